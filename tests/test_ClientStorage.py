"""ZODB's storage interfaces on a scripted server, and on a real one where only that convinces."""

import multiprocessing
import os
import threading
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transaction
import ZODB
from ZODB import interfaces
from ZODB.Connection import TransactionMetaData
from ZODB.DemoStorage import DemoStorage
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import ConflictError
from ZODB.POSException import POSKeyError
from ZODB.POSException import ReadOnlyError
from ZODB.POSException import StorageTransactionError
from ZODB.tests.MinPO import MinPO
from ZODB.tests.StorageTestBase import zodb_pickle
from ZODB.POSException import Unsupported
from ZODB.utils import maxtid
from ZODB.utils import z64
from zope.interface.verify import verifyObject

from tests.client.conftest import Calls
from tests.client.conftest import calls
from tests.client.conftest import host
from tests.client.peer import INFO
from tests.client.peer import PATIENCE
from tests.client.peer import Host
from tests.client.peer import Peer
from tests.client.peer import oid
from tests.client.peer import tid
from tests.system.servers import until
from zeo.client.cache import open_cache
from zeo.client.verification import CacheIsNewer
from zeo.ClientStorage import MB
from zeo.ClientStorage import ClientStorage
from zeo.errors import ClientDisconnected
from zeo.errors import ClientStorageError
from zeo.errors import OutcomeUnknown
from zeo.wire.announcements import invalidation_notice
from zeo.wire.framing import frame
from zeo.wire.messages import reply
from zeo.wire.replies import load_reply
from zeo.wire.revisions import HEAD
from zeo.wire.revisions import MOST
from zeo.wire.revisions import prefetched_notice

__all__ = ['calls', 'host']  # fixtures

INTERFACES = tuple((each.__module__, each.__name__) for each in (
    interfaces.IStorageUndoable, interfaces.IStorageIteration, interfaces.IExternalGC))

MakeStorage = Callable[..., tuple[ClientStorage, Peer]]


@pytest.fixture
def storage(host: Host, calls: Calls) -> Iterator[MakeStorage]:
    """A function that opens a storage on a scripted server."""
    storages: list[ClientStorage] = []

    def make(last_tid: bytes = tid(5), info: Any = {}, **options: Any) -> tuple[ClientStorage, Peer]:
        options = {'wait_timeout': PATIENCE, 'min_disconnect_poll': 0.01} | options
        opening = calls.start(lambda: ClientStorage(host.address, **options))
        peer = host.accept()
        peer.welcome(last_tid, **info)
        storages.append(opening())
        return storages[-1], peer

    yield make
    for each in storages:
        each.close()


class Database:
    def __init__(self, storage: ClientStorage) -> None:
        self.storage = storage
        self.told: list[Any] = []
        storage.registerDB(self)

    def invalidate(self, tid: bytes, oids: Any) -> None:
        self.told.append((tid, list(oids)))

    def invalidateCache(self) -> None:
        self.told.append('all')

    def transform_record_data(self, data: bytes) -> bytes:
        return data

    untransform_record_data = transform_record_data


def begun(storage: ClientStorage, peer: Peer, *oids: bytes) -> TransactionMetaData:
    """A transaction with these objects stored."""
    txn = TransactionMetaData()
    storage.tpc_begin(txn)
    for each in oids:
        storage.store(each, tid(1), b'new', '', txn)
    return txn


def voted(storage: ClientStorage, peer: Peer, calls: Calls, *oids: bytes,
          answer: Any = None) -> TransactionMetaData:
    txn = begun(storage, peer, *oids)
    voting = calls.start(storage.tpc_vote, txn)
    peer.read('tpc_begin')
    for _ in oids:
        peer.read('storea')
    peer.answer(peer.read('vote'), answer or [])
    assert voting() == answer
    return txn


# ---- opening


@pytest.mark.parametrize('addr', [None, 'host:8100', ('a', 'b', ''), 0, [], ('a', 99999)])
def test_a_bad_address_is_a_clear_error(addr: Any) -> None:
    with pytest.raises(ValueError, match='not the address of a server'):
        ClientStorage(addr)


def test_without_a_server_opening_fails_after_the_agreed_time(tmp_path: Path) -> None:
    with pytest.raises(ClientDisconnected, match='nobody'):
        ClientStorage(str(tmp_path / 'nobody'), wait_timeout=0.05)


def test_one_can_begin_without_a_server_and_read_what_is_cached(tmp_path: Path) -> None:
    path = str(tmp_path / 'cache.zec')
    cache = open_cache(path, 20 * MB, '1')
    cache.store(oid(1), tid(1), None, b'cached')
    cache.set_last_tid(tid(5))
    cache.close()
    storage = ClientStorage(str(tmp_path / 'nobody'), wait=False, cache=path, wait_timeout=0.05)
    assert storage.lastTransaction() == tid(5)
    assert storage.loadBefore(oid(1), tid(6)) == (b'cached', tid(1), None)
    with pytest.raises(ClientDisconnected):
        storage.loadBefore(oid(2), tid(6))
    assert storage.getName().endswith('(disconnected)')
    storage.close()


@pytest.mark.parametrize('by_environment', [False, True])
def test_a_second_client_of_the_same_name_gets_a_temporary_cache(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, by_environment: bool) -> None:
    options: Any = {'wait': False, 'var': tmp_path, 'client': 'worker'}
    if by_environment:
        monkeypatch.setenv('ZEO_CLIENT', options.pop('client'))
    one = ClientStorage(str(tmp_path / 'nobody'), **options)
    other = ClientStorage(str(tmp_path / 'nobody'), **options)
    try:
        assert one._cache.path == str(tmp_path / 'worker@1.zec')
        assert other._cache.path is None
        assert 'another client has it open; this client uses a temporary cache' in caplog.text
    finally:
        one.close()
        other.close()


