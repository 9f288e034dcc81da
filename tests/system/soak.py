"""What nobody planned, done to real servers: scenario after scenario, and what became of it.

    python -m tests.system.soak [--minutes 10] [SCENARIO ...]

Clients that do not read, stop, vanish, or die in any phase of a commit; servers that are killed or told to end
under load; full disks, no more files; many clients, and clients that come and go; and in
`tests.system.hostilities` those that mean harm: hostile messages to servers and to clients, hostile records, floods,
bad manners, TLS, roles, and all that can be wrong at a start.  Each scenario is
repeated for its share of the time and gives one line of figures: what was tried, what survived, what was
lost (always 0, or exit status 1), and the server's memory, threads and files before and after.

Scenarios that need to be root, for a small disk or a network of their own, are left out where nobody is.
"""

import argparse
import contextlib
import logging
import os
import random
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

from ZODB.Connection import TransactionMetaData
from ZODB.FileStorage import FileStorage
from ZODB.POSException import POSKeyError
from ZODB.utils import load_current
from ZODB.utils import p64
from ZODB.utils import z64

from tests.server.talk import SocketPeer
from tests.system import hostilities
from tests.system.accounts import AT_ONCE
from tests.system.accounts import KEPT
from tests.system.accounts import MB
from tests.system.accounts import Account
from tests.system.accounts import Resources
from tests.system.accounts import client_of
from tests.system.accounts import reset
from tests.system.accounts import seconds
from tests.system.accounts import watched
from tests.system.clients import Task
from tests.system.clients import store
from tests.system.servers import PATIENCE
from tests.system.servers import ROOT
from tests.system.servers import Server
from tests.system.servers import Storage
from tests.system.servers import file_storage
from tests.system.servers import until
from zeo.errors import ClientDisconnected
from zeo.errors import OutcomeUnknown

# ---- clients that are in the way ------------------------------------------------------------


def unread(effort: float) -> Account:
    """Clients ask for large objects, and all of them hear of many commits, and read nothing."""
    account = Account()
    stuck, asked, commits = 5, 40, max(int(300 * effort), 20)
    with Server() as server, client_of(server) as writer, client_of(server) as reader:
        large = writer.new_oid()
        store(writer, large, z64, b'x' * 2 * MB)
        load_current(reader, large)
        many = [writer.new_oid() for _ in range(200)]
        alone = Resources.of(server.process.pid)
        for peer in _ask_much(server, stuck, large, asked):  # what a thread keeps for its next need is kept once
            reset(peer)
        until(lambda: Resources.of(server.process.pid).files <= alone.files, 'the first ones are gone')
        with watched(server, account):
            account.before = alone._replace(memory=Resources.of(server.process.pid).memory)
            free = [seconds(_commit_many, writer, many) for _ in range(commits)]
            peers = _ask_much(server, stuck, large, asked)
            for _ in range(3):  # somebody else may have the machine for a moment
                beside = [seconds(_commit_many, writer, many) for _ in range(commits)]
                slower = statistics.median(beside) / statistics.median(free)
                if slower < 3:
                    break
            most = Resources.of(server.process.pid).memory
            # The replies that wait for each, and what a reply takes that is being made.
            account.expect(most < account.before.memory + stuck * 12 * MB + KEPT, f'{most} bytes')
            account.expect(slower < 3, f'commits take {slower:.1f} times as long')
            account.notes['clients that do not read'] = str(stuck)
            account.notes['commits beside them'] = (
                f'{statistics.median(free) * 1000:.1f} -> {statistics.median(beside) * 1000:.1f} ms')
            account.notes['memory meanwhile'] = f'{most / MB:.0f} MB'
            for peer in peers:
                reset(peer)
            reader.sync()
            account.expect(load_current(reader, many[0]) == load_current(writer, many[0]), 'what others see')
    return account


