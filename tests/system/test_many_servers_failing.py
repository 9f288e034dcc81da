"""Several servers over one PostgreSQL: a server dies, PostgreSQL dies, connections are cut; nothing is lost."""

import base64
import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import transaction
from transaction.interfaces import TransientError
from ZODB import DB
from ZODB.Connection import TransactionMetaData
from ZODB.POSException import POSError
from ZODB.tests.MinPO import MinPO
from ZODB.utils import load_current

from tests.system.clients import Task, hears_of, open_client, persistently, store, vote
from tests.system.cuts import Attempts, commit
from tests.system.postgres import Cluster, Host, hosts, open_directly, relstorage
from tests.system.proxy import DOWN, UP, Proxy
from tests.system.servers import until
from tests.system.test_many_servers import Witness
from zeo import ClientDisconnected, OutcomeUnknown
from zeo.client.verification import CacheIsNewer

pytestmark = pytest.mark.filterwarnings('ignore::ResourceWarning')  # stock clients sometimes leave a file open

NOBODY = ('127.0.0.1', 1)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def database(cluster: Cluster) -> str:
    return cluster.database()


@pytest.fixture
def two(cluster: Cluster, database: str) -> Iterator[list[Host]]:
    with hosts(cluster.dsn(database), 2) as servers:
        yield servers


# ---- the fate of a commit -----------------------------------------------------------------


def test_another_server_is_asked_what_became_of_a_commit_and_tells_the_truth(two: list[Host]) -> None:
    with contextlib.closing(open_client('zeo', two[1], server_sync=True)) as direct, Proxy(two[0].address) as proxy:
        attempts = Attempts(direct)
        for direction, cut in [(UP, cut) for cut in range(0, 180, 20)] + [(DOWN, cut) for cut in range(0, 120, 20)]:
            proxy.target = two[0].address
            with contextlib.closing(open_client('zeo', [proxy.address, two[1].address])) as storage:
                hears_of(storage, attempts.serial)

                def lose(direction: str = direction, cut: int = cut) -> None:
                    proxy.target = NOBODY       # whoever comes back comes to the other server
                    proxy.cut_after(cut, direction)

                attempts.commit(storage, cut, lose)
            proxy.mend()
        attempts.judge()


def test_a_server_that_is_only_slow_cannot_finish_what_another_has_said_is_not_committed(two: list[Host]) -> None:
    """It has got the order to finish and stands still; the client asks elsewhere; then it goes on."""
    first, second = two
    with contextlib.closing(open_client('zeo', second)) as direct, Proxy(first.address) as proxy:
        oid = direct.new_oid()
        serial = store(direct, oid, record=b'before')
        with contextlib.closing(open_client('zeo', [proxy.address, second.address])) as storage:
            hears_of(storage, serial)
            process = first.process
            assert process is not None

            standing = Event()

            def stand_still() -> None:
                process.send_signal(signal.SIGSTOP)
                proxy.target = NOBODY
                proxy.passed[UP] = 0
                standing.set()

            task = Task(commit, storage, oid, serial, b'after', stand_still)
            try:
                until(lambda: standing.is_set() and proxy.passed[UP], 'the order to finish is with the server')
                proxy.half_close()
                # The other server may want to wait until it knows.
                task.join(3)
            finally:
                process.send_signal(signal.SIGCONT)
            tid = None
            try:
                tid = task.result()
            except OutcomeUnknown:
                return
            except ClientDisconnected:
                pass
        # Whatever it still does is done when it has served somebody else.
        with contextlib.closing(open_client('zeo', first)) as other:
            store(other)
        direct.ping()
        assert load_current(direct, oid) == ((b'before', serial) if tid is None else (b'after', tid))


def test_a_commit_that_waits_for_a_standby_is_not_denied_by_another_server(
        cluster: Cluster, two: list[Host]) -> None:
    """It is decided, and nobody sees it yet."""
    first, second = two
    with contextlib.closing(open_client('zeo', second)) as direct, Proxy(first.address) as proxy:
        oid = direct.new_oid()
        serial = store(direct, oid, record=b'before')
        with contextlib.closing(open_client('zeo', [proxy.address, second.address])) as storage:
            hears_of(storage, serial)
            with contextlib.ExitStack() as waiting:

                def have_it_wait() -> None:
                    proxy.target = NOBODY
                    waiting.enter_context(cluster.set('synchronous_standby_names', 'nobody'))

                task = Task(commit, storage, oid, serial, b'after', have_it_wait)
                until(lambda: cluster.execute("SELECT 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep'"),
                      'the commit waits for the standby')
                proxy.half_close()
                task.join(2)    # it may well want to wait, too
            tid = task.result()
        direct.ping()
        assert load_current(direct, oid) == (b'after', tid)


