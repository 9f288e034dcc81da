"""One served storage, and what all its sessions share: commit lock, publisher, statistics.

There is one `Served` for each storage *object*, however many names it is served under.
"""

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING
from typing import Any

from persistent.TimeStamp import TimeStamp
from ZODB.interfaces import IBlobStorage
from ZODB.interfaces import IMVCCStorage
from ZODB.interfaces import IStorageRestoreable
from ZODB.POSException import POSKeyError
from ZODB.POSException import Unsupported
from ZODB.utils import maxtid
from ZODB.utils import z64
from zope.interface import providedBy

from zeo.server import blobs
from zeo.server import conflicts
from zeo.server.announcing import Wrapper
from zeo.server.announcing import announces_itself
from zeo.server.backing import POLL_INTERVAL
from zeo.server.commitlock import CommitLock
from zeo.server.counts import Statistics
from zeo.server.counts import Traffic
from zeo.server.filereader import load_before_of
from zeo.server.filewriter import writer_of
from zeo.server.histogram import Histogram
from zeo.server.history import History
from zeo.server.packing import Packing
from zeo.server.publisher import Publisher
from zeo.server.publisher import deliver
from zeo.server.seldom import SeldomEach
from zeo.server.tids import Tids
from zeo.server.worker import Worker
from zeo.wire.announcements import info_notice
from zeo.wire.framing import Frame
from zeo.wire.methods import EXTENSIONS

if TYPE_CHECKING:
    from zeo.server.gateway import Gateway
    from zeo.server.session import Session
    from zeo.server.transaction import Transaction

logger = logging.getLogger(__name__)


#: How many transactions whose tid was told are remembered when they are committed.
MOST_COMMITTED = 1000

#: After so many revisions it is looked whether somebody still wants to know.
LOOK_UP = 256


