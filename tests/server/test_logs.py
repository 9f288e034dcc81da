"""zeo.server.logs: where the log goes, and how it is reopened."""

import errno
import io
import logging
import os
import re

import pytest

from zeo.server import logs
from zeo.server.options import CannotStart
from zeo.server.options import parse


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


def test_each_event_is_one_line(capsys):
    logs.set_up(None, debug=False)
    logging.getLogger('zeo').info('%s: has a name', 'one\ntwo\r\nthree\x85four\u2028five')
    assert capsys.readouterr().err.endswith('INFO zeo: one two three four five: has a name\n')


def test_an_eventlog_is_set_up_and_reopened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'zeo.conf').write_text(
        '<eventlog>\n<logfile>\npath log\nformat %(message)s\n</logfile>\n</eventlog>\n<mappingstorage/>\n')
    log = logs.set_up(parse(['-p', '1', '-C', 'zeo.conf']).log, debug=True)
    logging.getLogger('zeo').debug('one')
    (tmp_path / 'log').rename(tmp_path / 'log.1')
    log.reopen()
    logging.getLogger('zeo').info('two')
    assert (tmp_path / 'log.1').read_text() == 'one\n' and (tmp_path / 'log').read_text() == 'two\n'


def test_an_eventlog_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'zeo.conf').write_text(
        '<eventlog>\n<logfile>\npath no/log\n</logfile>\n</eventlog>\n<mappingstorage/>\n')
    with pytest.raises(CannotStart, match='cannot write the log file .*/no/log: No such file'):
        logs.set_up(parse(['-p', '1', '-C', 'zeo.conf']).log, debug=False)


class Full(io.StringIO):
    """A file on a full disk."""

    def write(self, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_could_not_be_written_is_told_once_and_counted(tmp_path, capsys):
    path = tmp_path / 'log'
    log_file = logs.set_up(str(path), debug=False)
    logger = logging.getLogger('zeo')
    for _ in range(2):  # it may happen again
        file = log_file.setStream(Full())
        for number in range(3):
            logger.info('lost %d', number)
        log_file.setStream(file)
        logger.info('there is room again')
    told = capsys.readouterr().err.splitlines()
    assert told == [f'zeo.start: cannot write the log file {path}: [Errno 28] No space left on device'] * 2
    written = [line.split(': ', 1)[1] for line in path.read_text().splitlines()]
    assert written == ['there is room again', '3 lines could not be written'] * 2
