"""Several zeo servers over one PostgreSQL for minutes, under writers and readers, and everything dies at times.

    python -m tests.system.postgres_soak [--minutes 5] [--servers 3] [--processes 4] [--threads 3]
                                         [--client zeo|ZEO|mixed] [scenario ...]

The writers and readers are those of `tests.system.stress`, and so is what is checked: in every transaction
that the snapshot is whole, that it does not go back, and that it contains what this client, or with
`server_sync` anybody on any server, was told to be committed; and at the end, from the database itself, that
every revision that was read was current in its snapshot, and that each acknowledged commit is there.  Then
all servers have to agree with the database about the last transaction, and a client of each has to see
everything as it must be.

The processes are spread over the servers.  Where servers die, each client knows all of them and fails over.
PostgreSQL forces to the disk what it commits; it is ended in order or by SIGKILL to all its processes.

Two further scenarios count time: ``failover``, from the death of the server that a client uses to its next
acknowledged commit, and ``restart``, the same for PostgreSQL.  One line of figures for each; exit status 1 if
anything was wrong, 77 if there can be no PostgreSQL here.
"""

import argparse
import contextlib
import dataclasses
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import transaction
import ZODB
from transaction.interfaces import TransientError

from tests.system import stress
from tests.system.hotset import AllOfIt, Discrepancy, create, read
from tests.system.postgres import Cluster, Host, open_directly, relstorage, why_not
from tests.system.stress import Maker, Remembered, Stage


@dataclasses.dataclass(frozen=True)
class Scenario(stress.Scenario):
    """What goes on besides reading and writing, and what dies."""

    database_deaths: bool = False       # PostgreSQL is killed, or ended, and started again
    hang_ups: bool = False              # the sessions of the database are ended by its administrator

    @property
    def servers_fail(self) -> bool:
        return self.server_deaths or self.server_restarts


SCENARIOS = {each.name: each for each in (
    Scenario('plain'),
    Scenario('sync', sync=True),
    Scenario('history', undo=True, pack=True),
    Scenario('servers-die', sync=True, server_restarts=True, server_deaths=True, client_deaths=True),
    Scenario('postgres-dies', sync=True, database_deaths=True, hang_ups=True),
    Scenario('everything', sync=True, server_restarts=True, server_deaths=True, client_deaths=True,
             database_deaths=True, hang_ups=True, undo=True, pack=True),
)}

#: How often a time is measured.
TIMES = 15


class Site(Stage):
    """Several servers over one database, and the processes on them."""

    def __init__(self, scenario: Scenario, servers: Sequence[Host], cluster: Cluster, database: str,
                 options: argparse.Namespace, folder: str) -> None:
        super().__init__(scenario, servers[0], options, folder)
        self._dying = scenario
        self._servers = servers
        self._cluster = cluster
        self._database = database
        self._pause = threading.Event()     # never set: its wait is how long something is away

    def address(self, place: int) -> Any:
        first = place % len(self._servers)
        chosen = [*self._servers[first:], *self._servers[:first]]
        return [server.address for server in chosen] if self._dying.servers_fail else chosen[0].address

    def faults(self) -> list[Callable[[], None]]:
        scenario = self._dying
        return (super().faults() + [self._kill_database, self._end_database] * scenario.database_deaths
                + [self._hang_up] * scenario.hang_ups)

    def _restart(self) -> None:
        server = self._chance.choice(self._servers)
        server.stop()
        self._be_away()
        server.start()
        self.remembered.figures['restarts'] += 1

    def _kill_server(self) -> None:
        server = self._chance.choice(self._servers)
        server.kill()
        server.judge()
        self._be_away()
        server.start()
        self.remembered.figures['server deaths'] += 1

    def _kill_database(self) -> None:
        self._cluster.kill()
        self._be_away()
        self._cluster.start()
        self.remembered.figures['database deaths'] += 1

    def _end_database(self) -> None:
        self._cluster.stop(self._chance.choice([signal.SIGINT, signal.SIGQUIT]))
        self._be_away()
        self._cluster.start()
        self.remembered.figures['database restarts'] += 1

    def _hang_up(self) -> None:
        self.remembered.figures['sessions ended'] += self._cluster.hang_up(self._database)

    def _be_away(self) -> None:
        self._pause.wait(self._chance.choice([0, self._chance.uniform(0, 3)]))

    def convergence(self) -> None:
        """All servers have to agree with the database, and their clients with what must be true."""
        with contextlib.closing(open_directly(self._cluster.dsn(self._database))) as direct:
            last = direct.lastTransaction()
        for server in self._servers:
            with contextlib.closing(Maker('zeo', server.address, 'judge', 1 << 20, True)()) as storage:
                db = ZODB.DB(storage)
                with contextlib.closing(db.open()) as connection:
                    read(connection.root(), AllOfIt())
                if storage.lastTransaction() != last:
                    raise Discrepancy(f'{server} says that {storage.lastTransaction().hex()} was the last '
                                      f'transaction, the database says {last.hex()}')
                db.close()


