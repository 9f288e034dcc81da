"""One committer at a time: first come, first served; who has left is passed over; time is limited."""

import threading

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import Bundle
from hypothesis.stateful import RuleBasedStateMachine
from hypothesis.stateful import consumes
from hypothesis.stateful import invariant
from hypothesis.stateful import precondition
from hypothesis.stateful import rule

from tests.server.talk import PATIENCE
from zeo.server.commitlock import CommitLock


class Waiter:
    """Somebody who wants the lock."""

    def __init__(self, name: str = '', there: bool = True) -> None:
        self.name = name
        self.there = there
        self.grants = 0
        self.has_expired = threading.Event()

    def __repr__(self) -> str:
        return f'<{self.name}>'

    def granted(self) -> bool:
        if self.there:
            self.grants += 1
        return self.there

    def expired(self) -> None:
        self.has_expired.set()


def test_a_free_lock_is_taken_at_once() -> None:
    lock, waiter = CommitLock(), Waiter()
    assert lock.acquire(waiter) is True
    assert lock.holder is waiter
    assert lock.since is not None
    assert waiter.grants == 0  # it knows


def test_the_lock_goes_to_whoever_came_first() -> None:
    lock = CommitLock()
    first, second, third = waiters = [Waiter(str(number)) for number in range(3)]
    assert [lock.acquire(waiter) for waiter in waiters] == [True, False, False]
    assert lock.waiting == 2
    lock.release(first)
    assert lock.holder is second and second.grants == 1 and third.grants == 0
    lock.release(second)
    assert lock.holder is third
    lock.release(third)
    assert lock.holder is None and lock.since is None and lock.waiting == 0


def test_who_has_left_is_passed_over() -> None:
    lock = CommitLock()
    first, left, gone, last = Waiter(), Waiter(there=False), Waiter(there=False), Waiter()
    for waiter in (first, left, gone, last):
        lock.acquire(waiter)
    lock.release(first)
    assert lock.holder is last
    lock.release(last)
    assert lock.holder is None


def test_the_lock_is_free_if_all_have_left() -> None:
    lock = CommitLock()
    first, left = Waiter(), Waiter(there=False)
    lock.acquire(first)
    lock.acquire(left)
    lock.release(first)
    assert lock.holder is None
    assert lock.acquire(Waiter()) is True


def test_who_cancels_is_not_in_the_queue_any_more() -> None:
    lock = CommitLock()
    first, second = Waiter(), Waiter()
    lock.acquire(first)
    lock.acquire(second)
    assert lock.cancel(second) is True
    assert lock.cancel(second) is False
    assert lock.cancel(first) is False  # it does not wait
    lock.release(first)
    assert second.grants == 0 and lock.holder is None


def test_only_the_holder_releases() -> None:
    lock = CommitLock()
    lock.acquire(Waiter())
    with pytest.raises(AssertionError):
        lock.release(Waiter())


# ---- time


def test_a_holder_is_told_that_its_time_is_up() -> None:
    lock, waiter = CommitLock(limit=.01), Waiter()
    lock.start()
    lock.acquire(waiter)
    lock.wait_for_client(waiter)
    assert waiter.has_expired.wait(PATIENCE)
    assert lock.holder is waiter  # until it releases
    lock.release(waiter)
    lock.close()


def test_each_holder_has_its_own_time_also_who_was_waiting() -> None:
    lock, first, second = CommitLock(limit=.01), Waiter('first'), Waiter('second')
    lock.start()
    lock.acquire(first)
    lock.acquire(second)
    lock.wait_for_client(first)
    assert first.has_expired.wait(PATIENCE)
    assert not second.has_expired.is_set()
    lock.release(first)
    lock.wait_for_client(second)
    assert second.has_expired.wait(PATIENCE)
    lock.release(second)
    lock.close()


def test_the_clock_goes_on_after_a_rest() -> None:
    lock = CommitLock(limit=.01)
    lock.start()
    for _ in range(3):
        waiter = Waiter()
        lock.acquire(waiter)
        lock.wait_for_client(waiter)
        assert waiter.has_expired.wait(PATIENCE)
        lock.release(waiter)
    lock.close()


