"""Iterators that live in the server."""

import gc
from typing import Any

import pytest

from tests.client.conftest import Calls
from tests.client.conftest import Line
from tests.client.peer import oid
from tests.client.peer import tid
from zeo.client.iteration import Dropped
from zeo.client.iteration import Transactions
from zeo.errors import ClientDisconnected
from zeo.errors import ProtocolError


def begin(line: Line, calls: Calls, dropped: Dropped, iterator_id: int = 7) -> Transactions:
    starting = calls.start(Transactions, line.channel, tid(1), None, dropped)
    message = line.peer.read('iterator_start')
    assert message.args == (tid(1), None)
    line.peer.answer(message, iterator_id)
    iterator = starting()
    assert isinstance(iterator, Transactions)
    return iterator


def advance(line: Line, calls: Calls, iterator: Any, answer: Any) -> Any:
    going = calls.start(next, iterator, None)
    line.peer.answer(line.peer.read(), answer)
    return going()


def test_transactions_and_their_records_come_one_by_one(line: Line, calls: Calls) -> None:
    iterator = begin(line, calls, Dropped())
    transaction = advance(line, calls, iterator, (tid(2), ' ', b'user', b'note', {'a': 1}))
    assert transaction.tid == tid(2)
    assert (transaction.status, transaction.user, transaction.description) == (' ', b'user', b'note')
    assert transaction.extension == {'a': 1}
    starting = calls.start(iter, transaction)
    message = line.peer.read('iterator_record_start')
    assert message.args == (7, tid(2))
    line.peer.answer(message, 8)
    records = starting()
    record = advance(line, calls, records, (oid(1), tid(2), b'data', None))
    assert (record.oid, record.tid, record.data, record.data_txn) == (oid(1), tid(2), b'data', None)
    assert advance(line, calls, records, None) is None
    assert next(records, 'the end') == 'the end'  # and asks no more
    assert advance(line, calls, iterator, None) is None
    assert next(iterator, 'the end') == 'the end'


def test_iterators_that_are_dropped_are_reported_later(line: Line, calls: Calls) -> None:
    dropped = Dropped()
    first, second = begin(line, calls, dropped, 7), begin(line, calls, dropped, 8)
    assert advance(line, calls, second, None) is None  # the server has disposed of that one
    del first, second
    gc.collect()
    dropped.report(line.channel)
    line.channel.flush()
    assert line.peer.read('iterator_gc').args == ([7],)
    dropped.report(line.channel)
    going = calls.start(line.channel.call, 'ping')
    line.peer.answer(line.peer.read('ping'), None)  # nothing else came before it
    going()


def test_an_iterator_whose_request_for_records_fails_lives_on(line: Line, calls: Calls) -> None:
    iterator = begin(line, calls, Dropped())
    transaction = advance(line, calls, iterator, (tid(2), ' ', b'', b'', {}))
    starting = calls.start(iter, transaction)
    line.peer.refuse(line.peer.read('iterator_record_start'), KeyError(7))
    with pytest.raises(KeyError):
        starting()
    assert advance(line, calls, iterator, (tid(3), ' ', b'', b'', {})).tid == tid(3)


def test_an_iterator_ends_with_its_connection(line: Line, calls: Calls) -> None:
    dropped = Dropped()
    iterator = begin(line, calls, dropped)
    line.channel.end('lost')
    with pytest.raises(ClientDisconnected, match='iterator'):
        next(iterator)


def test_what_was_dropped_on_another_connection_is_forgotten(line: Line, calls: Calls) -> None:
    dropped = Dropped()
    iterator = begin(line, calls, dropped)
    del iterator
    gc.collect()
    another = Line()
    dropped.report(another.channel)
    assert another.channel._outgoing._posted == []
    another.close()
    dropped.report(line.channel)
    assert line.channel._outgoing._posted == []


def test_an_extension_that_ZODB_would_unpickle_is_refused(line: Line, calls: Calls) -> None:
    iterator = begin(line, calls, Dropped())
    with pytest.raises(ProtocolError):
        advance(line, calls, iterator, (tid(2), ' ', b'', b'', b'cos\nsystem\n.'))
