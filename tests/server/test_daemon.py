"""zeo.server.daemon: what is asked of zdaemon (tests/system/test_service_managers.py has real ones)."""

import os
import signal
import subprocess
import sys

import pytest

from zeo.server import daemon
from zeo.server.options import CannotStart
from zeo.server.options import parse


def asked(*words, configuration=''):
    words = ['-d', '-p', '1', '--log=zeo.log', *words]
    if configuration:
        with open('zeo.conf', 'w') as file:
            file.write(configuration + '<mappingstorage/>\n')
        words += ['-C', 'zeo.conf']
    return words, daemon.command(words, parse(words), '/run/ZEO.pid', '/run/ZEO.zdsock')


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return str(tmp_path)


def test_zdaemon_starts_the_same_command_line_in_the_foreground():
    before = os.umask(0o027)
    try:
        words, command = asked('my.fs')
    finally:
        assert os.umask(before) == 0o027
    end = command.index(sys.executable, 1)
    assert command[:end] == [
        sys.executable, '-m', 'zdaemon.zdrun', '-s', '/run/ZEO.zdsock', '-b', '10', '-x', '0,2', '-m', '027',
        '-t', '/dev/null']
    assert command[end:] == [sys.executable, '-m', 'zeo.start', *words, '-s', '--pid-file=/run/ZEO.pid']
    options = parse(command[end + 3:])
    assert not options.daemon and options.file == 'my.fs' and options.pid_file == '/run/ZEO.pid'


def test_the_section_runner_says_how_zdaemon_is_to_behave(folder):
    _, command = asked(configuration='''
<runner>
    backoff-limit 3
    exit-codes 0,2,7
    umask 077
    directory elsewhere
    transcript out
    forever true
</runner>
''')
    end = command.index(sys.executable, 1)
    assert command[5:end] == ['-b', '3', '-x', '0,2,7', '-m', '077', '-t', f'{folder}/out',
                              '-z', f'{folder}/elsewhere', '-f']
    assert command[-1] == f'--configuration={folder}/zeo.conf'


@pytest.mark.parametrize('pid_file', ['/no/such/folder/ZEO.pid', '/tmp/' + 'x' * 100 + '.pid'])
def test_a_place_where_zdaemon_cannot_make_its_socket_is_refused(pid_file):
    with pytest.raises(CannotStart, match='^the socket of zdaemon .*zdsock cannot be made: its folder must exist'):
        daemon.start([], parse(['-p', '1']), pid_file)


def test_without_zdaemon_it_is_said_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, 'zdaemon', None)
    with pytest.raises(CannotStart, match=r'^-d needs zdaemon, .*; install it \(pip install zdaemon\), or stay'):
        daemon.start([], parse(['-p', '1']), 'ZEO.pid')


@pytest.mark.parametrize('returncode', [0, 1])
def test_ctrl_c_while_zdaemon_starts_waits_until_it_can_be_stopped(folder, monkeypatch, returncode):
    said = []

    def run(command, **options):
        os.kill(os.getpid(), signal.SIGINT)
        return subprocess.CompletedProcess(command, returncode, stderr='KeyboardInterrupt')

    monkeypatch.setattr(subprocess, 'run', run)
    monkeypatch.setattr(daemon, '_say', lambda control, word: said.append(word))
    with pytest.raises(CannotStart, match='^ended before it was ready$'):
        daemon.start([], parse(['-p', '1']), f'{folder}/ZEO.pid')
    assert said == ['status', 'stop', 'status']
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
