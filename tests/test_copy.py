"""``python -m zeo.copy``: whole databases between files and servers, and their comparison."""

import errno
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ZODB
from ZODB.blob import Blob
from ZODB.FileStorage import FileStorage

from tests.system.servers import Server, Storage
from zeo import copy
from zeo.commands import Failure

Start = Callable[..., Server]

#: A FileStorage with blobs, as a server opens it.
WITH_BLOBS = {'1': Storage("FileStorage('Data.fs', blob_dir='blobs')",
                           '<filestorage 1>\npath Data.fs\nblob-dir blobs\n</filestorage>')}


def spell(server: Server) -> str:
    address = server.address
    return address if isinstance(address, str) else '%s:%d' % address


def fill(storage: Any, blobs: bool = False) -> None:
    """A few transactions, one of which was undone, and perhaps some with blobs."""
    db = ZODB.DB(storage)
    for number in range(4):
        with db.transaction(f'number {number}') as connection:
            connection.root()[number % 2] = str(number) * 1000
    db.undo(db.undoLog(0, 1)[0]['id'])
    __import__('transaction').commit()
    if blobs:
        for number in range(2):
            with db.transaction() as connection:
                connection.root()['blob'] = Blob(bytes([number]) * 300_000)
    db.close()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    fill(FileStorage(str(tmp_path / 'source.fs')))
    return tmp_path / 'source.fs'


def run(*arguments: Any) -> int:
    return copy.main([str(each) for each in arguments])


def test_a_file_is_copied_to_a_server_and_out_of_it_again(
        source: Path, tmp_path: Path, start_server: Start, capsys: pytest.CaptureFixture[str]) -> None:
    server = start_server()
    assert run(source, spell(server)) == 0
    assert run('--verify', source, spell(server)) == 0
    assert run(spell(server), tmp_path / 'again.fs') == 0
    assert run(spell(server), tmp_path / 'again.fs') == 0
    told = capsys.readouterr()
    assert told.out.splitlines() == ['6 transactions, 6 records, 0 blobs, 9.5 kB',
                                     '6 transactions, 6 records, 0 blobs, 9.5 kB: no difference',
                                     '6 transactions, 6 records, 0 blobs, 9.5 kB',
                                     'nothing to copy: the target has it all']
    assert not told.err
    assert (tmp_path / 'again.fs').read_bytes() == source.read_bytes()


def test_blobs_are_copied_too(
        tmp_path: Path, start_server: Start, capsys: pytest.CaptureFixture[str]) -> None:
    path, blobs = tmp_path / 'source.fs', tmp_path / 'blobs'
    fill(FileStorage(str(path), blob_dir=str(blobs)), blobs=True)
    server = start_server(storages=WITH_BLOBS)
    assert run(path, spell(server), '--source-blobs', blobs) == 0
    assert run(spell(server), tmp_path / 'again.fs', '--target-blobs', tmp_path / 'again') == 0
    assert run('--verify', path, tmp_path / 'again.fs', '--source-blobs', blobs,
               '--target-blobs', tmp_path / 'again') == 0
    told = capsys.readouterr()
    assert [re.findall(r'(\d+) blobs', line) for line in told.out.splitlines()] == [['2'], ['2'], ['2']]
    assert not told.err
    [one, *_] = sorted((tmp_path / 'again').rglob('*.blob'))
    one.chmod(0o600)
    one.write_bytes(b'something else')
    assert run('--verify', path, tmp_path / 'again.fs', '--source-blobs', blobs,
               '--target-blobs', tmp_path / 'again') == 1
    assert re.search('the blob of object [0-9a-f]{16} differs', capsys.readouterr().err)


