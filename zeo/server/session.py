"""One client's conversation: a message in, the storage called, replies out.

A session knows no socket: it is handed payloads, one after the other, by the thread that reads them,
and says what it has to say into its outbox.  Requests that may take long go on elsewhere and are
answered when they are done, while the session serves the next ones; they neither load nor finish.
"""

import itertools
import logging
import time
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from functools import partial
from typing import Any

from ZODB.interfaces import IBlobStorage
from ZODB.POSException import ConflictError
from ZODB.POSException import POSError
from ZODB.POSException import POSKeyError
from ZODB.POSException import ReadOnlyError
from ZODB.POSException import StorageError
from ZODB.POSException import StorageTransactionError
from ZODB.POSException import Unsupported
from ZODB.UndoLogCompatible import UndoLogCompatible
from ZODB.utils import z64

from zeo.errors import ProtocolError
from zeo.server import blobs
from zeo.server import figures
from zeo.server import prefetching
from zeo.server import telling
from zeo.server.backing import Unreachable
from zeo.server.counts import Traffic
from zeo.server.histogram import Histogram
from zeo.server.jobs import Jobs
from zeo.server.limits import Allowance
from zeo.server.limits import Limits
from zeo.server.limits import TooLarge
from zeo.server.outbox import AHEAD
from zeo.server.outbox import GONE
from zeo.server.outbox import SENT
from zeo.server.outbox import Outbox
from zeo.server.roles import Role
from zeo.server.roles import Roles
from zeo.server.roles import audit
from zeo.server.seldom import Seldom
from zeo.server.served import Served
from zeo.server.trace import Trace
from zeo.server.transaction import Answer
from zeo.server.transaction import State
from zeo.server.transaction import Transaction
from zeo.server.transaction import log_failure
from zeo.wire import messages
from zeo.wire import pieces
from zeo.wire.chunks import upload_in
from zeo.wire.decoding import decode_from_client
from zeo.wire.framing import Payload
from zeo.wire.loads import load_of
from zeo.wire.messages import PickledId
from zeo.wire.methods import EXTENSIONS
from zeo.wire.methods import METHODS
from zeo.wire.replies import load_reply
from zeo.wire.revisions import MOST as MOST_PREFETCHED
from zeo.wire.stores import unpack

logger = logging.getLogger(__name__)

#: How long in seconds a load waits for the announcement of what it has read.
ANNOUNCEMENT_PATIENCE = 5.0

#: A request waits while its client has so many bytes still to read, as long as it reads anything in so many
#: seconds.
ROOM = 4 * 1024 * 1024
ROOM_PATIENCE = 60.0

#: How many iterators over transactions, and over records, one client may have at a time.
ITERATORS = 200

#: How many revisions or transactions are told of, and how many revisions looked at, in one answer.
MOST_ENTRIES = 10_000

#: The largest number that may be asked for of anything, and the latest time, in seconds since 1970.
MOST = 2**62
LAST_TIME = 2**35

#: Errors that belong to everyday life and are not logged.
EXPECTED = (POSKeyError, ConflictError)


