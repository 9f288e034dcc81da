"""Fixtures for the server's side: served storages, and scripted clients of them."""

from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ZODB.FileStorage import FileStorage

from tests.server.talk import GatedStorage
from tests.server.talk import SessionPeer
from zeo.server.served import Served


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    """Serve a storage without a server (the arguments are `Served`'s); all are closed at the end."""
    all_served: list[Served] = []

    def serve(storage: Any = None, **options: Any) -> Served:
        served = Served('1', GatedStorage() if storage is None else storage, **options)
        all_served.append(served)
        served.start()
        return served

    yield serve
    for served in all_served:
        if isinstance(served.storage, GatedStorage):
            served.storage.gates.open_all()
        served.close()


@pytest.fixture
def connect() -> Iterator[Callable[..., SessionPeer]]:
    """Connect clients (the arguments are `SessionPeer`'s); all leave at the end."""
    peers: list[SessionPeer] = []

    def connect(*args: Any, **kw: Any) -> SessionPeer:
        peers.append(SessionPeer(*args, **kw))
        return peers[-1]

    yield connect
    for peer in peers:
        peer.close()


@pytest.fixture
def file_storage(tmp_path: Path) -> Any:
    """A FileStorage; whoever serves it closes it."""
    return FileStorage(str(tmp_path / 'Data.fs'))


@pytest.fixture
def served(serve: Callable[..., Served]) -> Served:
    return serve()


@pytest.fixture
def peer(connect: Callable[..., SessionPeer], served: Served) -> SessionPeer:
    return connect(served)


@pytest.fixture
def filed(connect: Callable[..., SessionPeer], serve: Callable[..., Served], file_storage: FileStorage) -> SessionPeer:
    """A client of a FileStorage."""
    return connect(serve(file_storage))
