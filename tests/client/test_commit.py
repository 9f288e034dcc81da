"""What a transaction sends to a server that takes many stores at a time, and to one that does not."""

from collections.abc import Callable
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from ZODB.Connection import TransactionMetaData
from ZODB.utils import z64

from tests.client.conftest import Calls
from tests.client.conftest import Line
from tests.client.interruptions import everywhere
from tests.client.peer import Host
from tests.client.peer import Peer
from tests.server.talk import oid
from tests.server.talk import tid
from zeo import ClientStorage as door
from zeo.client import channel
from zeo.client import commit
from zeo.client import outgoing
from zeo.client.commit import LARGE
from zeo.client.commit import TOGETHER
from zeo.client.commit import Commit
from zeo.client.updates import Updates
from zeo.ClientStorage import ClientStorage
from zeo.wire.stores import Store
from zeo.wire.stores import unpack


class Pair:
    """A storage, and the server's end of its connection."""

    def __init__(self, storage: ClientStorage, peer: Peer, calls: Calls) -> None:
        self.storage, self.peer, self.calls = storage, peer, calls

    def begun(self, *stores: Store, extension: dict[str, int] = {}) -> TransactionMetaData:
        txn = TransactionMetaData('user', 'note', extension)
        self.storage.tpc_begin(txn)
        self.store(txn, *stores)
        return txn

    def store(self, txn: TransactionMetaData, *stores: Store) -> None:
        for each, serial, record in stores:
            self.storage.store(each, serial, record, '', txn)

    def finish(self, txn: TransactionMetaData, number: int) -> None:
        finishing = self.calls.start(self.storage.tpc_finish, txn)
        message = self.peer.read('tpc_finish')
        assert message.args == (number,)
        self.peer.answer(message, tid(6))
        assert finishing() == tid(6)


@pytest.fixture
def pair(host: Host, calls: Calls) -> Iterator[Pair]:
    opening = calls.start(lambda: ClientStorage(host.address))
    peer = host.accept()
    peer.welcome(tid(5), zeo=('stores', 'settle'))
    storage: ClientStorage = opening()
    yield Pair(storage, peer, calls)
    storage.close()


def small(count: int, first: int = 1) -> list[Store]:
    return [(oid(number), tid(1), b'record %d' % number) for number in range(first, first + count)]


def test_a_small_transaction_is_one_request(pair: Pair) -> None:
    txn = pair.begun(*small(3))
    voting = pair.calls.start(pair.storage.tpc_vote, txn)
    message = pair.peer.read('commit')
    number, tell_tid, user, description, heads, records = message.args
    assert (tell_tid, user, description) == (True, b'user', b'note') and not message.oneway
    assert unpack(heads, records) == small(3)
    pair.peer.answer(message, ([], tid(6)))
    assert voting() is None and pair.storage.voted_tid(txn) == tid(6)
    pair.finish(txn, number)
    assert pair.storage.loadBefore(oid(2), tid(7)) == (b'record 2', tid(6), None)


def test_what_the_server_may_know_of_can_be_aborted_whatever_has_interrupted_its_beginning(calls: Calls) -> None:
    for interruption in everywhere(commit, channel, outgoing):
        line = Line()
        transaction = Commit(TransactionMetaData(extension={'a': 1}), line.channel, (), 1, Updates(100))
        interruption.run(transaction.begin, None, ' ')
        if line.channel.ended is None:
            line.channel.post('over')
            line.channel.flush()
            assert transaction.begun or line.peer.read().name == 'over', interruption.where
        line.close()


def test_a_beginning_that_is_interrupted_leaves_no_transaction_on_the_connection(host: Host, calls: Calls) -> None:
    """Neither here nor there: the next one could not begin."""
    for interruption in everywhere(door, commit, channel, outgoing):
        opening = calls.start(lambda: ClientStorage(host.address))
        peer = host.accept()
        peer.welcome(tid(5))
        storage: ClientStorage = opening()
        txn = TransactionMetaData(extension={'a': 1})
        interruption.run(storage.tpc_begin, txn)
        if interruption.where is not None and storage._commit is None and storage.is_connected():
            link = storage._supervisor.wait()
            link.channel.post('over')
            link.channel.flush()
            assert peer.read().name == 'over', interruption.where
        storage.close()


