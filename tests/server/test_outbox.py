"""Everything still to be said to one client: its order, its mark, its limits."""

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine
from hypothesis.stateful import initialize
from hypothesis.stateful import invariant
from hypothesis.stateful import precondition
from hypothesis.stateful import rule
from ZODB.utils import z64

from tests.server.talk import PATIENCE
from tests.server.talk import in_thread
from tests.server.talk import oid
from tests.server.talk import tid
from tests.system.servers import until
from zeo.server.outbox import LIMIT
from zeo.server.outbox import Outbox
from zeo.server.outbox import Outcome

FRAME = (b'frame',)


def taken(outbox: Outbox) -> bytes:
    return b''.join(outbox.take())


def announced(outbox: Outbox, number: int, *oids: bytes) -> bool:
    return outbox.announce((b'announcement',), tid(number), oids)


def waiting(outbox: Outbox) -> None:
    """Wait until somebody waits for this outbox."""
    until(lambda: outbox._waiting, 'somebody waits')


# ---- what goes in comes out


def test_what_was_appended_is_taken_in_order() -> None:
    outbox = Outbox()
    outbox.append((b'a', b'b'))
    outbox.append((b'c',))
    assert outbox.backlog == 3
    assert taken(outbox) == b'abc'
    assert outbox.backlog == 0
    assert outbox.take() == []


def test_one_take_is_bounded_but_takes_at_least_one_part() -> None:
    outbox = Outbox()
    outbox.append((b'x' * 100, b'y', b'z' * 100))
    assert outbox.take(most=50) == [b'x' * 100]
    assert outbox.take(most=50) == [b'y']
    assert outbox.take(most=50) == [b'z' * 100]


def test_nothing_is_appended_when_the_client_is_gone() -> None:
    outbox = Outbox()
    outbox.append(FRAME)
    outbox.end()
    assert outbox.gone and outbox.backlog == 0
    assert not outbox.append(FRAME)
    assert announced(outbox, 1)  # it is not this that ends it
    assert outbox.reply_to_load(FRAME, 0, z64) is Outcome.GONE
    assert outbox.reply_with_history(FRAME, z64) is Outcome.GONE
    assert outbox.take() == []
    outbox.end()


# ---- the mark


def test_a_load_that_nothing_was_announced_beside_is_sent() -> None:
    outbox = Outbox()
    announced(outbox, 5, oid(1))
    assert outbox.reply_to_load(FRAME, outbox.published, tid(5)) is Outcome.SENT
    assert taken(outbox) == b'announcementframe'


def test_a_load_is_done_again_if_anything_was_announced_since_its_mark() -> None:
    outbox = Outbox()
    mark = outbox.published
    announced(outbox, 5, oid(2))
    assert outbox.reply_to_load(FRAME, mark, tid(1)) is Outcome.AGAIN
    assert taken(outbox) == b'announcement'


def test_the_second_time_only_an_announcement_of_the_same_object_counts() -> None:
    outbox = Outbox()
    mark = outbox.watch(oid(1))
    announced(outbox, 5, oid(2))
    assert outbox.reply_to_load(FRAME, mark, tid(1), watching=True) is Outcome.SENT
    mark = outbox.watch(oid(1))
    announced(outbox, 6, oid(1))
    assert outbox.reply_to_load(FRAME, mark, tid(1), watching=True) is Outcome.AGAIN


@pytest.mark.parametrize('touched', [False, True])
def test_a_watch_that_was_never_used_says_nothing_about_the_next_load(touched: bool) -> None:
    """As after a load that failed when it was done again."""
    outbox = Outbox()
    outbox.watch(oid(1))
    mark = outbox.published
    announced(outbox, 5, oid(1) if touched else oid(2))
    assert outbox.reply_to_load(FRAME, mark, tid(1)) is Outcome.AGAIN


def test_history_needs_no_mark() -> None:
    outbox = Outbox()
    announced(outbox, 5, oid(1))
    assert outbox.reply_with_history(FRAME, tid(1)) is Outcome.SENT


# ---- replies do not run ahead


def test_no_reply_shows_a_tid_before_it_was_announced() -> None:
    outbox = Outbox()
    outbox.start_at(tid(4))
    assert outbox.reply_to_load(FRAME, outbox.published, tid(5)) is Outcome.AHEAD
    assert outbox.reply_with_history(FRAME, tid(5)) is Outcome.AHEAD
    assert outbox.reply_to_load(FRAME, outbox.published, tid(4)) is Outcome.SENT


