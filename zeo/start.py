"""From the command line to a running server: ``python -m zeo.start``, see start.txt.

Exit status: 0 if the server was ended by SIGTERM or SIGINT, 1 if it could not be started or
profiled, 2 if the command line is wrong; then there is one line on standard error that says why.
"""

from __future__ import annotations

import contextlib
import ctypes  # persistent has loaded it already
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import TYPE_CHECKING
from typing import Any

from ZODB.FileStorage.format import CorruptedError
from ZODB.POSException import POSError

from zeo import programs
from zeo.server import addresses
from zeo.server import logs
from zeo.server import privileges
from zeo.server import servicemanager
from zeo.server import storages
from zeo.server.options import CannotStart
from zeo.server.options import PROGRAM
from zeo.server.options import Options
from zeo.server.options import blob_folder
from zeo.server.options import data_file
from zeo.server.options import parse
from zeo.server.options import pid_file
from zeo.server.roles import Roles
from zeo.StorageServer import StorageServer

if TYPE_CHECKING:
    import ssl

    from zeo.server.monitor import Monitor

logger = logging.getLogger('zeo')

#: How long in seconds a thread waits for another that computes before it asks for its turn; Python's own 5 ms
#: were more than a load takes altogether: with 8 clients that load beside 2 that commit, 99 of 100 loads took
#: less than 6.7 ms then, and with this less than 4.2 ms, at the same rate.
TURN = 0.0005

#: Where memory comes from the GNU C library: what is larger than the first is given back as soon as it is not
#: needed, and what each thread keeps for its next need is not more than the second.  By itself the library moves
#: both with what it sees, up to 32 and 64 MB; a few large messages then cost hundreds of MB for ever.  Smaller
#: limits would show: memory that is new is dear, and with it a load of 1 MB takes twice as long.
GIVEN_BACK, KEPT = 4 * 1024 * 1024, 8 * 1024 * 1024

