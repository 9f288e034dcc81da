"""What a client's cache knows: which revision of which object lies where.  Pure: no file, no lock, no clock.

A revision is named by its oid and the tid at which it *starts*.  Its *end* is the start of the next
one.  The index keeps three kinds of them:

- *current*: no end yet, as of the cache's last tid.
- *suspect*: was current when the client left, and may have ended since.  Serves nobody until the
  server confirms it or somebody loads it anew.
- *historic*: with a known end; true for ever.

What is learned never takes the place of something newer.  Everything here is the same whether it
is told by a server or read back from the cache's file, so a replayed file gives the same index.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from enum import Enum
from struct import Struct

__all__ = ['Index', 'Kind', 'OPEN', 'REVISION']

#: In memory a revision is 28 bytes: start, end (`OPEN`: none), checksum of its record, and its place
#: (whatever the owner of the index makes of it).  Begins with the start, so that revisions of one
#: object sort, and can be bisected, in the order of time.
REVISION = Struct('>8s8sIQ')

OPEN = bytes(8)


class Kind(Enum):
    CURRENT = b'CURR'
    SUSPECT = b'SUSP'
    HISTORIC = b'HIST'


class Index:
    """Revisions by oid.

    Not locked: its owner lets one thread change it at a time.  Others may look into it meanwhile:
    values are immutable, and replaced whole.
    """

    def __init__(self) -> None:
        self.current: dict[bytes, bytes] = {}
        self.suspect: dict[bytes, bytes] = {}
        #: The historic revisions of an object, oldest first, none reaching into the next.
        self.historic: dict[bytes, tuple[bytes, ...]] = {}

    def __len__(self) -> int:
        return len(self.current) + len(self.suspect) + sum(map(len, self.historic.values()))

    def before(self, oid: bytes, tid: bytes) -> bytes | None:
        """The revision that was current immediately before `tid`, if it is known and proven."""
        revision = self.current.get(oid)
        if revision is not None and revision[:8] < tid:
            return revision
        revisions = self.historic.get(oid)
        if revisions is not None:
            # A tid sorts before the revision that starts with it.
            position = bisect_left(revisions, tid)
            if position and tid <= revisions[position - 1][8:16]:
                return revisions[position - 1]
        return None

    def find(self, oid: bytes, start: bytes) -> tuple[Kind, bytes] | None:
        """The revision of `oid` that starts at `start`, whatever its kind."""
        revision = self.current.get(oid)
        if revision is not None and revision[:8] == start:
            return Kind.CURRENT, revision
        revision = self.suspect.get(oid)
        if revision is not None and revision[:8] == start:
            return Kind.SUSPECT, revision
        revisions = self.historic.get(oid, ())
        position = bisect_left(revisions, start)
        if position < len(revisions) and revisions[position][:8] == start:
            return Kind.HISTORIC, revisions[position]
        return None

    # What a server says

    def wants(self, oid: bytes, start: bytes, end: bytes) -> bool:
        """Whether that revision would be news that contradicts nothing newer."""
        revisions = self.historic.get(oid, ())
        current = self.current.get(oid)
        if end == OPEN:
            return ((current is None or current[:8] < start)
                    and (not revisions or revisions[-1][8:16] <= start))
        position = bisect_left(revisions, start)
        return (start < end
                and (current is None or current[:8] <= start or end <= current[:8])
                and (position == 0 or revisions[position - 1][8:16] <= start)
                and (position == len(revisions) or end <= revisions[position][:8]))

    def put(self, kind: Kind, oid: bytes, start: bytes, end: bytes, check: int, place: int) -> None:
        """Add a revision that the index `wants`, or that it had."""
        revision = REVISION.pack(start, end, check, place)
        if kind is not Kind.HISTORIC:
            # An older revision held as current has ended somewhere on the way: nobody knows where.
            held, other = (self.current, self.suspect)[::1 if kind is Kind.CURRENT else -1]
            other.pop(oid, None)
            held[oid] = revision
            return
        for held in (self.current, self.suspect):
            if oid in held and held[oid][:8] < end:
                del held[oid]
        revisions = self.historic.get(oid, ())
        position = bisect_left(revisions, start)
        after = revisions[position:]
        if after and after[0][:8] == start:
            after = after[1:]
        self.historic[oid] = *revisions[:position], revision, *after

    # These tell what they changed: only that need be remembered elsewhere.

    def invalidate(self, tid: bytes, oids: Iterable[bytes]) -> list[bytes]:
        """End the current revisions of `oids` at `tid`.

        One that starts at `tid` (or later) *is* what the server speaks of, and stays what it is.
        A suspect may have ended before, so it cannot become history: it is forgotten.
        """
        changed = []
        for oid in oids:
            revision = self.current.get(oid)
            if revision is not None and revision[:8] < tid:
                ended = revision[:8] + tid + revision[16:]
                self.historic[oid] = *self.historic.get(oid, ()), ended
                del self.current[oid]       # last: who looks meanwhile finds one or the other
                changed.append(oid)
            revision = self.suspect.get(oid)
            if revision is not None and revision[:8] < tid:
                del self.suspect[oid]
                changed.append(oid)
        return changed

    def drop(self, oids: Iterable[bytes]) -> list[bytes]:
        """Forget the current revisions of `oids`: they ended, nobody knows when."""
        return [oid for oid in oids if self.current.pop(oid, None) or self.suspect.pop(oid, None)]

    def suspect_all(self) -> bool:
        """Let no current revision be served until it is confirmed."""
        current, self.current = self.current, {}
        self.suspect.update(current)
        return bool(current)

    def confirm(self, tid: bytes, oids: Iterable[bytes]) -> list[bytes]:
        """The suspects of `oids` are current as of `tid`."""
        changed = []
        for oid in oids:
            revision = self.suspect.get(oid)
            if revision is not None and revision[:8] <= tid:
                del self.suspect[oid]
                self.current[oid] = revision
                changed.append(oid)
        return changed

    # What happens to the place where it lies

    def forget(self, oid: bytes, start: bytes) -> None:
        """Forget one revision: its record is damaged or has to make room."""
        found = self.find(oid, start)
        if found is None:
            return
        kind, revision = found
        if kind is Kind.CURRENT:
            del self.current[oid]
        elif kind is Kind.SUSPECT:
            del self.suspect[oid]
        elif len(self.historic[oid]) == 1:
            del self.historic[oid]
        else:
            self.historic[oid] = tuple(other for other in self.historic[oid] if other is not revision)

    def forget_unended(self) -> None:
        """Forget all but history: the ends of the others may have been lost."""
        self.current = {}
        self.suspect = {}

    def contents(self) -> Iterator[tuple[bytes, bytes, bytes | None]]:
        """All that may be served: oid, start, and end if it has one."""
        for oid, revision in self.current.items():
            yield oid, revision[:8], None
        for oid, revisions in self.historic.items():
            for revision in revisions:
                yield oid, revision[:8], revision[8:16]
