"""The folder in which a client keeps blobs."""

import errno
import fcntl
import os
import stat
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ZODB.blob import FilesystemHelper
from ZODB.POSException import POSKeyError

from tests.client.conftest import Calls
from tests.client.interruptions import everywhere
from tests.client.peer import PATIENCE
from tests.client.peer import oid
from tests.client.peer import tid
from zeo.client import blobcache
from zeo.client import blobfiles
from zeo.client.arrivals import Arrivals
from zeo.client.blobcache import BlobCache
from zeo.errors import ClientStorageError

Open = Callable[..., BlobCache]


@pytest.fixture
def open_cache(tmp_path: Path) -> Iterator[Open]:
    caches: list[BlobCache] = []

    def open_cache(*args: Any, folder: Path = tmp_path / 'cache') -> BlobCache:
        caches.append(BlobCache(str(folder), *args))
        return caches[-1]

    yield open_cache
    for cache in caches:
        cache.close()


@pytest.fixture
def cache(open_cache: Open) -> BlobCache:
    return open_cache()


class Server:
    """Has blobs, and sends them when it is asked."""

    def __init__(self, cache: BlobCache) -> None:
        self.blobs: dict[tuple[bytes, bytes], bytes] = {}
        self.asked: list[tuple[bytes, bytes]] = []
        self.arrivals: Arrivals = cache.arrivals()

    def fetch(self, oid: bytes, tid: bytes) -> None:
        self.asked.append((oid, tid))
        data = self.blobs[oid, tid]
        self.arrivals.start(oid, tid)
        for at in range(0, len(data), 7):
            self.arrivals.add(oid, tid, memoryview(data)[at:at + 7])
        self.arrivals.complete(oid, tid)


@pytest.fixture
def server(cache: BlobCache) -> Server:
    return Server(cache)


def fails(*_: Any) -> None:
    raise AssertionError('the server need not be asked')


def files(folder: str | Path) -> list[str]:
    """What looks like a whole blob."""
    return sorted(name for _, _, names in os.walk(folder) for name in names if name.endswith('.blob'))


def temporary(cache: BlobCache) -> list[str]:
    return os.listdir(cache.temporary)


def put(cache: BlobCache, number: int, data: bytes, used: float = 0.0) -> str:
    """Have a blob in the cache that was used ``used`` seconds ago."""
    source = os.path.join(cache.folder, f'tmp/source{number}')
    Path(source).write_bytes(data)
    cache.keep(oid(number), tid(1), cache.take(oid(number), source))
    path = cache.get(oid(number), tid(1), fails)
    then = time.time() - used
    os.utime(path, (then, then))
    return path


# ---- what is there is right


def test_a_blob_is_fetched_once(cache: BlobCache, server: Server) -> None:
    server.blobs[oid(1), tid(1)] = b'some data'
    for _ in range(3):
        assert Path(cache.get(oid(1), tid(1), server.fetch)).read_bytes() == b'some data'
    assert server.asked == [(oid(1), tid(1))]
    assert not temporary(cache)


def test_revisions_and_objects_are_kept_apart(cache: BlobCache, server: Server) -> None:
    keys = [(oid(number), tid(revision)) for number in (1, 998, 997 * 3 + 1) for revision in (1, 2)]
    for key in keys:
        server.blobs[key] = repr(key).encode()
    paths = {cache.get(*key, server.fetch) for key in keys}
    assert len(paths) == len(keys)
    assert all(Path(cache.get(*key, fails)).read_bytes() == repr(key).encode() for key in keys)


def test_a_new_connection_has_its_own_arrivals(cache: BlobCache) -> None:
    before = cache.arrivals()
    before.start(oid(1), tid(1))
    after = cache.arrivals()
    assert not temporary(cache)
    after.start(oid(1), tid(1))
    before.add(oid(1), tid(1), b'wrong')
    before.complete(oid(1), tid(1))
    assert not files(cache.folder)
    after.add(oid(1), tid(1), b'right')
    after.complete(oid(1), tid(1))
    assert Path(cache.get(oid(1), tid(1), fails)).read_bytes() == b'right'


def test_what_the_server_does_not_have_is_a_key_error(cache: BlobCache) -> None:
    with pytest.raises(POSKeyError):
        cache.get(oid(1), tid(1), lambda *_: None)