def test_a_cache_newer_than_the_server_is_refused_unless_told_to_start_over(
        tmp_path: Path, host: Host, calls: Calls) -> None:
    path = str(tmp_path / 'cache.zec')
    cache = open_cache(path, 20 * MB, '1')
    cache.store(oid(1), tid(1), None, b'cached')
    cache.set_last_tid(tid(9))
    cache.close()
    opening = calls.start(lambda: ClientStorage(
        host.address, cache=path, wait_timeout=0.3, min_disconnect_poll=60))
    host.accept().welcome(tid(5))
    with pytest.raises(CacheIsNewer):
        opening()
    opening = calls.start(lambda: ClientStorage(host.address, cache=path, start_over=True))
    host.accept().welcome(tid(5))
    storage = opening()
    assert storage.lastTransaction() == tid(5)
    storage.close()


def test_only_what_the_served_storage_provides_is_declared(storage: MakeStorage) -> None:
    plain, _ = storage()
    rich, _ = storage(info={'interfaces': INTERFACES})
    for interface in interfaces.IStorageUndoable, interfaces.IStorageIteration, interfaces.IExternalGC:
        assert interface.providedBy(rich)
        assert not interface.providedBy(plain)
        verifyObject(interface, rich)
    for interface in interfaces.IStorage, interfaces.IMultiCommitStorage, interfaces.IPrefetchStorage:
        verifyObject(interface, plain)
    assert not interfaces.IStorageRestoreable.providedBy(rich)
    assert not hasattr(rich, '_lock')


def test_what_the_server_says_about_the_storage_is_passed_on(storage: MakeStorage, host: Host) -> None:
    one, peer = storage(info={'length': 8, 'size': 99, 'supportsUndo': True}, name='mine')
    assert (one.supportsUndo(), bool(one)) == (True, True)
    assert one.getName() == 'mine (connected)'
    assert str(host.address[1]) in one.sortKey()
    assert not one.isReadOnly()


@pytest.mark.parametrize('method, key', [('__len__', 'length'), ('getSize', 'size')])
def test_the_server_is_asked_for_sizes_and_what_it_said_last_holds_without_it(
        storage: MakeStorage, calls: Calls, method: str, key: str) -> None:
    one, peer = storage(info={key: 8})
    size = getattr(one, method)
    asking = calls.start(size)
    peer.answer(peer.read('get_info'), INFO | {key: 9})
    assert asking() == 9
    asking = calls.start(size)
    peer.read('get_info')
    peer.close()
    assert asking() == size() == 9


def test_sizes_are_not_asked_for_in_the_callback_of_a_commit(
        storage: MakeStorage, calls: Calls) -> None:
    one, peer = storage(info={'length': 8, 'size': 99})
    txn = voted(one, peer, calls, oid(1))
    told: list[int] = []
    finishing = calls.start(one.tpc_finish, txn, lambda _: told.extend([len(one), one.getSize()]))
    peer.answer(peer.read('tpc_finish'), tid(6))
    assert finishing() == tid(6)
    assert told == [8, 99]


def test_read_only_and_its_fallback_exclude_each_other() -> None:
    with pytest.raises(ValueError):
        ClientStorage(1, read_only=True, read_only_fallback=True)


# ---- loading


def test_a_loaded_revision_is_cached(storage: MakeStorage, calls: Calls) -> None:
    one, peer = storage()
    loading = calls.start(one.loadBefore, oid(1), tid(6))
    peer.send(load_reply(peer.read('loadBefore').id, b'data', tid(1), None))
    assert loading() == (b'data', tid(1), None)
    assert one.loadBefore(oid(1), tid(6)) == (b'data', tid(1), None)
    assert one.load(oid(1)) == (b'data', tid(1))


def test_a_revision_that_is_invalidated_behind_its_reply_is_not_kept_as_current(
        storage: MakeStorage, calls: Calls) -> None:
    one, peer = storage()
    database = Database(one)
    loading = calls.start(one.loadBefore, oid(1), tid(6))
    message = peer.read('loadBefore')
    peer.send(load_reply(message.id, b'old', tid(1), None), invalidation_notice(tid(6), [oid(1)]))
    assert loading() == (b'old', tid(1), None)
    until(lambda: one.lastTransaction() == tid(6), 'the invalidation was processed')
    assert database.told == [(tid(6), [oid(1)])]
    again = calls.start(one.loadBefore, oid(1), tid(7))
    peer.send(load_reply(peer.read('loadBefore').id, b'new', tid(6), None))
    assert again() == (b'new', tid(6), None)


@pytest.mark.parametrize('outcome', [tid(9), False])
def test_a_server_that_chooses_the_tid_late_tells_it_when_it_is_asked(
        storage: MakeStorage, host: Host, calls: Calls, outcome: Any) -> None:
    one, peer = storage(info={'zeo': ('settle',)})
    txn = begun(one, peer, oid(1))
    voting = calls.start(one.tpc_vote, txn)
    peer.read('tpc_begin')
    peer.read('storea')
    peer.answer(peer.read('vote'), ([], b'a receipt'))
    voting()
    finishing = calls.start(one.tpc_finish, txn)
    peer.read('tpc_finish')
    peer.close()
    peer = host.accept()
    peer.welcome(tid(5), zeo=('settle',))
    question = peer.read('settle')
    assert question.args[0] == b'a receipt'
    if outcome:
        peer.send(invalidation_notice(tid(9), [oid(1)]))
    peer.answer(question, outcome)
    if outcome:
        assert finishing() == one.lastTransaction() == tid(9)
    else:
        with pytest.raises(ClientDisconnected, match='not committed'):
            finishing()


