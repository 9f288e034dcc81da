"""A thread for what has to be done in turn."""

import logging
import queue
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)


class Worker:
    """A thread that does one job after the other."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, job: Callable[[], None]) -> None:
        """Have a job done soon.  What it raises is logged."""
        self._jobs.put(job)

    def _run(self) -> None:
        while True:
            job = self._jobs.get()
            if job is None:
                return
            self.do(job)

    def do(self, job: Callable[[], None]) -> None:
        """Do a job now, in the calling thread, which has nothing to do with what it may raise."""
        try:
            job()
        except BaseException:
            logger.exception('%s: a job failed', self._thread.name)

    def close(self) -> None:
        """Do what was submitted, then end.  It need not have been started."""
        if self._thread.ident is not None:
            self._jobs.put(None)
            self._thread.join()
