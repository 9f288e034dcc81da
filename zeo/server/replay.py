"""What a client has staged, done in the storage: a vote, once the commit lock is there.

Every operation comes in the order in which the client sent it.  A replay is done once; if the client is to resolve
conflicts, its next vote makes another one.
"""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

from ZODB.POSException import ConflictError
from ZODB.POSException import ReadConflictError
from ZODB.POSException import StorageError
from ZODB.utils import maxtid

from zeo.server import conflicts
from zeo.server.blobs import Uploads
from zeo.server.served import Served
from zeo.server.staging import Staging
from zeo.wire.stores import Store


class Replay:
    """One vote of a transaction; belongs to who has the commit lock.

    ``meta`` is the transaction for the storage, ``id`` the client's name for it, ``tid`` and ``status`` what the
    client wants it to have.  With ``tell_tid`` the client is to know the tid from the vote on.  Any thread may set
    ``given_up``: nobody waits for the result any more.
    """

    __slots__ = ('changed', 'conflicts', 'reported', 'given_up', '_served', '_meta', '_id', '_tid', '_status',
                 '_tell_tid', '_staging', '_uploads')

    def __init__(self, served: Served, meta: Any, id: Any, tid: bytes | None, status: str, tell_tid: bool,
                 staging: Staging, uploads: Uploads | None) -> None:
        self.changed: dict[bytes, None] = {}  # oids, as a set in order
        self.conflicts: dict[bytes, dict[str, Any]] = {}  # by oid: for the client to resolve
        self.reported: dict[bytes, None] = {}  # oids whose stored state is not what the client sent
        self.given_up = False
        self._served = served
        self._meta = meta
        self._id = id
        self._tid = tid
        self._status = status
        self._tell_tid = tell_tid
        self._staging = staging
        self._uploads = uploads

    def vote(self) -> bytes | None:
        """Do what was staged, and let the storage vote, unless there are `conflicts`.

        Returns what the client may ask with for the fate of the transaction, if that is known and to be told: as a
        rule its tid.
        """
        served, meta, tid = self._served, self._meta, self._tid
        storage = served.storage
        if tid is not None:
            self._check_chosen(tid)
        elif self._tell_tid:
            tid = served.choose_tid(meta)
        if served.asks_further:
            storage.tpc_begin(meta, tid, self._status, id=self._id if self._same_id else None)
        elif tid is not None:
            storage.tpc_begin(meta, tid, self._status)
        else:
            storage.tpc_begin(meta)
        if served.file_writer is not None:
            undoes = any(operation == 'undo' for operation, _ in self._staging)
            served.file_writer.begun(None if undoes else self._staging.size)
        for operation, args in self._staging:
            self._go_on()
            _OPERATIONS[operation](self, *args)
        if self.conflicts:
            return None
        self._report(storage.tpc_vote(meta))
        if served.asks_further:
            return storage.voted_tid(meta) if self._same_id else None
        return served.receipt(meta, tid) if self._tell_tid else None

    def _check_chosen(self, tid: bytes) -> None:
        """`StorageError` or `Unsupported` if the storage cannot take the tid that the client has chosen."""
        last_tid = self._served.storage.lastTransaction()
        if last_tid is not None and tid <= last_tid:
            raise StorageError(f'the chosen transaction id {tid.hex()} is not later than'
                               f' the last one, {last_tid.hex()}')
        if tid[:4] >= maxtid[:4]:
            raise StorageError(f'the chosen transaction id {tid.hex()} leaves no room for later ones')
        self._served.method('restore')  # storages without it do not take a tid either

    def _go_on(self) -> None:
        if self.given_up:  # nobody will hear of the result, and others wait
            raise StorageError('the transaction was given up while it was voting')

    def left_to_the_client(self, failure: BaseException) -> list[Any]:
        """The conflict that was found, if it was found only when the storage voted, and the client resolves."""
        if (not self._served.client_conflict_resolution or not isinstance(failure, ConflictError)
                or isinstance(failure, ReadConflictError) or failure.serials is None):
            return []
        stored = [record for operation, args in self._staging if operation in ('store', 'stores')
                  for oid, _, record in ([args] if operation == 'store' else args[0]) if oid == failure.oid][-1:]
        return [{'oid': failure.oid, 'serials': tuple(failure.serials), 'data': data} for data in stored]

    def _report(self, oids: Any) -> None:
        """Note objects that are not stored as the client sent them, as ``tpc_vote`` tells."""
        for each in oids or ():
            oid = each[0] if isinstance(each, tuple) else each  # (oid, serial) in older storages
            self.reported[oid] = None
            self.changed[oid] = None

    @property
    def _same_id(self) -> bool:
        """Whether the server behind ours is to know the transaction by the id that its client has chosen."""
        return self._tell_tid and type(self._id) is int

    # ---- the operations ------------------------------------------------------------------

    def _store(self, oid: bytes, serial: bytes, record: bytes) -> None:
        self._stores(((oid, serial, record),))

    def _stores(self, stores: Sequence[Store]) -> None:
        served, meta, changed, found = self._served, self._meta, self.changed, self.conflicts
        store, finds_conflicts = served.storage.store, served.finds_conflicts
        served.statistics.stores += len(stores)
        for oid, serial, record in stores:
            if self.given_up:
                self._go_on()
            changed[oid] = None
            try:
                if not finds_conflicts:
                    conflicts.check(served.storage, oid, serial)
                store(oid, serial, record, '', meta)
            except ConflictError as error:
                if not served.client_conflict_resolution or error.serials is None:
                    raise
                found[oid] = {'oid': oid, 'serials': tuple(error.serials), 'data': record}
            else:
                if found:
                    found.pop(oid, None)

    def _store_blob(self, oid: bytes, serial: bytes, record: bytes, path: str) -> None:
        self._served.statistics.stores += 1
        self.changed[oid] = None
        assert self._uploads is not None
        path = self._uploads.hand_over(path, keep=self._served.client_conflict_resolution)
        if not self._served.finds_conflicts:
            conflicts.check(self._served.storage, oid, serial)
        self._served.storage.storeBlob(oid, serial, record, path, '', self._meta)

    def _check(self, oid: bytes, serial: bytes) -> None:
        self._served.method('checkCurrentSerialInTransaction')(oid, serial, self._meta)

    def _delete(self, oid: bytes, serial: bytes) -> None:
        self.changed[oid] = None
        self._served.method('deleteObject')(oid, serial, self._meta)

    def _undo(self, undo_id: bytes) -> None:
        undone = self._served.method('undo')(undo_id, self._meta)
        if undone is not None:  # else the vote tells, as that of a `ClientStorage` does
            self._report(undone[1])

    def _restore(self, oid: bytes, tid: bytes, record: bytes | None, previous: bytes | None) -> None:
        self._check_restored(tid)
        self.changed[oid] = None
        self._served.method('restore')(oid, tid, record, '', previous, self._meta)

    def _restore_blob(self, oid: bytes, tid: bytes, record: bytes, previous: bytes | None,
                      path: str) -> None:
        self._check_restored(tid)
        self.changed[oid] = None
        self._served.method('restoreBlob')(oid, tid, record, path, previous, self._meta)

    def _check_restored(self, tid: bytes) -> None:
        if tid != self._tid:
            raise StorageError(f'a revision {tid.hex()} cannot be restored by transaction'
                               f' {self._tid.hex() if self._tid else "without a chosen id"}')


_OPERATIONS: dict[str, Callable[..., None]] = {
    'store': Replay._store,
    'stores': Replay._stores,
    'store_blob': Replay._store_blob,
    'check': Replay._check,
    'delete': Replay._delete,
    'undo': Replay._undo,
    'restore': Replay._restore,
    'restore_blob': Replay._restore_blob,
}
