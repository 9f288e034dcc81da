"""Connections that are made, refused, lost and made again; and what a client can do meanwhile."""

import json
import multiprocessing
import shutil
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transaction
from ZODB import DB
from ZODB.Connection import TransactionMetaData
from ZODB.POSException import POSKeyError, ReadOnlyError
from ZODB.tests.MinPO import MinPO
from ZODB.utils import load_current, z64

import zeo
from tests.system.clients import Recorder, Task, hears_of, store, vote
from tests.system.servers import PATIENCE, Server, Storage, file_storage, until

Start = Callable[..., Server]
Open = Callable[..., Any]

# Seconds a call waits for a connection in tests in which there shall be none.
SOON = .5


def gone(storage: Any) -> None:
    until(lambda: not storage.is_connected(), 'the client notices that the connection is lost')


def back(storage: Any) -> None:
    until(storage.is_connected, 'the client is connected')


def loads(storage: Any) -> int:
    """How often the server was asked for a revision."""
    count: int = storage.server_status()['loads']
    return count


# ---- addresses

def test_a_client_finds_a_server_on_this_machine_by_its_port(place: Any, open_client: Open) -> None:
    _, port = place.server.address
    for address in ('', port), ('localhost', port), port:
        assert open_client('zeo', address, place.name).is_connected()


def test_one_server_listens_on_a_port_and_on_a_unix_socket(
        start_server: Start, open_client: Open) -> None:
    server = start_server(both=True)
    by_port, by_path = open_client('zeo', server), open_client('zeo', server.second_address)
    hears_of(by_path, store(by_port))
    hears_of(by_port, store(by_path))


def test_a_client_moves_to_another_server_of_the_same_data(
        start_server: Start, open_client: Open) -> None:
    one = start_server(unix=True)
    other = Server(unix=True, folder=one.folder)
    other.address = one.folder + '/other'
    client = open_client('zeo', [one.address, other.address])
    store(client)
    one.stop()
    with other:
        gone(client)
        client.ping()
        store(client)
        assert len(list(client.iterator())) == 2


def test_a_client_can_be_given_a_new_address(start_server: Start, open_client: Open) -> None:
    one = start_server(unix=True)
    client = open_client('zeo', one)
    store(client)
    one.stop()
    gone(client)
    with Server(unix=True, folder=one.folder) as other:
        other.address = one.address
        client.new_addr(other.address)
        client.ping()
        store(client)


def test_an_unknown_storage_is_refused_by_name(place: Any, open_client: Open) -> None:
    with pytest.raises(zeo.ClientStorageError, match='no such storage'):
        open_client('zeo', place.server, 'no such storage', wait_timeout=SOON)


def test_without_a_server_the_constructor_gives_up_in_time(open_client: Open, tmp_path: Path) -> None:
    with pytest.raises(zeo.ClientDisconnected):
        open_client('zeo', str(tmp_path / 'nobody'), wait_timeout=SOON)


# ---- reading only

def test_a_client_opened_for_reading_only_cannot_write(place: Any) -> None:
    store(place.client(), z64)
    client = place.client(read_only=True)
    assert client.isReadOnly()
    assert load_current(client, z64)[0] == b'x'
    with pytest.raises(ReadOnlyError):
        store(client)


READ_ONLY = [
    pytest.param({'read_only': True}, {}, id='server'),
    pytest.param({}, {'read_only': True}, id='storage'),
]


@pytest.mark.parametrize('options, storage_options', READ_ONLY)
def test_a_server_for_reading_only_takes_no_writers(
        start_server: Start, open_client: Open, options: Any, storage_options: Any) -> None:
    server = start_server()
    store(open_client('zeo', server), z64)
    server.stop()
    server.storages = {'1': file_storage(**storage_options)}
    server.start(**options)
    reader = open_client('zeo', server, read_only=True)
    fallback = open_client('zeo', server, read_only_fallback=True)
    for client in reader, fallback:
        assert client.isReadOnly()
        assert load_current(client, z64)[0] == b'x'
        with pytest.raises(ReadOnlyError):
            store(client)
    with pytest.raises((ReadOnlyError, zeo.ClientDisconnected)):
        open_client('zeo', server, wait_timeout=SOON)


