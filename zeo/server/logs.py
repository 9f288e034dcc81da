"""Where the server's log goes, standard error or files that can be reopened, and what it looks like.

Each event is one line: ``TIME LEVEL LOGGER: WHOM IT IS ABOUT: WHAT HAPPENED``.  start.txt has the grammar.
"""

import contextlib
import logging
import sys
from typing import TYPE_CHECKING
from typing import Protocol

from zeo.server.options import PROGRAM
from zeo.server.options import CannotStart

if TYPE_CHECKING:
    from ZConfig.components.logger.logger import EventLogFactory

FORMAT = '%(asctime)s %(levelname)s %(name)s: %(message)s'


class LogFile(logging.FileHandler):
    """Appends to a file; another one of the same name is begun when it is told to `reopen`.

    Log rotation: rename the file, then have it reopened.  While it cannot be written, for want of room as
    a rule, standard error is told so, once, and the log what it missed, when it goes on.
    """

    _missed = 0

    def emit(self, record: logging.LogRecord) -> None:
        before = self._missed
        super().emit(record)
        if before and self._missed == before:
            self._missed = 0
            super().emit(logging.LogRecord(
                __name__, logging.WARNING, __file__, 0, '%d lines could not be written', (before,), None))

    def handleError(self, record: logging.LogRecord) -> None:
        self._missed += 1
        if self._missed == 1:
            with contextlib.suppress(OSError):
                print(f'{PROGRAM}: cannot write the log file {self.baseFilename}: {sys.exc_info()[1]}',
                      file=sys.stderr, flush=True)

    def reopen(self) -> None:
        """Go on in a file newly opened; raises `OSError`, and goes on in the old one."""
        old = self.setStream(self._open())
        if old is not None:
            old.close()


class OneLine(logging.Formatter):
    """An event is one line, whatever a client or a storage has put into it; only a traceback has more."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = ' '.join(record.message.splitlines())
        return super().formatMessage(record)


class Log(Protocol):
    """What can be reopened: a `LogFile`, or all files of an ``<eventlog>``."""

    def reopen(self) -> None:
        """Raises `OSError`."""


def set_up(log: 'str | EventLogFactory | None', debug: bool) -> Log | None:
    """Send the log of the whole process to standard error, to a file, or where ``<eventlog>`` says.

    Returns None if there is nothing to reopen.
    """
    # Says in three lines what we say in one.
    logging.getLogger('zc.lockfile').setLevel(logging.CRITICAL)
    level = logging.DEBUG if debug else logging.INFO
    if log is not None and not isinstance(log, str):
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
    handler.setFormatter(OneLine(FORMAT))
    logging.basicConfig(handlers=[handler], level=level, force=True)
    return handler if isinstance(handler, LogFile) else None


def _cannot_write(path: str, error: OSError) -> CannotStart:
    return CannotStart(f'cannot write the log file {path}: {error.strerror}; make its folder and give it to'
                       ' the user of the server, or choose another one')
