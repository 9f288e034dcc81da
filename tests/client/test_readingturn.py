"""The reading turn: who reads, who sleeps, who is woken, and the end."""

import signal
import socket
import threading
from collections.abc import Callable
from collections.abc import Iterator
from time import monotonic
from typing import Any

import pytest

from tests.client.conftest import Calls
from tests.client.conftest import Line
from tests.client.conftest import led
from tests.client.conftest import parked
from tests.client.conftest import told
from tests.client.interruptions import Interrupted
from tests.client.interruptions import Interruption
from tests.client.interruptions import everywhere
from tests.client.peer import PATIENCE
from tests.client.peer import Message
from tests.client.peer import oid
from tests.client.peer import tid
from tests.system.servers import until
from zeo.client import channel
from zeo.client import outgoing
from zeo.client import readingturn as module
from zeo.client.outgoing import Outgoing
from zeo.client.readingturn import LONGEST_TICK
from zeo.client.readingturn import SHORTEST_TICK
from zeo.client.readingturn import Prefetched
from zeo.client.readingturn import Request
from zeo.client.readingturn import Sleeper
from zeo.errors import ClientDisconnected
from zeo.errors import ClientStorageError
from zeo.wire.announcements import invalidation_notice
from zeo.wire.decoding import decode_from_client
from zeo.wire.framing import frame
from zeo.wire.messages import HEARTBEAT
from zeo.wire.messages import PULSE
from zeo.wire.messages import reply
from zeo.wire.replies import load_reply


@pytest.fixture
def interruption() -> Iterator[Any]:
    """A function by which another thread makes a signal handler raise in the main thread."""
    def handler(*_: Any) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGUSR1, handler)
    main = threading.main_thread().ident
    assert main is not None
    yield lambda: signal.pthread_kill(main, signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)


# ---- the reading turn: somebody reads while somebody waits


def test_a_leader_that_leaves_gives_the_turn_to_a_sleeper(line: Line, calls: Calls) -> None:
    first = calls.start(line.channel.call, 'first')
    first_message = line.peer.read('first')
    second = calls.start(line.channel.call, 'second')
    second_message = line.peer.read('second')
    parked(line, 1)
    line.peer.answer(first_message, 1)
    assert first() == 1
    line.peer.answer(second_message, 2)  # there is no watcher: only the sleeper can read it
    assert second() == 2


def test_a_leader_wakes_the_sleeper_whose_reply_it_reads(line: Line, calls: Calls) -> None:
    first = calls.start(line.channel.call, 'first')
    first_message = line.peer.read('first')
    second = calls.start(line.channel.call, 'second')
    second_message = line.peer.read('second')
    parked(line, 1)
    line.peer.answer(second_message, 2)
    assert second() == 2
    line.peer.answer(first_message, 1)
    assert first() == 1


