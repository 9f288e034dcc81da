"""Everything still to be said to one client, in order; and the mark that keeps loads honest.

Order is decided here.  A client may cache what a load reply calls current, so no such reply may stand
behind an invalidation that ends it.  The storage is read without any lock; therefore a reply made from
what was read enters only under its *mark* (read-then-validate, as in optimistic locking):

    mark = outbox.published         # before the storage is read
    ... read the storage, holding no lock ...
    outbox.reply_to_load(frame, mark, start)   # refuses if something was announced since

*Claim:* no reply that calls a revision of ``start < T`` current stands behind the announcement of a
transaction T that changed the object.  *Proof:* suppose it does.  ``published`` grew when T was
announced, in the same step, and was found equal to the mark later on; so the mark was taken after the
announcement of T, hence after ``storage.tpc_finish`` had returned for T; so the read began when T was
visible, and would have found ``start >= T``, or an end.  The reply to the client's own ``tpc_finish``
counts as an announcement.  QED.

The other way round, no reply shows a tid that was not announced here before: the load waits for the
announcement, which is a moment away, and is done again.  (Some clients' persistent caches cannot cope
with replies that run ahead.)

The mutex is a leaf: nothing is called while it is held, and appending never waits, so a slow client
delays nobody but itself.  If its backlog gets too long it is condemned.
"""

import enum
import itertools
import threading
from collections import deque
from collections.abc import Callable
from collections.abc import Collection

from ZODB.utils import z64

from zeo.wire.framing import Frame

#: Backlog in bytes beyond which a client that does not read is given up.
LIMIT = 64 * 1024 * 1024

#: So many frames are looked at to tell how far behind a client is.
LOOK_AT = 10_000

#: Sends, at once: what stands before the data, the file's number, where the data begin, how many bytes they are,
#: and what stands after them; and how many seconds the client may take nothing.  False if it is gone.
SendFile = Callable[[bytes, int, int, int, bytes, float], bool]

_ANNOUNCEMENT = b'invalidateTransaction'


class Outcome(enum.Enum):
    """What became of the reply to a load."""

    SENT = 'sent'
    AGAIN = 'again'  #: something was announced since the mark: read the storage again
    AHEAD = 'ahead'  #: it shows a transaction that is not announced yet: wait for that, then read again
    GONE = 'gone'  #: the connection has ended


# Looking up a member of an enumeration takes longer than all the rest (before Python 3.12).
SENT, AGAIN, AHEAD, GONE = Outcome.SENT, Outcome.AGAIN, Outcome.AHEAD, Outcome.GONE


