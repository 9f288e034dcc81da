"""Blob data in files on the client's side: in a cache folder of its own, or in the server's, shared.

A blob's revision never changes, so a file that has its final name is right for ever.  Files get their
final name by a rename when they are complete: a crash leaves only temporary ones behind, in ``tmp``.
Several processes may share one cache folder; two that want the same blob at the same time both fetch
it, and the second rename replaces the first file by an equal one.

When more than ``size`` bytes are cached, those used longest ago go first, but none that is open (its
reader holds a shared `flock`) and none that was used in the last moments.
"""

import contextlib
import fcntl
import logging
import os
import stat
import tempfile
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from typing import IO
from typing import Any

from ZODB.blob import BlobFile
from ZODB.blob import FilesystemHelper
from ZODB.blob import rename_or_copy_blob
from ZODB.POSException import POSKeyError
from ZODB.utils import oid_repr
from ZODB.utils import tid_repr

from zeo.errors import ClientStorageError

logger = logging.getLogger(__name__)

#: Files that were used within so many seconds are not removed to make room.
JUST_USED = 30.0

#: Temporary files that are older than this, in seconds, were left behind by a crash.
LEFT_BEHIND = 24 * 3600.0

#: How often a blob is fetched again that somebody else removed in the moment it was to be opened.
ATTEMPTS = 10

#: Asks the server for a blob and returns when all of it was received.
Fetch = Callable[[bytes, bytes], object]


class SharedBlobs:
    """The blob folder of the server's storage, which this machine can reach by itself."""

    def __init__(self, folder: str) -> None:
        self._helper = FilesystemHelper(folder)
        self._helper.create()
        self.temporary: str = self._helper.temp_dir

    def take(self, oid: bytes, path: str) -> str:
        """Move the application's file to where the server finds it under its bare name."""
        folder = self._helper.getPathForOID(oid, create=True)
        handle, target = tempfile.mkstemp(prefix='zeo-', suffix='.tmp', dir=folder)
        os.close(handle)
        rename_or_copy_blob(path, target, chmod=False)
        return target

    def keep(self, oid: bytes, tid: bytes, path: str) -> None:
        """The transaction has finished; the server has taken the file."""

    def get(self, oid: bytes, tid: bytes, fetch: Fetch) -> str:
        """The path of a revision's file."""
        path: str = self._helper.getBlobFilename(oid, tid)
        if not os.path.exists(path):
            # On a network file system it may take the asking of the server for us to see it.
            fetch(oid, tid)
            if not os.path.exists(path):
                raise POSKeyError(f'No blob file at {path}', oid, tid)
        return path

    def open(self, oid: bytes, tid: bytes, fetch: Fetch, blob: Any = None) -> IO[bytes]:
        """A revision's file, for reading."""
        return _open(self.get(oid, tid, fetch), blob)

    def discard(self, path: str) -> None:
        """Forget a file that was taken, if it is still there."""
        with contextlib.suppress(OSError):
            os.unlink(path)

    def close(self) -> None:
        """Nothing is left to do."""


