"""The library goes through a server and comes back as it was; and if it did not, that would be seen."""

import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
import ZODB
from ZODB.FileStorage import FileStorage

from tests.system import library
from tests.system.team import Client
from tests.system.team import Discrepancy

ROOT = pathlib.Path(__file__).resolve().parents[2]

NAMES = ['abc.py', 'bisect.py', 'queue.py']
NUMBERED = list(enumerate(NAMES))


def run(command: list[str]) -> tuple[int, str]:
    """Exit status and output; should it hang, nothing of what it started is left behind."""
    with subprocess.Popen(command, cwd=ROOT, text=True, start_new_session=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            account, _ = process.communicate(timeout=170)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, account


@pytest.mark.timeout(200)
@pytest.mark.parametrize('options, documents', [
    (['--quick'], 40), (['--quick', '--files', '10', '--unix'], 10),
], ids=['over TCP', 'over a Unix domain socket'])
def test_the_library_comes_back_as_it_was(options, documents):
    status, account = run([sys.executable, '-m', 'tests.system.library', *options])
    assert status == 0, account
    assert 'no discrepancy' in account
    assert f'{documents} documents' in account


@pytest.fixture
def client(tmp_path: pathlib.Path) -> Iterator[Client]:
    """A small library, without any server."""
    db = ZODB.DB(FileStorage(str(tmp_path / 'Data.fs')), large_record_size=1 << 26)
    client = Client(db, 'tester', lambda: None, lambda: client.figures['words looked up'] > 0)
    library.found(client)
    library.put(client, NUMBERED)
    yield client
    db.close()


def compare(client: Client) -> None:
    library.compare(client, NUMBERED)


def compare_index(client: Client) -> None:
    library.compare_index(client, NAMES)


def compare_records(client: Client) -> None:
    library.compare_records(client)


def test_a_library_well_kept_has_no_discrepancy(client):
    library.search(client)
    compare(client)
    compare_index(client)
    compare_records(client)
    assert client.figures['documents'] == 3
    assert client.figures['definitions'] > 30
    assert client.figures['words looked up'] > 0


def test_what_was_changed_is_undone(client):
    library.change(client, [0, 2], round=0)
    with pytest.raises(Discrepancy, match='abc.py is not what its file is'):
        compare(client)
    with pytest.raises(Discrepancy):
        compare_index(client)
    library.undo(client, [0, 2])
    compare(client)
    compare_index(client)
    assert client.figures['undone'] == 2


def test_what_was_changed_is_edited_back_and_packed_away(client):
    library.change(client, [0, 2], round=0)
    library.edit(client, [0, 2])
    compare(client)
    compare_index(client)
    with pytest.raises(Discrepancy, match='outlived the pack'):
        compare_records(client)
    library.pack(client)
    compare_records(client)
    assert client.figures['KB after'] < client.figures['KB before']


def a_byte_less(root):
    root['documents'][1].source = root['documents'][1].source[:-1]


def another_definition(root):
    root['documents'][1].definitions[0].first += 1


def a_definition_of_another_document(root):
    root['documents'][1].definitions[0].document = root['documents'][0]


def no_document(root):
    del root['documents'][1]


def a_word_less(root):
    root['words']['bisect_left'].remove(1)


def a_word_more(root):
    root['words']['bisect_left'].insert(0)


def a_word_that_is_nowhere(root):
    root['words']['nowhere_in_the_text'] = type(root['words']['bisect_left'])([1])


@pytest.mark.parametrize('damage, who', [
    (a_byte_less, compare), (another_definition, compare), (a_definition_of_another_document, compare),
    (no_document, compare), (no_document, compare_index), (a_word_less, compare_index),
    (a_word_more, compare_index), (a_word_that_is_nowhere, compare_index), (no_document, compare_records),
])
def test_damage_is_seen(client, damage, who):
    client.do(damage)
    with pytest.raises(Discrepancy):
        who(client)


@pytest.mark.parametrize('damage', [a_word_less, a_word_more])
def test_damage_is_seen_while_searching(client, damage):
    client.over = lambda: client.figures['transactions'] > 2000    # it looks into random documents
    client.do(damage)
    with pytest.raises(Discrepancy):
        library.search(client)


def test_a_transaction_that_conflicts_is_done_again(client):
    seen = []

    def work(root):
        seen.append(root['counter'])
        root['counter'] += 1
        if len(seen) == 1:
            client.do(count)

    def count(root):
        root['counter'] += 1

    def begin(root):
        root['counter'] = 0

    client.do(begin)
    client.do(work)
    assert seen == [0, 1]
    assert client.figures['conflicts'] == 1


def test_a_record_that_is_gone_is_missed(client):
    storage = client.db.storage
    lost = []
    client.do(lambda root: lost.append(root['documents']._p_oid))
    every_record = storage.record_iternext

    def but_one(token=None):
        found = every_record(token)
        return every_record(found[3]) if found[0] == lost[0] else found

    storage.record_iternext = but_one
    with pytest.raises(Discrepancy, match='to which others refer'):
        compare_records(client)
