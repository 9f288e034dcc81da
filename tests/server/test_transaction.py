"""One client's transaction: every state, and every way in which it may end."""

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from ZODB.FileStorage import FileStorage
from ZODB.POSException import ConflictError
from ZODB.POSException import StorageError
from ZODB.POSException import StorageTransactionError
from ZODB.utils import p64
from ZODB.utils import u64
from ZODB.utils import z64

from tests.server.talk import PATIENCE
from tests.server.talk import Announcing
from tests.server.talk import Gate
from tests.server.talk import GatedStorage
from tests.server.talk import SessionPeer
from tests.server.talk import in_thread
from tests.server.talk import oid
from tests.server.talk import packed
from tests.server.talk import records
from tests.server.talk import tid
from tests.system.servers import until
from zeo.errors import ClientDisconnected
from zeo.errors import ProtocolError
from zeo.errors import ServerException
from zeo.server.limits import Limits
from zeo.server.served import MOST_COMMITTED
from zeo.server.served import Served
from zeo.server.staging import Staging
from zeo.server.transaction import QUICK
from zeo.server.transaction import State
from zeo.wire.stores import HEAD
from zeo.wire.stores import Store

Serve = Callable[..., Served]
Connect = Callable[..., SessionPeer]

NEW = (oid(1), z64, b'record')


def state(peer: SessionPeer) -> State | None:
    """The state of a client's transaction; None if it has none."""
    transaction = peer.session._current()
    return None if transaction is None else transaction.state


def holder(served: Served) -> Any:
    """The client that holds the commit lock."""
    return None if served.lock.holder is None else served.lock.holder.client  # type: ignore[attr-defined]


def is_as_before(served: Served) -> bool:
    """Nobody holds or waits for anything, and nothing was stored."""
    return (served.lock.holder is None and served.lock.waiting == 0 and len(served.storage) == 0
            and served.active_txns == 0 and not served.told)


def can_commit(served: Served, connect: Connect) -> bool:
    """Whether somebody else can commit now, that is: lock and storage are free."""
    connect(served).commit(oid(99), b'somebody else')
    return True


# ---- the way it should be


def test_nothing_touches_the_storage_before_vote(served: Served, peer: SessionPeer) -> None:
    peer.begin(1, NEW)
    assert state(peer) is State.BEGUN
    assert served.storage.calls == [] and served.lock.holder is None
    assert served.active_txns == 1


def test_a_transaction_is_voted_and_finished(served: Served, peer: SessionPeer) -> None:
    peer.begin(1, NEW, (oid(2), z64, b'two'))
    assert peer.call('vote', 1) == []
    assert state(peer) is State.VOTED
    assert holder(served) is not None
    finished = peer.call('tpc_finish', 1)
    assert served.storage.lastTransaction() == finished == served.publisher.last_tid
    assert served.storage.load(oid(2))[0] == b'two'
    assert state(peer) is None and served.lock.holder is None
    assert served.active_txns == 0


def test_the_committer_is_told_sizes_before_its_answer(served: Served, peer: SessionPeer) -> None:
    peer.begin(1, NEW)
    peer.call('vote', 1)
    peer.call('tpc_finish', 1)
    assert [message[2] for message in peer.told[-2:]] == ['info', '.reply']
    assert peer.notices('info')[-1][0]['length'] == 1


def test_a_committer_who_sends_many_stores_at_a_time_asks_for_sizes_itself(served: Served, peer: SessionPeer) -> None:
    peer.call('commit', 1, True, b'', b'', *packed(NEW))
    peer.call('tpc_finish', 1)
    peer.call('tpc_begin', 2, b'', b'', {})
    peer.tell('stores', *packed((oid(2), z64, b'two')), 2)
    peer.call('vote', 2)
    peer.call('tpc_finish', 2)
    assert peer.notices('info') == []
    assert peer.call('get_info')['length'] == 2


def test_everybody_else_hears_of_all_objects_once(
        served: Served, peer: SessionPeer, connect: Connect) -> None:
    other = connect(served)
    peer.begin(1, NEW, (oid(2), z64, b'two'), (oid(2), z64, b'two again'))
    peer.call('vote', 1)
    finished = peer.call('tpc_finish', 1)
    assert other.invalidations() == [(finished, [oid(1), oid(2)])]
    assert peer.invalidations() == []


