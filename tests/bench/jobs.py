"""What worker processes do: the jobs of `tests.bench.measure.Worker`, in terms of a storage."""

import os
import shutil
import threading
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from tests.bench.measure import median, pause, timed, wait_until
from tests.bench.sides import Server, oids

MAXTID = b'\x7f' + b'\xff' * 7


def prepare(space: SimpleNamespace, server: Server) -> None:
    """Know the server; nothing is opened yet."""
    space.server = server
    space.storages = []


def open_client(space: SimpleNamespace, **options: Any) -> float:
    """Have one storage, a fresh one; returns how long opening it took."""
    close_clients(space)
    server = space.server
    begin = time.perf_counter()
    space.storage = server.side.open(server.address, server.path, **options)
    space.storages.append(space.storage)
    return time.perf_counter() - begin


def open_plain(space: SimpleNamespace, *_: Any) -> None:
    open_client(space)


def close_clients(space: SimpleNamespace, *_: Any) -> None:
    while space.storages:
        space.storages.pop().close()


# ---- blobs

def open_with_blobs(space: SimpleNamespace, name: str) -> None:
    """Have a storage with a blob cache of its own, which is empty."""
    cache = f'{space.server.path}.{name}'
    shutil.rmtree(cache, ignore_errors=True)
    open_client(space, blob_dir=cache)


