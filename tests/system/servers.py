"""Real server processes for tests: started, awaited, restarted, stopped, and judged at the end.

A `Server` is of kind ``'zeo'`` (``python -m zeo.start``) or ``'ZEO'`` (``python -m ZEO.runzeo`` of
PyPI's ZEO, the stock peer).  Nothing here sleeps: who waits, waits for a line in the server's log,
for the end of the process, or for a `Condition`.
"""

import ast
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ['Address', 'Pool', 'Server', 'Storage', 'file_storage', 'freeze', 'until']

Address = tuple[str, int] | str

# Seconds that anything here may take.  Never reached on a healthy machine, however busy.
PATIENCE = 60.0

ROOT = Path(__file__).resolve().parents[2]

# Runs ``ZEO.runzeo`` with one addition: the address it really listens on is printed (its own log
# shows port 0 when the system chose the port).  And with one thing taken away: on uvloop, which it uses
# where it is installed, it answers a commit before it sends the announcements of earlier ones.
RUNZEO = """
import sys
sys.modules['uvloop'] = None
import ZODB.event, ZEO.runzeo
def tell(event):
    if hasattr(event, 'address'):
        print('SERVING', repr(event.address), file=sys.stderr, flush=True)
ZODB.event.notify = tell
ZEO.runzeo.main(sys.argv[1:])
"""


def until(condition: Any, what: str, timeout: float = PATIENCE) -> None:
    """Wait until ``condition()`` is true; for what offers nothing to wait on."""
    pause = threading.Event()   # never set: its wait is a pause that cannot be forgotten to end
    for _ in range(int(timeout / .01)):
        if condition():
            return
        pause.wait(.01)
    raise AssertionError(f'still not so after {timeout} seconds: {what}')


def freeze(process: 'subprocess.Popen[Any]') -> None:
    """Stop a process (SIGSTOP); when this returns, each of its threads has stopped.

    One of them is told to, and tells the others when its turn comes, which takes a while on a busy machine.
    """
    process.send_signal(signal.SIGSTOP)

    def stopped() -> bool:
        states = set()
        for path in Path(f'/proc/{process.pid}/task').glob('*/stat'):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
                states.add(path.read_text().rpartition(')')[2].split()[0])
        return states == {'T'}

    until(stopped, 'all threads have stopped')


def figures(pid: int) -> dict[str, int]:
    """Resident memory in kB, threads and open files of a process."""
    folder = Path('/proc', str(pid))
    status = dict(line.split(':', 1) for line in (folder / 'status').read_text().splitlines())
    return {'memory': int(status['VmRSS'].split()[0]), 'threads': int(status['Threads']),
            'files': len(os.listdir(folder / 'fd'))}


# Runs ``zeo.start`` with other values for some of its constants.
START = """
import sys
import zeo.StorageServer, zeo.server.threads
{}
import zeo.start
sys.exit(zeo.start.main())
"""


class Storage(NamedTuple):
    """A storage that a server shall serve, in the words of either kind of server."""

    python: str                 # an expression for the module that ``-S`` names
    section: str | None = None  # ZConfig, with NAME for the storage's name; None: stock servers cannot
    path: str | None = None     # a plain FileStorage's file


def file_storage(path: str = 'Data.fs', wrapper: str = '', read_only: bool = False,
                 pack_gc: bool = True, blobs: str = '', blob_wrapper: bool = False) -> Storage:
    """A FileStorage; ``wrapper`` may be 'HexStorage' or 'ServerHexStorage' (ZODB.tests.hexstorage).

    ``blobs`` is the folder for its blobs, which may be kept by a wrapper.
    """
    options = ', read_only=True' if read_only else ''
    options += '' if pack_gc else ', pack_gc=False'
    if blobs and blob_wrapper:
        return Storage(
            f'BlobStorage({blobs!r}, FileStorage({path!r}{options}))',
            f'<blobstorage NAME>\nblob-dir {blobs}\n<filestorage>\npath {path}\nread-only {read_only}\n'
            f'pack-gc {pack_gc}\n</filestorage>\n</blobstorage>\n')
    options += f', blob_dir={blobs!r}' if blobs else ''
    python = f'FileStorage({path!r}{options})'
    name = '' if wrapper else ' NAME'
    section = (f'<filestorage{name}>\npath {path}\nread-only {read_only}\npack-gc {pack_gc}\n'
               + (f'blob-dir {blobs}\n' if blobs else '') + '</filestorage>\n')
    if wrapper:
        python = f'{wrapper}({python})'
        kind = wrapper.lower()
        section = f'%import ZODB.tests\n<{kind} NAME>\n{section}</{kind}>\n'
    return Storage(python, section, None if wrapper or options else path)