class Served:
    """A storage as all sessions see it.

    ``transaction_timeout`` limits in seconds how long a client may hold the commit lock (None: no
    limit).  ``invalidation_queue_size`` is how many recent transactions are remembered for clients
    that come back; with ``invalidation_age`` (seconds) the storage itself is asked about those that
    are older than the queue but not older than that.  With ``client_conflict_resolution`` conflicts
    are sent to the client instead of being resolved here.  With ``blob_sync`` a vote is not answered before
    the blobs are on the disk.  A storage that others commit to, too, is looked at each ``poll_interval``
    seconds (`zeo.server.gateway`).
    """

    def __init__(self, name: str, storage: Any, *, read_only: bool = False,
                 transaction_timeout: float | None = None, invalidation_queue_size: int = 100,
                 invalidation_age: float | None = None,
                 client_conflict_resolution: bool = False, blob_sync: bool = True,
                 poll_interval: float = POLL_INTERVAL) -> None:
        self.name = name
        self._gateway: Gateway | None = None
        if IMVCCStorage.providedBy(storage):
            from zeo.server.gateway import fronted  # few are of that kind

            self._gateway = storage = fronted(storage, poll_interval)
        self.storage = storage
        self._read_only = read_only
        self.client_conflict_resolution = client_conflict_resolution
        self.blob_sync = blob_sync
        self.announces_itself = announces_itself(storage)
        self.statistics = Statistics()
        self.failures = SeldomEach(logger)  # of what clients ask for, as they may ask again and again
        self.lock = CommitLock(transaction_timeout, name)
        self.packing = Packing(name, storage)
        self.history = History(self.method)
        # Those who use it, and what those did that have left; guarded by `_register`, a leaf.
        self.sessions: dict['Session', None] = {}
        self._departed = Traffic(0, 0, Histogram())
        self._register = threading.Lock()
        # Runs the votes that had to wait for the commit lock, but for quick ones, or may have to wait for a
        # pack.  Since they hold the commit lock there is never more than one.
        self.voter = Worker(f'zeo voter {name}')
        # Transactions whose tid was told to their clients at vote, by tid, until they end.  Changed
        # by whoever has the commit lock.
        self.told: dict[bytes, 'Transaction'] = {}
        # The tids of the latest of them that were committed; a pack may remove them from the storage.
        self.committed: deque[bytes] = deque(maxlen=MOST_COMMITTED)
        self._tids = Tids()
        self._can_choose = (not self.announces_itself and hasattr(storage, 'iterator')
                            and IStorageRestoreable.providedBy(storage))
        # A storage that is itself a client (`ClientStorage`): the server behind it chooses, and is asked.
        self.asks_further = hasattr(storage, 'settle')
        #: whether a small transaction is voted without another server, or the like, having a say
        self.votes_by_itself = not self.announces_itself and self._gateway is None
        self._invalidation_age = invalidation_age
        self._helpers: set[threading.Thread] = set()
        # Whether the storage finds conflicts in a way that does not look into what a client sent.
        self.finds_conflicts = (
            conflicts.take_over(storage, client_conflict_resolution) or self.announces_itself)
        #: a faster way to load, if there is one; else the storage's ``loadBefore`` is called
        self.load_before = load_before_of(storage)
        #: to be told of what has begun there, if it is of the kind
        self.file_writer = writer_of(storage)
        if IBlobStorage.providedBy(storage):
            blobs.remove_leftovers(storage)
        for each in conflicts.storages(storage):
            blobs.take_over(each)
        recent: list[tuple[bytes, list[bytes]]] = []
        if hasattr(storage, 'lastInvalidations') and not self.announces_itself:
            recent = list(storage.lastInvalidations(invalidation_queue_size))
        # A storage that announces itself is listened to first and asked for its last tid second: what
        # lies between is either announced, or is not news to anybody.
        first_tid = z64 if self.announces_itself else self._last_tid_of_storage()
        self.publisher = Publisher(first_tid, recent, invalidation_queue_size)
        self._in_doubt = False  # whether the storage may have transactions that nobody was told of
        if hasattr(storage, 'registerDB'):
            storage.registerDB(Wrapper(self))
        if self.announces_itself:
            self.publisher.start_afresh(self._last_tid_of_storage())

    def entered(self, session: 'Session') -> None:
        """It uses this storage from now on."""
        with self._register:
            self.sessions[session] = None

    def left(self, session: 'Session') -> None:
        """It does not any more; what it did still counts."""
        with self._register:
            if self.sessions.pop(session, self) is None:
                self._departed = self._departed.plus([session.traffic])

    def traffic(self) -> Traffic:
        """Of all sessions, also those that have left; never less than before."""
        with self._register:
            return self._departed.plus(each.traffic for each in self.sessions)

    @property
    def active_txns(self) -> int:
        """How many transactions are in progress."""
        return sum(each.in_transaction for each in list(self.sessions))

    @property
    def read_only(self) -> bool:
        """Whether clients may not write, as far as is known: a storage behind may change its mind."""
        return self._read_only or bool(self.storage.isReadOnly())

    @property
    def supports_undo(self) -> bool:
        return bool(getattr(self.storage, 'supportsUndo', lambda: False)())

    def method(self, name: str) -> Any:
        """A method that not every storage has; `Unsupported` if this one does not."""
        try:
            return getattr(self.storage, name)
        except AttributeError:
            raise Unsupported(f'the storage on the server has no {name}') from None

    def _last_tid_of_storage(self) -> bytes:
        tid: bytes = self.storage.lastTransaction() or z64
        return tid

    def info(self) -> dict[str, Any]:
        """The answer to ``get_info``."""
        storage = self.storage
        return {
            'length': len(storage),
            'size': storage.getSize(),
            'name': storage.getName(),
            'supportsUndo': self.supports_undo,
            'supports_record_iternext': hasattr(storage, 'record_iternext'),
            'interfaces': tuple(
                (each.__module__, each.__name__) for each in providedBy(storage).__iro__),
            EXTENSIONS: (*self.extensions, 'pulse', *blobs.extensions(storage)),
        }

    @property
    def extensions(self) -> tuple[str, ...]:
        """What this server can do beyond the protocol for clients that ask for it."""
        can_settle = self.storage.can_settle if self.asks_further else self._can_choose or self._keeps_receipts
        return ('verify', 'figures', 'stores', 'prefetch', *(['settle'] if can_settle else []))

    def sizes(self) -> dict[str, int]:
        """What ``info`` notices tell."""
        return {'length': len(self.storage), 'size': self.storage.getSize()}

    def size_notice(self) -> Frame:
        """The ``info`` notice; nothing if the storage cannot tell, for that is no reason to fail."""
        try:
            return info_notice(**self.sizes())
        except Exception:
            logger.exception('storage %s: does not tell its size', self.name)
            return ()

    def status(self) -> dict[str, Any]:
        """The answer to ``server_status`` and to the monitoring probe."""
        counts = self.statistics
        alive = self.lock.clock_is_alive
        return {
            'loads': counts.loads,
            'stores': counts.stores,
            'commits': counts.commits,
            'aborts': counts.aborts,
            'conflicts': counts.conflicts,
            'conflicts_resolved': counts.conflicts_resolved,
            'active_txns': self.active_txns,
            'connections': len(self.publisher.subscribers),
            'waiting': self.lock.waiting,
            'lock_time': self.lock.since,
            'start': time.ctime(counts.started),
            'last-transaction': self.publisher.last_tid.hex(),
            'timeout-thread-is-alive': 'stub' if alive is None else alive,
        }

    def invalidations_since(self, tid: bytes) -> tuple[bytes, list[bytes]] | None:
        """The answer to ``getInvalidations``: what was changed after ``tid``; None if not known."""
        known = self.publisher.since(tid)
        if self._gateway is not None and (known is None or tid > known[0]):
            last_tid = self.publisher.last_tid  # first, as below
            oids = self._gateway.changed_since(tid)
            return None if oids is None else (last_tid, oids)
        if known is not None or self._invalidation_age is None or self.announces_itself:
            return known
        age = time.time() - TimeStamp(tid).timeTime()
        if age > self._invalidation_age or not hasattr(self.storage, 'iterator'):
            return None
        # First the last tid, then the storage: what is finished meanwhile is announced.
        last_tid = self.publisher.last_tid
        oids = self.history.changed(tid, last_tid)
        return None if oids is None else (last_tid, oids)

    def outdated(self, revisions: bytes, is_wanted: Callable[[], bool] = lambda: True) -> bytes:
        """The answer to ``verify``: which of these revisions are not current (any more).

        ``revisions`` are pairs of oid and tid, 16 bytes each; the answer is oids, 8 bytes each.

        Nothing has to be ordered here.  The client has registered before, so a change that this
        answer does not know of is announced to it, before the answer or after.  Ends soon when it is not
        wanted any more.
        """
        if self._gateway is not None:  # one question for all of them
            pairs = [(revisions[at:at + 8], revisions[at + 8:at + 16]) for at in range(0, len(revisions), 16)]
            current_ones = self._gateway.current([oid for oid, _ in pairs])
            return b''.join([oid for oid, tid in pairs if current_ones.get(oid) != tid])
        get_tid = self.storage.getTid
        outdated = []
        for at in range(0, len(revisions), 16):
            if not at % (16 * LOOK_UP) and not is_wanted():
                break
            oid = revisions[at:at + 8]
            try:
                current = get_tid(oid)
            except POSKeyError:
                current = None
            if current != revisions[at + 8:at + 16]:
                outdated.append(oid)
        return b''.join(outdated)

    # ---- the fate of a transaction -------------------------------------------------------

    @property
    def _keeps_receipts(self) -> bool:
        return self._gateway is not None and self._gateway.keeps_receipts

    def choose_tid(self, meta: Any) -> bytes | None:
        """A tid for a transaction that is about to vote, never chosen before; None: the storage will.

        With the commit lock.
        """
        if self._gateway is not None:
            self._gateway.promise(meta)
        if not self._can_choose:
            return None
        return self._tids.choose(self.storage.lastTransaction() or z64)

    def receipt(self, meta: Any, tid: bytes | None) -> bytes | None:
        """What is told at vote, to be given to `settle`: the tid if it is known, else what finds it."""
        return tid if self._gateway is None else self._gateway.receipt(meta)

    def settle(self, tid: bytes, id: Any) -> bool | bytes:
        """The answer to ``settle``: whether the transaction that was to get ``tid`` is committed.

        If ``tid`` is a `receipt` of another form, the answer is the tid that it has got, or False.

        If it is still voted, on a connection that was lost, it is aborted now, so that the answer is
        final.  It may be asked after a restart, since a tid is chosen once and stays with the
        transaction in the storage.  `StorageError` if it was packed away since, before the restart.
        """
        transaction = self.told.get(tid)
        if transaction is not None and transaction.id == id:
            transaction.settle()
        if self.asks_further:
            # The transaction has the same id there.  Whatever connection it was on there, this one or one
            # that was lost before, nothing can finish it after this answer.
            committed: bool | bytes = self.storage.settle(tid, id)
            return committed
        if self._gateway is not None:
            return self._gateway.outcome(tid) or False
        if tid in self.committed:
            return True
        return self.history.has(tid)

    # ---- pack -----------------------------------------------------------------------

    def pack(self, pack_time: float) -> None:
        """Pack the storage; raises what the storage raises, and `StorageError` if a pack is in progress."""
        with self.packing:
            started = time.monotonic()
            logger.info('storage %s: packing as of %s', self.name, time.ctime(pack_time))
            self.packing.run(pack_time)
            if self.load_before is not None:
                with contextlib.suppress(Exception):
                    self.load_before(z64, maxtid)  # so that it lets go of the file that was packed
            logger.info('storage %s: packed in %.1f s', self.name, time.monotonic() - started)
        deliver(self.publisher.tell(self.size_notice()))

    # ---- when something went wrong in the middle ----------------------------------------

    def hang_up_on_everybody(self) -> None:
        """A transaction may be in the storage and was not announced: nobody may trust its cache."""
        try:
            last_tid = self._last_tid_of_storage()
        except Exception:
            logger.exception('storage %s: does not tell its last transaction', self.name)
            last_tid, self._in_doubt = z64, True
        deliver(self.publisher.start_afresh(last_tid))

    @property
    def registers_at_once(self) -> bool:
        """Whether `catch_up` asks the storage nothing."""
        return not (self.announces_itself or self._in_doubt)

    def catch_up(self, announcing: bytes | None = None) -> None:
        """See to it that nobody takes the last tid announced for the storage's if it is not.

        What announces itself never shows a tid before it is announced, except when it could not tell
        what had changed (``invalidateCache``): its last tid moves after that.  Stock ZEO's clients show the
        thread that is ``announcing`` a tid just that one.  Raises what the storage raises.
        """
        if self.announces_itself or self._in_doubt:
            last_tid = self._last_tid_of_storage()  # first: the publisher's may only be later
            if last_tid > self.publisher.last_tid and last_tid != announcing:
                logger.warning('storage %s: has transactions that it did not announce; everybody is'
                               ' disconnected', self.name)
                deliver(self.publisher.start_afresh(last_tid))
            self._in_doubt = False

    # ---- threads ------------------------------------------------------------------------

    def start(self) -> None:
        """Start the threads without which a commit could not go on, while there still are threads."""
        self.voter.start()
        self.lock.start()
        if self._gateway is not None:
            self._gateway.start()

    def run_beside(self, name: str, job: Callable[[], None]) -> None:
        """Run a job that may take long on a thread of its own; `close` waits for it."""
        def run() -> None:
            try:
                job()
            finally:
                self._helpers.discard(thread)
        thread = threading.Thread(target=run, name=f'zeo {name} {self.name}', daemon=True)
        self._helpers.add(thread)
        try:
            thread.start()
        except BaseException:
            self._helpers.discard(thread)
            raise

    def close(self) -> None:
        """Wait for votes in progress, stop a pack, end the threads, close the storage.  No session is left."""
        self.voter.close()
        self.packing.close()
        for helper in list(self._helpers):
            helper.join()
        self.lock.close()
        if self.file_writer is not None:
            self.file_writer.close()
        self.storage.close()
        self.load_before = None
