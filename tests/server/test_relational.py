"""What RelStorage over PostgreSQL is asked, with a database that answers from a script.

The real one is asked in tests/system/test_many_servers*.py.
"""

import base64
import logging
import re
import types
from collections.abc import Callable
from typing import Any

import pytest
from ZODB.POSException import ConflictError
from ZODB.POSException import POSKeyError
from ZODB.POSException import UndoError
from ZODB.utils import p64
from ZODB.utils import z64

from zeo.server import relational
from zeo.server.backing import Unreachable
from zeo.server.backing import View
from zeo.server.relational import Relational
from zeo.server.relational import backing_of

Rows = list[tuple[Any, ...]]


class Cursor:
    """Answers each question by the first pattern that is found in it; may be asked a function of its values."""

    def __init__(self, **answers: Rows | Callable[..., Rows]) -> None:
        self.answers = answers
        self.asked: list[tuple[Any, ...]] = []
        self.rows: Rows = []

    def execute(self, query: str, values: Any = ()) -> None:
        self.asked.append(tuple(values))
        [answer] = [answer for word, answer in self.answers.items() if re.search(word, query)][:1]
        self.rows = answer(*values) if callable(answer) else answer

    def fetchall(self) -> Rows:
        return self.rows


class RelStorage:
    """As much of it as is looked at."""

    keep_history = True

    def __init__(self, cursor: Cursor | None = None, read_only: bool = False) -> None:
        self._load_connection = types.SimpleNamespace(cursor=cursor, connection=object())
        driver = types.SimpleNamespace(driver_module=types.SimpleNamespace(__name__='pg8000'))
        manager = types.SimpleNamespace(driver=driver, ro_replica_selector=None, _dsn='dbname=zeo')
        self._adapter = type('PostgreSQLAdapter', (), {'connmanager': manager})()
        self.read_only = read_only
        self.polls = 0

    def new_instance(self) -> 'RelStorage':
        return self

    def poll_invalidations(self) -> None:
        self.polls += 1

    def isReadOnly(self) -> bool:
        return self.read_only


RelStorage.__module__ = 'relstorage.storage'


def opened(read_only: bool = False, **answers: Any) -> tuple[Relational, View, Cursor]:
    cursor = Cursor(**answers)
    storage = RelStorage(cursor, read_only)
    return Relational(storage), View(storage), cursor


# ---- who is served


def test_relstorage_is_recognised_without_being_imported() -> None:
    assert isinstance(backing_of(RelStorage()), Relational)
    assert backing_of(object()) is None
    assert backing_of(types.SimpleNamespace(base=object())) is None


def test_what_cannot_be_served_is_refused_in_one_line() -> None:
    free = RelStorage()
    free.keep_history = False
    oracle = RelStorage()
    oracle._adapter = type('OracleAdapter', (), {})()
    replicas = RelStorage()
    replicas._adapter.connmanager.ro_replica_selector = object()
    for storage, reason in [
            (free, 'keep-history true'), (oracle, 'only PostgreSQL'), (replicas, 'ro-replica-conf'),
            (types.SimpleNamespace(base=RelStorage()), 'around RelStorage')]:
        with pytest.raises(ValueError, match=reason) as refusal:
            backing_of(storage)
        assert '\n' not in str(refusal.value)


def test_connections_that_lead_nowhere_end_by_themselves() -> None:
    pytest.importorskip('psycopg2')
    storage = RelStorage()
    manager = storage._adapter.connmanager
    manager.driver.driver_module.__name__ = 'psycopg2'
    manager._dsn = 'dbname=zeo connect_timeout=99'
    Relational(storage)
    assert 'connect_timeout=99' in manager._dsn and 'tcp_user_timeout=10000' in manager._dsn
    before = manager._dsn
    Relational(storage)
    assert manager._dsn == before


