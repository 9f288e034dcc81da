"""Blobs between real servers and clients: both modes, broken connections, crowds, and little memory."""

import os
import random
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import transaction
import ZODB
from ZODB.blob import Blob
from ZODB.FileStorage import FileStorage
from ZODB.interfaces import IBlobStorage, IBlobStorageRestoreable
from ZODB.POSException import ConflictError, StorageError, Unsupported

from tests.system.certificates import Certificates
from tests.system.clients import Task
from tests.system.proxy import DOWN, UP, Proxy
from tests.system.servers import PATIENCE, ROOT, Server, file_storage, until
from zeo.client import blobcache
from zeo.errors import ClientDisconnected, ClientStorageError
from zeo.wire.certificates import client_context

MB = 1024 * 1024

Open = Callable[..., Any]

WITH_BLOBS = {'1': file_storage(blobs='blobs')}


@pytest.fixture
def server(start_server: Open) -> Server:
    started: Server = start_server('zeo', WITH_BLOBS)
    return started


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    assert isinstance(server.address, tuple)
    with Proxy(server.address) as proxy:
        yield proxy


def shared(server: Server) -> dict[str, Any]:
    """What a client that shares the server's folder is given."""
    return {'blob_dir': os.path.join(server.folder, 'blobs'), 'shared_blob_dir': True}


def files(folder: str | Path, suffix: str = '') -> list[str]:
    return [os.path.join(path, name) for path, _, names in os.walk(folder)
            for name in names if name.endswith(suffix)]


def in_tmp(folder: str | Path) -> list[str]:
    return os.listdir(os.path.join(folder, 'tmp'))


class Person:
    """A database that somebody has open, with a transaction of their own."""

    def __init__(self, storage: Any) -> None:
        self.storage = storage
        self.db = ZODB.DB(storage)
        self.transactions = transaction.TransactionManager()
        self.connection = self.db.open(self.transactions)
        self.root = self.connection.root()

    def begin(self, storage: Any = None) -> None:
        """See what is there now; with a storage, at least what that one knows."""
        if storage is not None:
            until(lambda: self.storage.lastTransaction() >= storage.lastTransaction(), 'it is heard of')
        self.transactions.begin()

    def store(self, **blobs: bytes) -> None:
        for name, data in blobs.items():
            self.root[name] = Blob(data)
        self.transactions.commit()

    def read(self, name: str) -> bytes:
        with self.root[name].open() as file:
            data: bytes = file.read()
        return data

    def close(self) -> None:
        self.transactions.abort()
        self.connection.close()
        self.db.close()


@pytest.fixture
def person(open_client: Open) -> Iterator[Open]:
    """Open a database (the arguments are `open_client`'s)."""
    people: list[Person] = []

    def person(*args: Any, **options: Any) -> Person:
        people.append(Person(open_client(*args, **options)))
        return people[-1]

    yield person
    for each in people:
        each.close()


# ---- who has what


@pytest.mark.filterwarnings('ignore::ResourceWarning')  # stock clients sometimes leave a file open
@pytest.mark.parametrize('kind, makes', [
    ('zeo', ('zeo', 'zeo')), ('zeo', ('zeo', 'ZEO')), ('zeo', ('ZEO', 'zeo')),
    ('ZEO', ('zeo', 'zeo')), ('ZEO', ('zeo', 'ZEO'))])
@pytest.mark.parametrize('modes', ['cached cached', 'cached shared', 'shared cached', 'shared shared'])
def test_a_blob_gets_from_one_client_to_another(
        start_server: Open, person: Open, tmp_path: Path, kind: str, makes: tuple[str, str],
        modes: str) -> None:
    server = start_server(kind, WITH_BLOBS)
    one, other = [
        person(make, server, **(shared(server) if mode == 'shared' else {'blob_dir': tmp_path / f'{at}'}))
        for at, (make, mode) in enumerate(zip(makes, modes.split()))]
    data = os.urandom(300_000)
    for number in range(3):
        one.store(first=data[number:], empty=b'')
        other.begin(one.storage)
        assert other.read('first') == one.read('first') == data[number:]
        assert other.read('empty') == one.read('empty') == b''
        one, other = other, one


