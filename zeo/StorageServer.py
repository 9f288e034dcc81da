"""Listens, accepts, gives each client a thread and a session; ends them all in order.

Threads of a server process, each named for what it does:

- ``zeo accept ADDRESS``: one for each listening socket (`zeo.server.listener`), accepts connections, greets, and hears
  who comes in: until the first request, or without TLS until `register` is answered if that takes no time.  It
  waits for nobody; `StorageServer.close` ends it by a byte in its bell, and it lets go of those it still hears;
- ``zeo client ADDRESS``: one for each connection from then on, reads from the socket and runs the session: it is
  in recv, in the storage, or sending to its own client; TLS is agreed on here, too.  When the client has left it
  is a ``zeo spare`` for some seconds, and may serve the next one; there are never more than there may be
  connections (`zeo.server.threads`).  `StorageServer.close` shuts their sockets and joins them;
- ``zeo writer``: one, sends to clients that do not read fast enough (`zeo.server.writer`);
- ``zeo pulse``: one, tells clients that the server lives (`zeo.server.pulse`);
- ``zeo voter STORAGE``: one for each storage, runs votes that had to wait and are not quick (`zeo.server.worker`);
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
import logging
import socket
import threading
from collections.abc import Mapping
from collections.abc import Sequence
from typing import TYPE_CHECKING
from typing import Any

from zeo.server import addresses as listening
from zeo.server.addresses import Address
from zeo.server.backing import POLL_INTERVAL
from zeo.server.connection import Connection
from zeo.server.limits import Allowance
from zeo.server.limits import Door
from zeo.server.limits import Full
from zeo.server.limits import Limits
from zeo.server.limits import files_for_connections
from zeo.server.limits import files_for_iterators
from zeo.server.listener import Listener
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
from zeo.server.writer import Writer
from zeo.wire import messages

if TYPE_CHECKING:
    import ssl

logger = logging.getLogger(__name__)

#: How long in seconds `StorageServer.close` waits for connections to end by themselves, all together.
CLOSING_PATIENCE = 10.0


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
        self._listeners: list[Listener] = []
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
        listeners: list[Listener] = []
        with contextlib.ExitStack() as unless_done:
            for address in self._wanted:
                if isinstance(address, socket.socket):
                    sockets = [address]
                elif isinstance(address, str):
                    sockets = [listening.listen_unix(address, self._socket_mode)]
                else:
                    sockets = listening.listen(*address)
                for sock in sockets:
                    listeners.append(Listener(self, sock, file_is_ours=sock is not address))
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
              address: Address | None = None) -> Connection | None:
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

    def serve(self, connection: Connection) -> None:
        """Serve one client as long as it stays, in the calling thread."""
        threading.current_thread().name = f'zeo client {connection.session.client}'
        connection.run()

    def dismiss(self, connection: Connection) -> None:
        """Close a connection and make room for another."""
        try:
            connection.close()
        finally:
            with self._mutex:
                del self._connections[connection]
                self._door.leave(connection)

    def _let_in(self, connection: Connection, host: str | None) -> bool:
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

    def has_registered(self, connection: Connection) -> None:
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
    def connections(self) -> list[Connection]:
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
