"""The programs as they are installed (``zeo-start`` and its like), and how Ctrl-C ends them from the beginning.

It takes a moment until the modules of a program are read.  A Ctrl-C in this moment ends it at once and without
a word, as it ends programs that are not Python's.
"""

import importlib
import signal


def begin() -> None:
    """Until `begun`, Ctrl-C ends the program without a word.  Who ignores it goes on ignoring it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def begun() -> None:
    """The program can end in order now: Ctrl-C is a `KeyboardInterrupt` again."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def backup() -> int:
    return _run('zeo.backup')


def copy() -> int:
    return _run('zeo.copy')


def pack() -> int:
    return _run('zeo.pack')


def start() -> int:
    return _run('zeo.start')


def status() -> int:
    return _run('zeo.status')


def _run(program: str) -> int:
    begin()
    result: int = importlib.import_module(program).main()
    return result
