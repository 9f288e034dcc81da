"""Several servers over one PostgreSQL, all writable: what one commits all announce, and nobody is told less.

The servers are processes, as they would be on hosts of their own.  What needs one of them to end, or
PostgreSQL to, is in tests/system/test_many_servers_failing.py.
"""

import contextlib
import gc
import subprocess
import sys
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest
import transaction
from BTrees.Length import Length
from ZODB import DB
from ZODB.Connection import TransactionMetaData
from ZODB.POSException import ConflictError, POSKeyError, ReadConflictError
from ZODB.tests.MinPO import MinPO
from ZODB.utils import load_current, p64, z64

from tests.server.talk import SocketPeer
from tests.system.clients import Recorder, Task, hears_of, open_client, store, vote
from tests.system.postgres import Cluster, Host, hosts, open_directly, relstorage
from tests.system.proxy import Proxy

pytestmark = pytest.mark.filterwarnings('ignore::ResourceWarning')  # stock clients sometimes leave a file open

KINDS = ('zeo', 'ZEO')


class Site:
    """Three servers over one database, and clients that are closed at the end of a test."""

    def __init__(self, servers: list[Host], dsn: str) -> None:
        self.servers = servers
        self.dsn = dsn
        self._opened: list[Any] = []

    def client(self, number: int, kind: str = 'zeo', **options: Any) -> Any:
        """A client of one of the servers."""
        self._opened.append(open_client(kind, self.servers[number], **options))
        return self._opened[-1]

    def close(self) -> None:
        while self._opened:
            self._opened.pop().close()


@pytest.fixture(scope='module')
def three(cluster: Cluster) -> Iterator[Site]:
    dsn = cluster.dsn(cluster.database())
    with hosts(dsn, 3) as servers:
        yield Site(servers, dsn)
    gc.collect()


@pytest.fixture
def site(three: Site) -> Iterator[Site]:
    yield three
    three.close()


class Witness(Recorder):
    """Also notes which objects it was told of."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[bytes, set[bytes]]] = []

    def invalidate(self, tid: bytes, oids: Any) -> None:
        super().invalidate(tid, oids)
        self.told.append((tid, set(oids)))


def commit(storage: Any, *records: tuple[bytes, bytes]) -> bytes:
    """Commit records of some objects, given with their serials; the tid."""
    meta = transaction_of(storage, *records)
    storage.tpc_vote(meta)
    tid: bytes = storage.tpc_finish(meta)
    return tid


def transaction_of(storage: Any, *records: tuple[bytes, bytes]) -> Any:
    """A transaction that has stored some records and has not voted."""
    meta = TransactionMetaData()
    storage.tpc_begin(meta)
    for oid, serial in records:
        storage.store(oid, serial, b'record', '', meta)
    return meta


# ---- what is announced ------------------------------------------------------------------


def test_all_clients_of_all_servers_are_told_of_each_transaction_once_in_order_and_exactly(site: Site) -> None:
    writers = [site.client(number, kind) for number, kind in ((0, 'zeo'), (1, 'ZEO'), (2, 'zeo'))]
    readers = [site.client(number, kind) for number in range(3) for kind in KINDS]
    witnesses = [Witness() for _ in readers]
    for reader, witness in zip(readers, witnesses):
        reader.registerDB(witness)
    done = []
    last = {writer.new_oid(): z64 for writer in writers for _ in range(4)}
    for number, writer in enumerate(islice(cycle(writers), 60)):
        oids = [oid for place, oid in enumerate(last) if (number + place) % 5 == 0]
        tid = commit(writer, *((oid, last[oid]) for oid in oids))
        last |= dict.fromkeys(oids, tid)
        done.append((tid, set(oids)))
    for reader, witness in zip(readers, witnesses):
        hears_of(reader, done[-1][0])
        assert witness.told == done
        assert not witness.caches


def test_transactions_committed_on_all_servers_at_once_are_announced_everywhere_in_one_order(site: Site) -> None:
    readers = [site.client(number, kind) for number in range(3) for kind in KINDS]
    witnesses = [Witness() for _ in readers]
    for reader, witness in zip(readers, witnesses):
        reader.registerDB(witness)

    def write(number: int) -> dict[bytes, set[bytes]]:
        storage = open_client(KINDS[number % 2], site.servers[number // 2])
        with contextlib.closing(storage):
            oid, serial, done = storage.new_oid(), z64, {}
            for _ in range(40):
                serial = commit(storage, (oid, serial))
                done[serial] = {oid}
            return done

    done: dict[bytes, set[bytes]] = {}
    for task in [Task(write, number) for number in range(6)]:
        done |= task.result()
    assert len(done) == 240
    for reader, witness in zip(readers, witnesses):
        hears_of(reader, max(done))
        assert witness.told == sorted(done.items())


@pytest.mark.parametrize('kind', KINDS)
def test_a_client_never_hears_late_of_what_came_before_its_own_commit(site: Site, kind: str) -> None:
    """What others committed below one's own tid is announced first: at once it conflicts or is known."""
    one, other = site.client(0, kind), site.client(1)
    witness = Witness()
    one.registerDB(witness)
    seen = one.new_oid()
    serial = commit(other, (seen, z64))
    for _ in range(50):
        hears_of(one, serial)
        assert load_current(one, seen)[1] == serial    # it is in the cache of one's client now
        serial = commit(other, (seen, serial))
        tid = commit(one, (one.new_oid(), z64))
        # With the answer to the commit, nothing of before is unknown.
        assert serial < tid and serial in witness.tids
        assert load_current(one, seen)[1] == serial


