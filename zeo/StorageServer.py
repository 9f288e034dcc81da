"""Listens, accepts, gives each client a thread and a session; ends them all in order.

Threads of a server process, each named for what it does:

- ``zeo accept ADDRESS``: one for each listening socket (`socketserver`), accepts connections, greets, and hears
  who comes in: until the first request, or without TLS until `register` is answered if that takes no time.  It
  waits for nobody; `StorageServer.close` ends it by a byte in its bell, and it lets go of those it still hears;
- ``zeo client ADDRESS``: one for each connection from then on, reads from the socket and runs the session: it is
  in recv, in the storage, or sending to its own client; TLS is agreed on here, too.  When the client has left it
  is a ``zeo spare`` for some seconds, and may serve the next one; there are never more than there may be
  connections (`zeo.server.threads`).  `StorageServer.close` shuts their sockets and joins them;
- ``zeo writer``: one, sends to clients that do not read fast enough (`zeo.server.writer`);
- ``zeo pulse``: one, tells clients that the server lives (`zeo.server.pulse`);
- ``zeo voter STORAGE``: one for each storage, runs votes that had to wait and are not quick (`zeo.server.served`);
- ``zeo commit clock STORAGE``: one for each storage, ends transactions that take too long;
- ``zeo poller STORAGE``: one for each storage that other servers write to, too: looks for what they do
  (`zeo.server.gateway`);
- ``zeo pack STORAGE`` and the like: one for each request that may take long, while it lasts;
- ``zeo monitor ADDRESS``: one for each socket of the monitor, beside one for each request of a browser and the
  like, of which there are few at a time (`zeo.server.monitor`).

Locks, from the outermost to the innermost; who holds one may take only those below it:

1. the commit lock of a storage (`zeo.server.commitlock`; no thread ever waits in it): from vote to
   finish or abort;
2. the storage's own locks, inside its calls; for one that other servers write to, that is the gateway's turn
   to look at the database and to announce, held while the database is asked;
3. the publisher's mutex: appending an announcement to all outboxes;
4. a transaction's mutex: one move of its state;
5. an outbox' mutex: appending or taking; a leaf.

Beside these, `Line`'s turn to write is only ever tried, never waited for (except to close the socket, and by
who sends a blob from its file, in a thread that holds nothing else), and so is the lock of the one pack in
progress (`zeo.server.packing`).  All others are leaves, each for what stands beside it: the mutexes inside the
commit lock, of the list of connections, of a session's jobs that go on beside it, of a line's closing, of what
TLS encrypts (`zeo.wire.tls`), of how many iterators there are, of the sessions of
a storage, of the threads for clients, of a gateway's idle readers, and of lines that are logged seldom, with
their hosts.  The lock for a gateway's oids is held while the database is asked for some, and nothing is taken
under it.  No storage is called and nothing is sent under 3, 4, 5 or a leaf.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import itertools
import logging
import os
import selectors
import socket
import socketserver
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING
from typing import Any

from zeo.errors import ProtocolError
from zeo.errors import TlsError
from zeo.server import addresses as listening
from zeo.server.backing import POLL_INTERVAL
from zeo.server.limits import FIRST_FRAMES
from zeo.server.limits import READERS_FRAMES
from zeo.server.limits import Allowance
from zeo.server.limits import Door
from zeo.server.limits import Full
from zeo.server.limits import Limits
from zeo.server.limits import files_for_connections
from zeo.server.limits import files_for_iterators
from zeo.server.outbox import Outbox
from zeo.server.pulse import Pulse
from zeo.server.roles import Roles
from zeo.server.seldom import Rations
from zeo.server.seldom import Seldom
from zeo.server.seldom import SeldomEach
from zeo.server.served import Served
from zeo.server.session import MeasuredSession
from zeo.server.session import Session
from zeo.server.threads import Threads
from zeo.server.values import DEFAULT_SOCKET_MODE
from zeo.server.writer import DONT_WAIT
from zeo.server.writer import PATIENCE
from zeo.server.writer import Line
from zeo.server.writer import SecureLine
from zeo.server.writer import Writer
from zeo.wire import messages
from zeo.wire.framing import Inbox
from zeo.wire.framing import Payload
from zeo.wire.framing import frame

if TYPE_CHECKING:
    import ssl

    from zeo.wire.tls import Tls

logger = logging.getLogger(__name__)

#: ``(host, port)``, or the path of a Unix domain socket.
Address = tuple[str, int] | str

#: With TLS it is the client who begins, as soon as it is connected; one that has said nothing after so
#: many seconds is told that TLS is spoken here.
FIRST_WORD_PATIENCE = 5.0

#: Replies are sent when so many bytes have piled up, though there are more requests to serve first.
_ENOUGH = 128 * 1024

#: How long in seconds clients that have registered may wait for their threads while others come in: to wake
#: threads one by one takes longer than to register the others first.
_HANDING_OVER = 0.01

#: So many connections are accepted before who is there already is heard.
_AT_ONCE = 50

#: How long in seconds `StorageServer.close` waits for connections to end by themselves, all together,
#: and how long the end of a connection waits for its client to read what is still to be sent.
CLOSING_PATIENCE = 10.0
LAST_WORDS_PATIENCE = 5.0

#: The kernel takes no more while so many bytes wait in it to be sent: on a slow line, what is small and
#: comes after a blob does not wait for megabytes.
UNSENT = 128 * 1024

#: TCP keep-alive: after so many idle seconds, every so many seconds, so many times.
KEEPALIVE_IDLE, KEEPALIVE_INTERVAL, KEEPALIVE_COUNT = 60, 15, 4

#: So many seconds the kernel is to wait for a client's machine to acknowledge what was sent to it: keep-alive
#: begins only after that.  A client that lets what was sent lie in the kernel for so long is given up, too.
VANISHED_AFTER = KEEPALIVE_IDLE + KEEPALIVE_INTERVAL * KEEPALIVE_COUNT

#: A client that gives signs of life, as all do every minute, is given up after so many seconds without any.  The
#: kernel need not find out: it keeps the connection of a stopped process alive, and knows of a machine behind a
#: proxy only what that one knows.
SILENCE = 180.0


class StorageServer:
    """A server for any number of named storages on any number of addresses.

    ``storages`` maps names to storages (`ZODB.interfaces.IStorage`), which the server closes in the
    end.  ``addresses`` are ``(host, port)`` (host ``''``: all interfaces; port 0: a free one) or paths
    of Unix domain sockets, whose files get the permissions ``socket_mode``, or sockets that listen already,
    which the server closes.  The options are explained in start.txt; ``transaction_timeout``,
    ``invalidation_age`` and ``poll_interval`` are in seconds, None switches the first two off; without ``roles`` everybody may do everything.
    With ``ssl``, the context of a server (`zeo.wire.certificates.server_context` makes one), TLS is spoken at
    addresses with a port.  With ``measure`` sessions measure how long loads take.
    """

    def __init__(self, storages: Mapping[str, Any], addresses: Sequence[Address | socket.socket], *,
                 read_only: bool = False, transaction_timeout: float | None = 30.0,
                 invalidation_queue_size: int = 100, invalidation_age: float | None = None,
                 client_conflict_resolution: bool = False, blob_sync: bool = True,
                 poll_interval: float = POLL_INTERVAL,
                 socket_mode: int = DEFAULT_SOCKET_MODE, ssl: ssl.SSLContext | None = None,
                 limits: Limits = Limits(), roles: Roles = Roles(), measure: bool = False) -> None:
        by_storage: dict[int, Served] = {}
        self._served: dict[str, Served] = {}
        for name, storage in storages.items():
            served = by_storage.get(id(storage))
            if served is None:
                served = by_storage[id(storage)] = Served(
                    name, storage, read_only=read_only, transaction_timeout=transaction_timeout,
                    invalidation_queue_size=invalidation_queue_size,
                    invalidation_age=invalidation_age,
                    client_conflict_resolution=client_conflict_resolution, blob_sync=blob_sync,
                    poll_interval=poll_interval)
            self._served[name] = served
        self._wanted = list(addresses)
        self._socket_mode = socket_mode
        self.session: type[Session] = MeasuredSession if measure else Session
        self._listeners: list[_Listener] = []
        self._writer = Writer()
        self._pulse = Pulse(self._give_sign_of_life)
        self.limits = limits
        self.roles = roles
        # Iterators over transactions, each with a file, that all clients together may have.
        self.iterators = Allowance(files_for_iterators(limits.max_connections))
        # For connections that end before they have registered: a port scan must not fill the log.
        self.strangers = Seldom(logger)
        # For clients that break the protocol; some do so again and again.
        self.offenders = SeldomEach(logger)
        self.rations = Rations(logger)
        self._ssl = ssl
        # Guards `_connections`, `_door` and `_closing`; a leaf.
        self._mutex = threading.Lock()
        self._door = Door(max(1, min(limits.max_connections, files_for_connections())),
                          limits.max_connections_per_address)
        self._connections: dict[Connection, None] = {}
        self.threads = Threads('zeo spare', most=self._door.most)
        self._closing = False
        self._closed = threading.Event()

    @property
    def addresses(self) -> list[Address]:
        """Where the server listens, with ports as they were chosen."""
        return [listener.address for listener in self._listeners]

    @property
    def storages(self) -> Mapping[str, Served]:
        """What is served, by name."""
        return self._served

    @property
    def closing(self) -> bool:
        """Whether the server is to end, or has ended."""
        return self._closing

    def start(self) -> None:
        """Listen on all addresses and serve in background threads.

        Raises `OSError`, whose text names the address and says what to do, and then listens nowhere.
        """
        listeners: list[_Listener] = []
        with contextlib.ExitStack() as unless_done:
            for address in self._wanted:
                if isinstance(address, socket.socket):
                    sockets = [address]
                elif isinstance(address, str):
                    sockets = [listening.listen_unix(address, self._socket_mode)]
                else:
                    sockets = listening.listen(*address)
                for sock in sockets:
                    listeners.append(_Listener(self, sock, file_is_ours=sock is not address))
                    unless_done.callback(listeners[-1].server_close)
            self._writer.start()
            self._pulse.start()
            for served in set(self._served.values()):
                served.start()
            for listener in listeners:
                listener.start()
                self._listeners.append(listener)
            unless_done.pop_all()

    # ---- connections ------------------------------------------------------------------

    def admit(self, sock: socket.socket, client: str, host: str | None = None,
              address: Address | None = None) -> 'Connection | None':
        """Let a client in and greet it; None if there is no room.  Who is let in is `dismiss`ed in the end.

        ``host`` is where it is, unless it is here; ``address`` is the one that it has connected to.
        """
        context = None if sock.family == socket.AF_UNIX else self._ssl
        connection = Connection(self, sock, client, host or client.partition('#')[0], address, context)
        if not self._let_in(connection, host):
            connection.close()
            return None
        connection.greet()
        return connection

    def serve(self, connection: 'Connection') -> None:
        """Serve one client as long as it stays, in the calling thread."""
        threading.current_thread().name = f'zeo client {connection.session.client}'
        connection.run()

    def dismiss(self, connection: 'Connection') -> None:
        """Close a connection and make room for another."""
        try:
            connection.close()
        finally:
            with self._mutex:
                del self._connections[connection]
                self._door.leave(connection)

    def _let_in(self, connection: 'Connection', host: str | None) -> bool:
        """Whether there is room; somebody else may have to leave for it."""
        try:
            with self._mutex:
                if self._closing:
                    return False
                leaving = self._door.enter(connection, host)
                self._connections[connection] = None
        except Full as full:
            self.strangers.warning('%s: refused: %s', connection.session.client, full)
            return False
        if isinstance(leaving, Connection):
            self.strangers.warning('%s: disconnected: it has not introduced itself, and others want to come in',
                                   leaving.session.client)
            leaving.line.hang_up()
        return True

    def has_registered(self, connection: 'Connection') -> None:
        """It need not make room for others any more."""
        with self._mutex:
            self._door.registered(connection)

    @property
    def registers_at_once(self) -> bool:
        """Whether no storage is asked anything, which may take long, when a client registers."""
        return all(served.registers_at_once for served in self._served.values())

    @property
    def writer(self) -> Writer:
        return self._writer

    @property
    def connections(self) -> list['Connection']:
        """A snapshot of the connections."""
        with self._mutex:
            return list(self._connections)

    def _give_sign_of_life(self) -> None:
        """To those who want that and would hear nothing else now."""
        for connection in self.connections:
            outbox = connection.session.outbox
            if connection.session.wants_pulse and not outbox.backlog:
                outbox.append(messages.PULSE)
                connection.line.push()

    # ---- the end ------------------------------------------------------------------------

    def close(self) -> None:
        """Stop accepting, let finishing transactions finish, abort the others, close everything.

        Returns when all threads have ended and the storages are closed.  May be called again, and from
        any thread but the server's own.
        """
        with self._mutex:
            first, self._closing = not self._closing, True
            connections = list(self._connections)
        if not first:
            self._closed.wait()
            return
        try:
            for listener in self._listeners:
                listener.stop()
            for connection in connections:
                connection.stop()
            if not self.threads.close(CLOSING_PATIENCE):
                for connection in self.connections:
                    logger.warning('%s: does not end by itself', connection.session.client)
                    connection.line.hang_up()
                self.threads.close()  # who is left is in the storage, and may be finishing a transaction
            self._pulse.close()
            self._writer.close()
        finally:
            for served in set(self._served.values()):
                try:
                    served.close()
                except Exception:
                    logger.exception('storage %s: cannot be closed', served.name)
            self._closed.set()


class Idle(Exception):
    """A registered client has been silent for too long."""


class Heard(enum.Enum):
    """What has become of a newcomer."""

    LITTLE = enum.auto()  # it has to say more
    ENOUGH = enum.auto()  # it needs a thread
    ALL = enum.auto()  # it has left, or has to


class Connection:
    """A client's socket with its session, and the loop that reads from the one into the other.

    One thread at a time: the listener's calls `greet` and `hear`, then another one `run`.
    """

    def __init__(self, server: StorageServer, sock: socket.socket, client: str, host: str,
                 address: Address | None, context: ssl.SSLContext | None) -> None:
        self._server = server
        self._sock = sock
        self._host = host
        self._limits = server.limits
        self._tls: Tls | None = None
        self._recv_into: Callable[[memoryview], int] = sock.recv_into
        self._stopping = False
        self._may_be_silent = server.limits.idle_timeout or 0.0  # seconds; 0 is for ever
        self.deadline = 0.0  # time.monotonic() at which the client has to be registered
        self._inbox = Inbox(FIRST_FRAMES, 32 * 1024)
        self._is_greeted = False  # whether the client has answered our greeting with the same
        self._unanswered: Payload | None = None  # what it has said then
        outbox = Outbox()
        if context is None:
            self.line = Line(sock, outbox, server.writer)
        else:
            from zeo.wire.tls import Tls  # who does without does not load OpenSSL

            self._tls = Tls(context, self._receive_in_time, server_side=True)
            self._recv_into = self._tls.recv_into
            self.line = SecureLine(sock, outbox, server.writer, self._tls)
        self.session = server.session(server.storages, outbox, client, self.line.hang_up, limits=server.limits,
                                      roles=server.roles, address=address, iterators=server.iterators,
                                      may_log=server.rations.of(host).allows, heard=self._expect_more)
        debug = logging.getLogger('zeo.server').isEnabledFor(logging.DEBUG)
        self._handle = self.session.handle_and_tell if debug else self.session.handle

    @property
    def speaks_tls(self) -> bool:
        return self._tls is not None

    def greet(self) -> None:
        """The server speaks first, except where TLS is spoken."""
        self.deadline = time.monotonic() + self._limits.registration_timeout
        if self._tls is None:
            self.session.outbox.append(frame(messages.GREETING))
            self.line.push()

    def hear(self) -> Heard:
        """Take what a newcomer says, as far as that needs no waiting; not with TLS."""
        heard = Heard.ALL
        with self._telling():
            heard = self._hear()
        return heard

    def _hear(self) -> Heard:
        inbox = self._inbox
        self._left()
        try:
            count = self._sock.recv_into(inbox.buffer(), 0, DONT_WAIT)
        except BlockingIOError:
            return Heard.LITTLE
        if not count:
            self._tell_end()
            return Heard.ALL
        inbox.advance(count)
        self.session.received += count
        payload = self._first_words()
        if payload == messages.GREETING and not self._is_greeted:
            self._is_greeted = True
            payload = self._first_words()
        if payload is None:
            return Heard.LITTLE
        if not (self._is_greeted and self._server.registers_at_once):
            self._unanswered = payload
            return Heard.ENOUGH
        self._introduce(payload)
        self.line.push()
        return Heard.ENOUGH

    def _introduce(self, payload: Payload) -> None:
        """Let it register.  It need not make room for others when it is told that it has."""
        self._handle(payload)
        if self.session.is_registered:
            self._server.has_registered(self)

    def run(self) -> None:
        """Serve until the client leaves, breaks the protocol, or the server is closed."""
        session, inbox = self.session, self._inbox
        with self._telling():
            if self._tls is not None:
                self._agree_on_tls(self._tls)
                session.outbox.append(frame(messages.GREETING))
                self.line.push()
            if session.is_registered or self._handshake():
                inbox.limit = self._limits.max_message
                if session.read_only:
                    inbox.limit = min(inbox.limit, READERS_FRAMES)
                self._set_time_limit(self._may_be_silent)
                if self._tls is not None:
                    self._tls.receive = self._sock.recv
                else:
                    inbox.divert = session.divert
                self._converse(inbox)
            self._tell_end()

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """An error in here ends the connection; tell the log which."""
        session = self.session
        try:
            yield
        except (ProtocolError, TlsError) as error:
            seldom = self._server.offenders.of(self._host) if session.is_registered else \
                self._server.strangers
            seldom.warning('%s: disconnected: %s', session.client, error)
        except Idle:
            logger.log(self._level(), '%s: disconnected: it has not said anything for %g s', session.client,
                       self._may_be_silent)
        except OSError as error:
            if isinstance(error, TimeoutError) and error.errno is None:  # ours; the network's has a number
                self._server.strangers.warning('%s: disconnected: it took too long to introduce itself',
                                               session.client)
            else:
                logger.log(self._level(), '%s: lost: %s', session.client, error.strerror or error)
        except Exception:
            logger.exception('%s: disconnected because of an error here', session.client)

    def _tell_end(self) -> None:
        """The client has left, or had to."""
        if self.session.outbox.condemned:
            logger.warning('%s: disconnected: it does not read what it is sent', self.session.client)
        else:
            logger.log(self._level(), '%s: has left', self.session.client)

    def _level(self) -> int:
        """Of what is everyday life: details if it is about a stranger, or too often the same."""
        if self.session.is_registered and self._server.rations.of(self._host).allows():
            return logging.INFO
        return logging.DEBUG

    def _set_time_limit(self, seconds: float) -> None:
        """How long one recv may take; 0 is for ever.  In the kernel, where it costs no extra call."""
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO,
                              struct.pack('ll', int(seconds), int(seconds % 1 * 1e6)))

    def _expect_more(self) -> None:
        """The client gives signs of life: there will be others.  The thread that runs the connection calls this.

        Only waits for the client count, however long the server takes for what it was asked.
        """
        if not 0 < self._may_be_silent <= SILENCE:
            self._may_be_silent = SILENCE
            self._set_time_limit(SILENCE)

    def _left(self) -> float:
        """How many seconds of the handshake are left."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return max(left, 0.001)  # 0 would be for ever

    def _receive_in_time(self, size: int) -> bytes:
        """Where TLS gets its bytes until the client is registered, however slowly they come."""
        self._set_time_limit(self._left())
        try:
            return self._sock.recv(size)
        except BlockingIOError:
            raise TimeoutError from None

    def _receive(self, inbox: Inbox) -> bool:
        """Read once; False at the end of the stream."""
        try:
            count = self._recv_into(inbox.buffer())
        except BlockingIOError:
            raise TimeoutError from None
        inbox.advance(count)
        self.session.received += count
        return count > 0

    def _first_words(self) -> Payload | None:
        """What the handshake has brought so far: a payload, or None."""
        try:
            return self._inbox.next()
        except ProtocolError:
            if not self._is_greeted and messages.looks_like_tls(self._inbox.beginning(2)):
                raise TlsError('the client speaks TLS, and this address does not') from None
            raise

    def _next(self) -> Payload | None:
        """The next payload during the handshake; None at the end of the stream."""
        payload, self._unanswered = self._unanswered, None
        while payload is None:
            payload = self._first_words()
            if payload is None:
                self._set_time_limit(self._left())
                if not self._receive(self._inbox):
                    return None
        return payload

    def _agree_on_tls(self, tls: Tls) -> None:
        """The handshake of TLS."""
        sock = self._sock
        end = self.deadline
        self.deadline = min(end, time.monotonic() + FIRST_WORD_PATIENCE)

        def send(said: bytes) -> None:
            self.deadline = end  # the client has begun
            sock.settimeout(self._left())
            try:
                sock.sendall(said)
            finally:
                sock.settimeout(None)

        try:
            tls.shake_hands(send)
        except TimeoutError:
            if tls.has_begun:
                raise
            with contextlib.suppress(OSError):
                sock.send(messages.TLS_ALERT, socket.MSG_DONTWAIT)
            raise TlsError('the client does not begin to speak TLS, and has to') from None
        self.session.certificate_name = tls.peer_name()

    def _handshake(self) -> bool:
        """Agree on the protocol, and hear the first request, which has to register."""
        outbox = self.session.outbox
        if not self._is_greeted:
            answer = self._next()
            if answer is None:
                return False
            if answer == messages.PROBE:
                if not self.session.may_come_in():
                    return False
                outbox.append(frame(messages.status_report(
                    {name: served.status() for name, served in self._server.storages.items()})))
                self.line.push(PATIENCE)
                return False
            if answer != messages.GREETING:
                raise ProtocolError(f'it does not speak {messages.GREETING.decode()}')
            self._is_greeted = True
        while not self.session.is_registered:
            payload = self._next()
            if payload is None:
                return False
            self._introduce(payload)
            self.line.push(PATIENCE)
        return True

    def _converse(self, inbox: Inbox) -> None:
        """Serve one request after the other, as long as there are any; send replies in one go."""
        session = self.session
        handle = self._handle
        outbox = session.outbox
        push = self.line.push
        receive = self._recv_into
        payload = inbox.next()
        while True:
            while payload is not None:
                handle(payload)
                if outbox.backlog > _ENOUGH:
                    push(PATIENCE)
                payload = inbox.next()
            if outbox.backlog:
                push(PATIENCE)
            if self._stopping or outbox.gone:
                return
            passing = inbox.passing
            try:
                count = receive(inbox.buffer()) if passing is None else inbox.pass_on(self._sock)
            except BlockingIOError:
                raise Idle from None
            if not count:
                return
            session.received += count
            payload = inbox.received(count) if passing is None else inbox.next()

    def stop(self) -> None:
        """The server is closing: come to an end after the request that is served now.  Any thread."""
        self._stopping = True
        self.line.shut(socket.SHUT_RD)

    def close(self) -> None:
        """Leave nothing behind.  The thread that ran the connection calls this."""
        try:
            self.session.close()
        finally:
            self.line.push(LAST_WORDS_PATIENCE)
            self.line.close()


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


