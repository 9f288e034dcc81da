"""What all sessions of a storage share."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ZODB.Connection import TransactionMetaData
from ZODB.FileStorage import FileStorage
from ZODB.MappingStorage import MappingStorage
from ZODB.utils import newTid
from ZODB.utils import p64
from ZODB.utils import u64

from tests.server.talk import PATIENCE
from tests.server.talk import SessionPeer
from tests.server.talk import in_thread
from tests.server.talk import oid
from tests.system.servers import until
from zeo.server.served import Served

Serve = Callable[..., Served]
Connect = Callable[..., SessionPeer]


# ---- after a restart


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


# ---- options


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
