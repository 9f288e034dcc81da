"""Who hears of a transaction, what is remembered, in which order."""

from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given
from ZODB.utils import z64

from tests.server.talk import oid
from tests.server.talk import payloads
from tests.server.talk import tid
from zeo.server import publisher as module
from zeo.server.outbox import Outbox
from zeo.server.publisher import Publisher
from zeo.wire import messages
from zeo.wire.decoding import decode_from_server
from zeo.wire.framing import Inbox


def told(outbox: Outbox) -> list[Any]:
    """All that was appended, decoded."""
    return list(map(decode_from_server, payloads(Inbox(2**31), outbox.take(2**31))))


def subscribed(publisher: Publisher) -> Outbox:
    outbox = Outbox()
    publisher.subscribe(outbox)
    return outbox


def test_everybody_but_the_committer_hears_of_a_transaction_and_the_committer_gets_its_answer() -> None:
    publisher = Publisher(tid(1))
    one, committer, two = (subscribed(publisher) for _ in range(3))
    to_deliver = publisher.publish(tid(2), [oid(1)], committer, messages.reply(b'K\x07', tid(2)))
    assert set(to_deliver) == {one, committer, two}
    assert told(one) == told(two) == [(0, 1, 'invalidateTransaction', (tid(2), [oid(1)]))]
    assert told(committer) == [(7, 0, '.reply', tid(2))]


def test_an_announcement_moves_the_mark_and_the_tid_of_all_also_of_the_committer() -> None:
    publisher = Publisher(tid(1))
    one, committer = subscribed(publisher), subscribed(publisher)
    publisher.publish(tid(2), [oid(1)], committer, (b'answer',))
    for outbox in (one, committer):
        assert (outbox.published, outbox.announced) == (1, tid(2))
    assert publisher.last_tid == tid(2)


def test_the_committer_is_answered_after_the_others_are_told() -> None:
    order = []

    class Noting(Outbox):
        def announce(self, *args: Any) -> bool:
            order.append(self)
            return super().announce(*args)

    publisher = Publisher(tid(1))
    outboxes = [Noting() for _ in range(3)]
    for outbox in outboxes:
        publisher.subscribe(outbox)
    publisher.publish(tid(2), [], outboxes[0], (b'answer',))
    assert order == [*outboxes[1:], outboxes[0]]


def test_who_subscribes_is_taken_to_know_what_was_announced_before() -> None:
    publisher = Publisher(tid(3))
    outbox = subscribed(publisher)
    assert outbox.announced == tid(3)
    assert outbox.published == 0


def test_who_has_unsubscribed_hears_nothing_and_may_do_so_again() -> None:
    publisher = Publisher(tid(1))
    outbox = subscribed(publisher)
    publisher.unsubscribe(outbox)
    publisher.unsubscribe(outbox)
    assert publisher.publish(tid(2), [oid(1)]) == []
    assert publisher.subscribers == []
    assert told(outbox) == []


def test_who_leaves_takes_nobody_else_along() -> None:
    """A departing client once made ZEO's iteration skip an innocent one."""
    publisher = Publisher(tid(1))

    class Leaving(Outbox):
        def announce(self, *args: Any) -> bool:
            publisher._subscribers.pop(self)
            return super().announce(*args)

    first, leaving, last = Outbox(), Leaving(), Outbox()
    for outbox in (first, leaving, last):
        publisher.subscribe(outbox)
    publisher.publish(tid(2), [oid(1)])
    assert len(told(first)) == len(told(last)) == 1


def test_what_was_announced_already_is_dropped() -> None:
    publisher = Publisher(tid(5))
    outbox = subscribed(publisher)
    assert publisher.publish(tid(5), [oid(1)]) == []
    assert publisher.publish(tid(4), [oid(1)]) == []
    assert told(outbox) == []
    assert publisher.since(tid(5)) == (tid(5), [])


def test_a_committer_whose_storage_has_announced_the_transaction_itself_gets_its_answer() -> None:
    publisher = Publisher(tid(1))
    committer = subscribed(publisher)
    publisher.publish(tid(2), [oid(1)])
    assert publisher.publish(tid(2), [oid(1)], committer, messages.reply(b'K\x07', tid(2))) == [committer]
    assert [message[2] for message in told(committer)] == ['invalidateTransaction', '.reply']


def test_a_transaction_that_comes_after_a_later_one_is_an_error_and_not_dropped() -> None:
    """Else nobody but its committer would ever hear of it."""
    publisher = Publisher(tid(5))
    committer = subscribed(publisher)
    with pytest.raises(ValueError, match='after'):
        publisher.publish(tid(4), [oid(1)], committer, (b'answer',))
    assert committer.take() == []


def test_a_notice_to_everybody_moves_no_mark() -> None:
    publisher = Publisher(tid(1))
    one, two = subscribed(publisher), subscribed(publisher)
    assert publisher.tell(messages.notice('info', ({'size': 1},))) == [one, two]
    assert told(one) == told(two) == [(0, 1, 'info', ({'size': 1},))]
    assert (one.published, one.announced) == (0, tid(1))


# ---- what is remembered


