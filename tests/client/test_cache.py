"""The cache as its client sees it."""

import errno
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from ZODB.utils import p64, u64, z64

from tests.client.conftest import Calls
from tests.client.truth import FAR_FUTURE, SMALL, Truth, copied, knowledge, renew, teach
from zeo.client import cache as cache_module
from zeo.client import cachefile
from zeo.client.cache import ASIDE, ASIDE_SIZE, HOT_EXTRA, OWN_ASIDE, OWN_ASIDE_SIZE
from zeo.client.cache import Cache, CacheUnavailable, cache_path, open_cache
from zeo.client.cachefile import Log
from zeo.client.cacheledger import MOST_USED, MOVES

A, B, C = p64(1), p64(2), p64(3)
T1, T2, T3, T4 = p64(10), p64(20), p64(30), p64(40)
MB = 1024 * 1024


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / 'client@1.zec')


@pytest.fixture
def opened() -> Iterator[Callable[..., Cache]]:
    """Open caches that are closed at the end."""
    caches = []

    def opened(path: str | None = None, size: int = SMALL, **kw: Any) -> Cache:
        caches.append(open_cache(path, size, **kw))
        return caches[-1]

    yield opened
    for cache in caches:
        cache.close()


@pytest.fixture
def cache(opened: Callable[..., Cache], path: str) -> Cache:
    return opened(path)


# Revisions

def test_what_came_last_is_set_aside_and_can_be_found_there(opened: Callable[..., Cache]) -> None:
    cache = opened(None, MB)
    cache.store(A, T1, None, b'one')
    assert cache._aside and not cache._ledger.index
    assert cache.loadBefore(A, T2) == (b'one', T1, None)
    assert cache.loadBefore(A, T1) is None
    assert len(cache) == 1
    assert list(cache.contents()) == [(A, T1, None)]


def test_what_is_set_aside_can_be_ended_and_is_history_then(opened: Callable[..., Cache]) -> None:
    cache = opened(None, MB)
    cache.store(A, T1, None, b'one')
    cache.invalidate(T2, [A])
    assert cache.load(A) is None
    assert cache.loadBefore(A, T2) == (b'one', T1, T2)


def test_what_is_set_aside_is_not_replaced_by_something_older(opened: Callable[..., Cache]) -> None:
    cache = opened(None, MB)
    cache.store(A, T2, None, b'two')
    cache.store(A, T1, None, b'one')
    assert cache.load(A) == (b'two', T2)
    cache.store(A, T3, None, b'three')
    assert cache.load(A) == (b'three', T3)


def test_nothing_is_set_aside_that_contradicts_what_is_known(opened: Callable[..., Cache]) -> None:
    cache = opened(None, MB)
    cache.store(A, T2, None, b'two')
    cache.flush()
    cache.store(A, T1, None, b'one')
    assert not cache._aside
    assert cache.load(A) == (b'two', T2)


def test_no_more_is_set_aside_than_may_be(opened: Callable[..., Cache]) -> None:
    cache = opened(None, 20 * MB)
    for oid in range(1000):
        cache.store(p64(oid), T1, None, bytes(oid * 30))
        assert len(cache._aside) <= ASIDE
        assert sum(len(data) for data, _, _ in cache._aside.values()) <= ASIDE_SIZE
    assert held(cache, range(1000)) == 1000


def test_many_that_come_together_are_found_like_those_that_come_singly(opened: Callable[..., Cache]) -> None:
    together, singly = opened(None, MB), opened(None, MB)
    for cache in together, singly:
        cache.store(p64(1), T2, None, b'known')
        cache.flush()
        cache.store(p64(2), T1, None, b'aside')
        cache.store(p64(3), T1, T2, b'past')
        cache.flush()
        cache.store(p64(4), T2, None, b'aside')
    for first in range(0, 200, 10):
        many = [(p64(oid), (bytes(oid), T1 if oid % 7 else T2, T3 if oid % 25 == 24 else None))
                for oid in (*range(first, first + 10), first + 3)]
        together.store_all(many)
        for oid, (data, start, end) in many:
            singly.store(oid, start, end, data)
        assert len(together._aside) <= ASIDE
    assert sorted(together.contents()) == sorted(singly.contents())
    for oid in range(200):
        for tid in T2, T3, FAR_FUTURE:
            assert together.loadBefore(p64(oid), tid) == singly.loadBefore(p64(oid), tid)


def test_many_that_come_together_are_set_aside_in_one_step_and_no_more_than_may_be(
        opened: Callable[..., Cache]) -> None:
    cache = opened(None, 20 * MB)
    for first in range(0, 1000, 50):
        cache.store_all([(p64(oid), (bytes(oid * 5), T1, None)) for oid in range(first, first + 50)])
        assert len(cache._aside) <= ASIDE
        assert sum(map(len, (data for data, _, _ in cache._aside.values()))) == cache._aside_size <= ASIDE_SIZE
        assert p64(first + 49) in cache._aside
    assert held(cache, range(1000)) == 1000
    cache.close()
    cache.store_all([(A, (b'one', T1, None))])
    assert not cache._aside and not len(cache)


def test_of_many_that_come_together_none_is_set_aside_that_is_over_or_too_long(opened: Callable[..., Cache]) -> None:
    cache = opened(None)
    cache.store_all([(A, (b'one', T1, T2))])
    assert not cache._aside and cache.loadBefore(A, FAR_FUTURE) is None and cache.loadBefore(A, T2) == (b'one', T1, T2)
    cache.store_all([(C, (b'three', T1, None)), (B, (bytes(1000), T1, None))])
    cache.flush()
    assert cache.load(A) is cache.load(B) is None and cache.load(C) == (b'three', T1)


def test_however_many_come_together_no_more_is_set_aside_than_may_be(opened: Callable[..., Cache]) -> None:
    cache = opened(None, 20 * MB)
    cache.store_all([(p64(oid), (b'', T1, None)) for oid in range(2 * ASIDE)])
    assert len(cache._aside) <= ASIDE
    for first in range(1000, 1100, 10):
        cache.store_all([(p64(oid), (bytes(10000), T1, None)) for oid in range(first, first + 10)])
        assert cache._aside_size <= ASIDE_SIZE
    assert held(cache, range(2 * ASIDE)) == 2 * ASIDE and held(cache, range(1000, 1100)) == 100


def test_many_that_come_together_replace_nothing_newer(opened: Callable[..., Cache]) -> None:
    for put_away in True, False:
        cache = opened(None, MB)
        cache.store(A, T2, None, b'two')
        if put_away:
            cache.flush()
        cache.store_all([(B, (b'other', T1, None)), (A, (b'one', T1, None))])
        assert cache.load(A) == (b'two', T2) and cache.load(B) == (b'other', T1)


def test_what_is_set_aside_is_in_the_file_after_a_close(opened: Callable[..., Cache], path: str) -> None:
    cache = opened(path, MB)
    cache.store(A, T1, None, b'one')
    assert cache._aside
    cache.close()
    assert cache.load(A) is None
    assert opened(path, MB).load(A) == (b'one', T1)


