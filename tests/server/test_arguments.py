"""Values that no client may pass, and those that would damage the storage."""

from typing import Any

import pytest
from ZODB.utils import maxtid
from ZODB.utils import z64

from tests.server.talk import SessionPeer
from tests.server.talk import oid
from tests.server.talk import tid
from zeo.errors import ProtocolError
from zeo.errors import ServerException
from zeo.server.served import Served
from zeo.wire.stores import HEAD


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
