"""Servers over PostgreSQL: blobs through them, and the commands that look after a server."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ZODB
from ZODB.blob import Blob
from ZODB.FileStorage import FileStorage

from tests.system.clients import hears_of, open_client
from tests.system.postgres import Cluster, Host, relstorage
from zeo import backup, copy, pack

pytestmark = pytest.mark.filterwarnings('ignore::ResourceWarning')  # stock clients sometimes leave a file open

LARGE = b'0123456789' * 300_000


@pytest.fixture(params=[False, True], ids=['in PostgreSQL', 'in a shared folder'])
def two(request: pytest.FixtureRequest, cluster: Cluster, tmp_path: Path) -> Iterator[list[Host]]:
    """Two servers over one database with blobs."""
    dsn = cluster.dsn(cluster.database())
    with contextlib.ExitStack() as servers:
        yield [servers.enter_context(Host('zeo', {'1': relstorage(
            dsn, blob_dir=tmp_path / ('shared' if request.param else f'blobs{number}'), shared_blob_dir=request.param)}))
            for number in range(2)]


@contextlib.contextmanager
def opened(server: Host, folder: Path, kind: str = 'zeo') -> Iterator[Any]:
    db = ZODB.DB(open_client(kind, server, blob_dir=str(folder)))
    try:
        yield db
    finally:
        db.close()


def content(connection: Any, name: str = 'blob') -> bytes:
    with connection.root()[name].open() as file:
        data: bytes = file.read()
        return data


def test_blobs_go_in_at_one_server_and_out_at_another(two: list[Host], tmp_path: Path) -> None:
    with opened(two[0], tmp_path / 'one') as one, opened(two[1], tmp_path / 'two') as other, \
            opened(two[1], tmp_path / 'three', 'ZEO') as stock:
        with one.transaction() as connection:
            connection.root()['blob'] = Blob(b'small')
        with one.transaction() as connection, connection.root()['blob'].open('w') as file:
            file.write(LARGE)
        last = one.storage.lastTransaction()
        for db in other, stock:
            hears_of(db.storage, last)
            with db.transaction() as connection:
                assert content(connection) == LARGE
        with stock.transaction() as connection, connection.root()['blob'].open('a') as file:
            file.write(b'and more')
        hears_of(one.storage, stock.storage.lastTransaction())
        with one.transaction() as connection:
            assert content(connection) == LARGE + b'and more'
            oid = connection.root()['blob']._p_oid
        tids = [entry['tid'] for entry in one.storage.history(oid, 9)]
        assert len(tids) == 3
        assert Path(other.storage.loadBlob(oid, tids[2])).read_bytes() == b'small'


def address(server: Host) -> str:
    host, port = server.address
    return f'{host}:{port}'


def run(command: Any, *arguments: object) -> None:
    assert command.main([str(each) for each in arguments]) == 0


def test_the_commands_work_with_any_of_the_servers(
        two: list[Host], cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, restored, out = tmp_path / 'source.fs', tmp_path / 'restored.fs', tmp_path / 'out.fs'
    first, second = map(address, two)
    db = ZODB.DB(FileStorage(str(source), blob_dir=f'{source}.blobs'))
    for number in range(4):
        with db.transaction(f'number {number}') as connection:
            connection.root()[str(number)] = Blob(b'%d' % number)
            connection.root()['last'] = number
    with db.transaction() as connection:    # garbage for the pack
        del connection.root()['0']
    db.close()
    run(copy, source, first)                            # a FileStorage goes in,
    run(copy, '--verify', source, second)
    run(backup, second, tmp_path / 'backup')
    with opened(two[0], tmp_path / 'cache') as db, db.transaction('later') as connection:
        connection.root()['later'] = Blob(LARGE)
    run(backup, first, tmp_path / 'backup')             # any server may be asked for what is new,
    run(backup, '--check', tmp_path / 'backup')
    run(backup, '--restore', tmp_path / 'backup', restored)
    run(copy, '--verify', second, restored)
    run(pack, first)
    run(copy, second, out)                              # and a FileStorage comes out
    run(copy, '--verify', first, out)
    told = capsys.readouterr()
    assert not told.err
    assert told.out.splitlines()[:2] == [line + ': no difference' * number for number, line in enumerate(
        ['6 transactions, 10 records, 4 blobs, 981 B'] * 2)]
    db = ZODB.DB(FileStorage(str(out), blob_dir=f'{out}.blobs'))
    with db.transaction() as connection:
        assert sorted(connection.root()) == ['1', '2', '3', 'last', 'later']
        assert content(connection, '3') == b'3' and content(connection, 'later') == LARGE
    db.close()
    with Host('zeo', {'1': relstorage(cluster.dsn(cluster.database()), blob_dir=tmp_path / 'new')}) as new:
        run(backup, '--restore', tmp_path / 'backup', address(new))
        run(copy, '--verify', restored, address(new))
