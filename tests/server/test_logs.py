"""zeo.server.logs: where the log goes, and how it is reopened."""

import logging
import re

import pytest

from zeo.server import logs
from zeo.server.options import CannotStart


@pytest.fixture(autouse=True)
def as_it_was():
    """The logging of this process, put back afterwards."""
    root, lock = logging.getLogger(), logging.getLogger('zc.lockfile')
    handlers, level, lock_level = root.handlers[:], root.level, lock.level
    root.handlers[:] = []  # else they would be closed
    yield
    for handler in root.handlers:
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    lock.setLevel(lock_level)


def test_the_log_goes_to_standard_error_with_the_time(capsys):
    assert logs.set_up(None, debug=False) is None
    logging.getLogger('zeo').info('ready')
    out, err = capsys.readouterr()
    assert not out
    assert re.fullmatch(r'\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO zeo: ready\n', err)


@pytest.mark.parametrize('debug', [True, False])
def test_details_are_logged_on_request_only(capsys, debug):
    logs.set_up(None, debug=debug)
    logging.getLogger('zeo').debug('details')
    assert ('details' in capsys.readouterr().err) is debug


def test_the_log_is_appended_to_a_file(tmp_path):
    path = tmp_path / 'log'
    path.write_text('before\n')
    logs.set_up(str(path), debug=False)
    logging.getLogger('zeo').info('größer')
    before, line = path.read_text(encoding='utf-8').splitlines()
    assert before == 'before' and line.endswith('INFO zeo: größer')


def test_after_a_rename_reopening_goes_on_in_a_new_file(tmp_path):
    path = tmp_path / 'log'
    log_file = logs.set_up(str(path), debug=False)
    logging.getLogger('zeo').info('one')
    path.rename(tmp_path / 'log.1')
    logging.getLogger('zeo').info('two')
    log_file.reopen()
    logging.getLogger('zeo').info('three')
    assert path.read_text().endswith('zeo: three\n') and path.read_text().count('\n') == 1
    assert (tmp_path / 'log.1').read_text().count('\n') == 2


def test_a_file_that_cannot_be_reopened_leaves_the_old_one_in_use(tmp_path):
    folder = tmp_path / 'folder'
    folder.mkdir()
    log_file = logs.set_up(str(folder / 'log'), debug=False)
    folder.rename(tmp_path / 'old')
    with pytest.raises(OSError):
        log_file.reopen()
    logging.getLogger('zeo').info('still here')
    assert 'still here' in (tmp_path / 'old' / 'log').read_text()


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(CannotStart, match='cannot write the log file .*/no/log: No such file'):
        logs.set_up(str(tmp_path / 'no' / 'log'), debug=False)
