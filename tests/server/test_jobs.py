"""What is done beside a session: how much at a time, how much may wait, and what is not begun any more."""

import threading
from collections.abc import Callable

import pytest
from ZODB.POSException import StorageError

from tests.server.talk import PATIENCE
from tests.system.servers import until
from zeo.server import jobs as module
from zeo.server.jobs import Jobs
from zeo.server.outbox import Outbox


def start(function: Callable[[], None]) -> None:
    threading.Thread(target=function, daemon=True).start()


class Slow:
    """Jobs that wait for a gate, of a client."""

    def __init__(self) -> None:
        self.outbox = Outbox()
        self.jobs = Jobs(self.outbox, lambda: None)
        self.gate = threading.Event()
        self.done: list[int] = []
        self.running = threading.Semaphore(0)

    def add(self, number: int, size: int = 1, always: bool = False) -> None:
        def job() -> None:
            self.running.release()
            assert self.gate.wait(PATIENCE)
            self.done.append(number)
        self.jobs.add(job, size, start, always=always)

    def wait_until_running(self) -> None:
        assert self.running.acquire(timeout=PATIENCE)


def test_all_are_done_and_then_no_thread_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, 'HELPERS', 2)
    slow = Slow()
    for number in range(10):
        slow.add(number)
    slow.gate.set()
    until(lambda: not slow.jobs._helpers, 'all threads have ended')
    assert sorted(slow.done) == [*range(10)] and slow.jobs._size == 0


def test_so_many_may_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, 'HELPERS', 1)
    monkeypatch.setattr(module, 'MOST_JOBS', 3)
    slow = Slow()
    slow.add(0)
    slow.wait_until_running()
    for number in range(3):
        slow.add(number)
    with pytest.raises(ValueError, match='more than 3 requests'):
        slow.add(9)
    slow.gate.set()


def test_so_many_bytes_may_wait_or_be_dealt_with_but_one_request_in_any_case(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, 'MOST_BYTES', 1000)
    slow = Slow()
    slow.add(0, 5000)
    slow.wait_until_running()
    with pytest.raises(ValueError, match='of 5000 bytes'):
        slow.add(1, 1)
    slow.gate.set()
    until(lambda: not slow.jobs._helpers, 'it is done')
    slow.add(1, 600)
    slow.add(2, 400)
    until(lambda: len(slow.done) == 3, 'these are done')


def test_nothing_is_begun_for_who_has_left_but_what_has_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, 'HELPERS', 1)
    slow = Slow()
    slow.add(0)
    slow.wait_until_running()
    slow.add(1)
    slow.add(2, always=True)
    slow.outbox.end()
    slow.gate.set()
    until(lambda: not slow.jobs._helpers, 'the thread has ended')
    assert slow.done == [0, 2] and slow.jobs._size == 0


def test_who_does_not_read_waits_before_each(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    jobs = Jobs(Outbox(), lambda: done.append('room'))
    for _ in range(2):
        jobs.add(lambda: done.append('job'), 1, lambda function: function())
    assert done == ['room', 'job'] * 2


def test_what_no_thread_can_be_started_for_is_refused_and_forgotten() -> None:
    def fail(_: object) -> None:
        raise RuntimeError("can't start new thread")

    slow = Slow()
    with pytest.raises(StorageError, match="cannot do that now: can't start new thread"):
        slow.jobs.add(lambda: None, 1, fail)
    slow.gate.set()
    slow.add(1)
    until(lambda: slow.done, 'the next one is done')
    assert slow.jobs._size == 0
