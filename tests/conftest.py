"""Fixtures for tests that need real server processes (see tests/system/servers.py)."""

import contextlib
import gc
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.system import clients, postgres
from tests.system.certificates import Certificates
from tests.system.servers import Pool, Server, until

# Some tests are about Ctrl-C, which is ignored by what a shell starts in the background, and by its children.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope='module', autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    """Whoever opens a client or a server closes it."""
    before = set(threading.enumerate())
    yield

    def left() -> list[str]:
        return [thread.name for thread in threading.enumerate()
                if thread not in before and thread.name.startswith('zeo')]

    if left():
        gc.collect()
        with contextlib.suppress(AssertionError):
            until(lambda: not left(), 'they have ended', 10)
        assert not left()


@pytest.fixture(scope='session')
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp('certificates'))


@pytest.fixture(scope='session')
def cluster() -> Iterator[postgres.Cluster]:
    """A PostgreSQL, the same for all tests; each takes a database of its own."""
    if reason := postgres.why_not():
        pytest.skip(reason)
    with postgres.Cluster() as cluster:
        yield cluster


@pytest.fixture
def start_server() -> Iterator[Callable[..., Server]]:
    """Start servers (the arguments are `Server`'s); at the end all are stopped and judged."""
    servers: list[Server] = []

    def start(*args: Any, **kw: Any) -> Server:
        server = Server(*args, **kw)
        servers.append(server)
        return server.start()

    yield start
    failures = []
    for server in servers:
        try:
            server.close()
        except AssertionError as failure:
            failures.append(failure)
    if failures:
        raise failures[0]


@pytest.fixture
def open_client(start_server: Any) -> Iterator[Callable[..., Any]]:
    """Open client storages (the arguments are `clients.open_client`'s); at the end all are closed."""
    storages: list[Any] = []

    def open_client(*args: Any, **kw: Any) -> Any:
        storages.append(clients.open_client(*args, **kw))
        return storages[-1]

    yield open_client
    for storage in storages:
        storage.close()
    gc.collect()    # what a test forgot to close is found here, not in the next one


class Place:
    """A fresh storage in a running server."""

    def __init__(self, server: Server, name: str) -> None:
        self.server = server
        self.name = name
        self._storages: list[Any] = []

    def client(self, kind: str = 'zeo', **options: Any) -> Any:
        """A client of it, closed at the end of the test."""
        self._storages.append(clients.open_client(kind, self.server, self.name, **options))
        return self._storages[-1]

    def close(self) -> None:
        for storage in self._storages:
            storage.close()


@pytest.fixture(scope='module')
def _module_pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.close()
    gc.collect()


@pytest.fixture
def place(_module_pool: Pool) -> Iterator[Place]:
    """For tests that need a server, but none of their own."""
    place = Place(*_module_pool.take())
    yield place
    place.close()


@pytest.fixture(scope='class')
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    """Fresh storages for a test class, which says of what sort in its attribute ``server``."""
    pool = Pool(**request.cls.server)
    yield pool
    pool.close()
    gc.collect()    # what the class forgot to close is found here, not in the next one
