"""Scripted clients that speak Z5 to our server: over a socket, or handing payloads to a session.

Also what the tests of the server's side need beside them: storages that stop at named gates until the
test lets them go on, and names for oids and tids.  Nothing here sleeps, and every wait has a time-out.
"""

import itertools
import socket
import threading
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

from ZODB.MappingStorage import MappingStorage
from ZODB.utils import maxtid
from ZODB.utils import p64
from ZODB.utils import u64
from ZODB.utils import z64
from zope.interface import directlyProvides
from zope.interface import providedBy

from zeo.server.outbox import Outbox
from zeo.server.served import Served
from zeo.server.session import Session
from zeo.wire import faults
from zeo.wire import messages
from zeo.wire.decoding import decode_from_server
from zeo.wire.framing import Frame
from zeo.wire.framing import Inbox
from zeo.wire.framing import frame
from zeo.wire.greeting import GREETING
from zeo.wire.stores import Batch
from zeo.wire.stores import Store

#: Seconds that anything may take.  Never reached on a healthy machine, however busy.
PATIENCE = 30.0

Message = tuple[Any, int, str, Any]


def in_thread(function: Callable[..., Any], *args: Any) -> 'Future[Any]':
    """Call a function in a thread of its own; its result, or what it raises, is in the future."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=f'test {function}', daemon=True).start()
    return future


def payloads(inbox: Inbox, parts: Iterable[bytes]) -> Iterator[bytes | bytearray]:
    """What the parts of frames contain."""
    for part in parts:
        rest = memoryview(part)
        while rest:
            room = inbox.buffer()
            count = min(len(room), len(rest))
            room[:count] = rest[:count]
            inbox.advance(count)
            rest = rest[count:]
            while (payload := inbox.next()) is not None:
                yield payload


def packed(*stores: Store) -> tuple[bytes, bytes]:
    """Heads and records, as they travel."""
    batch = Batch()
    for store in stores:
        batch.add(*store)
    heads, records = batch.take()
    return heads, b''.join(records)


class Peer:
    """What the two kinds of clients have in common: it says things, and remembers all it was told."""

    def __init__(self) -> None:
        self._ids = itertools.count(1)
        self.told: list[Message] = []  # all messages so far, in order
        self.asked: dict[int, tuple[str, tuple[Any, ...]]] = {}  # requests by their ids
        self._new = threading.Condition()  # guards `told` and `ended`; notified when they change
        self.ended = False

    def _say(self, frame: Frame) -> None:
        raise NotImplementedError

    def _hear(self, payload: bytes | bytearray) -> None:
        with self._new:
            self.told.append(decode_from_server(payload))
            self._new.notify_all()

    def _end(self) -> None:
        with self._new:
            self.ended = True
            self._new.notify_all()

    def ask(self, name: str, *args: Any) -> int:
        """Send a request; returns its id."""
        number = next(self._ids)
        self.asked[number] = name, args
        self._say(messages.request(number, name, args))
        return number

    def tell(self, name: str, *args: Any) -> None:
        """Send a one-way message."""
        self._say(messages.notice(name, args))

    def wait(self, condition: Callable[[Message], bool], what: str = '',
             patience: float = PATIENCE) -> Message:
        """The first message for which the condition holds, as soon as there is one."""
        found: list[Message] = []
        seen = 0

        def look() -> bool:
            nonlocal seen
            seen = min(seen, len(self.told))  # it may be cleared
            while not found and seen < len(self.told):
                if condition(self.told[seen]):
                    found.append(self.told[seen])
                seen += 1
            return bool(found) or self.ended

        with self._new:
            assert self._new.wait_for(look, patience), f'still waiting for {what}; told: {self.told}'
        if found:
            return found[0]
        raise EOFError(f'the connection has ended without {what}')

    def wait_for_end(self, patience: float | None = None) -> bool:
        """Wait until the server has hung up; with ``patience`` no longer than that, and tell whether it has."""
        with self._new:
            ended = self._new.wait_for(lambda: self.ended, PATIENCE if patience is None else patience)
        assert ended or patience is not None, 'the server has not hung up'
        return ended

    def answer(self, number: int, patience: float = PATIENCE) -> Any:
        """The result of a request; raises what the server says is wrong."""
        _, flag, _, result = self.wait(
            lambda message: message[0] == number and message[2] == '.reply', f'reply {number}',
            patience)
        if flag:
            raise faults.recreate(*result)
        return result

    def call(self, name: str, *args: Any) -> Any:
        return self.answer(self.ask(name, *args))

    def notices(self, name: str) -> list[Any]:
        """The arguments of all notices of that name so far."""
        with self._new:
            return [args for _, flag, each, args in self.told if flag and each == name]

    def invalidations(self) -> list[tuple[bytes, list[bytes]]]:
        return [(tid, list(oids)) for tid, oids in self.notices('invalidateTransaction')]

    # ---- transactions

    def begin(self, id: Any = 1, *stores: tuple[bytes, bytes, bytes], **kw: Any) -> None:
        """Begin a transaction; stores are oid, serial and record."""
        self.tell('tpc_begin', id, b'user', b'description', {}, *kw.values())
        for oid, serial, record in stores:
            self.tell('storea', oid, serial, record, id)

    def commit(self, oid: bytes, record: bytes, serial: bytes | None = None, id: Any = 1) -> bytes:
        """A whole transaction; returns its tid."""
        self.begin(id, (oid, self.serial(oid) if serial is None else serial, record))
        self.call('vote', id)
        tid: bytes = self.call('tpc_finish', id)
        return tid

    def serial(self, oid: bytes) -> bytes:
        try:
            tid: bytes = self.call('getTid', oid)
            return tid
        except KeyError:
            return z64

    def load(self, oid: bytes, before: bytes = maxtid) -> Any:
        return self.call('loadBefore', oid, before)


class SessionPeer(Peer):
    """A client without a network: its messages are handled at once, in the thread that says them."""

    def __init__(self, storages: Served | dict[str, Served], name: str = '1', read_only: bool = False,
                 register: bool = True, session: type[Session] = Session) -> None:
        super().__init__()
        self.outbox = Outbox()
        self.outbox.deliver = self._listen
        if isinstance(storages, Served):
            storages = {name: storages}
        self.hung_up = False
        self.session = session(storages, self.outbox, 'the client', self._hang_up)
        self._inbox = Inbox(2**31)
        self._listening = threading.Lock()
        if register:
            self.registered: bytes = self.call('register', name, read_only)

    def _hang_up(self) -> None:
        self.hung_up = True
        self.outbox.end()
        self._listen()

    def say(self, payload: bytes) -> None:
        """Hand over any bytes.  Raises `ProtocolError` where a server would hang up."""
        self.session.handle(payload)
        self._listen()

    def _say(self, frame: Frame) -> None:
        self.say(b''.join(frame)[4:])

    def _listen(self) -> None:
        with self._listening:
            while parts := self.outbox.take():
                for payload in payloads(self._inbox, parts):
                    self._hear(payload)
        if self.outbox.gone:
            self._end()

    def close(self) -> None:
        """The connection ends, as when the client leaves."""
        self.session.close()
        self.outbox.end()
        self._end()


class SocketPeer(Peer):
    """A client over a real socket, with a thread that reads."""

    def __init__(self, address: tuple[str, int] | str, name: str = '1', read_only: bool = False,
                 register: bool = True, reading: bool = True,
                 wrap: Callable[[socket.socket], socket.socket] = lambda sock: sock) -> None:
        super().__init__()
        family = socket.AF_UNIX if isinstance(address, str) else \
            socket.AF_INET6 if ':' in address[0] else socket.AF_INET
        self.sock = socket.socket(family, socket.SOCK_STREAM)
        self.sock.settimeout(PATIENCE)
        if family != socket.AF_UNIX:
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            self.sock.connect(address)
            self.sock = wrap(self.sock)
        except OSError:
            self.sock.close()
            raise
        self._inbox = Inbox(2**31)
        self._reader = threading.Thread(target=self._read, name='test reader', daemon=True)
        self.greeting = self.receive()
        if register:
            self.send(GREETING)
            number = self.ask('register', name, read_only)
            if reading:
                self._reader.start()
                self.registered: bytes = self.answer(number)

    def receive(self) -> bytes | bytearray | None:
        """The next payload, read in the calling thread; None at the end."""
        while (payload := self._inbox.next()) is None:
            count = self.sock.recv_into(self._inbox.buffer())
            if not count:
                return None
            self._inbox.advance(count)
        return payload

    def start_reading(self) -> None:
        self._reader.start()

    def _read(self) -> None:
        try:
            while (payload := self.receive()) is not None:
                self._hear(payload)
        except OSError:
            pass
        self._end()

    def send(self, payload: bytes) -> None:
        self.sock.sendall(b''.join(frame(payload)))

    def _say(self, frame: Frame) -> None:
        self.sock.sendall(b''.join(frame))

    def close(self) -> None:
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        if self._reader.ident is not None:
            self._reader.join(PATIENCE)
        self.sock.close()

    def __enter__(self) -> 'SocketPeer':
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


# ---- gates -----------------------------------------------------------------------------


class Gate:
    """A place where the first thread that comes by stops until the test opens it."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()  # guards `_shut`
        self._shut = False
        self._reached = threading.Event()
        self._opened = threading.Event()

    def shut(self) -> None:
        """From now on: one thread will stop here; the others pass."""
        self._reached.clear()
        self._opened.clear()
        self._shut = True

    def go_through(self) -> None:
        with self._mutex:
            stop, self._shut = self._shut, False
        if stop:
            self._reached.set()
            assert self._opened.wait(PATIENCE), 'the gate was never opened'

    def wait_until_reached(self) -> None:
        assert self._reached.wait(PATIENCE), 'nobody came to the gate'

    def open(self) -> None:
        self._shut = False
        self._opened.set()


