"""Where the server's log goes: standard error, or a file that can be reopened."""

import logging

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


def set_up(path: str | None, debug: bool) -> LogFile | None:
    """Send the log of the whole process to standard error, or to the file `path`, which is returned."""
    handler: logging.Handler
    log_file = None
    if path is None:
        handler = logging.StreamHandler()
    else:
        try:
            handler = log_file = LogFile(path, encoding='utf-8')
        except OSError as error:
            raise CannotStart(f'cannot write the log file {path}: {error.strerror}; make its folder'
                              ' and give it to the user of the server, or choose another one') from None
    handler.setFormatter(logging.Formatter(FORMAT))
    logging.basicConfig(
        handlers=[handler], level=logging.DEBUG if debug else logging.INFO, force=True)
    # Says in three lines what we say in one.
    logging.getLogger('zc.lockfile').setLevel(logging.CRITICAL)
    return log_file