def slow_to_park(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Who finds the turn taken sets the first of the events, and parks when the second is set."""
    found_taken, may_park = threading.Event(), threading.Event()

    class LateSleeper(Sleeper):
        def __init__(self) -> None:
            found_taken.set()
            assert may_park.wait(PATIENCE)
            super().__init__()

    monkeypatch.setattr(module, 'Sleeper', LateSleeper)
    return found_taken, may_park


def test_who_parks_just_when_the_leader_has_left_reads_itself(
        line: Line, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    """The leader frees the turn after the other found it taken, and before it has parked."""
    found_taken, may_park = slow_to_park(monkeypatch)
    first = calls.start(line.channel.call, 'first')
    first_message = line.peer.read('first')
    led(line)
    second = calls.start(line.channel.call, 'second')
    second_message = line.peer.read('second')
    assert found_taken.wait(PATIENCE)
    line.peer.answer(first_message, 1)
    assert first() == 1
    may_park.set()
    line.peer.answer(second_message, 2)
    assert second() == 2


def test_who_parks_just_when_its_reply_was_read_does_not_sleep(
        line: Line, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    found_taken, may_park = slow_to_park(monkeypatch)
    first = calls.start(line.channel.call, 'first')
    first_message = line.peer.read('first')
    led(line)
    second = calls.start(line.channel.call, 'second')
    second_message = line.peer.read('second')
    assert found_taken.wait(PATIENCE)
    line.peer.answer(second_message, 2)
    until(lambda: len(line.channel._requests) == 1, 'the second reply was dispatched')
    may_park.set()
    assert second() == 2
    line.peer.answer(first_message, 1)
    assert first() == 1


def test_who_parks_between_the_leaders_look_and_its_freeing_the_turn_is_not_forgotten(
        line: Line, calls: Calls) -> None:
    """The leader finds nobody parked; somebody parks and finds the turn taken; the leader frees it."""
    looked, may_free = threading.Event(), threading.Event()
    turn = line.channel._turn

    class SlowTurn:
        def acquire(self, *args: Any, **kw: Any) -> bool:
            return turn.acquire(*args, **kw)

        def release(self) -> None:
            looked.set()
            assert may_free.wait(PATIENCE)
            turn.release()

    line.channel._turn = SlowTurn()  # type: ignore[assignment]
    first = calls.start(line.channel.call, 'first')
    line.peer.answer(line.peer.read('first'), 1)
    assert looked.wait(PATIENCE)
    second = calls.start(line.channel.call, 'second')
    second_message = line.peer.read('second')
    parked(line, 1)
    may_free.set()
    assert first() == 1
    line.peer.answer(second_message, 2)
    assert second() == 2


def test_a_sleeper_may_be_interrupted_and_its_reply_still_has_its_effect(
        line: Line, calls: Calls, interruption: Any) -> None:
    first = calls.start(line.channel.call, 'first')
    first_message = line.peer.read('first')
    led(line)

    def interrupt() -> None:
        parked(line, 1)
        interruption()

    helper = calls.start(interrupt)
    effects: list[Any] = []
    with pytest.raises(Interrupted):
        line.channel.call('second', (), lambda key, result: effects.append(result))
    helper()
    assert not line.channel._parked
    line.peer.answer(line.peer.read('second'), 2)
    line.peer.answer(first_message, 1)
    assert first() == 1
    assert effects == [2]
    third = calls.start(line.channel.call, 'third')
    line.peer.answer(line.peer.read('third'), 3)
    assert third() == 3


def test_a_sleeper_interrupted_when_it_is_given_the_turn_passes_it_on(
        line: Line, calls: Calls, interruption: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    woken = threading.Event()

    class InterruptedSleeper(Sleeper):
        def wake(self) -> None:  # its entry was just removed, by somebody who gives it the turn
            assert self.given
            interruption()
            until(lambda: waiting, 'the sleeper waits for its waker')
            woken.set()
            super().wake()

        def await_waker(self) -> None:
            waiting.append(True)
            super().await_waker()

    waiting: list[bool] = []
    first = calls.start(line.channel.call, 'first')
    first_message = line.peer.read('first')
    led(line)
    third: list[Any] = []

    def go_on() -> None:
        parked(line, 1)
        line.peer.answer(first_message, 1)
        assert woken.wait(PATIENCE)

    monkeypatch.setattr(module, 'Sleeper', InterruptedSleeper)
    helper = calls.start(go_on)
    with pytest.raises(Interrupted):
        line.channel.call('second')
    helper()
    assert first() == 1
    monkeypatch.undo()
    third.append(calls.start(line.channel.call, 'third'))
    line.peer.read('second')
    line.peer.answer(line.peer.read('third'), 3)
    assert third[0]() == 3


def test_a_leader_that_is_interrupted_ends_the_connection_and_everybody_hears_of_it(
        line: Line, calls: Calls, interruption: Any, caplog: pytest.LogCaptureFixture) -> None:
    others: list[Any] = []

    def interrupt() -> None:
        line.peer.read('main')
        led(line)
        others.append(calls.start(line.channel.call, 'other'))
        line.peer.read('other')
        parked(line, 1)
        interruption()

    helper = calls.start(interrupt)
    with pytest.raises(Interrupted):
        line.channel.call('main')
    helper()
    with pytest.raises(ClientDisconnected):
        others[0]()
    assert not caplog.records  # a handler that calls sys.exit, as web servers have, is no error of ours


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, 'LAST_LOOK', .02)


class Story:
    """What happens on one line while the main thread works on it, and is interrupted."""

    def __init__(self, interruption: Interruption) -> None:
        self.interruption = interruption
        self.line, self.calls = Line(), Calls()

    def expect(self, *names: str) -> Message:
        """The client's next message; ConnectionError if it says nothing any more."""
        message = self.line.peer.read()
        if message.name not in names:
            raise ConnectionError(message.name)
        return message

    def park(self, number: int) -> None:
        until(lambda: len(self.line.channel._parked) == number or self.interruption.where, f'{number} sleepers')

    def tell(self, work: Callable[[], Any], answer: Callable[[], Any]) -> None:
        """Afterwards everybody has got an answer, or heard of the end, and nothing is left that could hold up anybody."""
        line, where = self.line, self.interruption.where

        def all_of_it() -> bool:
            try:
                answer()
            except ConnectionError:
                return False
            return True

        helper = self.calls.start(all_of_it)
        self.interruption.run(work)
        if line.channel.ended is None:
            line.channel.post('over')
            line.channel.flush()
        if not helper():
            line.channel.end('interrupted before all was said')
        for thread in self.calls.threads:
            thread.join(PATIENCE)
            assert not thread.is_alive(), where
        assert threading.get_ident() not in line.channel._inside, where
        assert not line.channel._outgoing._lock.locked(), where
        began = monotonic()
        line.close()
        assert monotonic() - began < module.LAST_READER / 2, where


def test_a_leader_may_be_interrupted_anywhere(impatient: None) -> None:
    """Also just when it was to wake somebody, or to give the turn to somebody."""
    for interruption in everywhere(module, channel, outgoing):
        story = Story(interruption)
        line, calls = story.line, story.calls

        def answer() -> None:
            first = story.expect('loadBefore')
            calls.start(line.channel.load, oid(1), tid(9))
            calls.start(line.channel.call, 'second')
            second = story.expect('second')
            calls.start(line.channel.call, 'third')
            third = story.expect('third')
            story.park(3)
            line.peer.send(reply(second.id, None))
            line.peer.send(load_reply(first.id, b'x', tid(1), None))
            line.peer.send(reply(third.id, None))

        story.tell(lambda: line.channel.load(oid(1), tid(9)), answer)


@pytest.mark.parametrize('given', [True, False])
def test_a_sleeper_may_be_interrupted_anywhere(impatient: None, given: bool) -> None:
    """Before, while or after it is given the turn, or its answer."""
    for interruption in everywhere(module, channel, outgoing):
        story = Story(interruption)
        line = story.line
        story.calls.start(line.channel.call, 'first')
        first = line.peer.read('first')
        led(line)
        story.calls.start(line.channel.call, 'second')
        second = line.peer.read('second')
        parked(line, 1)

        def answer() -> None:
            third = story.expect('third')
            story.park(2)
            for each in (first, second, third) if given else (first, third, second):
                line.peer.answer(each, None)

        story.tell(lambda: line.channel.call('third'), answer)


def test_who_sends_for_others_may_be_interrupted_anywhere(impatient: None) -> None:
    for interruption in everywhere(module, channel, outgoing):
        story = Story(interruption)
        line, calls = story.line, story.calls
        send = line.channel._outgoing._send

        def others_come(data: bytes, flags: int) -> int:
            if threading.current_thread() is threading.main_thread() and len(calls.threads) == 1:
                for name in 'second', 'third':
                    calls.start(line.channel.call, name)
                until(lambda: len(line.channel._outgoing._left) == 2, 'two leave their requests')
            return send(data, flags)

        line.channel._outgoing._send = others_come  # type: ignore[assignment]

        def answer() -> None:
            for _ in range(3):
                line.peer.answer(story.expect('first', 'second', 'third'), None)

        story.tell(lambda: line.channel.call('first'), answer)


def test_who_prefetches_and_then_loads_may_be_interrupted_anywhere(impatient: None) -> None:
    for interruption in everywhere(module, channel, outgoing):
        story = Story(interruption)
        line = story.line

        def answer() -> None:
            story.expect('prefetch')
            story.calls.start(line.channel.load, oid(2), tid(9))
            story.park(1)   # so both have joined
            line.peer.send(told(1, 2))

        def work() -> None:
            line.channel.prefetch([oid(1), oid(2)], tid(9), together=True)
            line.channel.load(oid(1), tid(9))

        story.tell(work, answer)


def test_who_posts_may_be_interrupted_anywhere(impatient: None) -> None:
    for interruption in everywhere(module, channel, outgoing):
        story = Story(interruption)
        line = story.line

        def answer() -> None:
            story.expect('short')
            story.expect('long')
            line.peer.answer(story.expect('last'), None)

        def work() -> None:
            line.channel.post('short', (b'x' * 20_000,))
            line.channel.post('long', (b'x' * 70_000,))
            line.channel.flush()
            line.channel.call('last')

        story.tell(work, answer)


def test_a_call_from_within_an_effect_raises_at_once(line: Line, calls: Calls) -> None:
    refusals: list[str] = []

    def effect(key: Any, result: Any) -> None:
        for forbidden in (line.channel.call, line.channel.post):
            try:
                forbidden('ping')
            except ClientStorageError as error:
                refusals.append(str(error))

    result = calls.start(line.channel.call, 'first', (), effect)
    line.peer.answer(line.peer.read('first'), 1)
    assert result() == 1
    assert len(refusals) == 2
    assert line.channel.ended is None


def test_a_call_by_a_signal_handler_that_interrupts_a_call_raises_at_once(
        line: Line, calls: Calls) -> None:
    refusals: list[BaseException] = []

    def handler(*_: Any) -> None:
        try:
            line.channel.call('ping')
        except ClientStorageError as error:
            refusals.append(error)

    def script() -> None:
        message = line.peer.read('main')
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGUSR1)
        until(lambda: refusals, 'the handler was refused')
        line.peer.answer(message, 1)

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        helper = calls.start(script)
        assert line.channel.call('main') == 1
        helper()
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_leader_deals_with_all_it_has_received_before_it_leaves(line: Line, calls: Calls) -> None:
    result = calls.start(line.channel.call, 'ping')
    message = line.peer.read()
    line.peer.send(reply(message.id, None), invalidation_notice(tid(2), [oid(1)]))
    result()
    assert line.heard == [('invalidate', tid(2), [oid(1)])]  # there is no watcher here


