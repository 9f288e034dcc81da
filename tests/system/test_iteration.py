"""Iterators over a server's transactions: where they begin and end, and when they die."""

import datetime
from collections.abc import Callable
from typing import Any

import pytest
from ZODB.Connection import TransactionMetaData
from ZODB.FileStorage import FileStorage
from ZODB.utils import p64, u64, z64

import zeo
from tests.system.clients import store
from tests.system.servers import Server, file_storage, until


def tids(iterator: Any) -> list[bytes]:
    return [transaction.tid for transaction in iterator]


def test_an_iterator_begins_and_ends_where_it_is_told(place: Any) -> None:
    client = place.client()
    all_tids = [store(client) for _ in range(6)]
    assert tids(client.iterator()) == all_tids
    assert tids(client.iterator(all_tids[2])) == all_tids[2:]
    assert tids(client.iterator(None, all_tids[2])) == all_tids[:3]
    assert tids(client.iterator(all_tids[1], all_tids[1])) == all_tids[1:2]
    assert tids(client.iterator(p64(u64(all_tids[1]) + 1), all_tids[3])) == all_tids[2:4]
    assert tids(client.iterator(p64(u64(all_tids[-1]) + 1))) == []


def test_an_empty_storage_has_no_transactions(place: Any) -> None:
    assert tids(place.client().iterator()) == []


def test_iterators_run_side_by_side(place: Any) -> None:
    one, other = place.client(), place.client()
    all_tids = [store(one) for _ in range(3)]
    iterators = [one.iterator(), one.iterator(), other.iterator()]
    for tid in all_tids:
        assert [next(iterator).tid for iterator in iterators] == [tid] * 3
    for iterator in iterators:
        assert next(iterator, None) is None
        assert next(iterator, None) is None     # the end stays the end


def test_records_come_with_their_transaction(place: Any) -> None:
    client = place.client()
    meta = TransactionMetaData('someone', 'many records', {'size': 7})
    oids = [client.new_oid() for _ in range(300)]
    client.tpc_begin(meta)
    for number, oid in enumerate(oids):
        client.store(oid, z64, b'%d' % number, '', meta)
    client.tpc_vote(meta)
    tid = client.tpc_finish(meta)
    transaction = next(client.iterator())
    assert (transaction.tid, transaction.status) == (tid, ' ')
    assert (transaction.user, transaction.description) == (b'someone', b'many records')
    assert transaction.extension == {'size': 7}
    assert [(record.oid, record.tid, record.data) for record in transaction] == [
        (oid, tid, b'%d' % number) for number, oid in enumerate(oids)]


def test_an_iterator_lives_on_while_its_client_commits(place: Any) -> None:
    client = place.client()
    first, second = store(client), store(client)
    iterator = client.iterator()
    assert next(iterator).tid == first
    store(client)
    assert next(iterator).tid == second


def test_abandoned_iterators_do_no_harm(place: Any) -> None:
    client = place.client()
    all_tids = [store(client) for _ in range(3)]
    for number in range(500):
        next(client.iterator())
        if number % 50 == 0:
            store(client)   # the server is told of them when a transaction ends
    assert tids(client.iterator())[:3] == all_tids


def test_an_iterator_ends_with_its_connection(
        start_server: Callable[..., Server], open_client: Callable[..., Any]) -> None:
    server = start_server()
    client = open_client('zeo', server)
    all_tids = [store(client) for _ in range(3)]
    iterator = client.iterator()
    next(iterator)
    abandoned = client.iterator()
    next(abandoned)
    server.stop()
    until(lambda: not client.is_connected(), 'the client notices')
    server.start()
    client.ping()
    with pytest.raises(zeo.ClientDisconnected):
        next(iterator)
    del abandoned
    assert tids(client.iterator()) == all_tids
    store(client)


def test_current_records_come_one_by_one(place: Any) -> None:
    client = place.client()
    oids = [client.new_oid() for _ in range(10)]
    for oid in oids:
        store(client, oid, z64, b'old')
    latest = {oid: store(client, oid, client.getTid(oid), b'new') for oid in oids}
    seen = []
    cookie = None
    while True:
        oid, tid, record, cookie = client.record_iternext(cookie)
        seen.append((oid, tid, record))
        if cookie is None:
            break
    assert seen == [(oid, latest[oid], b'new') for oid in oids]


@pytest.mark.parametrize('kind', ['zeo', 'ZEO'])
def test_what_is_no_plain_data_in_an_extension_is_left_out_and_all_else_is_told(
        start_server: Callable[..., Server], open_client: Any, tmp_path: Any, kind: str) -> None:
    path = str(tmp_path / 'Data.fs')
    storage = FileStorage(path)
    extensions = [{'note': 'one'}, {'note': 'two', 'when': datetime.datetime(2026, 1, 2)}, {'note': 'three'}]
    serial = z64
    for extension in extensions:
        meta = TransactionMetaData('someone', 'changes it', extension)
        storage.tpc_begin(meta)
        storage.store(z64, serial, b'cx\ny\nq.N.', '', meta)
        storage.tpc_vote(meta)
        serial = storage.tpc_finish(meta)
    storage.close()
    server = start_server(storages={'1': file_storage(path)})
    client = open_client(kind, server)
    plain = [{'note': 'one'}, {'note': 'two'}, {'note': 'three'}]
    assert [transaction.extension for transaction in client.iterator()] == plain
    for log in client.history(z64, 9), client.undoLog(0, -9), client.undoInfo(0, -9):
        assert [entry['note'] for entry in log] == ['three', 'two', 'one']
        assert [entry['description'] for entry in log] == [b'changes it'] * 3
        assert not any('when' in entry for entry in log)
    lines = [line for line in server.log.lines if 'clients are not told of' in line]
    assert len(lines) == 1 and lines[0].endswith("'when' (datetime)"), lines