@contextlib.contextmanager
def servers_over(cluster: Cluster, database: str, number: int) -> Iterator[list[Host]]:
    """Servers that are there when asked for, and are ended without being judged if something went wrong."""
    servers = [Host('zeo', {'1': relstorage(cluster.dsn(database))}) for _ in range(number)]
    try:
        for server in servers:
            server.start()
        yield servers
        for server in servers:
            server.close()
    finally:
        for server in servers:
            if server.process is not None:
                server.kill()
            server.close()


def populate(address: Any) -> None:
    with contextlib.closing(ZODB.DB(Maker('zeo', address, 'create', 1 << 20, False)())) as db:
        with db.transaction('create') as connection:
            create(connection.root())


def play(scenario: Scenario, options: argparse.Namespace, seconds: float) -> Remembered:
    """Play a scenario and judge it; returns what was done and seen, and what was wrong."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix='zeo-stress-'))
        cluster = stack.enter_context(Cluster(durable=True))
        database = cluster.database()
        servers = stack.enter_context(servers_over(cluster, database, options.servers))
        populate(servers[0].address)
        site = Site(scenario, servers, cluster, database, options, folder)
        try:
            site.run(seconds)
        except Discrepancy as discrepancy:
            site.remembered.failures.append(f'Discrepancy: {discrepancy}')
        finally:
            remembered = site.end()
        try:
            site.convergence()
        except Discrepancy as discrepancy:
            remembered.failures.append(f'Discrepancy: {discrepancy}')
        if remembered.failures:
            for server in servers:
                print(f'{server} said:\n{server.log}', file=sys.stderr)
        stress.judge(open_directly(cluster.dsn(database)), remembered)
        return remembered


# ---- how long it takes -----------------------------------------------------------------------


class Committer(threading.Thread):
    """Commits all the time, and notes when each commit was acknowledged."""

    def __init__(self, kind: str, addresses: Sequence[Any]) -> None:
        super().__init__(name=f'{kind} committer', daemon=True)
        self._db = ZODB.DB(Maker(kind, list(addresses), 'committer', 1 << 20, False)())
        self._over = threading.Event()
        self._noted = threading.Condition()     # guards the following; notified at each commit
        self.acknowledged: list[tuple[float, bytes]] = []
        self.failures: list[BaseException] = []
        self.start()

    def run(self) -> None:
        chance = random.Random()
        manager = transaction.TransactionManager()
        try:
            while not self._over.is_set():
                try:
                    manager.begin()
                    with contextlib.closing(self._db.open(manager)) as connection:
                        account = connection.root()['accounts'][0]
                        account.change(account.value, chance)
                        connection.root()['changes'].change(1)
                        manager.commit()
                        tid = account._p_serial
                    with self._noted:
                        self.acknowledged.append((time.monotonic(), tid))
                        self._noted.notify_all()
                except TransientError:
                    pass
                finally:
                    manager.abort()
        except BaseException as failure:
            self.failures.append(failure)

    def first_after(self, begun: float) -> float:
        """When the first commit after a moment was acknowledged; waits for it."""
        with self._noted:
            if not self._noted.wait_for(
                    lambda: self.acknowledged and self.acknowledged[-1][0] > begun, stress.PATIENCE):
                raise Discrepancy(f'no commit in {stress.PATIENCE} seconds; failures: {self.failures}')
            return next(when for when, _ in self.acknowledged if when > begun)

    def end(self) -> None:
        self._over.set()
        self.join(stress.PATIENCE)
        self._db.close()
        if self.failures:
            raise self.failures[0]


def failover(options: argparse.Namespace, kind: str, times: int = TIMES) -> Remembered:
    """From the SIGKILL of the server that a client uses to the client's next acknowledged commit."""
    remembered = Remembered()
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(Cluster(durable=True))
        database = cluster.database()
        servers = stack.enter_context(servers_over(cluster, database, options.servers))
        populate(servers[0].address)
        committer = Committer(kind, [server.address for server in servers])
        try:
            taken = []
            for _ in range(times):
                committer.first_after(time.monotonic())
                used = in_use(servers)
                assert used is not None, 'whoever commits has a server'
                begun = time.monotonic()
                used.kill()
                used.judge()
                # What was under way may still have been answered.
                taken.append(committer.first_after(time.monotonic()) - begun)
                used.start()
        finally:
            committer.end()
        note(remembered, taken)
        _judge_acknowledged(cluster, database, committer, remembered)
    return remembered


