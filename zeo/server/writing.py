"""What a gateway writes with: one instance, which has the one transaction in progress.

Conflicts are found like those of a FileStorage: what a client has changed has to be what is current.  Where
the storage looks for that under its own locks, it is done there (`zeo.server.relational`); else it is done
here, in a snapshot that was taken when the transaction began.
"""

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

from ZODB.POSException import ConflictError
from ZODB.POSException import POSKeyError
from ZODB.POSException import ReadConflictError
from ZODB.POSException import StorageError
from ZODB.POSException import StorageTransactionError

from zeo.server import conflicts
from zeo.server.backing import Backing
from zeo.server.backing import Unreachable
from zeo.server.backing import View
from zeo.server.backing import plainly
from zeo.server.readers import PAUSE
from zeo.server.reading import TOKEN


class Writing:
    """The part of a gateway that has a transaction; who calls it has the server's commit lock.

    ``tpc_finish`` is the gateway's affair, since it has to do with the order.
    """

    _backing: Backing
    _closed: threading.Event
    patience: float

    def __init__(self) -> None:
        self._writer: View | None = None
        self._transaction: Any = None
        self._tid: bytes | None = None  # chosen by the client
        self._token = b''
        self._resolved: list[bytes] = []

    @property
    def announced(self) -> bytes:
        """The tid announced last."""
        raise NotImplementedError

    # `zeo.server.conflicts` puts its resolver here.
    def tryToResolveConflict(self, oid: bytes, committed: bytes, old: bytes, record: bytes,
                             committed_data: bytes = b'') -> bytes:
        raise ConflictError(oid=oid, serials=(committed, old))

    def _crs_transform_record_data(self, record: bytes) -> bytes:
        return record

    _crs_untransform_record_data = _crs_transform_record_data

    def _resolve(self, oid: bytes, committed: bytes, old: bytes, record: bytes,
                 committed_data: bytes = b'') -> bytes:
        made = self.tryToResolveConflict(oid, committed, old, record, committed_data)
        self._resolved.append(oid)
        return made

    @contextlib.contextmanager
    def _committing(self, transaction: Any) -> Iterator[Any]:
        if transaction is not self._transaction or self._writer is None:
            raise StorageTransactionError('no such transaction is in progress')
        try:
            with plainly():
                yield self._writer.storage
        except Unreachable:
            self._drop_writer()
            raise

    def _drop_writer(self) -> None:
        writer, self._writer = self._writer, None
        self._transaction = None
        if writer is not None:
            writer.discard()

    def promise(self, transaction: Any) -> None:
        """Before `tpc_begin`: its fate may be asked for (`receipt`)."""
        if self._backing.keeps_receipts:
            self._token = os.urandom(16)
            transaction.extension[TOKEN] = self._token

    def tpc_begin(self, transaction: Any, tid: bytes | None = None, status: str = ' ') -> None:
        """Begin one; while the database cannot be reached, wait for it a while."""
        if self._transaction is not None:
            raise StorageTransactionError('another transaction is in progress')
        until = time.monotonic() + self.patience
        while True:
            try:
                self._begin(transaction, tid, status)
                return
            except Unreachable:
                if time.monotonic() >= until or self._closed.wait(PAUSE):
                    raise

    def _begin(self, transaction: Any, tid: bytes | None, status: str) -> None:
        with plainly():
            if self._writer is None:
                self._writer = self._backing.open_writer(self._resolve)
            writer = self._writer
            self._resolved = []
            self._tid = tid
            try:
                if not self._resolves_at_vote:
                    self._backing.refresh(writer, self.announced)  # to see what is current now
                if tid is None:
                    self._backing.begin(writer, transaction)
                else:
                    writer.storage.tpc_begin(transaction, tid, status)
                    # From here on nobody commits; so what is not there now does not come before it.
                    self._backing.refresh(writer, self.announced)
                    if (newest := self._backing.newest(writer)) >= tid:
                        raise StorageError(f'the chosen transaction id {tid.hex()} is not later than the last'
                                           f' one, {newest.hex()}')
            except BaseException:
                self._drop_writer()
                raise
            self._transaction = transaction

    @property
    def _resolves_at_vote(self) -> bool:
        """Whether the storage finds conflicts when it votes, and has them resolved here and not by clients."""
        return self._backing.resolves and isinstance(self.tryToResolveConflict, conflicts.Resolver)

    def _compare(self, storage: Any, oid: bytes, serial: bytes, record: bytes) -> tuple[bytes, bytes]:
        """The revision that is replaced, and the record to be stored; a conflict is resolved or raised."""
        if self._resolves_at_vote:
            return serial, record
        try:
            current: bytes = storage.load(oid)[1]
        except POSKeyError:  # a new one
            return serial, record
        if current == serial:
            return serial, record
        return current, self._resolve(oid, current, serial, record)

    def store(self, oid: bytes, serial: bytes, data: bytes, version: str, transaction: Any) -> None:
        with self._committing(transaction) as storage:
            serial, data = self._compare(storage, oid, serial, data)
            storage.store(oid, serial, data, '', transaction)

    def storeBlob(self, oid: bytes, serial: bytes, data: bytes, path: str, version: str,
                  transaction: Any) -> None:
        with self._committing(transaction) as storage:
            serial, data = self._compare(storage, oid, serial, data)
            storage.storeBlob(oid, serial, data, path, '', transaction)

    def restore(self, oid: bytes, tid: bytes, data: bytes | None, version: str, previous: bytes | None,
                transaction: Any) -> None:
        with self._committing(transaction) as storage:
            storage.restore(oid, tid, data, '', previous, transaction)

    def restoreBlob(self, oid: bytes, tid: bytes, data: bytes, path: str, previous: bytes | None,
                    transaction: Any) -> None:
        with self._committing(transaction) as storage:
            storage.restoreBlob(oid, tid, data, path, previous, transaction)

    def checkCurrentSerialInTransaction(self, oid: bytes, serial: bytes, transaction: Any) -> None:
        with self._committing(transaction) as storage:
            if not self._resolves_at_vote and (current := storage.load(oid)[1]) != serial:
                raise ReadConflictError(oid=oid, serials=(current, serial))
            storage.checkCurrentSerialInTransaction(oid, serial, transaction)

    def deleteObject(self, oid: bytes, serial: bytes, transaction: Any) -> None:
        with self._committing(transaction) as storage:
            storage.deleteObject(oid, serial, transaction)

    def undo(self, transaction_id: bytes, transaction: Any) -> Any:
        with self._committing(transaction):
            assert self._writer is not None
            return self._backing.undo(self._writer, transaction_id, transaction)

    def tpc_vote(self, transaction: Any) -> list[bytes]:
        """Returns the objects that are not stored as they were sent."""
        with self._committing(transaction) as storage:
            reported = storage.tpc_vote(transaction) or ()
        return list(dict.fromkeys([*self._resolved, *reported]))

    def receipt(self, transaction: Any) -> bytes | None:
        """What `outcome` of any server has to be given; it is voted.  None: that is not known here."""
        if not self._backing.keeps_receipts:
            return None
        with self._committing(transaction):
            assert self._writer is not None
            return self._backing.receipt(self._writer, self.announced, self._token, self._tid)

    def tpc_abort(self, transaction: Any) -> None:
        if transaction is not self._transaction or self._writer is None:
            return
        try:
            self._writer.storage.tpc_abort(transaction)
        except Exception:
            self._drop_writer()  # with its connection, whatever it did ends
        self._transaction = None
