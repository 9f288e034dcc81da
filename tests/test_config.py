"""zeo.config: a section <clientstorage> in any ZConfig file that knows ZODB's storages."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ZConfig
import ZODB.config

import zeo.config
from tests.system.certificates import Certificates
from tests.system.servers import Server, file_storage
from zeo.ClientStorage import ClientStorage

Start = Callable[..., Server]


def written(server: Server) -> str:
    return server.address if isinstance(server.address, str) else '%s:%d' % server.address


@pytest.mark.parametrize('unix', [False, True])
def test_a_storage_is_opened(start_server: Start, unix: bool) -> None:
    server = start_server('zeo', {'main': file_storage()}, unix=unix)
    storage = ZODB.config.storageFromString(f"""
        %import zeo
        <clientstorage>
            server {written(server)}
            storage main
        </clientstorage>
        """)
    assert type(storage) is ClientStorage and storage.is_connected()
    storage.close()


def test_a_database_is_opened_with_blobs_and_a_cache_that_stays(
        start_server: Start, tmp_path: Path) -> None:
    server = start_server('zeo', {'1': file_storage(blobs='blobs')})
    text = f"""
        %import zeo
        <zodb main>
            cache-size 123
            <clientstorage>
                server {written(server)}
                cache-path {tmp_path}/main.zec
                blob-dir {tmp_path}/blobs
            </clientstorage>
        </zodb>
        """
    for number in range(2):
        db = ZODB.config.databaseFromString(text)
        assert db.database_name == 'main' and db.getCacheSize() == 123
        with db.transaction() as connection:
            connection.root()[number] = ZODB.blob.Blob(b'data')
        db.close()
    assert (tmp_path / 'main.zec').exists() and (tmp_path / 'blobs' / '.layout').exists()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], tuple[Any, dict[str, Any]]]:
    """What a storage would be given."""
    found: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setattr(zeo.config, 'ClientStorage', lambda addr, **options: found.append((addr, options)))

    def opened(lines: str) -> tuple[Any, dict[str, Any]]:
        ZODB.config.storageFromString(f'%import zeo\n<clientstorage>\n{lines}\n</clientstorage>')
        return found.pop()

    return opened


def test_what_is_not_said_is_as_in_the_storage_itself(opened: Callable[[str], Any]) -> None:
    addresses, options = opened('server localhost:9999')
    assert addresses == [('localhost', 9999)]
    parameters = inspect.signature(ClientStorage).parameters
    assert options == {name: parameters[name].default for name in options}


def test_every_key_is_an_option(opened: Callable[[str], Any]) -> None:
    addresses, options = opened("""
        server db1:9999
        server /var/run/zeo.sock
        storage main
        name my storage
        cache-size 200MB
        cache-path /var/cache/main.zec
        client one
        var /var
        wait off
        wait-timeout 2.5
        min-disconnect-poll 1
        max-disconnect-poll 20
        read-only on
        read-only-fallback off
        server-sync yes
        client-label web
        start-over true
        blob-dir /var/blobs
        shared-blob-dir on
        blob-cache-size 3GB
        blob-cache-size-check 20
        <ssl>
            certificate client.pem
            key client.key
            password-file password
            password-function secrets.password
            authenticate ca.pem
            check-hostname off
            server-hostname db.example.com
        </ssl>
        """)
    assert addresses == [('db1', 9999), '/var/run/zeo.sock']
    assert options == {
        'storage': 'main', 'name': 'my storage', 'cache_size': 200 * 1024**2,
        'cache': '/var/cache/main.zec', 'client': 'one', 'var': '/var', 'wait': False, 'wait_timeout': 2.5,
        'min_disconnect_poll': 1.0, 'max_disconnect_poll': 20.0, 'read_only': True,
        'read_only_fallback': False, 'server_sync': True, 'client_label': 'web', 'start_over': True,
        'blob_dir': '/var/blobs', 'shared_blob_dir': True, 'blob_cache_size': 3 * 1024**3,
        'blob_cache_size_check': 20,
        'ssl': {
            'certificate': 'client.pem', 'key': 'client.key', 'password_file': 'password',
            'password_function': 'secrets.password', 'authenticate': 'ca.pem', 'check_hostname': False,
            'server_hostname': 'db.example.com'}}
    # all there are, but for two that are said otherwise, too
    assert {'addr', 'wait_for_server_on_startup', 'ssl_server_hostname', *options} == set(inspect.signature(ClientStorage).parameters)


def test_tls_may_be_asked_for_without_saying_more(opened: Callable[[str], Any]) -> None:
    assert opened('server localhost:9999\n<ssl>\n</ssl>')[1]['ssl'] == {}


def test_tls_is_spoken(start_server: Start, certificates: Certificates) -> None:
    server = start_server(tls_certificate=certificates.server, tls_authenticate=certificates.ca)
    storage = ZODB.config.storageFromString(f"""
        %import zeo
        <clientstorage>
            server {written(server)}
            <ssl>
                certificate {certificates.locked}
                password-function tests.system.certificates.password
                authenticate {certificates.ca}
                server-hostname localhost
            </ssl>
        </clientstorage>
        """)
    assert storage.is_connected()
    storage.close()


@pytest.mark.parametrize('lines, says', [
    ('storage main', "not enough values for 'server'"), ('server db:1\nwait perhaps', "not a valid boolean value: 'perhaps'"),
    ('server db:1\ncache-sise 5', 'cache-sise')])
def test_what_is_wrong_is_said(lines: str, says: str) -> None:
    with pytest.raises(ZConfig.ConfigurationError, match=says):
        ZODB.config.storageFromString(f'%import zeo\n<clientstorage>\n{lines}\n</clientstorage>')
