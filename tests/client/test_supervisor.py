"""A verified connection: made, kept, lost, made again, and closed from any state."""

import itertools
import math
import random
import socket
import threading
import traceback
from collections.abc import Iterator
from typing import Any

import pytest
from ZODB.POSException import ReadOnlyError

from tests.client.conftest import Calls
from tests.client.conftest import Client
from tests.client.conftest import MakeClient
from tests.client.conftest import ready
from tests.client.peer import INFO
from tests.client.peer import PATIENCE
from tests.client.peer import Host
from tests.client.peer import Peer
from tests.client.peer import oid
from tests.client.peer import tid
from tests.system.servers import until
from zeo.client import supervisor as module
from zeo.client.dialing import NobodyListens
from zeo.client.link import Link
from zeo.client.supervisor import State
from zeo.client.supervisor import Supervisor
from zeo.client.verification import CacheIsNewer
from zeo.errors import ClientDisconnected
from zeo.errors import ClientStorageError
from zeo.wire.announcements import invalidation_notice


# ---- making a connection


def test_a_client_registers_asks_for_information_and_is_ready(
        client: MakeClient, host: Host, calls: Calls) -> None:
    one = client(host, label='me')
    link = calls.start(one.supervisor.wait)
    peer = host.accept()
    peer.greet()
    message = peer.read('register')
    assert message.args == ('1', False)
    assert one.supervisor.state is State.CONNECTING
    peer.answer(message, tid(5))
    assert peer.read('set_client_label').args == ('me',)
    message = peer.read('get_info')
    assert one.supervisor.state is State.VERIFYING
    peer.answer(message, INFO)
    assert link().info == INFO
    assert one.connected == [link()]
    assert one.supervisor.state is State.READY
    assert one.cache.last_tid == tid(5)


def test_a_server_older_than_the_cache_is_refused_with_both_tids(
        client: MakeClient, host: Host, calls: Calls) -> None:
    one = client(host, max_poll=60.0)
    one.known(tid(9))
    waiting = calls.start(one.supervisor.wait, 0.5)
    peer = host.accept()
    peer.welcome(tid(5))
    assert peer.at_end()
    with pytest.raises(CacheIsNewer) as raised:
        waiting()
    assert raised.value.cache_tid == tid(9)
    assert raised.value.server_tid == tid(5)
    assert one.cache.load(oid(1)) == (b'one', tid(1))


def test_the_next_server_is_tried_if_one_fails(
        client: MakeClient, host: Host, second_host: Host, calls: Calls) -> None:
    one = client(host, second_host)
    waiting = calls.start(one.supervisor.wait)
    peer = host.accept()
    peer.greet()
    peer.refuse(peer.read('register'), ValueError('unknown storage: 1'))
    second_host.accept().welcome(tid(5))
    assert waiting().address == second_host.address


# ---- losing it


def test_a_server_that_does_not_answer_does_not_hold_up_the_next_for_long(
        client: MakeClient, host: Host, second_host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, 'FIRST_PATIENCE', 0.1)
    one = client(host, second_host)
    one.supervisor.start()
    peer = host.accept()
    peer.greet()
    peer.read('register')
    second_host.accept().welcome(tid(5))
    assert one.supervisor.wait().address == second_host.address
    assert peer.at_end()


def test_servers_that_all_take_long_are_given_more_time(
        client: MakeClient, host: Host, second_host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float | None] = []
    set_timeout = module.Channel.set_timeout

    def noted(channel: Any, seconds: float | None, *args: Any) -> None:
        given.append(seconds)
        set_timeout(channel, None if seconds is None else 0.05, *args)

    monkeypatch.setattr(module.Channel, 'set_timeout', noted)
    one = client(host, second_host)
    one.supervisor.start()
    for _ in range(4):
        for each in host, second_host:
            peer = each.accept()
            peer.greet()
            peer.read('register')
            assert peer.at_end()
    assert [each for each in given if each != module.REPLY_PATIENCE][:6] == [5, 5, 10, 10, 20, 20]


def test_a_lost_connection_is_made_again_and_verified(client: MakeClient, host: Host) -> None:
    one = client(host)
    peer = ready(one, host)
    one.cache.store(oid(1), tid(1), None, b'one')
    peer.close()
    peer = host.accept()
    peer.welcome(tid(6))
    peer.answer(peer.read('getInvalidations'), (tid(6), [oid(1)]))
    one.supervisor.wait()
    assert one.cache.load(oid(1)) is None
    assert len(one.connected) == 2


