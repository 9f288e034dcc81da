"""What a gateway answers from snapshots: records, history, blobs, transactions one after the other.

All errors are plain (`zeo.server.backing`), and what a server has written into a transaction for its own use
is not shown.
"""

from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

from ZODB.BaseStorage import DataRecord
from ZODB.BaseStorage import TransactionRecord

from zeo.server.backing import Backing
from zeo.server.backing import View
from zeo.server.backing import older
from zeo.server.backing import plainly
from zeo.server.readers import Readers
from zeo.server.readers import load_before

#: For a client that comes back, so many changed objects are told; one that missed more verifies its cache.
MOST_CHANGED = 100_000

#: Under this key of a transaction's extension is the token by which its fate can be told.
TOKEN = '_zeo'


class Reading:
    """The part of a gateway that reads; any thread."""

    #: So many seconds a request waits for the database, and clients are kept without it.
    patience = 5.0

    _root: Any
    _backing: Backing
    _readers: Readers

    @property
    def announced(self) -> bytes:
        """The tid announced last."""
        raise NotImplementedError

    def catch_up(self, patience: float | None = None) -> None:
        raise NotImplementedError

    def _read(self, job: Callable[[View], Any], *, anew: bool = False) -> Any:
        return self._readers.read(job, self.patience, anew=anew)

    def loadBefore(self, oid: bytes, tid: bytes) -> tuple[bytes, bytes, bytes | None] | None:
        found: tuple[bytes, bytes, bytes | None] | None = self._read(lambda view: load_before(view, oid, tid))
        if found is not None and found[1] > self.announced:
            self.catch_up()  # so that it can be answered at once
        return found

    def load(self, oid: bytes, version: str = '') -> tuple[bytes, bytes]:
        found: tuple[bytes, bytes] = self._read(lambda view: view.storage.load(oid))
        return found

    def getTid(self, oid: bytes) -> bytes:
        return self.load(oid)[1]

    def loadSerial(self, oid: bytes, tid: bytes) -> bytes:
        # A client that resolves a conflict is told of a revision before that is announced.
        record: bytes = self._read(
            lambda view: self._backing.load_serial(view, oid, tid), anew=tid > self.announced)
        return record

    def history(self, oid: bytes, size: int = 1) -> list[dict[str, Any]]:
        return _without_tokens(self._read(lambda view: view.storage.history(oid, size=size)))

    def undoLog(self, first: int = 0, last: int = -20, filter: Any = None) -> list[dict[str, Any]]:
        return _without_tokens(self._read(lambda view: view.storage.undoLog(first, last, filter)))

    def undoInfo(self, first: int = 0, last: int = -20, specification: Any = None) -> list[dict[str, Any]]:
        return _without_tokens(self._read(lambda view: view.storage.undoInfo(first, last, specification)))

    def _record_iternext(self, next: bytes | None = None) -> tuple[bytes, bytes, bytes, bytes | None]:
        found: tuple[bytes, bytes, bytes, bytes | None] = self._read(
            lambda view: self._backing.record_iternext(view, next))
        return found

    def iterator(self, start: bytes | None = None, stop: bytes | None = None) -> 'Transactions':
        with plainly():
            return Transactions(self._root.iterator(start, stop))

    def loadBlob(self, oid: bytes, serial: bytes) -> str:
        path: str = self._read(lambda view: view.storage.loadBlob(oid, serial))
        return path

    def openCommittedBlobFile(self, oid: bytes, serial: bytes, blob: Any = None) -> Any:
        return self._read(lambda view: view.storage.openCommittedBlobFile(oid, serial, blob))

    def current(self, oids: list[bytes]) -> dict[bytes, bytes]:
        """The current revisions of those objects that there are."""
        found: dict[bytes, bytes] = self._read(lambda view: self._backing.current(view, oids))
        return found

    def changed_since(self, tid: bytes) -> list[bytes] | None:
        """The objects changed after a transaction; None if that one is not known, or they are too many.

        What was announced is in it, and perhaps later ones.
        """
        if tid > self.announced:
            raise older(self.announced, tid)
        changed: list[bytes] | None = self._read(
            lambda view: self._backing.changed_since(view, tid, MOST_CHANGED))
        return changed

class Transactions:
    """What `Gateway.iterator` returns: its errors are plain, and it does not show tokens."""

    def __init__(self, transactions: Any) -> None:
        self._all = transactions
        self._next = iter(transactions)

    def __iter__(self) -> 'Transactions':
        return self

    def __next__(self) -> 'Transaction':
        with plainly():
            return Transaction(next(self._next))

    def close(self) -> None:
        close = getattr(self._all, 'close', None)
        if close is not None:
            close()


class Transaction(TransactionRecord):  # type: ignore[misc]
    def __init__(self, found: Any) -> None:
        extension = {key: value for key, value in found.extension.items() if key != TOKEN}
        super().__init__(found.tid, found.status, found.user, found.description, extension)
        self._found = found

    def __iter__(self) -> Iterator[DataRecord]:
        with plainly():
            # Not ``yield from``: ZODB's StorageStopIteration, of which only one base is initialised, would make
            # Python crash there.
            for record in self._found:
                yield record


def _without_tokens(entries: Any) -> list[dict[str, Any]]:
    """Of a history or an undo log."""
    return [{key: value for key, value in entry.items() if key not in (TOKEN, 'rs_tid_int', 'rs_oid_int')}
            for entry in entries]
