"""Who hears of a transaction, what was announced recently, and in which order.

Announcing a transaction is one step under one mutex: it is noted among the recent ones, it becomes the
last tid, and it is appended to every other subscriber's outbox.  All answers that tell a tid
(``register``, ``lastTransaction``, ``getInvalidations``) come from here and not from the storage, which
may already be ahead.
"""

import threading
from collections import deque
from collections.abc import Collection
from collections.abc import Iterable
from collections.abc import Sequence

from zeo.server.outbox import Outbox
from zeo.wire.announcements import invalidation_notice
from zeo.wire.framing import Frame

#: The oids of so many changes are remembered, of however few transactions.
MOST_OIDS = 1_000_000


class Publisher:
    """Announces the transactions of one storage, in tid order, to the outboxes that subscribed.

    ``recent`` are ``(tid, oids)`` pairs of the latest transactions, oldest first; the last ``keep``
    of them are kept for clients that come back, less if they changed more than `MOST_OIDS` objects.  ``last_tid`` is the storage's last tid.
    """

    def __init__(self, last_tid: bytes, recent: Iterable[tuple[bytes, Collection[bytes]]] = (),
                 keep: int = 100) -> None:
        # Guards all attributes.  Taken under the commit lock; under it only the outboxes' mutexes,
        # which are leaves, are taken.  No storage is called and nothing is sent while it is held.
        self._mutex = threading.Lock()
        self._subscribers: dict[Outbox, None] = {}  # in order of subscription
        self._last_tid = last_tid
        self._keep = max(keep, 1)
        self._recent: deque[tuple[bytes, Collection[bytes]]] = deque(recent, self._keep)
        self._oids = sum(len(oids) for _, oids in self._recent)
        # The ring can answer for tids from here on.
        self._known_since = self._recent[0][0] if self._recent else last_tid
        self._forget()

    @property
    def last_tid(self) -> bytes:
        """The tid announced last.  When it is seen here, its announcements are in all outboxes."""
        with self._mutex:
            return self._last_tid

    def subscribe(self, outbox: Outbox) -> None:
        """From now on every transaction is announced to this outbox."""
        with self._mutex:
            self._subscribers[outbox] = None
            outbox.start_at(self._last_tid)

    def unsubscribe(self, outbox: Outbox) -> None:
        """Forget an outbox; it need not be known."""
        with self._mutex:
            self._subscribers.pop(outbox, None)

    @property
    def subscribers(self) -> list[Outbox]:
        """A snapshot, in order of subscription."""
        with self._mutex:
            return list(self._subscribers)

    def publish(self, tid: bytes, oids: Sequence[bytes], committer: Outbox | None = None,
                answer: Frame = ()) -> list[Outbox]:
        """Announce a transaction; returns the outboxes that should be delivered now.

        The committer gets ``answer``, the reply to its ``tpc_finish``, at the very place where the
        others get the announcement.  For a storage whose transactions do not announce themselves
        this is called after ``storage.tpc_finish`` has returned and before the commit lock is
        released.  The last tid once more was announced already by the storage itself; then only the
        committer's answer is appended.  So were earlier ones, and nothing happens.  `ValueError` if a
        committer comes with an earlier one: it would be news that nobody is told.
        """
        frame = invalidation_notice(tid, oids)  # first, so that afterwards nothing can fail
        oid_set = oids if len(oids) < 8 else frozenset(oids)
        with self._mutex:
            if tid <= self._last_tid:
                if committer is None:
                    return []
                if tid < self._last_tid:
                    raise ValueError(f'transaction {tid.hex()} was finished after'
                                     f' {self._last_tid.hex()}')
                committer.append(answer)
                return [committer]
            if len(self._recent) == self._keep:
                self._forget_one()
            self._recent.append((tid, oid_set))
            self._oids += len(oid_set)
            if self._oids > MOST_OIDS:
                self._forget()
            self._last_tid = tid
            told = list(self._subscribers)
            for outbox in told:
                if outbox is not committer:
                    outbox.announce(frame, tid, oid_set)
            if committer is not None:
                committer.announce(answer, tid, oid_set)
        return told

    def _forget(self) -> None:
        """Of too many oids, those of the oldest transactions."""
        while self._oids > MOST_OIDS:
            self._forget_one()

    def _forget_one(self) -> None:
        self._known_since, oids = self._recent.popleft()
        self._oids -= len(oids)

    def tell(self, frame: Frame) -> list[Outbox]:
        """Append a notice that is no announcement to everybody; returns whom to deliver."""
        with self._mutex:
            told = list(self._subscribers)
            for outbox in told:
                outbox.append(frame)
        return told

    def start_afresh(self, last_tid: bytes) -> list[Outbox]:
        """Something was not announced as it should have been: forget the past, hang up on everybody.

        Clients that come back find a last tid that they do not know and nothing recent before it, so
        they will not believe to be up to date.  Returns the outboxes, which have ended.
        """
        with self._mutex:
            self._recent.clear()
            self._oids = 0
            self._last_tid = self._known_since = max(last_tid, self._last_tid)
            told = list(self._subscribers)
            for outbox in told:
                outbox.end()
        return told

    def since(self, tid: bytes) -> tuple[bytes, list[bytes]] | None:
        """The last tid, and the oids changed after ``tid``, each once; None if that is not known.

        A tid between two transactions is not known either.  Whoever has it has seen another past, as it was
        before the database was restored from a backup.
        """
        with self._mutex:
            if tid < self._known_since:
                return None
            changed: dict[bytes, None] = {}
            seen = self._known_since
            for each, oids in reversed(self._recent):
                if each <= tid:
                    seen = each
                    break
                changed.update(dict.fromkeys(oids))
            if seen != tid and tid < self._last_tid:
                return None
            return self._last_tid, list(changed)


def deliver(outboxes: Iterable[Outbox]) -> None:
    """Send what was appended; never waits."""
    for outbox in outboxes:
        outbox.deliver()
