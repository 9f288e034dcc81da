"""What is let through to a method, what is refused, how errors are told, and clients that do not read."""

import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
from ZODB.POSException import POSKeyError
from ZODB.POSException import StorageTransactionError
from ZODB.POSException import Unsupported
from ZODB.utils import maxtid
from ZODB.utils import z64

from tests.server.talk import PATIENCE
from tests.server.talk import SessionPeer
from tests.server.talk import in_thread
from tests.server.talk import oid
from tests.system.servers import until
from zeo.errors import ProtocolError
from zeo.errors import ServerException
from zeo.server import conversation as module
from zeo.server import jobs
from zeo.server.served import Served
from zeo.wire.loads import load_request
from zeo.wire.messages import HEARTBEAT
from zeo.wire.methods import METHODS
from zeo.wire.stores import HEAD

Connect = Callable[..., SessionPeer]


def message(id: Any, flag: Any, name: Any, args: Any) -> bytes:
    return pickle.dumps((id, flag, name, args), 3)


# ---- requests


def test_nothing_but_register_is_done_before_it(served: Served, connect: Connect) -> None:
    for name in METHODS:
        if name != 'register':
            with pytest.raises(ProtocolError, match='cannot be called now'):
                connect(served, register=False).call(name, oid(1), maxtid)
    assert served.publisher.subscribers == []


def test_the_id_of_a_request_is_whatever_the_client_likes(peer: SessionPeer) -> None:
    finished = peer.commit(oid(1), b'record')
    for id in (0, 7, -5, 2**40, (oid(1), maxtid), 'text', b'bytes', None, [1, [2]], 1.5):
        for flag in (False, 0, None):
            peer.told.clear()
            peer.session.outbox.take()
            peer.session.handle(message(id, flag, 'loadBefore', (oid(1), maxtid)))
            [part] = peer.session.outbox.take()
            assert pickle.loads(part[4:]) == (id, 0, '.reply', (b'record', finished, None))


def test_a_heartbeat_is_ignored_whatever_it_asks_for(served: Served, peer: SessionPeer) -> None:
    before = len(peer.told)
    peer.say(b''.join(HEARTBEAT)[4:])
    peer.say(message(-1, 0, 'loadBefore', (oid(1), maxtid)))
    peer.say(b''.join(load_request(-1, oid(1), maxtid))[4:])
    peer.say(message(-1, 0, 'ping', ()))
    peer.say(message(-1, 1, 'nonsense', ()))
    assert len(peer.told) == before


