"""What is measured: one generator function for each workload.

A workload is called once for each side, sets up what it needs, and yields one sample for each round
until it is closed.  So the rounds of all sides can be interleaved.  A sample maps the names of metrics
to numbers in seconds, bytes, or operations per second.
"""

import os
from collections.abc import Callable, Generator, Sequence
from functools import partial
from time import perf_counter
from typing import NamedTuple

from tests.bench import jobs
from tests.bench.measure import Cpu, Worker, all_call, median, open_files, percentile
from tests.bench.measure import resident_bytes, wait_until, workers
from tests.bench.peers import Peer, connect_many, first_contact, free_port
from tests.bench.sides import Address, Population, Side, end, folder, launch, oids, populate
from tests.bench.sides import remove_blobs, serving

Sample = dict[str, float]
Rounds = Generator[Sample, None, None]

KB, MB = 1024, 1024 * 1024


def cold_loads(side: Side, scale: float, size: int, count: int, unix: bool = False) -> Rounds:
    """One client with an empty cache loads one object after the other."""
    count = max(20, int(count * scale))
    with serving(side, Population(count, size), unix=unix) as server, \
            Worker(jobs.prepare, server) as client:
        while True:
            client.call(jobs.open_client)
            with Cpu([server.pid, client.pid]) as cpu:
                times = client.call(jobs.load, oids(1, count))
            client.call(jobs.close_clients)
            yield {'median': median(times), 'cpu': cpu.seconds / count}


def loads_by_processes(side: Side, scale: float, processes: int, count: int) -> Rounds:
    """Several client processes load at the same time."""
    count = max(50, int(count * scale / processes))
    with serving(side, Population(processes * count, KB)) as server, \
            workers(processes, jobs.prepare, server) as team:
        while True:
            all_call(team, jobs.open_plain)
            with Cpu([server.pid, *(worker.pid for worker in team)]) as cpu:
                slices = all_call(team, jobs.load_slice, count)
            all_call(team, jobs.close_clients)
            seconds = max(end for _, end, _ in slices) - min(begin for begin, _, _ in slices)
            yield {'rate': processes * count / seconds, 'cpu': cpu.seconds / (processes * count)}


def loads_by_threads(side: Side, scale: float, threads: int, count: int) -> Rounds:
    """Several threads load through one ClientStorage at the same time."""
    count = max(50, int(count * scale / threads))
    with serving(side, Population(threads * count, KB)) as server, \
            Worker(jobs.prepare, server) as client:
        while True:
            client.call(jobs.open_client)
            with Cpu([server.pid, client.pid]) as cpu:
                seconds = client.call(jobs.load_in_threads, threads, count)
            client.call(jobs.close_clients)
            yield {'rate': threads * count / seconds, 'cpu': cpu.seconds / (threads * count)}


def cache_hits(side: Side, scale: float) -> Rounds:
    """One client loads what it has in its cache."""
    with serving(side, Population(100, KB)) as server, Worker(jobs.prepare, server) as client:
        client.call(jobs.open_client)
        while True:
            yield {'median': client.call(jobs.hit, oids(1, 100), int(20 + 180 * scale))}


def commits(side: Side, scale: float, objects: int, times: int, disk: bool = False) -> Rounds:
    """One client commits new revisions of 1 KB."""
    times = max(4, int(times * scale))
    with serving(side, Population(objects, KB), disk=_disk() if disk else None) as server, \
            Worker(jobs.prepare, server) as client:
        client.call(jobs.open_committer, objects, KB)
        while True:
            with Cpu([server.pid, client.pid]) as cpu:
                done = client.call(jobs.commit, times)
            yield {'median': median(end - begin for _, begin, _, end in done),
                   'cpu': cpu.seconds / times}


def _disk() -> str:
    return os.environ.get('ZEO_BENCH_DISK', os.path.expanduser('~'))


