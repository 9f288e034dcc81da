"""Tids are the time, each later than the others."""

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck
from hypothesis import given
from hypothesis import settings
from persistent.TimeStamp import TimeStamp
from ZODB.utils import newTid
from ZODB.utils import p64
from ZODB.utils import u64
from ZODB.utils import z64

from zeo.server import tids
from zeo.server.tids import Tids


class Clock:
    """A time that is set by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(tids.time, 'time', lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


MOMENTS = st.one_of(
    st.floats(min_value=1.0, max_value=2.0**32),
    st.builds(lambda minute, before: minute * 60 - before,
              st.integers(min_value=1, max_value=2**26), st.sampled_from([0.0, 1e-9, 1e-6, 59.9999999, 30.0])))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(MOMENTS, min_size=1, max_size=6))
def test_it_is_the_tid_that_zodb_makes_of_the_time(clock: Clock, moments: list[float]) -> None:
    chooser = Tids()
    for clock.now in moments:
        assert abs(u64(chooser._now()) - u64(newTid(None))) <= 1
        seconds = TimeStamp(chooser._now()).timeTime()
        assert seconds == pytest.approx(clock.now, abs=1e-6)


@given(st.lists(MOMENTS, min_size=2, max_size=20), st.binary(min_size=8, max_size=8))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_each_is_later_whatever_the_clock_does(clock: Clock, moments: list[float], last_tid: bytes) -> None:
    chooser = Tids()
    last_tid = b'\x03' + last_tid[1:]  # of this century, more or less
    chosen = []
    for clock.now in moments:
        chosen.append(chooser.choose(last_tid))
    assert last_tid < chosen[0] and chosen == sorted(set(chosen))


def test_the_first_one_is_not_foreseen_if_the_clock_is_behind(clock: Clock) -> None:
    clock.now = 1e9
    future = p64(u64(newTid(None)) + 2**40)
    firsts = {Tids().choose(future) for _ in range(8)}
    assert len(firsts) > 1 and min(firsts) > future
    assert Tids().choose(z64) == newTid(None)
