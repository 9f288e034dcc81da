"""Storages that announce their transactions by themselves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ZODB.DemoStorage import DemoStorage
from ZODB.FileStorage import FileStorage
from ZODB.MappingStorage import MappingStorage
from ZODB.tests.hexstorage import HexStorage
from ZODB.utils import p64
from ZODB.utils import u64
from ZODB.utils import z64

from tests.server.talk import Announcing
from tests.server.talk import GatedStorage
from tests.server.talk import SessionPeer
from tests.server.talk import oid
from zeo.ClientStorage import ClientStorage
from zeo.server.announcing import announces_itself
from zeo.server.served import Served

Serve = Callable[..., Served]
Connect = Callable[..., SessionPeer]


@pytest.fixture
def storage() -> Announcing:
    return Announcing()


# ---- who announces itself


def test_who_announces_itself(tmp_path: Path) -> None:
    filed = FileStorage(str(tmp_path / 'Data.fs'))
    for silent in (MappingStorage(), filed, HexStorage(filed), DemoStorage(), GatedStorage(),
                   DemoStorage(base=MappingStorage()), object()):
        assert not announces_itself(silent)
    client = ClientStorage(('127.0.0.1', 9), wait=False)
    for loud in (Announcing(), HexStorage(Announcing()), client, DemoStorage(base=client)):
        assert announces_itself(loud)
    client.close()
    filed.close()


# ---- storages that announce themselves


def test_transactions_of_others_are_announced_to_everybody(
        serve: Serve, connect: Connect, storage: Announcing) -> None:
    served = serve(storage)
    one, two = connect(served), connect(served)
    committed = storage.somebody_commits(oid(1), oid(2))
    assert one.invalidations() == two.invalidations() == [(committed, [oid(1), oid(2)])]
    assert one.call('lastTransaction') == committed
    assert one.call('getInvalidations', z64) == (committed, [oid(1), oid(2)])


def test_the_reply_to_an_own_commit_is_at_its_place_among_them(
        serve: Serve, connect: Connect, storage: Announcing) -> None:
    served = serve(storage)
    peer, other = connect(served), connect(served)
    tids = []
    storage.between = lambda: tids.append(storage.somebody_commits(oid(2)))
    peer.begin(1, (oid(1), z64, b'record'))
    peer.call('vote', 1)
    finish = peer.ask('tpc_finish', 1)
    told = [(name, args) for number, _, name, args in peer.told
            if number == finish or name == 'invalidateTransaction']
    committed = told[0][1]
    assert told == [('.reply', committed), ('invalidateTransaction', (tids[0], [oid(2)]))]
    assert committed < tids[0]
    assert other.invalidations() == [(committed, [oid(1)]), (tids[0], [oid(2)])]


def test_a_storage_may_show_the_last_tid_to_the_thread_that_calls_back(
        serve: Serve, connect: Connect, storage: Announcing, monkeypatch: pytest.MonkeyPatch) -> None:
    """As clients of PyPI's ZEO do."""
    def tpc_finish(self: Announcing, transaction: Any, callback: Callable[[bytes], None]) -> bytes:
        self.shown = MappingStorage.tpc_finish(self, transaction)
        callback(self.shown)
        return self.shown

    monkeypatch.setattr(Announcing, 'tpc_finish', tpc_finish)
    served = serve(storage)
    peer, other = connect(served), connect(served)
    committed = peer.commit(oid(1), b'record')
    assert other.invalidations() == [(committed, [oid(1)])]


def test_a_storage_that_does_not_call_back_is_announced_all_the_same(
        serve: Serve, connect: Connect, storage: Announcing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Announcing, 'tpc_finish', lambda self, transaction, callback:
                        MappingStorage.tpc_finish(self, transaction))
    served = serve(storage)
    peer, other = connect(served), connect(served)
    committed = peer.commit(oid(1), b'record')
    assert other.invalidations() == [(committed, [oid(1)])]


