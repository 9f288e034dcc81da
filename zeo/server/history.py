"""What a storage's own record of its transactions tells: what they changed, and whether there is a certain one."""

import contextlib
import time
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

from ZODB.POSException import StorageError

#: How long in seconds an iterator is tried to be had of a file whose end is being written.
PATIENCE = 5.0


class History:
    """The transactions of a storage; ``method`` finds its method of some name, or raises `Unsupported`."""

    def __init__(self, method: Callable[[str], Any]) -> None:
        self._method = method

    def iterator(self, start: bytes | None, stop: bytes | None) -> Iterator[Any]:
        """Over the transactions from ``start`` to ``stop``; `Unsupported` if the storage has no iterators.

        A FileStorage finds where to start from the end of its file, and raises `ValueError` if a transaction is just
        being written there: then it is asked again.
        """
        iterator = self._method('iterator')
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return iter(iterator(start, stop))
            except ValueError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(0.01)

    @contextlib.contextmanager
    def _transactions(self, start: bytes, stop: bytes | None) -> Iterator[Any]:
        """An iterator over transactions of the storage, with its file closed in any case."""
        transactions = self.iterator(start, stop)
        try:
            yield transactions
        finally:
            close = getattr(transactions, 'close', None)
            if close is not None:
                close()

    def changed(self, tid: bytes, last_tid: bytes) -> list[bytes] | None:
        """Which objects the transactions after ``tid`` changed, up to ``last_tid``; None if there is no ``tid``."""
        changed: dict[bytes, None] = {}
        with self._transactions(tid, last_tid) as transactions:
            first = next(transactions, None)
            if first is None or first.tid != tid:
                return None  # the client has seen another past, see `Publisher.since`
            for transaction in transactions:
                changed.update((record.oid, None) for record in transaction)
        return list(changed)

    def has(self, tid: bytes) -> bool:
        """Whether there is a transaction ``tid``.  `StorageError` if it may have been packed away."""
        with self._transactions(tid, None) as transactions:
            first = next(transactions, None)
        if first is None:
            return False
        if first.tid != tid and first.status == 'p':  # what came before it may have been removed
            raise StorageError(f'whether transaction {tid.hex()} is committed cannot be known any more: it may have'
                               ' been packed away')
        return bool(first.tid == tid)