def test_half_a_message_left_by_a_leader_is_completed_by_the_watcher(watched: Line, calls: Calls) -> None:
    result = calls.start(watched.channel.call, 'ping')
    message = watched.peer.read()
    answer, = reply(message.id, None)
    news, = invalidation_notice(tid(2), [oid(1)])
    watched.peer.send((answer, news[:9]))
    result()
    watched.peer.send((news[9:],))
    until(lambda: watched.heard, 'the watcher has read it')


def test_the_watcher_reads_when_nobody_calls(watched: Line) -> None:
    watched.peer.send(invalidation_notice(tid(2), [oid(1)]))
    until(lambda: watched.heard == [('invalidate', tid(2), [oid(1)])], 'it was heard')


def test_the_watcher_looks_less_and_less_often_but_often_enough(line: Line) -> None:
    channel, ticks = line.channel, []

    class Bell:
        """Nobody rings it."""

        def acquire(self, timeout: float) -> bool:
            ticks.append(timeout)
            if len(ticks) == 10:
                channel._turn.release()
                channel.ended = 'over'
            return False

        def release(self) -> None:
            pass

    assert channel._turn.acquire(False)  # others read all the time
    channel._bell = Bell()  # type: ignore[assignment]
    channel.watch()
    assert ticks[:2] == [2 * SHORTEST_TICK, 4 * SHORTEST_TICK] and max(ticks) == ticks[-1] == LONGEST_TICK