def test_what_the_database_has_not_heard_of_is_not_served_from_the_cache(
        storage: MakeStorage, calls: Calls) -> None:
    """A commit is in the cache while its callback runs; its load returns when `lastTransaction` shows it."""
    one, peer = storage()
    txn = voted(one, peer, calls, oid(1))
    inside, go_on = threading.Event(), threading.Event()

    def callback(tid: bytes) -> None:
        inside.set()
        assert go_on.wait(PATIENCE)

    finishing = calls.start(one.tpc_finish, txn, callback)
    peer.answer(peer.read('tpc_finish'), tid(6))
    assert inside.wait(PATIENCE)
    assert one.lastTransaction() == tid(5)
    loading = calls.start(lambda: (one.load(oid(1)), one.lastTransaction()))
    message = peer.read('loadBefore')
    assert message.args == (oid(1), maxtid)
    peer.send(load_reply(message.id, b'new', tid(6), None))
    go_on.set()
    assert finishing() == tid(6)
    assert loading() == ((b'new', tid(6)), tid(6))


def test_a_load_that_meets_the_end_of_a_connection_goes_on_with_the_next(
        storage: MakeStorage, host: Host, calls: Calls) -> None:
    one, peer = storage()
    loading = calls.start(one.loadBefore, oid(1), tid(6))
    peer.read('loadBefore')
    peer.close()
    peer = host.accept()
    peer.welcome(tid(5))
    peer.send(load_reply(peer.read('loadBefore').id, b'data', tid(1), None))
    assert loading() == (b'data', tid(1), None)


def test_what_does_not_exist_is_an_error(storage: MakeStorage, calls: Calls) -> None:
    one, peer = storage()
    loading = calls.start(one.load, oid(1))
    peer.answer(peer.read('loadBefore'), None)
    with pytest.raises(POSKeyError):
        loading()
    loading = calls.start(one.loadBefore, oid(1), tid(6))
    peer.refuse(peer.read('loadBefore'), POSKeyError(oid(1)))
    with pytest.raises(POSKeyError):
        loading()


@pytest.mark.parametrize('bad', [b'', b'1234567', b'123456789', 'x' * 8, None, 1])
def test_ids_that_are_none_go_nowhere(storage: MakeStorage, bad: Any) -> None:
    one, peer = storage()
    with pytest.raises((ValueError, TypeError)):
        one.loadBefore(bad, tid(6))
    txn = begun(one, peer)
    with pytest.raises(ValueError):
        one.store(bad, z64, b'', '', txn)
    with pytest.raises(ValueError):
        one.deleteObject(oid(1), bad or b'-', txn)


def test_prefetched_objects_are_loaded_in_the_background(
        storage: MakeStorage, calls: Calls) -> None:
    one, peer = storage()
    one.prefetch(iter([oid(1), oid(2), oid(1)]), tid(6))
    for _ in range(2):
        message = peer.read('loadBefore')
        peer.send(load_reply(message.id, message.args[0], tid(1), None))
    until(lambda: len(one._cache) == 2, 'both are cached')
    one.prefetch([oid(1), oid(2)], tid(6))  # asks for nothing
    pinging = calls.start(one.ping)
    peer.answer(peer.read('ping'), None)
    pinging()


def test_prefetched_objects_are_asked_for_together_if_the_server_can_do_that(
        storage: MakeStorage, calls: Calls) -> None:
    one, peer = storage(info={'zeo': ('prefetch',)})
    one.prefetch(map(oid, range(1, MOST + 3)), tid(6))
    assert peer.read('prefetch').args == (b''.join(map(oid, range(1, MOST + 1))), tid(6))
    assert peer.read('prefetch').args == (oid(MOST + 1) + oid(MOST + 2), tid(6))
    peer.send(prefetched_notice(tid(6), [
        HEAD.pack(oid(1), tid(1), z64, 1), HEAD.pack(oid(2), tid(1), tid(2), 1), HEAD.pack(oid(3), z64, z64, 0)],
        [b'1', b'2']), invalidation_notice(tid(6), [oid(1)]))
    until(lambda: one.lastTransaction() == tid(6), 'all is read')
    assert sorted(one._cache.contents()) == [(oid(1), tid(1), tid(6)), (oid(2), tid(1), tid(2))]
    one.prefetch([oid(1), oid(MOST)], tid(6))  # the one is cached, the other one on its way
    loading = calls.start(one.loadBefore, oid(3), tid(6))  # nothing was told of it
    peer.answer(peer.read('loadBefore'), None)
    assert loading() is None


def test_prefetching_without_a_connection_does_nothing(tmp_path: Path) -> None:
    one = ClientStorage(str(tmp_path / 'nobody'), wait=False)
    one.prefetch([oid(1)], tid(6))
    one.close()


# ---- committing


