"""What was staged is done in the storage, in its order, unless it would damage it."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
from ZODB.POSException import ConflictError
from ZODB.POSException import Unsupported
from ZODB.utils import maxtid
from ZODB.utils import p64
from ZODB.utils import u64
from ZODB.utils import z64

from tests.server.talk import SessionPeer
from tests.server.talk import oid
from tests.server.talk import packed
from tests.server.talk import tid
from zeo.errors import ServerException
from zeo.server.replay import Replay
from zeo.server.served import Served
from zeo.server.staging import Staging

Serve = Callable[..., Served]
Connect = Callable[..., SessionPeer]


def test_operations_are_replayed_in_the_order_of_their_arrival(served: Served, peer: SessionPeer) -> None:
    peer.begin(1, (oid(1), z64, b'first'), (oid(1), z64, b'second'))
    peer.call('vote', 1)
    peer.call('tpc_finish', 1)
    assert served.storage.load(oid(1))[0] == b'second'


def test_a_vote_is_given_up_between_two_of_many_stores(served: Served, peer: SessionPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = []

    def store(oid: bytes, *_: Any) -> None:
        stored.append(oid)
        peer.session.tpc_abort(lambda result=None, error=None: None, 1)

    monkeypatch.setattr(served.storage, 'store', store, raising=False)
    peer.ask('commit', 1, True, b'', b'', *packed((oid(1), z64, b'one'), (oid(2), z64, b'two')))
    assert stored == [oid(1)] and served.lock.holder is None


def test_what_the_storage_cannot_do_is_an_error_that_says_so(served: Served, peer: SessionPeer) -> None:
    for name, args in [('deleteObject', (oid(1), z64)), ('undoa', (b'id',)),
                       ('restorea', (oid(1), tid(2), b'record', None))]:
        peer.begin(1, tid=tid(2)) if name == 'restorea' else peer.begin(1)
        peer.tell(name, *args, 1)
        with pytest.raises(Unsupported, match='the storage on the server has no'):
            peer.call('vote', 1)
    assert served.storage.calls.count('tpc_begin') == 2


@pytest.mark.parametrize('chosen, why', [
    (z64, 'not later'), (maxtid, 'no room'), (b'\xff' * 8, 'no room'), (b'\x7f\xff\xff\xff' + bytes(4), 'no room')])
def test_a_chosen_tid_that_would_damage_the_storage_is_refused(
        serve: Serve, connect: Connect, file_storage: Any, chosen: bytes, why: str) -> None:
    served = serve(file_storage)
    peer = connect(served)
    last = peer.commit(oid(1), b'record')
    for each in {chosen, last} if chosen == z64 else {chosen}:
        peer.begin(1, (oid(2), z64, b'two'), tid=each)
        with pytest.raises(ServerException, match=why):
            peer.call('vote', 1)
    assert file_storage.lastTransaction() == last
    assert peer.commit(oid(3), b'three') > last


def test_a_chosen_tid_is_the_transactions(serve: Serve, connect: Connect, file_storage: Any) -> None:
    peer = connect(serve(file_storage))
    chosen = p64(u64(peer.commit(oid(1), b'record')) + 1000)
    peer.begin(1, tid=chosen, status='p')
    peer.tell('restorea', oid(2), chosen, b'two', None, 1)
    peer.tell('restorea', oid(3), chosen, None, None, 1)
    peer.call('vote', 1)
    assert peer.call('tpc_finish', 1) == chosen
    assert peer.load(oid(2)) == (b'two', chosen, None)
    assert [each.status for each in file_storage.iterator(chosen)] == ['p']


@pytest.mark.parametrize('begin', [{}, {'tid': tid(7)}], ids=['no tid', 'another tid'])
def test_a_revision_is_restored_only_under_the_tid_of_its_transaction(
        serve: Serve, connect: Connect, file_storage: Any, begin: dict[str, bytes]) -> None:
    peer = connect(serve(file_storage))
    peer.begin(1, **begin)
    peer.tell('restorea', oid(2), tid(8), b'two', None, 1)
    with pytest.raises(ServerException, match='cannot be restored'):
        peer.call('vote', 1)


def test_restored_deleted_and_undone_objects_are_announced(
        serve: Serve, connect: Connect, file_storage: Any) -> None:
    """Other than in ZEO 6.2, where stale caches could remain."""
    served = serve(file_storage)
    peer, other = connect(served), connect(served)
    first = peer.commit(oid(1), b'one')
    second = peer.commit(oid(1), b'two', serial=first)
    peer.begin(1)
    peer.tell('undoa', peer.call('undoLog', 0, -1)[0]['id'], 1)
    assert peer.call('vote', 1) == [oid(1)]
    undone = peer.call('tpc_finish', 1)
    peer.begin(1)
    peer.tell('deleteObject', oid(1), undone, 1)
    peer.call('vote', 1)
    deleted = peer.call('tpc_finish', 1)
    restored = p64(u64(deleted) + 1)
    peer.begin(1, tid=restored)
    peer.tell('restorea', oid(1), restored, b'three', None, 1)
    peer.call('vote', 1)
    peer.call('tpc_finish', 1)
    assert other.invalidations() == [
        (each, [oid(1)]) for each in (first, second, undone, deleted, restored)]


def test_an_undo_of_many_objects_is_reported_without_looking_for_each_among_all(served: Served) -> None:
    replay = Replay(served, None, 1, None, ' ', False, Staging(), None)
    oids = list(map(oid, range(100_000)))
    replay._report(oids)
    replay._report([(oids[0], tid(1))])  # as older storages do
    assert list(replay.reported) == oids


def test_a_check_that_is_not_current_fails_the_vote(serve: Serve, connect: Connect, file_storage: Any) -> None:
    served = serve(file_storage)
    peer = connect(served)
    first = peer.commit(oid(1), b'one')
    peer.begin(1, (oid(2), z64, b'two'))
    peer.tell('checkCurrentSerialInTransaction', oid(1), first, 1)
    peer.call('vote', 1)
    second = peer.call('tpc_finish', 1)
    peer.commit(oid(1), b'changed', serial=first)
    peer.begin(1, (oid(2), second, b'three'))
    peer.tell('checkCurrentSerialInTransaction', oid(1), first, 1)
    with pytest.raises(ConflictError) as caught:
        peer.call('vote', 1)
    assert caught.value.oid == oid(1)


def test_a_record_in_a_conflict_is_not_looked_into(serve: Serve, connect: Connect, file_storage: Any) -> None:
    """The error that ZODB makes of it would unpickle it to name its class."""
    ran = threading.Event()
    global effect
    effect = ran.set
    peer = connect(serve(file_storage, client_conflict_resolution=True))
    record = b'\x80\x03N0ctests.server.test_replay\neffect\n)R.' + b'N.'
    first = peer.commit(oid(1), b'one')
    peer.commit(oid(1), b'two', serial=first)
    peer.begin(1, (oid(1), first, record))
    [conflict] = peer.call('vote', 1)
    assert conflict['data'] == record
    assert not ran.is_set()


effect: Callable[[], None]
