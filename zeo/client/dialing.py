"""From addresses to connected sockets on which the server has said which protocol it speaks.

With TLS, what goes over a socket is encrypted as soon as it is connected; a Unix domain socket stays as it
is, since it does not leave the machine.

Several addresses are tried in their order, each a little after the one before, so that neither a dead
host nor one that swallows packets holds up the others for long (*Happy Eyeballs*, RFC 8305).
"""

from __future__ import annotations

import os
import re
import selectors
import socket
import stat
import struct
from collections.abc import Callable
from collections.abc import Generator
from collections.abc import Iterator
from collections.abc import Sequence
from threading import Thread
from threading import get_ident
from time import monotonic
from typing import TYPE_CHECKING
from typing import Any
from typing import NamedTuple

from zeo.errors import ClientDisconnected
from zeo.errors import ProtocolError
from zeo.wire.framing import Inbox
from zeo.wire.framing import Payload
from zeo.wire.framing import frame
from zeo.wire.greeting import answer_to_greeting
from zeo.wire.greeting import looks_like_tls

if TYPE_CHECKING:
    import ssl

    from zeo.wire.tls import Tls

__all__ = ['Address', 'Line', 'Security', 'connect_unix', 'dial', 'display', 'is_asking', 'parse_addresses']

#: ``(host, port)``, or the path of a Unix domain socket.
Address = tuple[str, int] | str

#: What to do about a server that speaks TLS to a client that does not.
SPEAKS_TLS = 'the server speaks TLS: ask for it with ssl=True, or more of what ssl takes (a command: --tls)'

#: Seconds after which the next address is tried, too.
STAGGER = 0.25

#: Seconds for one server to be connected and to greet.
PATIENCE = 10.0

#: No greeting is longer.
GREETING_LIMIT = 64

#: No message is refused for its length once the server has been greeted: records have no limit.
MESSAGE_LIMIT = 2**32 - 1

#: Bytes of memory that a connection keeps for long records, once it has met one.
KEPT = 2 * 1024 * 1024

#: The kernel takes no more while so many bytes wait in it to be sent: on a slow line, a small request
#: does not wait for megabytes of a blob.
UNSENT = 128 * 1024

#: A peer that has gone without a word is found out after `DEAD_AFTER` seconds: of silence on an idle
#: connection (three probes unanswered), or with something sent and not acknowledged.
DEAD_AFTER = 40
KEEPALIVE = {'TCP_KEEPIDLE': 19, 'TCP_KEEPINTVL': 7, 'TCP_KEEPCNT': 3,
             'TCP_USER_TIMEOUT': DEAD_AFTER * 1000}


#: A path could be called so, but whoever writes this means a port.
_NO_PATH = re.compile(r'([^/]*:)?\d+').fullmatch

#: The second of two texts, if it is meant as a path: a slip in a port must not make files of a host and a port.
_PATH = re.compile('.*[./].*', re.DOTALL).fullmatch


def parse_addresses(addr: Any) -> list[Address]:
    """One address or a sequence of them, in the forms that `ClientStorage` takes.

    Raises `ValueError`.
    """
    if isinstance(addr, os.PathLike):
        addr = os.fspath(addr)
    if _is_one(addr):
        return [_parse(addr)]
    if isinstance(addr, Sequence) and not isinstance(addr, (bytes, bytearray)) and addr:
        if len(addr) == 2 and all(isinstance(each, str) for each in addr) and not _PATH(addr[1]):
            raise ValueError(f'{_bad(addr)}; a port is a number; of a socket file in this folder, give the path:'
                             f' ./{addr[1]}')
        return [_parse(each) for each in addr]
    raise _bad(addr)


def _is_one(addr: Any) -> bool:
    return isinstance(addr, (int, str)) or (
        isinstance(addr, (tuple, list)) and len(addr) == 2 and isinstance(addr[1], int)
        and (addr[0] is None or isinstance(addr[0], str)))


def _parse(addr: Any) -> Address:
    if isinstance(addr, os.PathLike):
        addr = os.fspath(addr)
    if not _is_one(addr):
        raise _bad(addr)
    if isinstance(addr, str):
        if not addr or '\0' in addr or _NO_PATH(addr):
            raise _bad(addr)
        return addr
    host, port = ('', addr) if isinstance(addr, int) else addr
    if isinstance(port, bool) or not 0 < port < 65536:
        raise _bad(addr)
    if host and host.startswith('[') and host.endswith(']'):  # as in a URL
        host = host[1:-1]
    return host or 'localhost', port


