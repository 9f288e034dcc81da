"""zeo.uri: from a URI to a storage, by itself and through zodburi."""

import configparser
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ZODB
import zodburi

import zeo.uri
from tests.system.servers import ROOT, Server, file_storage
from zeo.ClientStorage import ClientStorage
from zeo.wire.certificates import CLIENT_KEYS

Start = Callable[..., Server]


class Opened:
    """Stands in place of `ClientStorage`, and keeps what it was given."""

    def __init__(self, addresses: Any, **options: Any) -> None:
        self.addresses = addresses
        self.options = options


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Opened]:
    monkeypatch.setattr(zeo.uri, 'ClientStorage', Opened)

    def opened(uri: str) -> Opened:
        factory, others = zeo.uri.resolve(uri)
        assert not others
        found: Any = factory()
        assert isinstance(found, Opened)
        return found

    return opened


@pytest.mark.parametrize('uri, addresses', [
    ('tzeo://localhost:9999', [('localhost', 9999)]),
    ('tzeo://:9999', [('', 9999)]),
    ('tzeo://localhost:9999/', [('localhost', 9999)]),
    ('tzeo://[::1]:9999', [('::1', 9999)]),
    ('tzeo://db1:1,db2:2,[::1]:3', [('db1', 1), ('db2', 2), ('::1', 3)]),
    ('tzeo:///var/run/zeo.sock', ['/var/run/zeo.sock']),
    ('tzeo:///with%20space/zeo.sock?', ['/with space/zeo.sock']),
])
def test_where_the_server_is(opened: Callable[[str], Opened], uri: str, addresses: Any) -> None:
    found = opened(uri)
    assert found.addresses == addresses and found.options == {}


@pytest.mark.parametrize('query, options', [
    ('storage=main&name=my%20storage', {'storage': 'main', 'name': 'my storage'}),
    ('cache_size=1000', {'cache_size': 1000}),
    ('cache_size=200MB&blob_cache_size=3gb', {'cache_size': 200 * 1024**2, 'blob_cache_size': 3 * 1024**3}),
    ('cache=var/main.zec', {'cache': 'var/main.zec'}),
    ('client=one&var=/var/cache', {'client': 'one', 'var': '/var/cache'}),
    ('wait=false&wait_timeout=5', {'wait': False, 'wait_timeout': 5.0}),
    ('wait_for_server_on_startup=0', {'wait_for_server_on_startup': False}),
    ('min_disconnect_poll=.5&max_disconnect_poll=1e2',
     {'min_disconnect_poll': .5, 'max_disconnect_poll': 100.0}),
    ('read_only=yes&server_sync=On&start_over=1', {'read_only': True, 'server_sync': True, 'start_over': True}),
    ('read_only_fallback=True&client_label=web', {'read_only_fallback': True, 'client_label': 'web'}),
    ('blob_dir=/blobs&shared_blob_dir=t&blob_cache_size_check=20',
     {'blob_dir': '/blobs', 'shared_blob_dir': True, 'blob_cache_size_check': 20}),
    ('ssl=true', {'ssl': True}),
    ('ssl=0&ssl_key=unused', {'ssl': False}),
    ('ssl_certificate=/c.pem&ssl_key=k&ssl_password_file=p&ssl_password_function=m.f&ssl_authenticate=ca',
     {'ssl': {'certificate': '/c.pem', 'key': 'k', 'password_file': 'p', 'password_function': 'm.f',
              'authenticate': 'ca'}}),
    ('ssl=1&ssl_check_hostname=no&ssl_server_hostname=db',
     {'ssl': {'check_hostname': False, 'server_hostname': 'db'}}),
])
def test_options_have_their_types(opened: Callable[[str], Opened], query: str, options: Any) -> None:
    assert opened(f'tzeo://localhost:1?{query}').options == options
    assert opened(f'tzeo:///socket?{query}').options == options


