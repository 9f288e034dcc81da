"""Where the server's log goes: standard error, or files that can be reopened."""

import logging
from typing import Protocol

from ZConfig.components.logger.logger import EventLogFactory

from zeo.server.options import CannotStart

FORMAT = '%(asctime)s %(levelname)s %(name)s: %(message)s'


class LogFile(logging.FileHandler):
    """Appends to a file; another one of the same name is begun when it is told to `reopen`.

    Log rotation: rename the file, then have it reopened.
    """

    def reopen(self) -> None:
        """Go on in a file newly opened; raises `OSError`, and goes on in the old one."""
        old = self.setStream(self._open())
        if old is not None:
            old.close()


class Log(Protocol):
    """What can be reopened: a `LogFile`, or all files of an ``<eventlog>``."""

    def reopen(self) -> None:
        """Raises `OSError`."""


def set_up(log: str | EventLogFactory | None, debug: bool) -> Log | None:
    """Send the log of the whole process to standard error, to a file, or where ``<eventlog>`` says.

    Returns None if there is nothing to reopen.
    """
    # Says in three lines what we say in one.
    logging.getLogger('zc.lockfile').setLevel(logging.CRITICAL)
    level = logging.DEBUG if debug else logging.INFO
    if isinstance(log, EventLogFactory):
        try:
            root = log()
        except OSError as error:
            raise _cannot_write(error.filename or 'of <eventlog>', error) from None
        if debug:
            root.setLevel(level)
        reopening: Log = log
        return reopening
    handler: logging.Handler = logging.StreamHandler()
    if log is not None:
        try:
            handler = LogFile(log, encoding='utf-8')
        except OSError as error:
            raise _cannot_write(log, error) from None
    handler.setFormatter(logging.Formatter(FORMAT))
    logging.basicConfig(handlers=[handler], level=level, force=True)
    return handler if isinstance(handler, LogFile) else None


def _cannot_write(path: str, error: OSError) -> CannotStart:
    return CannotStart(f'cannot write the log file {path}: {error.strerror}; make its folder and give it to'
                       ' the user of the server, or choose another one')
