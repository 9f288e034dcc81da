"""One connection to a server: calls, their replies, and what every message changes, in wire order.

*Effects happen where the message is read*, before the next is read: a reply's ``effect`` runs in the
reading thread, also for a caller that has left.  An effect must not call the server; such a call
raises at once, as does one from a signal handler or destructor that interrupts a call.

Who reads, and when, is said in `zeo.client.readingturn`.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from typing import TYPE_CHECKING
from typing import Any

from zeo.client.readingturn import Effect
from zeo.client.readingturn import Prefetched
from zeo.client.readingturn import Reader
from zeo.client.readingturn import Request
from zeo.errors import ClientDisconnected
from zeo.errors import ProtocolError
from zeo.wire import faults
from zeo.wire.decoding import decode_from_server
from zeo.wire.framing import Frame
from zeo.wire.framing import Inbox
from zeo.wire.framing import Payload
from zeo.wire.loads import load_request
from zeo.wire.messages import REPLY
from zeo.wire.messages import answered_by
from zeo.wire.messages import notice as encode_notice
from zeo.wire.messages import request as encode_request
from zeo.wire.revisions import MOST
from zeo.wire.revisions import Found
from zeo.wire.revisions import unpack

if TYPE_CHECKING:
    import socket

    from zeo.wire.pieces import Divert
    from zeo.wire.tls import Tls

Notice = Callable[..., object]

#: What the server tells of a revision that one has to ask for alone.
UNTOLD: Any = object()


class Channel(Reader):
    """Calls to the server at the other end of ``sock``, which has been greeted; over ``tls``, if it is
    spoken there.

    ``notices`` says what to do with one-way messages from the server, by name; others are ignored.
    It may be replaced while a message is being dispatched.

    All methods may be called from any thread, except that `watch` is run by one.
    """

    __slots__ = ('notices', 'copies_files', '_loaded', '_told')

    def __init__(self, sock: socket.socket, inbox: Inbox, notices: dict[str, Notice], *,
                 loaded: Effect | None = None, told: Callable[[list[tuple[bytes, Found]]], None] | None = None,
                 address: object = '', tls: Tls | None = None) -> None:
        super().__init__(sock, inbox, address, tls)
        self.notices = notices
        #: whether the kernel may copy between files and the socket
        self.copies_files = tls is None
        self._loaded = loaded
        self._told = told

    # ---- what callers use

    def call(self, name: str, args: Sequence[Any] = (), effect: Effect | None = None,
             meanwhile: Callable[[], object] | None = None) -> Any:
        """Ask and wait for the answer; do first what can be done ``meanwhile``, if that is short.

        Raises what the server answers with; `ClientDisconnected` if the connection ends first;
        `ClientStorageError` inside an effect.
        """
        message_id = next(self._ids)
        return self._perform(Request(effect), message_id, encode_request(message_id, name, args), meanwhile)

    def ask(self, encode: Callable[..., Frame], *args: Any, effect: Effect | None = None,
            meanwhile: Callable[[], object] | None = None) -> Any:
        """The same with a request that ``encode`` makes of its number and the arguments."""
        message_id = next(self._ids)
        return self._perform(Request(effect), message_id, encode(message_id, *args), meanwhile)

    def load(self, oid: bytes, tid: bytes) -> tuple[bytes, bytes, bytes | None] | None:
        """``loadBefore``; equal ones in flight are one.  The result has been given to ``loaded``."""
        key = oid, tid
        result: tuple[bytes, bytes, bytes | None] | None = UNTOLD
        while result is UNTOLD:
            request = self._loads.get(key)
            if request is None:
                message_id = next(self._ids)
                request = Request(self._loaded, key)
                result = self._perform(request, message_id, load_request(message_id, oid, tid))
            else:
                result = self._perform(request, 0, None)
        return result

    def prefetch(self, oids: Sequence[bytes], tid: bytes, together: bool = False) -> None:
        """Ask for many revisions in few writes and do not wait; the answers are given to ``loaded``.

        ``together`` tells whether the server can be asked for many in one message.
        """
        me = self._enter()
        try:
            ask = self._ask_together if together else self._ask_singly
            for first in range(0, len(oids), MOST):  # the server begins meanwhile
                frames = ask(oids[first:first + MOST], tid)
                if frames:
                    self._outgoing.send((b''.join(frames),))
            self._calls += 1
        except BaseException as error:
            self.end(error)  # what was registered may not have been sent
            raise
        finally:
            del self._inside[me]
        if self.ended is not None:
            # What was registered is answered: by who ended it, if the sending came before the socket was shut down,
            # else by the sending, which has failed then.
            raise self._error()

    def _ask_singly(self, oids: Sequence[bytes], tid: bytes) -> Sequence[bytes]:
        frames: list[bytes] = []
        for oid in oids:
            message_id = next(self._ids)
            request = Request(self._loaded, (oid, tid))
            if self._register(request, message_id) is request:
                frames += load_request(message_id, oid, tid)
        return frames

    def _ask_together(self, oids: Sequence[bytes], tid: bytes) -> Sequence[bytes]:
        loads = self._loads
        wanted = []
        for oid in oids:
            key = oid, tid
            request = Prefetched(None)
            if loads.setdefault(key, request) is request:
                wanted.append(oid)
        return encode_notice('prefetch', (b''.join(wanted), tid)) if wanted else ()

    def post(self, name: str, args: Sequence[Any] = ()) -> None:
        """Send a one-way message, together with others or before the next request."""
        self.post_frame(encode_notice(name, args))

    def post_frame(self, frame: Frame) -> None:
        """The same with a one-way message that is a frame already."""
        me = self._enter()
        try:
            if self.ended is not None:
                raise self._error()
            self._outgoing.post(frame)
        finally:
            del self._inside[me]

    def post_file(self, head: bytes, file: int, at: int, size: int, tail: bytes) -> None:
        """The same with a message that has so many bytes of a file in the middle; only if `copies_files`."""
        me = self._enter()
        try:
            if self.ended is not None:
                raise self._error()
            self._outgoing.send_file(head, file, at, size, tail)
        finally:
            del self._inside[me]

    def divert(self, divert: Divert) -> None:
        """Who is asked where the data of long messages are to go, if `copies_files`."""
        if self.copies_files:
            self._inbox.divert = divert

    def flush(self) -> None:
        """Send what was posted."""
        me = self._enter()
        try:
            self._outgoing.send()
        finally:
            del self._inside[me]

    # ---- what the server says; all of it with the turn held

    def _dispatch(self, payload: Payload) -> None:
        """Read one message and do all it changes."""
        try:
            message_id, flag, name, args = decode_from_server(payload)
        except ProtocolError as error:
            self._refuse(payload, error)
            return
        if name == REPLY:
            request = self._requests.pop(message_id, None)
            if request is None:
                return
            if request.key is not None:
                # Before its effects, and before the next message: a load that begins after an
                # invalidation must not join an answer from before it.
                self._loads.pop(request.key, None)
            try:
                if flag:
                    if not isinstance(args, (tuple, list)) or len(args) != 2:
                        raise ProtocolError('an error reply without name and value')
                    request.error = faults.recreate, tuple(args)
                else:
                    request.result = args
                    if request.effect is not None:
                        request.effect(request.key, args)
            except Exception as error:
                request.error = _same, (error,)
                raise
            except BaseException:  # meant for this thread, not for the one that waits
                request.error = ClientDisconnected, ('interrupted while the reply was dealt with',)
                raise
            finally:
                self._answer(request)
        elif name == 'prefetched':
            self._tell(*args)
        else:
            notice = self.notices.get(name)
            if notice is not None:
                notice(*args)

    def _tell(self, tid: bytes, heads: bytes, records: bytes) -> None:
        """Answer loads that were asked for together; they leave the table before the effects, as others do."""
        revisions = unpack(heads, records)
        requests: list[Request] = []
        try:
            for oid, found in revisions:
                key = oid, tid
                request = self._loads.get(key)
                if type(request) is not Prefetched:
                    raise ProtocolError('a revision is told that nobody has asked for')
                requests.append(request)
                del self._loads[key]
                request.result = found or UNTOLD
            if self._told is not None:
                self._told([(oid, found) for oid, found in revisions if found is not None])
        except BaseException:
            for request in requests:
                request.error = ClientDisconnected, ('what was told could not be dealt with',)
            raise
        finally:
            for request in requests:
                self._answer(request)

    def _refuse(self, payload: Payload, error: ProtocolError) -> None:
        """A message cannot be decoded: the call that it answers fails with `ProtocolError`.

        If that call would have changed something here, or there is none, it is raised, too: then nobody
        knows what is missing.
        """
        message_id = answered_by(payload)
        request = None if message_id is None else self._requests.pop(message_id, None)
        if request is None:
            raise error
        request.error = ProtocolError, (f'the answer of {self.address} is refused: {error}',)
        if request.key is not None:
            self._loads.pop(request.key, None)
        self._answer(request)
        if request.effect is not None:
            raise error


def _same(error: BaseException) -> BaseException:
    return error