def concurrent_writers(side: Side, scale: float, processes: int, times: int) -> Rounds:
    """Several clients commit, each other objects."""
    times = max(10, int(times * scale))
    with serving(side, Population(processes, KB)) as server, \
            workers(processes, jobs.prepare, server) as team:
        all_call(team, jobs.open_committer, 1, KB)
        while True:
            with Cpu([server.pid, *(worker.pid for worker in team)]) as cpu:
                done = all_call(team, jobs.commit, times, 0)
            seconds = (max(each[-1][3] for each in done) - min(each[0][1] for each in done))
            yield {'rate': processes * times / seconds, 'cpu': cpu.seconds / (processes * times)}


def readers_beside_writers(side: Side, scale: float, readers: int, writers: int,
                           count: int) -> Rounds:
    """Clients load while others commit, all as fast as they can."""
    count = max(50, int(count * scale))
    with serving(side, Population(readers * count, KB)) as server, \
            workers(readers, jobs.prepare, server) as reading, \
            workers(writers, jobs.prepare, server) as writing:
        all_call(writing, jobs.open_committer, 1, KB)
        while True:
            all_call(reading, jobs.open_plain)
            for number, worker in enumerate(writing):
                worker.begin(jobs.commit_until_told, number)
            slices = all_call(reading, jobs.load_slice, count)
            for worker in writing:
                worker.interrupt()
            for worker in writing:
                worker.result()
            all_call(reading, jobs.close_clients)
            times = [time for _, _, each in slices for time in each]
            yield {'median': median(times), 'p99': percentile(times, 99)}


