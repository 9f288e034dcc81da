"""Files of blobs: what both kinds of folder, a cache and the server's, do with them."""

import contextlib
import os
import tempfile
from collections.abc import Callable
from collections.abc import Iterator
from typing import IO
from typing import Any

from ZODB.blob import BLOB_SUFFIX
from ZODB.blob import LAYOUT_MARKER
from ZODB.blob import BlobFile
from ZODB.blob import rename_or_copy_blob
from ZODB.utils import u64

from zeo.client.arrivals import unlink
from zeo.errors import ClientStorageError

#: Asks the server for a blob and returns when all of it was received.
Fetch = Callable[[bytes, bytes], object]


class CacheLayout:
    """Which file in a cache folder is whose."""

    name = 'zeocache'
    folders = 997

    def oid_to_path(self, oid: bytes) -> str:
        return str(u64(oid) % self.folders)

    def getBlobFilePath(self, oid: bytes, tid: bytes) -> str:
        number, folder = divmod(u64(oid), self.folders)
        return os.path.join(str(folder), f'{number}.{tid.hex()}{BLOB_SUFFIX}')


def layout_of(folder: str) -> str | None:
    """How a folder of blobs is laid out; None if it does not say."""
    try:
        with open(os.path.join(folder, LAYOUT_MARKER)) as file:
            return file.read().strip()
    except FileNotFoundError:
        return None


def take_file(path: str, folder: str) -> str:
    """Move a file into a folder, under a name of its own, which is returned; if that fails it stays where it is."""
    handle, target = tempfile.mkstemp(prefix='zeo-', suffix='.tmp', dir=folder)
    os.close(handle)
    try:
        rename_or_copy_blob(path, target, chmod=False)
    except BaseException:
        unlink(target)
        raise
    return target


def open_file(path: str, blob: Any) -> IO[bytes]:
    """A file for reading, of which ``blob``, if there is one, keeps track."""
    if blob is None:
        return open(path, 'rb')
    file: IO[bytes] = BlobFile(path, 'r', blob)
    return file


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Let an `OSError` say what could not be done with which folder."""
    try:
        yield
    except OSError as error:
        raise ClientStorageError(f'{what}: {error.strerror or error}') from error