def test_a_commit_goes_out_at_vote_and_is_cached_at_finish(storage: MakeStorage, calls: Calls) -> None:
    one, peer = storage()
    txn = TransactionMetaData('user', 'note', {'key': 1})
    one.tpc_begin(txn)
    one.store(oid(1), tid(1), b'one', '', txn)
    one.store(oid(2), None, b'two', '', txn)
    one.checkCurrentSerialInTransaction(oid(3), tid(1), txn)
    one.deleteObject(oid(4), tid(1), txn)
    assert one.tpc_transaction() is txn
    voting = calls.start(one.tpc_vote, txn)
    number, *described = peer.read('tpc_begin').args
    assert described == [b'user', b'note', {'key': 1}, None, ' ']
    assert peer.read('storea').args == (oid(1), tid(1), b'one', number)
    assert peer.read('storea').args == (oid(2), z64, b'two', number)
    assert peer.read('checkCurrentSerialInTransaction').args == (oid(3), tid(1), number)
    assert peer.read('deleteObject').args == (oid(4), tid(1), number)
    message = peer.read('vote')
    assert message.args == (number,)
    peer.answer(message, None)
    assert voting() is None
    told: list[Any] = []
    finishing = calls.start(one.tpc_finish, txn, lambda tid: told.append((tid, one.lastTransaction())))
    peer.answer(peer.read('tpc_finish'), tid(6))
    assert finishing() == tid(6)
    assert told == [(tid(6), tid(5))]
    assert one.lastTransaction() == tid(6)
    assert one.loadBefore(oid(1), tid(7)) == (b'one', tid(6), None)
    assert one.loadBefore(oid(2), tid(7)) == (b'two', tid(6), None)
    assert one.tpc_transaction() is None


def test_commits_and_invalidations_take_effect_in_the_order_of_the_wire(
        storage: MakeStorage, calls: Calls) -> None:
    one, peer = storage()
    database = Database(one)
    txn = voted(one, peer, calls, oid(1))
    finishing = calls.start(one.tpc_finish, txn, lambda tid: database.told.append(('mine', tid)))
    message = peer.read('tpc_finish')
    peer.send(invalidation_notice(tid(6), [oid(1)]), reply(message.id, tid(7)),
              invalidation_notice(tid(8), [oid(1)]))
    assert finishing() == tid(7)
    until(lambda: one.lastTransaction() == tid(8), 'the last was processed')
    assert database.told == [(tid(6), [oid(1)]), ('mine', tid(7)), (tid(8), [oid(1)])]
    assert one.loadBefore(oid(1), tid(8)) == (b'new', tid(7), tid(8))


def test_what_the_server_resolved_is_reported_and_not_cached(
        storage: MakeStorage, calls: Calls) -> None:
    one, peer = storage()
    txn = voted(one, peer, calls, oid(1), answer=[oid(1)])
    finishing = calls.start(one.tpc_finish, txn)
    peer.answer(peer.read('tpc_finish'), tid(6))
    finishing()
    assert one._cache.load(oid(1)) is None


def test_undone_objects_are_ended_in_the_cache(storage: MakeStorage, calls: Calls) -> None:
    one, peer = storage()
    one._cache.store(oid(1), tid(1), None, b'undone')
    txn = begun(one, peer)
    one.undo(b'undo id', txn)
    voting = calls.start(one.tpc_vote, txn)
    peer.read('tpc_begin')
    assert peer.read('undoa').args[0] == b'undo id'
    peer.answer(peer.read('vote'), [oid(1)])
    assert voting() == [oid(1)]
    finishing = calls.start(one.tpc_finish, txn)
    peer.answer(peer.read('tpc_finish'), tid(6))
    finishing()
    assert one.loadBefore(oid(1), tid(6)) == (b'undone', tid(1), tid(6))
    assert one._cache.load(oid(1)) is None


def test_a_conflict_drops_what_is_cached_and_the_transaction_can_be_aborted(
        storage: MakeStorage, calls: Calls) -> None:
    one, peer = storage()
    one._cache.store(oid(1), tid(1), None, b'outdated')
    txn = begun(one, peer, oid(1))
    voting = calls.start(one.tpc_vote, txn)
    peer.read('tpc_begin')
    peer.read('storea')
    peer.refuse(peer.read('vote'), ConflictError(oid=oid(1), serials=(tid(5), tid(1))))
    with pytest.raises(ConflictError):
        voting()
    assert one._cache.load(oid(1)) is None
    aborting = calls.start(one.tpc_abort, txn)
    peer.answer(peer.read('tpc_abort'), None)
    aborting()
    assert one.tpc_transaction() is None


def conflict(number: int) -> dict[str, Any]:
    return {'oid': oid(1), 'serials': (tid(number), tid(1)), 'data': zodb_pickle(MinPO(1))}


