"""Several zeo servers over one PostgreSQL, beside clients that use RelStorage directly.

    python -m tests.bench.postgres [--servers 0,1,2,3] [--clients 6] [--rounds 5] [--no-fsync]

Clients are processes, each with a `ZODB.DB`, a connection and small caches, spread over the servers.  What is
counted is what an application does: objects activated, transactions committed.  Prints a Markdown table.  All
of it, PostgreSQL included, shares the machine: on few cores, more servers cannot be faster.  Exit status 77 if
there can be no PostgreSQL here.
"""

import argparse
import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import transaction
import ZODB
from persistent.mapping import PersistentMapping
from ZODB.POSException import ConflictError
from ZODB.tests.MinPO import MinPO

from tests.bench.measure import Worker, all_call, median, percentile, workers
from tests.system.postgres import Cluster, hosts, open_directly, why_not

#: Objects of 1 KB that each client loads, and transactions of one object that it commits, in a round.
LOADS, COMMITS = 500, 100

DIRECT = 'RelStorage directly'


# ---- what clients do: jobs of `Worker` -------------------------------------------------------


def prepare(space: SimpleNamespace, makes: Sequence[Callable[[], Any]]) -> None:
    logging.disable()
    space.makes = makes


def open_database(space: SimpleNamespace, place: int) -> None:
    """Have a database, with nothing in its caches."""
    close_database(space)
    space.db = ZODB.DB(space.makes[place % len(space.makes)]())
    space.manager = transaction.TransactionManager()
    space.connection = space.db.open(space.manager)
    space.mine = space.connection.root()[place]
    space.oids = [each._p_oid for each in space.mine.values()]


def close_database(space: SimpleNamespace, *_: Any) -> None:
    if hasattr(space, 'db'):
        space.manager.abort()
        space.connection.close()
        space.db.close()


def load(space: SimpleNamespace, place: int) -> tuple[float, float]:
    """Activate all of one's own objects; when that began and ended."""
    space.manager.begin()
    begin = time.perf_counter()
    for oid in space.oids:
        space.connection.get(oid)._p_activate()
    return begin, time.perf_counter()


def commit(space: SimpleNamespace, count: int, place: int) -> tuple[float, float, list[float]]:
    """Commit new states of an object of one's own; begin, end, and how long each took."""
    mine, clock, manager = next(iter(space.mine.values())), time.perf_counter, space.manager
    times = []
    begin = clock()
    for _ in range(count):
        started = clock()
        manager.begin()
        mine.value = os.urandom(500) + b'.' * 500
        manager.commit()
        times.append(clock() - started)
    return begin, clock(), times


def count_together(space: SimpleNamespace, count: int, place: int) -> tuple[float, float, int]:
    """Commit as often to the object that all commit to; begin, end, and how often there was a conflict."""
    shared = space.connection.root()['shared']
    conflicts = 0
    begin = time.perf_counter()
    for _ in range(count):
        while True:
            space.manager.begin()
            shared.value += 1
            try:
                space.manager.commit()
                break
            except ConflictError:
                space.manager.abort()
                conflicts += 1
    return begin, time.perf_counter(), conflicts


# ---- who takes part ------------------------------------------------------------------------


def populate(dsn: str, clients: int) -> None:
    with contextlib.closing(ZODB.DB(open_directly(dsn))) as db:
        with db.transaction() as connection:
            root = connection.root()
            root['shared'] = MinPO(0)
            for place in range(clients):
                root[place] = PersistentMapping()
                for key in range(LOADS):
                    root[place][key] = MinPO(b'.' * 1000)


def _client(address: Any) -> Any:
    from zeo.ClientStorage import ClientStorage
    return ClientStorage(address, wait_timeout=60)


@contextlib.contextmanager
def taking_part(dsn: str, servers: int) -> Iterator[list[Callable[[], Any]]]:
    """How clients open the storage: over so many servers, or with 0 directly."""
    if not servers:
        yield [partial(open_directly, dsn)]
        return
    with hosts(dsn, servers) as running:
        yield [partial(_client, server.address) for server in running]


def measure(cluster: Cluster, servers: int, clients: int, rounds: int) -> dict[str, float]:
    """All workloads over so many servers, in a database of their own; medians of the rounds."""
    dsn = cluster.dsn(cluster.database())
    populate(dsn, clients)
    samples: dict[str, list[float]] = {}

    def sample(name: str, value: float) -> None:
        samples.setdefault(name, []).append(value)

    with taking_part(dsn, servers) as makes, workers(clients, prepare, makes) as team, \
            Worker(prepare, makes) as single:
        single.call(open_database, 0)
        for turn in range(rounds + 1):
            all_call(team, open_database)
            rate = _rate(all_call(team, load), clients * LOADS)
            if turn == 0:
                # Nobody has loaded it before: PostgreSQL is asked for everything.
                sample('loads', rate)
                single.call(commit, 10, 0)
                all_call(team, commit, 10)
                continue
            sample('loads again', rate)
            _, _, times = single.call(commit, COMMITS, 0)
            sample('commit', median(times))
            sample('commit, 99 %', percentile(times, 99))
            sample('commits', _rate(all_call(team, commit, COMMITS), clients * COMMITS))
            done = all_call(team, count_together, COMMITS // 5)
            sample('contended commits', _rate(done, clients * (COMMITS // 5)))
        all_call([*team, single], close_database)
    return {name: median(values) for name, values in samples.items()}


def _rate(done: Sequence[Any], count: int) -> float:
    return count / (max(each[1] for each in done) - min(each[0] for each in done))


ROWS = (
    ('loads', 'loads of 1 KB by {} clients, all caches empty', '/s'),
    ('loads again', 'the same by new clients', '/s'),
    ('commit', 'commit of 1 object of 1 KB, one client', 'ms'),
    ('commit, 99 %', 'the same, 99 % are faster than', 'ms'),
    ('commits', 'such commits by {} clients', '/s'),
    ('contended commits', 'the same, all to one object', '/s'),
)


def table(results: dict[str, dict[str, float]], clients: int) -> str:
    lines = ['| workload | ' + ' | '.join(results) + ' |', '| --- |' + ' ---: |' * len(results)]
    for name, title, unit in ROWS:
        cells = [f'{value * 1000:.1f} ms' if unit == 'ms' else f'{value:,.0f} /s'
                 for value in (each[name] for each in results.values())]
        lines.append(f'| {title.format(clients)} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog='python -m tests.bench.postgres', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--servers', default='0,1,2,3', type=lambda text: [int(each) for each in text.split(',')],
                        help='numbers of servers, 0 for RelStorage directly (0,1,2,3)')
    parser.add_argument('--clients', type=int, default=6)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--no-fsync', action='store_true', help='PostgreSQL does not force commits to the disk')
    options = parser.parse_args(arguments)
    if reason := why_not():
        print(f'skipped: {reason}', file=sys.stderr)
        return 77
    results = {}
    with Cluster(durable=not options.no_fsync) as cluster:
        for servers in options.servers:
            title = DIRECT if not servers else f'{servers} server{"s" * (servers > 1)}'
            results[title] = measure(cluster, servers, options.clients, options.rounds)
            print(f'{title}: {results[title]}', file=sys.stderr, flush=True)
    print(table(results, options.clients))
    return 0


if __name__ == '__main__':
    sys.exit(main())
