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
from struct import error as StructError
from typing import Any
from typing import NamedTuple

from zeo.errors import ProtocolError
from zeo.wire import faults
from zeo.wire import pickles
from zeo.wire.framing import HEADER
from zeo.wire.framing import JOIN_UP_TO
from zeo.wire.framing import Frame
from zeo.wire.framing import Payload
from zeo.wire.framing import frame

#: The key in the answer to ``get_info`` under which a zeo server names what it can do beyond the
#: protocol, as a sequence of words.  Other clients do not look there and never see any of it.
#:
#: ``restoreBlob``
#:     ``restoreBlobEnd(oid, tid, record, previous_tid, id)`` in place of ``storeBlobEnd``, and
#:     ``restoreBlobShared(oid, tid, record, previous_tid, filename, id)``: for copying transactions.
#: ``verify``
#:     ``verify(revisions)``: of many ``oid + tid`` (16 bytes each, joined) those oids whose current
#:     revision is another one (joined).
#: ``settle``
#:     ``vote(id, True)`` returns ``(usual result, tid)``; ``settle(tid, id)``, asked on a later
#:     connection, ends that transaction if it is still in doubt and says whether it is committed.  In place
#:     of a tid there may be other bytes; then the answer is the tid, or False.
#: ``pieces``
#:     Pieces of blobs may have up to `zeo.wire.pieces.LARGEST` bytes, and ``sendBlob(oid, tid, True)`` is
#:     answered in such; without that they have `zeo.server.blobs.CHUNK` bytes at most.
#: ``figures``
#:     ``figures()``: what `zeo.server.figures` tells of the server, as plain values; ``stop_pack()``:
#:     stop the pack in progress, if that is possible: whether it is.
#: ``stores``
#:     ``stores(heads, records, id)``, with what `zeo.wire.stores` puts there, in place of many ``storea``; and
#:     ``commit(id, tell_tid, user, description, heads, records)`` in place of ``tpc_begin``, stores, and
#:     ``vote(id, tell_tid)``, which it is answered like.  Who stores so is not sent ``info`` with the answer to
#:     ``tpc_finish``: it asks, with ``get_info``, when somebody wants to know the size.
#: ``prefetch``
#:     After the notice ``prefetch(oids, tid)``, with at most `zeo.wire.revisions.MOST` oids (joined), the server
#:     tells of each of them once, as ``loadBefore(oid, tid)`` would, by notices ``prefetched(tid, heads, records)``
#:     with what `zeo.wire.revisions` puts there.
#: ``pulse``
#:     After the notice ``pulse()`` the server gives a sign of life, the notice ``pulse()``, every
#:     `PULSE_INTERVAL` seconds unless it has something else to say; whatever its storages are busy with.
#:     The client has to give signs of life then, too (`HEARTBEAT`), every minute.
EXTENSIONS = 'zeo'

#: Seconds between two signs of life of a server.
PULSE_INTERVAL = 10.0

#: What a server says first, and what a client answers.
GREETING = b'Z5'

#: What a monitoring probe answers instead.
PROBE = b'ruok'

#: A pickled message id without the pickle's first and last opcodes.
PickledId = bytes

REPLY = '.reply'


#: The first byte of what a peer says that speaks TLS: an alert, or the handshake.
TLS_BEGINS_WITH = {21, 22}

#: What says in the clear that TLS is spoken here: a fatal alert (handshake_failure).
TLS_ALERT = bytes([21, 3, 1, 0, 2, 2, 40])


def looks_like_tls(first: bytes) -> bool:
    """Whether these first two bytes of a stream are those of TLS; no short frame begins with them."""
    return len(first) == 2 and first[0] in TLS_BEGINS_WITH and first[1] == 3


def answer_to_greeting(greeting: Payload) -> bytes | None:
    """What a client answers to a server's greeting; None if it cannot talk to that server."""
    encoding, version = bytes(greeting[:1]), bytes(greeting[1:])
    if encoding == b'Z' and min(version, b'5') == b'5':
        return GREETING
    return None


def status_report(status: dict[str, dict[str, Any]]) -> bytes:
    """The answer to a probe: the status of each storage, by name."""
    return json.dumps(status).encode('ascii')


# ---- pieces of pickle ------------------------------------------------------------

