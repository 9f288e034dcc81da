"""What the server's messages change here: the cache, then the database, then the last tid.

Everything in this module runs at the point of dispatch, in the thread that has just read the message
and before the next one is read (see `zeo.client.channel`).  So the changes happen in the order of the
wire, one at a time, and nothing here needs a lock.  In particular

- a revision that was loaded as the current one is cached as such only if no invalidation of it stood
  before the reply;
- `last_tid` moves when the cache and the database have taken notice, not earlier: whoever sees a tid
  sees everything up to it.
"""

import logging
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import Protocol

from ZODB.utils import readable_tid_repr
from ZODB.utils import z64

from zeo.client.cache import Cache
from zeo.client.updates import Updates
from zeo.client.verification import CacheIsNewer
from zeo.client.verification import Verdict
from zeo.client.verification import decide
from zeo.errors import ProtocolError

logger = logging.getLogger(__name__)

Invalidation = tuple[bytes, Sequence[bytes]]


class Database(Protocol):
    """What ZODB registers to be told."""

    def invalidate(self, tid: bytes, oids: Sequence[bytes]) -> object: ...

    def invalidateCache(self) -> object: ...


class Upkeep:
    """Keeps the cache and the registered database in step with the server."""

    def __init__(self, cache: Cache, start_over: bool = False) -> None:
        self.cache = cache
        self.database: Database | None = None
        self.start_over = start_over  # forget a cache that is newer than the server
        self._verified = z64  # the tid that the server gave when this connection was made

    def loaded(self, key: Any, result: Any) -> None:
        """A revision has come that was asked for with ``key = (oid, before tid)``."""
        if result is not None:
            data, start, end = result
            self.cache.store(key[0], start, end, data)

    def told(self, revisions: Sequence[tuple[bytes, tuple[bytes, bytes, bytes | None]]]) -> None:
        """The same with many revisions, and their oids."""
        self.cache.store_all(revisions)

    def invalidated(self, tid: bytes, oids: Sequence[bytes]) -> None:
        """Another client has committed."""
        if tid <= self._verified:
            # ZEO's server answers getInvalidations ahead of announcements that the answer covers.
            self.cache.invalidate(tid, oids)
            return
        if tid <= self.cache.last_tid:
            raise ProtocolError(f'transaction {tid.hex()} is announced after {self.cache.last_tid.hex()}')
        self.cache.invalidate(tid, oids)
        self._tell_database(tid, oids)
        self.cache.set_last_tid(tid)

    def finished(self, tid: Any, updates: Updates, callback: Callable[[bytes], object] | None) -> None:
        """This client has committed."""
        if not isinstance(tid, bytes) or len(tid) != 8 or tid <= self.cache.last_tid:
            raise ProtocolError(f'a transaction was finished as {tid!r} '
                                f'after {self.cache.last_tid.hex()}')
        updates.apply(self.cache, tid)
        if callback is not None:
            callback(tid)
        self.cache.set_last_tid(tid)

    # ---- when a connection is made

    def judge(self, server_tid: bytes) -> Verdict:
        """What is to be done before a connection to that server can be used.

        Raises `CacheIsNewer`.
        """
        verdict = decide(self.cache.last_tid, not len(self.cache), server_tid)
        if verdict is Verdict.REFUSE:
            error = CacheIsNewer(self.cache.last_tid, server_tid)
            if not self.start_over:
                raise error
            logger.warning('Starting over: %s', error)
            return Verdict.DROP
        return verdict

    def settle(self, verdict: Verdict, server_tid: bytes, changes: Any,
               early: Sequence[Invalidation], can_inquire: bool = False) -> None:
        """Do it: afterwards cache and database are as of the server's last tid, or later.

        ``changes`` is the answer to ``getInvalidations``, if that was asked; ``early`` are the
        invalidations that the connection has brought so far.  If one ``can_inquire``, what cannot be
        proved to be current is kept, in doubt (see `zeo.client.inquiry`).
        """
        cache = self.cache
        if verdict in (Verdict.KEEP, Verdict.CATCH_UP):
            cache.forget_later()  # this server speaks of what happened since, and may know another future
        if verdict is Verdict.CATCH_UP:
            if changes is None:
                verdict = Verdict.DROP
                if can_inquire:
                    logger.info('The server cannot tell what changed since %s; it is asked about all'
                                ' that is cached (%d records)', readable_tid_repr(cache.last_tid),
                                len(cache))
                    cache.suspect_all()
                    verdict = Verdict.DOUBT
            else:
                server_tid, oids = changes
                cache.invalidate(None, oids)
                if server_tid > cache.last_tid:
                    self._tell_database(server_tid, oids)
        if verdict is Verdict.DROP:
            logger.warning('Dropping what is cached (%d records): the server cannot tell what '
                           'changed since %s', len(cache), readable_tid_repr(cache.last_tid))
            # Until the database has been told, lastTransaction() is not to move.
            cache.clear(cache.last_tid if cache.last_tid <= server_tid else z64)
        if not can_inquire:
            cache.drop([oid for oid, _ in cache.suspects()])
        if verdict in (Verdict.DROP, Verdict.DOUBT, Verdict.START):
            self._drop_objects()
        cache.set_last_tid(server_tid)
        self._verified = server_tid
        for tid, oids in early:
            if tid > server_tid:
                self.invalidated(tid, oids)

    # ---- the database

    def _tell_database(self, tid: bytes, oids: Sequence[bytes]) -> None:
        database = self.database
        if database is None:
            return
        try:
            database.invalidate(tid, oids)
        except Exception:
            # It must not go on with stale objects.  If this fails, too, the connection is ended and
            # everything is verified on the next.
            logger.exception('The database failed to invalidate %d objects; invalidating all of them',
                             len(oids))
            database.invalidateCache()

    def _drop_objects(self) -> None:
        if self.database is not None:
            self.database.invalidateCache()
