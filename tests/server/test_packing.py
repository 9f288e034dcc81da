"""Packs that are watched, refused and stopped."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ZODB
from ZODB.FileStorage import FileStorage
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import StorageError
from ZODB.tests.hexstorage import HexStorage

from zeo.server.packing import Packing
from zeo.server.packing import file_storage as find


@pytest.fixture
def times(file_storage: FileStorage) -> list[float]:
    """Fill a file with revisions that can be packed away; when each was committed."""
    committed = []
    db = ZODB.DB(file_storage)
    for number in range(6):
        with db.transaction() as connection:
            connection.root()[number % 3] = 'x' * 1000
        committed.append(time.time())
    return committed


PHASES: dict[str, Callable[[Packing, Any], bool]] = {
    'while garbage is looked for': lambda packing, storage: packing._phase != 'copying',
    'while the past is copied': lambda packing, storage: packing._phase == 'copying',
    'while the rest is copied': lambda packing, storage: storage._commit_lock.locked(),
}


@pytest.mark.parametrize('phase', PHASES)
def test_a_pack_that_is_stopped_leaves_the_database_as_it_was(
        phase: str, file_storage: FileStorage, times: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(file_storage.getName())
    before = path.read_bytes()
    packing = Packing('1', file_storage)
    step = packing._step
    stopped = []

    def stop_then_step(done: float) -> None:
        if PHASES[phase](packing, file_storage):
            stopped.append(packing.stop())
        step(done)

    with monkeypatch.context() as patch:
        patch.setattr(packing, '_step', stop_then_step)
        with packing, pytest.raises(StorageError, match='was stopped; the database is as it was'):
            packing.run(times[3])
    assert stopped == [True]
    assert path.read_bytes() == before
    assert not path.with_name('Data.fs.pack').exists()
    assert not file_storage._commit_lock.locked()
    with packing:
        packing.run(times[3])  # as if nothing had happened
    assert len(path.read_bytes()) < len(before)
    file_storage.close()


def test_the_progress_of_a_pack_only_grows_and_reaches_its_end(
        file_storage: FileStorage, times: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    packing = Packing('1', file_storage)
    step = packing._step
    seen: list[float] = []

    def note(done: float) -> None:
        step(done)
        progress = packing.progress
        assert progress is not None
        seen.append(progress['share'])

    monkeypatch.setattr(packing, '_step', note)
    assert packing.progress is None
    with packing:
        packing.run(times[4])
    assert packing.progress is None
    assert seen == sorted(seen)
    assert seen[0] <= .5 < seen[-1] <= 1
    file_storage.close()


def test_a_second_pack_is_refused_while_there_is_one(file_storage: FileStorage) -> None:
    packing = Packing('main', file_storage)
    with packing:
        with pytest.raises(StorageError, match='storage main is being packed already, since 2'), packing:
            raise AssertionError('it has begun')
        assert packing.locked()
    with packing:
        pass
    file_storage.close()


def test_a_pack_of_another_kind_of_storage_tells_no_percentage_and_cannot_be_stopped() -> None:
    packing = Packing('1', MappingStorage())
    assert packing.room is None
    with packing:
        assert not packing.stop()
        progress = packing.progress
        assert progress is not None and progress['share'] is None
        packing.run(time.time())


def test_nothing_can_be_stopped_when_nothing_is_packed(file_storage: FileStorage, times: list[float]) -> None:
    packing = Packing('1', file_storage)
    assert not packing.stop()
    with packing:
        packing.run(times[-1])
    file_storage.close()


def test_the_room_is_what_is_free_and_what_the_last_pack_has_left(file_storage: FileStorage) -> None:
    room = Packing('1', file_storage).room
    old = Path(file_storage.getName() + '.old')
    with open(old, 'wb') as file:
        os.truncate(file.fileno(), 10**12)  # it takes no room itself
    with_old = Packing('1', file_storage).room
    assert room is not None and with_old is not None
    assert room > 0 and with_old >= 10**12
    file_storage.close()


def test_a_file_storage_is_found_inside_its_wrappers(file_storage: FileStorage) -> None:
    assert find(HexStorage(file_storage)) is file_storage
    assert find(MappingStorage()) is None
    file_storage.close()


def test_the_end_of_the_server_stops_a_pack_and_there_is_no_other(
        file_storage: FileStorage, times: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    packing = Packing('1', file_storage)
    step = packing._step

    def close_then_step(done: float) -> None:
        packing.close()
        step(done)

    monkeypatch.setattr(packing, '_step', close_then_step)
    with packing, pytest.raises(StorageError, match='was stopped; the database is as it was'):
        packing.run(times[3])
    for _ in range(2):
        with pytest.raises(StorageError, match='the server is closing'), packing:
            pytest.fail('it is packed')
    file_storage.close()
