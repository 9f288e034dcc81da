"""Replies of fixed shape: the result of a load or of a vote, some bytes, None, or an empty list."""

from struct import Struct

from zeo.wire.framing import HEADER
from zeo.wire.framing import JOIN_UP_TO
from zeo.wire.framing import Frame
from zeo.wire.framing import Payload
from zeo.wire.framing import frame
from zeo.wire.messages import END
from zeo.wire.messages import ENDS_TUPLE
from zeo.wire.messages import IS_NOTICE
from zeo.wire.messages import IS_REPLY
from zeo.wire.messages import REPLY
from zeo.wire.messages import START
from zeo.wire.messages import START_NUMBER
from zeo.wire.messages import VOTED
from zeo.wire.messages import FromServer
from zeo.wire.messages import PickledId
from zeo.wire.messages import reply
from zeo.wire.opcodes import EIGHT
from zeo.wire.opcodes import length4
from zeo.wire.opcodes import length4_at

_header = HEADER.pack

_REPLY_HEADS = {code: (layout.size, layout.unpack_from) for code, layout in [
    (0x4b, Struct('<3sxB13s')), (0x4d, Struct('<3sxH13s')), (0x4a, Struct('<3sxi13s'))]}
_CURRENT = b'N\x87' + END
_FORMER = b'\x87' + END
_current_tail = Struct('<2s8s4s').unpack_from

# What nearly all replies are: to a request of zeo's, a current revision of more than 255 bytes.
_IS_RECORD = IS_REPLY + b'B'
_record_head = Struct('<4si14sI').unpack_from
_former_tail = Struct('<2s8s2s8s3s').unpack_from

# And what ends the two steps of a commit: a tid, alone or after an empty list.
_IS_TID = IS_REPLY + EIGHT
_tid_alone = Struct(f'<4si{len(_IS_TID)}s8s2s')
_IS_VOTE = IS_REPLY + VOTED
_tid_told = Struct(f'<4si{len(_IS_VOTE)}s8s3s')


def load_reply(message_id: PickledId, record: bytes, start: bytes, end: bytes | None) -> Frame:
    """The reply ``(record, start, end)`` to ``loadBefore``; a long record is not copied."""
    try:
        if type(record) is bytes and len(start) == 8 and (end is None or len(end) == 8):
            length = len(record)
            head = (START + message_id + IS_REPLY
                    + (b'B' + length4(length) if length > 255 else b'C%c' % length))
            tail = EIGHT + start + _CURRENT if end is None else EIGHT + start + EIGHT + end + _FORMER
            whole = len(head) + length + len(tail)
            if whole <= JOIN_UP_TO:  # without another call
                return (b''.join((_header(whole), head, record, tail)),)
            return frame(head, record, tail)
    except Exception:
        pass  # an unusual storage, or too long
    return reply(message_id, (record, start, end))


def reply_of(data: Payload) -> FromServer | None:
    """A reply that is the result of a load or a vote, some bytes, None, or an empty list."""
    size = len(data)
    if size > 40:
        start, message_id, is_record, length = _record_head(data)
        if is_record == _IS_RECORD and start == START_NUMBER and size == length + 40:
            code8, tid, rest = _current_tail(data, length + 26)
            if code8 == EIGHT and rest == _CURRENT:
                record = data[26:-14] if type(data) is bytes else bytes(memoryview(data)[26:-14])
                return message_id, 0, REPLY, (record, tid, None)
    elif size == _tid_alone.size:
        start, message_id, is_tid, tid, rest = _tid_alone.unpack(data)
        if is_tid == _IS_TID and start == START_NUMBER and rest == END:
            return message_id, 0, REPLY, tid
    elif size == _tid_told.size:
        start, message_id, is_vote, tid, rest = _tid_told.unpack(data)
        if is_vote == _IS_VOTE and start == START_NUMBER and rest == ENDS_TUPLE:
            return message_id, 0, REPLY, ([], tid)
    return None if data[3:6] == IS_NOTICE else _other_reply_of(data)


def _other_reply_of(data: Payload) -> FromServer | None:
    if len(data) < 23:  # the longest head and one byte more
        return None
    head = _REPLY_HEADS.get(data[3])
    if head is None:
        return None
    at, unpack_from = head
    start, message_id, is_reply = unpack_from(data)
    if is_reply != IS_REPLY or start != START:
        return None
    code = data[at]
    if code == 0x42 and len(data) > at + 5:
        end = at + 5 + length4_at(data, at + 1)[0]
        at += 5
    elif code == 0x43:
        end = at + 2 + data[at + 1]
        at += 2
    elif code == 0x4e and data[at:] == b'Nt.':
        return message_id, 0, REPLY, None
    elif code == 0x5d and data[at:] == b']t.':
        return message_id, 0, REPLY, []
    else:
        return None
    left = len(data) - end
    if left == 14:
        code8, tid, rest = _current_tail(data, end)
        if code8 == EIGHT and rest == _CURRENT:
            record = data[at:end] if type(data) is bytes else bytes(memoryview(data)[at:end])
            return message_id, 0, REPLY, (record, tid, None)
    elif left == 23:
        code8, tid, between, end_tid, rest = _former_tail(data, end)
        if code8 == EIGHT and between == EIGHT and rest == _FORMER:
            record = data[at:end] if type(data) is bytes else bytes(memoryview(data)[at:end])
            return message_id, 0, REPLY, (record, tid, end_tid)
    elif left == 2 and data[end:] == END:
        return message_id, 0, REPLY, bytes(data[at:end])
    return None
