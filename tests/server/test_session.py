"""One client's session: what each method does."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
from ZODB.FileStorage import FileStorage
from ZODB.interfaces import IStorage
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import POSKeyError
from ZODB.POSException import ReadOnlyError
from ZODB.POSException import Unsupported
from ZODB.utils import p64
from ZODB.utils import u64
from ZODB.utils import z64

from tests.server.talk import SessionPeer
from tests.server.talk import oid
from tests.server.talk import tid
from tests.system.servers import until
from zeo.errors import ProtocolError
from zeo.errors import ServerException
from zeo.server import session as module
from zeo.server.served import LOOK_UP
from zeo.server.served import Served
from zeo.wire.methods import METHODS
from zeo.wire.stores import HEAD

Serve = Callable[..., Served]
Connect = Callable[..., SessionPeer]


# ---- registering


def test_register_tells_the_last_tid(served: Served, connect: Connect) -> None:
    assert connect(served).registered == z64
    last = connect(served).commit(oid(1), b'record')
    assert connect(served).registered == last


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


# ---- object ids


def test_new_oids_are_never_given_twice(filed: SessionPeer) -> None:
    seen: set[bytes] = set()
    for args, count in [((), 100), ((5,), 5), ((0,), 1), ((-5,), 1), ((10**10,), 100), ((True,), 1)]:
        oids = filed.call('new_oids', *args)
        assert len(oids) == len(set(oids)) == count
        assert not seen & set(oids)
        seen.update(oids)


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
