"""The moment in which the modules of zeo's programs (``python -m zeo.start``, ``zeo-start`` and its like) are read.

A Ctrl-C in this moment ends the program at once and without a word, as it ends programs that are not Python's.
Nobody looks for garbage meanwhile, as there is none: all that is read stays.
"""

import gc
import os
import signal
import sys

NAMES = ('backup', 'copy', 'pack', 'start', 'status')


def is_one() -> bool:
    """Whether this process has been started as one of the programs."""
    first = os.path.basename((getattr(sys, 'argv', None) or [''])[0])  # a Python within another program may have none
    if first == '-m':  # so it is while Python looks for the module to run
        return 'zeo' in sys.orig_argv or any(f'zeo.{name}' in sys.orig_argv for name in NAMES)
    return any(first == f'zeo-{name}' for name in NAMES)


def begin() -> None:
    """Until `begun`, Ctrl-C ends the program without a word.  Who ignores it goes on ignoring it."""
    gc.disable()  # looking for garbage took 8 of the 125 ms until a server answers
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def begun() -> None:
    """The program can end in order now: Ctrl-C is a `KeyboardInterrupt` again."""
    all_is_read()
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def all_is_read() -> None:
    """Garbage is looked for again from now on, but not in what there is already."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
