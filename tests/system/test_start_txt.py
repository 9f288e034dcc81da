"""start.txt is true: its examples are executed, and no option is missing.

Each entry (a heading with what is below it) is executed in an empty folder of its own, from top to
bottom.  A command that starts a server ends the one before, unless that ended in ``&``.  What is shown
below a command has to appear in this order in what it prints, or in the log of the server that
it concerns; ``...`` stands for anything, also for whole lines.  Port 9999 stands for a free one.
"""

import doctest
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.system.servers import PATIENCE
from tests.system.servers import ROOT
from tests.system.servers import Log
from tests.system.servers import until
from zeo.server import values
from zeo.server.options import _parser

TEXT = (ROOT / 'start.txt').read_text(encoding='utf-8')


def entries():
    """Heading and text of each entry that has an example."""
    parts = re.split(r'^(.+)\n(?:=+|-+)\n', TEXT, flags=re.MULTILINE)
    return {heading: text for heading, text in zip(parts[1::2], parts[2::2])}


ENTRIES = entries()
EXAMPLES = {heading: text for heading, text in ENTRIES.items() if '    $ ' in text}


def steps(text):
    """The indented blocks, as ('file', name, content), ('python', code) and ('command', line, output)."""
    for block in re.findall(r'(?:^    .*\n|^\n(?=    ))+', text, flags=re.MULTILINE):
        lines = [line[4:] for line in block.strip('\n').split('\n')]
        while lines:
            first = lines.pop(0)
            if match := re.fullmatch(r'# (\w+\.(?:py|conf))', first):
                content = [first, *take(lines, lambda line: not line.startswith('$ '))]
                yield 'file', match[1], '\n'.join(content) + '\n'
            elif first.startswith('>>> '):
                code = [first, *take(lines, lambda line: not line.startswith('$ '))]
                yield 'python', '\n'.join(code) + '\n'
            elif first.startswith('$ '):
                shown = take(lines, lambda line: line and not line.startswith('$ '))
                yield 'command', first[2:], shown


def take(lines, wanted):
    taken = []
    while lines and wanted(lines[0]):
        taken.append(lines.pop(0))
    return taken


def like(shown):
    return '.*'.join(map(re.escape, shown.split('...')))


