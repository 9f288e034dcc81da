"""``python -m zeo.pack`` beside real servers of both makes."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ZODB
from ZODB.FileStorage import FileStorage

from tests.system.servers import PATIENCE, ROOT, Server, Storage, until
from zeo import commands, pack
from zeo.commands import Failure

Start = Callable[..., Server]
Open = Callable[..., Any]

# A FileStorage whose packs go on once there is a file called ``go``; they may be stopped while waiting.
GATED = '''__import__('tests.test_pack', fromlist=['Gated']).Gated('Data.fs')'''


class Gated(FileStorage):  # type: ignore[misc]
    """Its pack stops at the first object that is alive until the test lets it go on."""

    def pack(self, t: float, referencesf: Any, gc: bool | None = None) -> None:
        def gated(record: bytes, oids: Any = None) -> Any:
            until(lambda: [referencesf(record), os.path.exists('go')][1], 'the test lets the pack go on')
            return referencesf(record, oids)
        super().pack(t, gated, gc)


def arguments(server: Server) -> list[str]:
    address = server.address
    return [address if isinstance(address, str) else '%s:%d' % address]


def fill(open_client: Open, server: Server, storage: str = '1', kind: str = 'zeo') -> None:
    db = ZODB.DB(open_client(kind, server, storage))
    for number in range(5):
        with db.transaction() as connection:
            connection.root()['x'] = str(number) * 10_000
    db.close()


@pytest.mark.parametrize('kind', ['zeo', 'ZEO'])
def test_a_pack_tells_the_sizes_before_and_after(
        kind: str, start_server: Start, open_client: Open, capsys: pytest.CaptureFixture[str]) -> None:
    server = start_server(kind)
    fill(open_client, server)
    assert pack.main(arguments(server)) == 0
    told = capsys.readouterr()
    assert 'storage 1: 50.9 kB before, 10.2 kB after (80 % less), ' in told.out
    assert not told.err
    assert (Path(server.folder) / 'Data.fs').stat().st_size < 11_000


def test_several_servers_are_packed_in_one_call_and_one_that_fails_does_not_keep_the_others(
        start_server: Start, open_client: Open, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = start_server(), start_server(unix=True)
    fill(open_client, one)
    fill(open_client, two)
    assert pack.main([*arguments(one), '/no/such/socket', *arguments(two)]) == 1
    told = capsys.readouterr()
    assert told.out.count('80 % less') == 2
    [line] = told.err.splitlines()
    assert line.startswith('zeo.pack: no server answers at /no/such/socket (')


def test_what_is_younger_than_so_many_days_is_kept(
        start_server: Start, open_client: Open, capsys: pytest.CaptureFixture[str]) -> None:
    server = start_server()
    fill(open_client, server)
    assert pack.main([*arguments(server), '--days=1']) == 0
    assert pack.main([*arguments(server), '--at=2020-01-01 12:30']) == 0
    assert capsys.readouterr().out.count('(nothing to remove)') == 2


def test_a_storage_that_is_not_there_is_told_with_those_that_are(
        start_server: Start, capsys: pytest.CaptureFixture[str]) -> None:
    server = start_server()
    assert pack.main([*arguments(server), '-S', 'main']) == 1
    assert 'there is no storage main here, but 1;' in capsys.readouterr().err


@pytest.mark.parametrize('wrong', [
    [], ['zeo.sock', '--days=-1'], ['zeo.sock', '--days=many'], ['zeo.sock', '--at=tomorrow'],
    ['zeo.sock', '--at=9999-01-01'], ['zeo.sock', '--days=1', '--at=2020-01-01'], ['1:2:3'], [':99999'],
    ['-h', 'localhost'], ['-p', '0'], ['9999'], ['zeo.sock', '--no-such-option'],
], ids=' '.join)
def test_a_wrong_command_line_is_told_in_one_line(
        wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        pack.main(wrong)
    assert ended.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith('zeo.pack: ') and line.endswith('(--help shows all options)')


def test_a_disk_that_may_be_too_small_is_told_before(
        start_server: Start, open_client: Open, capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch) -> None:
    server = start_server()
    fill(open_client, server)
    monkeypatch.setattr('zeo.commands.Client.figures', lambda client: {
        'storages': {'1': {'room': 10_000, 'pack': None}}})
    before = (Path(server.folder) / 'Data.fs').read_bytes()
    assert pack.main(arguments(server)) == 1
    assert ('a pack may need 50.9 kB on the disk of the server, which has 10.0 kB left'
            in capsys.readouterr().err)
    assert (Path(server.folder) / 'Data.fs').read_bytes() == before
    assert pack.main([*arguments(server), '--force']) == 0


def begin(server: Server) -> 'subprocess.Popen[str]':
    """Start packing, in a process of its own; returns when it has begun on the server."""
    process = subprocess.Popen(
        [sys.executable, '-m', 'zeo.pack', *arguments(server)], text=True,
        env=os.environ | {'PYTHONPATH': str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    server.log.wait_for('storage 1: packing as of')
    return process


def test_ctrl_c_stops_a_pack_and_leaves_the_database_as_it_was(
        start_server: Start, open_client: Open) -> None:
    server = start_server(storages={'1': Storage(GATED)})
    fill(open_client, server)
    before = (Path(server.folder) / 'Data.fs').read_bytes()
    packing = begin(server)
    packing.send_signal(signal.SIGINT)
    out, err = packing.communicate(timeout=PATIENCE)
    assert packing.returncode == 1
    assert not out
    [line] = err.splitlines()
    assert line.endswith(', storage 1: the pack of storage 1 was stopped; the database is as it was')
    server.log.wait_for('storage 1: the pack was stopped')
    assert (Path(server.folder) / 'Data.fs').read_bytes() == before
    fill(open_client, server)   # and it works


@pytest.mark.parametrize('kind', ['zeo', 'ZEO'])
def test_that_a_pack_cannot_be_stopped_is_told(
        kind: str, start_server: Start, open_client: Open, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    server = start_server(kind)
    fill(open_client, server)
    monkeypatch.setattr('zeo.commands.Client.figures', lambda client: None)     # of a stock server
    monkeypatch.setattr('zeo.commands.Client.stop_pack', lambda client: False)
    never = threading.Event()
    monkeypatch.setattr('zeo.commands.Client.pack', lambda client, t: never.wait(PATIENCE))
    stop = threading.Event()
    stop.set()
    with pytest.raises(Failure, match='this server cannot stop a pack; it goes on there'):
        pack.pack(commands.address(arguments(server)[0]), '1', time.time(), stop, False)
    never.set()


def test_a_second_pack_at_the_same_time_is_refused(
        start_server: Start, open_client: Open, capsys: pytest.CaptureFixture[str]) -> None:
    server = start_server(storages={'1': Storage(GATED)})
    fill(open_client, server)
    first = begin(server)
    assert pack.main(arguments(server)) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert f', storage 1 is being packed already, since {time.strftime("%Y-")}' in line and line.count('storage 1') == 1
    (Path(server.folder) / 'go').touch()
    out, err = first.communicate(timeout=PATIENCE)
    assert (first.returncode, err) == (0, '')
    assert '80 % less' in out
