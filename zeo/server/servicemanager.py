"""What a service manager hands over, and what it is told: sd_listen_fds(3) and sd_notify(3).

Both are plain conventions, so no library is needed; whoever else follows them (s6, dinit, container
runtimes, and our own ``-d``) is served as well as systemd.
"""

import contextlib
import os
import socket
from collections.abc import MutableMapping

from zeo.server.options import CannotStart

#: The first file descriptor that is handed over.
FIRST = 3


def sockets(environment: MutableMapping[str, str]) -> list[socket.socket]:
    """The listening sockets that were handed over to this process, which then owns them.

    The variables that say so are removed, so that no child process believes that it is meant.
    """
    number = environment.pop('LISTEN_FDS', '')
    process = environment.pop('LISTEN_PID', '')
    environment.pop('LISTEN_FDNAMES', None)
    if process != str(os.getpid()) or not number.isdecimal():
        return []
    with contextlib.ExitStack() as unless_done:
        found = []
        for descriptor in range(FIRST, FIRST + int(number)):
            os.set_inheritable(descriptor, False)
            try:
                sock = socket.socket(fileno=descriptor)
                unless_done.callback(sock.close)
                usable = (sock.type == socket.SOCK_STREAM and not isinstance(sock.getsockname(), bytes)
                          and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
            except OSError:
                usable = False
            if not usable:
                raise CannotStart(
                    f'file descriptor {descriptor}, which the service manager hands over, is no socket that'
                    ' listens on a port or a path; give it ListenStream= and Accept=no')
            found.append(sock)
        unless_done.pop_all()
        return found


def tell(*assignments: str) -> None:
    """Tell the service manager, if there is one that wants to know: ``READY=1``, ``STATUS=...``.

    That is a courtesy; what goes wrong with it is nobody's concern.
    """
    where = os.environ.get('NOTIFY_SOCKET', '')
    if where[:1] not in ('/', '@'):
        return
    if where.startswith('@'):  # in the abstract namespace of Linux
        where = '\0' + where[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(1.0)
        sock.sendto('\n'.join(assignments).encode('utf-8', 'replace'), where)