class _Listener(socketserver.ThreadingMixIn, socketserver.BaseServer):
    """Accepts on one listening socket, hears who comes in, and has a thread for each who stays.

    What `socketserver` calls a request is a `Connection`.
    """

    daemon_threads = True  # `StorageServer.close` sees to their end
    block_on_close = False

    def __init__(self, server: StorageServer, sock: socket.socket, *, file_is_ours: bool = True) -> None:
        sock.setblocking(False)  # who gave up between select and accept must not keep us there
        _set_options(sock)
        name = sock.getsockname()
        super().__init__(name, socketserver.BaseRequestHandler)
        self.socket = sock
        self.address: Address = name if isinstance(name, str) else name[:2]
        self._server = server
        self._file = listening.socket_file(name) if isinstance(name, str) and file_is_ours else None
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
            target=self.serve_forever, daemon=True, name=f'zeo accept {listening.describe(self.address)}')

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
                client = listening.describe(address)
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
            logger.warning('%s: connections are accepted again', listening.describe(self.address))

    def finish_request(self, request: Any, client_address: Any) -> None:
        self._server.serve(request)

    def shutdown_request(self, request: Any) -> None:
        try:
            self._server.dismiss(request)
        except Exception:
            self.handle_error(request, request.session.client)

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.exception('%s: the connection of %s failed', listening.describe(self.address), client_address)

    def _starve(self, reason: object) -> None:
        """What it takes to accept a connection is used up.

        It will be asked for again at once: neither spin nor fill the log.
        """
        if not self._starving:
            logger.error('%s: no connections can be accepted for now: %s', listening.describe(self.address), reason)
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
            listening.remove_socket_file(str(self.address), self._file)
