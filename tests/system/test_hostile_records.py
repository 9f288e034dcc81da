"""Hostile records in conflicts, sent to a real server, which resolves them and runs nothing.

The server's process listens for itself: an audit hook writes a line for every module that is imported,
every code that is executed and every command that is started after the server was ready; a module that
can be imported there writes a file when anything of it is used.
"""

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ZODB.POSException import ConflictError
from ZODB.utils import z64

from tests.server.talk import SocketPeer, oid
from tests.system.servers import Server, Storage, figures
from tests.wire import hostile

Start = Callable[..., Server]

SHOP = """
from persistent import Persistent

class Stock(Persistent):
    def _p_resolveConflict(self, old, saved, new):
        saved = dict(saved)
        saved['count'] = saved['count'] + new['count'] - old['count']
        return saved
"""

# What can be imported by the server and should never be.
CANARY = """
open('song', 'a').write('imported')

def sing(*args):
    open('song', 'a').write('called')

class Bird:
    def __new__(cls, *args):
        open('song', 'a').write('made')
        return super().__new__(cls)

    def __setstate__(self, state):
        open('song', 'a').write('altered')
"""

WATCHED = """
import os, sys
from ZODB.FileStorage import FileStorage
from ZODB.MappingStorage import MappingStorage

EVENTS = ('import', 'exec', 'marshal.', 'os.', 'subprocess.', 'shutil.', 'pty.', 'ctypes.', 'socket.connect',
          'socket.bind', 'code.', 'pickle.find_class', 'open', 'sys.', 'builtins.', 'webbrowser.')
HARMLESS = ('os.listdir', 'os.scandir', 'sys._getframe', 'sys.excepthook', 'os.remove', 'os.rename', 'os.truncate')

def listen(event, args):
    if not os.path.exists('listen') or not event.startswith(EVENTS) or event in HARMLESS:
        return
    if event == 'open' and (not isinstance(args[1], str) or set(args[1]) <= set('rb')):
        return
    os.write(2, f'AUDIT {event} {args!r:.200}\\n'.encode())

file = FileStorage('Data.fs')
plain = MappingStorage()
sys.addaudithook(listen)
"""

CLASSES = [('BTrees.Length', 'Length'), ('BTrees.OOBTree', 'OOBucket'), ('BTrees.OOBTree', 'OOBTree'),
           ('BTrees.IOBTree', 'IOTreeSet'), ('zeo_test_shop', 'Stock'), ('zeo_test_shop', 'Nothing'),
           ('canary', 'Bird'), ('no_such_module_zeo', 'Thing')]


def good(module: str, name: str, state: bytes) -> bytes:
    return b'\x80\x03c%s\n%s\n.\x80\x03%s.' % (module.encode(), name.encode(), state)


def count(number: int) -> bytes:
    return good('zeo_test_shop', 'Stock', b'}X\x05\x00\x00\x00countK%cs' % number)


STATES = {'Length': b'K\x07', 'Stock': b'}X\x05\x00\x00\x00countK\x07s'}
HONEST = {(module, name): good(module, name, STATES.get(name, b'N')) for module, name in CLASSES}


