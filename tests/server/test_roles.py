"""zeo.server.roles: who may do what, and what is told of it."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ZODB.FileStorage import FileStorage
from ZODB.POSException import ReadOnlyError

from tests.server.talk import SessionPeer
from tests.server.talk import oid
from zeo.errors import ServerException
from zeo.server.roles import Role
from zeo.server.roles import Roles
from zeo.server.roles import Rule
from zeo.server.served import Served
from zeo.server.values import Wrong
from zeo.server.values import role

HERE = ('127.0.0.1', 9999)


@pytest.mark.parametrize('text, address, certificate, found', [
    ('read=9999', HERE, None, Role.READ),
    ('write=:9999', HERE, None, Role.WRITE),
    ('admin=127.0.0.1:9999', HERE, None, Role.ADMIN),
    ('admin=localhost:9999', HERE, None, Role.ADMIN),
    ('admin=localhost:9999', ('::1', 9999), None, Role.ADMIN),
    ('admin=[::1]:9999', ('::1', 9999), None, Role.ADMIN),
    ('admin=127.0.0.2:9999', HERE, None, Role.NOTHING),
    ('admin=localhost:9999', ('10.0.0.1', 9999), None, Role.NOTHING),
    ('admin=9998', HERE, None, Role.NOTHING),
    ('admin=9999', '/run/zeo.sock', None, Role.NOTHING),
    ('admin=9999', None, None, Role.NOTHING),
    ('admin=/run/zeo.sock', '/run/zeo.sock', None, Role.ADMIN),
    ('admin=/run/zeo.sock', '/run/other.sock', None, Role.NOTHING),
    ('admin=./zeo.sock', 'zeo.sock', None, Role.ADMIN),
    ('admin=/run/zeo.sock', HERE, None, Role.NOTHING),
    ('write=cn:shop', HERE, 'shop', Role.WRITE),
    ('write=cn:shop', '/run/zeo.sock', 'shop', Role.WRITE),
    ('write=cn:shop', HERE, 'Shop', Role.NOTHING),
    ('write=cn:shop', HERE, None, Role.NOTHING),
    ('write=cn:a b=c', HERE, 'a b=c', Role.WRITE),
])
def test_a_rule_holds_for_an_address_or_a_certificate(
        text: str, address: Any, certificate: str | None, found: Role) -> None:
    assert Roles([role(text)]).of(address, certificate) is found


def test_the_highest_role_counts_and_without_rules_everybody_is_an_admin() -> None:
    roles = Roles([Rule(Role.READ, port=1), Rule(Role.ADMIN, certificate='ops'), Rule(Role.WRITE, port=2)])
    assert roles.of(('::', 1), None) is Role.READ
    assert roles.of(('::', 1), 'ops') is Role.ADMIN
    assert roles.of(('::', 2), 'someone') is Role.WRITE
    assert Roles().of(None, None) is Role.ADMIN


@pytest.mark.parametrize('text', ['', 'read', 'read=', '=9999', 'boss=9999', 'read=cn:', 'read=nowhere',
                                  'read=1:2:3', 'READ=9999'])
def test_what_is_no_rule_is_refused(text: str) -> None:
    with pytest.raises(Wrong):
        role(text)


# ---- in a session


class Audited:
    def __init__(self, served: Served, connect: Callable[..., SessionPeer], caplog: Any) -> None:
        self._served, self._connect, self._caplog = served, connect, caplog
        caplog.set_level('INFO', 'zeo.audit')

    def peer(self, as_role: str | None = None, certificate: str | None = None) -> SessionPeer:
        peer = self._connect(self._served, register=False)
        peer.session._roles = Roles([role(f'{as_role or "read"}=cn:{certificate}')] if certificate else [])
        peer.session.certificate_name = certificate
        return peer

    def lines(self) -> list[str]:
        return [record.getMessage() for record in self._caplog.records if record.name == 'zeo.audit']


@pytest.fixture
def audited(serve: Any, connect: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Audited:
    return Audited(serve(FileStorage(str(tmp_path / 'Data.fs'))), connect, caplog)


def undo(peer: SessionPeer) -> bytes:
    """The last transaction."""
    [last, *_] = peer.call('undoLog', 0, 1)
    peer.begin(7)
    peer.tell('undoa', last['id'], 7)
    peer.call('vote', 7)
    tid: bytes = peer.call('tpc_finish', 7)
    return tid


@pytest.mark.parametrize('as_role, certificate', [(None, None), ('admin', 'ops')])
def test_packs_and_undos_are_told(audited: Audited, as_role: str | None, certificate: str | None) -> None:
    peer = audited.peer(as_role, certificate)
    peer.call('register', '1', False)
    peer.tell('set_client_label', 'desk')
    peer.commit(oid(1), b'one')
    peer.commit(oid(1), b'two')
    tid = undo(peer)
    peer.call('pack', 0.0)
    with pytest.raises(Exception, match='a number of seconds'):
        peer.call('pack', -1.0)
    who = 'the client' + (f', certificate {certificate}' if certificate else '') + ' (desk)'
    undone, packed = audited.lines()
    assert undone == f'{who}: storage 1: undo: committed as {tid.hex()}'
    assert packed.startswith(f'{who}: storage 1: pack as of 1970-01-01') and packed.endswith(': done')


def test_what_fails_is_told_as_well(audited: Audited) -> None:
    peer = audited.peer()
    peer.call('register', '1', False)
    tid = peer.commit(oid(1), b'one')
    [last] = peer.call('undoLog', 0, 1)
    peer.commit(oid(1), b'two', serial=tid)
    peer.begin(2)
    peer.tell('undoa', last['id'], 2)
    with pytest.raises(Exception, match='undo'):
        peer.call('vote', 2)
    peer.begin(3)
    peer.tell('undoa', last['id'], 3)
    peer.call('tpc_abort', 3)

    def pack(*args: Any) -> None:
        raise OSError('no room')
    peer.session._served.packing.run = pack  # type: ignore[union-attr]
    with pytest.raises(ServerException):
        peer.call('pack', 0.0)
    failed, aborted, packed = audited.lines()
    assert 'undo: failed: ' in failed and 'undo: not committed' in aborted and 'failed: OSError: no room' in packed


def test_who_may_write_may_not_pack_or_undo(audited: Audited) -> None:
    peer = audited.peer('write', 'shop')
    peer.call('register', '1', False)
    peer.commit(oid(1), b'one')
    tid = peer.commit(oid(1), b'two')
    for call in 3 * [lambda: peer.call('pack', 0.0), lambda: peer.call('pack', 0.0, False),
                 lambda: peer.call('stop_pack'), lambda: undo(peer)]:
        with pytest.raises(ReadOnlyError, match='only for the role admin'):
            call()
    assert peer.load(oid(1))[:2] == (b'two', tid)
    assert len(peer.call('undoLog', 0, 10)) == 2
    peer.commit(oid(1), b'three')
    assert audited.lines() == [  # once, the others are counted
        f'the client, certificate shop: refused to {what}: only for the role admin'
        for what in ('pack', 'stop a pack', 'undo')]


@pytest.mark.parametrize('as_role', ['read', 'write', 'admin'])
def test_who_registers_for_reading_only_reads_whatever_the_role(audited: Audited, as_role: str) -> None:
    peer = audited.peer(as_role, 'someone')
    peer.call('register', '1', True)
    for name, args in [('new_oids', ()), ('commit', (1, True, b'', b'', b'', b''))]:
        with pytest.raises(ReadOnlyError):
            peer.call(name, *args)
    if as_role == 'admin':
        peer.call('pack', 0.0)
    else:
        with pytest.raises(ReadOnlyError):
            peer.call('pack', 0.0)


def test_who_may_read_is_told_so_and_may_fall_back(audited: Audited) -> None:
    peer = audited.peer('read', 'guest')
    with pytest.raises(ReadOnlyError):
        peer.call('register', '1', False)
    peer.call('register', '1', True)
    assert peer.call('lastTransaction') == bytes(8)
    assert audited.lines() == ['the client, certificate guest: refused to write: only for the role write']


def test_who_has_no_role_does_not_come_in(audited: Audited) -> None:
    peer = audited.peer('read', 'guest')
    peer.session.certificate_name = 'stranger'
    for read_only in False, True:
        with pytest.raises(Exception, match='no role for you'):
            peer.call('register', '1', read_only)
    assert not peer.session.is_registered
    assert audited.lines() == ['the client, certificate stranger: refused to use this server: it has no role']


def test_the_audit_log_has_a_name_of_its_own() -> None:
    assert logging.getLogger('zeo.audit') in {logging.getLogger(name) for name in logging.root.manager.loggerDict}
