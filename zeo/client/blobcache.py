"""A folder in which a client keeps the blobs that it uses.

A blob's revision never changes, so a file that has its final name is right for ever.  Files get their
final name by a rename when they are complete: a crash leaves only temporary ones behind, in ``tmp``.
Several processes may share one cache folder; two that want the same blob at the same time both fetch
it, and the second rename replaces the first file by an equal one.

When more than ``size`` bytes are cached, those used longest ago go first, but none that is open (its
reader holds a shared `flock`) and none that was written or used in the last moments.

The folder is laid out as ZEO's blob caches are, so one that is there can be taken over.
"""

import contextlib
import errno
import fcntl
import logging
import os
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import IO
from typing import Any
from typing import NamedTuple

from ZODB.blob import BLOB_SUFFIX
from ZODB.blob import LAYOUT_MARKER
from ZODB.blob import READ_PERMS
from ZODB.blob import FilesystemHelper
from ZODB.POSException import POSKeyError
from ZODB.utils import oid_repr
from ZODB.utils import tid_repr

from zeo.client.arrivals import Arrivals
from zeo.client.arrivals import unlink
from zeo.client.blobfiles import CacheLayout
from zeo.client.blobfiles import Fetch
from zeo.client.blobfiles import explained
from zeo.client.blobfiles import layout_of
from zeo.client.blobfiles import open_file
from zeo.client.blobfiles import take_file
from zeo.errors import ClientStorageError

logger = logging.getLogger(__name__)

#: Files that were written or used within so many seconds are not removed to make room.
JUST_USED = 10.0

#: Temporary files that are older than this, in seconds, were left behind by a crash.
LEFT_BEHIND = 24 * 3600.0

#: How long before a machine went down, in seconds, data may have been written that is not on its disk.
UNSETTLED = 600.0

#: Changes when the machine is started.
BOOT_ID = '/proc/sys/kernel/random/boot_id'

#: The file in a cache folder that says since when the machine has not been down.
BOOT_MARKER = '.boot'

#: How often a blob is fetched again that somebody else removed in the moment it was to be opened.
ATTEMPTS = 10

#: Who waits for a blob that another thread fetches looks this often, in seconds, whether that one was interrupted
#: before it could say that it has ended.
LAST_LOOK = 1.0


class _CacheHelper(FilesystemHelper):  # type: ignore[misc]
    """ZODB's helper, for those who look for it in a storage."""

    def __init__(self, folder: str) -> None:
        self.base_dir = folder + os.sep
        self.temp_dir = os.path.join(folder, 'tmp')
        self.layout = CacheLayout()
        self.layout_name = self.layout.name


class _File(NamedTuple):
    """A cached blob, as a look at the folder found it."""

    used: float
    changed: float
    size: int
    path: str


class _Fetching(threading.Event):
    """A thread fetches a blob; set when it has ended, whatever came of it."""

    def __init__(self) -> None:
        super().__init__()
        self.thread = threading.get_ident()


