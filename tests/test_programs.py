"""zeo.programs: Ctrl-C while a program is still being read."""

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
from zeo import programs

# A module that all of them need; Ctrl-C comes before it has been read.
SLOW = '''
import os, signal
os.kill(os.getpid(), signal.SIGINT)
raise AssertionError('Ctrl-C has not ended the program')
'''


def test_every_program_is_also_installed_as_a_script() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / 'setup.cfg')
    scripts = setup['options.entry_points']['console_scripts'].strip().split('\n')
    assert scripts == [f'zeo-{name} = zeo.{name}:main' for name in programs.NAMES]
    for name in programs.NAMES:
        assert callable(importlib.import_module(f'zeo.{name}').main)


@pytest.mark.parametrize('script', [False, True], ids=['module', 'script'])
@pytest.mark.parametrize('name', programs.NAMES)
def test_ctrl_c_while_a_program_is_read_ends_it_without_a_word(name: str, script: bool, tmp_path: Path) -> None:
    (tmp_path / 'ZODB.py').write_text(SLOW)
    (tmp_path / f'zeo-{name}').write_text(f'from zeo.{name} import main\nmain()\n')
    ended = run(tmp_path, *([tmp_path / f'zeo-{name}'] if script else ['-m', f'zeo.{name}']), '--help')
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, '', '')


def test_ctrl_c_ends_the_list_of_programs_without_a_word(tmp_path: Path) -> None:
    (tmp_path / 'ZODB.py').write_text(SLOW)
    ended = run(tmp_path, '-m', 'zeo')
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, '', '')


def test_other_programs_are_interrupted_as_they_like(tmp_path: Path) -> None:
    (tmp_path / 'ZODB.py').write_text(SLOW)
    (tmp_path / 'other.py').write_text('try:\n    import zeo\nexcept KeyboardInterrupt:\n    print("as it likes")\n')
    for words in (['-m', 'other', 'zeo'], [tmp_path / 'other.py', 'zeo.status'], ['-m', 'other', 'zeo.status']):
        ended = run(tmp_path, *words)
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, 'as it likes\n', '')


def run(folder: Path, *words: object) -> 'subprocess.CompletedProcess[str]':
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=folder, capture_output=True, text=True, timeout=PATIENCE,
        env={**os.environ, 'PYTHONPATH': f'{folder}{os.pathsep}{ROOT}'})


def test_who_ignores_ctrl_c_goes_on_ignoring_it() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        programs.begin()
        programs.begun()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_when_a_program_has_begun_ctrl_c_is_pythons_again() -> None:
    before = signal.getsignal(signal.SIGINT)
    programs.begin()
    programs.begun()
    assert signal.getsignal(signal.SIGINT) is before is signal.default_int_handler


def test_nobody_looks_for_garbage_while_a_program_is_read(tmp_path: Path) -> None:
    (tmp_path / 'ZODB.py').write_text('import gc\nraise SystemExit(f"while it is read: {gc.isenabled()}")')
    for name in programs.NAMES:
        assert run(tmp_path, '-m', f'zeo.{name}', '--help').stderr == 'while it is read: False\n'


@pytest.mark.parametrize('name', programs.NAMES)
def test_garbage_is_looked_for_when_a_program_has_begun(name: str, tmp_path: Path) -> None:
    # Refused by each of them; what is told is the moment when Python ends.
    (tmp_path / 'sitecustomize.py').write_text(
        'import atexit, gc\natexit.register(lambda: print(gc.isenabled(), gc.get_freeze_count() > 1000))')
    missing = tmp_path / 'missing'
    files = [] if name in ('status', 'pack') else [missing / 'Data.fs']
    ended = run(tmp_path, '-m', f'zeo.{name}', '-U', missing / 'sock', *files)
    assert (ended.returncode, ended.stdout) == (1, 'True True\n'), ended.stderr


def test_a_program_that_uses_zeo_keeps_its_garbage_collection() -> None:
    ended = subprocess.run([sys.executable, '-c', 'import gc, zeo.start; print(gc.isenabled(), gc.get_freeze_count())'],
                           capture_output=True, text=True, timeout=PATIENCE, cwd=ROOT)
    assert ended.stdout == 'True 0\n', ended.stderr
