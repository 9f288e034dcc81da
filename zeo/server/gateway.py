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

All three are checked exhaustively, within small bounds, by a model (`tests/models/gateway.pml`).

If a database is reached that does not have the last announced transaction, or none so late, nothing is read
from it (`zeo.server.relational`).  A transaction that was packed before the poller saw it may have lost objects that
it changed, which later ones have changed again.  Announced without these it would be seen torn, so there it is not
announced, nor are those after it: everybody is hung up on, and comes back to the state as it is now.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import zope.interface
from ZODB import interfaces
from ZODB.Connection import TransactionMetaData
from ZODB.POSException import StorageError
from ZODB.utils import z64

from zeo.server import relational
from zeo.server.backing import POLL_INTERVAL
from zeo.server.backing import Backing
from zeo.server.backing import Change
from zeo.server.backing import Unreachable
from zeo.server.backing import View
from zeo.server.backing import plainly
from zeo.server.readers import PAUSE
from zeo.server.readers import Readers
from zeo.server.reading import Reading
from zeo.server.writing import Writing

logger = logging.getLogger(__name__)

#: How often, in seconds, the database is asked for its size.
SIZES = 10.0

#: How long, in seconds, one waits for the end of a transaction whose fate is asked for.
FATE_PATIENCE = 20.0

#: What a gateway provides if the storage behind it does.
_INTERFACES = (
    interfaces.IStorage, interfaces.IStorageIteration, interfaces.IStorageUndoable,
    interfaces.IStorageRestoreable, interfaces.IExternalGC, interfaces.IBlobStorage,
    interfaces.IBlobStorageRestoreable)


