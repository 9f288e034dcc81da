"""RelStorage over PostgreSQL, as a gateway asks it.

Most of it is what `zeo.server.backing` says, in one indexed query each, on the connection of the instance
that is asked; so all of an answer is of one snapshot.  The rest is not in any interface:

- *continuity*: whoever reconnects may find another server behind the name, one that is a standby, lags
  behind, or has lost the last transactions.  So each new connection is asked for the transaction that was
  announced last before anything is read;
- *conflicts*: RelStorage finds them in ``tpc_vote``, with the objects locked, and would then run what a
  client has sent.  In place of that our own resolver is called, at the same place;
- *the fate of a transaction*: a token is written into its record, and PostgreSQL knows whether its
  transaction (by its xid) is still in progress.  An xid alone would not do: after a crash that of a
  transaction that was never committed may be given to another one.

Names of RelStorage's that begin with an underscore are used here and nowhere else.
"""

import base64
import binascii
import logging
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from ZODB.POSException import ConflictError
from ZODB.POSException import POSKeyError
from ZODB.POSException import UndoError
from ZODB.utils import maxtid
from ZODB.utils import p64
from ZODB.utils import u64
from ZODB.utils import z64

from zeo.server.backing import Backing
from zeo.server.backing import Change
from zeo.server.backing import Resolve
from zeo.server.backing import Unreachable
from zeo.server.backing import View
from zeo.server.backing import older

#: What is said about the other kind.
NEEDS_HISTORY = ('RelStorage without history cannot be served, since it cannot tell which transactions there were;'
                 ' set keep-history true (zodbconvert copies a database)')

#: So many transactions are read at a time.
BATCH = 1000


