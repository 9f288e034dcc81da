"""What can be sent of an extension is told, what cannot is logged."""

import datetime
import logging
from typing import Any

import pytest

from zeo.server import telling
from zeo.server.seldom import Seldom

TODAY = datetime.date(2026, 1, 2)
TID = bytes.fromhex('040d328b1f0e4a22')


class Stubborn:
    def __reduce__(self) -> Any:
        raise RuntimeError('no')


@pytest.fixture(autouse=True)
def seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telling, '_left_out', Seldom(telling.logger))


@pytest.mark.parametrize('extension', [{}, {'size': 7, 'more': [{'a': None}, (b'x', 1.5)]}, b'a pickle'])
def test_plain_data_are_told_as_they_are(extension: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert telling.plain('1', extension, TID) is extension
    assert not caplog.records


def test_the_rest_is_told_without_what_cannot_be_sent(caplog: pytest.LogCaptureFixture) -> None:
    assert telling.plain('1', {'size': 7, 'when': TODAY, 'deep': [{'er': TODAY}], TODAY: 1, 'no': Stubborn()}, TID) \
        == {'size': 7}
    [record] = caplog.records
    assert record.levelno == logging.WARNING and record.getMessage() == (
        'storage 1: transaction 040d328b1f0e4a22: clients are not told of what is no plain data in its extension:'
        " 'deep' (list), 'no' (Stubborn), 'when' (date), datetime.date(2026, 1, 2) (int)")


@pytest.mark.parametrize('name', ['tid', 'id'])
def test_other_entries_of_a_log_are_complete(name: str, caplog: pytest.LogCaptureFixture) -> None:
    good, bad = {name: TID, 'note': 'x'}, {name: TID, 'note': 'y', 'when': TODAY}
    assert telling.entries('1', iter([good, bad, good])) == [good, {name: TID, 'note': 'y'}, good]
    assert 'transaction 040d328b1f0e4a22' in caplog.text


def test_the_log_does_not_fill(caplog: pytest.LogCaptureFixture) -> None:
    telling.entries('1', [{'tid': TID, 'when': TODAY}] * 100)
    assert len(caplog.records) == 1
