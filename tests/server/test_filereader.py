"""The reader finds what the storage finds, also while a pack puts another file in the place of the storage's."""

import contextlib
import errno
import os
import pickle
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ZODB.Connection import TransactionMetaData
from ZODB.FileStorage import FileStorage
from ZODB.FileStorage.format import CorruptedDataError
from ZODB.fsIndex import fsIndex
from ZODB.POSException import POSKeyError
from ZODB.serialize import referencesf
from ZODB.utils import maxtid, z64

from tests.client.peer import PATIENCE
from tests.server.talk import oid
from tests.system.servers import until
from zeo.server import filereader
from zeo.server.filereader import FileReader, load_before_of
from zeo.server.served import Served


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[FileStorage]:
    storage = FileStorage(str(tmp_path / 'Data.fs'))
    yield storage
    storage.close()


@pytest.fixture
def reader(storage: FileStorage) -> FileReader:
    return FileReader(storage)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes were asked for, each time."""
    sizes = []

    def pread(number: int, size: int, at: int) -> bytes:
        sizes.append(size)
        return os.pread(number, size, at)

    monkeypatch.setattr(filereader, '_pread', pread)
    return sizes


def commit(storage: Any, *records: tuple[bytes, bytes], undo: bytes | None = None) -> bytes:
    transaction = TransactionMetaData()
    storage.tpc_begin(transaction)
    for number, record in records:
        storage.store(number, current(storage, number), record, '', transaction)
    if undo is not None:
        storage.undo(undo, transaction)
    storage.tpc_vote(transaction)
    tid: bytes = storage.tpc_finish(transaction)
    return tid


def current(storage: Any, number: bytes) -> bytes:
    try:
        tid: bytes = storage.getTid(number)
        return tid
    except POSKeyError:
        return z64


def the_same(storage: Any, reader: FileReader, number: bytes, tid: bytes = maxtid) -> Any:
    """What both find, or raise."""
    told: list[Any] = []
    for load in (storage.loadBefore, reader.load_before):
        try:
            told.append(load(number, tid))
        except Exception as error:
            told.append((type(error), error.args))
    assert told[0] == told[1]
    return told[1]


@pytest.mark.parametrize('size, sizes', [
    (1, [4096]), (4096 - 42, [4096]), (4096 - 41, [4096, 4096 - 41]), (100_000, [4096, 100_000])])
def test_a_current_record_is_read_at_once(
        storage: FileStorage, reader: FileReader, reads: list[int], size: int, sizes: list[int]) -> None:
    tid = commit(storage, (oid(1), b'x' * size), (oid(2), b'another'))
    reader._otherwise = None  # it is not asked
    assert reader.load_before(oid(1), maxtid) == (b'x' * size, tid, None)
    assert reads == sizes


def test_the_storage_is_asked_for_all_else(storage: FileStorage, reader: FileReader) -> None:
    first = commit(storage, (oid(1), b'one'))
    second = commit(storage, (oid(1), b'two'), (oid(2), b'new'))
    third = commit(storage, undo=storage.undoLog(0, 1)[0]['id'])
    assert the_same(storage, reader, oid(1)) == (b'one', third, None)  # a record that refers to another
    assert the_same(storage, reader, oid(1), third) == (b'two', second, third)
    assert the_same(storage, reader, oid(1), second) == (b'one', first, second)
    assert the_same(storage, reader, oid(1), first) is None
    assert the_same(storage, reader, oid(2))[0] is POSKeyError  # it has not been made
    assert the_same(storage, reader, oid(3))[0] is POSKeyError
    last = commit(storage, (oid(1), b'three'))
    assert the_same(storage, reader, oid(1), last) == (b'one', third, last)


def test_what_is_committed_is_read_then(storage: FileStorage, reader: FileReader) -> None:
    for record in (b'one', b'two'):
        tid = commit(storage, (oid(1), record))
        assert reader.load_before(oid(1), maxtid) == (record, tid, None)
    transaction = TransactionMetaData()
    storage.tpc_begin(transaction)
    storage.store(oid(1), tid, b'three', '', transaction)
    storage.tpc_vote(transaction)
    assert reader.load_before(oid(1), maxtid) == (b'two', tid, None)
    storage.tpc_abort(transaction)
    assert reader.load_before(oid(1), maxtid) == (b'two', tid, None)


def pack(storage: FileStorage) -> None:
    storage.pack(2**32, referencesf)


def test_after_a_pack_the_new_file_is_read(storage: FileStorage, reader: FileReader, reads: list[int]) -> None:
    commit(storage, (z64, b'\x80\x03N.\x80\x03N.'))
    commit(storage, (z64, b'\x80\x03N.\x80\x03K\x01.'))
    assert reader.load_before(z64, maxtid)
    before = reader._place.number
    pack(storage)
    assert the_same(storage, reader, z64)
    tid = commit(storage, (z64, b'\x80\x03N.\x80\x03K\x02.'))
    reader._otherwise = None
    assert reader.load_before(z64, maxtid) == (b'\x80\x03N.\x80\x03K\x02.', tid, None)
    number = reader._place.number
    assert number != before and os.fstat(number).st_ino == os.stat(storage._file_name).st_ino
    assert not os.path.exists(f'/proc/self/fd/{before}') or os.fstat(before).st_ino != os.stat(
        storage._file_name + '.old').st_ino


def test_where_no_more_files_can_be_opened_the_storage_reads(
        storage: FileStorage, reader: FileReader, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(2):
        commit(storage, (z64, b'\x80\x03N.\x80\x03K%c.' % number))
    pack(storage)
    assert storage._index is not reader._place.index  # so that it is to be opened

    def refuse(*_: Any) -> int:
        raise OSError(errno.EMFILE, 'too many open files')

    monkeypatch.setattr(os, 'open', refuse)
    assert the_same(storage, reader, z64)
    assert load_before_of(storage) is None


def test_the_file_that_was_packed_is_let_go_of_at_once(storage: FileStorage) -> None:
    served = Served('1', storage)
    for number in range(2):
        commit(storage, (z64, b'\x80\x03N.\x80\x03K%c.' % number))
    pack_time = time.time()
    with os.fdopen(os.open(storage._file_name, os.O_RDONLY)) as former:
        inode = os.fstat(former.fileno()).st_ino
    served.pack(pack_time)
    names = [name for name in os.listdir('/proc/self/fd') if os.path.exists(f'/proc/self/fd/{name}')]
    assert inode not in [os.stat(f'/proc/self/fd/{name}').st_ino for name in names]


def test_a_pack_that_ends_while_a_record_is_read_does_not_mix_the_files(
        storage: FileStorage, reader: FileReader, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        commit(storage, (z64, b'\x80\x03N.\x80\x03K%c.' % number))
    expected = storage.loadBefore(z64, maxtid)
    reader._otherwise = None

    def pread(number: int, size: int, at: int) -> bytes:
        if not packed:
            packed.append(True)
            pack(storage)
        return os.pread(number, size, at)

    packed: list[bool] = []
    monkeypatch.setattr(filereader, '_pread', pread)
    assert reader.load_before(z64, maxtid) == expected and packed
    assert reader.load_before(z64, maxtid) == expected


def test_a_pack_that_ends_before_a_record_is_looked_up_does_not_mix_them_either(
        storage: FileStorage, reader: FileReader) -> None:
    class Turning:
        @property
        def _index(self) -> Any:
            index = storage._index
            pack(storage)  # the first revision's place in the old file is that of the last one in the new
            return index

    for number in range(5):
        commit(storage, (z64, b'\x80\x03N.\x80\x03K%c.' % number))
    expected = storage.loadBefore(z64, maxtid)
    reader._storage = Turning()
    reader._otherwise = None
    assert reader.load_before(z64, maxtid) == expected


@pytest.mark.parametrize('when', ['looked up', 'begun', 'known to be long'])
def test_another_thread_that_goes_on_to_the_new_file_does_not_mix_them(
        storage: FileStorage, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    def turn() -> None:
        if when not in turned:
            turned.append(when)
            pack(storage)
            assert reader.load_before(z64, maxtid) == expected
            assert reader._place is not place

    class Index(fsIndex):  # type: ignore[misc]
        def __getitem__(self, key: bytes) -> Any:
            at = super().__getitem__(key)
            if when == 'looked up' and self is place.index:
                turn()
            return at

    def pread(number: int, size: int, at: int) -> bytes:
        if (when == 'known to be long') == (size != 4096):
            turn()
        return os.pread(number, size, at)

    turned: list[str] = []
    for number in range(5):
        commit(storage, (z64, b'\x80\x03N.' + pickle.dumps(b'%d' % number * 10_000, 3)))
    expected = storage.loadBefore(z64, maxtid)
    storage._index = Index(storage._index)
    reader = FileReader(storage)
    reader._otherwise = None
    place = reader._place
    monkeypatch.setattr(filereader, '_pread', pread)
    assert reader.load_before(z64, maxtid) == expected and turned


@pytest.mark.parametrize('packed_first', [True, False])
def test_no_pack_ends_between_the_file_and_its_index(
        storage: FileStorage, monkeypatch: pytest.MonkeyPatch, packed_first: bool) -> None:
    """It is about to, when the file is opened, and does when what belongs to it may be let go of."""
    for number in range(5):
        last = commit(storage, (z64, b'\x80\x03N.\x80\x03K%c.' % number))
    packing = threading.Thread(target=pack, args=(storage,))
    get, write_lock, about_to, open_it = storage._files.get, storage._files.write_lock, threading.Event(), os.open

    @contextlib.contextmanager
    def getting() -> Iterator[Any]:
        with get() as file:
            yield file
        if threading.current_thread() is not packing:
            packing.join(PATIENCE)
            assert not packing.is_alive()

    def locking() -> Any:
        about_to.set()
        return write_lock()

    def opening(path: Any, flags: int, *args: Any) -> int:
        number = None if packed_first else open_it(path, flags, *args)
        if not about_to.is_set():
            packing.start()
            assert about_to.wait(PATIENCE)
            until(lambda: storage._files.writers or not packing.is_alive(), 'it waits for readers, or has ended')
            if not storage._files._out:
                packing.join(PATIENCE)
        return open_it(path, flags, *args) if number is None else number

    monkeypatch.setattr(storage._files, 'get', getting)
    monkeypatch.setattr(storage._files, 'write_lock', locking)
    monkeypatch.setattr(os, 'open', opening)
    place = filereader._Place(storage)
    assert os.pread(place.number, 16, place.index[z64]) == z64 + last
    assert storage._index is not place.index


def test_damage_is_told_by_the_storage(storage: FileStorage, reader: FileReader) -> None:
    commit(storage, (oid(1), b'record'))
    at = storage._index[oid(1)]
    with open(storage._file_name, 'r+b') as file:
        file.seek(at)
        file.write(oid(7))
    storage._files.flush()
    with pytest.raises(CorruptedDataError):
        reader.load_before(oid(1), maxtid)


def test_a_file_that_ends_too_early_is_no_record(storage: FileStorage, reader: FileReader) -> None:
    commit(storage, (oid(1), b'x' * 10_000))
    os.truncate(storage._file_name, os.path.getsize(storage._file_name) - 100)
    reader._otherwise = lambda *_: 'the storage was asked'
    assert reader.load_before(oid(1), maxtid) == 'the storage was asked'


@pytest.mark.parametrize('left', [0, 20, 41])
def test_nor_is_a_file_that_ends_before_the_record_has_begun(
        storage: FileStorage, reader: FileReader, left: int) -> None:
    commit(storage, (oid(1), b'record'))
    os.truncate(storage._file_name, storage._index[oid(1)] + left)
    reader._otherwise = lambda *_: 'the storage was asked'
    assert reader.load_before(oid(1), maxtid) == 'the storage was asked'


def test_a_record_of_a_version_is_told_by_the_storage(storage: FileStorage, reader: FileReader) -> None:
    commit(storage, (oid(1), b'record'))
    at = storage._index[oid(1)]
    with open(storage._file_name, 'r+b') as file:
        file.seek(at + 32)
        file.write(b'\0\1')
    storage._files.flush()
    assert the_same(storage, reader, oid(1))[0] is ValueError


@pytest.mark.parametrize('number', [b'', b'short', b'much too long', 'text', None, 7])
def test_what_is_no_oid_is_told_by_the_storage(storage: FileStorage, reader: FileReader, number: Any) -> None:
    commit(storage, (oid(1), b'record'))
    assert isinstance(the_same(storage, reader, number)[0], type)


def test_a_closed_storage_is_not_read_from(storage: FileStorage, reader: FileReader) -> None:
    commit(storage, (oid(1), b'record'))
    storage.close()
    with pytest.raises(ValueError, match='closed'):
        reader.load_before(oid(1), maxtid)


def test_other_storages_load_themselves(storage: FileStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Special(FileStorage):  # type: ignore[misc]
        pass

    special = Special(str(tmp_path / 'special.fs'))
    assert load_before_of(special) is None
    special.close()
    assert load_before_of(storage) is not None
    with monkeypatch.context() as patch:
        patch.setattr(filereader, '_pread', None)  # as on Windows
        assert load_before_of(storage) is None
    monkeypatch.setattr(storage, 'loadBefore', print, raising=False)
    assert load_before_of(storage) is None


@pytest.mark.parametrize('name', ['_index', '_files', '_file_name'])
def test_a_storage_that_is_made_otherwise_loads_itself(
        storage: FileStorage, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with monkeypatch.context() as patch:
        patch.delattr(storage, name)
        assert load_before_of(storage) is None


def test_nothing_is_left_open(storage: FileStorage) -> None:
    reader = FileReader(storage)
    path = f'/proc/self/fd/{reader._place.number}'
    assert os.path.samefile(path, storage._file_name)
    del reader
    assert not os.path.exists(path) or not os.path.samefile(path, storage._file_name)