_START = b'\x80\x03('  # protocol 3, and the mark at which the four fields begin
_END = b't.'
_8 = b'C\x08'  # eight bytes follow: an oid or a tid

_int4 = Struct('<i').pack
_length4 = Struct('<I').pack
_length4_at = Struct('<I').unpack_from


def _pickled_bytes_head(length: int) -> bytes:
    return b'C%c' % length if length < 256 else b'B' + _length4(length)


def _pickled_int(value: int) -> bytes:
    if 0 <= value < 256:
        return b'K%c' % value
    if -2**31 <= value < 2**31:
        return b'J' + _int4(value)
    return pickle.dumps(value, pickles.PICKLE_PROTOCOL)[2:-1]


def _pickled_text(text: str) -> bytes:
    encoded = text.encode()
    return b'X' + _length4(len(encoded)) + encoded


def _pickled_args(args: Sequence[Any]) -> bytes:
    if not args:
        return b')'
    if len(args) == 1 and type(args[0]) is int:  # the id of a transaction, mostly
        return _pickled_int(args[0]) + b'\x85'
    pickled = [_pickled_plain(each) for each in args]
    if None in pickled:
        return pickles.dumps(tuple(args))[2:-1]
    return b'(%bt' % b''.join(pickled)  # type: ignore[arg-type]


def _pickled_plain(value: Any) -> bytes | None:
    """What nearly all arguments are, written without a memo: then no reader needs the long proof."""
    if value is None:
        return b'N'
    kind = type(value)
    if kind is int:
        return _pickled_int(value)
    if kind is bytes and len(value) < 2**31:
        return b'%b%b' % (_pickled_bytes_head(len(value)), value)
    if kind is str and value.isascii():
        return _pickled_text(value)
    if kind is bool:
        return b'\x88' if value else b'\x89'
    if kind is dict and not value:  # the extension of a transaction
        return b'}'
    if kind is list and not value:  # what most votes report
        return b']'
    return None


_IS_NOTICE = b'K\x00\x88'
_IS_REPLY = b'K\x00' + _pickled_text(REPLY)
_IS_ERROR = b'K\x02' + _pickled_text(REPLY)
_VOTED = b'(]' + _8
_ENDS_VOTED = b't' + _END
_NO_ID = _pickled_int(0)
_HEARTBEAT_ID = _pickled_int(-1)

_COULD_NOT_PICKLE = ValueError("Couldn't pickle response")


# ---- any message -------------------------------------------------------------------

HEARTBEAT: Frame = frame(_START + _HEARTBEAT_ID + _IS_REPLY + b'N' + _END)


def is_heartbeat(message_id: PickledId) -> bool:
    """Whether a client's message has the id that asks for no answer whatsoever."""
    return message_id == _HEARTBEAT_ID


def request(message_id: int, name: str, args: Sequence[Any] = ()) -> Frame:
    """A request that wants a reply with the same id.  Raises what `pickles.dumps` raises."""
    return frame(_START + _pickled_int(message_id) + b'\x89' + _pickled_text(name)
                 + _pickled_args(args) + _END)


def notice(name: str, args: Sequence[Any] = ()) -> Frame:
    """A one-way message.  Raises what `pickles.dumps` raises."""
    return frame(_START + _IS_NOTICE + _pickled_text(name) + _pickled_args(args) + _END)


_BEGINS_REPLY = re.compile(
    rb'\x80[\x02\x03]\((?:K(.)|M(..)|J(....))(?:K[\x00\x02]|[\x88\x89])'
    rb'X\x06\x00\x00\x00\.reply', re.DOTALL).match


def answered_by(payload: Payload) -> int | None:
    """Which request, with a number for its id, a message answers that cannot be decoded, if one can tell."""
    begins = _BEGINS_REPLY(bytes(payload[:64]))
    return begins and int.from_bytes(begins[begins.lastindex or 0], 'little')


#: A server's sign of life, see `EXTENSIONS`.
PULSE: Frame = notice('pulse')


