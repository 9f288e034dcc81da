"""Carries outboxes to sockets without ever waiting on a slow one.

Whoever has appended something to an outbox calls `Line.push`, which sends what the kernel takes at
once.  Only one thread at a time may send over a socket: it has the *turn to write*.  Who finds it taken
goes away, because the one who has it looks into the outbox once more after giving it back.  When the
kernel takes no more, the turn passes to the `Writer`'s thread, which sends the rest as the client reads
it.

With TLS, what is taken from the outbox is encrypted when it is taken: by who has the turn, so in the order
in which it is sent (see `zeo.wire.tls`).
"""

from __future__ import annotations

import contextlib
import logging
import select
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from zeo.server.outbox import Outbox
from zeo.wire import pieces

if TYPE_CHECKING:
    from zeo.wire.tls import Tls

logger = logging.getLogger(__name__)

#: Most parts that one system call takes (IOV_MAX is 1024 on Linux).
_MOST_PARTS = 256

#: How long in seconds a session's own thread helps the kernel before it leaves that to the writer.
PATIENCE = 0.2

#: So many bytes are sent at a time by those who do not send for themselves: a thread that commits must
#: not be kept by one client that reads as fast as others write to it, nor must the writer.
_AT_A_TIME = 1024 * 1024

DONT_WAIT = socket.MSG_DONTWAIT

#: So many bytes are encrypted at a time.
_SEALED_AT_A_TIME = 256 * 1024

#: Who sends a file looks so often, in seconds, whether the connection has ended.
_LOOK_UP = 1.0

#: How long in seconds the end of a connection waits for a thread that is just sending.
CLOSING_PATIENCE = 10.0


class Line:
    """A connected socket, and the outbox of what is to be said over it."""

    def __init__(self, sock: socket.socket, outbox: Outbox, writer: 'Writer') -> None:
        self.sock = sock
        self.outbox = outbox
        self._send = sock.send
        self._take: Callable[[], list[bytes] | list[bytes | memoryview]] = outbox.take
        self._writer = writer
        # The turn to write.  Held for one sending that does not wait, or by the writer's thread
        # for as long as the client does not read.
        self._turn = threading.Lock()
        # What was taken from the outbox and not yet sent, few parts; belongs to who has the turn.
        self._rest: list[memoryview | bytes] = []
        # Guards `_closed`, and the socket against being closed while it is shut down; a leaf.
        self._ending = threading.Lock()
        self._closed = False
        self._sends_files = False  # whether it was set up for that
        outbox.deliver = self.push
        outbox.send_file = self.send_file

    def push(self, patience: float = 0.0) -> None:
        """Send what is in the outbox; wait for the client at most ``patience`` seconds in all.

        Any thread may call this, with no mutex held; only the session's own has patience.  It never
        raises: a broken connection is noticed by the thread that reads from it.
        """
        outbox = self.outbox
        while outbox.backlog:
            if not self._turn.acquire(False):
                return  # who has it looks again
            if not self.send(patience):
                self._writer.take_over(self)  # with the turn
                return
            self._turn.release()
        if outbox.gone:
            self.hang_up()

    def send(self, patience: float = 0.0) -> bool:
        """Send until there is nothing left (True) or the kernel takes no more.  The turn is held.

        Without patience it also ends (False) when that was enough for once.
        """
        outbox, rest = self.outbox, self._rest
        until = 0.0
        enough = outbox.size_sent + _AT_A_TIME
        while True:
            if not rest:
                if not outbox.backlog:
                    return True
                rest.extend(self._take())
                if not rest:
                    return True
                if not patience and outbox.size_sent > enough:
                    return False
            try:
                if len(rest) == 1:
                    sent = self._send(rest[0], DONT_WAIT)
                else:
                    sent = self.sock.sendmsg(rest[:_MOST_PARTS], (), DONT_WAIT)
            except BlockingIOError:
                if patience:
                    now = time.monotonic()
                    until = until or now + patience
                    if self._wait(until - now):
                        continue
                return False
            except Exception as error:
                if not isinstance(error, OSError):
                    logger.exception('%s: a client cannot be sent to', threading.current_thread().name)
                outbox.end()  # the reading thread finds out, too
                rest.clear()
                return True
            outbox.size_sent += sent
            while rest and sent >= len(rest[0]):
                sent -= len(rest.pop(0))
            if sent:
                rest[0] = memoryview(rest[0])[sent:]

    def send_file(self, head: bytes, file: int, at: int, size: int, tail: bytes, patience: float) -> bool:
        """Send a message with so many bytes of a file in the middle, after what is in the outbox.

        The calling thread has the turn for as long as the client takes to read that, so never may one that
        commits call this.  False if the client is gone.  If it takes nothing for ``patience`` seconds,
        `TimeoutError`: it is gone then, too, since half a message may be sent.
        """
        outbox = self.outbox
        until = time.monotonic() + patience

        def sent(count: int) -> None:
            nonlocal until
            now = time.monotonic()
            if count:
                outbox.size_sent += count
                until = now + patience
            if outbox.gone:
                raise ConnectionError
            if now > until:
                raise TimeoutError('the client does not read')

        so_far = outbox.size_sent
        try:
            while not self._turn.acquire(timeout=_LOOK_UP):
                sent(0)
                if outbox.size_sent != so_far:  # by the writer
                    so_far, until = outbox.size_sent, time.monotonic() + patience
            try:
                while not self.send(_LOOK_UP):
                    sent(0)
                if not self._sends_files:
                    self._sends_files = True
                    self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO,
                                         struct.pack('ll', int(_LOOK_UP), int(_LOOK_UP % 1 * 1e6)))
                sent(0)
                pieces.send(self.sock, head, file, at, size, tail, sent)
                return True
            except BaseException:
                outbox.end()  # there may be half a message
                raise
            finally:
                self._turn.release()
                self.push()
        except OSError as error:
            self.hang_up()
            if isinstance(error, TimeoutError) and error.errno is None:
                raise  # else it is the network's
            if not isinstance(error, (ConnectionError, TimeoutError)):
                logger.error('%s: a blob cannot be sent: %s', threading.current_thread().name, error)
            return False

    def _wait(self, seconds: float) -> bool:
        """Wait until the kernel takes more; True also if the connection has ended."""
        poll = select.poll()
        poll.register(self.sock, select.POLLOUT)
        return seconds > 0 and bool(poll.poll(seconds * 1000))

    def give_turn_back(self) -> None:
        """The writer has sent everything."""
        self._turn.release()
        self.push()  # what was appended before the turn was free

    def hang_up(self) -> None:
        """End the connection in both directions; the thread that reads from it wakes up.  Any thread."""
        self.outbox.end()
        self.shut(socket.SHUT_RDWR)

    def shut(self, how: int) -> None:
        """`socket.shutdown`, unless the socket is closed, or ended by the client."""
        with self._ending, contextlib.suppress(OSError):
            if not self._closed:
                self.sock.shutdown(how)

    def close(self) -> None:
        """Close the socket, when nobody sends any more.  The thread that reads calls this, last of all."""
        if self._closed:
            return
        self.hang_up()
        # The writer sees the end and gives the turn back.  It is kept then, so that a late `push`
        # finds it taken and never touches a closed socket, or one that has got its number.
        self._turn.acquire(timeout=CLOSING_PATIENCE)
        with self._ending:
            self._closed = True
            self.sock.close()
        self.outbox.forget_line()


