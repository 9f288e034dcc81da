"""Our clients and stock clients on one server, ours or stock: they see each other's work."""

from collections.abc import Callable
from typing import Any

import pytest
import transaction
from BTrees.Length import Length
from persistent.mapping import PersistentMapping
from ZODB import DB
from ZODB.Connection import TransactionMetaData
from ZODB.POSException import ConflictError, POSKeyError
from ZODB.tests.MinPO import MinPO
from ZODB.utils import load_current, maxtid, z64

from tests.system.clients import Recorder, Task, hears_of, store, vote
from tests.system.servers import Server, file_storage, until

pytestmark = [
    pytest.mark.parametrize('server_kind', ['zeo', 'ZEO']),
    pytest.mark.filterwarnings('ignore::ResourceWarning'),  # stock clients sometimes leave a file open
]

# A record that is far larger than any buffer on the way.
LARGE = 20 * 1024 * 1024

Open = Callable[..., Any]


@pytest.fixture
def server(server_kind: str, start_server: Callable[..., Server]) -> Server:
    return start_server(server_kind)


@pytest.fixture(params=[('zeo', 'ZEO'), ('ZEO', 'zeo')], ids=['ours first', 'stock first'])
def pair(request: pytest.FixtureRequest, server: Server, open_client: Open) -> tuple[Any, Any]:
    """Two clients of different make."""
    first, second = request.param
    return open_client(first, server), open_client(second, server)


def connect(pair: tuple[Any, Any]) -> tuple[Any, Any]:
    one = DB(pair[0]).open(transaction.TransactionManager())
    catch_up(pair[1], pair[0])      # else its DB would find no root object
    return one, DB(pair[1]).open(transaction.TransactionManager())


def catch_up(storage: Any, other: Any) -> None:
    hears_of(storage, other.lastTransaction())


def commit(connection: Any, note: str = '') -> None:
    connection.transaction_manager.get().note(note)
    connection.transaction_manager.commit()


def refresh(connection: Any, other: Any) -> None:
    """Begin a new transaction that sees all that the other has committed."""
    catch_up(connection.db().storage, other.db().storage)
    connection.transaction_manager.begin()


def everything(storage: Any) -> list[Any]:
    """All transactions with all their records."""
    return [(txn.tid, txn.status, txn.user, txn.description, txn.extension,
             [(record.oid, record.tid, record.data, record.data_txn) for record in txn])
            for txn in storage.iterator()]


def test_each_sees_at_once_what_the_other_commits(pair: tuple[Any, Any]) -> None:
    one, other = connect(pair)
    one.root()['count'] = MinPO(0)
    commit(one)
    for number in range(1, 21):
        writer, reader = (one, other) if number % 2 else (other, one)
        refresh(writer, reader)
        writer.root()['count'].value += 1
        commit(writer)
        refresh(reader, writer)
        assert reader.root()['count'].value == number


def test_invalidations_reach_a_client_that_asks_for_nothing(
        server: Server, open_client: Open) -> None:
    writers = [open_client(kind, server) for kind in ('zeo', 'ZEO')]
    readers = [open_client(kind, server) for kind in ('zeo', 'ZEO')]
    for writer in writers:
        tid = store(writer)
        for reader in readers:
            hears_of(reader, tid)


def test_each_is_told_of_the_others_commits_once_and_in_order(pair: tuple[Any, Any]) -> None:
    recorders = []
    for storage in pair:
        recorder = Recorder()
        storage.registerDB(recorder)
        recorders.append(recorder)
    tids: list[list[bytes]] = [[], []]
    for number in range(30):
        which = number % 3 % 2
        tids[which].append(store(pair[which]))
    catch_up(*pair)
    catch_up(*pair[::-1])
    assert recorders[0].tids == tids[1]
    assert recorders[1].tids == tids[0]