def reply(message_id: PickledId, result: Any) -> Frame:
    """A reply; an error reply if the result cannot be sent."""
    head = _START + message_id + _IS_REPLY
    try:
        if result is None:
            return frame(head + b'N' + _END)
        if type(result) is bytes:
            return frame(head + _pickled_bytes_head(len(result)), result, _END)
        if type(result) is list and not result:
            return frame(head + b']' + _END)
        if type(result) is tuple:
            if len(result) == 2 and result[0] == [] and type(result[1]) is bytes and len(result[1]) == 8:
                return frame(head + _VOTED + result[1] + _ENDS_VOTED)  # by nearly every vote
            return frame(head + _pickled_args(result) + _END)
        return frame(head + pickles.dumps(result)[2:-1] + _END)
    except Exception:  # an application's or a storage's objects may raise anything
        return error_reply(message_id, _COULD_NOT_PICKLE)


def error_reply(message_id: PickledId, error: BaseException) -> Frame:
    """A reply that carries an error; if that cannot be sent, a `ValueError` that says so."""
    try:
        described = pickles.dumps(faults.describe(error))
    except Exception:
        described = pickles.dumps(faults.describe(_COULD_NOT_PICKLE))
    return frame(_START + message_id + _IS_ERROR + described[2:-1] + _END)


#: A message as a server reads it: id, one-way or not, name, arguments.
FromClient = tuple[PickledId, bool, str, tuple[Any, ...]]

#: A message as a client reads it: id, flag, name, and the arguments, or the result of a reply, or the
#: description of its error.
FromServer = tuple[int, int, str, Any]


def decode_from_client(data: Payload) -> FromClient:
    """Read a client's message; raises `ProtocolError`."""
    message = (_commit_of(data) or _whole_of(data) or _store_of(data) or _stores_of(data) or _upload_of(data)
               or _load_of(data))
    if message is not None:
        return message
    any_id, flag, name, args = _four(pickles.load_from_client(_whole(data)))
    if type(any_id) is int:
        message_id = _pickled_int(any_id)
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
    message = _reply_of(data) or _invalidation_of(data) or _info_of(data) or _download_of(data)
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


# ---- the messages of fixed shape -----------------------------------------------------
#
# Of each, what writes it stands before what reads it.  Whoever reads compares all bytes but the
# variable ones, and returns None if they differ.  What an id or a length can be is looked at, too:
# not each of their many possible forms is known here.

_IS_LOAD = b'\x89' + _pickled_text('loadBefore') + _8
_ENDS_LOAD = b'\x86' + _END

_LOAD_REQUEST = Struct('<8si18s8s2s8s3s')  # header and start, id, request, oid, opcode, tid, end
assert len(_IS_LOAD) == 18
_header = HEADER.pack
_LOAD_REQUEST_START = _header(_LOAD_REQUEST.size - HEADER.size) + _START + b'J'
_pack_load = _LOAD_REQUEST.pack

#: The opcodes of integers, by their size.
_INTS = {2: 0x4b, 3: 0x4d, 5: 0x4a}
assert [_pickled_int(value)[0] for value in (0, -1)] == [_INTS[2], _INTS[5]]

#: Zeo numbers its requests; ZEO uses ``(oid, tid)`` as the id of a load.
_LOAD_ID_SIZES = (*_INTS, 21)
_LOADS = {layout.size: layout.unpack
          for layout in [Struct(f'<3s{size}s18s8s2s8s3s') for size in _LOAD_ID_SIZES]}


def load_request(message_id: int, oid: bytes, tid: bytes) -> Frame:
    """``loadBefore(oid, tid)``."""
    try:
        if len(oid) == 8 == len(tid):
            return (_pack_load(_LOAD_REQUEST_START, message_id, _IS_LOAD, oid, _8, tid, _ENDS_LOAD),)
    except (TypeError, StructError):
        pass  # the id is a long one, or these are no bytes
    return request(message_id, 'loadBefore', (oid, tid))


def load_of(data: Payload) -> tuple[PickledId, bytes, bytes] | None:
    """Id, oid and tid if that is a load: what `decode_from_client` finds, for those who are in a hurry."""
    unpack = _LOADS.get(len(data))
    if unpack is not None:
        start, message_id, name, oid, between, tid, end = unpack(data)
        if (name == _IS_LOAD and start == _START and between == _8 and end == _ENDS_LOAD
                and message_id != _HEARTBEAT_ID
                and (message_id[0] == _INTS.get(len(message_id))
                     or message_id == _8 + oid + _8 + tid + b'\x86')):
            return message_id, oid, tid
    return None


