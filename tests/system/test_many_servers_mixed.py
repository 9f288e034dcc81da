"""A client of ours and a stock client, on different servers over one PostgreSQL, see each other's work.

What is tested is what tests/system/test_mixed_clients.py has for two clients on one server: nobody is to
notice the difference.
"""

import gc
from collections.abc import Iterator
from typing import Any

import pytest
from ZODB.POSException import POSKeyError
from ZODB.tests.MinPO import MinPO
from ZODB.tests.StorageTestBase import zodb_pickle
from ZODB.utils import load_current

from tests.system import test_mixed_clients as mixed
from tests.system.clients import hears_of, open_client, persistently, store
from tests.system.postgres import Cluster, HostPool

pytestmark = pytest.mark.filterwarnings('ignore::ResourceWarning')  # stock clients sometimes leave a file open


@pytest.fixture(scope='module')
def pool(cluster: Cluster) -> Iterator[HostPool]:
    pool = HostPool(cluster, 2, 7, poll_interval=.1)
    yield pool
    pool.close()
    gc.collect()


@pytest.fixture(params=[('zeo', 'ZEO'), pytest.param(('ZEO', 'zeo'), marks=pytest.mark.soak)],
                ids=['ours first', 'stock first'])
def pair(request: pytest.FixtureRequest, pool: HostPool) -> Iterator[tuple[Any, Any]]:
    """Two clients of different make on different servers."""
    _, name = pool.take()
    storages = [open_client(kind, server, name) for kind, server in zip(request.param, pool.servers)]
    yield storages[0], storages[1]
    for storage in storages:
        storage.close()


test_each_sees_at_once_what_the_other_commits = mixed.test_each_sees_at_once_what_the_other_commits
test_each_is_told_of_the_others_commits_once_and_in_order = (
    mixed.test_each_is_told_of_the_others_commits_once_and_in_order)
test_who_commits_second_gets_a_conflict_and_then_the_new_state = (
    mixed.test_who_commits_second_gets_a_conflict_and_then_the_new_state)
test_conflicts_between_them_are_resolved = mixed.test_conflicts_between_them_are_resolved
test_a_read_that_a_commit_depended_on_conflicts_with_the_others_write = (
    mixed.test_a_read_that_a_commit_depended_on_conflicts_with_the_others_write)
test_each_sees_what_the_other_undoes = mixed.test_each_sees_what_the_other_undoes
test_iteration_and_history_tell_both_the_same = mixed.test_iteration_and_history_tell_both_the_same
test_old_revisions_are_the_same_for_both = mixed.test_old_revisions_are_the_same_for_both
test_large_records_pass_between_them = pytest.mark.soak(mixed.test_large_records_pass_between_them)
test_new_oids_are_never_given_twice = mixed.test_new_oids_are_never_given_twice
test_objects_of_a_thousand_records_arrive_whole = mixed.test_objects_of_a_thousand_records_arrive_whole


def test_what_one_packs_away_is_history_for_neither(pair: tuple[Any, Any]) -> None:
    """Its server packs for all; what another one has read before it may still know, as a client may."""
    one, other = mixed.connect(pair)
    kept, lost = one.root()['kept'], one.root()['lost'] = MinPO(0), MinPO(0)
    mixed.commit(one)
    del one.root()['lost']
    kept.value = 1
    mixed.commit(one)
    oid, last = kept._p_oid, kept._p_serial
    mixed.refresh(other, one)
    other.db().pack()
    for storage in pair:
        assert len(mixed.everything(storage)) == 1
        assert load_current(storage, oid)[1] == last
    with pytest.raises(POSKeyError):
        pair[1].loadSerial(lost._p_oid, lost._p_serial)
    for writer, reader in ((one, other), (other, one)):
        mixed.refresh(writer, reader)
        writer.root()['kept'].value += 1
        mixed.commit(writer)
    mixed.refresh(one, other)
    assert one.root()['kept'].value == other.root()['kept'].value == 3


def test_a_pack_that_forgets_the_last_transaction_leaves_both_servers_at_work(
        pair: tuple[Any, Any], cluster: Cluster, pool: HostPool) -> None:
    """RelStorage forgets transactions of which nothing is left, be it the last one, which clients know of."""
    one, other = mixed.connect(pair)
    one.root()['x'] = MinPO(0)
    mixed.commit(one)
    last = store(pair[0], pair[0].new_oid(), record=zodb_pickle(MinPO('nobody refers to it')))
    hears_of(pair[1], last)
    one.db().pack()
    # All connections are opened again, and the database has nothing of what was announced last.
    assert cluster.hang_up(pool.databases[pool.taken])
    for writer, reader in ((one, other), (other, one)):
        persistently(lambda: add_one(writer))
        mixed.refresh(reader, writer)
    assert other.root()['x'].value == one.root()['x'].value == 2


def add_one(connection: Any) -> None:
    try:
        connection.transaction_manager.begin()
        connection.root()['x'].value += 1
        connection.transaction_manager.commit()
    finally:
        connection.transaction_manager.abort()
