"""One client's transaction, from ``tpc_begin`` to its end, whoever ends it.

Until ``vote`` everything is staged and the storage is not touched.  A vote takes the commit lock, for
which it may have to wait; it keeps it until the transaction is finished or aborted.  A quick vote that had to
wait is run by the thread that finished the transaction before.  Finish, abort,
time-out and disconnection *claim* the transaction by moving its state, in one step; who comes second
does nothing.

      BEGUN --vote--> WAITING --granted--> VOTING --ok--> VOTED --finish--> FINISHING --> ENDED
        ^                |                  |  |             |
        |              abort                |  error     abort, time-out, loss --> ABORTING --> ENDED
        |                +--> ENDED         |  +--> ENDED
        +------- the client must resolve ---+

A finishing transaction is never given up, however slow the disk is.  An abort that meets a voting one
leaves a note, and the thread that votes then aborts.
"""

import enum
import logging
import threading
import time
from collections.abc import Callable
from collections.abc import Container
from collections.abc import Sequence
from typing import Any

from transaction.interfaces import TransientError
from ZODB.Connection import TransactionMetaData
from ZODB.interfaces import IBlobStorage
from ZODB.POSException import ConflictError
from ZODB.POSException import POSError
from ZODB.POSException import ReadOnlyError
from ZODB.POSException import StorageError
from ZODB.POSException import StorageTransactionError
from ZODB.POSException import Unsupported

from zeo.server.backing import Unreachable
from zeo.server.blobs import Uploads
from zeo.server.limits import Limits
from zeo.server.limits import TooLarge
from zeo.server.outbox import Outbox
from zeo.server.publisher import deliver
from zeo.server.replay import Replay
from zeo.server.served import Served
from zeo.server.staging import OVERHEAD
from zeo.server.staging import Staging
from zeo.wire import messages
from zeo.wire.framing import Frame
from zeo.wire.stores import Store

logger = logging.getLogger(__name__)

#: Stores that count as so many bytes are voted in a millisecond or less.
QUICK = 64 * 1024

#: Appends the reply to a request: called with a result, or with ``error=``.
Answer = Callable[..., None]


class State(enum.Enum):
    BEGUN = 'begun'
    WAITING = 'waiting for the commit lock'
    VOTING = 'voting'
    VOTED = 'voted'
    FINISHING = 'finishing'
    ABORTING = 'aborting'
    ENDED = 'ended'


class _Asked(enum.Enum):
    """What became of the wish to abort a transaction."""

    CLAIMED = 'claimed'  #: who asked has to do it
    NOTED = 'noted'  #: the thread that votes will do it, and answer
    TOO_LATE = 'too late'  #: it is being finished or has ended


def log_failure(served: Served, client: str, what: str, error: BaseException) -> None:
    """What the machine refuses, such as room on its disk, takes one line; a surprise takes a traceback.

    Clients may be able to repeat it, so each kind of failure is told once a minute.
    """
    surprise = not isinstance(error, OSError)
    served.failures.of(f'{what} {type(error).__name__}').error(
        '%s: %s failed: %s', client, what, 'not foreseen' if surprise else error,
        cause=error if surprise else None)