def test_callers_wait_over_a_reconnection(client: MakeClient, host: Host, calls: Calls) -> None:
    one = client(host)
    peer = ready(one, host)
    peer.close()
    until(lambda: one.supervisor.link is None, 'the loss is noticed')
    waiting = calls.start(one.supervisor.wait)
    host.accept().welcome(tid(5))
    assert waiting() is one.connected[1]


def test_callers_do_not_wait_longer_than_agreed_and_hear_why(
        client: MakeClient, host: Host, calls: Calls) -> None:
    one = client(host, wait_timeout=0.3)
    waiting = calls.start(one.supervisor.wait)
    peer = host.accept()
    peer.greet()
    peer.refuse(peer.read('register'), ValueError('not today'))
    with pytest.raises(ClientStorageError, match='not today'):
        waiting()


def test_who_has_no_time_hears_whose_answer_is_missing(client: MakeClient, host: Host, second_host: Host) -> None:
    one = client(host, second_host)
    with pytest.raises(ClientDisconnected) as raised:
        one.supervisor.wait(0.01)  # they accept, and say nothing
    places = ', '.join(f'{name}:{port}' for name, port in (host.address, second_host.address))
    assert str(raised.value) == f'not connected to a server: no answer yet from {places}'


def test_callers_do_not_wait_for_a_storage_that_the_only_server_has_never_had(
        client: MakeClient, host: Host, calls: Calls) -> None:
    one = client(host, wait_timeout=1e6)
    waiting = calls.start(one.supervisor.wait)
    peer = host.accept()
    peer.greet()
    peer.refuse(peer.read('register'), ValueError('unknown storage: 1'))
    with pytest.raises(ClientStorageError, match=r'^the server at 127\.0\.0\.1:\d+ has no storage 1$'):
        waiting()
    # It is looked for all the same: who comes later may have more luck.
    peer = host.accept()
    peer.welcome(tid(5))
    until(lambda: one.supervisor.link is not None, 'the storage is there')


def test_callers_wait_for_a_storage_that_the_server_has_had(client: MakeClient, host: Host, calls: Calls) -> None:
    one = client(host)
    ready(one, host).close()
    until(lambda: one.supervisor.link is None, 'the loss is noticed')
    waiting = calls.start(one.supervisor.wait)
    peer = host.accept()
    peer.greet()
    peer.refuse(peer.read('register'), ValueError('unknown storage: 1'))
    host.accept().welcome(tid(5))
    assert waiting() is one.connected[1]


@pytest.mark.parametrize('seconds', [1e10, math.inf])
def test_callers_may_wait_as_long_as_they_like(
        client: MakeClient, host: Host, calls: Calls, seconds: float) -> None:
    one = client(host, wait_timeout=seconds)
    link = calls.start(one.supervisor.wait)
    host.accept().welcome(tid(5))
    assert link() is one.connected[0]


def test_pauses_may_be_as_long_as_anybody_likes(client: MakeClient, tmp_path: Any) -> None:
    one = client(str(tmp_path / 'nobody'), min_poll=1e100, max_poll=1e300)
    one.supervisor.start()
    until(lambda: one.supervisor.state is State.LOST, 'the first attempt has failed')
    assert one.supervisor._thread is not None and one.supervisor._thread.is_alive()


def test_each_caller_gets_an_error_of_its_own(client: MakeClient, host: Host, calls: Calls) -> None:
    """One that is raised again and again would keep the frames of all who ever got it."""
    one = client(host)
    one.known(tid(9))
    one.supervisor.start()
    host.accept().welcome(tid(5))
    until(lambda: one.supervisor._failure is not None, 'the server is refused')
    failures = []
    for _ in range(3):
        with pytest.raises(CacheIsNewer) as caught:
            one.supervisor.wait(0)
        failures.append(caught.value)
        assert (caught.value.cache_tid, caught.value.server_tid) == (tid(9), tid(5))
        assert len(list(traceback.walk_tb(caught.value.__traceback__))) < 5
    assert len(set(map(id, failures))) == 3 and len(set(map(str, failures))) == 1
    assert one.supervisor._failure.__traceback__ is None  # it would keep the frames of the attempt


