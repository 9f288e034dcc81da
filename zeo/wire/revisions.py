"""Many revisions in one message: what is told of each in one row, and all the records in another.

Of each object there are its oid, the tids at which its revision starts and ends, 8 bytes each, and the length of
the record as four bytes, unsigned and big-endian.  An end of zeros is none: the revision is current.  A length of
zero is no revision: about that object nothing is told, for whatever reason, and who wants to know has to ask for
it alone.
"""

from collections.abc import Sequence
from struct import Struct

from ZODB.utils import z64

from zeo.errors import ProtocolError
from zeo.wire.framing import HEADER
from zeo.wire.framing import Frame
from zeo.wire.messages import ENDS_TUPLE
from zeo.wire.messages import IS_NOTICE
from zeo.wire.messages import START
from zeo.wire.opcodes import EIGHT
from zeo.wire.opcodes import length4
from zeo.wire.opcodes import pickled_text

HEAD = Struct('>8s8s8sI')
assert HEAD.size == 28

#: So many objects one message may ask for.
MOST = 64

#: A message that tells has no more records when they have so many bytes together: others can then come between.
ENOUGH = 32 * 1024

#: Record, start, end.
Found = tuple[bytes, bytes, bytes | None]


def unpack(heads: bytes, records: bytes) -> list[tuple[bytes, Found | None]]:
    """Oid and revision of each, or None for what is not told.  Raises `ProtocolError`."""
    if type(heads) is not bytes or type(records) is not bytes or len(heads) % HEAD.size:
        raise ProtocolError('revisions are rows of bytes')
    revisions: list[tuple[bytes, Found | None]] = []
    at = 0
    for oid, start, end, length in HEAD.iter_unpack(heads):
        if length:
            begin, at = at, at + length
            revisions.append((oid, (records[begin:at], start, None if end == z64 else end)))
        else:
            revisions.append((oid, None))
    if at != len(records):
        raise ProtocolError('revisions whose lengths are not those of their records')
    return revisions


# ---- the message

_header = HEADER.pack

_IS_PREFETCHED = START + IS_NOTICE + pickled_text('prefetched') + b'(' + EIGHT


def prefetched_notice(tid: bytes, heads: Sequence[bytes], records: Sequence[bytes]) -> Frame:
    """``prefetched(tid, heads, records)``; both are still to be joined."""
    rows = b''.join(heads)
    size = sum(map(len, records))
    head = b'%b%bB%b%bB%b' % (_IS_PREFETCHED, tid, length4(len(rows)), rows, length4(size))
    return (b''.join((_header(len(head) + size + len(ENDS_TUPLE)), head, *records, ENDS_TUPLE)),)
