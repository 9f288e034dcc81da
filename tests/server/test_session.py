"""One client's conversation: each method, each refusal, and what is not let through."""

import base64
import pickle
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from ZODB.FileStorage import FileStorage
from ZODB.interfaces import IStorage
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import POSKeyError
from ZODB.POSException import ReadOnlyError
from ZODB.POSException import StorageTransactionError
from ZODB.POSException import Unsupported
from ZODB.serialize import ObjectWriter
from ZODB.tests.MinPO import MinPO
from ZODB.utils import maxtid
from ZODB.utils import p64
from ZODB.utils import u64
from ZODB.utils import z64

from tests.server.talk import PATIENCE
from tests.server.talk import SessionPeer
from tests.server.talk import in_thread
from tests.server.talk import oid
from tests.server.talk import tid
from tests.system.servers import until
from zeo.errors import ProtocolError
from zeo.errors import ServerException
from zeo.server import jobs
from zeo.server import session as module
from zeo.server.limits import Allowance
from zeo.server.served import LOOK_UP
from zeo.server.served import Served
from zeo.wire.loads import load_request
from zeo.wire.messages import HEARTBEAT
from zeo.wire.methods import METHODS
from zeo.wire.stores import HEAD

Serve = Callable[..., Served]
Connect = Callable[..., SessionPeer]


@pytest.fixture
def served(serve: Serve) -> Served:
    return serve()


@pytest.fixture
def peer(connect: Connect, served: Served) -> SessionPeer:
    return connect(served)


@pytest.fixture
def filed(connect: Connect, serve: Serve, file_storage: FileStorage) -> SessionPeer:
    """A client of a FileStorage."""
    return connect(serve(file_storage))


def message(id: Any, flag: Any, name: Any, args: Any) -> bytes:
    return pickle.dumps((id, flag, name, args), 3)


# ---- registering


def test_register_tells_the_last_tid(served: Served, connect: Connect) -> None:
    assert connect(served).registered == z64
    last = connect(served).commit(oid(1), b'record')
    assert connect(served).registered == last


def test_nothing_but_register_is_done_before_it(served: Served, connect: Connect) -> None:
    for name in METHODS:
        if name != 'register':
            with pytest.raises(ProtocolError, match='cannot be called now'):
                connect(served, register=False).call(name, oid(1), maxtid)
    assert served.publisher.subscribers == []


def test_register_is_refused_with_a_reason_and_may_be_tried_again(
        serve: Serve, connect: Connect) -> None:
    served = serve(read_only=True)
    peer = connect(served, register=False)
    with pytest.raises(ServerException, match='ValueError: unknown storage: nobody'):
        peer.call('register', 'nobody', False)
    with pytest.raises(ServerException, match='unknown storage'):
        peer.call('register', [b'nobody'], False)
    with pytest.raises(ReadOnlyError):
        peer.call('register', '1', False)
    assert not peer.session.is_registered and served.publisher.subscribers == []
    assert peer.call('register', '1', True) == z64
    assert served.publisher.subscribers == [peer.outbox]


def test_register_as_a_notice_registers_and_a_refused_one_ends_the_connection(
        served: Served, connect: Connect) -> None:
    peer = connect(served, register=False)
    peer.tell('register', '1', False)
    assert peer.told == [] and peer.call('lastTransaction') == z64
    with pytest.raises(ProtocolError):
        connect(served, register=False).tell('register', 'nobody', False)


def test_a_second_register_is_refused(served: Served, peer: SessionPeer) -> None:
    with pytest.raises(ProtocolError):
        peer.call('register', '1', False)


def test_a_storage_may_be_served_under_two_names(serve: Serve, connect: Connect) -> None:
    served = serve()
    storages = {'one': served, 'two': served}
    one, two = connect(storages, 'one'), connect(storages, 'two')
    finished = one.commit(oid(1), b'record')
    assert two.invalidations() == [(finished, [oid(1)])]
    assert two.load(oid(1)) == (b'record', finished, None)


