"""What may be asked of a storage with instances, and how its errors are made plain."""

from typing import Any

import pytest
from transaction.interfaces import TransientError
from ZODB import POSException
from ZODB.POSException import ConflictError
from ZODB.POSException import POSKeyError
from ZODB.POSException import ReadConflictError
from ZODB.POSException import StorageError
from ZODB.utils import p64
from ZODB.utils import z64

from tests.server.shared import Database
from tests.server.talk import oid
from zeo.server.backing import Backing
from zeo.server.backing import Unreachable
from zeo.server.backing import lost
from zeo.server.backing import plain
from zeo.server.backing import plainly
from zeo.wire import faults


@pytest.fixture
def database() -> Database:
    return Database()


@pytest.fixture
def backing(database: Database) -> Backing:
    return Backing(database.root())


# ---- asking


def test_changes_are_those_of_the_snapshot(database: Database, backing: Backing) -> None:
    view = backing.open()
    first = database.somebody_commits(oid(1), oid(2))
    second = database.somebody_commits(oid(2))
    backing.refresh(view, z64)
    database.somebody_commits(oid(3))
    assert list(backing.changes(view, z64)) == [(first, [oid(1), oid(2)]), (second, [oid(2)])]
    assert list(backing.changes(view, first)) == [(second, [oid(2)])]
    assert list(backing.changes(view, second)) == []
    assert backing.newest(view) == second


def test_what_changed_is_told_if_the_transaction_is_known(database: Database, backing: Backing) -> None:
    first, second = database.somebody_commits(oid(1)), database.somebody_commits(oid(2), oid(3))
    view = backing.open()
    backing.refresh(view, z64)
    assert backing.changed_since(view, first, 2) == [oid(2), oid(3)]
    assert backing.changed_since(view, first, 1) is None
    assert backing.changed_since(view, second, 9) == []
    assert backing.changed_since(view, z64, 9) == [oid(1), oid(2), oid(3)]
    assert backing.changed_since(view, p64(5), 9) is None


def test_a_snapshot_older_than_what_was_announced_is_refused(database: Database, backing: Backing) -> None:
    view = backing.open()
    committed = database.somebody_commits(oid(1))
    backing.refresh(view, committed)
    database.transactions = []
    with pytest.raises(Unreachable, match='restored from a backup'):
        backing.refresh(view, committed)


def test_letting_go_never_fails(backing: Backing) -> None:
    view = backing.open()
    view.storage.release = None
    view.discard()


# ---- errors


class OperationalError(Exception):
    """Python's DB-API calls it so."""

    pgcode: str | None = None


class DatabaseError(Exception):
    pgcode: str | None = None


class DataError(DatabaseError):
    pass


class Coded(Exception):
    def __init__(self, pgcode: str) -> None:
        super().__init__('password=secret host=db.example')
        self.pgcode = pgcode


class LiveKeyError(POSKeyError):
    pass


class Stale(ReadConflictError):
    pass


class Disconnected(POSException.StorageTransactionError, TransientError):
    pass


class Inconsistent(StorageError, TransientError):
    pass


class Busy(StorageError):
    pass


LIVE = {'adapter': object()}


@pytest.mark.parametrize(('error', 'expected'), [
    (LiveKeyError(oid(1), LIVE), POSKeyError(oid(1))),
    (POSKeyError(oid(1)), POSKeyError(oid(1))),
    (Stale('from the replica at db.example', oid=oid(1), serials=(p64(2), p64(3))),
     ReadConflictError(oid=oid(1), serials=(p64(2), p64(3)))),
    (ConflictError('Stored Objects\n...', oid=oid(1), serials=(p64(2), p64(3))),
     ConflictError(oid=oid(1), serials=(p64(2), p64(3)))),
    (POSException.ReadOnlyError(LIVE), POSException.ReadOnlyError()),
    (POSException.UndoError('not found', oid(1)), POSException.UndoError('not found', oid(1))),
    (Inconsistent(LIVE), ReadConflictError()),
    (Busy('a pack is in progress\nat db.example'), StorageError('Busy: a pack is in progress')),
    (POSException.StorageTransactionError(LIVE, 1), StorageError('StorageTransactionError')),
    (Coded('40P01'), ConflictError()),
    (Coded('55P03'), ConflictError()),
    (Coded('53100'), StorageError('the database refuses: Coded 53100')),
    (RuntimeError('at db.example'), StorageError('the database refuses: RuntimeError')),
    (Coded('57P01'), Unreachable('the database cannot be reached')),
    (Disconnected(LIVE), Unreachable('the connection to the database was lost')),
    (OperationalError('at db.example'), Unreachable('the database cannot be reached')),
])
def test_errors_are_made_plain(error: Exception, expected: Exception) -> None:
    made = plain(error)
    assert type(made) is type(expected)
    name, values = faults.describe(made)
    assert 'db.example' not in repr(values) and 'object' not in repr(values)
    assert faults.describe(expected) == (name, values)


@pytest.mark.parametrize(('error', 'expected'), [
    (ConnectionError(), True), (Coded('08006'), True), (Coded('57P03'), True), (Coded('25006'), True),
    (OperationalError(), True), (DatabaseError(), True), (DataError(), False),
    (DatabaseError({'C': '23505'}), False), (DatabaseError({'C': '57P01'}), True), (Coded('23505'), False), (ValueError(), False)])
def test_what_means_that_there_is_no_connection(error: Exception, expected: bool) -> None:
    assert lost(error) is expected


def test_what_is_raised_is_made_plain_and_the_end_of_an_iteration_is_none() -> None:
    with pytest.raises(StopIteration):
        with plainly():
            raise StopIteration
    with pytest.raises(POSKeyError) as found:
        with plainly():
            raise LiveKeyError(oid(1), LIVE)
    assert type(found.value) is POSKeyError
    error: Any = POSException.Unsupported('as it is')
    with pytest.raises(POSException.Unsupported) as same:
        with plainly():
            raise error
    assert same.value is error