def test_what_is_promised_depends_on_both_sides(
        start_server: Open, server: Server, open_client: Open, tmp_path: Path) -> None:
    plain = start_server()
    with_both = open_client('zeo', server, blob_dir=tmp_path / 'one')
    assert IBlobStorage.providedBy(with_both) and IBlobStorageRestoreable.providedBy(with_both)
    for storage in (open_client('zeo', server), open_client('zeo', plain),
                    open_client('zeo', plain, blob_dir=tmp_path / 'two')):
        assert not IBlobStorage.providedBy(storage)
    stock = start_server('ZEO', WITH_BLOBS)
    on_stock = open_client('zeo', stock, blob_dir=tmp_path / 'three')
    assert IBlobStorage.providedBy(on_stock) and not IBlobStorageRestoreable.providedBy(on_stock)


def test_what_is_missing_for_blobs_is_said(
        start_server: Open, server: Server, person: Open, tmp_path: Path) -> None:
    someone = person('zeo', server, blob_dir=tmp_path / 'one')
    someone.store(x=b'data')
    oid, tid = someone.root['x']._p_oid, someone.storage.lastTransaction()
    without = person('zeo', server)
    for use in (lambda: without.read('x'), lambda: without.storage.temporaryDirectory(),
                lambda: without.storage.loadBlob(oid, tid)):
        with pytest.raises(Unsupported, match='has no folder for blobs; give it a blob_dir'):
            use()
    on_plain = person('zeo', start_server(), blob_dir=tmp_path / 'two')
    with pytest.raises(Unsupported):
        on_plain.store(x=b'data')
    on_plain.transactions.abort()
    with pytest.raises(Unsupported, match='has no blobs: it needs a blob directory'):
        on_plain.storage.loadBlob(oid, tid)
    meta = ZODB.Connection.TransactionMetaData()
    on_plain.storage.tpc_begin(meta)
    (tmp_path / 'data').write_bytes(b'data')
    with pytest.raises(Unsupported, match='on the server has no blobs; it needs a blob directory'):
        on_plain.storage.storeBlob(oid, tid, b'record', str(tmp_path / 'data'), '', meta)
    on_plain.storage.tpc_abort(meta)
    assert (tmp_path / 'data').exists()


def test_a_folder_that_cannot_be_used_is_named_before_anything_else(
        server: Server, open_client: Open, tmp_path: Path) -> None:
    (tmp_path / 'file').write_text('')
    with pytest.raises(ClientStorageError, match=f'{tmp_path}/file'):
        open_client('zeo', server, blob_dir=tmp_path / 'file')
    with pytest.raises(ClientStorageError, match='it is the folder of a storage, not a cache'):
        open_client('zeo', server, blob_dir=os.path.join(server.folder, 'blobs'))
    with pytest.raises(ClientStorageError, match='it does not exist'):
        open_client('zeo', server, blob_dir=tmp_path / 'no', shared_blob_dir=True)
    with pytest.raises(ValueError, match='shared_blob_dir needs a blob_dir'):
        open_client('zeo', server, shared_blob_dir=True)


# ---- transactions


