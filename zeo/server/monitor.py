"""A small web server beside the storage server: health, figures, and a page to look at.

It is for people and programs who look after the server, in a place that only they can reach: it only tells,
and takes no orders.  Each request has a connection and a thread of its own, of which there are
at most `AT_ONCE`, and `PATIENCE` seconds for its head, which may have `LONGEST_HEAD` bytes.
"""

import http.server
import io
import json
import logging
import select
import socket
import socketserver
import threading
import time
from collections.abc import Callable
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zeo.server import addresses
from zeo.server import figures
from zeo.server import metrics
from zeo.server.served import Served
from zeo.version import __version__

logger = logging.getLogger(__name__)

AT_ONCE = 8
PATIENCE = 5.0  # seconds
LONGEST_HEAD = 16 * 1024

PAGE = Path(__file__).with_name('page')

#: Path, and the file and type of what is there.
FILES = {
    '/': ('index.html', 'text/html; charset=utf-8'),
    '/page.css': ('page.css', 'text/css; charset=utf-8'),
    '/page.js': ('page.js', 'text/javascript; charset=utf-8'),
}

#: Nothing but what comes from here is shown or run, and nobody else may show it as their own.
HEADERS = {
    'Cache-Control': 'no-store',
    'Content-Security-Policy': "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
                               " base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    'Referrer-Policy': 'no-referrer',
    'X-Content-Type-Options': 'nosniff',
}

#: Status, type and content of an answer.
Answer = tuple[int, str, bytes]


class Monitor:
    """Tells about storages over HTTP on ``host`` and ``port``; until it is told of them, that they are opened.

    Raises `OSError`, whose text names the address and says what to do, if it cannot listen there.
    """

    def __init__(self, host: str, port: int) -> None:
        self._storages: Mapping[str, Served] | None = None
        self._is_closing: Callable[[], bool] = lambda: False
        self._files = {path: (kind, (PAGE / name).read_bytes()) for path, (name, kind) in FILES.items()}
        self._webs = [_Web(self, sock) for sock in addresses.listen(host, port)]

    @property
    def warning(self) -> str | None:
        """What it cannot tell, and what to do about it."""
        return None if metrics.AVAILABLE else metrics.MISSING

    @property
    def address(self) -> tuple[str, int]:
        """Where it can be reached; of several, the first."""
        host, port = self._webs[0].socket.getsockname()[:2]
        return host, port

    def start(self) -> None:
        """Answer requests, in background threads."""
        for web in self._webs:
            web.thread.start()

    def tell_about(self, storages: Mapping[str, Served], is_closing: Callable[[], bool]) -> None:
        """The server is ready; ``is_closing`` tells whether it still is."""
        self._is_closing = is_closing
        self._storages = storages

    def close(self) -> None:
        """End all threads, those of requests included."""
        for web in self._webs:
            if web.thread.ident is not None:
                web.shutdown()
                web.thread.join()
            web.server_close()

    # ---- what is answered; in the threads of requests

    def answer(self, path: str) -> Answer:
        if path in self._files:
            return 200, *self._files[path]
        if path == '/healthz':
            return self._health()
        if path in ('/metrics', '/figures.json'):
            if self._storages is None:
                return 503, 'text/plain', b'the storages are being opened\n'
            if path == '/figures.json':
                return 200, 'application/json', json.dumps(figures.of_server(self._storages)).encode()
            if not metrics.AVAILABLE:
                return 501, 'text/plain', metrics.MISSING.encode() + b'\n'
            return 200, metrics.CONTENT_TYPE, metrics.exposition(figures.of_server(self._storages))
        return 404, 'text/plain', b'there are /, /healthz, /metrics and /figures.json\n'

    def _health(self) -> Answer:
        storages = {name: _health_of(served) for name, served in (self._storages or {}).items()}
        if self._is_closing():
            status = 'closing'
        elif self._storages is None:
            status = 'opening'
        else:
            status = 'ok' if all(each == 'ok' for each in storages.values()) else 'failing'
        told = json.dumps({'status': status, 'version': __version__, 'storages': storages})
        return 200 if status == 'ok' else 503, 'application/json', told.encode() + b'\n'


def _health_of(served: Served) -> str:
    """Whether a storage answers, and transactions that take too long are ended."""
    storage = served.storage
    try:
        if not getattr(storage, 'is_connected', lambda: True)():
            return 'not connected to its own server'
        storage.lastTransaction()
    except Exception as error:
        return f'{type(error).__name__}: {error}'
    return 'the commit clock has ended' if served.lock.clock_is_alive is False else 'ok'


class _Web(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """Answers what comes over one listening socket."""

    daemon_threads = False  # `server_close` waits for them; none takes longer than it may
    block_on_close = True

    def __init__(self, monitor: Monitor, sock: socket.socket) -> None:
        sock.setblocking(False)
        name = sock.getsockname()
        socketserver.BaseServer.__init__(self, name, _Request)
        self.socket = sock
        self.server_name, self.server_port = name[:2]
        self.monitor = monitor
        self._free = threading.BoundedSemaphore(AT_ONCE)
        self.thread = threading.Thread(
            target=self.serve_forever, args=(0.1,), daemon=True, name=f'zeo monitor {addresses.describe(name)}')

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread can be started
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug('%s: a request failed', addresses.describe(client_address), exc_info=True)


class _Request(http.server.BaseHTTPRequestHandler):
    """One request, and the end of its connection."""

    timeout = PATIENCE  # of each write
    server: _Web

    def version_string(self) -> str:
        return f'zeo/{__version__}'

    def handle_one_request(self) -> None:
        self.close_connection = True
        self.rfile.close()
        self.rfile = io.BufferedReader(io.BytesIO(self._head()))
        self.raw_requestline = self.rfile.readline()
        if self.raw_requestline and self.parse_request():
            if self.command in ('GET', 'HEAD'):
                self._answer()
            else:
                self.send_error(405, 'only GET and HEAD')
        self.wfile.flush()

    def _head(self) -> bytes:
        """The head of the request, in so much time and so many bytes."""
        head = b''
        poll = select.poll()  # `select.select` takes no socket beyond the first 1,024
        poll.register(self.connection, select.POLLIN)
        deadline = time.monotonic() + PATIENCE
        while b'\r\n\r\n' not in head and b'\n\n' not in head and len(head) < LONGEST_HEAD:
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                return b''
            more = self.connection.recv(LONGEST_HEAD - len(head))
            if not more:
                return b''
            head += more
        return head

    def _answer(self) -> None:
        status, kind, content = self.server.monitor.answer(self.path.partition('?')[0])
        self.send_response(status)
        self.send_header('Content-Type', kind)
        self.send_header('Content-Length', str(len(content)))
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == 'GET':
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Health is asked for every second: nothing for the log, unless it is to have everything."""
        logger.debug('%s: ' + format, addresses.describe(self.client_address), *args)