def _load_of(data: Payload) -> FromClient | None:
    load = load_of(data)
    return None if load is None else (load[0], False, 'loadBefore', load[1:])


_REPLY_HEADS = {code: (layout.size, layout.unpack_from) for code, layout in [
    (0x4b, Struct('<3sxB13s')), (0x4d, Struct('<3sxH13s')), (0x4a, Struct('<3sxi13s'))]}
_CURRENT = b'N\x87' + _END
_FORMER = b'\x87' + _END
_current_tail = Struct('<2s8s4s').unpack_from

# What nearly all replies are: to a request of zeo's, a current revision of more than 255 bytes.
_START_NUMBER = _START + b'J'
_IS_RECORD = _IS_REPLY + b'B'
_record_head = Struct('<4si14sI').unpack_from
_former_tail = Struct('<2s8s2s8s3s').unpack_from

# And what ends the two steps of a commit: a tid, alone or after an empty list.
_IS_TID = _IS_REPLY + _8
_tid_alone = Struct(f'<4si{len(_IS_TID)}s8s2s')
_IS_VOTE = _IS_REPLY + b'(]' + _8
_ENDS_VOTE = b't' + _END
_tid_told = Struct(f'<4si{len(_IS_VOTE)}s8s3s')


def load_reply(message_id: PickledId, record: bytes, start: bytes, end: bytes | None) -> Frame:
    """The reply ``(record, start, end)`` to ``loadBefore``; a long record is not copied."""
    try:
        if type(record) is bytes and len(start) == 8 and (end is None or len(end) == 8):
            length = len(record)
            head = (_START + message_id + _IS_REPLY
                    + (b'B' + _length4(length) if length > 255 else b'C%c' % length))
            tail = _8 + start + _CURRENT if end is None else _8 + start + _8 + end + _FORMER
            whole = len(head) + length + len(tail)
            if whole <= JOIN_UP_TO:  # without another call
                return (b''.join((_header(whole), head, record, tail)),)
            return frame(head, record, tail)
    except Exception:
        pass  # an unusual storage, or too long
    return reply(message_id, (record, start, end))


_IS_PREFETCHED = _START + _IS_NOTICE + _pickled_text('prefetched') + b'(' + _8


def prefetched_notice(tid: bytes, heads: Sequence[bytes], records: Sequence[bytes]) -> Frame:
    """``prefetched(tid, heads, records)``; both are still to be joined."""
    rows = b''.join(heads)
    size = sum(map(len, records))
    head = b'%b%bB%b%bB%b' % (_IS_PREFETCHED, tid, _length4(len(rows)), rows, _length4(size))
    return (b''.join((_header(len(head) + size + len(_ENDS_STORE)), head, *records, _ENDS_STORE)),)


def _reply_of(data: Payload) -> FromServer | None:
    """A reply that is the result of a load or a vote, some bytes, None, or an empty list."""
    size = len(data)
    if size > 40:
        start, message_id, is_record, length = _record_head(data)
        if is_record == _IS_RECORD and start == _START_NUMBER and size == length + 40:
            code8, tid, rest = _current_tail(data, length + 26)
            if code8 == _8 and rest == _CURRENT:
                record = data[26:-14] if type(data) is bytes else bytes(memoryview(data)[26:-14])
                return message_id, 0, REPLY, (record, tid, None)
    elif size == _tid_alone.size:
        start, message_id, is_tid, tid, rest = _tid_alone.unpack(data)
        if is_tid == _IS_TID and start == _START_NUMBER and rest == _END:
            return message_id, 0, REPLY, tid
    elif size == _tid_told.size:
        start, message_id, is_vote, tid, rest = _tid_told.unpack(data)
        if is_vote == _IS_VOTE and start == _START_NUMBER and rest == _ENDS_VOTE:
            return message_id, 0, REPLY, ([], tid)
    return None if data[3:6] == _IS_NOTICE else _other_reply_of(data)