def test_a_fallback_client_writes_where_it_may(start_server: Start, open_client: Open) -> None:
    server = start_server()
    client = open_client('zeo', server, read_only_fallback=True)
    assert not client.isReadOnly()
    store(client)
    server.stop()
    gone(client)
    server.start(read_only=True)
    client.ping()
    with pytest.raises(ReadOnlyError):
        store(client)
    server.stop()
    gone(client)
    server.start(read_only=False)
    until(lambda: client.is_connected() and not client.isReadOnly(), 'writing is allowed again')
    store(client)


def test_a_fallback_client_changes_over_to_a_server_that_lets_it_write(
        start_server: Start, open_client: Open) -> None:
    readable = start_server(unix=True, read_only=False)
    store(open_client('zeo', readable), z64)
    readable.restart(read_only=True)
    # A replica of the data, in a folder of its own.
    writable = Server(unix=True)
    shutil.copy(readable.folder + '/Data.fs', writable.folder)
    client = open_client('zeo', [readable.address, writable.address], read_only_fallback=True,
                         max_disconnect_poll=.2)
    with pytest.raises(ReadOnlyError):
        store(client)
    with writable:
        until(lambda: not client.isReadOnly(), 'the client has changed over')
        client.ping()
        store(client)
        client.close()


# ---- without a connection

def test_what_is_not_cached_cannot_be_loaded_without_a_server(
        start_server: Start, open_client: Open) -> None:
    server = start_server()
    client = open_client('zeo', server, wait_timeout=SOON)
    cached, other = client.new_oid(), client.new_oid()
    tid = store(client, cached)
    store(open_client('zeo', server), other)
    server.stop()
    gone(client)
    assert load_current(client, cached) == (b'x', tid)
    with pytest.raises(zeo.ClientDisconnected):
        load_current(client, other)
    with pytest.raises(zeo.ClientDisconnected):
        store(client)
    server.start()
    assert load_current(open_client('zeo', server), other)[0] == b'x'


def test_a_cache_file_serves_a_client_that_starts_without_a_server(
        start_server: Start, open_client: Open, tmp_path: Path) -> None:
    server = start_server()
    options = {'client': 'test', 'var': str(tmp_path)}
    client = open_client('zeo', server, **options)
    oids = [client.new_oid() for _ in range(2)]
    tids = [store(client, oid, z64, oid * 100) for oid in oids]
    client.close()
    server.stop()
    client = open_client('zeo', server, wait=False, wait_timeout=SOON, **options)
    assert not client.is_connected()
    for oid, tid in zip(oids, tids):
        assert load_current(client, oid) == (oid * 100, tid)
    with pytest.raises(zeo.ClientDisconnected):
        load_current(client, client_oid := b'\0' * 7 + b'\x77')
    server.start()
    back(client)
    with pytest.raises(POSKeyError):
        load_current(client, client_oid)


# ---- verification

def test_a_restart_without_changes_keeps_the_cache(start_server: Start, open_client: Open) -> None:
    server = start_server()
    client = open_client('zeo', server)
    recorder = Recorder()
    client.registerDB(recorder)
    oid = client.new_oid()
    tid = store(client, oid)
    told = recorder.caches
    server.stop()
    gone(client)
    server.start()
    client.ping()
    assert load_current(client, oid) == (b'x', tid)
    assert loads(client) == 0
    assert recorder.caches == told and not recorder.tids    # nothing was missed, nothing is dropped


