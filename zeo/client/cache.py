"""A client's object cache: revisions that need not be asked for, valid up to `last_tid`.

What is known is in an `Index`, in memory; the records are in a `Log`, in a file.  Whatever changes
the index is also a record in the log, so *the index is what replaying the log gives*, and a file
found after a crash gives what the cache once was.

**A hit takes no lock.**  It reads the revision from the index, its bytes from the file, and then
looks whether the index still has that very revision.  A revision leaves the index before its place
in the file is given away.  So if it is still there after the bytes were read, they were its bytes
(*read, then validate*); the checksum is for damage on the disk.  If it is not, the same is done
again under the mutex, where nothing moves.

**Whatever interrupts a change** (a full disk, KeyboardInterrupt between two steps) leaves an empty
cache: nothing is served from a state nobody can prove.  The file keeps the prefix it has, and the
log starts over when there is something to store.

**What is used stays.**  Room is made by reusing the oldest segment.  What was hit since it was
written there is appended anew, most used first, and counts as used a little less (*second chance*,
CLOCK); so a scan, which hits nothing twice, throws out little else than itself.
"""

import logging
import os
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from io import FileIO
from typing import Concatenate, ParamSpec, TypeVar
from urllib.parse import quote

from ZODB.utils import z64

from zeo.client.cachefile import HEAD_SIZE, LARGEST, Log, Record, Unusable, claim, unnamed
from zeo.client.cacheindex import OPEN, REVISION, Index, Kind
from zeo.errors import ClientStorageError

__all__ = ['Cache', 'CacheUnavailable', 'cache_path', 'open_cache']

logger = logging.getLogger(__name__)

# Tags of records.  A revision has that of its kind; its oid, start, end and body are its own.
KINDS = {kind.value: kind for kind in Kind}
INVALIDATE = b'INVA'        # start: the tid; body: oids
DROP = b'DROP'              # body: oids
SUSPECT_ALL = b'DOUB'
CONFIRM = b'CONF'           # start: the tid; body: oids
FORGET = b'FORG'            # oid, start: of one revision that is damaged
LAST_TID = b'LAST'          # start: the tid
RESUME = b'OPEN'            # oid: random, so that nothing written before it can follow it

#: The place of a record, as the index keeps it: offset << SIZE_BITS | size.
SIZE_BITS = LARGEST.bit_length()

