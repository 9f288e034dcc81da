"""Threads for jobs that come and go, such as serving a client; each is used again for a while.

To start a thread takes about as long as all else that is done when a client connects.  When many clients
come back at once, after a broken line, there are the threads of their old connections.
"""

import logging
import queue
import threading
from collections.abc import Callable
from time import monotonic

logger = logging.getLogger(__name__)

#: How long in seconds a thread that is done waits for another job before it ends.
PATIENCE = 10.0

#: How long in seconds a job waits for one to be done when there are as many threads as there may be.
ROOM_PATIENCE = 1.0

Job = Callable[[], None]


class Threads:
    """As many threads as there are jobs at a time, but never more than ``most``; those that are done wait a while
    for others.

    A thread has the name ``name`` while it has nothing to do; jobs may change that.
    """

    def __init__(self, name: str, patience: float | None = None, most: int = 2**31) -> None:
        self._name = name
        self._patience = PATIENCE if patience is None else patience
        self._most = most
        # Guards the three below; a leaf, under which a thread is started.
        self._mutex = threading.Lock()
        self._less = threading.Condition(self._mutex)  # told of each thread that is done, or ends
        self._all: set[threading.Thread] = set()
        self._free = 0  # how many wait, or are about to, and are not counted on for a job in the queue
        self._closed = False
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()

    def run(self, job: Job) -> None:
        """Have a job done by a thread that is free, or else by a new one.

        If there are as many as there may be, one gets a moment to come to its end.  Raises `RuntimeError` if
        there can be no more threads, or after `close`.
        """
        with self._mutex:
            if not self._less.wait_for(lambda: self._free or self._closed or len(self._all) < self._most, ROOM_PATIENCE):
                raise RuntimeError(f'there are {self._most} threads, and none is done')
            if self._closed:
                raise RuntimeError('there is no work any more')
            if self._free:
                self._free -= 1
                self._jobs.put(job)
                return
            # In a list that is emptied: a thread keeps its arguments as long as it lives.
            thread = threading.Thread(target=self._work, args=([job],), name=self._name, daemon=True)
            thread.start()
            self._all.add(thread)

    def _work(self, first: list[Job]) -> None:
        thread = threading.current_thread()
        job: Job | None = first.pop()
        while job is not None:
            try:
                job()
            except BaseException:  # whatever it is, there must not be one thread less for ever
                logger.exception('%s: a job failed', thread.name)
            del job  # nothing of it is kept while there is nothing to do
            thread.name = self._name
            job = self._next()
        with self._mutex:
            self._all.discard(thread)
            self._less.notify()

    def _next(self) -> Job | None:
        with self._mutex:
            if self._closed:
                return None
            self._free += 1
            self._less.notify()
        try:
            return self._jobs.get(timeout=self._patience)
        except queue.Empty:
            with self._mutex:
                if self._free:
                    self._free -= 1
                    return None
            return self._jobs.get()  # somebody counts on us: it is there already

    def close(self, timeout: float | None = None) -> bool:
        """No more jobs; wait until all are done and the threads have ended: False after so many seconds.

        May be called again.  Not from one of the threads.
        """
        with self._mutex:
            self._closed = True
            self._less.notify_all()
            for _ in range(self._free):
                self._jobs.put(None)
            self._free = 0
            left = list(self._all)
        deadline = None if timeout is None else monotonic() + timeout
        for thread in left:
            thread.join(None if deadline is None else max(deadline - monotonic(), 0))
        return not any(thread.is_alive() for thread in left)
