"""Measure the client's cache beside ZEO's: ``python -m tests.bench.bench_cache``.  Prints a Markdown table."""

import gc
import os
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

from zeo.client.cache import open_cache

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


def seconds(function: Callable[[], object], repeat: int = 5) -> float:
    """The shortest of several runs: the others had the machine for less than all of the time."""
    times = []
    for _ in range(repeat):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)


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
        for number in range(position, position + 5_000):
            cache.store(oids[number], tids[number], None, records[number])
        position += 5_000

    result['store 1 KB, room left, µs'] = seconds(store, 3) / 5_000 * 1e6
    result['store 1 KB, full, µs'] = seconds(store, 9) / 5_000 * 1e6
    hot = oids[position - 5_000:position]

    def hit() -> None:
        for oid in hot:
            assert cache.loadBefore(oid, MAXTID)

    result['hit 1 KB, µs'] = seconds(hit) / 5_000 * 1e6

    def miss() -> None:
        for oid in tids[100_000:105_000]:
            assert not cache.loadBefore(oid, MAXTID)

    result['miss, µs'] = seconds(miss) / 5_000 * 1e6
    moment = 100_000

    def invalidate() -> None:
        nonlocal moment
        for number in range(1_000):
            moment += 1
            cache.invalidate(tid(moment), [hot[(moment * 7) % 5_000]]) if make is ours else \
                cache.invalidate(hot[(moment * 7) % 5_000], tid(moment))
            set_last_tid(cache, tid(moment))

    result['invalidate one and move the last tid, µs'] = seconds(invalidate, 3) / 1_000 * 1e6
    cache.close()

    def reopen() -> None:
        make(path).close()

    result['reopen full 20 MB, ms'] = seconds(reopen, 7) * 1e3
    gc.collect()
    tracemalloc.start()
    cache = make(path)
    gc.collect()
    result['memory per object, bytes'] = tracemalloc.get_traced_memory()[0] / len(cache)
    tracemalloc.stop()
    result['objects held'] = len(cache)
    cache.close()
    return result


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


if __name__ == '__main__':
    main()