class Session:
    """The server's side of one connection.

    ``storages`` are those that may be registered for, by name.  ``client`` names the client in the log
    (its address, and later its label).  ``hang_up`` ends the connection; any thread may call it.
    ``roles`` say what it may do, who has connected to ``address``.  All clients share the ``iterators``.
    ``may_log`` says whether there may be another line about it that tells of everyday life.
    ``heard`` is called, in the thread that handles messages, when the client gives a sign of life.
    """

    def __init__(self, storages: Mapping[str, Served], outbox: Outbox, client: str,
                 hang_up: Callable[[], None] = lambda: None, *, limits: Limits = Limits(),
                 roles: Roles = Roles(), address: Any = None,
                 iterators: Allowance = Allowance(2**31), may_log: Callable[[], bool] = lambda: True,
                 heard: Callable[[], None] = lambda: None) -> None:
        self.outbox = outbox
        self.client = client
        self.connected = time.time()
        self.received = 0  # bytes
        self.label = ''
        self.certificate_name: str | None = None  # in the certificate that it has shown, if any
        self._limits = limits
        self._roles = roles
        self._listening = address
        self._role = Role.NOTHING
        self._refusals = Seldom(logger)
        self._labels = Seldom(logger)
        self.wants_pulse = False  # to be told now and then that the server lives
        self.loads = Histogram()  # how long they took, if that is measured
        self._address = client
        self._storages = storages
        self._hang_up = hang_up
        self._served: Served | None = None
        self._storage: Any = None
        self._read_only = False
        self._transaction: Transaction | None = None
        self._allowance = iterators
        self._may_log = may_log
        self._heard = heard
        self._iterators: dict[int, Iterator[Any]] = {}  # over transactions
        self._record_iterators: dict[int, Iterator[Any]] = {}
        self._iterator_ids = itertools.count()
        self._last_transactions: dict[int, Any] = {}  # by iterator id: what it returned last
        self._size = 0  # of the request that is dealt with, in bytes
        self._jobs: Jobs | None = None  # made for the first that there is, as most have none
        self._trace = Trace()

    @property
    def is_registered(self) -> bool:
        return self._served is not None

    @property
    def read_only(self) -> bool:
        """Whether it may not write, once it is registered."""
        return self._read_only

    @property
    def who(self) -> str:
        """For the audit log; what the client says itself comes last, since it may say anything."""
        shown = '' if self.certificate_name is None else f', certificate {_printable(self.certificate_name)}'
        return self._address + shown + (self.label and f' ({self.label})')

    # ---- a message comes in ------------------------------------------------------------

    def handle(self, payload: Payload) -> None:
        """Do what a message asks for.

        Raises `ProtocolError` if the connection has to be closed.  Errors of a request are answered;
        those of a one-way message cannot be, so they end the connection, too.
        """
        load = load_of(payload)
        if load is not None and self._served is not None:
            if self.outbox.backlog > ROOM:
                self._wait_for_room()
            try:
                self._load(*load)
            except Exception as error:
                self._failed(load[0], 'loadBefore', error)
            return
        message_id, oneway, name, args = decode_from_client(payload)
        if messages.is_heartbeat(message_id):
            self._heard()
            return
        self._size = len(payload)
        if self.outbox.backlog > ROOM and not oneway:
            self._wait_unless_it_ends(name, args)
        method = METHODS.get(name)
        if method is None or (self._served is None) != (name == 'register'):
            raise ProtocolError(f'{name[:100]!r} cannot be called now' if method else
                                f'there is no method {name[:100]!r}')
        try:
            if not method.least <= len(args) <= method.most:
                raise TypeError(f'{name} takes {method.least} to {method.most} arguments,'
                                f' not {len(args)}')
            if method.writes and self._read_only:
                raise ReadOnlyError()
            if name in _FOR_ADMINS and self._role < Role.ADMIN:
                raise self._forbidden(_FOR_ADMINS[name], 'only for the role admin')
            if name in _ANSWERING:
                answer = _no_answer if oneway else partial(self._answer, message_id)
                getattr(self, name)(answer, *args)
            elif name == 'tpc_finish':
                self._finish(None if oneway else message_id, *args)
            elif name == 'loadBefore' and not oneway:
                self._load(message_id, _oid(args[0]), _tid(args[1]))
            else:
                result = getattr(self, name)(*args)
                if not oneway:
                    self.outbox.append(messages.reply(message_id, result))
        except Exception as error:
            if not oneway:
                self._failed(message_id, name, error)
            elif not self._is_reported_later(name, error):
                raise ProtocolError(f'{name} failed: {_in_words(error)}') from None

    def handle_and_tell(self, payload: Payload) -> None:
        """`handle`, and tell the debug log how long it took."""
        message_id, oneway, name, _ = decode_from_client(payload)
        if not messages.is_heartbeat(message_id):
            self._trace.begin(message_id, name[:100])
        self.handle(payload)
        if oneway or name not in _ANSWERING:
            self._trace.end(message_id, self.client)

    def _answer(self, message_id: PickledId, result: Any = None,
                error: BaseException | None = None) -> None:
        if isinstance(error, Unreachable):
            self._database_is_lost(error)
        if error is not None:
            frame = messages.error_reply(message_id, error)
        else:
            frame = messages.reply(message_id, result)
        self.outbox.append(frame)
        self._trace.end(message_id, self.client, error)

    def _database_is_lost(self, error: Unreachable) -> None:
        """The client waits, or goes to another server, which is what clients do without a connection."""
        self._refusals.warning('%s: is disconnected: %s', self.client, error)
        self.outbox.end()
        self._hang_up()

    def _failed(self, message_id: PickledId, name: str, error: Exception) -> None:
        if isinstance(error, Unreachable):
            self._database_is_lost(error)
        elif not isinstance(error, (POSError, TypeError, ValueError, KeyError)) and self._served is not None:
            log_failure(self._served, self.client, name, error)
        elif not isinstance(error, EXPECTED) and self._may_log():
            self._refusals.info('%s: %s was refused: %s', self.client, name, _in_words(error))
        self.outbox.append(messages.error_reply(message_id, error))
        self._trace.end(message_id, self.client, error)

    def _is_reported_later(self, name: str, error: Exception) -> bool:
        """Whether the vote will say what went wrong with a one-way message."""
        transaction = self._current()
        if transaction is None or name not in _STAGING:
            return False
        if isinstance(error, (OSError, Unsupported, TooLarge, ReadOnlyError)):  # no room, as a rule
            transaction.fail(error)
        return transaction.failure is not None

    def _wait_for_room(self) -> None:
        """Let the client read what it has asked for, before there is more."""
        if not self._have_room():
            raise ProtocolError('it does not read what it asked for')

    def _have_room(self) -> bool:
        """The same; False if the client does not read."""
        if self.outbox.backlog <= ROOM:
            return True
        self.outbox.deliver()
        return self.outbox.wait_for_room(ROOM, ROOM_PATIENCE)

    def _let_it_read(self) -> None:
        """The same, in any thread: a client that does not read is disconnected."""
        if not self._have_room():
            self.outbox.condemned = True
            self._hang_up()

    def _wait_unless_it_ends(self, name: str, args: tuple[Any, ...]) -> None:
        """`_wait_for_room`, but what ends a voted transaction never waits, and a commit only if there is very
        much to be read: everybody else may be waiting for it.
        """
        if name in _COMMITTING:
            transaction = self._transaction
            if self.outbox.backlog <= self.outbox.limit or (
                    name not in _VOTING and transaction is not None and transaction.state is State.VOTED
                    and args[:1] == (transaction.id,)):
                return
        self._wait_for_room()

    def _beside(self, name: str, answer: Answer, job: Callable[[], Any], always: bool = False) -> None:
        """Do what may take long in a thread of its own, and answer when it is done.

        With ``always`` it is also done if the client has left.
        """
        assert self._served is not None
        served: Served = self._served

        def run() -> None:
            try:
                answer(job())
            except Exception as error:
                if not isinstance(error, POSError) or answer is _no_answer:
                    log_failure(served, self.client, name, error)
                answer(error=error)
            self.outbox.deliver()
        if self._jobs is None:
            self._jobs = Jobs(self.outbox, self._let_it_read)
        self._jobs.add(run, self._size, partial(served.run_beside, name), always=always)

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
        self._read_only = read_only
        self._role = role
        # First among those who hear of everything, then the last tid: nothing lies between.
        served.publisher.subscribe(self.outbox)
        served.entered(self)
        if self._may_log():
            logger.info('%s: uses storage %s%s', self.client, storage_name,
                        ' (read only)' if self._read_only else '')
        return served.publisher.last_tid

    def may_come_in(self) -> bool:
        """Whether it has a role at all; if not, that it wanted to is in the audit log."""
        if self._roles.of(self._listening, self.certificate_name) < Role.READ:
            self._forbidden('to use this server', 'it has no role')
            return False
        return True

    def _forbidden(self, what: str, why: str) -> ReadOnlyError:
        """What to raise; the attempt is in the audit log."""
        host = self._address.rpartition(':')[0]
        self._roles.refusals.of(f'{host} {self.certificate_name} {what}').warning(
            '%s: refused %s: %s', self.who, what, why)
        return ReadOnlyError(f'you are refused {what}: {why}')

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
        printable = _printable(str(label)[:100])
        if self._may_log():
            self._labels.info('%s: is called %s', self._address, printable)
        self.label = printable
        self.client = f'{self._address} ({printable})'

    def getInvalidations(self, tid: bytes) -> tuple[bytes, list[bytes]] | None:
        assert self._served is not None
        self._served.catch_up()
        return self._served.invalidations_since(_tid(tid))

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
        _tid(tid)
        served = self._served
        assert served is not None
        served.statistics.loads += len(oids) // 8
        try:
            prefetching.tell(self.outbox, served.load_before or self._storage.loadBefore, oids, tid,
                             self._wait_for_room)
        except Unreachable as error:
            self._database_is_lost(error)

    def loadSerial(self, oid: bytes, tid: bytes) -> bytes:
        record: bytes = self._storage.loadSerial(_oid(oid), _tid(tid))
        return record

    def getTid(self, oid: bytes) -> bytes:
        tid: bytes = self._storage.getTid(_oid(oid))
        return tid

    def history(self, oid: bytes, size: int = 1) -> list[dict[str, Any]]:
        assert self._served is not None
        return telling.entries(self._served.name, self._storage.history(_oid(oid), min(_number(size), MOST_ENTRIES)))

    def record_iternext(self, next: bytes | None = None) -> Any:
        assert self._served is not None
        if next is not None:
            _bytes(next)
        return self._served.method('record_iternext')(next)

    # ---- two-phase commit -----------------------------------------------------------------

    def new_oids(self, n: int = 100) -> list[bytes]:
        count = max(1, min(100, _number(n)))
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
            _tid(tid)
        if status not in (' ', 'p'):
            # A FileStorage takes others for signs of damage, and loses what comes after them.
            raise ValueError('the status of a transaction is a space, or p if it is packed')
        self._begin(id, user, description, extension, tid, status)

    def _begin(self, id: Any, user: bytes, description: bytes, extension: dict[Any, Any],
               tid: bytes | None = None, status: str = ' ') -> Transaction:
        assert self._served is not None
        self._transaction = transaction = Transaction(
            self._served, self.outbox, id, _bytes(user), _bytes(description), extension, tid, status,
            on_expired=self._hang_up, client=self.client, most=self._limits.max_transaction)
        return transaction

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction is in progress; any thread."""
        transaction = self._transaction
        return transaction is not None and not transaction.ended

    def _current(self) -> Transaction | None:
        """The transaction in progress."""
        transaction = self._transaction
        if transaction is not None and transaction.ended:
            self._transaction = transaction = None
        return transaction

    def _in_progress(self, id: Any) -> Transaction:
        transaction = self._current()
        if transaction is None or transaction.id != id:
            raise StorageTransactionError(transaction and transaction.id, id)
        return transaction

    def storea(self, oid: bytes, serial: bytes, record: bytes, id: Any) -> None:
        self._in_progress(id).stage('store', _new_oid(oid), _serial(serial), _record(record),
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
        self._in_progress(id).stage('check', _oid(oid), _tid(serial))

    def deleteObject(self, oid: bytes, serial: bytes, id: Any) -> None:
        self._in_progress(id).stage('delete', _oid(oid), _tid(serial))

    def undoa(self, undo_id: bytes, id: Any) -> None:
        transaction = self._in_progress(id)
        undo_id = _bytes(undo_id)
        transaction.stage('undo', undo_id, size=len(undo_id))
        assert self._served is not None
        transaction.tell_audit = partial(audit.info, '%s: storage %s: undo: %s', self.who, self._served.name)

    def restorea(self, oid: bytes, tid: bytes, record: bytes | None, previous_tid: bytes | None,
                 id: Any) -> None:
        transaction = self._in_progress(id)
        if record is not None:
            _record(record)
        if previous_tid is not None:
            _tid(previous_tid)
        transaction.stage('restore', _new_oid(oid), _tid(tid), record, previous_tid,
                          size=len(record or b''))

    def vote(self, answer: Answer, id: Any, tell_tid: bool = False) -> None:
        self._in_progress(id).vote(answer, bool(tell_tid))

    def settle(self, answer: Answer, tid: bytes, id: Any) -> None:
        assert self._served is not None
        self._beside('settle', answer, partial(self._served.settle, _bytes(tid), id))

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
        uploads.chunk(data if isinstance(data, memoryview) else _bytes(data))

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
        transaction.stage('store_blob', _new_oid(oid), _serial(serial), _record(record), path,
                          size=len(record))

    def storeBlobShared(self, oid: bytes, serial: bytes, record: bytes, filename: str,
                        id: Any) -> None:
        transaction = self._in_progress(id)
        path = blobs.shared_path(self._storage, _new_oid(oid), filename)
        self._uploading().adopt(path)
        transaction.stage('store_blob', oid, _serial(serial), _record(record), path,
                          size=len(record))

    def restoreBlobEnd(self, oid: bytes, tid: bytes, record: bytes, previous_tid: bytes | None,
                       id: Any) -> None:
        transaction = self._in_progress(id)
        path = self._uploading().end()
        self._restore_blob(transaction, oid, tid, record, previous_tid, path)

    def restoreBlobShared(self, oid: bytes, tid: bytes, record: bytes, previous_tid: bytes | None,
                          filename: str, id: Any) -> None:
        transaction = self._in_progress(id)
        path = blobs.shared_path(self._storage, _oid(oid), filename)
        self._uploading().adopt(path)
        self._restore_blob(transaction, oid, tid, record, previous_tid, path)

    def _restore_blob(self, transaction: Transaction, oid: bytes, tid: bytes, record: bytes,
                      previous_tid: bytes | None, path: str) -> None:
        if previous_tid is not None:
            _tid(previous_tid)
        transaction.stage('restore_blob', _new_oid(oid), _tid(tid), _record(record), previous_tid, path,
                          size=len(record))

    def _uploading(self) -> blobs.Uploads:
        transaction = self._current()
        if transaction is None:
            raise StorageTransactionError('a blob is sent without a transaction')
        return transaction.uploads

    def sendBlob(self, answer: Answer, oid: bytes, tid: bytes, large: bool = False) -> None:
        self._need_blobs()
        self._beside('blob', answer,
                     partial(blobs.send, self._storage, self.outbox, _oid(oid), _tid(tid), bool(large)))

    def _need_blobs(self) -> None:
        if not IBlobStorage.providedBy(self._storage):
            raise Unsupported('the storage on the server has no blobs: it needs a blob directory')

    # ---- undo information, packing -----------------------------------------------------------

    def undoInfo(self, answer: Answer, first: int = 0, last: int = -20,
                 specification: dict[str, Any] | None = None) -> None:
        if specification is not None and not isinstance(specification, dict):
            raise TypeError('what is looked for is a dict')
        self._tell_of_undo('undo info', answer, first, last, specification)

    def undoLog(self, answer: Answer, first: int = 0, last: int = -20) -> None:
        self._tell_of_undo('undo log', answer, first, last, None)

    def _tell_of_undo(self, name: str, answer: Answer, first: int, last: int,
                      specification: dict[str, Any] | None) -> None:
        """Of transactions that can be undone: at most `MOST_ENTRIES`, and as long as somebody wants to know."""
        _number(first)
        last = max(last, -MOST_ENTRIES) if _number(last) < 0 else min(last, first + MOST_ENTRIES)
        served = self._served
        assert served is not None
        if not served.supports_undo:
            answer([])
            return
        storage, outbox = self._storage, self.outbox

        def is_wanted(entry: dict[str, Any]) -> bool:
            """What `UndoLogCompatible.undoInfo` asks, and whether it is to go on: a file may be very long."""
            if outbox.gone:
                raise StorageError('nobody waits for the answer')
            return not any(entry.get(key) != value for key, value in (specification or {}).items())

        if isinstance(storage, UndoLogCompatible):
            ask = partial(storage.undoLog, first, last, is_wanted)
        elif name == 'undo log':
            ask = partial(storage.undoLog, first, last)
        else:
            ask = partial(storage.undoInfo, first, last, specification)
        self._beside(name, answer, lambda: telling.entries(served.name, ask()))

    def pack(self, answer: Answer, time: float, wait: bool = True) -> None:
        if not isinstance(time, (int, float)) or not 0 <= time <= LAST_TIME:
            raise TypeError('the time to pack to is a number of seconds since 1970')
        self._beside('pack', answer if wait else _no_answer, partial(self._pack, time), always=True)
        if not wait:
            answer(None)

    def _pack(self, time: float) -> None:
        assert self._served is not None
        result = 'done'
        try:
            self._served.pack(time)
        except BaseException as error:
            result = f'failed: {type(error).__name__}: {error}'
            raise
        finally:
            audit.info('%s: storage %s: pack as of %s: %s', self.who, self._served.name, _date(time), result)

    def stop_pack(self) -> bool:
        assert self._served is not None
        return self._served.packing.stop()

    # ---- iteration ----------------------------------------------------------------------------

    def iterator_start(self, start: bytes | None, stop: bytes | None) -> int:
        for tid in (start, stop):
            if tid is not None:
                _tid(tid)
        assert self._served is not None
        make = partial(self._served.history.iterator, start, stop)
        if not self._allowance.take():
            raise ValueError(f'{self._allowance.most} iterators are in use, of all clients together; try later')
        try:
            return self._keep(self._iterators, make)
        except BaseException:
            self._allowance.give_back()
            raise

    def _keep(self, iterators: dict[int, Iterator[Any]], make: Callable[[], Any]) -> int:
        if len(iterators) >= ITERATORS:  # each may hold a file open
            raise ValueError(f'{ITERATORS} iterators are in use; end some before starting others')
        iterator_id = next(self._iterator_ids)
        iterators[iterator_id] = iter(make())
        return iterator_id

    def iterator_next(self, iid: int) -> Any:
        try:
            transaction = next(self._iterators[iid])
        except StopIteration:
            self.iterator_gc([iid])
            return None
        self._last_transactions[iid] = transaction
        assert self._served is not None
        extension = telling.plain(self._served.name, transaction.extension, transaction.tid)
        return transaction.tid, transaction.status, transaction.user, transaction.description, extension

    def iterator_record_start(self, iid: int, tid: bytes) -> int:
        transaction = self._last_transactions[iid]
        if transaction.tid != tid:
            raise ValueError('records are asked for of a transaction that is not the last one')
        return self._keep(self._record_iterators, lambda: transaction)

    def iterator_record_next(self, rid: int) -> Any:
        try:
            record = next(self._record_iterators[rid])
        except StopIteration:
            self.iterator_gc([rid])
            return None
        return record.oid, record.tid, record.data, record.data_txn

    def iterator_gc(self, ids: list[int]) -> None:
        for iterator_id in ids:
            self._last_transactions.pop(iterator_id, None)
            self._record_iterators.pop(iterator_id, None)  # it has its transaction's file
            iterator = self._iterators.pop(iterator_id, None)
            if iterator is not None:
                self._allowance.give_back()
                close = getattr(iterator, 'close', None)
                if close is not None:
                    close()

    # ---- the end ---------------------------------------------------------------------------------

    def close(self) -> None:
        """The connection has ended: leave nothing behind.  In the session's own thread."""
        if self._transaction is not None:
            self._transaction.abandon()
        if self._served is not None:
            self._served.publisher.unsubscribe(self.outbox)
            self._served.left(self)
        self.iterator_gc([*self._iterators, *self._record_iterators])
        self._jobs, self._heard = None, lambda: None  # who know us: see `Outbox.forget_line`


