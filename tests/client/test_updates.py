"""What a transaction puts into the cache when it finishes."""

import tempfile
from collections.abc import Iterator
from typing import Any

import pytest

from tests.client.peer import oid
from tests.client.peer import tid
from zeo.client.cache import Cache
from zeo.client.cache import open_cache
from zeo.client.updates import Updates


@pytest.fixture
def cache() -> Iterator[Cache]:
    cache = open_cache(None, 1 << 20)
    yield cache
    cache.close()


def test_new_records_become_current_and_the_old_ones_end(cache: Cache) -> None:
    cache.store(oid(1), tid(1), None, b'old')
    updates = Updates(1000)
    updates.store(oid(1), b'new')
    updates.store(oid(2), b'first')
    updates.apply(cache, tid(5))
    assert cache.loadBefore(oid(1), tid(6)) == (b'new', tid(5), None)
    assert cache.loadBefore(oid(1), tid(5)) == (b'old', tid(1), tid(5))
    assert cache.loadBefore(oid(2), tid(6)) == (b'first', tid(5), None)
    updates.close()


def test_the_last_of_several_records_counts(cache: Cache) -> None:
    updates = Updates(1000)
    updates.store(oid(1), b'sent')
    updates.store(oid(1), b'resolved')
    updates.apply(cache, tid(5))
    assert cache.loadBefore(oid(1), tid(6)) == (b'resolved', tid(5), None)


def test_what_changes_to_something_unknown_only_ends(cache: Cache) -> None:
    cache.store(oid(1), tid(1), None, b'old')
    updates = Updates(1000)
    updates.store(oid(1), b'sent')
    updates.change(oid(1))
    updates.apply(cache, tid(5))
    assert cache.loadBefore(oid(1), tid(6)) is None
    assert cache.loadBefore(oid(1), tid(5)) == (b'old', tid(1), tid(5))


def test_many_records_go_to_a_file_and_come_back(
        cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    files: list[Any] = []

    def temporary_file(**options: Any) -> Any:
        files.append(make(**options))
        return files[-1]

    make = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, 'TemporaryFile', temporary_file)
    updates = Updates(1_000_000, memory=1000)
    for n in range(100):
        updates.store(oid(n), bytes([n]) * 100)
    updates.store(oid(3), b'again')
    updates.apply(cache, tid(5))
    updates.close()
    assert cache.loadBefore(oid(3), tid(6)) == (b'again', tid(5), None)
    for n in (0, 10, 50, 99):
        assert cache.loadBefore(oid(n), tid(6)) == (bytes([n]) * 100, tid(5), None)
    assert [file.closed for file in files] == [True]


def test_small_transactions_need_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(tempfile, 'TemporaryFile')
    updates = Updates(1000)
    updates.store(oid(1), bytes(1000))
    updates.close()


def test_what_the_cache_could_not_hold_is_not_remembered_but_ends(cache: Cache) -> None:
    cache.store(oid(2), tid(1), None, b'old')
    updates = Updates(1000)
    updates.store(oid(1), bytes(900))
    updates.store(oid(2), bytes(200))
    updates.apply(cache, tid(5))
    assert cache.loadBefore(oid(1), tid(6)) == (bytes(900), tid(5), None)
    assert cache.loadBefore(oid(2), tid(6)) is None


def test_closed_updates_refuse_to_be_applied(cache: Cache) -> None:
    """Else a commit whose caller left would leave its old revisions current."""
    updates = Updates(1000)
    updates.store(oid(1), b'data')
    updates.close()
    updates.close()
    with pytest.raises(ValueError):
        updates.apply(cache, tid(5))