def _bad(addr: Any) -> ValueError:
    return ValueError(
        f'{addr!r} is not the address of a server: give (host, port), a port (1 to 65535) of this '
        'host, the path of a Unix domain socket, or a sequence of these')


def display(address: Address) -> str:
    """As people write it."""
    if isinstance(address, str):
        return address
    host, port = address
    return f'[{host}]:{port}' if ':' in host else f'{host}:{port}'


def connect_unix(sock: socket.socket, path: str) -> None:
    """Connect to a socket file; what is none is told from that of a server that is away."""
    try:
        sock.connect(path)
    except ConnectionRefusedError:
        if not os.path.exists(path) or stat.S_ISSOCK(os.stat(path).st_mode):
            raise
        what = 'folder' if os.path.isdir(path) else 'file'
        raise ConnectionRefusedError(f'this is a {what}, and not the socket of a server') from None


class Security(NamedTuple):
    """How TLS is spoken: what verifies, and the name in the server's certificate (None: that in its address)."""

    context: ssl.SSLContext
    hostname: str | None


class NobodyListens(ClientDisconnected):
    """There is no server at any address; one may be just starting."""


class Line(NamedTuple):
    """A connection that is ready for `register`."""

    address: Address
    sock: socket.socket
    inbox: Inbox
    tls: Tls | None = None


def secure(sock: socket.socket, address: Address, security: Security | None) -> Tls | None:
    """The encryption for a new connection to ``address``, if there is to be one."""
    if security is None or isinstance(address, str):
        return None
    from zeo.wire.tls import Tls  # who does without does not load OpenSSL

    context, hostname = security
    return Tls(context, sock.recv, hostname=hostname or address[0])


def no_answer(seconds: float, perhaps_tls: bool) -> TimeoutError:
    """Of a server that says nothing; perhaps because it waits for TLS, where the client has to begin."""
    return TimeoutError(f'no answer within {seconds:g} seconds; perhaps it is stopped, or hangs'
                        + (f'; or {SPEAKS_TLS}' if perhaps_tls else ''))


class _Attempt:
    """One socket on its way: connecting, agreeing on TLS, then waiting for the greeting."""

    def __init__(self, address: Address, family: int, where: Any, security: Security | None) -> None:
        self.address = address
        self.where = where
        self.until = monotonic() + PATIENCE
        self.connected = False
        self.inbox = Inbox(GREETING_LIMIT, keep=KEPT)
        self.sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            if family == socket.AF_UNIX:
                self._connect_unix()
            else:
                self._tune()
                self.sock.setblocking(False)
                try:
                    self.sock.connect(where)
                except BlockingIOError:
                    pass
            self.tls = secure(self.sock, address, security)
            self.agreed = self.tls is None  # on TLS, or that there is none
            self.recv_into: Callable[[memoryview], int]
            self.recv_into = self.sock.recv_into if self.tls is None else self.tls.recv_into
        except BaseException:
            self.sock.close()
            raise

    def _connect_unix(self) -> None:
        # Connecting to a Unix socket does not go on in the background: if too many clients wait to be
        # accepted, it either fails or blocks.
        option = socket.SOL_SOCKET, socket.SO_SNDTIMEO
        self.sock.setsockopt(*option, struct.pack('ll', 1, 0))
        try:
            connect_unix(self.sock, self.where)
        except FileNotFoundError:  # also where a host without a port was meant
            raise FileNotFoundError('there is no such socket file; a port is named by (host, port)') from None
        except BlockingIOError:
            raise TimeoutError('the server does not accept connections') from None
        self.sock.setsockopt(*option, struct.pack('ll', 0, 0))
        self.sock.setblocking(False)

    def _tune(self) -> None:
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, 'TCP_NOTSENT_LOWAT'):
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if hasattr(socket, name):
                self.sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    @property
    def awaited(self) -> int:
        return selectors.EVENT_READ if self.connected else selectors.EVENT_WRITE

    def go_on(self) -> bool:
        """Something has happened.  Returns whether the server has been greeted; raises if it failed."""
        if not self.connected:
            error = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                raise OSError(error, os.strerror(error))
            self.connected = True
            if self.agreed:
                return False
        try:
            if self.tls is not None and not self.agreed:
                self.tls.shake_hands(self._send)
                self.agreed = True
            while (greeting := self._greeting()) is None:
                pass
        except BlockingIOError:
            return False
        answer = answer_to_greeting(greeting)
        if answer is None:
            raise ConnectionError(f'the server speaks protocol {bytes(greeting)!r}, which this '
                                  'client does not')
        said, = frame(answer)
        self._send(said if self.tls is None else self.tls.seal((said,)))
        self.inbox.limit = MESSAGE_LIMIT
        return True

    def _greeting(self) -> Payload | None:
        """Receive once; the greeting, if it is there as a whole."""
        size = self.recv_into(self.inbox.buffer())
        if not size:
            raise ConnectionError('the server closed the connection without a greeting')
        self.inbox.advance(size)
        if self.tls is None and looks_like_tls(self.inbox.beginning(2)):
            raise ConnectionError(SPEAKS_TLS)
        return self.inbox.next()

    def _send(self, said: bytes) -> None:
        try:
            sent = self.sock.send(said)
        except BlockingIOError:
            sent = 0
        if sent < len(said):
            raise ConnectionError('the server does not read')

    def too_late(self) -> Exception:
        return no_answer(PATIENCE, self.connected and not isinstance(self.address, str) and self.tls is None)


