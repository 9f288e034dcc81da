"""zeo.server.profiler: all threads in one profile that pstats reads."""

import pstats
import sys
import threading

import pytest

from zeo.server.profiler import Profiler


@pytest.fixture
def profiled(tmp_path):
    """Run a function under the profiler; the result is what pstats makes of it, by function name."""
    before = sys.getprofile(), threading.getprofile()

    def run(function):
        profiler = Profiler()
        profiler.start()
        try:
            function()
        finally:
            profiler.stop()
        with open(tmp_path / 'profile', 'wb') as file:
            profiler.dump(file)
        stats = pstats.Stats(str(tmp_path / 'profile'))
        return {key[2]: value for key, value in stats.stats.items()}

    yield run
    assert (sys.getprofile(), threading.getprofile()) == before


def leaf():
    return len('four')


def branch():
    leaf()
    leaf()


def countdown(n):
    if n:
        countdown(n - 1)


def numbers():
    yield 1
    yield 2


def in_thread(function):
    thread = threading.Thread(target=function)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()


def calls(row):
    return row[1]


def test_calls_are_counted_with_their_callers(profiled):
    found = profiled(branch)
    assert calls(found['branch']) == 1 and calls(found['leaf']) == 2
    assert calls(found['<built-in builtins.len>']) == 2
    [(caller, row)] = found['leaf'][4].items()
    assert caller[2] == 'branch' and row[0] == 2


def test_all_threads_are_in_it(profiled):
    def work():
        for _ in range(3):
            in_thread(branch)
        leaf()
    assert calls(profiled(work)['leaf']) == 7


def test_threads_that_have_ended_are_kept_as_their_sum_only(tmp_path):
    profiler = Profiler()
    profiler.start()
    try:
        for _ in range(20):
            in_thread(branch)
    finally:
        profiler.stop()
    assert len(profiler._profiles) <= 3


def test_recursion_is_counted_once_in_the_total_time(profiled):
    outer, all_calls, own, total, _ = profiled(lambda: countdown(5))['countdown']
    assert (outer, all_calls) == (1, 6)
    assert own <= total + 1e-6


def test_own_times_add_up_to_the_total(profiled):
    found = profiled(branch)
    parts = sum(found[name][2] for name in ('branch', 'leaf', '<built-in builtins.len>'))
    assert found['branch'][3] == pytest.approx(parts, abs=1e-6)


def test_exceptions_and_generators_leave_nothing_behind(profiled):
    def raising():
        raise KeyError

    def work():
        for _ in range(10):
            with pytest.raises(KeyError):
                raising()
            with pytest.raises(ValueError):
                int('x')
            generator = numbers()
            next(generator)
            with pytest.raises(KeyError):
                generator.throw(KeyError)
            assert list(numbers()) == [1, 2]
    found = profiled(work)
    assert calls(found['raising']) == 10 and found['raising'][0] == 10
    assert calls(found['work']) == 1
    assert {caller[2] for caller in found['raising'][4]} == {'work'}


def test_what_was_running_when_it_began_may_return():
    profiler = Profiler()

    def starts():
        profiler.start()
    starts()
    try:
        leaf()
    finally:
        profiler.stop()
    assert ('leaf' in {key[2] for key in profiler._profiles[0].table.functions})


def test_the_listing_can_be_printed(profiled, capsys, tmp_path):
    profiled(branch)
    pstats.Stats(str(tmp_path / 'profile')).sort_stats('cumulative').print_stats().print_callers()
    assert 'branch' in capsys.readouterr().out
