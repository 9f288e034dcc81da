"""One committer at a time: who waits, who comes next, and who need not wait at all."""

import subprocess
import sys
from typing import Any

import pytest
from ZODB.Connection import TransactionMetaData
from ZODB.POSException import ConflictError, POSKeyError
from ZODB.utils import load_current, z64

from tests.system.clients import Task, store, vote
from tests.system.servers import PATIENCE, ROOT, until


def queue_up(place: Any, watcher: Any, count: int) -> tuple[list[Any], list[Task]]:
    """So many clients that wait for the lock, one after the other."""
    waiting = [place.client() for _ in range(count)]
    tasks = []
    for number, client in enumerate(waiting, 1):
        tasks.append(Task(store, client))
        until(lambda: watcher.server_status()['waiting'] == number, f'{number} wait')
    assert all(task.is_alive() for task in tasks)
    return waiting, tasks


def test_who_waits_for_the_lock_gets_it_in_the_order_of_arrival(place: Any) -> None:
    first = place.client()
    meta = vote(first)
    waiting, tasks = queue_up(place, first, 5)
    tids = [first.tpc_finish(meta)] + [task.result() for task in tasks]
    assert tids == sorted(tids)
    status = first.server_status()
    assert status['waiting'] == 0 and status['lock_time'] is None


def test_an_abort_lets_the_next_one_in(place: Any) -> None:
    first = place.client()
    oid = first.new_oid()
    meta = vote(first, oid)
    waiting, tasks = queue_up(place, first, 2)
    first.tpc_abort(meta)
    for task in tasks:
        task.result()
    with pytest.raises(POSKeyError):
        load_current(first, oid)
    store(first)


def test_a_client_that_leaves_with_the_lock_lets_the_next_one_in(place: Any) -> None:
    watcher, first = place.client(), place.client()
    oid = first.new_oid()
    vote(first, oid)
    waiting, tasks = queue_up(place, watcher, 2)
    first.close()
    for task in tasks:
        task.result()
    with pytest.raises(POSKeyError):
        load_current(watcher, oid)


def test_a_client_that_leaves_the_queue_is_passed_over(place: Any) -> None:
    first = place.client()
    meta = vote(first)
    waiting, tasks = queue_up(place, first, 3)
    waiting[1].close()
    with pytest.raises(Exception):
        tasks[1].result()
    until(lambda: first.server_status()['waiting'] == 2, 'the server has noticed')
    first.tpc_finish(meta)
    assert tasks[0].result() < tasks[2].result()


def test_a_killed_client_process_does_not_keep_the_lock(place: Any) -> None:
    watcher = place.client()
    script = ('import sys; from tests.system.clients import *;'
              f'client = open_client("zeo", {place.server.address!r}, {place.name!r});'
              'vote(client); print("voted", flush=True); sys.stdin.read()')
    with subprocess.Popen([sys.executable, '-c', script], stdin=subprocess.PIPE, cwd=ROOT,
                          stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == 'voted\n'
        task = Task(store, place.client())
        until(lambda: watcher.server_status()['waiting'] == 1, 'the other one waits')
        process.kill()
        process.wait(PATIENCE)
    task.result()


def test_loads_and_stores_of_others_are_not_held_up(place: Any) -> None:
    first, other, reader = (place.client() for _ in range(3))
    oid = first.new_oid()
    old = store(first, oid)
    meta = vote(first, oid, old, b'new')
    assert load_current(reader, oid) == (b'x', old)
    assert reader.getTid(oid) == old
    rival = TransactionMetaData()
    other.tpc_begin(rival)
    other.store(other.new_oid(), z64, b'x', '', rival)
    other.ping()
    other.tpc_abort(rival)      # it was begun, but never waited
    new = first.tpc_finish(meta)
    until(lambda: load_current(reader, oid) == (b'new', new), 'the new state arrives')


def test_a_conflict_in_vote_frees_the_lock(place: Any) -> None:
    one, other = place.client(), place.client()
    oid = one.new_oid()
    old = store(one, oid)
    store(one, oid, old)
    with pytest.raises(ConflictError) as caught:
        vote(other, oid, old)
    assert caught.value.oid == oid
    store(one)
    store(other)


def test_a_transaction_may_be_aborted_at_any_point(place: Any) -> None:
    client = place.client()
    for steps in range(4):
        meta = TransactionMetaData()
        if steps > 0:
            client.tpc_begin(meta)
        if steps > 1:
            client.store(client.new_oid(), z64, b'x', '', meta)
        if steps > 2:
            client.tpc_vote(meta)
        client.tpc_abort(meta)
        client.tpc_abort(meta)
    store(client)
    assert len(list(client.iterator())) == 1


def test_two_threads_of_one_client_commit_one_after_the_other(place: Any) -> None:
    client = place.client()
    meta = vote(client)
    second = Task(store, client)
    assert second.is_alive()
    first = client.tpc_finish(meta)
    assert second.result() > first


def test_many_threads_store_small_and_large_records_through_one_client(place: Any) -> None:
    client = place.client()

    def work() -> None:
        for record in [b'x' * 200_000, b'x'] * 10:
            store(client, record=record)

    for task in [Task(work) for _ in range(5)]:
        task.result()
    assert len(list(client.iterator())) == 100