def _ask_much(server: Server, peers: int, oid: bytes, times: int) -> list[SocketPeer]:
    """Clients that ask for an object again and again and read nothing."""
    asking = [SocketPeer(server.address, reading=False) for _ in range(peers)]
    for peer in asking:
        for _ in range(times):
            peer.ask('loadBefore', oid, p64(2**63 - 1))
    return asking


#: A FileStorage in a server that gives up who is so many bytes behind: 64 MB are a lot of commits.
IMPATIENT = """(setattr(__import__('zeo.server.outbox').server.outbox.Outbox.__init__, '__defaults__', (10**6,)),
              FileStorage('Data.fs'))[1]"""


def lagging(effort: float) -> Account:
    """Clients hear of commits and read nothing, until they are cut off."""
    account, rounds = Account(), max(int(5 * effort), 1)
    with (Server(storages={'1': Storage(IMPATIENT)}, invalidation_queue_size=10) as server,
          client_of(server) as writer):
        many = [writer.new_oid() for _ in range(2000)]
        free = [seconds(_commit_many, writer, many) for _ in range(20)]
        with watched(server, account):
            beside: list[float] = []
            for _ in range(rounds):
                begin = len(server.log.lines)
                peer = SocketPeer(server.address, reading=False)
                peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                while not any('does not read what it is sent' in line for line in server.log.lines[begin:]):
                    beside.append(seconds(_commit_many, writer, many))
                    if len(beside) > 1000 * rounds:
                        break
                lines = [line for line in server.log.lines[begin:] if 'disconnected' in line]
                account.expect(len(lines) == 1, f'{len(lines)} lines tell that it is cut off')
                reset(peer)
            slower = statistics.median(beside) / statistics.median(free)
            account.expect(slower < 3, f'commits take {slower:.1f} times as long')
            account.notes['clients cut off'] = f'{rounds}, each after {len(beside) / rounds:.0f} commits'
            account.notes['commits beside them'] = (
                f'{statistics.median(free) * 1000:.1f} -> {statistics.median(beside) * 1000:.1f} ms')
    return account


def _commit_many(storage: Any, oids: list[bytes]) -> None:
    meta = _voted(storage, [(oid, b'y' * 100) for oid in oids])
    storage.tpc_finish(meta)


def _voted(storage: Any, changes: list[tuple[bytes, bytes]]) -> Any:
    meta = TransactionMetaData()
    storage.tpc_begin(meta)
    try:
        for oid, record in changes:
            storage.store(oid, _serial(storage, oid), record, '', meta)
        storage.tpc_vote(meta)
    except BaseException:
        storage.tpc_abort(meta)
        raise
    return meta


def _serial(storage: Any, oid: bytes) -> bytes:
    try:
        serial: bytes = load_current(storage, oid)[1]
        return serial
    except POSKeyError:
        return z64


#: A client that votes, says so, and ends when its input ends.
VOTER = """
import sys
from tests.system.clients import open_client, vote
client = open_client('zeo', {address!r})
client.tpc_finish(vote(client))
vote(client)
print('voted', flush=True)
sys.stdin.read()
"""