def test_a_storage_that_turns_read_only_refuses_writers_from_then_on(
        served: Served, connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one does that is itself a client, of a server that has fallen back."""
    connect(served)
    monkeypatch.setattr(served.storage, 'isReadOnly', lambda: True, raising=False)
    with pytest.raises(ReadOnlyError):
        connect(served)
    connect(served, read_only=True)


@pytest.mark.parametrize('name, args', [
    ('tpc_begin', (1, b'', b'', {})), ('commit', (1, True, b'', b'', b'', b'')), ('new_oids', ())])
def test_what_writes_is_refused_on_a_read_only_connection(
        served: Served, connect: Connect, name: str, args: tuple[Any, ...]) -> None:
    assert METHODS[name].writes
    peer = connect(served, read_only=True)
    with pytest.raises(ReadOnlyError):
        peer.call(name, *args)
    with pytest.raises(ProtocolError, match='ReadOnlyError'):
        peer.tell(name, *args)


def test_a_reader_stores_nothing(served: Served, connect: Connect) -> None:
    peer = connect(served, read_only=True)
    with pytest.raises(ProtocolError, match='StorageTransactionError'):
        peer.tell('stores', HEAD.pack(oid(1), z64, 6), b'record', 1)


def test_a_whole_transaction_that_wants_no_answer_holds_the_lock_no_longer_than_its_client(
        served: Served, peer: SessionPeer) -> None:
    peer.tell('commit', 1, True, b'', b'', HEAD.pack(oid(1), z64, 6), b'record')
    assert served.lock.holder is not None
    peer.session.close()
    assert served.lock.holder is None


def test_exactly_the_methods_that_begin_to_write_are_marked() -> None:
    """All others that change data need a transaction."""
    assert {name for name, method in METHODS.items() if method.writes} == {
        'tpc_begin', 'commit', 'new_oids'}


# ---- session


def test_get_info(filed: SessionPeer, file_storage: FileStorage) -> None:
    info = filed.call('get_info')
    assert info['length'] == 0
    assert info['size'] == file_storage.getSize()
    assert info['name'] == file_storage.getName()
    assert info['supportsUndo'] is True
    assert info['supports_record_iternext'] is True
    assert (IStorage.__module__, IStorage.__name__) in map(tuple, info['interfaces'])
    assert ('ZODB.interfaces', 'IStorageUndoable') in map(tuple, info['interfaces'])


def test_get_info_of_a_simple_storage(peer: SessionPeer) -> None:
    info = peer.call('get_info')
    assert info['supportsUndo'] is False
    assert info['supports_record_iternext'] is False


def test_last_transaction_is_what_was_announced(served: Served, connect: Connect) -> None:
    one, two = connect(served), connect(served)
    assert one.call('lastTransaction') == z64
    assert two.commit(oid(1), b'record') == one.call('lastTransaction')


def test_ping(peer: SessionPeer) -> None:
    assert peer.call('ping') is None


def test_a_label_is_part_of_the_name_in_the_log_and_harmless(
        peer: SessionPeer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level('INFO')
    peer.tell('set_client_label', 'nice\nFAKE line ' + 'x' * 1000)
    assert peer.session.client.startswith('the client (nice?FAKE line xxx')
    assert len(peer.session.client) < 200
    peer.tell('set_client_label', 'short')
    assert peer.session.client == 'the client (short)'
    assert not any('\n' in record.getMessage() for record in caplog.records)


def test_server_status(served: Served, peer: SessionPeer) -> None:
    finished = peer.commit(oid(1), b'record')
    peer.begin(2)
    peer.call('vote', 2)
    status = peer.call('server_status')
    expected = {
        'loads': 0, 'stores': 1, 'commits': 1, 'aborts': 0, 'conflicts': 0, 'conflicts_resolved': 0,
        'active_txns': 1, 'connections': 1, 'waiting': 0, 'last-transaction': finished.hex(),
        'timeout-thread-is-alive': 'stub'}
    assert expected == {key: status[key] for key in expected}
    assert isinstance(status['lock_time'], float) and isinstance(status['start'], str)


def test_the_clock_is_in_the_status(serve: Serve, connect: Connect) -> None:
    assert connect(serve(transaction_timeout=30)).call('server_status')['timeout-thread-is-alive'] is True


# ---- loading


def test_load_before(filed: SessionPeer) -> None:
    first = filed.commit(oid(1), b'one')
    second = filed.commit(oid(1), b'two')
    assert filed.load(oid(1)) == (b'two', second, None)
    assert filed.load(oid(1), second) == (b'one', first, second)
    assert filed.load(oid(1), first) is None
    with pytest.raises(POSKeyError) as caught:
        filed.load(oid(2))
    assert caught.value.args == (oid(2),)


@pytest.mark.parametrize('args', [
    (), (oid(1),), (oid(1), maxtid, 1), (b'abc', maxtid), (oid(1), b''), (1, maxtid), (oid(1), None),
    ('12345678', maxtid), ([], {})])
def test_a_load_that_makes_no_sense_is_refused_before_the_storage_sees_it(
        served: Served, peer: SessionPeer, args: tuple[Any, ...], caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.storage, 'loadBefore', lambda *_: pytest.fail('it was called'))
    with pytest.raises((ServerException, TypeError)):
        peer.call('loadBefore', *args)
    assert not [record for record in caplog.records if record.exc_info]


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


def test_load_serial_get_tid_and_history(filed: SessionPeer) -> None:
    first, second = filed.commit(oid(1), b'one'), filed.commit(oid(1), b'two')
    assert filed.call('loadSerial', oid(1), first) == b'one'
    assert filed.call('getTid', oid(1)) == second
    assert [entry['tid'] for entry in filed.call('history', oid(1))] == [second]
    entries = filed.call('history', oid(1), 10)
    assert [entry['tid'] for entry in entries] == [second, first]
    assert {'user_name', 'description', 'time', 'size'} <= entries[0].keys()
    for name, args in [('loadSerial', (oid(1), tid(1))), ('loadSerial', (oid(2), first)),
                       ('getTid', (oid(2),)), ('history', (oid(2),))]:
        with pytest.raises(POSKeyError):
            filed.call(name, *args)


def test_one_answer_tells_of_so_many_revisions(filed: SessionPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, 'MOST_ENTRIES', 3)
    tids = [filed.commit(oid(1), b'%d' % number) for number in range(6)]
    assert [each['tid'] for each in filed.call('history', oid(1), 2**60)] == tids[:2:-1]
    with pytest.raises(TypeError, match='at most 3 pairs'):
        filed.call('verify', bytes(16 * 4))


def test_record_iternext(filed: SessionPeer) -> None:
    committed = {each: filed.commit(oid(each), b'%d' % each) for each in range(3)}
    found, position = [], None
    while True:
        *record, position = filed.call('record_iternext', *([position] if position else []))
        found.append(tuple(record))
        if position is None:
            break
    assert found == [(oid(each), committed[each], b'%d' % each) for each in range(3)]


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


# ---- object ids


def test_new_oids_are_never_given_twice(filed: SessionPeer) -> None:
    seen: set[bytes] = set()
    for args, count in [((), 100), ((5,), 5), ((0,), 1), ((-5,), 1), ((10**10,), 100), ((True,), 1)]:
        oids = filed.call('new_oids', *args)
        assert len(oids) == len(set(oids)) == count
        assert not seen & set(oids)
        seen.update(oids)


# ---- what would damage the storage


@pytest.mark.parametrize('name, args', [
    ('storea', (b'abc', z64, b'record')), ('storea', (b'', z64, b'record')),
    ('storea', (b'123456789', z64, b'record')), ('storea', (1, z64, b'record')),
    ('storea', (oid(1), b'abc', b'record')), ('storea', (oid(1), 0, b'record')),
    ('storea', (oid(1), z64, 'text')), ('storea', (oid(1), z64, None)),
    ('storea', (oid(1), z64, b'')), ('storea', (b'\xff' * 8, z64, b'record')),
    ('storea', (b'\xff' * 4 + bytes(4), z64, b'record')), ('restorea', (b'\xff' * 8, tid(2), b'record', None)), ('restorea', (oid(1), tid(2), b'', None)),
    ('checkCurrentSerialInTransaction', (b'abc', z64)), ('checkCurrentSerialInTransaction', (oid(1), b'')),
    ('deleteObject', (b'abc', z64)), ('deleteObject', (oid(1), b'')), ('undoa', (5,)),
    ('stores', (HEAD.pack(oid(1), z64, 7), b'record')), ('stores', (HEAD.pack(oid(1), z64, 0), b'')),
    ('stores', (HEAD.pack(b'\xff' * 8, z64, 6), b'record')), ('stores', (oid(1) + z64, b'')), ('stores', (5, 'text')),
    ('restorea', (b'abc', tid(2), b'record', None)), ('restorea', (oid(1), b'', b'record', None)),
    ('restorea', (oid(1), tid(2), 'text', None)), ('restorea', (oid(1), tid(2), b'record', b''))])
def test_what_would_damage_the_storage_ends_the_connection(
        served: Served, peer: SessionPeer, name: str, args: tuple[Any, ...]) -> None:
    peer.begin(1)
    with pytest.raises(ProtocolError, match=name):
        peer.tell(name, *args, 1)
    peer.close()
    assert served.storage.calls == []


@pytest.mark.parametrize('user, heads, records', [
    (b'', HEAD.pack(oid(1), z64, 7), b'record'), (b'', HEAD.pack(oid(1), z64, 0), b''), (5, b'', b''),
    (b'', HEAD.pack(b'\xff' * 8, z64, 6), b'record'), (b'', b'x', b''), (b'', None, b'')])
def test_a_whole_transaction_that_would_damage_the_storage_is_refused_and_not_begun(
        served: Served, peer: SessionPeer, user: Any, heads: Any, records: Any) -> None:
    with pytest.raises((TypeError, ServerException)):
        peer.call('commit', 1, True, user, b'', heads, records)
    assert served.storage.calls == [] and served.active_txns == 0
    peer.commit(oid(1), b'record')


@pytest.mark.parametrize('args', [
    (b'', b'', {}, b'abc'), (b'', b'', {}, 5), (b'', b'', {}, None, ''), (b'', b'', {}, None, b' '),
    (b'', b'', {}, None, 'c'), (b'', b'', {}, None, 'u'), (b'', b'', {}, None, 'x'), (5, b'', {}),
    (b'', None, {}), (b'', b'', []), (b'', b'', None)])
def test_a_begin_that_makes_no_sense_ends_the_connection(
        peer: SessionPeer, args: tuple[Any, ...]) -> None:
    with pytest.raises(ProtocolError, match='tpc_begin'):
        peer.tell('tpc_begin', 1, *args)


# ---- undo, pack


def minimal(value: Any) -> bytes:
    """A record that a pack can read."""
    record: bytes = ObjectWriter().serialize(MinPO(value))
    return record


def test_undo_info_and_undo_log(filed: SessionPeer) -> None:
    filed.commit(oid(1), b'one')
    filed.commit(oid(1), b'two')
    log = filed.call('undoLog', 0, -10)
    assert len(log) == 2 and {'id', 'time', 'user_name', 'description'} <= log[0].keys()
    assert filed.call('undoInfo', 0, -10, None) == log
    assert filed.call('undoInfo', 0, -10, {'user_name': b'user'}) == log
    assert filed.call('undoInfo', 0, -10, {'user_name': b'somebody else'}) == []
    assert len(filed.call('undoInfo', 0, -1)) == len(filed.call('undoInfo', 0, 1)) == 1


def test_there_is_nothing_to_undo_in_a_storage_without_undo(peer: SessionPeer) -> None:
    assert peer.call('undoInfo', 0, -10, None) == [] == peer.call('undoLog', 0, -10)


def test_one_answer_tells_of_so_many_transactions(filed: SessionPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, 'MOST_ENTRIES', 3)
    tids = [filed.commit(oid(1), b'%d' % number) for number in range(6)]

    def told(name: str, *args: Any) -> list[bytes]:
        return [base64.decodebytes(each['id'] + b'\n') for each in filed.call(name, *args)]

    for name in 'undoLog', 'undoInfo':
        assert told(name, 0, -2) == tids[:3:-1]
        assert told(name, 0, -2**60) == told(name, 0, 2**60) == tids[:2:-1]
        assert told(name, 2, 2**60) == tids[3:0:-1]
    assert told('undoInfo', 0, -2, {'user_name': b'nobody'}) == []
    assert told('undoInfo', 0, -2, {'user_name': b'user'}) == tids[:3:-1]


def test_nobody_looks_for_what_nobody_wants_to_know_any_more(
        filed: SessionPeer, file_storage: FileStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(6):
        filed.commit(oid(1), b'%d' % number)
    asked, left, ended = [], threading.Event(), threading.Event()

    def undo_log(first: int, last: int, is_wanted: Any) -> Any:
        def leave(entry: Any) -> Any:
            asked.append(entry)
            assert left.wait(PATIENCE)
            return is_wanted(entry)
        try:
            return FileStorage.undoLog(file_storage, first, last, leave)
        finally:
            ended.set()

    monkeypatch.setattr(file_storage, 'undoLog', undo_log)
    filed.ask('undoInfo', 0, -10, {'user_name': b'nobody'})
    until(lambda: asked, 'it looks')
    filed.outbox.end()
    left.set()
    assert ended.wait(PATIENCE) and len(asked) == 1


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


def test_pack_and_everybody_is_told_the_size(filed: SessionPeer, connect: Connect) -> None:
    served = filed.session._served
    assert served is not None
    other = connect(served)
    filed.commit(oid(0), minimal(1))
    filed.commit(oid(0), minimal(2))
    assert len(filed.call('history', oid(0), 10)) == 2
    before = len(filed.notices('info'))
    assert filed.call('pack', time.time() + 10) is None
    assert len(filed.call('history', oid(0), 10)) == 1
    other.wait(lambda each: each[2] == 'info', 'the size')
    filed.wait(lambda _: len(filed.notices('info')) > before, 'the size')


def test_pack_without_waiting(served: Served, peer: SessionPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    packing = threading.Event()
    go_on = threading.Event()

    def pack(*_: Any) -> None:
        packing.set()
        assert go_on.wait(PATIENCE)

    monkeypatch.setattr(served.storage, 'pack', pack)
    assert peer.call('pack', 1.0, False) is None
    assert packing.wait(PATIENCE)
    peer.commit(oid(1), b'meanwhile')
    before = len(peer.notices('info'))
    go_on.set()
    peer.wait(lambda _: len(peer.notices('info')) > before, 'the size')


def test_pack_that_fails(
        served: Served, peer: SessionPeer, monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture) -> None:
    def pack(*_: Any) -> None:
        raise POSKeyError(oid(7))

    monkeypatch.setattr(served.storage, 'pack', pack)
    with pytest.raises(POSKeyError):
        peer.call('pack', 1.0)
    peer.call('pack', 1.0, False)  # nobody is told, so it is logged
    until(lambda: 'pack failed' in caplog.text, 'a line in the log')
    for nonsense in ('now', None, float('nan'), float('inf'), 10.0**300):
        with pytest.raises((ServerException, TypeError)):
            peer.call('pack', nonsense)


def test_pack_is_allowed_to_readers(served: Served, connect: Connect) -> None:
    assert connect(served, read_only=True).call('pack', time.time()) is None


# ---- iteration


def test_iteration_over_transactions_and_their_records(filed: SessionPeer) -> None:
    tids = [filed.commit(oid(each), b'%d' % each) for each in range(3)]
    iterator = filed.call('iterator_start', None, None)
    for each in range(3):
        found, status, user, description, extension = filed.call('iterator_next', iterator)
        assert (found, status, user, description, extension) == (
            tids[each], ' ', b'user', b'description', {})
        records = filed.call('iterator_record_start', iterator, found)
        assert filed.call('iterator_record_next', records) == (oid(each), found, b'%d' % each, None)
        assert filed.call('iterator_record_next', records) is None
        with pytest.raises(KeyError):
            filed.call('iterator_record_next', records)
    assert filed.call('iterator_next', iterator) is None
    with pytest.raises(KeyError) as caught:
        filed.call('iterator_next', iterator)
    assert caught.value.args == (iterator,)


def test_both_ends_of_an_iteration_are_inclusive(filed: SessionPeer) -> None:
    tids = [filed.commit(oid(each), b'%d' % each) for each in range(5)]
    iterator = filed.call('iterator_start', tids[1], tids[3])
    found = []
    while (transaction := filed.call('iterator_next', iterator)) is not None:
        found.append(transaction[0])
    assert found == tids[1:4]


def test_records_are_those_of_the_last_transaction(filed: SessionPeer) -> None:
    tids = [filed.commit(oid(each), b'%d' % each) for each in range(2)]
    iterator = filed.call('iterator_start', None, None)
    with pytest.raises(KeyError):
        filed.call('iterator_record_start', iterator, tids[0])
    filed.call('iterator_next', iterator)
    with pytest.raises(ServerException):
        filed.call('iterator_record_start', iterator, tids[1])
    records = filed.call('iterator_record_start', iterator, tids[0])
    for name, id in [('iterator_next', records), ('iterator_record_next', iterator),
                     ('iterator_next', 999), ('iterator_record_next', None)]:
        with pytest.raises(KeyError):
            filed.call(name, id)
    filed.tell('iterator_gc', [iterator, records, 12345])
    for name, id in [('iterator_next', iterator), ('iterator_record_next', records)]:
        with pytest.raises(KeyError):
            filed.call(name, id)


def test_iterators_end_with_the_connection(
        filed: SessionPeer, file_storage: FileStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    filed.commit(oid(1), b'record')
    made = []
    make = file_storage.iterator
    monkeypatch.setattr(file_storage, 'iterator', lambda *args: made.append(make(*args)) or made[-1])
    iterator = filed.call('iterator_start', None, None)
    filed.call('iterator_record_start', iterator, filed.call('iterator_next', iterator)[0])
    filed.close()
    assert made[0]._file is None


def test_all_clients_together_have_only_so_many_iterators(
        connect: Connect, serve: Serve, file_storage: FileStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    served, allowance = serve(file_storage), Allowance(2)
    one, two = connect(served), connect(served)
    one.commit(oid(1), b'record')
    for each in one, two:
        each.session._allowance = allowance
    iterators = [each.call('iterator_start', None, None) for each in (one, two)]
    for each in one, two:
        with pytest.raises(ServerException, match='2 iterators are in use, of all clients'):
            each.call('iterator_start', None, None)
    transaction = one.call('iterator_next', iterators[0])[0]
    one.call('iterator_record_start', iterators[0], transaction)  # has no file of its own
    one.tell('iterator_gc', [iterators[0], iterators[0], 77])
    with pytest.raises(ServerException):  # it cannot begin, and takes nothing
        monkeypatch.setattr(file_storage, 'iterator', lambda *_: 1 // 0)
        one.call('iterator_start', None, None)
    monkeypatch.undo()
    iterators[0] = one.call('iterator_start', None, None)
    while one.call('iterator_next', iterators[0]) is not None:
        pass
    two.close()
    assert allowance.take() and allowance.take() and not allowance.take()


def test_one_client_has_only_so_many_iterators(filed: SessionPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each holds a file open."""
    monkeypatch.setattr(module, 'ITERATORS', 3)
    iterators = [filed.call('iterator_start', None, None) for _ in range(3)]
    with pytest.raises(ServerException, match='3 iterators are in use'):
        filed.call('iterator_start', None, None)
    filed.tell('iterator_gc', iterators[:1])
    filed.call('iterator_start', None, None)


# ---- what a storage may not have


@pytest.mark.parametrize('name, args, method', [
    ('record_iternext', (), 'record_iternext'), ('iterator_start', (None, None), 'iterator')])
def test_what_the_storage_cannot_do_is_an_error_that_says_so(
        served: Served, peer: SessionPeer, name: str, args: tuple[Any, ...], method: str,
        monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    if method == 'iterator':
        monkeypatch.delattr(MappingStorage, 'iterator')
    with pytest.raises(Unsupported, match=f'the storage on the server has no {method}'):
        peer.call(name, *args)
    assert not [record for record in caplog.records if record.exc_info]


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


# ---- announcements that come late


def test_a_load_does_not_wait_for_an_announcement_for_ever(
        served: Served, peer: SessionPeer, monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(module, 'ANNOUNCEMENT_PATIENCE', .01)
    late = p64(u64(peer.commit(oid(1), b'record')) + 1)
    monkeypatch.setattr(served.storage, 'loadBefore', lambda *_: (b'news', late, None))
    assert peer.load(oid(1)) == (b'news', late, None)
    assert 'still not announced' in caplog.text


def test_a_load_is_not_done_again_and_again_while_others_commit(
        served: Served, peer: SessionPeer, connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    other = connect(served)
    peer.commit(oid(1), b'record')
    load = served.storage.loadBefore
    count = []

    def slow(*args: Any) -> Any:
        found = load(*args)
        count.append(1)
        other.commit(oid(2), b'%d' % len(count))
        return found

    monkeypatch.setattr(served.storage, 'loadBefore', slow)
    peer.load(oid(1))
    assert len(count) == 2


def test_verifying_ends_when_the_client_has_left(
        filed: SessionPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has asked for is kept until then."""
    asked: list[bytes] = []

    def get_tid(oid: bytes) -> bytes:
        asked.append(oid)
        filed.session.outbox.end()
        return z64

    monkeypatch.setattr(filed.session._storage, 'getTid', get_tid)
    filed.ask('verify', bytes(16 * 10_000))
    until(lambda: 'zeo verify' not in ' '.join(each.name for each in threading.enumerate()), 'it has ended')
    assert len(asked) == LOOK_UP


def test_verify_tells_what_is_outdated(filed: SessionPeer) -> None:
    first, second = filed.commit(oid(1), b'one'), filed.commit(oid(2), b'two')
    third = filed.commit(oid(1), b'three')
    revisions = [(oid(1), first), (oid(1), third), (oid(2), second), (oid(3), first)]
    answer = filed.call('verify', b''.join(a + b for a, b in revisions))
    assert answer == oid(1) + oid(3)
    with pytest.raises(TypeError):
        filed.call('verify', b'x' * 17)
