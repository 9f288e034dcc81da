"""zeo.server.servicemanager: what is handed over, and what is told."""

import os
import socket
import subprocess
import sys

import pytest

from tests.system.servers import ROOT
from zeo.server import servicemanager

# Puts the sockets where they are to be, says so as a service manager does, and asks for them.
TAKE = '''
import os, sys
for number, descriptor in enumerate(map(int, sys.argv[2:])):
    os.dup2(descriptor, 3 + number)
os.environ |= {'LISTEN_PID': sys.argv[1] or str(os.getpid()), 'LISTEN_FDS': str(len(sys.argv) - 2),
               'LISTEN_FDNAMES': 'x'}
from zeo.server import servicemanager
try:
    for sock in servicemanager.sockets(os.environ):
        print(sock.getsockname(), os.get_inheritable(sock.fileno()))
        sock.close()
except servicemanager.CannotStart as error:
    print(error)
print([name for name in os.environ if name.startswith('LISTEN_')])
'''


def take(*sockets, process=''):
    """What a process prints that is handed these sockets; the highest numbers first, to dup2 in peace."""
    high = [os.dup(sock.fileno()) for sock in sockets]
    try:
        done = subprocess.run(
            [sys.executable, '-W', 'error', '-c', TAKE, process, *map(str, high)], cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, pass_fds=high, timeout=60)
    finally:
        for descriptor in high:
            os.close(descriptor)
    *lines, left = done.stdout.splitlines()
    assert left == '[]', done.stdout
    return lines


def test_sockets_that_listen_are_taken_over(tmp_path):
    with (socket.create_server(('127.0.0.1', 0)) as tcp, socket.socket(socket.AF_UNIX) as unix):
        path = str(tmp_path / 'sock')
        unix.bind(path)
        unix.listen()
        assert take(tcp, unix) == [f'{tcp.getsockname()} False', f'{path} False']


def test_what_is_meant_for_another_process_is_left_alone():
    with socket.create_server(('127.0.0.1', 0)) as tcp:
        assert take(tcp, process='1') == []


def test_without_a_service_manager_there_are_none():
    for environment in {}, {'LISTEN_PID': str(os.getpid())}, {'LISTEN_FDS': '1'}:
        assert servicemanager.sockets(environment) == []
        assert environment == {}


def test_what_does_not_listen_is_refused():
    with socket.socket() as silent, socket.socket(type=socket.SOCK_DGRAM) as datagrams:
        for sock in silent, datagrams:
            [line] = take(sock)
            assert line.startswith('file descriptor 3, which the service manager hands over, is no socket that')


def test_what_is_no_socket_is_refused(tmp_path):
    with open(tmp_path / 'file', 'w') as file:
        [line] = take(file)
        assert 'is no socket that listens' in line


@pytest.mark.parametrize('where', ['{folder}/notify', '@{folder}/notify'])
def test_it_is_told_in_one_datagram(monkeypatch, tmp_path, where):
    if where.startswith('@') and sys.platform != 'linux':
        pytest.skip('only Linux has an abstract namespace')
    where = where.format(folder=tmp_path)
    monkeypatch.setenv('NOTIFY_SOCKET', where)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear:
        ear.settimeout(10)
        ear.bind(where.replace('@', '\0'))
        servicemanager.tell('READY=1', 'STATUS=für alle')
        assert ear.recv(1000) == 'READY=1\nSTATUS=für alle'.encode()


@pytest.mark.parametrize('where', [None, '', 'vsock:2:1234', '/no/such/socket', '@no such socket'])
def test_nobody_need_be_there(monkeypatch, where):
    monkeypatch.delenv('NOTIFY_SOCKET', raising=False)
    if where is not None:
        monkeypatch.setenv('NOTIFY_SOCKET', where)
    servicemanager.tell('READY=1')