def test_a_large_transaction_is_sent_while_it_is_made(pair: Pair) -> None:
    record = b'x' * (TOGETHER // 4)
    txn = pair.begun(*[(oid(number), z64, record) for number in range(1, 7)])
    beginning = pair.peer.read('tpc_begin')
    message = pair.peer.read('stores')
    assert message.oneway and message.args[2] == beginning.args[0]
    assert unpack(*message.args[:2]) == [(oid(number), z64, record) for number in range(1, 5)]
    voting = pair.calls.start(pair.storage.tpc_vote, txn)
    assert [each for each, _, _ in unpack(*pair.peer.read('stores').args[:2])] == [oid(5), oid(6)]
    message = pair.peer.read('vote')
    assert message.args == (beginning.args[0], True)
    pair.peer.answer(message, ([], tid(6)))
    voting()
    pair.finish(txn, beginning.args[0])


def test_everything_keeps_its_order(pair: Pair) -> None:
    large = b'x' * LARGE
    txn = pair.begun(*small(2))
    pair.storage.checkCurrentSerialInTransaction(oid(9), tid(1), txn)
    pair.store(txn, *small(1, 3), (oid(4), tid(1), large), *small(1, 5))
    voting = pair.calls.start(pair.storage.tpc_vote, txn)
    names = []
    stored: list[Store] = []
    while (message := pair.peer.read()).name != 'vote':
        names.append(message.name)
        if message.name == 'stores':
            stored += unpack(*message.args[:2])
        elif message.name == 'storea':
            stored.append(message.args[:3])
    assert names == ['tpc_begin', 'stores', 'checkCurrentSerialInTransaction', 'stores', 'storea', 'stores']
    assert stored == [*small(3), (oid(4), tid(1), large), *small(1, 5)]
    pair.peer.answer(message, ([], tid(6)))
    voting()
    pair.finish(txn, message.args[0])


def test_what_is_resolved_here_is_sent_and_voted_again(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair.storage, 'tryToResolveConflict', lambda *_: b'resolved')
    txn = pair.begun(*small(2))
    voting = pair.calls.start(pair.storage.tpc_vote, txn)
    message = pair.peer.read('commit')
    pair.peer.answer(message, [{'oid': oid(1), 'serials': (tid(4), tid(1)), 'data': b'record 1'}])
    heads, records, number = pair.peer.read('stores').args
    assert unpack(heads, records) == [(oid(1), tid(4), b'resolved')] and number == message.args[0]
    message = pair.peer.read('vote')
    assert message.args == (number, True)
    pair.peer.answer(message, ([], tid(6)))
    assert voting() == [oid(1)]
    pair.finish(txn, number)


def test_an_extension_goes_with_the_beginning(pair: Pair) -> None:
    txn = pair.begun(*small(1), extension={'key': 1})
    voting = pair.calls.start(pair.storage.tpc_vote, txn)
    assert pair.peer.read('tpc_begin').args[1:] == (b'user', b'note', {'key': 1}, None, ' ')
    assert unpack(*pair.peer.read('stores').args[:2]) == small(1)
    pair.peer.answer(pair.peer.read('vote'), ([], tid(6)))
    voting()


@pytest.mark.parametrize('chosen, status', [(tid(8), ' '), (None, 'p')])
def test_a_chosen_tid_and_a_status_go_with_the_beginning(pair: Pair, chosen: bytes | None, status: str) -> None:
    txn = TransactionMetaData('user', 'note')
    pair.storage.tpc_begin(txn, chosen, status)
    pair.store(txn, *small(1))
    voting = pair.calls.start(pair.storage.tpc_vote, txn)
    assert pair.peer.read('tpc_begin').args[3:] == ({}, chosen, status)
    assert unpack(*pair.peer.read('stores').args[:2]) == small(1)
    pair.peer.answer(pair.peer.read('vote'), ([], tid(8)))
    voting()


@pytest.mark.parametrize('name', ['user', 'description'])
def test_what_is_no_bytes_goes_with_the_beginning(pair: Pair, name: str) -> None:
    txn = TransactionMetaData('user', 'description')
    setattr(txn, name, 'text')
    pair.storage.tpc_begin(txn)
    pair.store(txn, *small(1))
    voting = pair.calls.start(pair.storage.tpc_vote, txn)
    assert 'text' in pair.peer.read('tpc_begin').args[1:3]
    assert unpack(*pair.peer.read('stores').args[:2]) == small(1)
    pair.peer.answer(pair.peer.read('vote'), ([], tid(6)))
    voting()


def test_an_empty_record_travels_alone(pair: Pair) -> None:
    txn = pair.begun(*small(1), (oid(2), tid(1), b''))
    voting = pair.calls.start(pair.storage.tpc_vote, txn)
    pair.peer.read('tpc_begin')
    assert unpack(*pair.peer.read('stores').args[:2]) == small(1)
    assert pair.peer.read('storea').args[:3] == (oid(2), tid(1), b'')
    pair.peer.answer(pair.peer.read('vote'), ([], tid(6)))
    voting()


@pytest.mark.parametrize('copies, offered, large', [
    (True, ('pieces',), True), (True, ('stores',), False), (False, ('pieces',), False)])
def test_large_pieces_are_for_servers_that_take_them_and_connections_that_copy_files(
        copies: bool, offered: tuple[str, ...], large: bool) -> None:
    line: Any = SimpleNamespace(copies_files=copies)
    assert Commit(TransactionMetaData(), line, offered, 1, Updates(100)).large_pieces is large


@pytest.mark.parametrize('name, does', [
    ('deleteObject', lambda storage, txn: storage.deleteObject(oid(9), tid(1), txn)),
    ('undoa', lambda storage, txn: storage.undo(tid(3), txn)),
    ('restorea', lambda storage, txn: storage.restore(oid(9), tid(3), b'record', '', None, txn))])
def test_whatever_comes_between_stores_stays_there(
        pair: Pair, name: str, does: Callable[[ClientStorage, TransactionMetaData], object]) -> None:
    txn = pair.begun(*small(1))
    does(pair.storage, txn)
    pair.store(txn, *small(1, 2))
    voting = pair.calls.start(pair.storage.tpc_vote, txn)
    names = [(message := pair.peer.read()).name for _ in range(5)]
    assert names == ['tpc_begin', 'stores', name, 'stores', 'vote']
    pair.peer.answer(message, ([], tid(6)))
    voting()


def test_what_the_server_has_not_heard_of_need_not_be_aborted(pair: Pair) -> None:
    pair.storage.tpc_abort(pair.begun(*small(2)))
    assert pair.storage.tpc_transaction() is None
    txn = pair.begun(*small(1, 3))
    voting = pair.calls.start(pair.storage.tpc_vote, txn)
    message = pair.peer.read('commit')
    assert unpack(*message.args[4:]) == small(1, 3)
    pair.peer.answer(message, ([], tid(6)))
    voting()
    aborting = pair.calls.start(pair.storage.tpc_abort, txn)
    message = pair.peer.read('tpc_abort')
    pair.peer.answer(message, None)
    aborting()


def test_other_servers_never_hear_of_it(host: Host, calls: Calls) -> None:
    opening = calls.start(lambda: ClientStorage(host.address))
    peer = host.accept()
    peer.welcome(tid(5))
    pair = Pair(opening(), peer, calls)
    txn = pair.begun(*small(2))
    voting = calls.start(pair.storage.tpc_vote, txn)
    names = [peer.read().name for _ in range(3)]
    message = peer.read('vote')
    assert names == ['tpc_begin', 'storea', 'storea'] and len(message.args) == 1
    peer.answer(message, [])
    voting()
    pair.storage.close()
