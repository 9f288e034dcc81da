"""What applications of a ZEO have come to rely on, and what no other module of tests is about."""

import unittest
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import transaction
import ZODB
from persistent import Persistent
from ZODB.POSException import POSKeyError, StorageError
from ZODB.tests.PackableStorage import IExternalGC_suite
from ZODB.utils import maxtid, z64

from tests.system.clients import hears_of, open_client as open_storage, store, vote
from tests.system.servers import Server, Storage, file_storage, until
from zeo.errors import ClientDisconnected

Open = Callable[..., Any]


@pytest.fixture
def databases() -> Iterator[Open]:
    """Databases of storages, closed at the end."""
    opened: list[ZODB.DB] = []

    def database(storage: Any, **options: Any) -> ZODB.DB:
        opened.append(ZODB.DB(storage, **options))
        return opened[-1]

    yield database
    for each in opened:
        each.close()


# ---- what others do is seen


def test_an_undo_is_seen_by_who_undid_and_by_others(
        start_server: Open, open_client: Open, databases: Open) -> None:
    server = start_server()
    one, other = [databases(open_client('zeo', server, server_sync=True)) for _ in range(2)]
    for number in range(3):
        with one.transaction() as connection:
            connection.root()['x'] = number
    for each in (one, other):       # it is in both caches
        with each.transaction() as connection:
            assert connection.root()['x'] == 2
    one.undo(one.undoLog(0, 1)[0]['id'])
    transaction.commit()
    for each in (one, other):
        with each.transaction() as connection:
            assert connection.root()['x'] == 1


def test_a_new_client_begins_with_the_last_transaction(start_server: Open, open_client: Open) -> None:
    server = start_server()
    tid = store(open_client('zeo', server))
    assert open_client('zeo', server).lastTransaction() == tid


def test_history_is_told_newest_first(start_server: Open, open_client: Open, databases: Open) -> None:
    database = databases(open_client('zeo', start_server()))
    for number in range(3):
        with database.transaction(f'note {number}') as connection:
            connection.root()['x'] = number
    found = database.history(z64, 2)
    assert [entry['description'] for entry in found] == ['note 2', 'note 1']
    assert len(database.history(z64, 100)) == 4


def test_prefetched_objects_are_not_loaded_again(
        start_server: Open, open_client: Open, databases: Open) -> None:
    server = start_server()
    one = databases(open_client('zeo', server))
    with one.transaction() as connection:
        connection.root().update({number: connection.root().__class__() for number in range(100)})
    storage = open_client('zeo', server, server_sync=True)
    with databases(storage).transaction() as connection:
        objects = list(connection.root().values())
        connection.prefetch(objects)
        storage.ping()      # answered after what was asked for before
        before = storage.server_status()['loads']
        assert [dict(each) for each in objects] == [{}] * 100
        assert storage.server_status()['loads'] == before


def test_a_garbage_collector_of_ones_own_may_delete_objects(
        start_server: Open, open_client: Open) -> None:
    server = start_server('zeo', {'1': file_storage(pack_gc=False)})
    one, other = [open_client('zeo', server) for _ in range(2)]
    oid = one.new_oid()
    tid = store(one, oid)
    hears_of(other, tid)
    assert other.load(oid) == (b'x', tid)
    meta = ZODB.Connection.TransactionMetaData()
    one.tpc_begin(meta)
    one.deleteObject(oid, tid, meta)
    one.tpc_vote(meta)
    deleted = one.tpc_finish(meta)
    hears_of(other, deleted)
    for each in (one, other):
        with pytest.raises(POSKeyError):
            each.load(oid)
        assert each.loadBefore(oid, deleted) == (b'x', tid, deleted)


def test_zodbs_suite_for_external_garbage_collection(tmp_path: Path) -> None:
    with Server('zeo', {'1': file_storage(pack_gc=False, blobs='blobs')}) as server:
        opened: list[Any] = []

        def create() -> Any:
            opened.append(open_storage('zeo', server, blob_dir=tmp_path / 'cache'))
            real = opened[-1].pack

            def pack(t: Any = None, referencesf: Any = None) -> None:
                real(t, referencesf)
                # What is cached would stay, which is right but not what the suite wants to see.
                opened[-1]._cache.clear(opened[-1].lastTransaction())
                for path in tmp_path.rglob('*.blob'):
                    path.unlink()

            opened[-1].pack = pack
            return opened[-1]

        result = unittest.TestResult()
        IExternalGC_suite(create).run(result)
        for storage in opened:
            storage.close()
    assert result.testsRun and result.wasSuccessful(), result.failures + result.errors