def test_an_interruption_while_it_is_put_away_leaves_an_empty_cache(
        opened: Callable[..., Cache], monkeypatch: Any) -> None:
    cache = opened(None, MB)
    cache.store(A, T1, None, b'one')
    cache.store(B, T1, None, b'two')

    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(cache._log, 'append', interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.invalidate(T2, [A])
    assert len(cache) == 0
    assert cache.load(A) is cache.load(B) is None


def test_a_transaction_ends_what_it_changes_and_brings_the_new_records(opened: Callable[..., Cache]) -> None:
    cache = opened(None, MB)
    cache.store(A, T1, None, b'one')
    cache.store(B, T1, None, b'other')
    renew(cache, T2, [A, B, C], {A: b'two', C: b'new'})
    assert cache.load(A) == (b'two', T2)
    assert cache.loadBefore(A, T2) == (b'one', T1, T2)
    assert cache.load(B) is None
    assert cache.loadBefore(B, T2) == (b'other', T1, T2)
    assert cache.load(C) == (b'new', T2)
    assert cache.last_tid == z64


def test_a_transaction_whose_records_cannot_be_read_leaves_an_empty_cache(opened: Callable[..., Cache]) -> None:
    def records() -> Iterator[tuple[bytes, bytes]]:
        yield A, b'two'
        raise ValueError('closed')

    cache = opened(None, MB)
    cache.store(A, T1, None, b'one')
    with pytest.raises(ValueError, match='closed'):
        cache.renew(T2, dict.fromkeys([A, B]), records)
    assert list(cache.contents()) == []
    assert cache.load(A) is None


def test_a_transaction_is_in_the_file_after_a_kill(
        opened: Callable[..., Cache], path: str, tmp_path: Path) -> None:
    cache = opened(path, MB)
    cache.store(A, T1, None, b'one')
    renew(cache, T2, [A, B], {A: b'two'})
    cache.flush()
    again = copied(cache, tmp_path / 'copy.zec', MB)
    assert knowledge(again) == knowledge(cache)
    assert list(again.contents()) == [(A, T2, None), (A, T1, T2)]
    again.close()


def test_a_small_transaction_is_set_aside_and_hides_what_it_ends(opened: Callable[..., Cache]) -> None:
    cache = opened(None, MB)
    cache.store(A, T1, None, b'one')
    cache.flush()
    for _ in range(3):
        assert cache.load(A) == (b'one', T1)
    assert A in cache._hot
    renew(cache, T2, [A], {A: b'two'})
    assert list(cache._aside) == [A] and not cache._hot
    assert cache.load(A) == (b'two', T2)
    renew(cache, T3, [A, B], {A: b'three', B: b'new'})
    assert list(cache._aside) == [A, B] and len(cache) == 4
    assert cache.load(A) == (b'three', T3)
    assert cache.load(B) == (b'new', T3)
    assert cache.loadBefore(A, T3) == (b'two', T2, T3)
    assert not cache._aside
    assert cache.loadBefore(A, T2) == (b'one', T1, T2)
    assert cache.load(A) == (b'three', T3) and len(cache) == 4


def test_what_is_loaded_anew_is_set_aside_beside_its_history(opened: Callable[..., Cache]) -> None:
    cache = opened(None, MB)
    cache.store(A, T1, None, b'one')
    cache.invalidate(T3, [A])
    cache.store(A, T2, None, b'wrong')      # there can be no such thing
    assert not cache._aside and cache.load(A) is None
    cache.store(A, T3, None, b'three')
    assert list(cache._aside) == [A]
    assert cache.load(A) == (b'three', T3)
    assert cache.loadBefore(A, T3) == (b'one', T1, T3)
    assert cache.load(A) == (b'three', T3) and not cache._aside


def test_a_small_transaction_ends_what_was_set_aside_before(opened: Callable[..., Cache]) -> None:
    cache = opened(None, MB)
    cache.store(A, T1, None, b'one')
    renew(cache, T2, [A], {A: b'two'})
    assert cache.load(A) == (b'two', T2)
    assert cache.loadBefore(A, T2) == (b'one', T1, T2)
    cache.invalidate(T3, [A])
    assert cache.load(A) is None
    assert cache.loadBefore(A, T3) == (b'two', T2, T3)


def test_a_small_transaction_ends_a_suspect(opened: Callable[..., Cache]) -> None:
    cache = opened(None, MB)
    cache.store(A, T1, None, b'one')
    cache.suspect_all()
    renew(cache, T2, [A], {A: b'two'})
    cache.confirm(T3, [A])
    assert cache.load(A) == (b'two', T2)
    assert list(cache.suspects()) == [] and cache.loadBefore(A, T2) is None


def test_a_transaction_that_is_older_than_what_is_known_changes_nothing_of_that(opened: Callable[..., Cache]) -> None:
    cache = opened(None, MB)
    cache.store(A, T3, None, b'three')
    renew(cache, T2, [A, B], {B: b'new', A: b'two'})
    assert cache.load(A) == (b'three', T3) and cache.load(B) == (b'new', T2)
    cache.flush()
    renew(cache, T2, [A], {A: b'two'})
    assert cache.load(A) == (b'three', T3)


def test_no_more_transactions_are_set_aside_than_may_be(opened: Callable[..., Cache]) -> None:
    cache = opened(None, 100 * MB)
    for number in range(1, 600):
        records = {p64(number % 7 + each): bytes(number * 4) for each in range(number % 270)}
        renew(cache, p64(number), records, records)
        assert len(cache._aside) + len(cache._former) <= OWN_ASIDE
        assert cache._aside_size <= OWN_ASIDE_SIZE
        for oid, record in records.items():
            assert cache.load(oid) == (record, p64(number))


def test_much_that_is_set_aside_is_put_away_when_there_is_time(opened: Callable[..., Cache]) -> None:
    cache = opened(None, MB)
    for number in range(1, ASIDE + 1):
        cache.make_ready()
        assert len(cache._aside) == number - 1
        renew(cache, p64(number), [p64(number)], {p64(number): b'record'})
    cache.make_ready()
    assert not cache._aside
    renew(cache, p64(ASIDE + 1), [A], {A: b'new'})
    for number in range(ASIDE):
        renew(cache, p64(ASIDE + 2 + number), [A], {A: b'newer'})
    assert len(cache._former) == ASIDE
    cache.make_ready()
    assert not cache._former and held(cache, range(1, ASIDE + 1)) == ASIDE


def test_a_transaction_that_is_set_aside_when_the_last_tid_moves_is_in_the_file_first(
        opened: Callable[..., Cache], path: str, tmp_path: Path) -> None:
    cache = opened(path, MB)
    cache.store(A, T1, None, b'one')
    cache.set_last_tid(T1)
    cache.flush()
    renew(cache, T2, [A], {A: b'two'})
    cache.set_last_tid(T2)
    assert cache._aside
    for flushed, last_tid, current in (False, T1, (b'one', T1)), (True, T2, (b'two', T2)):
        if flushed:
            cache.flush()
        found = copied(cache, tmp_path / 'copy.zec', MB)
        assert (found.last_tid, found.load(A)) == (last_tid, current)
        found.close()


def test_a_destructor_that_interrupts_a_transaction_cannot_make_it_forget_half_of_it(
        opened: Callable[..., Cache]) -> None:
    class Records(dict[bytes, bytes]):
        def items(self) -> Any:
            for each in super().items():
                yield each
                cache.flush()

    cache = opened(None, MB)
    cache.store(A, T1, None, b'one')
    cache.store(B, T1, None, b'one')
    with pytest.raises(RuntimeError):
        cache.renew(T2, Records({A: b'two', B: b'two'}), dict)
    assert len(cache) == 0 and cache.load(A) is cache.load(B) is None


def test_who_closes_in_the_middle_of_a_transaction_leaves_a_file_that_is_right(
        opened: Callable[..., Cache], path: str) -> None:
    class Records(dict[bytes, bytes]):
        def items(self) -> Any:
            for each in super().items():
                yield each
                cache.close()

    cache = opened(path, MB)
    cache.store(A, T1, None, b'one')
    cache.store(B, T1, None, b'one')
    cache.set_last_tid(T1)
    cache.flush()
    renew(cache, T2, [A], {A: b'two'})
    cache.set_last_tid(T2)
    cache.renew(T3, Records({B: b'three', A: b'three'}), dict)
    assert cache.load(A) is None
    cache = opened(path, MB)
    assert cache.last_tid < T2 and cache.load(A) in (None, (b'one', T1))


def test_what_others_change_does_not_disturb_what_is_set_aside_unless_it_is_that(
        opened: Callable[..., Cache]) -> None:
    cache = opened(None, MB)
    cache.store(A, T1, None, b'one')
    cache.invalidate(T2, [B, C])
    assert cache._aside and cache.load(A) == (b'one', T1)
    cache.invalidate(T3, [B, A])
    assert not cache._aside and cache.load(A) is None
    assert cache.loadBefore(A, T3) == (b'one', T1, T3)


def test_a_moving_last_tid_disturbs_nothing(opened: Callable[..., Cache]) -> None:
    cache = opened(None, MB)
    cache.store(A, T1, None, b'one')
    cache.store(B, T1, None, b'other')
    cache.flush()
    for _ in range(3):
        cache.load(A)
    cache.store(C, T1, None, b'new')
    cache.set_last_tid(T2)
    assert A in cache._hot and C in cache._aside
    assert cache.load(A) == (b'one', T1) and cache.load(C) == (b'new', T1)
    assert cache.last_tid == T2


def test_a_kill_takes_the_last_tid_back_only_by_so_many_transactions(
        opened: Callable[..., Cache], path: str, tmp_path: Path) -> None:
    cache = opened(path, MB)
    for number in range(1, 3 * MOVES):
        cache.set_last_tid(p64(number))
        found = copied(cache, tmp_path / 'copy.zec', MB)
        assert number - MOVES <= u64(found.last_tid) <= number
        found.close()
    cache.flush()
    found = copied(cache, tmp_path / 'copy.zec', MB)
    assert found.last_tid == cache.last_tid
    found.close()


def test_what_others_change_is_looked_for_when_nobody_stores_it_any_more(opened: Callable[..., Cache]) -> None:
    cache = opened(None, MB)
    mutex = cache._mutex

    class Contended:
        """Another thread was a little faster."""

        def __enter__(self) -> None:
            cache._mutex = mutex
            cache.store(A, T1, None, b'one')
            mutex.acquire()

        def __exit__(self, *_: object) -> None:
            mutex.release()

    cache._mutex = Contended()      # type: ignore[assignment]
    cache.invalidate(T2, [A])
    assert cache.load(A) is None and cache.loadBefore(A, T2) == (b'one', T1, T2)


def test_a_suspect_that_others_change_is_forgotten(opened: Callable[..., Cache]) -> None:
    cache = opened(None, MB)
    cache.store(A, T1, None, b'one')
    cache.suspect_all()
    cache.invalidate(T2, [A])
    assert list(cache.suspects()) == []


def test_a_stored_revision_is_loaded(cache: Cache) -> None:
    cache.store(A, T1, None, b'data')
    assert cache.load(A) == (b'data', T1)
    assert cache.loadBefore(A, T2) == (b'data', T1, None)
    assert cache.loadBefore(A, T1) is None
    assert cache.load(B) is None and cache.loadBefore(B, T2) is None
    assert len(cache) == 1


def test_revisions_of_the_past_are_found_by_the_tid_they_shall_be_older_than(cache: Cache) -> None:
    cache.store(A, T1, T2, b'one')
    cache.store(A, T3, None, b'three')
    cache.store(A, T2, T3, b'two')
    assert cache.loadBefore(A, T1) is None
    assert cache.loadBefore(A, p64(11)) == cache.loadBefore(A, T2) == (b'one', T1, T2)
    assert cache.loadBefore(A, T3) == (b'two', T2, T3)
    assert cache.loadBefore(A, T4) == (b'three', T3, None)
    assert sorted(cache.contents(), key=repr) == [(A, T1, T2), (A, T2, T3), (A, T3, None)]


def test_an_empty_record_is_a_record(cache: Cache) -> None:
    cache.store(A, T1, None, b'')
    cache.flush()
    assert cache.load(A) == (b'', T1)


def test_an_invalidated_revision_is_history(cache: Cache) -> None:
    cache.store(A, T1, None, b'one')
    cache.invalidate(T2, [A, B])
    assert cache.load(A) is None
    assert cache.loadBefore(A, T2) == (b'one', T1, T2)


def test_a_revision_whose_end_is_unknown_is_forgotten(cache: Cache) -> None:
    cache.store(A, T1, None, b'one')
    cache.invalidate(None, [A])
    assert list(cache.contents()) == []


@pytest.mark.parametrize('tid', [T2, T1])
def test_an_invalidation_that_says_what_is_known_changes_nothing_in_memory_and_file(
        cache: Cache, tmp_path: Path, tid: bytes) -> None:
    cache.store(A, T2, None, b'ahead of its invalidation')
    cache.invalidate(tid, [A])
    cache.set_last_tid(tid)
    cache.flush()
    assert cache.load(A) == (b'ahead of its invalidation', T2)
    reopened = copied(cache, tmp_path / 'copy.zec')
    assert reopened.load(A) == (b'ahead of its invalidation', T2)
    cache.invalidate(T3, [A])
    cache.flush()
    reopened.close()
    reopened = copied(cache, tmp_path / 'copy.zec')
    assert reopened.load(A) is None
    assert reopened.loadBefore(A, T3) == (b'ahead of its invalidation', T2, T3)
    reopened.close()


def test_a_reply_ahead_of_its_invalidation_ends_the_older_revision_for_good(cache: Cache, tmp_path: Path) -> None:
    cache.store(A, T1, None, b'old')
    cache.store(A, T2, None, b'new')
    cache.invalidate(T2, [A])
    cache.invalidate(T3, [A])
    cache.set_last_tid(T3)
    assert cache.load(A) is None
    cache.flush()
    reopened = copied(cache, tmp_path / 'copy.zec')
    assert knowledge(reopened) == knowledge(cache)
    reopened.close()


def test_older_knowledge_does_not_replace_newer(cache: Cache) -> None:
    cache.store(A, T3, None, b'three')
    cache.store(A, T1, None, b'one, from an answer that comes late')
    assert cache.load(A) == (b'three', T3)
    cache.invalidate(T4, [A])
    cache.store(A, T3, None, b'three')
    assert cache.load(A) is None


def test_what_is_known_is_not_written_again(cache: Cache) -> None:
    cache.store(A, T1, None, b'one')
    cache.store(B, T1, T2, b'two')
    cache.flush()
    before = Path(cache.path or '').read_bytes()
    cache.store(A, T1, None, b'one')
    cache.store(B, T1, T2, b'two')
    cache.invalidate(T3, [C])
    cache.drop([C])
    cache.confirm(T3, [A])
    cache.set_last_tid(z64)
    cache.flush()
    assert Path(cache.path or '').read_bytes() == before


def test_a_known_current_revision_can_be_told_its_end(cache: Cache, tmp_path: Path) -> None:
    cache.store(A, T1, None, b'one')
    cache.store(A, T1, T2, b'one')
    assert cache.load(A) is None
    assert cache.loadBefore(A, T2) == (b'one', T1, T2)
    cache.flush()
    reopened = copied(cache, tmp_path / 'copy.zec')
    assert knowledge(reopened) == knowledge(cache)
    reopened.close()


def test_nonsense_is_refused_and_leaves_the_rest_alone(cache: Cache) -> None:
    cache.store(A, T1, None, b'one')
    for oid, start, end in (b'short', T1, None), (A, b'long' * 3, None), (A, T1, b''):
        with pytest.raises(ValueError):
            cache.store(oid, start, end, b'')
    with pytest.raises(TypeError):
        cache.store(B, T1, None, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError):
        cache.invalidate(T2, [A, b'short'])
    cache.store(B, T2, T2, b'ends where it starts')
    assert cache.loadBefore(b'', T2) is cache.loadBefore(A, b'') is cache.loadBefore(b'\1', T2) is None
    assert cache.loadBefore(b'\1' * 9, T2) is None
    assert list(cache.contents()) == [(A, T1, None)]


# Last tid, clearing

def test_the_last_tid_does_not_go_back(cache: Cache) -> None:
    assert cache.last_tid == z64
    cache.set_last_tid(T2)
    cache.set_last_tid(T2)
    with pytest.raises(ValueError):
        cache.set_last_tid(T1)
    assert cache.last_tid == T2
    cache.clear(T1)
    assert cache.last_tid == T1


def test_clearing_forgets_everything(cache: Cache, tmp_path: Path) -> None:
    cache.store(A, T1, T2, b'one')
    cache.store(A, T2, None, b'two')
    cache.suspect_all()
    cache.clear(T3)
    assert knowledge(cache) == (T3, [], []) and len(cache) == 0
    cache.store(B, T1, None, b'new')
    cache.flush()
    reopened = copied(cache, tmp_path / 'copy.zec')
    assert knowledge(reopened) == (T3, [(B, T1, None)], [])
    reopened.close()


def test_clearing_has_forgotten_everything_when_the_last_tid_moves(cache: Cache, monkeypatch: Any) -> None:
    cache.store(A, T1, None, b'one')
    known = []
    start_over = cache._ledger.start_over

    def starting_over(last_tid: int) -> None:
        known.append((last_tid, len(cache._ledger.index)))
        start_over(last_tid)

    monkeypatch.setattr(cache._ledger, 'start_over', starting_over)
    cache.clear(T3)
    assert known == [(u64(T3), 0)]


# Suspects

def test_suspects_are_served_once_they_are_confirmed(cache: Cache) -> None:
    cache.store(A, T1, None, b'one')
    cache.store(B, T1, None, b'two')
    cache.store(C, T1, T2, b'history')
    cache.suspect_all()
    assert cache.load(A) is None and cache.loadBefore(A, T2) is None
    assert cache.loadBefore(C, T2) is None
    assert sorted(cache.suspects()) == [(A, T1), (B, T1)]
    cache.confirm(T3, [A])
    assert cache.load(A) == (b'one', T1)
    assert list(cache.suspects()) == [(B, T1)]
    assert len(cache) == 2


def test_a_suspect_is_served_when_it_is_loaded_anew(cache: Cache) -> None:
    cache.store(A, T1, None, b'one')
    cache.store(B, T1, None, b'two')
    cache.store(C, T1, None, b'three')
    cache.suspect_all()
    cache.store(A, T1, None, b'one')
    cache.store(B, T1, T2, b'two')
    cache.store(C, T3, None, b'new')
    assert cache.load(A) == (b'one', T1)
    assert cache.loadBefore(B, T2) == (b'two', T1, T2)
    assert cache.load(C) == (b'new', T3)
    assert list(cache.suspects()) == []


def test_a_suspect_that_is_invalidated_cannot_be_confirmed(cache: Cache) -> None:
    cache.store(A, T1, None, b'one')
    cache.suspect_all()
    cache.invalidate(T3, [A])
    cache.confirm(T2, [A])
    assert knowledge(cache) == (z64, [], [])


def test_dropping_suspects_leaves_alone_what_is_confirmed(cache: Cache) -> None:
    for oid in A, B:
        cache.store(oid, T1, None, b'one')
    cache.suspect_all()
    cache.confirm(T2, [A])
    cache.drop_suspects([A, B])
    assert cache.load(A) == (b'one', T1)
    assert list(cache.suspects()) == []


def test_what_is_set_aside_is_forgotten_if_it_begins_after_the_last_tid(cache: Cache) -> None:
    cache.set_last_tid(T2)
    cache.store(A, T2, None, b'two')
    cache.store(B, T3, None, b'three')
    cache.forget_later()
    assert cache.load(A) == (b'two', T2) and cache.load(B) is None


def test_suspects_are_still_suspect_after_a_restart(opened: Callable[..., Cache], path: str) -> None:
    cache = opened(path)
    cache.store(A, T1, None, b'one')
    cache.store(B, T1, None, b'two')
    cache.suspect_all()
    cache.confirm(T2, [B])
    cache.set_last_tid(T3)
    cache.close()
    cache = opened(path)
    assert knowledge(cache) == (T3, [(B, T1, None)], [(A, T1)])


def test_history_that_is_in_doubt_does_not_come_back(
        opened: Callable[..., Cache], path: str, tmp_path: Path) -> None:
    cache = opened(path)
    cache.store(A, T1, T2, b'one')
    cache.suspect_all()
    cache.set_last_tid(T3)
    assert cache.loadBefore(A, T2) is None
    cache.flush()
    killed = copied(cache, tmp_path / 'killed.zec')
    assert killed.loadBefore(A, T2) is None
    killed.close()
    cache.close()
    assert opened(path).loadBefore(A, T2) is None


# Size

def fill(cache: Cache, first: int, number: int, size: int = 100) -> None:
    for oid in range(first, first + number):
        cache.store(p64(oid), T1, None, bytes(size))


def held(cache: Cache, oids: range) -> int:
    current = {oid for oid, _, end in cache.contents() if end is None}
    return sum(p64(oid) in current for oid in oids)


def test_the_file_never_gets_longer_than_asked_for(cache: Cache, path: str) -> None:
    for oid in range(2000):
        cache.store(p64(oid), T1, None, bytes(oid % 300))
        cache.invalidate(T2, [p64(oid)])
    cache.flush()
    assert SMALL * 0.8 < os.path.getsize(path) <= SMALL
    cache.close()
    assert SMALL * 0.8 < os.path.getsize(path) <= SMALL


def test_most_of_the_file_is_used(opened: Callable[..., Cache]) -> None:
    cache = opened(None, 1 << 20)
    fill(cache, 0, 2000, 1000)
    assert len(cache) * 1000 > 0.8 * (1 << 20)


def test_a_record_longer_than_a_segment_is_not_cached(cache: Cache) -> None:
    cache.store(A, T1, None, b'one')
    cache.store(B, T1, None, bytes(1000))
    cache.store(A, T2, None, bytes(1000))
    cache.invalidate(T2, [A])
    assert list(cache.contents()) == [(A, T1, T2)]


def test_the_longest_record_is_cached_among_records_that_are_used(cache: Cache) -> None:
    for number in range(200):
        cache.store(p64(number), T1, None, bytes(100))
        cache.load(p64(number))
    longest = bytes(512 - 32 - 20 - 20 - 20)
    for number in range(1000, 1030):
        cache.store(p64(number), T1, None, longest)
        assert cache.load(p64(number)) == (longest, T1)
    cache.store(A, T2, None, longest + b'.')
    assert cache.loadBefore(A, FAR_FUTURE) is None


def test_a_scan_does_not_throw_out_what_is_used(opened: Callable[..., Cache]) -> None:
    size = 1 << 20
    cache = opened(None, size)
    hot = range(size // 4 // 1100)
    fill(cache, 0, len(hot), 1024)
    for _ in range(3):
        for oid in hot:
            assert cache.load(p64(oid))
    for number in range(1000, 1000 + 2 * size // 1100):     # each once, twice as much as fits
        fill(cache, number, 1, 1024)
    assert held(cache, hot) > 0.95 * len(hot)


def test_what_is_not_used_any_more_makes_room(opened: Callable[..., Cache]) -> None:
    cache = opened(None, 1 << 16)       # some 400 records
    former, latter = range(100), range(1000, 1100)
    others = count(10_000)
    for generation in former, latter:
        for _ in range(20):
            for oid in generation:
                if cache.load(p64(oid)) is None:
                    fill(cache, oid, 1)
                fill(cache, next(others), 1)
    assert held(cache, latter) > 0.9 * len(latter)
    assert held(cache, former) == 0


def test_new_objects_get_in_though_all_are_in_use(opened: Callable[..., Cache]) -> None:
    cache = opened(None, 1 << 16)
    fill(cache, 0, 1000)
    begun = cache._log.begun
    for number in range(1000, 2000):
        for oid, _, _ in list(cache.contents()):
            cache.load(oid)
        fill(cache, number, 1)
        assert cache.load(p64(number))
    segments_filled = 1000 * 160 / cache._log.segment
    assert cache._log.begun - begun < 6 * segments_filled


def test_a_cache_may_be_as_small_as_one_likes_to_say(opened: Callable[..., Cache]) -> None:
    cache = opened(None, 0)
    fill(cache, 0, 100)
    assert len(cache) > 0


# The file

def test_a_closed_cache_is_found_again(opened: Callable[..., Cache], path: str, caplog: Any) -> None:
    cache, truth = opened(path), Truth()
    for _ in range(5):
        cache.invalidate(truth.commit(A, B), [A, B])
        teach(cache, truth, A)
        cache.set_last_tid(truth.last_tid)
    known = knowledge(cache)
    cache.close()
    with caplog.at_level(logging.INFO):
        cache = opened(path)
    assert knowledge(cache) == known
    truth.check(cache)
    [message] = caplog.messages
    assert '5 revisions' in message and 'not closed' not in message


def test_what_was_flushed_survives_a_kill(opened: Callable[..., Cache], path: str, tmp_path: Path, caplog: Any) -> None:
    script = f"""
import os, signal
from zeo.client.cache import open_cache
cache = open_cache({path!r}, {SMALL})
cache.store({A!r}, {T1!r}, None, b'one')
cache.set_last_tid({T2!r})
cache.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, '-c', script], timeout=60).returncode == -9
    with caplog.at_level(logging.INFO):
        cache = opened(path)
    assert 'not closed' in caplog.text
    assert cache.load(A) == (b'one', T1) and cache.last_tid == T2


def test_a_temporary_cache_leaves_nothing_behind(opened: Callable[..., Cache], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
    cache = opened(None)
    fill(cache, 0, 100)
    cache.flush()
    assert cache.path is None and cache.load(p64(99))
    assert os.listdir(tmp_path) == []


def test_a_closed_cache_is_empty_and_ignores_what_it_is_told(cache: Cache) -> None:
    cache.store(A, T1, None, b'one')
    cache.close()
    cache.close()
    cache.store(A, T1, None, b'one')
    cache.invalidate(T2, [A])
    cache.set_last_tid(T3)
    cache.clear()
    cache.flush()
    assert cache.load(A) is None and len(cache) == 0 and list(cache.contents()) == []


def test_another_size_keeps_what_fits(opened: Callable[..., Cache], path: str) -> None:
    cache = opened(path)
    fill(cache, 0, 40)
    cache.close()
    cache = opened(path, SMALL * 2)
    assert held(cache, range(40)) == 40
    fill(cache, 100, 40)
    assert held(cache, range(40)) == 40
    cache.close()
    cache = opened(path, SMALL)
    assert len(cache) > 0 and os.path.getsize(path) <= SMALL
    for oid, _, _ in list(cache.contents()):
        assert cache.load(oid) == (bytes(100), T1)
    cache.close()
    assert len(opened(path, SMALL * 1000)) == 0


def test_restarting_often_does_not_wear_out_the_contents(opened: Callable[..., Cache], path: str) -> None:
    size = 1 << 16
    cache = opened(path, size)
    fill(cache, 0, 400)
    for number in range(100):
        cache.set_last_tid(p64(1000 + number))
        cache.close()
        cache = opened(path, size)
    assert held(cache, range(400)) > 300


def test_a_file_of_another_storage_is_not_believed(opened: Callable[..., Cache], path: str, caplog: Any) -> None:
    cache = opened(path, storage='one')
    cache.store(A, T1, None, b'one')
    cache.set_last_tid(T2)
    cache.close()
    cache = opened(path, storage='two')
    assert knowledge(cache) == (z64, [], [])
    assert [record.levelname for record in caplog.records] == ['WARNING']
    assert 'another storage' in caplog.text


def test_a_file_of_another_server_is_not_believed(opened: Callable[..., Cache], path: str) -> None:
    cache = opened(path)
    cache.store(A, T1, None, b'one')
    cache.set_server('first')       # nobody knew before: keeps what it has
    cache.close()
    cache = opened(path)
    cache.allow_servers(['zeroth', 'first'])
    assert cache.load(A) == (b'one', T1)
    cache.set_server('zeroth')      # its stand-in
    assert cache.load(A) == (b'one', T1)
    cache.allow_servers(['first', 'second'])
    assert knowledge(cache) == (z64, [], [])
    cache.close()
    cache = opened(path)
    assert knowledge(cache) == (z64, [], [])


def test_a_cache_that_came_from_another_server_knows_no_tid_and_no_server(
        opened: Callable[..., Cache], path: str, caplog: Any, tmp_path: Path) -> None:
    cache = opened(path)
    cache.set_server('first')
    cache.store(A, T1, None, b'one')
    cache.set_last_tid(T2)
    cache.flush()
    found = copied(cache, tmp_path / 'copy.zec')    # the server's name is in the file of one that was killed
    found.allow_servers(['second'])
    assert knowledge(found) == (z64, [], [])
    assert len([message for message in caplog.messages if 'another server' in message]) == 1
    found.allow_servers(['third'])
    found.close()
    assert len([message for message in caplog.messages if 'another server' in message]) == 1


def test_a_cache_that_forgot_all_leaves_the_file_to_the_server_it_has_from(
        cache: Cache, monkeypatch: Any, path: str) -> None:
    cache.set_server('first')
    cache.store(A, T1, None, b'one')
    cache.flush()
    cache.store(B, T1, None, b'two')
    switch = refusing(monkeypatch)
    switch(True)
    cache.flush()
    switch(False)
    before = Path(path).read_bytes()
    cache.set_server('second')
    assert Path(path).read_bytes() == before


# Whose file it is

def test_a_second_client_gets_a_temporary_cache_and_a_warning(
        cache: Cache, opened: Callable[..., Cache], path: str, caplog: Any) -> None:
    cache.store(A, T1, None, b'one')
    second = opened(path)
    assert second.path is None and second.load(A) is None
    second.store(B, T1, None, b'two')
    [record] = caplog.records
    assert record.levelname == 'WARNING' and path in record.message and 'another client' in record.message
    cache.flush()
    assert cache.load(A) == (b'one', T1) and cache.load(B) is None


def test_a_second_client_that_insists_gets_an_error(cache: Cache, path: str) -> None:
    with pytest.raises(CacheUnavailable, match='another client'):
        open_cache(path, SMALL, strict=True)


def test_the_file_is_free_when_its_client_closes_even_if_a_child_has_it_still(
        opened: Callable[..., Cache], path: str) -> None:
    cache = opened(path)
    copy = os.dup(cache._log._fd)
    try:
        cache.close()
        assert opened(path, strict=True).path == path
    finally:
        os.close(copy)


def test_a_forked_child_leaves_file_and_lock_to_its_parent(
        cache: Cache, opened: Callable[..., Cache], path: str, tmp_path: Path) -> None:
    cache.store(A, T1, None, b'one')
    with cache._mutex:      # as a thread may hold it that does not exist in the child
        child = os.fork()
    if child == 0:
        status = 1
        try:
            cache.abandon()
            cache.store(B, T1, None, b'from the child')
            cache.close()
            if cache.load(A) is None and open_cache(path, SMALL).path is None:
                status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert opened(path).path is None
    cache.flush()
    reopened = copied(cache, tmp_path / 'copy.zec')
    assert knowledge(reopened) == knowledge(cache)
    reopened.close()


def test_a_forked_child_does_not_wait_for_a_thread_that_it_has_not(
        cache: Cache, monkeypatch: Any, calls: Calls) -> None:
    begun, over = threading.Event(), threading.Event()

    def flush() -> None:
        begun.set()
        over.wait()

    monkeypatch.setattr(cache._ledger, 'flush', flush)
    changing = calls.start(cache.flush)
    begun.wait()
    try:
        cache.abandon()
        calls.start(cache.store, B, T1, None, b'from the child')()
        assert cache.load(B) is None
    finally:
        over.set()
        with pytest.raises(ValueError, match='closed file'):    # it is not there in a child
            changing()


def test_somebody_elses_file_is_not_touched(opened: Callable[..., Cache], tmp_path: Path, caplog: Any) -> None:
    precious = tmp_path / 'Data.fs'
    precious.write_bytes(b'FS30' + bytes(5000))
    cache = opened(str(precious))
    cache.store(A, T1, None, b'one')
    assert cache.load(A) and cache.path is None
    assert precious.read_bytes() == b'FS30' + bytes(5000)
    assert 'something else' in caplog.text


@pytest.mark.parametrize('make', [
    lambda path: path.mkdir(), lambda path: os.mkfifo(path), lambda path: path.symlink_to('/nowhere/at/all')],
    ids=['directory', 'pipe', 'dangling link'])
def test_what_cannot_be_a_cache_file_gives_a_temporary_cache(
        opened: Callable[..., Cache], tmp_path: Path, caplog: Any, make: Callable[[Path], None]) -> None:
    make(tmp_path / 'x.zec')
    cache = opened(str(tmp_path / 'x.zec'))
    cache.store(A, T1, None, b'one')
    assert cache.path is None and cache.load(A)
    assert len(caplog.messages) == 1
    with pytest.raises(CacheUnavailable):
        open_cache(str(tmp_path / 'x.zec'), SMALL, strict=True)


def test_without_any_file_nothing_is_cached(opened: Callable[..., Cache], monkeypatch: Any, caplog: Any) -> None:
    def no_file() -> None:
        raise OSError(errno.EMFILE, 'Too many open files')
    monkeypatch.setattr(cache_module, 'unnamed', no_file)
    cache = opened(None)
    fill(cache, 0, 2000)
    cache.set_last_tid(T2)
    cache.clear(T3)
    fill(cache, 0, 10)
    assert len(cache) == 0 and cache.last_tid == T3
    assert len(caplog.messages) == 1


def test_file_names_carry_client_and_storage(monkeypatch: Any) -> None:
    for name in 'ZEO_CLIENT', 'INSTANCE_HOME':
        monkeypatch.delenv(name, raising=False)
    assert cache_path('1') is None
    assert cache_path('1', 'zope', '/var') == '/var/zope@1.zec'
    assert cache_path('1', 'zope') == os.path.join(os.getcwd(), 'zope@1.zec')
    monkeypatch.setenv('INSTANCE_HOME', '/home/site')
    monkeypatch.setenv('ZEO_CLIENT', 'worker')
    assert cache_path('main') == '/home/site/var/worker@main.zec'
    assert cache_path('main', 'other') == '/home/site/var/other@main.zec'


def test_file_names_do_not_escape_and_do_not_collide() -> None:
    names = ['a', '../a', '/etc/a', 'a@b', 'a b', '..', 'ü', 'a\0b', '%2F', '/', 'b@a']
    paths = {cache_path(storage, client, '/var') for storage in names for client in names}
    assert len(paths) == len(names) ** 2
    assert {os.path.dirname(path or '') for path in paths} == {'/var'}
    assert all('\0' not in (path or '') for path in paths)


# What goes wrong

def refusing(monkeypatch: Any, error: int = errno.ENOSPC) -> Callable[[bool], None]:
    """A switch that lets all writing fail."""
    broken = False
    pwrite = os.pwrite

    def failing(fd: int, data: bytes, offset: int) -> int:
        if broken:
            raise OSError(error, os.strerror(error))
        return pwrite(fd, data, offset)

    def switch(value: bool) -> None:
        nonlocal broken
        broken = value

    monkeypatch.setattr(cachefile.os, 'pwrite', failing)
    return switch


def test_a_full_disk_costs_the_contents_and_one_line_in_the_log(
        cache: Cache, monkeypatch: Any, caplog: Any, tmp_path: Path) -> None:
    switch = refusing(monkeypatch)
    cache.store(A, T1, None, b'one')
    cache.set_last_tid(T2)
    cache.flush()
    switch(True)
    cache.store(B, T1, None, b'two')
    cache.flush()
    assert cache.load(A) is None and cache.load(B) is None
    for number in range(3):
        fill(cache, 0, cache_module.PAUSE)
        cache.invalidate(T3, [A])
        cache.flush()
    cache.set_last_tid(T3)
    assert cache.last_tid == T3
    [message] = caplog.messages
    assert 'No space left' in message


def test_a_cache_recovers_when_there_is_room_again(cache: Cache, monkeypatch: Any, tmp_path: Path) -> None:
    switch = refusing(monkeypatch)
    cache.store(A, T1, None, b'one')
    switch(True)
    cache.flush()
    cache.set_last_tid(T2)
    switch(False)
    fill(cache, 0, cache_module.PAUSE + 10)
    assert 0 < len(cache) < 20
    cache.flush()
    reopened = copied(cache, tmp_path / 'copy.zec')
    assert knowledge(reopened) == knowledge(cache) and reopened.last_tid == T2
    reopened.close()


def test_a_partial_write_is_a_full_disk(cache: Cache, monkeypatch: Any, tmp_path: Path) -> None:
    cache.store(A, T1, None, b'one')
    cache.set_last_tid(T1)
    cache.flush()
    pwrite = os.pwrite
    monkeypatch.setattr(cachefile.os, 'pwrite', lambda fd, data, offset: pwrite(fd, data[:-1], offset))
    cache.store(B, T1, None, b'two')
    cache.flush()
    assert len(cache) == 0
    monkeypatch.undo()
    reopened = copied(cache, tmp_path / 'copy.zec')
    assert list(reopened.contents()) == [(A, T1, None)]     # the prefix
    reopened.close()


def test_nothing_is_learned_while_the_disk_refuses(cache: Cache, monkeypatch: Any) -> None:
    switch = refusing(monkeypatch)
    cache.store(A, T1, None, b'one')
    switch(True)
    cache.flush()
    switch(False)
    renew(cache, T2, [A], {A: b'two'})
    cache.store_all([(B, (b'two', T1, None))])
    cache.store(C, T1, None, b'three')
    assert len(cache) == 0 and not cache._aside and not cache._ledger.index


def test_a_full_disk_at_the_end_is_told_unless_the_cache_is_temporary(
        opened: Callable[..., Cache], cache: Cache, monkeypatch: Any, caplog: Any) -> None:
    temporary = opened(None)
    for each in cache, temporary:
        each.store(A, T1, None, b'one')
        each.flush()
        each.set_last_tid(T2)
    refusing(monkeypatch)(True)
    temporary.close()
    assert not caplog.messages
    cache.close()
    [message] = caplog.messages
    assert 'what it learned last is lost' in message


def test_a_full_disk_at_the_start_does_not_stop_the_client(
        opened: Callable[..., Cache], path: str, monkeypatch: Any, caplog: Any) -> None:
    refusing(monkeypatch)(True)
    cache = opened(path)
    cache.store(A, T1, None, b'one')
    assert cache.load(A) is None
    assert len(caplog.messages) == 1


@pytest.mark.parametrize('interrupted', [
    'put', 'renew', 'evict', 'invalidate', 'drop', 'confirm', 'suspect_all', 'append', 'append_all', 'begin', 'flush', 'oldest'])
@pytest.mark.parametrize('before', [True, False])
def test_an_interrupted_change_leaves_nothing_that_could_be_wrong(
        cache: Cache, tmp_path: Path, monkeypatch: Any, interrupted: str, before: bool) -> None:
    """KeyboardInterrupt between any two steps: afterwards, and in the file, all is true."""
    truth = Truth()
    owner = cache._ledger.index if hasattr(cache._ledger.index, interrupted) else cache._log
    original = getattr(owner, interrupted)
    calls = 0

    def interrupt(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 30:
            if not before:
                original(*args)
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(owner, interrupted, interrupt)
    with pytest.raises(KeyboardInterrupt):
        for number in range(1000):
            oids = [p64(number % 7), p64(number % 11), p64(number % 70)]
            tid = truth.commit(*oids, size=100)
            if number % 3:
                cache.invalidate(tid, oids[:2])
            else:
                renew(cache, tid, oids[:2], {oids[0]: truth.revisions[oids[0]][-1][1]})
            cache.drop(oids[2:])
            cache.set_last_tid(tid)
            for oid in oids:
                teach(cache, truth, oid)
            cache.suspect_all()
            cache.confirm(tid, [oid for oid, start in cache.suspects() if truth.end(oid, start) is None])
            cache.flush()
    assert len(cache) == 0
    found = copied(cache, tmp_path / 'copy.zec')
    truth.check(found)
    found.close()
    for number in range(100):
        teach(cache, truth, p64(number))
    assert len(cache) > 0
    truth.check(cache)
    cache.flush()
    found = copied(cache, tmp_path / 'copy.zec')
    truth.check(found)
    assert knowledge(found) == knowledge(cache)
    found.close()


def test_a_signal_handler_may_close_the_cache_it_interrupts(cache: Cache, monkeypatch: Any) -> None:
    append = cache._log.append_all

    def closing(*args: Any) -> Any:
        cache.close()
        with pytest.raises(RuntimeError):
            cache.invalidate(T2, [A])
        return append(*args)

    monkeypatch.setattr(cache._log, 'append_all', closing)
    cache.store(A, T1, None, b'one')
    cache.flush()       # or it would only be set aside
    assert cache.load(A) is None
    assert cache._log._file.closed


@pytest.mark.parametrize('change', [
    lambda cache: cache.store(B, T1, None, b'two'),
    lambda cache: cache.store_all([(B, (b'two', T1, None))]),
    lambda cache: cache.invalidate(T2, [C]),
    lambda cache: cache.set_last_tid(T2),
    lambda cache: cache.renew(T2, {B: b'two'}, dict)])
def test_a_signal_handler_cannot_change_the_cache_it_interrupts(
        cache: Cache, monkeypatch: Any, change: Callable[[Cache], object]) -> None:
    append = cache._log.append_all

    def changing(*args: Any) -> Any:
        with pytest.raises(RuntimeError):
            change(cache)
        return append(*args)

    monkeypatch.setattr(cache._log, 'append_all', changing)
    cache.store(A, T1, None, b'one')
    cache.flush()
    assert knowledge(cache) == (z64, [(A, T1, None)], [])


def test_a_cache_whose_end_was_interrupted_ignores_what_it_is_told(cache: Cache, monkeypatch: Any) -> None:
    def interrupted(pause: int) -> None:
        raise KeyboardInterrupt

    cache.store(A, T1, None, b'one')
    with monkeypatch.context() as patch:
        patch.setattr(cache, '_forget_all', interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache.close()
    cache.store(B, T1, None, b'two')
    cache.store_all([(C, (b'three', T1, None))])
    cache.set_last_tid(T2)
    assert not cache._aside and cache.last_tid == z64


def test_what_an_earlier_round_left_in_its_place_is_not_taken_for_a_revision(
        opened: Callable[..., Cache], path: str, tmp_path: Path, caplog: Any) -> None:
    """After a power cut a file may have the page that was there before, whose checksums are right."""
    cache = opened(path)
    for oid in A, B:
        cache.store(oid, T2, None, b'new' * 100)
    cache.flush()
    content = b''.join(cachefile.pack(A, T1, b'old' * 100))
    killed = str(tmp_path / 'killed@1.zec')

    def lose(name: str) -> None:
        with open(name, 'r+b') as file:
            file.seek(file.read().index(A + T2 + b'new'))
            file.write(content)

    shutil.copy(path, killed)
    cache.set_last_tid(T3)
    cache.close()
    for name in path, killed:
        lose(name)
        again = opened(name)
        assert again.loadBefore(A, T4) is None
        assert again.loadBefore(B, T4) == (b'new' * 100, T2, None)
        again.store(A, T2, None, b'new' * 100)
        assert again.loadBefore(A, T4) == (b'new' * 100, T2, None)
        again.flush()
        lose(name)  # under a live one
        again.store(C, T2, T3, b'')  # nothing is hot
        assert again.loadBefore(A, T4) in (None, (b'new' * 100, T2, None))


def test_a_hit_that_is_counted_late_harms_nothing(opened: Callable[..., Cache]) -> None:
    """The revision was put away, and has ended, between finding it and counting the hit."""
    cache = opened(None, MB)

    class Slow(dict[bytes, Any]):
        def get(self, oid: bytes, default: Any = None) -> Any:
            found = super().get(oid, default)
            if found is not None and cache._aside is self:
                cache.invalidate(T3, [oid])
            return found

    cache.store(A, T1, None, b'one')
    cache._aside = Slow(cache._aside)
    assert cache.loadBefore(A, T2) == (b'one', T1, None)
    assert cache._aside_hits == {A: 1} and not cache._aside
    cache.store(B, T1, None, b'two')
    cache.invalidate(T4, [B])
    assert cache.loadBefore(B, T4) == (b'two', T1, T4) and cache.loadBefore(A, T3) == (b'one', T1, T3)


def test_what_was_hit_and_had_to_go_at_once_harms_nothing(opened: Callable[..., Cache]) -> None:
    cache = opened(None, 3000)
    for number in range(ASIDE):
        cache.store(p64(number), T1, None, b'x' * 20)
        assert cache.loadBefore(p64(number), T2)
    cache.flush()
    assert 0 < len(cache) < ASIDE


def test_damage_under_a_live_cache_is_a_miss(cache: Cache, path: str, caplog: Any, tmp_path: Path) -> None:
    data = {p64(oid): bytes([oid]) * 50 for oid in range(1, 20)}
    for oid, record in data.items():
        cache.store(oid, T1, None, record)
        cache.invalidate(T2, [oid]) if u64(oid) % 2 else None
    cache.flush()
    with open(path, 'r+b') as file:
        position = file.read().index(b'\7' * 50)
        file.seek(position + 20)
        file.write(b'?')
        position = Path(path).read_bytes().index(b'\10' * 50)
        file.seek(position + 20)
        file.write(b'?')
    for oid, record in data.items():
        found = cache.loadBefore(oid, T2)
        assert found is None if u64(oid) in (7, 8) else found is not None and found[0] == record
    assert len(cache) == len(data) - 2
    assert len(caplog.messages) == 1
    cache.store(p64(8), T1, None, data[p64(8)])
    assert cache.load(p64(8)) == (data[p64(8)], T1)


@pytest.mark.parametrize('length', [0, 10, 64, 100, 1000, 3000])
def test_truncation_under_a_live_cache_does_no_harm(cache: Cache, path: str, length: int) -> None:
    truth = Truth()
    for number in range(300):
        oids = [p64(number % 7), p64(number % 11)]
        cache.invalidate(truth.commit(*oids), oids)
        cache.set_last_tid(truth.last_tid)
        for oid in oids:
            teach(cache, truth, oid)
        if number % 100 == 50:
            cache.flush()
            os.truncate(path, length)
        truth.check(cache)
    fill(cache, 1000, cache_module.PAUSE + 1)
    assert len(cache) > 0


# Threads

def test_threads_that_load_while_others_store_and_invalidate_see_no_wrong_byte(opened: Callable[..., Cache]) -> None:
    """Records are made from oid and tid; each thread changes its own objects and loads everybody's."""
    cache = opened(None, SMALL)
    errors: list[object] = []
    start = threading.Barrier(5)
    sys_interval = sys.getswitchinterval()

    def record(oid: bytes, tid: bytes) -> bytes:
        return (oid + tid) * (5 + u64(oid) % 10)

    def look(oid: bytes, tid: bytes) -> None:
        found = cache.loadBefore(oid, tid)
        if found is not None and not (found[0] == record(oid, found[1]) and found[1] < tid <= (found[2] or tid)):
            errors.append((oid, tid, found))

    def change(thread: int) -> None:
        start.wait(30)
        for number in range(1, 1500):
            tid, oid = p64(number * 10), p64(thread * 100 + number % 20)
            cache.invalidate(tid, [oid])
            if (found := cache.loadBefore(oid, FAR_FUTURE)) is not None and found[1] < tid:
                errors.append(('stale', oid, tid, found))
            cache.store(oid, tid, None, record(oid, tid))
            look(oid, tid)
            look(p64(thread * 100 + number * 7 % 20), p64(number * 8 + 1))

    def load() -> None:
        start.wait(30)
        for number in range(6000):
            look(p64(number * 31 % 3 * 100 + number % 20), p64(number * 3 % 15000) if number % 3 else FAR_FUTURE)

    threads = [threading.Thread(target=change, args=(number,)) for number in range(3)]
    threads += [threading.Thread(target=load) for _ in range(2)]
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive()
    finally:
        sys.setswitchinterval(sys_interval)
    assert errors == []


def test_a_hit_does_not_wait_for_a_change(cache: Cache) -> None:
    cache.store(A, T1, None, b'one')
    cache.flush()
    found: list[object] = []
    with cache._mutex:
        thread = threading.Thread(target=lambda: found.append(cache.loadBefore(A, T2)))
        thread.start()
        thread.join(30)
        assert not thread.is_alive()
    assert found == [(b'one', T1, None)]


def test_a_place_given_away_while_it_is_read_is_not_believed(cache: Cache, monkeypatch: Any) -> None:
    """The reader has the place, and then the ring goes round: another revision of the object lies there now."""
    cache.store(A, T1, None, b'old')
    cache.flush()
    read, log, began = Log.read, cache._log, []

    def gate(place: int) -> bytes:
        if not began:
            began.append(place)
            cache.invalidate(T2, [A])
            number = 0
            while log._position != 64 + 32:     # the first segment, empty
                fill(cache, 1000 + number, 1, 77)
                number += 1
                if log._free or log._start != 64:
                    continue
                break
            cache.clear(T2)
            cache.store(A, T2, T3, b'off')
            assert cache._ledger.index.before(u64(A), u64(T3))[2] == place  # type: ignore[index]
        return read(log, place)

    monkeypatch.setattr(log, 'read', gate)
    assert cache.loadBefore(A, T4) is None      # without the look at `begun`: (b'off', T2, None)
    assert cache.loadBefore(A, T3) == (b'off', T2, T3)


# What is hit again and again

def warm(cache: Cache, oid: bytes) -> None:
    for _ in range(3):
        cache.load(oid)
    assert oid in cache._hot


@pytest.mark.parametrize('change', [
    lambda cache: cache.invalidate(T2, [A]),
    lambda cache: cache.invalidate(None, [A]),
    lambda cache: cache.drop([A]),
    lambda cache: cache.clear(),
    lambda cache: cache.suspect_all(),
    lambda cache: cache.close(),
    lambda cache: cache.abandon(),
], ids=['ended', 'ended some time', 'dropped', 'cleared', 'in doubt', 'closed', 'abandoned'])
def test_what_is_kept_in_memory_ends_with_the_revision(cache: Cache, change: Any) -> None:
    cache.store(A, T1, None, b'one')
    cache.flush()
    warm(cache, A)
    change(cache)
    assert cache.load(A) is None


def test_what_is_kept_in_memory_gives_way_to_a_newer_revision(cache: Cache) -> None:
    cache.store(A, T1, None, b'one')
    cache.flush()
    warm(cache, A)
    cache.store(A, T2, None, b'two')
    assert cache.load(A) == (b'two', T2)
    assert cache.loadBefore(A, T2) is None


def test_what_is_kept_in_memory_is_not_served_to_those_who_look_further_back(cache: Cache) -> None:
    cache.store(A, T2, None, b'two')
    cache.flush()
    warm(cache, A)
    assert cache.loadBefore(A, T2) is None


def test_a_revision_that_ended_while_it_was_read_does_not_enter_memory(
        cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.store(A, T1, None, b'one')
    cache.flush()
    cache.load(A)
    keep = cache._keep_hot

    def late(*args: Any) -> None:  # between the read and the keeping
        cache.invalidate(T2, [A])
        keep(*args)

    monkeypatch.setattr(cache, '_keep_hot', late)
    assert cache.load(A) == (b'one', T1)  # it began before
    assert cache.load(A) is None


def test_what_is_hit_while_it_ends_does_not_enter_memory(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.store(A, T1, None, b'one')
    cache.flush()
    cache.load(A)
    invalidate = cache._ledger.invalidate

    def hitting(*args: Any) -> None:  # the change has begun, the index does not know of it
        assert cache.load(A) == (b'one', T1)
        assert A not in cache._hot  # wherever the change is interrupted
        invalidate(*args)

    monkeypatch.setattr(cache._ledger, 'invalidate', hitting)
    cache.invalidate(T2, [A])
    assert cache.load(A) is None


def test_what_was_hit_while_it_was_set_aside_counts_as_used(opened: Callable[..., Cache]) -> None:
    cache = opened(None, MB)
    for oid in A, B:
        cache.store(oid, T1, None, bytes(200))
    for _ in range(5):
        cache.load(A)
    assert cache._aside
    cache.flush()
    assert [cache._ledger.use(cache._ledger.index.current.places[u64(oid)]) for oid in (A, B)] == [True, False]


def test_a_hit_of_what_is_set_aside_is_counted_once_though_others_go_on(
        opened: Callable[..., Cache], monkeypatch: Any) -> None:
    cache = opened(None, MB)
    cache.store(A, T1, None, bytes(200))
    cache.load(A)
    cache._aside_hits[B] = 1        # by a thread that was late: it has gone
    counted = []

    def use(place: int) -> bool:
        counted.append(place)
        cache._aside_hits[C] = 1    # by another one, just now
        return False

    monkeypatch.setattr(cache._ledger, 'use', use)
    cache.flush()
    cache.store(C, T1, None, bytes(200))
    cache._aside_hits[C] = 10 ** 12
    cache.flush()
    places = cache._ledger.index.current.places
    assert counted == [places[u64(A)], *[places[u64(C)]] * MOST_USED]


def test_memory_holds_no_more_than_its_share(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('zeo.client.cache.HOT_SIZE', 60 + 60 + HOT_EXTRA)
    for oid in A, B:
        cache.store(oid, T1, None, b'x' * 60)
    cache.flush()
    warm(cache, A)
    warm(cache, B)
    assert A not in cache._hot
    assert cache.load(A) == (b'x' * 60, T1)
