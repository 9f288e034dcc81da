"""What a transaction will put into the cache when it finishes.

Records are remembered in memory first and in a temporary file when there are many, and only as many
as the cache could hold: of what goes beyond, the cache only learns that it has changed.
"""

import tempfile
from collections.abc import Iterator
from typing import IO

from zeo.client.cache import Cache

__all__ = ['Updates']

#: Bytes of records that one transaction keeps in memory.
MEMORY = 4 * 1024 * 1024


class Updates:
    """The objects a transaction changes, and their new records as far as they are known and wanted.

    Used by the committing thread up to `tpc_finish`, then by the thread that reads the reply.
    """

    def __init__(self, limit: int, memory: int = MEMORY) -> None:
        self._limit = limit  # bytes of records worth remembering
        self._at_hand = min(limit, memory)  # bytes of records in memory
        self._size = 0
        # by oid: the record, or where it is in the file, or None: not to be cached
        self._changes: dict[bytes, bytes | tuple[int, int] | None] | None = {}
        self._file: IO[bytes] | None = None
        self._written = 0

    def store(self, oid: bytes, data: bytes) -> None:
        """The object's new record; it replaces an earlier one of this transaction."""
        size = self._size + len(data)
        if size <= self._at_hand:
            self._size = size
            self._set(oid, data)
        else:
            self._set(oid, self._kept(data))

    def change(self, oid: bytes) -> None:
        """The object changes, and its new record is not known here."""
        self._set(oid, None)

    def _set(self, oid: bytes, record: bytes | tuple[int, int] | None) -> None:
        if self._changes is None:
            raise ValueError('these updates are closed')
        self._changes[oid] = record

    def _kept(self, data: bytes) -> tuple[int, int] | None:
        if self._size + len(data) > self._limit:
            return None
        self._size += len(data)
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix='zeo-updates-')
        self._file.write(data)
        self._written += len(data)
        return self._written - len(data), len(data)

    def apply(self, cache: Cache, tid: bytes) -> None:
        """The transaction has become ``tid``: end what it changed, and store what it brings.

        Raises `ValueError` if this was closed, also in the middle by another thread: then the cache
        must not be taken for valid as of ``tid``.
        """
        changes = self._changes
        if changes is None:
            raise ValueError('these updates are closed')
        cache.renew(tid, changes, lambda: self._records(changes))

    def _records(self, changes: dict[bytes, bytes | tuple[int, int] | None]
                 ) -> Iterator[tuple[bytes, bytes]]:
        for oid, record in changes.items():
            if isinstance(record, tuple):
                assert self._file is not None
                start, length = record
                self._file.seek(start)
                record = self._file.read(length)
            if record is not None:
                yield oid, record

    def close(self) -> None:
        """Forget everything; may be called again."""
        self._changes = None
        if self._file is not None:
            self._file.close()
