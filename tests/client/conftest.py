"""Fixtures for tests with a scripted server."""

import socket
import threading
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import pytest
from ZODB.utils import z64

from tests.client.peer import PATIENCE
from tests.client.peer import Host
from tests.client.peer import Peer
from tests.client.peer import oid
from tests.client.peer import tid
from tests.system.servers import until
from zeo.client.cache import open_cache
from zeo.client.channel import Channel
from zeo.client.dialing import KEPT
from zeo.client.link import Link
from zeo.client.supervisor import State
from zeo.client.supervisor import Supervisor
from zeo.client.upkeep import Upkeep
from zeo.wire.framing import Frame
from zeo.wire.framing import Inbox
from zeo.wire.revisions import HEAD
from zeo.wire.revisions import prefetched_notice


class Calls:
    """Threads, each of which makes one call, and what came of them."""

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []

    def start(self, function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
        """Begin it; returns a function that waits for its end and returns or raises what it did."""
        outcome: list[tuple[bool, Any]] = []

        def run() -> None:
            try:
                outcome.append((True, function(*args)))
            except BaseException as error:
                outcome.append((False, error))

        thread = threading.Thread(target=run, name=f'test calling {function}', daemon=True)
        self.threads.append(thread)
        thread.start()

        def result() -> Any:
            thread.join(PATIENCE)
            assert outcome, 'this call does not end'
            good, value = outcome[0]
            if good:
                return value
            raise value

        return result


@pytest.fixture
def calls() -> Iterator[Calls]:
    calls = Calls()
    yield calls
    for thread in calls.threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()


class Line:
    """A channel, the peer at its other end, and what the channel was told."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.sock = ours
        self.peer = Peer(theirs)
        self.heard: list[Any] = []  # effects in their order
        self.channel = Channel(
            ours, Inbox(keep=KEPT),
            {'invalidateTransaction': lambda tid, oids: self.heard.append(('invalidate', tid, oids))},
            loaded=lambda key, result: self.heard.append(('loaded', key, result)),
            told=lambda revisions: self.heard.append(('told', revisions)), address='the peer')
        self.channel.set_timeout(None)
        self.watcher = threading.Thread(target=self.channel.watch, name='test watcher', daemon=True)

    def watch(self) -> None:
        self.watcher.start()

    def close(self) -> None:
        self.channel.end('the test is over')
        if self.watcher.ident is None:
            self.watch()
        self.watcher.join(PATIENCE)
        assert not self.watcher.is_alive()
        assert self.sock.fileno() == -1
        self.peer.close()


@pytest.fixture
def line(calls: Calls) -> Iterator[Line]:
    """A connection without its watcher: whoever waits for a reply must read it."""
    line = Line()
    yield line
    line.close()


@pytest.fixture
def watched(line: Line) -> Line:
    """A connection with its watcher."""
    line.watch()
    return line


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    yield host
    host.close()


@pytest.fixture
def second_host() -> Iterator[Host]:
    host = Host()
    yield host
    host.close()


def parked(line: Line, number: int) -> None:
    until(lambda: len(line.channel._parked) == number, f'{number} sleepers')


def led(line: Line) -> None:
    until(line.channel._turn.locked, 'somebody leads')


def told(*numbers: int, untold: tuple[int, ...] = ()) -> Frame:
    """Of each object its revision before tid 9; of those that are untold, that one has to ask again."""
    return prefetched_notice(tid(9), [
        *(HEAD.pack(oid(number), tid(1), z64, 8) for number in numbers),
        *(HEAD.pack(oid(number), z64, z64, 0) for number in untold)], list(map(oid, numbers)))


class Database:
    def __init__(self) -> None:
        self.told: list[Any] = []

    def invalidate(self, tid: bytes, oids: Any) -> None:
        self.told.append((tid, list(oids)))

    def invalidateCache(self) -> None:
        self.told.append('all')


class Client:
    """A supervisor with a cache and a database."""

    def __init__(self, *hosts: Any, **options: Any) -> None:
        self.cache = open_cache(None, 1 << 20)
        self.upkeep = Upkeep(self.cache)
        self.upkeep.database = self.database = Database()
        self.connected: list[Link] = []
        self.supervisor = Supervisor(
            [host.address if isinstance(host, Host) else host for host in hosts], '1', self.upkeep,
            **{'connected': self.connected.append, 'wait_timeout': PATIENCE, 'min_poll': 0.01}
            | options)

    def known(self, last_tid: bytes) -> None:
        """As if it had been connected before: object 1 is cached, valid as of that tid."""
        self.cache.store(oid(1), tid(1), None, b'one')
        self.cache.set_last_tid(last_tid)

    def close(self) -> None:
        self.supervisor.close()
        self.cache.close()
        assert not [each.name for each in threading.enumerate() if each.name.startswith('zeo client')]
        assert self.supervisor.state is State.CLOSED


MakeClient = Callable[..., Client]


@pytest.fixture
def client() -> Iterator[MakeClient]:
    clients: list[Client] = []

    def make(*args: Any, **options: Any) -> Client:
        clients.append(Client(*args, **options))
        return clients[-1]

    yield make
    for each in clients:
        each.close()


def ready(client: Client, host: Host, last_tid: bytes = tid(5), **info: Any) -> Peer:
    client.supervisor.start()
    peer = host.accept()
    peer.welcome(last_tid, **info)
    client.supervisor.wait()
    return peer