class Relational(Backing):
    """RelStorage, which preserves history, over PostgreSQL."""

    keeps_receipts = True
    resolves = True
    iterates_records = True

    def __init__(self, root: Any) -> None:
        super().__init__(root)
        # The last transaction that was in the database when the poller looked.  It need not be the one that was
        # announced last: a pack removes transactions without objects, also the last one.  In the turn.
        self._last = maxtid
        _notice_silence(root._adapter.connmanager)
        for name in _REPEATING:
            seldom = logging.getLogger(name)
            if not any(isinstance(each, _Seldom) for each in seldom.filters):
                seldom.addFilter(_Seldom())

    def open(self) -> View:
        view = super().open()
        # RelStorage's own ``load`` looks into a cache that all instances share, and while several of them move on
        # at the same time it may answer with a revision from before their snapshot.
        view.storage.load = partial(_load, view)
        return view

    def open_writer(self, resolve: Resolve) -> View:
        view = self.open()
        adapter = view.storage._adapter  # the instance's own
        find = adapter.lock_objects_and_detect_conflicts

        def find_and_resolve(cursor: Any, required: Any) -> Any:
            left, resolved = [], []
            state = view.storage._tpc_phase.shared_state
            if 0 in state.temp_storage.stored_oids:
                # RelStorage does not lock what is new, since nobody else has its oid.  But all who find an empty
                # database make a root, and each would replace that of the one before.
                cursor.execute('SELECT pg_advisory_xact_lock(0)')
                cursor.fetchall()
            for conflict in find(cursor, required):
                number, committed, saw, record = conflict
                if saw is None:  # read, not written
                    left.append(conflict)
                    continue
                oid = p64(number)
                made = resolve(oid, p64(committed), p64(saw), state.temp_storage.read_temp(number), bytes(record or b''))
                state.temp_storage.store_temp(number, made, committed)
                resolved.append(number)
            if resolved:
                adapter.mover.replace_temps(cursor, state.temp_storage.iter_for_oids(resolved))
            return left

        adapter.lock_objects_and_detect_conflicts = find_and_resolve
        return view

    def refresh(self, view: View, announced: bytes) -> None:
        view.storage.poll_invalidations()  # with a new snapshot, always
        connection = view.storage._load_connection.connection
        if connection is not view.connection or connection is None:
            self._prove(view, announced)
            view.connection = connection

    def forget(self) -> None:
        self.root._cache.clear(load_persistent=False)  # all instances share what is in it

    def begin(self, view: View, transaction: Any) -> None:
        view.storage.tpc_begin(transaction)
        view.storage._tpc_phase.shared_state.store_connection  # is opened, so that it can be waited for

    def prepare(self, writer: View) -> None:
        # RelStorage's commit lock, which it takes next, for as long as it would wait itself.  Some hold it across
        # their client's round trip: for an undo, or if blobs are in a folder that is shared.
        cursor = writer.storage._tpc_phase.shared_state.store_connection.cursor
        cursor.execute("SELECT set_config('lock_timeout', '500000', true), pg_advisory_xact_lock(-1)")
        cursor.fetchall()

    def undo(self, writer: View, transaction_id: bytes, transaction: Any) -> Any:
        # RelStorage looks first whether others have changed the objects, and then takes its commit lock; who
        # commits in between would be undone, too.  So the objects are locked before, in the way in which all who
        # vote lock them.  Who has the commit lock already, because this is not the first one that it undoes, must
        # not wait for those who will wait for that.
        tid = _tid(transaction_id)
        phase = writer.storage._tpc_phase
        waits = getattr(phase, 'committing_tid_lock', None) is None
        cursor = phase.shared_state.store_connection.cursor
        cursor.execute(
            f'SELECT pg_{"" if waits else "try_"}advisory_xact_lock(zoid) FROM'
            ' (SELECT DISTINCT zoid FROM object_state WHERE tid = %s ORDER BY zoid) AS undone', (u64(tid),))
        if [row for row in cursor.fetchall() if row[0] is False]:
            raise ConflictError('the objects of the transaction are being changed')
        return writer.storage.undo(transaction_id, transaction)

    def _prove(self, view: View, announced: bytes) -> None:
        """Raise `Unreachable` unless the connection leads to the database as clients know it."""
        last = min(announced, self._last)
        [(newest, known, standby)] = _rows(
            view, 'SELECT (SELECT MAX(tid) FROM transaction),'
            ' EXISTS (SELECT 1 FROM transaction WHERE tid = %s), pg_is_in_recovery()', u64(last))
        if p64(newest or 0) < last:
            raise older(p64(newest or 0), last)
        if not known and last != z64:
            raise Discontinued(f'the database does not have transaction {announced.hex()}, which clients were'
                               ' told of: it was packed away, or lost')
        if standby and not view.storage.isReadOnly():
            raise Unreachable('it is a standby, which cannot be written to')

    def newest(self, view: View) -> bytes:
        [(newest,)] = _rows(view, 'SELECT MAX(tid) FROM transaction')
        tid: bytes = p64(newest or 0)
        return tid

    def changes(self, view: View, after: bytes) -> Iterator[Change]:
        # Together with the last one that was there, to see whether it still is.
        known = min(u64(after), u64(self._last))
        seen = u64(after)
        while True:
            changes: dict[int, list[bytes]] = {}
            for tid, packed, oid in _rows(
                    view, 'SELECT found.tid, packed, zoid FROM'
                    ' (SELECT tid, packed FROM transaction WHERE tid >= %s ORDER BY tid LIMIT %s) AS found'
                    ' LEFT JOIN object_state ON object_state.tid = found.tid AND found.tid > %s'
                    ' ORDER BY found.tid', known, BATCH, seen):
                if packed and tid > seen:
                    raise Discontinued(f'transaction {p64(tid).hex()} was packed before this server had looked, so'
                                       ' that it is not known any more what it changed')
                oids = changes.setdefault(tid, [])
                if oid is not None:
                    oids.append(p64(oid))
            if known not in changes:  # a pack has removed it
                self._last = self.newest(view)
            elif changes:
                self._last = p64(max(changes))
            for tid, oids in changes.items():
                if tid > seen:
                    yield p64(tid), oids
            if len(changes) < BATCH:
                return
            known = max(changes)
            seen = max(seen, known)

    def changed_since(self, view: View, tid: bytes, most: int) -> list[bytes] | None:
        [(known,)] = _rows(view, 'SELECT EXISTS (SELECT 1 FROM transaction WHERE tid = %s)', u64(tid))
        if not known and tid != z64:
            return None
        found = _rows(view, 'SELECT zoid FROM current_object WHERE tid > %s LIMIT %s', u64(tid), most + 1)
        return None if len(found) > most else [p64(oid) for oid, in found]

    def load_serial(self, view: View, oid: bytes, tid: bytes) -> bytes:
        # Not from RelStorage's cache, which does not know what was packed away.
        record: bytes | None = view.storage._adapter.mover.load_revision(
            view.storage._load_connection.cursor, u64(oid), u64(tid))
        if not record:
            raise POSKeyError(oid)
        return record

    def current(self, view: View, oids: list[bytes]) -> dict[bytes, bytes]:
        # One that was deleted has a revision that says so.
        return {p64(oid): p64(tid) for oid, tid in _rows(
            view, 'SELECT zoid, tid FROM current_object WHERE zoid = ANY(%s)', list(map(u64, oids)))}

    def record_iternext(self, view: View, next: bytes | None) -> tuple[bytes, bytes, bytes, bytes | None]:
        found = [p64(oid) for oid, in _rows(
            view, 'SELECT zoid FROM current_object JOIN object_state USING (zoid, tid)'
            ' WHERE zoid >= %s AND state IS NOT NULL ORDER BY zoid LIMIT 2', u64(next) if next else 0)]
        if not found:
            raise ValueError('there are no more records')
        record, tid = view.storage.load(found[0])
        return found[0], tid, record, found[1] if len(found) == 2 else None

    # ---- the fate of a transaction ------------------------------------------------------

    # A receipt is an xid and a tid (8 bytes each), and the token, if there is one.  Then the tid is that of
    # a transaction before, else its own.

    def receipt(self, writer: View, last: bytes, token: bytes, tid: bytes | None) -> bytes:
        cursor = writer.storage._tpc_phase.shared_state.store_connection.cursor
        cursor.execute('SELECT txid_current()')
        [[xid]] = cursor.fetchall()
        number: bytes = p64(xid)
        return number + (last + token if tid is None else tid)

    def in_progress(self, view: View, receipt: bytes) -> bool:
        # The lock that every transaction has on its own number, until what it did can be seen.  It is looked
        # at as it is now, whatever the snapshot; ``txid_status`` would say too early that it is committed.
        [(found,)] = _rows(
            view, "SELECT EXISTS (SELECT 1 FROM pg_locks WHERE locktype = 'transactionid' AND granted"
            " AND mode = 'ExclusiveLock' AND transactionid::text::bigint = %s)", u64(receipt[:8]) & 0xFFFFFFFF)
        return bool(found)

    def outcome(self, view: View, receipt: bytes) -> bytes | None:
        tid, token = receipt[8:16], receipt[16:]
        if token:
            found = _rows(view, 'SELECT tid FROM transaction WHERE tid > %s'
                          ' AND position(%s IN extension) > 0 ORDER BY tid', u64(tid), token)
        else:
            found = _rows(view, 'SELECT tid FROM transaction WHERE tid = %s', u64(tid))
        return p64(found[0][0]) if found else None


