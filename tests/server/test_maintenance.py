"""Undo information and packs, as a client has them."""

import base64
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from ZODB.FileStorage import FileStorage
from ZODB.POSException import POSKeyError
from ZODB.serialize import ObjectWriter
from ZODB.tests.MinPO import MinPO

from tests.server.talk import PATIENCE
from tests.server.talk import SessionPeer
from tests.server.talk import oid
from tests.system.servers import until
from zeo.errors import ServerException
from zeo.server import maintenance as module
from zeo.server.served import Served

Connect = Callable[..., SessionPeer]


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