def test_what_changed_since_a_tid_is_told_once_each() -> None:
    publisher = Publisher(tid(1))
    publisher.publish(tid(2), [oid(1), oid(2)])
    publisher.publish(tid(4), [oid(2), oid(3)])
    assert publisher.since(tid(4)) == (tid(4), [])
    last_tid, oids = publisher.since(tid(2)) or (b'', [])
    assert (last_tid, sorted(oids)) == (tid(4), [oid(2), oid(3)])
    last_tid, oids = publisher.since(tid(1)) or (b'', [])
    assert (last_tid, sorted(oids)) == (tid(4), [oid(1), oid(2), oid(3)])


def test_nothing_is_told_about_a_transaction_that_there_never_was() -> None:
    """The database was restored from a backup, and went on from there; this client has seen the other future."""
    publisher = Publisher(tid(1))
    publisher.publish(tid(2), [oid(1)])
    publisher.publish(tid(4), [oid(2)])
    assert publisher.since(tid(3)) is None
    restored = Publisher(tid(4), [(tid(2), [oid(1)]), (tid(4), [oid(2)])])
    assert restored.since(tid(3)) is None
    assert restored.since(tid(2)) == (tid(4), [oid(2)])
    restored.start_afresh(tid(6))
    restored.publish(tid(8), [oid(2)])
    assert restored.since(tid(7)) is None


def test_what_is_older_than_anything_known_is_not_told() -> None:
    publisher = Publisher(tid(3))
    assert publisher.since(tid(2)) is None
    assert publisher.since(tid(3)) == (tid(3), [])
    recent = Publisher(tid(3), [(tid(2), [oid(2)]), (tid(3), [oid(3)])])
    assert recent.since(tid(1)) is None
    assert recent.since(tid(2)) == (tid(3), [oid(3)])


def test_only_so_many_transactions_are_remembered() -> None:
    publisher = Publisher(tid(0), keep=3)
    for number in range(1, 7):
        publisher.publish(tid(number), [oid(number)])
    assert publisher.since(tid(2)) is None
    last_tid, oids = publisher.since(tid(4)) or (b'', [])
    assert (last_tid, sorted(oids)) == (tid(6), [oid(5), oid(6)])


def test_only_so_many_oids_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, 'MOST_OIDS', 10)
    publisher = Publisher(tid(2), [(tid(1), [oid(1)] * 8), (tid(2), [oid(number) for number in range(8)])])
    assert publisher.since(tid(1)) == (tid(2), [oid(number) for number in range(8)])
    publisher.publish(tid(3), [oid(1), oid(2)])
    assert publisher.since(tid(1)) is not None
    publisher.publish(tid(4), [oid(3)])
    assert publisher.since(tid(1)) is None
    assert publisher.since(tid(2)) == (tid(4), [oid(3), oid(1), oid(2)])
    publisher.publish(tid(5), [oid(number) for number in range(20)])
    assert publisher.since(tid(4)) is None
    assert publisher.since(tid(5)) == (tid(5), [])
    publisher.publish(tid(6), [oid(1)])
    assert publisher.since(tid(5)) == (tid(6), [oid(1)])
    publisher.start_afresh(tid(7))
    publisher.publish(tid(8), [oid(number) for number in range(10)])
    assert publisher.since(tid(7)) is not None


@given(keep=st.integers(0, 5),
       before=st.integers(0, 5),
       commits=st.lists(st.lists(st.integers(0, 3), max_size=3), max_size=10),
       since=st.integers(0, 16))
def test_what_is_told_is_complete_or_nothing(
        keep: int, before: int, commits: list[list[int]], since: int) -> None:
    history = [(tid(number + 1), [oid(number % 4)]) for number in range(before)]
    publisher = Publisher(history[-1][0] if history else z64, history[-keep:] if keep else [], keep)
    for oids in commits:
        history.append((tid(len(history) + 1), list(map(oid, oids))))
        publisher.publish(*history[-1])
    last_tid = history[-1][0] if history else z64
    answer = publisher.since(tid(since))
    if answer is not None:
        assert answer[0] == last_tid
        assert len(answer[1]) == len(set(answer[1]))
        assert set(answer[1]) == {each for when, oids in history if when > tid(since) for each in oids}
    if tid(since) >= last_tid:
        assert answer is not None


def test_after_an_error_nothing_is_known_and_everybody_is_ended() -> None:
    publisher = Publisher(tid(1))
    outbox = subscribed(publisher)
    publisher.publish(tid(2), [oid(1)])
    assert publisher.start_afresh(tid(3)) == [outbox]
    assert outbox.gone and not outbox.condemned
    assert publisher.last_tid == tid(3)
    assert publisher.since(tid(2)) is None
    assert publisher.since(tid(3)) == (tid(3), [])


def test_starting_afresh_never_goes_back() -> None:
    publisher = Publisher(tid(5))
    publisher.start_afresh(tid(3))
    assert publisher.last_tid == tid(5)
    publisher.publish(tid(6), [oid(1)])
    assert publisher.since(tid(5)) == (tid(6), [oid(1)])


def test_whoever_cannot_keep_up_is_among_those_to_be_delivered() -> None:
    publisher = Publisher(tid(1))
    slow = Outbox(limit=10)
    publisher.subscribe(slow)
    slow.append((b'x' * 100,))
    assert publisher.publish(tid(2), [oid(1)]) == [slow]
    assert slow.condemned
