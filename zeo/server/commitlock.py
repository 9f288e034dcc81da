"""One committer at a time: first come, first served; cancellable; limited in time.

The lock is granted to *waiters*, objects that may have left in the meantime: granting says whether the
waiter was still there, and if not, the next one is asked.  No thread waits here.
"""

import logging
import threading
import time
from collections import deque
from typing import Protocol

logger = logging.getLogger(__name__)


class Waiter(Protocol):
    """Who wants the commit lock."""

    def granted(self) -> bool:
        """The lock is yours now.  False: no longer wanted; it goes on to the next.

        Called by the thread that released the lock, with no mutex held; it must not wait.
        """

    def go_on(self, here: bool = False) -> None:
        """Do what you wanted the lock for.  If it is quick, and ``here``, the calling thread has time for it."""

    def expired(self) -> None:
        """Your client has let you wait longer than the limit.  Called by the lock's own thread."""


class CommitLock:
    """A FIFO lock that is held across a client's round trip.

    ``limit`` is how long in seconds a client may let the holder wait before the holder is told that this
    expired; None for no limit.  What the server does itself for the holder does not count: that takes
    longer on a slow disk, and no client can help it.  What the holder does about it is its own affair;
    the lock is free when it is released.
    """

    def __init__(self, limit: float | None = None, name: str = '') -> None:
        # Guards the attributes below; a leaf.
        self._mutex = threading.Lock()
        self._holder: Waiter | None = None
        self._since: float | None = None  # time.time() of the grant
        self._deadline: float | None = None  # time.monotonic(); None: the server works for the holder
        self._queue: deque[Waiter] = deque()
        self._limit = limit
        self._waits = 0  # tells one wait for a client from the next
        # Notified when a resting clock has something to watch, or is to end.
        self._wake = threading.Condition(self._mutex)
        self._resting = False
        self._closed = False
        self._clock = threading.Thread(
            target=self._watch_time, name=f'zeo commit clock {name}', daemon=True)

    def start(self) -> None:
        """Start the clock, if there is a limit."""
        if self._limit is not None:
            self._clock.start()

    def acquire(self, waiter: Waiter) -> bool:
        """True: the lock is yours.  False: you are in the queue, `Waiter.granted` will be called."""
        with self._mutex:
            if self._holder is not None:
                self._queue.append(waiter)
                return False
            self._grant(waiter)
        return True

    def cancel(self, waiter: Waiter) -> bool:
        """Leave the queue; False if the waiter is not in it (any more)."""
        with self._mutex:
            try:
                self._queue.remove(waiter)
            except ValueError:
                return False
            return True

    def wait_for_client(self, holder: Waiter) -> None:
        """From now on it is up to the holder's client, whose time begins; nothing if it was released."""
        if self._limit is None:
            return
        with self._mutex:
            if self._holder is holder:
                self._waits += 1
                self._deadline = time.monotonic() + self._limit
                if self._resting:
                    self._resting = False
                    self._wake.notify()

    def release(self, holder: Waiter) -> Waiter | None:
        """Give the lock back; it goes to the first in the queue who still wants it.

        The caller has to let that one go on (`Waiter.go_on`), which is returned.
        """
        while True:
            with self._mutex:
                assert self._holder is holder, 'the lock is released by who holds it'
                self._holder = None
                self._since = None
                if not self._queue:
                    return None
                holder = self._queue.popleft()
                self._grant(holder)
            if holder.granted():
                return holder

    def _grant(self, waiter: Waiter) -> None:
        self._holder = waiter
        self._since = time.time()
        self._deadline = None

    # ---- for status -------------------------------------------------------------

    @property
    def holder(self) -> Waiter | None:
        return self._holder

    @property
    def since(self) -> float | None:
        """When the lock was taken, in seconds since the epoch; None if it is free."""
        return self._since

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def queue(self) -> list[Waiter]:
        """Who waits, in the order in which they will be asked."""
        with self._mutex:
            return list(self._queue)

    @property
    def clock_is_alive(self) -> bool | None:
        """Whether holders are timed out as they should be; None if there is no limit."""
        if self._limit is None:
            return None
        return self._clock.is_alive()

    # ---- the clock ----------------------------------------------------------------

    def _watch_time(self) -> None:
        """Tell each holder, once, when its time is up; rest while there is nobody to watch."""
        told = 0
        while True:
            with self._mutex:
                while True:
                    if self._closed:
                        return
                    if self._holder is None or self._deadline is None or self._waits == told:
                        self._resting = True
                        self._wake.wait()
                    elif (left := self._deadline - time.monotonic()) > 0:
                        self._wake.wait(left)  # a new holder meanwhile moves the deadline: look again
                    else:
                        holder, told = self._holder, self._waits
                        break
            try:
                holder.expired()
            except Exception:
                logger.exception('%s: a transaction that took too long could not be ended', self._clock.name)

    def close(self) -> None:
        """End the clock's thread and wait for it."""
        with self._mutex:
            self._closed = True
            self._wake.notify()
        if self._clock.ident is not None:
            self._clock.join()