class Outbox:
    """The frames still to be sent over one connection, first in, first out.

    Any thread may append.  ``deliver`` is called without arguments, and with no mutex held, by those
    who appended and want it sent; ``send_file`` is `zeo.server.writer.Line.send_file`, None where files cannot be
    sent.  ``published`` and ``announced`` (a tid) grow with each announcement;
    ``backlog`` and ``size_sent`` are in bytes, ``gone`` is final, ``condemned`` tells that the client did
    not keep up.  All of them may be read without the mutex; who has the turn to write counts
    ``size_sent``.
    """

    __slots__ = ('published', 'announced', 'backlog', 'gone', 'condemned', 'deliver', 'limit',
                 'send_file', 'size_sent', '_parts', '_largest', '_mutex', '_changed', '_waiting', '_watched',
                 '_touched')

    def __init__(self, limit: int = LIMIT) -> None:
        self.published = 0
        self.announced = z64
        self.backlog = 0
        self.gone = False
        self.condemned = False
        self.limit = limit
        self.size_sent = 0
        self.deliver: Callable[[], None] = _nobody_delivers
        self.send_file: SendFile | None = None
        self._parts: deque[bytes | memoryview] = deque()
        self._largest = 0  # of the announcements since there was nothing to be sent, in bytes
        self._mutex = threading.Lock()
        # Notified, if `_waiting`, when something was announced, when there is more room, and at
        # the end.  Every wait has a time-out.  Made by the first who waits, as few ever do.
        self._changed: threading.Condition | None = None
        self._waiting = 0  # how many threads wait
        self._watched: bytes | None = None  # the oid of a load that was already done again
        self._touched = False  # whether that oid was announced since

    # ---- what goes in ---------------------------------------------------------

    def append(self, frame: Frame) -> bool:
        """Append a frame whose place in the order does not matter; False if the client is gone."""
        with self._mutex:
            if self.gone:
                return False
            self._append(frame)
            return True

    def announce(self, frame: Frame, tid: bytes, oids: Collection[bytes]) -> bool:
        """Append the announcement of a transaction of somebody else, or of this client itself.

        The publisher calls this, in tid order, under its mutex.  False if the client does not keep
        up: the backlog *before* this announcement is beyond the limit, not counting the largest one in it.
        It is then condemned, and the caller has to `deliver`, to make that known.
        """
        with self._mutex:
            if self.gone:
                return True
            before = self.backlog
            if not before:
                self._largest = 0
            elif before > self.limit + self._largest:
                self.condemned = True
                self._end()
                return False
            self._append(frame)
            if len(frame) > 1:  # a long one
                self._largest = max(self._largest, self.backlog - before)
            self.published += 1
            self.announced = tid
            if self._watched is not None and self._watched in oids:
                self._touched = True
            if self._waiting:
                self._wake()
            return True

    def start_at(self, tid: bytes) -> None:
        """Transactions up to ``tid`` need no announcement here (the publisher, on subscription)."""
        with self._mutex:
            self.announced = tid

    def reply_to_load(self, frame: Frame, mark: int, start: bytes, *, watching: bool = False,
                      ahead: bool = False) -> Outcome:
        """Append a load's reply that calls the revision ``start`` current, if that is still proven.

        ``mark`` is what ``published``, or `watch` (then ``watching``), said before the storage was
        read.  With ``ahead`` the reply may show a tid that was not announced.
        """
        with self._mutex:
            if self.gone:
                return GONE
            if mark != self.published and not (watching and not self._touched):
                return AGAIN
            if start > self.announced and not ahead:
                return AHEAD
            parts = self._parts  # as in `_append`
            for part in frame:
                parts.append(part)
                self.backlog += len(part)
            return SENT

    def reply_with_history(self, frame: Frame, start: bytes, *, ahead: bool = False) -> Outcome:
        """Append a load's reply about a revision that has ended: nothing can make it untrue."""
        with self._mutex:
            if self.gone:
                return GONE
            if start > self.announced and not ahead:
                return AHEAD
            self._append(frame)
            return SENT

    def watch(self, oid: bytes) -> int:
        """A mark for doing a load again: from now on only announcements of this ``oid`` undo it.

        Else a slow storage under steady commits would never answer.
        """
        with self._mutex:
            self._watched = oid
            self._touched = False
            return self.published

    def _append(self, frame: Frame) -> None:
        parts = self._parts
        for part in frame:
            parts.append(part)
            self.backlog += len(part)

    def waiting_announcements(self) -> int:
        """How many transactions its client has not been told of since it does not read: its lag.

        What is in the kernel's hands, or about to be, does not count; nor is there a look at more than
        the first `LOOK_AT` frames.
        """
        with self._mutex:
            return sum(_ANNOUNCEMENT in part[:64] for part in itertools.islice(self._parts, LOOK_AT))

    # ---- waiting ---------------------------------

    def wait_for_announcement(self, tid: bytes, timeout: float) -> bool:
        """Wait until ``tid`` is announced or the client is gone; False after ``timeout`` seconds."""
        return self._wait(lambda: self.announced >= tid, timeout)

    def wait_for_room(self, backlog: int, timeout: float) -> bool:
        """Wait until the backlog is not above so many bytes or the client is gone.

        False if the client has read nothing for ``timeout`` seconds; one that reads slowly has time.
        """
        while True:
            sent = self.size_sent
            if self._wait(lambda: self.backlog <= backlog, timeout):
                return True
            if self.size_sent == sent:
                return False

    def _wait(self, condition: Callable[[], bool], timeout: float) -> bool:
        with self._mutex:
            if self._changed is None:
                self._changed = threading.Condition(self._mutex)
            self._waiting += 1
            try:
                return self._changed.wait_for(lambda: self.gone or condition(), timeout)
            finally:
                self._waiting -= 1

    # ---- what goes out: whoever has the turn to write ---------------------------

    def take(self, most: int = 256 * 1024) -> list[bytes | memoryview]:
        """Take parts from the front: at least one if there is any, then up to ``most`` bytes."""
        taken: list[bytes | memoryview] = []
        with self._mutex:
            parts = self._parts
            size = 0
            if self.backlog <= most and len(parts) <= 256:
                taken.extend(parts)
                parts.clear()
                size = self.backlog
            while parts and len(taken) < 256:
                if size and size + len(parts[0]) > most:
                    break
                part = parts.popleft()
                size += len(part)
                taken.append(part)
            self.backlog -= size
            if self._waiting:
                self._wake()
        return taken

    def put_back(self, part: bytes | memoryview) -> None:
        """The rest of the last part that was taken: it is the first one again."""
        with self._mutex:
            if not self.gone:
                self._parts.appendleft(part)
                self.backlog += len(part)
                self._largest = max(self._largest, len(part))

    def forget_line(self) -> None:
        """Whoever delivers is gone; with no cycle of references left, all is freed at once and not some day."""
        self.deliver = _nobody_delivers
        self.send_file = None

    def end(self) -> None:
        """Nothing more will be sent: the connection is closed.  May be called more than once."""
        with self._mutex:
            self._end()

    def _end(self) -> None:
        self.gone = True
        self._parts.clear()
        self.backlog = 0
        if self._waiting:
            self._wake()

    def _wake(self) -> None:
        assert self._changed is not None, 'somebody waits'
        self._changed.notify_all()


def _nobody_delivers() -> None:
    pass
