"""The index is what replaying the log gives."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ZODB.utils import p64

from zeo.client.cachefile import AROUND, COLLECTED, LARGEST, MANY, SIZE_BITS, Content, Log, claim, pack, unnamed
from zeo.client.cacheindex import OPEN, Kind
from zeo.client.cacheledger import MOST_USED, Ledger

STORAGE = bytes(16)
SIZE = 64 + 10 * 512


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[[], Ledger]]:
    """Open the same file again and again; what is open is closed first, as if its process had died."""
    ledgers: list[Ledger] = []

    def opened() -> Ledger:
        if ledgers and not ledgers[-1].log._file.closed:
            ledgers[-1].log.abandon()
        ledgers.append(Ledger(Log(claim(str(tmp_path / 'x.zec')), SIZE, STORAGE)))
        if ledgers[-1].log.empty:
            ledgers[-1].start_over(0)
        else:
            ledgers[-1].open()
        return ledgers[-1]

    yield opened
    if ledgers and not ledgers[-1].log._file.closed:
        ledgers[-1].log.abandon()


def content(oid: int, start: int, length: int = 40) -> Content:
    return pack(p64(oid), p64(start), bytes([oid]) * length)


def known(ledger: Ledger) -> tuple[object, ...]:
    index = ledger.index
    return (ledger.last_tid, list(index.current.starts.items()), list(index.suspect.starts.items()),
            list(index.ended()), list(index.current.places.items()), list(index.suspect.places.items()))


numbers = st.integers(1, 12)
changes = st.one_of(
    st.tuples(st.just('learn'), numbers, st.integers(0, 3), st.integers(0, 300)),
    st.tuples(st.just('invalidate'), st.lists(numbers, max_size=4)),
    st.tuples(st.just('drop'), st.lists(numbers, max_size=4)),
    st.tuples(st.just('suspect_all')),
    st.tuples(st.just('confirm'), st.lists(numbers, max_size=4)),
    st.tuples(st.just('forget'), numbers),
    st.tuples(st.just('move')),
    st.tuples(st.just('use'), numbers))


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(told=st.lists(changes, max_size=60), remember=st.booleans())
def test_replaying_gives_what_was_known(
        opened: Callable[[], Ledger], told: list[tuple[object, ...]], remember: bool) -> None:
    ledger = opened()
    ledger.start_over(0)
    now = 0
    for name, *arguments in told:
        now += 10
        if name == 'learn':
            oid, length, size = arguments
            end = now + length if length else OPEN      # type: ignore[operator]
            ledger.learn(oid, now, end, content(oid, now, size))    # type: ignore[arg-type]
        elif name == 'invalidate' or name == 'confirm':
            getattr(ledger, str(name))(now, *arguments)
        elif name == 'forget':
            [oid] = arguments
            ledger.forget(oid, ledger.index.current.starts.get(oid, 0))     # type: ignore[arg-type]
        elif name == 'move':
            ledger.move(now)
        elif name == 'use':
            [oid] = arguments
            if (place := ledger.index.current.places.get(oid)) is not None:
                ledger.use(place)
        else:
            getattr(ledger, str(name))(*arguments)
    ledger.log.flush()
    expected = known(ledger)
    if remember:
        ledger.close(remember=True)
    assert known(opened()) == expected


@settings(deadline=None)
@given(before=st.lists(st.tuples(numbers, st.integers(1, 30), st.integers(0, 3)), max_size=12), doubt=st.booleans(),
       revisions=st.dictionaries(numbers, st.integers(0, 600)), start=st.integers(10, 25))
def test_to_learn_all_is_to_learn_each(before: list[tuple[int, int, int]], doubt: bool,
                                       revisions: dict[int, int], start: int) -> None:
    ledgers = [Ledger(Log(unnamed(), 1 << 20, STORAGE)) for _ in range(2)]
    for ledger in ledgers:
        ledger.start_over(0)
        for oid, since, length in before:
            ledger.learn(oid, since, since + length if length else OPEN, content(oid, since))
        if doubt:
            ledger.suspect_all()
    one, other = ledgers
    other.invalidate(start, revisions)
    one.learn_all(start, [(p64(oid), bytes([oid]) * length) for oid, length in revisions.items()])
    one.invalidate(start, revisions)
    for oid, length in revisions.items():
        other.learn(oid, start, OPEN, content(oid, start, length))
    assert known(one)[:4] == known(other)[:4]
    for oid, place in one.index.current.places.items():
        assert one.log.read(place) == other.log.read(other.index.current.places[oid])
    for ledger in ledgers:
        ledger.log.abandon()


def test_to_learn_very_many_is_to_learn_some_hundreds_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(Log(unnamed(), 1 << 22, STORAGE))
    ledger.start_over(0)
    append_all, together, waiting = ledger.log.append_all, [], []

    def append(tag: bytes, contents: list[Content]) -> list[int]:
        together.append(len(contents))
        return append_all(tag, contents)

    def revisions() -> Iterator[tuple[bytes, bytes]]:
        for oid in range(1000):
            waiting.append(oid - sum(together))
            yield p64(oid), bytes(200)

    monkeypatch.setattr(ledger.log, 'append_all', append)
    assert ledger.learn_all(10, revisions()) == len(ledger.index) == 1000
    assert max(together) <= MANY and len(together) < 20
    assert max(waiting) * 200 <= COLLECTED
    ledger.log.abandon()


def test_what_is_too_long_is_not_learned_with_others(opened: Callable[[], Ledger]) -> None:
    ledger = opened()
    assert ledger.learn_all(10, [(p64(1), bytes(ledger.log.room)), (p64(2), bytes(ledger.log.room + 1))]) == 1
    assert dict(ledger.index.current.starts) == {1: 10}


def test_what_is_new_was_not_used(opened: Callable[[], Ledger]) -> None:
    ledger = opened()
    ledger._used = bytearray([MOST_USED]) * len(ledger._used)
    ledger.learn_news([p64(1) + p64(10), p64(2) + p64(10)], [bytes(100)] * 2)
    ledger.learn(3, 10, 20, content(3, 10, 200))
    places = [*ledger.index.current.places.values(), ledger.index.find(3, 10)[2]]   # type: ignore[index]
    assert [ledger.use(place) for place in places] == [False] * 3


def test_the_log_says_no_later_tid_than_it_can_prove(opened: Callable[[], Ledger]) -> None:
    ledger = opened()
    ledger.move(10)
    ledger.behind = ledger.last_tid
    ledger.move(20)
    assert opened().last_tid == 10


def test_who_starts_over_is_like_new(opened: Callable[[], Ledger]) -> None:
    ledger = opened()
    new = {**vars(ledger)}
    ledger.advance(10)
    ledger.behind = 5
    for oid in range(1, 100):
        ledger.learn(oid, 10, OPEN, content(oid, 10))
        ledger.use(ledger.index.current.places[oid])
    assert ledger._moves and ledger._savings and ledger._taken
    ledger.start_over(0)
    assert {name: vars(ledger)[name] for name in ('last_tid', 'behind', 'sound', '_moves', '_savings', '_taken')}.items() <= new.items()
    assert not len(ledger.index)


def test_what_is_known_already_is_not_written(opened: Callable[[], Ledger]) -> None:
    ledger = opened()
    position = ledger.log._position
    ledger.suspect_all()
    assert ledger.log._position == position
    ledger.learn(1, 10, OPEN, content(1, 10))
    ledger.learn(2, 10, 20, content(2, 10))
    position = ledger.log._position
    ledger.learn(1, 10, OPEN, content(1, 10))
    ledger.learn(2, 10, 20, content(2, 10))
    ledger.learn(2, 10, OPEN, content(2, 10))
    ledger.invalidate(10, [1, 2, 3])
    ledger.confirm(20, [1])
    ledger.drop([3])
    ledger.move(0)
    assert ledger.log._position == position


def test_an_invalidation_of_very_many_objects_is_noted_in_parts(opened: Callable[[], Ledger]) -> None:
    ledger = opened()
    for oid in range(200):
        ledger.index.put(Kind.CURRENT, oid, 10, OPEN, oid)
    ledger.invalidate(20, range(200))
    ledger.log.flush()
    records = [record for _, _, records, _ in Log.replay(opened().log) for record in records]
    assert [record.tag for record in records].count(b'INVA') > 5


def test_the_most_used_are_taken_along(opened: Callable[[], Ledger]) -> None:
    ledger = opened()
    for oid in range(1, 60):
        ledger.learn(oid, 10, OPEN, content(oid, 10, 60))
    ledger._savings = 0
    first = [record.oid for record in ledger.log.oldest()]
    for hits, oid in enumerate(first[:3]):
        for _ in range(hits):
            ledger.use(ledger.index.current.places[oid])
    started = ledger.log.begun
    oid = 100
    while ledger.log.begun < started + 2:
        ledger.learn(oid, 10, OPEN, content(oid, 10, 60))
        oid += 1
    kept = [oid in ledger.index.current.starts for oid in first[:3]]
    assert kept == [False, True, True]


def test_what_is_in_use_makes_room_for_what_is_new_without_being_moved_as_a_whole() -> None:
    log = Log(unnamed(), 1 << 20, STORAGE)
    ledger = Ledger(log)
    ledger.start_over(0)
    current = ledger.index.current
    oid = 0
    while log.begun < 16:
        ledger.learn(oid, 10, OPEN, pack(p64(oid), p64(10), bytes(60)))
        oid += 1
    for place in current.places.values():
        ledger.use(place)
    many = log.room // 64 // (AROUND + 10)
    assert many > 10
    for _ in range(1 + log.room // many // AROUND):    # somewhere there the open segment is full
        begun = log.begun
        ledger.learn_news([p64(oid + number) + p64(10) for number in range(many)], [bytes(10)] * many, Kind.CURRENT)
        assert all(oid + number in current.starts for number in range(many))
        assert log.begun - begun <= 2
        oid += many
    assert log.begun > 16
    log.abandon()


def test_what_a_disk_has_kept_in_the_place_of_a_survivor_is_not_taken_along(opened: Callable[[], Ledger]) -> None:
    """It is whole, and has the same length; as a record of its own it would be current again."""
    ledger = opened()
    for oid in range(1, 60):
        ledger.learn(oid, 10, OPEN, content(oid, 10, 60))
    ledger.log.flush()
    survivor = ledger.log.oldest()[0]
    old = b''.join(content(200, 5, 60))
    assert len(old) == survivor.place & LARGEST
    os.pwrite(ledger.log._fd, old, survivor.place >> SIZE_BITS)
    ledger.use(survivor.place)
    started = ledger.log.begun
    while ledger.log.begun == started:
        oid += 1
        ledger.learn(oid, 10, OPEN, content(oid, 10, 60))
    assert survivor.oid not in ledger.index.current.starts
    ledger.log.flush()
    assert 200 not in opened().index.current.starts


def test_hits_are_counted_up_to_a_limit(opened: Callable[[], Ledger]) -> None:
    ledger = opened()
    ledger.learn(1, 10, OPEN, content(1, 10))
    for _ in range(1000):
        ledger.use(ledger.index.current.places[1])
    assert max(ledger._used) == MOST_USED


def test_a_ledger_that_forgot_all_writes_nothing_until_it_starts_over(opened: Callable[[], Ledger]) -> None:
    ledger = opened()
    ledger.learn(1, 10, OPEN, content(1, 10))
    position, written = ledger.log._position, ledger.log._written
    ledger.forget_all()
    ledger.move(20)
    ledger.suspect_all()
    ledger.forget(1, 10)
    ledger.flush()
    assert (ledger.log._position, ledger.log._written) == (position, written)
    assert ledger.last_tid == 20 and not len(ledger.index)
    ledger.start_over(20)
    ledger.log.flush()
    assert known(opened())[:2] == (20, [])


def test_what_was_forgotten_is_not_remembered_to_be_nothing(opened: Callable[[], Ledger]) -> None:
    ledger = opened()
    ledger.learn(1, 10, OPEN, content(1, 10))
    ledger.log.flush()
    ledger.forget_all()
    ledger.close(remember=True)
    assert dict(opened().index.current.starts) == {1: 10}
