"""zeo.start: real servers, from the command line to their orderly end."""

import contextlib
import os
import pstats
import pwd
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from ZODB.FileStorage import FileStorage
from ZODB.utils import p64
from ZODB.utils import z64

from tests.server.talk import SocketPeer
from tests.system.accounts import KEPT
from tests.system.accounts import MB
from tests.system.accounts import Resources
from tests.system.servers import PATIENCE
from tests.system.servers import ROOT
from tests.system.servers import Log
from tests.system.servers import until
from zeo import start
from zeo.server.storages import close_all

READY = (r'^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO zeo: '
         r'ready on (?P<addresses>.+?); storages: (?P<storages>.+)$')

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason='only root can become another user')
needs_nobody = pytest.mark.skipif(
    'nobody' not in {user.pw_name for user in pwd.getpwall()}, reason='there is no user nobody here')


class Run:
    """One run of ``python -m zeo.start``."""

    def __init__(self, arguments, folder, environment):
        environment = {**os.environ, 'PYTHONPATH': str(ROOT), **environment}
        self.process = subprocess.Popen(
            [sys.executable, '-m', 'zeo.start', *arguments], cwd=folder, env=environment, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        self.log = Log(self.process.stderr)

    @property
    def pid(self):
        return self.process.pid

    def ready(self):
        """Wait until it is; the addresses, as words, and the storages, as one text."""
        match = self.log.wait_for(READY)
        return match['addresses'].replace(' (this machine only)', '').split(', '), match['storages']

    def signal(self, number):
        self.process.send_signal(number)

    def status(self):
        """Wait for the end."""
        status = self.process.wait(PATIENCE)
        self.log.join()
        return status

    def end(self):
        self.signal(signal.SIGTERM)
        assert self.status() == 0, self.log
        assert 'Traceback' not in str(self.log)

    def refusal(self):
        """It ends by itself, with status 1 and one line."""
        assert self.status() == 1, self.log
        [line] = self.log.lines
        assert line.startswith('zeo.start: ')
        return line.removeprefix('zeo.start: ')


@pytest.fixture
def folder():
    """A folder with a short path that other users can reach, and its owner can write."""
    path = tempfile.mkdtemp(prefix='zeo-')
    os.chmod(path, 0o755)
    yield Path(path)
    shutil.rmtree(path)


@pytest.fixture
def run(folder):
    """Run a server in the folder, with ``-p 0`` unless the arguments say where to listen."""
    runs = []

    def run(*arguments, **environment):
        if not {'-p', '-U', '--port', '--unix'} & set(arguments):
            arguments = ('-p', '0', *arguments)
        runs.append(Run(arguments, folder, {'INSTANCE_HOME': '', **environment}))
        return runs[-1]

    yield run
    for one in runs:
        if one.process.poll() is None:
            one.process.kill()
        one.status()


def greeting(address):
    """What the server at this address, as it is written in the log, says first."""
    if address.startswith('/'):
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(PATIENCE)
        client.connect(address)
    else:
        host, port = address.rsplit(':', 1)
        client = socket.create_connection((host.strip('[]'), int(port)), timeout=PATIENCE)
    with client, client.makefile('rb') as stream:
        return stream.read(6)


HELLO = b'\0\0\0\2Z5'


def owner(path):
    return pwd.getpwuid(os.stat(path).st_uid).pw_name


def effective_user(pid):
    for line in Path(f'/proc/{pid}/status').read_text().splitlines():
        if line.startswith('Uid:'):
            return {pwd.getpwuid(int(number)).pw_name for number in line.split()[1:5]}


# Where it listens

def test_without_a_host_only_this_machine_can_reach_it_in_both_families(run):
    server = run('-p', '0')
    where, _ = server.ready()
    assert ' (this machine only);' in str(server.log)
    assert where[0].startswith('127.0.0.1:') and len(where) in (1, 2)
    assert len({address.rsplit(':', 1)[1] for address in where}) == 1
    for address in where:
        assert greeting(address) == HELLO
    server.end()


@pytest.mark.parametrize('host, first', [('', '0.0.0.0'), ('0.0.0.0', '0.0.0.0'), ('::', '0.0.0.0')])
def test_it_is_opened_to_others_on_request_only(run, host, first):
    server = run('-p', '0', '-h', host)
    where, _ = server.ready()
    assert where[0].startswith(f'{first}:')
    assert 'this machine only' not in str(server.log)
    assert greeting(where[0].replace('0.0.0.0', '127.0.0.1')) == HELLO
    server.end()


def test_a_port_and_a_socket_file_may_both_be_given(run, folder):
    server = run('-p', '0', '-U', 'sock')
    where, _ = server.ready()
    assert where[-1] == str(folder / 'sock') and stat.S_ISSOCK(os.stat(folder / 'sock').st_mode)
    assert {greeting(address) for address in where} == {HELLO}
    server.end()
    assert not (folder / 'sock').exists()


def test_a_port_in_use_is_named(run):
    with socket.socket() as other:
        other.bind(('127.0.0.1', 0))
        other.listen()
        port = other.getsockname()[1]
        assert run('-p', str(port)).refusal().startswith(f'port {port} is in use on 127.0.0.1; stop')


def test_it_can_be_started_again_at_once_on_the_same_port_and_socket(run):
    first = run('-p', '0', '-U', 'sock')
    [address, *_] = first.ready()[0]
    port = address.rsplit(':', 1)[1]
    with socket.create_connection(('127.0.0.1', int(port)), timeout=PATIENCE):
        first.end()
    second = run('-p', port, '-U', 'sock')
    assert second.ready()[0][0] == address
    second.end()


def test_the_socket_of_a_killed_server_is_taken_over(run, folder):
    first = run('-U', 'sock')
    first.ready()
    first.signal(signal.SIGKILL)
    first.status()
    assert (folder / 'sock').exists()
    second = run('-U', 'sock')
    assert greeting(second.ready()[0][0]) == HELLO
    second.end()


def test_the_socket_of_a_living_server_is_refused(run, folder):
    first = run('-U', 'sock', 'a.fs')
    [address] = first.ready()[0]
    assert run('-U', 'sock', 'b.fs').refusal() == (
        'another server is listening on sock; stop it, or choose another path')
    assert greeting(address) == HELLO
    first.end()


@pytest.mark.parametrize('path, says', [
    ('file', 'file is there and is not a socket; move it away, or choose another path'),
    ('x' * 120, 'is too long (120 bytes); choose one of at most 107 bytes'),
    ('no/sock', 'folder no: No such file or directory; create the folder, or choose another one'),
])
def test_a_socket_that_cannot_be_made_is_explained(run, folder, path, says):
    (folder / 'file').touch()
    assert says in run('-U', path).refusal()


# What it serves

@pytest.mark.parametrize('arguments, environment, expected', [
    ([], {}, 'Data.fs'),
    (['my.fs'], {}, 'my.fs'),
    ([], {'INSTANCE_HOME': 'instance'}, 'instance/var/Data.fs'),
    (['INSTANCE_HOME=instance'], {}, 'instance/var/Data.fs'),
])
def test_the_file_served(run, folder, arguments, environment, expected):
    (folder / 'instance' / 'var').mkdir(parents=True)
    server = run(*arguments, **environment)
    assert server.ready()[1] == f'1 (FileStorage {folder / expected})'
    assert (folder / expected).exists()
    server.end()


MODULE = '''
import os
from ZODB.FileStorage import FileStorage
from ZODB.MappingStorage import MappingStorage
main = FileStorage('main.fs')
def temporary():
    return MappingStorage(os.environ.get('TITLE', 'untitled'))
'''


def test_named_storages_come_from_modules_which_see_the_environment_variables(run, folder):
    (folder / 'conf').mkdir()
    (folder / 'conf' / 'served.py').write_text(MODULE)
    server = run('-S', 'main=conf/served:main', '-S', 't=conf/served.py:temporary',
                 '-S', 'm=ZODB.MappingStorage:MappingStorage', 'TITLE=short lived')
    assert server.ready()[1] == (
        'main (FileStorage main.fs), t (MappingStorage short lived), m (MappingStorage)')
    server.end()


def test_a_module_that_fails_is_named_in_one_line(run, folder):
    (folder / 'broken.py').write_text('raise ValueError("one\\ntwo")')
    assert run('-S', '1=broken:x').refusal() == (
        '-S 1=broken:x cannot be loaded: ValueError: one two (-D shows where)')


def test_the_debug_log_shows_where_a_module_fails(run, folder):
    (folder / 'broken.py').write_text('raise ValueError("one")')
    server = run('-S', '1=broken:x', '-D')
    assert server.status() == 1
    assert 'broken.py", line 1' in str(server.log)


@pytest.mark.parametrize('arguments, says', [
    (['no/Data.fs'], 'the folder {folder}/no does not exist; create it, or choose another file'),
    (['file/Data.fs'], '{folder}/file is not a folder; choose another file'),
    (['folder'], '{folder}/folder is a folder; give the name of a file'),
    (['--read-only'], '{folder}/Data.fs does not exist; start once without --read-only to create it'),
    (['file'], '{folder}/file is damaged, or is not a FileStorage ('),
    (['file', '--read-only'], '{folder}/file is damaged, or is not a FileStorage ('),
    (['--log', 'no/log'], 'cannot write the log file no/log: No such file or directory; make its'),
    (['-P', 'no/profile'], 'cannot write the profile no/profile: No such file or directory; choose'),
    (['-u', 'no-such-user'], "there is no user 'no-such-user'; give the name or the number of one"),
    (['-S', '1=no_such_module:x'], '-S 1=no_such_module:x cannot be loaded: ModuleNotFoundError'),
])
def test_what_cannot_be_had_is_one_line_that_says_what_to_do(run, folder, arguments, says):
    (folder / 'file').write_bytes(b'this is no FileStorage' * 10)
    (folder / 'folder').mkdir()
    assert run(*arguments).refusal().startswith(says.format(folder=folder))
    assert (folder / 'file').read_bytes() == b'this is no FileStorage' * 10


def test_a_file_that_another_server_has_is_refused(run, folder):
    first = run()
    first.ready()
    assert run().refusal() == (f'{folder}/Data.fs is in use by another process ({first.pid}); stop it,'
                               ' or choose another file')
    first.end()


def test_a_wrong_command_line_is_status_2(run):
    server = run('-p', 'x')
    assert server.status() == 2
    assert server.log.lines == ["zeo.start: argument -p/--port: 'x' is no port; give a number from 0"
                                ' to 65535 (--help shows all options)']


def test_without_arguments_it_shows_its_usage(folder):
    done = subprocess.run([sys.executable, '-m', 'zeo.start'], cwd=folder, capture_output=True, text=True,
                          env={**os.environ, 'PYTHONPATH': str(ROOT)}, timeout=PATIENCE)
    assert done.returncode == 2
    assert done.stderr.startswith('usage: python -m zeo.start [options]') and not done.stdout


# The configuration file

def test_a_configuration_file_says_where_what_and_how(run, folder):
    (folder / 'zeo.conf').write_text('''
<zeo>
    address 127.0.0.1:0
    address ./sock
    socket-mode 600
    pid-file zeo.pid
    msgpack true
</zeo>
<filestorage Main>
    path main.fs
</filestorage>
%import zeo
<mappingstorage 2/>
<eventlog>
    <logfile>
        path log
        format %(asctime)s %(levelname)s %(name)s: %(message)s
    </logfile>
</eventlog>
''')
    server = Run(['-C', 'zeo.conf'], folder, {'INSTANCE_HOME': ''})
    until_logged(folder / 'log', server, 'ready on')
    log = (folder / 'log').read_text()
    assert 'storages: main (FileStorage main.fs), 2 (MappingStorage Mapping Storage)' in log
    assert 'WARNING zeo: zeo.conf:7: msgpack in <zeo> has no meaning here' in log
    assert greeting(str(folder / 'sock')) == HELLO
    assert stat.S_IMODE(os.stat(folder / 'sock').st_mode) == 0o600
    assert (folder / 'zeo.pid').read_text() == f'{server.pid}\n'
    (folder / 'log').rename(folder / 'log.1')
    server.signal(signal.SIGUSR2)
    until_logged(folder / 'log', server, 'SIGUSR2: log reopened')
    server.end()
    assert not (folder / 'zeo.pid').exists() and not server.log.lines


def test_a_wrong_configuration_file_is_status_2(run, folder):
    (folder / 'zeo.conf').write_text('<zeo>\naddress nowhere\n</zeo>\n')
    server = run('-C', 'zeo.conf')
    assert server.status() == 2
    assert server.log.lines == ["zeo.start: zeo.conf:2: 'nowhere' is no address; give host:port, a port, or"
                                ' the path of a socket file with a slash in it']


def test_a_section_that_cannot_be_opened_is_named_with_file_and_line(run, folder):
    (folder / 'zeo.conf').write_text('<filestorage>\npath Data.fs\n</filestorage>\n')
    (folder / 'Data.fs').write_bytes(b'this is no FileStorage' * 10)
    assert run('-C', 'zeo.conf').refusal().startswith(
        f'zeo.conf:1: <filestorage 1>: {folder}/Data.fs is damaged, or is not a FileStorage (')


def test_a_storage_whose_last_transactions_cannot_be_read_is_one_line(run, folder):
    (folder / 'broken.py').write_text("""
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import StorageError

class Broken(MappingStorage):
    def lastInvalidations(self, size):
        raise StorageError('a bad block')
""")
    assert run('-S', '1=broken:Broken').refusal() == (
        'the last transactions of what is to be served cannot be read: StorageError: a bad block (-D shows where)')


@pytest.mark.parametrize('words, status, says', [
    ([], 0, 'the command line: nothing wrong was found'),
    (['-C', 'zeo.conf'], 0, 'zeo.conf: nothing wrong was found'),
    (['no/Data.fs'], 2, 'zeo.start: the folder {folder}/no does not exist; create it, or choose another file'),
    (['--read-only'], 2, 'zeo.start: {folder}/Data.fs does not exist; start once without --read-only to'),
    (['-S', '1=nosuch:x'], 2, 'zeo.start: -S 1=nosuch:x cannot be loaded: ModuleNotFoundError: No module'),
    (['-S', '1=./nosuch:x'], 2, 'zeo.start: -S 1=./nosuch:x: there is no file {folder}/nosuch.py; give'),
    (['-S', '1=fails:x'], 0, 'the command line: nothing wrong was found'),
])
def test_checking_opens_and_makes_nothing(folder, capfd, monkeypatch, words, status, says):
    (folder / 'fails.py').write_text('raise ValueError')
    (folder / 'zeo.conf').write_text('<filestorage>\npath Data.fs\n</filestorage>\n')
    monkeypatch.chdir(folder)
    monkeypatch.delenv('INSTANCE_HOME', raising=False)
    assert start.main(['--check', '-U', 'sock', '--pid-file=pid', '--log=log', *words]) == status
    out, err = capfd.readouterr()
    assert (out or err).startswith(says.format(folder=folder)) and (out + err).count('\n') == 1
    assert {path.name for path in folder.iterdir()} == {'fails.py', 'zeo.conf'}


def test_checking_finds_users_and_folders_that_are_not_there(folder, capfd, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.delenv('INSTANCE_HOME', raising=False)
    (folder / 'zeo.conf').write_text(
        '<zeo>\naddress ./no/sock\naddress 1\nuser no-such-user\npid-file no/pid\n<ssl>\ncertificate no\n</ssl>\n'
        '</zeo>\n<mappingstorage/>\n')
    assert start.main(['--check', '-C', 'zeo.conf', '--log=no/log']) == 2
    user, tls, address, pid, log = capfd.readouterr().err.splitlines()
    assert tls.startswith('zeo.start: zeo.conf:6: TLS: ')
    assert user.startswith("zeo.start: zeo.conf:4: there is no user 'no-such-user'; give the name or the number")
    problem = f'the folder {folder}/no does not exist; create it, or choose another one'
    assert address == f'zeo.start: zeo.conf:2: ./no/sock: {problem}'
    assert pid == f'zeo.start: zeo.conf:5: {folder}/no/pid: {problem}'
    assert log == f'zeo.start: no/log: {problem}'


def test_sockets_that_are_meant_for_another_process_are_not_waited_for(folder):
    server = Run(['Data.fs'], folder, {'LISTEN_FDS': '1', 'LISTEN_PID': '1', 'INSTANCE_HOME': ''})
    assert server.status() == 1
    assert server.log.lines[-1].startswith('zeo.start: no address to listen on: the service manager hands its')


def test_a_pid_file_of_another_process_is_left_alone(run, folder):
    server = run('--pid-file', 'pid')
    server.ready()
    assert (folder / 'pid').read_text() == f'{server.pid}\n'
    (folder / 'pid').write_text('1\n')
    server.end()
    assert (folder / 'pid').read_text() == '1\n'


def test_a_pid_file_is_written_through_no_link(folder):
    precious = folder / 'precious'
    precious.write_text('kept')
    for name in 'pid', f'pid.{os.getpid()}':
        os.symlink(precious, folder / name)
    start._write_number(str(folder / 'pid'))
    assert precious.read_text() == 'kept'
    assert (folder / 'pid').read_text() == f'{os.getpid()}\n' and not (folder / 'pid').is_symlink()
    start._write_number(str(folder / 'pid'))


def test_a_pid_file_that_cannot_be_written_is_named(run, folder):
    server = run('--pid-file', 'no/pid')
    assert server.status() == 1
    assert server.log.lines[-1].startswith('zeo.start: cannot write the number of the process to'
                                           f' {folder}/no/pid: No such file or directory; choose')


# The user

@needs_root
@needs_nobody
class TestRoot:

    def test_root_becomes_nobody_where_nobody_can_write(self, run, folder):
        folder.chmod(0o777)
        server = run('-U', 'sock')
        server.ready()
        assert 'going on as root' not in str(server.log)
        assert effective_user(server.pid) == {'nobody'}
        assert owner(folder / 'Data.fs') == owner(folder / 'sock') == 'nobody'
        server.end()
        assert not (folder / 'sock').exists()

    def test_root_goes_on_with_one_warning_where_nobody_cannot(self, run, folder):
        server = run()
        server.ready()
        [warning] = [line for line in server.log.lines if ' WARNING ' in line]
        assert f'going on as root, since user nobody cannot write the folder {folder}; to' in warning
        assert effective_user(server.pid) == {'root'}
        server.end()

    @pytest.mark.parametrize('suffix', ['', '.lock'])
    def test_files_of_root_keep_root(self, run, folder, suffix):
        FileStorage(str(folder / 'Data.fs')).close()
        (folder / 'Data.fs.index').unlink()
        os.chown(folder / 'Data.fs', 65534, 65534)
        os.chown(folder / 'Data.fs.tmp', 65534, 65534)
        os.chown(folder / f'Data.fs{suffix}', 0, 0)
        (folder / f'Data.fs{suffix}').chmod(0o644)
        folder.chmod(0o777)
        server = run()
        server.ready()
        assert f'nobody cannot write {folder}/Data.fs{suffix};' in str(server.log)
        server.end()

    def test_root_is_kept_for_modules_since_nobody_knows_what_they_open(self, run, folder):
        folder.chmod(0o777)
        server = run('-S', '1=ZODB.MappingStorage:MappingStorage')
        server.ready()
        assert 'may not be able to write what the modules of -S open; to give up' in str(server.log)
        server.end()

    def test_a_named_user_is_become(self, run, folder):
        folder.chmod(0o777)
        server = run('-u', 'nobody', '-P', 'profile', '--log', 'log')
        status = run('-u', str(pwd.getpwnam('nobody').pw_uid), 'other.fs')
        status.ready()
        assert effective_user(status.pid) == {'nobody'}
        status.end()
        log = folder / 'log'
        until(lambda: log.exists() and 'ready on' in log.read_text(), 'it is ready')
        server.signal(signal.SIGTERM)
        assert server.status() == 0
        assert {owner(folder / name) for name in ('Data.fs', 'log', 'profile')} == {'nobody'}

    def test_a_named_user_who_cannot_write_the_file_is_refused(self, run, folder):
        assert run('-u', 'nobody').refusal() == (
            f'user nobody cannot write the folder {folder}; change that (chown), or choose another user'
            ' with -u')
        assert not (folder / 'Data.fs').exists()

    def test_root_may_be_named_and_is_not_warned(self, run, folder):
        server = run('-u', 'root')
        server.ready()
        assert 'WARNING' not in str(server.log)
        server.end()

    def test_only_root_can_become_another(self, folder):
        folder.chmod(0o777)
        code = ('import locale, os, sys, zeo.start; os.setgid(65534); os.setuid(65534);'
                'sys.exit(zeo.start.main(sys.argv[1:]))')
        done = subprocess.run([sys.executable, '-c', code, '-p', '0', '-u', 'root'], cwd=folder,
                              capture_output=True, text=True, timeout=PATIENCE,
                              env={**os.environ, 'PYTHONPATH': str(ROOT)})
        assert (done.returncode, done.stderr) == (
            1, 'zeo.start: only root can become another user (root); start as that user, without -u\n')


# Its log

def test_the_log_may_go_to_a_file_that_is_reopened(run, folder):
    server = run('--log', 'log', '-U', 'sock')
    until_logged(folder / 'log', server, 'ready on')
    (folder / 'log').rename(folder / 'log.1')
    server.signal(signal.SIGHUP)
    until_logged(folder / 'log', server, 'SIGHUP: log reopened')
    server.end()
    assert not server.log.lines
    assert (folder / 'log').read_text().endswith('INFO zeo: closed\n')
    assert 'SIGHUP' not in (folder / 'log.1').read_text()


def until_logged(path, server, text):
    """Wait until the server has logged this."""
    until(lambda: server.process.poll() is not None
          or path.exists() and text in path.read_text(), f'{text!r} is in {path}')


def test_a_log_that_cannot_be_reopened_goes_on_in_the_old_file(run, folder):
    (folder / 'logs').mkdir()
    server = run('--log', 'logs/log')
    until_logged(folder / 'logs' / 'log', server, 'ready on')
    (folder / 'logs').rename(folder / 'old')
    server.signal(signal.SIGHUP)
    until_logged(folder / 'old' / 'log', server, 'SIGHUP: cannot reopen the log')
    server.end()


def test_without_a_file_there_is_nothing_to_reopen(run):
    server = run()
    server.ready()
    server.signal(signal.SIGHUP)
    server.log.wait_for('SIGHUP: the log goes to standard error')
    server.end()


def test_what_is_wrong_is_also_in_the_log_file(run, folder):
    (folder / 'file').touch()
    assert 'is not a socket' in run('-U', 'file', '--log', 'log').refusal()
    assert 'ERROR zeo: file is there and is not a socket' in (folder / 'log').read_text()


def test_details_are_logged_with_D(run):
    server = run('-D')
    server.ready()
    assert ' DEBUG ' in str(server.log)
    server.end()


# Its end

@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order(run, folder, number):
    server = run('-U', 'sock')
    server.ready()
    server.signal(number)
    assert server.status() == 0
    assert re.search(f'INFO zeo: {number.name}: closing\n.* INFO zeo: closed$', str(server.log))
    assert not (folder / 'sock').exists()


SLOW = '''
import sys
import threading
from ZODB.MappingStorage import MappingStorage

class Slow(MappingStorage):
    def close(self):
        print('closing slowly', file=sys.stderr, flush=True)
        with open('gate', 'rb'):    # waits for the test to open it
            super().close()

def opening():
    print('opening slowly', file=sys.stderr, flush=True)
    for _ in range(6000):
        threading.Event().wait(.01)
'''


def test_a_second_signal_while_closing_does_not_break_it(run, folder):
    os.mkfifo(folder / 'gate')
    (folder / 'slow.py').write_text(SLOW)
    server = run('-S', '1=slow:Slow')
    server.ready()
    server.signal(signal.SIGTERM)
    server.log.wait_for('closing slowly')
    for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        server.signal(number)
    with open(folder / 'gate', 'wb'):
        pass
    assert server.status() == 0
    assert server.log.lines[-1].endswith('INFO zeo: closed')


def test_a_second_signal_does_no_harm_while_python_itself_cleans_up(run, folder):
    (folder / 'last.py').write_text('''
import atexit, signal, sys
from ZODB.MappingStorage import MappingStorage
atexit.register(lambda: print('at exit', signal.getsignal(signal.SIGTERM), file=sys.stderr))
''')
    server = run('-S', '1=last:MappingStorage')
    server.ready()
    server.end()
    assert server.log.lines[-1] == f'at exit {signal.SIG_IGN}'


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_even_while_a_storage_is_being_opened(run, folder, number):
    (folder / 'slow.py').write_text(SLOW)
    server = run('-S', '1=slow:opening')
    server.log.wait_for('opening slowly')
    server.signal(number)
    assert server.status() == 0
    assert server.log.lines[-1].endswith('INFO zeo: ended before it was ready')


@pytest.mark.skipif(not os.path.exists('/proc/self/task'), reason='needs Linux to see a thread sleep')
def test_a_signal_is_noticed_though_the_sleeping_main_thread_is_not_interrupted():
    """It arrives in another thread, as it may arrive just before the main thread goes to sleep."""
    code = '''if True:
        import os, signal, threading
        from tests.system.servers import until
        from zeo.start import Signals

        def asleep():
            with open(f'/proc/self/task/{os.getpid()}/stat') as file:
                return file.read().rpartition(')')[2].split()[0] == 'S'

        def interrupt():
            go_on.wait(60)
            until(asleep, 'the main thread sleeps')
            signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        go_on = threading.Event()
        thread = threading.Thread(target=interrupt)
        signals = Signals()
        thread.start()
        go_on.set()
        print(signals.next().name)
        thread.join(60)
    '''
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True,
                          timeout=PATIENCE)
    assert done.stdout == 'SIGTERM\n', done.stderr


# Its profile

def test_all_threads_of_a_server_can_be_profiled(run, folder):
    server = run('-P', 'profile')
    [address, *_] = server.ready()[0]
    host, port = address.rsplit(':', 1)
    with socket.create_connection((host.strip('[]'), int(port)), timeout=PATIENCE) as client:
        client.sendall(b'\0\0\0\4ruok')  # who says something gets a thread
        while client.recv(4096):
            pass
    server.end()
    found = {(Path(file).name, name) for file, _, name in
             pstats.Stats(str(folder / 'profile')).stats}
    assert ('start.py', '_wait') in found           # the main thread
    assert ('listener.py', '_look') in found       # the listener
    assert ('StorageServer.py', 'serve') in found   # a client's thread


def test_a_profile_is_written_even_if_the_server_cannot_start(run, folder):
    (folder / 'file').touch()
    run('-U', 'file', '-P', 'profile').refusal()
    assert pstats.Stats(str(folder / 'profile')).total_calls > 0


# Words, without a process

def test_the_ready_line_has_one_form():
    from ZODB.MappingStorage import MappingStorage
    opened = {'1': MappingStorage('a'), 'b c': MappingStorage()}
    served = 'storages: 1 (MappingStorage a), b c (MappingStorage)'
    line = start.ready_line([('127.0.0.1', 1), ('::1', 1), '/run/sock'], opened)
    assert line == f'ready on 127.0.0.1:1, [::1]:1 (this machine only), /run/sock; {served}'
    line = start.ready_line([('127.0.0.1', 1), ('::', 2, 0, 0)], opened)
    assert line == f'ready on 127.0.0.1:1, [::]:2; {served}'
    assert start.ready_line(['sock'], {}) == f'ready on {os.getcwd()}/sock; storages: '
    close_all(opened)


def test_a_plain_start_does_not_wait_for_what_only_others_need():
    code = 'import sys, zeo.start; print(*{"ZConfig", "subprocess", "ssl"} & set(sys.modules))'
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == '\n'


def test_large_messages_do_not_cost_memory_for_ever(run):
    one = run()
    (address, *_), _ = one.ready()
    host, port = address.rsplit(':', 1)
    before = Resources.of(one.pid).memory
    with contextlib.ExitStack() as at_end:
        peers = [at_end.enter_context(SocketPeer((host, int(port)))) for _ in range(2)]
        for number, peer in enumerate(peers):
            peer.commit(p64(number + 1), b'x' * 14 * MB, z64)
            assert len(peer.load(p64(number + 1))[0]) == 14 * MB
        until(lambda: Resources.of(one.pid).memory < before + KEPT, 'memory is given back')
