"""Readers: new enough, one thread each, no more than the limit, given back or let go of."""

import pytest
from ZODB.POSException import POSKeyError
from ZODB.POSException import ReadConflictError
from ZODB.utils import maxtid
from ZODB.utils import z64

from tests.server.shared import Database
from tests.server.talk import in_thread
from tests.server.talk import oid
from zeo.server import readers as module
from zeo.server.backing import Backing
from zeo.server.backing import Unreachable
from zeo.server.backing import View
from zeo.server.readers import Readers
from zeo.server.readers import load_before


class Pool(Readers):
    def __init__(self, database: Database, most: int = 8) -> None:
        self.known = 1, z64
        self.database = database
        super().__init__(Backing(database.root()), lambda: self.known, most)

    @property
    def instances(self) -> int:
        return len(self.database.instances) - 1 - sum(each.released for each in self.database.instances)


@pytest.fixture
def database() -> Database:
    return Database()


@pytest.fixture
def pool(database: Database) -> Pool:
    return Pool(database)


def newest(view: View) -> bytes:
    tid: bytes = view.storage.lastTransaction()
    return tid


def test_a_snapshot_is_kept_until_the_generation_moves(pool: Pool, database: Database) -> None:
    assert pool.read(newest, 0) == z64
    committed = database.somebody_commits(oid(1))
    assert pool.read(newest, 0) == z64
    pool.known = 2, committed
    assert pool.read(newest, 0) == committed
    assert pool.instances == 1


def test_a_new_one_can_be_asked_for(pool: Pool, database: Database) -> None:
    pool.read(newest, 0)
    committed = database.somebody_commits(oid(1))
    assert pool.read(newest, 0, anew=True) == committed


def test_each_is_used_by_one_thread_and_there_are_no_more_than_the_limit(database: Database) -> None:
    pool = Pool(database, most=2)
    database.somebody_commits(oid(1))
    gate = database.gates['loaded']
    gate.shut()
    first = in_thread(pool.read, lambda view: view.storage.load(oid(1)), 0)
    gate.wait_until_reached()
    pool.read(newest, 0)
    assert pool.instances == 2
    inner: list[bool] = []

    def both(view: View) -> None:
        inner.append(pool._free.acquire(blocking=False))

    pool.read(both, 0)
    assert inner == [False]
    gate.open()
    first.result(30)


def test_a_missing_object_costs_no_reader(pool: Pool) -> None:
    for _ in range(3):
        with pytest.raises(POSKeyError):
            pool.read(lambda view: view.storage.load(oid(1)), 0)
    assert pool.instances == 1


def test_what_may_be_done_again_is_done_with_another_one(pool: Pool) -> None:
    tries: list[View] = []

    def job(view: View) -> str:
        tries.append(view)
        if len(tries) < 3:
            raise ReadConflictError
        return 'done'

    assert pool.read(job, 0) == 'done'
    assert len(set(tries)) == 3 and pool.instances == 1
    tries.clear()

    def never(view: View) -> None:
        tries.append(view)
        raise ReadConflictError

    with pytest.raises(ReadConflictError):
        pool.read(never, 0)
    assert len(tries) == module.AGAIN


def test_without_the_database_all_are_let_go_of_and_it_is_tried_again(pool: Pool, database: Database) -> None:
    pool.read(newest, 0)
    database.down = True
    with pytest.raises(Unreachable):
        pool.read(newest, 0)
    assert pool.instances == 0
    database.down = False
    pool.read(newest, 0)


def test_those_that_rest_take_a_new_snapshot(pool: Pool, database: Database,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    pool.read(newest, 0)
    pool.rest()
    committed = database.somebody_commits(oid(1))
    assert pool.read(newest, 0) == z64    # it has not rested for long
    monkeypatch.setattr(module, 'RESTING', -1.0)
    pool.rest()
    assert pool.read(newest, 0) == committed
    assert pool.instances == 1


def test_after_the_end_none_is_kept(pool: Pool) -> None:
    pool.read(newest, 0)
    pool.close()
    assert pool.instances == 0
    pool.read(newest, 0)
    assert pool.instances == 0


def test_what_is_current_is_read_from_the_cache_and_the_rest_from_the_database(
        pool: Pool, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    first = database.somebody_commits(oid(1), record=b'first')
    second = database.somebody_commits(oid(1), record=b'second')
    view = Backing(database.root()).open()
    view.storage.poll_invalidations()
    assert load_before(view, oid(1), second) == (b'first', first, second)
    assert load_before(view, oid(1), first) is None
    monkeypatch.setattr(type(view.storage), 'loadBefore', None)
    assert load_before(view, oid(1), maxtid) == (b'second', second, None)
