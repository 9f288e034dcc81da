"""Many stores in one message: what is told of each in one row, and all the records in another.

Of each object there are its oid and the serial of the revision that was changed, 8 bytes each, and the length
of its record as four bytes, unsigned and big-endian.  So the two sides have next to nothing to do for each.
"""

from collections.abc import Sequence
from struct import Struct
from struct import error as StructError

from zeo.wire.commits import store_tail
from zeo.wire.framing import HEADER
from zeo.wire.framing import Frame
from zeo.wire.framing import Payload
from zeo.wire.messages import ENDS_TUPLE
from zeo.wire.messages import IS_NOTICE
from zeo.wire.messages import NO_ID
from zeo.wire.messages import START
from zeo.wire.messages import START_NUMBER
from zeo.wire.messages import FromClient
from zeo.wire.messages import request
from zeo.wire.opcodes import length4
from zeo.wire.opcodes import length4_at
from zeo.wire.opcodes import pickled_int
from zeo.wire.opcodes import pickled_text

HEAD = Struct('>8s8sI')
assert HEAD.size == 20

#: So many stores, and bytes of records, one message may have: each store takes memory before it can be counted.
MOST, MOST_BYTES = 2**16, 16 * 1024 * 1024

#: What is stored: oid, serial, record.
Store = tuple[bytes, bytes, bytes]

#: How an oid begins that leaves no room for later ones.
_LAST_OIDS = b'\xff\xff\xff\xff'


class Batch:
    """Stores that wait to be sent together; ``size`` is how many bytes of records they have."""

    __slots__ = ('size', '_heads', '_records')

    def __init__(self) -> None:
        self.size = 0
        self._heads: list[bytes] = []
        self._records: list[bytes] = []

    def add(self, oid: bytes, serial: bytes, record: bytes) -> int:
        """One more, with ids of 8 bytes each; returns `size`."""
        length = len(record)
        self._heads.append(HEAD.pack(oid, serial, length))
        self._records.append(record)
        self.size += length
        return self.size

    def take(self) -> tuple[bytes, list[bytes]]:
        """All heads, and the records; then it is empty."""
        heads, records = b''.join(self._heads), self._records
        self._heads, self._records, self.size = [], [], 0
        return heads, records

    def __bool__(self) -> bool:
        return bool(self._heads)


def unpack(heads: bytes, records: bytes) -> list[Store]:
    """What is stored; `TypeError` or `ValueError` if a store like that would not be taken singly, either."""
    if type(heads) is not bytes or type(records) is not bytes or len(heads) % HEAD.size:
        raise TypeError('stores are rows of bytes')
    if len(heads) > MOST * HEAD.size or len(records) > MOST_BYTES:
        raise ValueError(f'more than {MOST} stores, or {MOST_BYTES} bytes, in one message')
    stores = []
    at = 0
    for oid, serial, length in HEAD.iter_unpack(heads):
        if not length:
            raise ValueError('a record is never empty')
        if oid >= _LAST_OIDS:
            raise ValueError('an oid that leaves no room for later ones')
        stores.append((oid, serial, records[at:at + length]))
        at += length
    if at != len(records):
        raise ValueError('stores whose lengths are not those of their records')
    return stores


# ---- the messages

_header = HEADER.pack

_IS_STORES = START + IS_NOTICE + pickled_text('stores') + b'(B'
_IS_COMMIT = b'\x89' + pickled_text('commit') + b'('
_pack_commit = Struct(f'<4si{len(_IS_COMMIT)}ssis').pack
_commit_head = Struct(f'<3s5s{len(_IS_COMMIT)}sBis').unpack_from
_COMMIT_ROWS = 3 + 5 + len(_IS_COMMIT) + 6  # where the first of four begins


def stores_notice(heads: bytes, records: Sequence[bytes], transaction_id: int) -> Frame:
    """``stores(heads, records, transaction_id)``, where the records are still to be joined."""
    size = sum(map(len, records))
    tail = pickled_int(transaction_id) + ENDS_TUPLE
    head = b'%b%b%bB%b' % (_IS_STORES, length4(len(heads)), heads, length4(size))
    return (b''.join((_header(len(head) + size + len(tail)), head, *records, tail)),)


def commit_request(message_id: int, transaction_id: int, tell_tid: bool, user: bytes, description: bytes,
                   heads: bytes, records: Sequence[bytes]) -> Frame:
    """``commit(transaction_id, tell_tid, user, description, heads, records)``; they are still to be joined."""
    size = sum(map(len, records))
    try:
        start = _pack_commit(START_NUMBER, message_id, _IS_COMMIT, b'J', transaction_id,
                             b'\x88' if tell_tid else b'\x89')
    except StructError:  # the ids are long ones, or others
        return request(message_id, 'commit', (transaction_id, tell_tid, user, description, heads, b''.join(records)))
    head = b'%bB%b%bB%b%bB%b%bB%b' % (start, length4(len(user)), user, length4(len(description)), description,
                                      length4(len(heads)), heads, length4(size))
    return (b''.join((_header(len(head) + size + len(ENDS_TUPLE)), head, *records, ENDS_TUPLE)),)


def _rows(data: bytes, at: int, count: int, end: int) -> list[bytes] | None:
    """So many bytes objects that are pickled one after the other, from ``at`` just to ``end``."""
    rows = []
    for _ in range(count):
        if at + 5 > end or data[at] != 0x42:
            return None
        start = at + 5
        at = start + length4_at(data, at + 1)[0]
        rows.append(data[start:at])
    return rows if at == end else None


def stores_of(data: Payload) -> FromClient | None:
    """``stores``."""
    at = len(_IS_STORES)
    if data[:at] != _IS_STORES or len(data) < at + 8:
        return None
    data = bytes(data)
    code, transaction_id, ending = store_tail(data, len(data) - 8)
    rows = _rows(data, at - 1, 2, len(data) - 8)
    if rows is None or code != 0x4a or ending != ENDS_TUPLE:
        return None
    return NO_ID, True, 'stores', (*rows, transaction_id)


def commit_of(data: Payload) -> FromClient | None:
    """``commit``: a small transaction as a whole."""
    if len(data) < _COMMIT_ROWS or data[8:8 + len(_IS_COMMIT)] != _IS_COMMIT:
        return None
    data = bytes(data)
    start, message_id, _, code, transaction_id, tell_tid = _commit_head(data)
    rows = _rows(data, _COMMIT_ROWS, 4, len(data) - 3)
    if (rows is None or start != START or message_id[0] != 0x4a or code != 0x4a or data[-3:] != ENDS_TUPLE
            or tell_tid not in (b'\x88', b'\x89')):
        return None
    return message_id, False, 'commit', (transaction_id, tell_tid == b'\x88', *rows)
