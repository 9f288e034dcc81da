"""One connection: calls, their answers, and in which order things happen."""

from itertools import count
from pathlib import Path
from typing import Any

import pytest
from ZODB.POSException import POSKeyError
from ZODB.utils import z64

from tests.client.conftest import Calls
from tests.client.conftest import Line
from tests.client.conftest import parked
from tests.client.conftest import told
from tests.client.peer import PATIENCE
from tests.client.peer import oid
from tests.client.peer import tid
from tests.system.servers import until
from zeo.client.outgoing import Outgoing
from zeo.errors import ClientDisconnected
from zeo.errors import ProtocolError
from zeo.errors import ServerException
from zeo.wire.announcements import invalidation_notice
from zeo.wire.chunks import blob_chunk_notice
from zeo.wire.chunks import download_in
from zeo.wire.framing import frame
from zeo.wire.messages import notice
from zeo.wire.messages import reply
from zeo.wire.pieces import Destination
from zeo.wire.pieces import Passing
from zeo.wire.replies import load_reply
from zeo.wire.revisions import HEAD
from zeo.wire.revisions import MOST


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


def test_what_could_not_be_asked_for_is_awaited_by_nobody(
        line: Line, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(Outgoing, 'send', no_memory)
        line.channel.prefetch([oid(1)], tid(9), together=True)
    with pytest.raises(ClientDisconnected):
        calls.start(line.channel.load, oid(1), tid(9))()


def test_what_is_in_flight_is_not_asked_for_again_singly(line: Line, calls: Calls) -> None:
    line.channel.prefetch([oid(1)], tid(9))
    line.channel.prefetch([oid(1), oid(2)], tid(9))
    result = calls.start(line.channel.load, oid(2), tid(9))
    assert [line.peer.read('loadBefore').args[0], (message := line.peer.read('loadBefore')).args[0]] == [oid(1), oid(2)]
    assert len(line.channel._requests) == 2  # or they would stay for ever
    line.peer.send(load_reply(message.id, b'two', tid(7), None))
    assert result() == (b'two', tid(7), None)
    calls.start(line.channel.post, 'over')()
    line.channel.flush()
    line.peer.read('over')


def test_nothing_can_be_posted_after_the_end(line: Line) -> None:
    line.channel.end('over')
    with pytest.raises(ClientDisconnected, match='over'):
        line.channel.post('tpc_begin')


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


def test_frames_of_several_threads_are_not_mixed(watched: Line, calls: Calls) -> None:
    data = bytes(500_000)
    results = [calls.start(watched.channel.call, 'echo', (n, data)) for n in range(4)]
    for _ in results:
        message = watched.peer.read('echo')
        assert message.args[1] == data
        watched.peer.answer(message, message.args[0])
    assert [result() for result in results] == [0, 1, 2, 3]


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
