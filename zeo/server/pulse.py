"""Tells clients that the server lives, also while its storages keep it busy.

A client cannot know otherwise whether a server takes long or was stopped, hangs or is gone: the kernel keeps
the connection of a stopped process alive.
"""

import logging
import threading
from collections.abc import Callable

from zeo.wire.methods import PULSE_INTERVAL

logger = logging.getLogger(__name__)


class Pulse:
    """The thread that calls ``beat`` every `PULSE_INTERVAL` seconds; ``beat`` must not wait for a client."""

    def __init__(self, beat: Callable[[], object], interval: float | None = None) -> None:
        self._beat = beat
        self._interval = PULSE_INTERVAL if interval is None else interval
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name='zeo pulse', daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(self._interval):
            try:
                self._beat()
            except Exception:  # the next may go better; without any, clients would leave
                logger.exception('%s: clients could not be given a sign of life', threading.current_thread().name)

    def close(self) -> None:
        """End the thread."""
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()