def dial(addresses: Sequence[Address], interruption: socket.socket, security: Security | None = None,
         ) -> Generator[Line | None, None, None]:
    """Connect to the addresses; yields those that answer, preferred ones first if at the same time.

    None is yielded now and then while there is nothing new, for a caller that does not want to wait any
    longer.  Whoever gets a `Line` owns its socket.  The others are closed when the iterator ends or is closed.
    Ends early when ``interruption`` becomes readable.  Raises `ClientDisconnected`, which says what
    went wrong with each, if none of them answers.
    """
    targets = _resolve(addresses)
    failures: list[tuple[Address, Exception]] = []
    answered = False
    with selectors.DefaultSelector() as selector:
        selector.register(interruption, selectors.EVENT_READ)
        attempts: list[_Attempt] = []  # in the order of their beginning

        def fail(attempt: _Attempt, error: Exception) -> None:
            failures.append((attempt.address, error))
            selector.unregister(attempt.sock)
            attempts.remove(attempt)
            attempt.sock.close()

        try:
            more = True
            next_at = monotonic()
            while more or attempts:
                now = monotonic()
                if more and (now >= next_at or not attempts):
                    target = next(targets, None)
                    if target is None:
                        more = False
                        continue
                    address, family, where = target
                    try:
                        if isinstance(where, Exception):
                            raise where
                        attempt = _Attempt(address, family, where, security)
                    except (OSError, ValueError) as error:
                        failures.append((address, error))
                        continue
                    attempts.append(attempt)
                    selector.register(attempt.sock, attempt.awaited, attempt)
                    next_at = now + STAGGER
                    continue
                pause = max(0.0, next_at - now) if more else STAGGER
                ready = {key.data for key, _ in selector.select(pause)}
                if None in ready:
                    return
                if not ready:
                    yield None
                for attempt in list(attempts):
                    try:
                        if attempt not in ready:
                            if monotonic() >= attempt.until:
                                raise attempt.too_late()
                            continue
                        greeted = attempt.go_on()
                    except (OSError, ProtocolError) as error:
                        fail(attempt, error)
                        next_at = now  # try the next at once
                        continue
                    selector.unregister(attempt.sock)
                    if greeted:
                        attempts.remove(attempt)
                        answered = True
                        yield Line(attempt.address, attempt.sock, attempt.inbox, attempt.tls)
                    else:
                        selector.register(attempt.sock, attempt.awaited, attempt)
        finally:
            for attempt in attempts:
                attempt.sock.close()
    if not answered:
        absent = all(isinstance(error, (ConnectionRefusedError, FileNotFoundError)) for _, error in failures)
        said = '; '.join(f'{display(address)}: {error}' for address, error in failures)
        raise (NobodyListens if absent else ClientDisconnected)(f'no server answers ({said})')


#: Threads that ask what a name stands for.  Nothing can interrupt that.
_asking: set[int | None] = set()


def is_asking(thread: Thread) -> bool:
    """Whether a thread cannot end now because it waits for a name server."""
    return thread.ident in _asking


def _resolve(addresses: Sequence[Address]) -> Iterator[tuple[Address, int, Any]]:
    """Each address with its family and what to give to `connect`, or the error that prevents it."""
    for address in addresses:
        if isinstance(address, str):
            yield address, socket.AF_UNIX, address
            continue
        _asking.add(get_ident())
        try:
            found: Any = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            found = error
        finally:
            _asking.discard(get_ident())
        if isinstance(found, Exception):
            yield address, socket.AF_UNSPEC, found
        else:
            for family, _, _, _, where in found:
                yield address, family, where