def test_who_commits_second_gets_a_conflict_and_then_the_new_state(pair: tuple[Any, Any]) -> None:
    one, other = connect(pair)
    one.root()['x'] = MinPO(0)
    commit(one)
    refresh(other, one)
    one.root()['x'].value = 'one'
    other.root()['x'].value = 'other'
    commit(one)
    with pytest.raises(ConflictError):
        commit(other)
    other.transaction_manager.abort()
    refresh(other, one)
    assert other.root()['x'].value == 'one'
    other.root()['x'].value = 'other'
    commit(other)
    refresh(one, other)
    assert one.root()['x'].value == 'other'


def test_conflicts_between_them_are_resolved(pair: tuple[Any, Any]) -> None:
    one, other = connect(pair)
    one.root()['length'] = Length()
    commit(one)
    refresh(other, one)
    one.root()['length'].change(5)
    other.root()['length'].change(7)
    commit(one)
    commit(other)
    for connection in one, other:
        refresh(connection, other)
        assert connection.root()['length']() == 12


def test_a_read_that_a_commit_depended_on_conflicts_with_the_others_write(
        pair: tuple[Any, Any]) -> None:
    one, other = pair
    read, written = one.new_oid(), other.new_oid()
    old = store(one, read, z64, b'old')
    meta = TransactionMetaData()
    other.tpc_begin(meta)
    other.checkCurrentSerialInTransaction(read, old, meta)
    other.store(written, z64, b'depends on the old', '', meta)
    store(one, read, old, b'new')
    with pytest.raises(ConflictError):
        other.tpc_vote(meta)
    other.tpc_abort(meta)


def test_each_sees_what_the_other_undoes(pair: tuple[Any, Any]) -> None:
    one, other = connect(pair)
    one.root()['x'] = MinPO('before')
    commit(one)
    one.root()['x'].value = 'a mistake'
    commit(one, 'mistake')
    refresh(other, one)
    assert other.root()['x'].value == 'a mistake'
    [entry] = [entry for entry in other.db().undoInfo(0, 20) if entry['description'] == 'mistake']
    assert entry['id'] in [seen['id'] for seen in one.db().undoLog(0, 20)]
    other.db().undo(entry['id'], other.transaction_manager.get())
    commit(other)
    for connection in one, other:
        refresh(connection, other)
        assert connection.root()['x'].value == 'before'


def test_what_one_packs_away_is_gone_for_the_other(pair: tuple[Any, Any]) -> None:
    one, other = connect(pair)
    root = one.root()
    root['kept'] = MinPO('kept')
    root['lost'] = MinPO('lost')
    commit(one)
    lost, old = root['lost']._p_oid, root['kept']._p_serial
    kept = root['kept']._p_oid
    del root['lost']
    root['kept'].value = 'kept still'
    commit(one)
    refresh(other, one)
    other.db().pack()
    with pytest.raises(POSKeyError):
        pair[0].loadSerial(kept, old)
    with pytest.raises(POSKeyError):
        pair[0].getTid(lost)
    refresh(one, other)
    one.root()['kept'].value = 'changed after the pack'
    commit(one)
    refresh(other, one)
    assert other.root()['kept'].value == 'changed after the pack'
    assert len(everything(pair[0])) == 2


def test_iteration_and_history_tell_both_the_same(pair: tuple[Any, Any]) -> None:
    one, other = connect(pair)
    one.root()['x'] = MinPO(0)
    commit(one, 'first')
    for number in range(5):
        for connection, last in (one, other), (other, one):
            refresh(connection, last)
            current = connection.transaction_manager.get()
            current.user = 'user number %d' % number
            current.setExtendedInfo('number', number)
            connection.root()['x'].value += 1
            commit(connection, 'step')
    refresh(one, other)
    told = everything(pair[0])
    assert told == everything(pair[1])
    assert len(told) == 12 and told[-1][4] == {'number': 4}
    oid = one.root()['x']._p_oid
    history = pair[0].history(oid, 20)
    assert list(history) == list(pair[1].history(oid, 20))
    assert len(history) == 11
    assert [entry['tid'] for entry in history] == [txn[0] for txn in reversed(told[1:])]
    records = [list(iternext(storage)) for storage in pair]
    assert records[0] == records[1]
    assert [record[0] for record in records[0]] == [z64, oid]


