"""The instances that loads are read from: as many as there are loads at a time, up to a limit.

Each is used by one thread at a time.  Whoever takes one gets a snapshot that is at least as new as what
was announced when he came: it is taken again if the owner's ``generation`` has moved since.
"""

import threading
import time
from collections.abc import Callable
from typing import Any
from typing import TypeVar

from ZODB.POSException import POSKeyError

from zeo.server.backing import Backing
from zeo.server.backing import Unreachable
from zeo.server.backing import View
from zeo.server.backing import is_transient
from zeo.server.backing import lost
from zeo.server.backing import plain

_T = TypeVar('_T')

#: So many are read from at a time; each holds a connection to the database.
MOST = 8

#: One that was not used for so many seconds lets go of its snapshot, which hinders the database in tidying up.
RESTING = 2.0

#: How long in seconds one waits before the next attempt to reach the database.
PAUSE = 0.1

#: How often something is done again that the storage says may be done again.
AGAIN = 3


class Readers:
    """``known`` tells the generation, and the transaction announced last, which everything read has to show."""

    def __init__(self, backing: Backing, known: Callable[[], tuple[int, bytes]], most: int = MOST) -> None:
        self._backing = backing
        self._known = known
        # How many more may be in use; whoever has one gives it back when the database has answered.
        self._free = threading.Semaphore(most)
        # Guards what follows; a leaf.
        self._mutex = threading.Lock()
        self._idle: list[tuple[View, float]] = []  # and since when; the last one is the next to be used
        self._closed = threading.Event()

    def read(self, job: Callable[[View], _T], patience: float, *, anew: bool = False) -> _T:
        """What the job says of a snapshot that is new enough; with ``anew`` taken after the call.

        While the database cannot be reached, it is tried again for ``patience`` seconds, then `Unreachable`
        is raised.  All errors are `plain`.
        """
        until = time.monotonic() + patience
        left = AGAIN
        while True:
            try:
                return self._once(job, anew)
            except Exception as error:
                left -= is_transient(error)
                made = plain(error)
                if isinstance(made, Unreachable):
                    again = time.monotonic() < until
                else:
                    again = is_transient(error) and left > 0
                if not again or self._closed.is_set():
                    if made is error:
                        raise
                    raise made from error
                if isinstance(made, Unreachable):
                    self._closed.wait(PAUSE)

    def _once(self, job: Callable[[View], _T], anew: bool) -> _T:
        with self._free:
            view = self._take()
            try:
                generation, announced = self._known()
                if anew or view.generation != generation:
                    view.generation = -1
                    self._backing.refresh(view, announced)
                    view.generation = generation
                result = job(view)
            except POSKeyError:
                self._give_back(view)
                raise
            except BaseException as error:
                # Whatever happened to it, another one has nothing to do with that.
                view.discard()
                if isinstance(error, Exception) and lost(error):
                    self.discard()
                raise
            self._give_back(view)
            return result

    def _take(self) -> View:
        with self._mutex:
            if self._idle:
                return self._idle.pop()[0]
        return self._backing.open()

    def _give_back(self, view: View) -> None:
        with self._mutex:
            if not self._closed.is_set():
                self._idle.append((view, time.monotonic()))
                return
        view.discard()

    def rest(self) -> None:
        """Let those go of their snapshots that have not been used for a while."""
        before = time.monotonic() - RESTING
        with self._mutex:
            resting = [each for each in self._idle if each[1] < before and each[0].generation >= 0]
            self._idle = [each for each in self._idle if each not in resting]
        for view, since in resting:
            try:
                view.generation = -1
                view.storage.sync()
            except Exception:
                view.discard()
                continue
            with self._mutex:
                if not self._closed.is_set():
                    self._idle.insert(0, (view, since))
                    continue
            view.discard()

    def discard(self) -> None:
        """Let go of all that are idle: what they are connected to has gone."""
        with self._mutex:
            idle, self._idle = self._idle, []
        for view, _ in idle:
            view.discard()

    def close(self) -> None:
        """None is given out any more to be kept; who waits for the database is told at once."""
        self._closed.set()
        self.discard()


def load_before(view: View, oid: bytes, tid: bytes) -> tuple[bytes, bytes, bytes | None] | None:
    """What ``loadBefore`` says, asked in the cheapest way: most objects are wanted as they are now."""
    load: Any = view.storage.load
    try:
        record, start = load(oid)
    except POSKeyError:
        pass  # it may have been deleted after that
    else:
        if start < tid:
            return record, start, None
    found = view.storage.loadBefore(oid, tid)
    if found is None:
        return None
    record, start, end = found
    if record is None:  # it was deleted, or its creation undone, at that time
        raise POSKeyError(oid)
    return record, start, end