def test_everyday_errors_are_not_logged_and_others_without_a_traceback(
        filed: SessionPeer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level('INFO')
    caplog.clear()
    with pytest.raises(POSKeyError):
        filed.load(oid(9))
    assert caplog.records == []
    with pytest.raises(StorageTransactionError):
        filed.call('vote', 'line\nbreak')
    assert [record.exc_info for record in caplog.records] == [None]
    assert '\n' not in caplog.text.rstrip('\n')


def test_what_may_take_long_does_not_hold_up_its_own_client(
        served: Served, peer: SessionPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    monkeypatch.setattr(served.storage, 'supportsUndo', lambda: True, raising=False)
    for name in ('undoInfo', 'undoLog', 'pack'):
        monkeypatch.setattr(served.storage, name, lambda *_: gate.wait(PATIENCE) and [], raising=False)
    requests = [peer.ask('undoInfo', 0, -1), peer.ask('undoLog', 0, -1), peer.ask('pack', 1.0)]
    assert peer.call('ping') is None
    assert not any(each[0] in requests for each in peer.told)
    gate.set()
    assert [peer.answer(request) for request in requests] == [[], [], None]


def test_one_client_has_only_so_many_threads_and_all_its_requests_are_answered(
        served: Served, peer: SessionPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, 'HELPERS', 2)
    monkeypatch.setattr(jobs, 'MOST_JOBS', 10)
    gate, running, most = threading.Semaphore(0), [], []

    def slow(*_: Any) -> list[Any]:
        running.append(1)
        most.append(len(running))
        assert gate.acquire(timeout=PATIENCE)
        running.pop()
        return []

    monkeypatch.setattr(served.storage, 'supportsUndo', lambda: True, raising=False)
    monkeypatch.setattr(served.storage, 'undoLog', slow, raising=False)
    first = [peer.ask('undoLog', 0, -1) for _ in range(2)]
    until(lambda: len(running) == 2, 'both threads are at work')
    later = [peer.ask('undoLog', 0, -1) for _ in range(10)]
    with pytest.raises(ServerException, match='more than 10 requests'):
        peer.call('undoLog', 0, -1)
    for _ in range(12):
        gate.release()
    for request in first + later:
        assert peer.answer(request) == []
    assert max(most) == 2


def test_without_another_thread_a_request_is_refused_and_not_forgotten(
        served: Served, peer: SessionPeer, monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, 'start', start)
    with pytest.raises(ServerException, match="can't start new thread"):
        peer.call('verify', b'')
    assert not [record for record in caplog.records if record.exc_info]
    peer.commit(oid(1), b'record')  # this needs no new thread
    monkeypatch.undo()
    assert peer.call('verify', b'') == b''


# ---- messages that are none


@pytest.mark.parametrize('payload', [
    b'', b'nonsense', b'Z5', pickle.dumps(5), pickle.dumps((1, 2, 3)), message(1, 0, 5, ()),
    message(1, 0, 'ping', 5), message(1, 0, 'no_such_method', ()), message(1, 0, '__init__', ()),
    message(1, 0, 'handle', (b'',)), message(1, 0, 'close', ()), message(1, 0, 'outbox', ()),
    message(1, 0, '_load', (1, oid(1), maxtid)), message(1, 0, '.reply', None),
    message(0, 1, 'no_such_method', ())])
def test_whatever_is_not_a_message_or_not_a_method_ends_the_connection(
        peer: SessionPeer, payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        peer.say(payload)


@pytest.mark.parametrize('name', ['eval', 'exec', '__import__', 'getattr', 'open'])
def test_nothing_that_a_message_names_is_called(peer: SessionPeer, name: str, tmp_path: Any) -> None:
    """ZEO 6.2 takes anything from the module builtins."""
    path = str(tmp_path / 'made')
    expression = f"__import__('os').mkdir({path!r})"
    pickled = b'\x80\x03(K\x01\x89X\x04\x00\x00\x00pingcbuiltins\n%s\nX%s%s\x85R\x85t.' % (
        name.encode(), len(expression).to_bytes(4, 'little'), expression.encode())
    with pytest.raises(ProtocolError):
        peer.say(pickled)
    assert not (tmp_path / 'made').exists()


@pytest.mark.parametrize('name', [name for name in METHODS if name not in ('register', 'loadBefore')])
def test_a_wrong_number_of_arguments_is_an_error(peer: SessionPeer, name: str) -> None:
    method = METHODS[name]
    for count in {method.least - 1, method.most + 1} - {-1}:
        with pytest.raises(TypeError, match='arguments'):
            peer.call(name, *[oid(1)] * count)
        with pytest.raises(ProtocolError):
            peer.tell(name, *[oid(1)] * count)
    assert peer.call('ping') is None


@pytest.mark.parametrize('name', [
    name for name in METHODS if name not in ('register', 'set_client_label') and METHODS[name].most])
@pytest.mark.parametrize('nonsense', [None, 5, 'text', [], {}, 2**300, b'x' * 9, [[1], [2]]], ids=repr)
def test_arguments_that_make_no_sense_are_answered_or_refused(
        filed: SessionPeer, name: str, nonsense: Any, caplog: pytest.LogCaptureFixture) -> None:
    """No traceback in the log, no connection that does not answer any more."""
    try:
        filed.call(name, *[nonsense] * METHODS[name].most)
    except (ServerException, TypeError, KeyError, StorageTransactionError, Unsupported):
        pass
    filed.call('tpc_abort', nonsense)
    assert filed.call('ping') is None
    assert not [record.getMessage() for record in caplog.records if record.exc_info]


def test_everything_may_be_a_request_or_a_notice(served: Served, peer: SessionPeer) -> None:
    """The flag decides, not the name."""
    peer.call('tpc_begin', 1, b'', b'', {})
    peer.call('storea', oid(1), z64, b'record', 1)
    peer.tell('vote', 1)
    peer.tell('tpc_finish', 1)
    for name in ('ping', 'get_info', 'lastTransaction', 'new_oids', 'server_status'):
        peer.tell(name)
    peer.tell('loadBefore', oid(1), maxtid)
    peer.tell('tpc_abort', 1)
    assert served.storage.load(oid(1))[0] == b'record'
    assert [each[2] for each in peer.told].count('.reply') == 3  # with that to register


class Live:
    """An object that must not be touched."""

    def __repr__(self) -> str:
        raise AssertionError('it was shown')

    def __reduce__(self) -> Any:
        raise AssertionError('it was pickled')


def test_live_objects_in_an_error_are_not_sent_but_named(
        served: Served, peer: SessionPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    def vote(_: Any) -> None:
        raise StorageTransactionError(Live(), [oid(1), {'key': Live()}])

    monkeypatch.setattr(served.storage, 'tpc_vote', vote)
    peer.begin(1)
    with pytest.raises(StorageTransactionError) as caught:
        peer.call('vote', 1)
    live, rest = caught.value.args
    assert live == f'<{__name__}.Live>' and rest == [oid(1), {'key': live}]


def test_a_result_that_cannot_be_sent_is_an_error(
        served: Served, peer: SessionPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.storage, 'history', lambda *_: [Live()])
    with pytest.raises(ServerException, match="Couldn't pickle response"):
        peer.call('history', oid(1))
    assert peer.call('ping') is None


# ---- clients that do not read


def unread(peer: SessionPeer) -> None:
    """Let nothing be read from now on."""
    peer.outbox.deliver = lambda: None


def test_no_load_is_answered_while_too_much_is_unread(
        served: Served, peer: SessionPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, 'ROOM', 1000)
    peer.commit(oid(1), b'x' * 2000)
    unread(peer)
    for name, args in [('loadBefore', (oid(1), maxtid)), ('loadSerial', (oid(1), peer.serial(oid(1))))]:
        listen, peer._listen = peer._listen, lambda: None  # type: ignore[method-assign]
        peer.ask('loadBefore', oid(1), maxtid)
        asked = in_thread(peer.ask, name, *args)
        until(lambda: peer.outbox._waiting, 'it waits for room')
        assert peer.outbox.backlog < 3000
        peer._listen = listen  # type: ignore[method-assign]
        listen()
        asked.result(PATIENCE)


def test_who_reads_nothing_of_what_it_asked_for_is_given_up(
        served: Served, peer: SessionPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, 'ROOM', 1000)
    monkeypatch.setattr(module, 'ROOM_PATIENCE', .01)
    peer.commit(oid(1), b'x' * 2000)
    unread(peer)
    peer._listen = lambda: None  # type: ignore[method-assign]
    with pytest.raises(ProtocolError, match='does not read'):
        for _ in range(2):
            peer.ask('loadBefore', oid(1), maxtid)


def test_votes_and_finishes_never_wait_for_a_client_that_does_not_read(
        served: Served, peer: SessionPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, 'ROOM', 0)
    monkeypatch.setattr(module, 'ROOM_PATIENCE', PATIENCE)
    unread(peer)
    peer.outbox.append((b'x' * 1000,))
    peer._listen = lambda: None  # type: ignore[method-assign]
    peer.begin(1, (oid(1), z64, b'record'))
    peer.ask('vote', 1)
    peer.ask('tpc_finish', 1)
    peer.ask('tpc_abort', 1)
    assert len(served.storage) == 1


@pytest.mark.parametrize('name, args', [
    ('ping', ()), ('get_info', ()), ('new_oids', ()), ('tpc_begin', (5, b'', b'', {})), ('pack', ('soon',)),
    ('vote', (2,)), ('tpc_finish', (2,)), ('tpc_finish', (1,)), ('tpc_abort', (2,)),
    ('commit', (1, True, b'', b'', b'', b''))])
def test_whatever_is_asked_for_what_is_unread_is_limited(
        served: Served, connect: Connect, monkeypatch: pytest.MonkeyPatch, name: str, args: tuple[Any, ...]) -> None:
    monkeypatch.setattr(module, 'ROOM', 1000)
    monkeypatch.setattr(module, 'ROOM_PATIENCE', .01)
    peer = connect(served)
    peer.outbox.limit = 50_000
    unread(peer)
    peer._listen = lambda: None  # type: ignore[method-assign]
    peer.begin(1)
    with pytest.raises(ProtocolError, match='does not read'):
        for _ in range(10_000):
            peer.ask(name, *args)
    assert peer.outbox.backlog < 60_000


@pytest.mark.parametrize('name, args', [('vote', (1,)), ('commit', (1, True, b'', b'', b'', b''))])
def test_what_a_voted_transaction_is_asked_for_again_is_limited_too(
        peer: SessionPeer, monkeypatch: pytest.MonkeyPatch, name: str, args: tuple[Any, ...]) -> None:
    monkeypatch.setattr(module, 'ROOM', 1000)
    monkeypatch.setattr(module, 'ROOM_PATIENCE', .01)
    peer.begin(1)
    peer.call('vote', 1)
    unread(peer)
    peer.outbox.limit = 50_000
    peer._listen = lambda: None  # type: ignore[method-assign]
    with pytest.raises(ProtocolError, match='does not read'):
        for _ in range(10_000):
            peer.ask(name, *args)


def test_a_whole_transaction_does_not_wait_for_a_client_that_has_a_little_to_read(
        served: Served, peer: SessionPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    unread(peer)
    with monkeypatch.context() as context:
        context.setattr(module, 'ROOM', 1000)
        context.setattr(module, 'ROOM_PATIENCE', .01)
        context.setattr(peer, '_listen', lambda: None)
        peer.outbox.append((b'x' * 2000,))
        peer.ask('commit', 1, True, b'', b'', HEAD.pack(oid(1), z64, 6), b'record')
        assert served.lock.holder is not None
    peer.session.close()


@pytest.mark.parametrize('end', ['tpc_finish', 'tpc_abort'])
def test_what_ends_a_voted_transaction_waits_for_nobody(
        served: Served, peer: SessionPeer, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    peer.begin(1, (oid(1), z64, b'record'))
    peer.call('vote', 1)
    unread(peer)
    with monkeypatch.context() as context:
        context.setattr(module, 'ROOM', 1000)
        context.setattr(peer, '_listen', lambda: None)
        peer.outbox.append((b'x' * 20_000,))
        peer.outbox.limit = 10_000
        peer.ask(end, 1)
        assert served.lock.holder is None


def test_what_is_done_beside_waits_for_room_as_well(
        served: Served, connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, 'ROOM', 1000)
    monkeypatch.setattr(served.storage, 'supportsUndo', lambda: True, raising=False)
    gate = threading.Semaphore(0)
    monkeypatch.setattr(jobs, 'HELPERS', 1)
    monkeypatch.setattr(served.storage, 'undoLog', lambda *_: gate.acquire() and [b'x' * 2000], raising=False)
    peer = connect(served)
    requests = [peer.ask('undoLog') for _ in range(10)]
    listen = peer._listen
    unread(peer)
    peer._listen = lambda: None  # type: ignore[method-assign]
    for _ in requests:
        gate.release()
    until(lambda: peer.outbox._waiting, 'it waits for room')
    assert peer.outbox.backlog < 5000
    peer._listen = peer.outbox.deliver = listen  # type: ignore[method-assign]
    listen()
    assert [peer.answer(request) for request in requests] == [[b'x' * 2000]] * 10


def test_who_reads_nothing_of_what_was_done_beside_is_given_up(
        served: Served, peer: SessionPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, 'ROOM', 1000)
    monkeypatch.setattr(module, 'ROOM_PATIENCE', .01)
    unread(peer)
    with monkeypatch.context() as context:
        context.setattr(peer, '_listen', lambda: None)
        peer.outbox.append((b'x' * 2000,))
        peer.tell('pack', 1.0)  # which waits for room before it is begun
        until(lambda: peer.hung_up, 'it is disconnected')
    assert peer.outbox.condemned
