"""A network between client and server that does what a test wants: nothing, late, in pieces, or no more."""

import contextlib
import socket
import struct
import threading
from typing import Any

UP, DOWN = 'to the server', 'to the client'


class Proxy:
    """Passes TCP connections on to ``target``, each direction in a thread of its own.

    The attributes may be changed at any time: ``pieces`` is how many bytes are passed on at once (0: as
    many as there are), ``delay`` the seconds before each piece.
    """

    def __init__(self, target: tuple[str, int]) -> None:
        self.target = target
        self.pieces = 0
        self.delay = 0.0
        self.connections = 0
        self.passed = {UP: 0, DOWN: 0}      # bytes; only indicative while more connections than one are in use
        self._flowing = threading.Event()  # cleared: nothing is passed on, and nobody is told
        self._flowing.set()
        self._closed = threading.Event()
        self._cut: dict[str, int] = {}  # by direction: how many bytes are still passed on
        self._mutex = threading.Lock()  # guards the following and `_cut`
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listening = socket.create_server(('127.0.0.1', 0))
        self.address = self._listening.getsockname()
        self._start(self._accept)

    def _start(self, run: Any, *args: Any) -> None:
        thread = threading.Thread(target=run, args=args, name='proxy', daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(self.target)
            except OSError:
                client.close()
                continue
            with self._mutex:
                self.connections += 1
                self._sockets |= {client, server}
                if self._closed.is_set():
                    client.close()
                    server.close()
                    return
            for sock in client, server:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._start(self._pass_on, client, server, UP)
            self._start(self._pass_on, server, client, DOWN)

    def _pass_on(self, source: socket.socket, sink: socket.socket, direction: str) -> None:
        try:
            while data := source.recv(65536):
                size = self.pieces or len(data)
                for at in range(0, len(data), size):
                    if self.delay:
                        self._closed.wait(self.delay)
                    self._flowing.wait()
                    piece, cut = self._until_cut(data[at:at + size], direction)
                    sink.sendall(piece)
                    self.passed[direction] += len(piece)
                    if cut:
                        return
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        finally:
            self._end(source, sink)

    def _until_cut(self, data: bytes, direction: str) -> tuple[bytes, bool]:
        with self._mutex:
            left = self._cut.get(direction)
            if left is None:
                return data, False
            if len(data) < left:
                self._cut[direction] = left - len(data)
                return data, False
            del self._cut[direction]
            return data[:left], True

    @staticmethod
    def _end(*sockets: socket.socket) -> None:
        for sock in sockets:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    # ---- what tests want

    def cut_after(self, count: int, direction: str) -> None:
        """Cut the connection when so many more bytes have gone in that direction."""
        with self._mutex:
            self._cut = {direction: count}

    def mend(self) -> None:
        """Cut nothing any more."""
        with self._mutex:
            self._cut = {}

    def hold(self) -> None:
        """Swallow everything from now on without a word, as a cable that was pulled out."""
        self._flowing.clear()

    def release(self) -> None:
        """The cable is back, with what was on its way."""
        self._flowing.set()

    def reset(self) -> None:
        """End all connections with a TCP reset in both directions."""
        with self._mutex:
            sockets, self._sockets = self._sockets, set()
        for sock in sockets:
            with contextlib.suppress(OSError):  # it has ended already
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
                # Closing a socket that another thread reads from only resets when that has ended.
                sock.shutdown(socket.SHUT_RD)
            sock.close()

    def half_close(self) -> None:
        """Tell each side that the other will not send any more, and pass on nothing but that."""
        with self._mutex:
            sockets = list(self._sockets)
        for sock in sockets:
            try:
                sock.shutdown(socket.SHUT_WR)
            except OSError:
                pass

    def close(self) -> None:
        """End everything."""
        self._closed.set()
        self._flowing.set()
        self._end(self._listening)
        self._listening.close()
        with self._mutex:
            sockets = list(self._sockets)
        self._end(*sockets)
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()
        for sock in sockets:
            sock.close()

    def __enter__(self) -> 'Proxy':
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
