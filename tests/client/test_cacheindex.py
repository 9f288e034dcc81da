"""Which revision is known: against a plain list of revisions."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zeo.client.cacheindex import OPEN, Index, Kind

A, B = 1, 2


def index(*revisions: tuple[int, int, int]) -> Index:
    """With revisions of `A`: start, end, place."""
    result = Index()
    for start, end, place in revisions:
        result.put(Kind.HISTORIC if end else Kind.CURRENT, A, start, end, place)
    return result


def test_a_historic_revision_is_found_by_any_tid_within_it() -> None:
    known = index((10, 20, 1), (20, 30, 2), (50, 60, 3))
    assert [known.before(A, tid) for tid in (10, 11, 20, 21, 30, 31, 50, 51, 60, 61)] == [
        None, (10, 20, 1), (10, 20, 1), (20, 30, 2), (20, 30, 2), None, None, (50, 60, 3), (50, 60, 3), None]


def test_an_invalidation_ends_the_current_revision() -> None:
    known = index((10, OPEN, 1))
    assert known.invalidate(20, [A, B]) == [A]
    assert known.find(A, 10) == (Kind.HISTORIC, 20, 1)


@pytest.mark.parametrize('tid', [10, 5])
def test_an_invalidation_that_is_not_newer_than_the_revision_changes_nothing(tid: int) -> None:
    known = index((10, OPEN, 1))
    assert known.invalidate(tid, [A]) == []
    assert known.find(A, 10) == (Kind.CURRENT, OPEN, 1)


@pytest.mark.parametrize('start, end, wanted', [
    (5, OPEN, False), (20, OPEN, False), (29, OPEN, False), (30, OPEN, False), (41, OPEN, True),
    (5, 10, True), (5, 11, False), (15, 18, False), (20, 30, True), (21, 29, True), (20, 31, True),
    (20, 41, False), (41, 50, True), (50, 50, False)])
def test_only_what_contradicts_nothing_newer_is_wanted(start: int, end: int, wanted: bool) -> None:
    known = index((10, 20, 1), (40, OPEN, 2))
    assert known.wants(A, start, end) is wanted


def test_history_that_reaches_beyond_a_revision_shows_that_it_is_not_current() -> None:
    assert not index((10, 20, 1)).wants(A, 15, OPEN)


@pytest.mark.parametrize('doubt', [False, True])
@pytest.mark.parametrize('revisions', [
    [], [(10, OPEN, 1)], [(10, 20, 1)], [(10, 20, 1), (20, OPEN, 2)], [(10, 20, 1), (30, OPEN, 2)]])
def test_to_renew_is_to_invalidate_and_to_put(revisions: list[tuple[int, int, int]], doubt: bool) -> None:
    one, other = index(*revisions), index(*revisions)
    if doubt:
        one.suspect_all()
        other.suspect_all()
    assert one.is_next(A, 40)
    one.renew([(A, 40), (B, 40)], [7, 8])
    other.invalidate(40, [A, B])
    other.put(Kind.CURRENT, A, 40, OPEN, 7)
    other.put(Kind.CURRENT, B, 40, OPEN, 8)
    assert one.pack() == other.pack()


@pytest.mark.parametrize('start, following, over', [(5, False, False), (30, False, False), (31, True, False)])
def test_what_is_current_is_not_over_and_may_have_a_follower(start: int, following: bool, over: bool) -> None:
    known = index((10, 20, 1), (30, OPEN, 2))
    assert (known.is_next(A, start), known.is_over(A, start)) == (following, over)
    known.suspect_all()
    assert (known.is_next(A, start), known.is_over(A, start)) == (following, over)


@pytest.mark.parametrize('start, over', [(19, False), (20, True), (21, True)])
def test_what_has_ended_is_over_from_then_on(start: int, over: bool) -> None:
    known = index((10, 20, 1))
    assert known.is_next(A, start) is known.is_over(A, start) is over
    assert known.is_next(B, start) is known.is_over(B, start) is True


def test_a_newer_current_revision_leaves_an_older_one_without_a_known_end_behind() -> None:
    known = index((10, OPEN, 1))
    known.put(Kind.CURRENT, A, 30, OPEN, 2)
    assert known.find(A, 10) is None and known.before(A, 20) is None


def test_a_historic_revision_after_the_current_one_shows_that_it_has_ended() -> None:
    known = index((10, OPEN, 1))
    known.put(Kind.HISTORIC, A, 30, 40, 2)
    assert known.find(A, 10) is None


def test_suspects_are_not_current_until_confirmed() -> None:
    known = index((10, OPEN, 1))
    assert known.suspect_all()
    assert not known.suspect_all()
    assert known.find(A, 10) == (Kind.SUSPECT, OPEN, 1)
    assert known.confirm(9, [A]) == []
    assert known.confirm(10, [A, B]) == [A]
    assert known.find(A, 10) == (Kind.CURRENT, OPEN, 1)


def test_history_is_forgotten_when_the_past_is_in_doubt() -> None:
    known = index((10, OPEN, 1))
    known.invalidate(20, [A])
    assert known.before(A, 15) is not None
    assert known.suspect_all()
    assert known.before(A, 15) is None
    assert not known.suspect_all()


def test_a_suspect_that_is_invalidated_does_not_become_history() -> None:
    known = index((10, OPEN, 1))
    known.suspect_all()
    assert known.invalidate(20, [A]) == [A]
    assert known.find(A, 10) is None and known.before(A, 15) is None


def test_a_suspect_at_whose_start_an_invalidation_comes_stays_one() -> None:
    known = index((10, OPEN, 1))
    known.suspect_all()
    assert known.invalidate(10, [A]) == []


def test_suspects_of_two_absences_add_up() -> None:
    known = index((10, OPEN, 1))
    known.suspect_all()
    known.put(Kind.CURRENT, B, 20, OPEN, 2)
    known.suspect_all()
    assert sorted(known.suspect.starts.items()) == [(A, 10), (B, 20)]
    assert not known.current.starts


def test_a_gap_leaves_nothing_of_what_was_before() -> None:
    known = index((10, 20, 1), (30, OPEN, 2))
    known.put(Kind.SUSPECT, B, 10, OPEN, 3)
    known.forget_all()
    assert not list(known.ended()) and len(known) == 0


def test_dropping_leaves_history() -> None:
    known = index((10, 20, 1), (30, OPEN, 2))
    assert known.drop([A, B]) == [A]
    assert list(known.ended()) == [(A, 10, 20)]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 15), st.integers(1, 5)), max_size=20),
       st.lists(st.integers(0, 15), max_size=5))
def test_history_is_found_and_forgotten_as_in_a_plain_list(told: list[tuple[int, int]], forgotten: list[int]) -> None:
    known, plain = Index(), dict[int, tuple[int, int]]()
    for place, (start, length) in enumerate(told):
        start, end = start * 4 + 1, start * 4 + 1 + length
        if known.find(A, start) is None and known.wants(A, start, end):
            known.put(Kind.HISTORIC, A, start, end, place)
            assert all(end <= other or start >= ended for other, (ended, _) in plain.items())
            plain[start] = end, place
        elif start not in plain:
            assert not all(end <= other or start >= ended for other, (ended, _) in plain.items())
    for start in forgotten:
        known.forget(A, start * 4 + 1)
        plain.pop(start * 4 + 1, None)
    assert list(known.ended()) == [(A, start, plain[start][0]) for start in sorted(plain)]
    for tid in range(80):
        expected = [(start, end, place) for start, (end, place) in plain.items() if start < tid <= end]
        assert known.before(A, tid) == (expected[0] if expected else None)
    assert len(known) == len(plain)


def test_an_object_that_changes_all_the_time_has_no_ever_longer_history() -> None:
    index = Index()
    for tid in range(1, 1001):
        index.invalidate(tid, [1])
        index.put(Kind.CURRENT, 1, tid, OPEN, tid)
    assert [start for _, start, _ in index.ended()] == list(range(950, 1000))
    index.put(Kind.HISTORIC, 1, 2, 3, 5)    # older than what was forgotten: forgotten at once
    assert [start for _, start, _ in index.ended()] == list(range(950, 1000))
    assert index.before(1, 1000) == (999, 1000, 999)
