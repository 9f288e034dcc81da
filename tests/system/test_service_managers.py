"""Under zdaemon, systemd, supervisord, logrotate and in a container: as far as each is to be had here.

The examples are those of start.txt, with a folder of the test in place of /srv/zeo.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.system.servers import PATIENCE, ROOT, Log, until
from zeo.client.probe import probe

TEXT = (ROOT / 'start.txt').read_text(encoding='utf-8')
START = [sys.executable, '-m', 'zeo.start']
ENVIRONMENT = {**{name: value for name, value in os.environ.items() if name != 'INSTANCE_HOME'},
               'PYTHONPATH': str(ROOT)}


def example(name):
    """The indented block of start.txt that begins with this file's name in a comment."""
    found = re.search(rf'^    # {re.escape(name)}\n((?:    .*\n|\n(?=    ))+)', TEXT, flags=re.MULTILINE)
    return re.sub('^    ', '', found[1], flags=re.MULTILINE)


def needs(program):
    return pytest.mark.skipif(shutil.which(program) is None, reason=f'there is no {program} here')


@pytest.fixture
def folder():
    """With a short path, for sockets; and nobody in it when the test is over."""
    path = Path(tempfile.mkdtemp(prefix='zeo-'))
    (path / 'zeo.conf').write_text(
        f'<zeo>\naddress {path}/sock\npid-file {path}/ZEO.pid\n</zeo>\n'
        f'<filestorage>\npath {path}/Data.fs\n</filestorage>\n'
        f'<eventlog>\n<logfile>\npath {path}/zeo.log\nformat %(levelname)s %(message)s\n</logfile>\n</eventlog>\n')
    yield path
    with contextlib.suppress(OSError, ValueError):
        os.kill(int((path / 'ZEO.pid').read_text()), signal.SIGKILL)
    shutil.rmtree(path)


