"""The reading turn: while somebody waits for a reply, exactly one thread reads the socket.

*Leader/followers*.  A thread that waits for a reply reads the socket itself.
The lock ``turn`` is the right to read and dispatch; who holds it is the leader, the others sleep.

*While somebody waits, somebody reads.*  A waiter takes the turn if it is free.  If not, it writes
itself into ``parked``, looks once more (is my reply there? is the turn free now?), and only then
sleeps.  A leader that leaves gives the turn to somebody parked; if there is nobody it frees it, looks
once more, and takes it back if somebody parked meanwhile.  Each side publishes first and looks second,
so one of the two sees the other, whatever the interleaving.  An entry in ``parked`` is the right to
wake that sleeper: whoever removes it (only one thread can) wakes it, once.  So a sleeper that leaves by
an exception either removes its own entry, or waits for the one who did and passes on the turn if it was
given it.  A reader that leaves by an exception ends the connection, which answers everybody.

*No two full socket buffers.*  The turn is never held while sending.  A sender that cannot go on rings
the watcher, which takes a free turn and reads until the sender is through; thus the server can get rid
of its replies and comes to read again.  A caller may leave its request to another one that is just sending.

*What was received belongs to the channel.*  A leader dispatches all whole messages that its last
``recv`` brought before it leaves, and whoever reads looks into the inbox before the socket.

One *watcher* thread per channel reads when nobody calls, and closes the descriptor in the end: it takes
the turn for good after everybody has been told, so that nobody reads from a closed descriptor.
"""

from __future__ import annotations

import logging
import socket
import struct
from abc import ABC
from abc import abstractmethod
from collections.abc import Callable
from itertools import count
from threading import Lock
from threading import get_ident
from time import monotonic
from typing import TYPE_CHECKING
from typing import Any

from zeo.client.outgoing import Outgoing
from zeo.client.outgoing import SecureOutgoing
from zeo.errors import ClientDisconnected
from zeo.errors import ClientStorageError
from zeo.wire.framing import Frame
from zeo.wire.framing import Inbox
from zeo.wire.framing import Payload
from zeo.wire.messages import HEARTBEAT
from zeo.wire.messages import request as encode_request

if TYPE_CHECKING:
    from zeo.wire.tls import Tls

logger = logging.getLogger(__name__)

#: Seconds between two signs of life on an otherwise quiet connection.
HEARTBEAT_INTERVAL = 60.0

#: Seconds for which a server may be silent that gives signs of life by itself (every `PULSE_INTERVAL`).
SILENCE = 40.0

#: Another one is asked for a sign of life after `HEARTBEAT_INTERVAL` of silence, and given so many more of
#: these: a ZEO server answers nobody while its storage is busy with a long vote.
PATIENCE = 4

#: The watcher looks whether it is needed this often, in seconds, and less often while it is not.
SHORTEST_TICK, LONGEST_TICK = 0.005, 0.040

#: A sleeper looks this often, in seconds, whether the connection has ended without anybody waking it.
LAST_LOOK = 1.0

#: How long the end of a connection may wait for its last reader; that one has been told to stop.
LAST_READER = 10.0

Effect = Callable[[Any, Any], None]  # of the request's key, and the result
Key = tuple[bytes, bytes]


class Request:
    """A question to the server, and its answer as soon as `done`; may be shared by several waiters."""

    __slots__ = ('effect', 'key', 'done', 'result', 'error', 'sleepers')

    def __init__(self, effect: Effect | None, key: Key | None = None) -> None:
        self.effect = effect  # run by the thread that reads the reply, before anybody is woken
        self.key = key  # (oid, tid) of a load, by which equal loads find it
        self.done = False  # set last; then the next two do not change any more
        self.result: Any = None
        # how to make an exception; each waiter raises one of its own
        self.error: tuple[Callable[..., BaseException], tuple[Any, ...]] | None = None
        self.sleepers: list[Sleeper] = []  # who waits without reading


