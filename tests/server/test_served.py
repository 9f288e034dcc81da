"""What all sessions of a storage share; storages that announce their transactions themselves."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ZODB.Connection import TransactionMetaData
from ZODB.DemoStorage import DemoStorage
from ZODB.FileStorage import FileStorage
from ZODB.MappingStorage import MappingStorage
from ZODB.tests.hexstorage import HexStorage
from ZODB.utils import newTid
from ZODB.utils import p64
from ZODB.utils import u64
from ZODB.utils import z64

from tests.server.talk import PATIENCE
from tests.server.talk import Announcing
from tests.server.talk import GatedStorage
from tests.server.talk import SessionPeer
from tests.server.talk import in_thread
from tests.server.talk import oid
from tests.server.talk import tid
from tests.system.servers import until
from zeo.ClientStorage import ClientStorage
from zeo.server.served import Served
from zeo.server.served import Worker
from zeo.server.served import announces_itself

Serve = Callable[..., Served]
Connect = Callable[..., SessionPeer]


@pytest.fixture
def storage() -> Announcing:
    return Announcing()


# ---- who announces itself


def test_who_announces_itself(tmp_path: Path) -> None:
    filed = FileStorage(str(tmp_path / 'Data.fs'))
    for silent in (MappingStorage(), filed, HexStorage(filed), DemoStorage(), GatedStorage(),
                   DemoStorage(base=MappingStorage()), object()):
        assert not announces_itself(silent)
    client = ClientStorage(('127.0.0.1', 9), wait=False)
    for loud in (Announcing(), HexStorage(Announcing()), client, DemoStorage(base=client)):
        assert announces_itself(loud)
    client.close()
    filed.close()


# ---- storages that announce themselves


def test_transactions_of_others_are_announced_to_everybody(
        serve: Serve, connect: Connect, storage: Announcing) -> None:
    served = serve(storage)
    one, two = connect(served), connect(served)
    committed = storage.somebody_commits(oid(1), oid(2))
    assert one.invalidations() == two.invalidations() == [(committed, [oid(1), oid(2)])]
    assert one.call('lastTransaction') == committed
    assert one.call('getInvalidations', z64) == (committed, [oid(1), oid(2)])


def test_the_reply_to_an_own_commit_is_at_its_place_among_them(
        serve: Serve, connect: Connect, storage: Announcing) -> None:
    served = serve(storage)
    peer, other = connect(served), connect(served)
    tids = []
    storage.between = lambda: tids.append(storage.somebody_commits(oid(2)))
    peer.begin(1, (oid(1), z64, b'record'))
    peer.call('vote', 1)
    finish = peer.ask('tpc_finish', 1)
    told = [(name, args) for number, _, name, args in peer.told
            if number == finish or name == 'invalidateTransaction']
    committed = told[0][1]
    assert told == [('.reply', committed), ('invalidateTransaction', (tids[0], [oid(2)]))]
    assert committed < tids[0]
    assert other.invalidations() == [(committed, [oid(1)]), (tids[0], [oid(2)])]


def test_a_storage_may_show_the_last_tid_to_the_thread_that_calls_back(
        serve: Serve, connect: Connect, storage: Announcing, monkeypatch: pytest.MonkeyPatch) -> None:
    """As clients of PyPI's ZEO do."""
    def tpc_finish(self: Announcing, transaction: Any, callback: Callable[[bytes], None]) -> bytes:
        self.shown = MappingStorage.tpc_finish(self, transaction)
        callback(self.shown)
        return self.shown

    monkeypatch.setattr(Announcing, 'tpc_finish', tpc_finish)
    served = serve(storage)
    peer, other = connect(served), connect(served)
    committed = peer.commit(oid(1), b'record')
    assert other.invalidations() == [(committed, [oid(1)])]


def test_a_storage_that_does_not_call_back_is_announced_all_the_same(
        serve: Serve, connect: Connect, storage: Announcing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Announcing, 'tpc_finish', lambda self, transaction, callback:
                        MappingStorage.tpc_finish(self, transaction))
    served = serve(storage)
    peer, other = connect(served), connect(served)
    committed = peer.commit(oid(1), b'record')
    assert other.invalidations() == [(committed, [oid(1)])]