def test_one_of_many_threads_fetches(cache: BlobCache, server: Server, calls: Calls) -> None:
    server.blobs[oid(1), tid(1)] = b'some data'
    fetching, go_on = threading.Event(), threading.Event()

    def fetch(oid: bytes, tid: bytes) -> None:
        fetching.set()
        assert go_on.wait(PATIENCE)
        server.fetch(oid, tid)

    results = [calls.start(cache.get, oid(1), tid(1), fetch)]
    assert fetching.wait(PATIENCE)
    results += [calls.start(cache.get, oid(1), tid(1), server.fetch) for _ in range(9)]
    go_on.set()
    assert len({result() for result in results}) == 1
    assert server.asked == [(oid(1), tid(1))]


def test_what_another_thread_has_fetched_this_moment_is_not_fetched_again(
        cache: BlobCache, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(cache, 1, b'some data')
    looks = iter([False, True])
    monkeypatch.setattr(cache, '_use', lambda _: next(looks))
    assert cache.get(oid(1), tid(1), fails) == path


def test_when_one_thread_fails_to_fetch_the_next_tries(
        cache: BlobCache, server: Server, calls: Calls) -> None:
    server.blobs[oid(1), tid(1)] = b'some data'
    fetching, go_on = threading.Event(), threading.Event()

    def fetch(*_: Any) -> None:
        fetching.set()
        assert go_on.wait(PATIENCE)
        raise ConnectionError('lost')

    first = calls.start(cache.get, oid(1), tid(1), fetch)
    assert fetching.wait(PATIENCE)
    second = calls.start(cache.get, oid(1), tid(1), server.fetch)
    go_on.set()
    with pytest.raises(ConnectionError):
        first()
    assert Path(second()).read_bytes() == b'some data'


def test_who_fetches_may_be_interrupted_anywhere(
        cache: BlobCache, server: Server, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    """And who waits for that, or wants the blob later, gets it."""
    monkeypatch.setattr(blobcache, 'LAST_LOOK', .02)
    for number, interruption in enumerate(everywhere(blobcache), 1):
        key = oid(number), tid(1)
        server.blobs[key] = b'some data'
        waiting: list[Any] = []

        def fetch(oid: bytes, tid: bytes) -> None:
            waiting.append(calls.start(cache.get, oid, tid, server.fetch))
            server.fetch(oid, tid)

        interruption.run(cache.get, *key, fetch)
        waiting.append(calls.start(cache.get, *key, server.fetch))
        for result in waiting:
            assert Path(result()).read_bytes() == b'some data', interruption.where


def test_a_destructor_that_wants_the_blob_whose_fetching_it_interrupts_is_refused(
        cache: BlobCache, server: Server, calls: Calls) -> None:
    server.blobs[oid(1), tid(1)] = b'some data'

    def fetch(oid: bytes, tid: bytes) -> None:
        with pytest.raises(ClientStorageError, match='interrupted'):
            cache.get(oid, tid, fails)
        server.fetch(oid, tid)

    assert Path(calls.start(cache.get, oid(1), tid(1), fetch)()).read_bytes() == b'some data'


def test_a_destructor_may_load_a_blob_while_room_is_about_to_be_made(
        open_cache: Open, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = open_cache(1000, 0)
    server = Server(cache)
    cache.close()
    found: list[str] = []

    def interrupted(**options: Any) -> threading.Thread:
        if not found:
            server.blobs[oid(1), tid(1)] = b'some data'
            found.append('')
            found[0] = cache.get(oid(1), tid(1), server.fetch)
        return threading.Thread(**options)

    monkeypatch.setattr(blobcache, 'threading', SimpleNamespace(**{**vars(threading), 'Thread': interrupted}))
    calls.start(cache._grown, 1000)()
    assert Path(found[0]).read_bytes() == b'some data'


def test_two_caches_may_share_a_folder(open_cache: Open) -> None:
    one, other = open_cache(), open_cache()
    path = put(one, 1, b'some data')
    assert other.get(oid(1), tid(1), fails) == path
    server = Server(other)
    server.blobs[oid(1), tid(1)] = b'some data'
    server.fetch(oid(1), tid(1))     # both fetched it at the same time
    assert Path(path).read_bytes() == b'some data'


def test_a_cache_of_zeo_is_taken_over(open_cache: Open, tmp_path: Path) -> None:
    import ZEO.ClientStorage
    theirs = ZEO.ClientStorage.BlobCacheLayout()
    folder = tmp_path / 'theirs'
    path = folder / theirs.getBlobFilePath(oid(12345), tid(6789))
    path.parent.mkdir(parents=True)
    path.write_bytes(b'some data')
    (folder / '.layout').write_text('zeocache')
    assert open_cache(folder=folder).get(oid(12345), tid(6789), fails) == str(path)


# ---- commits


def test_what_was_committed_is_cached(cache: BlobCache, tmp_path: Path) -> None:
    source = tmp_path / 'source'
    source.write_bytes(b'some data')
    taken = cache.take(oid(1), str(source))
    assert not source.exists() and not files(cache.folder)
    cache.keep(oid(1), tid(1), taken)
    assert Path(cache.get(oid(1), tid(1), fails)).read_bytes() == b'some data'
    assert not temporary(cache)


def test_what_was_aborted_is_gone(cache: BlobCache, tmp_path: Path) -> None:
    source = tmp_path / 'source'
    source.write_bytes(b'some data')
    cache.discard(cache.take(oid(1), str(source)))
    cache.discard('/no/such/file')
    assert not files(cache.folder) and not temporary(cache)


def test_a_commit_does_not_fail_because_its_blob_cannot_be_kept(
        cache: BlobCache, caplog: pytest.LogCaptureFixture) -> None:
    cache.keep(oid(1), tid(1), '/no/such/file')
    assert cache.folder in caplog.text and '/no/such/file' in caplog.text


def test_a_file_that_cannot_be_taken_stays_where_it_is(cache: BlobCache, tmp_path: Path) -> None:
    with pytest.raises(ClientStorageError, match=f'a blob cannot be put into {cache.temporary}: No such'):
        cache.take(oid(1), str(tmp_path / 'nothing'))
    assert not temporary(cache)


def test_a_file_on_another_file_system_is_taken_all_the_same(
        cache: BlobCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.rename

    def not_across(source: str, target: str) -> None:
        if source == str(tmp_path / 'file'):
            raise OSError(errno.EXDEV, 'Invalid cross-device link')
        rename(source, target)

    monkeypatch.setattr(os, 'rename', not_across)
    (tmp_path / 'file').write_bytes(b'data')
    taken = cache.take(oid(1), str(tmp_path / 'file'))
    assert Path(taken).read_bytes() == b'data' and not (tmp_path / 'file').exists()
    cache.keep(oid(1), tid(1), taken)
    assert not temporary(cache)


# ---- permissions


def test_a_new_folder_is_private_and_files_are_read_only(cache: BlobCache, tmp_path: Path) -> None:
    path = put(cache, 1, b'some data')
    assert stat.S_IMODE(os.stat(cache.folder).st_mode) == 0o700
    assert stat.S_IMODE(os.stat(os.path.dirname(path)).st_mode) == 0o700
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o400


def test_who_may_use_the_folder_may_use_what_is_in_it(open_cache: Open, tmp_path: Path) -> None:
    folder = tmp_path / 'group'
    folder.mkdir()
    folder.chmod(0o2770)
    cache = open_cache(folder=folder)
    path = put(cache, 1, b'some data')
    assert stat.S_IMODE(os.stat(cache.temporary).st_mode) == 0o2770
    assert stat.S_IMODE(os.stat(os.path.dirname(path)).st_mode) == 0o2770
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o440


# ---- what can be wrong with the folder


def test_a_folder_that_cannot_be_made_is_named(open_cache: Open, tmp_path: Path) -> None:
    (tmp_path / 'file').write_text('')
    for folder in tmp_path / 'file', tmp_path / 'file' / 'cache':
        with pytest.raises(ClientStorageError, match=f'the blob cache folder {folder} cannot be used: Not a'):
            open_cache(folder=folder)


def test_a_folder_that_cannot_be_written_is_named(
        open_cache: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, 'access', lambda *_: False)     # root may do everything
    with pytest.raises(ClientStorageError, match=f'{tmp_path}/cache cannot be used: it is not writable'):
        open_cache()


def test_the_folder_of_a_storage_is_not_used_as_a_cache(open_cache: Open, tmp_path: Path) -> None:
    FilesystemHelper(str(tmp_path / 'blobs')).create()
    with pytest.raises(ClientStorageError, match='it is the folder of a storage, not a cache; give another'):
        open_cache(folder=tmp_path / 'blobs')


def test_a_folder_with_other_things_is_not_used(open_cache: Open, tmp_path: Path) -> None:
    (tmp_path / 'home').mkdir()
    (tmp_path / 'home' / 'letters').write_text('')
    with pytest.raises(ClientStorageError, match='it contains something else'):
        open_cache(folder=tmp_path / 'home')


@pytest.mark.parametrize('check', [-1, 100, 1000])
def test_a_share_of_the_size_is_a_percentage(open_cache: Open, check: int) -> None:
    with pytest.raises(ValueError, match='blob_cache_size_check'):
        open_cache(1000, check)


def test_a_full_disk_fails_who_asked_and_leaves_nothing(
        cache: BlobCache, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(prefix: str, suffix: str, dir: str) -> tuple[int, str]:
        path = f'{dir}/{prefix}full{suffix}'
        Path(path).write_bytes(b'')
        return os.open('/dev/full', os.O_WRONLY), path

    server.blobs[oid(1), tid(1)] = b'some data'
    with monkeypatch.context() as patch:
        patch.setattr(blobfiles.tempfile, 'mkstemp', full)
        with pytest.raises(ClientStorageError, match=f'{cache.folder} cannot be written to: No space left'):
            cache.get(oid(1), tid(1), server.fetch)
    assert not temporary(cache)
    assert Path(cache.get(oid(1), tid(1), server.fetch)).read_bytes() == b'some data'


def test_a_folder_that_vanished_is_named(cache: BlobCache, server: Server) -> None:
    os.rmdir(cache.temporary)
    server.blobs[oid(1), tid(1)] = b'some data'
    with pytest.raises(ClientStorageError, match=f'{cache.folder} cannot be written to: No such file'):
        cache.get(oid(1), tid(1), server.fetch)


# ---- making room


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody makes room but the test."""
    monkeypatch.setattr(BlobCache, '_grown', lambda *_: None)


@pytest.mark.usefixtures('idle')
def test_those_used_longest_ago_go_first(open_cache: Open) -> None:
    cache = open_cache(400, 0)
    for number, used in [(1, 50), (2, 300), (3, 100), (4, 400), (5, 200), (6, 60)]:
        put(cache, number, b'x' * 100, used=used)
    assert cache.sweep()
    assert {number for number in range(1, 7) if is_cached(cache, number)} == {1, 3, 5, 6}


def is_cached(cache: BlobCache, number: int) -> bool:
    return os.path.exists(cache.helper.getBlobFilename(oid(number), tid(1)))


@pytest.mark.usefixtures('idle')
def test_room_is_made_for_what_comes_until_the_next_look(open_cache: Open) -> None:
    cache = open_cache(1000, 25)
    for number in range(1, 11):
        put(cache, number, b'x' * 100, used=1000 - number)
    assert cache.sweep() and len(files(cache.folder)) == 10     # just enough room
    put(cache, 11, b'x' * 100, used=100)
    assert cache.sweep()
    assert {number for number in range(1, 12) if is_cached(cache, number)} == set(range(5, 12))


@pytest.mark.usefixtures('idle')
def test_what_is_open_stays(open_cache: Open) -> None:
    cache = open_cache(100, 0)
    for number in (1, 2, 3):
        put(cache, number, b'x' * 100, used=100)
    with cache.open(oid(2), tid(1), fails):
        os.utime(cache.helper.getBlobFilename(oid(2), tid(1)), (1, 1))
        assert cache.sweep()
        assert [is_cached(cache, number) for number in (1, 2, 3)] == [False, True, False]
    put(cache, 4, b'x' * 100, used=100)
    os.utime(cache.helper.getBlobFilename(oid(2), tid(1)), (1, 1))
    assert cache.sweep()
    assert not is_cached(cache, 2)


@pytest.mark.usefixtures('idle')
def test_what_was_just_used_stays(open_cache: Open) -> None:
    cache = open_cache(100, 0)
    for number in (1, 2, 3):
        put(cache, number, b'x' * 100, used=100)
    cache.get(oid(2), tid(1), fails)
    cache.get(oid(3), tid(1), fails)
    assert not cache.sweep()     # to be looked at again
    assert [is_cached(cache, number) for number in (1, 2, 3)] == [False, True, True]


@pytest.mark.usefixtures('idle')
def test_only_blobs_are_removed(open_cache: Open) -> None:
    cache = open_cache(0, 0)
    path = put(cache, 1, b'x' * 100, used=100)
    others = [os.path.join(cache.folder, 'README'), os.path.join(os.path.dirname(path), '.lock'),
              os.path.join(cache.temporary, 'BUCx')]
    for other in others:
        Path(other).write_text('something else')
    assert cache.sweep()
    assert not os.path.exists(path) and all(map(os.path.exists, others))


def test_room_is_made_when_enough_has_come_in(open_cache: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blobcache, 'JUST_USED', -1.0)     # even what was used this moment may go
    cache = open_cache(1000, 10)
    for number in range(1, 100):
        put_quickly(cache, number)
    for thread in threading.enumerate():
        if thread.name == 'zeo blob cache':
            thread.join(PATIENCE)
    cache._grown(1000)
    cache.close()
    assert len(files(cache.folder)) <= 10


def put_quickly(cache: BlobCache, number: int) -> None:
    source = os.path.join(cache.temporary, f'source{number}')
    Path(source).write_bytes(b'x' * 100)
    cache.keep(oid(number), tid(1), cache.take(oid(number), source))


def test_two_who_make_room_do_not_remove_twice_as_much(
        open_cache: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlobCache, '_grown', lambda *_: None)
    one, other = open_cache(500, 0), open_cache(500, 0)
    for number in range(1, 11):
        put(one, number, b'x' * 100, used=1000 - number)
    found = list(other._files())
    assert one.sweep()
    monkeypatch.setattr(other, '_files', lambda: iter(found))     # it looked at the same time
    assert other.sweep()
    assert len(files(one.folder)) == 5


def test_what_is_removed_while_it_is_opened_is_fetched_again(cache: BlobCache, server: Server,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    server.blobs[oid(1), tid(1)] = b'some data'
    get, times = cache.get, iter([True, True, False])

    def get_and_lose(*args: Any) -> str:
        path = get(*args)
        if next(times):
            os.unlink(path)
        return path

    monkeypatch.setattr(cache, 'get', get_and_lose)
    with cache.open(oid(1), tid(1), server.fetch) as file:
        assert file.read() == b'some data'
    assert len(server.asked) == 3


def test_a_cache_whose_files_always_vanish_says_so(cache: BlobCache, server: Server,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, 'get', lambda *_: '/no/such/file')
    with pytest.raises(ClientStorageError, match=f'blobs vanish from the cache folder {cache.folder}'):
        cache.open(oid(1), tid(1), server.fetch)


def test_readers_share_an_open_file(cache: BlobCache) -> None:
    put(cache, 1, b'some data')
    with cache.open(oid(1), tid(1), fails) as one, cache.open(oid(1), tid(1), fails) as other:
        assert one.read() == other.read() == b'some data'
        with open(one.name, 'rb') as third, pytest.raises(BlockingIOError):
            fcntl.flock(third, fcntl.LOCK_EX | fcntl.LOCK_NB)


# ---- after a crash


def test_only_old_temporary_files_are_removed(open_cache: Open) -> None:
    cache = open_cache()
    for name, age in [('zeo-old.tmp', 2), ('zeo-new.tmp', 0), ('BUC-old.tmp', 2)]:
        path = os.path.join(cache.temporary, name)
        Path(path).write_text('')
        then = time.time() - age * blobcache.LEFT_BEHIND
        os.utime(path, (then, then))
    open_cache()
    assert sorted(temporary(cache)) == ['BUC-old.tmp', 'zeo-new.tmp']


def test_after_the_machine_went_down_what_came_last_is_fetched_again(
        open_cache: Open, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    boot = tmp_path / 'boot'
    monkeypatch.setattr(blobcache, 'BOOT_ID', str(boot))
    boot.write_text('one\n')
    cache = open_cache()
    found = cache._files
    for number in (1, 2, 3):
        put(cache, number, b'some data')
    open_cache()
    assert [is_cached(cache, number) for number in (1, 2, 3)] == [True, True, True]

    def aged(self: BlobCache) -> Iterator[blobcache._File]:
        for file in found():
            first = file.path == cache.helper.getBlobFilename(oid(1), tid(1))
            yield file._replace(changed=file.changed - (blobcache.UNSETTLED + 1 if first else 0))

    boot.write_text('two\n')
    monkeypatch.setattr(BlobCache, '_files', aged)
    open_cache()
    assert [is_cached(cache, number) for number in (1, 2, 3)] == [True, False, False]
    put(cache, 2, b'some data')
    open_cache()
    assert is_cached(cache, 2)


# ---- fork


def test_a_child_leaves_what_arrives_to_its_parent(cache: BlobCache, server: Server) -> None:
    server.arrivals.start(oid(1), tid(1))
    server.arrivals.add(oid(1), tid(1), b'some ')
    child = os.fork()
    if not child:
        status = 1
        try:
            cache.abandon()
            cache.close()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    server.arrivals.add(oid(1), tid(1), b'data')
    server.arrivals.complete(oid(1), tid(1))
    assert Path(cache.get(oid(1), tid(1), fails)).read_bytes() == b'some data'