def stopped(effort: float) -> Account:
    """A client process is stopped (SIGSTOP) while it holds the commit lock; then it is killed."""
    account, waits = Account(), []
    with Server(transaction_timeout=0.5) as server, client_of(server) as other:
        store(other)
        with watched(server, account):
            for _ in range(max(int(20 * effort), 2)):
                with subprocess.Popen(
                        [sys.executable, '-c', VOTER.format(address=server.address)], cwd=ROOT, text=True,
                        stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
                    assert process.stdout is not None
                    assert process.stdout.readline() == 'voted\n'
                    process.send_signal(signal.SIGSTOP)
                    waits.append(seconds(store, other))
                    process.kill()
                account.expect(waits[-1] < 0.5 + AT_ONCE, f'the next commit took {waits[-1]:.1f} s')
            account.notes['the next commit after'] = f'{max(waits):.2f} s at most, of which 0.5 are the time-out'
    return account


#: How far a client gets with its commit before it vanishes.
PHASES = ('greeted', 'registered', 'begun', 'stored', 'half a record', 'voting', 'waiting', 'voted', 'finishing')


def vanishing(effort: float) -> Account:
    """Clients vanish in each phase of a commit: the next commit goes on at once, nothing is half done."""
    account, waits = Account(), []
    with Server(transaction_timeout=0) as server, client_of(server) as other, client_of(server) as holder:
        store(other)
        store(holder)
        with watched(server, account):
            for _ in range(max(int(50 * effort), 1)):
                for phase in PHASES:
                    one, two = other.new_oid(), other.new_oid()
                    peer = SocketPeer(server.address, register=phase != 'greeted')
                    meta = _voted(holder, [(holder.new_oid(), b'x')]) if phase == 'waiting' else None
                    _go_as_far_as(phase, peer, one, two)
                    reset(peer)
                    waits.append(seconds(holder.tpc_finish, meta) if meta else 0.0)
                    waits.append(seconds(store, other))
                    account.expect(max(waits[-2:]) < AT_ONCE, f'{phase}: {max(waits[-2:]):.1f} s for the next commit')
                    there = [_serial(other, oid) for oid in (one, two)]
                    account.expect(there[0] == there[1], f'{phase}: half of it is there')
                    account.expect(phase == 'finishing' or there[0] == z64, f'{phase}: it is there')
            account.notes['the next commit after'] = f'{max(waits):.2f} s at most'
    return account


def _go_as_far_as(phase: str, peer: SocketPeer, one: bytes, two: bytes) -> None:
    if phase in ('greeted', 'registered'):
        return
    if phase == 'begun':
        peer.begin(7)
        return
    peer.begin(7, (one, z64, b'x'), (two, z64, b'x'))
    match phase:
        case 'half a record':
            peer.sock.sendall(b'\0\1\0\0half')
        case 'voting' | 'waiting':
            peer.ask('vote', 7)
        case 'voted':
            peer.call('vote', 7)
        case 'finishing':
            peer.call('vote', 7)
            peer.ask('tpc_finish', 7)


# ---- servers that end ----------------------------------------------------------------------


class Writers:
    """Threads, each with a client of its own, that commit pairs of objects until they are told to stop."""

    def __init__(self, server: Server, count: int) -> None:
        self._over = threading.Event()
        self.acknowledged: dict[bytes, bytes] = {}  # what was written, by tid
        self.in_doubt = 0
        self.failed = 0
        self.problems: list[str] = []
        self._mutex = threading.Lock()  # guards the above
        self._tasks = [Task(self._write, server, number) for number in range(count)]

    def _write(self, server: Server, number: int) -> None:
        with client_of(server, max_disconnect_poll=.2) as client:
            turn = 0
            oids: list[bytes] = []
            while not self._over.is_set():
                turn += 1
                record = b'%d-%d' % (number, turn) + b'.' * (turn % 5000)
                try:
                    if not oids:
                        oids = [client.new_oid(), client.new_oid()]
                    tid = client.tpc_finish(_voted(client, [(oid, record) for oid in oids]))
                except OutcomeUnknown:
                    with self._mutex:
                        self.in_doubt += 1
                except ClientDisconnected:
                    with self._mutex:
                        self.failed += 1
                except Exception:
                    with self._mutex:
                        self.problems.append(traceback.format_exc())
                    return
                else:
                    with self._mutex:
                        self.acknowledged[tid] = record

    def stop(self) -> None:
        self._over.set()
        for task in self._tasks:
            task.result()


def _compare(path: str, writers: Writers, account: Account) -> None:
    """Each acknowledged transaction is in the file, and each transaction in the file is whole."""
    found = {}
    with contextlib.closing(FileStorage(path, read_only=True)) as file:
        for transaction in file.iterator():
            records = {record.data for record in transaction}
            if len(records) > 1:
                account.lost.append(f'{transaction.tid.hex()} is not whole')
            found[transaction.tid] = records.pop()
    for tid, record in writers.acknowledged.items():
        account.expect(found.get(tid) == record, f'{tid.hex()} was acknowledged and is not there')
    account.lost += writers.problems
    account.notes['acknowledged'] = str(len(writers.acknowledged))
    account.notes['failed and said so'] = str(writers.failed)
    if writers.in_doubt:
        account.notes['outcome unknown and said so'] = str(writers.in_doubt)


def killed(effort: float) -> Account:
    """The server is killed (SIGKILL) at random moments under several writers, and started again."""
    account, chance = Account(), random.Random(1)
    rounds = max(int(100 * effort), 3)
    with Server() as server:
        writers = Writers(server, 4)
        try:
            for _ in range(rounds):
                some = len(writers.acknowledged) + chance.randrange(1, 60)
                until(lambda: len(writers.acknowledged) >= some or writers.problems, 'clients are back and write')
                server.kill()
                server.start()
        finally:
            writers.stop()
        server.stop()
        _compare(os.path.join(server.folder, 'Data.fs'), writers, account)
        account.notes['deaths'] = str(rounds)
    return account


def told_to_end(effort: float) -> Account:
    """The server is told to end under load, ends in seconds, and is started again at once."""
    account, times = Account(), []
    with Server(both=True) as server:
        writers = Writers(server, 4)
        try:
            for _ in range(max(int(50 * effort), 2)):
                some = len(writers.acknowledged) + 50
                until(lambda: len(writers.acknowledged) >= some or writers.problems, 'clients are back and write')
                times.append(seconds(server.stop))  # fails unless the exit status is 0
                account.expect(times[-1] < 2 * AT_ONCE, f'{times[-1]:.1f} s to end')
                server.start()  # same port, same socket
        finally:
            writers.stop()
        server.stop()
        _compare(os.path.join(server.folder, 'Data.fs'), writers, account)
        account.notes['ends'] = f'{len(times)}, {max(times):.1f} s at most'
    return account


#: A module for -S: a storage of which a copy is made each time when it was told to be on the disk.
SYNCED = """
import os, shutil, sys
import ZODB.FileStorage
module = sys.modules['ZODB.FileStorage.FileStorage']
sync = module.fsync
def fsync(number):
    sync(number)
    shutil.copyfile('Data.fs', 'synced.new')
    os.rename('synced.new', 'synced')
module.fsync = fsync
storage = module.FileStorage('Data.fs')
"""


def power_cut(effort: float) -> Account:
    """What has reached the disk when a commit is answered contains that commit, whole."""
    account = Account()
    with tempfile.TemporaryDirectory(prefix='zeo-') as folder:
        with open(os.path.join(folder, 'synced_storage.py'), 'w') as file:
            file.write(SYNCED)
        server = Server(folder=folder, storages={'1': file_storage(wrapper='')._replace(
            python="__import__('synced_storage').storage", path=None)})
        with server, client_of(server) as client:
            oids = [client.new_oid(), client.new_oid()]
            for turn in range(max(int(200 * effort), 10)):
                tid = client.tpc_finish(_voted(client, [(oid, b'%d' % turn) for oid in oids]))
                account.expect(_survives(folder, tid, oids, b'%d' % turn), f'{tid.hex()} is not on disk')
    return account


def _survives(folder: str, tid: bytes, oids: list[bytes], record: bytes) -> bool:
    """Whether a commit is there in what had reached the disk."""
    path = os.path.join(folder, 'after the power cut')
    try:
        shutil.copyfile(os.path.join(folder, 'synced'), path)
    except FileNotFoundError:
        return False
    with contextlib.closing(FileStorage(path, read_only=True)) as file:
        return file.lastTransaction() == tid and all(load_current(file, oid) == (record, tid) for oid in oids)


# ---- what runs out -----------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(size: int) -> Iterator[str]:
    """A disk of so many bytes."""
    with tempfile.TemporaryDirectory(prefix='zeo-') as folder:
        subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size}', 'none', folder], check=True)
        try:
            yield folder
        finally:
            subprocess.run(['umount', '-l', folder], check=True)


