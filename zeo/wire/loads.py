"""The request for a load."""

from struct import Struct
from struct import error as StructError

from zeo.wire.framing import HEADER
from zeo.wire.framing import Frame
from zeo.wire.framing import Payload
from zeo.wire.messages import END
from zeo.wire.messages import HEARTBEAT_ID
from zeo.wire.messages import START
from zeo.wire.messages import FromClient
from zeo.wire.messages import PickledId
from zeo.wire.messages import request
from zeo.wire.opcodes import EIGHT
from zeo.wire.opcodes import INTS
from zeo.wire.opcodes import pickled_text

_IS_LOAD = b'\x89' + pickled_text('loadBefore') + EIGHT
_ENDS_LOAD = b'\x86' + END

_LOAD_REQUEST = Struct('<8si18s8s2s8s3s')  # header and start, id, request, oid, opcode, tid, end
assert len(_IS_LOAD) == 18
_LOAD_REQUEST_START = HEADER.pack(_LOAD_REQUEST.size - HEADER.size) + START + b'J'
_pack_load = _LOAD_REQUEST.pack
_int_of_size = INTS.get  # bound here: Python looks for methods of what is imported in a slower way

#: Zeo numbers its requests; ZEO uses ``(oid, tid)`` as the id of a load.
_LOAD_ID_SIZES = (*INTS, 21)
_LOADS = {layout.size: layout.unpack
          for layout in [Struct(f'<3s{size}s18s8s2s8s3s') for size in _LOAD_ID_SIZES]}


def load_request(message_id: int, oid: bytes, tid: bytes) -> Frame:
    """``loadBefore(oid, tid)``."""
    try:
        if len(oid) == 8 == len(tid):
            return (_pack_load(_LOAD_REQUEST_START, message_id, _IS_LOAD, oid, EIGHT, tid, _ENDS_LOAD),)
    except (TypeError, StructError):
        pass  # the id is a long one, or these are no bytes
    return request(message_id, 'loadBefore', (oid, tid))


def load_of(data: Payload) -> tuple[PickledId, bytes, bytes] | None:
    """Id, oid and tid if that is a load: what `decoding` finds, for those who are in a hurry."""
    unpack = _LOADS.get(len(data))
    if unpack is not None:
        start, message_id, name, oid, between, tid, end = unpack(data)
        if (name == _IS_LOAD and start == START and between == EIGHT and end == _ENDS_LOAD
                and message_id != HEARTBEAT_ID
                and (message_id[0] == _int_of_size(len(message_id))
                     or message_id == EIGHT + oid + EIGHT + tid + b'\x86')):
            return message_id, oid, tid
    return None


def load_message_of(data: Payload) -> FromClient | None:
    """The same as a message."""
    load = load_of(data)
    return None if load is None else (load[0], False, 'loadBefore', load[1:])
