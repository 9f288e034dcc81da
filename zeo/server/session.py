"""What a client may ask for, method by method, with the names that they have on the wire.

A session knows no socket: it is handed payloads, one after the other, by the thread that reads them,
and says what it has to say into its outbox (see `zeo.server.conversation`).
"""

import logging
import time
from collections.abc import Callable
from collections.abc import Mapping
from functools import partial
from typing import Any

from ZODB.interfaces import IBlobStorage
from ZODB.POSException import ReadOnlyError
from ZODB.POSException import StorageError
from ZODB.POSException import StorageTransactionError
from ZODB.POSException import Unsupported

from zeo.server import blobs
from zeo.server import figures
from zeo.server import prefetching
from zeo.server import telling
from zeo.server.arguments import as_bytes
from zeo.server.arguments import as_new_oid
from zeo.server.arguments import as_number
from zeo.server.arguments import as_oid
from zeo.server.arguments import as_record
from zeo.server.arguments import as_serial
from zeo.server.arguments import as_tid
from zeo.server.backing import Unreachable
from zeo.server.conversation import printable
from zeo.server.counts import Traffic
from zeo.server.histogram import Histogram
from zeo.server.iterators import Iterators
from zeo.server.limits import Allowance
from zeo.server.limits import Limits
from zeo.server.limits import TooLarge
from zeo.server.maintenance import Maintenance
from zeo.server.outbox import AHEAD
from zeo.server.outbox import GONE
from zeo.server.outbox import SENT
from zeo.server.outbox import Outbox
from zeo.server.roles import Role
from zeo.server.roles import Roles
from zeo.server.roles import audit
from zeo.server.seldom import Seldom
from zeo.server.served import Served
from zeo.server.transaction import Answer
from zeo.server.transaction import Transaction
from zeo.wire import messages
from zeo.wire import pieces
from zeo.wire.chunks import upload_in
from zeo.wire.messages import PickledId
from zeo.wire.methods import EXTENSIONS
from zeo.wire.replies import load_reply
from zeo.wire.revisions import MOST as MOST_PREFETCHED
from zeo.wire.stores import unpack

logger = logging.getLogger(__name__)

#: How long in seconds a load waits for the announcement of what it has read.
ANNOUNCEMENT_PATIENCE = 5.0

#: How many revisions are told of, or looked at, in one answer.
MOST_ENTRIES = 10_000