def can_have_disks() -> bool:
    """Whether this process may mount anything."""
    try:
        with small_disk(MB):
            return True
    except (subprocess.CalledProcessError, FileNotFoundError):
        return False


def fill(folder: str) -> str:
    """Leave no room on a disk; returns the file to remove."""
    path = os.path.join(folder, 'ballast')
    with open(path, 'wb', buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(64 * 1024))
    return path


def full_disk(effort: float) -> Account:
    """The disk of the data is full while clients commit; earlier data is read, and later there is room."""
    account = Account()
    with small_disk(24 * MB) as folder, Server(folder=folder) as server, client_of(server) as client:
        oid, kept = client.new_oid(), {}
        for turn in range(max(int(30 * effort), 2)):
            kept[store(client, oid, _serial(client, oid), b'%d' % turn)] = b'%d' % turn
            ballast = fill(folder)
            _is_refused(account, client, oid, 100_000)
            with client_of(server) as other:
                account.expect(load_current(other, oid)[0] == b'%d' % turn, 'earlier data')
            os.unlink(ballast)
        store(client, oid, _serial(client, oid), b'at last')
        server.restart()
        for tid, record in kept.items():
            account.expect(client.loadSerial(oid, tid) == record, f'{tid.hex()} after a restart')
    return account