@pytest.mark.parametrize('share', [False, True])
def test_many_threads_commit_several_blobs_and_objects_at_once(
        server: Server, open_client: Open, tmp_path: Path, share: bool) -> None:
    storage = open_client('zeo', server, **(shared(server) if share else {'blob_dir': tmp_path / 'one'}))
    other = open_client('zeo', server, blob_dir=tmp_path / 'two', server_sync=True)
    db, reader = ZODB.DB(storage), ZODB.DB(other)
    with db.transaction() as connection:
        for number in range(4):
            connection.root()[number] = connection.root().__class__()

    def work(number: int) -> None:
        chance = random.Random(number)
        for round in range(5):
            with db.transaction() as connection:
                mine = connection.root()[number]
                for name in range(3):
                    mine[name] = Blob(bytes([number, round, name]) * chance.randint(0, 100_000))
                mine['plain'] = round
            with reader.transaction() as connection:
                mine = connection.root()[number]
                for name in range(3) if 'plain' in mine else ():
                    with mine[name].open() as file:
                        data = file.read()
                    assert data == bytes([number, mine['plain'], name]) * (len(data) // 3)

    tasks = [Task(work, number) for number in range(4)]
    for task in tasks:
        task.result()
    db.close()
    reader.close()
    assert len(files(os.path.join(server.folder, 'blobs'), '.blob')) == 4 * 5 * 3
    for folder in (os.path.join(server.folder, 'blobs'), tmp_path / 'two'):
        assert not in_tmp(folder)


@pytest.mark.parametrize('share', [False, True])
def test_what_is_not_committed_leaves_no_file(
        server: Server, person: Open, tmp_path: Path, share: bool) -> None:
    folder = shared(server) if share else {'blob_dir': tmp_path / 'one'}
    one, other = person('zeo', server, **folder), person('zeo', server, blob_dir=tmp_path / 'two')
    one.store(x=b'committed')
    one.root['plain'] = one.root.__class__()
    one.transactions.commit()
    before = files(os.path.join(server.folder, 'blobs')), files(tmp_path / 'one')

    def unchanged() -> bool:
        return before == (files(os.path.join(server.folder, 'blobs')), files(tmp_path / 'one'))

    one.root['y'] = Blob(b'aborted')        # before it was stored
    one.transactions.abort()
    one.root['y'] = Blob(b'rolled back')
    one.transactions.savepoint()
    one.transactions.abort()
    one.begin()

    class Saboteur:
        transaction_manager = one.transactions

        def sortKey(self) -> str:
            return '~'

        def tpc_vote(self, _: Any) -> None:
            raise RuntimeError('not with me')

        tpc_begin = commit = tpc_finish = abort = tpc_abort = lambda self, _: None

    one.root['y'] = Blob(b'voted, and aborted')
    one.transactions.get().join(Saboteur())
    with pytest.raises(RuntimeError, match='not with me'):
        one.transactions.commit()
    one.transactions.abort()
    other.begin(one.storage)
    one.root['plain']['y'] = Blob(b'in conflict')
    other.root['plain']['y'] = 1
    other.transactions.commit()
    before_other = files(tmp_path / 'two')
    with pytest.raises(ConflictError):
        one.transactions.commit()
    one.transactions.abort()
    until(unchanged, 'nothing is left')
    assert files(tmp_path / 'two') == before_other
    one.begin(other.storage)
    assert one.read('x') == b'committed'


def test_of_two_who_change_the_same_blob_one_gets_a_conflict(
        server: Server, person: Open, tmp_path: Path) -> None:
    one, other = [person('zeo', server, blob_dir=tmp_path / name) for name in ('one', 'two')]
    one.store(x=b'before')
    other.begin(one.storage)
    for someone, data in ((one, b'one'), (other, b'other')):
        with someone.root['x'].open('w') as file:
            file.write(data)
    one.transactions.commit()
    with pytest.raises(ConflictError):
        other.transactions.commit()
    other.transactions.abort()
    other.begin(one.storage)
    assert other.read('x') == one.read('x') == b'one'


def test_what_one_has_committed_is_not_fetched(server: Server, person: Open, tmp_path: Path) -> None:
    someone = person('zeo', server, blob_dir=tmp_path / 'one')
    someone.storage._fetch_blob = None     # would fail
    someone.store(x=b'data')
    assert someone.read('x') == b'data'


# ---- copying


@pytest.mark.parametrize('share', [False, True])
def test_transactions_are_copied_with_their_blobs(
        server: Server, open_client: Open, tmp_path: Path, share: bool) -> None:
    source = FileStorage(str(tmp_path / 'source.fs'), blob_dir=str(tmp_path / 'source'))
    db = ZODB.DB(source)
    for number in range(3):
        with db.transaction() as connection:
            connection.root()['x'] = Blob(b'x' * number * 200_000)
            connection.root()[number] = Blob(b'data %d' % number)
    target = open_client('zeo', server, **(shared(server) if share else {'blob_dir': tmp_path / 'one'}))
    target.copyTransactionsFrom(source)
    reader = open_client('zeo', server, blob_dir=tmp_path / 'two')
    found = 0
    for one, other in zip(source.iterator(), reader.iterator(), strict=True):
        assert one.tid == other.tid
        for before, after in zip(one, other, strict=True):
            assert (before.oid, before.tid, before.data) == (after.oid, after.tid, after.data)
            if source.is_blob_record(before.data):
                with open(source.loadBlob(before.oid, before.tid), 'rb') as file:
                    original = file.read()
                with open(reader.loadBlob(after.oid, after.tid), 'rb') as file:
                    assert file.read() == original
                found += 1
    assert found == 6
    db.close()
    assert not in_tmp(os.path.join(server.folder, 'blobs'))


# ---- long pieces


@pytest.mark.parametrize('kind, way, by_kernel', [
    ('zeo', 'TCP', True), ('zeo', 'Unix', True), ('zeo', 'TLS', False), ('ZEO', 'TCP', False)])
def test_the_kernel_copies_between_files_and_connections_where_that_is_possible(
        start_server: Open, person: Open, tmp_path: Path, certificates: Certificates,
        monkeypatch: pytest.MonkeyPatch, kind: str, way: str, by_kernel: bool) -> None:
    copied: dict[str, int] = {}

    def counting(name: str) -> Callable[..., int]:
        function = getattr(os, name)

        def count(*args: Any) -> int:
            size: int = function(*args)
            copied[name] = copied.get(name, 0) + size
            return size
        return count

    for name in 'sendfile', 'splice':
        monkeypatch.setattr(os, name, counting(name))
    options: dict[str, Any] = {}
    if way == 'TLS':
        options['ssl'] = client_context(authenticate=certificates.ca)
    server = start_server(kind, WITH_BLOBS, **(
        {'unix': True} if way == 'Unix' else {'tls_certificate': certificates.server} if way == 'TLS' else {}))
    one = person('zeo', server, blob_dir=tmp_path / 'one', **options)
    data = os.urandom(5 * MB)
    one.store(x=data, y=data[:1000], z=data[:200_000])
    assert copied.get('sendfile', 0) == (len(data) + 200_000 if by_kernel else 0)
    other = person('zeo', server, blob_dir=tmp_path / 'two', **options)
    assert [other.read(name) for name in 'xyz'] == [data, data[:1000], data[:200_000]]
    if by_kernel:  # into a pipe and out of it, but for what came together with other messages
        assert 2 * len(data) * .9 < copied['splice'] <= 2 * (len(data) + 200_000)
    else:
        assert not copied


# ---- when the connection breaks


def test_a_download_that_is_cut_is_done_again(
        server: Server, proxy: Proxy, person: Open, tmp_path: Path) -> None:
    data = os.urandom(3 * MB)
    person('zeo', server, blob_dir=tmp_path / 'one').store(x=data)
    other = person('zeo', proxy.address, blob_dir=tmp_path / 'two')
    oid, tid = other.root['x']._p_oid, other.storage.lastTransaction()
    proxy.cut_after(MB, DOWN)
    with open(other.storage.loadBlob(oid, tid), 'rb') as file:
        assert file.read() == data
    assert proxy.connections == 2
    assert len(files(tmp_path / 'two', '.blob')) == 1 and not in_tmp(tmp_path / 'two')


@pytest.mark.parametrize('at', [200, 100_000, MB])
def test_an_upload_that_is_cut_fails_and_leaves_nothing(
        server: Server, proxy: Proxy, person: Open, tmp_path: Path, at: int) -> None:
    someone = person('zeo', proxy.address, blob_dir=tmp_path / 'one')
    someone.store(before=b'before')
    proxy.cut_after(at, UP)
    with pytest.raises(ClientDisconnected):
        someone.store(x=os.urandom(2 * MB))
    someone.transactions.abort()
    until(lambda: not in_tmp(os.path.join(server.folder, 'blobs')), 'the server removes what has come')
    assert not in_tmp(tmp_path / 'one')
    someone.begin()
    someone.store(x=b'again')
    assert someone.read('x') == b'again' and someone.read('before') == b'before'
    assert len(files(os.path.join(server.folder, 'blobs'), '.blob')) == 2


def test_a_blob_can_be_read_without_a_server_if_it_is_cached(
        server: Server, person: Open, tmp_path: Path) -> None:
    someone = person('zeo', server, blob_dir=tmp_path / 'one', wait_timeout=.2)
    someone.store(x=b'cached', y=b'not cached')
    assert someone.read('x') == b'cached'
    oid, tid = someone.root['y']._p_oid, someone.storage.lastTransaction()
    os.unlink(someone.storage.loadBlob(oid, tid))
    server.stop()
    assert someone.read('x') == b'cached'
    with pytest.raises(ClientDisconnected):
        someone.storage.loadBlob(oid, tid)
    server.start()
    until(someone.storage.is_connected, 'it is connected again')
    assert someone.read('y') == b'not cached'


@pytest.mark.parametrize('share', [False, True])
def test_a_full_disk_on_the_server_fails_the_commit_and_nothing_else(
        server: Server, person: Open, tmp_path: Path, share: bool) -> None:
    someone = person('zeo', server, **(shared(server) if share else {'blob_dir': tmp_path / 'one'}))
    someone.store(x=b'before')
    assert server.process is not None
    if share:
        # The client puts the file there; what is in its way is a folder that is not one.
        someone.storage._blobs.helper.getPathForOID = lambda oid, create: '/dev/null'
        message = f"a blob cannot be put into {server.folder}/blobs: Not a directory"
    else:
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (MB, MB))
        message = f'File too large.*{server.folder}/blobs/tmp/zeo-'
    with pytest.raises(StorageError, match=message):
        someone.store(x=b'x' * 3 * MB)
    someone.transactions.abort()
    someone.begin()
    assert someone.read('x') == b'before'
    assert not in_tmp(os.path.join(server.folder, 'blobs'))
    if not share:
        someone.store(x=b'small enough')
        assert someone.read('x') == b'small enough'


