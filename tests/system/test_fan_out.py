"""Servers whose storage is a client of another server: three levels, and clients on each of them."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import transaction
import ZODB
from BTrees.Length import Length
from BTrees.OOBTree import OOBTree
from transaction.interfaces import TransientError
from ZODB.blob import Blob
from ZODB.POSException import ConflictError
from ZODB.utils import maxtid, z64

from tests.system.clients import Recorder, Task, hears_of, store
from tests.system.proxy import DOWN, UP, Proxy
from tests.system.servers import Server, Storage, file_storage, until
from tests.system.cuts import EXCHANGE, Attempts, commit
from tests.system.test_fate import in_database
from zeo.errors import ClientDisconnected

Open = Callable[..., Any]

LEVELS = ('main', 'middle', 'near')


def client_of(server: Server, **options: Any) -> dict[str, Storage]:
    """The storage of a server that is a client of another one."""
    words = ''.join(f', {name}={value!r}' for name, value in options.items())
    return {'1': Storage(f'ClientStorage({server.address!r}, wait_timeout=60, max_disconnect_poll=.5{words})')}


@pytest.fixture
def tower(start_server: Open) -> dict[str, Server]:
    """Three servers, each but the first a client of the one before."""
    main = start_server('zeo', {'1': file_storage(blobs='blobs')}, unix=True)
    middle = start_server('zeo', client_of(main, blob_dir='cache'), unix=True)
    near = start_server('zeo', client_of(middle, blob_dir='cache'), unix=True)
    return dict(zip(LEVELS, (main, middle, near)))


@pytest.fixture
def clients(tower: dict[str, Server], open_client: Open, tmp_path: Path) -> dict[str, Any]:
    """A client on each level."""
    return {level: open_client('zeo', server, blob_dir=tmp_path / level) for level, server in tower.items()}


@pytest.fixture
def databases(clients: dict[str, Any]) -> Iterator[dict[str, ZODB.DB]]:
    databases = {}
    for level, client in clients.items():
        databases[level] = ZODB.DB(client)
        for other in clients.values():
            hears_of(other, client.lastTransaction())
    yield databases
    for database in databases.values():
        database.close()


@pytest.mark.parametrize('kind', ['zeo', 'ZEO'])
def test_whoever_commits_knows_how_large_the_storage_is(tower: dict[str, Server], open_client: Open, kind: str) -> None:
    main, near = open_client('zeo', tower['main']), open_client(kind, tower['near'])
    for _ in range(2):
        before = main.getSize()
        store(near, near.new_oid(), z64, b'record')
        until(lambda: (len(near), near.getSize()) == (len(main), main.getSize()), 'the sizes are known')
        assert main.getSize() > before


def all_hear_of(clients: dict[str, Any], tid: bytes) -> None:
    for client in clients.values():
        hears_of(client, tid)


@pytest.mark.parametrize('level', LEVELS)
def test_what_is_committed_on_one_level_is_seen_on_all(clients: dict[str, Any], level: str) -> None:
    recorders = {name: Recorder() for name in clients}
    for name, client in clients.items():
        client.registerDB(recorders[name])
    oid = clients[level].new_oid()
    tid, tids = z64, []
    for number in range(10):
        record = b'record %d' % number
        tid = store(clients[level], oid, tid, record)
        tids.append(tid)
        all_hear_of(clients, tid)
        assert [client.load(oid) for client in clients.values()] == [(record, tid)] * 3
    for name in clients:
        assert recorders[name].tids == ([] if name == level else tids)
        assert recorders[name].caches == 0


def test_commits_from_all_levels_are_told_once_and_in_order(clients: dict[str, Any]) -> None:
    recorders = {name: Recorder() for name in clients}
    own: dict[str, list[bytes]] = {name: [] for name in clients}
    for name, client in clients.items():
        client.registerDB(recorders[name])

    def work(name: str) -> None:
        for _ in range(20):
            own[name].append(store(clients[name]))

    for task in [Task(work, name) for name in clients]:
        task.result()
    tids = sorted(sum(own.values(), []))
    all_hear_of(clients, tids[-1])
    for name in clients:
        assert recorders[name].tids == sorted(set(tids) - set(own[name]))
        assert own[name] == sorted(own[name])


def test_the_same_counter_is_counted_on_by_all_levels(databases: dict[str, ZODB.DB]) -> None:
    with databases['main'].transaction() as connection:
        connection.root()['count'] = connection.root().__class__(value=0)
    for database in databases.values():
        hears_of(database.storage, databases['main'].storage.lastTransaction())

    def work(database: ZODB.DB) -> int:
        manager = transaction.TransactionManager()
        connection = database.open(manager)
        last = done = 0
        try:
            while done < 15:
                manager.begin()
                count = connection.root()['count']
                assert count['value'] >= last, 'back in time'
                last = count['value']
                count['value'] += 1
                try:
                    manager.commit()
                    done, last = done + 1, last + 1
                except TransientError:
                    manager.abort()
        finally:
            manager.abort()
            connection.close()
        return done

    tasks = [Task(work, database) for database in databases.values()]
    assert sum(task.result() for task in tasks) == 45
    for database in databases.values():
        hears_of(database.storage, max(each.storage.lastTransaction() for each in databases.values()))
        with database.transaction() as connection:
            assert connection.root()['count']['value'] == 45


def test_conflicts_between_levels_are_resolved_or_raised(
        clients: dict[str, Any], databases: dict[str, ZODB.DB]) -> None:
    with databases['near'].transaction() as connection:
        root = connection.root()
        root['length'], root['tree'], root['plain'] = Length(), OOBTree(), root.__class__()
    all_hear_of(clients, clients['near'].lastTransaction())
    managers = {name: transaction.TransactionManager() for name in LEVELS}
    connections = {name: databases[name].open(managers[name]) for name in LEVELS}
    for number, name in enumerate(LEVELS):
        connections[name].root()['length'].change(10 ** number)
        connections[name].root()['tree'][name] = number
    for name in LEVELS:
        managers[name].commit()
    all_hear_of(clients, clients['near'].lastTransaction())
    for name in LEVELS:
        managers[name].begin()
        root = connections[name].root()
        assert root['length']() == 111 and dict(root['tree']) == {'main': 0, 'middle': 1, 'near': 2}
        root['plain']['x'] = name
    managers['main'].commit()
    for name in ('near', 'middle'):
        with pytest.raises(ConflictError):
            managers[name].commit()
        managers[name].abort()
    for name in LEVELS:
        connections[name].close()


@pytest.mark.parametrize('restarted', [['main'], ['middle'], ['near'], ['main', 'middle'],
                                       ['near', 'middle', 'main']])
def test_caches_are_right_after_restarts(
        tower: dict[str, Server], clients: dict[str, Any], restarted: list[str]) -> None:
    oids = [clients['main'].new_oid() for _ in range(6)]
    tids = {oid: store(clients['near'], oid, z64, b'before') for oid in oids}
    all_hear_of(clients, max(tids.values()))
    for client in clients.values():
        for oid in oids:
            assert client.load(oid) == (b'before', tids[oid])
    for level in restarted:
        tower[level].stop()
    # What changes meanwhile, as far as somebody can still be reached.
    if 'main' not in restarted:
        tids[oids[0]] = store(clients['main'], oids[0], tids[oids[0]], b'meanwhile')
    for level in sorted(restarted, key=LEVELS.index):
        tower[level].start()
    for client in clients.values():
        until(client.is_connected, 'it is connected again')
    tids[oids[1]] = store_soon(clients['near'], oids[1], tids[oids[1]], b'after, near')
    tids[oids[2]] = store_soon(clients['main'], oids[2], tids[oids[2]], b'after, main')
    all_hear_of(clients, max(tids.values()))
    records = [clients['main'].loadSerial(oid, tids[oid]) for oid in oids]
    for client in clients.values():
        assert [client.load(oid) for oid in oids] == list(zip(records, tids.values()))


def store_soon(storage: Any, oid: bytes, serial: bytes, record: bytes) -> bytes:
    """Commit as soon as the servers in between have found each other again."""
    done: list[bytes] = []

    def attempt() -> bool:
        try:
            done.append(store(storage, oid, serial, record))
        except TransientError:
            return False
        return True

    until(attempt, 'a commit gets through')
    return done[0]


def test_a_level_that_was_cut_off_passes_on_what_it_missed(
        tower: dict[str, Server], clients: dict[str, Any]) -> None:
    oids = [clients['main'].new_oid() for _ in range(200)]
    tids = {oid: store(clients['main'], oid, z64, b'before') for oid in oids[:2]}
    all_hear_of(clients, max(tids.values()))
    assert clients['near'].load(oids[0]) == (b'before', tids[oids[0]])
    tower['main'].stop()
    address, tower['main'].address = tower['main'].address, os.path.join(tower['main'].folder, 'other')
    tower['main'].start()       # the level in the middle does not find it there
    somebody = type(clients['main'])(tower['main'].address, wait_timeout=60)
    for oid in oids:            # more than anybody remembers
        tids[oid] = store(somebody, oid, tids.get(oid, z64), b'meanwhile')
    somebody.close()
    tower['main'].stop()
    tower['main'].address = address
    tower['main'].start()
    all_hear_of(clients, max(tids.values()))
    for client in clients.values():
        assert client.load(oids[0]) == (b'meanwhile', tids[oids[0]])
        assert client.load(oids[-1]) == (b'meanwhile', tids[oids[-1]])


def test_blobs_go_through_all_levels(
        tower: dict[str, Server], clients: dict[str, Any], databases: dict[str, ZODB.DB]) -> None:
    data = {name: os.urandom(300_000) for name in LEVELS}
    for name in LEVELS:
        with databases[name].transaction() as connection:
            connection.root()[name] = Blob(data[name])
        all_hear_of(clients, clients[name].lastTransaction())
    for name in LEVELS:
        with databases[name].transaction() as connection:
            for each in LEVELS:
                with connection.root()[each].open() as file:
                    assert file.read() == data[each]
    for name, folder in zip(LEVELS, ('blobs', 'cache', 'cache')):
        assert not os.listdir(os.path.join(tower[name].folder, folder, 'tmp'))


def test_undo_and_pack_go_through_all_levels(clients: dict[str, Any], databases: dict[str, ZODB.DB]) -> None:
    for number in range(3):
        with databases['near'].transaction() as connection:
            connection.root()['x'] = number
    [last, *_] = databases['near'].undoLog(0, 1)
    databases['near'].undo(last['id'])
    transaction.commit()
    all_hear_of(clients, clients['near'].lastTransaction())
    for database in databases.values():
        with database.transaction() as connection:
            assert connection.root()['x'] == 1
    databases['near'].pack()
    assert len(clients['main'].history(z64, 10)) == 1
    for client in clients.values():
        assert client.loadBefore(z64, maxtid)[1] == clients['main'].getTid(z64)


def test_object_ids_are_given_once(clients: dict[str, Any]) -> None:
    oids = [client.new_oid() for _ in range(150) for client in clients.values()]
    assert len(set(oids)) == len(oids)


def test_what_cannot_be_written_above_cannot_be_written_below(
        start_server: Open, open_client: Open, tower: dict[str, Server]) -> None:
    reading = start_server('zeo', client_of(tower['main'], read_only=True), unix=True)
    with pytest.raises(ClientDisconnected, match='ReadOnlyError'):
        open_client('zeo', reading, wait_timeout=1)
    below = open_client('zeo', reading, read_only=True)
    tid = store(open_client('zeo', tower['main']))
    hears_of(below, tid)


def test_a_commit_fails_below_while_there_is_no_server_above(
        tower: dict[str, Server], clients: dict[str, Any]) -> None:
    tid = store(clients['near'], record=b'before')
    tower['main'].kill()
    task = Task(store, clients['near'])
    tower['main'].start()
    try:
        task.result()
    except TransientError:
        pass
    later = store_soon(clients['near'], clients['main'].new_oid(), z64, b'after')
    assert later > tid
    all_hear_of(clients, later)


# ---- what became of a commit


@pytest.mark.timeout(600)
@pytest.mark.parametrize('level, direction, step', [
    ('near', UP, 60), ('near', DOWN, 60), ('main', UP, 60),
    *(pytest.param(level, direction, 1, marks=pytest.mark.soak) for level in LEVELS for direction in (UP, DOWN))])
def test_wherever_the_way_to_the_last_server_is_cut_the_outcome_is_told_truly(
        start_server: Open, open_client: Open, level: str, direction: str, step: int) -> None:
    """Cut between a server and its client after some bytes of the exchange from vote to the end."""
    with contextlib.ExitStack() as at_end:
        main = server = start_server()
        for each in LEVELS:
            address = server.address
            if each == level:
                proxy = at_end.enter_context(Proxy(address))
                address = proxy.address
            if each != LEVELS[-1]:
                server = start_server('zeo', {'1': Storage(
                    f'ClientStorage({address!r}, wait_timeout=60, min_disconnect_poll=.01, max_disconnect_poll=.05)')})
        direct = open_client('zeo', main, server_sync=True)
        client = open_client('zeo', address, wait_timeout=60, min_disconnect_poll=.01, max_disconnect_poll=.05)
        attempts = Attempts(direct)
        for cut in range(0, EXCHANGE[direction], step):
            hears_of(client, attempts.serial)
            proxy.cut_after(cut, direction)
            attempts.commit(client, cut)
            proxy.mend()
            until(client.is_connected, 'it is connected again')
            assert client.load(attempts.oid) == (attempts.record, attempts.serial)
        client.close()
    attempts.judge()


@pytest.mark.parametrize('direction', [UP, DOWN])
def test_the_outcome_is_told_truly_by_a_server_in_the_middle_that_was_restarted(
        start_server: Open, open_client: Open, direction: str) -> None:
    """Cut when the transaction is voted; the server in the middle is killed then, or after it has committed."""
    main = start_server()
    middle = start_server('zeo', client_of(main))
    direct = open_client('zeo', main, server_sync=True)
    with Proxy(middle.address) as proxy:
        client = open_client('zeo', proxy.address, wait_timeout=60)
        oid = client.new_oid()
        serial = store(client, oid)
        task = Task(commit, client, oid, serial, b'new', lambda: proxy.cut_after(0, direction))
        if direction is DOWN:
            until(lambda: in_database(direct, oid) == b'new', 'it is committed')
        else:
            until(lambda: not client.is_connected(), 'the connection is lost')
        middle.kill()
        proxy.mend()
        middle.start()
        if direction is DOWN:
            assert task.result() == direct.getTid(oid)
        else:
            with pytest.raises(ClientDisconnected, match='was not committed'):
                task.result()
            assert direct.getTid(oid) == serial
        assert client.load(oid) == direct.load(oid)
        store_soon(client, oid, client.load(oid)[1], b'later')  # nothing is locked
        client.close()
