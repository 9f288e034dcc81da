"""Frames to messages: by their shape if they have one of the known ones, else by unpickling them.

The few messages that make up nearly all traffic (loads and their replies, stores, invalidations, and
replies that are a tid or nothing) have a fixed shape, apart from one record of any length.  They are
written by joining constant pieces of pickle, and read by comparing with them, which is both faster
than pickling and exact: a message that matches is that message.  All others go through `pickles`.

Each shape has a module, or a place in one, where what writes it stands before what reads it.  Whoever reads
compares all bytes but the variable ones, and returns None if they differ.  What an id or a length can be is
looked at, too: not each of their many possible forms is known there.
"""

from typing import Any

from zeo.errors import ProtocolError
from zeo.wire import pickles
from zeo.wire.announcements import info_of
from zeo.wire.announcements import invalidation_of
from zeo.wire.chunks import download_of
from zeo.wire.chunks import upload_of
from zeo.wire.commits import step_of
from zeo.wire.commits import store_of
from zeo.wire.framing import Payload
from zeo.wire.loads import load_message_of
from zeo.wire.messages import FromClient
from zeo.wire.messages import FromServer
from zeo.wire.messages import is_heartbeat
from zeo.wire.opcodes import pickled_int
from zeo.wire.replies import reply_of
from zeo.wire.stores import commit_of
from zeo.wire.stores import stores_of


def decode_from_client(data: Payload) -> FromClient:
    """Read a client's message; raises `ProtocolError`."""
    message = (step_of(data) or commit_of(data) or store_of(data) or stores_of(data) or upload_of(data)
               or load_message_of(data))
    if message is not None:
        return message
    any_id, flag, name, args = _four(pickles.load_from_client(_whole(data)))
    if type(any_id) is int:
        message_id = pickled_int(any_id)
    else:
        try:
            message_id = pickles.dumps(any_id)[2:-1]
        except Exception:
            raise ProtocolError('a message whose id cannot be sent back') from None
    if not isinstance(args, (tuple, list)):
        if not is_heartbeat(message_id):
            raise ProtocolError('a message whose arguments are not a sequence')
        args = ()
    return message_id, bool(flag), name, tuple(args)


def decode_from_server(data: Payload) -> FromServer:
    """Read a server's message; raises `ProtocolError`."""
    message = reply_of(data) or invalidation_of(data) or info_of(data) or download_of(data)
    if message is not None:
        return message
    message_id, flag, name, args = _four(pickles.load_from_server(_whole(data)))
    if not isinstance(message_id, int) or not isinstance(flag, int):
        raise ProtocolError('a message whose id or flag is not a number')
    return message_id, flag, name, args


def _whole(data: Payload) -> bytes | bytearray:
    return bytes(data) if type(data) is memoryview else data


def _four(message: Any) -> tuple[Any, Any, str, Any]:
    if not isinstance(message, (tuple, list)) or len(message) != 4:
        raise ProtocolError('a message that does not have four fields')
    message_id, flag, name, args = message
    if not isinstance(name, str):
        raise ProtocolError('a message whose name is not text')
    return message_id, flag, name, args