class MeasuredSession(Session):
    """A session that measures how long it takes to answer loads, which is what servers mostly do."""

    def _load(self, message_id: PickledId, oid: bytes, tid: bytes) -> None:
        begin = time.perf_counter()
        super()._load(message_id, oid, tid)
        self.loads.observe(time.perf_counter() - begin)


#: Methods that are given a function to answer with, since they may answer later.
_ANSWERING = frozenset({'vote', 'commit', 'tpc_abort', 'undoInfo', 'undoLog', 'pack', 'verify', 'settle',
                        'sendBlob', 'figures'})

#: Methods that are for those with the role of that name, and what they do.
_FOR_ADMINS = {'pack': 'to pack', 'stop_pack': 'to stop a pack', 'undoa': 'to undo'}

#: Methods without which the commit lock would be kept.
_COMMITTING = frozenset({'vote', 'commit', 'tpc_finish', 'tpc_abort'})

#: Those of them that may have to wait for it.
_VOTING = frozenset({'vote', 'commit'})

#: One-way methods that prepare a vote.
_STAGING = frozenset({
    'storea', 'stores', 'checkCurrentSerialInTransaction', 'deleteObject', 'undoa', 'restorea',
    'storeBlobStart', 'storeBlobChunk', 'storeBlobEnd', 'storeBlobShared', 'restoreBlobEnd',
    'restoreBlobShared'})