def test_a_callback_after_the_storage_gave_up_waiting_is_announced_and_delivered(
        serve: Serve, connect: Connect, storage: Announcing, monkeypatch: pytest.MonkeyPatch) -> None:
    """The storage's own server has committed; its answer comes when nobody waits for it."""
    late: list[Any] = []

    def tpc_finish(self: Announcing, transaction: Any, callback: Callable[[bytes], None]) -> bytes:
        committed = MappingStorage.tpc_finish(self, transaction)
        late.append(lambda: callback(committed))
        raise OSError(110, 'timed out')

    served = serve(storage)
    peer = connect(served)
    peer.begin(1, (oid(1), z64, b'record'))
    peer.call('vote', 1)
    monkeypatch.setattr(Announcing, 'tpc_finish', tpc_finish)
    with pytest.raises(EOFError):
        peer.call('tpc_finish', 1)
    back = connect(served)
    late[0]()
    assert [oids for _, oids in back.invalidations()] == [[oid(1)]]
    assert served.lock.holder is None


def test_an_invalidated_cache_hangs_up_on_everybody_and_nothing_before_is_known(
        serve: Serve, connect: Connect, storage: Announcing) -> None:
    served = serve(storage)
    peer = connect(served)
    before = storage.somebody_commits(oid(1))
    storage.shown = after = p64(u64(before) + 5)
    storage.db.invalidateCache()
    peer.wait_for_end()
    back = connect(served)
    assert back.registered == after
    assert back.call('getInvalidations', before) is None


@pytest.mark.parametrize('event', [
    lambda peer, storage: peer.call('ping'),
    lambda peer, storage: peer.call('lastTransaction'),
    lambda peer, storage: peer.call('getInvalidations', z64),
    lambda peer, storage: storage.somebody_commits(oid(9)),
    lambda peer, storage: peer.commit(oid(9), b'record')],
    ids=['ping', 'lastTransaction', 'getInvalidations', 'commit of others', 'own commit'])
def test_a_last_tid_that_moves_after_the_cache_was_invalidated_is_not_overlooked(
        serve: Serve, connect: Connect, storage: Announcing,
        event: Callable[[SessionPeer, Announcing], Any]) -> None:
    """Who connects in between believes to be up to date as of the tid before."""
    served = serve(storage)
    before = storage.somebody_commits(oid(1))
    storage.db.invalidateCache()
    peer = connect(served)
    assert peer.registered == before
    storage.shown = after = p64(u64(before) + 5)
    try:
        event(peer, storage)
    except EOFError:
        pass
    peer.wait_for_end()
    back = connect(served)
    assert back.registered >= after
    assert back.call('getInvalidations', before) is None


def test_what_is_announced_while_the_server_starts_is_not_lost(
        serve: Serve, connect: Connect, storage: Announcing, monkeypatch: pytest.MonkeyPatch) -> None:
    last_transaction = Announcing.lastTransaction
    calls = []

    def meanwhile(self: Announcing) -> bytes:
        found = last_transaction(self)
        if not calls:
            calls.append(1)
            self.somebody_commits(oid(1))
        return found

    monkeypatch.setattr(Announcing, 'lastTransaction', meanwhile)
    served = serve(storage)
    assert connect(served).registered == storage.shown > z64
    assert served.publisher.since(z64) is None


def test_an_announcement_that_makes_no_sense_hangs_up_on_everybody(
        serve: Serve, connect: Connect, storage: Announcing) -> None:
    peer = connect(serve(storage))
    with pytest.raises(TypeError):
        storage.db.invalidate(None, [oid(1)])
    peer.wait_for_end()


def test_the_wrapper_is_one_that_storages_may_ask(serve: Serve, storage: Announcing) -> None:
    serve(storage)
    assert storage.db.references(b'N.N.') == []
    assert storage.db.transform_record_data(b'x') == b'x' == storage.db.untransform_record_data(b'x')


# ---- invalidations by age, and after a restart


def test_recent_transactions_are_known_after_a_restart(
        serve: Serve, connect: Connect, tmp_path: Path) -> None:
    path = str(tmp_path / 'Data.fs')
    served = Served('1', FileStorage(path))
    served.start()
    peer = connect(served)
    tids = [peer.commit(oid(number), b'record') for number in range(5)]
    peer.close()
    served.close()
    again = connect(serve(FileStorage(path), invalidation_queue_size=3))
    assert again.registered == tids[-1]
    assert again.call('getInvalidations', tids[1]) is None
    last, oids = again.call('getInvalidations', tids[2])
    assert (last, sorted(oids)) == (tids[4], [oid(3), oid(4)])


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