STOP = {signal.SIGTERM, signal.SIGINT}
REOPEN = {signal.SIGHUP, signal.SIGUSR2}


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until a signal says to stop; returns the exit status (`SystemExit` for usage errors)."""
    programs.all_is_read()  # only that: what Ctrl-C does is up to `Signals`
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    if options.check:
        return check(options)
    try:
        if options.daemon:
            os.environ.update(options.environment)
            number = pid_file(options, os.environ)
            assert number is not None
            from zeo.server import daemon  # takes a while, and few need it
            programs.begun()
            print(daemon.start(arguments, options, number))
        else:
            run(options)
    except CannotStart as error:
        if options.log and logging.getLogger().hasHandlers():
            logger.error('%s', error)
        servicemanager.tell('STOPPING=1', f'STATUS={error}')
        print(f'{PROGRAM}: {error}', file=sys.stderr)
        return 1
    return 0


def check(options: Options) -> int:
    """Tell what is wrong with what the options name, as far as can be seen without opening anything."""
    os.environ.update(options.environment)
    problems = list(_problems(options))
    for text in (*options.notices, *problems):
        print(f'{PROGRAM}: {text}', file=sys.stderr)
    if problems:
        return 2
    print(f'{options.configuration or "the command line"}: nothing wrong was found')
    return 0


def _problems(options: Options) -> Iterator[str]:
    file = data_file(options, os.environ)
    if file is None:
        yield from filter(None, map(storages.look_for, options.storages))
    elif problem := storages.look_for_file(file, options.read_only):
        yield problem

    def at(name: str) -> str:
        return f'{options.places[name]}: ' if name in options.places else ''

    if options.user is not None:
        try:
            privileges.find_user(options.user)
        except CannotStart as error:
            yield f'{at("user")}{error}'
    try:
        _tls(options)
    except CannotStart as error:
        yield f'{at("tls_certificate")}{error}'
    made: list[tuple[str, Any]] = [(str(path), path) for path in options.addresses]
    made += [('pid_file', pid_file(options, os.environ)), ('log', options.log), ('profile', options.profile)]
    for name, path in made:
        if isinstance(path, str) and not os.path.isdir(folder := os.path.dirname(os.path.abspath(path))):
            yield f'{at(name)}{path}: the folder {folder} does not exist; create it, or choose another one'


def run(options: Options) -> None:
    """Serve until a signal says to stop.  Raises `CannotStart`."""
    os.environ.update(options.environment)
    file = data_file(options, os.environ)
    if file is not None:
        storages.check_place(file)
    with contextlib.ExitStack() as at_end:
        # These two are done before: keys, and files of Python, often cannot be read by others.
        tls = _tls(options)
        monitor = _monitor(options)
        if monitor is not None:
            at_end.callback(monitor.close)
        if options.user is not None and os.geteuid() == 0:
            _import_what_may_be_needed()
        # First of all else: whatever is opened or made afterwards belongs to the user who has to work with it.
        warning = privileges.settle(options.user, lambda: _complaint(options, file))
        log_file = logs.set_up(options.log, options.debug)
        handed_over = servicemanager.sockets(os.environ)
        if not (handed_over or options.addresses):
            raise CannotStart('no address to listen on: the service manager hands its sockets to another process'
                              ' (LISTEN_PID); start the server itself, not a program that starts it')
        signals = Signals()
        at_end.callback(signals.ignore)
        sys.setswitchinterval(TURN)
        _keep_little_memory()
        if options.profile:
            at_end.enter_context(_profiling(options.profile))
        if monitor is not None:
            monitor.start()
        try:
            opened = _open(options, file, signals)
        except Interrupted:
            logger.info('ended before it was ready')
            return
        number = pid_file(options, os.environ)
        if number is not None:
            at_end.callback(_remove_number, number)
        server = _start(options, opened, handed_over, tls)
        at_end.callback(server.close)
        if monitor is not None:
            monitor.tell_about(server.storages, lambda: server.closing)
            logger.info('the monitor is at %s', 'http://' + addresses.describe(monitor.address))
        for text in (warning, monitor and monitor.warning, *options.notices):
            if text:
                logger.warning('%s', text)
        if number is not None:
            _write_number(number)
        if tls is not None:
            logger.info('TLS is spoken at addresses with a port; clients need %s certificate',
                        'no' if options.tls_authenticate is None else 'a')
        ready = ready_line(server.addresses, opened)
        logger.info('%s', ready)
        servicemanager.tell('READY=1', f'STATUS={ready}', f'MAINPID={os.getpid()}')
        gc.freeze()  # what there is now stays: nobody need look for garbage in it
        at_end.callback(gc.unfreeze)
        _wait(signals, log_file)
        servicemanager.tell('STOPPING=1', 'STATUS=closing')
    logger.info('closed')


def _keep_little_memory() -> None:
    """Set `GIVEN_BACK` and `KEPT`, unless there is another C library, or the environment says what to do."""
    if any(name.startswith('MALLOC_') for name in os.environ):
        return
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, GIVEN_BACK)  # M_MMAP_THRESHOLD of malloc.h
        mallopt(-1, KEPT)  # M_TRIM_THRESHOLD


def _import_what_may_be_needed() -> None:
    """What is imported only when it is needed: another user perhaps cannot read it."""
    import encodings.idna  # noqa: F401  (for names of hosts in other scripts)

    from zeo.server import gateway  # noqa: F401
    from zeo.server import profiler  # noqa: F401


def _monitor(options: Options) -> 'Monitor | None':
    """The web server that tells how this one is; started, it answers already while storages are opened."""
    if options.monitor is None:
        return None
    from zeo.server.monitor import Monitor

    try:
        return Monitor(*options.monitor)
    except OSError as error:
        raise CannotStart(f'the monitor: {error.strerror or error}') from None


def _complaint(options: Options, file: str | None) -> str | None:
    """What of the files on the command line the current user cannot work with."""
    if file is not None and (problem := privileges.may_serve(file, options.read_only)):
        return problem
    blob_dir = None if file is None else blob_folder(options, file)
    if blob_dir is not None and (problem := privileges.may_keep_blobs(blob_dir, options.read_only)):
        return problem
    if file is None and options.user is None:
        whose = 'the storage sections' if options.configuration else 'the modules of -S'
        return f'may not be able to write what {whose} open'
    written = [path for path in (options.log, options.profile, pid_file(options, os.environ))
               if isinstance(path, str)]
    if problem := privileges.may_write(written):
        return problem
    for address in options.addresses:
        if isinstance(address, str):
            return privileges.may_make_files_in(os.path.dirname(os.path.abspath(address)))
    return None


def _open(options: Options, file: str | None, signals: 'Signals') -> dict[str, Any]:
    """Open what is to be served.

    This may take long (without its index, a large file is read as a whole); a signal ends it.
    """
    openers: dict[str, Callable[[], Any]]
    if file is None:
        openers = storages.openers(options.storages)
    else:
        blob_dir = blob_folder(options, file)
        openers = {'1': lambda: storages.open_file(file, options.read_only, blob_dir)}
    with signals.interrupting():
        return storages.open_all(openers)


def _tls(options: Options) -> ssl.SSLContext | None:
    """What is needed for TLS, if it is asked for.  Raises `CannotStart`."""
    if options.tls_certificate is None:
        return None
    from zeo.wire import certificates  # who does without does not load OpenSSL

    try:
        return certificates.server_context(
            options.tls_certificate, options.tls_key, password_file=options.tls_password_file,
            password_function=options.tls_password_function, authenticate=options.tls_authenticate)
    except certificates.Unusable as error:
        raise CannotStart(f'TLS: {error}') from None


def _start(options: Options, opened: dict[str, Any], handed_over: list[socket.socket],
           tls: ssl.SSLContext | None) -> StorageServer:
    with contextlib.ExitStack() as unless_started:
        unless_started.callback(storages.close_all, opened)
        try:
            server = StorageServer(
                opened, (*handed_over, *options.addresses),
                read_only=options.read_only,
                transaction_timeout=options.transaction_timeout,
                invalidation_queue_size=options.invalidation_queue_size,
                invalidation_age=options.invalidation_age,
                client_conflict_resolution=options.client_conflict_resolution,
                blob_sync=options.blob_sync,
                poll_interval=options.poll_interval,
                socket_mode=options.socket_mode, ssl=tls,
                limits=options.limits, roles=Roles(options.roles), measure=options.monitor is not None)
        except (POSError, CorruptedError, OSError) as error:  # of a storage that is asked for its last transactions
            logger.debug('the last transactions cannot be read', exc_info=True)
            raise CannotStart(f'the last transactions of what is to be served cannot be read:'
                              f' {type(error).__name__}: {error} (-D shows where)') from None
        unless_started.pop_all()  # the server closes the storages from now on
        unless_started.callback(server.close)
        try:
            server.start()
        except OSError as error:
            raise CannotStart(error.strerror or str(error)) from None
        unless_started.pop_all()
        return server


def ready_line(bound: Sequence[addresses.SocketAddress | str], opened: dict[str, Any]) -> str:
    """The line that says where the server can be reached, and what it serves.

    Others may rely on its form: ``ready on ADDRESS[, ADDRESS ...]; storages: NAME (KIND)[, ...]``,
    where an address is ``HOST:PORT``, ``[HOST]:PORT`` or the absolute path of a socket file, and the
    last address with a port is followed by ``(this machine only)`` if that is true.
    """
    tcp = [address for address in bound if not isinstance(address, str)]
    words = [addresses.describe(address) for address in tcp]
    if tcp and all(map(addresses.only_this_machine, tcp)):
        words[-1] += ' (this machine only)'
    words += [os.path.abspath(path) for path in bound if isinstance(path, str)]
    served = [f'{name} ({storages.describe(storage)})' for name, storage in opened.items()]
    return f'ready on {", ".join(words)}; storages: {", ".join(served)}'


class Interrupted(BaseException):
    """A signal to stop arrived while the storages were being opened."""


class Signals:
    """The signals that a server obeys, in the order in which they arrive.

    They are written down at once and obeyed by the main thread at a place of its own choice: so a
    second one while closing does no harm, and the log is never reopened in the middle of a line.

    What they are written to is a pipe (`signal.set_wakeup_fd`), since only that is safe: Python runs
    its own handlers between two instructions, so a signal that arrives just before the main thread
    goes to sleep in a lock or a queue would not be noticed before the next one.
    """

    def __init__(self) -> None:
        self._arrived, writing = os.pipe()  # open as long as the process lives, as handlers are
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        self._interrupting = False
        for number in STOP | REOPEN:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: object) -> None:
        if self._interrupting and number in STOP:
            self._interrupting = False  # once is enough; what is open is being closed now
            raise Interrupted

    def ignore(self) -> None:
        """From now on: Python's own end takes handlers away, and then a signal would kill the process."""
        for number in STOP | REOPEN:
            signal.signal(number, signal.SIG_IGN)

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """While this lasts, a signal to stop raises `Interrupted` in the main thread."""
        self._interrupting = True
        try:
            yield
        finally:
            self._interrupting = False

    def next(self) -> signal.Signals:
        """Wait for the next signal."""
        while True:
            [number] = os.read(self._arrived, 1)
            if number in STOP | REOPEN:
                return signal.Signals(number)


