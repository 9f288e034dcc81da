"""A server, or clients, whose machine vanishes from the network without a word: a network of the test's own."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.accounts import KEPT, Resources
from tests.system.servers import PATIENCE, ROOT, Log, until
from zeo.client.dialing import DEAD_AFTER
from zeo.server.connection import SILENCE
from zeo.server.listener import VANISHED_AFTER

pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(400),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which('ip') is None,
                       reason='only root can make networks, and with iproute2'),
]

CLIENT = """
import sys, threading, time
from zeo import ClientDisconnected
from zeo.ClientStorage import ClientStorage

storage = ClientStorage((sys.argv[1], 9999), wait_timeout=1)
print('ready', flush=True)
sys.stdin.readline()  # the cable is pulled out
began = time.monotonic()
try:
    if sys.argv[2] == 'calling':
        storage._supervisor.link.channel.call('ping')
    else:
        while storage.is_connected():
            threading.Event().wait(.1)
        raise ClientDisconnected
except ClientDisconnected:
    print('found out after %.1f s' % (time.monotonic() - began), flush=True)
storage.close()
"""


ENVIRONMENT = dict(os.environ, PYTHONPATH=str(ROOT))


def ip(*words: str) -> None:
    subprocess.run(['ip', *words], check=True, capture_output=True, timeout=PATIENCE)


@contextlib.contextmanager
def network(clients: int) -> Iterator[list[str]]:
    """Network namespaces, the last one with a cable to each of the others.

    The first has the address 10.99.1.1, its cable ends at 10.99.1.2, and so on.
    """
    names = [f'zeo{os.getpid()}{side}' for side in 'abcdefgh'[:clients + 1]]
    there = names[-1]
    try:
        for name in names:
            ip('netns', 'add', name)
        for number, name in enumerate(names[:-1], 1):
            ip('link', 'add', 'cable', 'netns', name, 'type', 'veth', 'peer', 'name', f'cable{number}', 'netns', there)
            for side, address, end in (name, 1, 'cable'), (there, 2, f'cable{number}'):
                ip('-n', side, 'addr', 'add', f'10.99.{number}.{address}/24', 'dev', end)
                ip('-n', side, 'link', 'set', end, 'up')
        yield names
    finally:
        for name in names:
            subprocess.run(['ip', 'netns', 'del', name], capture_output=True, timeout=PATIENCE)


@pytest.fixture
def machines() -> Iterator[list[str]]:
    """Two machines with a cable between them."""
    with network(1) as machines:
        yield machines


@contextlib.contextmanager
def server(machine: str, folder: Path, *options: str) -> Iterator[tuple[Log, 'subprocess.Popen[str]']]:
    """A server there, and its log."""
    process = subprocess.Popen(
        ['ip', 'netns', 'exec', machine, sys.executable, '-m', 'zeo.start', '-h', '', '-p', '9999',
         '-u', 'root', *options, 'Data.fs'], cwd=folder, env=ENVIRONMENT, text=True, stderr=subprocess.PIPE)
    log = Log(process.stderr)
    try:
        log.wait_for('ready on')
        yield log, process
    finally:
        process.kill()
        process.wait(PATIENCE)
        log.join()


@contextlib.contextmanager
def client(machine: str, program: str, *arguments: str) -> Iterator['subprocess.Popen[str]']:
    """A process here that has said its first line, 'ready'."""
    process = subprocess.Popen(
        ['ip', 'netns', 'exec', machine, sys.executable, '-c', program, *arguments], env=ENVIRONMENT,
        text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == 'ready\n'
        yield process
    finally:
        process.kill()
        process.communicate(timeout=PATIENCE)


def goes_on(process: 'subprocess.Popen[str]') -> str:
    """Tell a client to go on; the next line that it says."""
    assert process.stdin is not None and process.stdout is not None
    print('', file=process.stdin, flush=True)
    return process.stdout.readline()


@pytest.mark.parametrize('state', ['calling', 'idle'])
def test_a_server_that_vanished_is_found_out_in_the_stated_time(
        machines: list[str], tmp_path: Path, state: str) -> None:
    here, there = machines
    with server(there, tmp_path), client(here, CLIENT, '10.99.1.2', state) as process:
        ip('-n', there, 'addr', 'flush', 'dev', 'cable1')  # nobody answers there any more
        said = goes_on(process)
        assert said.startswith('found out after ')
        assert float(said.split()[3]) < DEAD_AFTER + 10


#: A client of either make in some state; it says a line for each line it is told.
STATES = """
import sys
from ZODB.utils import maxtid, p64, z64
from tests.system.clients import open_client, store, vote

