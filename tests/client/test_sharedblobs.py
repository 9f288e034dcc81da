"""The folder of blobs that a client shares with its server."""

import os
from pathlib import Path
from typing import Any

import pytest
from ZODB.blob import FilesystemHelper
from ZODB.POSException import POSKeyError

from tests.client.peer import oid
from tests.client.peer import tid
from zeo.client.blobcache import BlobCache
from zeo.client.sharedblobs import SharedBlobs
from zeo.errors import ClientStorageError


def fails(*_: Any) -> None:
    raise AssertionError('the server need not be asked')


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    FilesystemHelper(str(tmp_path / 'blobs')).create()
    return tmp_path / 'blobs'


def test_a_shared_blob_is_where_the_server_has_it(folder: Path) -> None:
    shared = SharedBlobs(str(folder))
    path = Path(FilesystemHelper(str(folder)).getBlobFilename(oid(1), tid(1)))
    path.parent.mkdir(parents=True)
    path.write_bytes(b'some data')
    assert shared.get(oid(1), tid(1), fails) == str(path)
    with shared.open(oid(1), tid(1), fails) as file:
        assert file.read() == b'some data'
    with pytest.raises(POSKeyError, match='No blob file at'):
        shared.get(oid(1), tid(2), fails)


def test_a_file_is_put_where_the_server_finds_it(folder: Path, tmp_path: Path) -> None:
    shared = SharedBlobs(str(folder))
    (tmp_path / 'source').write_bytes(b'some data')
    taken = shared.take(oid(1), str(tmp_path / 'source'))
    assert os.path.dirname(taken) == shared.helper.getPathForOID(oid(1)) and taken.endswith('.tmp')
    assert Path(taken).read_bytes() == b'some data' and not (tmp_path / 'source').exists()
    shared.discard(taken)
    shared.discard(taken)
    assert not os.path.exists(taken)


def test_a_shared_folder_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ClientStorageError, match=f"{tmp_path}/no cannot be used: it does not exist; it has"):
        SharedBlobs(str(tmp_path / 'no'))


def test_the_cache_of_a_client_cannot_be_shared_with_the_server(tmp_path: Path) -> None:
    BlobCache(str(tmp_path / 'cache')).close()
    with pytest.raises(ClientStorageError, match='it is the cache of a client'):
        SharedBlobs(str(tmp_path / 'cache'))
