"""What goes to the server: whole frames, one after another, by any thread.

One-way messages are put together and go out in few large writes, at the latest with the next request.
Who has a request to send while another thread sends leaves it to that one (*flat combining*), which sends it
next: waiting for the right to send would take longer than sending, if several threads load.  A sender that cannot go on, because the server does not read, says so (`Outgoing.stuck`): somebody has to
read then, or both sides might wait for each other.

With TLS, whole frames are encrypted by who has the right to send, just before they are sent, so in the
order in which they are sent (see `zeo.wire.tls`).
"""

from __future__ import annotations

import logging
import socket
from collections import deque
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
from threading import Lock
from typing import TYPE_CHECKING

from zeo.wire import pieces
from zeo.wire.framing import Frame

if TYPE_CHECKING:
    from zeo.wire.tls import Tls

logger = logging.getLogger(__name__)

#: How long the end of a connection may wait for its last sender; the socket takes nothing more.
LAST_SENDER = 10.0

#: One-way messages are put together until there are so many bytes of them.  With more, the server would
#: have nothing to do for longer than the system calls take that are saved.
POSTED_UP_TO = 16 * 1024

#: Messages of so many bytes are not put together with others.
LARGE = 64 * 1024

#: Who sends takes on what others leave meanwhile, so many times: its own caller wants to go on, too.  (With
#: few, threads that wait for the right to send cost more than is won: 30 threads were a tenth slower with 4.)
TAKEN_ON = 30
_PROMISES = (True,) * TAKEN_ON + (False,)

#: So many bytes are encrypted at a time.
SEALED_AT_A_TIME = 256 * 1024

DONT_WAIT = socket.MSG_DONTWAIT


class Outgoing:
    """The sending side of a connection.

    Never to be used by a thread that holds the right to read, except `beat`, which does not wait.
    ``failed`` is called with an exception after which nothing more can be sent, perhaps with the lock held;
    ``ring`` when a sender gets stuck.  A failed `send` or `post` raises nothing: whoever reads finds the
    connection at its end.
    """

    __slots__ = ('stuck', '_sock', '_send', '_failed', '_ring', '_lock', '_posted', '_size', '_left', '_relieving')

    def __init__(self, sock: socket.socket, failed: Callable[[BaseException], None],
                 ring: Callable[[], None]) -> None:
        self.stuck = False  # a sender waits for the server to read
        self._sock = sock
        self._send = sock.send
        self._failed = failed
        self._ring = ring
        self._lock = Lock()  # the right to send; guards the next two
        self._posted: list[bytes] = []
        self._size = 0
        # Frames that are to be sent by who is sending; any thread may append, who has the right takes them out.
        self._left: deque[Frame] = deque()
        # Whether who has the right to send looks for them, once more after giving it back.  The last time that
        # it sends for others it is not so: then they wait for the right, and one of them goes on.
        self._relieving = False

    def send(self, frame: Frame = ()) -> None:
        """Send what was posted, then the frame; or leave that to a thread that is sending now.

        It is left first, and looked whether somebody takes it second; who sends gives up the right first, and
        looks whether something was left second: so one of the two sees the other.  Who leaves this by an
        exception may have broken that promise, and ends the connection.  Nobody sends for others for ever:
        the last time it promises nothing.
        """
        left = self._left
        left.append(frame)
        try:
            for promise in _PROMISES:
                if not left or self._relieving:
                    break
                with self._lock:
                    self._relieving = promise
                    try:
                        self._transmit(self._take())
                    finally:
                        self._relieving = False
        except BaseException as error:
            self._failed(error)
            raise

    def _take(self) -> Frame:
        """What was left, as one frame."""
        left = self._left
        frame = left.popleft() if left else ()
        if not left:
            return frame
        parts = [*frame]
        while left:
            parts += left.popleft()
        return (b''.join(parts),) if sum(map(len, parts)) < LARGE else tuple(parts)

    def post(self, frame: Frame) -> None:
        """Send it later, or now if enough has come together."""
        with self._lock:
            try:
                size = sum(map(len, frame))
                if size >= LARGE:
                    self._transmit(frame)  # as it is, not copied
                    return
                self._posted += frame
                self._size += size
                if self._size >= POSTED_UP_TO:
                    self._transmit(())
            except BaseException as error:  # what others have posted may be lost
                self._failed(error)
                raise

    def send_file(self, head: bytes, file: int, at: int, size: int, tail: bytes) -> None:
        """Send what was posted, then a message with so many bytes of a file in the middle; not with TLS.

        The kernel may wait for what comes next before it sends the last bytes of it.
        """
        with self._lock:
            try:
                self._transmit(())
                self.stuck = True  # it cannot be known before
                self._ring()
                pieces.send(self._sock, head, file, at, size, tail, _nobody_counts)
            except OSError as error:
                self._failed(error)
            except BaseException as error:  # perhaps in the middle of a frame
                self._failed(error)
                raise
            finally:
                self.stuck = False

    def beat(self, frame: Frame) -> bool:
        """Send a sign of life after what was posted, unless somebody is sending; never waits.  Whether it was sent.

        (What was posted may lie here for as long as a transaction takes; it is no sign of life until it is sent.)
        """
        if self._lock.acquire(False):
            try:
                said = b''.join((*self._posted, *frame))
                rest = said[self._send(said, DONT_WAIT):]
                self._posted, self._size = [rest] if rest else [], len(rest)
                return True
            except BlockingIOError:
                pass  # the server has more than enough to read
            except OSError as error:
                self._failed(error)
            finally:
                self._lock.release()
        return False

    def farewell(self) -> None:
        """Say that nothing more will be sent, if there is a way to say so; also from a signal handler."""

    def close(self) -> None:
        """Close the socket when nobody sends; it must have been shut down."""
        if not self._lock.acquire(timeout=LAST_SENDER):
            logger.error('A connection is closed under its sender')  # or one was interrupted just when it began
        self._sock.close()
        self._lock.release()  # who comes late finds the socket closed

    def _transmit(self, frame: Iterable[bytes]) -> None:
        if self._posted:
            if sum(map(len, frame)) < LARGE:
                frame = (b''.join((*self._posted, *frame)),)
            else:
                frame = (b''.join(self._posted), *frame)
            self._posted = []
            self._size = 0
        try:
            for part in frame:
                try:
                    sent = self._send(part, DONT_WAIT)
                except BlockingIOError:
                    sent = 0
                if sent < len(part):
                    self._send_rest(memoryview(part)[sent:])
        except OSError as error:
            self._failed(error)
        except BaseException as error:  # perhaps in the middle of a frame
            self._failed(error)
            raise

    def _send_rest(self, rest: memoryview) -> None:
        self.stuck = True
        self._ring()
        try:
            self._sock.sendall(rest)
        except BlockingIOError:  # SO_SNDTIMEO
            raise TimeoutError('the server has read nothing for too long') from None
        finally:
            self.stuck = False