def test_a_server_that_is_killed_in_an_upload_serves_no_half_blob(
        server: Server, person: Open, tmp_path: Path) -> None:
    someone = person('zeo', server, blob_dir=tmp_path / 'one')
    someone.store(x=b'before')

    def kill() -> None:
        until(lambda: any(os.path.getsize(path) > MB for path in files(
            os.path.join(server.folder, 'blobs', 'tmp'))), 'some of it has come')
        server.kill()

    killer = Task(kill)
    with pytest.raises(ClientDisconnected):
        someone.store(x=os.urandom(64 * MB))
    killer.result()
    someone.transactions.abort()
    server.start()
    until(someone.storage.is_connected, 'it is connected again')
    someone.begin()
    assert someone.read('x') == b'before'
    someone.store(x=b'after')
    assert len(files(os.path.join(server.folder, 'blobs'), '.blob')) == 2


# ---- crowds


def slow_down(proxy: Proxy) -> None:
    """16 MB a second, and no room for more on the line than a real one has."""
    for sock in proxy._sockets:
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, 64 * 1024)
    proxy.delay = .004      # for each piece of up to 64 KB


def test_small_loads_go_on_beside_a_large_download(
        server: Server, proxy: Proxy, person: Open, open_client: Open, tmp_path: Path) -> None:
    one = person('zeo', server, blob_dir=tmp_path / 'one')
    for number in range(20):
        one.root[number] = one.root.__class__()
    one.store(x=b'x' * 16 * MB)
    oids = [one.root[number]._p_oid for number in range(20)]
    x, tid = one.root['x']._p_oid, one.storage.lastTransaction()
    slow = open_client('zeo', proxy.address, blob_dir=tmp_path / 'two')
    slow_down(proxy)
    other = open_client('zeo', server, blob_dir=tmp_path / 'three')
    download = Task(slow.loadBlob, x, tid)
    until(lambda: in_tmp(tmp_path / 'two'), 'it begins to arrive')
    for oid in oids:
        other.load(oid)
    for oid in oids[:5]:
        slow.load(oid)
    assert not files(tmp_path / 'two', '.blob') and download.is_alive()
    assert os.path.getsize(download.result()) == 16 * MB