def missed(start_server: Start, open_client: Open, tmp_path: Path, commits: int,
           **server_options: Any) -> tuple[Any, bytes, bytes, bytes, bytes]:
    """A client whose cache file has missed some commits: (client, unchanged oid, its tid, changed
    oid, its tid)."""
    server = start_server(invalidation_queue_size=3, **server_options)
    options = {'client': 'test', 'var': str(tmp_path)}
    client = open_client('zeo', server, **options)
    unchanged, changed = client.new_oid(), client.new_oid()
    kept = store(client, unchanged)
    serial = store(client, changed)
    client.close()
    other = open_client('zeo', server)
    for number in range(commits):
        serial = store(other, changed, serial, b'%d' % number)
    return open_client('zeo', server, **options), unchanged, kept, changed, serial


def test_a_cache_that_missed_little_catches_up(
        start_server: Start, open_client: Open, tmp_path: Path) -> None:
    client, unchanged, kept, changed, serial = missed(start_server, open_client, tmp_path, 2)
    before = loads(client)
    assert load_current(client, unchanged) == (b'x', kept)
    assert loads(client) == before
    assert load_current(client, changed) == (b'1', serial)
    assert loads(client) == before + 1
    assert client.lastTransaction() == serial


def test_a_cache_that_missed_too_much_asks_about_each_object(
        start_server: Start, open_client: Open, tmp_path: Path) -> None:
    client, unchanged, kept, changed, serial = missed(start_server, open_client, tmp_path, 9)
    until(lambda: next(client._cache.suspects(), None) is None, 'it has asked')
    before = loads(client)
    assert load_current(client, unchanged) == (b'x', kept)
    assert loads(client) == before
    assert load_current(client, changed) == (b'8', serial)
    assert loads(client) == before + 1
    assert client.lastTransaction() == serial


def test_a_server_with_an_invalidation_age_looks_further_back(
        start_server: Start, open_client: Open, tmp_path: Path) -> None:
    client, unchanged, kept, changed, serial = missed(start_server, open_client, tmp_path, 9,
                                                      invalidation_age=1000)
    before = loads(client)
    assert load_current(client, unchanged) == (b'x', kept)
    assert loads(client) == before
    assert load_current(client, changed) == (b'8', serial)
    assert loads(client) == before + 1


def test_what_verification_invalidates_stays_so_in_the_cache_file(
        start_server: Start, open_client: Open, tmp_path: Path) -> None:
    server = start_server()
    options = {'client': 'test', 'var': str(tmp_path)}
    client = open_client('zeo', server, **options)
    oid = client.new_oid()
    old = store(client, oid, z64, b'old')
    client.close()
    new = store(open_client('zeo', server), oid, old, b'new')
    client = open_client('zeo', server, **options)      # here it is invalidated, and not loaded
    store(client)                                       # and the cache knows of something later
    client.close()
    client = open_client('zeo', server, **options)
    assert load_current(client, oid) == (b'new', new)


def test_a_connected_client_hears_what_it_missed_during_a_restart(
        start_server: Start, open_client: Open) -> None:
    server = start_server(unix=True)
    client, other = open_client('zeo', server), open_client('zeo', server, wait_timeout=60)
    db = DB(client)
    manager = transaction.TransactionManager()
    connection = db.open(manager)
    connection.root()['x'] = MinPO('old')
    manager.commit()
    hears_of(other, client.lastTransaction())
    server.stop()
    gone(client)
    # Another server of the same data, which the first client does not know.
    with Server(unix=True, folder=server.folder) as elsewhere:
        assert elsewhere.address == server.address
        other.ping()
        other_manager = transaction.TransactionManager()
        other_connection = DB(other).open(other_manager)
        other_connection.root()['x'].value = 'new'
        other_manager.commit()
        hears_of(client, other.lastTransaction())
        manager.begin()
        assert connection.root()['x'].value == 'new'
        client.close()
        other.close()


