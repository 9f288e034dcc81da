"""A client's object cache: revisions that need not be asked for, valid up to `last_tid`."""

import logging
import os
import threading
import zlib
from collections.abc import Iterable, Iterator
from urllib.parse import quote

from zeo.client.cacheindex import OPEN, REVISION, Index

__all__ = ['Cache', 'cache_path', 'open_cache']

logger = logging.getLogger(__name__)

z64 = bytes(8)


def cache_path(storage: str, client: str | None = None, var: str | None = None) -> str | None:
    """Where the persistent cache of that storage and client is; None: nobody asked for one.

    `client` defaults to the environment variable ``ZEO_CLIENT``, `var` to the directory ``var`` of
    ``INSTANCE_HOME`` if that is set, else to the current directory.  Whatever the names contain,
    the file is in that directory, and different names give different files.
    """
    client = client or os.environ.get('ZEO_CLIENT')
    if not client:
        return None
    if var is None:
        home = os.environ.get('INSTANCE_HOME')
        var = os.path.join(home, 'var') if home else os.getcwd()
    return os.path.join(var, f"{quote(client, safe='')}@{quote(storage, safe='')}.zec")


class Cache:
    def __init__(self) -> None:
        self.path: str | None = None
        self.last_tid = z64
        self._mutex = threading.RLock()
        self._index = Index()
        self._data: dict[tuple[bytes, bytes], bytes] = {}

    def __len__(self) -> int:
        with self._mutex:
            return len(self._index)

    def load(self, oid: bytes) -> tuple[bytes, bytes] | None:
        """The current revision: record and start tid."""
        with self._mutex:
            revision = self._index.current.get(oid)
            if revision is None:
                return None
            return self._data[oid, revision[:8]], revision[:8]

    def loadBefore(self, oid: bytes, tid: bytes) -> tuple[bytes, bytes, bytes | None] | None:
        """The revision that was current before `tid`: record, start tid, end tid (None: current)."""
        with self._mutex:
            revision = self._index.before(oid, tid)
            if revision is None:
                return None
            start, end, _, _ = REVISION.unpack(revision)
            return self._data[oid, start], start, None if end == OPEN else end

    def store(self, oid: bytes, start: bytes, end: bytes | None, data: bytes) -> None:
        """Keep a revision as the server told it; what is known or outdated already is ignored."""
        with self._mutex:
            if self._index.wants(oid, start, end or OPEN):
                self._data[oid, start] = data
                self._index.put(oid, start, end or OPEN, zlib.crc32(data), 0)

    def invalidate(self, tid: bytes | None, oids: Iterable[bytes]) -> None:
        """End the current revisions of `oids` at `tid`; None: drop them, they ended at an unknown time."""
        with self._mutex:
            if tid is None:
                self._index.drop(oids)
            else:
                self._index.invalidate(tid, oids)

    def drop(self, oids: Iterable[bytes]) -> None:
        """Forget the current revisions of `oids`."""
        self.invalidate(None, oids)

    def set_last_tid(self, tid: bytes) -> None:
        """The contents are valid up to `tid`; ValueError if that goes backwards."""
        if tid < self.last_tid:
            raise ValueError(f'last tid may not go back from {self.last_tid.hex()} to {tid.hex()}')
        self.last_tid = tid

    def clear(self, tid: bytes = z64) -> None:
        """Forget everything, start anew as of `tid`."""
        with self._mutex:
            self._index = Index()
            self._data = {}
            self.last_tid = tid

    def contents(self) -> Iterator[tuple[bytes, bytes, bytes | None]]:
        """All revisions that may be served, as of now: oid, start, end (None: current)."""
        with self._mutex:
            return iter(list(self._index.contents()))

    def suspect_all(self) -> None:
        """Serve no current revision until it is confirmed, or stored again."""
        with self._mutex:
            self._index.suspect_all()

    def suspects(self) -> Iterator[tuple[bytes, bytes]]:
        """What waits to be confirmed, as of now: oid and start."""
        with self._mutex:
            return iter([(oid, revision[:8]) for oid, revision in self._index.suspect.items()])

    def confirm(self, tid: bytes, oids: Iterable[bytes]) -> None:
        """The server says that the suspect revisions of `oids` are current as of `tid`."""
        with self._mutex:
            self._index.confirm(tid, oids)

    def abandon(self) -> None:
        """In a forked child: forget everything; the parent's file and its lock are not touched."""
        self.close()

    def close(self) -> None:
        with self._mutex:
            self._index = Index()
            self._data = {}


def open_cache(path: str | None, size: int, owner: str = '', strict: bool = False) -> Cache:
    return Cache()