def _is_refused(account: Account, client: Any, oid: bytes, size: int) -> None:
    """A commit of that size fails, and says why."""
    try:
        store(client, oid, _serial(client, oid), b'x' * size)
    except Exception as error:
        account.expect('space' in str(error), f'a full disk is told as {error!r}')
    else:
        account.expect(False, 'a commit on a full disk')


def full_staging(effort: float) -> Account:
    """There is no room for what is staged of a large transaction; smaller ones go on."""
    account = Account()
    with small_disk(2 * MB) as folder:
        environment = os.environ.get('TMPDIR')
        os.environ['TMPDIR'] = folder
        try:
            server = Server().start()
        finally:
            os.environ.pop('TMPDIR')
            if environment is not None:
                os.environ['TMPDIR'] = environment
        with contextlib.closing(server), client_of(server) as client:
            oid = client.new_oid()
            store(client, oid)
            with watched(server, account):
                for _ in range(max(int(30 * effort), 2)):
                    _is_refused(account, client, oid, 8 * MB)
                    account.expect(store(client, oid, _serial(client, oid)) > z64, 'a small commit')
            account.expect(not os.listdir(folder), 'nothing is left in the temporary folder')
    return account


def full_log(effort: float) -> Account:
    """There is no room for the log; the server goes on, and logs again when there is."""
    account = Account()
    with small_disk(MB) as folder, tempfile.TemporaryDirectory(prefix='zeo-') as data:
        log, address = os.path.join(folder, 'log'), os.path.join(data, 'socket')
        with subprocess.Popen(
                [sys.executable, '-m', 'zeo.start', '-U', address, '--log', log, os.path.join(data, 'Data.fs')],
                cwd=ROOT, text=True, stderr=subprocess.PIPE) as process, client_of(address) as client:
            for _ in range(max(int(20 * effort), 2)):
                ballast = fill(folder)
                before = os.path.getsize(log)
                for _ in range(20):
                    client_of(address).__enter__().close()
                account.expect(store(client) > z64, 'a commit without a log')
                os.unlink(ballast)
                with client_of(address):
                    until(lambda: os.path.getsize(log) > before, 'it logs again', 20)
                account.expect(True, 'it logs again')
            process.send_signal(signal.SIGTERM)
            said = process.communicate(timeout=PATIENCE)[1]
            account.expect(process.returncode == 0, f'exit status {process.returncode}')
            account.expect('Traceback' not in said, said[-2000:])
            account.expect(said.count('\n') < 100, f'{said.count(chr(10))} lines on standard error')
    return account