def test_a_server_that_is_behind_its_client_is_not_used(
        start_server: Start, open_client: Open) -> None:
    server = start_server()
    client = open_client('zeo', server, wait_timeout=SOON)
    store(client, z64, z64, b'old')
    server.stop()
    gone(client)
    data, saved = Path(server.folder, 'Data.fs'), Path(server.folder, 'Saved.fs')
    shutil.copy(data, saved)
    server.start()
    back(client)
    new = store(client, z64, client.lastTransaction(), b'new')
    server.stop()
    gone(client)
    newest = Path(server.folder, 'Newest.fs')
    shutil.copy(data, newest)
    shutil.copy(saved, data)
    Path(server.folder, 'Data.fs.index').unlink()
    server.start()

    def refused() -> bool:
        with pytest.raises(zeo.ClientStorageError) as caught:
            client.ping()
        return 'newer than the server' in str(caught.value)     # before that: not connected

    until(refused, 'the client says why')
    assert load_current(client, z64) == (b'new', new)
    server.stop()
    shutil.copy(newest, data)
    Path(server.folder, 'Data.fs.index').unlink(missing_ok=True)
    server.start()
    back(client)
    store(client)


# ---- transactions and lost connections

@pytest.mark.parametrize('end', ['stop', 'kill'])
def test_a_client_goes_on_when_its_server_is_back(
        start_server: Start, open_client: Open, end: str) -> None:
    server = start_server()
    client = open_client('zeo', server)
    tids = [store(client)]
    for _ in range(3):
        getattr(server, end)()
        gone(client)
        server.start()
        tids.append(store(client))      # waits for the connection
    assert [txn.tid for txn in client.iterator()] == tids


@pytest.mark.parametrize('voted', [False, True])
def test_a_transaction_does_not_survive_its_connection(
        start_server: Start, open_client: Open, voted: bool) -> None:
    server = start_server()
    client = open_client('zeo', server)
    oid = client.new_oid()
    if voted:
        meta = vote(client, oid)
    else:
        meta = TransactionMetaData()
        client.tpc_begin(meta)
        client.store(oid, z64, b'x', '', meta)
    server.stop()
    gone(client)
    server.start()
    client.ping()
    with pytest.raises(zeo.ClientDisconnected):
        (client.tpc_finish if voted else client.tpc_vote)(meta)
    client.tpc_abort(meta)
    with pytest.raises(POSKeyError):
        load_current(client, oid)
    store(client, oid)


def test_a_transaction_that_holds_the_lock_too_long_is_aborted(
        start_server: Start, open_client: Open) -> None:
    server = start_server(transaction_timeout=1)
    slow, other = open_client('zeo', server), open_client('zeo', server)
    oid = slow.new_oid()
    meta = vote(slow, oid)
    store(other)        # waits until the lock is free
    server.log.wait_for('took too long')
    gone(slow)
    back(slow)
    with pytest.raises(zeo.ClientDisconnected):
        slow.tpc_finish(meta)
    slow.tpc_abort(meta)
    with pytest.raises(POSKeyError):
        load_current(slow, oid)
    # Those that end in time are left alone.
    slow.tpc_abort(vote(slow))
    store(slow, oid)


def test_closing_a_client_ends_the_transactions_of_its_other_threads(place: Any) -> None:
    client = place.client(wait_timeout=SOON)
    meta = vote(client)
    second = Task(store, client)
    client.close()
    with pytest.raises(zeo.ClientStorageError):
        client.tpc_finish(meta)
    client.tpc_abort(meta)
    with pytest.raises(zeo.ClientStorageError):
        second.result()


def test_several_processes_use_one_server(place: Any) -> None:
    client = place.client()
    oid = client.new_oid()
    store(client, oid, z64, b'from the parent')
    context = multiprocessing.get_context('spawn')
    with context.Pool(2) as pool:
        tids = pool.starmap_async(
            _work_in_process, [(place.server.address, place.name, oid)] * 4).get(PATIENCE)
        pool.close()
        pool.join()
    assert len(set(tids)) == 4
    hears_of(client, max(tids))
    assert len(list(client.iterator())) == 5


