"""The steps of a commit: the store of an object, the vote, the end."""

from struct import Struct
from struct import error as StructError

from zeo.wire.framing import HEADER
from zeo.wire.framing import Frame
from zeo.wire.framing import Payload
from zeo.wire.framing import frame
from zeo.wire.messages import END
from zeo.wire.messages import ENDS_TUPLE
from zeo.wire.messages import IS_NOTICE
from zeo.wire.messages import NO_ID
from zeo.wire.messages import START
from zeo.wire.messages import FromClient
from zeo.wire.messages import notice
from zeo.wire.messages import request
from zeo.wire.opcodes import EIGHT
from zeo.wire.opcodes import INTS
from zeo.wire.opcodes import length4
from zeo.wire.opcodes import length4_at
from zeo.wire.opcodes import pickled_int
from zeo.wire.opcodes import pickled_text

_IS_STORE = START + IS_NOTICE + pickled_text('storea') + b'(' + EIGHT
_store_head = Struct(f'<{len(_IS_STORE)}s8s2s8s').unpack_from
_STORE_RECORD = len(_IS_STORE) + 18
store_tail = Struct('<Bi3s').unpack_from  # an id with its opcode, and the end
_int_of_size = INTS.get  # bound here: Python looks for methods of what is imported in a slower way


def store_notice(oid: bytes, serial: bytes, record: bytes, transaction_id: int) -> Frame:
    """``storea(oid, serial, record, transaction_id)``; a long record is not copied."""
    if type(record) is not bytes or len(oid) != 8 or len(serial) != 8:
        return notice('storea', (oid, serial, record, transaction_id))
    length = len(record)
    return frame(
        _IS_STORE + oid + EIGHT + serial
        + (b'B' + length4(length) if length > 255 else b'C%c' % length),
        record,
        pickled_int(transaction_id) + ENDS_TUPLE)


def store_of(data: Payload) -> FromClient | None:
    """``storea``."""
    at = _STORE_RECORD
    if len(data) < at + 5:
        return None
    name, oid, between, serial = _store_head(data)
    if name != _IS_STORE or between != EIGHT:
        return None
    code = data[at]
    if code == 0x42:
        end = at + 5 + length4_at(data, at + 1)[0]
        at += 5
    elif code == 0x43:
        end = at + 2 + data[at + 1]
        at += 2
    else:
        return None
    if len(data) - end == 8:
        code, transaction_id, ending = store_tail(data, end)
        if code != 0x4a or ending != ENDS_TUPLE:
            return None
    else:
        tail = data[end:]
        size = len(tail)
        if size < 5 or tail[-3:] != ENDS_TUPLE:
            return None
        if tail[0] == _int_of_size(size - 3):
            transaction_id = int.from_bytes(tail[1:-3], 'little')
        elif tail[0] == 0x8a and tail[1] == size - 5:  # ZEO's transactions have long ids
            transaction_id = int.from_bytes(tail[2:-3], 'little', signed=True)
        else:
            return None
    record = data[at:end] if type(data) is bytes else bytes(memoryview(data)[at:end])
    return NO_ID, True, 'storea', (oid, serial, record, transaction_id)


#: What asks for a vote or ends a transaction, by its length.  The transaction's id is the argument, or the
#: first of two.
_STEPS = {layout.size: (layout.unpack, head, tail, name, more) for name, head, tail, more, layout in [
    (name, head, tail, more, Struct(f'<3s5s{len(head)}sBi{len(tail)}s'))
    for name, head, tail, more in [
        *((name, b'\x89' + pickled_text(name), b'\x85' + END, ())
          for name in ('vote', 'tpc_finish', 'tpc_abort')),
        ('vote', b'\x89' + pickled_text('vote') + b'(', b'\x88t' + END, (True,))]]}
assert len(_STEPS) == 4


def step_of(data: Payload) -> FromClient | None:
    """``vote``, ``tpc_finish``, or ``tpc_abort``."""
    form = _STEPS.get(len(data))
    if form is not None:
        unpack, head, tail, name, more = form
        start, message_id, is_it, code, transaction_id, end = unpack(data)
        if is_it == head and start == START and message_id[0] == code == 0x4a and end == tail:
            return message_id, False, name, (transaction_id, *more)
    return None


_IS_FINISH = b'\x89' + pickled_text('tpc_finish') + b'J'
_ENDS_FINISH = b'\x85' + END
_FINISH_REQUEST = Struct(f'<8si{len(_IS_FINISH)}si3s')  # header and start, id, request, transaction, end
_FINISH_REQUEST_START = HEADER.pack(_FINISH_REQUEST.size - HEADER.size) + START + b'J'


def finish_request(message_id: int, transaction_id: object) -> Frame:
    """``tpc_finish(transaction_id)``."""
    if type(transaction_id) is int:
        try:
            return (_FINISH_REQUEST.pack(_FINISH_REQUEST_START, message_id, _IS_FINISH, transaction_id, _ENDS_FINISH),)
        except StructError:
            pass  # long ones
    return request(message_id, 'tpc_finish', (transaction_id,))
