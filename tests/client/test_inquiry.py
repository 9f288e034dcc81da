"""Asking about cached revisions: what is confirmed, what is forgotten, and what comes in between."""

from collections.abc import Iterator
from typing import Any

import pytest
from ZODB.utils import p64

from zeo.client.cache import Cache, open_cache
from zeo.client.inquiry import BATCH, inquire
from zeo.errors import ClientDisconnected, ProtocolError

T1, T2, T3 = p64(1), p64(2), p64(3)


class Channel:
    """Answers ``verify`` at once, as a server that knows these current tids."""

    def __init__(self, current: dict[bytes, bytes], before_answer: Any = None) -> None:
        self.current = current
        self.asked: list[int] = []
        self.before_answer = before_answer

    def call(self, name: str, args: Any, effect: Any) -> None:
        assert name == 'verify'
        revisions, = args
        pairs = [(revisions[at:at + 8], revisions[at + 8:at + 16]) for at in range(0, len(revisions), 16)]
        self.asked.append(len(pairs))
        outdated = b''.join(oid for oid, tid in pairs if self.current.get(oid) != tid)
        if self.before_answer is not None:
            self.before_answer()
        effect(None, outdated)


@pytest.fixture
def cache() -> Iterator[Cache]:
    cache = open_cache(None, 1_000_000)
    yield cache
    cache.close()


def test_what_is_still_current_is_served_again_and_the_rest_is_forgotten(cache: Cache) -> None:
    for number in range(4):
        cache.store(p64(number), T1, None, b'%d' % number)
    cache.set_last_tid(T2)
    cache.suspect_all()
    assert cache.load(p64(0)) is None
    inquire(Channel({p64(0): T1, p64(1): T2, p64(2): T1}), cache)  # type: ignore[arg-type]
    assert [cache.load(p64(number)) for number in range(4)] == [(b'0', T1), None, (b'2', T1), None]
    assert list(cache.suspects()) == []


def test_many_objects_are_asked_about_at_a_time(cache: Cache) -> None:
    current = {p64(number): T1 for number in range(BATCH * 2 + 1)}
    for oid in current:
        cache.store(oid, T1, None, b'x')
    cache.set_last_tid(T1)
    cache.suspect_all()
    channel = Channel(current)
    inquire(channel, cache)  # type: ignore[arg-type]
    assert channel.asked == [BATCH, BATCH, 1]
    assert all(cache.load(oid) for oid in current)


def test_an_announcement_that_stands_before_the_answer_is_not_undone_by_it(cache: Cache) -> None:
    """The server looked before T3; its answer says that the revision is current, and comes late."""
    cache.store(p64(1), T1, None, b'old')
    cache.set_last_tid(T2)
    cache.suspect_all()

    def announce() -> None:
        cache.invalidate(T3, [p64(1)])
        cache.set_last_tid(T3)

    inquire(Channel({p64(1): T1}, announce), cache)  # type: ignore[arg-type]
    assert cache.load(p64(1)) is None


def test_what_was_loaded_in_between_stays(cache: Cache) -> None:
    cache.store(p64(1), T1, None, b'old')
    cache.set_last_tid(T2)
    cache.suspect_all()
    inquire(Channel({p64(1): T1}, lambda: cache.store(p64(1), T1, None, b'old')),  # type: ignore[arg-type]
            cache)
    assert cache.load(p64(1)) == (b'old', T1)


def test_what_was_loaded_in_between_stays_also_if_it_is_newer_than_what_was_asked_about(
        cache: Cache) -> None:
    cache.store(p64(1), T1, None, b'old')
    cache.set_last_tid(T2)
    cache.suspect_all()
    inquire(Channel({p64(1): T2}, lambda: cache.store(p64(1), T2, None, b'new')),  # type: ignore[arg-type]
            cache)
    assert cache.load(p64(1)) == (b'new', T2)


def test_when_the_connection_ends_the_rest_stays_in_doubt(cache: Cache) -> None:
    cache.store(p64(1), T1, None, b'x')
    cache.suspect_all()

    class Dying(Channel):
        def call(self, name: str, args: Any, effect: Any) -> None:
            raise ClientDisconnected('gone')

    inquire(Dying({}), cache)  # type: ignore[arg-type]
    assert cache.load(p64(1)) is None
    assert list(cache.suspects()) == [(p64(1), T1)]


@pytest.mark.parametrize('answer', [None, b'seven..', 8, 'textual!'])
def test_an_answer_that_is_none_ends_the_inquiry_and_confirms_nothing(cache: Cache, answer: Any) -> None:
    cache.store(p64(1), T1, None, b'x')
    cache.suspect_all()
    raised = []

    class Odd(Channel):
        def call(self, name: str, args: Any, effect: Any) -> None:
            try:
                effect(None, answer)
            except ProtocolError as error:  # in a channel this ends the connection, and the call
                raised.append(error)
                raise ClientDisconnected('given up') from None

    inquire(Odd({}), cache)  # type: ignore[arg-type]
    assert raised
    assert cache.load(p64(1)) is None
