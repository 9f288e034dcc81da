"""What a message is, and how any is written: the four fields.

A message is the pickle of a 4-tuple ``(message id, flag, name, args)``.  Those of fixed shape are written in
modules of their own, and all are read in `decoding`.

To a server a message id is an opaque value that it returns unchanged.  So the server's side keeps it
in the form in which it came, as a piece of pickle (`PickledId`), and puts that into the reply.
"""

import re
from collections.abc import Sequence
from typing import Any

from zeo.wire import faults
from zeo.wire import pickles
from zeo.wire.framing import Frame
from zeo.wire.framing import Payload
from zeo.wire.framing import frame
from zeo.wire.opcodes import EIGHT
from zeo.wire.opcodes import pickled_args
from zeo.wire.opcodes import pickled_bytes_head
from zeo.wire.opcodes import pickled_int
from zeo.wire.opcodes import pickled_text

#: A pickled message id without the pickle's first and last opcodes.
PickledId = bytes

#: A message as a server reads it: id, one-way or not, name, arguments.
FromClient = tuple[PickledId, bool, str, tuple[Any, ...]]

#: A message as a client reads it: id, flag, name, and the arguments, or the result of a reply, or the
#: description of its error.
FromServer = tuple[int, int, str, Any]

REPLY = '.reply'

START = b'\x80\x03('  # protocol 3, and the mark at which the four fields begin
END = b't.'
START_NUMBER = START + b'J'  # and an id as zeo's clients have it
ENDS_TUPLE = b't' + END  # of arguments

IS_NOTICE = b'K\x00\x88'
IS_REPLY = b'K\x00' + pickled_text(REPLY)
_IS_ERROR = b'K\x02' + pickled_text(REPLY)
VOTED = b'(]' + EIGHT  # what most votes are answered by, and a tid
NO_ID = pickled_int(0)
HEARTBEAT_ID = pickled_int(-1)

_COULD_NOT_PICKLE = ValueError("Couldn't pickle response")

HEARTBEAT: Frame = frame(START + HEARTBEAT_ID + IS_REPLY + b'N' + END)


def is_heartbeat(message_id: PickledId) -> bool:
    """Whether a client's message has the id that asks for no answer whatsoever."""
    return message_id == HEARTBEAT_ID


def request(message_id: int, name: str, args: Sequence[Any] = ()) -> Frame:
    """A request that wants a reply with the same id.  Raises what `pickles.dumps` raises."""
    return frame(START + pickled_int(message_id) + b'\x89' + pickled_text(name)
                 + pickled_args(args) + END)


def notice(name: str, args: Sequence[Any] = ()) -> Frame:
    """A one-way message.  Raises what `pickles.dumps` raises."""
    return frame(START + IS_NOTICE + pickled_text(name) + pickled_args(args) + END)


_BEGINS_REPLY = re.compile(
    rb'\x80[\x02\x03]\((?:K(.)|M(..)|J(....))(?:K[\x00\x02]|[\x88\x89])'
    rb'X\x06\x00\x00\x00\.reply', re.DOTALL).match


def answered_by(payload: Payload) -> int | None:
    """Which request, with a number for its id, a message answers that cannot be decoded, if one can tell."""
    begins = _BEGINS_REPLY(bytes(payload[:64]))
    return begins and int.from_bytes(begins[begins.lastindex or 0], 'little')


#: A server's sign of life, see `zeo.wire.methods.EXTENSIONS`.
PULSE: Frame = notice('pulse')


def reply(message_id: PickledId, result: Any) -> Frame:
    """A reply; an error reply if the result cannot be sent."""
    head = START + message_id + IS_REPLY
    try:
        if result is None:
            return frame(head + b'N' + END)
        if type(result) is bytes:
            return frame(head + pickled_bytes_head(len(result)), result, END)
        if type(result) is list and not result:
            return frame(head + b']' + END)
        if type(result) is tuple:
            if len(result) == 2 and result[0] == [] and type(result[1]) is bytes and len(result[1]) == 8:
                return frame(head + VOTED + result[1] + ENDS_TUPLE)  # by nearly every vote
            return frame(head + pickled_args(result) + END)
        return frame(head + pickles.dumps(result)[2:-1] + END)
    except Exception:  # an application's or a storage's objects may raise anything
        return error_reply(message_id, _COULD_NOT_PICKLE)


def error_reply(message_id: PickledId, error: BaseException) -> Frame:
    """A reply that carries an error; if that cannot be sent, a `ValueError` that says so."""
    try:
        described = pickles.dumps(faults.describe(error))
    except Exception:
        described = pickles.dumps(faults.describe(_COULD_NOT_PICKLE))
    return frame(START + message_id + _IS_ERROR + described[2:-1] + END)
