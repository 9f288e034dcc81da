"""Conflicts are resolved, and a record in one runs nothing but what resolves it.

What hostile records may try is generated in `tests.wire.hostile`; tests/system/test_hostile_records.py
sends that to a real server.
"""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from BTrees.Length import Length
from ZODB.blob import BlobStorage
from ZODB.DemoStorage import DemoStorage
from ZODB.FileStorage import FileStorage
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import ConflictError
from ZODB.tests.hexstorage import HexStorage
from ZODB.tests.hexstorage import ServerHexStorage
from ZODB.utils import z64

from tests.server.keepers import SINGING
from tests.server.keepers import Bird
from tests.server.keepers import Broken
from tests.server.keepers import Keeper
from tests.server.keepers import Made
from tests.server.keepers import Revisions
from tests.server.keepers import Stubborn
from tests.server.keepers import effects
from tests.server.keepers import record
from tests.server.keepers import refused
from tests.server.keepers import resolve
from tests.server.keepers import sing
from tests.server.talk import GatedStorage
from tests.server.talk import SessionPeer
from tests.server.talk import in_thread
from tests.server.talk import oid
from zeo.errors import ProtocolError
from zeo.server.conflicts import Resolver
from zeo.server.served import Served

Serve = Callable[..., Served]
Connect = Callable[..., SessionPeer]


@pytest.fixture(autouse=True)
def silence() -> None:
    effects.clear()
    Made.made.clear()


@pytest.mark.parametrize('kind', [Stubborn, Bird, sing, 1, None, (Bird, ()), ((sing.__module__, 'sing'), ()),
                                  ('no_such_module_zeo', 'Thing'), (('no_such_module_zeo', 'Thing'), None),
                                  (('os', 'system'), ('echo',)), (('builtins', 'eval'), ('1',))])
def test_a_class_that_has_no_way_is_not_touched(kind: Any) -> None:
    refused(record(kind, {}))


def test_the_committed_record_must_have_the_same_class() -> None:
    refused(record(Keeper, {}), saved=record(Stubborn, {}))
    refused(record(Keeper, {}), saved=record(Made, {}))
    refused(record(Stubborn, {}), saved=record(Keeper, {}))


def test_a_conflict_says_which_class_it_is_about() -> None:
    with pytest.raises(ConflictError) as caught:
        resolve(record(Stubborn, {}))
    assert caught.value.class_name == f'{Stubborn.__module__}.Stubborn'
    with pytest.raises(ConflictError) as caught:
        resolve(b'nonsense')
    assert caught.value.class_name is None


def test_an_error_of_a_class_is_a_conflict_and_one_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level('INFO')
    good = Revisions(record(Broken, {}), record(Broken, {}))
    resolver = Resolver(good)
    for _ in range(3):
        with pytest.raises(ConflictError):
            resolver(oid(1), b'saved', b'old', record(Broken, {}))
    [line] = caplog.records
    assert 'Broken' in line.getMessage() and 'RuntimeError: not today' in line.getMessage()
    assert not line.exc_info


# ---- in storages


def file(path: Path, name: str = 'Data.fs') -> Any:
    return FileStorage(str(path / name))


STORAGES: dict[str, Callable[[Path], Any]] = {
    'FileStorage': file,
    'MappingStorage': lambda path: MappingStorage(),
    'DemoStorage': lambda path: DemoStorage(),
    'DemoStorage of files': lambda path: DemoStorage(base=file(path), changes=file(path, 'changes.fs')),
    'HexStorage': lambda path: HexStorage(file(path)),
    'ServerHexStorage': lambda path: ServerHexStorage(file(path)),
    'BlobStorage': lambda path: BlobStorage(str(path / 'blobs'), file(path)),
    'a wrapper without a word': lambda path: GatedStorage(file(path)),
    'a wrapped MappingStorage': lambda path: GatedStorage(),
}


def hexed(storage: Any, data: bytes) -> bytes:
    """As clients of a storage that decodes only for itself send it."""
    return b'.h' + data.hex().encode() if type(storage) is ServerHexStorage else data


@pytest.fixture(params=STORAGES, ids=str)
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return STORAGES[request.param](tmp_path)