class BlobCache:
    """A folder with the blobs that were used, of at most about ``size`` bytes (None: no limit).

    It is looked after when ``check`` percent of that have come in.  Raises `ClientStorageError`, which
    names the folder, if it cannot be used.
    """

    def __init__(self, folder: str, size: int | None = None, check: int = 10) -> None:
        self.folder = os.path.abspath(folder)
        self.temporary = os.path.join(self.folder, 'tmp')
        try:
            os.makedirs(self.temporary, 0o700, exist_ok=True)
            if not os.access(self.temporary, os.W_OK | os.X_OK):
                raise PermissionError('not writable')
        except OSError as error:
            raise ClientStorageError(
                f'the blob cache folder {self.folder} cannot be used:'
                f' {error.strerror or error}') from None
        self._size = size
        self._step = None if size is None else size * check // 100
        self._arrived = 0  # bytes since the folder was looked after; may be a little wrong
        self._arriving: dict[tuple[bytes, bytes], IO[bytes]] = {}  # belongs to the reading thread
        # Guards `_fetching` and `_sweeper`; a leaf.
        self._mutex = threading.Lock()
        self._fetching: dict[tuple[bytes, bytes], threading.Event] = {}
        self._sweeper: threading.Thread | None = None
        self._remove_leftovers()
        self._grown(self._step or 0)

    # ---- files

    def _path(self, oid: bytes, tid: bytes) -> str:
        return os.path.join(self.folder, f'{oid[-1]:02x}', f'{oid.hex()}.{tid.hex()}.blob')

    def _rename(self, path: str, oid: bytes, tid: bytes) -> None:
        target = self._path(oid, tid)
        os.chmod(path, stat.S_IRUSR)
        try:
            os.rename(path, target)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(target), 0o700, exist_ok=True)
            os.rename(path, target)

    def take(self, oid: bytes, path: str) -> str:
        """Move the application's file to this folder, for as long as its transaction lasts."""
        handle, target = tempfile.mkstemp(prefix='zeo-', suffix='.tmp', dir=self.temporary)
        os.close(handle)
        rename_or_copy_blob(path, target, chmod=False)
        return target

    def keep(self, oid: bytes, tid: bytes, path: str) -> None:
        """The transaction has finished: what it has sent is cached as this revision."""
        size = os.stat(path).st_size
        self._rename(path, oid, tid)
        self._grown(size)

    def discard(self, path: str) -> None:
        """Forget a file that was taken, if it is still there."""
        with contextlib.suppress(OSError):
            os.unlink(path)

    # ---- reading

    def get(self, oid: bytes, tid: bytes, fetch: Fetch) -> str:
        """The path of a revision's file, which the server is asked for if it is not there."""
        path = self._path(oid, tid)
        try:
            os.utime(path)  # the clock of "used longest ago"
            return path
        except FileNotFoundError:
            pass
        key = oid, tid
        with self._mutex:
            underway = self._fetching.get(key)
            if underway is None:
                self._fetching[key] = mine = threading.Event()
        if underway is not None:
            underway.wait()  # ended by the thread that fetches
            if os.path.exists(path):
                return path
            return self.get(oid, tid, fetch)
        try:
            fetch(oid, tid)
        finally:
            with self._mutex:
                del self._fetching[key]
            mine.set()
        if not os.path.exists(path):
            raise POSKeyError(f'the server has no blob {oid_repr(oid)} {tid_repr(tid)}', oid, tid)
        return path

    def open(self, oid: bytes, tid: bytes, fetch: Fetch, blob: Any = None) -> IO[bytes]:
        """A revision's file, for reading; it is not removed while it is open."""
        for _ in range(ATTEMPTS):
            try:
                file = _open(self.get(oid, tid, fetch), blob)
            except FileNotFoundError:
                continue  # removed in between, by another process
            fcntl.flock(file, fcntl.LOCK_SH)
            return file
        raise ClientStorageError(
            f'blobs vanish from the cache folder {self.folder} as soon as they are fetched;'
            ' is blob_cache_size too small for what is used at a time?')

    # ---- receiving: by the thread that reads from the connection, in the order of the wire

    def begin(self, oid: bytes, tid: bytes) -> None:
        """A blob begins to arrive."""
        self._drop(oid, tid)
        self._arriving[oid, tid] = tempfile.NamedTemporaryFile(
            prefix='zeo-', suffix='.download', dir=self.temporary, buffering=0, delete=False)

    def add(self, oid: bytes, tid: bytes, data: bytes) -> None:
        """A piece of it."""
        file = self._arriving.get((oid, tid))
        if file is None:
            return  # it could not be begun, or written to; the one who asked finds no file
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[file.write(rest):]
        except OSError as error:
            logger.error('The blob cache %s cannot be written to: %s', self.folder, error.strerror)
            self._drop(oid, tid)

    def complete(self, oid: bytes, tid: bytes) -> None:
        """All of it is there."""
        file = self._arriving.pop((oid, tid), None)
        if file is not None:
            size = file.tell()
            file.close()
            self._rename(file.name, oid, tid)
            self._grown(size)

    def _drop(self, oid: bytes, tid: bytes) -> None:
        file = self._arriving.pop((oid, tid), None)
        if file is not None:
            file.close()
            self.discard(file.name)

    def lost(self) -> None:
        """The connection has ended: what was arriving will not be completed."""
        for oid, tid in list(self._arriving):
            self._drop(oid, tid)

    # ---- making room

    def _grown(self, size: int) -> None:
        if self._step is None:
            return
        self._arrived += size
        if self._arrived < self._step:
            return
        with self._mutex:
            if self._sweeper is None or not self._sweeper.is_alive():
                self._arrived = 0
                self._sweeper = threading.Thread(
                    target=self.sweep, name='zeo blob cache', daemon=True)
                self._sweeper.start()

    def _files(self) -> Iterator[tuple[float, int, str]]:
        """Time of last use, size and path of each cached blob."""
        with os.scandir(self.folder) as folders:
            for folder in folders:
                if len(folder.name) == 2 and folder.is_dir():
                    with os.scandir(folder.path) as files:
                        for file in files:
                            with contextlib.suppress(FileNotFoundError):
                                found = file.stat()
                                yield found.st_mtime, found.st_size, file.path

    def sweep(self) -> None:
        """Remove what was used longest ago until the rest is small enough."""
        assert self._size is not None and self._step is not None
        files = sorted(self._files())
        excess = sum(size for _, size, _ in files) - max(self._size - self._step, 0)
        latest = time.time() - JUST_USED
        for used, size, path in files:
            if excess <= 0 or used > latest:
                break
            if self._remove_if_unused(path):
                excess -= size

    @staticmethod
    def _remove_if_unused(path: str) -> bool:
        try:
            with open(path, 'rb', buffering=0) as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(path)
                return True
        except OSError:
            return False  # open, or gone already

    def _remove_leftovers(self) -> None:
        oldest = time.time() - LEFT_BEHIND
        with os.scandir(self.temporary) as files:
            for file in files:
                with contextlib.suppress(OSError):
                    if file.name.startswith('zeo-') and file.stat().st_mtime < oldest:
                        os.unlink(file.path)

    def close(self) -> None:
        """Wait until no thread is at work."""
        self.lost()
        with self._mutex:
            sweeper = self._sweeper
        if sweeper is not None:
            sweeper.join()


def _open(path: str, blob: Any) -> IO[bytes]:
    """Open a file for a `ZODB.blob.Blob`, which keeps track of it, or for nobody (None)."""
    if blob is None:
        return open(path, 'rb')
    file: IO[bytes] = BlobFile(path, 'r', blob)
    return file
