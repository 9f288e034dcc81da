"""Fixtures: servers that run in this process, and scripted clients of them."""

import os
import threading
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.talk import GatedStorage
from tests.server.talk import SocketPeer
from tests.system.servers import until
from zeo.StorageServer import StorageServer

Start = Callable[..., StorageServer]
Connect = Callable[..., SocketPeer]

LOCAL = ('127.0.0.1', 0)


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a server over a `GatedStorage`; all are closed at the end, and leave nothing behind."""
    before = set(threading.enumerate())
    servers: list[StorageServer] = []

    def start(storages: dict[str, Any] | None = None, addresses: Any = (LOCAL,), **options: Any) -> Any:
        server = StorageServer({'1': GatedStorage()} if storages is None else storages, addresses,
                               **options)
        servers.append(server)
        server.start()
        return server

    yield start
    for server in servers:
        for served in server.storages.values():
            if isinstance(served.storage, GatedStorage):
                served.storage.gates.open_all()
        server.close()
    until(lambda: {each for each in threading.enumerate() if each.name.startswith('zeo')} <= before,
          'no thread is left')


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Connect to a server, at its first address if it is not another one."""
    peers: list[SocketPeer] = []

    def connect(server: Any, **kw: Any) -> SocketPeer:
        address = server.addresses[0] if isinstance(server, StorageServer) else server
        peers.append(SocketPeer(address, **kw))
        return peers[-1]

    yield connect
    for peer in peers:
        peer.close()


@pytest.fixture
def server(start: Start) -> StorageServer:
    return start()


def storage(server: StorageServer) -> GatedStorage:
    found = server.storages['1'].storage
    assert isinstance(found, GatedStorage)
    return found


def open_files() -> int:
    return len(os.listdir('/proc/self/fd'))


def is_closed(peer: SocketPeer) -> bool:
    """Wait for the end of a connection that nobody reads from yet."""
    try:
        while peer.sock.recv(2**16):
            pass
    except ConnectionResetError:
        pass
    return True