def test_conflicts_are_resolved_here_if_the_server_asks(
        storage: MakeStorage, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    one, peer = storage()
    monkeypatch.setattr(one, 'tryToResolveConflict',
                        lambda oid, committed, read, data: b'resolved' + committed[-1:])
    txn = begun(one, peer, oid(1), oid(2))
    voting = calls.start(one.tpc_vote, txn)
    for _ in range(3):
        peer.read()
    peer.answer(peer.read('vote'), [conflict(3)])
    assert peer.read('storea').args[:3] == (oid(1), tid(3), b'resolved\3')
    peer.answer(peer.read('vote'), [conflict(4)])
    assert peer.read('storea').args[:3] == (oid(1), tid(4), b'resolved\4')
    peer.answer(peer.read('vote'), [])
    assert voting() == [oid(1)]
    finishing = calls.start(one.tpc_finish, txn)
    peer.answer(peer.read('tpc_finish'), tid(6))
    finishing()
    assert one.loadBefore(oid(1), tid(7)) == (b'resolved\4', tid(6), None)


def test_resolving_conflicts_is_given_up_after_nine_rounds(
        storage: MakeStorage, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    one, peer = storage()
    monkeypatch.setattr(one, 'tryToResolveConflict', lambda oid, committed, read, data: b'resolved')
    txn = begun(one, peer, oid(1))
    voting = calls.start(one.tpc_vote, txn)
    for _ in range(9):
        while (message := peer.read()).name != 'vote':
            pass
        peer.answer(message, [conflict(3)])
    with pytest.raises(ConflictError):
        voting()
    one._supervisor.close()


@pytest.mark.parametrize('bad', ['text', None, bytearray(b'record'), 5])
def test_what_is_no_record_is_refused_and_the_transaction_can_go_on(
        storage: MakeStorage, calls: Calls, bad: Any) -> None:
    one, peer = storage()
    txn = TransactionMetaData()
    one.tpc_begin(txn)
    for store in (lambda: one.store(oid(1), z64, bad, '', txn),
                  lambda: one.restore(oid(1), tid(3), bad or 5, '', None, txn),
                  lambda: one.storeBlob(oid(1), z64, bad, 'no file', '', txn),
                  lambda: one.restoreBlob(oid(1), tid(3), bad, 'no file', None, txn)):
        with pytest.raises(TypeError, match='a record is bytes'):
            store()
    one.store(oid(1), z64, b'record', '', txn)
    voting = calls.start(one.tpc_vote, txn)
    assert peer.read('tpc_begin').name and peer.read('storea').args[2] == b'record'
    peer.answer(peer.read('vote'), [])
    voting()
    one._supervisor.close()
    one.tpc_abort(txn)


def test_transactions_must_begin_once_and_before_anything_else(
        storage: MakeStorage, calls: Calls) -> None:
    one, peer = storage()
    txn, other = TransactionMetaData(), TransactionMetaData()
    for use in (lambda: one.store(oid(1), z64, b'', '', txn), lambda: one.tpc_vote(txn),
                lambda: one.tpc_finish(txn), lambda: one.undo(b'', txn)):
        with pytest.raises(StorageTransactionError):
            use()
    one.tpc_abort(txn)  # does nothing
    one.tpc_begin(txn)
    with pytest.raises(StorageTransactionError):
        one.tpc_begin(txn)
    with pytest.raises(StorageTransactionError):
        one.store(oid(1), z64, b'', '', other)
    one.tpc_abort(other)
    assert one.tpc_transaction() is txn


def test_a_second_transaction_waits_for_the_first(storage: MakeStorage, calls: Calls) -> None:
    one, peer = storage()
    first, second = TransactionMetaData(), TransactionMetaData()
    one.tpc_begin(first)
    beginning = calls.start(one.tpc_begin, second)
    aborting = calls.start(one.tpc_abort, first)
    peer.read('tpc_begin')
    message = peer.read('tpc_abort')
    assert one.tpc_transaction() is first
    peer.answer(message, None)
    aborting()
    beginning()
    assert one.tpc_transaction() is second


def test_a_read_only_storage_writes_nothing(storage: MakeStorage) -> None:
    one, _ = storage(read_only=True)
    assert one.isReadOnly()
    txn = TransactionMetaData()
    for write in (one.new_oid, lambda: one.tpc_begin(txn), lambda: one.undo(b'', txn),
                  lambda: one.store(oid(1), z64, b'', '', txn)):
        with pytest.raises(ReadOnlyError):
            write()


def test_a_read_only_storage_needs_no_server_to_refuse(tmp_path: Path) -> None:
    with closing(ClientStorage(str(tmp_path / 'nobody'), wait=False, read_only=True, wait_timeout=0.05)) as storage:
        with pytest.raises(ReadOnlyError):
            storage.tpc_begin(TransactionMetaData())


@pytest.mark.parametrize('chosen, extension, error', [
    (b'short', {}, ValueError), (None, {'a': lambda: 0}, Exception)])
def test_a_transaction_that_cannot_begin_costs_nothing_else(
        storage: MakeStorage, calls: Calls, chosen: bytes | None, extension: Any, error: type[Exception]) -> None:
    one, peer = storage()
    with pytest.raises(error):
        one.tpc_begin(TransactionMetaData(extension=extension), chosen)
    assert one.tpc_transaction() is None
    voted(one, peer, calls)


def test_who_is_interrupted_before_the_server_knows_keeps_the_connection(
        storage: MakeStorage, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    one, peer = storage()
    with monkeypatch.context() as patch:
        patch.setattr('zeo.client.commit.Commit.begin', interrupted)
        with pytest.raises(KeyboardInterrupt):
            one.tpc_begin(TransactionMetaData())
    voted(one, peer, calls)


def test_who_is_interrupted_in_an_abort_has_given_up_the_transaction(
        storage: MakeStorage, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    one, peer = storage()
    txn = voted(one, peer, calls, oid(1))
    commit = one._commit
    assert commit is not None
    with monkeypatch.context() as patch:
        patch.setattr('zeo.client.channel.Channel.call', interrupted)
        with pytest.raises(KeyboardInterrupt):
            one.tpc_abort(txn)
    assert one.tpc_transaction() is None and not one._commit_lock.locked()
    with pytest.raises(ValueError, match='closed'):
        commit.updates.store(oid(1), b'late')


def test_who_does_not_await_the_end_of_a_commit_ends_the_connection(
        storage: MakeStorage, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **options: object) -> None:
        raise KeyboardInterrupt

    one, peer = storage()
    txn = voted(one, peer, calls, oid(1))
    channel = one._supervisor.wait().channel
    with monkeypatch.context() as patch:
        patch.setattr('zeo.client.channel.Channel.ask', interrupted)
        with pytest.raises(KeyboardInterrupt):
            one.tpc_finish(txn)
    assert channel.ended == 'the end of a commit was not awaited'
    assert one.tpc_transaction() is None and not one._commit_lock.locked()


def test_a_commit_whose_answer_is_refused_is_of_unknown_outcome(storage: MakeStorage, calls: Calls) -> None:
    one, peer = storage()
    txn = voted(one, peer, calls, oid(1))
    finishing = calls.start(one.tpc_finish, txn)
    good, = reply(peer.read('tpc_finish').id, 5)
    peer.send(frame(good[4:].replace(b'K\x05', b'cdatetime\ndatetime\n')))
    with pytest.raises(OutcomeUnknown, match='datetime'):
        finishing()


@pytest.mark.parametrize('change', [
    lambda one, txn: one.restore(oid(1), tid(4), b'of another storage', '', None, txn),
    lambda one, txn: one.deleteObject(oid(1), tid(1), txn)])
def test_what_is_restored_or_deleted_ends_in_the_cache(
        storage: MakeStorage, calls: Calls, change: Callable[[ClientStorage, Any], object]) -> None:
    one, peer = storage()
    one._cache.store(oid(1), tid(1), None, b'old')
    txn = begun(one, peer)
    change(one, txn)
    voting = calls.start(one.tpc_vote, txn)
    while (message := peer.read()).name != 'vote':
        pass
    peer.answer(message, [])
    voting()
    finishing = calls.start(one.tpc_finish, txn)
    peer.answer(peer.read('tpc_finish'), tid(6))
    finishing()
    assert one._cache.load(oid(1)) is None
    assert one._cache.loadBefore(oid(1), tid(6)) == (b'old', tid(1), tid(6))


def test_an_abort_whose_answer_is_refused_is_an_abort(storage: MakeStorage, calls: Calls) -> None:
    one, peer = storage()
    txn = voted(one, peer, calls, oid(1))
    aborting = calls.start(one.tpc_abort, txn)
    message = peer.read('tpc_abort')
    good, = reply(message.id, 5)
    peer.send(frame(good[4:].replace(b'K\x05', b'cdatetime\ndatetime\n')))
    aborting()
    assert one.tpc_transaction() is None


def test_an_abort_after_the_end_of_the_connection_is_an_abort(storage: MakeStorage, calls: Calls) -> None:
    one, peer = storage()
    txn = voted(one, peer, calls, oid(1))
    channel = one._supervisor.wait().channel
    peer.close()
    until(lambda: channel.ended is not None, 'the connection is lost')
    one._dropped_iterators.add(lambda: channel, 1)
    one.tpc_abort(txn)
    assert one.tpc_transaction() is None and not one._commit_lock.locked()


def test_a_conflict_about_no_object_is_a_conflict(storage: MakeStorage, calls: Calls) -> None:
    one, peer = storage()
    txn = begun(one, peer, oid(1))
    voting = calls.start(one.tpc_vote, txn)
    peer.read('tpc_begin')
    peer.read('storea')
    peer.refuse(peer.read('vote'), ConflictError('of some kind'))
    with pytest.raises(ConflictError):
        voting()


def test_two_clients_call_their_transactions_otherwise(tmp_path: Path) -> None:
    numbers = set()
    for _ in range(2):
        with closing(ClientStorage(str(tmp_path / 'nobody'), wait=False)) as storage:
            numbers.add(next(storage._transaction_ids))
    assert len(numbers) == 2


def test_who_cannot_be_opened_leaves_the_cache_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object, **options: object) -> None:
        raise MemoryError

    path = str(tmp_path / 'cache.zec')
    with monkeypatch.context() as patch:
        patch.setattr('zeo.ClientStorage.Supervisor', failing)
        with pytest.raises(MemoryError) as caught:
            ClientStorage(str(tmp_path / 'nobody'), wait=False, cache=path)
    open_cache(path, MB, '1', strict=True).close()
    del caught


def test_what_came_from_another_server_is_not_served(
        storage: MakeStorage, calls: Calls, tmp_path: Path) -> None:
    path = str(tmp_path / 'cache.zec')
    one, peer = storage(cache=path)
    loading = calls.start(one.loadBefore, oid(1), tid(6))
    message = peer.read('loadBefore')
    peer.send(load_reply(message.id, b'record', tid(1), None))
    loading()
    one.close()
    with closing(ClientStorage(str(tmp_path / 'nobody'), wait=False, cache=path)) as other:
        assert other.lastTransaction() == z64 and len(other._cache) == 0


def test_no_transaction_begins_if_the_connection_it_waited_for_is_read_only(
        storage: MakeStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    one, _ = storage()
    with monkeypatch.context() as patch:
        patch.setattr(one, '_supervisor', SimpleNamespace(wait=lambda: SimpleNamespace(read_only=True)))
        for _ in range(2):  # the commit lock is free again
            with pytest.raises(ReadOnlyError):
                one.tpc_begin(TransactionMetaData())


def test_object_ids_are_fetched_by_the_hundred_and_go_with_their_connection(
        storage: MakeStorage, host: Host, calls: Calls) -> None:
    one, peer = storage()
    getting = calls.start(lambda: [one.new_oid() for _ in range(3)])
    peer.answer(peer.read('new_oids'), [oid(n) for n in range(1, 101)])
    assert getting() == [oid(1), oid(2), oid(3)]
    peer.close()
    peer = host.accept()
    peer.welcome(tid(5))
    one._supervisor.wait()
    getting = calls.start(one.new_oid)
    peer.answer(peer.read('new_oids'), [oid(200)])
    assert getting() == oid(200)


def test_many_threads_get_different_object_ids(storage: MakeStorage, calls: Calls) -> None:
    one, peer = storage()
    getting = [calls.start(lambda: [one.new_oid() for _ in range(50)]) for _ in range(8)]
    given = 0
    results: list[bytes] = []

    def serve() -> None:
        nonlocal given
        while True:
            message = peer.read()
            if message.name == 'ping':
                return peer.answer(message, None)
            peer.answer(message, [oid(given + n) for n in range(100)])
            given += 100

    serving = calls.start(serve)
    for each in getting:
        results += each()
    calls.start(one.ping)()
    serving()
    assert len(set(results)) == 400


# ---- losing the connection


def lose(one: ClientStorage, peer: Peer, host: Host, last_tid: bytes = tid(5)) -> Peer:
    """Lose the connection, and have another."""
    channel = one._supervisor.wait().channel
    peer.close()
    until(lambda: channel.ended, 'the loss is noticed')
    peer = host.accept()
    peer.welcome(last_tid)
    return peer


def test_a_transaction_does_not_survive_its_connection(
        storage: MakeStorage, host: Host, calls: Calls) -> None:
    one, peer = storage()
    txn = begun(one, peer, oid(1))
    peer = lose(one, peer, host)
    one._supervisor.wait()
    for use in (lambda: one.store(oid(1), z64, b'', '', txn), lambda: one.tpc_vote(txn),
                lambda: one.tpc_finish(txn), lambda: one.undo(b'', txn)):
        with pytest.raises(ClientDisconnected):
            use()
    one.tpc_abort(txn)
    assert one.tpc_transaction() is None
    one.tpc_begin(TransactionMetaData())


@pytest.mark.parametrize('phase', ['vote', 'tpc_abort', 'pack', 'undoLog', 'new_oids', 'getTid'])
def test_every_call_ends_when_the_connection_does(
        storage: MakeStorage, calls: Calls, phase: str) -> None:
    one, peer = storage()
    txn = begun(one, peer, oid(1))
    call = {'vote': lambda: one.tpc_vote(txn), 'tpc_abort': lambda: one.tpc_abort(txn),
            'pack': one.pack, 'undoLog': one.undoLog, 'new_oids': one.new_oid,
            'getTid': lambda: one.getTid(oid(1))}[phase]
    calling = calls.start(call)
    while peer.read().name != phase:
        pass
    peer.close()
    if phase == 'tpc_abort':
        calling()  # then the server aborts by itself
        assert one.tpc_transaction() is None
    else:
        with pytest.raises(ClientDisconnected):
            calling()


def test_a_commit_that_is_cut_off_while_finishing_is_of_unknown_outcome(
        storage: MakeStorage, host: Host, calls: Calls) -> None:
    one, peer = storage()
    one._cache.store(oid(1), tid(1), None, b'old')
    txn = voted(one, peer, calls, oid(1))
    finishing = calls.start(one.tpc_finish, txn, lambda tid: pytest.fail('called back'))
    peer.read('tpc_finish')
    peer.close()
    with pytest.raises(OutcomeUnknown):
        finishing()
    assert one._cache.load(oid(1)) == (b'old', tid(1))
    peer = host.accept()  # it was committed
    peer.welcome(tid(6))
    peer.answer(peer.read('getInvalidations'), (tid(6), [oid(1)]))
    one._supervisor.wait()
    assert one._cache.load(oid(1)) is None
    one.tpc_begin(TransactionMetaData())


def test_a_server_whose_storage_this_is_can_have_its_transactions_settled(
        storage: MakeStorage, host: Host, calls: Calls) -> None:
    one, peer = storage(info={'zeo': ('settle',)})
    assert one.can_settle
    txn = TransactionMetaData()
    one.tpc_begin(txn, id=77)
    voting = calls.start(one.tpc_vote, txn)
    assert peer.read('tpc_begin').args[0] == 77
    peer.answer(message := peer.read('vote'), ([], tid(6)))
    assert message.args == (77, True)
    voting()
    assert one.voted_tid(txn) == tid(6)
    settling = calls.start(one.settle, tid(4), 66)
    peer.answer(message := peer.read('settle'), True)
    assert message.args == (tid(4), 66) and settling() is True
    peer.close()
    until(lambda: not one.can_settle, 'the connection is lost')
    settling = calls.start(one.settle, tid(4), 66)  # waits for a connection
    peer = host.accept()
    peer.welcome(tid(6), zeo=())
    peer.answer(peer.read('getInvalidations'), (tid(6), []))
    with pytest.raises(Unsupported, match='cannot be asked'):
        settling()
    assert not one.can_settle


def test_a_callback_that_fails_ends_the_connection_and_everything_is_verified(
        storage: MakeStorage, host: Host, calls: Calls) -> None:
    one, peer = storage()
    txn = voted(one, peer, calls, oid(1))
    finishing = calls.start(one.tpc_finish, txn, lambda tid: 1 // 0)
    peer.answer(peer.read('tpc_finish'), tid(6))
    with pytest.raises(ZeroDivisionError):
        finishing()
    assert one.lastTransaction() == tid(5)
    peer = host.accept()
    peer.welcome(tid(6))
    assert peer.read('getInvalidations').args == (tid(5),)


def test_a_callback_may_not_call_the_server(storage: MakeStorage, calls: Calls) -> None:
    one, peer = storage()
    txn = voted(one, peer, calls, oid(1))
    refused: list[BaseException] = []

    def callback(tid: bytes) -> None:
        try:
            one.ping()
        except ClientStorageError as error:
            refused.append(error)

    finishing = calls.start(one.tpc_finish, txn, callback)
    peer.answer(peer.read('tpc_finish'), tid(6))
    assert finishing() == tid(6)
    assert refused


def test_begin_waits_for_a_connection_and_gives_back_the_commit_lock_if_there_is_none(
        storage: MakeStorage, host: Host) -> None:
    one, peer = storage(wait_timeout=0.05)
    channel = one._supervisor.wait().channel
    host.listener.close()
    peer.close()
    until(lambda: channel.ended, 'the loss is noticed')
    for _ in range(2):
        with pytest.raises(ClientDisconnected):
            one.tpc_begin(TransactionMetaData())


def test_closing_ends_everything_and_may_be_repeated(storage: MakeStorage, calls: Calls) -> None:
    before = set(threading.enumerate())
    one, peer = storage()
    loading = calls.start(one.loadBefore, oid(1), tid(6))
    peer.read('loadBefore')
    one.close()
    one.close()
    with pytest.raises(ClientDisconnected):
        loading()
    with pytest.raises(ClientDisconnected):
        one.ping()
    assert not [each for each in set(threading.enumerate()) - before if each.name.startswith('zeo client')]


# ---- small things


def test_with_server_sync_each_transaction_begins_with_a_round_trip(
        storage: MakeStorage, calls: Calls) -> None:
    one, peer = storage(server_sync=True)
    syncing = calls.start(one.sync)
    message = peer.read('ping')
    peer.send(invalidation_notice(tid(6), [oid(1)]), reply(message.id, None))
    syncing()
    assert one.lastTransaction() == tid(6)
    two, _ = storage()
    two.sync()  # asks nobody


def test_the_undo_log_can_be_filtered_here(storage: MakeStorage, calls: Calls) -> None:
    one, peer = storage()
    log = [{'id': b'%d' % n, 'even': not n % 2} for n in range(250)]
    reading = calls.start(lambda: one.undoLog(100, 110, lambda entry: entry['even']))

    def serve() -> None:
        for _ in range(3):
            message = peer.read('undoLog')
            peer.answer(message, log[slice(*message.args)])

    serving = calls.start(serve)
    assert reading() == log[200:220:2]
    serving()


def test_packing_goes_so_many_days_back(storage: MakeStorage, calls: Calls) -> None:
    one, peer = storage()
    packing = calls.start(lambda: one.pack(1_000_000, None, wait=False, days=2))
    message = peer.read('pack')
    assert message.args == (1_000_000 - 2 * 86400, False)
    peer.answer(message, None)
    packing()


# ---- with a real server


@pytest.fixture
def address() -> Iterator[Any]:
    """Of a server in this process, with a database in memory."""
    from zeo.StorageServer import StorageServer
    server = StorageServer({'1': MappingStorage()}, [('127.0.0.1', 0)])
    server.start()
    yield server.addresses[0]
    server.close()


def test_a_database_over_the_network(address: Any) -> None:
    with closing(ZODB.DB(ClientStorage(address))) as db, \
            closing(ZODB.DB(ClientStorage(address, server_sync=True))) as other:
        with db.transaction() as connection:
            connection.root.x = MinPO(1)
        with other.transaction() as connection:
            assert connection.root.x.value == 1
            connection.root.x.value = 2
        db.storage.ping()
        with db.transaction() as connection:
            assert connection.root.x.value == 2


def test_a_demo_storage_may_have_a_client_as_its_base(address: Any) -> None:
    with closing(ZODB.DB(ClientStorage(address))) as db, db.transaction() as connection:
        connection.root.x = 1
    with closing(ZODB.DB(DemoStorage(base=ClientStorage(address)))) as db:
        with db.transaction() as connection:
            connection.root.x += 1
        with db.transaction() as connection:
            assert connection.root.x == 2
    with closing(ZODB.DB(ClientStorage(address))) as db, db.transaction() as connection:
        assert connection.root.x == 1


def test_another_storage_can_be_copied(address: Any, tmp_path: Path) -> None:
    from ZODB.FileStorage import FileStorage

    from zeo.StorageServer import StorageServer
    source = FileStorage(str(tmp_path / 'source.fs'))
    with closing(ZODB.DB(source)) as db:
        for n in range(5):
            with db.transaction() as connection:
                connection.root.x = n
    server = StorageServer({'1': FileStorage(str(tmp_path / 'target.fs'))}, [('127.0.0.1', 0)])
    server.start()
    source = FileStorage(str(tmp_path / 'source.fs'), read_only=True)
    target = ClientStorage(server.addresses[0])
    target.copyTransactionsFrom(source)
    assert ([(each.tid, [(record.oid, record.data) for record in each]) for each in target.iterator()]
            == [(each.tid, [(record.oid, record.data) for record in each]) for each in source.iterator()])
    assert target.lastTransaction() == source.lastTransaction()
    source.close()
    target.close()
    server.close()


def use_in_child(db: Any, results: Any) -> None:
    """What a forked child does with the database that it inherits."""
    try:
        storage = db.storage
        with db.transaction() as connection:
            connection.root.child = os.getpid()
            seen = connection.root.parent
        results.send((seen, storage._cache.path, storage.is_connected()))
        db.close()
    except BaseException as error:
        results.send(error)
        raise


def test_a_forked_child_has_its_own_connection_and_cache(
        tmp_path: Path, start_server: Any) -> None:
    server = start_server('zeo')
    path = str(tmp_path / 'cache.zec')
    storage = ClientStorage(server.address, cache=path)
    db = ZODB.DB(storage)
    with db.transaction() as connection:
        connection.root.parent = 'here'
    link = storage._supervisor.wait()
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context('fork').Process(target=use_in_child, args=(db, theirs))
    child.start()
    theirs.close()
    result = ours.recv()
    child.join(PATIENCE)
    assert child.exitcode == 0
    assert result == ('here', None, True)
    storage.ping()
    assert storage._supervisor.wait() is link  # the child has not ended it
    with db.transaction() as connection:
        assert connection.root.child == child.pid
        connection.root.parent = 'still here'
    assert storage._cache.path == path
    ours.close()
    db.close()
    transaction.abort()
