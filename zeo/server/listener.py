"""Accepts on a listening socket, and hears those who come in until each gets a thread of its own."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import selectors
import socket
import socketserver
import threading
import time
from collections import deque
from functools import partial
from typing import Any
from typing import Protocol

from zeo.server import addresses
from zeo.server.addresses import Address
from zeo.server.connection import Connection
from zeo.server.connection import Heard
from zeo.server.threads import Threads

logger = logging.getLogger(__name__)

#: How long in seconds clients that have registered may wait for their threads while others come in: to wake
#: threads one by one takes longer than to register the others first.
_HANDING_OVER = 0.01

#: So many connections are accepted before who is there already is heard.
_AT_ONCE = 50

#: The kernel takes no more while so many bytes wait in it to be sent: on a slow line, what is small and
#: comes after a blob does not wait for megabytes.
UNSENT = 128 * 1024

#: TCP keep-alive: after so many idle seconds, every so many seconds, so many times.
KEEPALIVE_IDLE, KEEPALIVE_INTERVAL, KEEPALIVE_COUNT = 60, 15, 4

#: So many seconds the kernel is to wait for a client's machine to acknowledge what was sent to it: keep-alive
#: begins only after that.  A client that lets what was sent lie in the kernel for so long is given up, too.
VANISHED_AFTER = KEEPALIVE_IDLE + KEEPALIVE_INTERVAL * KEEPALIVE_COUNT


class Host(Protocol):
    """What a listener needs of its server; all listeners have the same."""

    threads: Threads

    def admit(self, sock: socket.socket, client: str, host: str | None = None,
              address: Address | None = None) -> Connection | None: ...

    def serve(self, connection: Connection) -> None: ...

    def dismiss(self, connection: Connection) -> None: ...


def _set_options(listening: socket.socket) -> None:
    """Of the connections, which inherit them where sockets come from BSD, and so on Linux."""
    if listening.family == socket.AF_UNIX:
        return
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in [('TCP_NODELAY', 1), ('TCP_NOTSENT_LOWAT', UNSENT), ('TCP_KEEPIDLE', KEEPALIVE_IDLE),
                          ('TCP_KEEPINTVL', KEEPALIVE_INTERVAL), ('TCP_KEEPCNT', KEEPALIVE_COUNT),
                          ('TCP_USER_TIMEOUT', VANISHED_AFTER * 1000)]:
        if hasattr(socket, option):
            listening.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


class Listener(socketserver.ThreadingMixIn, socketserver.BaseServer):
    """Accepts on one listening socket, hears who comes in, and has a thread for each who stays.

    What `socketserver` calls a request is a `Connection`.
    """

    daemon_threads = True  # `StorageServer.close` sees to their end
    block_on_close = False

    def __init__(self, server: Host, sock: socket.socket, *, file_is_ours: bool = True) -> None:
        sock.setblocking(False)  # who gave up between select and accept must not keep us there
        _set_options(sock)
        name = sock.getsockname()
        super().__init__(name, socketserver.BaseRequestHandler)
        self.socket = sock
        self.address: Address = name if isinstance(name, str) else name[:2]
        self._server = server
        self._file = addresses.socket_file(name) if isinstance(name, str) and file_is_ours else None
        self._clients = 0
        self._starving = False  # whether the last connection could not be accepted, or got no thread
        self._pause = threading.Event()  # set when the listener is to stop; then there is a byte in `_bell`
        self._ear, self._bell = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._ear, selectors.EVENT_READ)
        self._selector.register(sock, selectors.EVENT_READ)
        # Whom we hear, the oldest first, and who waits for a thread; they belong to the listener's thread.
        self._newcomers: dict[Connection, None] = {}
        self._staying: deque[Connection] = deque()
        self._hand_over_at = 0.0  # time.monotonic() at which none of them waits any longer
        self._thread = threading.Thread(
            target=self.serve_forever, daemon=True, name=f'zeo accept {addresses.describe(self.address)}')

    def serve_forever(self, poll_interval: float = 0) -> None:
        """Until `stop`; then nobody is heard any more."""
        while not self._pause.is_set():
            self._look()
        self._hand_over()
        while self._newcomers:
            connection, _ = self._newcomers.popitem()
            self.shutdown_request(connection)

    def _look(self) -> None:
        """Wait until something happens, and deal with it."""
        ready = self._selector.select(0 if self._staying else self._patience())
        now = time.monotonic()
        if self._staying and (not ready or now >= self._hand_over_at):
            self._hand_over()
        if not self._staying:
            self._hand_over_at = now + _HANDING_OVER
        for key, _ in ready:
            if key.data is not None:
                self._hear(key.data)
            elif key.fileobj is self.socket:
                self._accept()
        for late in list(itertools.takewhile(lambda each: each.deadline <= now, self._newcomers)):
            self._hear(late)

    def _patience(self) -> float | None:
        """How long the first of the newcomers may still say nothing."""
        for connection in self._newcomers:
            return max(connection.deadline - time.monotonic(), 0)
        return None

    def _accept(self) -> None:
        """Everybody who has come, but now and then others are heard, too."""
        try:
            for _ in range(_AT_ONCE):
                sock, address = self.socket.accept()
                self._welcome(sock, address)
        except (BlockingIOError, ConnectionError):  # there is nobody, or nobody any more
            pass
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self._starve(error.strerror)

    def _welcome(self, sock: socket.socket, address: Any) -> None:
        try:
            if not os.get_blocking(sock.fileno()):  # inherited as well, but not on Linux
                sock.setblocking(True)
            host = None
            if isinstance(address, tuple):
                host = address[0]
                client = addresses.describe(address)
            else:
                self._clients += 1
                client = f'{self.address}#{self._clients}'
            connection = self._server.admit(sock, client, host, self.address)
        except Exception:
            self.handle_error(sock, address)
            sock.close()
            return
        if connection is None:
            return
        if connection.speaks_tls:
            self._staying.append(connection)
            return
        try:
            self._selector.register(connection.line.sock, selectors.EVENT_READ, connection)
        except OSError:  # the kernel has no room for that
            self.handle_error(connection, client)
            self.shutdown_request(connection)
            return
        self._newcomers[connection] = None

    def _hear(self, connection: Connection) -> None:
        if connection not in self._newcomers:
            return  # it was late, and said something at the same time
        heard = connection.hear()
        if heard is Heard.LITTLE:
            return
        del self._newcomers[connection]
        self._selector.unregister(connection.line.sock)
        if heard is Heard.ENOUGH:
            self._staying.append(connection)
        else:
            self.shutdown_request(connection)

    def _hand_over(self) -> None:
        """Have a thread for each who stays."""
        while self._staying:
            connection = self._staying.popleft()
            self.process_request(connection, connection.session.client)

    def process_request(self, request: Any, client_address: Any) -> None:
        try:
            self._server.threads.run(partial(self.process_request_thread, request, client_address))
        except RuntimeError as error:  # there can be no more threads now
            self.shutdown_request(request)
            self._starve(error)
            return
        if self._starving:
            self._starving = False
            logger.warning('%s: connections are accepted again', addresses.describe(self.address))

    def finish_request(self, request: Any, client_address: Any) -> None:
        self._server.serve(request)

    def shutdown_request(self, request: Any) -> None:
        try:
            self._server.dismiss(request)
        except Exception:
            self.handle_error(request, request.session.client)

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.exception('%s: the connection of %s failed', addresses.describe(self.address), client_address)

    def _starve(self, reason: object) -> None:
        """What it takes to accept a connection is used up.

        It will be asked for again at once: neither spin nor fill the log.
        """
        if not self._starving:
            logger.error('%s: no connections can be accepted for now: %s', addresses.describe(self.address), reason)
        self._starving = True
        self._pause.wait(1.0)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._pause.set()
        self._bell.send(b'.')
        self._thread.join()
        self.server_close()

    def server_close(self) -> None:
        self._selector.close()
        self._ear.close()
        self._bell.close()
        self.socket.close()
        if self._file is not None:
            addresses.remove_socket_file(str(self.address), self._file)