def test_two_full_socket_buffers_are_no_deadlock(watched: Line, calls: Calls) -> None:
    """The server does not read before it has said a lot; the client sends a lot meanwhile."""
    for sock in watched.sock, watched.peer.sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    begun = threading.Event()

    def server() -> Any:
        assert begun.wait(PATIENCE)
        for n in range(2000):
            watched.peer.send(invalidation_notice(tid(n + 1), [oid(n)] * 10))
        message = watched.peer.read('large')
        watched.peer.answer(message, len(message.args[0]))

    serving = calls.start(server)
    result = calls.start(watched.channel.call, 'large', (bytes(3_000_000),))
    until(lambda: watched.channel._outgoing.stuck, 'the sender is stuck')
    begun.set()
    assert result() == 3_000_000
    serving()
    assert len(watched.heard) == 2000


def test_the_watcher_reads_for_a_stuck_sender_when_the_last_caller_has_left(
        line: Line, calls: Calls) -> None:
    """The same, but there is a caller that reads when the sender gets stuck, and then it leaves."""
    for sock in line.sock, line.peer.sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    first = calls.start(line.channel.call, 'first')
    message = line.peer.read('first')
    line.watch()
    large = calls.start(line.channel.call, 'large', (bytes(3_000_000),))
    until(lambda: line.channel._outgoing.stuck, 'the sender is stuck')
    line.peer.answer(message, 1)
    assert first() == 1
    for n in range(2000):
        line.peer.send(invalidation_notice(tid(n + 1), [oid(n)] * 10))
    message = line.peer.read('large')
    line.peer.answer(message, len(message.args[0]))
    assert large() == 3_000_000
    assert len(line.heard) == 2000