def full_cache(effort: float) -> Account:
    """There is no room for a client's cache file; it goes on without."""
    account = Account()
    with Server() as server, client_of(server) as writer:
        records = {writer.new_oid(): random.randbytes(100_000) for _ in range(60)}
        for oid, record in records.items():
            store(writer, oid, z64, record)
        for turn in range(max(int(10 * effort), 1)):
            with small_disk(3 * MB) as folder, client_of(server, client='small', var=folder) as client:
                for oid, record in [*records.items()] * 2:
                    account.expect(load_current(client, oid)[0] == record, 'what is loaded')
                oid = random.choice(list(records))
                records[oid] = random.randbytes(100_000)
                store(client, oid, load_current(client, oid)[1], records[oid])
                client.close()
                with client_of(server, client='small', var=folder) as again:
                    for oid, record in records.items():
                        account.expect(load_current(again, oid)[0] == record, 'what is loaded afterwards')
    return account


def read_only_medium(effort: float) -> Account:
    """On a medium that cannot be written to, a server says so in one line, or serves for reading."""
    account = Account()
    with small_disk(8 * MB) as folder:
        with Server(folder=folder) as server, client_of(server) as client:
            oid = client.new_oid()
            store(client, oid, z64, b'kept')
        subprocess.run(['mount', '-o', 'remount,ro', folder], check=True)
        path = os.path.join(folder, 'Data.fs')
        refused = subprocess.run(
            [sys.executable, '-m', 'zeo.start', '-p', '0', path], cwd=ROOT, text=True, capture_output=True,
            timeout=PATIENCE)
        account.expect(refused.returncode == 1 and len(refused.stderr.splitlines()) == 1
                       and 'Traceback' not in refused.stderr, refused.stderr)
        with Server(storages={'1': file_storage(path)}, read_only=True) as server, \
                client_of(server, read_only=True) as client:
            account.expect(load_current(client, oid)[0] == b'kept', 'what is loaded')
    return account


def out_of_files(effort: float) -> Account:
    """The server may open no more files; who is connected goes on, and the log is not flooded."""
    account = Account()
    with Server() as server, client_of(server) as client:
        oid = client.new_oid()
        store(client, oid)
        pid = server.process.pid
        with watched(server, account):
            limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            lines = len(server.log.lines)
            most = len(os.listdir(f'/proc/{pid}/fd')) + 20
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (most, limits[1]))
            with contextlib.ExitStack() as strangers:
                for _ in range(max(int(140 * effort), 60)):  # more would wait for the operating system
                    stranger = socket.create_connection(server.address, PATIENCE)
                    strangers.callback(stranger.close)
                for _ in range(20):
                    account.expect(store(client, oid, _serial(client, oid)) > z64, 'a commit')
                    account.expect(client.server_status()['commits'] > 0, 'a call')
                account.notes['log lines'] = str(len(server.log.lines) - lines)
                account.expect(len(server.log.lines) - lines < 20, f'{len(server.log.lines) - lines} lines in the log')
            resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
            with client_of(server) as another:
                account.expect(load_current(another, oid)[0] == b'x', 'who comes later')
    return account


# ---- many ----------------------------------------------------------------------------------------


def many(effort: float) -> Account:
    """Hundreds of clients load and commit, all of them connected all the time."""
    account = Account()
    count, rounds = max(int(500 * min(effort * 4, 1)), 50), max(int(4 * effort), 1)
    with Server() as server, client_of(server) as client:
        oids = [client.new_oid() for _ in range(count)]
        _commit_many(client, oids)
        until(lambda: len(os.listdir(f'/proc/{server.process.pid}/fd')), 'it is there')
        with watched(server, account), contextlib.ExitStack() as ended:
            peers = []
            for _ in range(count):
                peers.append(SocketPeer(server.address))
                ended.callback(peers[-1].close)
            idle = Resources.of(server.process.pid)
            for number in range(rounds):
                tasks = [Task(_take_turns, peers[first::8], oids[first::8], b'%d' % number) for first in range(8)]
                for task in tasks:
                    for truth in task.result():
                        account.expect(truth, 'a client reads what it wrote')
            active = Resources.of(server.process.pid)
            for what, used in ('idle', idle), ('active', active):
                account.notes[f'memory for each {what} client'] = (
                    f'{(used.memory - account.before.memory) / count / 1024:.0f} kB')
            tids = {_serial(client, oid) for oid in oids}
            account.expect(len(tids) == count, 'each committed its own')
            heard = [peer.invalidations() for peer in peers]
            account.expect(all([tid for tid, _ in each] == sorted(tid for tid, _ in each) for each in heard),
                           'announcements in order')
            account.expect(all(len(each) == (count - 1) * rounds for each in heard), 'each heard of all others')
            account.notes['clients'] = str(count)
    return account


