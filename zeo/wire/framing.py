"""Bytes to frames and back: length-prefixed framing.

A frame is a length N as four bytes, unsigned and big-endian, then N bytes of payload, N > 0.  The
stream consists of frames and nothing else.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING

from zeo.errors import ProtocolError

if TYPE_CHECKING:
    import socket

    from zeo.wire.pieces import Divert
    from zeo.wire.pieces import Passing

#: One whole frame, header included, in parts to be sent one after the other.  Long records keep a
#: part of their own, so that putting a frame together does not copy them.
Frame = tuple[bytes, ...]

#: What is in a frame.  A view is only lent: it has to be done with before more is received.
Payload = bytes | bytearray | memoryview

#: The longest payload the length prefix can express.
LONGEST = 2**32 - 1

HEADER = Struct('>I')
assert HEADER.size == 4

_pack = HEADER.pack
_unpack_from = HEADER.unpack_from

#: Payloads up to this length are copied to make one part of them.
JOIN_UP_TO = 16 * 1024

#: A buffer begins with so many bytes: most connections, most of the time, need no more.  (Python itself keeps
#: memory for what is so small.  Of more, the C library would keep some for each thread that has freed it once.)
_SMALL = 480

#: A long frame's buffer starts no larger than this and doubles as data arrives, so that a length
#: prefix alone makes nobody allocate much.
_FIRST_STEP = 4 * 1024 * 1024


def frame(head: bytes, body: bytes = b'', tail: bytes = b'') -> Frame:
    """Put the header before a payload given in one to three parts."""
    length = len(head) + len(body) + len(tail)
    if length <= JOIN_UP_TO:
        return (b''.join((_pack(length), head, body, tail)),)
    if length > LONGEST:
        raise ProtocolError(f'a message of {length} bytes is longer than the protocol can carry')
    return tuple([part for part in (_pack(length), head, body, tail) if part])


class Inbox:
    """Bytes in, payloads out: what was received and is not yet taken.

    Whoever reads the socket lets it write into `buffer()`, says with `advance()` how much came, and
    takes payloads with `next()` until there is none.  Not thread safe: it belongs to whoever has the
    right to read.

    ``limit`` is the length in bytes of the longest acceptable payload and may be changed at any time.
    ``size`` is how many bytes are received at a time when many come.  ``keep`` is how many bytes of
    memory may be kept for long payloads: one of these is lent as a view of that memory, and is
    overwritten when the next one arrives.  ``divert`` may send the data of a long payload elsewhere, which
    is no payload then; while ``passing`` is not None, `pass_on` receives.
    """

    __slots__ = ('limit', 'divert', 'passing', '_size', '_keep', '_kept', '_buffer', '_view', '_start', '_end',
                 '_long', '_length', '_filled')

    def __init__(self, limit: int = LONGEST, size: int = 64 * 1024, keep: int = 0) -> None:
        self.limit = limit
        self.divert: Divert | None = None
        self.passing: Passing | None = None
        self._size = size
        self._keep = keep
        # Memory that is new is the dearest part of receiving 1 MB: each of its pages is a fault.
        self._kept = bytearray()
        self._buffer = bytearray(min(size, _SMALL))
        self._view = memoryview(self._buffer)
        self._start = self._end = 0  # what lies between them was received and is not yet taken
        self._long: bytearray | None = None  # a payload too long for the buffer, while it arrives
        self._length = 0  # its whole length
        self._filled = 0  # how much of it is there

    def buffer(self) -> memoryview:
        """Where the next bytes belong; never empty.  Use it at once and keep no reference."""
        if self._long is None:
            return self._view[self._end:] if self._end else self._view
        return memoryview(self._long)[self._filled:self._length]

    def beginning(self, count: int) -> bytes:
        """The first bytes, at most so many, of what was received and is not yet taken."""
        return bytes(self._view[self._start:min(self._start + count, self._end)])

    def advance(self, count: int) -> None:
        """Note that ``count`` bytes were written into `buffer()`."""
        if self._long is None:
            self._end += count
            if self._end == len(self._buffer) < self._size:
                self._grow()
            return
        self._filled += count
        have = len(self._long)
        if self._filled == have < self._length:
            self._long += bytes(min(have, self._length - have))

    def received(self, count: int) -> Payload | None:
        """`advance`, then `next`: in one step if what came is just one whole frame, as it mostly is."""
        if self._long is None and not self._end and count > 4:
            length, = _unpack_from(self._buffer)
            if length + 4 == count and length <= self.limit:
                return bytes(self._view[4:count])
        self.advance(count)
        return self.next()

    def next(self) -> Payload | None:
        """The next whole payload, or None until more bytes have come.

        Raises `ProtocolError` for a length that is zero or beyond the limit.
        """
        if self._long is not None:
            if self._filled < self._length:
                return None
            payload, self._long = self._long, None
            return memoryview(payload)[:self._length] if payload is self._kept else payload
        start = self._start
        have = self._end - start
        if have < 4:
            if not have:
                self._start = self._end = 0
            elif start + 4 > len(self._buffer):
                self._to_front()
            return None
        length, = _unpack_from(self._buffer, start)
        if not 0 < length <= self.limit:
            raise ProtocolError(f'a frame of {length} bytes; this side takes 1 to {self.limit}')
        end = start + 4 + length
        if end <= self._end:
            if end == self._end:
                self._start = self._end = 0
            else:
                self._start = end
            return bytes(self._view[start + 4:end])
        if len(self._buffer) < length + 4 <= self._size:
            self._grow()
        if length + 4 > len(self._buffer):
            if self.divert is not None and self._pass(self.divert, length):
                return None
            self._long = self._memory(length, have)
            self._long[:have - 4] = self._view[start + 4:self._end]
            self._length = length
            self._filled = have - 4
            self._start = self._end = 0
        elif end > len(self._buffer):
            self._to_front()
        return None

    def _pass(self, divert: Divert, length: int) -> bool:
        """Whether the data of the long payload that begins here go elsewhere; those that are here are gone."""
        at = self._start + 4
        passing = divert(self._view[at:self._end], length)
        if passing is None:
            return False
        at += passing.head
        end = min(self._end, at + passing.left)
        passing.take(self._view[at:end])
        self._start = end
        self._to_front()
        self.passing = passing
        return True

    def pass_on(self, sock: socket.socket) -> int:
        """Receive once, while ``passing``; how many bytes, 0 at the end of the stream.

        Raises what `socket.recv` raises, and `ProtocolError` if the payload does not end as it has to.
        """
        passing = self.passing
        assert passing is not None
        if passing.left:
            return passing.receive(sock)
        # No more than the end, and how the next one begins, so that its data can be passed on, too.
        tail = passing.tail
        count = sock.recv_into(self._view[self._end:len(tail) + 4 + passing.head])
        self._end += count
        if self._end >= len(tail):
            if self._view[:len(tail)] != tail:
                raise ProtocolError('a piece of a blob does not end as it has to')
            self._start = len(tail)
            self.passing = None
        return count

    def _memory(self, length: int, have: int) -> bytearray:
        """Where a long payload of that length belongs, or begins, of which so many bytes are there."""
        if length > self._keep:
            return bytearray(min(length, max(_FIRST_STEP, have)))
        if length > len(self._kept):
            self._kept = bytearray(length)
        return self._kept

    def _grow(self) -> None:
        buffer = bytearray(self._size)
        buffer[:self._end] = self._view[:self._end]
        self._buffer, self._view = buffer, memoryview(buffer)

    def _to_front(self) -> None:
        have = self._end - self._start
        self._buffer[:have] = self._buffer[self._start:self._end]
        self._start, self._end = 0, have
