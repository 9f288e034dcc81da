"""``-d``: the server in the background, looked after by zdaemon, which restarts it after a fatal error.

zdaemon (zdrun) becomes a daemon and starts the same command line again, with ``-s``.  The server tells
when it is ready in the way that it tells service managers (`zeo.server.servicemanager`), so who started
it hears of success or failure as if it had stayed in the foreground.
"""

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from collections.abc import Sequence

from zeo.server.addresses import LONGEST_PATH
from zeo.server.options import CannotStart
from zeo.server.options import Options

#: Seconds between two looks whether zdaemon is still there, and for it to answer and to end.
PAUSE = 0.5
PATIENCE = 10.0


def start(arguments: Sequence[str], options: Options, pid_file: str) -> str:
    """Returns when the server is ready, with its ready line and the number of its process.

    Raises `CannotStart`; then nothing goes on in the background.
    """
    if importlib.util.find_spec('zdaemon') is None:
        raise CannotStart('-d needs zdaemon, which is not installed here; install it (pip install zdaemon), or'
                          ' stay in the foreground (-s)')
    control = os.path.abspath(str(options.runner.get('socket_name', pid_file.removesuffix('.pid') + '.zdsock')))
    longest = LONGEST_PATH - len('.4194304')  # while zdaemon makes it, its number is appended
    if not os.path.isdir(os.path.dirname(control)) or len(os.fsencode(control)) > longest:
        raise CannotStart(f'the socket of zdaemon {control} cannot be made: its folder must exist, and its path'
                          f' have at most {longest} bytes; choose another --pid-file, beside which it is')
    if _say(control, 'status') is not None:
        raise CannotStart(f'there is a server in the background already, with {control}; stop it first, or'
                          ' choose another --pid-file for this one')
    with _ear() as (ear, where):
        with _ctrl_c() as was_pressed:
            manager = subprocess.run(
                command(arguments, options, pid_file, control), env={**os.environ, 'NOTIFY_SOCKET': where},
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            if was_pressed:
                raise KeyboardInterrupt
            if manager.returncode:
                *_, why = manager.stderr.strip().splitlines() or ['']
                raise CannotStart(f'zdaemon cannot start: {why}')
            return _outcome(ear, control)
        except BaseException as error:
            _stop(control)
            if isinstance(error, KeyboardInterrupt):
                raise CannotStart('ended before it was ready') from None
            raise


def command(arguments: Sequence[str], options: Options, pid_file: str, control: str) -> list[str]:
    """How to start zdaemon, which starts the server."""
    os.umask(mask := os.umask(0o077))
    words = [sys.executable, '-m', 'zdaemon.zdrun', '-s', control,
             '-b', str(options.runner.get('backoff_limit', 10)),
             '-x', str(options.runner.get('exit_codes', '0,2')),
             '-m', str(options.runner.get('umask', f'{mask:03o}')),
             '-t', os.path.abspath(str(options.runner.get('transcript', os.devnull)))]
    if 'directory' in options.runner:
        words += ['-z', os.path.abspath(str(options.runner['directory']))]
    if options.runner.get('forever'):
        words.append('-f')
    words += [sys.executable, '-m', 'zeo.start', *arguments, '-s', f'--pid-file={pid_file}']
    if options.configuration is not None:
        words.append(f'--configuration={os.path.abspath(options.configuration)}')
    return words


@contextlib.contextmanager
def _ctrl_c() -> Iterator[list[int]]:
    """Meanwhile Ctrl-C is only noted: it is not known yet what would have to be ended."""
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _ear() -> Iterator[tuple[socket.socket, str]]:
    """A datagram socket that any user of this machine may write to, as the server may have become another."""
    with tempfile.TemporaryDirectory(prefix='zeo-') as folder:
        os.chmod(folder, 0o711)
        path = os.path.join(folder, 'notify')
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear:
            ear.settimeout(PAUSE)
            ear.bind(path)
            os.chmod(path, 0o666)
            yield ear, path


def _outcome(ear: socket.socket, control: str) -> str:
    while True:
        try:
            told = dict(line.split('=', 1) for line in ear.recv(65536).decode('utf-8', 'replace').split('\n')
                        if '=' in line)
        except TimeoutError:
            if _say(control, 'status') is None:
                raise CannotStart('the server and zdaemon have ended; the log may say why') from None
            continue
        if told.get('READY') == '1':
            return f'{told.get("STATUS")} (process {told.get("MAINPID")})'
        if told.get('STOPPING') == '1':
            raise CannotStart(told.get('STATUS', ''))


def _stop(control: str) -> None:
    """Have zdaemon stop, and the server with it if it runs."""
    end = time.monotonic() + PATIENCE
    _say(control, 'stop')
    while _say(control, 'status') is not None and time.monotonic() < end:
        time.sleep(0.05)


def _say(control: str, word: str) -> str | None:
    """zdaemon's answer; None if it is not there."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(PATIENCE)
            sock.connect(control)
            sock.sendall(f'{word}\n'.encode('ascii'))
            return sock.recv(1000).decode('utf-8', 'replace')
    except OSError:
        return None
