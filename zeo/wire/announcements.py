"""What a server announces: the objects that a transaction has changed, the size of the storage."""

import re
from collections.abc import Sequence
from struct import Struct

from zeo.wire.framing import Frame
from zeo.wire.framing import Payload
from zeo.wire.framing import frame
from zeo.wire.messages import END
from zeo.wire.messages import IS_NOTICE
from zeo.wire.messages import START
from zeo.wire.messages import FromServer
from zeo.wire.messages import notice
from zeo.wire.opcodes import EIGHT
from zeo.wire.opcodes import pickled_int
from zeo.wire.opcodes import pickled_text

_IS_INVALIDATION = START + IS_NOTICE + pickled_text('invalidateTransaction') + EIGHT
_INVALIDATED = len(_IS_INVALIDATION) + 8
_ENDS_INVALIDATION = b'e\x86' + END
_ENDS_SINGLE = b'a\x86' + END
_join_oids = EIGHT.join  # bound here: Python looks for methods of what is imported in a slower way
_each_oid = Struct('<2s8s').iter_unpack
_of_one_object = Struct(f'<{len(_IS_INVALIDATION)}s8s4s8s4s')


def invalidation_notice(tid: bytes, oids: Sequence[bytes]) -> Frame:
    """``invalidateTransaction(tid, oids)``."""
    if len(tid) != 8 or set(map(len, oids)) != {8}:
        return notice('invalidateTransaction', (tid, list(oids)))
    return frame(_IS_INVALIDATION + tid + b'](' + EIGHT, _join_oids(oids), _ENDS_INVALIDATION)


def invalidation_of(data: Payload) -> FromServer | None:
    """``invalidateTransaction``."""
    if len(data) == _of_one_object.size:
        name, tid, between, oid, end = _of_one_object.unpack(data)
        if name == _IS_INVALIDATION and between == b'](' + EIGHT and end == _ENDS_INVALIDATION:
            return 0, 1, 'invalidateTransaction', (tid, [oid])
    at = _INVALIDATED
    if data[:at - 8] != _IS_INVALIDATION:
        return None
    data = bytes(data)
    if data[at:at + 2] == b'](' and data[-4:] == _ENDS_INVALIDATION:
        pickled = data[at + 2:-4]
    elif data[at:at + 1] == b']' and data[-4:] == _ENDS_SINGLE and len(data) == at + 15:
        pickled = data[at + 1:-4]
    else:
        return None
    if len(pickled) % 10:
        return None
    oids = [oid for code, oid in _each_oid(pickled) if code == EIGHT]
    if len(oids) * 10 != len(pickled):
        return None
    return 0, 1, 'invalidateTransaction', (data[at - 8:at], oids)


_IS_INFO = START + IS_NOTICE + pickled_text('info') + b'}(' + pickled_text('length')
_SIZE = pickled_text('size')
_ENDS_INFO = b'u\x85' + END
_LONGEST_INFO = len(_IS_INFO) + len(_SIZE) + 10 + len(_ENDS_INFO)


def info_notice(length: int, size: int) -> Frame:
    """``info({'length': length, 'size': size})``."""
    if type(length) is type(size) is int:
        return frame(_IS_INFO + pickled_int(length) + _SIZE, pickled_int(size), _ENDS_INFO)
    return notice('info', ({'length': length, 'size': size},))


_KNOWN_SIZES = re.compile(
    re.escape(_IS_INFO) + rb'(?:K(.)|J(....))' + re.escape(_SIZE) + rb'(?:K(.)|J(....))' + re.escape(_ENDS_INFO),
    re.DOTALL).fullmatch


def info_of(data: Payload) -> FromServer | None:
    """``info`` with small sizes."""
    if len(data) > _LONGEST_INFO:
        return None
    sizes = _KNOWN_SIZES(data)
    if sizes is None:
        return None
    short_length, length, short_size, size = sizes.groups()
    return 0, 1, 'info', ({
        'length': short_length[0] if short_length else int.from_bytes(length, 'little', signed=True),
        'size': short_size[0] if short_size else int.from_bytes(size, 'little', signed=True)},)
