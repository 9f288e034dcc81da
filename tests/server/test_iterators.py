"""Iterators over transactions and their records, as a client has them."""

from collections.abc import Callable

import pytest
from ZODB.FileStorage import FileStorage

from tests.server.talk import SessionPeer
from tests.server.talk import oid
from zeo.errors import ServerException
from zeo.server import iterators as module
from zeo.server.limits import Allowance
from zeo.server.served import Served

Serve = Callable[..., Served]
Connect = Callable[..., SessionPeer]


# ---- iteration


def test_iteration_over_transactions_and_their_records(filed: SessionPeer) -> None:
    tids = [filed.commit(oid(each), b'%d' % each) for each in range(3)]
    iterator = filed.call('iterator_start', None, None)
    for each in range(3):
        found, status, user, description, extension = filed.call('iterator_next', iterator)
        assert (found, status, user, description, extension) == (
            tids[each], ' ', b'user', b'description', {})
        records = filed.call('iterator_record_start', iterator, found)
        assert filed.call('iterator_record_next', records) == (oid(each), found, b'%d' % each, None)
        assert filed.call('iterator_record_next', records) is None
        with pytest.raises(KeyError):
            filed.call('iterator_record_next', records)
    assert filed.call('iterator_next', iterator) is None
    with pytest.raises(KeyError) as caught:
        filed.call('iterator_next', iterator)
    assert caught.value.args == (iterator,)


def test_both_ends_of_an_iteration_are_inclusive(filed: SessionPeer) -> None:
    tids = [filed.commit(oid(each), b'%d' % each) for each in range(5)]
    iterator = filed.call('iterator_start', tids[1], tids[3])
    found = []
    while (transaction := filed.call('iterator_next', iterator)) is not None:
        found.append(transaction[0])
    assert found == tids[1:4]


def test_records_are_those_of_the_last_transaction(filed: SessionPeer) -> None:
    tids = [filed.commit(oid(each), b'%d' % each) for each in range(2)]
    iterator = filed.call('iterator_start', None, None)
    with pytest.raises(KeyError):
        filed.call('iterator_record_start', iterator, tids[0])
    filed.call('iterator_next', iterator)
    with pytest.raises(ServerException):
        filed.call('iterator_record_start', iterator, tids[1])
    records = filed.call('iterator_record_start', iterator, tids[0])
    for name, id in [('iterator_next', records), ('iterator_record_next', iterator),
                     ('iterator_next', 999), ('iterator_record_next', None)]:
        with pytest.raises(KeyError):
            filed.call(name, id)
    filed.tell('iterator_gc', [iterator, records, 12345])
    for name, id in [('iterator_next', iterator), ('iterator_record_next', records)]:
        with pytest.raises(KeyError):
            filed.call(name, id)


def test_iterators_end_with_the_connection(
        filed: SessionPeer, file_storage: FileStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    filed.commit(oid(1), b'record')
    made = []
    make = file_storage.iterator
    monkeypatch.setattr(file_storage, 'iterator', lambda *args: made.append(make(*args)) or made[-1])
    iterator = filed.call('iterator_start', None, None)
    filed.call('iterator_record_start', iterator, filed.call('iterator_next', iterator)[0])
    filed.close()
    assert made[0]._file is None


def test_all_clients_together_have_only_so_many_iterators(
        connect: Connect, serve: Serve, file_storage: FileStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    served, allowance = serve(file_storage), Allowance(2)
    one, two = connect(served), connect(served)
    one.commit(oid(1), b'record')
    for each in one, two:
        each.session._iterators._allowance = allowance
    iterators = [each.call('iterator_start', None, None) for each in (one, two)]
    for each in one, two:
        with pytest.raises(ServerException, match='2 iterators are in use, of all clients'):
            each.call('iterator_start', None, None)
    transaction = one.call('iterator_next', iterators[0])[0]
    one.call('iterator_record_start', iterators[0], transaction)  # has no file of its own
    one.tell('iterator_gc', [iterators[0], iterators[0], 77])
    with pytest.raises(ServerException):  # it cannot begin, and takes nothing
        monkeypatch.setattr(file_storage, 'iterator', lambda *_: 1 // 0)
        one.call('iterator_start', None, None)
    monkeypatch.undo()
    iterators[0] = one.call('iterator_start', None, None)
    while one.call('iterator_next', iterators[0]) is not None:
        pass
    two.close()
    assert allowance.take() and allowance.take() and not allowance.take()


def test_one_client_has_only_so_many_iterators(filed: SessionPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each holds a file open."""
    monkeypatch.setattr(module, 'ITERATORS', 3)
    iterators = [filed.call('iterator_start', None, None) for _ in range(3)]
    with pytest.raises(ServerException, match='3 iterators are in use'):
        filed.call('iterator_start', None, None)
    filed.tell('iterator_gc', iterators[:1])
    filed.call('iterator_start', None, None)
