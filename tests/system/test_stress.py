"""Snapshots stay whole under stress; and a snapshot that is not would be noticed."""

import os
import pathlib
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import transaction
import ZODB
from ZODB.FileStorage import FileStorage
from ZODB.utils import u64

from tests.system import hotset
from tests.system.hotset import AllOfIt
from tests.system.hotset import Discrepancy

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(*arguments: str, timeout: float = 170) -> tuple[int, str]:
    """Exit status and output; should it hang, nothing of what it started is left behind."""
    command = [sys.executable, '-m', 'tests.system.stress', *arguments]
    with subprocess.Popen(command, cwd=ROOT, text=True, start_new_session=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            account, _ = process.communicate(timeout=timeout)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, account


# ---- the real thing ----------------------------------------------------------------------


@pytest.mark.timeout(200)
@pytest.mark.parametrize('arguments', [
    ['slow-storage'], ['everything', '--unix'], ['slow-storage', '--client', 'mixed'],
], ids=' '.join)
def test_every_snapshot_is_whole_for_a_few_seconds(arguments):
    status, account = run(*arguments, '--minutes', '.1', '--processes', '2', '--threads', '2')
    assert status == 0, account
    assert 'revisions checked' in account


@pytest.mark.timeout(200)
def test_replies_that_stand_behind_announcements_are_noticed():
    # It takes a few seconds, and ends when somebody has noticed.
    status, account = run('slow-storage', '--minutes', '2', '--mistake', 'no-mark')
    assert status == 1, account
    assert 'Discrepancy' in account


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize('client', ['zeo', 'mixed'])
def test_every_snapshot_is_whole_for_a_minute(client):
    status, account = run('--minutes', '1', '--client', client, timeout=500)
    assert status == 0, account


# ---- those who look ------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: pathlib.Path) -> str:
    return str(tmp_path / 'Data.fs')


@pytest.fixture
def root(path: str) -> Iterator[Any]:
    db = ZODB.DB(FileStorage(path))
    manager = transaction.TransactionManager()
    with db.transaction('create') as connection:
        hotset.create(connection.root())
    connection = db.open(manager)
    yield connection.root()
    manager.abort()
    connection.close()
    db.close()


def test_what_writers_leave_is_what_readers_expect(root):
    chance = random.Random(1)
    for _ in range(50):
        hotset.write(root, chance)
        hotset.read(root, chance)
        root._p_jar.transaction_manager.commit()
    assert root['changes']() == 100
    assert len(hotset.read(root, AllOfIt())) == hotset.ACCOUNTS + 2 * hotset.PAIRS + 1


def an_account_robbed(root):
    root['accounts'][3].value -= 1


def a_change_not_counted(root):
    root['accounts'][3].changes += 1


def a_counter_ahead(root):
    root['changes'].change(1)


def half_a_pair(root):
    root['pairs'][2][0].value += 1


@pytest.mark.parametrize('torn', [an_account_robbed, a_change_not_counted, a_counter_ahead, half_a_pair])
def test_a_torn_snapshot_is_noticed(root, torn):
    torn(root)
    with pytest.raises(Discrepancy):
        hotset.read(root, AllOfIt())


HISTORY = {1: {10, 20, 30}, 2: {20}}


@pytest.mark.parametrize('before, seen', [
    (31, ((1, 30), (2, 20))), (30, ((1, 20),)), (21, ((1, 20), (2, 20))), (20, ((1, 10),)),
])
def test_a_snapshot_of_what_was_current_passes(before, seen):
    assert hotset.check_snapshots([(before, seen)], HISTORY) == len(seen)


@pytest.mark.parametrize('before, seen', [
    (31, ((1, 20),)),               # stale
    (31, ((2, 20), (1, 10))),
    (30, ((1, 30),)),               # ahead of its time
    (20, ((2, 20),)),               # not there yet
    (31, ((1, 25),)),               # never there
    (31, ((3, 10),)),
])
def test_a_snapshot_of_anything_else_is_noticed(before, seen):
    with pytest.raises(Discrepancy):
        hotset.check_snapshots([(before, seen)], HISTORY)


def test_a_lost_commit_is_noticed():
    hotset.check_acknowledged([20, 30], HISTORY)
    with pytest.raises(Discrepancy, match='1 acknowledged commits are lost'):
        hotset.check_acknowledged([20, 40], HISTORY)


def test_history_is_noted_before_a_pack_forgets_it(root):
    storage = root._p_jar.db().storage
    cell = root['accounts'][0]
    serials = [cell._p_serial]
    history: hotset.History = {}
    noted = hotset.note_history(storage, history)
    for value in (1, 2, 3):
        cell.change(value, random.Random(1))
        root._p_jar.transaction_manager.commit()
        serials.append(cell._p_serial)
        noted = hotset.note_history(storage, history, noted)
    assert noted == serials[-1]
    root._p_jar.db().pack()
    remains: hotset.History = {}
    hotset.note_history(storage, remains)
    assert remains[u64(cell._p_oid)] == {u64(serials[-1])}
    assert history[u64(cell._p_oid)] == set(map(u64, serials))
