"""Who is compared with whom: how each side's server is started, and how its client is opened."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.bench import floor
from tests.bench.peers import first_contact, free_port

Address = tuple[str, int] | str

ROOT = Path(__file__).resolve().parents[2]

#: The folder of blobs is named like the data file, with this at the end; zeo looks for it there.
BLOBS = '.blobs'

#: Where data is kept in memory, if the system has such a place.
TMPFS = '/dev/shm' if os.path.isdir('/dev/shm') else tempfile.gettempdir()

# ZEO takes uvloop whenever that can be imported: so its absence has to be arranged.
_RUNZEO = 'import sys; {}; from ZEO.runzeo import main; main(sys.argv[1:])'
_NO_UVLOOP = "sys.modules['uvloop'] = None"


class Side:
    """One of those who are compared.  ``name`` is for files and commands, ``title`` for tables."""

    name = title = ''
    has_server = True

    def command(self, address: Address, path: str, synced: bool = True) -> list[str]:
        """What starts a server of a FileStorage, after the interpreter's name.

        If not ``synced`` it need not wait until blobs are on the disk.
        """
        raise NotImplementedError

    def open(self, address: Address, path: str, **options: Any) -> Any:
        """A client storage; called in worker processes only."""
        raise NotImplementedError


def _spelled(address: Address) -> str:
    return address if isinstance(address, str) else '%s:%d' % address


class Ours(Side):
    name, title = 'zeo', 'zeo'

    def command(self, address: Address, path: str, synced: bool = True) -> list[str]:
        where = ['-U', address] if isinstance(address, str) else ['-h', address[0], '-p', str(address[1])]
        return ['-m', 'zeo.start', *where, *([] if synced else ['--no-blob-sync']), path]

    def open(self, address: Address, path: str, **options: Any) -> Any:
        from zeo.ClientStorage import ClientStorage
        return ClientStorage(address, **options)


class Theirs(Side):
    name, title = 'ZEO', 'ZEO (asyncio)'
    prelude = _NO_UVLOOP

    def command(self, address: Address, path: str, synced: bool = True) -> list[str]:
        program = ['-c', _RUNZEO.format(self.prelude)]
        if not os.path.isdir(path + BLOBS):
            return [*program, '-a', _spelled(address), '-f', path]
        configuration = path + '.conf'  # its command line knows no blobs
        Path(configuration).write_text(
            f'<zeo>\naddress {_spelled(address)}\n</zeo>\n'
            f'<filestorage 1>\npath {path}\nblob-dir {path}{BLOBS}\n</filestorage>\n')
        return [*program, '-C', configuration]

    def open(self, address: Address, path: str, **options: Any) -> Any:
        exec(self.prelude, {'sys': sys})
        from ZEO.ClientStorage import ClientStorage
        return ClientStorage(address, **options)


class TheirsWithUvloop(Theirs):
    name, title = 'uvloop', 'ZEO (uvloop)'
    prelude = 'import uvloop'


class InProcess(Side):
    name, title = 'FileStorage', 'FileStorage in process'
    has_server = False

    def open(self, address: Address, path: str, **options: Any) -> Any:
        from ZODB.FileStorage import FileStorage
        return FileStorage(path)


class Floor(Side):
    name, title = 'floor', 'bare floor'

    def command(self, address: Address, path: str, synced: bool = True) -> list[str]:
        return ['-m', 'tests.bench.floorserver', _spelled(address), path, *([] if synced else ['unsynced'])]

    def open(self, address: Address, path: str, **options: Any) -> Any:
        return floor.Client(address, **options)


SIDES: dict[str, Side] = {side.name: side for side in [
    Ours(), Theirs(), TheirsWithUvloop(), InProcess(), Floor()]}


class Population(NamedTuple):
    """So many objects of so many bytes each."""

    objects: int
    size: int


class Server(NamedTuple):
    """A running server of a side; ``pid`` is 0 if there is none."""

    side: Side
    address: Address
    path: str
    pid: int


@contextlib.contextmanager
def folder(disk: str | None = None) -> Iterator[str]:
    """A folder in memory, or below ``disk``, for as long as it is needed."""
    path = tempfile.mkdtemp(prefix='zeo-bench-', dir=disk or TMPFS)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def oids(first: int, count: int) -> list[bytes]:
    return [number.to_bytes(8, 'big') for number in range(first, first + count)]


def populate(path: str, population: Population) -> bytes:
    """Write a FileStorage with the objects 1 to N; returns the tid of all of them."""
    from ZODB.Connection import TransactionMetaData
    from ZODB.FileStorage import FileStorage
    storage = FileStorage(path)
    transaction = TransactionMetaData()
    storage.tpc_begin(transaction)
    noise = os.urandom(population.size)
    for oid in oids(1, population.objects):
        storage.store(oid, bytes(8), oid + noise[8:], '', transaction)
    storage.tpc_vote(transaction)
    tid: bytes = storage.tpc_finish(transaction)
    storage.close()
    return tid


def remove_blobs(server: Server) -> None:
    """Remove all blobs of server and clients: each round is to find the memory that the one before has used."""
    for file in Path(server.path).parent.rglob('*.blob'):
        file.unlink()


def launch(side: Side, address: Address, path: str, synced: bool = True) -> subprocess.Popen[bytes]:
    """Start a side's server, and do not wait."""
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    environment.pop('PYTHONDONTWRITEBYTECODE', None)  # no installed package is compiled at each start
    return subprocess.Popen([sys.executable, *side.command(address, path, synced)], env=environment,
                            cwd=os.path.dirname(path), stdin=subprocess.DEVNULL,
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(3)
    except subprocess.TimeoutExpired:  # a ZEO server waits for its clients
        process.kill()
        process.wait()


@contextlib.contextmanager
def serving(side: Side, population: Population, *, unix: bool = False,
            disk: str | None = None, blobs: bool = False, synced: bool = True) -> Iterator[Server]:
    """A server over a fresh FileStorage, perhaps with blobs, on TCP loopback or on a Unix socket."""
    with folder(disk) as place:
        path = os.path.join(place, 'Data.fs')
        populate(path, population)
        if blobs:
            os.mkdir(path + BLOBS)
        address: Address = os.path.join(place, 'socket') if unix else ('127.0.0.1', free_port())
        if not side.has_server:
            yield Server(side, address, path, 0)
            return
        process = launch(side, address, path, synced)
        try:
            first_contact(address).close()
            yield Server(side, address, path, process.pid)
        finally:
            end(process)
