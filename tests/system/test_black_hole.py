"""A server whose machine vanishes from the network without a word: a network of the test's own."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.servers import PATIENCE, ROOT, Log
from zeo.client.dialing import DEAD_AFTER

pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which('ip') is None,
                       reason='only root can make networks, and with iproute2'),
]

CLIENT = """
import sys, threading, time
from zeo import ClientDisconnected
from zeo.ClientStorage import ClientStorage

storage = ClientStorage((sys.argv[1], 9999), wait_timeout=1)
print('connected', flush=True)
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


def ip(*words: str) -> None:
    subprocess.run(['ip', *words], check=True, capture_output=True, timeout=PATIENCE)


@pytest.fixture
def machines() -> Iterator[tuple[str, str]]:
    """Two network namespaces, 10.99.0.1 and 10.99.0.2, with a cable between them."""
    here, there = (f'zeo{os.getpid()}{side}' for side in 'ab')
    try:
        for name in here, there:
            ip('netns', 'add', name)
        ip('link', 'add', 'cable', 'netns', here, 'type', 'veth', 'peer', 'name', 'cable', 'netns', there)
        for name, address in (here, '10.99.0.1/24'), (there, '10.99.0.2/24'):
            ip('-n', name, 'addr', 'add', address, 'dev', 'cable')
            ip('-n', name, 'link', 'set', 'cable', 'up')
        yield here, there
    finally:
        for name in here, there:
            subprocess.run(['ip', 'netns', 'del', name], capture_output=True, timeout=PATIENCE)


@contextlib.contextmanager
def connected(machines: tuple[str, str], folder: Path, state: str) -> Iterator[tuple[Log, subprocess.Popen[str]]]:
    """The log of a server there, and a client of it here that waits for a line."""
    here, there = machines
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    server = subprocess.Popen(
        ['ip', 'netns', 'exec', there, sys.executable, '-m', 'zeo.start', '-h', '10.99.0.2', '-p', '9999',
         '-u', 'root', 'Data.fs'], cwd=folder, env=environment, text=True, stderr=subprocess.PIPE)
    log = Log(server.stderr)
    log.wait_for('ready on')
    client = subprocess.Popen(
        ['ip', 'netns', 'exec', here, sys.executable, '-c', CLIENT, '10.99.0.2', state], env=environment,
        text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert client.stdout is not None
    try:
        assert client.stdout.readline() == 'connected\n'
        yield log, client
    finally:
        client.kill()
        client.communicate(timeout=PATIENCE)
        server.kill()
        server.wait(PATIENCE)
        log.join()


@pytest.mark.parametrize('state', ['calling', 'idle'])
def test_a_server_that_vanished_is_found_out_in_the_stated_time(
        machines: tuple[str, str], tmp_path: Path, state: str) -> None:
    with connected(machines, tmp_path, state) as (_, client):
        assert client.stdin is not None and client.stdout is not None
        ip('-n', machines[1], 'addr', 'flush', 'dev', 'cable')  # nobody answers there any more
        print('', file=client.stdin, flush=True)
        said = client.stdout.readline()
        assert said.startswith('found out after ')
        assert float(said.split()[3]) < DEAD_AFTER + 10