def test_small_loads_go_on_beside_a_large_upload(
        server: Server, proxy: Proxy, person: Open, open_client: Open, tmp_path: Path) -> None:
    one = person('zeo', server, blob_dir=tmp_path / 'one')
    for number in range(20):
        one.root[number] = one.root.__class__()
    one.transactions.commit()
    oids = [one.root[number]._p_oid for number in range(20)]
    slow = person('zeo', proxy.address, blob_dir=tmp_path / 'two', cache_size=10_000)
    slow.root['x'] = Blob(b'x' * 16 * MB)
    slow_down(proxy)
    upload = Task(slow.transactions.commit)
    uploads = os.path.join(server.folder, 'blobs', 'tmp')
    until(lambda: os.listdir(uploads), 'it begins to arrive')
    for oid in oids:
        one.storage.load(oid)
    for oid in oids[:5]:
        slow.storage._call('loadSerial', oid, slow.storage.getTid(oid))
    assert upload.is_alive() and os.listdir(uploads)
    one.root[0]['y'] = Blob(b'meanwhile')
    one.transactions.commit()       # nobody waits for an upload with the commit lock
    assert upload.is_alive()
    upload.result()
    assert os.path.getsize(slow.storage.loadBlob(slow.root['x']._p_oid, slow.storage.lastTransaction()))


