"""A database in memory that several servers share, as RelStorage's is: whoever uses it has to look.

It has gates where a race may be decided (``polled``: a snapshot was taken; ``loaded``: a record was read;
``finished``: a transaction can be seen by others, and ``tpc_finish`` has not returned), and it can be down.
"""

import itertools
import threading
from collections.abc import Iterator
from typing import Any

from ZODB.BaseStorage import DataRecord
from ZODB.BaseStorage import TransactionRecord
from ZODB.Connection import TransactionMetaData
from ZODB.interfaces import IMVCCStorage
from ZODB.POSException import POSKeyError
from ZODB.POSException import StorageTransactionError
from ZODB.utils import p64
from ZODB.utils import u64
from ZODB.utils import z64
from zope.interface import implementer

from tests.server.talk import Gates


class Database:
    """Transactions that were committed, in order."""

    def __init__(self) -> None:
        self.gates = Gates()
        self.down = False
        self.transactions: list[tuple[bytes, Any, dict[bytes, bytes | None]]] = []
        self.oids = itertools.count(1000)
        self.lock = threading.Lock()  # one finishes at a time
        self.instances: list[Instance] = []

    def root(self) -> 'Instance':
        return Instance(self)

    def answer(self) -> None:
        if self.down:
            raise ConnectionError('the database at db.example is down')

    def commit(self, meta: Any, records: dict[bytes, bytes | None], tid: bytes | None = None) -> bytes:
        with self.lock:
            last = self.transactions[-1][0] if self.transactions else z64
            chosen: bytes = tid or p64(max(u64(last), 1_000_000) + 1)
            self.transactions = [*self.transactions, (chosen, meta, records)]
        return chosen

    def somebody_commits(self, *oids: bytes, record: bytes = b'of somebody else') -> bytes:
        """Another server does."""
        return self.commit(TransactionMetaData(), dict.fromkeys(oids, record))


@implementer(IMVCCStorage)
class Instance:
    """What one looks through: its snapshot is taken by `poll_invalidations`."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.seen: list[tuple[bytes, Any, dict[bytes, bytes | None]]] = []
        self.released = False
        self.transaction: Any = None
        self.tid: bytes | None = None
        self.changes: dict[bytes, bytes | None] = {}
        database.instances.append(self)

    def new_instance(self) -> 'Instance':
        self.database.answer()
        return Instance(self.database)

    def release(self) -> None:
        self.released = True

    close = release

    def sync(self, force: bool = True) -> None:
        pass

    def poll_invalidations(self) -> None:
        self.database.answer()
        self.seen = self.database.transactions
        self.database.gates['polled'].go_through()

    # ---- reading

    def _revisions(self, oid: bytes) -> list[tuple[bytes, bytes | None]]:
        self.database.answer()
        found = [(tid, records[oid]) for tid, _, records in self.seen if oid in records]
        if not found:
            raise POSKeyError(oid, {'adapter': self})  # as RelStorage's
        return found

    def load(self, oid: bytes, version: str = '') -> tuple[bytes, bytes]:
        tid, record = self._revisions(oid)[-1]
        if record is None:
            raise POSKeyError(oid, {'adapter': self})
        self.database.gates['loaded'].go_through()
        return record, tid

    def loadBefore(self, oid: bytes, before: bytes) -> tuple[bytes | None, bytes, bytes | None] | None:
        revisions = self._revisions(oid)
        earlier = [(tid, record) for tid, record in revisions if tid < before]
        if not earlier:
            return None
        tid, record = earlier[-1]
        return record, tid, next((each for each, _ in revisions if each > tid), None)

    def loadSerial(self, oid: bytes, tid: bytes) -> bytes:
        record = dict(self._revisions(oid)).get(tid)
        if record is None:
            raise POSKeyError(oid, {'adapter': self})
        return record

    def history(self, oid: bytes, version: Any = None, size: int = 1) -> list[dict[str, Any]]:
        found = {tid: meta for tid, meta, records in self.seen if oid in records}
        return [{'tid': tid, 'rs_tid_int': u64(tid), **found[tid].extension} for tid in reversed(found)][:size]

    def lastTransaction(self) -> bytes:
        self.database.answer()
        return self.seen[-1][0] if self.seen else z64

    def iterator(self, start: bytes | None = None, stop: bytes | None = None) -> Iterator[TransactionRecord]:
        self.database.answer()
        for tid, meta, records in self.database.transactions:
            if (start or z64) <= tid and (stop is None or tid <= stop):
                yield Record(tid, meta, records)

    # ---- writing

    def tpc_begin(self, transaction: Any, tid: bytes | None = None, status: str = ' ') -> None:
        self.database.answer()
        assert self.transaction is None
        self.transaction, self.tid, self.changes = transaction, tid, {}

    def store(self, oid: bytes, serial: bytes, record: bytes, version: str, transaction: Any) -> None:
        if transaction is not self.transaction:
            raise StorageTransactionError(self, transaction)
        self.changes[oid] = record

    def restore(self, oid: bytes, tid: bytes, record: bytes | None, version: str, previous: Any,
                transaction: Any) -> None:
        self.changes[oid] = record

    def checkCurrentSerialInTransaction(self, oid: bytes, serial: bytes, transaction: Any) -> None:
        pass

    def tpc_vote(self, transaction: Any) -> None:
        self.database.answer()

    def tpc_finish(self, transaction: Any) -> bytes:
        self.database.answer()
        if transaction is not self.transaction:
            raise StorageTransactionError(self, transaction)
        tid = self.database.commit(transaction, self.changes, self.tid)
        self.transaction = None
        self.database.gates['finished'].go_through()
        return tid

    def tpc_abort(self, transaction: Any) -> None:
        self.transaction = None

    # ---- the rest

    def new_oid(self) -> bytes:
        self.database.answer()
        return p64(next(self.database.oids))

    def pack(self, when: float, references: Any) -> None:
        """Old revisions are gone, and transactions without objects, as with RelStorage."""
        kept, seen = [], set[bytes]()
        for tid, meta, records in reversed(self.database.transactions):
            current = {oid: record for oid, record in records.items() if oid not in seen}
            seen.update(records)
            if current:
                kept.append((tid, meta, current))
        self.database.transactions = kept[::-1]

    def getName(self) -> str:
        return 'shared'

    def sortKey(self) -> str:
        return 'shared'

    def isReadOnly(self) -> bool:
        return False

    def __len__(self) -> int:
        return 7

    def getSize(self) -> int:
        return 77


class Record(TransactionRecord):
    def __init__(self, tid: bytes, meta: Any, records: dict[bytes, bytes | None]) -> None:
        super().__init__(tid, ' ', meta.user, meta.description, meta.extension)
        self.records = records

    def __iter__(self) -> Iterator[DataRecord]:
        for oid, record in self.records.items():
            yield DataRecord(oid, self.tid, record, None)
