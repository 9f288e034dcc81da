"""zeo.server.trace: each call is told once, with its time."""

import logging

import pytest

from zeo.server.trace import Trace


@pytest.fixture
def told(caplog):
    caplog.set_level(logging.DEBUG, 'zeo.server.trace')
    return lambda: [record.getMessage() for record in caplog.records]


def test_a_call_is_told_when_it_is_answered_and_only_once(told):
    trace = Trace()
    trace.begin(b'1', 'vote')
    assert told() == []
    trace.end(b'1', 'client')
    trace.end(b'1', 'client')
    [line] = told()
    assert line.startswith('client: vote took ') and line.endswith(' ms')


def test_an_error_is_named(told):
    trace = Trace()
    trace.begin(b'1', 'pack')
    trace.end(b'1', 'client', KeyError('x'))
    assert told()[0].endswith(' ms (KeyError)')


def test_what_was_not_begun_is_not_told(told):
    Trace().end(b'1', 'client')
    assert told() == []
