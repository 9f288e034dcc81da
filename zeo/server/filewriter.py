"""Small transactions of a FileStorage are put together in memory, not in its temporary file.

A FileStorage writes what is stored to a temporary file first, and copies it when it votes.  That takes two system
calls for each object and more, and for each of them the thread lets go of Python's global lock, for which it
has to wait again if others have something to do; all that under the commit lock, while everybody else who
commits waits.

*Why nothing can be lost.*  What is in the temporary file is not part of the database: a storage that starts
empties it.  The place is changed by the transaction that has just begun, when nothing is in either, and no
other one can begin before it has ended.  (Whoever commits to the same storage past its server, in the same process,
writes to where the server's last transaction was put together: to memory, as a rule.)
"""

import contextlib
import io
from typing import Any

from ZODB.FileStorage import FileStorage
from ZODB.FileStorage.FileStorage import TempFormatter

#: A transaction of so many bytes is put together in memory; as many may be kept until the next one.
SMALL = 4 * 1024 * 1024


class FileWriter:
    """Chooses where a FileStorage puts its transactions together.  ``begun`` is called with the commit lock."""

    def __init__(self, storage: Any) -> None:
        self._storage = storage
        self._on_disk = storage._tfile, storage._tfmt
        memory = io.BytesIO()
        self._in_memory = memory, TempFormatter(memory)

    def begun(self, size: int | None) -> None:
        """A transaction of about so many bytes (None: nobody knows) has begun, and nothing is stored yet."""
        file, formatter = self._in_memory if size is not None and size <= SMALL else self._on_disk
        file.truncate(0)  # it is at the beginning: a storage that begins rewinds what was in use before
        self._storage._tfile, self._storage._tfmt = file, formatter

    def close(self) -> None:
        """The storage is about to be closed, and closes its file."""
        self._storage._tfile, self._storage._tfmt = self._on_disk


def writer_of(storage: Any) -> FileWriter | None:
    """For a plain FileStorage that is written to."""
    if type(storage) is FileStorage:
        with contextlib.suppress(AttributeError):  # it is read only; or a later ZODB does it in another way
            return FileWriter(storage)
    return None