# ---- the end


@pytest.mark.parametrize('watching', [False, True])
def test_everybody_who_waits_hears_of_the_end(line: Line, calls: Calls, watching: bool) -> None:
    if watching:
        line.watch()
    results = [calls.start(line.channel.call, f'call{n}') for n in range(3)]
    results += [calls.start(line.channel.load, oid(1), tid(1)) for n in range(2)]
    for _ in range(4):
        line.peer.read()
    if watching:
        until(lambda: len(line.channel._parked) in (4, 5), 'all but a leader sleep')
    else:
        parked(line, 4)
    line.peer.close()
    for result in results:
        with pytest.raises(ClientDisconnected):
            result()


class Contended(dict[Any, Any]):
    """What is last in it is taken by another thread just now."""

    def popitem(self) -> Any:
        self.clear()
        return super().popitem()


def test_who_ends_the_connection_answers_what_nobody_else_does(line: Line) -> None:
    channel = line.channel
    channel._loads, channel._requests = Contended({(oid(1), tid(9)): Request(None)}), Contended({1: Request(None)})
    channel.end('over')
    dispatched, entered, asked = Request(None), Request(None), Prefetched(None)
    channel._loads = {(oid(2), tid(9)): dispatched, (oid(3), tid(9)): asked}  # the answer of the first is being read
    channel._requests = {}
    channel.end('again')
    assert asked.done and not dispatched.done
    assert channel._register(entered, 2) is entered and entered.done


def test_a_leader_that_leaves_frees_the_turn_if_its_sleeper_has_just_left(line: Line) -> None:
    channel = line.channel
    channel._parked = Contended({Sleeper(): True})
    assert channel._turn.acquire(False)
    channel._leave()
    assert not channel._turn.locked()


