"""What a storage's own record of its transactions tells."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ZODB.Connection import TransactionMetaData
from ZODB.FileStorage import FileStorage
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import StorageError
from ZODB.POSException import Unsupported
from ZODB.utils import z64

from tests.server.talk import PATIENCE
from tests.server.talk import GatedStorage
from tests.server.talk import SessionPeer
from tests.server.talk import in_thread
from tests.server.talk import oid
from tests.server.talk import tid
from tests.system.servers import until
from zeo.server.served import Served

Serve = Callable[..., Served]
Connect = Callable[..., SessionPeer]


def test_what_was_changed_is_told_after_a_transaction_that_there_is(serve: Serve, connect: Connect,
                                                                    file_storage: FileStorage) -> None:
    served = serve(file_storage)
    peer = connect(served)
    tids = [peer.commit(oid(number % 3), b'record') for number in range(5)]
    assert served.history.changed(tids[1], tids[3]) == [oid(2), oid(0)]
    assert served.history.changed(tids[4], tids[4]) == []
    assert served.history.changed(tid(5), tids[4]) is None
    assert served.history.changed(b'\xff' * 8, tids[4]) is None


def test_whether_there_is_a_transaction_is_known_unless_it_may_have_been_packed_away(
        serve: Serve, connect: Connect, file_storage: FileStorage) -> None:
    served = serve(file_storage)
    peer = connect(served)
    tids = [peer.commit(oid(0), b'\x80\x03N.\x80\x03N.') for _ in range(3)]
    assert all(map(served.history.has, tids))
    assert not served.history.has(tid(5)) and not served.history.has(b'\xff' * 8)
    served.pack(time.time() + 1)
    assert served.history.has(tids[2])
    with pytest.raises(StorageError, match='packed away'):
        served.history.has(tids[0])


def test_a_storage_without_iterators_has_no_history(serve: Serve) -> None:
    class Plain(MappingStorage):
        iterator = property()  # has none

    with pytest.raises(Unsupported, match='no iterator'):
        serve(Plain()).history.has(tid(1))


def test_older_transactions_are_looked_up_in_the_storage_if_they_are_not_too_old(
        serve: Serve, connect: Connect, file_storage: FileStorage) -> None:
    served = serve(file_storage, invalidation_queue_size=1, invalidation_age=3600.0)
    peer = connect(served)
    tids = [peer.commit(oid(number % 3), b'record') for number in range(5)]
    last, oids = peer.call('getInvalidations', tids[0])
    assert (last, sorted(oids)) == (tids[4], [oid(0), oid(1), oid(2)])
    assert peer.call('getInvalidations', tid(5)) is None
    assert peer.call('getInvalidations', b'\xff' * 8) == (tids[4], [])


def test_the_look_into_the_storage_ends_where_announcements_begin(
        serve: Serve, connect: Connect, file_storage: FileStorage) -> None:
    gated = GatedStorage(file_storage)
    served = serve(gated, invalidation_queue_size=1, invalidation_age=3600.0)
    peer, other = connect(served), connect(served)
    tids = [peer.commit(oid(1), b'record') for _ in range(3)]
    gated.gates['finished'].shut()
    commit = in_thread(peer.commit, oid(2), b'on disk and not yet announced')
    gated.gates['finished'].wait_until_reached()
    assert other.call('getInvalidations', tids[0]) == (tids[2], [oid(1)])
    gated.gates['finished'].open()
    committed = commit.result(PATIENCE)
    assert other.invalidations()[-1] == (committed, [oid(2)])


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')  # FileStorage leaves its file open
def test_an_iterator_is_had_though_a_transaction_is_just_being_written(
        serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the fate of a commit could not be told, or a backup not be gone on with, while others commit."""
    storage = FileStorage(str(tmp_path / 'Data.fs'))
    tids = []
    for number in range(3):
        transaction = TransactionMetaData()
        storage.tpc_begin(transaction)
        storage.store(oid(number), z64, bytes(600_000), '', transaction)
        storage.tpc_vote(transaction)
        tids.append(storage.tpc_finish(transaction))
    served, whole = serve(storage), (tmp_path / 'Data.fs').stat().st_size
    with open(tmp_path / 'Data.fs', 'ab') as file:
        file.write(b'the beginning of another transaction')
    tries: list[str] = []
    iterator = storage.iterator

    def tell_of_failure(*args: bytes) -> Any:
        try:
            return iterator(*args)
        except ValueError as error:
            tries.append(str(error))
            raise

    monkeypatch.setattr(storage, 'iterator', tell_of_failure)
    answer = in_thread(served.settle, tids[1], 1)
    until(lambda: len(tries) >= 2, 'it is tried again')
    with open(tmp_path / 'Data.fs', 'ab') as file:
        file.truncate(whole)
    assert answer.result(PATIENCE) is True


def test_an_iterator_that_cannot_be_had_is_given_up(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(MappingStorage):
        def iterator(self, start: bytes | None = None, stop: bytes | None = None) -> Any:
            raise ValueError('nobody knows where it is')

    monkeypatch.setattr('zeo.server.history.PATIENCE', .02)
    with pytest.raises(ValueError, match='nobody knows'):
        serve(Broken()).history.iterator(tid(1), None)
