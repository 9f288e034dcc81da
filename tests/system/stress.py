"""Many processes and threads on one server for minutes, and every snapshot any of them had is checked.

    python -m tests.system.stress [--minutes 3] [--processes 4] [--threads 3]
                                  [--server zeo|ZEO] [--client zeo|ZEO|mixed] [scenario ...]

Writers move amounts between accounts, and change both halves of pairs, all in a small hot set of
objects; caches are small.  Readers look at all of it or at some of it.  Checked at once, in every
transaction:

    - both halves of a pair are equal, and the sum of all accounts never changes;
    - each object counts its changes, and a counter, in which all writers meet, their sum: a snapshot with a
      single object of another time shows;
    - a thread's snapshots never go back, and contain what was committed over the same client before;
      with `server_sync` they contain what was acknowledged to anybody, in any process, before they began.

And at the end, from the server's file (exactly, not by invariants):

    - each revision that anybody has read was the current one in the snapshot in which it was read;
    - each commit that was acknowledged is there.

Scenarios differ in what goes on beside: nothing, restarts and sudden deaths of the server, sudden
deaths of clients, undo and pack; or the storage is slow just when a load could be overtaken by a commit.
One line of figures for each; exit status 1 if anything was wrong.
"""

import argparse
import contextlib
import dataclasses
import faulthandler
import logging
import multiprocessing
import os
import pathlib
import pickle
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import transaction
import ZODB
from transaction.interfaces import TransientError
from ZODB.FileStorage import FileStorage
from ZODB.POSException import ConflictError
from ZODB.POSException import ReadConflictError
from ZODB.POSException import UndoError
from ZODB.utils import u64

from tests.system.hotset import MISTAKES
from tests.system.hotset import AllOfIt
from tests.system.hotset import Discrepancy
from tests.system.hotset import History
from tests.system.hotset import Snapshot
from tests.system.hotset import check_acknowledged
from tests.system.hotset import check_snapshots
from tests.system.hotset import create
from tests.system.hotset import note_history
from tests.system.hotset import read
from tests.system.hotset import write

#: Seconds after which somebody who should have ended is taken to hang.
PATIENCE = 120.0

#: How many snapshots a thread remembers for the end.
MEMORY = 20_000


@dataclasses.dataclass(frozen=True)
class Scenario:
    """What goes on besides reading and writing."""

    name: str
    sync: bool = False              # every transaction begins with a round trip
    server_restarts: bool = False   # it is told to end, and started again
    server_deaths: bool = False     # it is killed, and started again
    client_deaths: bool = False     # a process is killed, another takes its place
    undo: bool = False
    pack: bool = False
    slow: bool = False              # the storage takes its time, at the moments when it matters


SCENARIOS = {each.name: each for each in (
    Scenario('plain'),
    Scenario('sync', sync=True),
    Scenario('slow-storage', sync=True, slow=True),
    Scenario('history', undo=True, pack=True),
    Scenario('clients-die', client_deaths=True),
    Scenario('server-dies', server_restarts=True, server_deaths=True),
    Scenario('everything', sync=True, server_restarts=True, server_deaths=True, client_deaths=True,
             undo=True, pack=True),
)}


# ---- one client process --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Shared:
    """What all processes look at.  No locks: whoever holds one may be killed."""

    over: Any                       # not 0: the end
    acknowledged: Any               # for each thread of all processes the last tid it committed


@dataclasses.dataclass
class Remembered:
    """What a process, or all of them, did and saw."""

    figures: Counter[str] = dataclasses.field(default_factory=Counter)
    snapshots: list[Snapshot] = dataclasses.field(default_factory=list)
    acknowledged: list[int] = dataclasses.field(default_factory=list)
    history: History = dataclasses.field(default_factory=dict)
    failures: list[str] = dataclasses.field(default_factory=list)

    def add(self, other: 'Remembered') -> None:
        self.figures += other.figures
        self.snapshots += other.snapshots
        self.acknowledged += other.acknowledged
        for oid, tids in other.history.items():
            self.history.setdefault(oid, set()).update(tids)
        self.failures += other.failures