def test_the_answer_is_given_before_the_lock_is_released(
        served: Served, peer: SessionPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    release = served.lock.release
    backlog = []

    def noted(holder: Any) -> None:
        backlog.append(peer.outbox.backlog)
        release(holder)

    monkeypatch.setattr(served.lock, 'release', noted)
    peer.begin(1, NEW)
    peer.call('vote', 1)
    peer.call('tpc_finish', 1)
    assert backlog[0] > 0


def test_ids_are_whatever_the_client_likes(served: Served, peer: SessionPeer) -> None:
    for id in (0, -1, None, 'text', b'bytes', 2**70, 1.5, (1, 2), [1, [2]], {'a': 1}, 'x' * 10**6):
        peer.commit(oid(1), b'record', id=id)


# ---- waiting for the lock


def test_a_vote_waits_for_the_lock_and_nothing_else_does(
        served: Served, peer: SessionPeer, connect: Connect) -> None:
    other = connect(served)
    peer.begin(1, NEW)
    peer.call('vote', 1)
    other.begin(1, (oid(2), z64, b'two'))
    vote = other.ask('vote', 1)
    assert state(other) is State.WAITING and served.lock.waiting == 1
    assert other.call('ping') is None
    assert served.storage.calls.count('tpc_begin') == 1
    peer.call('tpc_finish', 1)
    assert other.answer(vote) == []
    other.call('tpc_finish', 1)
    assert len(served.storage) == 2


def test_waiting_votes_are_served_in_the_order_of_their_arrival(
        served: Served, peer: SessionPeer, connect: Connect) -> None:
    peer.begin(1, NEW)
    peer.call('vote', 1)
    others = [connect(served) for _ in range(4)]
    votes = []
    for number, other in enumerate(others):
        other.begin(1, (oid(10 + number), z64, b'record'))
        votes.append(other.ask('vote', 1))
    peer.call('tpc_finish', 1)
    tids = []
    for other, vote in zip(others, votes, strict=True):
        other.answer(vote)
        tids.append(other.call('tpc_finish', 1))
    assert tids == sorted(tids)


def waiting_for(served: Served, peer: SessionPeer, other: SessionPeer, whole: bool, *stores: Store) -> int:
    """One has voted, and the vote of the other waits; its number."""
    peer.begin(1, NEW)
    peer.call('vote', 1)
    if whole:
        vote = other.ask('commit', 1, False, b'', b'', *packed(*stores))
    else:
        other.begin(1, *stores)
        vote = other.ask('vote', 1)
    assert state(other) is State.WAITING
    return vote


def test_who_has_finished_and_told_so_runs_the_next_vote_if_it_is_quick(
        served: Served, peer: SessionPeer, connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    other, third = connect(served), connect(served)
    vote = waiting_for(served, peer, other, True, (oid(2), z64, b'two'))
    ran: list[object] = []

    def tpc_vote(_: Any) -> None:
        ran.extend([threading.get_ident(), peer.told[-1][2], holder(served) == 'the client'])

    monkeypatch.setattr(served.storage, 'tpc_vote', tpc_vote)
    finished = peer.call('tpc_finish', 1)
    assert ran == [threading.get_ident(), '.reply', True]
    assert other.answer(vote) == [] and state(other) is State.VOTED
    assert other.invalidations() == third.invalidations() == [(finished, [oid(1)])]


@pytest.mark.parametrize('why', ['it is not whole', 'it is large', 'it stores much', 'a pack', 'another server'])
def test_who_has_finished_does_not_run_a_vote_that_may_take_long(
        served: Served, peer: SessionPeer, connect: Connect, why: str) -> None:
    other = connect(served)
    gate = served.storage.gates['voting']
    served.votes_by_itself = why != 'another server'
    stores = {'it is large': [(oid(2), z64, bytes(QUICK))],
              'it stores much': [(oid(number), z64, b'a') for number in range(2, 300)]}.get(why, [(oid(2), z64, b'two')])
    vote = waiting_for(served, peer, other, why != 'it is not whole', *stores)
    with served.packing if why == 'a pack' else contextlib.nullcontext():
        gate.shut()
        finished = peer.call('tpc_finish', 1)
        gate.wait_until_reached()
        assert peer.load(oid(1))[:2] == (b'record', finished)
        gate.open()
        assert other.answer(vote) == []


@pytest.mark.parametrize('where', ['in the storage', 'here'])
def test_what_the_next_vote_raises_is_not_the_failure_of_who_has_finished(
        served: Served, peer: SessionPeer, connect: Connect, monkeypatch: pytest.MonkeyPatch, where: str,
        caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_: Any) -> None:
        raise SystemExit

    other = connect(served)
    vote = waiting_for(served, peer, other, True, (oid(2), z64, b'two'))
    if where == 'here':
        monkeypatch.setattr(served.lock, 'wait_for_client', fail)
    else:
        monkeypatch.setattr(served.storage, 'tpc_vote', fail)
    assert peer.call('tpc_finish', 1) == served.publisher.last_tid
    assert peer.load(oid(1))[0] == b'record'
    if where == 'here':
        assert 'a job failed' in caplog.text and other.hung_up
    else:
        with pytest.raises(ServerException):
            other.answer(vote)
    monkeypatch.undo()
    assert can_commit(served, connect)


@pytest.mark.parametrize('whole', [True, False], ids=['who has finished', 'a thread of its own'])
@pytest.mark.parametrize('fails', [False, True], ids=['the vote succeeds', 'the vote fails'])
def test_a_vote_whose_answer_cannot_be_told_keeps_neither_the_lock_nor_its_client(
        served: Served, peer: SessionPeer, connect: Connect, caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch, whole: bool, fails: bool) -> None:
    def no_memory(*_: Any, **__: Any) -> None:
        raise MemoryError

    other = connect(served)
    waiting_for(served, peer, other, whole, (oid(2), z64, b'two'))
    transaction = other.session._transaction
    assert transaction is not None
    transaction._vote_answer = no_memory
    if fails:
        monkeypatch.setattr(served.storage, 'tpc_vote', no_memory)
    peer.call('tpc_finish', 1)
    until(lambda: 'a job failed' in caplog.text, 'the vote has ended')
    assert other.hung_up
    assert transaction.state is State.ENDED and served.lock.holder is None
    monkeypatch.undo()
    assert can_commit(served, connect)


def test_a_vote_that_fails_without_waiting_keeps_neither_the_lock_nor_its_client(
        resolving: Served, connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = connect(resolving)
    peer.begin(1, NEW)
    transaction = peer.session._transaction
    assert transaction is not None

    def conflict(_: Any) -> None:
        monkeypatch.setattr(transaction._replay, '_staging', Unreadable())
        raise ConflictError(oid=oid(1), serials=(tid(2), tid(1)))

    class Unreadable(list[Any]):
        def __iter__(self) -> Any:
            raise OSError(errno.EIO, 'Input/output error')

        def close(self) -> None:
            pass

    monkeypatch.setattr(resolving.storage, 'tpc_vote', conflict)
    with pytest.raises(EOFError):
        peer.call('vote', 1)
    assert peer.hung_up and transaction.state is State.ENDED
    monkeypatch.undo()
    assert can_commit(resolving, connect)


@pytest.mark.parametrize('error', [OSError, SystemExit])
@pytest.mark.parametrize('fails', [False, True], ids=['finished', 'refused'])
def test_whatever_is_left_of_a_transaction_the_lock_is_not(
        served: Served, peer: SessionPeer, connect: Connect, caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch, fails: bool, error: type[BaseException]) -> None:
    def cannot_close(_: Staging) -> None:
        raise error

    def refuse(_: Any) -> None:
        raise ConflictError

    peer.begin(1, NEW)
    with monkeypatch.context() as patched:
        patched.setattr(Staging, 'close', cannot_close)
        if fails:
            patched.setattr(served.storage, 'tpc_vote', refuse)
            with pytest.raises(ConflictError):
                peer.call('vote', 1)
        else:
            peer.call('vote', 1)
            peer.call('tpc_finish', 1)
    assert 'something may be left' in caplog.text
    assert served.lock.holder is None and can_commit(served, connect)


def test_a_storage_that_has_to_ask_others_is_not_quick(serve: Serve) -> None:
    assert serve().votes_by_itself and not serve(Announcing()).votes_by_itself


def test_a_vote_during_a_pack_does_not_hold_up_its_client(
        served: Served, peer: SessionPeer) -> None:
    """The storage may let it wait until it is packed."""
    with served.packing:
        served.storage.gates['voting'].shut()
        peer.begin(1, NEW)
        vote = peer.ask('vote', 1)
        served.storage.gates['voting'].wait_until_reached()
        assert peer.call('ping') is None
        served.storage.gates['voting'].open()
        assert peer.answer(vote) == []


# ---- votes that fail


@pytest.mark.parametrize('error', [
    ConflictError(oid=oid(1), serials=(tid(2), tid(1))), ValueError('as it happens'), OSError(5, 'disk'),
    MemoryError(), SystemExit(1)], ids=lambda error: type(error).__name__)
def test_a_vote_that_fails_ends_the_transaction_and_releases_the_lock(
        served: Served, peer: SessionPeer, connect: Connect, error: BaseException,
        monkeypatch: pytest.MonkeyPatch) -> None:
    def tpc_vote(_: Any) -> None:
        raise error

    monkeypatch.setattr(served.storage, 'tpc_vote', tpc_vote)
    peer.begin(1, NEW)
    with pytest.raises((type(error), ServerException)):  # type: ignore[arg-type]
        peer.call('vote', 1)
    assert state(peer) is None and is_as_before(served)
    assert served.storage.calls[-1] == 'tpc_abort'
    assert peer.call('tpc_abort', 1) is None  # finds nothing
    monkeypatch.undo()
    peer.commit(oid(1), b'anew')
    assert can_commit(served, connect)


def test_a_vote_that_fails_after_it_waited_does_the_same(
        served: Served, peer: SessionPeer, connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    other = connect(served)
    peer.begin(1, NEW)
    peer.call('vote', 1)
    other.begin(1, (oid(1), z64, b'at the same time'))
    vote = other.ask('vote', 1)
    peer.call('tpc_finish', 1)
    with pytest.raises(ConflictError) as caught:
        other.answer(vote)
    assert caught.value.oid == oid(1)
    assert caught.value.serials == (served.publisher.last_tid, z64)
    assert state(other) is None and served.lock.holder is None
    assert served.statistics.conflicts == 1


def test_a_storage_that_cannot_even_abort_does_not_keep_the_lock(
        served: Served, peer: SessionPeer, connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> None:
        raise SystemExit

    monkeypatch.setattr(served.storage, 'tpc_abort', fail)
    peer.begin(1, NEW)
    peer.call('vote', 1)
    peer.call('tpc_abort', 1)
    assert served.lock.holder is None and state(peer) is None


def test_the_wrong_transaction_is_refused_and_the_right_one_goes_on(
        served: Served, peer: SessionPeer) -> None:
    for id in (1, 2):
        with pytest.raises(StorageTransactionError):
            peer.call('vote', id)
        with pytest.raises(StorageTransactionError):
            peer.call('tpc_finish', id)
        assert peer.call('tpc_abort', id) is None
    peer.begin(1, NEW)
    with pytest.raises(StorageTransactionError) as caught:
        peer.call('vote', 2)
    assert caught.value.args == (1, 2)
    assert peer.call('tpc_abort', 2) is None
    assert state(peer) is State.BEGUN
    peer.call('vote', 1)
    with pytest.raises(StorageTransactionError):
        peer.call('tpc_finish', 2)
    peer.call('tpc_finish', 1)
    with pytest.raises(StorageTransactionError):
        peer.call('tpc_finish', 1)
    assert served.storage.load(oid(1))[0] == b'record'


def test_a_finish_without_a_vote_is_refused_and_nothing_happens(
        served: Served, peer: SessionPeer) -> None:
    peer.begin(1, NEW)
    with pytest.raises(StorageTransactionError):
        peer.call('tpc_finish', 1)
    assert served.storage.calls == []
    peer.call('vote', 1)
    peer.call('tpc_finish', 1)


def test_a_second_vote_does_no_harm_to_the_first(
        served: Served, peer: SessionPeer, connect: Connect) -> None:
    other = connect(served)
    other.begin(1, NEW)
    other.call('vote', 1)
    peer.begin(1, (oid(2), z64, b'two'))
    vote = peer.ask('vote', 1)
    with pytest.raises(StorageTransactionError, match='already voting'):
        peer.call('vote', 1)
    other.call('tpc_finish', 1)
    assert peer.answer(vote) == []
    with pytest.raises(StorageTransactionError, match='already voting'):
        peer.call('vote', 1)
    peer.call('tpc_finish', 1)


def test_a_repeated_begin_is_ignored_and_another_one_refused(served: Served, peer: SessionPeer) -> None:
    peer.begin(1, NEW)
    peer.begin(1)
    with pytest.raises(StorageTransactionError):
        peer.call('tpc_begin', 2, b'', b'', {})
    peer.call('vote', 1)
    peer.call('tpc_finish', 1)
    assert served.storage.load(oid(1))[0] == b'record'


@pytest.mark.parametrize('name, args', [
    ('storea', (oid(1), z64, b'record')), ('checkCurrentSerialInTransaction', (oid(1), z64)),
    ('deleteObject', (oid(1), z64)), ('undoa', (b'id',)), ('restorea', (oid(1), z64, b'record', None)),
    ('stores', (HEAD.pack(oid(1), z64, 6), b'record'))])
def test_data_for_a_transaction_that_is_not_in_progress_ends_the_connection(
        served: Served, peer: SessionPeer, name: str, args: tuple[Any, ...]) -> None:
    with pytest.raises(ProtocolError, match=name):
        peer.tell(name, *args, 1)
    peer.begin(1)
    with pytest.raises(ProtocolError, match=name):
        peer.tell(name, *args, 2)
    with pytest.raises(StorageTransactionError):
        peer.call(name, *args, 2)  # as a request: an answer


def test_data_after_the_vote_is_refused(served: Served, peer: SessionPeer) -> None:
    peer.begin(1, NEW)
    peer.call('vote', 1)
    with pytest.raises(StorageTransactionError):
        peer.call('storea', oid(2), z64, b'late', 1)
    peer.call('tpc_finish', 1)
    assert len(served.storage) == 1


# ---- many stores at a time, and a transaction as a whole


def test_many_stores_are_as_good_as_single_ones(filed: SessionPeer) -> None:
    filed.begin(1, (oid(1), z64, b'one'))
    filed.tell('stores', *packed((oid(2), z64, b'two'), (oid(1), z64, b'one anew')), 1)
    filed.tell('storea', oid(3), z64, b'three', 1)
    filed.call('vote', 1)
    finished = filed.call('tpc_finish', 1)
    assert [filed.load(oid(number))[:2] for number in (1, 2, 3)] == [
        (b'one anew', finished), (b'two', finished), (b'three', finished)]
    assert filed.session._served and filed.session._served.statistics.stores == 4


def test_a_transaction_as_a_whole_is_answered_like_its_vote(filed: SessionPeer, connect: Connect) -> None:
    assert filed.session._served is not None
    other = connect(filed.session._served)
    reported, told = filed.call('commit', 7, True, b'user', b'note', *packed((oid(1), z64, b'one'), (oid(2), z64, b'two')))
    assert reported == []
    assert filed.call('tpc_finish', 7) == told
    assert other.invalidations() == [(told, [oid(1), oid(2)])]
    entry, = filed.call('history', oid(1))
    assert (entry['user_name'], entry['description']) == (b'user', b'note')
    assert filed.call('commit', 8, False, b'', b'', *packed((oid(1), told, b'two'))) == []
    filed.call('tpc_abort', 8)
    with pytest.raises(ConflictError):
        filed.call('commit', 9, True, b'', b'', *packed((oid(1), z64, b'outdated')))
    assert filed.call('commit', 9, False, b'', b'', b'', b'') == []  # the other one is over


def test_a_transaction_as_a_whole_is_refused_beside_another(served: Served, peer: SessionPeer) -> None:
    for id in 1, 2:
        peer.begin(1, NEW)
        with pytest.raises(StorageTransactionError):
            peer.call('commit', id, True, b'', b'', b'', b'')
        assert state(peer) is State.BEGUN
        peer.call('tpc_abort', 1)


@pytest.mark.parametrize('whole', [False, True])
def test_many_stores_count_as_single_ones_do(peer: SessionPeer, whole: bool) -> None:
    peer.session._limits = Limits(max_transaction=5000)
    for size, fits in [(4400, True), (4401, False)]:
        stores = packed((oid(1), z64, b'x' * (size - 1)), (oid(2), z64, b'x'))
        if not whole:
            peer.begin(1)
            peer.tell('stores', *stores, 1)
        vote = partial(peer.call, 'commit', 1, False, b'', b'', *stores) if whole else partial(peer.call, 'vote', 1)
        if fits:
            assert vote() == []
            peer.call('tpc_abort', 1)
        else:
            with pytest.raises(StorageError, match='more than 5000 bytes'):
                vote()
    assert peer.session._served is not None and peer.session._served.active_txns == 0
    peer.session._limits = Limits()
    peer.commit(oid(1), b'record')


def test_a_full_disk_is_reported_to_a_transaction_as_a_whole(
        served: Served, peer: SessionPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr('zeo.server.staging.Staging.append', full)
        with pytest.raises(ServerException, match='cannot stage the transaction: .*No space left'):
            peer.call('commit', 1, True, b'', b'', *packed(NEW))
    assert is_as_before(served) and served.storage.calls == []
    peer.commit(oid(1), b'record')


def test_no_stores_at_all_leave_nothing_behind(peer: SessionPeer) -> None:
    """However often they come: they count nothing either."""
    peer.tell('tpc_begin', 1, b'', b'', {})
    for _ in range(10):
        peer.tell('stores', b'', b'', 1)
    transaction = peer.session._transaction
    assert transaction is not None and not list(transaction._staging)
    assert peer.call('vote', 1) == []
    peer.call('tpc_finish', 1)


def test_many_stores_come_too_late_after_the_vote(peer: SessionPeer) -> None:
    peer.begin(1)
    peer.call('vote', 1)
    with pytest.raises(ProtocolError, match='the transaction is voted'):
        peer.tell('stores', HEAD.pack(oid(1), z64, 6), b'record', 1)


def test_many_stores_are_not_kept_for_a_vote_that_will_fail(peer: SessionPeer) -> None:
    peer.begin(1)
    transaction = peer.session._transaction
    assert transaction is not None
    transaction.fail(OSError('no room'))
    peer.tell('stores', HEAD.pack(oid(1), z64, 6), b'record', 1)
    assert not list(transaction._staging)


def test_many_stores_that_wait_on_the_disk_are_replayed(filed: SessionPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    filed.begin(1)
    assert filed.session._transaction is not None
    monkeypatch.setattr(filed.session._transaction._staging, '_in_memory', 10)
    for number in range(1, 5, 2):
        filed.tell('stores', *packed((oid(number), z64, b'one'), (oid(number + 1), z64, b'two')), 1)
    assert filed.session._transaction._staging._file is not None
    filed.call('vote', 1)
    finished = filed.call('tpc_finish', 1)
    assert [filed.load(oid(number))[0] for number in range(1, 5)] == [b'one', b'two'] * 2
    assert filed.load(oid(4))[1] == finished


# ---- abort, in each state


def test_an_abort_of_what_has_begun_forgets_it(served: Served, peer: SessionPeer) -> None:
    peer.begin(1, NEW)
    assert peer.call('tpc_abort', 1) is None
    assert served.storage.calls == [] and is_as_before(served)


def test_an_abort_while_waiting_leaves_the_queue_and_the_vote_is_not_answered(
        served: Served, peer: SessionPeer, connect: Connect) -> None:
    other = connect(served)
    other.begin(1, NEW)
    other.call('vote', 1)
    peer.begin(1, (oid(2), z64, b'two'))
    vote = peer.ask('vote', 1)
    assert peer.call('tpc_abort', 1) is None
    assert served.lock.waiting == 0
    other.call('tpc_finish', 1)
    assert served.lock.holder is None
    assert peer.call('ping') is None
    assert not any(message[0] == vote for message in peer.told)
    peer.commit(oid(3), b'anew')


def test_an_abort_of_what_is_voted_aborts_and_releases(
        served: Served, peer: SessionPeer, connect: Connect) -> None:
    other = connect(served)
    peer.begin(1, NEW)
    peer.call('vote', 1)
    other.begin(1, (oid(2), z64, b'two'))
    vote = other.ask('vote', 1)
    peer.call('tpc_abort', 1)
    assert other.answer(vote) == []
    other.call('tpc_finish', 1)
    assert [each for each, _, _ in records(served.storage)] == [oid(2)]


def test_an_abort_while_voting_is_answered_when_the_vote_has_ended_and_the_vote_is_not(
        served: Served, peer: SessionPeer, connect: Connect) -> None:
    other = connect(served)
    other.begin(1, NEW)
    other.call('vote', 1)
    peer.begin(1, (oid(2), z64, b'two'))
    vote = peer.ask('vote', 1)
    served.storage.gates['voting'].shut()
    other.call('tpc_finish', 1)
    served.storage.gates['voting'].wait_until_reached()
    abort = peer.ask('tpc_abort', 1)
    assert peer.call('ping') is None
    assert not any(message[0] == abort for message in peer.told)
    served.storage.gates['voting'].open()
    assert peer.answer(abort) is None
    assert served.lock.holder is None
    assert not any(message[0] == vote for message in peer.told)
    assert [each for each, _, _ in records(served.storage)] == [oid(1)]


def test_an_abort_that_comes_just_when_a_vote_has_failed_is_answered(
        served: Served, peer: SessionPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    peer.begin(1, NEW)
    transaction = peer.session._transaction
    assert transaction is not None
    transaction.state = State.ENDED  # between two looks of the session at it
    monkeypatch.setattr(peer.session, '_current', lambda: transaction)
    assert peer.call('tpc_abort', 1) is None


# ---- the connection ends: each row of the protocol's table


def test_loss_before_register_is_nothing(served: Served, connect: Connect) -> None:
    connect(served, register=False).close()
    assert is_as_before(served) and served.publisher.subscribers == []


def test_loss_when_idle_is_forgotten(served: Served, peer: SessionPeer) -> None:
    assert served.status()['connections'] == 1
    peer.close()
    assert is_as_before(served) and served.status()['connections'] == 0


def test_loss_of_what_has_begun_discards_it(served: Served, peer: SessionPeer) -> None:
    peer.begin(1, NEW)
    transaction = peer.session._transaction
    assert transaction is not None
    for number in range(5):
        peer.tell('storea', oid(number), z64, b'x' * 2**20, 1)
    file = transaction._staging._file
    assert file is not None
    peer.close()
    assert file.closed and served.storage.calls == [] and is_as_before(served)


def test_loss_while_waiting_leaves_the_queue(
        served: Served, peer: SessionPeer, connect: Connect) -> None:
    other, third = connect(served), connect(served)
    other.begin(1, NEW)
    other.call('vote', 1)
    peer.begin(1, (oid(2), z64, b'two'))
    peer.ask('vote', 1)
    third.begin(1, (oid(3), z64, b'three'))
    vote = third.ask('vote', 1)
    peer.close()
    other.call('tpc_finish', 1)
    assert third.answer(vote) == []
    third.call('tpc_finish', 1)
    assert [each for each, _, _ in records(served.storage)] == [oid(1), oid(3)]


def test_loss_while_voting_aborts_when_the_vote_has_ended(
        served: Served, peer: SessionPeer, connect: Connect) -> None:
    with served.packing:  # so that it votes on another thread
        served.storage.gates['voting'].shut()
        peer.begin(1, NEW)
        peer.ask('vote', 1)
        served.storage.gates['voting'].wait_until_reached()
        peer.close()
        assert served.lock.holder is not None
        served.storage.gates['voting'].open()
    until(lambda: is_as_before(served), 'the vote has ended')
    assert served.storage.calls[-1] == 'tpc_abort'
    assert can_commit(served, connect)


def test_loss_of_what_is_voted_aborts_and_wakes_the_next(
        served: Served, peer: SessionPeer, connect: Connect) -> None:
    other = connect(served)
    peer.begin(1, NEW)
    peer.call('vote', 1)
    other.begin(1, (oid(2), z64, b'two'))
    vote = other.ask('vote', 1)
    peer.close()
    assert served.storage.calls[:3] == ['tpc_begin', 'tpc_vote', 'tpc_abort']
    assert other.answer(vote) == []
    other.call('tpc_finish', 1)


def test_loss_while_finishing_completes_it_with_all_announcements(
        served: Served, peer: SessionPeer, connect: Connect) -> None:
    other = connect(served)
    peer.begin(1, NEW)
    peer.call('vote', 1)
    served.storage.gates['finishing'].shut()
    finish = in_thread(peer.ask, 'tpc_finish', 1)
    served.storage.gates['finishing'].wait_until_reached()
    peer.outbox.end()  # the connection is broken
    assert peer.session._transaction is not None
    peer.session._transaction.abandon()  # as by a client that asks for its fate
    served.storage.gates['finishing'].open()
    finish.result(PATIENCE)
    assert 'tpc_abort' not in served.storage.calls
    assert other.invalidations() == [(served.storage.lastTransaction(), [oid(1)])]
    assert served.lock.holder is None


# ---- time


def test_a_transaction_that_takes_too_long_is_aborted_and_its_client_hung_up(
        serve: Serve, connect: Connect) -> None:
    """Other than in ZEO 6.2, where the lock stayed with the connection that was closed."""
    served = serve(transaction_timeout=.5)
    peer, other = connect(served), connect(served)
    peer.begin(1, NEW)
    peer.call('vote', 1)
    other.begin(1, (oid(2), z64, b'two'))
    vote = other.ask('vote', 1)
    assert other.answer(vote) == []
    other.call('tpc_finish', 1)
    peer.wait_for_end()
    assert peer.hung_up and not other.hung_up
    assert [each for each, _, _ in records(served.storage)] == [oid(2)]


def test_time_does_not_count_before_the_lock_is_taken(serve: Serve, connect: Connect) -> None:
    served = serve(transaction_timeout=.05)
    peer, other = connect(served), connect(served)
    other.begin(1, NEW)
    peer.begin(1, (oid(2), z64, b'two'))
    peer.call('vote', 1)
    peer.wait_for_end()  # more time than it was allowed has gone by
    assert other.call('vote', 1) == []


def test_a_finishing_transaction_is_never_timed_out(serve: Serve, connect: Connect) -> None:
    served = serve(transaction_timeout=PATIENCE)
    peer = connect(served)
    peer.begin(1, NEW)
    peer.call('vote', 1)
    served.storage.gates['finishing'].shut()
    finish = in_thread(peer.call, 'tpc_finish', 1)
    served.storage.gates['finishing'].wait_until_reached()
    assert peer.session._transaction is not None
    peer.session._transaction.expired()
    served.storage.gates['finishing'].open()
    assert finish.result(PATIENCE) == served.storage.lastTransaction()
    assert not peer.hung_up


def test_time_that_was_up_a_moment_too_late_harms_nobody(served: Served, peer: SessionPeer) -> None:
    peer.begin(1, NEW)
    transaction = peer.session._transaction
    assert transaction is not None
    peer.call('vote', 1)
    peer.call('tpc_finish', 1)
    transaction.expired()
    assert not peer.hung_up


def test_the_time_that_the_vote_itself_takes_does_not_count(serve: Serve, connect: Connect) -> None:
    served = serve(transaction_timeout=.05)
    peer, other = connect(served), connect(served)
    other.begin(1, (oid(2), z64, b'two'))
    other.call('vote', 1)
    other.wait_for_end()  # the clock runs
    served.storage.gates['voting'].shut()
    peer.begin(1, NEW)
    vote = in_thread(peer.call, 'vote', 1)
    served.storage.gates['voting'].wait_until_reached()
    assert peer.session._transaction is not None
    peer.session._transaction.expired()
    assert not threading.Event().wait(.2) and not peer.hung_up
    served.storage.gates['voting'].open()
    assert vote.result(PATIENCE) == []
    peer.wait_for_end()  # now it does
    until(lambda: is_as_before(served), 'it is aborted')


@pytest.mark.parametrize('winner', ['finish', 'time'])
def test_finish_and_time_claim_it_in_one_step_and_the_second_does_nothing(
        served: Served, peer: SessionPeer, connect: Connect, winner: str) -> None:
    peer.begin(1, NEW)
    peer.call('vote', 1)
    transaction = peer.session._transaction
    assert transaction is not None
    gate = served.storage.gates['finishing' if winner == 'finish' else 'aborting']
    gate.shut()
    if winner == 'finish':
        first, second = in_thread(peer.ask, 'tpc_finish', 1), transaction.expired
    else:
        def second() -> None:
            with pytest.raises(StorageTransactionError):
                transaction.finish(None)
        first = in_thread(transaction.expired)
    gate.wait_until_reached()
    second()
    gate.open()
    first.result(PATIENCE)
    ends = [call for call in served.storage.calls if call in ('tpc_finish', 'tpc_abort')]
    assert ends == ['tpc_finish' if winner == 'finish' else 'tpc_abort']
    assert served.lock.holder is None and can_commit(served, connect)


# ---- a finish that fails


def test_a_finish_that_fails_hangs_up_on_everybody_and_releases_the_lock(
        served: Served, peer: SessionPeer, connect: Connect) -> None:
    other = connect(served)
    before = served.publisher.last_tid
    peer.begin(1, NEW)
    peer.call('vote', 1)
    served.storage.finish_error = OSError(5, 'when all was done')
    with pytest.raises(EOFError):
        peer.call('tpc_finish', 1)
    other.wait_for_end()
    assert other.invalidations() == []
    served.storage.finish_error = None
    assert served.lock.holder is None and served.active_txns == 0
    late = connect(served)
    assert late.registered == served.storage.lastTransaction() > before
    assert late.call('getInvalidations', before) is None
    assert can_commit(served, connect)


def test_a_storage_that_does_not_tell_its_last_transaction_after_that_is_asked_again(
        served: Served, peer: SessionPeer, connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> bytes:
        raise OSError(5, 'the disk is gone')

    before = served.publisher.last_tid
    peer.begin(1, NEW)
    peer.call('vote', 1)
    served.storage.finish_error = OSError(5, 'when all was done')
    monkeypatch.setattr(served.storage, 'lastTransaction', fail, raising=False)
    with pytest.raises(EOFError):
        peer.call('tpc_finish', 1)
    with pytest.raises(ServerException):
        connect(served)  # nobody may believe to be up to date
    monkeypatch.undo()
    late = connect(served)
    assert late.registered == served.storage.lastTransaction() > before
    assert late.call('getInvalidations', before) is None


@pytest.mark.parametrize('method', ['__len__', 'getSize'])
def test_a_storage_that_does_not_tell_its_size_commits_all_the_same(
        served: Served, peer: SessionPeer, connect: Connect, monkeypatch: pytest.MonkeyPatch,
        method: str) -> None:
    def fail(*_: Any) -> int:
        raise OSError(5, 'as it happens')

    other = connect(served)
    monkeypatch.setattr(GatedStorage, method, fail, raising=False)
    finished = peer.commit(oid(1), b'record')
    assert other.invalidations() == [(finished, [oid(1)])]
    assert peer.notices('info') == []


def test_an_announcement_that_fails_half_way_hangs_up_on_everybody(
        served: Served, peer: SessionPeer, connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = connect(served), connect(served)

    def fail(*_: Any) -> bool:
        raise MemoryError

    monkeypatch.setattr(type(two.outbox), 'announce', fail)
    peer.begin(1, NEW)
    peer.call('vote', 1)
    with pytest.raises(EOFError):
        peer.call('tpc_finish', 1)
    for each in (one, two, peer):
        each.wait_for_end()
    monkeypatch.undo()
    assert connect(served).registered == served.storage.lastTransaction()
    assert can_commit(served, connect)


# ---- blobs


@pytest.mark.parametrize('end', ['loss', 'abort', 'vote that fails'])
def test_nothing_is_left_of_an_upload_that_was_not_committed(
        serve: Serve, connect: Connect, tmp_path: Path, end: str) -> None:
    """In ZEO 6.2 it may remain."""
    storage = FileStorage(str(tmp_path / 'Data.fs'), blob_dir=str(tmp_path / 'blobs'))
    served = serve(storage)
    peer = connect(served)
    folder = Path(storage.temporaryDirectory())
    peer.begin(1)
    for number in (1, 2):
        peer.tell('storeBlobStart')
        peer.tell('storeBlobChunk', b'x' * 1000)
        if number == 1:
            serial = z64 if end != 'vote that fails' else tid(7)
            peer.tell('storeBlobEnd', oid(number), serial, b'record', 1)
    assert len([path for path in folder.iterdir() if path.suffix == '.tmp']) == 2
    if end == 'loss':
        peer.close()
    elif end == 'abort':
        peer.call('tpc_abort', 1)
    else:
        connect(served).commit(oid(1), b'somebody else')
        with pytest.raises(ConflictError):
            peer.call('vote', 1)
    assert not [path for path in folder.iterdir() if path.suffix == '.tmp']


# ---- no room


def test_a_full_disk_is_reported_at_vote_and_the_connection_stays(
        served: Served, peer: SessionPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is staged is not answered: hanging up would be all that the client learns."""
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    peer.begin(1, NEW)
    monkeypatch.setattr('zeo.server.staging.Staging.append', full)
    peer.tell('storea', oid(2), z64, b'two', 1)
    peer.tell('storea', oid(3), z64, b'three', 1)
    monkeypatch.undo()
    peer.tell('storea', oid(4), z64, b'four', 1)  # there is room again, but it is too late
    with pytest.raises(ServerException, match='cannot stage the transaction: .*No space left'):
        peer.call('vote', 1)
    assert is_as_before(served) and served.storage.calls == []
    peer.call('tpc_abort', 1)
    peer.commit(oid(1), b'record')


@pytest.mark.parametrize('error, surprise', [
    (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), False), (ArithmeticError('strange'), True)])
def test_a_full_disk_at_vote_is_one_line_in_the_log_and_a_surprise_shows_where(
        served: Served, peer: SessionPeer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
        error: Exception, surprise: bool) -> None:
    def failing(*_: Any) -> None:
        raise error

    peer.begin(1, NEW)
    with monkeypatch.context() as patched:
        patched.setattr(served.storage, 'store', failing, raising=False)
        with pytest.raises(ServerException, match='strange' if surprise else 'No space left'):
            peer.call('vote', 1)
    [record] = [record for record in caplog.records if record.levelname == 'ERROR']
    assert 'the client: vote failed: ' in record.getMessage() and bool(record.exc_info) is surprise
    assert surprise or 'No space left' in record.getMessage()
    peer.commit(oid(1), b'record')


def test_nothing_else_that_goes_wrong_while_staging_is_forgiven(
        served: Served, peer: SessionPeer) -> None:
    peer.begin(1, NEW)
    assert peer.session._transaction is not None
    peer.session._transaction.fail(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(ProtocolError):
        peer.tell('tpc_begin', 2, b'', b'', {})


# ---- conflicts that the client resolves


@pytest.fixture
def resolving(serve: Serve, file_storage: Any) -> Served:
    return serve(file_storage, client_conflict_resolution=True)


def test_conflicts_are_sent_to_the_client_and_the_transaction_stays(
        resolving: Served, connect: Connect) -> None:
    peer, other = connect(resolving), connect(resolving)
    first = peer.commit(oid(1), b'one')
    second = other.commit(oid(1), b'two', serial=first)
    peer.begin(1, (oid(1), first, b'mine'), (oid(2), z64, b'beside'))
    assert peer.call('vote', 1) == [{'oid': oid(1), 'serials': (second, first), 'data': b'mine'}]
    assert state(peer) is State.BEGUN and resolving.lock.holder is None
    third = other.commit(oid(1), b'three', serial=second)  # and again somebody is faster
    peer.tell('storea', oid(1), second, b'resolved', 1)
    assert peer.call('vote', 1) == [{'oid': oid(1), 'serials': (third, second), 'data': b'resolved'}]
    peer.tell('storea', oid(1), third, b'resolved again', 1)
    assert peer.call('vote', 1) == []
    finished = peer.call('tpc_finish', 1)
    assert peer.load(oid(1)) == (b'resolved again', finished, None)
    assert peer.load(oid(2)) == (b'beside', finished, None)
    assert other.invalidations()[-1] == (finished, [oid(1), oid(2)])


def test_conflicts_of_many_stores_are_sent_to_the_client(resolving: Served, connect: Connect) -> None:
    peer = connect(resolving)
    first = peer.commit(oid(1), b'one')
    second = peer.commit(oid(1), b'two', serial=first)
    stores = packed((oid(2), z64, b'beside'), (oid(1), first, b'mine'))
    assert peer.call('commit', 1, True, b'', b'', *stores) == [
        {'oid': oid(1), 'serials': (second, first), 'data': b'mine'}]
    assert state(peer) is State.BEGUN and resolving.lock.holder is None
    peer.tell('stores', *packed((oid(1), second, b'resolved')), 1)
    assert peer.call('vote', 1) == []
    finished = peer.call('tpc_finish', 1)
    assert peer.load(oid(1)) == (b'resolved', finished, None)
    assert peer.load(oid(2)) == (b'beside', finished, None)


def test_a_transaction_with_conflicts_may_be_aborted_or_lost(resolving: Served, connect: Connect) -> None:
    peer, other = connect(resolving), connect(resolving)
    first = peer.commit(oid(1), b'one')
    other.commit(oid(1), b'two', serial=first)
    for end in (lambda: peer.call('tpc_abort', 1), peer.close):
        peer.begin(1, (oid(1), first, b'mine'))
        assert len(peer.call('vote', 1)) == 1
        end()
        assert resolving.lock.holder is None and resolving.active_txns == 0
    assert can_commit(resolving, connect)


def test_a_vote_that_does_not_wait_for_the_one_before_gets_an_answer_of_its_own(
        resolving: Served, connect: Connect) -> None:
    peer = connect(resolving)
    first = peer.commit(oid(1), b'one')
    second = peer.commit(oid(1), b'two', serial=first)
    peer.begin(1, (oid(1), first, b'mine'))
    transaction = peer.session._transaction
    assert transaction is not None
    release = resolving.lock.release

    def and_again(holder: Any) -> None:
        resolving.lock.release = release  # type: ignore[method-assign]
        transaction._vote_answer = lambda *_, **__: pytest.fail('the answer of the next vote')
        release(holder)

    resolving.lock.release = and_again  # type: ignore[method-assign]
    assert peer.call('vote', 1) == [{'oid': oid(1), 'serials': (second, first), 'data': b'mine'}]


# ---- transactions whose tid the client wants to know


def test_a_vote_may_tell_the_tid_and_settle_its_fate(
        serve: Serve, connect: Connect, file_storage: Any) -> None:
    served = serve(file_storage)
    peer, asking = connect(served), connect(served)
    peer.begin(1, NEW)
    reported, told = peer.call('vote', 1, True)
    assert reported == []
    assert asking.call('settle', told, 1) is False  # aborted, so that this is final
    with pytest.raises(StorageTransactionError):
        peer.call('tpc_finish', 1)
    peer.begin(2, NEW)
    _, told = peer.call('vote', 2, True)
    assert peer.call('tpc_finish', 2) == told
    assert asking.call('settle', told, 2) is True
    assert served.told == {}


def test_settling_waits_for_a_finish_in_progress(
        serve: Serve, connect: Connect, file_storage: Any) -> None:
    storage = GatedStorage(file_storage)
    served = serve(storage)
    peer, asking = connect(served), connect(served)
    peer.begin(1, NEW)
    _, told = peer.call('vote', 1, True)
    storage.gates['finished'].shut()
    finish = in_thread(peer.call, 'tpc_finish', 1)
    storage.gates['finished'].wait_until_reached()
    settle = asking.ask('settle', told, 1)
    assert asking.call('ping') is None
    assert not any(message[0] == settle for message in asking.told)
    storage.gates['finished'].open()
    assert finish.result(PATIENCE) == told
    assert asking.answer(settle) is True


class Further(Announcing):
    """A storage that is a client of another server, which can be asked."""

    def __init__(self) -> None:
        super().__init__()
        self.can_settle = True
        self.told: bytes | None = tid(7)
        self.ids: list[Any] = []
        self.asked: list[Any] = []
        self.answer: Any = True

    def tpc_begin(self, transaction: Any, tid: bytes | None = None, status: str = ' ', *, id: Any = None) -> None:
        self.ids.append(id)
        super().tpc_begin(transaction)

    def voted_tid(self, transaction: Any) -> bytes | None:
        assert transaction is self._transaction
        return self.told

    def settle(self, tid: bytes, id: Any) -> bool:
        self.asked.append((tid, id, self._transaction))
        if isinstance(self.answer, Exception):
            raise self.answer
        committed: bool = self.answer
        return committed


def test_the_server_behind_ours_chooses_the_tid_and_settles_what_became_of_it(
        serve: Serve, connect: Connect) -> None:
    storage = Further()
    served = serve(storage)
    peer, asking = connect(served), connect(served)
    peer.begin(77, NEW)
    assert peer.call('vote', 77, True) == ([], tid(7))
    assert storage.ids == [77]  # there the transaction has the id that the client will ask with
    storage.answer = False
    assert asking.call('settle', tid(7), 77) is False
    assert storage.asked == [(tid(7), 77, None)]  # asked when ours had been aborted
    storage.answer = True
    assert asking.call('settle', tid(9), 78) is True  # of a server that was here before
    storage.answer = ClientDisconnected('it is away')
    with pytest.raises(Exception, match='it is away'):
        asking.call('settle', tid(9), 78)


def test_what_the_server_behind_ours_does_not_know_is_not_told(serve: Serve, connect: Connect) -> None:
    storage = Further()
    peer = connect(serve(storage))
    for id, tells_tid, told, result, passed in [
            (1, False, tid(7), [], None), (2, True, None, ([], None), 2), ('id', True, tid(7), ([], None), None)]:
        storage.told = told
        peer.begin(id, NEW)
        assert peer.call('vote', *(id, True) if tells_tid else (id,)) == result
        assert storage.ids[-1] == passed
        peer.call('tpc_abort', id)


def test_settling_is_offered_while_the_server_behind_ours_offers_it(serve: Serve, connect: Connect) -> None:
    storage = Further()
    peer = connect(serve(storage))
    for offered in True, False, True:
        storage.can_settle = offered
        assert ('settle' in peer.call('get_info')['zeo']) is offered


def test_the_metadata_of_a_transaction_reach_the_storage(
        serve: Serve, connect: Connect, file_storage: Any) -> None:
    peer = connect(serve(file_storage))
    peer.tell('tpc_begin', 1, 'usér', b'descr\xc3\xaeption', {'key': ['value']})
    peer.tell('storea', *NEW, 1)
    peer.call('vote', 1)
    peer.call('tpc_finish', 1)
    [transaction] = list(file_storage.iterator())
    assert transaction.user == 'usér'.encode()
    assert transaction.description.decode() == 'descrîption'
    assert transaction.extension == {'key': ['value']}


class Told(dict[bytes, Any]):
    """Lets who looks at all transactions that were told stop behind that."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate()

    def items(self) -> Any:
        found = list(super().items())
        self.gate.go_through()
        return found


def test_who_leaves_the_queue_does_not_make_a_voted_transaction_forgotten(
        serve: Serve, connect: Connect, file_storage: FileStorage) -> None:
    """Else its client would be told that it is not committed, and then it would be."""
    served = serve(GatedStorage(file_storage))
    one, two, asking = connect(served), connect(served), connect(served)
    served.told = told = Told()
    served.storage.gates['voting'].shut()
    one.begin(1, NEW)
    vote = in_thread(one.ask, 'vote', 1, True)
    served.storage.gates['voting'].wait_until_reached()
    two.begin(2, NEW)
    two.ask('vote', 2, True)
    told.gate.shut()
    leaving = in_thread(two.ask, 'tpc_abort', 2)
    until(lambda: leaving.done() or told.gate._reached.is_set(), 'it is about to leave')
    served.storage.gates['voting'].open()
    _, chosen = one.answer(vote.result(PATIENCE))
    told.gate.open()
    leaving.result(PATIENCE)
    assert asking.call('settle', chosen, 1) is False
    with pytest.raises(StorageTransactionError):
        one.call('tpc_finish', 1)
    assert served.told == {}


@pytest.mark.parametrize('end', ['tpc_finish', 'tpc_abort', 'close'])
def test_the_lock_is_released_whatever_fails_at_the_end(
        served: Served, peer: SessionPeer, connect: Connect, caplog: pytest.LogCaptureFixture, end: str) -> None:
    peer.begin(1, NEW)
    peer.call('vote', 1)

    def fail(_: str) -> None:
        raise MemoryError

    transaction = peer.session._transaction
    assert transaction is not None
    transaction.tell_audit = fail
    peer.close() if end == 'close' else peer.call(end, 1)
    assert 'MemoryError' in caplog.text
    assert state(peer) is None and served.active_txns == 0
    assert can_commit(served, connect)


def test_the_lock_is_released_whatever_fails_before_finishing(
        served: Served, peer: SessionPeer, connect: Connect) -> None:
    class Many(dict[bytes, None]):
        def __iter__(self) -> Any:
            raise MemoryError

    peer.begin(1, NEW)
    peer.call('vote', 1)
    transaction = peer.session._transaction
    assert transaction is not None
    transaction._replay.changed = Many()
    with pytest.raises(EOFError):
        peer.call('tpc_finish', 1)
    assert can_commit(served, connect) and oid(1) not in served.storage._data


def test_what_clients_can_repeat_does_not_fill_the_log(
        served: Served, peer: SessionPeer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(_: Any) -> None:
        raise AttributeError('not foreseen at all')

    monkeypatch.setattr(served.storage, 'tpc_vote', fail)
    for number in range(5):
        peer.begin(number, NEW)
        with pytest.raises(ServerException):
            peer.call('vote', number)
    [record] = [record for record in caplog.records if record.exc_info]
    assert 'vote failed' in record.getMessage()


def test_a_transaction_that_was_packed_away_is_committed_all_the_same(
        serve: Serve, connect: Connect, file_storage: FileStorage) -> None:
    def overwritten(id: int) -> bytes:
        peer.begin(id, (oid(0), peer.serial(oid(0)), record))
        told: bytes = peer.call('vote', id, True)[1]
        assert peer.call('tpc_finish', id) == told
        peer.commit(oid(0), record, id=99)
        peer.call('pack', time.time() + 10)
        assert told not in [each.tid for each in file_storage.iterator()]
        return told

    record = b'\x80\x03N.\x80\x03N.'
    served = serve(file_storage)
    peer = connect(served)
    peer.commit(oid(0), record)
    told = overwritten(1)
    assert connect(served).call('settle', told, 1) is True
    served.committed.clear()  # as after a restart
    with pytest.raises(StorageError, match='cannot be known any more'):
        connect(served).call('settle', told, 1)
    assert connect(served).call('settle', p64(u64(served.publisher.last_tid) + 1), 7) is False


def test_of_what_was_committed_so_much_is_remembered(filed: SessionPeer) -> None:
    served = filed.session._served
    assert served is not None and served.committed.maxlen == MOST_COMMITTED
    told = []
    for number in range(2):
        told.append(filed.call('commit', number, True, b'', b'', *packed((oid(number), z64, b'record')))[1])
        filed.call('tpc_finish', number)
    assert list(served.committed) == told
