"""What a gateway answers from snapshots."""

from collections.abc import Callable
from typing import Any

import pytest
from ZODB.Connection import TransactionMetaData
from ZODB.interfaces import StorageStopIteration
from ZODB.POSException import POSKeyError

from tests.server.shared import Database
from tests.server.talk import SessionPeer
from tests.server.talk import oid
from tests.server.talk import tid
from zeo.server.reading import TOKEN
from zeo.server.reading import Transactions
from zeo.server.served import Served

Serve = Callable[..., Served]
Connect = Callable[..., SessionPeer]


@pytest.fixture
def database() -> Database:
    return Database()


@pytest.fixture
def peer(serve: Serve, connect: Connect, database: Database) -> SessionPeer:
    return connect(serve(database.root(), poll_interval=3600.0))


def test_old_revisions(peer: SessionPeer, database: Database) -> None:
    first = database.somebody_commits(oid(1), record=b'first')
    second = database.somebody_commits(oid(1), record=b'second')
    peer.call('ping')
    assert peer.call('loadSerial', oid(1), first) == b'first'
    assert peer.call('getTid', oid(1)) == second
    third = database.somebody_commits(oid(1), record=b'not announced')
    assert peer.call('loadSerial', oid(1), third) == b'not announced'
    with pytest.raises(POSKeyError) as missing:
        peer.call('loadSerial', oid(1), tid(7))
    assert missing.value.args == (oid(1),)


def test_many_revisions_are_verified_at_once(peer: SessionPeer, database: Database) -> None:
    first = database.somebody_commits(oid(1), oid(2), oid(3))
    database.somebody_commits(oid(2))
    database.commit(TransactionMetaData(), {oid(3): None})
    peer.call('ping')
    outdated = peer.call('verify', b''.join(oid(number) + first for number in (1, 2, 3, 4)))
    assert outdated == oid(2) + oid(3) + oid(4)


def test_what_a_server_has_written_for_itself_is_not_shown(peer: SessionPeer, database: Database) -> None:
    meta = TransactionMetaData('me', 'what', {TOKEN: b'secret', 'color': 'red'})
    committed = database.commit(meta, {oid(1): b'record'})
    peer.call('ping')
    [entry] = peer.call('history', oid(1), 5)
    assert entry == {'tid': committed, 'color': 'red'}
    iterator = peer.call('iterator_start', None, None)
    assert peer.call('iterator_next', iterator) == (committed, ' ', b'me', b'what', {'color': 'red'})
    records = peer.call('iterator_record_start', iterator, committed)
    assert peer.call('iterator_record_next', records) == (oid(1), committed, b'record', None)
    assert peer.call('iterator_record_next', records) is None
    assert peer.call('iterator_next', iterator) is None


def test_iterators_close_what_they_iterate_over_and_fail_plainly() -> None:
    class Failing:
        closed = False

        def __iter__(self) -> Any:
            return self

        def __next__(self) -> Any:
            raise POSKeyError(oid(1), object())

        def close(self) -> None:
            self.closed = True

    failing = Failing()
    transactions = Transactions(failing)
    with pytest.raises(POSKeyError) as missing:
        next(transactions)
    assert missing.value.args == (oid(1),)
    transactions.close()
    assert failing.closed
    Transactions(iter(())).close()


def test_records_that_end_as_zodbs_do() -> None:
    class Records:
        """As RelStorage's."""

        tid, status, user, description, extension = tid(1), ' ', b'', b'', {}

        def __iter__(self) -> Any:
            return self

        def __next__(self) -> Any:
            raise StorageStopIteration

    [transaction] = Transactions([Records()])
    assert list(transaction) == []