@pytest.mark.parametrize('by_clients', [False, True])
def test_a_hostile_record_is_a_conflict_in_any_storage(
        serve: Serve, connect: Connect, storage: Any, by_clients: bool) -> None:
    served = serve(storage, client_conflict_resolution=by_clients)
    peer = connect(served)
    bad, good = hexed(storage, SINGING), hexed(storage, record(Keeper, 1))
    for first, second, new in [(good, good, bad), (bad, bad, bad), (good, bad, good)]:
        number = oid(int.from_bytes(first[-3:], 'big') + len(second))
        tid = peer.commit(number, first)
        current = peer.commit(number, second, serial=tid)
        peer.begin(1, (number, tid, new))
        if by_clients:
            assert peer.call('vote', 1) == [{'oid': number, 'serials': (current, tid), 'data': new}]
            peer.call('tpc_abort', 1)
        else:
            with pytest.raises(ConflictError) as caught:
                peer.call('vote', 1)
            assert caught.value.serials == (current, tid)
        assert peer.load(number)[:2] == (second, current)
    assert not effects and served.lock.holder is None


def test_a_good_record_is_resolved_in_any_storage_that_can(
        serve: Serve, connect: Connect, storage: Any) -> None:
    if 'Mapping' in repr(getattr(storage, '_storage', storage)):
        pytest.skip('it has no way to resolve conflicts')
    peer = connect(serve(storage))
    first, second, third = (hexed(storage, record(Length, number)) for number in (5, 6, 9))
    tid = peer.commit(oid(1), first)
    peer.commit(oid(1), second, serial=tid)
    peer.begin(1, (oid(1), tid, third))
    assert peer.call('vote', 1) == [oid(1)]
    peer.call('tpc_finish', 1)
    assert peer.load(oid(1))[0] == hexed(storage, record(Length, 10))


def test_an_undo_is_resolved_in_the_same_way(serve: Serve, connect: Connect, tmp_path: Path) -> None:
    peer = connect(serve(file(tmp_path)))
    tids = [peer.commit(oid(1), record(Length, number)) for number in (1, 5, 6)]
    peer.commit(oid(2), SINGING)
    tids.append(peer.commit(oid(2), SINGING + b'N.'))
    peer.commit(oid(2), SINGING)
    undoable = {each['id']: each for each in peer.call('undoLog', 0, 10)}
    ids = [each for each in undoable if undoable[each]['size']] or list(undoable)
    peer.begin(1)
    peer.tell('undoa', ids[-2], 1)  # the second one: from 1 to 5
    assert peer.call('vote', 1) == [oid(1)]
    peer.call('tpc_finish', 1)
    assert peer.load(oid(1))[0] == record(Length, 2)
    peer.begin(2)
    peer.tell('undoa', ids[1], 2)
    with pytest.raises(Exception, match='later transaction'):
        peer.call('vote', 2)
    assert not effects


def test_a_new_object_is_no_conflict_where_the_server_looks_itself(serve: Serve, connect: Connect) -> None:
    peer = connect(serve(MappingStorage()))
    tid = peer.commit(oid(1), b'one', serial=z64)
    peer.begin(1, (oid(1), tid, b'two'), (oid(1), tid, b'three'), (oid(2), z64, b'four'))
    assert peer.call('vote', 1) == []
    peer.call('tpc_finish', 1)
    assert peer.load(oid(1))[0] == b'three'


def test_a_transaction_that_was_given_up_resolves_no_more_conflicts(
        serve: Serve, connect: Connect, tmp_path: Path) -> None:
    served = serve(file(tmp_path))
    peer = connect(served)
    tid = peer.commit(oid(1), record(Length, 1))
    stores = served.statistics.stores
    peer.begin(1, *((oid(number), z64, b'x') for number in range(2, 10)))
    reached, go_on = threading.Event(), threading.Event()
    store = served.storage.store

    def slow(*args: Any) -> Any:
        reached.set()
        assert go_on.wait(30)
        return store(*args)

    served.storage.store = slow
    voting = in_thread(peer.ask, 'vote', 1)
    assert reached.wait(30)
    assert peer.session._transaction is not None
    peer.session._transaction.abandon()
    go_on.set()
    voting.result(30)
    assert served.statistics.stores == stores + 1 and served.lock.holder is None
    served.storage.store = store
    assert peer.load(oid(1))[1] == tid


def test_a_damaged_message_is_still_the_end(serve: Serve, connect: Connect) -> None:
    with pytest.raises(ProtocolError):
        connect(serve()).say(SINGING)