_, kind, host, state = sys.argv
storage = open_client(kind, (host, 9999), client_label=f'{kind}, {state}')
if state == 'reading':
    oids = [storage.new_oid() for _ in range(100)]
    for oid in oids:
        store(storage, oid, record=b'x' * 1_000_000)
    storage.close()
    storage = open_client(kind, (host, 9999), client_label=f'{kind}, {state}', cache_size=0)
if state == 'voted':
    vote(storage)
print('ready', flush=True)
if state == 'reading':
    while True:
        for oid in oids:
            storage.loadBefore(oid, maxtid)
for line in sys.stdin:
    if state == 'committing':
        store(storage)
    print(storage.is_connected(), flush=True)
"""


def test_clients_that_vanished_are_found_out_in_the_stated_time(tmp_path: Path) -> None:
    """Whatever they do: in vain they held the commit lock, and all of what they had is given back.

    The kernel finds out who does not acknowledge anything, and the silence those who only stopped.
    """
    with network(3) as (unplugged, nameless, connected, there), contextlib.ExitStack() as at_end:
        log, process = at_end.enter_context(server(there, tmp_path, '--transaction-timeout=0'))

        def come(machine: str, number: int, kind: str, state: str) -> 'subprocess.Popen[str]':
            return at_end.enter_context(client(machine, STATES, kind, f'10.99.{number}.2', state))

        committing = come(connected, 3, 'zeo', 'committing')
        staying = [come(connected, 3, kind, 'staying') for kind in ('zeo', 'ZEO')]
        assert goes_on(committing) == 'True\n'
        before = Resources.of(process.pid)
        names = ['10.99.1.1.*zeo, reading', '10.99.1.1.*zeo, idle', '10.99.1.1.*ZEO, idle',
                 '10.99.2.1.*zeo, reading', '10.99.2.1.*zeo, idle', '10.99.2.1.*ZEO, idle',
                 '10.99.1.1.*zeo, voted']
        for name in names:
            number = int(name[6])
            come([unplugged, nameless][number - 1], number, *name[name.index('*') + 1:].split(', '))
        stopped = come(connected, 3, 'zeo', 'stopped')

        began = time.monotonic()
        ip('-n', unplugged, 'link', 'set', 'cable', 'down')
        ip('-n', nameless, 'addr', 'flush', 'dev', 'cable')
        stopped.send_signal(signal.SIGSTOP)
        assert goes_on(committing) == 'True\n'  # and not before the one that has voted is found out
        assert time.monotonic() - began < VANISHED_AFTER + 20
        for name in names:
            log.wait_for(f'{name}.*: (lost: |disconnected: it does not read)', VANISHED_AFTER + 20)
        assert time.monotonic() - began < VANISHED_AFTER + 20
        log.wait_for(rf'10.99.3.1.*zeo, stopped\): disconnected: it has not said anything for {SILENCE:g} s', SILENCE)
        assert time.monotonic() - began < SILENCE + 20
        stopped.send_signal(signal.SIGCONT)
        until(lambda: str(log).count('is called zeo, stopped') == 2, 'it is connected again')
        stopped.kill()
        for each in staying:
            assert goes_on(each) == 'True\n'
        assert not [line for line in log.lines if 'staying' in line and ('lost' in line or 'disconn' in line)]
        until(lambda: (now := Resources.of(process.pid)).threads <= before.threads
              and now.files <= before.files, 'threads and files are given back')
        assert Resources.of(process.pid).memory < before.memory + KEPT