def test_what_was_acknowledged_on_one_server_is_seen_by_a_transaction_begun_afterwards_on_another(
        site: Site) -> None:
    storages = [site.client(number, kind, server_sync=True) for number, kind in ((0, 'zeo'), (1, 'ZEO'), (2, 'zeo'))]
    opened = []
    for storage in storages:
        if opened:
            storage.sync()
        opened.append(DB(storage).open(transaction.TransactionManager()))
    opened[0].transaction_manager.begin()
    opened[0].root()['count'] = MinPO(0)
    opened[0].transaction_manager.commit()
    for number in range(90):
        connection = opened[(number + 1) % 3]
        connection.transaction_manager.begin()
        assert connection.root()['count'].value == number
        connection.root()['count'].value += 1
        connection.transaction_manager.commit()


def test_a_ping_to_one_server_brings_what_was_acknowledged_by_another(site: Site) -> None:
    writer, readers = site.client(0), [site.client(1), site.client(2, 'ZEO')]
    for _ in range(100):
        tid = store(writer)
        for reader in readers:
            reader.ping()
            assert reader.lastTransaction() == tid


def test_what_uses_the_database_directly_is_announced_too(site: Site) -> None:
    storage, witness = site.client(0), Witness()
    storage.registerDB(witness)
    with contextlib.closing(open_directly(site.dsn)) as direct:
        oid = direct.new_oid()
        tid = store(direct, oid)
    hears_of(storage, tid)
    assert witness.told == [(tid, {oid})]
    assert load_current(storage, oid) == (b'x', tid)


def test_who_connects_later_begins_where_all_others_are(site: Site) -> None:
    tids = [store(site.client(0))]
    for number in cycle((1, 2, 0)):
        late = site.client(number)
        assert late.lastTransaction() == tids[-1]
        tids.append(store(late))
        if len(tids) == 12:
            break


# ---- conflicts ----------------------------------------------------------------------------


