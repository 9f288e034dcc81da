"""Many revisions told at once: what is told, in which order, and what is left out."""

from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import pytest
from ZODB.POSException import POSKeyError
from ZODB.utils import maxtid
from ZODB.utils import u64
from ZODB.utils import z64

from tests.server.talk import SessionPeer
from tests.server.talk import oid
from tests.server.talk import payloads
from tests.server.talk import tid
from zeo.errors import ProtocolError
from zeo.server.backing import Unreachable
from zeo.server.outbox import Outbox
from zeo.server.prefetching import tell
from zeo.server.served import Served
from zeo.wire.announcements import invalidation_notice
from zeo.wire.decoding import decode_from_server
from zeo.wire.framing import Inbox
from zeo.wire.revisions import ENOUGH
from zeo.wire.revisions import HEAD
from zeo.wire.revisions import MOST
from zeo.wire.revisions import unpack

Found = tuple[Any, Any, Any]


class Database:
    """Current revisions by number, which a test commits at any time; and all that a client is told of them."""

    def __init__(self) -> None:
        self.outbox = Outbox()
        self.revisions: dict[int, Any] = {}
        self.loaded: list[int] = []
        self.last = 0
        self.beside: Callable[[int], object] = lambda number: None  # called after something was read

    def commit(self, *numbers: int, announce: bool = True) -> None:
        """Visible first, announced second."""
        self.last += 1
        for number in numbers:
            self.revisions[number] = b'%d of %d' % (self.last, number), tid(self.last), None
        if announce:
            self.announce(*numbers)

    def announce(self, *numbers: int) -> None:
        oids = [oid(number) for number in numbers]
        self.outbox.announce(invalidation_notice(tid(self.last), oids), tid(self.last), oids)

    def load(self, oid: bytes, tid: bytes) -> Any:
        number = u64(oid)
        self.loaded.append(number)
        found = self.revisions.get(number)
        self.beside(number)
        if isinstance(found, Exception):
            raise found
        return found

    def tell(self, *numbers: int, wait: Callable[[], None] = lambda: None) -> None:
        tell(self.outbox, self.load, b''.join(map(oid, numbers)), maxtid, wait)

    def told(self) -> Iterator[tuple[str, Any]]:
        """The messages so far: their names, and what is invalid, or which revision is told of which object."""
        parts: list[bytes] = []
        while self.outbox.backlog:
            parts += map(bytes, self.outbox.take())
        for payload in payloads(Inbox(2**31), parts):
            _, _, name, args = decode_from_server(payload)
            if name == 'prefetched':
                assert args[0] == maxtid
                yield name, {u64(each): found for each, found in unpack(*args[1:])}
            else:
                yield name, [u64(each) for each in args[1]]


@pytest.fixture
def database() -> Database:
    database = Database()
    for number in range(MOST):
        database.commit(number)
    assert len(list(database.told())) == MOST
    return database


def test_many_small_revisions_are_told_in_one_message(database: Database) -> None:
    database.tell(*range(MOST))
    assert list(database.told()) == [('prefetched', database.revisions)]
    assert database.loaded == list(range(MOST))


def test_a_former_revision_has_its_end(database: Database) -> None:
    database.revisions[1] = b'former', tid(1), tid(2)
    database.tell(1)
    assert list(database.told()) == [('prefetched', {1: (b'former', tid(1), tid(2))})]


def test_a_message_tells_of_no_more_than_is_enough_and_is_sent_at_once(database: Database) -> None:
    sent = []
    database.outbox.deliver = lambda: sent.append(database.outbox.backlog)
    sizes = [ENOUGH // 2 - 1, ENOUGH // 2, 1, ENOUGH - 1, 10 * ENOUGH, ENOUGH, 5]
    for number, size in enumerate(sizes):
        database.revisions[number] = bytes(size), tid(1), None
    database.tell(*range(len(sizes)))
    assert len(sent) == 4
    assert [list(revisions) for _, revisions in database.told()] == [[0, 1, 2], [3, 4], [5], [6]]


def test_before_each_message_there_is_a_wait_for_room(database: Database) -> None:
    for number in range(3):
        database.revisions[number] = bytes(ENOUGH), tid(1), None
    waits = []

    def wait() -> None:
        waits.append(len(database.loaded))
        if len(waits) == 3:
            raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError):
        database.tell(0, 1, 2, wait=wait)
    assert waits == [0, 1, 2] and len(list(database.told())) == 2


@pytest.mark.parametrize('unusual', [
    None, POSKeyError(oid(1)), ZeroDivisionError(), (b'', tid(1), None), ('text', tid(1), None), (b'x', b'short', None),
    (b'x', tid(1), b'short'), (b'x', 5, None), (None, tid(1), None), (b'x', tid(1)), 5])
def test_what_is_not_there_or_unusual_is_left_out(database: Database, unusual: Any) -> None:
    database.revisions[1] = unusual
    database.tell(0, 1, 2)
    assert list(database.told()) == [
        ('prefetched', {0: database.revisions[0], 1: None, 2: database.revisions[2]})]


