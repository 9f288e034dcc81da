"""python -m zeo: what there is to run."""

import os
import subprocess
import sys

import pytest

from tests.system.servers import PATIENCE
from tests.system.servers import ROOT
from zeo import programs
from zeo.__main__ import main
from zeo.version import __version__


def test_all_programs_are_told_on_standard_error_and_the_command_line_was_wrong() -> None:
    ended = subprocess.run([sys.executable, '-m', 'zeo'], capture_output=True, text=True, timeout=PATIENCE,
                           env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert (ended.returncode, ended.stdout) == (2, '')
    told = [line.split()[2] for line in ended.stderr.splitlines() if line.startswith('  python -m zeo.')]
    assert sorted(told) == [f'zeo.{name}' for name in programs.NAMES]


def test_who_asks_for_help_gets_it_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['--help']) == 0
    out, err = capsys.readouterr()
    assert 'python -m zeo.start ' in out and err == ''
    assert main(['--version']) == 0
    assert capsys.readouterr().out == f'zeo {__version__}\n'


@pytest.mark.parametrize('arguments, said', [
    (['start', '-p', '9999'], 'zeo: run python -m zeo.start'), (['-p', '9999'], "zeo: there is no '-p' here"),
    (['stop'], "zeo: there is no 'stop' here")])
def test_what_was_meant_is_said_first(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert err.splitlines()[0] == said and 'python -m zeo.status ' in err and out == ''
