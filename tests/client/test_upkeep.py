"""The cache, then the database, then the last tid."""

from collections.abc import Iterator
from typing import Any

import pytest
from ZODB.utils import z64

from tests.client.peer import oid
from tests.client.peer import tid
from zeo.client.cache import Cache
from zeo.client.cache import open_cache
from zeo.client.updates import Updates
from zeo.client.upkeep import Upkeep
from zeo.client.verification import CacheIsNewer
from zeo.client.verification import Verdict
from zeo.errors import ProtocolError


class Database:
    """Remembers what it is told, and what cache and last tid looked like then."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.told: list[Any] = []
        self.at_that_time: list[tuple[bytes, Any]] = []

    def note(self, *what: Any) -> None:
        self.told.append(what)
        self.at_that_time.append((self.cache.last_tid, self.cache.load(oid(1))))

    def invalidate(self, tid: bytes, oids: Any) -> None:
        self.note(tid, list(oids))

    def invalidateCache(self) -> None:
        self.note('all')


@pytest.fixture
def upkeep() -> Iterator[Upkeep]:
    """A cache with object 1, valid as of 5."""
    cache = open_cache(None, 1 << 20)
    cache.store(oid(1), tid(1), None, b'one')
    cache.set_last_tid(tid(5))
    upkeep = Upkeep(cache)
    upkeep.database = Database(cache)
    yield upkeep
    cache.close()


def database(upkeep: Upkeep) -> Database:
    assert isinstance(upkeep.database, Database)
    return upkeep.database


def test_an_invalidation_reaches_the_cache_then_the_database_then_the_last_tid(upkeep: Upkeep) -> None:
    upkeep.invalidated(tid(6), [oid(1), oid(2)])
    assert database(upkeep).told == [(tid(6), [oid(1), oid(2)])]
    assert database(upkeep).at_that_time == [(tid(5), None)]
    assert upkeep.cache.last_tid == tid(6)
    assert upkeep.cache.loadBefore(oid(1), tid(6)) == (b'one', tid(1), tid(6))


def test_what_does_not_exist_is_not_cached(upkeep: Upkeep) -> None:
    upkeep.loaded((oid(2), tid(99)), None)
    assert list(upkeep.cache.contents()) == [(oid(1), tid(1), None)]


def test_without_a_database_the_cache_is_kept_up(upkeep: Upkeep) -> None:
    upkeep.database = None
    upkeep.invalidated(tid(6), [oid(1)])
    assert upkeep.cache.load(oid(1)) is None
    upkeep.settle(Verdict.DROP, tid(7), None, [])
    assert upkeep.cache.last_tid == tid(7)


def test_an_invalidation_at_the_start_of_a_revision_does_not_end_it(upkeep: Upkeep) -> None:
    """Some servers let a reply run ahead of the announcement of its own transaction."""
    upkeep.loaded((oid(2), tid(99)), (b'two', tid(6), None))
    upkeep.invalidated(tid(6), [oid(2)])
    assert upkeep.cache.loadBefore(oid(2), tid(7)) == (b'two', tid(6), None)


def test_a_commit_reaches_the_cache_then_the_callback_then_the_last_tid(upkeep: Upkeep) -> None:
    updates = Updates(1000)
    updates.store(oid(1), b'changed')
    seen: list[Any] = []
    upkeep.finished(tid(6), updates, lambda tid: seen.append(
        (tid, upkeep.cache.last_tid, upkeep.cache.load(oid(1)))))
    assert seen == [(tid(6), tid(5), (b'changed', tid(6)))]
    assert upkeep.cache.last_tid == tid(6)


def test_a_callback_that_fails_leaves_the_last_tid_where_it_was(upkeep: Upkeep) -> None:
    with pytest.raises(ZeroDivisionError):
        upkeep.finished(tid(6), Updates(1000), lambda tid: 1 // 0)
    assert upkeep.cache.last_tid == tid(5)


@pytest.mark.parametrize('answer', [None, b'', 'text', tid(5), tid(4), tid(6) + b'.'])
def test_a_commit_with_an_impossible_tid_is_an_error(upkeep: Upkeep, answer: Any) -> None:
    with pytest.raises(ProtocolError):
        upkeep.finished(answer, Updates(1000), None)
    assert upkeep.cache.last_tid == tid(5)


def test_an_invalidation_that_goes_back_is_an_error(upkeep: Upkeep) -> None:
    with pytest.raises(ProtocolError):
        upkeep.invalidated(tid(5), [oid(1)])
    assert upkeep.cache.load(oid(1)) is not None


def test_a_database_that_fails_to_invalidate_some_invalidates_all(
        upkeep: Upkeep, caplog: pytest.LogCaptureFixture) -> None:
    told = []

    class Failing:
        def invalidate(self, tid: bytes, oids: Any) -> None:
            raise TypeError('takes three')

        def invalidateCache(self) -> None:
            told.append('all')

    upkeep.database = Failing()
    upkeep.invalidated(tid(6), [oid(1)])
    assert told == ['all']
    assert 'takes three' in caplog.text


# ---- verification


def test_a_cache_that_is_up_to_date_is_kept_and_nobody_is_disturbed(upkeep: Upkeep) -> None:
    assert upkeep.judge(tid(5)) is Verdict.KEEP
    upkeep.settle(Verdict.KEEP, tid(5), None, [])
    assert upkeep.cache.load(oid(1)) == (b'one', tid(1))
    assert database(upkeep).told == []


def test_catching_up_drops_and_invalidates_exactly_what_changed(upkeep: Upkeep) -> None:
    upkeep.cache.store(oid(2), tid(2), None, b'two')
    assert upkeep.judge(tid(7)) is Verdict.CATCH_UP
    upkeep.settle(Verdict.CATCH_UP, tid(7), (tid(8), [oid(1)]), [])
    assert upkeep.cache.load(oid(1)) is None
    assert upkeep.cache.load(oid(2)) == (b'two', tid(2))
    assert database(upkeep).told == [(tid(8), [oid(1)])]
    assert database(upkeep).at_that_time == [(tid(5), None)]
    assert upkeep.cache.last_tid == tid(8)


@pytest.mark.parametrize('verdict, changes', [(Verdict.KEEP, None), (Verdict.CATCH_UP, (tid(5), []))])
def test_what_begins_or_ends_after_the_last_tid_is_not_believed(upkeep: Upkeep, verdict: Verdict, changes: Any) -> None:
    """It came from a database that may have been restored from a backup since."""
    for number in 2, 3:
        upkeep.cache.store(oid(number), tid(2), None, b'before')
    upkeep.cache.store(oid(4), tid(3), tid(5), b'ended')
    upkeep.cache.invalidate(tid(7), [oid(2)])
    upkeep.cache.store(oid(2), tid(7), None, b'given up')
    upkeep.cache.set_last_tid(tid(5))
    upkeep.settle(verdict, tid(5), changes, [])
    assert sorted(upkeep.cache.contents()) == [
        (oid(1), tid(1), None), (oid(3), tid(2), None), (oid(4), tid(3), tid(5))]
    assert database(upkeep).told == []


def test_without_an_answer_everything_is_dropped_before_the_last_tid_moves(
        upkeep: Upkeep, caplog: pytest.LogCaptureFixture) -> None:
    upkeep.settle(Verdict.CATCH_UP, tid(7), None, [])
    assert len(upkeep.cache) == 0
    assert database(upkeep).told == [('all',)]
    assert database(upkeep).at_that_time == [(tid(5), None)]
    assert upkeep.cache.last_tid == tid(7)
    assert 'Dropping what is cached (1 records)' in caplog.text


def test_without_an_answer_all_is_kept_in_doubt_as_long_as_one_can_inquire(upkeep: Upkeep) -> None:
    upkeep.settle(Verdict.CATCH_UP, tid(7), None, [], can_inquire=True)
    assert upkeep.cache.load(oid(1)) is None
    assert database(upkeep).told == [('all',)]
    assert database(upkeep).at_that_time == [(tid(5), None)]
    upkeep.settle(Verdict.KEEP, tid(7), None, [], can_inquire=True)
    assert list(upkeep.cache.suspects()) == [(oid(1), tid(1))]
    upkeep.settle(Verdict.KEEP, tid(7), None, [])
    assert list(upkeep.cache.suspects()) == []
    assert database(upkeep).told == [('all',)]


def test_what_was_put_aside_beyond_the_verified_tid_is_replayed_in_order(upkeep: Upkeep) -> None:
    upkeep.settle(Verdict.CATCH_UP, tid(7), (tid(8), [oid(3)]),
                  [(tid(7), [oid(1)]), (tid(8), [oid(1)]), (tid(9), [oid(1)]), (tid(10), [oid(4)])])
    assert database(upkeep).told == [(tid(8), [oid(3)]), (tid(9), [oid(1)]), (tid(10), [oid(4)])]
    assert upkeep.cache.last_tid == tid(10)
    assert upkeep.cache.loadBefore(oid(1), tid(9)) == (b'one', tid(1), tid(9))


def test_what_verification_has_covered_may_still_be_announced(upkeep: Upkeep) -> None:
    """Some servers answer ``getInvalidations`` ahead of announcements that the answer covers."""
    upkeep.settle(Verdict.CATCH_UP, tid(7), (tid(8), [oid(1)]), [])
    upkeep.loaded((oid(2), tid(99)), (b'two', tid(2), None))
    upkeep.invalidated(tid(7), [oid(1)])
    upkeep.invalidated(tid(8), [oid(1), oid(2)])
    assert upkeep.cache.load(oid(2)) is None
    assert upkeep.cache.last_tid == tid(8)
    assert database(upkeep).told == [(tid(8), [oid(1)])]
    upkeep.invalidated(tid(9), [oid(1)])
    with pytest.raises(ProtocolError):
        upkeep.invalidated(tid(9), [oid(1)])


def test_a_cache_newer_than_the_server_is_refused_and_kept(upkeep: Upkeep) -> None:
    with pytest.raises(CacheIsNewer):
        upkeep.judge(tid(4))
    assert upkeep.cache.load(oid(1)) == (b'one', tid(1))
    assert upkeep.cache.last_tid == tid(5)


def test_starting_over_forgets_a_cache_newer_than_the_server(upkeep: Upkeep) -> None:
    upkeep.start_over = True
    verdict = upkeep.judge(tid(4))
    upkeep.settle(verdict, tid(4), None, [])
    assert len(upkeep.cache) == 0
    assert upkeep.cache.last_tid == tid(4)
    assert database(upkeep).told == [('all',)]


def test_the_first_connection_of_an_empty_cache_sets_the_last_tid(upkeep: Upkeep) -> None:
    upkeep.cache.clear(z64)
    upkeep.settle(upkeep.judge(tid(4)), tid(4), None, [(tid(6), [oid(1)])])
    assert database(upkeep).told == [('all',), (tid(6), [oid(1)])]  # perhaps it failed to drop all when the cache did
    assert upkeep.cache.last_tid == tid(6)
