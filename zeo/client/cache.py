"""A client's object cache: revisions that need not be asked for, valid up to `last_tid`.

What is known is in an `Index`, in memory; the records are in a `Log`, in a file.  Whatever changes
the index is also a record in the log, so *the index is what replaying the log gives*, and a file
found after a crash gives what the cache once was.

**A hit takes no lock.**  It asks the index for a place, reads there, and looks whether a segment of
the log was begun meanwhile.  A place is given away only by beginning a segment, and has left the
index before.  So if none was begun, the bytes are those of the revision that was the right one when
the index was asked (*read, then validate*); the checksum is for damage on the disk.  If one was, the
same is done again under the mutex, where nothing moves.

**Whatever interrupts a change** (a full disk, KeyboardInterrupt between two steps) leaves an empty
cache: nothing is served from a state nobody can prove.  The file keeps the prefix it has, and the
log starts over when there is something to store.

**What came last is set aside.**  Loads come one at a time, each after a wait in which the processor
forgot all about us; putting many revisions away at once takes a fraction of the time.  So new current
ones of unknown objects first go into a small dict, where they can be found; any other change puts
them away before it is made, and so sees nothing of it.

**What is used stays.**  Room is made by reusing the oldest segment.  What was hit since it was
written there is appended anew, most used first, and counts as used once less (*second chance*,
CLOCK); so a scan, which hits nothing twice, throws out little else than itself.

In memory an object takes some 60 bytes, plus one byte per 128 bytes of the file.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from hashlib import blake2b
from io import FileIO
from itertools import chain
from struct import Struct
from typing import Any, Concatenate, ParamSpec, TypeVar
from urllib.parse import quote

from ZODB.utils import p64, u64, z64

from zeo.client.cachefile import FRONT_SIZE, SIZE_BITS, Log, Unusable, claim, pack, unnamed, unpack
from zeo.client.cacheindex import OPEN, Index, Kind
from zeo.errors import ClientStorageError

__all__ = ['Cache', 'CacheUnavailable', 'cache_path', 'open_cache']

logger = logging.getLogger(__name__)

# Tags of records.  A revision has that of its kind; its oid, start, end and body are its own.
KINDS: dict[bytes, Kind] = {kind.value: kind for kind in Kind}
INVALIDATE = b'INVA'        # start: the tid; body: oids
DROP = b'DROP'              # body: oids
SUSPECT_ALL = b'DOUB'
CONFIRM = b'CONF'           # start: the tid; body: oids
FORGET = b'FORG'            # oid, start: of one revision that is damaged
LAST_TID = b'LAST'          # start: the tid
RESUME = b'OPEN'            # oid: random, so that nothing that was written before can follow it

OIDS = Struct('>Q')
FAR_FUTURE = b'\xff' * 8

#: Hits are counted up to this, for every so many bytes of the file.  (Shorter neighbours share.)
MOST_USED = 3
GRAIN = 128

#: So many revisions, and so many bytes of them, may be set aside; a longer one never is.
ASIDE, ASIDE_SIZE, ASIDE_LONGEST = 64, 128 * 1024, 16 * 1024

#: When the disk refuses, so many stores are ignored before it is tried again.
PAUSE = 1000

P = ParamSpec('P')
T = TypeVar('T')


class CacheUnavailable(ClientStorageError):
    """The cache file cannot be used: another process has it, or the system refuses it."""


def cache_path(storage: str, client: str | None = None, var: str | None = None) -> str | None:
    """Where the persistent cache of that storage and client is; None: nobody asked for one.

    `client` defaults to the environment variable ``ZEO_CLIENT``, `var` to the directory ``var`` of
    ``INSTANCE_HOME`` if that is set, else to the current directory.  Whatever the names contain,
    the file is in that directory, and different names give different files.
    """
    client = client or os.environ.get('ZEO_CLIENT')
    if not client:
        return None
    if var is None:
        home = os.environ.get('INSTANCE_HOME')
        var = os.path.join(home, 'var') if home else os.getcwd()
    return os.path.join(var, f"{quote(client, safe='')}@{quote(storage, safe='')}.zec")


def open_cache(path: str | None, size: int, storage: str = '1', strict: bool = False) -> 'Cache':
    """The cache in the file at `path`, of at most `size` bytes (a few KB at least); None: a temporary one.

    A file that holds no usable cache of that storage starts empty.  One that another process has open,
    or that cannot be opened, or is no cache and not named like one (``.zec``), is left alone: then the
    cache is a temporary one and a warning says why, or, if `strict`, CacheUnavailable does.
    """
    digest = blake2b(storage.encode(), digest_size=16).digest()
    if path is not None:
        try:
            return Cache(Log(claim(path), size, digest), path)
        except OSError as error:
            message = f'Cache file {path} cannot be used: {error.strerror or error}'
            if strict:
                raise CacheUnavailable(message) from error
            logger.warning('%s; this client uses a temporary cache', message)
    try:
        return Cache(Log(unnamed(), size, digest), None)
    except OSError as error:
        logger.warning('No temporary cache: %s; nothing is cached', error)
        return Cache(Log(FileIO(os.devnull, 'r+'), size, digest), None, useless=True)


def _change(method: Callable[Concatenate['Cache', P], T]) -> Callable[Concatenate['Cache', P], T | None]:
    """A method that changes the cache: alone, and wholly or with nothing left."""

    @wraps(method)
    def changing(self: 'Cache', /, *args: P.args, **kw: P.kwargs) -> T | None:
        with self._mutex:
            if self._changing:
                raise RuntimeError('a signal handler or destructor called the cache it had interrupted')
            if self._closed:
                return None
            self._changing = True
            try:
                if self._aside:
                    self._put_away()
                return method(self, *args, **kw)
            except OSError as error:
                self._forget_all(PAUSE)
                if not self._complained:
                    self._complained = True
                    logger.warning('Cache %s: %s; goes on without what it held', self.name, error)
                return None
            except BaseException:
                self._forget_all(1)
                raise
            finally:
                self._changing = False
                if self._closed:
                    self._close()

    return changing


class Cache:
    """Current and historic revisions, found by oid and the tid they shall be older than.

    Every method may be called by any thread at any time, and none waits for anything but the disk.
    After `close` the cache is empty and ignores what it is told.  `last_tid` is the tid up to which
    the contents are known to be valid.
    """

    def __init__(self, log: Log, path: str | None, useless: bool = False) -> None:
        self.path = path
        self.name = path or '(temporary)'
        self.last_tid: bytes = z64
        #: Held by who changes anything; a leaf: nothing but the file is waited for under it.
        #: Reentrant, so that a signal handler that closes the cache does not wait for itself.
        self._mutex = threading.RLock()
        self._changing = False
        self._closed = False
        self._useless = useless
        self._complained = False
        self._log = log
        self._index = Index()
        #: What is known beside the index, by oid: record, start, hits.  Replaced, never emptied.
        self._aside: dict[bytes, list[Any]] = {}
        self._aside_size = 0
        self._longest_aside = min(ASIDE_LONGEST, log.segment // 16)
        #: Hits since a record was written, by its offset // GRAIN.  Inexact: nobody locks it.
        self._used = bytearray(log.extent // GRAIN + 1)
        #: So many bytes may be taken along when room is made: gained with each segment, and saved up
        #: for those that are in use as a whole.
        self._savings = log.extent // 2
        #: 0: the log says what the index says.  Else: nothing may be written before it starts over,
        #: and so many stores are ignored before that is tried.
        self._resting = PAUSE
        if not useless:
            self._open()

    def __len__(self) -> int:
        with self._mutex:
            return len(self._index) + len(self._aside)

    # Looking

    def load(self, oid: bytes) -> tuple[bytes, bytes] | None:
        """The current revision: record and start tid."""
        found = self.loadBefore(oid, FAR_FUTURE)
        return None if found is None else found[:2]

    def loadBefore(self, oid: bytes, tid: bytes) -> tuple[bytes, bytes, bytes | None] | None:
        """The revision that was current before `tid`: record, start tid, end tid (None: current)."""
        if not len(oid) == len(tid) == 8:
            return None
        aside = self._aside.get(oid)
        if aside is not None and aside[1] < tid:
            aside[2] += 1
            return aside[0], aside[1], None
        log, key = self._log, int.from_bytes(oid)
        begun = log.begun
        place = self._index.current.places.get(key)
        if place is not None:
            try:
                found = unpack(log.read(place))
            except OSError:     # closed meanwhile, or a bad disk
                found = None
            if found is not None and found[0] == oid and found[1] < tid and log.begun == begun:
                self._count(place)
                return found[2], found[1], None
        elif key not in self._index.historic and not self._changing:
            return None
        return self._find(key, int.from_bytes(tid))

    @_change
    def _find(self, oid: int, tid: int) -> tuple[bytes, bytes, bytes | None] | None:
        """The same with nobody moving anything.  Now what fails its checksum is damaged."""
        index = self._index
        while True:
            start, end, place = index.current.starts.get(oid, tid), OPEN, None
            if start < tid:
                place = index.current.places[oid]
            elif (past := index.before(oid, tid)) is not None:
                start, end, place = past
            if place is None:
                return None
            try:
                found = unpack(self._log.read(place))
            except OSError:
                found = None
            if found is not None and found[:2] == (p64(oid), p64(start)):
                self._count(place)
                return found[2], found[1], p64(end) if end != OPEN else None
            self._damaged(oid, start)

    def _count(self, place: int) -> None:
        grain = (place >> SIZE_BITS) // GRAIN
        if self._used[grain] < MOST_USED:
            self._used[grain] += 1

    def _damaged(self, oid: int, start: int) -> None:
        if not self._complained:
            self._complained = True
            logger.warning('Cache %s: a record is damaged; it will be loaded anew', self.name)
        self._index.forget(oid, start)
        self._note(FORGET, oid=oid, start=start)

    def contents(self) -> Iterator[tuple[bytes, bytes, bytes | None]]:
        """All revisions that may be served, as of now: oid, start, end (None: current)."""
        with self._mutex:
            self._settle()
            current = list(self._index.current.starts.items())
            ended = list(self._index.ended())
        return chain(((p64(oid), p64(start), None) for oid, start in current),
                     ((p64(oid), p64(start), p64(end)) for oid, start, end in ended))

    def suspects(self) -> Iterator[tuple[bytes, bytes]]:
        """What waits to be confirmed, as of now: oid and start."""
        with self._mutex:
            suspect = list(self._index.suspect.starts.items())
        return ((p64(oid), p64(start)) for oid, start in suspect)

    # Learning

    def store(self, oid: bytes, start: bytes, end: bytes | None, data: bytes) -> None:
        """Keep a revision as the server told it.

        What is known already, contradicts something newer, or is too long is ignored.  A suspect that
        turns out to be current (or gets an end) is served again.  ValueError if an oid or tid is none.
        """
        if end is None and self._set_aside(oid, start, data):
            return
        numbers = u64(oid), u64(start), OPEN if end is None else u64(end)
        if end is None or start < end:
            self._store(*numbers, pack(oid, start, data))

    def _set_aside(self, oid: bytes, start: bytes, data: bytes) -> bool:
        """Keep a current revision of an unknown object for later; False: it has to be stored now."""
        with self._mutex:
            aside = self._aside
            if (self._resting or self._closed or self._changing or type(data) is not bytes
                    or len(data) > self._longest_aside or oid in aside
                    or not len(oid) == len(start) == 8 or self._index.knows(int.from_bytes(oid))):
                return False
            aside[oid] = [data, start, 0]
            self._aside_size += len(data)
            if len(aside) >= ASIDE or self._aside_size >= ASIDE_SIZE:
                self._settle()
            return True

    @_change
    def _settle(self) -> None:
        """Nothing is set aside any more (that is so before every change)."""

    def _put_away(self) -> None:
        for oid, (data, start, used) in self._aside.items():
            self._learn(u64(oid), u64(start), OPEN, pack(oid, start, data), min(used, MOST_USED))
        self._aside, self._aside_size = {}, 0

    @_change
    def _store(self, oid: int, start: int, end: int, content: bytes) -> None:
        self._learn(oid, start, end, content)

    def _learn(self, oid: int, start: int, end: int, content: bytes, used: int = 0) -> None:
        if not self._back_in_service():
            return
        index = self._index
        found = index.find(oid, start) if index.knows(oid) else None
        if found is None:
            if index.wants(oid, start, end) and len(content) <= self._log.room:
                self._keep(Kind.CURRENT if end == OPEN else Kind.HISTORIC, oid, start, end, content, used)
        elif found[0] is not Kind.HISTORIC:
            self._note_oids(CONFIRM, start, index.confirm(start, [oid]))
            if end != OPEN:
                self._note_oids(INVALIDATE, end, index.invalidate(end, [oid]))

    def invalidate(self, tid: bytes | None, oids: Iterable[bytes]) -> None:
        """End the current revisions of `oids` at `tid`; None: forget them, they ended nobody knows when.

        A revision that starts at `tid` or later stays what it is.
        """
        self._invalidate(None if tid is None else u64(tid), list(map(u64, oids)))

    @_change
    def _invalidate(self, tid: int | None, oids: list[int]) -> None:
        if tid is None:
            self._note_oids(DROP, 0, self._index.drop(oids))
        else:
            self._note_oids(INVALIDATE, tid, self._index.invalidate(tid, oids))

    def drop(self, oids: Iterable[bytes]) -> None:
        """Forget the current revisions of `oids`, suspect or not."""
        self.invalidate(None, oids)

    @_change
    def suspect_all(self) -> None:
        """Serve no current revision until it is confirmed, or stored again.  Historic ones stay valid."""
        if self._index.suspect_all():
            self._note(SUSPECT_ALL)

    def confirm(self, tid: bytes, oids: Iterable[bytes]) -> None:
        """The server says that the suspect revisions of `oids` are current as of `tid`.

        To be told between the invalidations before and after that moment, as any other answer.
        """
        self._confirm(u64(tid), list(map(u64, oids)))

    @_change
    def _confirm(self, tid: int, oids: list[int]) -> None:
        self._note_oids(CONFIRM, tid, self._index.confirm(tid, oids))

    def set_last_tid(self, tid: bytes) -> None:
        """The contents are valid up to `tid`; ValueError if that goes backwards."""
        if self._move_last_tid(tid, u64(tid)) is False:
            raise ValueError(f'last tid may not go back from {self.last_tid.hex()} to {tid.hex()}')

    @_change
    def _move_last_tid(self, tid: bytes, number: int) -> bool:
        if tid > self.last_tid:
            self.last_tid = tid
            self._note(LAST_TID, start=number)
        return tid == self.last_tid

    def clear(self, tid: bytes = z64) -> None:
        """Forget everything, start anew as of `tid`."""
        self._clear(p64(u64(tid)))

    @_change
    def _clear(self, tid: bytes) -> None:
        self.last_tid = tid
        self._start_over()

    @_change
    def set_server(self, identity: str) -> None:
        """The server says who it is.  What came from another one is forgotten."""
        server = blake2b(identity.encode(), digest_size=16).digest()
        former, self._log.server = self._log.server, server
        if former not in (server, bytes(16)):
            logger.warning('Cache %s is of another server: starts empty', self.name)
            self.last_tid = z64
            self._start_over()
        elif former != server and not self._resting:
            self._log.mark(clean=False)

    @_change
    def flush(self) -> None:
        """Let the file have all that was learned; what is not there yet is lost if the process is killed.

        Happens by itself after every 64 KB and at the end.
        """
        if not self._resting:
            self._log.flush()

    # The log

    def _keep(self, kind: Kind, oid: int, start: int, end: int, content: bytes, used: int = 0) -> None:
        """Append a revision, then let it be found."""
        if not self._log.fits(content):
            self._make_room(content)
        place = self._log.append(kind, end, content)
        self._used[(place >> SIZE_BITS) // GRAIN] = used
        self._index.put(kind, oid, start, end, place)

    def _note(self, tag: bytes, oid: int = 0, start: int = 0, body: bytes = b'') -> None:
        """Append what was changed in the index."""
        if not self._resting:
            content = pack(p64(oid), p64(start), body)
            if not self._log.fits(content):
                self._make_room(content)
            self._log.append(tag, OPEN, content)

    def _note_oids(self, tag: bytes, start: int, oids: list[int]) -> None:
        many = self._log.room // 16
        for first in range(0, len(oids), many):
            self._note(tag, start=start, body=b''.join(map(p64, oids[first:first + many])))

    def _make_room(self, content: bytes) -> None:
        """Begin a segment with room for `content`, taking along what was used of the oldest one."""
        index, log = self._index, self._log
        records, image = log.oldest()
        kept = []
        for record in records:
            found = index.find(record.oid, record.start) if record.tag in KINDS else None
            if found is not None and found[2] == record.place:
                index.forget(record.oid, record.start)
                if used := self._used[(record.place >> SIZE_BITS) // GRAIN]:
                    kept.append((used, record, *found))
        log.begin(u64(self.last_tid))
        # If all is in use, three bytes in four are kept on an average, or nothing new would get in.
        self._savings = min(self._savings + log.room * 3 // 4, log.extent // 2)
        room = min(self._savings, log.room - len(content) - FRONT_SIZE)
        self._savings -= room
        for used, record, kind, end, place in sorted(kept, key=lambda entry: -entry[0]):
            survivor = log.content(place, image)
            if len(survivor) + FRONT_SIZE <= room:
                room -= len(survivor) + FRONT_SIZE
                self._keep(kind, record.oid, record.start, end, survivor, used - 1)
        self._savings += room

    def _back_in_service(self) -> bool:
        """Whether the log can be written to; after a pause it starts over."""
        if self._resting:
            self._resting = max(self._resting - 1, 1)
            if self._resting == 1:
                self._start_over()
        return not self._resting

    def _start_over(self) -> None:
        self._index = Index()
        if not self._useless:
            self._resting = PAUSE
            self._log.start_over(u64(self.last_tid))
            self._resting = 0

    def _forget_all(self, pause: int) -> None:
        """A change was not completed: leave the log as it is, and serve nothing."""
        try:
            self._resting = pause
        finally:
            self._index = Index()
            self._aside, self._aside_size = {}, 0

    @_change
    def _open(self) -> None:
        """Learn what the file has to tell."""
        log = self._log
        try:
            if not log.empty:
                clean = log.resume()
                summary = log.recall() if clean else None
                if summary is None:
                    self._replay(verify=not clean)
                else:
                    self._recall(summary)
                logger.info('Cache %s%s: %d revisions, valid up to tid %s', self.name,
                            '' if clean else ' was not closed', len(self._index), self.last_tid.hex())
                return
        except Unusable as error:
            logger.warning('Cache %s starts empty: %s', self.name, error)
        self.last_tid = z64
        self._start_over()

    def _summary(self) -> bytes:
        return b''.join([self.last_tid, self._used, self._index.pack()])

    def _recall(self, summary: bytes) -> None:
        """Know what `_summary` knew."""
        end = 8 + len(self._used)
        self.last_tid, self._used = summary[:8], bytearray(summary[8:end])
        self._index = Index.unpack(summary[end:])
        self._continue()

    def _continue(self) -> None:
        """Begin to write to a file that was read."""
        self._resting = 0
        self._log.mark(clean=False)
        content = pack(os.urandom(8), z64, b'')
        if self._log.fits(content):
            self._log.append(RESUME, OPEN, content)

    def _replay(self, verify: bool) -> None:
        """Repeat what the log says was learned; `verify`: look at the bodies of revisions, too."""
        index, log = self._index, self._log
        last, damaged = 0, []
        for gap, last, records, image in log.replay():
            if gap:     # what is lost may have ended any revision before it, and none after it
                index.forget_unended()
            for tag, oid, start, end, place in records:
                kind = KINDS.get(tag)
                if kind is not None:
                    index.put(kind, oid, start, end, place)
                    if verify and unpack(log.content(place, image)) is None:
                        damaged.append((oid, start))
                elif tag == LAST_TID:
                    last = start
                else:
                    self._repeat(tag, oid, start, unpack(log.content(place, image)))
        self.last_tid = p64(last)
        self._continue()
        # Only now: had they been left out, what they took the place of would be back.
        for oid, start in damaged:
            self._damaged(oid, start)

    def _repeat(self, tag: bytes, oid: int, start: int, content: tuple[bytes, bytes, bytes] | None) -> None:
        index = self._index
        if content is None:
            index.forget_unended()      # the damaged body is a gap as well
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

    # The end

    def close(self) -> None:
        """Leave the file to whoever opens it next."""
        with self._mutex:
            if not self._closed:
                try:
                    if not self._changing:
                        self._settle()
                finally:
                    self._closed = True
                    if not self._changing:      # else it closes when the change it interrupted is over
                        self._close()

    def _close(self) -> None:
        try:
            self._log.close(None if self._resting or self.path is None else self._summary())
        except OSError as error:
            logger.warning('Cache %s: %s; what it learned last is lost', self.name, error)
        finally:
            self._index = Index()
            self._aside, self._aside_size = {}, 0

    def abandon(self) -> None:
        """In a forked child: forget everything; the parent's file and its lock stay the parent's."""
        self._mutex = threading.RLock()     # a thread that does not exist here may have held it
        self._closed, self._changing = True, False
        self._index = Index()
        self._aside, self._aside_size = {}, 0
        self._log.abandon()