@pytest.mark.parametrize('kinds', [('zeo', 'zeo'), ('zeo', 'ZEO'), ('ZEO', 'zeo'), ('ZEO', 'ZEO')], ids='-'.join)
def test_who_comes_second_gets_an_ordinary_conflict_with_both_serials(site: Site, kinds: tuple[str, str]) -> None:
    one, other = (site.client(number, kind) for number, kind in enumerate(kinds))
    oid = one.new_oid()
    old = store(one, oid)
    new = store(one, oid, old)
    meta = transaction_of(other, (oid, old))
    with pytest.raises(ConflictError) as caught:
        other.tpc_vote(meta)
    other.tpc_abort(meta)
    assert type(caught.value) is ConflictError
    assert (caught.value.oid, caught.value.serials) == (oid, (new, old))
    # It is not poisoned for what comes next.
    newest = store(other, oid, new)
    hears_of(one, newest)


@pytest.mark.parametrize('kind', KINDS)
def test_a_dependency_that_another_server_has_broken_is_a_read_conflict(site: Site, kind: str) -> None:
    one, other = site.client(0), site.client(1, kind)
    oid = one.new_oid()
    old = store(one, oid)
    store(one, oid, old)
    meta = transaction_of(other, (other.new_oid(), z64))
    other.checkCurrentSerialInTransaction(oid, old, meta)
    with pytest.raises(ReadConflictError) as caught:
        other.tpc_vote(meta)
    other.tpc_abort(meta)
    assert caught.value.oid == oid