class Server:
    def __init__(self, command, folder, environment):
        self.command = command
        self.process = subprocess.Popen(
            ['sh', '-c', 'exec ' + command.removesuffix(' &')], cwd=folder, env=environment, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.log = Log(self.process.stdout)

    def shows(self, shown, since=0):
        """These lines are in the log, in this order, or will be."""
        for line in shown:
            if line == '...':
                continue
            until(lambda: self.process.poll() is not None
                  or any(re.fullmatch(like(line), logged) for logged in self.log.lines[since:]),
                  f'{line!r} in\n{self.log}')
            if self.process.poll() is not None:
                self.log.join()
            found = [number for number, logged in enumerate(self.log.lines[since:])
                     if re.fullmatch(like(line), logged)]
            assert found, f'{line!r} is not in\n{self.log}'
            since += found[0] + 1

    def can_be_reached(self):
        """At every address that it names."""
        [line] = [line for line in self.log.lines if 'ready on' in line]
        named = line.split('ready on ')[1].split('; storages: ')[0].replace(' (this machine only)', '')
        for address in named.split(', '):
            if address.startswith('/'):
                client = socket.socket(socket.AF_UNIX)
                client.connect(address)
            else:
                host, port = address.rsplit(':', 1)
                client = socket.create_connection((host.strip('[]'), int(port)), timeout=PATIENCE)
                if any('clients need no certificate' in line for line in self.log.lines):
                    client = ssl._create_unverified_context().wrap_socket(client)
                elif any('clients need a certificate' in line for line in self.log.lines):
                    client.close()
                    continue
            with client, client.makefile('rb') as stream:
                assert stream.read(6) == b'\0\0\0\2Z5'

    def end(self):
        self.process.send_signal(signal.SIGTERM)
        self.ended()

    def ended(self):
        assert self.process.wait(PATIENCE) == 0, self.log
        self.log.join()

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(PATIENCE)
        self.log.join()


class World:
    """A folder, and the servers that run in it."""

    def __init__(self, folder):
        self.folder = folder
        self.servers = []
        # `python` is the one that runs the tests, and finds this zeo.
        self.environment = {
            **os.environ, 'PYTHONPATH': str(ROOT),
            'PATH': os.path.dirname(sys.executable) + os.pathsep + os.environ['PATH']}
        self.environment.pop('INSTANCE_HOME', None)

    def command(self, command, shown):
        if command.startswith('python -m zeo.start'):
            if self.servers and not self.servers[-1].command.endswith('&'):
                self.servers.pop().end()
            server = Server(command, self.folder, self.environment)
            self.servers.append(server)
            server.shows(shown)
            if any('ready on' in line for line in shown):
                server.can_be_reached()
            elif shown:  # it ended by itself
                server.process.wait(PATIENCE)
                self.servers.pop()
                assert (server.process.returncode == 0) == ('zeo.start:' not in shown[0])
        elif command.startswith('kill '):
            server = self.servers[-1]
            since = len(server.log.lines)
            self.run(command)
            server.shows(shown, since)
            if '-HUP' not in command:
                self.servers.pop().ended()
        elif command.startswith('cat ') and shown:  # what another process is about to write
            until(lambda: all(re.search(like(line), self.run(command, check=False)) for line in shown),
                  f'{command!r} shows {shown}')
        else:
            output = self.run(command)
            assert re.search('(?s)' + like('\n'.join(shown)), output), output

    def run(self, command, check=True):
        done = subprocess.run(['sh', '-c', command], cwd=self.folder, env=self.environment, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=PATIENCE)
        assert not check or done.returncode == 0, done.stdout
        return done.stdout


@pytest.fixture
def world(monkeypatch):
    folder = tempfile.mkdtemp(prefix='zeo-')
    monkeypatch.chdir(folder)
    world = World(Path(folder))
    yield world
    for server in world.servers:
        server.kill()
    shutil.rmtree(folder)


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize('heading', EXAMPLES)
def test_the_examples_do_what_they_show(heading, world):
    if heading.startswith('-u '):
        if os.geteuid() != 0:
            pytest.skip('only root can become another user')
        world.folder.chmod(0o777)
    text = EXAMPLES[heading].replace('9999', str(free_port()))
    for kind, *step in steps(text):
        if kind == 'file':
            name, content = step
            (world.folder / name).write_text(content)
        elif kind == 'python':
            example = doctest.DocTestParser().get_doctest(step[0], {}, heading, 'start.txt', 0)
            result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example)
            assert result.attempted and not result.failed
        else:
            world.command(*step)
    while world.servers:
        world.servers.pop().end()


def options():
    return [action for action in _parser()._actions if action.option_strings]


@pytest.mark.parametrize('option', options(), ids=lambda option: option.option_strings[-1])
def test_every_option_is_explained_with_its_default_and_an_example(option):
    value = option.metavar
    forms = [name + ((('=' if name.startswith('--') else ' ') + value) if value else '')
             for name in option.option_strings]
    text = ENTRIES[', '.join(forms)]
    if option.dest not in ('help', 'version'):
        assert re.search('^Default: ', text, flags=re.MULTILINE)
        if option.default not in (None, False, []):
            default = 'on' if option.default is True else format(
                option.default, 'o' if option.type is values.mode else 'g')
            assert re.search(f'^Default: {re.escape(default)}(,|$)', text, flags=re.MULTILINE)
    commands = [command for kind, command, *_ in steps(text) if kind == 'command']
    assert any(re.search(rf'\s{re.escape(name)}(\s|=|$)', command)
               for name in option.option_strings for command in commands)


def test_every_option_that_is_explained_exists():
    known = {', '.join(option.option_strings) for option in options()}
    explained = {re.sub(r'[= ]\[?[A-Z][]A-Z=:]*', '', heading) for heading in ENTRIES if heading[0] == '-'}
    assert explained == known
