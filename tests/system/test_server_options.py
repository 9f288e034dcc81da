"""The options of the command line, each seen from a client of a real server."""

import time
from collections.abc import Callable
from typing import Any

import pytest
from persistent.TimeStamp import TimeStamp
from ZODB.POSException import ReadOnlyError, StorageError
from ZODB.utils import maxtid, p64, u64, z64

from tests.server.talk import SocketPeer, oid
from tests.system.clients import Task, store, vote
from tests.system.servers import file_storage, until
from zeo.errors import ClientDisconnected

Open = Callable[..., Any]


# ---- --transaction-timeout


@pytest.mark.filterwarnings('ignore::ResourceWarning')  # stock clients may leave a file open
@pytest.mark.parametrize('kind', ['zeo', 'ZEO'])
def test_who_votes_and_does_not_go_on_lets_the_next_one_in(
        start_server: Open, open_client: Open, kind: str) -> None:
    server = start_server(transaction_timeout=1)
    slow, quick = open_client(kind, server), open_client('zeo', server)
    oid = slow.new_oid()
    meta = vote(slow, oid, record=b'never committed')
    began = time.monotonic()
    tid = store(quick, oid, record=b'committed')        # waits for the lock
    assert 0.5 < time.monotonic() - began < 20
    server.log.wait_for('the transaction took too long and is aborted')
    until(lambda: not slow.is_connected() or slow.lastTransaction() >= tid, 'the slow one notices')
    with pytest.raises((ClientDisconnected, StorageError)):
        slow.tpc_finish(meta)
    slow.tpc_abort(meta)
    until(lambda: slow.is_connected() and slow.lastTransaction() >= tid, 'it is back')
    assert slow.load(oid) == (b'committed', tid)
    assert store(slow, oid, tid, b'once more') > tid


def test_a_slow_client_that_has_not_voted_is_not_in_the_way_of_anybody(
        start_server: Open, open_client: Open) -> None:
    server = start_server(transaction_timeout=0.2)
    slow, quick = open_client('zeo', server), open_client('zeo', server)
    meta = type(vote(quick))()      # some transaction; that one is timed out below
    slow.tpc_begin(meta)
    slow.store(slow.new_oid(), z64, b'x', '', meta)
    server.log.wait_for('the transaction took too long and is aborted')
    slow.tpc_vote(meta)
    slow.tpc_finish(meta)


def test_without_a_limit_a_transaction_may_take_its_time(start_server: Open, open_client: Open) -> None:
    server = start_server(transaction_timeout=0)
    slow, quick = open_client('zeo', server), open_client('zeo', server)
    meta = vote(slow)
    waiting = Task(store, quick)
    until(lambda: slow.server_status()['waiting'] == 1, 'the other one waits')
    assert slow.server_status()['timeout-thread-is-alive'] == 'stub'
    tid = slow.tpc_finish(meta)
    assert waiting.result() > tid


# ---- --invalidation-queue-size, --invalidation-age


def commits(peer: SocketPeer, count: int) -> list[bytes]:
    return [peer.commit(oid(number), b'record %d' % number, id=number) for number in range(1, count + 1)]


def test_exactly_so_many_transactions_are_remembered(start_server: Open) -> None:
    server = start_server(invalidation_queue_size=5)
    with SocketPeer(server.address) as peer:
        tids = commits(peer, 12)
        for missed in range(1, 5):
            last, oids = peer.call('getInvalidations', tids[-1 - missed])
            assert last == tids[-1] and sorted(oids) == [oid(number) for number in range(13 - missed, 13)]
        assert peer.call('getInvalidations', tids[-7]) is None
    server.restart()
    with SocketPeer(server.address) as peer:        # a FileStorage tells what it was
        last, oids = peer.call('getInvalidations', tids[-3])
        assert last == tids[-1] and sorted(oids) == [oid(11), oid(12)]
        assert peer.call('getInvalidations', tids[-7]) is None


def test_with_an_age_the_storage_is_asked_as_far_back(start_server: Open) -> None:
    server = start_server(invalidation_queue_size=2, invalidation_age=1000)
    with SocketPeer(server.address) as peer:
        tids = commits(peer, 12)
        last, oids = peer.call('getInvalidations', tids[0])
        assert last == tids[-1] and sorted(oids) == [oid(number) for number in range(2, 13)]
        old = TimeStamp(*time.gmtime(time.time() - 2000)[:6]).raw()
        assert peer.call('getInvalidations', old) is None
        assert peer.call('getInvalidations', p64(u64(tids[0]) + 1)) is None  # no transaction here had that one


# ---- --read-only


def test_a_read_only_server_serves_and_refuses(start_server: Open) -> None:
    server = start_server(storages={'1': file_storage(), '2': file_storage('two.fs')})
    with SocketPeer(server.address) as peer:
        tid = peer.commit(oid(1), b'before')
    server.restart(read_only=True)
    with SocketPeer(server.address, register=False) as peer:
        peer.send(b'Z5')
        peer.start_reading()
        for name in '12':
            with pytest.raises(ReadOnlyError):
                peer.call('register', name, False)
        assert peer.call('register', '1', True) == tid
        assert peer.load(oid(1), maxtid) == (b'before', tid, None)
        with pytest.raises(ReadOnlyError):
            peer.call('new_oids')
        with pytest.raises(ReadOnlyError):
            peer.call('tpc_begin', 1, b'', b'', {})


# ---- --client-conflict-resolution


@pytest.mark.parametrize('by_clients', [False, True])
def test_who_is_to_resolve_a_conflict(start_server: Open, by_clients: bool) -> None:
    server = start_server(client_conflict_resolution=by_clients)
    with SocketPeer(server.address) as peer:
        first = peer.commit(oid(1), b'one')
        second = peer.commit(oid(1), b'two')
        peer.begin(2, (oid(1), first, b'three'))
        if by_clients:
            [conflict] = peer.call('vote', 2)
            assert conflict == {'oid': oid(1), 'serials': (second, first), 'data': b'three'}
        else:
            with pytest.raises(Exception, match='conflict'):
                peer.call('vote', 2)
