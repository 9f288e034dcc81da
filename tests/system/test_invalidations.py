"""What others commit becomes visible: in one piece, in order, at the latest after a round trip."""

import threading
from typing import Any

import pytest
import transaction
from BTrees.check import check
from BTrees.OOBTree import OOBTree
from ZODB import DB
from ZODB.POSException import ConflictError
from ZODB.tests.MinPO import MinPO
from ZODB.utils import load_current, p64, u64, z64

from tests.system.clients import Recorder, Task, hears_of, store
from tests.system.servers import until

STOCK = pytest.mark.filterwarnings('ignore::ResourceWarning')   # it may leave its cache file open


@pytest.mark.parametrize('kinds', [
    ('zeo', 'zeo'), pytest.param(('zeo', 'ZEO'), marks=STOCK), pytest.param(('ZEO', 'zeo'), marks=STOCK)])
def test_after_a_round_trip_a_client_knows_all_that_was_committed_before(
        place: Any, kinds: tuple[str, str]) -> None:
    writer, reader = map(place.client, kinds)
    for _ in range(200):
        tid = store(writer)
        reader.ping()
        assert reader.lastTransaction() == tid


def test_with_server_sync_a_transaction_sees_all_that_was_committed_before_it_began(
        place: Any) -> None:
    one, other = (DB(place.client(server_sync=True)) for _ in range(2))
    managers = [transaction.TransactionManager() for _ in range(2)]
    connections = [db.open(manager) for db, manager in zip((one, other), managers)]
    managers[0].begin()
    connections[0].root()['count'] = MinPO(0)
    managers[0].commit()
    for number in range(100):
        which = number % 2
        managers[which].begin()
        connections[which].root()['count'].value += 1
        managers[which].commit()
    managers[0].begin()
    assert connections[0].root()['count'].value == 100


def test_the_database_is_told_before_the_last_transaction_moves(place: Any) -> None:
    writer, reader = place.client(), place.client()
    told = []

    class Witness(Recorder):
        def invalidate(self, tid: bytes, oids: Any) -> None:
            told.append((tid, reader.lastTransaction(), set(oids)))

    reader.registerDB(Witness())
    oids = [writer.new_oid() for _ in range(20)]
    tids = [store(writer, oid) for oid in oids]
    hears_of(reader, tids[-1])
    assert [entry[0] for entry in told] == tids
    assert [entry[2] for entry in told] == [{oid} for oid in oids]
    assert all(last < tid for tid, last, _ in told)


def test_a_load_bound_to_the_past_gets_the_past(place: Any) -> None:
    writer, reader = place.client(), place.client()
    oid = writer.new_oid()
    old = store(writer, oid, z64, b'old')
    new = store(writer, oid, old, b'new')
    assert reader.loadBefore(oid, new) == (b'old', old, new)
    assert reader.loadBefore(oid, p64(u64(new) + 1)) == (b'new', new, None)
    newest = store(writer, oid, new, b'newest')
    hears_of(reader, newest)
    assert reader.loadBefore(oid, newest) == (b'new', new, newest)
    assert load_current(reader, oid) == (b'newest', newest)


def test_a_client_may_be_closed_while_news_pours_in(place: Any) -> None:
    writer = place.client()
    oid = writer.new_oid()
    enough = threading.Event()

    def pour() -> int:
        serial, count = z64, 0
        while not enough.is_set():
            serial = store(writer, oid, serial)
            count += 1
        return count

    task = Task(pour)
    until(lambda: writer.lastTransaction() != z64, 'the first commit')
    for _ in range(20):
        reader = place.client()
        reader.registerDB(Recorder())
        load_current(reader, oid)
        reader.close()
    enough.set()
    assert task.result() > 20


class Adder:
    """Adds keys of its own to the common tree until so many are in it; conflicts are tried again."""

    def __init__(self, db: Any, number: int, step: int, commits: int, batch: int = 1) -> None:
        self._db = db
        self._keys = iter(range(number, 10 ** 9, step))
        self._commits = commits
        self._batch = batch
        self.number = number

    def __call__(self) -> list[int]:
        manager = transaction.TransactionManager()
        connection = self._db.open(manager)
        added: list[int] = []
        for _ in range(self._commits):
            keys = [next(self._keys) for _ in range(self._batch)]
            while True:
                try:
                    manager.begin()
                    tree = connection.root()['tree']
                    for key in keys:
                        tree[key] = self.number
                    manager.commit()
                    break
                except ConflictError:
                    manager.abort()
            added += keys
        connection.close()
        return added


@pytest.mark.parametrize('storages, threads, commits, batch', [
    pytest.param(1, 2, 60, 1, id='two threads of one client'),
    pytest.param(2, 2, 60, 1, id='two clients'),
    pytest.param(2, 3, 40, 1, id='two clients, one of them with two threads'),
    pytest.param(12, 12, 10, 1, id='a dozen clients'),
    pytest.param(2, 3, 15, 50, id='large transactions'),
])
def test_concurrent_additions_to_a_tree_are_all_there_and_the_tree_is_sound(
        place: Any, storages: int, threads: int, commits: int, batch: int) -> None:
    dbs = [DB(place.client())]
    with dbs[0].transaction() as connection:
        connection.root()['tree'] = OOBTree()
    dbs += [DB(place.client()) for _ in range(storages - 1)]
    tasks = [Task(Adder(dbs[number % storages], number, threads, commits, batch))
             for number in range(threads)]
    keys = {key: number for number, task in enumerate(tasks) for key in task.result()}
    assert len(keys) == threads * commits * batch
    last = max(db.storage.lastTransaction() for db in dbs)
    for db in dbs:
        hears_of(db.storage, last)
        connection = db.open(transaction.TransactionManager())
        tree = connection.root()['tree']
        check(tree)
        tree._check()
        assert dict(tree) == keys
        connection.close()
