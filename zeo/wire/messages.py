"""Frames to messages and back: the handshake, the four fields of a message, the table of methods.

A message is the pickle of a 4-tuple ``(message id, flag, name, args)``.

The few messages that make up nearly all traffic (loads and their replies, stores, invalidations, and
replies that are a tid or nothing) have a fixed shape, apart from one record of any length.  They are
written by joining constant pieces of pickle, and read by comparing with them, which is both faster
than pickling and exact: a message that matches is that message.  All others go through `pickles`.

To a server a message id is an opaque value that it returns unchanged.  So the server's side keeps it
in the form in which it came, as a piece of pickle (`PickledId`), and puts that into the reply.
"""

import json
import pickle
import re
from collections.abc import Sequence
from struct import Struct
from typing import Any
from typing import NamedTuple

from zeo.errors import ProtocolError
from zeo.wire import faults
from zeo.wire import pickles
from zeo.wire.framing import Frame
from zeo.wire.framing import frame

#: The key in the answer to ``get_info`` under which a zeo server names what it can do beyond the
#: protocol, as a sequence of words.  Other clients do not look there and never see any of it.
#:
#: ``verify``
#:     ``verify(revisions)``: of many ``oid + tid`` (16 bytes each, joined) those oids whose current
#:     revision is another one (joined).
#: ``settle``
#:     ``vote(id, True)`` returns ``(usual result, tid)``; ``settle(tid, id)``, asked on a later
#:     connection, ends that transaction if it is still in doubt and says whether it is committed.
EXTENSIONS = 'zeo'

#: What a server says first, and what a client answers.
GREETING = b'Z5'

#: What a monitoring probe answers instead.
PROBE = b'ruok'

#: A pickled message id without the pickle's first and last opcodes.
PickledId = bytes

REPLY = '.reply'

#: The flag of a reply that carries an error.
ERROR = 2


def answer_to_greeting(greeting: bytes | bytearray) -> bytes | None:
    """What a client answers to a server's greeting; None if it cannot talk to that server."""
    encoding, version = greeting[:1], greeting[1:]
    if encoding == b'Z' and min(version, b'5') == b'5':
        return GREETING
    return None


def status_report(status: dict[str, dict[str, Any]]) -> bytes:
    """The answer to a probe: the status of each storage, by name."""
    return json.dumps(status).encode('ascii')


# ---- pieces of pickle ------------------------------------------------------------

_int4 = Struct('<i').pack
_length4 = Struct('<I').pack


def _pickled_bytes_head(length: int) -> bytes:
    return b'C%c' % length if length < 256 else b'B' + _length4(length)


def _pickled_int(value: int) -> bytes:
    if 0 <= value < 256:
        return b'K%c' % value
    if 0 <= value < 2**31:
        return b'J' + _int4(value)
    return pickle.dumps(value, pickles.PICKLE_PROTOCOL)[2:-1]


def _pickled_text(text: str) -> bytes:
    encoded = text.encode()
    return b'X' + _length4(len(encoded)) + encoded


_INT = rb'(K.|M..|J....|\x8a\x05.{5}|\x8a\x06.{6}|\x8a\x07.{7}|\x8a\x08.{8})'
_8 = rb'C\x08(.{8})'
_BYTES_HEAD = rb'(?:C(.)|B(....))'

_IS_REPLY = b'K\x00' + _pickled_text(REPLY)
_IS_ERROR = b'K\x02' + _pickled_text(REPLY)
_HEARTBEAT_ID = b'J\xff\xff\xff\xff'


def _int_of(piece: bytes) -> int:
    return int.from_bytes(piece[2 if piece[0] == 0x8a else 1:], 'little', signed=piece[0] not in b'KM')


def _pattern(*parts: bytes) -> re.Pattern[bytes]:
    return re.compile(b''.join(parts), re.DOTALL)


def _record_at(data: bytes | bytearray, start: int, short: bytes | None, long: bytes | None) -> int:
    """Where the record that starts at ``start`` ends."""
    if short is not None:
        return start + short[0]
    assert long is not None
    return start + int.from_bytes(long, 'little')


def _cut(data: bytes | bytearray, start: int, end: int) -> bytes:
    return data[start:end] if type(data) is bytes else bytes(memoryview(data)[start:end])


# ---- any message -------------------------------------------------------------------

HEARTBEAT: Frame = frame(b'\x80\x03(' + _HEARTBEAT_ID + _IS_REPLY + b'Nt.')


def request(message_id: int, name: str, args: Sequence[Any] = ()) -> Frame:
    """A request that wants a reply with the same id.  Raises what `pickle.dumps` raises."""
    return frame(b'\x80\x03(' + _pickled_int(message_id) + b'\x89' + _pickled_text(name)
                 + pickles.dumps(tuple(args))[2:-1] + b't.')