READER = """
import random, sys
import ZODB, ZODB.blob
from zeo.ClientStorage import ClientStorage
from zeo.client import blobcache
blobcache.JUST_USED = 0.0
host, port, folder, seed = sys.argv[1:]
chance = random.Random(seed)
db = ZODB.DB(ClientStorage((host, int(port)), blob_dir=folder, blob_cache_size=100_000))
with db.transaction() as connection:
    for _ in range(200):
        number = chance.randint(0, 49)
        with connection.root()[number].open('r') as file:
            data = file.read()
        assert data == bytes([number]) * 10_000, (number, len(data))
db.close()
"""


def test_several_processes_share_a_cache_that_is_too_small(
        server: Server, person: Open, tmp_path: Path) -> None:
    someone = person('zeo', server, blob_dir=tmp_path / 'one')
    for number in range(50):
        someone.root[number] = Blob(bytes([number]) * 10_000)
    someone.transactions.commit()
    host, port = server.address
    readers = [subprocess.Popen(
        [sys.executable, '-c', READER, str(host), str(port), str(tmp_path / 'shared'), str(seed)],
        env=dict(os.environ, PYTHONPATH=str(ROOT)), stderr=subprocess.PIPE, text=True) for seed in range(3)]
    for reader in readers:
        _, errors = reader.communicate(timeout=PATIENCE)
        assert reader.returncode == 0, errors
    cache = blobcache.BlobCache(str(tmp_path / 'shared'), 100_000)
    cache.close()
    for path in files(tmp_path / 'shared', '.blob'):
        assert os.path.getsize(path) == 10_000
    assert not in_tmp(tmp_path / 'shared')