class Clock:
    """The last tid that was committed over one client, by any of its threads."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()      # guards `last`
        self.last = 0

    def move(self, tid: int) -> None:
        with self._mutex:
            self.last = max(self.last, tid)


class Worker:
    """A thread that reads and writes until the end."""

    def __init__(self, db: ZODB.DB, shared: Shared, slot: int, clock: Clock, sync: bool) -> None:
        self._db = db
        self._shared = shared
        self._slot = slot
        self._clock = clock
        self._sync = sync
        self._chance = random.Random()
        self._last = 0                      # how far its last snapshot reached
        self.remembered = Remembered()

    def run(self) -> None:
        try:
            while not self._shared.over.value:
                self._with_a_connection()
        except BaseException:
            self.remembered.failures.append(traceback.format_exc())
            self._shared.over.value = 1

    def _with_a_connection(self) -> None:
        """A few hundred transactions; then a new connection, with an empty cache."""
        figures = self.remembered.figures
        manager = transaction.TransactionManager()
        connection = None
        try:
            for _ in range(self._chance.randint(1, 500)):
                if self._shared.over.value:
                    break
                known, seen = self._clock.last, max(self._shared.acknowledged)
                try:
                    manager.begin()
                    if connection is None:
                        connection = self._db.open(manager)
                    self._check_age(connection, known, seen)
                    self._transaction(manager, connection)
                except ConflictError as problem:
                    figures['read conflicts' if isinstance(problem, ReadConflictError) else 'conflicts'] += 1
                except TransientError:
                    figures['lost connections'] += 1
                manager.abort()
                if self._chance.random() < .1 and connection is not None:
                    connection.cacheMinimize()
        finally:
            manager.abort()
            if connection is not None:
                connection.close()

    def _check_age(self, connection: Any, known: int, seen: int) -> None:
        before = u64(connection._storage._start)
        if before < self._last:
            raise Discrepancy(f'a snapshot of what was before {before:016x} came after one of {self._last:016x}')
        if before <= known:
            raise Discrepancy(f'a snapshot of what was before {before:016x} lacks this client\'s own {known:016x}')
        if self._sync and before <= seen:
            raise Discrepancy(f'a snapshot of what was before {before:016x} lacks {seen:016x}, '
                              'acknowledged to somebody before it began')
        self._last = before

    def _transaction(self, manager: Any, connection: Any) -> None:
        if self._chance.random() < .6:
            try:
                seen = read(connection.root(), self._chance)
            except Discrepancy:
                # Which object it was, is found in the end.
                self.remembered.snapshots.append(_everything_seen(connection))
                raise
            self._remember(connection, seen)
            self.remembered.figures['snapshots'] += 1
        else:
            cell = write(connection.root(), self._chance)
            manager.commit()
            tid = u64(cell._p_serial)
            self._shared.acknowledged[self._slot] = tid
            self._clock.move(tid)
            self.remembered.acknowledged.append(tid)
            self.remembered.figures['commits'] += 1

    def _remember(self, connection: Any, seen: list[Any]) -> None:
        some = self._chance.sample(seen, min(6, len(seen)))
        snapshot = (u64(connection._storage._start),
                    tuple((u64(each._p_oid), u64(each._p_serial)) for each in some))
        snapshots = self.remembered.snapshots
        if len(snapshots) < MEMORY:
            snapshots.append(snapshot)
        else:
            snapshots[self._chance.randrange(MEMORY)] = snapshot


def _everything_seen(connection: Any) -> Snapshot:
    known = (connection._cache.get(oid) for oid in connection._cache.cache_data)
    return u64(connection._storage._start), tuple(
        (u64(each._p_oid), u64(each._p_serial)) for each in known if each is not None and each._p_changed is not None)


def historian(db: ZODB.DB, shared: Shared, scenario: Scenario) -> Remembered:
    """Undo and pack, until the end; and remember the history that a pack makes forget."""
    remembered = Remembered()
    noted: bytes | None = None
    pause = threading.Event()       # never set: waited for, so that the others can do something
    chance = random.Random()
    last_pack = time.monotonic()
    try:
        while not shared.over.value:
            pause.wait(.1)
            try:
                if scenario.undo:
                    _undo_one(db, chance)
                    remembered.figures['undone'] += 1
                if scenario.pack and time.monotonic() - last_pack > 3:
                    # A transaction of before this moment that is finished after the look at the history is the
                    # last one of before, since the next cannot begin earlier: a pack lets it be.
                    now = time.time()
                    noted = note_history(db.storage, remembered.history, noted)
                    db.pack(now)
                    remembered.figures['packs'] += 1
                    last_pack = time.monotonic()
            except UndoError:
                remembered.figures['not undone'] += 1
            except TransientError:
                remembered.figures['conflicts'] += 1
            except Exception as problem:
                # A stock client does not know all of them by their names.
                if 'Undo' not in str(problem):
                    raise
                remembered.figures['not undone'] += 1
    except BaseException:
        remembered.failures.append(traceback.format_exc())
        shared.over.value = 1
    return remembered


def _undo_one(db: ZODB.DB, chance: random.Random) -> None:
    manager = transaction.TransactionManager()
    try:
        recent = [each for each in db.undoInfo(0, -5) if each['description'] != 'initial database creation'
                  and each['description'] != 'create']
        if recent:
            db.undo(chance.choice(recent)['id'], manager.get())
            manager.commit()
    finally:
        manager.abort()


def take_part(make: Callable[[], Any], scenario: Scenario, shared: Shared, slots: Sequence[int],
              result: str) -> None:
    """A process: a client, and a thread for each slot; without slots, undo and pack."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)     # for who finds it hanging
    logging.disable()       # ZODB tells at length of each connection that is lost
    remembered = Remembered()
    try:
        db = _database(make, shared)
        try:
            if slots:
                clock = Clock()
                workers = [Worker(db, shared, slot, clock, scenario.sync) for slot in slots]
                threads = [threading.Thread(target=each.run, name=f'worker {slot}')
                           for slot, each in zip(slots, workers)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                for worker in workers:
                    remembered.add(worker.remembered)
            else:
                remembered.add(historian(db, shared, scenario))
        finally:
            db.close()
    except BaseException:
        remembered.failures.append(traceback.format_exc())
        shared.over.value = 1
    with open(f'{result}.new', 'wb') as file:
        pickle.dump(remembered, file)
    os.rename(f'{result}.new', result)


def _database(make: Callable[[], Any], shared: Shared) -> ZODB.DB:
    """The database; the server may be away just when we come."""
    while True:
        storage = None
        try:
            storage = make()
            return ZODB.DB(storage, cache_size=15, pool_size=100)
        except TransientError:
            if storage is not None:
                storage.close()
            if shared.over.value:
                raise


@dataclasses.dataclass(frozen=True)
class Maker:
    """Opens a client; can be sent to another process."""

    kind: str
    address: Any
    label: str
    cache_size: int
    sync: bool
    cache: str | None = None    # the file, which outlives the process, if it is our client

    def __call__(self) -> Any:
        from tests.system.clients import open_client

        cache = {'cache': self.cache} if self.cache is not None and self.kind == 'zeo' else {}
        return open_client(self.kind, self.address, cache_size=self.cache_size, server_sync=self.sync,
                           max_disconnect_poll=.5, client_label=self.label, **cache)


# ---- a scenario, from the start of the server to the judgement ---------------------------------


class Stage:
    """A server and the processes on it."""

    def __init__(self, scenario: Scenario, server: Any, options: argparse.Namespace, folder: str) -> None:
        self._scenario = scenario
        self._server = server
        self._options = options
        self._folder = pathlib.Path(folder)
        self._context = multiprocessing.get_context('spawn')
        size = options.processes * options.threads
        self.shared = Shared(self._context.RawValue('Q', 0), self._context.RawArray('Q', size))
        self._processes: dict[int, Any] = {}
        self._started = 0
        self._chance = random.Random()
        self._before: dict[int, list[int]] = {}     # what a process's slots said when it was started
        self.remembered = Remembered()

    def _slots(self, place: int) -> slice:
        """Where the threads of a process tell what they committed; for who undoes and packs: nowhere."""
        threads, last = self._options.threads, self._options.processes
        return slice(min(place, last) * threads, min(place + 1, last) * threads)

    def address(self, place: int) -> Any:
        """What the client of a place connects to."""
        return self._server.address

    def start(self, place: int) -> None:
        """Start the process of a place; that of the last place undoes and packs."""
        options = self._options
        self._started += 1
        mine = self._slots(place)
        self._before[place] = self.shared.acknowledged[mine]
        slots = range(mine.start, mine.stop)
        kind = ('zeo', 'ZEO')[place % 2] if options.client == 'mixed' else options.client
        make = Maker(kind, self.address(place), f'{self._scenario.name} {self._started}',
                     options.cache_size * 1024, self._scenario.sync, str(self._folder / f'{place}.zec'))
        process = self._context.Process(
            target=take_part, name=f'stress {place}',
            args=(make, self._scenario, self.shared, slots, str(self._folder / str(self._started))))
        process.start()
        self._processes[place] = process

    def run(self, seconds: float) -> None:
        places = list(range(self._options.processes))
        if self._scenario.undo or self._scenario.pack:
            places.append(self._options.processes)
        for place in places:
            self.start(place)
        faults = self.faults()
        pause = threading.Event()       # never set: it paces the faults
        patience = time.monotonic() + PATIENCE
        while not self.shared.over.value and not all(self.shared.acknowledged):
            # It begins when everybody has begun.
            pause.wait(.1)
            if time.monotonic() > patience:
                raise Discrepancy('some have not committed anything yet')
        end = time.monotonic() + seconds
        while not self.shared.over.value and (left := end - time.monotonic()) > 0:
            pause.wait(min(left, self._chance.uniform(.5, 4) if faults else .5))
            if faults and time.monotonic() < end:
                self._chance.choice(faults)()

    def faults(self) -> list[Callable[[], None]]:
        scenario = self._scenario
        return ([self._restart] * scenario.server_restarts + [self._kill_server] * scenario.server_deaths
                + [self._kill_client] * scenario.client_deaths)

    def _restart(self) -> None:
        self._server.restart()
        self.remembered.figures['restarts'] += 1

    def _kill_server(self) -> None:
        self._server.kill()
        if self._server.kind == 'zeo':
            self._server.judge()
        self._server.start()
        self.remembered.figures['server deaths'] += 1

    def _kill_client(self) -> None:
        place = self._chance.randrange(self._options.processes)
        if self.shared.acknowledged[self._slots(place)] == self._before[place]:
            return      # it has hardly begun
        process = self._processes.pop(place)
        process.kill()
        process.join(PATIENCE)
        process.close()
        # The last that it told; the rest of its memory is gone.
        self.remembered.acknowledged += filter(None, self.shared.acknowledged[self._slots(place)])
        self.start(place)
        self.remembered.figures['client deaths'] += 1

    def end(self) -> Remembered:
        """Tell all to end, gather what they remember."""
        self.shared.over.value = 1
        remembered = self.remembered
        for place, process in self._processes.items():
            process.join(PATIENCE)
            if process.exitcode is None:
                os.kill(process.pid, signal.SIGUSR1)        # tells where it hangs
                process.join(5)
                process.kill()
                process.join(PATIENCE)
                remembered.failures.append(f'process {place} did not end within {PATIENCE} seconds')
            elif process.exitcode:
                remembered.failures.append(f'process {place} ended with status {process.exitcode}')
            process.close()
        self._processes.clear()
        for path in self._folder.iterdir():
            if path.suffix not in ('.new', '.zec'):
                with path.open('rb') as file:
                    remembered.add(pickle.load(file))
        return remembered


def play(scenario: Scenario, options: argparse.Namespace, seconds: float) -> Remembered:
    """Play a scenario and judge it; returns what was done and seen, and what was wrong."""
    from tests.system.servers import Server
    from tests.system.servers import Storage
    from tests.system.servers import file_storage

    storage = file_storage()
    if scenario.slow:
        module = '__import__("tests.system.hotset", fromlist=["SlowStorage"])'
        storage = Storage(f'{module}.SlowStorage("Data.fs", {options.mistake!r})')
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix='zeo-stress-'))
        server = stack.enter_context(Server(options.server, {'1': storage}, unix=options.unix))
        kind = 'zeo' if options.client == 'mixed' else options.client
        with contextlib.closing(ZODB.DB(Maker(kind, server.address, 'create', 1 << 20, False)())) as db:
            with db.transaction('create') as connection:
                create(connection.root())
        stage = Stage(scenario, server, options, folder)
        try:
            stage.run(seconds)
        except Discrepancy as discrepancy:
            stage.remembered.failures.append(f'Discrepancy: {discrepancy}')
        finally:
            remembered = stage.end()
        server.stop()
        if remembered.failures:
            print(f'The server said:\n{server.log}', file=sys.stderr)
        judge(FileStorage(os.path.join(server.folder, 'Data.fs'), read_only=True), remembered)
        return remembered