@pytest.mark.parametrize('kind', ['zeo', 'ZEO'])
def test_all_revisions_of_blobs_get_to_servers_of_both_makes(
        kind: str, tmp_path: Path, start_server: Start, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / 'source.fs'
    db = ZODB.DB(FileStorage(str(path), blob_dir=f'{path}.blobs'))
    for number in range(3):     # two objects, with three revisions each, beside others in one transaction
        with db.transaction() as connection:
            for name in 'one', 'two':
                blob = connection.root().setdefault(name, Blob())
                with blob.open('w') as file:
                    file.write(f'{name} {number}'.encode() * 100_000)
            connection.root()['number'] = number
    db.undo(db.undoLog(0, 1)[0]['id'])
    __import__('transaction').commit()
    db.close()
    server = start_server(kind, storages=WITH_BLOBS)
    assert run(path, spell(server)) == 0
    assert run('--verify', path, spell(server)) == 0
    assert run(spell(server), tmp_path / 'again.fs') == 0
    assert run('--verify', path, tmp_path / 'again.fs') == 0
    told = capsys.readouterr()
    assert not told.err and set(re.findall(r'(\d+) blobs', told.out)) == {'8'}


def test_blobs_that_cannot_be_copied_or_compared_are_told_of(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, blobs = tmp_path / 'source.fs', tmp_path / 'blobs'
    fill(FileStorage(str(path), blob_dir=str(blobs)), blobs=True)
    (tmp_path / 'one.conf').write_text(f'<filestorage>\npath {tmp_path}/one.fs\n</filestorage>\n')
    with_blobs = '--source-blobs', blobs
    assert run(path, tmp_path / 'one.conf', *with_blobs) == 1
    assert run('--verify', path, tmp_path / 'one.conf', *with_blobs) == 1
    assert run(path, tmp_path / 'two.fs') == 1
    assert run('--verify', path, tmp_path / 'two.fs') == 1
    whats = [line.removeprefix('zeo.copy: 2 blobs were ') for line in capsys.readouterr().err.splitlines()]
    no_place, not_said = ('the target has no place for them (--target-blobs)',
                          'the source does not say where they are (--source-blobs)')
    assert whats == [f'left out: {no_place}', f'not compared: {no_place}',
                     f'left out: {not_said}', f'not compared: {not_said}']
    (tmp_path / 'two.fs.blobs').mkdir()
    assert run('--verify', path, tmp_path / 'two.fs', *with_blobs) == 1
    assert re.search('the blob of object [0-9a-f]{16} is missing in the target', capsys.readouterr().err)


def test_the_blobs_of_a_file_are_where_the_server_would_look_for_them(
        tmp_path: Path, start_server: Start, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / 'source.fs'
    fill(FileStorage(str(path), blob_dir=f'{path}.blobs'), blobs=True)
    server = start_server(storages=WITH_BLOBS)
    assert run(path, spell(server)) == 0
    assert run(spell(server), tmp_path / 'again.fs') == 0
    assert run('--verify', path, tmp_path / 'again.fs') == 0
    assert len(list((tmp_path / 'again.fs.blobs').rglob('*.blob'))) == 2
    fill(FileStorage(str(tmp_path / 'plain.fs')))
    assert run(tmp_path / 'plain.fs', tmp_path / 'copy.fs') == 0
    assert not (tmp_path / 'copy.fs.blobs').exists()
    assert not capsys.readouterr().err


def test_a_copy_that_was_stopped_goes_on_where_it_was(source: Path, tmp_path: Path) -> None:
    one, two = FileStorage(str(source), read_only=True), FileStorage(str(tmp_path / 'copy.fs'))

    class AfterThree(threading.Event):
        def is_set(self) -> bool:
            return len(list(copy.transactions(two, None, one.lastTransaction()))) == 3

    with pytest.raises(Failure, match='stopped after 3 transactions, .*; the same command goes on'):
        copy.copy(one, two, AfterThree())
    assert copy.copy(one, two, threading.Event()).transactions == 3
    assert copy.copy(one, two, threading.Event()).transactions == 0
    assert copy.compare(one, two, threading.Event()).transactions == 6
    one.close()
    two.close()
    assert (tmp_path / 'copy.fs').read_bytes() == source.read_bytes()


def test_a_target_with_other_transactions_is_left_alone(
        source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / 'other.fs'
    fill(FileStorage(str(other)))
    before = other.read_bytes()
    assert run(source, other) == 1
    assert 'the target has transactions already, and its last one, ' in capsys.readouterr().err
    assert other.read_bytes() == before


def test_a_configuration_file_of_zodb_can_be_source_and_target(
        source: Path, tmp_path: Path, start_server: Start, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / 'one.conf').write_text(f'<filestorage>\npath {source}\nread-only true\n</filestorage>\n')
    (tmp_path / 'two.conf').write_text(
        f'<filestorage>\npath {tmp_path}/two.fs\nblob-dir {tmp_path}/two\n</filestorage>\n')
    assert run(tmp_path / 'one.conf', tmp_path / 'two.conf') == 0
    assert (tmp_path / 'two.fs').read_bytes() == source.read_bytes()


def test_a_storage_of_a_servers_configuration_file_is_copied_by_its_name(
        source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / 'zeo.conf').write_text(
        f'<zeo>\naddress 9999\n</zeo>\n<mappingstorage other/>\n'
        f'<filestorage main>\npath {source}\nread-only true\n</filestorage>\n')
    assert run('-S', 'main', tmp_path / 'zeo.conf', tmp_path / 'copy.fs') == 0
    assert (tmp_path / 'copy.fs').read_bytes() == source.read_bytes()
    assert run(tmp_path / 'zeo.conf', tmp_path / 'copy.fs') == 1
    assert capsys.readouterr().err.endswith(
        'zeo.conf: cannot be opened: it has no storage 1, but other, main; name one of these with -S\n')
    (tmp_path / 'zeo.conf').write_text('<oops/>\n')
    assert run(tmp_path / 'zeo.conf', tmp_path / 'copy.fs') == 1
    assert "zeo.conf:1: unknown type name: 'oops'" in capsys.readouterr().err


@pytest.mark.parametrize('unix', [False, True])
def test_a_server_may_be_named_by_options(
        unix: bool, source: Path, tmp_path: Path, start_server: Start) -> None:
    server = start_server(unix=unix)
    assert run(source, spell(server)) == 0
    words = ['-U', server.address] if unix else ['-h', server.address[0], '-p', server.address[1]]
    assert run(*words, tmp_path / 'again.fs') == 0
    assert (tmp_path / 'again.fs').read_bytes() == source.read_bytes()
    assert run('--verify', tmp_path / 'again.fs', *words) == 0


def test_a_socket_that_is_not_there_is_not_taken_for_a_file(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run('-U', tmp_path / 'sock', tmp_path / 'copy.fs') == 1
    assert 'no server answers' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('wrong', [[], ['one'], ['one', 'two', 'three'], ['-p', '1'], ['-h', 'x', 'one', 'two'],
                                   ['-p', '1', 'one', 'two']], ids=' '.join)
def test_a_wrong_command_line_is_told_in_one_line(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        copy.main(wrong)
    assert ended.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith('zeo.copy: ')


@pytest.mark.parametrize('make', ['more', 'less', 'other'])
def test_the_first_difference_is_told(
        make: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / 'target.fs'
    assert run(source, target) == 0
    if make == 'other':
        data = target.read_bytes()
        target.write_bytes(data.replace(b'2' * 1000, b'2' * 999 + b'x'))
    else:
        db = ZODB.DB(str(target if make == 'more' else source))
        with db.transaction() as connection:
            connection.root()['new'] = 1
        db.close()
    capsys.readouterr()
    assert run('--verify', source, target) == 1
    assert re.search({'more': 'the target has transactions after [0-9a-f]{16}, the last one of the source',
                      'less': 'the target has no transaction [0-9a-f]{16}',
                      'other': 'transaction [0-9a-f]{16}: object 0{16} differs'}[make],
                     capsys.readouterr().err)


def test_a_source_that_is_not_there_and_a_target_that_cannot_be_used_are_told(
        source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / 'missing.fs', tmp_path / 'target.fs') == 1
    assert run(source, tmp_path) == 1
    assert run(':1', tmp_path / 'target.fs') == 1
    assert run(source, tmp_path / 'no' / 'target.fs') == 1
    (tmp_path / 'text').write_text('something else')
    assert run(source, tmp_path / 'text') == 1
    first, second, third, fourth, fifth = capsys.readouterr().err.splitlines()
    assert 'missing.fs: cannot be opened: there is no such file' in first
    assert second == f'zeo.copy: {tmp_path} is a folder; give the name of a file'
    assert third.endswith('no server answers at localhost:1 (Connection refused)')
    assert fourth == f'zeo.copy: the folder {tmp_path}/no does not exist; create it, or choose another file'
    assert 'text is damaged, or is not a FileStorage' in fifth
    assert {path.name for path in tmp_path.iterdir()} == {'source.fs', 'source.fs.index', 'source.fs.lock', 'source.fs.tmp', 'text'}


@pytest.mark.parametrize('partial, what_now', [
    (False, 'the same command goes on from here'), (True, 'nothing of this is kept, the same command begins again')])
def test_a_full_disk_is_told_with_what_to_do(
        partial: bool, what_now: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = FileStorage(str(source), read_only=True), FileStorage(str(tmp_path / 'copy.fs'))
    vote = two.tpc_vote

    def full(transaction: Any) -> None:
        if len(list(copy.transactions(two, None, one.lastTransaction()))) == 2:
            raise OSError(errno.ENOSPC, 'No space left on device')
        vote(transaction)

    monkeypatch.setattr(two, 'tpc_vote', full)
    with pytest.raises(Failure, match=f'after 2 transactions, .*: no room is left for the target, or .*; {what_now}'):
        copy.copy(one, two, threading.Event(), partial=partial)
    monkeypatch.undo()
    assert copy.copy(one, two, threading.Event()).transactions == 4
    one.close()
    two.close()