class SecureLine(Line):
    """The same with TLS."""

    def __init__(self, sock: socket.socket, outbox: Outbox, writer: 'Writer', tls: Tls) -> None:
        super().__init__(sock, outbox, writer)
        self._tls = tls
        self._take = self._take_sealed
        outbox.send_file = None
        tls.answer = self._answer

    def _take_sealed(self) -> list[bytes]:
        """With the turn: the next parts of the outbox, encrypted."""
        outbox = self.outbox
        parts = outbox.take(_SEALED_AT_A_TIME)
        if len(parts) == 1 and len(parts[0]) > _SEALED_AT_A_TIME:
            whole = memoryview(parts[0])
            outbox.put_back(whole[_SEALED_AT_A_TIME:])
            parts = [whole[:_SEALED_AT_A_TIME]]
        try:
            sealed = self._tls.seal(parts)
        except OSError:
            outbox.end()  # the reading thread finds out, too
            return []
        return [sealed] if sealed else []

    def _answer(self) -> None:
        """Send what TLS has to say itself; whoever is sending now says it with what comes next."""
        if self._turn.acquire(False):
            self._rest.extend(self._take_sealed())
            if not self.send():
                self._writer.take_over(self)
                return
            self._turn.release()
            self.push()

    def close(self) -> None:
        """Tell the client that this is the end, if it takes that at once."""
        if not self._closed and self._turn.acquire(False):
            if not self._rest and not self.outbox.backlog:
                with contextlib.suppress(OSError):
                    self.sock.send(self._tls.farewell(), DONT_WAIT)
            self._turn.release()
        super().close()
        self._take = self.outbox.take
        self._tls.answer = self.outbox.deliver


class Writer:
    """The thread that sends to clients that do not read as fast as they are sent to."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        # Lines given to the writer, None to end it; a byte in `_bell` says that there is one.
        self._new: deque[Line | None] = deque()
        self._ear, self._bell = socket.socketpair()
        self._ear.setblocking(False)
        self._bell.setblocking(False)
        self._selector.register(self._ear, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name='zeo writer', daemon=True)

    def start(self) -> None:
        self._thread.start()

    def take_over(self, line: Line) -> None:
        """Send the rest of a line, whose turn the caller has and gives away."""
        self._new.append(line)
        self._ring()

    def _ring(self) -> None:
        try:
            self._bell.send(b'.')
        except BlockingIOError:
            pass  # it is ringing
        except OSError:
            pass  # it has ended

    def _run(self) -> None:
        try:
            while True:
                for key, _ in self._selector.select():
                    if key.data is None:
                        self._ear.recv(4096)
                        if not self._welcome():
                            return
                    else:
                        self._carry_on(key.data)
        except Exception:
            logger.critical('%s: failed', threading.current_thread().name, exc_info=True)
            raise

    def _welcome(self) -> bool:
        while self._new:
            line = self._new.popleft()
            if line is None:
                return False
            try:
                self._selector.register(line.sock, selectors.EVENT_WRITE, line)
            except (ValueError, KeyError, OSError):  # closed meanwhile
                line.outbox.end()
                line.give_turn_back()
        return True

    def _carry_on(self, line: Line) -> None:
        try:
            done = line.outbox.gone or line.send()
        except Exception:  # there may be no memory; others must not suffer for it
            logger.exception('%s: a client cannot be sent to', threading.current_thread().name)
            line.outbox.end()
            done = True
        if done:
            self._selector.unregister(line.sock)
            line.give_turn_back()

    def close(self) -> None:
        """End the thread; what is not sent by now is not sent."""
        self._new.append(None)
        self._ring()
        if self._thread.ident is not None:
            self._thread.join()
        self._selector.close()
        self._ear.close()
        self._bell.close()