def test_a_server_that_hangs_up_is_asked_less_and_less_often(
        client: MakeClient, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, 'uniform', lambda low, high: high)
    pauses: list[int] = []
    pause = Supervisor._pause
    monkeypatch.setattr(Supervisor, '_pause', lambda self, n: (pauses.append(n), pause(self, n))[1])
    one = client(host, min_poll=0.001)
    one.supervisor.start()
    for _ in range(3):
        host.accept().close()  # before the greeting
    for _ in range(3):
        peer = host.accept()
        peer.greet()
        peer.close()
    host.accept().welcome(tid(5))
    one.supervisor.wait()
    assert pauses == [0, 1, 2, 3, 4, 5]


def test_pauses_double_up_to_the_greatest_and_vary(
        client: MakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    one = client(1, min_poll=1.0, max_poll=5.0)
    waits: list[float] = []
    now = [0.0]

    def wait(timeout: float) -> bool:
        waits.append(timeout)
        now[0] += timeout
        return False

    monkeypatch.setattr(one.supervisor._changed, 'wait', wait)
    monkeypatch.setattr(module, 'monotonic', lambda: now[0])
    for n in range(5):
        one.supervisor._pause(n)
    for actual, expected in zip(waits, [1, 2, 4, 5, 5], strict=True):
        assert 0.75 * expected <= actual <= 1.25 * expected
    assert len(set(waits)) == 5
    waits.clear()
    one.supervisor._waiters = 1
    one.supervisor._pause(4)
    assert waits == [pytest.approx(module.WAITED_FOR)]


def test_a_client_may_begin_without_a_server(client: MakeClient, calls: Calls) -> None:
    with socket.socket() as sock:
        sock.bind(('127.0.0.1', 0))
        address = sock.getsockname()
    one = client(address)
    one.supervisor.start()
    until(lambda: one.supervisor.state is State.LOST, 'it has tried')
    waiting = calls.start(one.supervisor.wait)
    host = Host(address)
    host.accept().welcome(tid(5))
    waiting()
    host.close()


def test_new_addresses_are_tried_at_once(
        client: MakeClient, host: Host, calls: Calls, tmp_path: Any) -> None:
    one = client(str(tmp_path / 'nobody'), min_poll=1000.0, max_poll=1000.0)
    one.supervisor.start()
    until(lambda: one.supervisor.state is State.LOST, 'it has tried')
    one.supervisor.new_addresses([host.address])
    host.accept().welcome(tid(5))
    one.supervisor.wait()


def test_whoever_is_dispatching_may_not_wait_for_a_connection(
        client: MakeClient, host: Host, calls: Calls) -> None:
    one = client(host)
    errors: list[BaseException] = []

    def invalidate(tid: bytes, oids: Any) -> None:
        one.supervisor.link = None
        try:
            one.supervisor.wait()
        except ClientStorageError as error:
            errors.append(error)

    one.database.invalidate = invalidate  # type: ignore[method-assign]
    peer = ready(one, host)
    peer.send(invalidation_notice(tid(6), [oid(1)]))
    until(lambda: errors, 'it was refused')
    assert not isinstance(errors[0], ClientDisconnected)


# ---- closing


def test_closing_while_it_looks_for_a_server(client: MakeClient, host: Host, calls: Calls) -> None:
    one = client(host)
    waiting = calls.start(one.supervisor.wait)
    peer = host.accept()  # and never greet
    one.supervisor.close()
    assert one.supervisor._thread is not None
    assert not one.supervisor._thread.is_alive()
    with pytest.raises(ClientDisconnected, match='closed'):
        waiting()
    assert peer.at_end()


@pytest.mark.parametrize('last', ['register', 'get_info', 'getInvalidations'])
def test_closing_while_the_server_does_not_answer(
        client: MakeClient, host: Host, calls: Calls, last: str) -> None:
    one = client(host)
    one.known(tid(3))
    waiting = calls.start(one.supervisor.wait)
    peer = host.accept()
    peer.greet()
    for name, answer in ('register', tid(5)), ('get_info', INFO), ('getInvalidations', None):
        message = peer.read(name)
        if name == last:
            break
        peer.answer(message, answer)
    one.supervisor.close()
    with pytest.raises(ClientDisconnected, match='closed'):
        waiting()
    assert peer.at_end()


def test_closing_when_ready_ends_the_calls_in_flight(
        client: MakeClient, host: Host, calls: Calls) -> None:
    one = client(host)
    peer = ready(one, host)
    results = [calls.start(one.connected[0].channel.call, 'pack', (n,)) for n in range(3)]
    for _ in results:
        peer.read('pack')
    one.supervisor.close()
    for result in results:
        with pytest.raises(ClientDisconnected):
            result()
    assert peer.at_end()
    with pytest.raises(ClientDisconnected, match='closed'):
        one.supervisor.wait()


def test_closing_between_attempts(client: MakeClient, tmp_path: Any, calls: Calls) -> None:
    one = client(str(tmp_path / 'nobody'), min_poll=1000.0, max_poll=1000.0)
    one.supervisor.start()
    until(lambda: one.supervisor.state is State.LOST, 'it has tried')
    one.supervisor.close()
    assert one.supervisor.state is State.CLOSED


def test_closing_before_it_was_started(client: MakeClient, host: Host) -> None:
    one = client(host)
    one.supervisor.close()
    one.supervisor.start()
    with pytest.raises(ClientDisconnected):
        one.supervisor.wait()


def test_closing_waits_until_the_database_is_left_alone(
        client: MakeClient, host: Host, calls: Calls) -> None:
    one = client(host)
    busy, go_on = threading.Event(), threading.Event()

    def invalidate(tid: bytes, oids: Any) -> None:
        one.database.told.append('busy')
        busy.set()
        assert go_on.wait(PATIENCE)
        one.database.told.append('done')

    one.database.invalidate = invalidate  # type: ignore[method-assign]
    peer = ready(one, host)
    one.database.told.clear()
    peer.send(invalidation_notice(tid(6), [oid(1)]), invalidation_notice(tid(7), [oid(1)]))
    assert busy.wait(PATIENCE)
    closing = calls.start(one.supervisor.close)
    until(lambda: one.connected[0].channel.ended, 'closing has begun')
    assert calls.threads[-1].is_alive()
    go_on.set()
    closing()
    assert one.database.told == ['busy', 'done']


def test_closing_from_within_a_callback_does_not_wait_for_itself(
        client: MakeClient, host: Host) -> None:
    one = client(host)
    done = threading.Event()

    def invalidate(tid: bytes, oids: Any) -> None:
        one.supervisor.close()
        done.set()

    one.database.invalidate = invalidate  # type: ignore[method-assign]
    peer = ready(one, host)
    peer.send(invalidation_notice(tid(6), [oid(1)]))
    assert done.wait(PATIENCE)
    assert one.supervisor._thread is not None
    one.supervisor._thread.join(PATIENCE)


# ---- read-only servers


def refuse_writers(peer: Peer) -> None:
    peer.greet()
    message = peer.read('register')
    assert message.args[1] is False
    peer.refuse(message, ReadOnlyError())


def test_a_writing_client_does_not_take_a_read_only_server(
        client: MakeClient, host: Host, calls: Calls) -> None:
    one = client(host, wait_timeout=0.3, max_poll=60.0)
    waiting = calls.start(one.supervisor.wait)
    peer = host.accept()
    refuse_writers(peer)
    assert peer.at_end()
    with pytest.raises(ClientDisconnected) as raised:
        waiting()
    assert isinstance(raised.value.__cause__, ReadOnlyError)


def test_with_fallback_a_read_only_server_is_used_until_there_is_a_writable_one(
        client: MakeClient, host: Host, second_host: Host, calls: Calls) -> None:
    one = client(host, fallback=True)
    one.supervisor.start()
    peer = host.accept()
    refuse_writers(peer)
    message = peer.read('register')
    assert message.args[1] is True
    peer.answer(message, tid(5))
    peer.answer(peer.read('get_info'), INFO)
    assert one.supervisor.wait().read_only
    # It goes on looking, and it is refused again ...
    seeker = host.accept()
    refuse_writers(seeker)
    assert seeker.at_end()
    # ... until there is one that takes it.
    seeker = host.accept()
    seeker.greet()
    seeker.answer(seeker.read('register'), tid(6))
    seeker.answer(seeker.read('get_info'), INFO)
    seeker.answer(seeker.read('getInvalidations'), (tid(6), []))
    assert peer.at_end()
    until(lambda: len(one.connected) == 2, 'it has changed over')
    assert not one.supervisor.wait().read_only
    assert one.supervisor._seeker is None


def test_with_fallback_a_writable_server_is_preferred(
        client: MakeClient, host: Host, second_host: Host, calls: Calls) -> None:
    one = client(host, second_host, fallback=True)
    waiting = calls.start(one.supervisor.wait)
    peer = host.accept()
    refuse_writers(peer)
    peer.answer(peer.read('register'), tid(5))
    second_host.accept().welcome(tid(5))
    assert not waiting().read_only
    assert peer.at_end()


def test_closing_while_a_better_server_is_looked_for(client: MakeClient, host: Host) -> None:
    one = client(host, fallback=True)
    one.supervisor.start()
    peer = host.accept()
    refuse_writers(peer)
    peer.answer(peer.read('register'), tid(5))
    peer.answer(peer.read('get_info'), INFO)
    one.supervisor.wait()
    seeker = host.accept()
    seeker.greet()
    seeker.read('register')
    one.supervisor.close()
    assert seeker.at_end()
    assert peer.at_end()


def test_closing_does_not_wait_for_a_name_server(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answer = threading.Event(), threading.Event()

    def slow(*args: Any, **options: Any) -> Any:
        asked.set()
        assert answer.wait(PATIENCE)
        raise OSError('no such name')

    monkeypatch.setattr('zeo.client.dialing.socket.getaddrinfo', slow)
    monkeypatch.setattr('zeo.client.supervisor.JOIN', PATIENCE)
    one = Client(('nobody.example', 1))
    one.supervisor.start()
    assert asked.wait(PATIENCE)
    thread = one.supervisor._thread
    assert thread is not None
    one.supervisor.close()  # or it would wait for the answer, which comes later
    assert thread.is_alive()
    answer.set()
    thread.join(PATIENCE)
    one.close()


def test_a_connection_that_cannot_be_attended_for_lack_of_threads_is_ended_and_made_again(
        client: MakeClient, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = Supervisor._begin_to_seek
    failures = [RuntimeError("can't start new thread")]

    def begin_to_seek(self: Supervisor, link: Link) -> None:
        if failures:
            raise failures.pop()
        begin(self, link)

    monkeypatch.setattr(Supervisor, '_begin_to_seek', begin_to_seek)
    one = client(host)
    one.supervisor.start()
    first = host.accept()
    first.welcome(tid(5))
    assert first.at_end()
    second = host.accept()
    second.welcome(tid(5))
    one.supervisor.wait()


def test_each_reason_why_there_is_no_connection_is_logged_once(
        client: MakeClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    reasons = itertools.cycle(['one', 'two'])
    tried = []

    def dial(*args: Any) -> Iterator[None]:
        tried.append(next(reasons))
        raise ClientDisconnected(tried[-1])
        yield

    monkeypatch.setattr(module, 'dial', dial)
    client('/nowhere').supervisor.start()
    until(lambda: len(tried) > 6, 'it has tried often')
    assert [each.getMessage().rsplit(' ', 1)[1] for each in caplog.records
            if each.levelname == 'WARNING'] == ['one', 'two']


def test_nobody_is_warned_of_a_server_that_is_just_starting(
        client: MakeClient, host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    dial, rounds = module.dial, itertools.count(1)

    def late(*args: Any) -> Iterator[Any]:
        if next(rounds) <= module.EARLY:
            raise NobodyListens('no server answers')
        return dial(*args)

    monkeypatch.setattr(module, 'dial', late)
    one = client(host)
    one.supervisor.start()
    host.accept().welcome(tid(5))
    one.supervisor.wait()
    assert not caplog.records


def test_an_error_of_our_own_is_logged_with_its_traceback(
        client: MakeClient, host: Host, caplog: pytest.LogCaptureFixture) -> None:
    def connected(_: Link) -> None:
        raise RuntimeError('a mistake')

    one = client(host, connected=connected)
    one.supervisor.start()
    host.accept().welcome(tid(5))
    until(lambda: 'No connection to storage 1: a mistake' in caplog.text, 'it is logged')
    assert 'Traceback' in caplog.text and 'raise RuntimeError' in caplog.text


def test_reasons_that_are_always_new_do_not_fill_the_log_nor_the_memory(
        client: MakeClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    tried = itertools.count()

    def dial(*args: Any) -> Iterator[None]:
        raise ClientDisconnected(str(next(tried)))
        yield

    monkeypatch.setattr(module, 'dial', dial)
    made = client('/nowhere', max_poll=.01).supervisor
    made.start()
    until(lambda: next(tried) > 3 * module.MOST_REASONS, 'it has tried often')
    assert len([each for each in caplog.records if each.levelname == 'WARNING']) == module.MOST_REASONS
    assert len(made._told) == module.MOST_REASONS