class Gates(dict[str, Gate]):
    """Gates by name; they stand open until they are shut."""

    def __missing__(self, name: str) -> Gate:
        gate = self[name] = Gate()
        return gate

    def open_all(self) -> None:
        for gate in self.values():
            gate.open()


class GatedStorage:
    """A storage with gates where a race may be decided.

    ``loading``, ``loaded``: before and after a record is read; ``voting``: in ``tpc_vote``;
    ``finishing``: when the transaction is given its tid and is not yet to be seen; ``finished``: when it
    is on disk, and ``tpc_finish`` has not returned; ``aborting``.  `calls` lists the calls of the
    two-phase commit.
    """

    def __init__(self, storage: Any = None) -> None:
        self._storage = MappingStorage() if storage is None else storage
        self.gates = Gates()
        self.calls: list[str] = []
        self.finish_error: Exception | None = None  # raised by ``tpc_finish`` when all is done
        directlyProvides(self, providedBy(self._storage))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def __len__(self) -> int:
        return len(self._storage)

    registerDB = MappingStorage.registerDB  # one that is known to announce nothing

    def loadBefore(self, oid: bytes, tid: bytes) -> Any:
        self.gates['loading'].go_through()
        found = self._storage.loadBefore(oid, tid)
        self.gates['loaded'].go_through()
        return found

    def tpc_begin(self, *args: Any) -> None:
        self.calls.append('tpc_begin')
        self._storage.tpc_begin(*args)

    def tpc_vote(self, transaction: Any) -> Any:
        self.calls.append('tpc_vote')
        self.gates['voting'].go_through()
        return self._storage.tpc_vote(transaction)

    def tpc_finish(self, transaction: Any, callback: Any = None) -> bytes:
        self.calls.append('tpc_finish')

        def called(tid: bytes) -> None:
            if callback is not None:
                callback(tid)
            self.gates['finishing'].go_through()

        tid: bytes = self._storage.tpc_finish(transaction, called)
        if self.finish_error is not None:
            raise self.finish_error
        self.gates['finished'].go_through()
        return tid

    def tpc_abort(self, transaction: Any) -> None:
        self.calls.append('tpc_abort')
        self.gates['aborting'].go_through()
        self._storage.tpc_abort(transaction)