def iternext(storage: Any) -> Any:
    """All current records."""
    cookie = None
    while True:
        oid, tid, data, cookie = storage.record_iternext(cookie)
        yield oid, tid, data
        if cookie is None:
            return


def test_old_revisions_are_the_same_for_both(pair: tuple[Any, Any]) -> None:
    oid = pair[0].new_oid()
    tids = [store(pair[0], oid, z64, b'0')]
    for number in range(1, 4):
        tids.append(store(pair[number % 2], oid, tids[-1], b'%d' % number))
    for storage in pair:
        catch_up(storage, pair[1])
        for number, (start, end) in enumerate(zip(tids, [*tids[1:], None])):
            record = b'%d' % number
            assert storage.loadBefore(oid, end or maxtid) == (record, start, end)
            assert storage.loadSerial(oid, start) == record
        assert storage.loadBefore(oid, tids[0]) is None


def test_large_records_pass_between_them(pair: tuple[Any, Any]) -> None:
    oid, tid = pair[0].new_oid(), z64
    for writer, reader in (pair, pair[::-1]):
        record = (b'from %s ' % type(writer).__module__.encode()).ljust(LARGE, b'x')
        tid = store(writer, oid, tid, record)
        catch_up(reader, writer)
        assert load_current(reader, oid) == (record, tid)


def test_new_oids_are_never_given_twice(pair: tuple[Any, Any]) -> None:
    oids = [storage.new_oid() for _ in range(250) for storage in pair]
    assert len(set(oids)) == 500


def test_who_votes_second_waits_for_the_first(pair: tuple[Any, Any]) -> None:
    one, other = pair
    meta = TransactionMetaData()
    oid = one.new_oid()
    one.tpc_begin(meta)
    one.store(oid, z64, b'first', '', meta)
    one.tpc_vote(meta)
    second = Task(store, other)
    until(lambda: one.server_status()['waiting'] == 1, 'the second vote waits in the server')
    assert second.is_alive()
    first = one.tpc_finish(meta)
    assert second.result() > first


def test_two_storages_of_one_server_keep_apart(
        server_kind: str, start_server: Callable[..., Server], open_client: Open) -> None:
    names = ['apples', 'pears']
    server = start_server(server_kind, {name: file_storage(name + '.fs') for name in names})
    ours = {name: open_client('zeo', server, name) for name in names}
    stock = {name: open_client('ZEO', server, name) for name in names}
    for name in names:
        store(ours[name], z64, z64, name.encode())
    # A commit in one of them is not held up by one in the other.
    meta = vote(ours['apples'])
    before = stock['pears'].lastTransaction()
    after = store(stock['pears'])
    assert after > before
    ours['apples'].tpc_abort(meta)
    for name in names:
        catch_up(stock[name], ours[name])
        assert load_current(stock[name], z64)[0] == name.encode()
    assert ours['apples'].lastTransaction() < after
    assert len(everything(ours['apples'])) == 1
    assert len(everything(ours['pears'])) == 2


@pytest.mark.parametrize('kind', ['zeo', 'ZEO'])
def test_a_client_with_several_addresses_finds_the_one_that_answers(
        kind: str, server: Server, open_client: Open) -> None:
    dead = server.folder + '/nobody listens here'
    storage = open_client(kind, [dead, server.address])
    assert storage.is_connected()
    tid = store(storage, z64, z64, b'x')
    assert storage.lastTransaction() == tid


def test_objects_of_a_thousand_records_arrive_whole(pair: tuple[Any, Any]) -> None:
    one, other = connect(pair)
    root = one.root()
    for number in range(1000):
        root[number] = PersistentMapping(number=number)
    commit(one)
    refresh(other, one)
    oids = [other.root()[number]._p_oid for number in range(1000)]
    other.prefetch(oids)
    assert [other.root()[number]['number'] for number in range(1000)] == list(range(1000))
