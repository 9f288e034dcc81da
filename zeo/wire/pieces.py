"""Pieces of blobs between files and sockets, copied by the kernel and not by way of this process's memory.

A piece is an ordinary message, with much data in the middle.  Who sends it has the kernel send the data
from the file (sendfile(2)).  Who receives it reads the beginning of the message, has the kernel put the
data into a file, by way of a pipe (splice(2)), and reads the message's end.  Where the system cannot do
that, data are read and written as usual.

With TLS there is none of this, since the file and the socket do not carry the same bytes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable
from collections.abc import Iterator
from typing import IO

#: A piece has at least and at most so many bytes of data, but for the last one of a blob.
SMALLEST = 128 * 1024
LARGEST = 1024 * 1024

#: A message with a piece is not longer than so many bytes.
LONGEST_MESSAGE = LARGEST + 1000

#: How long in seconds a piece may take, roughly: whatever else is to be said has to wait for it.
A_WHILE = 0.01

#: What a pipe is to hold, if the system lets it.
_PIPE = 1024 * 1024

#: So many bytes are read at a time where the kernel does not copy.
_BUFFER = 256 * 1024

#: What a system call says that does not work with such a file or such a socket.
_CANNOT = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})

#: More comes at once: tell the kernel to wait for it (not on every system).
_MORE = getattr(socket, 'MSG_MORE', 0)


# ---- from a file ---------------------------------------------------------------------

def cut(size: int, now: Callable[[], float] = time.monotonic) -> Iterator[tuple[int, int]]:
    """Where the pieces of a blob of so many bytes begin, and how long they are to be.

    That depends on how long it took to send the one before: until the next is asked for.
    """
    at, length = 0, SMALLEST
    while at < size:
        piece = min(length, size - at)
        begin = now()
        yield at, piece
        took = now() - begin
        if took > A_WHILE:
            length = max(length // 2, SMALLEST)
        elif took < A_WHILE / 2:
            length = min(length * 2, LARGEST)
        at += piece


def send(sock: socket.socket, head: bytes, file: int, at: int, size: int, tail: bytes,
         sent: Callable[[int], object]) -> None:
    """Send ``head``, ``size`` bytes of the file, and ``tail``, which may leave together with what comes next.

    ``sent`` is told how many bytes it were after each step, 0 if the socket's own time limit (SO_SNDTIMEO) has
    passed; it may raise what is to end this.  Raises `OSError`, also if the file ends early.
    """
    _send_all(sock, head, sent)
    while size:
        try:
            count = os.sendfile(sock.fileno(), file, at, size)
            if not count:
                raise OSError(errno.EIO, 'a blob has become shorter while it was sent')
        except BlockingIOError:
            count = 0
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
            count = min(size, _BUFFER)
            data = os.pread(file, count, at)
            if len(data) < count:
                raise OSError(errno.EIO, 'a blob has become shorter while it was sent') from None
            _send_all(sock, data, sent)
            at += count
            size -= count
            continue
        at += count
        size -= count
        sent(count)
    _send_all(sock, tail, sent)


def _send_all(sock: socket.socket, data: bytes, sent: Callable[[int], object]) -> None:
    rest = memoryview(data)
    while rest:
        try:
            count = sock.send(rest, _MORE)
        except BlockingIOError:
            count = 0
        rest = rest[count:]
        sent(count)


# ---- into a file ---------------------------------------------------------------------

class Destination:
    """A new file, written from its beginning to its end, by one thread at a time."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file  # not buffered
        self._pipe: tuple[int, int] | None = None  # empty between two calls
        self._splices = hasattr(os, 'splice')
        self.size = 0  # of what was written

    def write(self, data: bytes | memoryview) -> None:
        """Write all of it; raises `OSError`."""
        rest = memoryview(data)
        while rest:
            count = self._file.write(rest)
            rest = rest[count:]
            self._wrote(count)

    def _wrote(self, count: int) -> None:
        self.size += count

    def pipe(self) -> tuple[int, int] | None:
        """By way of which the kernel copies; None if it cannot."""
        if self._pipe is None and self._splices:
            try:
                self._pipe = os.pipe()
                with contextlib.suppress(OSError):  # one user's pipes may hold so much in all
                    fcntl.fcntl(self._pipe[1], fcntl.F_SETPIPE_SZ, _PIPE)
            except OSError:
                self._splices = False  # the process has no more file descriptors
        return self._pipe

    def drain(self, count: int) -> None:
        """Write what is in the pipe; raises `OSError`, after which it is closed."""
        assert self._pipe is not None
        try:
            while count:
                try:
                    written = os.splice(self._pipe[0], self._file.fileno(), count)
                    self._wrote(written)
                except OSError as error:
                    if error.errno not in _CANNOT:
                        raise
                    data = os.read(self._pipe[0], count)  # such a file is only written to
                    written = len(data)
                    self.write(data)
                count -= written
        except OSError:
            self.give_up_pipe()
            raise

    def give_up_pipe(self) -> None:
        """Do without."""
        self._splices = False
        pipe, self._pipe = self._pipe, None
        for end in pipe or ():
            os.close(end)

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        """Raises `OSError` if the system does only now."""
        self.give_up_pipe()
        self._file.close()


class Passing:
    """The data of one piece, while they arrive.

    ``left`` bytes of them are still to come, after the ``head`` bytes with which the message begins and before
    its ``tail``.  If the file cannot be written, ``failed`` is called with the error, and the rest is received
    for nothing.
    """

    __slots__ = ('head', 'left', 'tail', '_destination', '_failed')

    def __init__(self, head: int, left: int, tail: bytes, destination: Destination,
                 failed: Callable[[OSError], object]) -> None:
        self.head = head
        self.left = left
        self.tail = tail
        self._destination: Destination | None = destination
        self._failed = failed

    def take(self, data: memoryview) -> None:
        """These were received already."""
        self.left -= len(data)
        if self._destination is not None:
            try:
                self._destination.write(data)
            except OSError as error:
                self._fail(error)

    def receive(self, sock: socket.socket) -> int:
        """Receive more, as `socket.recv` does: how many bytes, 0 at the end; raises what that raises."""
        destination = self._destination
        pipe = None if destination is None else destination.pipe()
        if destination is None or pipe is None:
            buffer = memoryview(bytearray(min(self.left, _BUFFER)))
            count = sock.recv_into(buffer)
            self.take(buffer[:count])
            return count
        try:
            count = os.splice(sock.fileno(), pipe[1], self.left)
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
            destination.give_up_pipe()
            return self.receive(sock)
        self.left -= count
        try:
            destination.drain(count)
        except OSError as error:
            self._fail(error)
        return count

    def _fail(self, error: OSError) -> None:
        self._destination = None
        self._failed(error)


#: Told how a message begins, and how long it is; returns where its data go, None if it is to be received
#: as others are.
Divert = Callable[[memoryview, int], Passing | None]

