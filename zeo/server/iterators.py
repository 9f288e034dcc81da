"""A client's iterators over transactions and their records: each may hold a file open, so they are counted."""

from collections.abc import Callable
from collections.abc import Iterator
from itertools import count
from typing import Any

from zeo.server.limits import Allowance

#: How many iterators over transactions, and over records, one client may have at a time.
ITERATORS = 200


class Iterators:
    """Those of one client, by number.  All clients share the ``allowance``.  Belongs to the session's thread."""

    __slots__ = ('_allowance', '_transactions', '_records', '_last', '_numbers')

    def __init__(self, allowance: Allowance) -> None:
        self._allowance = allowance
        self._transactions: dict[int, Iterator[Any]] = {}
        self._records: dict[int, Iterator[Any]] = {}
        self._last: dict[int, Any] = {}  # by number: the transaction that was returned last
        self._numbers = count()

    def start(self, make: Callable[[], Any]) -> int:
        """Iterate over the transactions that ``make`` gives; `ValueError` if there are too many that do."""
        if not self._allowance.take():
            raise ValueError(f'{self._allowance.most} iterators are in use, of all clients together; try later')
        try:
            return self._keep(self._transactions, make)
        except BaseException:
            self._allowance.give_back()
            raise

    def _keep(self, iterators: dict[int, Iterator[Any]], make: Callable[[], Any]) -> int:
        if len(iterators) >= ITERATORS:
            raise ValueError(f'{ITERATORS} iterators are in use; end some before starting others')
        number = next(self._numbers)
        iterators[number] = iter(make())
        return number

    def next(self, number: int) -> Any:
        """The next transaction; None after the last one, and then the iterator has ended.  `KeyError` if there is none."""
        try:
            transaction = self._last[number] = next(self._transactions[number])
        except StopIteration:
            self.end([number])
            return None
        return transaction

    def start_records(self, number: int, tid: bytes) -> int:
        """Iterate over the records of the transaction that an iterator has returned last, and that has this tid."""
        transaction = self._last[number]
        if transaction.tid != tid:
            raise ValueError('records are asked for of a transaction that is not the last one')
        return self._keep(self._records, lambda: transaction)

    def next_record(self, number: int) -> Any:
        """The next record, as `next`."""
        try:
            return next(self._records[number])
        except StopIteration:
            self.end([number])
            return None

    def end(self, numbers: list[int]) -> None:
        """End these, of either kind; others than there are do no harm."""
        for number in numbers:
            self._last.pop(number, None)
            self._records.pop(number, None)  # it has its transaction's file
            iterator = self._transactions.pop(number, None)
            if iterator is not None:
                self._allowance.give_back()
                close = getattr(iterator, 'close', None)
                if close is not None:
                    close()

    def end_all(self) -> None:
        """The client has left."""
        self.end([*self._transactions, *self._records])