def _other_reply_of(data: Payload) -> FromServer | None:
    if len(data) < 23:  # the longest head and one byte more
        return None
    head = _REPLY_HEADS.get(data[3])
    if head is None:
        return None
    at, unpack_from = head
    start, message_id, is_reply = unpack_from(data)
    if is_reply != _IS_REPLY or start != _START:
        return None
    code = data[at]
    if code == 0x42 and len(data) > at + 5:
        end = at + 5 + _length4_at(data, at + 1)[0]
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
        if code8 == _8 and rest == _CURRENT:
            record = data[at:end] if type(data) is bytes else bytes(memoryview(data)[at:end])
            return message_id, 0, REPLY, (record, tid, None)
    elif left == 23:
        code8, tid, between, end_tid, rest = _former_tail(data, end)
        if code8 == _8 and between == _8 and rest == _FORMER:
            record = data[at:end] if type(data) is bytes else bytes(memoryview(data)[at:end])
            return message_id, 0, REPLY, (record, tid, end_tid)
    elif left == 2 and data[end:] == _END:
        return message_id, 0, REPLY, bytes(data[at:end])
    return None


#: What asks for a vote or ends a transaction, by its length.  The transaction's id is the argument, or the
#: first of two.
_COMMITS = {layout.size: (layout.unpack, head, tail, name, more) for name, head, tail, more, layout in [
    (name, head, tail, more, Struct(f'<3s5s{len(head)}sBi{len(tail)}s'))
    for name, head, tail, more in [
        *((name, b'\x89' + _pickled_text(name), b'\x85' + _END, ())
          for name in ('vote', 'tpc_finish', 'tpc_abort')),
        ('vote', b'\x89' + _pickled_text('vote') + b'(', b'\x88t' + _END, (True,))]]}
assert len(_COMMITS) == 4


def _commit_of(data: Payload) -> FromClient | None:
    form = _COMMITS.get(len(data))
    if form is not None:
        unpack, head, tail, name, more = form
        start, message_id, is_it, code, transaction_id, end = unpack(data)
        if is_it == head and start == _START and message_id[0] == code == 0x4a and end == tail:
            return message_id, False, name, (transaction_id, *more)
    return None


_IS_FINISH = b'\x89' + _pickled_text('tpc_finish') + b'J'
_ENDS_FINISH = b'\x85' + _END
_FINISH_REQUEST = Struct(f'<8si{len(_IS_FINISH)}si3s')  # header and start, id, request, transaction, end
_FINISH_REQUEST_START = _header(_FINISH_REQUEST.size - HEADER.size) + _START + b'J'


def finish_request(message_id: int, transaction_id: object) -> Frame:
    """``tpc_finish(transaction_id)``."""
    if type(transaction_id) is int:
        try:
            return (_FINISH_REQUEST.pack(_FINISH_REQUEST_START, message_id, _IS_FINISH, transaction_id, _ENDS_FINISH),)
        except StructError:
            pass  # long ones
    return request(message_id, 'tpc_finish', (transaction_id,))


_IS_STORE = _START + _IS_NOTICE + _pickled_text('storea') + b'(' + _8
_store_head = Struct(f'<{len(_IS_STORE)}s8s2s8s').unpack_from
_STORE_RECORD = len(_IS_STORE) + 18
_ENDS_STORE = b't' + _END
_store_tail = Struct('<Bi3s').unpack_from


def store_notice(oid: bytes, serial: bytes, record: bytes, transaction_id: int) -> Frame:
    """``storea(oid, serial, record, transaction_id)``; a long record is not copied."""
    if type(record) is not bytes or len(oid) != 8 or len(serial) != 8:
        return notice('storea', (oid, serial, record, transaction_id))
    length = len(record)
    return frame(
        _IS_STORE + oid + _8 + serial
        + (b'B' + _length4(length) if length > 255 else b'C%c' % length),
        record,
        _pickled_int(transaction_id) + _ENDS_STORE)


def _store_of(data: Payload) -> FromClient | None:
    at = _STORE_RECORD
    if len(data) < at + 5:
        return None
    name, oid, between, serial = _store_head(data)
    if name != _IS_STORE or between != _8:
        return None
    code = data[at]
    if code == 0x42:
        end = at + 5 + _length4_at(data, at + 1)[0]
        at += 5
    elif code == 0x43:
        end = at + 2 + data[at + 1]
        at += 2
    else:
        return None
    if len(data) - end == 8:
        code, transaction_id, ending = _store_tail(data, end)
        if code != 0x4a or ending != _ENDS_STORE:
            return None
    else:
        tail = data[end:]
        size = len(tail)
        if size < 5 or tail[-3:] != _ENDS_STORE:
            return None
        if tail[0] == _INTS.get(size - 3):
            transaction_id = int.from_bytes(tail[1:-3], 'little')
        elif tail[0] == 0x8a and tail[1] == size - 5:  # ZEO's transactions have long ids
            transaction_id = int.from_bytes(tail[2:-3], 'little', signed=True)
        else:
            return None
    record = data[at:end] if type(data) is bytes else bytes(memoryview(data)[at:end])
    return _NO_ID, True, 'storea', (oid, serial, record, transaction_id)


