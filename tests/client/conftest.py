"""Fixtures for tests with a scripted server."""

import socket
import threading
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import pytest

from tests.client.peer import PATIENCE
from tests.client.peer import Host
from tests.client.peer import Peer
from tests.system.servers import until
from zeo.client.channel import Channel
from zeo.client.dialing import KEPT
from zeo.wire.framing import Inbox


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