def test_relstorage_does_not_fill_the_log_while_it_cannot_connect(
        caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    Relational(RelStorage())
    Relational(RelStorage())
    logger = logging.getLogger('relstorage.adapters.postgresql.connmanager')
    [seldom] = logger.filters
    for _ in range(3):
        logger.warning('Unable to connect: %s', 'at db.example', exc_info=ValueError())
    logger.info('something else')
    assert caplog.messages.count('Unable to connect: at db.example') == 1
    assert 'Traceback' not in caplog.text
    logger.removeFilter(seldom)


# ---- continuity


def test_a_new_connection_has_to_lead_to_the_database_that_clients_know() -> None:
    answer: Rows = [(5, True, False)]
    backing, view, cursor = opened(pg_is_in_recovery=lambda *_: answer)
    backing.refresh(view, p64(5))
    backing.refresh(view, p64(5))
    assert len(cursor.asked) == 1 and view.storage.polls == 2    # a connection is asked once
    for answer, error in [([(4, False, False)], 'restored from a backup'),
                          ([(6, False, False)], 'packed away, or lost'),
                          ([(6, True, True)], 'standby')]:
        view.storage._load_connection.connection = object()
        with pytest.raises(Unreachable, match=error):
            backing.refresh(view, p64(5))
    with pytest.raises(Unreachable):    # it is asked again until it is right
        backing.refresh(view, p64(5))
    answer = [(6, True, False)]
    backing.refresh(view, p64(5))


def test_a_standby_can_be_read_from_by_those_who_only_read() -> None:
    backing, view, _ = opened(read_only=True, pg_is_in_recovery=[(6, True, True)])
    backing.refresh(view, p64(5))


def test_an_empty_database_is_as_good_as_another() -> None:
    backing, view, _ = opened(pg_is_in_recovery=[(None, False, False)])
    backing.refresh(view, z64)


def test_a_transaction_that_was_packed_away_is_not_missed() -> None:
    def prove(tid: int) -> Rows:
        return [(3, tid == 3, False)]

    backing, view, cursor = opened(LEFT=[], MAX=[(3,)], pg_is_in_recovery=prove)
    cursor.answers = {'pg_is': prove, 'LEFT': [], 'MAX': [(3,)]}
    assert list(backing.changes(view, p64(5))) == []    # 5, the last one, is not there any more
    backing.refresh(view, p64(5))


def test_what_is_cached_of_another_past_can_be_forgotten() -> None:
    backing, view, _ = opened()
    cleared: list[Any] = []
    view.storage._cache = types.SimpleNamespace(clear=lambda **options: cleared.append(options))
    backing.forget()
    assert cleared == [{'load_persistent': False}]    # what is kept in a file is of that past, too


# ---- changes


def test_changes_come_in_order_each_with_its_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relational, 'BATCH', 3)
    table = {1: [10], 2: [10, 11], 3: [], 4: [12], 5: [10]}

    def rows(known: int, most: int, seen: int) -> Rows:
        tids = [tid for tid in table if tid >= known][:most]
        return [(tid, False, oid) for tid in tids for oid in (table[tid] if tid > seen else []) or [None]]

    backing, view, cursor = opened(LEFT=rows)
    expected = [(p64(tid), list(map(p64, oids))) for tid, oids in table.items()]
    assert list(backing.changes(view, p64(1))) == expected[1:]
    assert list(backing.changes(view, p64(5))) == []
    assert len(cursor.asked) == 4


def test_what_was_announced_is_not_told_again_however_much_came_after_the_last_look(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relational, 'BATCH', 3)

    def rows(known: int, most: int, seen: int) -> Rows:
        return [(tid, tid < 8, 10 if tid > seen else None) for tid in range(1, 11) if tid >= known][:most]

    backing, view, _ = opened(LEFT=rows)
    backing._last = p64(1)
    assert list(backing.changes(view, p64(8))) == [(p64(9), [p64(10)]), (p64(10), [p64(10)])]


def test_what_was_packed_before_anybody_looked_is_not_told_by_halves() -> None:
    backing, view, cursor = opened(LEFT=[(3, True, None), (4, True, 10), (5, True, 11), (6, False, 10)])
    assert list(backing.changes(view, p64(5))) == [(p64(6), [p64(10)])]
    with pytest.raises(relational.Discontinued, match='transaction 0000000000000004 was packed before'):
        next(backing.changes(view, p64(3)))