def _work_in_process(address: Any, name: str, oid: bytes) -> bytes:
    from tests.system.clients import open_client
    client = open_client('zeo', address, name)
    try:
        assert load_current(client, oid)[0] == b'from the parent'
        return store(client)
    finally:
        client.close()


# ---- strangers, and what the log says

@pytest.mark.parametrize('bytes_sent', [
    b'', b'GET / HTTP/1.0\r\n\r\n', b'\0\0\0\2Z4', b'\0\0\0\2X5', b'\xff\xff\xff\xff',
    b'\0\0\0\2Z5\0\0\0\5salty', b'\0\0\0\2Z5\0\0\0\0', b'\0\0\0\2Z5\0\0\0\4N'],
    ids=['nothing', 'http', 'old protocol', 'other encoding', 'endless', 'no pickle', 'empty frame',
         'half a frame'])
def test_strangers_are_shown_out_and_disturb_nobody(place: Any, bytes_sent: bytes) -> None:
    client = place.client()
    with socket.create_connection(place.server.address, PATIENCE) as stranger:
        stranger.sendall(bytes_sent)
        stranger.shutdown(socket.SHUT_WR)
        try:
            while stranger.recv(100):
                pass        # the greeting, then the end
        except ConnectionResetError:
            pass
    store(client)


def test_connections_that_are_reset_at_once_do_no_harm(place: Any) -> None:
    for _ in range(20):
        stranger = socket.create_connection(place.server.address, PATIENCE)
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
        stranger.close()
    store(place.client())


def test_a_monitor_is_told_the_status_of_all_storages(place: Any) -> None:
    client = place.client()
    tid = store(client)
    with socket.create_connection(place.server.address, PATIENCE) as monitor:
        with monitor.makefile('rb') as stream:
            assert stream.read(6) == b'\0\0\0\2Z5'
            monitor.sendall(b'\0\0\0\4ruok')
            length, = struct.unpack('>I', stream.read(4))
            status = json.loads(stream.read(length).decode('ascii'))
            assert stream.read() == b''
    assert status[place.name]['last-transaction'] == tid.hex()
    assert status[place.name]['commits'] == client.server_status()['commits'] == 1
    assert status[place.name]['connections'] == 1


def test_the_log_names_a_client_by_its_label_and_is_silent_about_missing_objects(
        start_server: Start, open_client: Open) -> None:
    server = start_server()
    client = open_client('zeo', server, client_label='the night shift')
    with pytest.raises(POSKeyError):
        load_current(client, b'\0' * 8)
    client.ping()
    server.log.wait_for('the night shift')
    assert 'POSKeyError' not in str(server.log)


# ---- a client as the storage of another server

def test_a_server_can_serve_the_client_of_another_server(
        start_server: Start, open_client: Open) -> None:
    source = start_server()
    outlets = []
    for _ in range(2):
        make = f"__import__('zeo.ClientStorage').ClientStorage.ClientStorage({source.address!r})"
        outlets.append(start_server('zeo', {'1': Storage(make)}))
    direct = open_client('zeo', source)
    one, other = (open_client('zeo', outlet) for outlet in outlets)
    oid = one.new_oid()
    serial = store(one, oid, z64, b'through one')
    for client in direct, other:
        hears_of(client, serial)
        assert load_current(client, oid) == (b'through one', serial)
    serial = store(other, oid, serial, b'through the other')
    for client in direct, one:
        hears_of(client, serial)
        assert load_current(client, oid) == (b'through the other', serial)
    serial = store(direct, oid, serial, b'directly')
    for client in one, other:
        hears_of(client, serial)
        assert load_current(client, oid) == (b'directly', serial)
    # When the source comes back, they all go on.
    source.restart()
    serial = store(one, oid, serial, b'after the restart')
    for client in direct, other:
        hears_of(client, serial)
        assert load_current(client, oid) == (b'after the restart', serial)
    assert [txn.tid for txn in one.iterator()] == [txn.tid for txn in direct.iterator()]