def test_with_patience_at_its_end_a_reply_may_run_ahead_but_keeps_its_mark() -> None:
    outbox = Outbox()
    mark = outbox.published
    assert outbox.reply_to_load(FRAME, mark, tid(5), ahead=True) is Outcome.SENT
    assert outbox.reply_with_history(FRAME, tid(5), ahead=True) is Outcome.SENT
    announced(outbox, 5, oid(1))
    assert outbox.reply_to_load(FRAME, mark, tid(5), ahead=True) is Outcome.AGAIN


def test_who_waits_for_an_announcement_wakes_up_when_it_comes() -> None:
    outbox = Outbox()
    done = in_thread(outbox.wait_for_announcement, tid(5), PATIENCE)
    waiting(outbox)
    announced(outbox, 4)
    announced(outbox, 5)
    assert done.result(PATIENCE) is True


@pytest.mark.parametrize('wait', [
    lambda outbox: outbox.wait_for_announcement(tid(5), PATIENCE),
    lambda outbox: outbox.wait_for_room(0, PATIENCE)], ids=['announcement', 'room'])
def test_who_waits_wakes_up_when_the_client_is_gone(wait: Callable[[Outbox], bool]) -> None:
    outbox = Outbox()
    outbox.append(FRAME)
    done = in_thread(wait, outbox)
    waiting(outbox)
    outbox.end()
    assert done.result(PATIENCE) is True


def test_waiting_for_an_announcement_has_an_end() -> None:
    assert Outbox().wait_for_announcement(tid(5), .01) is False


# ---- clients that do not read


def test_who_waits_for_room_wakes_up_when_there_is_some() -> None:
    outbox = Outbox()
    outbox.append((b'x' * 100,))
    done = in_thread(outbox.wait_for_room, 50, PATIENCE)
    waiting(outbox)
    outbox.take()
    assert done.result(PATIENCE) is True


def test_who_reads_nothing_is_not_waited_for_any_longer() -> None:
    outbox = Outbox()
    outbox.append((b'x' * 100,))
    assert outbox.wait_for_room(50, .01) is False


def test_who_reads_slowly_is_waited_for() -> None:
    class Slow(Outbox):
        """Its client reads a little each time somebody looks."""

        def _wait(self, *args: Any) -> bool:
            self.size_sent += 1
            if self.size_sent == 5:
                self.take()
            return super()._wait(*args)

    outbox = Slow()
    outbox.append((b'x' * 100,))
    assert outbox.wait_for_room(50, .01) is True
    assert outbox.size_sent == 5


def test_a_client_whose_backlog_is_too_long_is_condemned_by_the_next_announcement() -> None:
    outbox = Outbox(limit=100)
    outbox.append((b'x' * 100,))
    assert announced(outbox, 1)
    assert not outbox.gone
    assert not announced(outbox, 2)
    assert outbox.gone and outbox.condemned and not outbox.backlog


def test_one_large_announcement_condemns_nobody() -> None:
    outbox = Outbox(limit=100)
    assert outbox.announce((b'x' * 1000,), tid(1), [oid(1)])
    assert not outbox.gone


LONG = (b'head', b'x' * 1000)


def test_a_large_announcement_condemns_nobody_when_the_next_one_comes() -> None:
    outbox = Outbox(limit=100)
    assert outbox.announce(LONG, tid(1), [oid(1)])
    assert announced(outbox, 2)  # the client cannot have read the first one yet
    [_, part] = outbox.take(2000)[:2]
    outbox.put_back(memoryview(part)[10:])  # as with TLS, which is given a part of it at a time
    assert announced(outbox, 3)
    assert outbox.announce(LONG, tid(4), [oid(1)])
    assert not announced(outbox, 5) and outbox.condemned  # these are two


def test_what_was_large_and_is_sent_is_no_excuse_any_more() -> None:
    outbox = Outbox(limit=100)
    assert outbox.announce(LONG, tid(1), [oid(1)])
    outbox.take(2000)
    for number in range(2, 20):
        if not announced(outbox, number):
            break
    assert outbox.condemned


