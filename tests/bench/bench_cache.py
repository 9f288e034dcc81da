"""Measure the client's cache beside ZEO's: ``python -m tests.bench.bench_cache``.  Prints a Markdown table."""

import os
import random
import subprocess
import sys
import tempfile
import time
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


def seconds(function: Callable[[], object], repeat: int) -> float:
    """The shortest of many short runs: the others shared the machine with somebody."""
    return min(times(function, repeat))


def middle(function: Callable[[], object], repeat: int) -> float:
    """The average of the better half, where not every run has the same to do."""
    better = sorted(times(function, repeat))[:repeat // 2]
    return sum(better) / len(better)


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
        for oid in random.sample(hot, 500):
            assert cache.loadBefore(oid, MAXTID)

    result['hit 1 KB, µs'] = seconds(hit, 50) / 500 * 1e6

    def hit_again() -> None:
        for oid in hot[:500]:
            cache.loadBefore(oid, MAXTID)

    result['hit 1 KB that was hit before, µs'] = seconds(hit_again, 50) / 500 * 1e6

    with open(path, 'rb', buffering=0) as file:
        handle = file.fileno()
        places = random.sample(range(SIZE // 1100), 500)

        def read() -> None:
            for place in places:
                os.pread(handle, RECORD, place * 1100)

        result['only read 1 KB from the file, µs'] = seconds(read, 50) / 500 * 1e6

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


if __name__ == '__main__':
    main()