class Gateway(Reading, Writing):
    """A storage in front of one with instances; any thread may call it.

    Transactions are one at a time, as under the server's commit lock.
    """

    def __init__(self, root: Any, backing: Backing, poll_interval: float = POLL_INTERVAL) -> None:
        super().__init__()
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
        self._failed = 0, ''  # and of the last one for which the database could not be reached
        self._wrapper: Any = None
        # The generation and the last tid announced move together, in the turn; anybody may read them.
        self._known: tuple[int, bytes] = (0, z64)
        self._readers = Readers(backing, lambda: self._known)
        self._oids = threading.Lock()  # held while the root gives out an oid, which may ask the database
        self._sizes = (0, 0)
        self._sized = -SIZES
        self._closed = threading.Event()
        self._lost_since: float | None = None  # time.monotonic(), if the database is away; the thread's
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

    def catch_up(self, patience: float | None = None) -> None:
        """Announce all that was committed before the call.

        `Unreachable` if the database cannot be reached for so many seconds.
        """
        until = time.monotonic() + (self.patience if patience is None else patience)
        asked = self._begun
        while True:
            tried = self._begun
            try:
                with self._my_turn():
                    if self._polled <= asked:  # else somebody has polled meanwhile
                        if self._failed[0] > tried:  # or tried to: that may take long
                            raise Unreachable(self._failed[1])
                        try:
                            self._poll()
                        except Unreachable as error:
                            self._failed = self._begun, str(error)
                            raise
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
        try:
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
        except relational.Discontinued as error:
            with plainly():
                self._begin_afresh(poller, error)
        self._polled = number
        if own is not None:  # one that changed nothing need not be told apart by the storage
            if own <= self.announced:  # with all others, when everybody began afresh
                raise Unreachable('everybody is disconnected, and has to ask what became of it')
            generation = self._known[0] + 1
            self._known = generation, self.announced
            publish(own)
            self._known = generation, own

    def _look(self) -> View:
        """The poller with a new snapshot.  In the turn.  `Unreachable` if there is none to be had."""
        poller = self._poller
        if poller is not None:
            with contextlib.suppress(Unreachable):
                return self._refreshed(poller)
        with plainly():
            self._poller = poller = self._backing.open()
        return self._refreshed(poller)

    def _refreshed(self, poller: View) -> View:
        try:
            with plainly():
                try:
                    self._backing.refresh(poller, self.announced)
                except relational.Discontinued as error:
                    self._backing.refresh(poller, z64)
                    self._begin_afresh(poller, error)
        except BaseException:
            self._poller = None
            poller.discard()
            raise
        return poller

    def _begin_afresh(self, poller: View, reason: relational.Discontinued) -> None:
        """It cannot be told what changed: whoever has an older state may not go on with that."""
        logger.error('storage %s: %s; everybody is disconnected', self.getName(), reason)
        self._backing.forget()
        self._readers.discard()
        self._known = self._known[0] + 1, self._backing.newest(poller)
        self._wrapper.invalidateCache()

    def _changes(self, poller: View) -> Iterator[Change]:
        try:
            with plainly():
                yield from self._backing.changes(poller, self.announced)
        except relational.Discontinued:
            raise
        except Exception:
            self._poller = None
            poller.discard()
            raise

    def start(self) -> None:
        """Begin to look for others' transactions also if nobody asks."""
        self._thread.start()

    def _watch(self) -> None:
        waiting = True
        while not self._closed.wait(self._interval):
            try:
                self.catch_up(0)
                self._readers.rest()
                self._look_at_sizes()
            except Unreachable as error:
                now = time.monotonic()
                if self._lost_since is None:
                    self._lost_since = now
                    logger.warning('storage %s: %s', self.getName(), error)
                elif waiting and now - self._lost_since > self.patience:
                    waiting = False
                    logger.error('storage %s: %s for %.0f s; everybody is disconnected', self.getName(), error,
                                 now - self._lost_since)
                    with self._my_turn():
                        self._wrapper.invalidateCache()
            except Exception:
                logger.exception('storage %s: the database cannot be looked at', self.getName())
            else:
                if self._lost_since is not None:
                    logger.warning('storage %s: the database is there again, after %.1f s', self.getName(),
                                   time.monotonic() - self._lost_since)
                self._lost_since, waiting = None, True

    def is_connected(self) -> bool:
        """Whether the database answered at the last look."""
        return self._lost_since is None

    def registerDB(self, wrapper: Any) -> None:
        """Who is to be told; before `start`."""
        self._wrapper = wrapper

    def lastTransaction(self) -> bytes:
        """The tid announced last, after everything committed before the call was announced."""
        if self._holder != threading.get_ident():  # else it is being announced just now
            self.catch_up()
        return self.announced

    # ---- commits ------------------------------------------------------------------------

    def tpc_finish(self, transaction: Any, callback: Callable[[bytes], Any] = lambda tid: None) -> bytes:
        """Commit it, announce what came before, and call back in its place."""
        with self._finishing(transaction):
            assert self._writer is not None
            self._backing.prepare(self._writer)
        with self._my_turn():
            with self._finishing(transaction) as storage:
                tid: bytes = storage.tpc_finish(transaction)
            self._transaction = None
            self._poll(tid, callback)
        return tid

    @contextlib.contextmanager
    def _finishing(self, transaction: Any) -> Iterator[Any]:
        try:
            with self._committing(transaction) as storage:
                yield storage
        except Exception as error:
            # Whatever became of it, it is not in progress any more.  If it is committed, it will be found like
            # those of others, and announced to everybody; its own client has to ask.
            self._drop_writer()
            logger.error('storage %s: a transaction failed while it was being finished: %s', self.getName(), error)
            raise Unreachable('a transaction failed while it was being finished') from error

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
            view = self._backing.open()
            try:
                view.storage.poll_invalidations()
                if self._backing.newest(view) < self.announced:
                    # The last transaction had no objects (any more) and was packed away.  It must not seem
                    # to others as if the database were older than what clients know: one without objects
                    # takes its place.
                    mark = TransactionMetaData('', 'packed')
                    view.storage.tpc_begin(mark)
                    view.storage.tpc_vote(mark)
                    view.storage.tpc_finish(mark)
            finally:
                view.discard()
        with self._my_turn():  # no reader shows any more what was packed away
            self._known = self._known[0] + 1, self.announced
        self.catch_up()

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
        # RelStorage's own name for itself tells how PostgreSQL is reached, which is no client's business.
        kind = type(self._root).__name__
        return kind if name.startswith(f'{kind}: <') else name

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