def test_all_options_of_the_storage_are_known() -> None:
    tls = {f'ssl_{name}' for name in CLIENT_KEYS}
    assert {'addr', *zeo.uri.OPTIONS} == {*inspect.signature(ClientStorage).parameters, *tls}


def test_other_options_are_handed_on() -> None:
    _, others = zeo.uri.resolve('tzeo://localhost:1?storage=x&connection_pool_size=3&database_name=main')
    assert others == {'connection_pool_size': '3', 'database_name': 'main'}


@pytest.mark.parametrize('uri, says', [
    ('zeo://localhost:1', 'this is not a tzeo:// URI'),
    ('tzeo://', 'there is neither HOST:PORT nor the path of a socket'),
    ('tzeo:///', 'there is neither HOST:PORT nor the path of a socket'),
    ('tzeo://localhost', "'localhost' is not of the form HOST:PORT"),
    ('tzeo://localhost:x', "'localhost:x' is not of the form HOST:PORT"),
    ('tzeo://me:secret@localhost:1', "'me:secret@localhost:1' is not of the form HOST:PORT"),
    ('tzeo://db1:1,', "'' is not of the form HOST:PORT"),
    ('tzeo://var/zeo.sock', 'there is both a host (var) and a path (/zeo.sock); three slashes begin a path'),
    ('tzeo://localhost:1?wait=perhaps', 'wait=perhaps: give true or false'),
    ('tzeo://localhost:1?wait_timeout=soon', 'wait_timeout=soon: give a number of seconds'),
    ('tzeo://localhost:1?wait_timeout=-1', 'wait_timeout=-1: give a number of seconds'),
    ('tzeo://localhost:1?cache_size=20TB', 'cache_size=20TB: give a number of bytes, such as'),
    ('tzeo://localhost:1?blob_cache_size_check=half', 'blob_cache_size_check=half: give a percentage'),
])
def test_what_is_wrong_is_said(uri: str, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f'{uri}: {says}')):
        zeo.uri.resolve(uri)


# ---- through zodburi


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What installing would tell about this checkout's entry points, in front of what is installed."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / 'setup.cfg')
    info = tmp_path / 'site' / 'threaded_zeo-0.dist-info'
    info.mkdir(parents=True)
    (info / 'METADATA').write_text('Metadata-Version: 2.1\nName: threaded-zeo\nVersion: 0\n')
    (info / 'entry_points.txt').write_text(''.join(
        f'[{group}]\n{lines}\n' for group, lines in setup['options.entry_points'].items()))
    monkeypatch.setattr(sys, 'path', [str(info.parent), *sys.path])


@pytest.mark.usefixtures('installed')
@pytest.mark.parametrize('unix', [False, True])
def test_zodburi_opens_a_database_of_a_server(start_server: Start, tmp_path: Path, unix: bool) -> None:
    server = start_server('zeo', {'main': file_storage(blobs='blobs')}, unix=unix)
    where = server.address if isinstance(server.address, str) else '%s:%d' % server.address
    factory, options = zodburi.resolve_uri(
        f'tzeo://{where}?storage=main&wait_timeout=20&blob_dir={tmp_path}/cache&cache_size=5MB'
        '&connection_cache_size=123&connection_pool_size=3&database_name=shop')
    assert options == {'cache_size': 123, 'pool_size': 3, 'database_name': 'shop'}
    db = ZODB.DB(factory(), **options)
    with db.transaction() as connection:
        connection.root()['x'] = ZODB.blob.Blob(b'data')
    with db.transaction() as connection:
        with connection.root()['x'].open() as file:
            assert file.read() == b'data'
    assert db.database_name == 'shop'
    db.close()


@pytest.mark.usefixtures('installed')
def test_zodburi_refuses_options_that_nobody_knows() -> None:
    with pytest.raises(zodburi.UnknownDatabaseKeywords, match='cache_sise'):
        zodburi.resolve_uri('tzeo://localhost:9999?cache_sise=5')