def make_blob(space: SimpleNamespace, size: int) -> None:
    """Write the file that is uploaded next."""
    space.source = os.path.join(space.storage.temporaryDirectory(), 'source')
    with open(space.source, 'wb') as file:
        piece = os.urandom(1024 * 1024)
        for _ in range(size // len(piece)):
            file.write(piece)


def upload(space: SimpleNamespace) -> tuple[float, bytes, bytes]:
    """Commit a blob; the time from its store to the end of the commit, its oid and its tid."""
    from ZODB.Connection import TransactionMetaData
    storage, transaction = space.storage, TransactionMetaData()
    oid = storage.new_oid()
    begin = time.perf_counter()
    storage.tpc_begin(transaction)
    storage.storeBlob(oid, bytes(8), b'blob', space.source, '', transaction)
    storage.tpc_vote(transaction)
    tid = storage.tpc_finish(transaction)
    return time.perf_counter() - begin, oid, tid


def download(space: SimpleNamespace, oid: bytes, tid: bytes) -> float:
    """The time until a blob is here."""
    begin = time.perf_counter()
    path = space.storage.loadBlob(oid, tid)
    seconds = time.perf_counter() - begin
    os.unlink(path)
    return seconds


# ---- loading

def load(space: SimpleNamespace, wanted: Sequence[bytes]) -> list[float]:
    """The time that each load took."""
    load = space.storage.loadBefore
    return timed(lambda oid: load(oid, MAXTID), wanted)


def load_slice(space: SimpleNamespace, count: int, number: int) -> tuple[float, float, list[float]]:
    """Load so many objects, another slice for each worker; begin, end, and the time of each."""
    wanted = oids(1 + number * count, count)
    begin = time.perf_counter()
    times = load(space, wanted)
    return begin, time.perf_counter(), times


def load_in_threads(space: SimpleNamespace, threads: int, count: int) -> float:
    """Load ``count`` objects in each of some threads; returns the time until all are done."""
    ready = threading.Barrier(threads + 1)

    def run(wanted: Sequence[bytes]) -> None:
        ready.wait()
        load(space, wanted)

    team = [threading.Thread(target=run, args=(oids(1 + number * count, count),))
            for number in range(threads)]
    for thread in team:
        thread.start()
    begin = time.perf_counter()
    ready.wait()
    for thread in team:
        thread.join()
    return time.perf_counter() - begin


def hit(space: SimpleNamespace, wanted: Sequence[bytes], times: int) -> float:
    """Load what is cached, again and again; returns the time of one load."""
    load = space.storage.loadBefore
    for oid in wanted:
        load(oid, MAXTID)
    rounds = []
    for _ in range(times):
        begin = time.perf_counter()
        for oid in wanted:
            load(oid, MAXTID)
        rounds.append((time.perf_counter() - begin) / len(wanted))
    return median(rounds)


def prefetch(space: SimpleNamespace, wanted: Sequence[bytes]) -> float:
    """Announce what will be loaded, then load it; returns the time of all."""
    begin = time.perf_counter()
    space.storage.prefetch(wanted, MAXTID)
    for oid in wanted:
        space.storage.loadBefore(oid, MAXTID)
    return time.perf_counter() - begin


def fill_cache(space: SimpleNamespace, count: int, **options: Any) -> None:
    """Load so many objects into a persistent cache, and leave."""
    open_client(space, **options)
    for first in range(1, count + 1, 1000):
        prefetch(space, oids(first, min(1000, count + 1 - first)))
    close_clients(space)


def reopen_cache(space: SimpleNamespace, count: int, **options: Any) -> float:
    """Open a client with a full cache; returns the time until an object is there."""
    close_clients(space)
    begin = time.perf_counter()
    open_client(space, **options)
    space.storage.loadBefore(oids(count // 2, 1)[0], MAXTID)
    taken = time.perf_counter() - begin
    close_clients(space)
    return taken


# ---- committing

class Committer:
    """Commits new revisions of some objects, again and again, and takes the time of each commit."""

    def __init__(self, storage: Any, wanted: Sequence[bytes], size: int) -> None:
        self._storage = storage
        self._wanted = wanted
        self._record = b'x' * size
        self._serial = storage.loadBefore(wanted[0], MAXTID)[1]
        for oid in wanted[1:]:
            assert storage.loadBefore(oid, MAXTID)[1] == self._serial

    def commit(self) -> tuple[bytes, float, float, float]:
        """Tid; when the transaction was begun, when finishing it was begun, when it was finished."""
        from ZODB.Connection import TransactionMetaData
        clock = time.perf_counter
        storage, serial, record = self._storage, self._serial, self._record
        transaction = TransactionMetaData()
        begin = clock()
        storage.tpc_begin(transaction)
        for oid in self._wanted:
            storage.store(oid, serial, record, '', transaction)
        storage.tpc_vote(transaction)
        finish = clock()
        told: list[bytes] = []
        tid = storage.tpc_finish(transaction, told.append)
        end = clock()
        self._serial = tid or told[0]
        return self._serial, begin, finish, end


def open_committer(space: SimpleNamespace, count: int, size: int, number: int = 0) -> None:
    """Be ready to commit ``count`` objects at a time; each worker has others."""
    open_client(space)
    space.committer = Committer(space.storage, oids(1 + number * count, count), size)


def commit(space: SimpleNamespace, times: int, wait: float = 0,
           number: int = 0) -> list[tuple[bytes, float, float, float]]:
    """Commit so many times, waiting some seconds before each."""
    done = []
    for _ in range(times):
        if wait:
            pause(wait)
        done.append(space.committer.commit())
    return done


def commit_until_told(space: SimpleNamespace, number: int) -> int:
    done = 0
    while not space.told_to_stop():
        space.committer.commit()
        done += 1
    return done


# ---- watching

class Watcher:
    """What a storage tells of others' transactions: a stand-in for a `ZODB.DB`."""

    def __init__(self) -> None:
        self.seen: dict[bytes, float] = {}

    def invalidate(self, tid: bytes, oids: Any) -> None:
        self.seen[tid] = time.perf_counter()

    def invalidateCache(self) -> None:
        pass

    def references(self, record: bytes, oids: Any = None) -> list[bytes]:
        return []

    def transform_record_data(self, data: bytes) -> bytes:
        return data

    untransform_record_data = transform_record_data


def open_watchers(space: SimpleNamespace, count: int, number: int) -> None:
    """Have so many idle clients."""
    close_clients(space)
    server = space.server
    space.watchers = [Watcher() for _ in range(count)]
    for watcher in space.watchers:
        storage = server.side.open(server.address, server.path)
        storage.registerDB(watcher)
        space.storages.append(storage)


def seen(space: SimpleNamespace, tids: Sequence[bytes], number: int) -> list[float]:
    """When each of these transactions was known to all clients here."""
    wait_until(lambda: all(tids[-1] in watcher.seen for watcher in space.watchers),
               'the last transaction is seen', 30)
    return [max(watcher.seen[tid] for watcher in space.watchers) for tid in tids]
