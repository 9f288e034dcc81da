"""A client that comes back after a long time keeps what did not change, and nothing else."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ZODB.utils import maxtid

from tests.system.clients import Recorder, hears_of, store
from tests.system.servers import Server, until
from zeo.ClientStorage import ClientStorage

Start = Callable[..., Server]

MANY = 20_000


def settled(storage: Any) -> None:
    until(lambda: next(storage._cache.suspects(), None) is None, 'everything is verified')


def taken(server: Server) -> bytes:
    """A backup, taken while the server is stopped."""
    server.stop()
    backup = Path(server.folder, 'Data.fs').read_bytes()
    server.start()
    return backup


def restore(server: Server, backup: bytes) -> None:
    """Let the server go on from a backup."""
    server.stop()
    for file in Path(server.folder).glob('Data.fs.*'):
        file.unlink()
    Path(server.folder, 'Data.fs').write_bytes(backup)
    server.start()


def fill(storage: Any, count: int) -> list[bytes]:
    """So many objects, committed and cached."""
    from ZODB.Connection import TransactionMetaData

    meta = TransactionMetaData()
    oids = [storage.new_oid() for _ in range(count)]
    storage.tpc_begin(meta)
    for oid in oids:
        storage.store(oid, b'\0' * 8, b'first of ' + oid, '', meta)
    storage.tpc_vote(meta)
    storage.tpc_finish(meta)
    return oids


def forget_what_happened(server: Server, writer: Any, oid: bytes, serial: bytes) -> bytes:
    """More transactions than the server remembers."""
    for number in range(5):
        serial = store(writer, oid, serial, b'changed %d' % number)
    return serial


@pytest.fixture
def server(start_server: Start) -> Server:
    return start_server(invalidation_queue_size=3)


def test_after_a_long_absence_only_what_changed_is_loaded_again(server: Server, tmp_path: Path) -> None:
    path = str(tmp_path / 'c.zec')
    storage = ClientStorage(server.address, cache=path)
    oids = fill(storage, 100)
    serial = storage.lastTransaction()
    storage.close()
    writer = ClientStorage(server.address)
    changed = forget_what_happened(server, writer, oids[7], serial)

    storage = ClientStorage(server.address, cache=path)
    # Before anything is proven: right, because the server is asked.
    assert storage.load(oids[7]) == (b'changed 4', changed)
    assert storage.load(oids[8]) == (b'first of ' + oids[8], serial)
    settled(storage)
    before = writer.server_status()['loads']
    for oid in oids:
        expected = (b'changed 4', changed) if oid == oids[7] else (b'first of ' + oid, serial)
        assert storage.load(oid) == expected
    assert writer.server_status()['loads'] == before
    storage.close()
    writer.close()


def test_what_was_not_verified_before_the_client_ended_is_verified_the_next_time(
        server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / 'c.zec')
    storage = ClientStorage(server.address, cache=path)
    oids = fill(storage, 10)
    serial = storage.lastTransaction()
    storage.close()
    writer = ClientStorage(server.address)
    changed = forget_what_happened(server, writer, oids[7], serial)

    monkeypatch.setattr('zeo.client.supervisor.inquire', lambda channel, cache: None)
    storage = ClientStorage(server.address, cache=path)
    storage.close()
    monkeypatch.undo()

    storage = ClientStorage(server.address, cache=path)
    settled(storage)
    before = writer.server_status()['loads']
    assert storage.load(oids[8]) == (b'first of ' + oids[8], serial)
    assert writer.server_status()['loads'] == before
    assert storage.load(oids[7]) == (b'changed 4', changed)
    storage.close()
    writer.close()


def test_a_live_client_keeps_its_cache_over_a_long_interruption(server: Server) -> None:
    storage = ClientStorage(server.address, min_disconnect_poll=.01)
    recorder = Recorder()
    storage.registerDB(recorder)
    oids = fill(storage, 100)
    serial = storage.lastTransaction()
    server.stop()
    server.start()
    # It may have come back by now; then it missed nothing, and does so again.
    until(storage.is_connected, 'it is back')
    server.stop()
    from ZODB.FileStorage import FileStorage

    data = FileStorage(f'{server.folder}/Data.fs')
    for number in range(5):
        serial = store(data, oids[7], serial, b'changed %d' % number)
    data.close()
    server.start()
    until(lambda: storage.lastTransaction() == serial, 'it has caught up')
    settled(storage)
    assert recorder.caches  # ZODB's own caches may hold anything
    before = storage.server_status()['loads']
    assert storage.load(oids[8])[0] == b'first of ' + oids[8]
    assert storage.server_status()['loads'] == before
    assert storage.load(oids[7]) == (b'changed 4', serial)
    storage.close()


def test_a_stock_server_cannot_be_asked_so_the_cache_is_dropped(
        start_server: Start, tmp_path: Path) -> None:
    server = start_server('ZEO', invalidation_queue_size=3)
    path = str(tmp_path / 'c.zec')
    storage = ClientStorage(server.address, cache=path)
    oids = fill(storage, 10)
    serial = storage.lastTransaction()
    storage.close()
    writer = ClientStorage(server.address)
    changed = forget_what_happened(server, writer, oids[7], serial)
    storage = ClientStorage(server.address, cache=path)
    assert len(storage._cache) == 0
    assert storage.load(oids[7]) == (b'changed 4', changed)
    storage.close()
    writer.close()


@pytest.mark.soak
def test_with_many_cached_objects_the_first_load_is_right_and_comes_soon(
        server: Server, tmp_path: Path) -> None:
    path = str(tmp_path / 'c.zec')
    options: dict[str, Any] = {'cache': path, 'cache_size': 100_000_000}
    storage = ClientStorage(server.address, **options)
    oids = fill(storage, 5 * MANY)
    serial = storage.lastTransaction()
    storage.close()
    writer = ClientStorage(server.address)
    changed = forget_what_happened(server, writer, oids[7], serial)
    began = time.perf_counter()
    storage = ClientStorage(server.address, **options)
    first = storage.loadBefore(oids[7], maxtid)
    took = time.perf_counter() - began
    assert first == (b'changed 4', changed, None)
    settled(storage)
    verified = time.perf_counter() - began
    before = writer.server_status()['loads']
    assert all(storage.load(oid) for oid in oids)
    assert writer.server_status()['loads'] - before < MANY
    print(f'{len(oids)} cached objects: first load after {took * 1000:.0f} ms,'
          f' all verified after {verified:.1f} s')
    storage.close()
    writer.close()


def test_a_cache_file_of_another_server_is_not_believed(
        server: Server, start_server: Start, tmp_path: Path) -> None:
    path = str(tmp_path / 'c.zec')
    storage = ClientStorage(server.address, cache=path)
    oid, = fill(storage, 1)
    storage.close()
    other = start_server()
    writer = ClientStorage(other.address)
    tid = store(writer, oid, record=b'quite another')
    storage = ClientStorage(other.address, cache=path)
    assert storage.load(oid) == (b'quite another', tid)
    storage.close()
    writer.close()


@pytest.mark.parametrize('options', [{}, {'invalidation_age': 1000, 'invalidation_queue_size': 1}])
def test_what_was_cached_of_a_future_that_was_given_up_is_not_served(
        start_server: Start, tmp_path: Path, options: dict[str, Any]) -> None:
    """The database is restored from a backup, and goes on: its last transaction is later than any cached one."""
    server = start_server(**options)
    path = str(tmp_path / 'c.zec')
    storage = ClientStorage(server.address, cache=path)
    oids = fill(storage, 10)
    serial = storage.lastTransaction()
    backup = taken(server)
    until(storage.is_connected, 'it is back')
    given_up = store(storage, oids[1], serial, b'given up')
    again = store(storage, oids[1], given_up, b'given up as well')
    assert storage.loadBefore(oids[1], again) == (b'given up', given_up, again)
    storage.close()

    restore(server, backup)
    writer = ClientStorage(server.address)
    last = store(writer, oids[2], serial, b'the new future')
    assert last > again

    storage = ClientStorage(server.address, cache=path)
    assert storage.load(oids[1]) == (b'first of ' + oids[1], serial)
    assert storage.load(oids[2]) == (b'the new future', last)
    assert storage.loadBefore(oids[1], again) == (b'first of ' + oids[1], serial, None)
    settled(storage)
    before = writer.server_status()['loads']
    assert storage.load(oids[3]) == (b'first of ' + oids[3], serial)  # what is proven is kept
    assert writer.server_status()['loads'] == before
    storage.close()
    writer.close()


def test_what_a_killed_client_had_cached_of_a_future_that_was_given_up_is_not_served(
        server: Server, tmp_path: Path) -> None:
    """The file of its cache tells of transactions later than the last tid it tells, which the backup has."""
    path = tmp_path / 'c.zec'
    storage = ClientStorage(server.address, cache=path)
    oids = fill(storage, 10)
    serial = storage.lastTransaction()
    storage._cache.flush()
    backup = taken(server)
    until(storage.is_connected, 'it is back')
    given_up = store(storage, oids[1], serial, b'given up' * 20_000)
    killed = tmp_path / 'killed.zec'
    killed.write_bytes(path.read_bytes())
    storage.close()

    restore(server, backup)
    writer = ClientStorage(server.address)
    storage = ClientStorage(server.address, cache=killed)
    last = store(writer, oids[2], serial, b'the new future')
    assert last > given_up
    hears_of(storage, last)
    assert storage.load(oids[1]) == (b'first of ' + oids[1], serial)
    assert storage.loadBefore(oids[1], given_up) == (b'first of ' + oids[1], serial, None)
    storage.close()
    writer.close()