def test_a_holder_that_cannot_be_told_does_not_stop_the_clock() -> None:
    class Failing(Waiter):
        def expired(self) -> None:
            super().expired()
            raise RuntimeError('as it happens')

    lock, failing, next_one = CommitLock(limit=.01), Failing(), Waiter()
    lock.start()
    for waiter in (failing, next_one):
        lock.acquire(waiter)
        lock.wait_for_client(waiter)
        assert waiter.has_expired.wait(PATIENCE)
        lock.release(waiter)
    assert lock.clock_is_alive is True
    lock.close()
    assert lock.clock_is_alive is False


def test_the_time_that_the_server_works_for_the_holder_does_not_count() -> None:
    lock, working, waiting = CommitLock(limit=.01), Waiter('working'), Waiter('waiting')
    lock.start()
    lock.acquire(waiting)
    lock.wait_for_client(waiting)
    assert waiting.has_expired.wait(PATIENCE)  # so the clock runs
    lock.acquire(working)
    lock.release(waiting)
    lock.wait_for_client(waiting)  # too late, it has nothing to wait for
    assert not working.has_expired.wait(.1)
    lock.wait_for_client(working)
    assert working.has_expired.wait(PATIENCE)
    lock.close()


def test_who_releases_in_time_is_not_told() -> None:
    lock, waiter = CommitLock(limit=PATIENCE), Waiter()
    lock.start()
    lock.acquire(waiter)
    lock.wait_for_client(waiter)
    lock.release(waiter)
    lock.close()
    assert not waiter.has_expired.is_set()


@pytest.mark.parametrize('limit', [None, 30.0])
def test_closing_ends_the_clock_whether_there_is_one_or_not(limit: float | None) -> None:
    lock = CommitLock(limit)
    assert lock.clock_is_alive is (None if limit is None else False)
    lock.close()
    lock = CommitLock(limit)
    lock.start()
    assert lock.clock_is_alive is (None if limit is None else True)
    lock.acquire(Waiter())
    lock.close()


# ---- in any order


class Queue(RuleBasedStateMachine):
    """The lock beside a list that says who it should be."""

    waiters = Bundle('waiters')

    def __init__(self) -> None:
        super().__init__()
        self.lock = CommitLock()
        self.expected: list[Waiter] = []  # the holder first

    @rule(target=waiters)
    def come(self) -> Waiter:
        waiter = Waiter()
        assert self.lock.acquire(waiter) is (not self.expected)
        self.expected.append(waiter)
        return waiter

    @rule(waiter=consumes(waiters))
    def leave(self, waiter: Waiter) -> None:
        if waiter in self.expected[1:]:
            assert self.lock.cancel(waiter) is True
            self.expected.remove(waiter)
        else:
            assert self.lock.cancel(waiter) is False

    @rule(waiter=consumes(waiters))
    def vanish(self, waiter: Waiter) -> None:
        """It has left, and it is not yet known here."""
        if waiter in self.expected[1:]:
            waiter.there = False

    @precondition(lambda self: self.expected)
    @rule(again=st.booleans())
    def release(self, again: bool) -> None:
        holder = self.expected.pop(0)
        while self.expected and not self.expected[0].there:
            self.expected.pop(0)
        self.lock.release(holder)
        if again:
            assert self.lock.acquire(holder) is (not self.expected)
            self.expected.append(holder)

    @invariant()
    def the_right_one_holds_it(self) -> None:
        assert self.lock.holder is (self.expected[0] if self.expected else None)
        assert self.lock.waiting == max(len(self.expected) - 1, 0)
        assert (self.lock.since is None) is (not self.expected)


TestQueue = Queue.TestCase
TestQueue.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


def test_many_threads_never_hold_it_together_and_all_get_it() -> None:
    lock = CommitLock()
    inside: list[int] = []
    most = 0

    class Thread(threading.Thread, Waiter):
        def __init__(self) -> None:
            threading.Thread.__init__(self, daemon=True)
            self.turn = threading.Event()

        def granted(self) -> bool:
            self.turn.set()
            return True

        def run(self) -> None:
            nonlocal most
            for _ in range(100):
                self.turn.clear()
                if not lock.acquire(self):
                    assert self.turn.wait(PATIENCE)
                inside.append(1)
                most = max(most, len(inside))
                inside.pop()
                lock.release(self)

    threads = [Thread() for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert most == 1 and lock.holder is None