def test_the_limit_leaves_room_for_the_largest_replies_that_sessions_wait_for() -> None:
    from zeo.server.conversation import ROOM
    assert ROOM * 4 <= LIMIT


# ---- all of it, in any order


class Loads(RuleBasedStateMachine):
    """A client that loads while others commit, step by step in any order.

    The storage shows a transaction before it is announced; each load has a mark, a read, and a reply.
    What the client was told is checked against the rules that its cache relies on.
    """

    OIDS = [oid(1), oid(2)]

    @initialize()
    def start(self) -> None:
        self.outbox = Outbox()
        self.number = 0
        self.current = dict.fromkeys(self.OIDS, z64)  # in the storage
        self.unannounced: list[tuple[bytes, list[bytes]]] = []
        self.load: tuple[bytes, int, bool] | None = None  # oid, mark, watching
        self.found: bytes | None = None
        self.told: list[tuple[str, bytes, Any]] = []

    @rule(oids=st.lists(st.sampled_from(OIDS), min_size=1, max_size=2, unique=True))
    def commit(self, oids: list[bytes]) -> None:
        self.number += 1
        self.current.update(dict.fromkeys(oids, tid(self.number)))
        self.unannounced.append((tid(self.number), oids))

    @precondition(lambda self: self.unannounced)
    @rule(own=st.booleans())
    def announce(self, own: bool) -> None:
        each, oids = self.unannounced.pop(0)
        self.outbox.announce(FRAME, each, oids)
        self.told.append(('finished' if own else 'invalidated', each, oids))

    @precondition(lambda self: self.load is None)
    @rule(of=st.sampled_from(OIDS))
    def mark(self, of: bytes) -> None:
        self.load, self.found = (of, self.outbox.published, False), None

    @precondition(lambda self: self.load is not None and self.found is None)
    @rule()
    def read(self) -> None:
        assert self.load is not None
        self.found = self.current[self.load[0]]

    @precondition(lambda self: self.load is not None and self.found is None)
    @rule()
    def fail(self) -> None:
        self.load = None

    @precondition(lambda self: self.found is not None)
    @rule(ahead=st.booleans())
    def reply(self, ahead: bool) -> None:
        assert self.load is not None and self.found is not None
        of, mark, watching = self.load
        outcome = self.outbox.reply_to_load(FRAME, mark, self.found, watching=watching, ahead=ahead)
        if outcome is Outcome.SENT:
            self.told.append(('current', self.found, of))
            assert ahead or self.found <= self.outbox.announced
            self.load = self.found = None
        else:
            assert outcome is not Outcome.AHEAD or not ahead
            self.load, self.found = (of, self.outbox.watch(of), True), None

    @invariant()
    def nothing_outdated_was_called_current(self) -> None:
        last: dict[bytes, bytes] = {}
        for what, each, oids in getattr(self, 'told', ()):
            if what == 'current':
                assert each >= last.get(oids, z64)
            else:
                last.update(dict.fromkeys(oids, each))


TestLoads = Loads.TestCase
TestLoads.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)


class NoMark(Loads):
    """The same without the protection."""

    @initialize()
    def start(self) -> None:
        super().start()

        class Unprotected(Outbox):
            def reply_to_load(self, frame: Any, mark: int, start: bytes, **kw: Any) -> Outcome:
                return super().reply_to_load(frame, self.published, start, **kw)

        self.outbox = Unprotected()


def test_the_machine_finds_out_if_there_is_no_mark() -> None:
    from hypothesis import Phase
    from hypothesis.stateful import run_state_machine_as_test
    with pytest.raises(AssertionError):
        run_state_machine_as_test(NoMark, settings=settings(  # type: ignore[no-untyped-call]
            max_examples=1000, stateful_step_count=30, deadline=None, database=None,
            derandomize=True, phases=[Phase.generate], print_blob=False))


def test_what_is_put_back_is_first_again() -> None:
    outbox = Outbox()
    outbox.append((b'abcdef', b'gh'))
    [part] = outbox.take(6)
    outbox.put_back(memoryview(part)[4:])
    assert outbox.backlog == 4
    assert b''.join(outbox.take()) == b'efgh' and outbox.backlog == 0
    outbox.end()
    outbox.put_back(b'x')
    assert outbox.backlog == 0 and outbox.take() == []