# ---- client-side conflict resolution, options


def test_a_storage_is_served_read_only_if_it_is_or_if_that_is_wanted(
        serve: Serve, tmp_path: Path) -> None:
    FileStorage(str(tmp_path / 'Data.fs')).close()
    assert serve(FileStorage(str(tmp_path / 'Data.fs'), read_only=True)).read_only
    assert serve(MappingStorage(), read_only=True).read_only
    assert not serve(MappingStorage()).read_only


# ---- packing


def test_close_waits_for_a_pack(connect: Connect) -> None:
    gate, packed = threading.Event(), []

    class Packing(MappingStorage):
        def pack(self, *_: Any) -> None:
            assert gate.wait(PATIENCE)
            packed.append(self.opened())

    served = Served('1', Packing())
    served.start()
    peer = connect(served)
    peer.ask('pack', time.time())
    peer.close()
    closing = in_thread(served.close)
    gate.set()
    closing.result(PATIENCE)
    assert packed == [True]


# ---- threads


def test_a_worker_does_all_that_was_submitted_in_order_and_survives_errors(
        caplog: pytest.LogCaptureFixture) -> None:
    worker, done = Worker('test worker'), []

    def fail() -> None:
        raise SystemExit

    worker.submit(lambda: done.append(1))  # before it is started
    worker.start()
    worker.submit(fail)
    worker.submit(lambda: done.append(2))
    worker.close()
    assert done == [1, 2]
    assert 'test worker: a job failed' in caplog.text


def test_what_was_never_started_can_be_closed() -> None:
    Served('1', MappingStorage(), transaction_timeout=30).close()


def test_nothing_is_left_of_a_thread_that_could_not_be_started(
        serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    served = Served('1', MappingStorage())
    monkeypatch.setattr(threading.Thread, 'start', start)
    with pytest.raises(RuntimeError):
        served.run_beside('test', lambda: None)
    monkeypatch.undo()
    served.close()


def test_all_threads_end_with_it(connect: Connect) -> None:
    before = set(threading.enumerate())
    served = Served('1', MappingStorage(), transaction_timeout=30)
    served.start()
    peer = connect(served)
    peer.commit(oid(1), b'record')
    peer.call('verify', b'')
    peer.close()
    served.close()
    assert set(threading.enumerate()) <= before


def test_a_pack_does_not_keep_the_server_from_ending(
        connect: Connect, file_storage: FileStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served('1', file_storage)
    served.start()
    peer = connect(served)
    for number in range(3):
        peer.commit(oid(number), b'\x80\x03N.\x80\x03N.')
    begun, gate = threading.Event(), threading.Event()
    step = served.packing._step

    def wait_then_step(done: float) -> None:
        begun.set()
        assert gate.wait(PATIENCE)
        step(done)

    monkeypatch.setattr(served.packing, '_step', wait_then_step)
    peer.ask('pack', time.time())
    assert begun.wait(PATIENCE)
    peer.close()
    closing = in_thread(served.close)
    until(lambda: served.packing._closed, 'it is told to stop')
    gate.set()
    closing.result(PATIENCE)
    assert not Path(file_storage.getName() + '.pack').exists()


def test_a_tid_is_chosen_once_though_the_clock_is_behind_and_the_server_was_killed(tmp_path: Path) -> None:
    """Else who asks for the fate of the first one would be told that of the second."""
    future = p64(u64(newTid(None)) + 2**40)
    storage = FileStorage(str(tmp_path / 'Data.fs'))
    meta = TransactionMetaData()
    storage.tpc_begin(meta, future)
    storage.tpc_vote(meta)
    storage.tpc_finish(meta)
    chosen = set()
    for _ in range(5):
        served = Served('1', storage)  # as after a restart
        first, second = served.choose_tid(TransactionMetaData()), served.choose_tid(TransactionMetaData())
        assert first is not None and second is not None and future < first < second < p64(u64(future) + 2**33)
        assert u64(second) == u64(first) + 1
        chosen.add(first)
    assert len(chosen) == 5
    storage.close()


# ---- iterators


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

    monkeypatch.setattr('zeo.server.served.ITERATOR_PATIENCE', .02)
    with pytest.raises(ValueError, match='nobody knows'):
        serve(Broken()).iterator(tid(1), None)