def test_a_lost_database_is_told_to_who_asked(database: Database) -> None:
    database.revisions[1] = Unreachable('gone')
    with pytest.raises(Unreachable):
        database.tell(0, 1, 2)
    assert not list(database.told())


def test_nothing_is_told_to_who_has_left(database: Database) -> None:
    database.outbox.end()
    database.tell(*range(MOST))
    assert not list(database.told())


# ---- order


@pytest.mark.parametrize('read', range(8))
@pytest.mark.parametrize('changed', range(8))
def test_what_was_read_before_an_announcement_is_not_told_as_current_after_it(
        database: Database, read: int, changed: int) -> None:
    """A transaction changes any one of eight, after any one of them was read."""
    def commit(number: int) -> None:
        if number == read:
            database.beside = lambda number: None
            database.commit(changed)
    database.beside = commit
    database.tell(*range(8))
    current: dict[int, Any] = {}
    for name, what in database.told():
        if name == 'prefetched':
            current |= what
        else:
            assert what == [changed]
            for number in what:
                assert current.pop(number, None) is None, 'nothing was told before: it was read after the mark'
    assert current == {number: database.revisions[number] for number in range(8)}


def test_what_is_not_announced_is_not_told(database: Database) -> None:
    """It is left out, and the rest is told, though nobody announces it for as long as this takes."""
    database.commit(3, announce=False)
    database.tell(*range(8))
    told: dict[int, Any] = {}
    for name, what in database.told():
        told |= what
    assert told == {number: database.revisions[number] for number in range(8)} | {3: None}
    database.announce(3)
    database.tell(3)
    assert list(database.told()) == [('invalidateTransaction', [3]), ('prefetched', {3: database.revisions[3]})]


def test_it_ends_however_many_transactions_there_are(database: Database) -> None:
    """One is announced at each load: nothing can be told, and it is not tried for ever."""
    database.beside = lambda number: database.commit(MOST + 1)
    database.tell(*range(MOST))
    told: dict[int, Any] = {}
    for name, what in database.told():
        if name == 'prefetched':
            assert not told.keys() & what.keys()
            told |= what
    assert told == dict.fromkeys(range(MOST))
    assert len(database.loaded) < 4 * MOST


def test_after_a_transaction_more_and_more_are_told_at_a_time_again(database: Database) -> None:
    def commit(number: int) -> None:
        if len(database.loaded) in (64, 96):
            database.commit(MOST + 1)
    database.beside = commit
    database.tell(*range(MOST))
    assert [len(what) for name, what in database.told() if name == 'prefetched'] == [16, 32, 16]


# ---- asked for by a client


def test_a_client_is_told_what_loads_would_tell(
        serve: Callable[..., Served], connect: Callable[..., SessionPeer], file_storage: Any) -> None:
    served = serve(file_storage)
    peer = connect(served)
    tids = {number: peer.commit(oid(number), b'record %d' % number) for number in range(1, 5)}
    before = served.statistics.loads
    peer.tell('prefetch', b''.join(map(oid, range(1, 6))), tids[4])
    (asked, heads, records), = peer.notices('prefetched')
    assert asked == tids[4]
    assert unpack(heads, records) == [
        *((oid(number), (b'record %d' % number, tids[number], None)) for number in range(1, 4)),
        (oid(4), None), (oid(5), None)]
    assert served.statistics.loads == before + 5


@pytest.mark.parametrize('args', [
    (oid(1)[:-1], maxtid), (oid(1) + b'x', maxtid), (oid(1) * (MOST + 1), maxtid), (bytearray(oid(1)), maxtid),
    ('x' * 8, maxtid), ([oid(1)], maxtid), (None, maxtid), (oid(1), b'short'), (oid(1), None), (oid(1), 'x' * 8),
    (oid(1),), (oid(1), maxtid, 1)])
def test_what_asks_for_no_objects_is_refused(
        serve: Callable[..., Served], connect: Callable[..., SessionPeer], args: tuple[Any, ...]) -> None:
    served = serve()
    with pytest.raises(ProtocolError, match='prefetch failed'):
        connect(served).tell('prefetch', *args)
    assert served.statistics.loads == 0


def test_as_many_as_may_be_and_none_can_be_asked_for(
        serve: Callable[..., Served], connect: Callable[..., SessionPeer]) -> None:
    peer = connect(serve())
    peer.tell('prefetch', b'', maxtid)
    assert peer.notices('prefetched') == []
    peer.tell('prefetch', oid(1) * MOST, maxtid)
    assert peer.notices('prefetched') == [(maxtid, HEAD.pack(oid(1), z64, z64, 0) * MOST, b'')]


def test_a_lost_database_ends_the_connection(
        serve: Callable[..., Served], connect: Callable[..., SessionPeer]) -> None:
    served = serve()
    peer = connect(served)

    def lost(oid: bytes, tid: bytes) -> Any:
        raise Unreachable('gone')
    served.load_before = lost
    peer.tell('prefetch', oid(1), maxtid)
    assert peer.hung_up and peer.ended