def in_use(servers: Sequence[Host]) -> Host | None:
    """The server that has a client beside the one that looks."""
    for server in servers:
        with contextlib.closing(Maker('zeo', server.address, 'looks', 1 << 20, False)()) as storage:
            if storage.server_status()['connections'] > 1:
                return server
    return None


def restart(options: argparse.Namespace, kind: str, times: int = TIMES) -> Remembered:
    """From the moment when PostgreSQL answers again after SIGKILL to the client's next acknowledged commit."""
    remembered = Remembered()
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(Cluster(durable=True))
        database = cluster.database()
        servers = stack.enter_context(servers_over(cluster, database, options.servers))
        populate(servers[0].address)
        committer = Committer(kind, [servers[0].address])
        try:
            taken = []
            for _ in range(times):
                committer.first_after(time.monotonic())
                cluster.kill()
                cluster.start()
                begun = time.monotonic()
                taken.append(committer.first_after(begun) - begun)
        finally:
            committer.end()
        note(remembered, taken)
        _judge_acknowledged(cluster, database, committer, remembered)
    return remembered


def note(remembered: Remembered, taken: Sequence[float]) -> None:
    remembered.figures['times'] += len(taken)
    remembered.figures['ms, median'] = round(1000 * statistics.median(taken))
    remembered.figures['ms, most'] = round(1000 * max(taken))


def _judge_acknowledged(cluster: Cluster, database: str, committer: Committer, remembered: Remembered) -> None:
    with contextlib.closing(open_directly(cluster.dsn(database))) as direct:
        there = {each.tid for each in direct.iterator()}
    lost = {tid for _, tid in committer.acknowledged} - there
    remembered.figures['commits'] += len(committer.acknowledged)
    if lost:
        remembered.failures.append(f'{len(lost)} acknowledged commits are lost, the first is {min(lost).hex()}')


@dataclasses.dataclass(frozen=True)
class Timed:
    """A scenario that counts time."""

    name: str
    measure: Callable[[argparse.Namespace, str], Remembered]
    kind: str


TIMED = {each.name: each for each in (
    Timed('failover', failover, 'zeo'), Timed('failover-ZEO', failover, 'ZEO'),
    Timed('restart', restart, 'zeo'), Timed('restart-ZEO', restart, 'ZEO'))}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog='python -m tests.system.postgres_soak', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    known = {**SCENARIOS, **TIMED}
    parser.add_argument('scenarios', nargs='*', metavar='scenario', help=f'of {", ".join(known)} (all)')
    parser.add_argument('--minutes', type=float, default=5.0, help='for all scenarios but the timed ones (5)')
    parser.add_argument('--servers', type=int, default=3)
    parser.add_argument('--processes', type=int, default=4)
    parser.add_argument('--threads', type=int, default=3, help='in each process, over one client (3)')
    parser.add_argument('--client', choices=('zeo', 'ZEO', 'mixed'), default='mixed')
    parser.add_argument('--cache-size', type=int, default=40, metavar='KB',
                        help="of each client's file (40, about what there is to be cached)")
    options = parser.parse_args(arguments)
    if unknown := set(options.scenarios) - set(known):
        parser.error(f'no such scenario: {", ".join(sorted(unknown))}')
    if reason := why_not():
        print(f'skipped: {reason}', file=sys.stderr)
        return 77
    chosen = [known[name] for name in options.scenarios or known]
    lasting = sum(isinstance(each, Scenario) for each in chosen)

    def play_one(scenario: Any) -> Remembered:
        if isinstance(scenario, Timed):
            return scenario.measure(options, scenario.kind)
        return play(scenario, options, options.minutes * 60 / lasting)

    return stress.play_all(chosen, play_one)


if __name__ == '__main__':
    from tests.system import postgres_soak as myself     # what goes to other processes has its module's true name
    raise SystemExit(myself.main())
