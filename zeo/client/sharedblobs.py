"""The server's folder of blobs, where the client reaches it by itself."""

import contextlib
import errno
import os
from typing import IO
from typing import Any

from ZODB.blob import FilesystemHelper
from ZODB.POSException import POSKeyError

from zeo.client.arrivals import unlink
from zeo.client.blobfiles import CacheLayout
from zeo.client.blobfiles import Fetch
from zeo.client.blobfiles import explained
from zeo.client.blobfiles import layout_of
from zeo.client.blobfiles import open_file
from zeo.client.blobfiles import take_file


class SharedBlobs:
    """The blob folder of the server's storage, which this machine can reach by itself."""

    shared = True

    def __init__(self, folder: str) -> None:
        folder = os.path.abspath(folder)
        with explained(f'the shared blob folder {folder} cannot be used'):
            if layout_of(folder) == CacheLayout.name:
                raise OSError(errno.EINVAL, 'it is the cache of a client, not the folder of a storage')
            if not os.path.isdir(folder):
                raise OSError(errno.ENOENT, "it does not exist; it has to be the server's")
            self.helper = FilesystemHelper(folder)
        self._folder = folder

    def take(self, oid: bytes, path: str) -> str:
        with explained(f'a blob cannot be put into {self._folder}'):
            target = take_file(path, self.helper.getPathForOID(oid, create=True))
            os.chmod(target, 0o644)  # the server may be another user
        return target

    def keep(self, oid: bytes, tid: bytes, path: str) -> None:
        """The server has taken the file."""

    def discard(self, path: str) -> None:
        unlink(path)

    def get(self, oid: bytes, tid: bytes, fetch: Fetch) -> str:
        path: str = self.helper.getBlobFilename(oid, tid)
        if not os.path.exists(path):
            with contextlib.suppress(OSError):
                os.listdir(os.path.dirname(path))  # has a network file system look again
            if not os.path.exists(path):
                raise POSKeyError(f'No blob file at {path}', oid, tid)
        return path

    def open(self, oid: bytes, tid: bytes, fetch: Fetch, blob: Any = None) -> IO[bytes]:
        return open_file(self.get(oid, tid, fetch), blob)

    def arrivals(self) -> None:
        return None

    def abandon(self) -> None:
        """Nothing is under way."""

    def close(self) -> None:
        """Nothing is left to do."""
