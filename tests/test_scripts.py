"""zeo.scripts: the programs as they are installed, and Ctrl-C while they are still being read."""

import configparser
import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.system.servers import PATIENCE
from tests.system.servers import ROOT
from zeo import scripts

PROGRAMS = ['backup', 'copy', 'pack', 'start', 'status']

# A module that everything needs, and that has not been read when Ctrl-C comes.
SLOW = '''
import os, signal
os.kill(os.getpid(), signal.SIGINT)
raise AssertionError('Ctrl-C has not ended the program')
'''


def test_every_program_is_installed() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / 'setup.cfg')
    installed = setup['options.entry_points']['console_scripts'].strip().split('\n')
    assert installed == [f'zeo-{name} = zeo.scripts:{name}' for name in PROGRAMS]


@pytest.mark.parametrize('name', PROGRAMS)
def test_a_script_is_the_program_of_its_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(f'zeo.{name}')
    monkeypatch.setattr(module, 'main', lambda: 7)
    monkeypatch.setattr(scripts, 'begin', lambda: None)
    assert getattr(scripts, name)() == 7


@pytest.mark.parametrize('how', [['-m', 'zeo.%s'], ['-c', 'from zeo.scripts import %s; %s()']],
                         ids=['module', 'script'])
@pytest.mark.parametrize('name', PROGRAMS)
def test_ctrl_c_while_a_program_is_read_ends_it_without_a_word(
        name: str, how: list[str], tmp_path: Path) -> None:
    (tmp_path / 'argparse.py').write_text(SLOW)
    words = [word.replace('%s', name) for word in how]
    ended = subprocess.run(
        [sys.executable, *words, '--help'], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE,
        env={**os.environ, 'PYTHONPATH': f'{tmp_path}{os.pathsep}{ROOT}'})
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, '', '')


def test_who_ignores_ctrl_c_goes_on_ignoring_it() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        scripts.begin()
        scripts.begun()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_when_a_program_has_begun_ctrl_c_is_pythons_again() -> None:
    before = signal.getsignal(signal.SIGINT)
    scripts.begin()
    scripts.begun()
    assert signal.getsignal(signal.SIGINT) is before is signal.default_int_handler
