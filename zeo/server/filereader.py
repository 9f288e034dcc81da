"""Current records of a FileStorage, each read by one system call.

`FileStorage.loadBefore` takes several: a seek, and one read or two; for each of them the thread lets go of
Python's global lock, and has to wait for it afterwards if others load at the same time.  What nearly all
loads want, the current revision of an object, is at the place that the index names, with a length that says
itself: so it is read with pread(2), from the same place of the same file, and everything else (former
revisions, what was undone, what is not there or not as it should be) is left to the storage.

*Why this reads nothing older than `loadBefore` does.*  Index and file belong together until a pack puts new
ones in their places, under a lock that excludes commits and readers; both are taken while no pack can do
that.  The storage's index is looked at first, at each load.  If it is the one we have, then the place that
it names for an object is that of the last revision that was finished before, and what was written there is
not changed any more.  If a pack ends after that look, what is read is what was current before the pack's
end, when this load had begun; no transaction finishes between the two.  The old file can be read as long as
somebody has it open.
"""

import contextlib
import os
from collections.abc import Callable
from struct import Struct
from typing import Any

from ZODB.FileStorage import FileStorage
from ZODB.FileStorage.format import DATA_HDR
from ZODB.FileStorage.format import DATA_HDR_LEN

#: Oid, tid, where the previous revision and the transaction are, two zeros, the length of the record (or 0).
_HEADER = Struct(DATA_HDR)
assert _HEADER.size == DATA_HDR_LEN

#: So many bytes are read at first: longer records take another read.
_FIRST = 4096

Found = tuple[bytes, bytes, bytes | None]


class _Place:
    """An index of a storage, and the file that it is about; closed when nobody reads from it any more."""

    __slots__ = ('index', 'number')

    def __init__(self, storage: Any) -> None:
        with storage._files.get():  # no pack ends meanwhile
            self.number = os.open(storage._file_name, os.O_RDONLY | getattr(os, 'O_BINARY', 0))
            self.index = storage._index

    def __del__(self) -> None:
        if hasattr(self, 'number'):
            os.close(self.number)


class FileReader:
    """Loads for any number of threads."""

    def __init__(self, storage: Any) -> None:
        self._storage = storage
        self._files = storage._files
        self._otherwise = storage.loadBefore
        self._place = _Place(storage)

    def load_before(self, oid: bytes, tid: bytes) -> Found | None:
        """What ``loadBefore`` of the storage says, and raises."""
        place = self._place
        storage = self._storage
        try:
            if storage._index is not place.index:
                place = self._place = _Place(storage)
            at = place.index[oid]
            data = _pread(place.number, _FIRST, at)
            its_oid, start, _, _, versions, length = _unpack(data)
            if its_oid == oid and start < tid and length and not versions and not self._files.closed:
                if length <= _FIRST - DATA_HDR_LEN:
                    record = data[DATA_HDR_LEN:DATA_HDR_LEN + length]
                else:
                    record = _pread(place.number, length, at + DATA_HDR_LEN)
                if len(record) == length:
                    return record, start, None
        except Exception:
            pass  # the storage knows better what is wrong
        found: Found | None = self._otherwise(oid, tid)
        return found


_pread: Any = getattr(os, 'pread', None)
_unpack = _HEADER.unpack_from


def load_before_of(storage: Any) -> Callable[[bytes, bytes], Found | None] | None:
    """What can be called instead of the storage's ``loadBefore``, if that is a plain FileStorage."""
    if type(storage) is FileStorage and 'loadBefore' not in vars(storage) and _pread is not None:
        with contextlib.suppress(AttributeError, OSError):  # a later ZODB may keep index and files elsewhere
            return FileReader(storage).load_before
    return None