def _wait(signals: Signals, log_file: logs.Log | None) -> None:
    """Until a signal says to stop."""
    while (arrived := signals.next()) not in STOP:
        if log_file is None:
            logger.info('%s: the log goes to standard error, there is nothing to reopen', arrived.name)
            continue
        try:
            log_file.reopen()
        except OSError as error:
            logger.error('%s: cannot reopen the log, going on in the old file: %s', arrived.name, error)
        else:
            logger.info('%s: log reopened', arrived.name)
    logger.info('%s: closing', arrived.name)


def _write_number(path: str) -> None:
    """Write the number of this process to the pid file; nobody sees it half written.

    A link that somebody has put there, in a folder for everybody, is not followed.
    """
    new = f'{path}.{os.getpid()}'
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new)
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), 'wb') as file:
            file.write(b'%d\n' % os.getpid())
        os.replace(new, path)
    except OSError as error:
        raise CannotStart(f'cannot write the number of the process to {path}: {error.strerror}; choose'
                          ' another file with --pid-file') from None


def _remove_number(path: str) -> None:
    """Remove the pid file, unless another process has written its number there."""
    with contextlib.suppress(OSError):
        with open(path, 'rb') as file:
            ours = file.read() == b'%d\n' % os.getpid()
        if ours:
            os.unlink(path)


@contextlib.contextmanager
def _profiling(path: str) -> Iterator[None]:
    """Profile all threads while this lasts, and write the result to `path`."""
    try:
        file = open(path, 'wb')
    except OSError as error:
        raise CannotStart(f'cannot write the profile {path}: {error.strerror}; choose another file'
                          ' with -P') from None
    with file:
        from zeo.server.profiler import Profiler

        profiler = Profiler()
        profiler.start()
        try:
            yield
        finally:
            profiler.stop()
            profiler.dump(file)


if __name__ == '__main__':
    sys.exit(main())