def _nobody_counts(count: int) -> None:
    pass


class SecureOutgoing(Outgoing):
    """The same with TLS."""

    __slots__ = ('_tls', '_unsent')

    def __init__(self, sock: socket.socket, failed: Callable[[BaseException], None],
                 ring: Callable[[], None], tls: Tls) -> None:
        super().__init__(sock, failed, ring)
        self._tls = tls
        self._unsent = b''  # encrypted, so nothing may be sent before it
        tls.answer = self._answer

    def beat(self, frame: Frame) -> bool:
        if self._lock.acquire(False):
            try:
                if self._unsent:
                    self._send_at_once(())  # that is a sign, too
                    return False
                said, self._posted, self._size = b''.join((*self._posted, *frame)), [], 0
                self._send_at_once((said,))
                return True
            finally:
                self._lock.release()
        return False

    def farewell(self) -> None:
        if self._lock.acquire(False):
            try:
                self._sock.send(self._unsent + self._tls.farewell(), DONT_WAIT)
            except OSError:
                pass
            finally:
                self._lock.release()

    def _answer(self) -> None:
        """Send what TLS has to say itself; whoever is sending now says it with what comes next.

        Called by who has the right to read, so it does not wait.
        """
        if self._lock.acquire(False):
            try:
                self._send_at_once(())
            finally:
                self._lock.release()

    def _send_at_once(self, frame: Frame) -> None:
        """Send what the kernel takes, and keep the rest for the next sender."""
        try:
            self._unsent += self._tls.seal(frame)
            self._unsent = self._unsent[self._send(self._unsent, DONT_WAIT):]
        except BlockingIOError:
            pass
        except OSError as error:
            self._failed(error)

    def _transmit(self, frame: Iterable[bytes]) -> None:
        parts, self._posted, self._size = [*self._posted, *frame], [], 0
        super()._transmit(self._sealed(parts))

    def _sealed(self, parts: Sequence[bytes]) -> Iterator[bytes]:
        if sum(map(len, parts)) <= SEALED_AT_A_TIME:
            parts = (b''.join(parts),)
        for part in parts:
            view = memoryview(part)
            for at in range(0, len(part), SEALED_AT_A_TIME):
                unsent, self._unsent = self._unsent, b''
                yield unsent + self._tls.seal((view[at:at + SEALED_AT_A_TIME],))