def test_what_changed_since_is_bounded_and_only_told_of_known_transactions() -> None:
    backing, view, _ = opened(EXISTS=lambda tid: [(tid == 5,)], zoid=lambda tid, most: [(1,), (2,), (3,)][:most])
    assert backing.changed_since(view, p64(5), 3) == [p64(1), p64(2), p64(3)]
    assert backing.changed_since(view, p64(5), 2) is None
    assert backing.changed_since(view, p64(4), 3) is None
    assert backing.changed_since(view, z64, 3) == [p64(1), p64(2), p64(3)]


def test_a_revision_is_read_from_the_database_which_knows_what_was_packed_away() -> None:
    backing, view, _ = opened()
    revisions = {(1, 5): b'record'}
    view.storage._adapter.mover = types.SimpleNamespace(
        load_revision=lambda cursor, oid, tid: revisions.get((oid, tid)))
    assert backing.load_serial(view, p64(1), p64(5)) == b'record'
    with pytest.raises(POSKeyError):
        backing.load_serial(view, p64(1), p64(6))


def test_current_revisions_are_asked_for_all_at_once() -> None:
    backing, view, cursor = opened(ANY=lambda oids: [(oid, 7) for oid in oids if oid != 2])
    assert backing.current(view, [p64(1), p64(2), p64(3)]) == {p64(1): p64(7), p64(3): p64(7)}
    assert cursor.asked == [([1, 2, 3],)]


def test_records_one_after_the_other() -> None:
    def rows(oid: int) -> Rows:
        return [(each,) for each in (1, 4, 6) if each >= oid][:2]

    backing, view, _ = opened(zoid=rows)
    view.storage.load = lambda oid: (b'of ' + oid[-1:], p64(9))
    assert backing.record_iternext(view, None) == (p64(1), p64(9), b'of \1', p64(4))
    assert backing.record_iternext(view, p64(6)) == (p64(6), p64(9), b'of \6', None)
    with pytest.raises(ValueError):
        backing.record_iternext(view, p64(7))


# ---- conflicts


class Staged(dict[int, bytes]):
    def __init__(self) -> None:
        super().__init__({1: b'mine', 2: b'mine too'})
        self.based: dict[int, int] = {}

    read_temp = dict.__getitem__

    @property
    def stored_oids(self) -> list[int]:
        return list(self)

    def store_temp(self, number: int, record: bytes, committed: int) -> None:
        self[number], self.based[number] = record, committed

    def iter_for_oids(self, numbers: list[int]) -> list[tuple[bytes, int]]:
        return [(self[number], number) for number in numbers]


def test_conflicts_are_resolved_where_they_are_found() -> None:
    staged = Staged()
    replaced: list[Any] = []
    found: Rows = [(1, 8, 7, memoryview(b'theirs')), (3, 8, None, None)]
    backing, view, cursor = opened()
    view.storage._tpc_phase = types.SimpleNamespace(shared_state=types.SimpleNamespace(temp_storage=staged))
    adapter = view.storage._adapter
    adapter.lock_objects_and_detect_conflicts = lambda cursor, required: found
    adapter.mover = types.SimpleNamespace(replace_temps=lambda cursor, records: replaced.extend(records))
    asked: list[Any] = []

    def resolve(*args: Any) -> bytes:
        asked.append(args)
        return b'ours'

    backing.open_writer(resolve)
    assert adapter.lock_objects_and_detect_conflicts(cursor, {3: 7}) == [found[1]]    # that was only read
    assert asked == [(p64(1), p64(8), p64(7), b'mine', b'theirs')]
    assert replaced == [(b'ours', 1)] and staged.based == {1: 8}


def test_there_is_one_root_however_many_make_it() -> None:
    staged = Staged()
    steps: list[str] = []
    backing, view, cursor = opened(**{r'lock\(0\)': lambda: steps.append('locked') or [(None,)]})
    view.storage._tpc_phase = types.SimpleNamespace(shared_state=types.SimpleNamespace(temp_storage=staged))
    adapter = view.storage._adapter
    adapter.lock_objects_and_detect_conflicts = lambda cursor, required: steps.append('looked') or []
    backing.open_writer(lambda *_: b'')
    adapter.lock_objects_and_detect_conflicts(cursor, None)
    staged[0] = b'the root'
    adapter.lock_objects_and_detect_conflicts(cursor, None)
    assert steps == ['looked', 'locked', 'looked']