def judge(storage: Any, remembered: Remembered) -> None:
    """Compare what is remembered with what the server has stored, and that with what must be true at any time."""
    try:
        _compare(storage, remembered)
    except Discrepancy as discrepancy:
        remembered.failures.append(f'Discrepancy: {discrepancy}')


def _compare(storage: Any, remembered: Remembered) -> None:
    with contextlib.closing(ZODB.DB(storage)) as db:
        note_history(db.storage, remembered.history)
        remembered.figures['revisions checked'] = check_snapshots(remembered.snapshots, remembered.history)
        check_acknowledged(remembered.acknowledged, remembered.history)
        with contextlib.closing(db.open()) as connection:
            read(connection.root(), AllOfIt())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog='python -m tests.system.stress', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('scenarios', nargs='*', metavar='scenario', help=f'of {", ".join(SCENARIOS)} (all)')
    parser.add_argument('--minutes', type=float, default=3.0, help='for all scenarios together (3)')
    parser.add_argument('--processes', type=int, default=4)
    parser.add_argument('--threads', type=int, default=3, help='in each process, over one client (3)')
    parser.add_argument('--server', choices=('zeo', 'ZEO'), default='zeo', help="ours, or PyPI's")
    parser.add_argument('--client', choices=('zeo', 'ZEO', 'mixed'), default='zeo')
    parser.add_argument('--unix', action='store_true', help='over a Unix domain socket')
    parser.add_argument('--cache-size', type=int, default=40, metavar='KB',
                        help="of each client's file (40, about what there is to be cached)")
    parser.add_argument('--mistake', choices=sorted(MISTAKES), default='',
                        help='take a protection out of the server of slow-storage, which has to be noticed')
    options = parser.parse_args(arguments)
    unknown = set(options.scenarios) - set(SCENARIOS)
    if unknown:
        parser.error(f'no such scenario: {", ".join(sorted(unknown))}')
    chosen = [SCENARIOS[name] for name in options.scenarios or SCENARIOS]
    if options.server == 'ZEO':
        # It takes storages from its configuration only; its answer to a ping may overtake an announcement; and a
        # SIGTERM becomes an exception wherever it meets it, which some client may get to see.
        chosen = [dataclasses.replace(each, sync=False, server_restarts=False)
                  for each in chosen if not each.slow]

    return play_all(chosen, lambda each: play(each, options, options.minutes * 60 / len(chosen)))


def play_all(chosen: Sequence[Any], play_one: Callable[[Any], Remembered]) -> int:
    """Play one scenario after the other, a line of figures for each; the exit status."""
    wrong = 0
    for scenario in chosen:
        begun = time.monotonic()
        remembered = play_one(scenario)
        told = ', '.join(f'{value:,} {name}' for name, value in sorted(remembered.figures.items()) if value)
        print(f'{"WRONG" if remembered.failures else "ok":5} {scenario.name:12} '
              f'{time.monotonic() - begun:6.1f} s  {told}', flush=True)
        for failure in remembered.failures:
            print(failure, file=sys.stderr, flush=True)
        wrong += bool(remembered.failures)
    return 1 if wrong else 0


if __name__ == '__main__':
    from tests.system import stress as myself     # what goes to other processes has its module's true name
    raise SystemExit(myself.main())