def test_an_undo_does_not_overwrite_what_was_committed_meanwhile(cluster: Cluster, two: list[Host]) -> None:
    """It looks whether it may be done while the commit of another server is decided and not yet seen."""
    with contextlib.closing(open_client('zeo', two[0])) as one, contextlib.closing(open_client('zeo', two[1])) as other:
        oid = one.new_oid()
        first = store(one, oid, record=b'first')
        second = store(one, oid, first, b'second')
        store(other)    # its server has made its preparations in the database
        meta = vote(one, oid, second, b'third')
        with cluster.set('synchronous_standby_names', 'nobody'):
            finishing = Task(one.tpc_finish, meta)
            until(lambda: cluster.execute("SELECT 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep'"),
                  'the commit waits for the standby')
            undoing = Task(undo, other, second)
            until(lambda: not undoing.is_alive() or cluster.execute(
                "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"), 'the undo waits for the commit')
        third = finishing.result()
        with pytest.raises(POSError):       # there is nothing any more that it could undo
            undoing.result()
        hears_of(other, third)
        assert load_current(other, oid) == (b'third', third)


def undo(storage: Any, tid: bytes) -> None:
    meta = TransactionMetaData()
    storage.tpc_begin(meta)
    try:
        storage.undo(base64.encodebytes(tid).rstrip(), meta)
        storage.tpc_vote(meta)
        storage.tpc_finish(meta)
    except BaseException:
        storage.tpc_abort(meta)
        raise


@pytest.mark.parametrize('kind', ['zeo', 'ZEO'])
def test_what_a_server_was_killed_with_holds_up_nobody(two: list[Host], kind: str) -> None:
    """A vote dies with its server: others store the same object at once."""
    with contextlib.closing(open_client('zeo', two[1])) as other:
        oid = other.new_oid()
        serial = store(other, oid)
        with contextlib.closing(open_client(kind, [two[0].address, two[1].address], wait_timeout=20)) as storage:
            hears_of(storage, serial)
            with contextlib.closing(open_client('zeo', two[0])) as voter:
                hears_of(voter, serial)
                meta = vote(voter, oid, serial)
                rival = Task(store, other, oid, serial, b'rival')
                two[0].kill()
                tid = rival.result()
                voter.tpc_abort(meta)
            hears_of(storage, tid)
            assert load_current(storage, oid) == (b'rival', tid)
    two[0].start()


@pytest.mark.parametrize('kind', ['zeo', 'ZEO'])
def test_a_client_goes_on_at_another_server_when_its_own_dies(two: list[Host], kind: str) -> None:
    addresses = [server.address for server in two]
    with contextlib.closing(DB(open_client(kind, addresses))) as db:
        manager = transaction.TransactionManager()
        with contextlib.closing(db.open(manager)) as connection:
            connection.root()['x'] = MinPO(0)
            manager.commit()
            for number in range(1, 5):
                victim = two[number % 2]
                victim.kill()
                for attempt in range(100):
                    try:
                        manager.begin()
                        assert connection.root()['x'].value == number - 1
                        connection.root()['x'].value = number
                        manager.commit()
                        break
                    except TransientError:
                        manager.abort()
                        until(db.storage.is_connected, 'the client is connected')
                victim.start()
            manager.begin()
            assert connection.root()['x'].value == 4


# ---- PostgreSQL -----------------------------------------------------------------------------


@pytest.mark.parametrize('end', [Cluster.stop, Cluster.kill], ids=['ended', 'killed'])
def test_clients_wait_while_postgresql_is_restarted(cluster: Cluster, two: list[Host], end: Any) -> None:
    with contextlib.closing(open_client('zeo', two[0])) as ours, \
            contextlib.closing(open_client('ZEO', two[1])) as stock:
        oid = ours.new_oid()
        tid = store(ours, oid)
        hears_of(stock, tid)
        for number, storage in enumerate((ours, stock, ours)):
            end(cluster)
            cluster.start()
            tid = persistently(lambda: store(storage, oid, tid, b'%d' % number))
            for each in ours, stock:
                hears_of(each, tid)
                assert persistently(lambda: load_current(each, oid)) == (b'%d' % number, tid)


