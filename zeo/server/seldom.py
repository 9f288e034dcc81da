"""Keeps the log readable, whoever wants to fill it."""

import logging
import math
import threading
import time


class Seldom:
    """Lines of which there may be as many as somebody out there wants: at most one in `PAUSE` seconds."""

    PAUSE = 60.0

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        # Guards what follows; a leaf.
        self._mutex = threading.Lock()
        self._next = -math.inf  # time.monotonic() from which on one may be logged again
        self._untold = 0

    def warning(self, text: str, *args: object) -> None:
        """Log it, or count it; the next one that is logged tells how many were not."""
        self._log(logging.WARNING, text, *args)

    def info(self, text: str, *args: object) -> None:
        """The same for what is less important."""
        self._log(logging.INFO, text, *args)

    def error(self, text: str, *args: object, cause: BaseException | None = None) -> None:
        """The same for what went wrong here, with a traceback if there is a ``cause``."""
        self._log(logging.ERROR, text, *args, cause=cause)

    def _log(self, level: int, text: str, *args: object, cause: BaseException | None = None) -> None:
        with self._mutex:
            now = time.monotonic()
            if now < self._next:
                self._untold += 1
                return
            self._next = now + self.PAUSE
            untold, self._untold = self._untold, 0
        if untold:
            text += ' (and %d more of such kind before)'
            args += (untold,)
        self._logger.log(level, text, *args, exc_info=cause)


class Ration:
    """How many lines of everyday life one host may cause in `PAUSE` seconds: it may come and go as often as it likes."""

    PAUSE = 60.0
    MOST = 1000

    def __init__(self, logger: logging.Logger, name: str) -> None:
        self._logger = logger
        self._name = name
        self._mutex = threading.Lock()  # guards what follows; a leaf
        self._begin = -math.inf  # time.monotonic()
        self._used = 0

    def allows(self) -> bool:
        """Whether there may be one more line; that there is none for a while is told once."""
        with self._mutex:
            now = time.monotonic()
            if now > self._begin + self.PAUSE:
                self._begin, self._used = now, 0
            self._used += 1
            used = self._used
        if used == self.MOST + 1:
            self._logger.warning('%s: comes and goes so often that it is not told of for %d s', self._name, self.PAUSE)
        return used <= self.MOST


class Rations:
    """A `Ration` for each host."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._mutex = threading.Lock()  # guards `_by_name`; a leaf
        self._by_name: dict[str, Ration] = {}

    def of(self, name: str) -> Ration:
        with self._mutex:
            if name not in self._by_name and len(self._by_name) >= SeldomEach.MOST:
                self._by_name.clear()
            return self._by_name.setdefault(name, Ration(self._logger, name))


class SeldomEach:
    """A `Seldom` for each host, or whatever else has a name, so that nobody hides what others do."""

    MOST = 1000

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        # Guards `_by_name`; a leaf.
        self._mutex = threading.Lock()
        self._by_name: dict[str, Seldom] = {}

    def of(self, name: str) -> Seldom:
        with self._mutex:
            if name not in self._by_name and len(self._by_name) >= self.MOST:
                self._by_name.clear()
            return self._by_name.setdefault(name, Seldom(self._logger))