class Discontinued(Unreachable):
    """It cannot be told what led from the state that clients know to that of the database."""


def backing_of(storage: Any) -> Backing | None:
    """For RelStorage; None for others.  `ValueError`, one line, if it is not set up as it has to be."""
    inner = storage
    while not _is_relstorage(inner):
        if not hasattr(inner, 'base'):
            return None
        inner = inner.base
    if not inner.keep_history:
        raise ValueError(NEEDS_HISTORY)
    if inner is not storage:
        raise ValueError(f'{type(storage).__name__} around RelStorage cannot be served; let the clients'
                         ' compress, or PostgreSQL (it does so by itself)')
    if type(inner._adapter).__name__ != 'PostgreSQLAdapter':
        raise ValueError('of the databases below RelStorage only PostgreSQL can be served')
    if inner._adapter.connmanager.ro_replica_selector is not None:
        raise ValueError('RelStorage with ro-replica-conf cannot be served: replicas lag behind, so a client'
                         ' would be shown what has ended; leave it out')
    return Relational(storage)


def _tid(transaction_id: bytes) -> bytes:
    """That of a transaction to be undone, of which RelStorage's undo log tells an id."""
    try:
        tid = base64.decodebytes(transaction_id + b'\n')
    except binascii.Error:
        tid = b''
    if len(tid) != 8:
        raise UndoError('there is no such transaction')
    return tid


def _load(view: View, oid: bytes, version: str = '') -> tuple[bytes, bytes]:
    """The current revision in the view's snapshot."""
    found = _rows(view, 'SELECT state, tid FROM current_object JOIN object_state USING (zoid, tid) WHERE zoid = %s',
                  u64(oid))
    if not found or found[0][0] is None:  # it was deleted
        raise POSKeyError(oid)
    return bytes(found[0][0]), p64(found[0][1])


def _is_relstorage(storage: Any) -> bool:
    return any(kind.__module__.partition('.')[0] == 'relstorage' and kind.__name__ == 'RelStorage'
               for kind in type(storage).__mro__)


def _rows(view: View, query: str, *values: Any) -> list[Any]:
    """Of the view's snapshot."""
    cursor = view.storage._load_connection.cursor
    cursor.execute(query, values)
    return list(cursor.fetchall())


#: Without these a server behind which PostgreSQL's machine has vanished would wait for hours.
_TIMES = {'connect_timeout': 5, 'keepalives_idle': 5, 'keepalives_interval': 2, 'keepalives_count': 3,
          'tcp_user_timeout': 10_000}


def _notice_silence(manager: Any) -> None:
    """Have connections end by themselves that lead nowhere, where the dsn does not say when."""
    if manager.driver.driver_module.__name__ != 'psycopg2':
        return
    from psycopg2 import extensions

    given = extensions.parse_dsn(manager._dsn)
    manager._dsn = extensions.make_dsn(manager._dsn, **{
        name: value for name, value in _TIMES.items() if name not in given})


#: Loggers of RelStorage's that say at each attempt that the database cannot be reached, which we say, too.
_REPEATING = ('relstorage.adapters.postgresql.connmanager', 'relstorage.adapters.connections')


class _Seldom(logging.Filter):
    """Lets each kind of line pass once a minute, without its traceback."""

    PAUSE = 60.0

    def __init__(self) -> None:
        super().__init__()
        self._next: dict[Any, float] = {}  # time.monotonic(), by what is to be filled in

    def filter(self, record: logging.LogRecord) -> bool:
        now = time.monotonic()
        if record.levelno < logging.WARNING or now >= self._next.get(record.msg, now):
            self._next[record.msg] = now + self.PAUSE
            record.exc_info = record.exc_text = None
            return True
        return False
