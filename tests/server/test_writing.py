"""The one transaction that a gateway has in progress."""

from collections.abc import Callable
from typing import Any

import pytest
from BTrees.Length import Length
from ZODB.Connection import TransactionMetaData
from ZODB.POSException import ConflictError
from ZODB.POSException import ReadConflictError
from ZODB.POSException import StorageError
from ZODB.POSException import StorageTransactionError
from ZODB.serialize import ObjectWriter
from ZODB.utils import p64
from ZODB.utils import u64
from ZODB.utils import z64

from tests.server.shared import Database
from tests.server.shared import Instance
from tests.server.talk import SessionPeer
from tests.server.talk import oid
from zeo.server.gateway import Gateway
from zeo.server.gateway import fronted
from zeo.server.reading import TOKEN
from zeo.server.served import Served

Serve = Callable[..., Served]
Connect = Callable[..., SessionPeer]


@pytest.fixture
def database() -> Database:
    return Database()


@pytest.fixture
def served(serve: Serve, database: Database) -> Served:
    return serve(database.root(), poll_interval=3600.0)


def length(number: int) -> bytes:
    """The record of a counter, which resolves conflicts."""
    record: bytes = ObjectWriter().serialize(Length(number))
    return record


def current(database: Database, number: int) -> Any:
    return [records[oid(number)] for _, _, records in database.transactions if oid(number) in records][-1]


def test_a_conflict_with_another_server_is_raised(served: Served, connect: Connect,
                                                  database: Database) -> None:
    peer = connect(served)
    first = peer.commit(oid(1), b'first')
    second = database.somebody_commits(oid(1))
    peer.begin(1, (oid(1), first, b'mine'))
    with pytest.raises(ConflictError) as conflict:
        peer.call('vote', 1)
    assert (conflict.value.oid, conflict.value.serials) == (oid(1), (second, first))
    peer.commit(oid(1), b'next', second)    # nothing is left of it


def test_a_conflict_with_another_server_is_resolved(served: Served, connect: Connect,
                                                    database: Database) -> None:
    peer = connect(served)
    first = peer.commit(oid(1), length(1))
    database.somebody_commits(oid(1), record=length(3))
    peer.begin(1, (oid(1), first, length(5)))
    assert peer.call('vote', 1) == [oid(1)]
    peer.call('tpc_finish', 1)
    assert current(database, 1) == length(7)


def test_conflicts_are_left_to_the_client_if_it_wants_them(serve: Serve, connect: Connect,
                                                           database: Database) -> None:
    peer = connect(serve(database.root(), poll_interval=3600.0, client_conflict_resolution=True))
    first = peer.commit(oid(1), length(1))
    second = database.somebody_commits(oid(1), record=length(3))
    peer.begin(1, (oid(1), first, length(5)))
    [conflict] = peer.call('vote', 1)
    assert conflict == {'oid': oid(1), 'serials': (second, first), 'data': length(5)}


def test_also_those_that_are_found_when_the_storage_votes(
        serve: Serve, connect: Connect, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = connect(serve(database.root(), poll_interval=3600.0, client_conflict_resolution=True))
    first = peer.commit(oid(1), length(1))
    peer.begin(1, (oid(1), first, length(5)))
    vote = Instance.tpc_vote

    def somebody_is_faster(storage: Instance, transaction: Any) -> None:
        monkeypatch.setattr(Instance, 'tpc_vote', vote)
        raise ConflictError(oid=oid(1), serials=(p64(u64(first) + 1), first))

    monkeypatch.setattr(Instance, 'tpc_vote', somebody_is_faster)
    assert peer.call('vote', 1) == [
        {'oid': oid(1), 'serials': (p64(u64(first) + 1), first), 'data': length(5)}]
    assert peer.call('vote', 1) == []
    peer.call('tpc_finish', 1)


def test_what_was_read_has_to_be_current(served: Served, connect: Connect, database: Database) -> None:
    peer = connect(served)
    first = peer.commit(oid(1), b'first')
    second = database.somebody_commits(oid(1))
    peer.begin(1, (oid(2), z64, b'record'))
    peer.tell('checkCurrentSerialInTransaction', oid(1), first, 1)
    with pytest.raises(ReadConflictError) as conflict:
        peer.call('vote', 1)
    assert conflict.value.serials == (second, first)
    peer.begin(2, (oid(2), z64, b'record'))
    peer.tell('checkCurrentSerialInTransaction', oid(1), second, 2)
    peer.call('vote', 2)
    peer.call('tpc_finish', 2)


@pytest.fixture
def front(database: Database) -> Any:
    front = fronted(database.root(), 3600.0)
    front.registerDB(None)
    yield front
    front.close()


def test_a_tid_that_was_chosen_has_to_come_last(front: Gateway, database: Database) -> None:
    committed = database.somebody_commits(oid(1))
    for chosen in committed, p64(u64(committed) - 1):
        with pytest.raises(StorageError, match='not later than the last one'):
            front.tpc_begin(TransactionMetaData(), chosen)
    later, meta = p64(u64(committed) + 5), TransactionMetaData()
    front.registerDB(Told())
    front.tpc_begin(meta, later)
    front.restore(oid(1), later, b'restored', '', None, meta)
    front.tpc_vote(meta)
    assert front.tpc_finish(meta) == later
    assert front.load(oid(1)) == (b'restored', later)


class Told:
    def invalidate(self, tid: bytes, oids: Any) -> None:
        pass


def test_only_the_transaction_in_progress_can_go_on(front: Gateway) -> None:
    mine, other = TransactionMetaData(), TransactionMetaData()
    with pytest.raises(StorageTransactionError):
        front.tpc_vote(mine)
    front.tpc_begin(mine)
    with pytest.raises(StorageTransactionError):
        front.tpc_begin(other)
    with pytest.raises(StorageTransactionError):
        front.store(oid(1), z64, b'record', '', other)
    front.tpc_abort(other)
    front.store(oid(1), z64, b'record', '', mine)
    front.tpc_abort(mine)
    front.tpc_begin(other)
    front.tpc_abort(other)


def test_a_writer_that_failed_to_abort_is_let_go_of(front: Gateway, database: Database) -> None:
    meta = TransactionMetaData()
    front.tpc_begin(meta)
    writer = database.instances[-1]

    def fail(transaction: Any) -> None:
        raise RuntimeError

    writer.tpc_abort = fail  # type: ignore[method-assign]
    front.tpc_abort(meta)
    assert writer.released
    front.tpc_begin(meta)
    assert database.instances[-1] is not writer
    front.tpc_abort(meta)


def test_no_promise_is_made_that_cannot_be_kept(front: Gateway) -> None:
    meta = TransactionMetaData('', '', {})
    front.promise(meta)
    assert TOKEN not in meta.extension
    front.tpc_begin(meta)
    assert front.receipt(meta) is None
    front.tpc_abort(meta)


def test_a_transaction_sees_what_is_current_when_it_begins(front: Gateway, database: Database) -> None:
    for number in range(2):    # the second one after an abort, which leaves the snapshot
        committed = database.somebody_commits(oid(1))
        meta = TransactionMetaData()
        front.tpc_begin(meta)
        front.checkCurrentSerialInTransaction(oid(1), committed, meta)
        front.tpc_abort(meta)