def test_sessions_ended_by_the_administrator_are_opened_again(
        cluster: Cluster, database: str, two: list[Host]) -> None:
    with contextlib.closing(open_client('zeo', two[0])) as storage, \
            contextlib.closing(open_client('zeo', two[1])) as other:
        oid = storage.new_oid()
        tid = store(storage, oid)
        hears_of(other, tid)
        meta = vote(storage, oid, tid, b'in between')
        assert cluster.hang_up(database)
        with pytest.raises(TransientError):
            storage.tpc_finish(meta)
        storage.tpc_abort(meta)
        assert persistently(lambda: load_current(other, oid)) == (b'x', tid)
        # Nobody holds a lock.
        new = persistently(lambda: store(other, oid, tid, b'later'))
        hears_of(storage, new)
        newest = persistently(lambda: store(storage, oid, new, b'latest'))
        hears_of(other, newest)


def test_a_server_that_starts_while_postgresql_is_away_says_so(cluster: Cluster, database: str) -> None:
    section = relstorage(cluster.dsn(database)).section
    assert section is not None
    cluster.stop()
    try:
        refused = subprocess.run(
            [sys.executable, '-m', 'zeo.start', '-C', '/dev/stdin'], text=True, cwd=ROOT,
            input=f'<zeo>\naddress 127.0.0.1:0\n</zeo>\n{section.replace("NAME", "1")}',
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60)
    finally:
        cluster.start()
    assert refused.returncode not in (0, -9)
    assert '<relstorage 1>' in refused.stdout
    assert 'Traceback' not in refused.stdout


@pytest.mark.parametrize('kind', ['zeo', 'ZEO'])
def test_a_database_that_is_older_than_the_client_is_refused(
        cluster: Cluster, database: str, kind: str, tmp_path: Path) -> None:
    """As after a failover to an asynchronous standby that lacks the last transactions."""
    with contextlib.closing(open_directly(cluster.dsn(database))) as direct:
        oid = direct.new_oid()
        old = store(direct, oid)
    standby = cluster.database(like=database)
    with Host('zeo', {'1': relstorage(cluster.dsn(standby))}) as behind, \
            Host('zeo', {'1': relstorage(cluster.dsn(database))}) as first, Proxy(first.address) as proxy:
        addresses = [proxy.address, behind.address]
        options = {'client': 'known', 'var': str(tmp_path), 'wait_timeout': 3}
        with contextlib.closing(open_client(kind, addresses[0], **options)) as storage:
            new = store(storage, oid, old, b'new')
            assert load_current(storage, oid) == (b'new', new)
            proxy.target = behind.address
            proxy.reset()
            # Whoever has noticed already that the connection is lost hears what is wrong with the next.
            with pytest.raises((TransientError, CacheIsNewer)):
                load_current(storage, storage.new_oid() if kind == 'zeo' else b'\0' * 7 + b'\xfe')


def test_what_was_packed_before_a_server_looked_is_not_told_by_halves(two: list[Host]) -> None:
    """Transactions that it has missed have not all of their objects any more: nobody may see a state between them."""
    here, there = (open_client('zeo', server) for server in two)
    witness = Witness()
    with contextlib.closing(DB(here)) as db, contextlib.closing(there):
        with db.transaction() as connection:
            root = connection.root()
            root['a'], root['b'] = one, other = MinPO(0), MinPO(0)
        oids = {one._p_oid, other._p_oid}
        hears_of(there, here.lastTransaction())
        for oid in oids:
            load_current(there, oid)
        there.registerDB(witness)
        process = two[1].process
        assert process is not None
        process.send_signal(signal.SIGSTOP)
        try:
            with db.transaction() as connection:    # both
                connection.root()['a'].value = connection.root()['b'].value = 1
            with db.transaction() as connection:    # and one of them again
                connection.root()['b'].value = 2
            db.pack()
        finally:
            process.send_signal(signal.SIGCONT)
        hears_of(there, here.lastTransaction())
        told = [set(each) for _, each in witness.told]
        assert not told or oids <= told[0], told
        for oid in oids:
            assert persistently(lambda: load_current(there, oid)) == load_current(here, oid)
        assert 'was packed before this server had looked' in str(two[1].log)
