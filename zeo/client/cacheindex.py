"""What a client's cache knows: which revision of which object lies where.  Pure: no file, no lock, no clock.

A revision is named by its oid and the tid at which it *starts*.  Its *end* is the start of the next
one.  The index keeps three kinds of them:

- *current*: no end yet, as of the cache's last tid.
- *suspect*: was current when the client left, and may have ended since.  Serves nobody until the
  server confirms it or somebody loads it anew.
- *historic*: with a known end; true for ever, unless the past itself is in doubt.

What is learned never takes the place of something newer.  Everything here is the same whether it
is told by a server or read back from the cache's file, so a replayed file gives the same index.

Oids, tids and places (whatever the owner of the index makes of them) are unsigned 64-bit numbers
here, so that they can be kept in BTrees: some 40 bytes for an object, where a `dict` takes 180.
"""

import sys
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from enum import Enum
from struct import Struct
from typing import Any

from BTrees.QOBTree import QOBTree
from BTrees.QQBTree import QQBTree

__all__ = ['OPEN', 'Index', 'Kind', 'Table']

#: The end of a revision that has none.
OPEN = 0

#: The historic revisions of an object are rows of start, end and place, one after the other, oldest
#: first, none reaching into the next.
ROW = Struct('>QQQ')
_start_at = Struct('>Q').unpack_from


#: So many bytes of former rows stay when there is one more: an object that changes all the time would
#: take ever longer to change.
KEPT = 49 * ROW.size


class Kind(bytes, Enum):
    CURRENT = b'CURR'
    SUSPECT = b'SUSP'
    HISTORIC = b'HIST'


class Table:
    """One revision of each of many objects: where it starts and where it lies."""

    def __init__(self) -> None:
        self.starts: Any = QQBTree()
        self.places: Any = QQBTree()

    def remove(self, oid: int) -> None:
        del self.starts[oid]
        del self.places[oid]


