"""One pack at a time, whose progress can be seen, and that can be stopped while it has changed nothing.

How far a pack is, only a FileStorage lets us see: it calls for the references of each object that it
finds to be alive, and then reads its file from the beginning to the end.  At both places the pack can
be stopped, and leaves nothing behind, until the packed file takes the place of the old one.
"""

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from typing import Any

from ZODB.FileStorage import FileStorage
from ZODB.FileStorage.fspack import FileStoragePacker
from ZODB.POSException import StorageError

from zeo.wire.records import references

logger = logging.getLogger(__name__)


class Stopped(OSError):
    """The pack was stopped.  An `OSError`, after which the packer removes what it has written."""


class Packing:
    """The packs of one storage, of which there is at most one at a time."""

    def __init__(self, name: str, storage: Any) -> None:
        self._name = name
        self._storage = storage
        self._file_storage = file_storage(storage)
        self._busy = threading.Lock()  # held by the one pack in progress
        self._since = 0.0  # time.time()
        self._phase = ''
        self._done = 0.0
        self._stop = False
        self._closed = False

    def locked(self) -> bool:
        """Whether a pack is in progress."""
        return self._busy.locked()

    def __enter__(self) -> None:
        """Begin a pack; `StorageError` if there is one already."""
        if not self._busy.acquire(blocking=False):
            since = time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(self._since))
            raise StorageError(f'storage {self._name} is being packed already, since {since}')
        if self._closed:
            self._busy.release()
            raise StorageError(f'storage {self._name} is not packed, since the server is closing')
        self._since, self._phase, self._done, self._stop = time.time(), 'packing', 0.0, False

    def __exit__(self, *exc: object) -> None:
        self._busy.release()

    def run(self, pack_time: float) -> None:
        """Pack the storage; raises what the storage raises, `StorageError` if it was stopped."""
        found = self._file_storage
        # Somebody's own packer is left alone: nothing is known about it.
        watch = found is not None and getattr(found.packer, '__func__', found.packer) is FileStorage.packer
        if watch:
            found.packer = self._packer
        try:
            self._storage.pack(pack_time, self._references if watch else references)
        except Stopped:
            logger.info('storage %s: the pack was stopped', self._name)
            raise StorageError(f'the pack of storage {self._name} was stopped;'
                               ' the database is as it was') from None
        finally:
            if watch:
                del found.packer

    def _packer(self, storage: Any, references: Callable[..., Any], stop: bytes, gc: bool) -> Any:
        """In place of `FileStorage.packer`, which does the same without being watched."""
        packer = _Packer(storage, references, stop, gc)
        packer.watch = self._copying
        self._phase = 'looking for what is alive'
        try:
            end = packer.pack()
            return None if end is None else (end, packer.index)
        finally:
            packer.close()

    def _references(self, record: bytes, oids: list[bytes] | None = None) -> list[bytes]:
        self._step(self._done + 1 / max(len(self._storage), 1))
        return references(record, oids)

    def _copying(self, share: float) -> None:
        if self._phase != 'copying':
            self._phase, self._done = 'copying', 0.0
        self._step(share)

    def _step(self, done: float) -> None:
        self._done = done
        if self._stop or self._closed:
            raise Stopped

    def stop(self) -> bool:
        """Have the pack in progress stopped; False if there is none, or none that can be."""
        self._stop = self.locked() and self._file_storage is not None
        return self._stop

    def close(self) -> None:
        """Have the pack in progress stopped, if that is possible; from now on there is none."""
        self._closed = True

    @property
    def progress(self) -> dict[str, Any] | None:
        """Of the pack in progress: ``since``, ``phase``, ``share`` (0 to 1, None if it cannot be told)."""
        if not self.locked():
            return None
        share: float | None = None
        if self._phase != 'packing':
            share = (min(self._done, 1.0) + (self._phase == 'copying')) / 2
        return {'since': self._since, 'phase': self._phase, 'share': share}

    @property
    def room(self) -> int | None:
        """How many bytes a packed file may take on the disk; None if that cannot be told."""
        if self._file_storage is None:
            return None
        path = self._file_storage.getName()
        try:
            free = shutil.disk_usage(os.path.dirname(os.path.abspath(path))).free
        except OSError:
            return None
        try:
            return free + os.stat(path + '.old').st_size  # which a pack removes before anything else
        except OSError:
            return free


class _Packer(FileStoragePacker):  # type: ignore[misc]
    watch: Callable[[float], None]

    def _read_txn_header(self, pos: int, tid: bytes | None = None) -> Any:
        self.watch(pos / max(self.file_end, 1))
        return super()._read_txn_header(pos, tid)


def file_storage(storage: Any) -> Any:
    """The FileStorage that keeps this storage's records, perhaps wrapped; None if it is another one."""
    while not isinstance(storage, FileStorage):
        if hasattr(storage, 'changes') or not hasattr(storage, 'base'):
            return None
        storage = storage.base
    return storage
