"""Blob data on the client's side: which folder it is, and how they are sent."""

import os
from pathlib import Path
from typing import Any

import pytest
from ZODB.blob import FilesystemHelper

from zeo.client.blobcache import BlobCache
from zeo.client.blobs import PIECE
from zeo.client.blobs import open_blobs
from zeo.client.blobs import upload
from zeo.client.sharedblobs import SharedBlobs
from zeo.errors import ClientStorageError
from zeo.wire.chunks import upload_of
from zeo.wire.framing import Frame


def test_it_is_a_cache_or_the_folder_of_the_server(tmp_path: Path) -> None:
    FilesystemHelper(str(tmp_path / 'blobs')).create()
    for shared, kind in (False, BlobCache), (True, SharedBlobs):
        folder = open_blobs(str(tmp_path / ('blobs' if shared else 'cache')), shared, None, 10)
        assert type(folder) is kind and folder.shared is shared
        folder.close()
    with pytest.raises(ClientStorageError, match=str(tmp_path / 'cache')):
        open_blobs(str(tmp_path / 'cache'), True, None, 10)


class Channel:
    """Puts together what is posted."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.from_files = 0

    def post_frame(self, frame: Frame) -> None:
        self._read(b''.join(frame))

    def post_file(self, head: bytes, file: int, at: int, size: int, tail: bytes) -> None:
        self.from_files += 1
        self._read(head + os.pread(file, size, at) + tail)

    def _read(self, frame: bytes) -> None:
        message = upload_of(frame[4:])
        assert message is not None
        self.pieces.append(bytes(message[3][0]))


@pytest.mark.parametrize('large', [False, True])
@pytest.mark.parametrize('size', [0, 1, PIECE, PIECE + 1, 1_000_000])
def test_all_data_are_sent_in_pieces_that_are_not_too_long(tmp_path: Path, size: int, large: bool) -> None:
    data = os.urandom(size)
    (tmp_path / 'file').write_bytes(data)
    channel: Any = Channel()
    upload(str(tmp_path / 'file'), channel, large)
    assert b''.join(channel.pieces) == data
    if large and size > PIECE:
        assert channel.from_files == len(channel.pieces)
    else:
        assert not channel.from_files and all(0 < len(each) <= PIECE for each in channel.pieces)
