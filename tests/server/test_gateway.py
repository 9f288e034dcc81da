"""What is pulled from a shared database is pushed: in order, once, and before anybody can miss it."""

import logging
import threading
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import pytest
from ZODB.MappingStorage import MappingStorage
from ZODB.interfaces import IMVCCStorage
from ZODB.POSException import POSKeyError
from ZODB.POSException import StorageTransactionError
from ZODB.utils import p64
from ZODB.utils import u64
from ZODB.utils import z64
from zope.interface import directlyProvides

from tests.server.shared import Database
from tests.server.talk import SessionPeer
from tests.server.talk import in_thread
from tests.server.talk import oid
from zeo.server import gateway
from zeo.server import reading
from zeo.server.backing import Backing
from zeo.server.backing import Change
from zeo.server.backing import View
from zeo.server.gateway import Gateway
from zeo.server.gateway import backing_of
from zeo.server.gateway import fronted
from zeo.server.reading import TOKEN
from zeo.server.relational import Discontinued
from zeo.server.served import Served

Serve = Callable[..., Served]
Connect = Callable[..., SessionPeer]

#: Nobody polls but those who ask.
NEVER = 3600.0


@pytest.fixture
def database() -> Database:
    return Database()


@pytest.fixture
def served(serve: Serve, database: Database) -> Any:
    yield serve(database.root(), poll_interval=NEVER)
    database.down = False
    database.gates.open_all()


@pytest.fixture
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gateway, 'patience', 0.0)


def told(peer: SessionPeer, *numbers: int) -> list[Any]:
    """Announcements, and answers to these requests, as they came."""
    return [args for number, _, name, args in peer.told if number in numbers or name == 'invalidateTransaction']


# ---- who is behind a gateway


def test_a_storage_with_instances_gets_a_gateway_and_others_none(database: Database) -> None:
    plain = MappingStorage()
    assert fronted(plain) is plain
    front = fronted(database.root())
    assert isinstance(front, Gateway)
    assert not IMVCCStorage.providedBy(front)
    front.close()


def test_one_that_cannot_tell_transactions_apart_is_refused() -> None:
    class Dumb:
        pass

    dumb = Dumb()
    directlyProvides(dumb, IMVCCStorage)
    with pytest.raises(ValueError, match='Dumb cannot be served'):
        backing_of(dumb)


# ---- the order


def test_transactions_of_others_are_announced_each_with_its_own_objects(
        served: Served, connect: Connect, database: Database) -> None:
    one, two = connect(served), connect(served)
    changed = [(1, 2), (2, 3), (1,)]
    tids = [database.somebody_commits(*map(oid, each)) for each in changed]
    one.call('ping')
    expected = [(tid, list(map(oid, each))) for tid, each in zip(tids, changed, strict=True)]
    assert one.invalidations() == two.invalidations() == expected
    one.call('ping')
    assert one.invalidations() == expected    # once


def test_others_transactions_are_announced_without_anybody_asking(
        serve: Serve, connect: Connect, database: Database) -> None:
    peer = connect(serve(database.root(), poll_interval=0.001))
    committed = database.somebody_commits(oid(1))
    peer.wait(lambda message: message[2] == 'invalidateTransaction', 'an announcement')
    assert peer.invalidations() == [(committed, [oid(1)])]


def test_the_reply_to_an_own_commit_is_at_its_place_among_others(
        served: Served, connect: Connect, database: Database) -> None:
    peer, other = connect(served), connect(served)
    peer.begin(1, (oid(1), z64, b'record'))
    peer.call('vote', 1)
    before = database.somebody_commits(oid(2))
    database.gates['finished'].shut()
    number = max(peer.asked) + 1
    finishing = in_thread(peer.call, 'tpc_finish', 1)
    database.gates['finished'].wait_until_reached()
    after = database.somebody_commits(oid(3))
    database.gates['finished'].open()
    own = finishing.result(30)
    assert before < own < after
    assert told(peer, number) == [(before, [oid(2)]), own, (after, [oid(3)])]
    assert other.invalidations() == [(before, [oid(2)]), (own, [oid(1)]), (after, [oid(3)])]