class BlobCache:
    """A folder with the blobs that were used, of at most about ``size`` bytes (None: no limit).

    It is looked after when ``check`` percent of that have come in.  Raises `ClientStorageError`, which
    names the folder, if it cannot be used.
    """

    shared = False

    def __init__(self, folder: str, size: int | None = None, check: int = 10) -> None:
        if not 0 <= check < 100:
            raise ValueError(f'blob_cache_size_check is a percentage below 100, not {check}')
        self.folder = os.path.abspath(folder)
        self.helper = _CacheHelper(self.folder)
        self.temporary: str = self.helper.temp_dir
        self._size = size
        self._step = 0 if size is None else size * check // 100
        self._arrived = 0  # bytes since the folder was looked after; may be a little wrong
        self._set_up()
        with explained(f'the blob cache folder {self.folder} cannot be used'):
            self._prepare()
            self._remove_leftovers()
            self._remove_unsettled()
        self._grown(self._step)

    def _set_up(self) -> None:
        # Guards `_sweeper`; a leaf.  Reentrant, because a destructor that interrupts its holder may load a blob.
        self._mutex = threading.RLock()
        # Blobs on their way; an entry is the right to fetch, and to remove it.
        self._fetching: dict[tuple[bytes, bytes], _Fetching] = {}
        self._sweeper: threading.Thread | None = None
        self._closed = threading.Event()
        self._arrivals: Arrivals | None = None

    def _prepare(self) -> None:
        with contextlib.suppress(FileExistsError):  # what else it may be shows when it is used
            os.makedirs(self.folder, 0o700)
        layout = layout_of(self.folder)
        if layout is None:
            if any(not name.startswith('.') and name != 'tmp' for name in os.listdir(self.folder)):
                raise OSError(errno.EINVAL, 'it contains something else; give an empty folder')
            self._write(LAYOUT_MARKER, CacheLayout.name)
        elif layout != CacheLayout.name:
            raise OSError(errno.EINVAL, 'it is the folder of a storage, not a cache; give another one,'
                          ' or shared_blob_dir if the server uses just this folder')
        self._make_folder(self.temporary)
        if not os.access(self.temporary, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, 'it is not writable')

    def _make_folder(self, path: str) -> None:
        """Make a folder within ours, for the same users."""
        try:
            os.mkdir(path)
        except FileExistsError:
            return
        os.chmod(path, stat.S_IMODE(os.stat(self.folder).st_mode))

    def _write(self, name: str, content: str) -> None:
        handle, path = tempfile.mkstemp(prefix='.zeo-', dir=self.folder)
        with open(handle, 'w') as file:
            file.write(content)
            file.flush()
            os.fsync(handle)
        os.chmod(path, 0o644)
        os.replace(path, os.path.join(self.folder, name))

    # ---- files

    def _path(self, oid: bytes, tid: bytes) -> str:
        path: str = self.helper.getBlobFilename(oid, tid)
        return path

    def _put_in_place(self, path: str, oid: bytes, tid: bytes) -> None:
        """Give a complete file its final name; who may read the folder may read it."""
        size = os.stat(path).st_size
        target = self._path(oid, tid)
        folder = os.path.dirname(target)
        self._make_folder(folder)
        os.chmod(path, stat.S_IRUSR | os.stat(folder).st_mode & READ_PERMS)
        os.replace(path, target)
        self._grown(size)

    def take(self, oid: bytes, path: str) -> str:
        with explained(f'a blob cannot be put into {self.temporary}'):
            return take_file(path, self.temporary)

    def keep(self, oid: bytes, tid: bytes, path: str) -> None:
        try:
            self._put_in_place(path, oid, tid)
        except OSError as error:
            logger.error('%s: a blob is not kept: %s', self.folder, error)  # the server has it

    def discard(self, path: str) -> None:
        unlink(path)

    # ---- reading

    def get(self, oid: bytes, tid: bytes, fetch: Fetch) -> str:
        path = self._path(oid, tid)
        key = oid, tid
        attempts = 0
        while not self._use(path):
            mine = _Fetching()
            try:
                underway = self._fetching.setdefault(key, mine)
                if underway is not mine:
                    if underway.thread == threading.get_ident():
                        raise ClientStorageError('a signal handler or destructor wants the blob whose fetching it has'
                                                 ' interrupted')
                    while self._fetching.get(key) is underway and not underway.wait(LAST_LOOK):
                        pass
                    continue
                if self._use(path):
                    break  # another thread has just fetched it
                fetch(oid, tid)
                arrivals = self._arrivals
                failure = None if arrivals is None else arrivals.failures.pop(key, None)
            finally:  # whatever has interrupted us, also before we knew that it is ours
                if key in self._fetching and self._fetching[key] is mine:
                    del self._fetching[key]
                mine.set()
            if failure is not None:
                raise ClientStorageError(f'the blob cache folder {self.folder} cannot be written to:'
                                         f' {failure.strerror or failure}') from failure
            attempts += 1  # if it is not there now, another process has removed it to make room
            if attempts == ATTEMPTS:
                raise POSKeyError(f'No blob {oid_repr(oid)} {tid_repr(tid)} in {self.folder}', oid, tid)
        return path

    @staticmethod
    def _use(path: str) -> bool:
        """Whether the file is there; it is noted that it is used."""
        try:
            found = os.stat(path)
        except FileNotFoundError:
            return False
        if abs(time.time() - found.st_atime) > 1:
            with contextlib.suppress(OSError):  # it may be another user's
                os.utime(path, ns=(time.time_ns(), found.st_mtime_ns))
        return True

    def open(self, oid: bytes, tid: bytes, fetch: Fetch, blob: Any = None) -> IO[bytes]:
        for _ in range(ATTEMPTS):
            try:
                file = open_file(self.get(oid, tid, fetch), blob)
            except FileNotFoundError:
                continue  # removed in between, by another process
            with contextlib.suppress(OSError):  # not every network file system has it
                fcntl.flock(file, fcntl.LOCK_SH)
            return file
        raise ClientStorageError(
            f'blobs vanish from the cache folder {self.folder} as soon as they are fetched')

    def arrivals(self) -> Arrivals:
        if self._arrivals is not None:
            self._arrivals.lost()
        self._arrivals = Arrivals(self.folder, self.temporary, self._put_in_place)
        return self._arrivals

    # ---- making room

    def _grown(self, size: int) -> None:
        """So many bytes have come in."""
        if self._size is None:
            return
        self._arrived += size
        if self._arrived < self._step:
            return
        with self._mutex:
            if self._sweeper is None or not self._sweeper.is_alive():
                self._arrived = 0
                self._sweeper = threading.Thread(
                    target=self._make_room, name='zeo blob cache', daemon=True)
                with contextlib.suppress(RuntimeError):  # no more threads now: next time
                    self._sweeper.start()

    def _make_room(self) -> None:
        try:
            while not self.sweep() and not self._closed.wait(JUST_USED):
                pass
        except OSError as error:
            logger.error('no room can be made in %s: %s', self.folder, error)

    def _files(self) -> Iterator[_File]:
        with os.scandir(self.folder) as folders:
            for folder in folders:
                if folder.name.isdecimal() and folder.is_dir():
                    with os.scandir(folder.path) as files:
                        for file in files:
                            if file.name.endswith(BLOB_SUFFIX):
                                with contextlib.suppress(FileNotFoundError):
                                    found = file.stat()
                                    yield _File(max(found.st_atime, found.st_mtime), found.st_ctime,
                                                found.st_size, file.path)

    def sweep(self) -> bool:
        """Remove what was used longest ago until the rest is small enough; False if that is in use."""
        assert self._size is not None
        files = sorted(self._files())
        excess = sum(file.size for file in files) - self._size
        if excess <= 0:
            return True
        excess += self._step
        latest = time.time() - JUST_USED
        for file in files:
            if excess <= 0 or file.used > latest:
                break
            if self._remove_if_unused(file.path):
                excess -= file.size
        return excess <= self._step

    @staticmethod
    def _remove_if_unused(path: str) -> bool:
        try:
            with open(path, 'rb', buffering=0) as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(path)
        except FileNotFoundError:
            pass  # another process makes room, too
        except OSError:
            return False
        return True

    def _remove_leftovers(self) -> None:
        oldest = time.time() - LEFT_BEHIND
        with os.scandir(self.temporary) as files:
            for file in files:
                with contextlib.suppress(OSError):
                    if file.name.startswith('zeo-') and file.stat().st_mtime < oldest:
                        os.unlink(file.path)

    def _remove_unsettled(self) -> None:
        """After the machine was started again: remove what came in last before it went down.

        The names of files may have reached the disk before their data.  What is removed without need
        will be fetched again.
        """
        try:
            with open(BOOT_ID) as file:
                boot = file.read()
        except OSError:
            return  # another kind of system, on which nothing better is known
        marker = os.path.join(self.folder, BOOT_MARKER)
        if os.path.exists(marker):  # else the folder is new, or was ZEO's
            with open(marker) as file:
                if file.read() == boot:
                    return
            files = list(self._files())
            last = max((file.changed for file in files), default=0.0)
            for cached in files:
                if cached.changed > last - UNSETTLED:
                    unlink(cached.path)
        self._write(BOOT_MARKER, boot)

    # ---- the end

    def abandon(self) -> None:
        if self._arrivals is not None:
            self._arrivals.abandon()
        self._set_up()

    def close(self) -> None:
        self._closed.set()
        if self._arrivals is not None:
            self._arrivals.lost()
        with self._mutex:
            sweeper = self._sweeper
        if sweeper is not None and sweeper.ident is not None:
            sweeper.join()
