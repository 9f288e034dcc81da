"""One connection: who reads, who is woken, and in which order things happen."""

import signal
import socket
import threading
from collections.abc import Callable
from collections.abc import Iterator
from itertools import count
from time import monotonic
from pathlib import Path
from typing import Any

import pytest
from ZODB.POSException import POSKeyError
from ZODB.utils import z64

from tests.client.conftest import Calls
from tests.client.conftest import Line
from tests.client.interruptions import Interrupted
from tests.client.interruptions import Interruption
from tests.client.interruptions import everywhere
from tests.client.peer import PATIENCE
from tests.client.peer import Message
from tests.client.peer import oid
from tests.client.peer import tid
from tests.system.servers import until
from zeo.client import channel as module
from zeo.client import outgoing
from zeo.client.channel import Sleeper
from zeo.client.outgoing import Outgoing
from zeo.errors import ClientDisconnected
from zeo.errors import ClientStorageError
from zeo.errors import ProtocolError
from zeo.errors import ServerException
from zeo.wire.announcements import invalidation_notice
from zeo.wire.chunks import blob_chunk_notice
from zeo.wire.chunks import download_in
from zeo.wire.decoding import decode_from_client
from zeo.wire.framing import Frame
from zeo.wire.framing import frame
from zeo.wire.messages import HEARTBEAT
from zeo.wire.messages import PULSE
from zeo.wire.messages import notice
from zeo.wire.messages import reply
from zeo.wire.pieces import Destination
from zeo.wire.pieces import Passing
from zeo.wire.replies import load_reply
from zeo.wire.revisions import HEAD
from zeo.wire.revisions import MOST
from zeo.wire.revisions import prefetched_notice


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


def parked(line: Line, number: int) -> None:
    until(lambda: len(line.channel._parked) == number, f'{number} sleepers')


def led(line: Line) -> None:
    until(line.channel._turn.locked, 'somebody leads')


# ---- calls and replies


def test_a_call_returns_what_the_server_replies(line: Line, calls: Calls) -> None:
    result = calls.start(line.channel.call, 'getTid', (oid(1),))
    message = line.peer.read('getTid')
    assert message.args == (oid(1),)
    line.peer.answer(message, tid(7))
    assert result() == tid(7)


def test_what_can_be_done_meanwhile_is_done_when_the_server_has_the_request(line: Line, calls: Calls) -> None:
    def meanwhile() -> None:
        message = line.peer.read('getTid')
        line.peer.send(notice('invalidateTransaction', (tid(7), [])))
        line.peer.answer(message, tid(7))
        done.append(list(line.heard))

    done: list[Any] = []
    assert calls.start(line.channel.call, 'getTid', (oid(1),), None, meanwhile)() == tid(7)
    assert done == [[]] and line.heard


def test_who_fails_meanwhile_does_not_wait_and_nobody_gets_his_answer(line: Line, calls: Calls) -> None:
    def meanwhile() -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        calls.start(line.channel.call, 'getTid', (oid(1),), None, meanwhile)()
    with pytest.raises(ClientDisconnected):
        calls.start(line.channel.call, 'ping')()


def test_a_long_record_keeps_its_value_when_the_next_one_arrives(line: Line, calls: Calls) -> None:
    results = []
    for letter in b'a', b'b':
        result = calls.start(line.channel.load, oid(1), tid(9))
        message = line.peer.read('loadBefore')
        line.peer.send(load_reply(message.id, letter * 100_000, tid(7), None))
        results.append(result())
    assert [record for record, _, _ in results] == [b'a' * 100_000, b'b' * 100_000]


def test_an_error_reply_raises_and_leaves_the_connection_usable(line: Line, calls: Calls) -> None:
    result = calls.start(line.channel.call, 'getTid', (oid(1),))
    line.peer.refuse(line.peer.read(), POSKeyError(oid(1)))
    with pytest.raises(POSKeyError):
        result()
    result = calls.start(line.channel.call, 'ping')
    line.peer.refuse(line.peer.read(), ZeroDivisionError('oops'))
    with pytest.raises(ServerException, match='oops'):
        result()
    assert line.channel.ended is None