class Watched:
    """A server that says what it does, with a FileStorage '1' and a MappingStorage '2'."""

    def __init__(self, start_server: Start, folder: Path) -> None:
        for name, source in [('zeo_test_shop', SHOP), ('canary', CANARY), ('watched', WATCHED)]:
            (folder / f'{name}.py').write_text(source)
        self.folder = folder
        self.server = start_server(folder=str(folder), storages={
            '1': Storage('__import__("watched").file'), '2': Storage('__import__("watched").plain')})
        self.tried = self.resolved = 0
        self.peers = [SocketPeer(self.server.address, name) for name in '12']
        self.based: list[dict[tuple[str, str], tuple[bytes, bytes]]] = [{}, {}]
        for peer, based in zip(self.peers, self.based):
            for number, kind in enumerate(CLASSES, 1):  # each object has two revisions
                first = peer.commit(oid(number), HONEST[kind])
                peer.commit(oid(number), HONEST[kind], serial=first)
                based[kind] = oid(number), first
        for kind in CLASSES[0], CLASSES[4]:  # these are imported now
            assert self.conflict(0, *self.based[0][kind], HONEST[kind])
        (folder / 'listen').touch()

    def conflict(self, which: int, number: bytes, serial: bytes, record: bytes) -> bool:
        """Whether a conflict is resolved; it is never committed."""
        peer = self.peers[which]
        peer.begin(1, (number, serial, record))
        self.tried += 1
        try:
            resolved: bool = peer.call('vote', 1) == [number]
        except ConflictError:
            return False
        finally:
            peer.call('tpc_abort', 1)
            peer.told.clear()  # to look through it takes time
        self.resolved += resolved
        return resolved

    def suffer(self, rnd: random.Random, records: Callable[[], bytes], count: int) -> None:
        """Put hostile records into conflicts: as the new one, as the committed one, or both."""
        for number in range(count):
            which = rnd.randrange(2)
            record = records()
            if rnd.random() < .8:
                self.conflict(which, *self.based[which][rnd.choice(CLASSES)], record)
                continue
            fresh = oid(1000 + number + self.tried * 1000)
            peer = self.peers[which]
            first = peer.commit(fresh, rnd.choice([record, *HONEST.values()]), serial=z64)
            peer.commit(fresh, record, serial=first)
            self.conflict(which, fresh, first, rnd.choice([record, *HONEST.values()]))

    def judge(self) -> None:
        """Nothing has been executed, and conflicts are still resolved."""
        assert self.conflict(0, *self.based[0][CLASSES[0]], HONEST[CLASSES[0]])
        assert self.conflict(0, *self.based[0][CLASSES[4]], count(9))
        heard = [line for line in self.server.log.lines if 'AUDIT' in line]
        assert not heard
        assert not (self.folder / 'song').exists()

    def close(self) -> None:
        for peer in self.peers:
            peer.close()


@pytest.fixture
def watched(start_server: Start, tmp_path: Path) -> Iterator[Watched]:
    watched = Watched(start_server, tmp_path)
    yield watched
    watched.close()


def test_the_server_would_say_if_it_did_anything(watched: Watched) -> None:
    """Else the next test would not see it: here a class is imported, as it should be."""
    (watched.folder / 'zeo_test_other.py').write_text(SHOP)
    record = good('zeo_test_other', 'Stock', STATES['Stock'])
    peer = watched.peers[0]
    first = peer.commit(oid(100), record)
    peer.commit(oid(100), record, serial=first)
    assert watched.conflict(0, oid(100), first, record)
    watched.server.log.wait_for('AUDIT exec .*zeo_test_other')


def hostilities(watched: Watched, seed: int, count: int, largest: int) -> str:
    """Figures, after so many hostile records."""
    records = hostile.records(seed, largest, CLASSES)
    rnd = random.Random(seed)
    assert watched.server.process is not None
    watched.suffer(rnd, records, count // 10)
    before = figures(watched.server.process.pid)
    began = time.monotonic()
    watched.suffer(rnd, records, count)
    seconds = time.monotonic() - began
    watched.judge()
    after = figures(watched.server.process.pid)
    assert after['threads'] == before['threads'] and after['files'] == before['files']
    assert after['memory'] < before['memory'] + 30_000 + largest // 10
    return (f'{watched.tried} records in conflicts, 0 executed, {watched.resolved} resolved, {seconds:.0f} s,'
            f' memory {before["memory"] // 1024} -> {after["memory"] // 1024} MB')


def test_hostile_records_do_nothing_in_conflicts(watched: Watched) -> None:
    print(hostilities(watched, seed=1, count=2_000, largest=20_000))


@pytest.mark.soak
@pytest.mark.timeout(1500)
def test_very_many_hostile_records_do_nothing_in_conflicts(watched: Watched) -> None:
    print(hostilities(watched, seed=time.time_ns(), count=100_000, largest=200_000))