class Log:
    """What a process writes to its standard error, line by line, read by a thread of its own."""

    def __init__(self, stream: Any) -> None:
        self.lines: list[str] = []
        self._grown = threading.Condition()     # guards `lines`, `_ended`; notified at each change
        self._ended = False
        self._stream = stream
        self._reader = threading.Thread(target=self._read, name='server log', daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with self._stream:
            for line in self._stream:
                with self._grown:
                    self.lines.append(line.rstrip('\n'))
                    self._grown.notify_all()
        with self._grown:
            self._ended = True
            self._grown.notify_all()

    def join(self) -> None:
        self._reader.join(PATIENCE)
        assert not self._reader.is_alive()

    def wait_for(self, pattern: str, timeout: float = PATIENCE) -> re.Match[str]:
        """The first match in any line, as soon as there is one."""
        seen = 0
        with self._grown:
            while True:
                for line in self.lines[seen:]:
                    if match := re.search(pattern, line):
                        return match
                seen = len(self.lines)
                if self._ended or not self._grown.wait_for(
                        lambda: len(self.lines) > seen or self._ended, timeout):
                    raise AssertionError(f'no line like {pattern!r} in the log:\n{self}')

    def __str__(self) -> str:
        return '\n'.join(self.lines[-200:])


class Server:
    """One server process at a time, over one folder of data, at one address.

    ``kind``: 'zeo' or 'ZEO'.  ``unix``: listen on a Unix socket, not on a free TCP port; ``both``:
    listen on a Unix socket as well, at `second_address` (a stock server cannot).
    ``options``: ``read_only``, ``transaction_timeout``, ``invalidation_queue_size``,
    ``invalidation_age``, ``client_conflict_resolution``, and ``tls_certificate`` and the like of either
    kind of server.
    Paths of storages are relative to `folder`, the process's current directory.
    """

    address: Address
    log: Log

    #: Constants of zeo's modules, by their full names, that its processes shall have other values of: tests that wait
    #: for the server to lose its patience need not do so for as long as it is in real life.
    constants: dict[str, float] = {}

    def __init__(self, kind: str = 'zeo', storages: dict[str, Storage] | None = None, *,
                 unix: bool = False, both: bool = False, host: str = '127.0.0.1', folder: str | None = None,
                 **options: Any) -> None:
        assert kind in ('zeo', 'ZEO'), kind
        self.kind = kind
        self.storages = storages or {'1': file_storage()}
        self.options = options
        self._owns_folder = folder is None
        # A short path of its own: the name of a Unix socket may have 107 characters at most.
        self.folder = folder or tempfile.mkdtemp(prefix='zeo-')
        self.address = os.path.join(self.folder, 'socket') if unix else (host, 0)
        self.second_address = os.path.join(self.folder, 'second') if both else None
        self.process: subprocess.Popen[str] | None = None
        self._runs = 0

    def __repr__(self) -> str:
        return f'<{self.kind} server at {self.address}>'

    # -- starting

    def start(self, **options: Any) -> 'Server':
        """Start, wait until it is ready; ``options`` are changed for good."""
        assert self.process is None, 'it is running already'
        self.options.update(options)
        self._runs += 1
        arguments = self._zeo() if self.kind == 'zeo' else self._runzeo()
        environment = dict(os.environ, PYTHONPATH=str(ROOT), PYTHONUNBUFFERED='1')
        environment.pop('INSTANCE_HOME', None)
        self.process = subprocess.Popen(
            [sys.executable, *arguments], cwd=self.folder, env=environment, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        self.log = Log(self.process.stderr)
        try:
            self._await_ready()
        except BaseException:
            self.kill()
            raise
        return self

    def _zeo(self) -> list[str]:
        arguments = ['-W', 'error::ResourceWarning']
        if self.constants:
            arguments += ['-c', START.format('\n'.join(f'{name} = {value}' for name, value in self.constants.items()))]
        else:
            arguments += ['-m', 'zeo.start']
        if isinstance(self.address, str):
            arguments += ['-U', self.address]
        else:
            host, port = self.address
            arguments += ['-h', host, '-p', str(port)]
        if self.second_address:
            arguments += ['-U', self.second_address]
        for name, value in self.options.items():
            option = '--' + name.replace('_', '-')
            if value is True:
                arguments.append(option)
            elif value is not False:
                arguments.append(f'{option}={value}')
        if list(self.storages) == ['1'] and (path := self.storages['1'].path):
            return [*arguments, path]
        module = f'storages{self._runs}'
        lines = ['from ZODB.blob import BlobStorage',
                 'from ZODB.FileStorage import FileStorage',
                 'from zeo.ClientStorage import ClientStorage',
                 'from ZODB.tests.hexstorage import HexStorage, ServerHexStorage']
        for number, (name, storage) in enumerate(self.storages.items()):
            lines.append(f'storage{number} = {storage.python}')
            arguments += ['-S', f'{name}={module}:storage{number}']
        Path(self.folder, f'{module}.py').write_text('\n'.join(lines) + '\n')
        return arguments

    def _runzeo(self) -> list[str]:
        assert self.second_address is None
        address = self.address if isinstance(self.address, str) else '%s:%d' % self.address
        lines = ['<zeo>', f'address {address}']
        tls = {name: value for name, value in self.options.items() if name.startswith('tls_')}
        lines += [f'{name.replace("_", "-")} {value}' for name, value in self.options.items()
                  if name not in tls]
        if tls:
            lines += ['<ssl>', *(f'{name.removeprefix("tls_")} {value}' for name, value in tls.items()), '</ssl>']
        lines.append('</zeo>')
        for name, storage in self.storages.items():
            assert storage.section is not None, f'no stock server has {storage.python}'
            lines.append(storage.section.replace('NAME', name))
        configuration = Path(self.folder, f'zeo{self._runs}.conf')
        configuration.write_text('\n'.join(lines) + '\n')
        return ['-c', RUNZEO, '-C', str(configuration)]

    def _await_ready(self) -> None:
        if self.kind == 'ZEO':
            found = self.log.wait_for(r'^SERVING (.+)$')
            self.address = ast.literal_eval(found[1])
        else:
            found = self.log.wait_for(r'ready on (.+?); storages: ')
            if not isinstance(self.address, str):
                port = re.search(r':(\d+)', found[1].replace(f'[{self.address[0]}]', ''))
                assert port, found[0]
                self.address = (self.address[0], int(port[1]))

    # -- ending

    def stop(self) -> None:
        """SIGTERM, and wait for the end.  Our server must exit with status 0, having logged no traceback."""
        status = self._end(signal.SIGTERM)
        if self.kind == 'zeo':
            assert status == 0, f'exit status {status}, log:\n{self.log}'
            self.judge()

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self._end(signal.SIGKILL)

    def judge(self) -> None:
        """Assert that the log shows no traceback (but those of application classes, which ZODB shows)."""
        for number, line in enumerate(self.log.lines):
            if 'ZODB.ConflictResolution' in self.log.lines[number - 1]:
                continue
            if 'Traceback' in line or 'Exception ignored' in line:
                raise AssertionError('\n'.join(self.log.lines[max(number - 5, 0):number + 40]))

    def _end(self, number: signal.Signals) -> int:
        process, self.process = self.process, None
        assert process is not None, 'it is not running'
        process.send_signal(number)
        try:
            # A stock server may wait for its clients for ever; that is not what is tested here.
            return process.wait(PATIENCE if self.kind == 'zeo' else 5)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait(PATIENCE)
            assert self.kind != 'zeo', f'{number.name} did not end it, log:\n{self.log}'
            return status
        finally:
            self.log.join()

    def restart(self, **options: Any) -> None:
        """Stop and start again, at the same address, with the same data."""
        self.stop()
        self.start(**options)

    def close(self) -> None:
        """Stop it if it runs, forget the data."""
        try:
            if self.process is not None:
                self.stop()
        finally:
            if self._owns_folder:
                shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> 'Server':
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.close()


class Pool:
    """A fresh, empty storage for each test, many of them in one server process.

    Starting a process takes half a second, and there are a thousand tests.
    """

    def __init__(self, kind: str = 'zeo', *, unix: bool = False, wrapper: str = '', size: int = 50,
                 blobs: bool = False, **options: Any) -> None:
        self._kind = kind
        self._unix = unix
        self._wrapper = wrapper
        self._size = size
        self._blobs = blobs     # each storage in a folder NAME.blobs
        self._options = options
        self._server: Server | None = None
        self._names: Iterator[str] = iter(())

    def take(self) -> tuple[Server, str]:
        """A running server, and the name of a storage in it that nobody has used yet."""
        name = next(self._names, None)
        if name is None:
            self.close()
            names = [str(number) for number in range(1, self._size + 1)]
            storages = {name: file_storage(f'{name}.fs', self._wrapper,
                                           blobs=f'{name}.blobs' if self._blobs else '')
                        for name in names}
            self._server = Server(self._kind, storages, unix=self._unix, **self._options)
            self._server.start()
            self._names = iter(names)
            name = next(self._names)
        assert self._server is not None
        return self._server, name

    def close(self) -> None:
        server, self._server = self._server, None
        self._names = iter(())
        if server is not None:
            server.close()


@contextlib.contextmanager
def running(*args: Any, **kw: Any) -> Iterator[Server]:
    """`Server` as a context manager for those who have no fixture at hand."""
    with Server(*args, **kw) as server:
        yield server