#: Hits are counted up to this, one byte for every so many bytes of the file (a head is longer).
MOST_USED = 3
GRAIN = 32
assert GRAIN <= HEAD_SIZE

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

    def changing(self: 'Cache', /, *args: P.args, **kw: P.kwargs) -> T | None:
        with self._mutex:
            if self._changing:
                raise RuntimeError('a signal handler or destructor called the cache it had interrupted')
            if self._closed:
                return None
            self._changing = True
            try:
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

    changing.__name__, changing.__doc__ = method.__name__, method.__doc__
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
        #: Hits since the record was written, by offset of the body // GRAIN.  Inexact: nobody locks it.
        self._used = bytearray(log.extent // GRAIN + 1)
        #: 0: the log says what the index says.  Else: nothing may be written before it starts over,
        #: and so many stores are ignored before that is tried.
        self._resting = PAUSE
        if not useless:
            self._open()

    def __len__(self) -> int:
        with self._mutex:
            return len(self._index)

    # Looking

    def load(self, oid: bytes) -> tuple[bytes, bytes] | None:
        """The current revision: record and start tid."""
        revision = self._index.current.get(oid)
        if revision is None:
            return None
        found = self.loadBefore(oid, b'\xff' * 8)
        return None if found is None else found[:2]

    def loadBefore(self, oid: bytes, tid: bytes) -> tuple[bytes, bytes, bytes | None] | None:
        """The revision that was current before `tid`: record, start tid, end tid (None: current)."""
        revision = self._index.before(oid, tid)
        if revision is None:
            return None
        start, end, check, place = REVISION.unpack(revision)
        offset = place >> SIZE_BITS
        try:
            data = self._log.read(offset, place & LARGEST)
        except OSError:     # closed meanwhile, or a bad disk
            return self._load_damaged(oid, tid)
        if zlib.crc32(data) != check or self._index.before(oid, tid) is not revision:
            return self._load_damaged(oid, tid)
        grain = offset // GRAIN
        if self._used[grain] < MOST_USED:
            self._used[grain] += 1
        return data, start, None if end == OPEN else end

    @_change
    def _load_damaged(self, oid: bytes, tid: bytes) -> tuple[bytes, bytes, bytes | None] | None:
        """Once more, with nobody moving anything: now what does not fit its checksum is damaged."""
        while (revision := self._index.before(oid, tid)) is not None:
            start, end, check, place = REVISION.unpack(revision)
            try:
                data = self._log.read(place >> SIZE_BITS, place & LARGEST)
            except OSError:
                data = b''
            if zlib.crc32(data) == check and len(data) == place & LARGEST:
                return data, start, None if end == OPEN else end
            self._damaged(oid, start)
        return None

    def _damaged(self, oid: bytes, start: bytes) -> None:
        if not self._complained:
            self._complained = True
            logger.warning('Cache %s: a record is damaged; it will be loaded anew', self.name)
        self._index.forget(oid, start)
        self._note(FORGET, oid=oid, start=start)

    def contents(self) -> Iterator[tuple[bytes, bytes, bytes | None]]:
        """All revisions that may be served, as of now: oid, start, end (None: current)."""
        with self._mutex:
            return iter(list(self._index.contents()))

    def suspects(self) -> Iterator[tuple[bytes, bytes]]:
        """What waits to be confirmed, as of now: oid and start."""
        with self._mutex:
            return iter([(oid, revision[:8]) for oid, revision in self._index.suspect.items()])

    # Learning

    def store(self, oid: bytes, start: bytes, end: bytes | None, data: bytes) -> None:
        """Keep a revision as the server told it.

        What is known already, contradicts something newer, or is too long is ignored.  A suspect that
        turns out to be current (or gets an end) is served again.
        """
        if not len(oid) == len(start) == len(end or z64) == 8:
            raise ValueError(f'oid and tids have 8 bytes: {oid!r}, {start!r}, {end!r}')
        if end is None or start < end:
            self._store(oid, start, end or OPEN, zlib.crc32(data), data)

    @_change
    def _store(self, oid: bytes, start: bytes, end: bytes, check: int, data: bytes) -> None:
        if not self._back_in_service():
            return
        found = self._index.find(oid, start)
        if found is None:
            if self._index.wants(oid, start, end) and len(data) <= self._log.room:
                self._keep(Kind.CURRENT if end == OPEN else Kind.HISTORIC, oid, start, end, check, data)
        elif found[0] is not Kind.HISTORIC:
            self._note_oids(CONFIRM, start, self._index.confirm(start, [oid]))
            if end != OPEN:
                self._note_oids(INVALIDATE, end, self._index.invalidate(end, [oid]))

    @_change
    def invalidate(self, tid: bytes | None, oids: Iterable[bytes]) -> None:
        """End the current revisions of `oids` at `tid`; None: forget them, they ended nobody knows when.

        A revision that starts at `tid` or later stays what it is.
        """
        if tid is None:
            self._note_oids(DROP, z64, self._index.drop(oids))
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

    @_change
    def confirm(self, tid: bytes, oids: Iterable[bytes]) -> None:
        """The server says that the suspect revisions of `oids` are current as of `tid`."""
        self._note_oids(CONFIRM, tid, self._index.confirm(tid, oids))

    def set_last_tid(self, tid: bytes) -> None:
        """The contents are valid up to `tid`; ValueError if that goes backwards."""
        if self._move_last_tid(tid) is False:
            raise ValueError(f'last tid may not go back from {self.last_tid.hex()} to {tid.hex()}')

    @_change
    def _move_last_tid(self, tid: bytes) -> bool:
        if tid > self.last_tid:
            self.last_tid = tid
            self._note(LAST_TID, start=tid)
        return tid == self.last_tid

    @_change
    def clear(self, tid: bytes = z64) -> None:
        """Forget everything, start anew as of `tid`."""
        self.last_tid = tid
        self._start_over()

    @_change
    def set_server(self, identity: str) -> None:
        """The server says who it is.  What came from another one is forgotten."""
        server = blake2b(identity.encode(), digest_size=16).digest()
        if self._log.server == server:
            return
        if self._log.server != bytes(16):
            logger.warning('Cache %s is of another server: starts empty', self.name)
            self.last_tid = z64
            self._log.server = server
            self._start_over()
        elif not self._resting:
            self._log.set_server(server)

    @_change
    def flush(self) -> None:
        """Let the file have all that was learned; what is not there yet is lost if the process is killed.

        Happens by itself after every 64 KB and at the end.
        """
        if not self._resting:
            self._log.flush()

    # The log

    def _keep(self, kind: Kind, oid: bytes, start: bytes, end: bytes, check: int, data: bytes,
              used: int = 0) -> None:
        """Append a revision, then let it be found."""
        if not self._log.fits(len(data)):
            self._make_room(len(data))
        offset = self._log.append(kind.value, oid, start, end, check, data)
        self._used[offset // GRAIN] = used
        self._index.put(kind, oid, start, end, check, offset << SIZE_BITS | len(data))

    def _note(self, tag: bytes, oid: bytes = z64, start: bytes = z64, body: bytes = b'') -> None:
        """Append what was changed in the index."""
        if not self._resting:
            if not self._log.fits(len(body)):
                self._make_room(len(body))
            self._log.append(tag, oid, start, z64, zlib.crc32(body), body)

    def _note_oids(self, tag: bytes, start: bytes, oids: list[bytes]) -> None:
        many = self._log.room // 8
        for first in range(0, len(oids), many):
            self._note(tag, start=start, body=b''.join(oids[first:first + many]))

    def _make_room(self, size: int) -> None:
        """Begin a segment with room for `size` bytes, taking along what was used of the oldest one."""
        index, log = self._index, self._log
        records, image = log.oldest()
        kept = []
        for record in records:
            found = index.find(record.oid, record.start) if record.tag in KINDS else None
            if found is not None and REVISION.unpack(found[1])[3] == record.offset << SIZE_BITS | record.size:
                index.forget(record.oid, record.start)
                if used := self._used[record.offset // GRAIN]:
                    kept.append((used, record, *found))
        log.begin(self.last_tid)
        # Never the whole segment, or nothing new would get in.
        room = min(log.room - size, log.room * 3 // 4)
        for used, record, kind, revision in sorted(kept, key=lambda entry: -entry[0]):
            if record.size + HEAD_SIZE <= room:
                room -= record.size + HEAD_SIZE
                self._keep(kind, record.oid, record.start, revision[8:16], record.check,
                           log.body(record, image), used - 1)

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
            self._log.start_over(self.last_tid)
            self._resting = 0

    def _forget_all(self, pause: int) -> None:
        """A change was not completed: leave the log as it is, and serve nothing."""
        try:
            self._resting = pause
        finally:
            self._index = Index()

    @_change
    def _open(self) -> None:
        """Learn what the file has to tell."""
        log = self._log
        try:
            if not log.empty:
                clean = log.resume()
                self._replay(verify=not clean)
                logger.info('Cache %s%s: %d revisions, valid up to tid %s', self.name,
                            '' if clean else ' was not closed', len(self._index), self.last_tid.hex())
                return
        except Unusable as error:
            logger.warning('Cache %s starts empty: %s', self.name, error)
        self.last_tid = z64
        self._start_over()

    def _replay(self, verify: bool) -> None:
        """Repeat what the log says was learned; `verify`: read the bodies of revisions, too."""
        index, log = self._index, self._log
        damaged = []
        for gap, last_tid, records, image in log.replay():
            if gap:     # what is lost may have ended any revision before it, and none after it
                index.forget_unended()
            self.last_tid = last_tid
            for record in records:
                tag, oid, start, end, check, size, offset = record
                kind = KINDS.get(tag)
                if kind is not None:
                    index.put(kind, oid, start, end, check, offset << SIZE_BITS | size)
                    if verify and zlib.crc32(log.body(record, image)) != check:
                        damaged.append((oid, start))
                elif tag == LAST_TID:
                    self.last_tid = start
                else:
                    self._repeat(tag, oid, start, log.body(record, image), check)
        self._resting = 0
        if log.fits(0):
            log.append(RESUME, os.urandom(8), z64, z64, 0, b'')
        # Only now: had they been left out, what they took the place of would be back.
        for oid, start in damaged:
            self._damaged(oid, start)

    def _repeat(self, tag: bytes, oid: bytes, start: bytes, body: bytes, check: int) -> None:
        index = self._index
        oids = [body[at:at + 8] for at in range(0, len(body), 8)]
        if zlib.crc32(body) != check:
            index.forget_unended()      # a gap as well
        elif tag == INVALIDATE:
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
                self._closed = True
                if not self._changing:      # else it closes when the change it interrupted is over
                    self._close()

    def _close(self) -> None:
        self._index = Index()
        try:
            self._log.close(clean=not self._resting)
        except OSError as error:
            logger.warning('Cache %s: %s; what it learned last is lost', self.name, error)

    def abandon(self) -> None:
        """In a forked child: forget everything; the parent's file and its lock stay the parent's."""
        self._mutex = threading.RLock()     # a thread that does not exist here may have held it
        self._closed, self._changing = True, False
        self._index = Index()
        self._log.abandon()
