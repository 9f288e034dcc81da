"""Files of blobs: what both kinds of folder do with them."""

import errno
import os
from pathlib import Path

import pytest
from ZEO.ClientStorage import BlobCacheLayout
from ZODB.blob import LAYOUT_MARKER
from ZODB.blob import Blob

from tests.client.peer import oid
from tests.client.peer import tid
from zeo.client.blobfiles import CacheLayout
from zeo.client.blobfiles import explained
from zeo.client.blobfiles import layout_of
from zeo.client.blobfiles import open_file
from zeo.client.blobfiles import take_file
from zeo.errors import ClientStorageError


@pytest.mark.parametrize('number', [0, 1, 996, 997, 2**64 - 1])
def test_a_file_is_where_zeos_cache_has_it(number: int) -> None:
    ours, theirs = CacheLayout(), BlobCacheLayout()
    assert ours.oid_to_path(oid(number)) == theirs.oid_to_path(oid(number))
    assert ours.getBlobFilePath(oid(number), tid(5)) == theirs.getBlobFilePath(oid(number), tid(5))


def test_a_folder_says_how_it_is_laid_out(tmp_path: Path) -> None:
    assert layout_of(str(tmp_path)) is None
    (tmp_path / LAYOUT_MARKER).write_text('bushy\n')
    assert layout_of(str(tmp_path)) == 'bushy'


def test_a_file_is_taken_under_a_name_of_its_own_and_kept_or_left(tmp_path: Path) -> None:
    folder = tmp_path / 'folder'
    folder.mkdir()
    for data in b'one', b'two':
        (tmp_path / 'source').write_bytes(data)
        taken = take_file(str(tmp_path / 'source'), str(folder))
        assert Path(taken).read_bytes() == data and Path(taken).parent == folder
        assert not (tmp_path / 'source').exists()
    with pytest.raises(FileNotFoundError):
        take_file(str(tmp_path / 'source'), str(folder))
    assert len(os.listdir(folder)) == 2


def test_a_blob_knows_of_its_open_file(tmp_path: Path) -> None:
    (tmp_path / 'file').write_bytes(b'data')
    blob = Blob()
    with open_file(str(tmp_path / 'file'), None) as plain, open_file(str(tmp_path / 'file'), blob) as file:
        assert plain.read() == file.read() == b'data'
        assert getattr(file, 'blob') is blob


def test_what_went_wrong_is_told_with_what_was_to_be_done() -> None:
    with pytest.raises(ClientStorageError, match='^folder x cannot be used: No space left on device$'):
        with explained('folder x cannot be used'):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