def test_replies_may_come_in_any_order(line: Line, calls: Calls) -> None:
    results = [calls.start(line.channel.call, 'getTid', (oid(n),)) for n in range(3)]
    messages = sorted((line.peer.read() for _ in results), key=lambda message: message.args[0])
    for message in reversed(messages):
        line.peer.answer(message, message.args[0])
    assert [result() for result in results] == [oid(0), oid(1), oid(2)]


def test_several_waiters_of_one_failed_load_get_an_exception_each(line: Line, calls: Calls) -> None:
    results = [calls.start(line.channel.load, oid(1), tid(9)) for _ in range(2)]
    parked(line, 1)
    line.peer.refuse(line.peer.read(), POSKeyError(oid(1)))
    errors = []
    for result in results:
        with pytest.raises(POSKeyError) as raised:
            result()
        errors.append(raised.value)
    assert errors[0] is not errors[1]


def test_a_message_that_cannot_be_decoded_ends_the_connection(line: Line, calls: Calls) -> None:
    """Nobody knows whose it is: those who wait may try again."""
    result = calls.start(line.channel.call, 'ping')
    line.peer.read()
    line.peer.send(frame(b'cos\nsystem\n.'))
    with pytest.raises(ClientDisconnected, match='lost: .*system'):
        result()
    assert line.peer.at_end()


def undecodable(message_id: bytes) -> tuple[bytes, ...]:
    good, = reply(message_id, 5)
    bad = good[4:].replace(b'K\x05', b'cdatetime\ndatetime\n')
    return frame(bad)  # type: ignore[return-value]


@pytest.mark.parametrize('before', [0, 254, 65534])
def test_an_answer_that_cannot_be_decoded_is_an_error_of_that_call_alone(
        line: Line, calls: Calls, before: int) -> None:
    line.channel._ids = count(before)
    result = calls.start(line.channel.call, 'undoLog')
    message = line.peer.read('undoLog')
    other = calls.start(line.channel.call, 'ping')
    ping = line.peer.read('ping')
    line.peer.send(undecodable(message.id))
    with pytest.raises(ProtocolError, match='datetime'):
        result()
    line.peer.answer(ping, 'there')
    assert other() == 'there'
    assert line.channel.ended is None


def test_an_answer_that_cannot_be_decoded_and_would_change_something_ends_the_connection(
        line: Line, calls: Calls) -> None:
    results = [calls.start(line.channel.call, 'tpc_finish', (1,), lambda key, tid: None),
               calls.start(line.channel.load, oid(1), tid(5))]
    messages = [line.peer.read(), line.peer.read()]
    finish = next(each for each in messages if each.name == 'tpc_finish')
    line.peer.send(undecodable(finish.id))
    with pytest.raises(ProtocolError, match='datetime'):
        results[0]()
    with pytest.raises(ClientDisconnected, match='datetime'):  # which may be tried again
        results[1]()
    assert line.peer.at_end()


def test_a_load_that_cannot_be_decoded_is_joined_by_nobody_any_more(line: Line, calls: Calls) -> None:
    result = calls.start(line.channel.load, oid(1), tid(5))
    line.peer.send(undecodable(line.peer.read('loadBefore').id))
    with pytest.raises(ProtocolError):
        result()
    assert not line.channel._loads and line.channel.ended is not None


@pytest.mark.parametrize('fault', [None, (), ('a', 'b', 'c')])
def test_an_error_reply_of_no_known_form_ends_the_call(line: Line, calls: Calls, fault: Any) -> None:
    result = calls.start(line.channel.call, 'ping')
    message = line.peer.read()
    good, = reply(message.id, fault)
    bad = good.replace(b'K\x00X', b'K\x02X')
    assert bad != good
    line.peer.send((bad,))
    with pytest.raises(ProtocolError):
        result()


def test_unknown_notices_and_replies_to_nobody_do_no_harm(line: Line, calls: Calls) -> None:
    result = calls.start(line.channel.call, 'ping')
    message = line.peer.read()
    line.peer.send(notice('receiveBlobStart', (1, 2)), reply(b'K\x63', 5), reply(message.id, 'there'))
    assert result() == 'there'


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
    for interruption in everywhere(module, outgoing):
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
    for interruption in everywhere(module, outgoing):
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
    for interruption in everywhere(module, outgoing):
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
    for interruption in everywhere(module, outgoing):
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
    for interruption in everywhere(module, outgoing):
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


