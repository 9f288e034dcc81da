"""What the commands share: addresses, errors in one line, figures for people, progress."""

import argparse
import importlib
import io
import itertools
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.system.servers import ROOT
from tests.system.servers import Server
from zeo import commands
from zeo.commands import Failure
from zeo.commands import Progress
from zeo.errors import ServerException


@pytest.mark.parametrize('text, meant', [
    (':9999', ('localhost', 9999)), ('example.org:1', ('example.org', 1)), ('[::1]:9999', ('::1', 9999)),
    ('/run/zeo.sock', '/run/zeo.sock'), ('zeo.sock', 'zeo.sock'), ('./a:1', './a:1')])
def test_an_address_is_understood_in_all_its_forms(text: str, meant: Any) -> None:
    assert commands.address(text) == meant


@pytest.mark.parametrize('text', ['', '9999', ':0', ':65536', '::1:9999', '[a]:1', 'a\0b', ':x'])
def test_what_is_no_address_is_told_with_what_would_be_one(text: str) -> None:
    if text == ':x':
        assert commands.address(text) == ':x'   # a file may be called so
        return
    with pytest.raises(argparse.ArgumentTypeError, match='is no address; give host:port, :port'):
        commands.address(text)


def failing(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error
    return fail


@pytest.mark.parametrize('error, line', [
    (Failure('there is no\nserver'), 'test: there is no server\n'),
    (FileNotFoundError(2, 'No such file', 'x'), 'test: x: No such file\n'),
    (Failure(commands.in_words(ServerException('a.b.C', ('what the server says',)))),
     'test: what the server says\n'),
    (KeyboardInterrupt(), 'test: stopped\n'),
])
def test_what_goes_wrong_is_one_line_and_status_1(
        error: BaseException, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.run('test', failing(error)) == 1
    assert capsys.readouterr().err == line


def test_an_error_of_the_program_itself_is_not_hidden() -> None:
    with pytest.raises(AssertionError):
        commands.run('test', failing(AssertionError()))


@pytest.mark.parametrize('number, text', [
    (0, '0 B'), (999, '999 B'), (1000, '1.0 kB'), (12_345_678, '12.3 MB'), (5e15, '5000.0 TB'), (None, '?')])
def test_sizes_are_short(number: float | None, text: str) -> None:
    assert commands.size(number) == text


@pytest.mark.parametrize('seconds, text', [
    (-1, '0.0 s'), (1.25, '1.2 s'), (61, '1 min 1 s'), (7260, '2 h 1 min'), (90000, '1 d 1 h')])
def test_time_spans_are_short(seconds: float, text: str) -> None:
    assert commands.duration(seconds) == text


def test_progress_is_told_in_lines_when_there_is_no_terminal(
        capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Progress, 'PAUSE', 0.0)
    with Progress('packing', 200) as progress:
        progress.at(0)
        progress.at(50, 'copying')
    with Progress('copying', None, 'transactions') as progress:
        progress.at(7)
    begin, first, second = capsys.readouterr().err.splitlines()
    assert begin == 'packing: 0 %'
    assert first.startswith('packing: 25 %, about ') and first.endswith(' left (copying)')
    assert second == 'copying: 7'


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip('tqdm')
    terminal = Terminal()
    monkeypatch.setattr('sys.stderr', terminal)
    clock = itertools.count()
    monkeypatch.setattr('tqdm.std.time', lambda: float(next(clock)))  # it is not drawn more often than one can see
    with Progress('packing', 200) as progress:
        progress.at(100, 'copying')
    shown = terminal.getvalue()
    assert '\rpacking: ' in shown and re.search(r' 50 % \|.*\| .*B/s, [\d:]+ left, copying', shown), shown


def test_progress_is_told_in_lines_on_a_terminal_without_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr('sys.stderr', terminal)
    monkeypatch.setitem(__import__('sys').modules, 'tqdm', None)
    monkeypatch.setattr(Progress, 'PAUSE', 0.0)
    with Progress('packing', 200) as progress:
        progress.at(50)
    assert terminal.getvalue().startswith('packing: 25 %')


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_is_noted_and_ends_nothing(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with commands.interruption() as asked:
        assert not asked.is_set()
        os.kill(os.getpid(), number)
        assert asked.wait(10)
    assert signal.getsignal(number) is before


@pytest.mark.parametrize('name', ['backup', 'copy', 'pack', 'status'])
def test_every_option_is_in_the_readme_and_the_shared_ones_are_everywhere(name: str) -> None:
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    options = {option for action in importlib.import_module(f'zeo.{name}')._parser()._actions
               for option in action.option_strings}
    assert {'-p', '--port', '-h', '--host', '-U', '--unix', '-S', '--storage', '--help', '--version'} <= options
    for option in options - {'--port', '--host', '--unix', '--storage', '--help', '--version'}:
        assert re.search(rf'(`|\s|\$.*){option}\b', readme), option


@pytest.mark.parametrize('name, more', [('pack', ()), ('copy', ('copied.fs',)), ('backup', ('folder',)), ('status', ())])
def test_a_server_that_is_stopped_is_not_waited_for(
        start_server: Callable[..., Server], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path, name: str, more: tuple[str, ...]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands, 'PATIENCE', .2)
    server = start_server()
    assert server.process is not None
    server.process.send_signal(signal.SIGSTOP)
    try:
        assert importlib.import_module(f'zeo.{name}').main(['%s:%d' % server.address, *more]) == 1
    finally:
        server.process.send_signal(signal.SIGCONT)
    [line] = capsys.readouterr().err.splitlines()
    assert 'no answer within 0.2 seconds; perhaps it is stopped, or hangs' in line