_IS_STORES = _START + _IS_NOTICE + _pickled_text('stores') + b'(B'
_ENDS_STORES = _ENDS_STORE
_IS_COMMIT = b'\x89' + _pickled_text('commit') + b'('
_pack_commit = Struct(f'<4si{len(_IS_COMMIT)}ssis').pack
_commit_head = Struct(f'<3s5s{len(_IS_COMMIT)}sBis').unpack_from
_COMMIT_ROWS = 3 + 5 + len(_IS_COMMIT) + 6  # where the first of four begins


def stores_notice(heads: bytes, records: Sequence[bytes], transaction_id: int) -> Frame:
    """``stores(heads, records, transaction_id)``, where the records are still to be joined."""
    size = sum(map(len, records))
    tail = _pickled_int(transaction_id) + _ENDS_STORES
    head = b'%b%b%bB%b' % (_IS_STORES, _length4(len(heads)), heads, _length4(size))
    return (b''.join((_header(len(head) + size + len(tail)), head, *records, tail)),)


def commit_request(message_id: int, transaction_id: int, tell_tid: bool, user: bytes, description: bytes,
                   heads: bytes, records: Sequence[bytes]) -> Frame:
    """``commit(transaction_id, tell_tid, user, description, heads, records)``; they are still to be joined."""
    size = sum(map(len, records))
    try:
        start = _pack_commit(_START_NUMBER, message_id, _IS_COMMIT, b'J', transaction_id,
                             b'\x88' if tell_tid else b'\x89')
    except StructError:  # the ids are long ones, or others
        return request(message_id, 'commit', (transaction_id, tell_tid, user, description, heads, b''.join(records)))
    head = b'%bB%b%bB%b%bB%b%bB%b' % (start, _length4(len(user)), user, _length4(len(description)), description,
                                      _length4(len(heads)), heads, _length4(size))
    return (b''.join((_header(len(head) + size + len(_ENDS_STORE)), head, *records, _ENDS_STORE)),)


def _rows(data: bytes, at: int, count: int, end: int) -> list[bytes] | None:
    """So many bytes objects that are pickled one after the other, from ``at`` just to ``end``."""
    rows = []
    for _ in range(count):
        if at + 5 > end or data[at] != 0x42:
            return None
        start = at + 5
        at = start + _length4_at(data, at + 1)[0]
        rows.append(data[start:at])
    return rows if at == end else None


def _stores_of(data: Payload) -> FromClient | None:
    at = len(_IS_STORES)
    if data[:at] != _IS_STORES or len(data) < at + 8:
        return None
    data = bytes(data)
    code, transaction_id, ending = _store_tail(data, len(data) - 8)
    rows = _rows(data, at - 1, 2, len(data) - 8)
    if rows is None or code != 0x4a or ending != _ENDS_STORES:
        return None
    return _NO_ID, True, 'stores', (*rows, transaction_id)


def _whole_of(data: Payload) -> FromClient | None:
    """A small transaction as a whole."""
    if len(data) < _COMMIT_ROWS or data[8:8 + len(_IS_COMMIT)] != _IS_COMMIT:
        return None
    data = bytes(data)
    start, message_id, _, code, transaction_id, tell_tid = _commit_head(data)
    rows = _rows(data, _COMMIT_ROWS, 4, len(data) - 3)
    if (rows is None or start != _START or message_id[0] != 0x4a or code != 0x4a or data[-3:] != _ENDS_STORE
            or tell_tid not in (b'\x88', b'\x89')):
        return None
    return message_id, False, 'commit', (transaction_id, tell_tid == b'\x88', *rows)


