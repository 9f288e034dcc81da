"""zeo.client, zeo.DB, zeo.connection and zeo.server: a database over the network in one call."""

import gc
import os
import subprocess
import sys
import threading

import pytest
import transaction
from ZODB.blob import Blob
from ZODB.MappingStorage import MappingStorage

import zeo
from tests.system.servers import until


@pytest.fixture
def address():
    address, stop = zeo.server()
    yield address
    stop()


def test_a_server_without_a_path_keeps_its_data_in_memory(address):
    connection = zeo.connection(address)
    connection.root()['x'] = 1
    transaction.commit()
    connection.close()
    with zeo.DB(address).transaction() as connection:
        assert connection.root()['x'] == 1
        connection.db().close()


def test_a_server_with_a_path_keeps_its_data_in_that_file(tmp_path):
    path = str(tmp_path / 'Data.fs')
    for expected in [None, 1]:
        address, stop = zeo.server(path)
        db = zeo.DB(address)
        with db.transaction() as connection:
            assert connection.root().get('x') == expected
            connection.root()['x'] = 1
        db.close()
        stop()


def test_a_server_may_serve_a_storage_and_listen_on_a_socket_file(tmp_path):
    path = tmp_path / 'sock'
    address, stop = zeo.server(storage=MappingStorage('mine'), address=path)
    assert address == str(path)
    storage = zeo.client(address, wait_timeout=5)
    assert storage.is_connected()
    storage.close()
    stop()


def test_stopping_the_server_ends_its_threads_and_may_be_repeated():
    before = set(threading.enumerate())
    _, stop = zeo.server()
    assert set(threading.enumerate()) - before
    stop()
    stop()
    assert set(threading.enumerate()) == before


def threads_of_clients():
    """All but those that the server, which is here as well, keeps for the next client."""
    return {thread for thread in threading.enumerate() if thread.name != 'zeo spare'}


def test_closing_the_connection_closes_its_database(address):
    before = set(threading.enumerate())
    connection = zeo.connection(address)
    connection.close()
    until(lambda: threads_of_clients() <= before, 'its threads have ended')


def test_options_go_to_the_storage_and_to_the_database(address):
    db = zeo.DB(address, name='shop', database={'cache_size': 17})
    assert db.storage.getName().startswith('shop')
    assert db.getCacheSize() == 17
    db.close()


def test_a_wrong_database_option_leaves_nothing_behind(address):
    before = set(threading.enumerate())
    with pytest.raises((TypeError, AssertionError)):  # as ZODB sees it
        zeo.DB(address, database={'no_such_option': 1})
    until(lambda: threads_of_clients() <= before, 'its threads have ended')


def test_a_path_and_a_storage_exclude_each_other():
    with pytest.raises(TypeError):
        zeo.server('Data.fs', storage=MappingStorage())
    with pytest.raises(TypeError):
        zeo.server(storage=MappingStorage(), blob_dir='blobs')


def test_a_file_that_cannot_be_opened_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'file').write_text('no database')
    os.mkfifo(tmp_path / 'pipe')
    for path, text in {
            'missing/Data.fs': f'^the folder {tmp_path}/missing does not exist; create it',
            'file/Data.fs': f'^{tmp_path}/file is not a folder; choose another',
            'file': f'^{tmp_path}/file is damaged, or is not a FileStorage',
            'pipe': f'^{tmp_path}/pipe is not an ordinary file; choose another one',
            '': f'^{tmp_path} is a folder; give the name of a file'}.items():
        with pytest.raises(OSError, match=text):
            zeo.server(path)
    _, stop = zeo.server('Data.fs')
    with pytest.raises(OSError, match=f'^{tmp_path}/Data.fs is in use by another process'):
        zeo.server('Data.fs')
    stop()


@pytest.mark.parametrize('wrong', [
    'localhost:9999', '9999', '', 9999, None, (), ('localhost', '9999'), ('localhost', 65536), ('localhost', True)])
def test_what_is_no_address_is_told_before_anything_is_opened(tmp_path, monkeypatch, wrong):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match='is no address to listen on: give'):
        zeo.server('Data.fs', address=wrong)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('option', ['transaction_timeout', 'invalidation_age'])
@pytest.mark.parametrize('wrong', [0, -1, '30', float('nan')])
def test_what_is_no_number_of_seconds_is_told_at_once(option, wrong):
    with pytest.raises(ValueError, match=f'^{option} is a number of seconds greater than 0, or None, not {wrong!r}'):
        zeo.server(**{option: wrong})


@pytest.mark.parametrize('wrong', [1, 'Data.fs', MappingStorage])
def test_what_is_no_storage_is_told(wrong):
    with pytest.raises(TypeError, match='is no storage; a file is named by its path, as the first argument'):
        zeo.server(storage=wrong)


@pytest.mark.parametrize('path', [None, 'Data.fs'])
def test_blobs_need_a_folder_at_either_side(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    address, stop = zeo.server(path, blob_dir='blobs')
    for folder in 'one', 'two':
        db = zeo.DB(address, blob_dir=folder)
        with db.transaction() as connection:
            with connection.root().setdefault('blob', Blob(b'beginning')).open() as file:
                assert file.read() == b'beginning'
        db.close()
    stop()
    assert list((tmp_path / 'blobs').rglob('*.blob'))


def test_the_name_of_the_storage_may_come_second(address):
    for open_it in zeo.client, zeo.DB, zeo.connection:
        open_it(address, '1').close()
        with pytest.raises(zeo.ClientStorageError, match='has no storage shop'):
            open_it(address, 'shop')


def test_an_address_that_is_in_use_is_an_error_and_closes_the_storage(address):
    class Closing(MappingStorage):
        closed = False

        def close(self):
            self.closed = True

    storage = Closing()
    with pytest.raises(OSError, match='in use'):
        zeo.server(storage=storage, address=address)
    assert storage.closed
    gc.collect()  # a socket that was left open would be a warning, and so an error, here


def test_a_client_does_not_load_the_server():
    code = ('import sys, zeo, zeo.ClientStorage; '
            'sys.exit(any(name.startswith(("zeo.server.", "zeo.StorageServer")) for name in sys.modules))')
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0