def test_an_own_commit_is_never_announced_as_somebody_elses(
        served: Served, connect: Connect, database: Database) -> None:
    peer, other = connect(served), connect(served)
    peer.begin(1, (oid(1), z64, b'record'))
    peer.call('vote', 1)
    database.gates['finished'].shut()
    finishing = in_thread(peer.call, 'tpc_finish', 1)
    database.gates['finished'].wait_until_reached()
    asking = in_thread(other.call, 'ping')    # it is visible, and looked for
    database.gates['finished'].open()
    own = finishing.result(30)
    asking.result(30)
    assert peer.invalidations() == []
    assert other.invalidations() == [(own, [oid(1)])]


class Busy(Backing):
    """One that has to wait before it can commit."""

    def prepare(self, writer: View) -> None:
        writer.storage.database.gates['locking'].go_through()


def test_others_are_answered_while_a_commit_waits_for_its_turn_in_the_database(
        serve: Serve, connect: Connect, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('zeo.server.gateway.Backing', Busy)
    served = serve(database.root(), poll_interval=NEVER)
    peer, other = connect(served), connect(served)
    peer.begin(1, (oid(1), z64, b'record'))
    peer.call('vote', 1)
    database.gates['locking'].shut()
    finishing = in_thread(peer.call, 'tpc_finish', 1)
    database.gates['locking'].wait_until_reached()
    committed = database.somebody_commits(oid(2))
    assert in_thread(other.call, 'lastTransaction').result(30) == committed
    database.gates['locking'].open()
    assert finishing.result(30) > committed


def test_a_commit_without_objects_has_its_place_too(
        served: Served, connect: Connect, database: Database) -> None:
    peer, other = connect(served), connect(served)
    peer.begin(1)
    peer.call('vote', 1)
    own = peer.call('tpc_finish', 1)
    assert other.invalidations() == [(own, [])]


# ---- loads


def test_a_load_after_an_announcement_shows_it(served: Served, connect: Connect, database: Database) -> None:
    first = database.somebody_commits(oid(1), record=b'first')
    peer, other = connect(served), connect(served)
    assert peer.load(oid(1)) == (b'first', first, None)    # so there is a reader with a snapshot
    second = database.somebody_commits(oid(1), record=b'second')
    other.call('ping')
    assert peer.invalidations() == [(second, [oid(1)])]
    assert peer.load(oid(1)) == (b'second', second, None)
    assert peer.load(oid(1), second) == (b'first', first, second)
    assert peer.load(oid(1), first) is None


def test_a_load_that_was_read_before_an_announcement_is_done_again(
        served: Served, connect: Connect, database: Database) -> None:
    database.somebody_commits(oid(1), record=b'first')
    peer, other = connect(served), connect(served)
    database.gates['loaded'].shut()
    loading = in_thread(peer.load, oid(1))
    database.gates['loaded'].wait_until_reached()
    second = database.somebody_commits(oid(1), record=b'second')
    other.call('ping')
    database.gates['loaded'].open()
    assert loading.result(30) == (b'second', second, None)


def test_what_a_load_shows_ahead_is_announced_before_it(
        served: Served, connect: Connect, database: Database) -> None:
    peer = connect(served)
    committed = database.somebody_commits(oid(1))
    number = peer.ask('loadBefore', oid(1), p64(u64(committed) + 1))
    assert told(peer, number) == [(committed, [oid(1)]), (b'of somebody else', committed, None)]


def test_what_is_deleted_is_no_revision(served: Served, connect: Connect, database: Database) -> None:
    first = database.somebody_commits(oid(1), record=b'first')
    deleted = database.commit(database.transactions[0][1], {oid(1): None})
    peer = connect(served)
    with pytest.raises(POSKeyError) as missing:
        peer.load(oid(1))
    assert missing.value.args == (oid(1),)    # no live objects
    assert peer.load(oid(1), deleted) == (b'first', first, deleted)
    with pytest.raises(POSKeyError):
        peer.load(oid(1), p64(u64(deleted) + 1))


# ---- questions about the last transaction


def test_who_asks_is_answered_by_a_look_that_begins_afterwards(
        served: Served, connect: Connect, database: Database) -> None:
    peer, other = connect(served), connect(served)
    database.gates['polled'].shut()
    early = in_thread(other.call, 'ping')
    database.gates['polled'].wait_until_reached()    # has its snapshot
    committed = database.somebody_commits(oid(1))
    begun = served.storage._begun
    late = in_thread(peer.call, 'lastTransaction')
    database.gates['polled'].open()
    early.result(30)
    assert late.result(30) == committed
    assert served.storage._begun == begun + 1


class Queue:
    """A lock that knows how many want it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.arrived = threading.Semaphore(0)

    def __enter__(self) -> None:
        self.arrived.release()
        self.lock.acquire()

    def __exit__(self, *_: Any) -> None:
        self.lock.release()


def test_those_who_wait_share_a_look(served: Served, connect: Connect, database: Database) -> None:
    peers = [connect(served) for _ in range(5)]
    front = served.storage
    front._turn = Queue()
    with front._turn.lock:
        waiting = [in_thread(peer.call, 'ping') for peer in peers]
        for _ in peers:
            assert front._turn.arrived.acquire(timeout=30)
        begun = front._begun
        committed = database.somebody_commits(oid(1))
    for each in waiting:
        each.result(30)
    assert front._begun == begun + 1
    assert all(peer.invalidations() == [(committed, [oid(1)])] for peer in peers)


def test_those_who_wait_share_a_failure(
        served: Served, connect: Connect, database: Database, no_patience: None) -> None:
    peers = [connect(served) for _ in range(5)]
    front = served.storage
    front._turn = Queue()
    with front._turn.lock:
        waiting = [in_thread(peer.ask, 'ping') for peer in peers]
        for _ in peers:
            assert front._turn.arrived.acquire(timeout=30)
        begun = front._begun
        database.down = True
    for each in waiting:
        each.result(30)
    assert front._begun == begun + 1    # each may take seconds
    assert all(peer.hung_up for peer in peers)
    database.down = False
    connect(served).call('ping')


def test_a_client_that_registers_is_told_the_last_transaction_after_a_look(
        served: Served, connect: Connect, database: Database) -> None:
    committed = database.somebody_commits(oid(1))
    assert connect(served).registered == committed


def test_an_empty_database_can_be_served(served: Served, connect: Connect) -> None:
    peer = connect(served)
    assert peer.registered == z64
    with pytest.raises(POSKeyError):
        peer.load(oid(0))
    own = peer.commit(oid(0), b'the root')
    assert peer.load(oid(0)) == (b'the root', own, None)


# ---- clients that come back


def test_what_changed_is_told_from_the_database(serve: Serve, connect: Connect, database: Database) -> None:
    tids = [database.somebody_commits(oid(number)) for number in range(10)]
    peer = connect(serve(database.root(), poll_interval=NEVER, invalidation_queue_size=1))
    last, oids = peer.call('getInvalidations', tids[4])
    assert last == tids[-1] and set(oids) == set(map(oid, range(5, 10)))
    assert peer.call('getInvalidations', p64(u64(tids[0]) - 1)) is None    # packed away, perhaps
    assert peer.call('getInvalidations', tids[-1]) == (tids[-1], [])


def test_too_many_changed_objects_are_not_told(
        serve: Serve, connect: Connect, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, 'MOST_CHANGED', 3)
    tids = [database.somebody_commits(oid(number)) for number in range(5)]
    peer = connect(serve(database.root(), poll_interval=NEVER))
    assert peer.call('getInvalidations', tids[0]) is None
    assert len(peer.call('getInvalidations', tids[1])[1]) == 3


def test_a_client_that_knows_more_than_the_database_is_refused(served: Served, connect: Connect,
                                                               database: Database) -> None:
    committed = database.somebody_commits(oid(1))
    peer = connect(served)
    peer.ask('getInvalidations', p64(u64(committed) + 1))
    peer.wait_for_end()
    assert peer.hung_up


# ---- without the database


def test_without_the_database_a_client_is_hung_up_on(
        served: Served, connect: Connect, database: Database, no_patience: None) -> None:
    database.somebody_commits(oid(1))
    for request in [('ping',), ('loadBefore', oid(1), p64(2**62)), ('lastTransaction',), ('new_oids', 1)]:
        peer = connect(served)
        database.down = True
        peer.ask(*request)
        peer.wait_for_end()
        assert peer.hung_up, request
        database.down = False


def test_a_vote_without_the_database_ends_the_connection_and_nobody_elses(
        served: Served, connect: Connect, database: Database, no_patience: None) -> None:
    peer, other = connect(served), connect(served)
    peer.begin(1, (oid(1), z64, b'record'))
    database.down = True
    peer.ask('vote', 1)
    peer.wait_for_end()
    database.down = False
    assert not other.ended
    other.commit(oid(1), b'another one')    # the commit lock is free


def test_a_load_waits_for_the_database(served: Served, connect: Connect, database: Database) -> None:
    committed = database.somebody_commits(oid(1))
    peer = connect(served)
    peer.load(oid(1))
    database.down = True
    waiting: threading.Event = served.storage._readers._closed
    pause, paused = waiting.wait, threading.Event()

    def wait(timeout: float | None = None) -> bool:
        paused.set()
        return pause(timeout)

    waiting.wait = wait  # type: ignore[method-assign]
    loading = in_thread(peer.load, oid(1))
    assert paused.wait(30)
    database.down = False
    assert loading.result(30) == (b'of somebody else', committed, None)
    assert not peer.ended


def test_who_has_no_database_for_long_hangs_up_on_everybody(
        serve: Serve, connect: Connect, database: Database, no_patience: None,
        caplog: pytest.LogCaptureFixture) -> None:
    served = serve(database.root(), poll_interval=0.001)
    peer = connect(served)
    with caplog.at_level(logging.WARNING):
        database.down = True
        peer.wait_for_end()
        assert not served.storage.is_connected()
        database.down = False
        served.storage.catch_up(30)
        again = connect(served)
        committed = again.commit(oid(1), b'record')
    assert again.load(oid(1)) == (b'record', committed, None)
    assert 'db.example' not in caplog.text and 'everybody is disconnected' in caplog.text


def test_a_commit_that_fails_ends_its_connection_and_may_still_be_there(
        served: Served, connect: Connect, database: Database, no_patience: None) -> None:
    peer, other = connect(served), connect(served)
    peer.begin(1, (oid(1), z64, b'record'))
    peer.call('vote', 1)
    commit = database.commit

    def commit_and_break(*args: Any) -> bytes:
        commit(*args)
        raise ConnectionError('cut off')

    database.commit = commit_and_break  # type: ignore[method-assign]
    peer.ask('tpc_finish', 1)
    peer.wait_for_end()
    database.commit = commit  # type: ignore[method-assign]
    other.call('ping')
    [(committed, oids)] = other.invalidations()
    assert oids == [oid(1)] and other.load(oid(1)) == (b'record', committed, None)
    other.commit(oid(1), b'next')    # the commit lock is free


def test_a_database_that_is_older_than_what_was_announced_is_not_read(
        served: Served, connect: Connect, database: Database, no_patience: None) -> None:
    database.somebody_commits(oid(1))
    peer = connect(served)
    kept, database.transactions = database.transactions, []
    peer.ask('ping')
    peer.wait_for_end()
    other = SessionPeer(served, register=False)
    other.ask('register', '1', False)
    other.wait_for_end()
    database.transactions = kept
    connect(served).load(oid(1))


class Suspicious(Backing):
    """One that finds out that the database goes on from another past."""

    suspects = False
    forgot = 0

    def refresh(self, view: View, announced: bytes) -> None:
        if self.suspects and announced != z64:
            raise Discontinued('it was lost')
        super().refresh(view, announced)

    def forget(self) -> None:
        self.forgot += 1
        self.suspects = False


def test_nobody_and_nothing_is_kept_if_the_database_goes_on_from_another_past(
        serve: Serve, connect: Connect, database: Database, monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr('zeo.server.gateway.Backing', Suspicious)
    served = serve(database.root(), poll_interval=NEVER)
    peer = connect(served)
    lost = peer.commit(oid(1), b'lost')
    peer.load(oid(1))
    database.transactions = []
    later = database.somebody_commits(oid(1), record=b'other')
    database.transactions[-1] = (p64(u64(lost) + 1), *database.transactions[-1][1:])
    served.storage._backing.suspects = True
    peer.ask('ping')
    peer.wait_for_end()
    assert served.storage._backing.forgot == 1 and 'it was lost; everybody is disconnected' in caplog.text
    again = connect(served)
    assert again.registered == p64(u64(lost) + 1) and later
    assert again.load(oid(1)) == (b'other', again.registered, None)
    assert again.call('getInvalidations', lost) is None    # who knows it cannot be told what changed since


class Forgetful(Backing):
    """One that cannot tell any more what some transactions changed."""

    forgets = False

    def changes(self, view: View, after: bytes) -> Iterator[Change]:
        if self.forgets and self.newest(view) > after:
            raise Discontinued('it was packed')
        return super().changes(view, after)


@pytest.mark.parametrize('more', [0, 1])
def test_a_commit_that_finds_out_is_made_and_everybody_begins_afresh(
        serve: Serve, connect: Connect, database: Database, monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture, more: int) -> None:
    monkeypatch.setattr('zeo.server.gateway.Backing', Forgetful)
    served = serve(database.root(), poll_interval=NEVER)
    peer, other = connect(served), connect(served)
    front = served.storage
    before = front._known[0]
    peer.begin(1, (oid(1), z64, b'record'))
    peer.call('vote', 1)
    front._backing.forgets = True
    if more:    # somebody else's, of which the same look tells
        look = front._look
        monkeypatch.setattr(front, '_look', lambda: (database.somebody_commits(oid(2)), look())[1])
    peer.ask('tpc_finish', 1)
    peer.wait_for_end()
    other.wait_for_end()
    monkeypatch.undo()
    front._backing.forgets = False
    assert 'it was packed; everybody is disconnected' in caplog.text
    assert max(record.levelno for record in caplog.records) < logging.CRITICAL  # which is for what nobody expects
    newest = database.transactions[-1][0]
    assert front.announced == newest and front._known[0] > before
    again = connect(served)
    assert again.registered == newest and again.load(oid(1))[0] == b'record'
    again.commit(oid(3), b'next')   # the commit lock is free


# ---- the rest


def test_sizes_and_oids_are_the_roots(served: Served, connect: Connect, database: Database) -> None:
    peer = connect(served)
    info = peer.call('get_info')
    assert (info['length'], info['size'], info['name']) == (7, 77, 'shared')
    assert peer.call('new_oids', 2) == [p64(1000), p64(1001)]
    assert not [name for _, name in info['interfaces'] if 'MVCC' in name]


def test_a_pack_that_removes_the_last_transaction_puts_another_one_there(
        served: Served, connect: Connect, database: Database) -> None:
    peer = connect(served)
    peer.commit(oid(1), b'record')
    empty = database.somebody_commits()
    peer.call('ping')
    peer.call('pack', 0.0, True)
    last = database.transactions[-1][0]
    assert last == empty or last > empty
    assert peer.call('lastTransaction') >= empty
    assert connect(served).registered >= empty


def test_what_was_packed_away_is_not_shown_any_more(
        served: Served, connect: Connect, database: Database) -> None:
    peer = connect(served)
    first = peer.commit(oid(1), b'first')
    second = peer.commit(oid(1), b'second')
    assert peer.call('loadSerial', oid(1), first) == b'first'
    peer.call('pack', 0.0, True)
    with pytest.raises(POSKeyError):    # the reader had a snapshot from before
        peer.call('loadSerial', oid(1), first)
    assert peer.load(oid(1)) == (b'second', second, None)


def test_all_instances_are_released_in_the_end(serve: Serve, connect: Connect, database: Database) -> None:
    served = Served('1', database.root(), poll_interval=0.001)
    served.start()
    peer = SessionPeer(served)
    peer.commit(oid(1), b'record')
    peer.load(oid(1))
    peer.close()
    served.close()
    assert all(each.released for each in database.instances)


# ---- the fate of a transaction, at another server


class Promising(Backing):
    """One that can be asked what became of a transaction: its token is looked for."""

    keeps_receipts = True

    def receipt(self, writer: View, last: bytes, token: bytes, tid: bytes | None) -> bytes:
        return p64(id(writer.storage)) + last + token

    def in_progress(self, view: View, receipt: bytes) -> bool:
        database: Database = view.storage.database
        database.gates['asked'].go_through()
        return any(p64(id(each)) == receipt[:8] and each.transaction is not None for each in database.instances)

    def outcome(self, view: View, receipt: bytes) -> bytes | None:
        return next((tid for tid, meta, _ in view.storage.seen if meta.extension.get(TOKEN) == receipt[16:]), None)


@pytest.fixture
def two(serve: Serve, database: Database, monkeypatch: pytest.MonkeyPatch) -> tuple[Served, Served]:
    monkeypatch.setattr('zeo.server.gateway.Backing', Promising)
    return serve(database.root(), poll_interval=NEVER), serve(database.root(), poll_interval=NEVER)


def test_another_server_tells_what_became_of_a_transaction(
        two: tuple[Served, Served], connect: Connect, database: Database) -> None:
    here, there = two
    peer, other = connect(here), connect(there)
    assert 'settle' in peer.call('get_info')['zeo']
    peer.begin(1, (oid(1), z64, b'record'))
    _, receipt = peer.call('vote', 1, True)
    database.somebody_commits(oid(2))
    own = peer.call('tpc_finish', 1)
    number = other.ask('settle', receipt, 1)
    assert other.answer(number) == own
    assert told(other, number)[-2:] == [(own, [oid(1)]), own]    # it is announced first


def test_a_transaction_that_was_cut_off_is_never_committed_later(
        two: tuple[Served, Served], connect: Connect, database: Database) -> None:
    here, there = two
    peer, other = connect(here), connect(there)
    peer.begin(1, (oid(1), z64, b'record'))
    _, receipt = peer.call('vote', 1, True)
    database.gates['asked'].shut()
    number = other.ask('settle', receipt, 1)
    database.gates['asked'].wait_until_reached()
    assert not [each for each in other.told if each[0] == number]    # it may still be finished
    peer.close()
    database.gates['asked'].open()
    assert other.answer(number) is False


def test_one_that_is_still_in_progress_is_not_guessed_about(
        two: tuple[Served, Served], connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, 'FATE_PATIENCE', 0.0)
    here, there = two
    peer, other = connect(here), connect(there)
    peer.begin(1, (oid(1), z64, b'record'))
    _, receipt = peer.call('vote', 1, True)
    with pytest.raises(Exception, match='still in progress'):
        other.call('settle', receipt, 1)
    with pytest.raises(ValueError):
        there.storage.outcome(b'what no server has said')
    assert connect(here).call('settle', receipt, 1) is False    # its own server ends it
    with pytest.raises(StorageTransactionError):
        peer.call('tpc_finish', 1)