def test_a_conflict_that_is_not_resolved_ends_the_vote() -> None:
    backing, view, cursor = opened()
    view.storage._tpc_phase = types.SimpleNamespace(shared_state=types.SimpleNamespace(temp_storage=Staged()))
    adapter = view.storage._adapter
    adapter.lock_objects_and_detect_conflicts = lambda cursor, required: [(1, 8, 7, None)]

    def resolve(*args: Any) -> bytes:
        raise ConflictError(oid=args[0], serials=args[1:3])

    backing.open_writer(resolve)
    with pytest.raises(ConflictError):
        adapter.lock_objects_and_detect_conflicts(cursor, None)


@pytest.mark.parametrize(('has_commit_lock', 'got', 'question'), [
    (False, [(None,), (None,)], 'pg_advisory_xact_lock'), (True, [(True,), (True,)], 'pg_try_advisory_xact_lock'),
    (True, [(True,), (False,)], 'pg_try_advisory_xact_lock')])
def test_objects_are_locked_before_their_change_is_undone(
        has_commit_lock: bool, got: Rows, question: str) -> None:
    steps: list[Any] = []
    backing, view, cursor = opened(**{question: lambda tid: steps.append(tid) or got})
    view.storage._tpc_phase = types.SimpleNamespace(
        committing_tid_lock=object() if has_commit_lock else None,
        shared_state=types.SimpleNamespace(store_connection=types.SimpleNamespace(cursor=cursor)))
    view.storage.undo = lambda *args: steps.append(args)
    transaction_id = base64.encodebytes(p64(9))[:-1]
    if (False,) in got:
        with pytest.raises(ConflictError):
            backing.undo(view, transaction_id, 'transaction')
        assert steps == [9]
    else:
        backing.undo(view, transaction_id, 'transaction')
        assert steps == [9, (transaction_id, 'transaction')]


@pytest.mark.parametrize('wrong', [b'', b'short', b'x' * 100, b'=' * 11])
def test_what_is_no_id_of_a_transaction_is_not_undone(wrong: bytes) -> None:
    backing, view, _ = opened()
    with pytest.raises(UndoError):
        backing.undo(view, wrong, None)


def test_a_commit_waits_for_the_lock_before_it_has_the_turn() -> None:
    backing, view, cursor = opened(**{'pg_advisory_xact_lock': [(None, None)]})
    view.storage._tpc_phase = types.SimpleNamespace(
        shared_state=types.SimpleNamespace(store_connection=types.SimpleNamespace(cursor=cursor)))
    backing.prepare(view)
    assert len(cursor.asked) == 1


# ---- the fate of a transaction


def test_a_receipt_leads_to_the_transaction() -> None:
    backing, view, cursor = opened()
    cursor.answers = {'txid_current': [[2**32 + 77]], 'pg_locks': lambda xid: [(xid == 77,)],
                      'position': lambda after, token: [(9,)] if (after, token) == (5, b't' * 16) else [],
                      'tid = ': lambda tid: [(tid,)] if tid == 9 else []}
    view.storage._tpc_phase = types.SimpleNamespace(
        shared_state=types.SimpleNamespace(store_connection=types.SimpleNamespace(cursor=cursor)))
    receipt = backing.receipt(view, p64(5), b't' * 16, None)
    assert len(receipt) == 32
    assert backing.in_progress(view, receipt)    # the lock has 32 bits of the number
    assert backing.outcome(view, receipt) == p64(9)
    other = backing.receipt(view, p64(5), b'u' * 16, None)
    assert backing.outcome(view, other) is None
    chosen = backing.receipt(view, p64(5), b'', p64(9))
    assert len(chosen) == 16 and backing.outcome(view, chosen) == p64(9)
    assert backing.outcome(view, backing.receipt(view, p64(5), b'', p64(8))) is None
