"""Serves a database that several servers share: what is pulled from it is pushed to the clients.

A storage with instances (`ZODB.interfaces.IMVCCStorage`), such as RelStorage over PostgreSQL, is committed
to by others, too, and tells nobody.  A `Gateway` looks, and presents itself to the server as a storage that
*announces itself*: it calls its wrapper for each transaction of others, and back from `tpc_finish` for one
of its own, in the order of their tids.

Two kinds of instances are looked through, and one is written with:

- the *poller* says which transactions there are; it is used by who has the *turn*, a lock;
- *readers* (`zeo.server.readers`) answer loads;
- the *writer* has the one transaction in progress, under the server's commit lock.

*What is asked of the database.*  (D1) What is committed is seen by every snapshot that is taken after
``tpc_finish`` has returned.  (D2) A snapshot that shows a transaction shows all with smaller tids.  With
RelStorage a tid is chosen under a lock of the database that is held until the transaction is visible, and is
larger than all others.

*Claim 1: announcements are in tid order, each transaction is announced once, and none is left out.*
*Proof:* all are made by who has the turn, from one snapshot of the poller, for all transactions later than
the last one announced, in order, and that one is moved on at each.  By D2 none can appear below it later.  A
commit of our own is finished with the turn, so nobody announces it as somebody else's: it is visible only
after the turn was taken, and is among the transactions (D1) when its own thread polls before it gives the
turn back; at its place the callback is called in place of the wrapper.  QED.

*Claim 2: a read that begins after a transaction was announced shows it,* which is all that the proof in
`zeo.server.outbox` needs.  *Proof:* before a batch of transactions is announced, the generation moves.  A
reader whose snapshot belongs to another generation takes a new one.  The one that is used was begun after the
generation was read, and that was read after it had moved, hence after the poller had seen the transaction;
so it is there (D1: it was committed before).  QED.  Readers may run ahead of what is announced; then the load
polls, so that its reply does not have to wait for that.

*Claim 3: what was committed anywhere before a client asks (``ping``, ``lastTransaction``, ``register``) has
been announced to it before it is answered.*  *Proof:* the poll whose end is waited for began after the
question: `catch_up` counts them.  QED.

If a database is reached that does not have the last announced transaction, or none so late, nothing is read
from it (`zeo.server.relational`).
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import zope.interface
from ZODB import interfaces
from ZODB.BaseStorage import DataRecord
from ZODB.BaseStorage import TransactionRecord
from ZODB.POSException import ConflictError
from ZODB.POSException import POSKeyError
from ZODB.POSException import ReadConflictError
from ZODB.POSException import StorageError
from ZODB.POSException import StorageTransactionError
from ZODB.utils import z64

from zeo.server import conflicts
from zeo.server import relational
from zeo.server.backing import Backing
from zeo.server.backing import Change
from zeo.server.backing import Unreachable
from zeo.server.backing import View
from zeo.server.backing import older
from zeo.server.backing import plainly
from zeo.server.readers import PAUSE
from zeo.server.readers import Readers
from zeo.server.readers import load_before

logger = logging.getLogger(__name__)

#: Others' transactions are looked for so often, in seconds, unless somebody asks.
POLL_INTERVAL = 0.05

#: So many seconds a request waits for the database, and clients are kept without it.
PATIENCE = 5.0

#: How often, in seconds, the database is asked for its size.
SIZES = 10.0

#: For a client that comes back, so many changed objects are told; one that missed more verifies its cache.
MOST_CHANGED = 100_000

#: How long, in seconds, one waits for the end of a transaction whose fate is asked for.
FATE_PATIENCE = 20.0

#: Under this key of a transaction's extension is the token by which its fate can be told.
TOKEN = '_zeo'

#: What a gateway provides if the storage behind it does.
_INTERFACES = (
    interfaces.IStorage, interfaces.IStorageIteration, interfaces.IStorageUndoable,
    interfaces.IStorageRestoreable, interfaces.IExternalGC, interfaces.IBlobStorage,
    interfaces.IBlobStorageRestoreable)


class Gateway:
    """A storage in front of one with instances; any thread may call it.

    Transactions are one at a time, as under the server's commit lock.
    """

    def __init__(self, root: Any, backing: Backing, poll_interval: float = POLL_INTERVAL) -> None:
        self._root = root
        self._backing = backing
        self._interval = poll_interval
        # The turn to poll and to announce.  Held while the database is asked, and while own commits are
        # finished; under it the publisher's mutex and the outboxes' are taken.
        self._turn = threading.Lock()
        self._holder: int | None = None  # the thread that has it
        self._poller: View | None = None  # belongs to who has the turn, as does what follows
        self._begun = 0  # polls
        self._polled = 0  # the number of the last one that succeeded
        self._wrapper: Any = None
        # The generation and the last tid announced move together, in the turn; anybody may read them.
        self._known: tuple[int, bytes] = (0, z64)
        self._readers = Readers(backing, lambda: self._known)
        # The following belong to who has the server's commit lock.
        self._writer: View | None = None
        self._transaction: Any = None
        self._tid: bytes | None = None  # chosen by the client
        self._token = b''
        self._resolved: list[bytes] = []
        self._oids = threading.Lock()  # held while the root gives out an oid, which may ask the database
        self._sizes = (0, 0)
        self._sized = -SIZES
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=f'zeo poller {self.getName()}', daemon=True)
        if backing.iterates_records:
            self.record_iternext = self._record_iternext
        if interfaces.IBlobStorage.providedBy(root) and hasattr(root.blobhelper, 'fshelper'):
            self.fshelper = root.blobhelper.fshelper
        zope.interface.alsoProvides(self, *(each for each in _INTERFACES if each.providedBy(root)))
        with self._my_turn():
            poller = self._look()
            with plainly():
                self._known = 1, backing.newest(poller)
        self._look_at_sizes()

    # ---- looking for what others do ------------------------------------------------------

    @contextlib.contextmanager
    def _my_turn(self) -> Iterator[None]:
        with self._turn:
            self._holder = threading.get_ident()
            try:
                yield
            finally:
                self._holder = None

    @property
    def announced(self) -> bytes:
        """The tid announced last."""
        return self._known[1]

    def catch_up(self, patience: float = PATIENCE) -> None:
        """Announce all that was committed before the call.

        `Unreachable` if the database cannot be reached for ``patience`` seconds.
        """
        until = time.monotonic() + patience
        asked = self._begun
        while True:
            try:
                with self._my_turn():
                    if self._polled <= asked:  # else somebody has polled meanwhile
                        self._poll()
                return
            except Unreachable:
                if time.monotonic() >= until or self._closed.wait(PAUSE):
                    raise

    def _poll(self, own: bytes | None = None, publish: Callable[[bytes], Any] = lambda tid: None) -> None:
        """Announce, in the turn, what is new; ``publish`` is called in the place of the transaction ``own``."""
        self._begun += 1
        number = self._begun
        poller = self._look()
        generation = self._known[0] + 1
        for tid, oids in self._changes(poller):
            self._known = generation, self.announced  # before anything is announced
            if own is not None and own <= tid:
                publish(own)
                self._known = generation, own
            if own != tid:
                self._wrapper.invalidate(tid, oids)
                self._known = generation, tid
            if own is not None and own <= tid:
                own = None
        if own is not None:  # one that changed nothing need not be told apart by the storage
            self._known = generation, self.announced
            publish(own)
            self._known = generation, own
        self._polled = number

    def _look(self) -> View:
        """The poller with a new snapshot.  In the turn.  `Unreachable` if there is none to be had."""
        poller = self._poller
        if poller is not None:
            with contextlib.suppress(Unreachable):
                return self._refreshed(poller)
        self._poller = poller = self._backing.open()
        return self._refreshed(poller)

    def _refreshed(self, poller: View) -> View:
        try:
            with plainly():
                try:
                    self._backing.refresh(poller, self.announced)
                except relational.Discontinued as error:
                    logger.error('storage %s: %s; everybody is disconnected', self.getName(), error)
                    self._backing.refresh(poller, z64)
                    self._known = self._known[0] + 1, self._backing.newest(poller)
                    self._wrapper.invalidateCache()
        except BaseException:
            self._poller = None
            poller.discard()
            raise
        return poller

    def _changes(self, poller: View) -> Iterator[Change]:
        try:
            with plainly():
                yield from self._backing.changes(poller, self.announced)
        except Exception:
            self._poller = None
            poller.discard()
            raise

    def start(self) -> None:
        """Begin to look for others' transactions also if nobody asks."""
        self._thread.start()

    def _watch(self) -> None:
        since: float | None = None  # when the database could not be reached any more
        waiting = True
        while not self._closed.wait(self._interval):
            try:
                self.catch_up(0)
                self._readers.rest()
                self._look_at_sizes()
            except Unreachable as error:
                now = time.monotonic()
                if since is None:
                    since = now
                    logger.warning('storage %s: %s', self.getName(), error)
                elif waiting and now - since > PATIENCE:
                    waiting = False
                    logger.error('storage %s: %s for %.0f s; everybody is disconnected', self.getName(), error,
                                 now - since)
                    with self._my_turn():
                        self._wrapper.invalidateCache()
            except Exception:
                logger.exception('storage %s: the database cannot be looked at', self.getName())
            else:
                if since is not None:
                    logger.warning('storage %s: the database is there again, after %.1f s', self.getName(),
                                   time.monotonic() - since)
                since, waiting = None, True

    def registerDB(self, wrapper: Any) -> None:
        """Who is to be told; before `start`."""
        self._wrapper = wrapper

    def lastTransaction(self) -> bytes:
        """The tid announced last, after everything committed before the call was announced."""
        if self._holder != threading.get_ident():  # else it is being announced just now
            self.catch_up()
        return self.announced

    # ---- loading -----------------------------------------------------------------------

    def _read(self, job: Callable[[View], Any], *, anew: bool = False) -> Any:
        return self._readers.read(job, PATIENCE, anew=anew)

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
        record: bytes = self._read(lambda view: view.storage.loadSerial(oid, tid))
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

    def changed_since(self, tid: bytes) -> list[bytes] | None:
        """The objects changed after a transaction; None if that one is not known, or they are too many.

        What was announced is in it, and perhaps later ones.
        """
        if tid > self.announced:
            raise older(self.announced, tid)
        changed: list[bytes] | None = self._read(
            lambda view: self._backing.changed_since(view, tid, MOST_CHANGED))
        return changed

    # ---- the one transaction in progress ---------------------------------------------------

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
        until = time.monotonic() + PATIENCE
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
                # What is compared and resolved here is as new as it can be.
                self._backing.refresh(writer, self.announced)
                if tid is None:
                    writer.storage.tpc_begin(transaction)
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

    def _compare(self, storage: Any, oid: bytes, serial: bytes, record: bytes) -> tuple[bytes, bytes]:
        """The revision that is replaced, and the record to be stored; a conflict is resolved or raised."""
        if self._backing.resolves and isinstance(self.tryToResolveConflict, conflicts.Resolver):
            return serial, record  # that is done when it votes
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
            if not self._backing.resolves and (current := storage.load(oid)[1]) != serial:
                raise ReadConflictError(oid=oid, serials=(current, serial))
            storage.checkCurrentSerialInTransaction(oid, serial, transaction)

    def deleteObject(self, oid: bytes, serial: bytes, transaction: Any) -> None:
        with self._committing(transaction) as storage:
            storage.deleteObject(oid, serial, transaction)

    def undo(self, transaction_id: bytes, transaction: Any) -> Any:
        with self._committing(transaction) as storage:
            return storage.undo(transaction_id, transaction)

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

    def tpc_finish(self, transaction: Any, callback: Callable[[bytes], Any] = lambda tid: None) -> bytes:
        """Commit it, announce what came before, and call back in its place."""
        with self._my_turn():
            try:
                with self._committing(transaction) as storage:
                    tid: bytes = storage.tpc_finish(transaction)
            except BaseException:
                self._drop_writer()  # whatever became of it, it is not in progress any more
                raise
            self._transaction = None
            self._poll(tid, callback)
        return tid

    def tpc_abort(self, transaction: Any) -> None:
        if transaction is not self._transaction or self._writer is None:
            return
        try:
            self._writer.storage.tpc_abort(transaction)
        except Exception:
            self._drop_writer()  # with its connection, whatever it did ends
        self._transaction = None

    # ---- the fate of a transaction ---------------------------------------------------------

    @property
    def keeps_receipts(self) -> bool:
        return self._backing.keeps_receipts

    def outcome(self, receipt: bytes) -> bytes | None:
        """The tid of a transaction that was voted at any server, if it is committed; None if it never will.

        If it is, it has been announced.  Waits for its end; `StorageError` if that takes too long.
        """
        if len(receipt) not in (16, 32):
            raise ValueError('no server says such things at vote')
        until = time.monotonic() + FATE_PATIENCE
        while self._read(lambda view: self._backing.in_progress(view, receipt), anew=True):
            if time.monotonic() >= until or self._closed.wait(PAUSE):
                raise StorageError('the transaction is still in progress')
        tid: bytes | None = self._read(lambda view: self._backing.outcome(view, receipt), anew=True)
        if tid is not None:
            self.catch_up()
        return tid

    # ---- the rest: asked of the root -------------------------------------------------------

    def new_oid(self) -> bytes:
        with self._oids, plainly():
            oid: bytes = self._root.new_oid()
            return oid

    def pack(self, pack_time: float, references: Any) -> None:
        with plainly():
            self._root.pack(pack_time, references)
        self._sized = -SIZES

    def _look_at_sizes(self) -> None:
        if time.monotonic() - self._sized >= SIZES:
            with plainly():
                self._sizes = len(self._root), self._root.getSize()
            self._sized = time.monotonic()

    def __len__(self) -> int:
        return self._sizes[0]

    def getSize(self) -> int:
        return self._sizes[1]

    def getName(self) -> str:
        name: str = self._root.getName()
        return name

    def sortKey(self) -> str:
        key: str = self._root.sortKey()
        return key

    def isReadOnly(self) -> bool:
        return bool(self._root.isReadOnly())

    def supportsUndo(self) -> bool:
        return bool(getattr(self._root, 'supportsUndo', lambda: False)())

    def temporaryDirectory(self) -> str:
        path: str = self._root.temporaryDirectory()
        return path

    def close(self) -> None:
        """End the thread, let go of all instances and of the root."""
        self._closed.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._readers.close()
        with self._my_turn():
            poller, self._poller = self._poller, None
            if poller is not None:
                poller.discard()
        self._drop_writer()
        self._root.close()


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
            yield from self._found


def _without_tokens(entries: Any) -> list[dict[str, Any]]:
    """Of a history or an undo log."""
    return [{key: value for key, value in entry.items() if key not in (TOKEN, 'rs_tid_int', 'rs_oid_int')}
            for entry in entries]


def fronted(storage: Any, poll_interval: float = POLL_INTERVAL) -> Any:
    """The storage as it is to be served: behind a `Gateway` if it is one with instances, else itself.

    `ValueError`, one line, if it cannot be served.
    """
    backing = backing_of(storage)
    return storage if backing is None else Gateway(storage, backing, poll_interval)


def backing_of(storage: Any) -> Backing | None:
    """How to ask a storage; None if it has no instances.  `ValueError`, one line, if it cannot be served."""
    if not interfaces.IMVCCStorage.providedBy(storage):
        return None
    backing = relational.backing_of(storage)
    if backing is None and not hasattr(storage, 'iterator'):
        raise ValueError(f'{type(storage).__name__} cannot be served, since it cannot tell which transactions'
                         ' there were')
    return backing or Backing(storage)