def test_a_call_that_is_entered_just_when_the_connection_ends_is_answered(
        line: Line, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everybody has been told, and nobody will read any more, when the request is entered."""
    encode = channel.encode_request

    def encode_and_end(*args: Any) -> Any:
        encoded = encode(*args)
        line.channel.end('just now')
        line.watch()
        line.watcher.join(PATIENCE)
        return encoded

    monkeypatch.setattr(channel, 'encode_request', encode_and_end)
    monkeypatch.setattr(Outgoing, 'send', lambda self, frame: None)  # nor does sending tell us
    result = calls.start(line.channel.call, 'ping')
    with pytest.raises(ClientDisconnected, match='just now'):
        result()


def test_sleepers_hear_of_the_end_although_the_leader_is_busy(line: Line, calls: Calls) -> None:
    busy, go_on = threading.Event(), threading.Event()

    def effect(key: Any, result: Any) -> None:
        busy.set()
        assert go_on.wait(PATIENCE)

    first = calls.start(line.channel.call, 'first', (), effect)
    message = line.peer.read('first')
    second = calls.start(line.channel.call, 'second')
    line.peer.read('second')
    parked(line, 1)
    line.peer.answer(message, 1)
    assert busy.wait(PATIENCE)
    line.channel.end('enough')
    with pytest.raises(ClientDisconnected, match='enough'):
        second()
    go_on.set()
    assert first() == 1


def test_a_sender_that_is_stuck_hears_of_the_end(watched: Line, calls: Calls) -> None:
    result = calls.start(watched.channel.call, 'large', (bytes(10_000_000),))
    until(lambda: watched.channel._outgoing.stuck, 'the sender is stuck')
    watched.channel.end('enough')
    with pytest.raises(ClientDisconnected, match='enough'):
        result()


def test_the_descriptor_is_not_closed_while_a_reader_is_busy(watched: Line, calls: Calls) -> None:
    busy, go_on = threading.Event(), threading.Event()

    def effect(key: Any, result: Any) -> None:
        busy.set()
        assert go_on.wait(PATIENCE)

    result = calls.start(watched.channel.call, 'first', (), effect)
    message = watched.peer.read('first')
    # Not before a caller reads it itself: the watcher cannot close what it is reading from.
    other = calls.start(watched.channel.call, 'other')
    other_message = watched.peer.read('other')
    watched.peer.answer(other_message, None)
    other()
    watched.peer.answer(message, None)
    assert busy.wait(PATIENCE)
    watched.channel.end('while it is busy')
    watched.watcher.join(0.1)
    assert watched.watcher.is_alive()
    assert watched.sock.fileno() != -1
    go_on.set()
    result()
    watched.watcher.join(PATIENCE)
    assert watched.sock.fileno() == -1


def test_after_the_end_no_effect_happens_any_more(line: Line, calls: Calls) -> None:
    def effect(key: Any, result: Any) -> None:
        line.channel.end('by this')

    result = calls.start(line.channel.call, 'first', (), effect)
    message = line.peer.read('first')
    line.peer.send(reply(message.id, 1), invalidation_notice(tid(1), [oid(1)]))
    assert result() == 1
    line.watch()
    line.watcher.join(PATIENCE)
    assert line.heard == []


def test_a_signal_handler_may_end_the_connection_that_its_thread_reads(
        watched: Line, calls: Calls) -> None:
    def script() -> None:
        watched.peer.read('main')
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, lambda *_: watched.channel.end('by a signal'))
    try:
        helper = calls.start(script)
        with pytest.raises(ClientDisconnected, match='by a signal'):
            watched.channel.call('main')
        helper()
    finally:
        signal.signal(signal.SIGUSR1, before)


# ---- a server that says nothing


def test_the_watcher_gives_a_sign_of_life_when_nothing_happens(
        line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, 'HEARTBEAT_INTERVAL', 0.05)
    line.channel.set_timeout(None)
    line.watch()
    for _ in range(3):
        while frame(payload := line.peer.payload()) != HEARTBEAT:  # type: ignore[arg-type]
            line.peer.send(reply(decode_from_client(payload)[0], None))  # it was a ping


@pytest.mark.parametrize('idle', [False, True])
def test_a_server_without_its_signs_of_life_is_taken_for_dead(
        line: Line, calls: Calls, monkeypatch: pytest.MonkeyPatch, idle: bool) -> None:
    monkeypatch.setattr(module, 'SILENCE', 0.1)
    line.channel.set_timeout(None, pulsing=True)
    if idle:
        line.watch()
        until(lambda: line.channel.ended is not None, 'the end is noticed')
    else:
        with pytest.raises(ClientDisconnected, match='no sign of life for 0.1 seconds'):
            calls.start(line.channel.call, 'ping')()
    assert 'no sign of life' in str(line.channel.ended)


def test_a_call_may_take_long_while_there_are_signs_of_life(
        line: Line, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, 'SILENCE', 2.0)
    line.channel.set_timeout(None, pulsing=True)
    result = calls.start(line.channel.call, 'vote')
    message = line.peer.read('vote')
    began = monotonic()

    def beat() -> bool:
        line.peer.send(PULSE)
        return monotonic() > began + 2.5

    until(beat, 'more time has passed than one silence may take')
    line.peer.answer(message, [])
    assert result() == []


def test_a_sender_is_not_stuck_for_ever_with_a_server_without_its_signs_of_life(
        line: Line, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, 'SILENCE', 0.1)
    line.channel.set_timeout(None, pulsing=True)
    line.watch()
    with pytest.raises(ClientDisconnected, match='no sign of life'):
        calls.start(line.channel.call, 'large', (bytes(10_000_000),))()


def test_a_server_that_gives_no_signs_of_life_is_asked_for_some(
        line: Line, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, 'HEARTBEAT_INTERVAL', 0.05)
    line.channel.set_timeout(None)
    result = calls.start(line.channel.call, 'vote')
    vote = line.peer.read('vote')
    for _ in range(2 * module.PATIENCE):
        line.peer.answer(line.peer.read('ping'), None)
    last = line.peer.read('ping')
    assert line.channel.ended is None
    with pytest.raises(ClientDisconnected, match='has not answered for 0.25 seconds'):
        result()
    assert line.peer.at_end()
    assert vote.id != last.id


def test_a_server_that_neither_reads_nor_gives_signs_of_life_is_given_up(
        line: Line, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, 'HEARTBEAT_INTERVAL', 0.02)
    line.channel.set_timeout(None)
    line.watch()
    # The sender finds it out, or, at about the same time, the watcher.
    with pytest.raises(ClientDisconnected, match='has read nothing for too long|has not answered for'):
        calls.start(line.channel.call, 'large', (bytes(10_000_000),))()