class Prefetched(Request):
    """A load that is asked for together with others, and answered like that: it has no number.

    Its entry in `Reader._loads` is the right to answer it.  With `UNTOLD` for its result one has to ask again.
    """

    __slots__ = ()


class Sleeper:
    """A waiter that does not read, for as long as it sleeps."""

    __slots__ = ('bed', 'given', 'woken', 'left')

    def __init__(self) -> None:
        self.bed = Lock()  # released to wake us
        self.bed.acquire()
        self.given = False  # woken because we have the turn now
        self.woken = False
        self.left = False  # gave up waiting, and left nothing undone

    def wake(self) -> None:
        """Only by whoever removed our entry from `Reader._parked`."""
        self.woken = True
        self.bed.release()

    def await_waker(self) -> None:
        """After our entry was removed by somebody: wait for its waking, which is a step away."""
        while not self.woken:
            self.bed.acquire(timeout=0.1)


class Reader(ABC):
    """A connection to a server over ``sock``, over ``tls`` if it is spoken there, whose callers take turns in reading.

    What a message changes is said by `_dispatch`.  All methods may be called from any thread, except that `watch`
    is run by one.
    """

    __slots__ = ('address', 'ended', '_sock', '_recv_into', '_outgoing', '_inbox', '_turn', '_parked', '_requests',
                 '_loads', '_inside', '_ids', '_calls', '_bell', '_pulsing', '_asked', '_silent', '__weakref__')

    def __init__(self, sock: socket.socket, inbox: Inbox, address: object, tls: Tls | None) -> None:
        self.address = address
        #: None, or why the connection is at its end; set before anybody is told
        self.ended: str | None = None
        self._sock = sock
        self._recv_into: Callable[[memoryview], int]
        self._outgoing: Outgoing
        if tls is None:
            self._recv_into = sock.recv_into
            self._outgoing = Outgoing(sock, self.end, self._ring)
        else:
            self._recv_into = tls.recv_into
            self._outgoing = SecureOutgoing(sock, self.end, self._ring, tls)
        self._inbox = inbox  # belongs to the leader
        self._turn = Lock()  # the right to read and dispatch; held over a recv
        self._parked: dict[Sleeper, bool] = {}  # an entry is the right to wake
        self._requests: dict[int, Request] = {}  # an entry is the right to answer
        self._loads: dict[Key, Request] = {}  # those of them that load, by oid and tid
        self._inside: dict[int, bool] = {}  # threads that are in a call, or watch
        self._ids = count(1)
        self._calls = 0  # grows with each call; only whether it moved matters
        self._bell = Lock()  # released to make the watcher look at once
        self._bell.acquire()
        self._pulsing = False  # the server gives signs of life
        self._asked: Request | None = None  # for one; this and the next belong to the leader
        self._silent = 0  # waits since then in which nothing came

    def is_inside(self) -> bool:
        """Whether this very thread is in a call (of which this is an effect or an interruption)."""
        return get_ident() in self._inside

    def set_timeout(self, seconds: float | None, pulsing: bool = False) -> None:
        """Limit each wait for the socket; only before the channel is shared between threads.

        None is for the time after: then a call may take as long as the server lives, as far as one can
        know.  If that is ``pulsing`` it gives signs of life by itself; else it is asked for them.
        """
        self._sock.settimeout(seconds)
        if seconds is None:
            self._pulsing = pulsing
            self._limit(socket.SO_RCVTIMEO, SILENCE if pulsing else HEARTBEAT_INTERVAL)
            if not pulsing:  # one that is may be busy and not read; somebody else hears that it lives
                self._limit(socket.SO_SNDTIMEO, HEARTBEAT_INTERVAL * (PATIENCE + 1))

    def _limit(self, option: int, seconds: float) -> None:
        whole, part = divmod(seconds, 1)
        self._sock.setsockopt(socket.SOL_SOCKET, option,
                              struct.pack('ll', int(whole), int(part * 1_000_000)))

    # ---- one call

    def _enter(self) -> int:
        me = get_ident()
        if me in self._inside:
            raise ClientStorageError(
                'a call to the server from within one (by a callback of the storage, a signal handler, '
                'or a destructor) would wait for itself')
        self._inside[me] = True
        return me

    def _perform(self, request: Request, message_id: int, frame: Frame | None,
                 meanwhile: Callable[[], object] | None = None) -> Any:
        """Send the frame (unless somebody else has sent an equal one) and wait for the answer."""
        me = get_ident()
        if me in self._inside:
            self._enter()
        self._inside[me] = True
        sleeper = None
        try:
            self._calls += 1
            if frame is not None:
                standing = self._register(request, message_id)
                if standing is request:
                    self._outgoing.send(frame)
                request = standing
            if meanwhile is not None:
                meanwhile()
            if self._turn.acquire(False):
                self._lead(request)
            else:
                sleeper = Sleeper()
                self._sleep(request, sleeper)
        except BaseException as error:
            if sleeper is None or not sleeper.left:
                self.end(error)
            raise
        finally:
            del self._inside[me]
        if not request.done:  # the connection has ended; whoever was to answer is a step behind us
            raise self._error()
        if request.error is not None:
            make, args = request.error
            raise make(*args)
        return request.result

    def _register(self, request: Request, message_id: int) -> Request:
        """Enter a request that is about to be sent; returns it, or the equal one that stands."""
        self._requests[message_id] = request
        if request.key is not None:
            standing = self._loads.setdefault(request.key, request)
            if standing is not request:
                self._requests.pop(message_id, None)
                return standing
        if self.ended is not None:  # looked at when the request can be found by who ended it
            self._answer_all()
        return request

    def _sleep(self, request: Request, sleeper: Sleeper) -> None:
        """Wait until somebody else has read the answer, or gives us the turn to read it."""
        parked = self._parked
        request.sleepers.append(sleeper)
        parked[sleeper] = True
        if request.done:  # perhaps answered before we were there to be woken
            if parked.pop(sleeper, None):
                return
        elif self._turn.acquire(False):
            parked.pop(sleeper, None)
            self._lead(request)
            return
        try:
            while not sleeper.bed.acquire(timeout=LAST_LOOK):
                if self.ended is not None:
                    return  # who was to wake us was interrupted just then, which has ended the connection
        except BaseException:
            if not parked.pop(sleeper, None):
                sleeper.await_waker()
                if sleeper.given:
                    self._leave()
            sleeper.left = True
            raise
        if sleeper.given:
            self._lead(request)

    # ---- reading; all of it with the turn held

    def _lead(self, request: Request) -> None:
        """Read and dispatch until the request is answered; then pass on the turn."""
        inbox = self._inbox
        try:
            payload = inbox.next()
            while not request.done or (payload is not None and self.ended is None):
                if payload is None:
                    payload = self._receive(inbox)
                else:
                    self._dispatch(payload)
                    payload = inbox.next()
        except Exception as error:
            self.end(error)
        except BaseException as error:
            self.end(error)
            raise
        finally:
            self._leave()

    def _receive(self, inbox: Inbox) -> Payload | None:
        """Wait for more; a message, if it is there as a whole now."""
        passing = inbox.passing
        try:
            size = self._recv_into(inbox.buffer()) if passing is None else inbox.pass_on(self._sock)
        except BlockingIOError:  # SO_RCVTIMEO: nothing came for a while
            self._hear_nothing()
            return None
        if not size:
            raise ConnectionError('the server closed the connection')
        return inbox.received(size) if passing is None else inbox.next()

    def _hear_nothing(self) -> None:
        """One wait was in vain.  Raises `TimeoutError` if the server can be taken for dead."""
        if self._pulsing:
            raise TimeoutError(f'the server has given no sign of life for {SILENCE:g} seconds')
        if self._asked is not None and not self._asked.done:
            self._silent += 1
            if self._silent == PATIENCE:
                raise TimeoutError('the server has not answered for '
                                   f'{HEARTBEAT_INTERVAL * (PATIENCE + 1):g} seconds')
            return
        message_id, request = next(self._ids), Request(None)
        self._requests[message_id] = request
        if self._outgoing.beat(encode_request(message_id, 'ping')):
            self._asked, self._silent = request, 0
        else:
            self._requests.pop(message_id, None)

    @abstractmethod
    def _dispatch(self, payload: Payload) -> None:
        """Read one message and do all it changes."""

    def _answer(self, request: Request) -> None:
        request.done = True
        for sleeper in request.sleepers:
            if self._parked.pop(sleeper, None):
                sleeper.wake()

    def _leave(self) -> None:
        """Give the turn to somebody parked; if there is nobody, free it."""
        parked = self._parked
        while True:
            if parked:
                try:
                    sleeper, _ = parked.popitem()
                except KeyError:
                    continue
                sleeper.given = True
                sleeper.wake()
                return
            self._turn.release()
            if not parked or not self._turn.acquire(False):
                return

    # ---- the watcher

    def watch(self) -> None:
        """Read when nobody calls, until the connection has ended; then close the descriptor.

        To be called once for each channel, by the thread that is its watcher from then on.
        """
        me = self._enter()
        try:
            tick = SHORTEST_TICK
            beat = monotonic() + HEARTBEAT_INTERVAL
            calls = self._calls
            while self.ended is None:
                if (self._outgoing.stuck or self._calls == calls) and self._turn.acquire(False):
                    self._read_for_nobody(beat)
                    tick = SHORTEST_TICK
                else:
                    tick = min(2 * tick, LONGEST_TICK)
                calls = self._calls
                now = monotonic()
                if now >= beat:
                    self._outgoing.beat(HEARTBEAT)
                    beat = now + HEARTBEAT_INTERVAL
                if self.ended is None and self._bell.acquire(timeout=tick):
                    tick = SHORTEST_TICK
        finally:
            self._close()
            del self._inside[me]

    def _read_for_nobody(self, until: float) -> None:
        """Read and dispatch until a call is made (its thread can read itself) or ``until``."""
        inbox = self._inbox
        calls = self._calls
        try:
            payload = inbox.next()
            while self.ended is None:
                if payload is not None:
                    self._dispatch(payload)
                    payload = inbox.next()
                elif (self._calls != calls and not self._outgoing.stuck) or monotonic() >= until:
                    break
                else:
                    payload = self._receive(inbox)
        except Exception as error:
            self.end(error)
        finally:
            self._leave()

    def _ring(self) -> None:
        try:
            self._bell.release()
        except RuntimeError:
            pass  # it is ringing

    # ---- the end

    def end(self, reason: BaseException | str) -> None:
        """End the connection and answer everybody; by any thread, also a signal handler; never waits."""
        if self.ended is None:
            if isinstance(reason, Exception) and not isinstance(reason, (OSError, ClientStorageError)):
                logger.error('The connection to %s is given up because of an error here',
                             self.address, exc_info=reason)
            self.ended = str(reason) or type(reason).__name__
            self._outgoing.farewell()
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._answer_all()
        self._ring()

    def abandon(self) -> None:
        """In a forked child: close this copy of the descriptor and leave the stream to the parent."""
        self.ended = 'it belongs to the parent process'
        self._sock.close()

    def _answer_all(self) -> None:
        while self._loads:
            try:
                _, load = self._loads.popitem()
            except KeyError:
                break
            if type(load) is Prefetched:
                load.error = self._error, ()
                self._answer(load)
        while self._requests:
            try:
                _, request = self._requests.popitem()
            except KeyError:
                break
            request.error = self._error, ()
            self._answer(request)

    def _error(self) -> Exception:
        return ClientDisconnected(f'connection to {self.address} lost: {self.ended}')

    def _close(self) -> None:
        self.end('closed')  # whoever began to end it need not have got further than the first line
        until = monotonic() + LAST_READER
        while not self._turn.acquire(timeout=LONGEST_TICK):  # and keeps it
            if len(self._inside) == 1:
                break  # only we are: nobody reads, and who had just taken the turn was interrupted
            if monotonic() >= until:
                logger.error('The connection to %s is closed under its reader', self.address)
                break
        self._outgoing.close()