@pytest.fixture
def run(folder):
    """Run a program in the folder; it is killed at the end if it is still there."""
    with contextlib.ExitStack() as at_end:
        def run(*command, **environment):
            process = subprocess.Popen(
                command, cwd=folder, env=ENVIRONMENT | environment, text=True, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            process.log = Log(process.stdout)
            at_end.callback(process.log.join)
            at_end.callback(process.wait, PATIENCE)
            at_end.callback(process.kill)
            return process
        yield run


def served(folder):
    return list(probe(str(folder / 'sock'), PATIENCE)) == ['1']


def number(folder):
    """The server's process, when it is ready."""
    until(lambda: (folder / 'ZEO.pid').exists(), 'there is a pid file')
    return int((folder / 'ZEO.pid').read_text())


def gone(process):
    """Whether there is no such process, or it is a zombie that its parent has not noticed yet."""
    try:
        return Path(f'/proc/{process}/stat').read_text().rpartition(')')[2].split()[0] == 'Z'
    except OSError:
        return True


# ---- zdaemon

def background(folder, *words):
    return subprocess.run([*START, '-d', *words], cwd=folder, env=ENVIRONMENT, text=True, capture_output=True,
                          timeout=PATIENCE)


def test_a_server_in_the_background_is_restarted_when_it_crashes_and_stopped_for_good(folder):
    started = background(folder, '-C', 'zeo.conf')
    assert (started.returncode, started.stderr) == (0, '')
    first = number(folder)
    assert started.stdout == (f'ready on {folder}/sock; storages: 1 (FileStorage {folder}/Data.fs)'
                              f' (process {first})\n')
    assert served(folder) and (folder / 'ZEO.zdsock').exists()
    os.kill(first, signal.SIGKILL)
    until(lambda: number(folder) != first, 'another server is ready')
    assert served(folder)
    second = number(folder)
    os.kill(second, signal.SIGTERM)
    until(lambda: gone(second) and not (folder / 'ZEO.zdsock').exists(), 'server and zdaemon have ended')
    assert not (folder / 'ZEO.pid').exists() and not (folder / 'sock').exists()
    assert (folder / 'zeo.log').read_text().endswith('INFO SIGTERM: closing\nINFO closed\n')


def test_what_keeps_it_from_starting_in_the_background_is_told_and_nothing_stays(folder):
    (folder / 'file').write_bytes(b'this is no FileStorage' * 10)
    done = background(folder, '-U', 'sock', '--log=zeo.log', 'file')
    assert (done.returncode, done.stdout) == (1, '')
    [line] = done.stderr.splitlines()
    assert line.startswith(f'zeo.start: {folder}/file is damaged, or is not a FileStorage (')
    assert not (folder / 'ZEO.zdsock').exists() and not (folder / 'ZEO.pid').exists()


def test_a_second_server_in_the_background_is_refused_and_the_first_goes_on(folder):
    assert background(folder, '-C', 'zeo.conf').returncode == 0
    second = background(folder, '-U', 'other', '--log=other.log', 'other.fs')
    assert (second.returncode, second.stderr) == (
        1, f'zeo.start: there is a server in the background already, with {folder}/ZEO.zdsock; stop it first,'
           ' or choose another --pid-file for this one\n')
    assert served(folder)
    server = number(folder)
    os.kill(server, signal.SIGTERM)
    until(lambda: gone(server) and not (folder / 'ZEO.zdsock').exists(), 'server and zdaemon have ended')


def test_in_the_background_the_log_needs_a_file(folder):
    done = background(folder, '-U', 'sock')
    assert (done.returncode, done.stderr) == (
        2, 'zeo.start: -d leaves the terminal; say with --log which file the log goes to'
           ' (--help shows all options)\n')


@pytest.mark.parametrize('words', [['-s'], ['-D']])
def test_the_background_is_taken_back(run, folder, words):
    server = run(*START, '-d', *words, '-U', 'sock')
    server.log.wait_for('ready on')
    server.send_signal(signal.SIGTERM)
    assert server.wait(PATIENCE) == 0


# ---- systemd

def test_a_service_manager_is_told_when_it_is_ready_and_when_it_ends(run, folder):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear:
        ear.settimeout(PATIENCE)
        ear.bind(str(folder / 'notify'))
        server = run(*START, '-C', 'zeo.conf', NOTIFY_SOCKET=str(folder / 'notify'))
        assert ear.recv(10000).decode().split('\n') == [
            'READY=1', f'STATUS=ready on {folder}/sock; storages: 1 (FileStorage {folder}/Data.fs)',
            f'MAINPID={server.pid}']
        assert served(folder)
        server.send_signal(signal.SIGTERM)
        assert ear.recv(10000) == b'STOPPING=1\nSTATUS=closing'
        assert server.wait(PATIENCE) == 0


def test_a_service_manager_is_told_why_it_cannot_start(run, folder):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear:
        ear.settimeout(PATIENCE)
        ear.bind(str(folder / 'notify'))
        server = run(*START, '-U', 'sock', 'no/Data.fs', NOTIFY_SOCKET=str(folder / 'notify'))
        assert ear.recv(10000).decode().startswith(f'STOPPING=1\nSTATUS=the folder {folder}/no does not exist')
        assert server.wait(PATIENCE) == 1


HAND_OVER = '''
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ |= {'LISTEN_PID': str(os.getpid()), 'LISTEN_FDS': '1'}
os.execv(sys.executable, [sys.executable, '-m', 'zeo.start', *sys.argv[2:]])
'''


def test_a_socket_that_is_handed_over_is_served_and_its_file_is_left_alone(run, folder):
    with socket.socket(socket.AF_UNIX) as listening:
        path = folder / 'handed'
        listening.bind(str(path))
        listening.listen()
        handed = listening.fileno()
        process = subprocess.Popen([sys.executable, '-c', HAND_OVER, str(handed), 'Data.fs'], cwd=folder,
                                   env=ENVIRONMENT, text=True, stderr=subprocess.PIPE, pass_fds=[handed])
    log = Log(process.stderr)
    try:
        assert list(probe(str(path), PATIENCE)) == ['1']      # it waits until the server is ready
        assert log.wait_for(r'ready on (\S+);')[1] == str(path)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait(PATIENCE)
        log.join()
    assert path.exists()


@needs('systemd-socket-activate')
def test_systemd_hands_its_sockets_over(run, folder):
    activator = run('systemd-socket-activate', '-l', str(folder / 'handed'), f'--setenv=PYTHONPATH={ROOT}',
                    *START, 'Data.fs')
    activator.log.wait_for('Listening on')
    assert list(probe(str(folder / 'handed'), PATIENCE)) == ['1']
    activator.log.wait_for(f'ready on {folder}/handed;')
    activator.send_signal(signal.SIGTERM)       # it has become the server
    assert activator.wait(PATIENCE) == 0


@needs('systemd-analyze')
def test_systemd_finds_nothing_wrong_with_the_examples(folder):
    for name in 'zeo.service', 'zeo.socket':
        text = example(name).replace('/srv/zeo/bin/zeo-start', f'{sys.executable} -m zeo.start')
        (folder / name).write_text(text.replace('/srv/zeo', str(folder)))
    done = subprocess.run(['systemd-analyze', 'verify', './zeo.service', './zeo.socket'], cwd=folder, text=True,
                          env={**os.environ, 'SYSTEMD_LOG_LEVEL': 'info'}, capture_output=True, timeout=PATIENCE)
    if 'Failed to' in done.stderr and not re.search(r'zeo\.(service|socket)', done.stderr):
        pytest.skip('systemd-analyze does not work here')
    assert done.returncode == 0 and not re.search(r'zeo\.(service|socket)', done.stderr), done.stderr


# ---- supervisord

def test_supervisord_starts_restarts_and_stops_it(run, folder):
    pytest.importorskip('supervisor')
    program = example('zeo.ini').replace('/srv/zeo/bin/zeo-start', f'{sys.executable} -m zeo.start')
    program = program.replace('/srv/zeo', str(folder)).replace('user=zope\n', '')
    (folder / 'zeo.ini').write_text(
        f'[supervisord]\nnodaemon=true\nlogfile=/dev/null\nlogfile_maxbytes=0\npidfile={folder}/pid\n{program}')
    manager = run(sys.executable, '-W', 'ignore', '-c', 'import supervisor.supervisord as s; s.main()', '-c',
                  'zeo.ini')
    first = number(folder)
    assert served(folder)
    os.kill(first, signal.SIGKILL)
    manager.log.wait_for('exited: zeo .*not expected')
    until(lambda: number(folder) != first, 'another server is ready')
    assert served(folder)
    manager.send_signal(signal.SIGTERM)
    manager.log.wait_for(r'stopped: zeo \(exit status 0\)')
    manager.wait(PATIENCE)
    assert not (folder / 'ZEO.pid').exists()


# ---- containers

@needs('unshare')
@pytest.mark.skipif(os.geteuid() != 0, reason='only root can be the first process')
def test_it_may_be_the_first_process_of_a_container(run, folder):
    """As such it has no default actions for signals, and no parent that looks after it."""
    command = re.search(r'sh -c "(.+?)"', ' '.join(example('compose.yaml').split()))[1]
    for theirs, ours in [('cp -r /src /tmp/zeo && pip install --quiet /tmp/zeo', 'true'), ('exec python', f'exec {sys.executable}'),
                         ("-h '' -p 9999", '-U /data/sock --pid-file=/data/ZEO.pid'), ('/data', str(folder))]:
        assert theirs in command
        command = command.replace(theirs, ours)
    folder.chmod(0o755)
    first = run('unshare', '--fork', '--pid', '--kill-child', 'sh', '-c', command)
    until(lambda: first.poll() is not None or (folder / 'ZEO.pid').exists(), 'it is ready, or cannot be')
    if 'unshare failed' in str(first.log):
        pytest.skip('there can be no containers here')
    assert first.poll() is None, str(first.log)
    assert (folder / 'ZEO.pid').read_text() == '1\n'
    (folder / 'ZEO.pid').unlink()       # 1 is another process out here
    assert served(folder)
    check = re.search('test: python -c "(.+)"', example('compose.yaml'))[1]
    assert "('localhost', 9999)" in check
    check = check.replace("('localhost', 9999)", repr(str(folder / 'sock')))
    assert subprocess.run([sys.executable, '-c', check], env=ENVIRONMENT, timeout=PATIENCE).returncode == 0
    [server] = Path(f'/proc/{first.pid}/task/{first.pid}/children').read_text().split()
    os.kill(int(server), signal.SIGTERM)
    assert first.wait(PATIENCE) == 0
    assert subprocess.run([sys.executable, '-c', check], env=ENVIRONMENT, timeout=PATIENCE,
                          stderr=subprocess.DEVNULL).returncode == 1


# ---- logrotate

@pytest.mark.parametrize('by', ['hand', pytest.param('logrotate', marks=needs('logrotate'))])
def test_the_log_is_rotated(run, folder, by):
    text = example('zeo.logrotate').replace('/srv/zeo', str(folder))
    server = run(*START, '-C', 'zeo.conf')
    assert number(folder) == server.pid
    if by == 'logrotate':
        folder.chmod(0o700)
        (folder / 'zeo.logrotate').write_text(text)
        (folder / 'zeo.logrotate').chmod(0o600)
        subprocess.run(['logrotate', '--force', '--state', 'state', 'zeo.logrotate'], cwd=folder, check=True,
                       timeout=PATIENCE)
    else:
        (folder / 'zeo.log').rename(folder / 'zeo.log.1')
        script = re.search(r'postrotate\n(.+)\n *endscript', text)[1]
        subprocess.run(['sh', '-c', script], check=True, timeout=PATIENCE)
    until(lambda: (folder / 'zeo.log').exists() and (folder / 'zeo.log').read_text(), 'there is a new log')
    server.send_signal(signal.SIGTERM)
    assert server.wait(PATIENCE) == 0
    assert 'ready on' in (folder / 'zeo.log.1').read_text()
    assert (folder / 'zeo.log').read_text() == (
        'INFO SIGHUP: log reopened\nINFO SIGTERM: closing\nINFO closed\n')
