"""Processes that work on one database at the same time, each with a client of its own.

What a process does is a function, the task; its first argument is a `Client`, which runs transactions
until they get through and counts what happens.
"""

import concurrent.futures
import contextlib
import dataclasses
import logging
import multiprocessing
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import transaction
import ZODB
from transaction.interfaces import TransientError
from ZODB.POSException import ConflictError

#: Attempts at one transaction before it is given up.  With random waits between them it never comes to that.
ATTEMPTS = 100

#: Seconds that a phase may take before something is taken to hang.
PATIENCE = 1200.0


class Discrepancy(AssertionError):
    """The database is not what it has to be."""


def expect(truth: bool, what: str) -> None:
    if not truth:
        raise Discrepancy(what)


class Client:
    """A database opened by this process, and what it met there.

    Those who write call ``step`` after each transaction; ``over`` tells those without an end of their
    own to stop.
    """

    def __init__(self, db: ZODB.DB, label: str, step: Callable[[], None], over: Callable[[], bool]) -> None:
        self.db = db
        self.label = label
        self.step = step
        self.over = over
        self.figures: Counter[str] = Counter()
        self.chance = random.Random(label)
        self._pause = multiprocessing.Event()    # never set: to wait for it is to let others go first

    def do(self, work: Callable[[Any], Any], note: str = '') -> Any:
        """Run ``work(root)`` in a transaction, again and again until it gets through.

        If the connection ends while a commit is on its way, work may be done twice; it has to look for
        itself whether it was done already.
        """
        manager = transaction.TransactionManager()
        for attempt in range(ATTEMPTS):
            manager.begin().note(note)
            try:
                with contextlib.closing(self.db.open(manager)) as connection:
                    try:
                        result = work(connection.root())
                        manager.commit()
                    finally:
                        manager.abort()
            except TransientError as problem:
                self.figures['conflicts' if isinstance(problem, ConflictError) else 'lost connections'] += 1
                # Who lost waits a little, the longer the more often it lost.
                self._pause.wait(self.chance.random() * min(1.0, .002 * 2 ** attempt))
                continue
            self.figures['transactions'] += 1
            return result
        raise Discrepancy(f'{self.label} did not get through in {ATTEMPTS} attempts')


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the database is, and with what client it is opened."""

    address: Any
    client: str
    cache_size: int             # bytes that the client's cache file may have


_steps: Any = None              # in a process of a team: the semaphore and the event of the team
_over: Any = None


def _join_team(steps: Any, over: Any) -> None:
    global _steps, _over
    _steps, _over = steps, over


def _take_part(place: Place, label: str, task: Callable[..., None], *args: Any) -> Counter[str]:
    from tests.system.clients import open_client

    # ZODB tells of every load that fails because the server is being restarted.
    logging.disable()
    storage = open_client(place.client, place.address, cache_size=place.cache_size, client_label=label,
                          max_disconnect_poll=.5)
    db = ZODB.DB(storage, cache_size=100_000, large_record_size=1 << 26)
    try:
        client = Client(db, label, _steps.release, _over.is_set)
        task(client, *args)
        return client.figures
    finally:
        db.close()


class Team:
    """Processes that work at the same time, each with a client of its own, and end together."""

    def __init__(self, place: Place, size: int) -> None:
        self._place = place
        context = multiprocessing.get_context('spawn')
        self._steps = context.Semaphore(0)      # released at each step of any of them
        self._over = context.Event()            # those without an end of their own stop
        self._pool = concurrent.futures.ProcessPoolExecutor(
            size, context, initializer=_join_team, initargs=(self._steps, self._over))
        self._futures: list[concurrent.futures.Future[Counter[str]]] = []
        self._counted: set[concurrent.futures.Future[Counter[str]]] = set()

    def start(self, task: Callable[..., None], *args: Any) -> concurrent.futures.Future[Counter[str]]:
        label = f'{task.__name__}_{len(self._futures)}'
        self._futures.append(self._pool.submit(_take_part, self._place, label, task, *args))
        return self._futures[-1]

    def wait_for_steps(self, number: int) -> None:
        """Return in the middle of things, when so many more have been done."""
        end = time.monotonic() + PATIENCE
        for _ in range(number):
            while not self._steps.acquire(timeout=.5):
                self._look_for_failures()
                expect(time.monotonic() < end, 'nothing goes on any more')
        self._look_for_failures()

    def _look_for_failures(self) -> None:
        for future in self._futures:
            if future.done():
                future.result()

    def figures(self, *futures: concurrent.futures.Future[Counter[str]]) -> Counter[str]:
        """Wait for these and add up what they did."""
        # A failure of anybody is told at once, not when the others have done what they had to do.
        waiting = set(futures)
        end = time.monotonic() + PATIENCE
        while waiting:
            _, waiting = concurrent.futures.wait(waiting, 1)
            self._look_for_failures()
            expect(time.monotonic() < end, 'nothing goes on any more')
        return sum((future.result() for future in futures), Counter())

    def end(self) -> Counter[str]:
        """Wait for the end of all, add up what they did."""
        self._over.set()
        return self.figures(*self._futures)

    def __enter__(self) -> 'Team':
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._pool.shutdown(cancel_futures=True)