def test_a_counter_that_all_count_at_once_counts_all(site: Site) -> None:
    """Conflicts between clients of different servers are resolved as those between clients of one."""
    storage = site.client(0)
    db = DB(storage)
    with db.transaction() as connection:
        connection.root()['length'] = Length()
    tid = storage.lastTransaction()

    def count(number: int) -> int:
        conflicts = 0
        with contextlib.closing(DB(open_client(KINDS[number % 2], site.servers[number // 2]))) as mine:
            hears_of(mine.storage, tid)
            manager = transaction.TransactionManager()
            with contextlib.closing(mine.open(manager)) as connection:
                for _ in range(25):
                    while True:
                        manager.begin()
                        connection.root()['length'].change(1)
                        try:
                            manager.commit()
                            break
                        except ConflictError:   # two that resolve the same meet in the database
                            manager.abort()
                            conflicts += 1
        return conflicts

    for task in [Task(count, number) for number in range(6)]:
        task.result()
    storage.ping()
    with db.transaction() as connection:
        assert connection.root()['length']() == 150
    assert sum(storage_.server_status()['conflicts_resolved'] for storage_ in
               (site.client(number) for number in range(3))) > 10


def test_a_vote_on_one_server_waits_for_the_commit_that_is_under_way_on_another(site: Site) -> None:
    one, other = site.client(0), site.client(1)
    oid = one.new_oid()
    old = store(one, oid)
    hears_of(other, old)
    meta = vote(one, oid, old, b'one')
    rival = Task(store, other, oid, old, b'other')
    rival.join(.3)      # it waits, as a rule, or is told at once
    tid = one.tpc_finish(meta)
    # Whoever had the object first has won; the other is told, not overwritten.
    with pytest.raises(ConflictError):
        rival.result()
    hears_of(other, tid)
    assert load_current(other, oid) == (b'one', tid)


# ---- what is told to clients about the database ---------------------------------------------------


def test_new_oids_are_never_given_twice(site: Site) -> None:
    storages = [site.client(number, kind) for number in range(3) for kind in KINDS]
    oids = [storage.new_oid() for _ in range(250) for storage in storages]
    assert len(set(oids)) == 1500


@pytest.mark.parametrize('kind', KINDS)
def test_errors_carry_oids_and_tids_and_nothing_else(site: Site, kind: str) -> None:
    storage = site.client(0, kind)
    store(storage)
    for call in (lambda: storage.loadSerial(p64(1 << 40), p64(5)), lambda: storage.getTid(p64(1 << 40)),
                 lambda: storage.history(p64(1 << 40)), lambda: load_current(storage, p64(1 << 40))):
        with pytest.raises(POSKeyError) as caught:
            call()
        assert caught.value.args == (p64(1 << 40),)
    # The connection is as good as before.
    hears_of(site.client(1), store(storage))


@pytest.mark.parametrize('kind', KINDS)
def test_a_cache_filled_at_one_server_is_verified_at_another(site: Site, kind: str, tmp_path: Path) -> None:
    """Also by a server that has announced nothing of what was missed."""
    late = Host('zeo', {'1': relstorage(site.dsn)}, unix=True)
    options = {'client': 'travels', 'var': str(tmp_path)}
    with Proxy(site.servers[0].address) as proxy:
        addresses = [proxy.address, late.address]
        travelling = open_client(kind, addresses, **options)
        oids = [travelling.new_oid() for _ in range(50)]
        serial = commit(travelling, *((oid, z64) for oid in oids))
        for oid in oids:
            load_current(travelling, oid)
        travelling.close()

    writer = site.client(2)
    new = serial
    for _ in range(20):         # the new server has not announced any of them
        new = commit(writer, (oids[7], new))
    with late:
        travelling = open_client(kind, addresses, **options)
        try:
            assert travelling.lastTransaction() == new
            before = travelling.server_status()['loads']
            assert load_current(travelling, oids[7])[1] == new
            for oid in oids[8:]:
                assert load_current(travelling, oid)[1] == serial
            assert travelling.server_status()['loads'] - before == 1
        finally:
            travelling.close()


def test_any_server_says_what_was_changed_since_any_transaction(site: Site) -> None:
    """What a client asks that comes back, asked of a server that was started afterwards."""
    writer = site.client(0)
    oids = [writer.new_oid() for _ in range(5)]
    first = commit(writer, *((oid, z64) for oid in oids))
    serials = dict.fromkeys(oids, first)
    for number in range(20):
        oid = oids[number % 3]
        serials[oid] = commit(writer, (oid, serials[oid]))
    with Host('zeo', {'1': relstorage(site.dsn)}) as late, SocketPeer(late.address) as peer:
        last, changed = peer.call('getInvalidations', first)
    assert last == max(serials.values())
    assert sorted(changed) == sorted(oids[:3])


# ---- starting ------------------------------------------------------------------------------


def test_an_empty_database_is_prepared_by_servers_started_at_once(cluster: Cluster) -> None:
    dsn = cluster.dsn(cluster.database(like=''))
    servers = [Host('zeo', {'1': relstorage(dsn)}) for _ in range(2)]
    storages: list[Any] = []

    def open_database(kind: str, server: Host) -> DB:
        storages.append(open_client(kind, server))
        return DB(storages[-1])

    try:
        for task in [Task(server.start) for server in servers]:
            task.result()
        # A stock client, too, has to be told that there is no root object, not that something is wrong.
        opening = [Task(open_database, kind, server) for kind, server in zip(KINDS, servers)]
        databases = []
        for task in opening:
            try:
                databases.append(task.result())
            except ConflictError:
                pass    # both wanted to create it
        assert databases
        with databases[0].transaction() as connection:
            connection.root()['x'] = 1
    finally:
        for storage in storages:
            storage.close()
        for server in servers:
            server.close()


def test_a_history_free_storage_is_refused_with_a_message(cluster: Cluster, tmp_path: Path) -> None:
    database = cluster.database(like='')
    section = relstorage(cluster.dsn(database), keep_history=False).section
    assert section is not None
    configuration = tmp_path / 'zeo.conf'
    configuration.write_text(f'<zeo>\naddress 127.0.0.1:0\n</zeo>\n{section.replace("NAME", "1")}')
    refused = subprocess.run([sys.executable, '-m', 'zeo.start', '-C', str(configuration)], text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60)
    assert refused.returncode not in (0, -9)
    assert 'keep-history' in refused.stdout
    assert 'Traceback' not in refused.stdout
