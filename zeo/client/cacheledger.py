"""What a client's cache knows, and the book in which that is kept: an `Index` in step with a `Log`.

Whatever changes the index is also a record in the log, so *the index is what replaying the log
gives*, and a file found after a crash gives what the cache once was.  An `Index` in memory says where
a revision lies; its record in the log says the same to whoever opens the file next.

**What is used stays.**  Room is made by reusing the oldest segment.  What was hit since it was
written there is appended anew, most used first, and counts as used once less (*second chance*,
CLOCK); so a scan, which hits nothing twice, throws out little else than itself.
"""

import os
from collections.abc import Iterable, Sequence
from struct import Struct

from ZODB.utils import p64, u64

from zeo.client.cachefile import ALONE, COLLECTED, MANY, SIZE_BITS, Content, Log, pack, pack_all, repack, unpack
from zeo.client.cacheindex import OPEN, Index, Kind

__all__ = ['MOST_USED', 'NEXT', 'Ledger']

# Tags of records.  A revision has that of its kind; its oid, start, end and body are its own.
KINDS: dict[bytes, Kind] = {kind.value: kind for kind in Kind}
NEXT = b'NEXT'              # a current revision that invalidates, at its start, the one before
INVALIDATE = b'INVA'        # start: the tid; body: oids
DROP = b'DROP'              # body: oids
SUSPECT_ALL = b'DOUB'
CONFIRM = b'CONF'           # start: the tid; body: oids
FORGET = b'FORG'            # oid, start: of one revision that is damaged
LAST_TID = b'LAST'          # start: the tid
RESUME = b'OPEN'            # oid: random, so that nothing that was written before can follow it

OIDS = Struct('>Q')
NAME = Struct('>Q Q')

#: Of an oid.
as_number = int.from_bytes

#: Hits are counted up to this, for every so many bytes of the file.  (Shorter neighbours share.)
MOST_USED = 3
GRAIN = 128
GRAIN_BITS = SIZE_BITS + 7      # of a place; 2 ** 7 is GRAIN

#: The last tid moves with every transaction of anybody.  The file is told after so many: what is older is as
#: true, and who opens it asks the server for what has changed since.
MOVES = 50


