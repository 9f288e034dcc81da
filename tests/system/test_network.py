"""A network that delays, tears apart, half-closes, swallows and resets: the client goes on, or says so."""

import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import transaction
from ZODB import DB
from ZODB.utils import maxtid

from tests.system.clients import Task, hears_of, store
from tests.system.proxy import Proxy
from tests.system.servers import PATIENCE, Server, until
from zeo import ClientDisconnected
from zeo.client import dialing
from zeo.ClientStorage import ClientStorage

Start = Callable[..., Server]


@pytest.fixture
def server(start_server: Start) -> Server:
    return start_server()


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    with Proxy(server.address) as proxy:
        yield proxy


@pytest.fixture
def storage(proxy: Proxy) -> Iterator[Any]:
    storage = ClientStorage(proxy.address, wait_timeout=PATIENCE, min_disconnect_poll=.01)
    yield storage
    storage.close()


def use(storage: Any, number: int) -> None:
    """What an application does: write, read, undo, iterate."""
    oid = storage.new_oid()
    record = b'%d' % number * 20_000
    tid = store(storage, oid, record=record)
    storage._cache.clear(storage.lastTransaction())
    assert storage.loadBefore(oid, maxtid) == (record, tid, None)
    assert storage.undoLog(0, 1)
    assert [each.tid for each in storage.iterator(tid)] == [tid]


def test_frames_that_come_byte_by_byte_are_the_same_frames(proxy: Proxy) -> None:
    proxy.pieces = 1
    storage = ClientStorage(proxy.address, wait_timeout=PATIENCE)
    oid = storage.new_oid()
    tid = store(storage, oid, record=b'x' * 1000)
    storage._cache.clear(tid)
    assert storage.load(oid) == (b'x' * 1000, tid)
    storage.close()


@pytest.mark.parametrize('pieces', [3, 1000, 70_000])
def test_frames_that_come_in_odd_pieces_are_the_same_frames(
        proxy: Proxy, storage: Any, pieces: int) -> None:
    proxy.pieces = pieces
    for number in range(3):
        use(storage, number)


def test_a_slow_network_only_takes_longer(proxy: Proxy, storage: Any) -> None:
    proxy.delay = .01
    use(storage, 1)


def test_a_reset_connection_is_made_again(proxy: Proxy, storage: Any) -> None:
    for number in range(3):
        before = proxy.connections
        proxy.reset()
        until(lambda: proxy.connections > before and storage.is_connected(), 'it is connected again')
        use(storage, number)


def test_a_half_closed_connection_is_made_again(proxy: Proxy, storage: Any) -> None:
    before = proxy.connections
    proxy.half_close()
    until(lambda: proxy.connections > before and storage.is_connected(), 'it is connected again')
    use(storage, 1)


def test_a_reset_during_a_call_is_an_error_of_that_call_and_loads_are_tried_again(
        proxy: Proxy, storage: Any) -> None:
    oid = storage.new_oid()
    tid = store(storage, oid)
    storage._cache.clear(tid)
    proxy.hold()
    calls = storage._supervisor.link.channel._calls
    asking, loading = Task(storage.undoLog), Task(storage.load, oid)
    until(lambda: storage._supervisor.link.channel._calls >= calls + 2, 'both have asked')
    proxy.reset()
    proxy.release()
    with pytest.raises(ClientDisconnected):
        asking.result()
    assert loading.result() == (b'x', tid)


def test_what_others_committed_during_the_interruption_is_seen_afterwards(
        server: Server, proxy: Proxy, storage: Any) -> None:
    db = DB(storage)
    with db.transaction() as connection:
        connection.root()['n'] = 0
    other = DB(ClientStorage(server.address, server_sync=True))
    reader = db.open(transaction.TransactionManager())
    for n in range(1, 4):
        assert reader.root()['n'] == n - 1
        before = proxy.connections
        proxy.hold()
        with other.transaction() as connection:
            connection.root()['n'] = n
        proxy.reset()
        proxy.release()
        until(lambda: proxy.connections > before and storage.is_connected(), 'it is connected again')
        hears_of(storage, other.lastTransaction())
        reader.sync()
        assert reader.root()['n'] == n
    reader.close()
    other.close()


def test_the_kernel_is_told_to_find_out_a_peer_that_is_gone_without_a_word(storage: Any) -> None:
    """What it does then it does by itself: the connection ends, see the test of resets."""
    sock = storage._supervisor.link.channel._sock
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    options = {name: sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name))
               for name in dialing.KEEPALIVE}
    assert options == dialing.KEEPALIVE
    assert options['TCP_USER_TIMEOUT'] == dialing.DEAD_AFTER * 1000
    assert (options['TCP_KEEPIDLE'] + options['TCP_KEEPINTVL'] * options['TCP_KEEPCNT']
            <= dialing.DEAD_AFTER)


def test_closing_returns_at_once_although_the_network_swallows_everything(proxy: Proxy) -> None:
    before = set(threading.enumerate())
    storage = ClientStorage(proxy.address, wait_timeout=PATIENCE)
    calls = storage._supervisor.link.channel._calls
    proxy.hold()
    asking = Task(storage.undoLog)
    until(lambda: storage._supervisor.link.channel._calls > calls, 'it has asked')
    Task(storage.close).result()
    with pytest.raises(ClientDisconnected):
        asking.result()
    assert {thread for thread in threading.enumerate()
            if thread not in before and thread.name.startswith('zeo')} == set()


def test_half_open_connections_do_not_disturb_the_one_that_is_used(
        server: Server, proxy: Proxy) -> None:
    proxy.hold()
    storage = ClientStorage([proxy.address, server.address], wait_timeout=PATIENCE)
    assert storage._server_address == dialing.display(server.address)
    use(storage, 1)
    proxy.release()
    use(storage, 2)
    storage.close()
