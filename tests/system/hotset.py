"""A few objects that everybody changes, what must always be true of them, and who would notice if not.

Accounts, between which amounts are moved; pairs, whose halves are equal; each counts its changes, and a counter
counts them all.  `read` finds any snapshot torn that has one object of another time.  What that
would miss is found by `check_snapshots`, which compares what was read with the whole history.
"""

import random
import threading
from bisect import bisect_left
from collections.abc import Iterable
from typing import Any

import persistent
from BTrees.Length import Length
from persistent.list import PersistentList
from ZODB.FileStorage import FileStorage
from ZODB.utils import u64

ACCOUNTS = 10
PAIRS = 5
TOTAL = 1000 * ACCOUNTS


class Discrepancy(AssertionError):
    """Somebody saw what cannot have been."""


class Cell(persistent.Persistent):  # type: ignore[misc]
    """A value, how often it was changed, and something that takes room in caches."""

    def __init__(self, value: int) -> None:
        self.value = value
        self.changes = 0
        self.filling = b''

    def change(self, value: int, chance: random.Random) -> None:
        self.value = value
        self.changes += 1
        self.filling = b'.' * chance.randint(0, 3000)


def create(root: Any) -> None:
    root['accounts'] = PersistentList(Cell(TOTAL // ACCOUNTS) for _ in range(ACCOUNTS))
    root['pairs'] = PersistentList((Cell(0), Cell(0)) for _ in range(PAIRS))
    # Does not conflict: what two transactions add to it is added up.
    root['changes'] = Length()


def write(root: Any, chance: random.Random) -> Cell:
    """Change two objects and count that; returns one of them."""
    one: Cell
    other: Cell
    if chance.random() < .5:
        one, other = chance.sample(root['accounts'], 2)
        amount = chance.randint(1, 100)
        one.change(one.value - amount, chance)
        other.change(other.value + amount, chance)
    else:
        one, other = chance.choice(root['pairs'])
        value = chance.randint(1, 1_000_000)
        one.change(value, chance)
        other.change(value, chance)
    root['changes'].change(2)
    if chance.random() < .2:
        root._p_jar.readCurrent(chance.choice(root['accounts']))
    return one


def read(root: Any, chance: random.Random) -> list[Any]:
    """Look at all of it, or at a part, in any order; returns the objects that were looked at."""
    accounts, pairs, changes = list(root['accounts']), list(root['pairs']), root['changes']
    everything = chance.random() < .5
    if not everything:
        accounts, pairs = [], chance.sample(pairs, chance.randint(1, PAIRS))
    cells = accounts + [cell for pair in pairs for cell in pair]
    for cell in chance.sample(cells, len(cells)):
        cell._p_activate()
    for one, other in pairs:
        if one.value != other.value:
            raise Discrepancy(f'a pair is {one.value} and {other.value}')
    if everything:
        total, counted = sum(cell.value for cell in accounts), sum(cell.changes for cell in cells)
        if total != TOTAL:
            raise Discrepancy(f'all accounts make {total}, not {TOTAL}')
        if counted != changes():
            raise Discrepancy(f'objects were changed {counted} times, the counter says {changes()}')
        cells.append(changes)
    return cells


class AllOfIt(random.Random):
    """Chooses everything that `read` leaves to chance."""

    def random(self) -> float:
        return 0.0


# ---- what somebody remembers, compared with the server's file -----------------------------

#: The tid up to which a snapshot reaches (it is not part of it), and what was read: oids and serials.
Snapshot = tuple[int, tuple[tuple[int, int], ...]]


#: The tids of each object's revisions.
History = dict[int, set[int]]


def note_history(storage: Any, history: History, since: bytes | None = None) -> bytes | None:
    """Add what a storage has, from a tid on; returns the last tid."""
    for each in storage.iterator(since):
        for record in each:
            history.setdefault(u64(record.oid), set()).add(u64(record.tid))
        since = each.tid
    return since


def check_snapshots(snapshots: Iterable[Snapshot], history: History) -> int:
    """What was read must have been current then; returns how many revisions were looked at."""
    revisions = {oid: sorted(tids) for oid, tids in history.items()}
    checked = 0
    for before, seen in snapshots:
        for oid, serial in seen:
            known = revisions.get(oid, ())
            place = bisect_left(known, before)
            current = known[place - 1] if place else None
            if current != serial:
                raise Discrepancy(
                    f'in a snapshot of what was before {before:016x}, object {oid:#x} was read as of {serial:016x}, '
                    f'but {"nothing" if current is None else f"{current:016x}"} was current')
            checked += 1
    return checked


def check_acknowledged(acknowledged: Iterable[int], history: History) -> None:
    """What was acknowledged must have been committed."""
    lost = set(acknowledged).difference(*history.values())
    if lost:
        raise Discrepancy(f'{len(lost)} acknowledged commits are lost, the first is {min(lost):016x}')


# ---- a storage that is slow when it matters ----------------------------------------------


class SlowStorage(FileStorage):  # type: ignore[misc]
    """A file storage that often waits between reading and telling, and between committing and telling.

    What a thread has read here is overtaken by commits all the time.  With ``mistake`` the server in
    whose process this is has a protection taken out, so that one can see what it is good for:
    'no-mark', replies to loads may stand behind the announcement that ends what they say.
    """

    def __init__(self, path: str, mistake: str = '') -> None:
        super().__init__(path)
        self._pause = threading.Event()     # never set
        if mistake:
            MISTAKES[mistake]()

    def loadBefore(self, oid: bytes, tid: bytes) -> Any:
        found = super().loadBefore(oid, tid)
        self._linger()
        return found

    def tpc_finish(self, transaction: Any, f: Any = None) -> Any:
        tid = super().tpc_finish(transaction, f)
        self._linger()
        return tid

    def _linger(self) -> None:
        if random.random() < .5:
            self._pause.wait(random.random() * .004)


def _no_mark() -> None:
    from zeo.server.outbox import Outbox

    right = Outbox.reply_to_load

    def wrong(self: Outbox, frame: Any, mark: int, start: bytes, **options: Any) -> Any:
        return right(self, frame, self.published, start, **options)

    Outbox.reply_to_load = wrong  # type: ignore[method-assign]


MISTAKES = {'no-mark': _no_mark}