class Ledger:
    """An index whose every change is noted in a log.

    Not locked; its owner lets one thread at a time change it.  After any exception but `Unusable` it
    says nothing that can be relied on, until it is told to `forget_all` and then to `start_over`.
    Others may look meanwhile for a place in `index`, read there, and count that as `use`.
    """

    def __init__(self, log: Log) -> None:
        self.log = log
        self.index = Index()
        #: The contents are valid up to this tid.
        self.last_tid = 0
        #: How often that has moved since it was noted.
        self._moves = 0
        #: While some transactions up to `last_tid` are not in the log: the last tid before them.
        self.behind: int | None = None
        #: The log says what the index says.  Else nothing may be written before it starts over.
        self.sound = False
        #: Hits since a record was written, by its offset // GRAIN.  Inexact: nobody locks it.
        self._used = bytearray(log.extent // GRAIN + 1)
        #: So many bytes may be taken along when room is made: three for each that is new, saved up for
        #: segments that are in use as a whole.
        self._savings = 0
        #: So many were taken along into the open segment.
        self._taken = 0

    def use(self, place: int) -> bool:
        """Count a hit; whether there was one before."""
        grain = place >> GRAIN_BITS
        used = self._used[grain]
        if used < MOST_USED:
            self._used[grain] = used + 1
        return used > 0

    # What a server says

    def learn(self, oid: int, start: int, end: int, content: Content) -> None:
        """Keep a revision, if that is news and not too long."""
        index = self.index
        found = index.find(oid, start) if index.knows(oid) else None
        if found is None:
            if index.wants(oid, start, end) and len(content[1]) <= self.log.room:
                self._keep(Kind.CURRENT if end == OPEN else Kind.HISTORIC, oid, start, end, content)
        else:       # of what is history nothing more can be said: what came after began when it ended, or later
            self.confirm(start, [oid])
            self.invalidate(end, [oid])     # nothing ends if that is OPEN

    def learn_all(self, start: int, revisions: Iterable[tuple[bytes, bytes]]) -> int:
        """`learn` current revisions that start at the same tid, by oid.

        The one before is invalidated of as many as it returns.
        """
        is_next, room, since = self.index.is_next, self.log.room, p64(start)
        names, bodies, length, learned = [], [], 0, 0
        for oid, body in revisions:
            if is_next(as_number(oid), start) and len(body) <= room:
                names.append(oid + since)
                bodies.append(body)
                length += len(body)
                if length >= COLLECTED:
                    self.learn_news(names, bodies)
                    learned += len(names)
                    names, bodies, length = [], [], 0
            else:
                self.learn(as_number(oid), start, OPEN, pack(oid, since, body))
        if names:
            self.learn_news(names, bodies)
        return learned + len(names)

    def learn_news(self, names: Sequence[bytes], bodies: Sequence[bytes], tag: bytes = NEXT) -> None:
        """Keep current revisions that are not too long: oid and start of each, and body.

        Each `is_next`, at its turn, and invalidates the one before.  With the tag of a current one all before is over.
        """
        count, log, length = len(names), self.log, sum(map(len, bodies))
        if count > 1 and (count > MANY or not log.fits(length, count)):
            half = count // 2
            self.learn_news(names[:half], bodies[:half], tag)
            self.learn_news(names[half:], bodies[half:], tag)
            return
        if not log.fits(length, count):
            self._make_room(length)
        places = log.append_all(tag, pack_all(names, bodies))
        first, end = places[0] >> GRAIN_BITS, (places[-1] >> GRAIN_BITS) + 1
        self._used[first:end] = bytes(end - first)
        revisions = NAME.iter_unpack(b''.join(names))
        if tag == NEXT:
            self.index.renew(revisions, places)
        else:
            current = self.index.current
            for (oid, start), place in zip(revisions, places):
                current.starts[oid] = start
                current.places[oid] = place

    def invalidate(self, tid: int, oids: Iterable[int]) -> None:
        """See `Index.invalidate`."""
        self._note_oids(INVALIDATE, tid, self.index.invalidate(tid, oids))

    def drop(self, oids: Iterable[int]) -> None:
        """See `Index.drop`."""
        self._note_oids(DROP, 0, self.index.drop(oids))

    def suspect_all(self) -> None:
        """See `Index.suspect_all`."""
        if self.index.suspect_all():
            self._note(SUSPECT_ALL)

    def confirm(self, tid: int, oids: Iterable[int]) -> None:
        """See `Index.confirm`."""
        self._note_oids(CONFIRM, tid, self.index.confirm(tid, oids))

    def forget(self, oid: int, start: int) -> None:
        """Forget a revision, also when the file is read again."""
        self.index.forget(oid, start)
        self._note(FORGET, oid=oid, start=start)

    def forget_later(self) -> None:
        """Forget what is said to begin or to end after the last tid."""
        for oid, start in self.index.later_than(self.last_tid):
            self.forget(oid, start)

    def advance(self, last_tid: int) -> bool:
        """The contents are valid up to `last_tid`; False: nothing was done, call `move`."""
        if self._moves < MOVES and last_tid > self.last_tid:
            self.last_tid = last_tid
            self._moves += 1
            return True
        return False

    def move(self, last_tid: int) -> None:
        """The contents are valid up to `last_tid`, not earlier than before; let the file have it."""
        if last_tid > self.last_tid:
            self.last_tid = last_tid
            self._moves += 1
            self.flush()

    def flush(self) -> None:
        """Let the file have all that was learned."""
        if self.sound:
            if self._moves:
                self._moves = 0
                self._note(LAST_TID, start=self._provable)
            self.log.flush()

    def start_over(self, last_tid: int) -> None:
        """Forget everything, also in the file."""
        self.forget_all()
        self.last_tid, self.behind = last_tid, None
        self._moves = self._savings = self._taken = 0
        self.log.start_over(last_tid)
        self.sound = True

    def forget_all(self) -> None:
        """Know nothing, and leave the file as it is."""
        try:
            self.sound = False
        finally:
            self.index = Index()

    @property
    def _provable(self) -> int:
        """The last tid as of which the log says what is so."""
        return self.last_tid if self.behind is None else self.behind

    # Writing

    def _keep(self, kind: Kind, oid: int, start: int, end: int, content: Content, used: int = 0) -> None:
        """Append a revision, then let it be found."""
        length = len(content[1])
        if not self.log.fits(length):
            self._make_room(length)
        place = self.log.append(kind, end, content)
        self._used[place >> GRAIN_BITS] = used
        self.index.put(kind, oid, start, end, place)

    def _note(self, tag: bytes, oid: int = 0, start: int = 0, body: bytes = b'') -> None:
        """Append what was changed in the index."""
        if self.sound:
            if not self.log.fits(len(body)):
                self._make_room(len(body))
            self.log.append(tag, OPEN, pack(p64(oid), p64(start), body))

    def _note_oids(self, tag: bytes, start: int, oids: list[int]) -> None:
        many = self.log.room // 16
        for first in range(0, len(oids), many):
            self._note(tag, start=start, body=b''.join(map(p64, oids[first:first + many])))

    def _make_room(self, length: int) -> None:
        """Begin a segment with room for a body of that length, taking along what was used of the oldest one."""
        index, log, used = self.index, self.log, self._used
        kept = []
        for _, oid, start, _, place in log.oldest():
            found = index.evict(oid, start, place)
            if found is not None and (hits := used[place >> GRAIN_BITS]):
                survivor = repack(log.read(place))
                if survivor[0] == NAME.pack(oid, start):    # else the disk has kept what was there before
                    kept.append((hits, oid, start, *found, survivor))
        # If all is in use, three bytes in four are kept on an average, or nothing new would get in; and never
        # all of a segment, or one after the other would be moved for a few objects that somebody waits for.
        self._savings = min(self._savings + 3 * (log.filled - self._taken), log.extent // 4)
        log.begin(self._provable)
        room = min(self._savings, log.room - max(length, log.room // 64))
        for hits, oid, start, kind, end, survivor in sorted(kept, key=lambda entry: -entry[0]):
            size = len(survivor[1]) + ALONE
            if size <= room:
                room -= size
                self._keep(kind, oid, start, end, survivor, hits - 1)
        self._taken = log.filled
        self._savings -= self._taken

    # From one process to the next

    def close(self, remember: bool) -> None:
        """Close the file; `remember` that it need not be replayed."""
        summary = None
        try:
            if remember and self.sound and self.behind is None:
                self.flush()
                summary = b''.join([p64(self.last_tid), self._used, self.index.pack()])
        finally:
            self.log.close(summary)

    def open(self) -> bool:
        """Know what the file has to tell, which is not empty; tells whether it had been closed.

        Raises Unusable if it is nothing.
        """
        clean = self.log.resume()
        summary = self.log.recall() if clean else None
        if summary is None:
            self._replay(verify=not clean)
        else:
            self._recall(summary)
        return clean

    def _recall(self, summary: bytes) -> None:
        """Know what was known at `close`."""
        end = 8 + len(self._used)
        self.last_tid, self._used = int.from_bytes(summary[:8]), bytearray(summary[8:end])
        self.index = Index.unpack(summary[end:])
        self._continue()

    def _continue(self) -> None:
        """Begin to write to a file that was read."""
        self.sound = True
        self.log.mark(clean=False)
        if self.log.fits(0):    # else a new segment comes first, which nothing that was written before can follow
            self._note(RESUME, oid=u64(os.urandom(8)))

    def _replay(self, verify: bool) -> None:
        """Repeat what the log says was learned; `verify`: look at the bodies of revisions, too."""
        index, log = self.index, self.log
        last, damaged = 0, []
        for gap, last, records, image in log.replay():
            if gap:     # what is lost may have ended any revision before it, and none after it
                index.forget_all()
            for tag, oid, start, end, place in records:
                kind = KINDS.get(tag)
                if kind is not None or tag == NEXT:
                    if kind is None:
                        index.renew([(oid, start)], [place])
                    else:
                        index.put(kind, oid, start, end, place)
                    if verify and self._named(log.content(place, image), oid, start) is None:
                        damaged.append((oid, start))
                elif tag == LAST_TID:
                    last = start
                else:
                    self._repeat(tag, oid, start, self._named(log.content(place, image), oid, start))
        self.last_tid = last
        self._continue()
        # Only now: had they been left out, what they took the place of would be back.
        for oid, start in damaged:
            self.forget(oid, start)

    @staticmethod
    def _named(content: bytes, oid: int, start: int) -> tuple[bytes, bytes, bytes] | None:
        """What was packed, if it has the name that its record's head says; else the disk has not got it."""
        found = unpack(content)
        return found if found is not None and NAME.unpack(found[0] + found[1]) == (oid, start) else None

    def _repeat(self, tag: bytes, oid: int, start: int, content: tuple[bytes, bytes, bytes] | None) -> None:
        index = self.index
        if content is None:
            index.forget_all()      # the damaged body is a gap as well
            return
        oids = [oid for oid, in OIDS.iter_unpack(content[2])]
        if tag == INVALIDATE:
            index.invalidate(start, oids)
        elif tag == DROP:
            index.drop(oids)
        elif tag == SUSPECT_ALL:
            index.suspect_all()
        elif tag == CONFIRM:
            index.confirm(start, oids)
        elif tag == FORGET:
            index.forget(oid, start)
