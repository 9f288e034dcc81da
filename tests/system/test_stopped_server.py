"""A server that is stopped, or hangs, while its machine and so its connections live on."""

import os
import signal
from collections.abc import Callable
from time import monotonic
from typing import Any

import pytest

from tests.client.conftest import Calls
from tests.client.conftest import calls as calls
from tests.system.servers import Server, freeze, until
from zeo.client import dialing, readingturn
from zeo.ClientStorage import ClientStorage
from zeo.errors import ClientDisconnected


@pytest.fixture
def stopped(start_server: Callable[..., Server], request: pytest.FixtureRequest) -> Any:
    """A function that stops a running server with SIGSTOP; at the end it goes on."""
    stopped: list[int] = []

    def stop(server: Server) -> None:
        assert server.process is not None
        stopped.append(server.process.pid)
        freeze(server.process)

    yield stop
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize('kind', ['zeo', 'ZEO'])
@pytest.mark.parametrize('call', ['ping', 'vote'])
def test_a_call_to_a_stopped_server_ends_and_the_next_server_is_used(
        start_server: Callable[..., Server], stopped: Callable[[Server], None], calls: Calls,
        monkeypatch: pytest.MonkeyPatch, kind: str, call: str) -> None:
    one = start_server(kind)
    other = start_server()
    monkeypatch.setattr(readingturn, 'SILENCE', 1.0)
    monkeypatch.setattr(readingturn, 'HEARTBEAT_INTERVAL', 0.2)
    storage = ClientStorage([one.address, other.address])
    try:
        link = storage._supervisor.wait()
        assert link.address == one.address
        monkeypatch.setattr(dialing, 'PATIENCE', 1.0)
        stopped(one)
        with pytest.raises(ClientDisconnected, match='no sign of life|has not answered'):
            calls.start(link.channel.call, call, (1,) if call == 'vote' else ())()
        storage.ping()
        assert storage._supervisor.wait().address == other.address
    finally:
        storage.close()


@pytest.mark.soak
@pytest.mark.parametrize('idle', [False, True])
def test_a_stopped_server_is_found_out_in_the_stated_time(
        start_server: Callable[..., Server], stopped: Callable[[Server], None], calls: Calls, idle: bool) -> None:
    server = start_server()
    storage = ClientStorage(server.address)
    try:
        stopped(server)
        began = monotonic()
        if idle:
            until(lambda: not storage.is_connected(), 'the server is missed')
        else:
            with pytest.raises(ClientDisconnected):
                calls.start(storage._supervisor.wait().channel.call, 'ping')()
        assert monotonic() - began < 45
    finally:
        storage.close()


def test_an_idle_client_finds_out_that_its_server_is_stopped_and_comes_back(
        start_server: Callable[..., Server], stopped: Callable[[Server], None],
        monkeypatch: pytest.MonkeyPatch) -> None:
    server = start_server()
    monkeypatch.setattr(readingturn, 'SILENCE', 1.0)
    storage = ClientStorage(server.address, wait_timeout=60)
    try:
        monkeypatch.setattr(dialing, 'PATIENCE', 0.5)
        stopped(server)
        until(lambda: not storage.is_connected(), 'the server is missed')
        monkeypatch.undo()
        assert server.process is not None
        os.kill(server.process.pid, signal.SIGCONT)
        storage.ping()
    finally:
        storage.close()