def test_a_callback_after_the_storage_gave_up_waiting_is_announced_and_delivered(
        serve: Serve, connect: Connect, storage: Announcing, monkeypatch: pytest.MonkeyPatch) -> None:
    """The storage's own server has committed; its answer comes when nobody waits for it."""
    late: list[Any] = []

    def tpc_finish(self: Announcing, transaction: Any, callback: Callable[[bytes], None]) -> bytes:
        committed = MappingStorage.tpc_finish(self, transaction)
        late.append(lambda: callback(committed))
        raise OSError(110, 'timed out')

    served = serve(storage)
    peer = connect(served)
    peer.begin(1, (oid(1), z64, b'record'))
    peer.call('vote', 1)
    monkeypatch.setattr(Announcing, 'tpc_finish', tpc_finish)
    with pytest.raises(EOFError):
        peer.call('tpc_finish', 1)
    back = connect(served)
    late[0]()
    assert [oids for _, oids in back.invalidations()] == [[oid(1)]]
    assert served.lock.holder is None


def test_an_invalidated_cache_hangs_up_on_everybody_and_nothing_before_is_known(
        serve: Serve, connect: Connect, storage: Announcing) -> None:
    served = serve(storage)
    peer = connect(served)
    before = storage.somebody_commits(oid(1))
    storage.shown = after = p64(u64(before) + 5)
    storage.db.invalidateCache()
    peer.wait_for_end()
    back = connect(served)
    assert back.registered == after
    assert back.call('getInvalidations', before) is None


@pytest.mark.parametrize('event', [
    lambda peer, storage: peer.call('ping'),
    lambda peer, storage: peer.call('lastTransaction'),
    lambda peer, storage: peer.call('getInvalidations', z64),
    lambda peer, storage: storage.somebody_commits(oid(9)),
    lambda peer, storage: peer.commit(oid(9), b'record')],
    ids=['ping', 'lastTransaction', 'getInvalidations', 'commit of others', 'own commit'])
def test_a_last_tid_that_moves_after_the_cache_was_invalidated_is_not_overlooked(
        serve: Serve, connect: Connect, storage: Announcing,
        event: Callable[[SessionPeer, Announcing], Any]) -> None:
    """Who connects in between believes to be up to date as of the tid before."""
    served = serve(storage)
    before = storage.somebody_commits(oid(1))
    storage.db.invalidateCache()
    peer = connect(served)
    assert peer.registered == before
    storage.shown = after = p64(u64(before) + 5)
    try:
        event(peer, storage)
    except EOFError:
        pass
    peer.wait_for_end()
    back = connect(served)
    assert back.registered >= after
    assert back.call('getInvalidations', before) is None


def test_what_is_announced_while_the_server_starts_is_not_lost(
        serve: Serve, connect: Connect, storage: Announcing, monkeypatch: pytest.MonkeyPatch) -> None:
    last_transaction = Announcing.lastTransaction
    calls = []

    def meanwhile(self: Announcing) -> bytes:
        found = last_transaction(self)
        if not calls:
            calls.append(1)
            self.somebody_commits(oid(1))
        return found

    monkeypatch.setattr(Announcing, 'lastTransaction', meanwhile)
    served = serve(storage)
    assert connect(served).registered == storage.shown > z64
    assert served.publisher.since(z64) is None


def test_an_announcement_that_makes_no_sense_hangs_up_on_everybody(
        serve: Serve, connect: Connect, storage: Announcing) -> None:
    peer = connect(serve(storage))
    with pytest.raises(TypeError):
        storage.db.invalidate(None, [oid(1)])
    peer.wait_for_end()


def test_the_wrapper_is_one_that_storages_may_ask(serve: Serve, storage: Announcing) -> None:
    serve(storage)
    assert storage.db.references(b'N.N.') == []
    assert storage.db.transform_record_data(b'x') == b'x' == storage.db.untransform_record_data(b'x')
