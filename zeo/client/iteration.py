"""Iterators that live in the server, as ZODB wants to see them.

They belong to one connection and end with it.  Those that are dropped before their end are reported to
the server at some later time: whoever drops them may be a destructor, which must not call.
"""

import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any

from ZODB.BaseStorage import DataRecord
from ZODB.BaseStorage import TransactionRecord

from zeo.client.channel import Channel
from zeo.errors import ClientDisconnected
from zeo.errors import ProtocolError

__all__ = ['Dropped', 'Transactions']


class Dropped:
    """Iterators that nobody needs any more and the server does not know about."""

    def __init__(self) -> None:
        self._ids: deque[tuple[weakref.ref[Channel], int]] = deque()

    def add(self, channel: 'weakref.ref[Channel]', iterator_id: int) -> None:
        """May be called at any moment, also by the garbage collector."""
        self._ids.append((channel, iterator_id))

    def report(self, channel: Channel) -> None:
        """Tell the server about those of this connection; forget those of others."""
        ids = []
        while self._ids:
            try:
                its_channel, iterator_id = self._ids.popleft()
            except IndexError:
                break
            if its_channel() is channel:
                ids.append(iterator_id)
        if ids:
            channel.post('iterator_gc', (ids,))


class _Remote:
    """The client's end of an iterator in the server."""

    def __init__(self, channel: Channel, iterator_id: int, dropped: Dropped) -> None:
        self._channel = channel
        self._id = iterator_id
        self._at_drop = weakref.finalize(self, dropped.add, weakref.ref(channel), iterator_id)
        self._at_drop.atexit = False

    def ask(self, method: str, *args: Any) -> Any:
        if self._channel.ended is not None:
            raise ClientDisconnected('an iterator ends with its connection; start a new one')
        return self._channel.call(method, (self._id, *args))

    def next(self, method: str) -> Any:
        """The next item, or None at the end."""
        if not self._at_drop.alive:
            return None
        item = self.ask(method)
        if item is None:
            self._at_drop.detach()  # the server has disposed of it
        return item


class Transactions(Iterator[Any]):
    """`IStorageIteration.iterator`'s result."""

    def __init__(self, channel: Channel, start: bytes | None, stop: bytes | None,
                 dropped: Dropped) -> None:
        self._dropped = dropped
        self._channel = channel
        self._remote = _Remote(channel, channel.call('iterator_start', (start, stop)), dropped)

    def __next__(self) -> '_Transaction':
        item = self._remote.next('iterator_next')
        if item is None:
            raise StopIteration
        return _Transaction(self, *item)

    def records(self, tid: bytes) -> '_Records':
        """The records of the transaction that was returned last."""
        return _Records(_Remote(
            self._channel, self._remote.ask('iterator_record_start', tid), self._dropped))


class _Transaction(TransactionRecord):  # type: ignore[misc]
    """One transaction; its records can be had until the next transaction is."""

    def __init__(self, transactions: Transactions, tid: bytes, status: str, user: bytes,
                 description: bytes, extension: Any) -> None:
        if not isinstance(extension, dict):
            raise ProtocolError('a transaction whose extension is not a dictionary')  # bytes: a pickle
        super().__init__(tid, status, user, description, extension)
        self._transactions = transactions

    def __iter__(self) -> '_Records':
        return self._transactions.records(self.tid)


class _Records(Iterator[DataRecord]):
    """The records of one transaction."""

    def __init__(self, remote: _Remote) -> None:
        self._remote = remote

    def __next__(self) -> DataRecord:
        item = self._remote.next('iterator_record_next')
        if item is None:
            raise StopIteration
        return DataRecord(*item)