class Index:
    """Revisions by oid.

    Not locked: its owner lets one thread change it at a time.  Others may look meanwhile for the
    place of a current revision, or for a historic one `before` a tid.
    """

    def __init__(self) -> None:
        self.current = Table()
        self.suspect = Table()
        self.historic: Any = QOBTree()

    def __len__(self) -> int:
        rows = sum(map(len, self.historic.values())) // ROW.size
        return len(self.current.starts) + len(self.suspect.starts) + rows

    def before(self, oid: int, tid: int) -> tuple[int, int, int] | None:
        """Start, end and place of the historic revision that was current immediately before `tid`."""
        rows = self.historic.get(oid)
        if rows is not None:
            position = _position(rows, tid) - ROW.size
            if position >= 0:
                start, end, place = ROW.unpack_from(rows, position)
                if tid <= end:
                    return start, end, place
        return None

    def find(self, oid: int, start: int) -> tuple[Kind, int, int] | None:
        """Kind, end and place of the revision of `oid` that starts at `start`."""
        if self.current.starts.get(oid) == start:
            return Kind.CURRENT, OPEN, self.current.places[oid]
        if self.suspect.starts.get(oid) == start:
            return Kind.SUSPECT, OPEN, self.suspect.places[oid]
        rows = self.historic.get(oid)
        if rows is not None:
            position = _position(rows, start)
            if position < len(rows):
                found, end, place = ROW.unpack_from(rows, position)
                if found == start:
                    return Kind.HISTORIC, end, place
        return None

    # What a server says

    def knows(self, oid: int) -> bool:
        """Whether there is any revision of `oid`."""
        # By places: who asks has just missed the object there, and the processor remembers that.
        return oid in self.current.places or oid in self.suspect.places or oid in self.historic

    def is_over(self, oid: int, start: int) -> bool:
        """Whether all that is known of `oid` had ended when `start` began."""
        if oid in self.current.places or oid in self.suspect.places:
            return False
        rows = self.historic.get(oid)
        return rows is None or _end(rows, len(rows)) <= start

    def is_next(self, oid: int, start: int) -> bool:
        """Whether a revision that begins at `start` comes after all that is known of `oid`."""
        latest: int | None = self.current.starts.get(oid)
        if latest is None:
            rows = self.historic.get(oid)
            if rows is not None and _end(rows, len(rows)) > start:
                return False
            latest = self.suspect.starts.get(oid)
        return latest is None or latest < start

    def wants(self, oid: int, start: int, end: int) -> bool:
        """Whether a revision that cannot be found would be news that contradicts nothing newer."""
        current = self.current.starts.get(oid)
        rows = self.historic.get(oid, b'')
        if end == OPEN:
            return (current is None or current < start) and (not rows or _end(rows, len(rows)) <= start)
        position = _position(rows, start)
        return (start < end
                and (current is None or current < start or end <= current)
                and (position == 0 or _end(rows, position) <= start)
                and (position == len(rows) or end <= ROW.unpack_from(rows, position)[0]))

    def later_than(self, tid: int) -> list[tuple[int, int]]:
        """Oid and start of each revision that is said to begin or to end after `tid`."""
        found = []
        for starts in (self.current.starts, self.suspect.starts):
            if max(starts.values(), default=0) > tid:   # seldom so, and soon said
                found += [(oid, start) for oid, start in starts.items() if start > tid]
        for oid, rows in self.historic.items():
            if _end(rows, len(rows)) > tid:
                found += [(oid, start) for start, end, _ in ROW.iter_unpack(rows) if end > tid]
        return found

    def put(self, kind: Kind, oid: int, start: int, end: int, place: int) -> None:
        """Add a revision that the index `wants`, or that it had."""
        if kind is Kind.HISTORIC:
            for held in (self.current, self.suspect):
                if held.starts.get(oid, end) < end:
                    held.remove(oid)
            rows = self.historic.get(oid, b'')
            position = _position(rows, start)
            after = rows[position:]
            if after and ROW.unpack_from(after)[0] == start:
                after = after[ROW.size:]
            self.historic[oid] = (rows[:position] + ROW.pack(start, end, place) + after)[-KEPT - ROW.size:]
        else:
            # An older revision held as current has ended somewhere on the way: nobody knows where.
            held, other = self.current, self.suspect
            if kind is Kind.SUSPECT:
                held, other = other, held
            if oid in other.starts:
                other.remove(oid)
            held.starts[oid] = start
            held.places[oid] = place

    def renew(self, revisions: Iterable[tuple[int, int]], places: Iterable[int]) -> None:
        """Add current revisions, by oid and start, each of which `is_next`; those before are invalidated then."""
        starts, held, historic, suspect = self.current.starts, self.current.places, self.historic, self.suspect
        for (oid, start), place in zip(revisions, places):
            former = starts.get(oid)
            if former is not None:  # history first: who looks meanwhile finds one or the other
                historic[oid] = historic.get(oid, b'')[-KEPT:] + ROW.pack(former, start, held[oid])
            elif oid in suspect.starts:
                suspect.remove(oid)
            starts[oid] = start
            held[oid] = place

    # These tell what they changed: only that need be remembered elsewhere.

    def invalidate(self, tid: int, oids: Iterable[int]) -> list[int]:
        """End the current revisions of `oids` at `tid`.

        One that starts at `tid` (or later) *is* what the server speaks of, and stays what it is.
        A suspect may have ended before, so it cannot become history: it is forgotten.
        """
        changed = []
        for oid in oids:
            start = self.current.starts.get(oid)
            if start is not None and start < tid:
                row = ROW.pack(start, tid, self.current.places[oid])
                self.historic[oid] = self.historic.get(oid, b'')[-KEPT:] + row
                self.current.remove(oid)       # last: who looks meanwhile finds one or the other
                changed.append(oid)
            elif self.suspect.starts.get(oid, tid) < tid:
                self.suspect.remove(oid)
                changed.append(oid)
        return changed

    def drop(self, oids: Iterable[int]) -> list[int]:
        """Forget the current revisions of `oids`: they ended, nobody knows when."""
        changed = []
        for oid in oids:
            for held in (self.current, self.suspect):
                if oid in held.starts:
                    held.remove(oid)
                    changed.append(oid)
        return changed

    def suspect_all(self) -> bool:
        """Let no current revision be served until it is confirmed; forget history, of which nobody can be asked."""
        historic, self.historic = self.historic, QOBTree()
        current, self.current = self.current, Table()
        if self.suspect.starts:
            self.suspect.starts.update(current.starts)
            self.suspect.places.update(current.places)
        else:
            self.suspect = current
        return bool(current.starts or historic)

    def confirm(self, tid: int, oids: Iterable[int]) -> list[int]:
        """The suspects of `oids` are current as of `tid`."""
        changed = []
        for oid in oids:
            start = self.suspect.starts.get(oid)
            if start is not None and start <= tid:
                self.put(Kind.CURRENT, oid, start, OPEN, self.suspect.places[oid])
                changed.append(oid)
        return changed

    # What happens to the place where it lies

    def forget(self, oid: int, start: int) -> None:
        """Forget one revision: its record is damaged."""
        found = self.find(oid, start)
        if found is not None:
            self.evict(oid, start, found[2])

    def evict(self, oid: int, start: int, place: int) -> tuple[Kind, int] | None:
        """Forget the revision that lies there, since that has to make room; gives kind and end, if there is one."""
        if self.current.places.get(oid) == place:
            self.current.remove(oid)
            return Kind.CURRENT, OPEN
        if self.suspect.places.get(oid) == place:
            self.suspect.remove(oid)
            return Kind.SUSPECT, OPEN
        rows = self.historic.get(oid)
        if rows is not None:
            position = _position(rows, start)
            if position < len(rows):
                _, end, found = ROW.unpack_from(rows, position)
                if found == place:
                    rows = rows[:position] + rows[position + ROW.size:]
                    if rows:
                        self.historic[oid] = rows
                    else:
                        del self.historic[oid]
                    return Kind.HISTORIC, end
        return None

    def forget_all(self) -> None:
        """Forget everything: what ended it, or put it in doubt, may have been lost."""
        self.current = Table()
        self.suspect = Table()
        self.historic = QOBTree()

    # In one piece

    def pack(self) -> bytes:
        """All of it as bytes: columns of numbers, each after its length; then the rows."""
        rows = list(self.historic.values())
        return b''.join([
            _packed(self.current.starts.keys()), _packed(self.current.starts.values()),
            _packed(self.current.places.values()), _packed(self.suspect.starts.keys()),
            _packed(self.suspect.starts.values()), _packed(self.suspect.places.values()),
            _packed(self.historic.keys()), _packed(map(len, rows)), *rows])

    @classmethod
    def unpack(cls, data: bytes) -> 'Index':
        """What was packed."""
        columns, at = [], 0
        for _ in range(8):
            end = at + 8 + 8 * int.from_bytes(data[at:at + 8])
            columns.append(_unpacked(data[at + 8:end]))
            at = end
        index = cls()
        index.current.starts.update(list(zip(columns[0], columns[1])))
        index.current.places.update(list(zip(columns[0], columns[2])))
        index.suspect.starts.update(list(zip(columns[3], columns[4])))
        index.suspect.places.update(list(zip(columns[3], columns[5])))
        for oid, length in zip(columns[6], columns[7]):
            index.historic[oid] = data[at:at + length]
            at += length
        return index

    def ended(self) -> Iterator[tuple[int, int, int]]:
        """Oid, start and end of all historic revisions."""
        for oid, rows in self.historic.items():
            for start, end, _ in ROW.iter_unpack(rows):
                yield oid, start, end


def _position(rows: bytes, start: int) -> int:
    """Where in `rows` a revision that starts at `start` is, or would be."""
    if not rows or _start_at(rows)[0] >= start:  # what has to make room is the oldest, mostly
        return 0
    return ROW.size * bisect_left(
        range(len(rows) // ROW.size), start, key=lambda row: _start_at(rows, row * ROW.size)[0])


def _end(rows: bytes, position: int) -> int:
    """The end of the revision before that position."""
    end: int = ROW.unpack_from(rows, position - ROW.size)[1]
    return end


def _packed(numbers: Iterable[int]) -> bytes:
    column = array('Q', numbers)
    if sys.byteorder == 'little':
        column.byteswap()
    return len(column).to_bytes(8) + column.tobytes()


def _unpacked(data: bytes) -> 'array[int]':
    column = array('Q', data)
    if sys.byteorder == 'little':
        column.byteswap()
    return column