class Transaction:
    """A transaction in progress; a `zeo.server.commitlock.Waiter`.

    ``id`` is the client's name for it.  The session's thread calls the methods, except `granted`, `go_on`,
    `expired` and `abandon`, which any thread may call.  ``on_expired`` ends the connection.  ``most`` is how
    many bytes it may have.
    """

    def __init__(self, served: Served, outbox: Outbox, id: Any, user: bytes, description: bytes,
                 extension: dict[Any, Any], tid: bytes | None = None, status: str = ' ',
                 on_expired: Callable[[], None] = lambda: None, client: str = '',
                 most: int = Limits().max_transaction) -> None:
        self.id = id
        self.client = client
        self._served = served
        self._outbox = outbox
        self._meta = TransactionMetaData(user, description, extension)
        self._tid = tid
        self._status = status
        self._on_expired = on_expired
        self._staging = Staging()
        self._most = most
        self._size = 0  # bytes that were staged and uploaded
        # Is told what became of the transaction, at its end, if somebody has to know.
        self.tell_audit: Callable[[str], None] = _no_answer
        self._outcome = 'not committed'
        self._tells_sizes = True  # at the end; else the client asks
        self._uploads: Uploads | None = None
        # Guards `state`, `_abort_answers` and that the vote is given up; a leaf, held for one move.
        self._mutex = threading.Lock()
        self.state = State.BEGUN
        self._abort_answers: list[Answer] = []
        self.failure: Exception | None = None  # why it cannot be voted any more
        # The following belong to whoever votes, then to whoever has claimed the transaction.
        self._replay: Replay  # of the latest vote
        self._vote_answer: Answer = _no_answer
        self._tell_tid = False
        self._quick = False  # the vote may be run by another session's thread
        self._told: bytes | None = None  # the tid that was told
        self._asked_at = 0.0  # time.perf_counter() of the vote
        self._settled = threading.Lock()  # released at the end if the client knows the tid
        self._settled.acquire()

    def _move(self, before: State, after: State) -> bool:
        with self._mutex:
            if self.state is not before:
                return False
            self.state = after
            return True

    @property
    def ended(self) -> bool:
        return self.state is State.ENDED

    # ---- staging ------------------------------------------------------------------

    def stage(self, operation: str, *args: Any, size: int = 0) -> None:
        """Keep an operation (the name of a method of `Replay`, and its arguments) until vote."""
        if self.state is not State.BEGUN:
            raise StorageTransactionError(f'the transaction is {self.state.value}')
        if self.failure is None:
            self.count(OVERHEAD + size)
            self._staging.append((operation, args), size)

    def stage_stores(self, stores: Sequence[Store], size: int) -> None:
        """The same with many stores, whose records have so many bytes together."""
        overhead = OVERHEAD * len(stores)
        if self.state is not State.BEGUN:
            raise StorageTransactionError(f'the transaction is {self.state.value}')
        self._tells_sizes = False
        if self.failure is None and stores:
            self.count(overhead + size)
            self._staging.append(('stores', (stores,)), overhead - OVERHEAD + size)

    def count(self, size: int) -> None:
        """So many bytes are added; `TooLarge` if these are too many."""
        self._size += size
        if self._size > self._most:
            raise TooLarge(f'it has more than {self._most} bytes')

    def fail(self, error: Exception) -> None:
        """Something could not be staged, for want of room as a rule: the next vote will say so.

        Nobody waits for an answer to what is staged; ending the connection would not tell the client
        why.
        """
        if self.failure is None:
            if isinstance(error, ReadOnlyError):
                self.failure = error
            else:
                self._served.failures.of('stage').error(
                    '%s: the transaction cannot be staged: %s', self.client, error)
                self.failure = StorageError(f'the server cannot stage the transaction: {error}')
            self._staging.close()
            if self._uploads is not None:
                self._uploads.close()

    @property
    def uploads(self) -> Uploads:
        """The blobs of this transaction until it votes; `Unsupported` if the storage has none."""
        if self.state is not State.BEGUN:
            raise StorageTransactionError(f'the transaction is {self.state.value}')
        if self.failure is not None:
            raise self.failure
        if self._uploads is None:
            if not IBlobStorage.providedBy(self._served.storage):
                raise Unsupported('the storage on the server has no blobs: it needs a blob directory')
            self._uploads = Uploads(self._served.storage, self._served.blob_sync)
        return self._uploads

    # ---- voting -------------------------------------------------------------------

    def vote(self, answer: Answer, tell_tid: bool = False, only_stores: bool = False) -> None:
        """Take the commit lock, replay what was staged, let the storage vote; the answer may come later.

        Raises `StorageTransactionError`, without harm, if it is voting already; what was given to
        `fail`, and the transaction has ended.  With ``tell_tid`` the answer to a successful vote is a pair: the usual answer, and the tid that
        the transaction will have, or None if the storage chooses it later.  With ``only_stores``
        there is nothing else to be done; if these are few, that may happen on the thread of another session.
        """
        self._asked_at = time.perf_counter()
        if not self._move(State.BEGUN, State.WAITING):
            raise StorageTransactionError(f'already voting: the transaction is {self.state.value}')
        if self.failure is not None:
            self.abandon()
            raise self.failure
        self._vote_answer = answer
        self._tell_tid = tell_tid
        self._replay = Replay(self._served, self._meta, self.id, self._tid, self._status, tell_tid, self._staging,
                              self._uploads)
        self._quick = only_stores and self._size <= QUICK and self._served.votes_by_itself
        if not self._served.lock.acquire(self):
            return
        if not self.granted():
            self._release()
        elif self._served.packing.locked():
            self.go_on()
        else:
            self._vote()

    def granted(self) -> bool:
        """The commit lock is ours, unless this transaction has ended meanwhile."""
        return self._move(State.WAITING, State.VOTING)

    def go_on(self, here: bool = False) -> None:
        """Vote; if ``here``, and that is quick, before this returns."""
        served = self._served
        if here and self._quick and not served.packing.locked():  # else the storage may have to wait for the pack
            served.voter.do(self._vote)
        else:
            served.voter.submit(self._vote)

    def _release(self) -> None:
        """Give the commit lock back, and let who has it now go on."""
        successor = self._served.lock.release(self)
        if successor is not None:
            successor.go_on()

    def _vote(self) -> None:
        """In the thread that votes, state VOTING, with the commit lock."""
        try:
            self._vote_and_answer()
        except BaseException:  # there was no memory for the answer, say; nobody else would ever end it
            self._end_vote()
            raise

    def _end_vote(self) -> None:
        """It is not known what the client has heard: give the lock back, and end the connection."""
        with self._mutex:
            claimed = self.state in (State.VOTING, State.VOTED)
            if claimed:
                self.state = State.ABORTING
        try:
            if claimed:
                self._abort_claimed()
        finally:
            self._on_expired()

    def _vote_and_answer(self) -> None:
        # A next vote, for which the client need not wait, has its own.
        replay, answer = self._replay, self._vote_answer
        error: BaseException | None = None
        tid: bytes | None = None
        conflicts: list[Any] = []
        self._served.statistics.vote_wait.observe(time.perf_counter() - self._asked_at)
        try:
            tid = replay.vote()
            conflicts = list(replay.conflicts.values())
        except BaseException as failure:  # whatever it is, the lock must not be kept
            conflicts = replay.left_to_the_client(failure)
            error = None if conflicts else failure
            self._outcome = f'failed: {type(failure).__name__}'
            if isinstance(failure, ConflictError):
                self._served.statistics.conflicts += not conflicts
            elif not isinstance(failure, POSError):
                log_failure(self._served, self.client, 'vote', failure)
        if error is None and not conflicts:
            self._served.statistics.conflicts_resolved += len(replay.reported)
            with self._mutex:
                voted = not replay.given_up
                if voted:
                    self.state = State.VOTED
                    if self._tell_tid and tid is not None:
                        self._served.told[tid] = self
                        self._told = tid
                    # in one step: no abort is answered before
                    reported = list(replay.reported)
                    answer((reported, tid) if self._tell_tid else reported)
            if voted:
                self._served.lock.wait_for_client(self)
                self._outbox.deliver()
                return
        self._abort_storage()
        with self._mutex:
            asked = replay.given_up
            again = bool(conflicts) and not asked
            self.state = State.BEGUN if again else State.ENDED
        if not again:
            self._end()
        self._release()
        if asked:
            self._answer_aborts()
        elif error is not None:
            answer(error=error)
        else:
            answer(conflicts)
        self._outbox.deliver()

    # ---- finishing ------------------------------------------------------------------

    def finish(self, message_id: messages.PickledId | None) -> None:
        """Make the voted transaction durable, announce it, answer it, then release the commit lock."""
        if not self._move(State.VOTED, State.FINISHING):
            raise StorageTransactionError(f'cannot finish: the transaction is {self.state.value}')
        begin = time.perf_counter()
        served = self._served
        oids: list[bytes] = []
        tids: list[bytes] = []  # the one that was published
        told: list[Outbox] = []

        def publish(tid: bytes) -> None:
            served.catch_up(tid)
            answer: Frame = ()
            if message_id is not None:
                answer = messages.reply(message_id, tid)
                if self._tells_sizes and not served.announces_itself:
                    answer = served.size_notice() + answer
            tids.append(tid)
            try:
                told.extend(served.publisher.publish(tid, oids, self._outbox, answer))
            except BaseException:  # it may have reached some and not others
                served.hang_up_on_everybody()
                raise
            if self.ended:  # the storage gave up waiting for its own server, which answered late
                deliver(told)

        try:
            oids.extend(self._replay.changed)
            if served.announces_itself:
                # The storage has its own order and calls back at our place in it.
                tid = served.storage.tpc_finish(self._meta, publish)
            else:
                tid = served.storage.tpc_finish(self._meta)
            if not tids:
                publish(served.storage.lastTransaction() if tid is None else tid)
            served.statistics.commits += 1
            if self._told is not None:
                served.committed.append(self._told)
            self._outcome = f'committed as {tids[0].hex()}'
            served.statistics.finish.observe(time.perf_counter() - begin)
        except Unreachable:  # a gateway will find it, if it is committed, and announce it; its client has to ask
            self._outcome = 'not known here'
            self._abort_storage()
            raise
        except BaseException as error:
            of_the_network = isinstance(error, TransientError)  # of a storage that is a client itself
            logger.critical('%s: a transaction failed while it was being finished; everybody is'
                            ' disconnected%s', self.client, f': {error}' if of_the_network else '',
                            exc_info=not of_the_network)
            self._abort_storage()  # should it still be in progress there; else this does nothing
            served.hang_up_on_everybody()
            raise
        finally:
            with self._mutex:
                self.state = State.ENDED
            self._end()
            successor = served.lock.release(self)
            try:
                self._outbox.deliver()  # the committer first
            finally:
                if successor is not None:
                    successor.go_on(here=True)
            deliver(told)
        if self._tells_sizes and served.announces_itself:  # the storage asks its own server, not amid its reply
            self._outbox.append(served.size_notice())
            self._outbox.deliver()

    # ---- aborting --------------------------------------------------------------------

    def abort(self, answer: Answer) -> None:
        """End the transaction at the client's wish; if it is voting now, the answer comes later."""
        asked = self._ask_to_abort(answer)
        if asked is _Asked.CLAIMED:
            self._abort_claimed()
        elif asked is _Asked.TOO_LATE:
            answer(None)  # a vote that failed has just ended it

    def abandon(self) -> None:
        """The connection has ended, or is ended: end the transaction unless it is being finished."""
        if self._ask_to_abort(_no_answer) is _Asked.CLAIMED:
            self._abort_claimed()

    def settle(self) -> None:
        """End the transaction unless it is being finished, and wait until it has ended."""
        self.abandon()
        with self._settled:
            pass

    def expired(self) -> None:
        """The client has not gone on after the vote: abort, release the lock, and end the connection."""
        asked = self._ask_to_abort(_no_answer, {State.VOTED})
        if asked is not _Asked.CLAIMED:
            return  # it is being finished, or was released a moment ago
        logger.warning('%s: the transaction took too long and is aborted; the client is'
                       ' disconnected', self.client)
        self._abort_claimed()
        self._on_expired()

    def _ask_to_abort(self, answer: Answer, among: Container[State] = frozenset(State)) -> '_Asked':
        """Claim the transaction for aborting it, if its state is ``among`` these."""
        with self._mutex:
            state = self.state
            if state not in among or state in (State.FINISHING, State.ABORTING, State.ENDED):
                return _Asked.TOO_LATE
            self._abort_answers.append(answer)
            if state is State.VOTING:
                self._replay.given_up = True
                return _Asked.NOTED
            self.state = State.ABORTING if state is State.VOTED else State.ENDED
        if state is State.WAITING:
            self._served.lock.cancel(self)  # if it is just being granted, `granted` refuses
        return _Asked.CLAIMED

    def _abort_claimed(self) -> None:
        if self.state is State.ABORTING:
            self._abort_storage()
            with self._mutex:
                self.state = State.ENDED
            self._end()
            self._release()
        else:
            self._end()
        self._answer_aborts()

    def _abort_storage(self) -> None:
        try:
            self._served.storage.tpc_abort(self._meta)
        except BaseException:
            logger.exception('%s: abort failed', self.client)
        self._served.statistics.aborts += 1

    def _answer_aborts(self) -> None:
        for answer in self._abort_answers:
            answer(None)
        self._abort_answers.clear()

    def _end(self) -> None:
        """The transaction is over; called once, by whoever claimed it, who may have a lock to release: raises nothing."""
        try:
            self.tell_audit(self._outcome)
            self._staging.close()
            if self._uploads is not None:
                self._uploads.close()
        except BaseException:
            logger.exception('%s: something may be left of a transaction', self.client)
        if self._told is not None:  # only then: who has the commit lock may be changing these
            self._served.told.pop(self._told, None)
        if self._tell_tid:
            self._settled.release()


def _no_answer(result: Any = None, error: BaseException | None = None) -> None:
    pass
