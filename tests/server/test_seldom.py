"""zeo.server.seldom: of many lines, one."""

import logging

from zeo.server import seldom
from zeo.server.seldom import Rations
from zeo.server.seldom import Seldom
from zeo.server.seldom import SeldomEach


def test_of_many_warnings_one_is_logged_and_later_the_number_of_the_others(caplog, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(seldom.time, 'monotonic', lambda: now)
    lines = Seldom(logging.getLogger('zeo'))
    for number in range(5):
        lines.warning('%s: bad', number)
    now += Seldom.PAUSE - 1
    lines.warning('%s: bad', 5)
    now += 1
    for number in range(6, 9):
        lines.warning('%s: bad', number)
    assert [record.getMessage() for record in caplog.records] == [
        '0: bad', '6: bad (and 5 more of such kind before)']


def test_nobody_hides_what_others_do(caplog):
    lines = SeldomEach(logging.getLogger('zeo'))
    for number in range(3):
        lines.of('here').warning('here %d', number)
    lines.of('there').warning('there')
    assert [record.getMessage() for record in caplog.records] == ['here 0', 'there']


def test_the_memory_of_hosts_is_bounded():
    lines = SeldomEach(logging.getLogger('zeo'))
    first = lines.of('0')
    for number in range(SeldomEach.MOST):
        lines.of(str(number))
    assert lines.of('0') is first
    lines.of('one more')
    assert lines.of('0') is not first


def test_what_is_less_important_is_told_as_such(caplog):
    caplog.set_level('INFO')
    Seldom(logging.getLogger('zeo')).info('%s', 'news')
    [record] = caplog.records
    assert (record.levelname, record.getMessage()) == ('INFO', 'news')


def test_everyday_life_is_told_up_to_a_number_of_lines_and_again_after_a_while(caplog, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(seldom.time, 'monotonic', lambda: now)
    monkeypatch.setattr(seldom.Ration, 'MOST', 3)
    rations = Rations(logging.getLogger('zeo'))
    assert [rations.of('here').allows() for _ in range(6)] == [True] * 3 + [False] * 3
    assert rations.of('there').allows()
    assert [record.getMessage() for record in caplog.records] == [
        'here: comes and goes so often that it is not told of for 60 s']
    now += 61
    assert [rations.of('here').allows() for _ in range(4)] == [True] * 3 + [False]
    assert len(caplog.records) == 2


def test_the_memory_of_rations_is_bounded_as_well():
    rations = Rations(logging.getLogger('zeo'))
    first = rations.of('0')
    for number in range(SeldomEach.MOST):
        rations.of(str(number))
    assert rations.of('0') is first
    rations.of('one more')
    assert rations.of('0') is not first


def test_an_error_may_have_its_traceback(caplog):
    Seldom(logging.getLogger('zeo')).error('%s failed', 'it', cause=ValueError('why'))
    [record] = caplog.records
    assert record.levelname == 'ERROR' and 'ValueError: why' in caplog.text