def _oid(value: Any) -> bytes:
    if not isinstance(value, bytes) or len(value) != 8:
        raise ValueError('an oid is 8 bytes')
    return value


def _new_oid(value: Any) -> bytes:
    """An oid under which something is stored: storages give later ones to new objects."""
    if _oid(value)[:4] == b'\xff\xff\xff\xff':
        raise ValueError('an oid that leaves no room for later ones')
    return value  # type: ignore[no-any-return]


def _tid(value: Any) -> bytes:
    if not isinstance(value, bytes) or len(value) != 8:
        raise ValueError('a tid is 8 bytes')
    return value


def _serial(value: Any) -> bytes:
    """Of the revision that was changed.  Stock clients pass on ZODB's None, or text, for a new object."""
    return z64 if value is None or value == '\0' * 8 else _tid(value)


def _number(value: Any) -> int:
    if not isinstance(value, int) or abs(value) > MOST:
        raise TypeError('a whole number of usual size is expected')
    return value


def _record(value: Any) -> bytes:
    if not isinstance(value, bytes):
        raise TypeError('a record is bytes')
    if not value:
        raise ValueError('a record is never empty')  # it would make a FileStorage unreadable
    return value


def _bytes(value: Any) -> bytes:
    if isinstance(value, str):
        return value.encode('utf-8', 'surrogateescape')
    if not isinstance(value, bytes):
        raise TypeError('bytes or text is expected')
    return value


def _in_words(error: Exception) -> str:
    """An error in one line for the log, whatever a client has put into it."""
    try:
        text = str(error)
    except Exception:  # an integer may be too long for it
        text = 'details that cannot be shown'
    return f'{type(error).__name__}: {_printable(text[:200])}'


def _printable(text: str) -> str:
    return ''.join(char if char.isprintable() else '?' for char in text)


def _date(seconds: float) -> str:
    return time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(seconds))


def _no_answer(result: Any = None, error: BaseException | None = None) -> None:
    pass