def test_references_between_databases_survive_packing(
        start_server: Open, open_client: Open, databases: Open) -> None:
    server = start_server('zeo', {'1': file_storage('one.fs'), '2': file_storage('two.fs')})
    family: dict[str, ZODB.DB] = {}
    for name in '12':
        databases(open_client('zeo', server, name), databases=family, database_name=name)
    with family['1'].transaction() as connection:
        there = connection.get_connection('2').root()
        there['object'] = there.__class__(x=1)
        connection.get_connection('2').add(there['object'])     # where it belongs
        connection.root()['there'] = there['object']
    for database in family.values():
        database.pack()
    with family['1'].transaction() as connection:
        assert connection.root()['there']['x'] == 1


class Creative(Persistent):
    """Makes another object when its state is asked for, which is when it is committed."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getstate__(self) -> Any:
        self.made = type(self)('made at commit') if self.name == 'first' else None
        return super().__getstate__()


@pytest.mark.parametrize('kind', ['zeo', 'ZEO'])
def test_objects_that_are_made_while_a_transaction_is_committed_are_in_it(
        start_server: Open, open_client: Open, databases: Open, kind: str) -> None:
    server = start_server(kind)
    one = databases(open_client('zeo', server)).open()
    one.root()['x'] = Creative('first')
    transaction.commit()
    other = databases(open_client('zeo', server)).open()
    assert other.root()['x'].made.name == 'made at commit'
    for connection in one, other:
        connection.close()


# ---- when the storage on the server fails


@pytest.mark.parametrize('kind', ['zeo', 'ZEO'])
@pytest.mark.filterwarnings('ignore::ResourceWarning')
def test_an_error_in_vote_is_told_and_the_next_one_goes_on(
        start_server: Open, open_client: Open, kind: str) -> None:
    storage = Storage("type('Failing', (FileStorage,), {'tpc_vote': lambda self, transaction: "
                      "FileStorage.tpc_vote(self, transaction) if b'fail' not in transaction.description"
                      " else 1 / 0})('Data.fs')")
    server = Server('zeo', {'1': storage})
    server.start()
    try:
        one, other = [open_client(kind, server), open_client('zeo', server)]
        meta = ZODB.Connection.TransactionMetaData(description='fail')
        one.tpc_begin(meta)
        one.store(one.new_oid(), z64, b'x', '', meta)
        with pytest.raises(StorageError, match='ZeroDivisionError'):
            one.tpc_vote(meta)
        tid = store(other)      # the lock is free
        one.tpc_abort(meta)
        assert store(one) > tid
        server.log.wait_for('division by zero')
    finally:
        server.kill()
        server.close()


def test_an_error_in_finish_disconnects_everybody_and_nothing_wrong_is_seen(
        start_server: Open, open_client: Open) -> None:
    storage = Storage("type('Failing', (FileStorage,), {'tpc_finish': lambda self, transaction, f=None: "
                      "FileStorage.tpc_finish(self, transaction, f) if b'fail' not in"
                      " transaction.description else (FileStorage.tpc_finish(self, transaction, f), 1 / 0)})"
                      "('Data.fs')")
    server = Server('zeo', {'1': storage})
    server.start()
    try:
        one, other = [open_client('zeo', server) for _ in range(2)]
        oid = one.new_oid()
        tid = store(one, oid, record=b'before')
        hears_of(other, tid)
        assert other.load(oid) == (b'before', tid)
        meta = ZODB.Connection.TransactionMetaData(description='fail')
        one.tpc_begin(meta)
        one.store(oid, tid, b'after', '', meta)
        one.tpc_vote(meta)
        try:
            committed = one.tpc_finish(meta)        # it is in the storage, and that was found out
        except ClientDisconnected:
            committed = None
        until(lambda: other.lastTransaction() > tid and one.lastTransaction() > tid, 'both catch up')
        for each in (one, other):
            data, current = each.load(oid)
            assert data == b'after' and current == each.lastTransaction()
            assert committed in (None, current)
        assert store(other, oid, current, b'later') > current
    finally:
        server.kill()
        server.close()


# ---- when the server takes its time


def test_many_loads_of_one_object_are_one_request(start_server: Open, open_client: Open) -> None:
    server = start_server()
    storage = open_client('zeo', server)
    oid = storage.new_oid()
    tid = store(open_client('zeo', server), oid, record=b'x' * 1000)
    hears_of(storage, tid)
    before = storage.server_status()['loads']
    for _ in range(10):
        assert storage.loadBefore(oid, maxtid) == (b'x' * 1000, tid, None)
    assert storage.server_status()['loads'] == before + 1


def test_a_transaction_may_be_aborted_after_its_time_was_over(start_server: Open, open_client: Open) -> None:
    server = start_server(transaction_timeout=.2)
    storage = open_client('zeo', server)
    meta = vote(storage)
    server.log.wait_for('the transaction took too long and is aborted')
    channel = storage._commit.channel
    until(lambda: channel.ended is not None, 'it is known here')
    storage.tpc_abort(meta)
    assert storage.tpc_transaction() is None
    store(storage)
