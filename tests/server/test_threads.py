"""Threads that are used again: for whom there is one, and that all of them end."""

import threading
import weakref
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.talk import PATIENCE
from tests.server.talk import in_thread
from tests.system.servers import until
from zeo.server import threads as module
from zeo.server.threads import Threads


@pytest.fixture
def make() -> Iterator[Callable[..., Threads]]:
    made: list[Threads] = []

    def make(**options: Any) -> Threads:
        made.append(Threads('test thread', **options))
        return made[-1]

    yield make
    assert all(threads.close(PATIENCE) for threads in made)
    assert not running()


def running() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name.startswith('test thread')]


class Job:
    """Tells in which thread it is done, and ends when it may."""

    def __init__(self, may_end: bool = False) -> None:
        self.begun, self.may_end = threading.Event(), threading.Event()
        if may_end:
            self.may_end.set()

    def __call__(self) -> None:
        self.thread = threading.current_thread()
        self.begun.set()
        assert self.may_end.wait(PATIENCE)

    def thread_of(self) -> threading.Thread:
        assert self.begun.wait(PATIENCE)
        return self.thread


def waiting(threads: Threads) -> Callable[[], bool]:
    return lambda: threads._free == len(threads._all)


def test_jobs_at_the_same_time_have_a_thread_each(make: Callable[..., Threads]) -> None:
    threads = make()
    jobs = [Job() for _ in range(5)]
    for job in jobs:
        threads.run(job)
    assert len({job.thread_of() for job in jobs}) == 5
    assert all(job.thread.daemon for job in jobs)  # who hangs does not keep the process from ending
    for job in jobs:
        job.may_end.set()


def test_a_thread_that_is_done_does_the_next_job_under_its_own_name(make: Callable[..., Threads]) -> None:
    threads = make()

    def named() -> None:
        threading.current_thread().name = 'test thread of a job'

    threads.run(named)
    until(waiting(threads), 'it is free')
    [first] = running()
    assert first.name == 'test thread'
    for _ in range(3):
        job = Job(may_end=True)
        threads.run(job)
        assert job.thread_of() is first
        until(waiting(threads), 'it is free again')
    assert running() == [first]


@pytest.mark.parametrize('error', [ZeroDivisionError, SystemExit])
def test_a_job_that_fails_costs_no_thread(
        make: Callable[..., Threads], caplog: pytest.LogCaptureFixture, error: type[BaseException]) -> None:
    def fail() -> None:
        raise error

    threads = make(most=1)
    threads.run(fail)
    until(waiting(threads), 'it is free')
    assert 'a job failed' in caplog.text
    threads.run(Job(may_end=True))
    assert len(running()) == 1


def test_who_has_nothing_to_do_for_long_ends(make: Callable[..., Threads]) -> None:
    threads = make(patience=.01)
    for _ in range(200):  # some just when another one gets free
        threads.run(Job(may_end=True))
    until(lambda: not running(), 'they have ended')
    assert not threads._all and not threads._free


def test_a_job_that_comes_just_when_the_thread_gives_up_is_done(
        make: Callable[..., Threads], monkeypatch: pytest.MonkeyPatch) -> None:
    """It was counted on: so it does not end, but takes what is there by now."""
    threads = make()
    job = Job(may_end=True)
    get = threads._jobs.get

    class Late:
        """A queue whose time-outs are over when there is something in it."""

        put = threads._jobs.put

        def get(self, timeout: float | None = None) -> Any:
            if timeout is not None:
                threads.run(job)
                raise __import__('queue').Empty
            return get()

    monkeypatch.setattr(threads, '_jobs', Late())
    first = Job(may_end=True)
    threads.run(first)
    assert job.thread_of() is first.thread_of()
    monkeypatch.undo()


def test_close_waits_for_jobs_and_ends_who_waits(make: Callable[..., Threads]) -> None:
    threads = make(patience=3600)  # who is done later must not wait for anything
    idle, busy = Job(), Job()
    threads.run(idle)
    threads.run(busy)
    idle.may_end.set()
    busy.thread_of()
    until(lambda: threads._free == 1, 'one is free')
    assert not threads.close(0)
    with pytest.raises(RuntimeError):
        threads.run(Job())
    until(lambda: running() == [busy.thread], 'who waited has ended')
    closing = in_thread(threads.close)
    busy.may_end.set()
    assert closing.result(PATIENCE)


def test_without_a_thread_a_job_is_refused(
        make: Callable[..., Threads], monkeypatch: pytest.MonkeyPatch) -> None:
    threads = make()

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, 'start', start)
        with pytest.raises(RuntimeError):
            threads.run(Job())
    job = Job(may_end=True)
    threads.run(job)
    assert job.thread_of() in running()


def test_with_as_many_as_there_may_be_a_job_waits_for_one_to_be_done(make: Callable[..., Threads]) -> None:
    threads = make(most=1)
    first, second = Job(), Job(may_end=True)
    threads.run(first)
    thread = first.thread_of()
    running_it = in_thread(threads.run, second)
    until(lambda: bool(threads._less._waiters), 'it waits')  # type: ignore[attr-defined]
    first.may_end.set()
    running_it.result(PATIENCE)
    assert second.thread_of() is thread and running() == [thread]


def test_a_job_for_which_no_thread_gets_free_is_refused(
        make: Callable[..., Threads], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, 'ROOM_PATIENCE', .01)
    threads = make(most=1)
    busy = Job()
    threads.run(busy)
    with pytest.raises(RuntimeError, match='1 thread'):
        threads.run(Job())
    busy.may_end.set()


def test_nothing_is_kept_of_a_job_that_is_done(make: Callable[..., Threads]) -> None:
    threads = make()
    for _ in range(2):  # by a new thread, and by one that was free
        job = Job(may_end=True)
        kept = weakref.ref(job)
        threads.run(job)
        job.thread_of()
        del job
        until(lambda: kept() is None, 'it is gone')