def notice(name: str, args: Sequence[Any] = ()) -> Frame:
    """A one-way message.  Raises what `pickle.dumps` raises."""
    return frame(b'\x80\x03(K\x00\x88' + _pickled_text(name)
                 + pickles.dumps(tuple(args))[2:-1] + b't.')


def reply(message_id: PickledId, result: Any) -> Frame:
    """A reply; an error reply if the result cannot be pickled."""
    try:
        pickled = pickles.dumps(result)[2:-1]
    except Exception:  # an application's or a storage's objects may raise anything
        return error_reply(message_id, ValueError("Couldn't pickle response"))
    return frame(b'\x80\x03(' + message_id + _IS_REPLY + pickled + b't.')


def error_reply(message_id: PickledId, error: BaseException) -> Frame:
    """A reply that carries an error; if that cannot be pickled, a `ValueError` that says so."""
    try:
        pickled = pickles.dumps(faults.describe(error))[2:-1]
    except Exception:
        pickled = pickles.dumps(faults.describe(ValueError("Couldn't pickle response")))[2:-1]
    return frame(b'\x80\x03(' + message_id + _IS_ERROR + pickled + b't.')


class FromClient(NamedTuple):
    """A message as a server reads it."""

    id: PickledId
    oneway: bool
    name: str
    args: tuple[Any, ...]


class FromServer(NamedTuple):
    """A message as a client reads it; ``args`` of a reply is the result or the error's description."""

    id: Any
    flag: int
    name: str
    args: Any


def is_heartbeat(message_id: PickledId) -> bool:
    """Whether a client's message has the id that asks for no answer whatsoever."""
    return message_id == _HEARTBEAT_ID


def decode_from_client(data: bytes | bytearray) -> FromClient:
    """Read a client's message; raises `ProtocolError`."""
    match = _LOAD(data)
    if match is not None:
        message_id, oid, tid = match.groups()
        return FromClient(message_id, False, 'loadBefore', (oid, tid))
    match = _STORE_HEAD(data)
    if match is not None:
        oid, serial, short, long = match.groups()
        start = match.end()
        end = _record_at(data, start, short, long)
        match = _STORE_TAIL(data, end)
        if match is not None:
            return FromClient(b'K\x00', True, 'storea',
                              (oid, serial, _cut(data, start, end), _int_of(match.group(1))))
    message_id, flag, name, args = _four(data)
    try:
        args = tuple(args)
    except TypeError:
        raise ProtocolError('a message whose arguments are not a sequence') from None
    return FromClient(pickles.dumps(message_id)[2:-1], bool(flag), name, args)


def decode_from_server(data: bytes | bytearray) -> FromServer:
    """Read a server's message; raises `ProtocolError`."""
    match = _LOAD_REPLY_HEAD(data)
    if match is not None:
        message_id, short, long = match.groups()
        start = match.end()
        end = _record_at(data, start, short, long)
        match = _LOAD_REPLY_TAIL(data, end)
        if match is not None:
            return FromServer(_int_of(message_id), 0, REPLY, (_cut(data, start, end), *match.groups()))
        match = _TID_REPLY(data)
        if match is not None:
            return FromServer(_int_of(match.group(1)), 0, REPLY, match.group(2))
    match = _INVALIDATION(data)
    if match is not None:
        tid, pickled = match.groups()
        return FromServer(0, 1, 'invalidateTransaction',
                          (tid, [pickled[at:at + 8] for at in range(2, len(pickled), 10)]))
    message = FromServer(*_four(data))
    if not isinstance(message.flag, int):
        raise ProtocolError('a message whose flag is not a number')
    return message


def _four(data: bytes | bytearray) -> tuple[Any, Any, str, Any]:
    message = pickles.loads(data)
    if not isinstance(message, (tuple, list)) or len(message) != 4:
        raise ProtocolError('a message that does not have four fields')
    message_id, flag, name, args = message
    if not isinstance(name, str):
        raise ProtocolError('a message whose name is not text')
    return message_id, flag, name, args


# ---- the messages of fixed shape -----------------------------------------------------

_LOAD_ARGS = _pickled_text('loadBefore')
_LOAD = _pattern(rb'\x80\x03\((C\x08.{8}C\x08.{8}\x86|', _INT[1:], rb'(?:\x89|K\x00)',
                 re.escape(_LOAD_ARGS), _8, _8, rb'\x86t\.').fullmatch

_STORE = b'\x80\x03(K\x00\x88' + _pickled_text('storea') + b'('
_STORE_HEAD = _pattern(re.escape(_STORE), _8, _8, _BYTES_HEAD).match
_STORE_TAIL = _pattern(_INT, rb'tt\.').fullmatch