class Announcing(MappingStorage):
    """A storage with transactions of others, as a `ClientStorage` is one.

    Everything that becomes visible is announced in order, own commits by the callback of
    ``tpc_finish``; then the last tid moves.
    """

    def __init__(self) -> None:
        super().__init__()
        self.db: Any = None
        self.between: Callable[[], None] = lambda: None  # called in tpc_finish after the callback
        self.shown = z64

    def registerDB(self, db: Any) -> None:
        self.db = db

    def lastTransaction(self) -> bytes:
        return self.shown

    def tpc_finish(self, transaction: Any, callback: Callable[[bytes], None] = lambda tid: None) -> bytes:
        committed: bytes = super().tpc_finish(transaction)
        callback(committed)
        self.shown = max(self.shown, committed)
        self.between()
        return committed

    def somebody_commits(self, *oids: bytes) -> bytes:
        committed = p64(max(u64(super().lastTransaction() or z64), u64(self.shown)) + 1)
        self.db.invalidate(committed, oids)
        self.shown = committed
        return committed


# ---- names ----------------------------------------------------------------------------------


def oid(number: int) -> bytes:
    return p64(number)


def tid(number: int) -> bytes:
    """An early tid, for what is not stored."""
    return p64(number)


def records(storage: Any) -> Iterator[tuple[bytes, bytes, bytes]]:
    """All revisions in a storage with an iterator, as oid, tid and record."""
    for transaction in storage.iterator():
        for record in transaction:
            yield record.oid, record.tid, record.data