def test_a_cache_that_is_too_small_for_many_threads_serves_them_all(
        server: Server, open_client: Open, person: Open, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blobcache, 'JUST_USED', 0.0)
    someone = person('zeo', server, blob_dir=tmp_path / 'one')
    for number in range(50):
        someone.root[number] = Blob(bytes([number]) * 1000)
    someone.transactions.commit()
    storages = [open_client('zeo', server, blob_dir=tmp_path / 'shared', blob_cache_size=5000)
                for _ in range(2)]
    keys = [(someone.root[number]._p_oid, someone.storage.lastTransaction()) for number in range(50)]

    def work(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(100):
            number = chance.randint(0, 49)
            with storages[seed % 2].openCommittedBlobFile(*keys[number]) as file:
                assert file.read() == bytes([number]) * 1000

    tasks = [Task(work, seed) for seed in range(6)]
    for task in tasks:
        task.result()
    for storage in storages:
        storage.close()
    assert not [thread for thread in threading.enumerate() if thread.name == 'zeo blob cache']


def test_a_child_process_goes_on_with_the_same_cache(
        server: Server, person: Open, tmp_path: Path) -> None:
    someone = person('zeo', server, blob_dir=tmp_path / 'one')
    someone.store(x=b'cached', y=b'not cached')
    keys = {name: (someone.root[name]._p_oid, someone.storage.lastTransaction()) for name in 'xy'}
    os.unlink(someone.storage.loadBlob(*keys['y']))
    child = os.fork()
    if not child:
        status = 1
        try:
            for name, data in (('x', b'cached'), ('y', b'not cached')):
                with someone.storage.openCommittedBlobFile(*keys[name]) as file:
                    assert file.read() == data
            someone.storage.close()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert someone.read('x') == b'cached' and someone.read('y') == b'not cached'


# ---- memory


def peak(pid: int) -> int:
    """The most memory in bytes that a process has had."""
    with open(f'/proc/{pid}/status') as file:
        [line] = [line for line in file if line.startswith('VmHWM')]
    return int(line.split()[1]) * 1024


CARRIER = """
import os, sys
from ZODB.Connection import TransactionMetaData
from zeo.ClientStorage import ClientStorage
host, port, folder, size = sys.argv[1:]
size = int(size)
def peak():
    [line] = [line for line in open('/proc/self/status') if line.startswith('VmHWM')]
    return int(line.split()[1]) * 1024
up = ClientStorage((host, int(port)), blob_dir=folder + '/up')
down = ClientStorage((host, int(port)), blob_dir=folder + '/down')
source = folder + '/source'
with open(source, 'wb') as file:
    file.truncate(size)
    file.write(b'start')
    file.seek(size - 3)
    file.write(b'end')
before = peak()
oid, meta = up.new_oid(), TransactionMetaData()
up.tpc_begin(meta)
up.storeBlob(oid, None, b'record', source, '', meta)
up.tpc_vote(meta)
tid = up.tpc_finish(meta)
path = down.loadBlob(oid, tid)
print(peak() - before, flush=True)
with open(path, 'rb') as file:
    assert os.fstat(file.fileno()).st_size == size
    assert file.read(7) == b'start\\0\\0'
    file.seek(size - 5)
    assert file.read() == b'\\0\\0end'
up.close()
down.close()
"""


@pytest.mark.timeout(600)
@pytest.mark.parametrize('size', [64 * MB, pytest.param(1024 * MB, marks=pytest.mark.soak)])
def test_a_large_blob_takes_little_memory_on_either_side(
        server: Server, open_client: Open, tmp_path: Path, size: int) -> None:
    host, port = server.address
    open_client('zeo', server, blob_dir=tmp_path / 'first').new_oid()
    assert server.process is not None
    before = peak(server.process.pid)
    carried = subprocess.run(
        [sys.executable, '-c', CARRIER, str(host), str(port), str(tmp_path), str(size)],
        env=dict(os.environ, PYTHONPATH=str(ROOT)), stdout=subprocess.PIPE, text=True, check=True,
        timeout=500)
    of_the_server = peak(server.process.pid) - before
    print(f'{size // MB} MB: client {int(carried.stdout) / MB:.1f} MB, server {of_the_server / MB:.1f} MB')
    assert int(carried.stdout) < 10 * MB
    assert of_the_server < 10 * MB
