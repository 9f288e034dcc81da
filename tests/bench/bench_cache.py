"""Measure the client's cache beside ZEO's: ``python -m tests.bench.bench_cache``.  Prints Markdown tables.

The second one is about its share of what a client does: the same is done with a cache that keeps nothing, in turn.
"""

import os
import random
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable
from statistics import quantiles
from typing import Any

from tests.bench.sides import Ours, Population, Server, serving
from tests.bench.sides import oids as numbered
from zeo.client.cache import Cache, open_cache
from zeo.client.cachefile import Log, unnamed

SIZE = 20 << 20
RECORD = 1024
MAXTID = b'\x7f' + b'\xff' * 7


def tid(number: int) -> bytes:
    return number.to_bytes(8, 'big')


def ours(path: str) -> Any:
    return open_cache(path, SIZE)


def theirs(path: str) -> Any:
    from ZEO.cache import ClientCache
    return ClientCache(path, SIZE)


def seconds(function: Callable[[], object], repeat: int) -> float:
    """The shortest of many short runs: the others shared the machine with somebody."""
    return min(times(function, repeat))


def middle(function: Callable[[], object], repeat: int) -> float:
    """The average of the better half, where not every run has the same to do."""
    better = sorted(times(function, repeat))[:repeat // 2]
    return sum(better) / len(better)


def lower_quartile(some: Iterable[float]) -> float:
    """What it takes while the machine has little else to do."""
    return quantiles(some)[0]


def times(function: Callable[[], object], repeat: int) -> list[float]:
    result = []
    for _ in range(repeat):
        started = time.perf_counter()
        function()
        result.append(time.perf_counter() - started)
    return result


def measure(make: Callable[[str], Any], path: str) -> dict[str, float]:
    body = os.urandom(RECORD - 8)
    records = [tid(number) + body for number in range(60_000)]
    oids = [tid(number) for number in range(60_000)]
    tids = [tid(number + 1) for number in range(200_000)]
    cache = make(path)
    result = {}

    position = 0

    def store() -> None:
        nonlocal position
        for number in range(position, position + 500):
            cache.store(oids[number], tids[number], None, records[number])
        position += 500

    result['store 1 KB, room left, µs'] = seconds(store, 30) / 500 * 1e6
    result['store 1 KB, full, µs'] = middle(store, 85) / 500 * 1e6
    hot = oids[position - 5_000:position]

    def hit() -> None:
        for oid in once.pop():
            cache.loadBefore(oid, MAXTID)

    random.shuffle(hot)
    once = [hot[first:first + 500] for first in range(0, len(hot), 500)]
    result['hit 1 KB for the first time, µs'] = seconds(hit, len(once)) / 500 * 1e6

    def hit_again() -> None:
        for oid in hot[:500]:
            cache.loadBefore(oid, MAXTID)

    result['hit 1 KB that was hit before, µs'] = seconds(hit_again, 50) / 500 * 1e6

    with open(path, 'rb', buffering=0) as file:
        handle = file.fileno()
        places = random.sample(range(SIZE // 1100), 5_000)

        def read() -> None:
            for place in scattered.pop():
                os.pread(handle, RECORD, place * 1100)

        scattered = [places[first:first + 500] for first in range(0, len(places), 500)]
        result['only read 1 KB from the file, µs'] = seconds(read, len(scattered)) / 500 * 1e6

        def verify() -> None:
            for place in scattered.pop():
                data = os.pread(handle, RECORD + 20, place * 1100)
                zlib.crc32(data)
                data[16:-4]

        scattered = [places[first:first + 500] for first in range(0, len(places), 500)]
        result['read, checksum and slice, µs'] = seconds(verify, len(scattered)) / 500 * 1e6

    def miss() -> None:
        for oid in tids[100_000:100_500]:
            assert not cache.loadBefore(oid, MAXTID)

    result['miss, µs'] = seconds(miss, 50) / 500 * 1e6
    moment = 100_000

    def invalidate() -> None:
        nonlocal moment
        for number in range(100):
            moment += 1
            cache.invalidate(tid(moment), [hot[(moment * 7) % 5_000]]) if make is ours else \
                cache.invalidate(hot[(moment * 7) % 5_000], tid(moment))
            set_last_tid(cache, tid(moment))

    result['invalidate one and move the last tid, µs'] = seconds(invalidate, 30) / 100 * 1e6
    cache.close()

    def reopen() -> None:
        nonlocal cache
        cache = make(path)

    result['reopen full 20 MB, ms'] = min(seconds(reopen, 1) + 0 * bool(cache.close()) for _ in range(7)) * 1e3
    cache = make(path)
    result['close full 20 MB, ms'] = seconds(cache.close, 1) * 1e3
    result['objects of 1 KB held'] = len(make_and_close(make, path))
    result['memory per object, bytes'] = memory(make, path + '-small')
    return result


class Nothing(Cache):
    """A cache that keeps nothing, and takes no time for that."""

    def __init__(self) -> None:
        super().__init__(Log(unnamed(), SIZE, bytes(16)), None)

    def loadBefore(self, oid: bytes, tid: bytes) -> None:
        pass

    def store(self, *_: Any) -> None:
        pass

    renew = invalidate = store


def work(server: Server, cache: Cache, number: int) -> dict[str, tuple[float, float]]:
    """What loads and commits take a client with that cache: seconds, and seconds of its own CPU.

    Each ``number`` is for other objects.
    """
    from ZODB.Connection import TransactionMetaData
    storage = Ours().open(server.address, server.path, cache=cache)

    def load(some: list[bytes]) -> None:
        for oid in some:
            storage.loadBefore(oid, MAXTID)

    def commit(some: list[bytes]) -> None:
        transaction = TransactionMetaData()
        storage.tpc_begin(transaction)
        for oid, serial in zip(some, serials):
            storage.store(oid, serial, record, '', transaction)
        storage.tpc_vote(transaction)
        serials[:] = [storage.tpc_finish(transaction)] * len(some)

    def clock(function: Callable[[list[bytes]], None], some: list[bytes]) -> tuple[float, float]:
        began, cpu = time.perf_counter(), time.process_time()
        function(some)
        return time.perf_counter() - began, time.process_time() - cpu

    record, own = os.urandom(RECORD), numbered(1_000_000 + 1_000 * number, 1_000)
    serials = [bytes(8)] * len(own)
    try:
        load(numbered(1, 300))
        result = {'cold load of 1 KB': clock(load, numbered(1_000 + number % 9 * 3_000, 3_000))}
        result['commit of 1,000 new objects'] = clock(commit, own)
        result['commit of 1,000 known objects'] = clock(commit, own)
    finally:
        storage.close()
    return result


def shares(rounds: int = 15) -> None:
    """Print how much of a client's work its cache is."""
    taken: dict[str, list[list[tuple[float, float]]]] = {}
    with serving(Ours(), Population(30_000, RECORD)) as server:
        for number in range(rounds):
            for kept, cache in enumerate((Nothing(), open_cache(None, SIZE))):
                for what, times in work(server, cache, 2 * number + kept).items():
                    taken.setdefault(what, [[], []])[kept].append(times)
    print('\n| | with a cache | without | share of its time | of its CPU |\n|---|---:|---:|---:|---:|')
    for what, (without, kept) in taken.items():
        (time_kept, cpu_kept), (time_without, cpu_without) = (
            map(lower_quartile, zip(*some)) for some in (kept, without))
        scale, unit = (1e6 / 3_000, 'µs') if 'load' in what else (1e3, 'ms')
        print(f'| {what} | {time_kept * scale:.1f} {unit} | {time_without * scale:.1f} {unit} '
              f'| {1 - time_without / time_kept:.0%} | {1 - cpu_without / cpu_kept:.0%} |')


def make_and_close(make: Callable[[str], Any], path: str) -> range:
    cache = make(path)
    held = range(len(cache))
    cache.close()
    return held


def memory(make: Callable[[str], Any], path: str) -> float:
    """How much a process grows, per object, by filling a cache with small ones."""
    script = f"""
from tests.bench.bench_cache import *
make = {make.__name__}
make({path!r}).close()
before = resident()
cache = make({path!r})
for number in range(90_000):
    cache.store(tid(number * 7919 % 90_000), tid(number + 1), None, tid(number) * 20)
print((resident() - before) / len(cache))
cache.close()
"""
    return float(subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, check=True).stdout)


def resident() -> int:
    """Bytes of memory that this process has."""
    with open('/proc/self/statm') as file:
        return int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')


def set_last_tid(cache: Any, last: bytes) -> None:
    if hasattr(cache, 'set_last_tid'):
        cache.set_last_tid(last)
    else:
        cache.setLastTid(last)


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        mine = measure(ours, os.path.join(directory, 'ours.zec'))
        other = measure(theirs, os.path.join(directory, 'theirs.zec'))
    print(f'Python {sys.version.split()[0]}, records of {RECORD} bytes, cache of {SIZE >> 20} MB\n')
    print('| | zeo | ZEO |\n|---|---:|---:|')
    for what in mine:
        print(f'| {what} | {mine[what]:,.1f} | {other[what]:,.1f} |')
    shares()


if __name__ == '__main__':
    main()
