"""A FileStorage holds the same whether its transactions were put together in memory or in its temporary file."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ZODB.Connection import TransactionMetaData
from ZODB.FileStorage import FileStorage
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import ConflictError
from ZODB.utils import p64, z64

from tests.server.talk import SessionPeer, oid
from zeo.server.filewriter import SMALL, FileWriter, writer_of
from zeo.server.served import Served

LARGE = SMALL + 1


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[FileStorage]:
    storage = FileStorage(str(tmp_path / 'Data.fs'))
    yield storage
    storage.close()


def temporary(folder: Path) -> bytes:
    """What is, or was, in the storage's temporary file."""
    return (folder / 'Data.fs.tmp').read_bytes()


class Script:
    """The same transactions, wherever they are put together."""

    def __init__(self, storage: FileStorage) -> None:
        self.storage = storage
        self.writer: FileWriter | None = None
        self._tids = map(p64, range(1 << 40, 1 << 41, 1 << 32))

    def begin(self, size: int) -> TransactionMetaData:
        transaction = TransactionMetaData()
        self.storage.tpc_begin(transaction, next(self._tids))
        if self.writer is not None:
            self.writer.begun(size)
        return transaction

    def end(self, transaction: TransactionMetaData) -> None:
        self.storage.tpc_vote(transaction)
        self.storage.tpc_finish(transaction)

    def commit(self, size: int, *records: tuple[bytes, bytes, bytes]) -> None:
        transaction = self.begin(size)
        for number, serial, record in records:
            self.storage.store(number, serial, record, '', transaction)
        self.end(transaction)

    def undo(self, size: int, *ids: bytes) -> None:
        transaction = self.begin(size)
        for each in ids:
            self.storage.undo(each, transaction)
        self.end(transaction)

    def run(self, size: int) -> None:
        storage = self.storage
        self.commit(LARGE, (oid(1), z64, b'one'), (oid(2), z64, b'two' * 5000))
        first = storage.lastTransaction()
        self.commit(size, (oid(1), first, b'three' * 9000), (oid(3), z64, b'x'))
        second = storage.lastTransaction()
        given_up = self.begin(size)
        storage.store(oid(4), z64, b'never' * 20_000, '', given_up)
        storage.tpc_abort(given_up)
        refused = self.begin(size)
        storage.store(oid(4), z64, b'never' * 10_000, '', refused)
        with pytest.raises(ConflictError):
            storage.store(oid(1), first, b'not current', '', refused)
        storage.tpc_abort(refused)
        self.commit(size, (oid(1), second, b'four'))
        # The second finds in what is not voted yet what the first has written there.
        self.undo(size, *(each['id'] for each in storage.undoLog(0, 2)))
        self.commit(LARGE, (oid(5), z64, b'five'))
        self.commit(size, (oid(6), z64, b'six'))


@pytest.mark.parametrize('size', [0, SMALL, LARGE])
def test_the_file_is_the_same(tmp_path: Path, storage: FileStorage, size: int) -> None:
    script = Script(storage)
    script.writer = writer_of(storage)
    assert script.writer is not None
    script.run(size)
    script.writer.close()

    (tmp_path / 'plain').mkdir()
    with contextlib.closing(FileStorage(str(tmp_path / 'plain' / 'Data.fs'))) as plain:
        Script(plain).run(size)
    assert (tmp_path / 'Data.fs').read_bytes() == (tmp_path / 'plain' / 'Data.fs').read_bytes()


def test_only_large_ones_take_the_temporary_file(tmp_path: Path, storage: FileStorage) -> None:
    script = Script(storage)
    script.writer = writer_of(storage)
    assert script.writer is not None
    script.commit(SMALL, (oid(1), z64, b'in memory' * 10_000))
    assert temporary(tmp_path) == b''
    script.commit(LARGE, (oid(2), z64, b'on disk' * 10_000))
    assert b'on disk' * 9000 in temporary(tmp_path)
    script.writer.close()


def test_nothing_is_kept_of_the_one_before(storage: FileStorage) -> None:
    script = Script(storage)
    script.writer = writer_of(storage)
    assert script.writer is not None
    script.commit(0, (oid(1), z64, b'x' * 100_000))
    transaction = script.begin(0)
    assert storage._tfile.read() == b''
    storage.tpc_abort(transaction)
    script.writer.close()


def test_the_storage_closes_its_file(tmp_path: Path) -> None:
    storage = FileStorage(str(tmp_path / 'Data.fs'))
    file = storage._tfile
    served = Served('1', storage)
    assert served.file_writer is not None
    transaction = TransactionMetaData()
    storage.tpc_begin(transaction)
    served.file_writer.begun(0)
    storage.tpc_abort(transaction)
    assert storage._tfile is not file
    served.close()
    assert file.closed


def test_other_storages_do_it_in_their_own_way(tmp_path: Path, storage: FileStorage) -> None:
    class Another(FileStorage):  # type: ignore[misc]
        pass

    assert writer_of(MappingStorage()) is None
    for name, kind, changed in [('Data.fs', FileStorage, {'read_only': True}), ('Other.fs', Another, {})]:
        with contextlib.closing(kind(str(tmp_path / name), **changed)) as other:
            assert writer_of(other) is None
    del storage._tfmt  # a later ZODB may not have it
    assert writer_of(storage) is None


@pytest.mark.parametrize('size, in_memory', [(100_000, True), (LARGE, False)])
def test_a_client_commits(tmp_path: Path, file_storage: Any, serve: Any, connect: Any, size: int,
                          in_memory: bool) -> None:
    peer: SessionPeer = connect(serve(file_storage))
    record = b'x' * size
    committed = peer.commit(oid(1), record)
    assert (temporary(tmp_path) == b'') == in_memory
    assert file_storage.load(oid(1)) == (record, committed)


def test_an_undo_is_put_together_in_the_temporary_file(tmp_path: Path, file_storage: Any, serve: Any, connect: Any) -> None:
    """Nobody knows before how much it writes."""
    peer: SessionPeer = connect(serve(file_storage))
    peer.commit(oid(1), b'one')
    assert temporary(tmp_path) == b''
    peer.begin(1)
    peer.tell('undoa', file_storage.undoLog(0, 1)[0]['id'], 1)
    peer.call('vote', 1)
    assert temporary(tmp_path) != b''
    peer.call('tpc_finish', 1)