_IS_INVALIDATION = _START + _IS_NOTICE + _pickled_text('invalidateTransaction') + _8
_INVALIDATED = len(_IS_INVALIDATION) + 8
_ENDS_INVALIDATION = b'e\x86' + _END
_ENDS_SINGLE = b'a\x86' + _END
_each_oid = Struct('<2s8s').iter_unpack
_of_one_object = Struct(f'<{len(_IS_INVALIDATION)}s8s4s8s4s')


def invalidation_notice(tid: bytes, oids: Sequence[bytes]) -> Frame:
    """``invalidateTransaction(tid, oids)``."""
    if len(tid) != 8 or set(map(len, oids)) != {8}:
        return notice('invalidateTransaction', (tid, list(oids)))
    return frame(_IS_INVALIDATION + tid + b'](' + _8, _8.join(oids), _ENDS_INVALIDATION)


_IS_INFO = _START + _IS_NOTICE + _pickled_text('info') + b'}(' + _pickled_text('length')
_SIZE = _pickled_text('size')
_ENDS_INFO = b'u\x85' + _END
_LONGEST_INFO = len(_IS_INFO) + len(_SIZE) + 10 + len(_ENDS_INFO)


def info_notice(length: int, size: int) -> Frame:
    """``info({'length': length, 'size': size})``."""
    if type(length) is type(size) is int:
        return frame(_IS_INFO + _pickled_int(length) + _SIZE, _pickled_int(size), _ENDS_INFO)
    return notice('info', ({'length': length, 'size': size},))


_KNOWN_SIZES = re.compile(
    re.escape(_IS_INFO) + rb'(?:K(.)|J(....))' + re.escape(_SIZE) + rb'(?:K(.)|J(....))' + re.escape(_ENDS_INFO),
    re.DOTALL).fullmatch


def _info_of(data: Payload) -> FromServer | None:
    if len(data) > _LONGEST_INFO:
        return None
    sizes = _KNOWN_SIZES(data)
    if sizes is None:
        return None
    short_length, length, short_size, size = sizes.groups()
    return 0, 1, 'info', ({
        'length': short_length[0] if short_length else int.from_bytes(length, 'little', signed=True),
        'size': short_size[0] if short_size else int.from_bytes(size, 'little', signed=True)},)


_IS_BLOB_CHUNK = _START + _IS_NOTICE + _pickled_text('receiveBlobChunk') + _8
_ENDS_DOWNLOAD = b'\x87' + _END
_DOWNLOAD_HEAD = len(_IS_BLOB_CHUNK) + 18 + 5


def blob_chunk_notice(oid: bytes, tid: bytes, data: bytes) -> Frame:
    """``receiveBlobChunk(oid, tid, data)``; a long piece is not copied."""
    return frame(_IS_BLOB_CHUNK + oid + _8 + tid + _pickled_bytes_head(len(data)), data,
                 _ENDS_DOWNLOAD)


def around_download(oid: bytes, tid: bytes, size: int) -> tuple[bytes, bytes]:
    """What stands before and after so many bytes of data (more than 255) in ``receiveBlobChunk``."""
    head = _IS_BLOB_CHUNK + oid + _8 + tid + _pickled_bytes_head(size)
    return HEADER.pack(len(head) + size + len(_ENDS_DOWNLOAD)) + head, _ENDS_DOWNLOAD


def download_in(beginning: memoryview, length: int) -> tuple[bytes, bytes, int, int, bytes] | None:
    """If so begins a long ``receiveBlobChunk`` of so many bytes: oid and tid, and where the data are.

    That is how many bytes stand before them, how many they are, and what has to stand after them.
    """
    head = bytes(beginning[:_DOWNLOAD_HEAD])
    at = len(_IS_BLOB_CHUNK)
    if head[:at] != _IS_BLOB_CHUNK or head[at + 8:at + 10] != _8:
        return None
    size = _long_bytes(head, _DOWNLOAD_HEAD, length - len(_ENDS_DOWNLOAD))
    return None if size is None else (head[at:at + 8], head[at + 10:at + 18], len(head), size, _ENDS_DOWNLOAD)


def _long_bytes(head: bytes, whole: int, end: int) -> int | None:
    """The length of the bytes whose pickle begins with the last 5 of ``whole`` and ends at ``end``, if so it does."""
    if len(head) < whole or head[-5] != 0x42:
        return None
    size: int = _length4_at(head, whole - 4)[0]
    return size if whole + size == end else None


