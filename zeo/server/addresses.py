"""Addresses to listening sockets: which ones a host name means, and who may take over a socket file.

Whatever goes wrong is raised as an `OSError` whose text names the address and says what to do; it is
meant to be shown to the user as it is.

This module knows about sockets, and nothing about storages or sessions.
"""

import contextlib
import errno
import fcntl
import os
import re
import socket
import stat
import time
from collections.abc import Iterator

from zeo.server.values import DEFAULT_SOCKET_MODE

#: An address as users give it: ``(host, port)``, or the path of a Unix domain socket.
Address = tuple[str, int] | str

#: An address as `socket.socket.bind` takes it: ``(host, port)`` and, for IPv6, two numbers more.
SocketAddress = tuple[str, int] | tuple[str, int, int, int]

#: Longest path the kernel takes for a socket file, in bytes (``sun_path`` has one more, for its NUL).
LONGEST_PATH = 107

BACKLOG = 128  #: connections that may wait to be accepted
ROUNDS = 100  #: how many ports are tried for one that is free in all address families
PATIENCE = 5.0  #: seconds to wait for another server that is starting in the same folder


#: A file could be called so, but whoever writes this means a port.
_NO_PATH = re.compile(r'([^/]*:)?\d+').fullmatch


def check(address: object) -> None:
    """Raise `ValueError` if this cannot be an address to listen on."""
    match address:
        case str() if address and '\0' not in address and not _NO_PATH(address):
            return
        case (str(), int(port)) if 0 <= port < 65536 and not isinstance(port, bool):
            return
    raise ValueError(f'{address!r} is no address to listen on: give (host, port), with port 0 for a free one,'
                     ' or the path of a Unix domain socket')


