"""A transaction's operations, kept from the time they arrive until vote replays them."""

import contextlib
import pickle
import tempfile
from collections.abc import Iterator
from typing import IO
from typing import Any

#: What is kept in memory, in bytes; beyond that a temporary file takes everything.
IN_MEMORY = 4 * 1024 * 1024

#: What an operation costs beside its record, roughly.
OVERHEAD = 300

#: The name of a method of `zeo.server.replay.Replay` and its arguments.
Operation = tuple[str, tuple[Any, ...]]


class Staging:
    """Operations in the order of arrival: in memory first, in an unnamed temporary file when large.

    ``size`` is roughly the number of bytes staged.  Belongs to one transaction, which sees to it that
    one thread at a time uses it.
    """

    def __init__(self, in_memory: int = IN_MEMORY) -> None:
        self.size = 0
        self._in_memory = in_memory
        self._operations: list[Operation] = []  # those not yet in the file
        self._held = 0  # their size
        self._file: IO[bytes] | None = None

    def append(self, operation: Operation, size: int = 0) -> None:
        """Keep an operation whose record has ``size`` bytes.  `OSError` if the disk is full."""
        self._operations.append(operation)
        self._held += OVERHEAD + size
        self.size += OVERHEAD + size
        if self._held > self._in_memory:
            self._spill()

    def _spill(self) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix='zeo-', suffix='.staging')
        self._file.seek(0, 2)
        # One after the other, so that reading them back takes no more memory than the largest.
        for operation in self._operations:
            pickle.dump(operation, self._file, pickle.HIGHEST_PROTOCOL)
        self._operations.clear()
        self._held = 0

    def __iter__(self) -> Iterator[Operation]:
        """The operations from the first to the last; may be done again (client-side resolution)."""
        if self._file is not None:
            self._spill()
            end = self._file.tell()
            self._file.seek(0)
            while self._file.tell() < end:
                # This process has written it: the restrictions on what comes from the network
                # were applied before.
                yield pickle.load(self._file)
        yield from self._operations

    def close(self) -> None:
        """Forget everything, temporary file included."""
        self._operations.clear()
        if self._file is not None:
            with contextlib.suppress(OSError):  # what is still buffered may not fit on the disk
                self._file.close()
            self._file = None