def test_a_call_that_is_entered_just_when_the_connection_ends_is_answered(
        line: Line, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everybody has been told, and nobody will read any more, when the request is entered."""
    encode = module.encode_request

    def encode_and_end(*args: Any) -> Any:
        encoded = encode(*args)
        line.channel.end('just now')
        line.watch()
        line.watcher.join(PATIENCE)
        return encoded

    monkeypatch.setattr(module, 'encode_request', encode_and_end)
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


def test_an_effect_that_fails_raises_in_its_call_and_ends_the_connection(
        line: Line, calls: Calls, caplog: pytest.LogCaptureFixture) -> None:
    def effect(key: Any, result: Any) -> None:
        raise ZeroDivisionError('in the effect')

    other = calls.start(line.channel.call, 'other')
    line.peer.read('other')
    result = calls.start(line.channel.call, 'first', (), effect)
    message = line.peer.read('first')
    parked(line, 1)
    line.peer.answer(message, 1)
    with pytest.raises(ZeroDivisionError):
        result()
    with pytest.raises(ClientDisconnected):
        other()
    assert 'given up because of an error here' in caplog.text


# ---- effects, in wire order


def test_effects_happen_in_the_order_of_the_wire(line: Line, calls: Calls) -> None:
    loads = [calls.start(line.channel.load, oid(n), tid(9)) for n in (1, 2)]
    messages = sorted((line.peer.read('loadBefore') for _ in loads), key=lambda each: each.args)
    line.peer.send(
        load_reply(messages[0].id, b'one', tid(1), None),
        invalidation_notice(tid(2), [oid(1)]),
        load_reply(messages[1].id, b'two', tid(1), tid(2)),
        invalidation_notice(tid(3), [oid(2)]))
    assert loads[0]() == (b'one', tid(1), None)
    assert loads[1]() == (b'two', tid(1), tid(2))
    assert line.heard == [
        ('loaded', (oid(1), tid(9)), (b'one', tid(1), None)),
        ('invalidate', tid(2), [oid(1)]),
        ('loaded', (oid(2), tid(9)), (b'two', tid(1), tid(2))),
        ('invalidate', tid(3), [oid(2)])]


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


# ---- equal loads


def test_equal_loads_in_flight_are_one_request(line: Line, calls: Calls) -> None:
    results = [calls.start(line.channel.load, oid(1), tid(9)) for _ in range(3)]
    message = line.peer.read('loadBefore')
    parked(line, 2)
    line.peer.send(load_reply(message.id, b'data', tid(1), None))
    assert [result() for result in results] == [(b'data', tid(1), None)] * 3
    again = calls.start(line.channel.load, oid(1), tid(9))
    line.peer.send(load_reply(line.peer.read('loadBefore').id, b'data', tid(1), None))
    again()
    assert len(line.heard) == 2


def test_a_load_that_begins_after_an_invalidation_joins_no_answer_from_before_it(
        line: Line, calls: Calls) -> None:
    """At the invalidation, the answer that stood before it must have left the table of loads."""
    standing: list[dict[Any, Any]] = []
    line.channel.notices['invalidateTransaction'] = (
        lambda tid, oids: standing.append(dict(line.channel._loads)))
    result = calls.start(line.channel.load, oid(1), tid(9))
    message = line.peer.read('loadBefore')
    line.peer.send(load_reply(message.id, b'data', tid(1), None),
                   invalidation_notice(tid(2), [oid(1)]))
    result()
    assert standing == [{}]


def test_a_load_joins_the_prefetch_of_the_same_revision(line: Line, calls: Calls) -> None:
    line.channel.prefetch([oid(1), oid(2), oid(1)], tid(9))
    messages = [line.peer.read('loadBefore'), line.peer.read('loadBefore')]
    result = calls.start(line.channel.load, oid(2), tid(9))
    for message in messages:
        line.peer.send(load_reply(message.id, message.args[0], tid(1), None))
    assert result() == (oid(2), tid(1), None)
    assert [heard[1][0] for heard in line.heard] == [oid(1), oid(2)]


def test_what_was_prefetched_is_read_by_the_watcher_if_nobody_loads(watched: Line) -> None:
    watched.channel.prefetch([oid(n) for n in range(100)], tid(9))
    for _ in range(100):
        message = watched.peer.read('loadBefore')
        watched.peer.send(load_reply(message.id, b'data', tid(1), None))
    until(lambda: len(watched.heard) == 100, 'all are loaded')


# ---- many revisions in one message


def told(*numbers: int, untold: tuple[int, ...] = ()) -> Frame:
    """Of each object its revision before tid 9; of those that are untold, that one has to ask again."""
    return prefetched_notice(tid(9), [
        *(HEAD.pack(oid(number), tid(1), z64, 8) for number in numbers),
        *(HEAD.pack(oid(number), z64, z64, 0) for number in untold)], list(map(oid, numbers)))


def revision(number: int) -> tuple[bytes, bytes, None]:
    return oid(number), tid(1), None


def test_many_are_asked_for_in_one_message_and_told_in_any_number(watched: Line) -> None:
    numbers = range(MOST + 10)
    watched.channel.prefetch([oid(n) for n in numbers] + [oid(0)], tid(9), together=True)
    for some in numbers[:MOST], numbers[MOST:]:
        message = watched.peer.read('prefetch')
        assert message.oneway and message.args == (b''.join(map(oid, some)), tid(9))
    for some in numbers[:10], numbers[20:], numbers[10:20]:
        watched.peer.send(told(*some))
    until(lambda: len(watched.heard) == 3, 'all are loaded')
    assert watched.heard[2] == ('told', [(oid(n), revision(n)) for n in numbers[10:20]])
    assert not watched.channel._loads and not watched.channel._requests


def test_what_is_in_flight_is_not_asked_for_again(line: Line, calls: Calls) -> None:
    result = calls.start(line.channel.load, oid(1), tid(9))
    message = line.peer.read('loadBefore')
    line.channel.prefetch([oid(1), oid(2)], tid(9), together=True)
    line.channel.prefetch([oid(1), oid(2)], tid(9), together=True)
    line.channel.prefetch([oid(1), oid(2), oid(3)], tid(9), together=True)
    assert [line.peer.read('prefetch').args[0] for _ in range(2)] == [oid(2), oid(3)]
    line.peer.send(load_reply(message.id, *revision(1)), told(2, 3))
    assert result() == revision(1)


def test_a_load_joins_those_that_were_asked_for_together(line: Line, calls: Calls) -> None:
    line.channel.prefetch([oid(1), oid(2), oid(3)], tid(9), together=True)
    line.peer.read('prefetch')
    results = [calls.start(line.channel.load, oid(2), tid(9)) for _ in range(3)]
    parked(line, 2)
    line.peer.send(told(1, 2), told(3))
    assert [result() for result in results] == [revision(2)] * 3
    assert line.heard == [('told', [(oid(1), revision(1)), (oid(2), revision(2))]), ('told', [(oid(3), revision(3))])]


def test_what_is_not_told_is_asked_for_alone_by_who_wants_it(line: Line, calls: Calls) -> None:
    line.channel.prefetch([oid(1), oid(2), oid(3)], tid(9), together=True)
    line.peer.read('prefetch')
    results = [calls.start(line.channel.load, oid(2), tid(9)) for _ in range(2)]
    parked(line, 1)
    line.peer.send(told(1, untold=(2, 3)))
    message = line.peer.read('loadBefore')
    assert message.args == (oid(2), tid(9))
    parked(line, 1)  # the other one has joined that
    line.peer.refuse(message, POSKeyError(oid(2)))
    for result in results:
        with pytest.raises(POSKeyError):
            result()
    assert line.heard == [('told', [(oid(1), revision(1))])]


def test_a_load_after_an_invalidation_joins_nothing_that_was_told_before_it(line: Line, calls: Calls) -> None:
    standing: list[dict[Any, Any]] = []
    line.channel.notices['invalidateTransaction'] = (
        lambda tid, oids: standing.append(dict(line.channel._loads)) or line.heard.append('invalidated'))
    line.channel.prefetch([oid(1), oid(2)], tid(9), together=True)
    line.peer.read('prefetch')
    result = calls.start(line.channel.load, oid(2), tid(9))
    line.peer.send(told(1, 2), invalidation_notice(tid(2), [oid(1)]))
    assert result() == revision(2)
    assert standing == [{}] and line.heard[-1] == 'invalidated'


@pytest.mark.parametrize('asked', ['nothing', 'alone', 'as of another tid', 'before'])
def test_a_revision_that_was_not_asked_for_ends_the_connection(line: Line, calls: Calls, asked: str) -> None:
    if asked == 'alone':
        result = calls.start(line.channel.load, oid(1), tid(9))
        line.peer.read('loadBefore')
    else:
        if asked == 'as of another tid':
            line.channel.prefetch([oid(1)], tid(8), together=True)
        if asked == 'before':
            line.channel.prefetch([oid(1)], tid(9), together=True)
            line.peer.send(told(1))
        result = calls.start(line.channel.call, 'ping')
    line.peer.send(told(1))
    with pytest.raises(ClientDisconnected, match='nobody has asked for'):
        result()
    assert len(line.heard) == (asked == 'before')


@pytest.mark.parametrize('args', [(), (5,), (tid(9), b'short', b''), (tid(9), 'text', 5), ([], HEAD.pack(
    oid(1), tid(1), z64, 1), b'x'), (tid(9), HEAD.pack(oid(1), tid(1), z64, 9), b'x'), (tid(9), b'', b'', b'')])
def test_what_tells_no_revisions_ends_the_connection(line: Line, calls: Calls, args: Any) -> None:
    line.channel.prefetch([oid(1)], tid(9), together=True)
    result = calls.start(line.channel.load, oid(1), tid(9))
    line.peer.send(notice('prefetched', args))
    with pytest.raises(ClientDisconnected):
        result()
    assert not line.heard


def test_who_waits_for_one_of_many_is_told_when_the_connection_ends(line: Line, calls: Calls) -> None:
    line.channel.prefetch([oid(1), oid(2)], tid(9), together=True)
    results = [calls.start(line.channel.load, oid(n), tid(9)) for n in (1, 2, 2)]
    parked(line, 2)
    line.channel.end('enough')
    for result in results:
        with pytest.raises(ClientDisconnected, match='enough'):
            result()
    with pytest.raises(ClientDisconnected, match='enough'):
        line.channel.prefetch([oid(3)], tid(9), together=True)
    assert not line.channel._loads


def test_an_effect_that_fails_ends_the_connection_for_who_waits_for_one_of_many(line: Line, calls: Calls) -> None:
    def fail(revisions: Any) -> None:
        raise ProtocolError('oops')
    line.channel._told = fail
    line.channel.prefetch([oid(1), oid(2)], tid(9), together=True)
    results = [calls.start(line.channel.load, oid(n), tid(9)) for n in (1, 2, 2)]
    parked(line, 2)
    line.peer.send(told(1, 2))
    for result in results:
        with pytest.raises(ClientDisconnected):
            result()
    assert str(line.channel.ended) == 'oops'


@pytest.mark.parametrize('how', ['ended', 'failed effect', 'not asked for'])
def test_who_finds_one_of_many_and_comes_to_wait_when_all_is_over_does_not_wait(
        watched: Line, calls: Calls, how: str) -> None:
    def fail(revisions: Any) -> None:
        raise ProtocolError('oops')
    watched.channel._told = fail
    watched.channel.prefetch([oid(1)], tid(9), together=True)
    request = watched.channel._loads[oid(1), tid(9)]
    if how == 'ended':
        watched.channel.end('enough')
    else:
        watched.peer.send(told(1, *([2] if how == 'not asked for' else [])))
    until(lambda: not watched.watcher.is_alive(), 'the watcher has taken the turn for good')
    with pytest.raises(ClientDisconnected):
        calls.start(watched.channel._perform, request, 0, None)()


# ---- sending


def test_posted_messages_go_before_the_next_request_and_with_it(line: Line, calls: Calls) -> None:
    line.channel.post('tpc_begin', (1, b'', b'', {}))
    line.channel.post('storea', (oid(1), tid(1), b'data', 1))
    line.peer.sock.setblocking(False)
    with pytest.raises(BlockingIOError):
        line.peer.sock.recv(1)
    line.peer.sock.settimeout(PATIENCE)
    result = calls.start(line.channel.call, 'vote', (1,))
    assert [line.peer.read().name for _ in range(3)] == ['tpc_begin', 'storea', 'vote']
    line.channel.end('enough')
    with pytest.raises(ClientDisconnected):
        result()


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


def test_frames_of_several_threads_are_not_mixed(watched: Line, calls: Calls) -> None:
    data = bytes(500_000)
    results = [calls.start(watched.channel.call, 'echo', (n, data)) for n in range(4)]
    for _ in results:
        message = watched.peer.read('echo')
        assert message.args[1] == data
        watched.peer.answer(message, message.args[0])
    assert [result() for result in results] == [0, 1, 2, 3]


def test_the_watcher_gives_a_sign_of_life_when_nothing_happens(
        line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, 'HEARTBEAT_INTERVAL', 0.05)
    line.channel.set_timeout(None)
    line.watch()
    for _ in range(3):
        while frame(payload := line.peer.payload()) != HEARTBEAT:  # type: ignore[arg-type]
            line.peer.send(reply(decode_from_client(payload)[0], None))  # it was a ping


# ---- a server that says nothing


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


# ---- files


def test_a_message_from_a_file_is_one_among_others(line: Line, tmp_path: Path) -> None:
    (tmp_path / 'file').write_bytes(b'some data')
    with open(tmp_path / 'file', 'rb') as file:
        line.channel.post('before')
        line.channel.post_file((10).to_bytes(4, 'big') + b'<<<', file.fileno(), 5, 4, b'>>>')
        line.channel.post('after')
        line.channel.flush()
    assert line.peer.read('before')
    assert line.peer.payload() == b'<<<data>>>'
    assert line.peer.read('after')
    line.channel.end('that was all')
    with pytest.raises(ClientDisconnected, match='that was all'):
        line.channel.post_file(b'', 0, 0, 0, b'')


def test_data_of_long_messages_go_where_they_are_wanted_and_others_come_in_between(
        line: Line, calls: Calls, tmp_path: Path) -> None:
    destination = Destination(open(tmp_path / 'file', 'wb', buffering=0))

    def divert(beginning: memoryview, length: int) -> Passing | None:
        found = download_in(beginning, length)
        return None if found is None else Passing(*found[2:], destination, lambda error: None)

    heard: list[Any] = []
    line.channel.divert(divert)
    line.channel.notices = {'invalidateTransaction': lambda tid, oids: heard.append(tid)}
    loading = calls.start(line.channel.load, oid(1), tid(9))
    message = line.peer.read('loadBefore')
    for number in range(3):
        line.peer.sock.sendall(b''.join(blob_chunk_notice(oid(2), tid(1), b'%d' % number * 300_000)))
        line.peer.sock.sendall(b''.join(invalidation_notice(tid(number + 10), [oid(3)])))
    line.peer.answer(message, (b'record', tid(1), None))
    assert loading() == (b'record', tid(1), None)
    assert heard == [tid(10), tid(11), tid(12)]
    destination.close()
    assert (tmp_path / 'file').read_bytes() == b''.join(b'%d' % number * 300_000 for number in range(3))


def test_a_server_that_leaves_within_a_long_message_has_left(line: Line, calls: Calls, tmp_path: Path) -> None:
    destination = Destination(open(tmp_path / 'file', 'wb', buffering=0))
    line.channel.divert(lambda beginning, length: Passing(10, 100_000, b'', destination, lambda error: None))
    call = calls.start(line.channel.call, 'sendBlob', (oid(1), tid(1)))
    line.peer.read('sendBlob')
    line.peer.sock.sendall((200_000).to_bytes(4, 'big') + b'x' * 50_000)
    line.peer.close()
    with pytest.raises(ClientDisconnected, match='closed the connection'):
        call()
    destination.close()