def resolve(host: str, port: int) -> list[tuple[socket.AddressFamily, SocketAddress]]:
    """All addresses that `host` means for a listening socket, each with its family, IPv4 first.

    ``''`` and ``'::'`` are all interfaces, in both families; ``'localhost'`` is this machine's
    loopback in both families, whatever its hosts file says (RFC 6761, section 6.3).
    """
    both = {'': ('0.0.0.0', '::'), '::': ('0.0.0.0', '::'), 'localhost': ('127.0.0.1', '::1')}
    if host in both:
        four, six = both[host]
        found: list[tuple[socket.AddressFamily, SocketAddress]] = [(socket.AF_INET, (four, port))]
        if socket.has_ipv6:
            found.append((socket.AF_INET6, (six, port, 0, 0)))
        return found
    try:
        answers = socket.getaddrinfo(  # only for text it imports what names in other scripts need
            host.encode() if host.isascii() else host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        reason = error.strerror if isinstance(error, socket.gaierror) else error
        raise OSError(
            errno.EADDRNOTAVAIL, f'the host {host!r} is not known here ({reason}); give an address'
            ' or a name of this machine') from None
    unique = {(family, address): None for family, _, _, _, address in answers
              if family in (socket.AF_INET, socket.AF_INET6)}
    return sorted(unique, key=lambda found: found[0] != socket.AF_INET)  # type: ignore[arg-type]


def listen(host: str, port: int, backlog: int = BACKLOG) -> list[socket.socket]:
    """Listening sockets on every address that `host` means, all with the same port.

    Port 0 chooses a port that is free on all of them.  An address that this machine does not have
    (IPv6, in many a container) is left out as long as there is another one.
    """
    addresses = resolve(host, port)
    for _ in range(ROUNDS - 1):
        try:
            return _listen_on_all(addresses, port, backlog)
        except OSError as error:
            # Port 0: what the kernel chose for the first family is in use in the second one.
            if port != 0 or error.errno != errno.EADDRINUSE:
                raise
    return _listen_on_all(addresses, port, backlog)


def _listen_on_all(
        addresses: list[tuple[socket.AddressFamily, SocketAddress]], port: int, backlog: int,
) -> list[socket.socket]:
    with contextlib.ExitStack() as unless_done:
        sockets: list[socket.socket] = []
        missing: OSError | None = None
        for family, address in addresses:
            try:
                listening = socket.socket(family, socket.SOCK_STREAM)
            except OSError as error:
                missing = _explain(error, address)
                continue
            unless_done.callback(listening.close)
            # A connection of a server that ended a moment ago does not keep the port from us.
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                if family == socket.AF_INET6:
                    listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                address = (address[0], port, *address[2:])
                listening.bind(address)
                listening.listen(backlog)
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise _explain(error, address) from None
                missing = _explain(error, address)
                listening.close()
                continue
            sockets.append(listening)
            port = listening.getsockname()[1]
        if not sockets:
            assert missing is not None, 'a name always has at least one address'
            raise missing
        unless_done.pop_all()
        return sockets


def _explain(error: OSError, address: SocketAddress) -> OSError:
    """The same error in words that name the address and say what to do."""
    host, port = address[:2]
    where = describe(address)
    match error.errno:
        case errno.EADDRINUSE:
            text = (f'port {port} is in use on {host}; stop the server that has it, or choose'
                    ' another port')
        case errno.EADDRNOTAVAIL | errno.EAFNOSUPPORT:
            text = f'{host} is not an address of this machine; choose one that is'
        case errno.EACCES | errno.EPERM:
            text = (f'may not listen on {where}; ports below 1024 are for root, choose a higher'
                    ' one')
        case _:
            text = f'cannot listen on {where}: {error.strerror}'
    return OSError(error.errno, text)


def listen_unix(path: str, mode: int = DEFAULT_SOCKET_MODE, backlog: int = BACKLOG) -> socket.socket:
    """A listening Unix domain socket on `path`; the socket file of a dead server is taken over.

    The file has these permissions (which say who may connect), and at no time more: Linux makes it with
    those of the socket, less the umask; elsewhere nobody can connect before it listens.
    """
    with claim_unix_path(path):
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with contextlib.suppress(OSError):
                os.fchmod(listening.fileno(), mode)
            listening.bind(path)
            os.chmod(path, mode)
            listening.listen(backlog)
        except OSError as error:
            listening.close()
            raise OSError(error.errno, f'cannot make the socket file {path}: {error.strerror}') from None
        return listening


@contextlib.contextmanager
def claim_unix_path(path: str) -> Iterator[None]:
    """While this lasts, `path` is free for a socket file of ours.

    What a dead server left there is removed.  A socket that somebody listens on, and anything that
    is not a socket, is refused with an `OSError`, and so is a path that cannot be one.

    Two servers that find the same stale file at the same time must not remove each other's new one:
    so only one at a time may look, remove and bind, and the lock for that is on the folder (`flock`),
    where it leaves no file behind.
    """
    if len(os.fsencode(path)) > LONGEST_PATH:
        raise OSError(
            errno.ENAMETOOLONG, f'the socket path {path} is too long ({len(os.fsencode(path))} bytes);'
            f' choose one of at most {LONGEST_PATH} bytes')
    folder = os.path.dirname(path) or '.'
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise OSError(
            error.errno, f'the socket {path} cannot be made: folder {folder}: {error.strerror};'
            ' create the folder, or choose another one') from None
    try:
        _lock(handle, path)
        _remove_if_stale(path)
        yield
    finally:
        os.close(handle)  # this unlocks


def _lock(handle: int, path: str) -> None:
    end = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > end:
                raise OSError(
                    errno.EAGAIN, f'the folder of the socket {path} is locked by another process;'
                    ' try again, or choose another folder') from None
        time.sleep(0.01)


def _remove_if_stale(path: str) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise OSError(error.errno, f'the socket {path} cannot be made: {error.strerror}') from None
    if not stat.S_ISSOCK(mode):
        raise OSError(
            errno.ENOTSOCK, f'{path} is there and is not a socket; move it away, or choose another path')
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # a server with a full backlog must not keep us waiting
        result = probe.connect_ex(path)
    if result in (errno.ECONNREFUSED, errno.ENOENT):
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        except OSError as error:
            raise OSError(
                error.errno, f'{path} was left behind by another server and cannot be removed:'
                f' {error.strerror}') from None
    elif result in (errno.EACCES, errno.EPERM):
        raise OSError(
            result, f'{path} belongs to another user, so it cannot be known whether its server is'
            ' running; remove it if not, or choose another path')
    else:
        raise OSError(
            errno.EADDRINUSE, f'another server is listening on {path}; stop it, or choose another path')


def socket_file(path: str) -> tuple[int, int]:
    """What tells this file from another one of the same name: its device and inode."""
    found = os.lstat(path)
    return found.st_dev, found.st_ino


def remove_socket_file(path: str, identity: tuple[int, int]) -> None:
    """Remove a socket file of ours, if it is still the one that `socket_file` told of."""
    with contextlib.suppress(OSError):
        if socket_file(path) == identity:
            os.unlink(path)


def describe(address: SocketAddress | str) -> str:
    """``127.0.0.1:9999``, ``[::1]:9999``, or the path of a socket file."""
    if isinstance(address, str):
        return address
    host, port = address[:2]
    return f'[{host}]:{port}' if ':' in host else f'{host}:{port}'


def only_this_machine(address: SocketAddress | str) -> bool:
    """Whether nobody on another machine can reach this address."""
    return isinstance(address, str) or address[0] == '::1' or address[0].startswith('127.')