class Session(Maintenance):
    """The server's side of one connection: what each method does.

    ``storages`` are those that may be registered for, by name; ``limits`` and ``iterators`` are those of all clients.
    Everything else is explained at `Conversation`.
    """

    def __init__(self, storages: Mapping[str, Served], outbox: Outbox, client: str,
                 hang_up: Callable[[], None] = lambda: None, *, limits: Limits = Limits(),
                 roles: Roles = Roles(), address: Any = None,
                 iterators: Allowance = Allowance(2**31), may_log: Callable[[], bool] = lambda: True,
                 heard: Callable[[], None] = lambda: None) -> None:
        super().__init__(outbox, client, hang_up, roles, address, may_log, heard)
        self.wants_pulse = False  # to be told now and then that the server lives
        self.loads = Histogram()  # how long they took, if that is measured
        self._storages = storages
        self._storage: Any = None
        self._storage_name = ''  # under which it is registered
        self._limits = limits
        self._labels = Seldom(logger)
        self._iterators = Iterators(iterators)

    # ---- session -----------------------------------------------------------------------

    def register(self, storage_name: str, read_only: bool) -> bytes:
        if not self.may_come_in():
            raise StorageError('this server has no role for you; see --role there')
        role = self._roles.of(self._listening, self.certificate_name)
        served = self._storages.get(storage_name) if isinstance(storage_name, str) else None
        if served is None:
            raise ValueError(f'unknown storage: {storage_name!s:.100}')
        if role < Role.WRITE and not read_only:
            raise self._forbidden('to write', 'only for the role write')
        if served.read_only and not read_only:
            raise ReadOnlyError()
        read_only = bool(read_only) or served.read_only
        served.catch_up()
        self._served = served
        self._storage = served.storage
        self._storage_name = storage_name
        self._read_only = read_only
        self._role = role
        # First among those who hear of everything, then the last tid: nothing lies between.
        served.publisher.subscribe(self.outbox)
        served.entered(self)
        return served.publisher.last_tid

    def tell_storage(self) -> None:
        """Have the log tell what it has registered for; not in `register`, which must not wait for a disk."""
        if self._may_log():
            logger.info('%s: uses storage %s%s', self.client, self._storage_name,
                        ' (read only)' if self._read_only else '')

    def may_come_in(self) -> bool:
        """Whether it has a role at all; if not, that it wanted to is in the audit log."""
        if self._roles.of(self._listening, self.certificate_name) < Role.READ:
            self._forbidden('to use this server', 'it has no role')
            return False
        return True

    def get_info(self) -> dict[str, Any]:
        assert self._served is not None
        info = self._served.info()
        if self._limits.max_message >= pieces.LONGEST_MESSAGE:
            info[EXTENSIONS] += ('pieces',)
        return info

    def lastTransaction(self) -> bytes:
        assert self._served is not None
        self._served.catch_up()
        return self._served.publisher.last_tid

    def ping(self) -> None:
        """A round trip: what was committed before has been announced before the reply."""
        assert self._served is not None
        self._served.catch_up()

    def pulse(self) -> None:
        self.wants_pulse = True
        self._heard()  # it gives signs of life itself

    def set_client_label(self, label: str) -> None:
        label = printable(str(label)[:100])
        if self._may_log():
            self._labels.info('%s: is called %s', self._address, label)
        self.label = label
        self.client = f'{self._address} ({label})'

    def getInvalidations(self, tid: bytes) -> tuple[bytes, list[bytes]] | None:
        assert self._served is not None
        self._served.catch_up()
        return self._served.invalidations_since(as_tid(tid))

    def server_status(self) -> dict[str, Any]:
        assert self._served is not None
        return self._served.status()

    def figures(self, answer: Answer) -> None:
        # Beside: a disk is asked how much room it has.
        self._beside('figures', answer, partial(figures.of_server, self._storages))

    def own_figures(self) -> dict[str, Any]:
        """What `zeo.server.figures` tells of this client; any thread."""
        return {'address': self._address, 'label': self.label, 'since': self.connected,
                'read_only': self._read_only, 'received': self.received,
                'sent': self.outbox.size_sent, 'unsent': self.outbox.backlog,
                'behind': self.outbox.waiting_announcements()}

    @property
    def traffic(self) -> Traffic:
        return Traffic(self.received, self.outbox.size_sent, self.loads)

    def verify(self, answer: Answer, revisions: bytes) -> None:
        if not isinstance(revisions, bytes) or len(revisions) % 16 or len(revisions) > 16 * MOST_ENTRIES:
            raise TypeError(f'revisions to verify are at most {MOST_ENTRIES} pairs of oid and tid')
        assert self._served is not None
        outbox = self.outbox
        self._beside('verify', answer, partial(self._served.outdated, revisions, lambda: not outbox.gone))

    # ---- loading ------------------------------------------------------------------------

    def _load(self, message_id: PickledId, oid: bytes, tid: bytes) -> None:
        """Answer ``loadBefore`` in the order that `zeo.server.outbox` proves to be right."""
        outbox = self.outbox
        served = self._served
        assert served is not None
        served.statistics.loads += 1
        load = served.load_before or self._storage.loadBefore
        watching = ahead = False
        mark = outbox.published
        while True:
            found = load(oid, tid)
            if found is None:
                outbox.append(messages.reply(message_id, None))
                return
            record, start, end = found
            frame = load_reply(message_id, record, start, end)
            if end is None:
                outcome = outbox.reply_to_load(frame, mark, start, watching=watching, ahead=ahead)
            else:
                outcome = outbox.reply_with_history(frame, start, ahead=ahead)
            if outcome is SENT or outcome is GONE:
                return
            if outcome is AHEAD:
                outbox.deliver()  # what was answered before need not wait
                if not outbox.wait_for_announcement(start, ANNOUNCEMENT_PATIENCE):
                    logger.warning('%s: transaction %s was read but is still not announced after'
                                   ' %d s', self.client, start.hex(), ANNOUNCEMENT_PATIENCE)
                    ahead = True
            mark, watching = outbox.watch(oid), True

    def loadBefore(self, oid: bytes, tid: bytes) -> None:
        """As a one-way message, which nobody sends: nothing to be done."""

    def prefetch(self, oids: bytes, tid: bytes) -> None:
        """Tell of many revisions in few messages."""
        if type(oids) is not bytes or len(oids) % 8 or len(oids) > 8 * MOST_PREFETCHED:
            raise TypeError(f'at most {MOST_PREFETCHED} oids are asked for in one message')
        as_tid(tid)
        served = self._served
        assert served is not None
        served.statistics.loads += len(oids) // 8
        try:
            prefetching.tell(self.outbox, served.load_before or self._storage.loadBefore, oids, tid,
                             self._wait_for_room)
        except Unreachable as error:
            self._database_is_lost(error)

    def loadSerial(self, oid: bytes, tid: bytes) -> bytes:
        record: bytes = self._storage.loadSerial(as_oid(oid), as_tid(tid))
        return record

    def getTid(self, oid: bytes) -> bytes:
        tid: bytes = self._storage.getTid(as_oid(oid))
        return tid

    def history(self, oid: bytes, size: int = 1) -> list[dict[str, Any]]:
        assert self._served is not None
        return telling.entries(self._served.name, self._storage.history(as_oid(oid), min(as_number(size), MOST_ENTRIES)))

    def record_iternext(self, next: bytes | None = None) -> Any:
        assert self._served is not None
        if next is not None:
            as_bytes(next)
        return self._served.method('record_iternext')(next)

    # ---- two-phase commit -----------------------------------------------------------------

    def new_oids(self, n: int = 100) -> list[bytes]:
        count = max(1, min(100, as_number(n)))
        return [self._storage.new_oid() for _ in range(count)]

    def tpc_begin(self, id: Any, user: bytes, description: bytes, extension: dict[Any, Any],
                  tid: bytes | None = None, status: str = ' ') -> None:
        current = self._current()
        if current is not None:
            if current.id == id:
                return
            raise StorageTransactionError(current.id, id)
        if not isinstance(extension, dict):
            raise TypeError('the extension of a transaction is a dict')
        if tid is not None:
            as_tid(tid)
        if status not in (' ', 'p'):
            # A FileStorage takes others for signs of damage, and loses what comes after them.
            raise ValueError('the status of a transaction is a space, or p if it is packed')
        self._begin(id, user, description, extension, tid, status)

    def _begin(self, id: Any, user: bytes, description: bytes, extension: dict[Any, Any],
               tid: bytes | None = None, status: str = ' ') -> Transaction:
        assert self._served is not None
        self._transaction = transaction = Transaction(
            self._served, self.outbox, id, as_bytes(user), as_bytes(description), extension, tid, status,
            on_expired=self._hang_up, client=self.client, most=self._limits.max_transaction)
        return transaction

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction is in progress; any thread."""
        transaction = self._transaction
        return transaction is not None and not transaction.ended

    def _in_progress(self, id: Any) -> Transaction:
        transaction = self._current()
        if transaction is None or transaction.id != id:
            raise StorageTransactionError(transaction and transaction.id, id)
        return transaction

    def storea(self, oid: bytes, serial: bytes, record: bytes, id: Any) -> None:
        self._in_progress(id).stage('store', as_new_oid(oid), as_serial(serial), as_record(record),
                                    size=len(record))

    def stores(self, heads: bytes, records: bytes, id: Any) -> None:
        self._in_progress(id).stage_stores(unpack(heads, records), len(records))

    def commit(self, answer: Answer, id: Any, tell_tid: bool, user: bytes, description: bytes, heads: bytes,
               records: bytes) -> None:
        """Begin a transaction, stage some stores, and vote."""
        current = self._current()
        if current is not None:
            raise StorageTransactionError(current.id, id)
        stores = unpack(heads, records)
        transaction = self._begin(id, user, description, {})
        try:
            transaction.stage_stores(stores, len(records))
        except (OSError, TooLarge) as error:
            transaction.fail(error)
        transaction.vote(answer, bool(tell_tid), only_stores=True)

    def checkCurrentSerialInTransaction(self, oid: bytes, serial: bytes, id: Any) -> None:
        self._in_progress(id).stage('check', as_oid(oid), as_tid(serial))

    def deleteObject(self, oid: bytes, serial: bytes, id: Any) -> None:
        self._in_progress(id).stage('delete', as_oid(oid), as_tid(serial))

    def undoa(self, undo_id: bytes, id: Any) -> None:
        transaction = self._in_progress(id)
        undo_id = as_bytes(undo_id)
        transaction.stage('undo', undo_id, size=len(undo_id))
        assert self._served is not None
        transaction.tell_audit = partial(audit.info, '%s: storage %s: undo: %s', self.who, self._served.name)

    def restorea(self, oid: bytes, tid: bytes, record: bytes | None, previous_tid: bytes | None,
                 id: Any) -> None:
        transaction = self._in_progress(id)
        if record is not None:
            as_record(record)
        if previous_tid is not None:
            as_tid(previous_tid)
        transaction.stage('restore', as_new_oid(oid), as_tid(tid), record, previous_tid,
                          size=len(record or b''))

    def vote(self, answer: Answer, id: Any, tell_tid: bool = False) -> None:
        self._in_progress(id).vote(answer, bool(tell_tid))

    def settle(self, answer: Answer, tid: bytes, id: Any) -> None:
        assert self._served is not None
        self._beside('settle', answer, partial(self._served.settle, as_bytes(tid), id))

    def _finish(self, message_id: PickledId | None, id: Any) -> None:
        self._in_progress(id).finish(message_id)
        self._transaction = None

    def tpc_abort(self, answer: Answer, id: Any) -> None:
        transaction = self._current()
        if transaction is None or transaction.id != id:
            answer(None)
        else:
            transaction.abort(answer)

    # ---- blobs ---------------------------------------------------------------------------------

    def storeBlobStart(self) -> None:
        self._uploading().start()

    def storeBlobChunk(self, data: bytes | memoryview) -> None:
        uploads = self._uploading()
        assert self._transaction is not None
        self._transaction.count(len(data))
        uploads.chunk(data if isinstance(data, memoryview) else as_bytes(data))

    def divert(self, beginning: memoryview, length: int) -> pieces.Passing | None:
        """If so begins a message with a long piece of a blob: have its data go straight to the file.

        If it does not, or something is wrong with it, or with the transaction, it is handled as others are.
        """
        found = upload_in(beginning, length)
        if found is None:
            return None
        head, size, tail = found
        transaction = self._current()
        try:
            uploads = self._uploading()
            arriving = uploads.arriving
            assert transaction is not None
            transaction.count(size)
        except Exception:
            return None
        return pieces.Passing(head, size, tail, arriving, lambda error: transaction.fail(uploads.named(error)))

    def storeBlobEnd(self, oid: bytes, serial: bytes, record: bytes, id: Any) -> None:
        transaction = self._in_progress(id)
        path = self._uploading().end()
        transaction.stage('store_blob', as_new_oid(oid), as_serial(serial), as_record(record), path,
                          size=len(record))

    def storeBlobShared(self, oid: bytes, serial: bytes, record: bytes, filename: str,
                        id: Any) -> None:
        transaction = self._in_progress(id)
        path = blobs.shared_path(self._storage, as_new_oid(oid), filename)
        self._uploading().adopt(path)
        transaction.stage('store_blob', oid, as_serial(serial), as_record(record), path,
                          size=len(record))

    def restoreBlobEnd(self, oid: bytes, tid: bytes, record: bytes, previous_tid: bytes | None,
                       id: Any) -> None:
        transaction = self._in_progress(id)
        path = self._uploading().end()
        self._restore_blob(transaction, oid, tid, record, previous_tid, path)

    def restoreBlobShared(self, oid: bytes, tid: bytes, record: bytes, previous_tid: bytes | None,
                          filename: str, id: Any) -> None:
        transaction = self._in_progress(id)
        path = blobs.shared_path(self._storage, as_oid(oid), filename)
        self._uploading().adopt(path)
        self._restore_blob(transaction, oid, tid, record, previous_tid, path)

    def _restore_blob(self, transaction: Transaction, oid: bytes, tid: bytes, record: bytes,
                      previous_tid: bytes | None, path: str) -> None:
        if previous_tid is not None:
            as_tid(previous_tid)
        transaction.stage('restore_blob', as_new_oid(oid), as_tid(tid), as_record(record), previous_tid, path,
                          size=len(record))

    def _uploading(self) -> blobs.Uploads:
        transaction = self._current()
        if transaction is None:
            raise StorageTransactionError('a blob is sent without a transaction')
        return transaction.uploads

    def sendBlob(self, answer: Answer, oid: bytes, tid: bytes, large: bool = False) -> None:
        self._need_blobs()
        self._beside('blob', answer,
                     partial(blobs.send, self._storage, self.outbox, as_oid(oid), as_tid(tid), bool(large)))

    def _need_blobs(self) -> None:
        if not IBlobStorage.providedBy(self._storage):
            raise Unsupported('the storage on the server has no blobs: it needs a blob directory')

    # ---- iteration ----------------------------------------------------------------------------

    def iterator_start(self, start: bytes | None, stop: bytes | None) -> int:
        for tid in (start, stop):
            if tid is not None:
                as_tid(tid)
        assert self._served is not None
        return self._iterators.start(partial(self._served.history.iterator, start, stop))

    def iterator_next(self, iid: int) -> Any:
        transaction = self._iterators.next(iid)
        if transaction is None:
            return None
        assert self._served is not None
        extension = telling.plain(self._served.name, transaction.extension, transaction.tid)
        return transaction.tid, transaction.status, transaction.user, transaction.description, extension

    def iterator_record_start(self, iid: int, tid: bytes) -> int:
        return self._iterators.start_records(iid, tid)

    def iterator_record_next(self, rid: int) -> Any:
        record = self._iterators.next_record(rid)
        return None if record is None else (record.oid, record.tid, record.data, record.data_txn)

    def iterator_gc(self, ids: list[int]) -> None:
        self._iterators.end(ids)

    # ---- the end ---------------------------------------------------------------------------------

    def close(self) -> None:
        """The connection has ended: leave nothing behind.  In the session's own thread."""
        if self._transaction is not None:
            self._transaction.abandon()
        if self._served is not None:
            self._served.publisher.unsubscribe(self.outbox)
            self._served.left(self)
        self._iterators.end_all()
        self._jobs, self._heard = None, lambda: None  # who know us: see `Outbox.forget_line`


class MeasuredSession(Session):
    """A session that measures how long it takes to answer loads, which is what servers mostly do."""

    def _load(self, message_id: PickledId, oid: bytes, tid: bytes) -> None:
        begin = time.perf_counter()
        super()._load(message_id, oid, tid)
        self.loads.observe(time.perf_counter() - begin)