def _take_turns(peers: list[SocketPeer], oids: list[bytes], record: bytes) -> list[bool]:
    return [peer.load(oid)[1] <= (tid := peer.commit(oid, record)) and peer.load(oid)[:2] == (record, tid)
            for peer, oid in zip(peers, oids, strict=True)]


def coming_and_going(effort: float) -> Account:
    """Clients connect, load, and leave or vanish, thousands of times."""
    account = Account()
    with Server() as server, client_of(server) as client:
        oid = client.new_oid()
        tid = store(client, oid)
        _come_and_go(server, oid, tid, 40)
        with watched(server, account):
            for task in [Task(_come_and_go, server, oid, tid, max(int(1250 * effort), 50)) for _ in range(4)]:
                for truth in task.result():
                    account.expect(truth, 'what is loaded')
    return account


def _come_and_go(server: Server, oid: bytes, tid: bytes, times: int) -> list[bool]:
    truths = []
    for number in range(times):
        peer = SocketPeer(server.address, register=number % 5 != 0)
        if number % 5:
            truths.append(peer.load(oid) == (b'x', tid, None))
        if number % 2:
            peer.close()
        else:
            reset(peer)
    return truths


# ---- all of it -----------------------------------------------------------------------------------

NEED_A_DISK = {'full-disk': full_disk, 'full-staging': full_staging, 'full-log': full_log,
               'full-cache': full_cache, 'read-only-medium': read_only_medium}
SCENARIOS: dict[str, Callable[[float], Account]] = {
    'unread': unread, 'lagging': lagging, 'stopped': stopped, 'vanishing': vanishing, 'killed': killed,
    'told-to-end': told_to_end, 'power-cut': power_cut, 'out-of-files': out_of_files, 'many': many,
    'coming-and-going': coming_and_going, **NEED_A_DISK, **hostilities.SCENARIOS}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser('python -m tests.system.soak', description=__doc__.splitlines()[0])
    parser.add_argument('--minutes', type=float, default=10, help='so long in all, about (default: 10)')
    parser.add_argument('scenarios', nargs='*', metavar='SCENARIO',
                        help=f'some of {", ".join(SCENARIOS)} (default: all)')
    options = parser.parse_args(arguments)
    for name in options.scenarios:
        if name not in SCENARIOS:
            parser.error(f'no such scenario: {name}')
    names = options.scenarios or list(SCENARIOS)
    for possible, needing in (can_have_disks, NEED_A_DISK), (hostilities.can_have_a_network, hostilities.NEED_A_NETWORK):
        if set(names) & set(needing) and not possible():
            print('left out, since that needs root:', *[name for name in names if name in needing])
            names = [name for name in names if name not in needing]
    logging.getLogger('zeo').setLevel(logging.CRITICAL)  # that connections are lost is no news here
    lost = 0
    until_when = time.monotonic()
    for name in names:
        until_when += options.minutes * 60 / len(names)
        effort = 1.0
        while True:
            begin = time.monotonic()
            account = SCENARIOS[name](effort)
            lost += len(account.lost)
            print(f'{name}: {time.monotonic() - begin:.0f} s; {account}', *account.lost[:5], sep='\n    ', flush=True)
            if time.monotonic() + (time.monotonic() - begin) > until_when:
                break
    return 1 if lost else 0


if __name__ == '__main__':
    sys.exit(main())
