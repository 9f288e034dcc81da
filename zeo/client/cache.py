"""A client's object cache: revisions that need not be asked for, valid up to `last_tid`.

What is known is in a `Ledger`: an index in memory, and a log in a file.  Here is what is done with
it by several threads, when it may be interrupted, and when the disk refuses.

**A hit takes no lock.**  It asks the index for a place, reads there, and looks whether a segment of
the log was begun meanwhile.  A place is given away only by beginning a segment, and has left the
index before.  So if none was begun, the bytes are those of the revision that was the right one when
the index was asked (*read, then validate*); checksum and start are for damage on the disk.  If one was, the
same is done again under the mutex, where nothing moves.

What is hit again and again is also kept in memory, up to 1 MB, until the next change of the cache.  Who
hits puts it into the dict that was there *before* it asked the index.  A change replaces that dict when
it begins, by one that takes nothing, and again when it is over.  So what is in the dict that can be found
was found in the index when the last change was over, and there was none since.

**Whatever interrupts a change** (a full disk, KeyboardInterrupt between two steps) leaves an empty
cache: nothing is served from a state nobody can prove.  The file keeps the prefix it has, and the
log starts over when there is something to store.

**What came last is set aside.**  Loads come one at a time, each after a wait in which the processor
forgot all about us; putting many revisions away at once, as one record of the log, takes a fraction of
the time.  So new current ones, after all that is known of their objects, first go into a small dict, where they
can be found; any other change puts them away before it is made, and so sees nothing of it.  So do those of this
client's own small transactions, which also end what is current in the index; these are put away, if there are
many, while the next transaction's vote is waited for.  What is aside hides what the index
holds of its object: who wants an older one changes something, too.  The file speaks of no later transaction
before it has these: it tells the last tid there was before them.

In memory an object takes some 50 bytes, plus one byte per 128 bytes of the file.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import wraps
from hashlib import blake2b
from io import FileIO
from itertools import chain
from operator import add
from struct import Struct
from typing import Concatenate, ParamSpec, TypeVar
from urllib.parse import quote
from zlib import crc32

from ZODB.utils import p64, u64, z64

from zeo.client.cachefile import RESIDUE, Content, Log, Unusable, claim, pack, unnamed, unpack
from zeo.client.cacheindex import OPEN, Kind
from zeo.client.cacheledger import MOST_USED, NEXT, Ledger
from zeo.errors import ClientStorageError

__all__ = ['Cache', 'CacheUnavailable', 'cache_path', 'open_cache']

logger = logging.getLogger(__name__)

FAR_FUTURE = b'\xff' * 8

#: So many revisions, and so many bytes of them, may be set aside; a longer one never is.
ASIDE, ASIDE_SIZE, ASIDE_LONGEST = 64, 128 * 1024, 16 * 1024

#: The same if a transaction of this client brings them: then the next one has time to put them away.
OWN_ASIDE, OWN_ASIDE_SIZE = 256, 512 * 1024

#: Bytes of memory for what was hit more than once since the last change; so many of them are for what is
#: around a record.
HOT_SIZE, HOT_EXTRA = 1024 * 1024, 250

#: When the disk refuses, so many stores are ignored before it is tried again.
PAUSE = 1000

P = ParamSpec('P')
T = TypeVar('T')

#: Of an oid or tid.
as_number = int.from_bytes

#: The same, in a tuple, and an error if these are not eight bytes: `u64` takes a while when nothing is warm.
unpack_number = Struct('>Q').unpack

Current = tuple[bytes, bytes, None]     # record, start; no end


class _Nowhere(dict[bytes, Current]):
    """Where what is hit during a change is put."""

    def __setitem__(self, oid: bytes, revision: Current) -> None:
        pass


NOWHERE = _Nowhere()


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
    var = os.fsdecode(var)
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


def _server_digest(name: str) -> bytes:
    return blake2b(name.encode(), digest_size=16).digest()


def _change(method: Callable[Concatenate['Cache', P], T], /, settled: bool = True
            ) -> Callable[Concatenate['Cache', P], T | None]:
    """A method that changes the cache: alone, and wholly or with nothing left; if `settled`, with nothing set aside."""

    @wraps(method)
    def changing(self: 'Cache', /, *args: P.args, **kw: P.kwargs) -> T | None:
        with self._mutex:
            if self._changing:
                raise RuntimeError('a signal handler or destructor called the cache it had interrupted')
            if self._closed:
                return None
            self._changing = True
            try:
                if settled and self._aside:
                    self._put_away()
                self._hot = NOWHERE
                return method(self, *args, **kw)
            except OSError as error:
                self._forget_all(PAUSE)
                self._complain(f'{error}; goes on without what it held')
                return None
            except BaseException:
                self._forget_all(1)
                raise
            finally:
                self._hot, self._hot_size = {}, 0
                self._changing = False
                if self._closed:
                    self._close()

    return changing


def _small_change(method: Callable[Concatenate['Cache', P], T]) -> Callable[Concatenate['Cache', P], T | None]:
    """The same for one that leaves aside what is."""
    return _change(method, settled=False)


class Cache:
    """Current and historic revisions, found by oid and the tid they shall be older than.

    Every method may be called by any thread at any time, and none waits for anything but the disk.
    After `close` the cache is empty and ignores what it is told.
    """

    def __init__(self, log: Log, path: str | None, useless: bool = False) -> None:
        self.path = path
        self.name = path or '(temporary)'
        #: Held by who changes anything; a leaf: nothing but the file is waited for under it.
        #: Reentrant, so that a signal handler that closes the cache does not wait for itself.
        self._mutex = threading.RLock()
        self._changing = False
        self._closed = False
        self._useless = useless
        self._complained = False
        self._log = log
        self._ledger = Ledger(log)
        #: Current revisions that were hit, by oid; see above.
        self._hot: dict[bytes, Current] = {}
        self._hot_size = 0
        #: What is known beside the index, by oid.  Replaced, never emptied.
        self._aside: dict[bytes, Current] = {}
        self._aside_size = 0
        self._aside_hits: dict[bytes, int] = {}
        #: Those that others took the place of while they were set aside, the oldest first: name and record.
        self._former: list[tuple[bytes, bytes]] = []
        self._longest_aside = min(ASIDE_LONGEST, log.segment // 16)
        #: After the disk has refused, or a change was interrupted, so many stores are ignored before
        #: the ledger starts over.
        self._resting = 0
        self._open()

    @property
    def last_tid(self) -> bytes:
        """The contents are known to be valid up to this tid."""
        return self._ledger.last_tid.to_bytes(8)

    def __len__(self) -> int:
        with self._mutex:
            return len(self._ledger.index) + len(self._aside) + len(self._former)

    # Looking

    def load(self, oid: bytes) -> tuple[bytes, bytes] | None:
        """The current revision: record and start tid."""
        found = self.loadBefore(oid, FAR_FUTURE)
        return None if found is None else found[:2]

    def loadBefore(self, oid: bytes, tid: bytes) -> tuple[bytes, bytes, bytes | None] | None:
        """The revision that was current before `tid`: record, start tid, end tid (None: current)."""
        if not len(oid) == len(tid) == 8:
            return None
        hot = self._hot
        found = hot.get(oid)
        if found is not None and found[1] < tid:
            return found
        found = self._aside.get(oid)
        if found is not None:
            if found[1] < tid:
                self._aside_hits[oid] = self._aside_hits.get(oid, 0) + 1
                return found
            return self._find(as_number(oid), as_number(tid))
        log, key = self._log, as_number(oid)
        begun = log.begun
        current = self._ledger.index.current
        place = current.places.get(key)
        if place is not None:
            try:
                content = log.read(place)
            except OSError:     # closed meanwhile, or a bad disk
                content = b''
            if crc32(content) == RESIDUE and content[:8] == oid and log.begun == begun:
                start = content[8:16]
                # Another start: it was changed meanwhile, or the disk has kept what was there before.
                if start < tid and as_number(start) == current.starts.get(key):
                    found = content[16:-4], start, None
                    if self._ledger.use(place):
                        self._keep_hot(hot, oid, found)
                    return found
        elif key not in self._ledger.index.historic and not self._changing:
            return None
        return self._find(key, as_number(tid))

    def _keep_hot(self, hot: dict[bytes, Current], oid: bytes, revision: Current) -> None:
        """Have a revision that is hit again and again in memory; `hot` is older than the search for it."""
        hot[oid] = revision
        self._hot_size += len(revision[0]) + HOT_EXTRA
        if self._hot_size > HOT_SIZE:
            with self._mutex:
                if not self._changing:
                    self._hot, self._hot_size = {}, 0

    @_change
    def _find(self, oid: int, tid: int) -> tuple[bytes, bytes, bytes | None] | None:
        """The same with nobody moving anything.  Now what fails its checksum is damaged."""
        index = self._ledger.index
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
                self._ledger.use(place)
                return found[2], found[1], p64(end) if end != OPEN else None
            self._complain('a record is damaged; it will be loaded anew')
            self._ledger.forget(oid, start)

    def contents(self) -> Iterator[tuple[bytes, bytes, bytes | None]]:
        """All revisions that may be served, as of now: oid, start, end (None: current)."""
        with self._mutex:
            self._settle()
            current = list(self._ledger.index.current.starts.items())
            ended = list(self._ledger.index.ended())
        return chain(((p64(oid), p64(start), None) for oid, start in current),
                     ((p64(oid), p64(start), p64(end)) for oid, start, end in ended))

    def suspects(self) -> Iterator[tuple[bytes, bytes]]:
        """What waits to be confirmed, as of now: oid and start."""
        with self._mutex:
            suspect = list(self._ledger.index.suspect.starts.items())
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
            if (not self._ledger.sound or self._closed or self._changing
                    or len(data) > self._longest_aside or oid in aside
                    or not len(oid) == len(start) == 8
                    or (self._ledger.index.knows(as_number(oid))
                        and not self._ledger.index.is_over(as_number(oid), as_number(start)))):
                return False
            if len(aside) + len(self._former) >= ASIDE or self._aside_size + len(data) > ASIDE_SIZE:
                self._settle()  # not before: what came last is asked for next
                return self._set_aside(oid, start, data)
            aside[oid] = data, start, None
            self._aside_size += len(data)
            return True

    @_small_change
    def _set_all_aside(self, tid: bytes, records: Mapping[bytes, object]) -> bool:
        """Keep for later what a transaction of this client brings; False: it has to be stored now."""
        aside, ledger, number = self._aside, self._ledger, as_number(tid)
        if not ledger.sound or len(aside) + len(self._former) + len(records) > OWN_ASIDE:
            return False
        for oid, data in records.items():
            former = aside.get(oid)
            if (type(data) is not bytes or len(data) > self._longest_aside
                    or self._aside_size + len(data) > OWN_ASIDE_SIZE
                    or not (ledger.index.is_next(as_number(oid), number) if former is None else former[1] < tid)):
                return False
            if ledger.behind is None:
                ledger.behind = ledger.last_tid
            if former is not None:
                self._former.append((oid + former[1], former[0]))
            aside[oid] = data, tid, None
            self._aside_size += len(data)
        return True

    def store_all(self, revisions: Sequence[tuple[bytes, tuple[bytes, bytes, bytes | None]]]) -> None:
        """`store` many, each with its oid: record, start tid, end tid."""
        news = {oid: (data, start, None) for oid, (data, start, end) in revisions
                if end is None and len(data) <= self._longest_aside}
        size = sum([len(data) for data, _, _ in news.values()])
        with self._mutex:
            if len(self._aside) + len(self._former) + len(news) > ASIDE or self._aside_size + size > ASIDE_SIZE:
                self._settle()
            if (self._ledger.sound and not self._closed and not self._changing
                    and len(news) == len(revisions) <= ASIDE and size <= ASIDE_SIZE
                    and self._aside.keys().isdisjoint(news)
                    and not any(map(self._ledger.index.knows, map(as_number, news)))):
                self._aside.update(news)
                self._aside_size += size
                return
        for oid, (data, start, end) in revisions:
            self.store(oid, start, end, data)

    def make_ready(self) -> None:
        """Have nothing to put away soon: for who has to wait for something else anyway."""
        if len(self._aside) + len(self._former) >= ASIDE:
            self._settle()

    @_change
    def _settle(self) -> None:
        """Nothing is set aside any more (that is so before every change)."""

    def _put_away(self) -> None:
        aside, ledger = self._aside, self._ledger
        bodies, starts, _ = zip(*aside.values())
        names = list(map(add, aside, starts))
        if self._former:
            former, their_bodies = zip(*self._former)
            names, bodies = [*former, *names], their_bodies + bodies
        ledger.learn_news(names, bodies, Kind.CURRENT if ledger.behind is None else NEXT)
        ledger.behind = None
        # Who hits takes no lock: there may be more any moment, also of what has gone since.
        for oid, hits in self._aside_hits.copy().items():
            place = ledger.index.current.places.get(as_number(oid))
            for _ in range(min(hits, MOST_USED) if place is not None else 0):
                ledger.use(place)
        self._aside, self._aside_size, self._aside_hits, self._former = {}, 0, {}, []

    @_change
    def _store(self, oid: int, start: int, end: int, content: Content) -> None:
        if self._in_service():
            self._ledger.learn(oid, start, end, content)

    def invalidate(self, tid: bytes | None, oids: Sequence[bytes]) -> None:
        """End the current revisions of `oids` at `tid`; None: forget them, they ended nobody knows when.

        A revision that starts at `tid` or later stays what it is.
        """
        with self._mutex:
            # Most of what others change is not here, and then there is nothing to change.
            index, aside = self._ledger.index, self._aside
            current, suspect = index.current.starts, index.suspect.starts
            for oid in oids:
                number, = unpack_number(oid)
                if number in current or number in suspect or oid in aside:
                    break
            else:
                if not self._changing:
                    return
            self._invalidate(None if tid is None else u64(tid), list(map(u64, oids)))

    @_change
    def _invalidate(self, tid: int | None, oids: list[int]) -> None:
        if tid is None:
            self._ledger.drop(oids)
        else:
            self._ledger.invalidate(tid, oids)

    def renew(self, tid: bytes, changes: Mapping[bytes, object],
              records: Callable[[], Iterable[tuple[bytes, bytes]]]) -> None:
        """A transaction of this client: `invalidate` and `store` its oids and records.

        `changes` has all oids, and the records if they are at hand; else those known are what `records` gives.  Its
        error leaves an empty cache, as whatever interrupts a change.
        """
        if self._set_all_aside(tid, changes) is False:
            self._renew(u64(tid), list(map(u64, changes)), records)

    @_change
    def _renew(self, tid: int, oids: list[int], records: Callable[[], Iterable[tuple[bytes, bytes]]]) -> None:
        renewed = self._ledger.learn_all(tid, records()) if self._in_service() else 0
        if renewed < len(oids):
            self._ledger.invalidate(tid, oids)

    def drop(self, oids: Sequence[bytes]) -> None:
        """Forget the current revisions of `oids`, suspect or not."""
        self.invalidate(None, oids)

    def drop_suspects(self, oids: Iterable[bytes]) -> None:
        """Forget what is still in doubt of `oids`."""
        self._drop_suspects(list(map(u64, oids)))

    @_change
    def _drop_suspects(self, oids: list[int]) -> None:
        suspects = self._ledger.index.suspect.starts
        self._ledger.drop([oid for oid in oids if oid in suspects])

    @_change
    def suspect_all(self) -> None:
        """Serve no current revision until it is confirmed, or stored again.  Historic ones are forgotten.

        They would be right if the client was only away for long, and may be wrong if the database was
        restored from a backup meanwhile and went on from there: then it has another past.
        """
        self._ledger.suspect_all()

    def confirm(self, tid: bytes, oids: Iterable[bytes]) -> None:
        """The server says that the suspect revisions of `oids` are current as of `tid`.

        To be told between the invalidations before and after that moment, as any other answer.
        """
        self._confirm(u64(tid), list(map(u64, oids)))

    @_change
    def _confirm(self, tid: int, oids: list[int]) -> None:
        self._ledger.confirm(tid, oids)

    @_change
    def forget_later(self) -> None:
        """Forget what is said to begin or to end after the last tid.

        That may be in the file of a client that was killed.  It is true, unless the database was restored
        from a backup meanwhile: then a server that knows the last tid need not know of it.
        """
        self._ledger.forget_later()

    def set_last_tid(self, tid: bytes) -> None:
        """The contents are valid up to `tid`; ValueError if that goes backwards."""
        number, = unpack_number(tid)
        with self._mutex:
            # What is hit, and what was set aside, stays: that is current now, as it was before.
            if not self._changing and not self._closed and self._ledger.advance(number):
                return
        if self._move(number) is False:
            raise ValueError(f'last tid may not go back from {self.last_tid.hex()} to {tid.hex()}')

    @_change
    def _move(self, tid: int) -> bool:
        self._ledger.move(tid)
        return tid == self._ledger.last_tid

    def clear(self, tid: bytes = z64) -> None:
        """Forget everything, start anew as of `tid`."""
        self._clear(u64(tid))

    @_change
    def _clear(self, tid: int) -> None:
        self._ledger.forget_all()
        self._ledger.last_tid = tid
        self._start_over()

    @_change
    def allow_servers(self, names: Iterable[str]) -> None:
        """These are servers of the same data.  What came from any other is forgotten."""
        if self._log.server not in (bytes(16), *map(_server_digest, names)):
            logger.warning('Cache %s is of another server: starts empty', self.name)
            self._log.server = bytes(16)
            self._ledger.last_tid = 0
            self._start_over()

    @_change
    def set_server(self, name: str) -> None:
        """What is stored from now on comes from that server, which is allowed."""
        self._log.server = _server_digest(name)
        if self._ledger.sound:
            self._log.mark(clean=False)

    @_change
    def flush(self) -> None:
        """Let the file have all that was learned; what is not there yet is lost if the process is killed.

        Happens by itself after every 64 KB, now and then as the last tid moves, and at the end.
        """
        self._ledger.flush()

    # Beginning, failing, recovering

    @_change
    def _open(self) -> None:
        try:
            if not self._log.empty:
                clean = self._ledger.open()
                logger.info('Cache %s%s: %d revisions, valid up to tid %s', self.name,
                            '' if clean else ' was not closed', len(self._ledger.index), self.last_tid.hex())
                return
        except Unusable as error:
            logger.warning('Cache %s starts empty: %s', self.name, error)
        self._start_over()

    def _start_over(self) -> None:
        if not self._useless:
            self._ledger.start_over(self._ledger.last_tid)

    def _in_service(self) -> bool:
        """Whether something can be stored; after a pause the ledger starts over."""
        if not self._ledger.sound:
            self._resting -= 1
            if self._resting <= 0:
                self._start_over()
        return self._ledger.sound

    def _forget_all(self, pause: int) -> None:
        """A change was not completed."""
        try:
            self._resting = pause
            self._hot, self._hot_size = {}, 0
            self._aside, self._aside_size, self._aside_hits, self._former = {}, 0, {}, []
        finally:
            self._ledger.forget_all()

    def _complain(self, what: str) -> None:
        if not self._complained:
            self._complained = True
            logger.warning('Cache %s: %s', self.name, what)

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
            self._ledger.close(remember=self.path is not None)
        except OSError as error:
            logger.warning('Cache %s: %s; what it learned last is lost', self.name, error)
        finally:
            self._forget_all(PAUSE)

    def abandon(self) -> None:
        """In a forked child: forget everything; the parent's file and its lock stay the parent's."""
        self._mutex = threading.RLock()     # a thread that does not exist here may have held it
        self._closed, self._changing = True, False
        self._forget_all(PAUSE)
        self._log.abandon()
