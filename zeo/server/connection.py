"""A client's connection on the server: greeting, handshake, and the loop that serves one request after the other."""

from __future__ import annotations

import contextlib
import enum
import logging
import socket
import struct
import time
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from typing import TYPE_CHECKING
from typing import Protocol

from zeo.errors import ProtocolError
from zeo.errors import TlsError
from zeo.server.addresses import Address
from zeo.server.limits import FIRST_FRAMES
from zeo.server.limits import READERS_FRAMES
from zeo.server.limits import Allowance
from zeo.server.limits import Limits
from zeo.server.outbox import Outbox
from zeo.server.roles import Roles
from zeo.server.seldom import Rations
from zeo.server.seldom import Seldom
from zeo.server.seldom import SeldomEach
from zeo.server.served import Served
from zeo.server.session import Session
from zeo.server.writer import DONT_WAIT
from zeo.server.writer import PATIENCE
from zeo.server.writer import Line
from zeo.server.writer import SecureLine
from zeo.server.writer import Writer
from zeo.wire.framing import Inbox
from zeo.wire.framing import Payload
from zeo.wire.framing import frame
from zeo.wire.greeting import GREETING
from zeo.wire.greeting import PROBE
from zeo.wire.greeting import TLS_ALERT
from zeo.wire.greeting import looks_like_tls
from zeo.wire.greeting import status_report

if TYPE_CHECKING:
    import ssl

    from zeo.wire.tls import Tls

logger = logging.getLogger(__name__)

#: With TLS it is the client who begins, as soon as it is connected; one that has said nothing after so
#: many seconds is told that TLS is spoken here.
FIRST_WORD_PATIENCE = 5.0

#: Replies are sent when so many bytes have piled up, though there are more requests to serve first.
_ENOUGH = 128 * 1024

#: How long in seconds the end of a connection waits for its client to read what is still to be sent.
LAST_WORDS_PATIENCE = 5.0

#: A client that gives signs of life, as all do every minute, is given up after so many seconds without any.  The
#: kernel need not find out: it keeps the connection of a stopped process alive, and knows of a machine behind a
#: proxy only what that one knows.
SILENCE = 180.0


class Idle(Exception):
    """A registered client has been silent for too long."""


class Heard(enum.Enum):
    """What has become of a newcomer."""

    LITTLE = enum.auto()  # it has to say more
    ENOUGH = enum.auto()  # it needs a thread
    ALL = enum.auto()  # it has left, or has to


class Host(Protocol):
    """What a connection needs of its server; all connections have the same."""

    limits: Limits
    roles: Roles
    iterators: Allowance
    strangers: Seldom
    offenders: SeldomEach
    rations: Rations
    session: type[Session]

    @property
    def storages(self) -> Mapping[str, Served]: ...

    @property
    def writer(self) -> Writer: ...

    @property
    def registers_at_once(self) -> bool: ...

    def has_registered(self, connection: Connection) -> None: ...


class Connection:
    """A client's socket with its session, and the loop that reads from the one into the other.

    One thread at a time: the listener's calls `greet` and `hear`, then another one `run`.
    """

    def __init__(self, server: Host, sock: socket.socket, client: str, host: str,
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
        self._inbox = Inbox(FIRST_FRAMES, 40 * 1024)  # many stores in one message are a little more than 32 KB
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
            self.session.outbox.append(frame(GREETING))
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
        if payload == GREETING and not self._is_greeted:
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
                session.outbox.append(frame(GREETING))
                self.line.push()
            if session.is_registered or self._handshake():
                session.tell_storage()
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
            if not self._is_greeted and looks_like_tls(self._inbox.beginning(2)):
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
                sock.send(TLS_ALERT, socket.MSG_DONTWAIT)
            raise TlsError('the client does not begin to speak TLS, and has to') from None
        self.session.certificate_name = tls.peer_name()

    def _handshake(self) -> bool:
        """Agree on the protocol, and hear the first request, which has to register."""
        outbox = self.session.outbox
        if not self._is_greeted:
            answer = self._next()
            if answer is None:
                return False
            if answer == PROBE:
                if not self.session.may_come_in():
                    return False
                outbox.append(frame(status_report(
                    {name: served.status() for name, served in self._server.storages.items()})))
                self.line.push(PATIENCE)
                return False
            if answer != GREETING:
                raise ProtocolError(f'it does not speak {GREETING.decode()}')
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