_LOAD_REPLY_HEAD = _pattern(rb'\x80\x03\(', _INT, re.escape(_IS_REPLY), _BYTES_HEAD).match
_LOAD_REPLY_TAIL = _pattern(_8, rb'(?:N|C\x08(.{8}))\x87t\.').fullmatch
_TID_REPLY = _pattern(rb'\x80\x03\(', _INT, re.escape(_IS_REPLY), _8, rb't\.').fullmatch

_BLOB_CHUNK = b'\x80\x03(K\x00\x88' + _pickled_text('receiveBlobChunk')

_INVALIDATE = b'\x80\x03(K\x00\x88' + _pickled_text('invalidateTransaction')
_INVALIDATION = _pattern(re.escape(_INVALIDATE), _8, rb'\]\(((?:C\x08.{8})*)e\x86t\.').fullmatch


def load_request(message_id: int, oid: bytes, tid: bytes) -> Frame:
    """``loadBefore(oid, tid)``."""
    return frame(b'\x80\x03(' + _pickled_int(message_id) + b'\x89' + _LOAD_ARGS
                 + b'C\x08' + oid + b'C\x08' + tid + b'\x86t.')


def load_reply(message_id: PickledId, record: bytes, start: bytes, end: bytes | None) -> Frame:
    """The reply ``(record, start, end)`` to ``loadBefore``; a long record is not copied."""
    return frame(b'\x80\x03(' + message_id + _IS_REPLY + _pickled_bytes_head(len(record)), record,
                 b'C\x08' + start + (b'N\x87t.' if end is None else b'C\x08' + end + b'\x87t.'))


def store_notice(oid: bytes, serial: bytes, record: bytes, transaction_id: int) -> Frame:
    """``storea(oid, serial, record, transaction_id)``; a long record is not copied."""
    return frame(_STORE + b'C\x08' + oid + b'C\x08' + serial + _pickled_bytes_head(len(record)),
                 record, _pickled_int(transaction_id) + b'tt.')


def blob_chunk_notice(oid: bytes, tid: bytes, data: bytes) -> Frame:
    """``receiveBlobChunk(oid, tid, data)``; a long piece is not copied."""
    return frame(_BLOB_CHUNK + b'C\x08' + oid + b'C\x08' + tid + _pickled_bytes_head(len(data)),
                 data, b'\x87t.')


def invalidation_notice(tid: bytes, oids: Sequence[bytes]) -> Frame:
    """``invalidateTransaction(tid, oids)``."""
    return frame(_INVALIDATE + b'C\x08' + tid + b']('
                 + b''.join([b'C\x08' + oid for oid in oids]) + b'e\x86t.')


# ---- the table of methods ------------------------------------------------------------

class Method(NamedTuple):
    """A method that clients may call: how many arguments it takes, and whether it changes data."""

    least: int
    most: int
    writes: bool = False


METHODS: dict[str, Method] = {
    # session
    'register': Method(2, 2),
    'get_info': Method(0, 0),
    'lastTransaction': Method(0, 0),
    'ping': Method(0, 0),
    'set_client_label': Method(1, 1),
    'getInvalidations': Method(1, 1),
    'server_status': Method(0, 0),
    # loading
    'loadBefore': Method(2, 2),
    'loadSerial': Method(2, 2),
    'getTid': Method(1, 1),
    'history': Method(1, 2),
    'record_iternext': Method(0, 1),
    # two-phase commit
    'new_oids': Method(0, 1, writes=True),
    'tpc_begin': Method(4, 6, writes=True),
    'storea': Method(4, 4),
    'checkCurrentSerialInTransaction': Method(3, 3),
    'deleteObject': Method(3, 3),
    'undoa': Method(2, 2),
    'restorea': Method(5, 5),
    'vote': Method(1, 2),
    'tpc_finish': Method(1, 1),
    'tpc_abort': Method(1, 1),
    # undo information, packing
    'undoInfo': Method(0, 3),
    'undoLog': Method(0, 2),
    'pack': Method(1, 2),
    # blobs
    'storeBlobStart': Method(0, 0),
    'storeBlobChunk': Method(1, 1),
    'storeBlobEnd': Method(4, 4),
    'storeBlobShared': Method(5, 5),
    'sendBlob': Method(2, 2),
    # iteration
    'iterator_start': Method(2, 2),
    'iterator_next': Method(1, 1),
    'iterator_record_start': Method(2, 2),
    'iterator_record_next': Method(1, 1),
    'iterator_gc': Method(1, 1),
    # extensions, see `EXTENSIONS`
    'verify': Method(1, 1),
    'settle': Method(2, 2),
}
