"""``python -m zeo.backup``: online, incremental, with blobs, verified, restorable to a point in time."""

import errno
import fcntl
import threading
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import transaction
import ZODB
from persistent.TimeStamp import TimeStamp
from ZODB.blob import Blob
from ZODB.FileStorage import FileStorage

from tests.system.servers import Server
from tests.test_copy import WITH_BLOBS, fill, spell
from zeo import backup, copy, pack
from zeo.commands import Failure

Start = Callable[..., Server]
Open = Callable[..., Any]


def run(*arguments: Any) -> int:
    return backup.main([str(each) for each in arguments])


class Site:
    """A served database with blobs, its backup, and places to restore to."""

    def __init__(self, server: Server, client: Any, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.address = spell(server)
        self.backup = folder / 'backup'
        self.db = ZODB.DB(client)

    def commit(self, key: str, value: Any) -> bytes:
        with self.db.transaction() as connection:
            connection.root()[key] = value
        tid: bytes = self.db.storage.lastTransaction()
        return tid

    def restored(self, *arguments: str) -> dict[str, Any]:
        """What is in the database that a backup becomes; blobs as bytes."""
        target = self.folder / f'restored{len(list(self.folder.glob("restored*.fs")))}'
        file, blobs = target.with_suffix('.fs'), target.with_suffix('.blobs')
        assert run('--restore', *arguments, self.backup, file, '--target-blobs', blobs) == 0
        db = ZODB.DB(FileStorage(str(file), blob_dir=str(blobs)))
        with db.transaction() as connection:
            found = dict(connection.root())
            for key, value in found.items():
                if isinstance(value, Blob):
                    with value.open() as file:
                        found[key] = file.read()
        db.close()
        return found


@pytest.fixture
def site(start_server: Start, open_client: Open, tmp_path: Path) -> Any:
    server = start_server(storages=WITH_BLOBS)
    site = Site(server, open_client('zeo', server, blob_dir=str(tmp_path / 'cache')), tmp_path)
    yield site
    site.db.close()


def test_each_run_adds_what_is_new_and_all_of_it_is_restored(
        site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.commit('one', 1)
    assert run(site.address, site.backup) == 0
    site.commit('blob', Blob(b'a blob' * 100_000))
    site.commit('two', 2)
    assert run(site.address, site.backup) == 0
    assert run(site.address, site.backup) == 0
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith('2 transactions, 2 records, 0 blobs, ')
    assert second.startswith('2 transactions, 3 records, 1 blobs, 600.')
    assert third.startswith('nothing new since 2')
    assert len(backup.Backup(site.backup).parts) == 2
    assert site.restored() == {'one': 1, 'blob': b'a blob' * 100_000, 'two': 2}


def test_of_a_storage_without_transactions_no_backup_is_made(
        start_server: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = start_server()
    assert run('%s:%d' % server.address, tmp_path / 'backup') == 0
    assert capsys.readouterr().out == 'nothing to back up: there is no transaction yet\n'


def test_a_point_in_time_is_restored(site: Site) -> None:
    tids = [site.commit('number', number) for number in range(4)]
    assert run(site.address, site.backup) == 0
    for number, tid in enumerate(tids):
        moment = datetime.fromtimestamp(TimeStamp(tid).timeTime())
        after = moment.replace(microsecond=min(moment.microsecond + 1, 999_999))
        assert site.restored('--at', after.isoformat(' '))['number'] == number
    assert site.restored('--at', '2100-01-01 00:00:00')['number'] == 3


def test_there_is_nothing_before_the_beginning(
        site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(site.address, site.backup) == 0
    assert run('--restore', '--at', '2020-01-01 00:00:00', site.backup, site.folder / 'old.fs') == 1
    assert 'there is nothing yet at that time; the backup begins at 2' in capsys.readouterr().err
    assert not (site.folder / 'old.fs').exists()


def test_a_pack_between_two_runs_does_no_harm(site: Site) -> None:
    for number in range(4):
        site.commit('number', number)
    assert run(site.address, site.backup) == 0
    assert pack.main([site.address]) == 0
    site.commit('number', 'after the pack')
    assert run(site.address, site.backup) == 0
    assert site.restored()['number'] == 'after the pack'


def test_the_server_may_be_named_by_options(site: Site, start_server: Start) -> None:
    site.commit('one', 1)
    port = site.address.rpartition(':')[2]
    assert run('-h', '127.0.0.1', '-p', port, site.backup) == 0
    assert site.restored() == {'one': 1}
    empty = start_server(unix=True, storages=WITH_BLOBS)
    assert run('--restore', site.backup, '-U', empty.address) == 0
    assert copy.main(['--verify', site.address, str(empty.address)]) == 0


def test_a_backup_is_restored_into_a_server(
        site: Site, start_server: Start, tmp_path: Path) -> None:
    site.commit('blob', Blob(b'a blob'))
    assert run(site.address, site.backup) == 0
    empty = start_server(storages=WITH_BLOBS)
    assert run('--restore', site.backup, spell(empty)) == 0
    assert copy.main(['--verify', site.address, spell(empty)]) == 0


@pytest.mark.parametrize('name', ['Data.fs', 'part.json', '*.blob'])
def test_damage_is_found_before_anything_is_restored(
        name: str, site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.commit('blob', Blob(b'a blob'))
    assert run(site.address, site.backup) == 0
    assert run('--check', site.backup) == 0
    [file] = site.backup.rglob(name)
    file.chmod(0o600)
    file.write_bytes(file.read_bytes()[:-1] + b'?')
    assert run('--check', site.backup) == 1
    assert run('--restore', site.backup, site.folder / 'restored.fs') == 1
    assert capsys.readouterr().err.count('is damaged') == 2
    assert not (site.folder / 'restored.fs').exists()


@pytest.mark.parametrize('content', ['', '[]', '{"files": 3}', '{"files": {}}'])
def test_a_part_that_does_not_say_what_is_in_it_is_damaged(
        content: str, site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(site.address, site.backup) == 0
    [file] = site.backup.rglob('part.json')
    file.write_text(content)
    assert run('--check', site.backup) == 1
    assert run('--restore', site.backup, site.folder / 'restored.fs') == 1
    assert run(site.address, site.backup) == 1
    assert capsys.readouterr().err.count(' is damaged: ') == 3


@pytest.mark.parametrize('damage', [lambda data: data[:-1] + b'?', lambda data: data[:60] + b'?' * 50 + data[110:],
                                    lambda data: b'?' * len(data)])
def test_nothing_is_added_to_what_is_damaged(
        damage: Callable[[bytes], bytes], site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.commit('one', 1)
    assert run(site.address, site.backup) == 0
    [file] = site.backup.rglob('Data.fs')
    file.chmod(0o600)
    file.write_bytes(damage(file.read_bytes()))
    site.commit('two', 2)
    before = sorted(site.backup.rglob('*'))
    assert run(site.address, site.backup) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert 'damaged' in line
    assert sorted(site.backup.rglob('*')) == before


@pytest.mark.parametrize('number', [0, 1])
def test_a_part_that_has_gone_is_noticed(
        number: int, site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    for commit in range(3):
        site.commit('number', commit)
        assert run(site.address, site.backup) == 0
    parts = backup.Backup(site.backup).parts
    parts[number][2].rename(site.folder / 'elsewhere')
    site.commit('number', 3)
    assert run('--check', site.backup) == 1
    assert run('--restore', site.backup, site.folder / 'restored.fs') == 1
    assert run(site.address, site.backup) == 1
    says = f'is not whole: a part is missing before {parts[number + 1][2].name}'
    assert [says in line for line in capsys.readouterr().err.splitlines()] == [True] * 3
    assert not (site.folder / 'restored.fs').exists()


def test_what_is_later_than_the_point_in_time_is_not_kept_in_the_target(
        site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    tid = site.commit('number', 1)
    site.commit('number', 2)
    assert run(site.address, site.backup) == 0
    target = site.folder / 'target.fs'
    assert run('--restore', site.backup, target) == 0
    moment = datetime.fromtimestamp(TimeStamp(tid).timeTime() + 0.000_001)
    assert run('--restore', '--at', moment.isoformat(' '), site.backup, target) == 1
    assert 'which is later than what is to be restored; choose an empty target' in capsys.readouterr().err


def test_a_restore_tells_all_that_is_there_and_where_its_blobs_are(
        site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.commit('blob', Blob(b'a blob'))
    assert run(site.address, site.backup) == 0
    target = site.folder / 'target.fs'
    assert run('--restore', site.backup, target) == 0
    assert run('--restore', site.backup, target) == 0
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == second == third and ' 1 blobs, ' in first
    assert len(list((site.folder / 'target.fs.blobs').rglob('*.blob'))) == 1
    assert copy.main(['--verify', site.address, str(target)]) == 0


def test_the_file_of_a_database_is_backed_up_with_its_blobs(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, blobs = tmp_path / 'source.fs', tmp_path / 'there'
    fill(FileStorage(str(path), blob_dir=str(blobs)), blobs=True)
    assert run(path, tmp_path / 'backup', '--source-blobs', blobs) == 0
    assert run(path, tmp_path / 'other') == 1
    blobs.rename(f'{path}.blobs')
    assert run(path, tmp_path / 'third') == 0
    told = capsys.readouterr()
    assert [' 2 blobs, ' in line for line in told.out.splitlines()] == [True, False, True]
    assert '2 blobs could not be had from the source; all else is there' in told.err


@pytest.mark.parametrize('name, says', [
    ('no/backup', 'no does not exist; create it'), ('file', 'file is not a folder; choose another one')])
def test_a_folder_that_cannot_be_is_told(
        name: str, says: str, site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    (site.folder / 'file').write_text('')
    assert run(site.address, site.folder / name) == 1
    assert says in capsys.readouterr().err


def test_the_backup_of_another_database_is_left_alone(
        site: Site, start_server: Start, open_client: Open, capsys: pytest.CaptureFixture[str]) -> None:
    other = start_server()
    ZODB.DB(open_client('zeo', other)).close()
    assert run(site.address, site.backup) == 0
    before = sorted(site.backup.rglob('*'))
    assert run(spell(other), site.backup) == 1
    assert 'the backup is one of another database, or the database was set back' in capsys.readouterr().err
    assert sorted(site.backup.rglob('*')) == before


def test_a_database_that_was_set_back_is_not_mixed_with_what_it_was(
        site: Site, start_server: Start, open_client: Open, tmp_path: Path,
        capsys: pytest.CaptureFixture[str]) -> None:
    site.commit('one', 1)
    assert run(site.address, tmp_path / 'old') == 0
    site.commit('two', 2)
    assert run(site.address, site.backup) == 0
    server = start_server()
    assert run('--restore', tmp_path / 'old', spell(server)) == 0
    db = ZODB.DB(open_client('zeo', server))
    other = db.open()
    other.add(item := type(other.root())())
    transaction.commit()
    db.close()
    assert item._p_serial > backup.Backup(site.backup).lastTransaction()
    assert run(spell(server), site.backup) == 1
    assert 'or the database was set back' in capsys.readouterr().err


def test_two_backups_into_one_folder_at_the_same_time_are_refused(
        site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.backup.mkdir()
    with open(site.backup / 'lock', 'w') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert run(site.address, site.backup) == 1
    assert 'another backup into this folder is in progress' in capsys.readouterr().err


def test_a_backup_that_is_stopped_keeps_what_it_has_and_goes_on_the_next_time(
        site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    class AfterTwo(threading.Event):
        asked = 0

        def is_set(self) -> bool:
            self.asked += 1
            return self.asked > 2

    for number in range(4):
        site.commit('number', number)
    with copy.opened(site.address, '1', None, 'test', read_only=True) as source:
        with pytest.raises(Failure, match='stopped; what is there is whole'):
            backup.back_up(source, site.backup, AfterTwo())
        stopped = threading.Event()
        stopped.set()
        with pytest.raises(Failure, match='stopped; what is there is whole'):
            backup.back_up(source, site.backup, stopped)
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert site.restored()['number'] == 0
    assert run(site.address, site.backup) == 0
    assert site.restored()['number'] == 3


def test_a_full_disk_is_told_with_what_has_become_of_the_backup(
        site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, 'No space left on device')

    site.commit('one', 1)
    assert run(site.address, site.backup) == 0
    site.commit('two', 2)
    before = sorted(site.backup.rglob('*'))
    with monkeypatch.context() as patch:
        patch.setattr(backup, '_flush', full)
        assert run(site.address, site.backup) == 1
    assert capsys.readouterr().err == (
        f'zeo.backup: {site.backup}: No space left on device; nothing was added to this backup\n')
    assert sorted(site.backup.rglob('*')) == before
    assert run('--check', site.backup) == 0
    assert run(site.address, site.backup) == 0
    assert site.restored() == {'one': 1, 'two': 2}


def test_what_was_left_unfinished_is_forgotten(site: Site) -> None:
    site.commit('one', 1)
    (site.backup / 'unfinished').mkdir(parents=True)
    (site.backup / 'unfinished' / 'Data.fs').write_bytes(b'half of a file')
    assert run(site.address, site.backup) == 0
    assert not (site.backup / 'unfinished').exists()
    assert site.restored() == {'one': 1}


def test_a_stock_server_is_backed_up_too(
        start_server: Start, open_client: Open, tmp_path: Path) -> None:
    server = start_server('ZEO')
    ZODB.DB(open_client('ZEO', server)).close()
    assert run(spell(server), tmp_path / 'backup') == 0
    assert run('--restore', tmp_path / 'backup', tmp_path / 'restored.fs') == 0
    assert copy.main(['--verify', spell(server), str(tmp_path / 'restored.fs')]) == 0


@pytest.mark.parametrize('wrong', [
    [], ['zeo.sock'], ['--check', 'dir', 'other'], ['--restore', 'dir'], ['--check', '--restore', 'dir'],
    ['--target-blobs', 'b', 'zeo.sock', 'dir'], ['--source-blobs', 'b', '--check', 'dir'],
    ['-p', '1'], ['-U', 'sock', '--check', 'dir'], ['-p', '1', 'zeo.sock', 'dir'], ['-h', 'x', 'zeo.sock', 'dir'],
    ['--at', '2020-01-01 00:00:00', 'zeo.sock', 'dir'], ['--restore', '--at', '2020-01-01', 'dir', 'x'],
    ['--restore', '--at', 'yesterday', 'dir', 'x']], ids=' '.join)
def test_a_wrong_command_line_is_told_in_one_line(
        wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        backup.main(wrong)
    assert ended.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith('zeo.backup: ')
