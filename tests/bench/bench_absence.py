"""Measure a client's return after a long absence beside ZEO's: ``python -m tests.bench.bench_absence [OBJECTS]``.

Both clients have so many objects of 100 bytes in a persistent cache, and were away for more transactions than
their server remembers.  Prints a Markdown table.
"""

import logging
import random
import sys
import tempfile
import time
from typing import Any

from ZODB.Connection import TransactionMetaData
from ZODB.utils import maxtid, z64

from tests.system.clients import open_client, store
from tests.system.servers import Server

MISSED = 5
SAMPLE = 5_000


def fill(storage: Any, count: int) -> list[bytes]:
    """So many objects, committed and cached."""
    oids = [storage.new_oid() for _ in range(count)]
    meta = TransactionMetaData()
    storage.tpc_begin(meta)
    for oid in oids:
        storage.store(oid, z64, b'first of ' + oid + bytes(83), '', meta)
    storage.tpc_vote(meta)
    storage.tpc_finish(meta)
    return oids


def measure(kind: str, count: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder, Server(kind, invalidation_queue_size=3) as server:
        options: dict[str, Any] = {'client': 'bench', 'var': folder, 'cache_size': 1_000 * count}
        storage = open_client(kind, server, **options)
        oids = fill(storage, count)
        serial = storage.lastTransaction()
        storage.close()
        writer = open_client(kind, server)
        changed = serial
        for number in range(MISSED):
            changed = store(writer, oids[7], changed, b'changed %d' % number)

        began = time.perf_counter()
        storage = open_client(kind, server, **options)
        first = storage.loadBefore(oids[7], maxtid)
        result = {'first correct load, ms': (time.perf_counter() - began) * 1000}
        assert first == (b'changed %d' % (MISSED - 1), changed, None)
        began_to_verify = time.perf_counter()
        if kind == 'zeo':
            while next(storage._cache.suspects(), None) is not None:
                storage.ping()
        result['until all is verified, s'] = time.perf_counter() - began_to_verify
        before = writer.server_status()['loads']
        began = time.perf_counter()
        for oid in random.sample(oids, SAMPLE):
            assert storage.loadBefore(oid, maxtid)
        result[f'load {SAMPLE} of them, s'] = time.perf_counter() - began
        asked = writer.server_status()['loads'] - before
        result['of these from the server, %'] = 100 * asked / SAMPLE
        storage.close()
        writer.close()
        return result


def main() -> None:
    logging.disable()
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    mine, other = measure('zeo', count), measure('ZEO', count)
    print(f'Python {sys.version.split()[0]}, {count} cached objects, {MISSED} transactions missed\n')
    print('| | zeo | ZEO |\n|---|---:|---:|')
    for what in mine:
        print(f'| {what} | {mine[what]:,.2f} | {other[what]:,.2f} |')


if __name__ == '__main__':
    main()