def invalidations(side: Side, scale: float, clients: int) -> Rounds:
    """One client commits, some idle ones hear of it: from the call of tpc_finish to the last of them."""
    times = max(10, int(50 * scale))
    processes = min(clients, 10)
    with serving(side, Population(1, KB)) as server, \
            Worker(jobs.prepare, server) as committer, \
            workers(processes, jobs.prepare, server) as team:
        all_call(team, jobs.open_watchers, clients // processes)
        committer.call(jobs.open_committer, 1, KB)
        while True:
            with Cpu([server.pid, committer.pid, *(worker.pid for worker in team)]) as cpu:
                done = committer.call(jobs.commit, times, .015)
                tids = [tid for tid, _, _, _ in done]
                seen = [max(each) for each in zip(*all_call(team, jobs.seen, tids))]
            yield {'median': median(last - finish for last, (_, _, finish, _) in zip(seen, done)),
                   'finish': median(end - finish for _, _, finish, end in done),
                   'cpu': cpu.seconds / times}


def prefetching(side: Side, scale: float) -> Rounds:
    """One client asks for 1,000 objects at once, then loads them."""
    with serving(side, Population(1000, KB)) as server, Worker(jobs.prepare, server) as client:
        while True:
            client.call(jobs.open_client)
            with Cpu([server.pid, client.pid]) as cpu:
                seconds = client.call(jobs.prefetch, oids(1, 1000))
            client.call(jobs.close_clients)
            yield {'seconds': seconds, 'cpu': cpu.seconds}


def idle_clients(side: Side, scale: float, clients: int) -> Rounds:
    """Many clients are connected and do nothing (they are made by hand: see peers.py)."""
    count = max(100, int(500 * scale))
    with serving(side, Population(count, KB)) as server, Worker(jobs.prepare, server) as client:
        files = open_files(server.pid)
        while True:
            with Cpu([server.pid, os.getpid()]) as cpu:
                seconds, peers = _timed_peers(server.address, clients)
            memory = resident_bytes(server.pid)
            client.call(jobs.open_client)
            times = client.call(jobs.load, oids(1, count))
            client.call(jobs.close_clients)
            for peer in peers:
                peer.close()
            wait_until(lambda: open_files(server.pid) <= files + 1, 'idle clients are gone')
            yield {'connect': seconds, 'connect cpu': cpu.seconds / clients,
                   'memory': memory, 'median': median(times)}


def _timed_peers(address: Address, clients: int) -> tuple[float, list[Peer]]:
    begin = perf_counter()
    peers = connect_many(address, clients)
    return perf_counter() - begin, peers


def cache_reopening(side: Side, scale: float) -> Rounds:
    """A client with a full persistent cache of 20 MB is opened again."""
    count = max(4000, int(18_000 * scale))
    with serving(side, Population(count, KB)) as server, Worker(jobs.prepare, server) as client, \
            folder() as place:
        fill = partial(jobs.fill_cache, client='bench', var=place, cache_size=20 * MB)
        reopen = partial(jobs.reopen_cache, client='bench', var=place, cache_size=20 * MB)
        client.call(fill, count)
        while True:
            with Cpu([client.pid]) as cpu:
                seconds = client.call(reopen, count)
            yield {'seconds': seconds, 'cpu': cpu.seconds}


def large_blobs(side: Side, scale: float, size: int, disk: bool = False, synced: bool = True) -> Rounds:
    """A large blob is committed by one client and fetched by another."""
    size = int(size * max(scale, .5))
    place = _disk() if disk else None
    with serving(side, Population(10, KB), disk=place, blobs=True, synced=synced) as server, \
            Worker(jobs.prepare, server) as sender, Worker(jobs.prepare, server) as receiver:
        sender.call(jobs.open_with_blobs, 'sender')
        receiver.call(jobs.open_with_blobs, 'receiver')
        while True:
            sender.call(jobs.make_blob, size)
            with Cpu([server.pid, sender.pid]) as up:
                seconds, oid, tid = sender.call(jobs.upload)
            with Cpu([server.pid, receiver.pid]) as down:
                fetched = receiver.call(jobs.download, oid, tid)
            remove_blobs(server)
            yield {'up': size / seconds, 'down': size / fetched,
                   'up cpu': up.seconds, 'down cpu': down.seconds}


def server_start(side: Side, scale: float) -> Rounds:
    """From starting the server's process to the first object loaded from it."""
    with folder() as place:
        path = os.path.join(place, 'Data.fs')
        populate(path, Population(1000, KB))
        while True:
            address = '127.0.0.1', free_port()
            begin = perf_counter()
            process = launch(side, address, path)
            try:
                peer = first_contact(address)
                peer.load(oids(1, 1)[0], jobs.MAXTID)
                seconds = perf_counter() - begin
                peer.close()
            finally:
                end(process)
            yield {'seconds': seconds}


# ---- the table

class Row(NamedTuple):
    """A metric in words; ``least`` and ``aim`` are how many times better than ZEO zeo has to be."""

    metric: str
    words: str
    unit: str
    least: float
    aim: float | None = None

    @property
    def more_is_better(self) -> bool:
        return self.unit == '/s' or self.unit == 'MB/s'


# The floor has no cache; a FileStorage in process takes part where a single client is measured.
SERVED = ('zeo', 'ZEO', 'uvloop', 'floor')
ALL = ('zeo', 'ZEO', 'uvloop', 'FileStorage', 'floor')
CACHED = ('zeo', 'ZEO', 'uvloop')


class Workload(NamedTuple):
    """A named workload: a function above with its arguments, who takes part, and what is told of it."""

    name: str
    function: Callable[..., Rounds]
    arguments: dict[str, object]
    rows: Sequence[Row]
    sides: Sequence[str] = SERVED


WORKLOADS = [
    Workload('load-1k', cold_loads, dict(size=KB, count=1000), [
        Row('median', 'cold load, 1 KB', 'µs', 5, 8),
        Row('cpu', 'the same, CPU', 'µs', 5, 7)], ALL),
    Workload('load-1k-unix', cold_loads, dict(size=KB, count=1000, unix=True), [
        Row('median', 'cold load, 1 KB, Unix socket', 'µs', 6, 10)]),
    Workload('load-10k', cold_loads, dict(size=10 * KB, count=500), [
        Row('median', 'cold load, 10 KB', 'µs', 4, 7)], ALL),
    Workload('load-1m', cold_loads, dict(size=MB, count=60), [
        Row('median', 'cold load, 1 MB', 'ms', 3, 8)], ALL),
    Workload('load-4-processes', loads_by_processes, dict(processes=4, count=2000), [
        Row('rate', 'loads, 4 client processes', '/s', 3, 6)]),
    Workload('load-16-processes', loads_by_processes, dict(processes=16, count=3200), [
        Row('rate', 'loads, 16 client processes', '/s', 3, 6)]),
    Workload('load-4-threads', loads_by_threads, dict(threads=4, count=2000), [
        Row('rate', 'loads, 4 threads on one client', '/s', 2.5, 4)]),
    Workload('load-8-threads', loads_by_threads, dict(threads=8, count=2000), [
        Row('rate', 'loads, 8 threads on one client', '/s', 2.5, 4)]),
    Workload('cache-hit', cache_hits, {}, [Row('median', 'cache hit', 'µs', 2, 4)], CACHED),
    Workload('commit-1', commits, dict(objects=1, times=200), [
        Row('cpu', 'commit of 1 object, tmpfs, CPU', 'ms', 4, 5),
        Row('median', 'the same, median', 'ms', 4, 5)], ALL),
    Workload('commit-1-disk', commits, dict(objects=1, times=100, disk=True), [
        Row('median', 'commit of 1 object, disk', 'ms', 3.5, 4.5)], ALL),
    Workload('commit-100', commits, dict(objects=100, times=20), [
        Row('median', 'commit of 100 objects, tmpfs', 'ms', 5, 7)], ALL),
    Workload('commit-1000', commits, dict(objects=1000, times=4), [
        Row('median', 'commit of 1,000 objects, tmpfs', 'ms', 5, 7)], ALL),
    Workload('writers-4', concurrent_writers, dict(processes=4, times=100), [
        Row('rate', 'commits, 4 concurrent writers, tmpfs', '/s', 3.5, 5)]),
    Workload('readers-writers', readers_beside_writers, dict(readers=8, writers=2, count=200), [
        Row('median', '8 readers beside 2 writers, median', 'ms', 3.5, 5),
        Row('p99', 'the same, p99', 'ms', 2.5, 4)]),
    Workload('invalidate-1', invalidations, dict(clients=1), [
        Row('median', 'invalidation seen by 1 idle client', 'ms', 3, 5)]),
    Workload('invalidate-10', invalidations, dict(clients=10), [
        Row('median', 'seen by all of 10', 'ms', 3, 5)]),
    Workload('invalidate-50', invalidations, dict(clients=50), [
        Row('median', 'seen by all of 50', 'ms', 3, 5),
        Row('finish', "the committer's own finish then", 'ms', 1.5, 3)]),
    Workload('prefetch', prefetching, {}, [
        Row('seconds', 'prefetch and load 1,000 objects', 'ms', 3.5, 6)]),
    Workload('idle-500', idle_clients, dict(clients=500), [
        Row('median', 'load beside 500 idle clients', 'µs', 4, 7),
        Row('connect', 'connect and register 500 clients', 'ms', 1.5, 3),
        Row('memory', 'server memory with 500 idle clients', 'MB', 1)]),
    Workload('reopen-cache', cache_reopening, {}, [
        Row('seconds', 'reopen a 20 MB cache, first load', 'ms', 3, 10)], CACHED),
    Workload('blob-64m', large_blobs, dict(size=64 * MB), [
        Row('up', 'blob upload, 64 MB, tmpfs', 'MB/s', 3, 6),
        Row('down', 'blob download, 64 MB, tmpfs', 'MB/s', 3, 6)]),
    Workload('blob-64m-disk', large_blobs, dict(size=64 * MB, disk=True, synced=False), [
        Row('up', 'blob upload, 64 MB, disk, --no-blob-sync', 'MB/s', 3, 6),
        Row('down', 'blob download, 64 MB, disk', 'MB/s', 3, 6)]),
    Workload('blob-64m-synced', large_blobs, dict(size=64 * MB, disk=True), [
        Row('up', 'blob upload, 64 MB, on the disk before it is answered (not ZEO)', 'MB/s', 1)]),
    Workload('start', server_start, {}, [
        Row('seconds', 'start the server, first load', 'ms', 2, 3)]),
]