def _download_of(data: Payload) -> FromServer | None:
    """A piece of a blob; it is not copied, but a `memoryview` of the message, and only lent like that."""
    if data[:len(_IS_BLOB_CHUNK)] != _IS_BLOB_CHUNK:
        return None
    at = len(_IS_BLOB_CHUNK) + 18
    piece = _last_bytes(data, at, _ENDS_DOWNLOAD)
    if piece is None or data[at - 10:at - 8] != _8:
        return None
    return 0, 1, 'receiveBlobChunk', (bytes(data[at - 18:at - 10]), bytes(data[at - 8:at]), piece)


_IS_UPLOAD = _START + _IS_NOTICE + _pickled_text('storeBlobChunk')
_ENDS_UPLOAD = b'\x85' + _END
_UPLOAD_HEAD = len(_IS_UPLOAD) + 5


def upload_notice(data: bytes) -> Frame:
    """``storeBlobChunk(data)``; it is not copied."""
    head = _IS_UPLOAD + _pickled_bytes_head(len(data))
    return HEADER.pack(len(head) + len(data) + len(_ENDS_UPLOAD)) + head, data, _ENDS_UPLOAD


def around_upload(size: int) -> tuple[bytes, bytes]:
    """What stands before and after so many bytes of data (more than 255) in ``storeBlobChunk``."""
    head = _IS_UPLOAD + _pickled_bytes_head(size)
    return HEADER.pack(len(head) + size + len(_ENDS_UPLOAD)) + head, _ENDS_UPLOAD


def upload_in(beginning: memoryview, length: int) -> tuple[int, int, bytes] | None:
    """If so begins a long ``storeBlobChunk`` of so many bytes: where the data are, as in `download_in`."""
    head = bytes(beginning[:_UPLOAD_HEAD])
    if head[:len(_IS_UPLOAD)] != _IS_UPLOAD:
        return None
    size = _long_bytes(head, _UPLOAD_HEAD, length - len(_ENDS_UPLOAD))
    return None if size is None else (len(head), size, _ENDS_UPLOAD)


def _upload_of(data: Payload) -> FromClient | None:
    """A piece of a blob; it is not copied, but a `memoryview` of the message."""
    if data[:len(_IS_UPLOAD)] != _IS_UPLOAD:
        return None
    piece = _last_bytes(data, len(_IS_UPLOAD), _ENDS_UPLOAD)
    return None if piece is None else (_NO_ID, True, 'storeBlobChunk', (piece,))


def _last_bytes(data: Payload, at: int, end: bytes) -> memoryview | None:
    """The bytes that are pickled at ``at`` if nothing but ``end`` comes after them."""
    code = data[at:at + 1]
    if code == b'B' and len(data) >= at + 5:
        length = _length4_at(data, at + 1)[0]
        at += 5
    elif code == b'C' and len(data) >= at + 2:
        length = data[at + 1]
        at += 2
    else:
        return None
    if len(data) != at + length + len(end) or data[at + length:] != end:
        return None
    return memoryview(data)[at:at + length]


def _invalidation_of(data: Payload) -> FromServer | None:
    if len(data) == _of_one_object.size:
        name, tid, between, oid, end = _of_one_object.unpack(data)
        if name == _IS_INVALIDATION and between == b'](' + _8 and end == _ENDS_INVALIDATION:
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
    oids = [oid for code, oid in _each_oid(pickled) if code == _8]
    if len(oids) * 10 != len(pickled):
        return None
    return 0, 1, 'invalidateTransaction', (data[at - 8:at], oids)


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
    'sendBlob': Method(2, 3),
    'restoreBlobEnd': Method(5, 5),
    'restoreBlobShared': Method(6, 6),
    # iteration
    'iterator_start': Method(2, 2),
    'iterator_next': Method(1, 1),
    'iterator_record_start': Method(2, 2),
    'iterator_record_next': Method(1, 1),
    'iterator_gc': Method(1, 1),
    # extensions, see `EXTENSIONS`
    'verify': Method(1, 1),
    'settle': Method(2, 2),
    'stores': Method(3, 3),
    'prefetch': Method(2, 2),
    'commit': Method(6, 6, writes=True),
    'figures': Method(0, 0),
    'stop_pack': Method(0, 0),
    'pulse': Method(0, 0),
}
