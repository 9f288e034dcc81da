"""zeo.server.storages: from names to open storages, and what is said when that fails."""

import errno
import logging
import os
import re
import sys
import types

import pytest
from ZODB.DemoStorage import DemoStorage
from ZODB.FileStorage import FileStorage
from ZODB.FileStorage.FileStorage import FileStorageFormatError
from ZODB.FileStorage.format import CorruptedDataError
from ZODB.interfaces import IBlobStorage
from ZODB.interfaces import IMVCCStorage
from ZODB.MappingStorage import MappingStorage
from zope.interface import alsoProvides

from zeo.server import storages
from zeo.server.configuration import StorageSection
from zeo.server.options import CannotStart
from zeo.server.values import StorageName


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty current folder, and nothing imported or searched afterwards that was not before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', sys.path[:])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def refusal(function, *arguments):
    with pytest.raises(CannotStart) as caught:
        function(*arguments)
    text = str(caught.value)
    assert '\n' not in text
    return text


# Files

def test_a_file_is_created_if_need_be(here):
    storage = storages.open_file(str(here / 'Data.fs'), False)
    assert isinstance(storage, FileStorage) and not storage.isReadOnly()
    storage.close()
    assert os.path.exists('Data.fs')


def test_a_file_that_is_still_empty_is_opened_again_without_a_warning(here, caplog):
    for _ in range(3):
        storages.open_file(str(here / 'Data.fs'), False).close()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_file_opened_for_reading_is_not_created(here):
    path = str(here / 'Data.fs')
    assert refusal(storages.open_file, path, True) == (
        f'{path} does not exist; start once without --read-only to create it')
    assert not os.listdir()


def test_a_file_opened_for_reading_is_not_locked(here):
    path = str(here / 'Data.fs')
    storages.open_file(path, False).close()
    first, second = storages.open_file(path, True), storages.open_file(path, True)
    assert first.isReadOnly() and second.isReadOnly()
    first.close()
    second.close()


def test_a_file_in_use_names_the_process(here):
    path = str(here / 'Data.fs')
    storage = storages.open_file(path, False)
    try:
        assert refusal(storages.open_file, path, False) == (
            f'{path} is in use by another process ({os.getpid()}); stop it, or choose another file')
    finally:
        storage.close()


# FileStorage leaves files open when it fails in a later step, so these only pretend; real ones are in
# tests/test_start.py.
@pytest.mark.parametrize('error, says', [
    (OSError(errno.EACCES, 'Permission denied', '/x/Data.fs.lock'),
     '/x/Data.fs.lock: Permission denied; start as a user who may'),
    (OSError(errno.EROFS, 'Read-only file system', '/x/Data.fs'),
     '/x/Data.fs: Read-only file system; start as a user who may'),
    (OSError(errno.ENOSPC, 'No space left on device'),
     'cannot open /x/Data.fs: No space left on device'),
    (IsADirectoryError(errno.EISDIR, 'Is a directory', '/x/Data.fs'),
     '/x/Data.fs is a folder; give the name of a file'),
    (FileStorageFormatError('/x/Data.fs'), '/x/Data.fs is damaged, or is not a FileStorage ('),
    (CorruptedDataError(b'\0' * 8, b'x', 4), '/x/Data.fs is damaged, or is not a FileStorage ('),
    (ValueError('two\nlines'), 'cannot open /x/Data.fs: ValueError: two lines'),
])
def test_other_errors_are_told_in_one_line(monkeypatch, error, says):
    def fail(path, **options):
        raise error
    monkeypatch.setattr(storages, 'FileStorage', fail)
    assert refusal(storages.open_file, '/x/Data.fs', False).startswith(says)


def test_a_missing_folder_is_named(here):
    assert refusal(storages.check_place, str(here / 'no' / 'Data.fs')) == (
        f'the folder {here}/no does not exist; create it, or choose another file')


def test_a_file_is_no_folder(here):
    (here / 'file').touch()
    assert 'is not a folder' in refusal(storages.check_place, str(here / 'file' / 'Data.fs'))


# Modules

MODULE = '''
from ZODB.MappingStorage import MappingStorage

ready = MappingStorage('ready')

def make():
    return MappingStorage('made')

class Holder:
    inner = MappingStorage('inner')

number = 5

def nothing():
    return None

def fails():
    raise KeyError('what\\nnow')

def leaves():
    raise SystemExit(3)
'''


@pytest.fixture
def module(here):
    """Where a module is that can be named in several ways."""
    folder = here / 'conf' / 'deep'
    folder.mkdir(parents=True)
    for place in here, folder:
        (place / 'served_by_test.py').write_text(MODULE)
    (here / 'conf' / '__init__.py').touch()
    (folder / '__init__.py').touch()
    return folder


def opened(module, attribute='ready'):
    return storages.open_named(StorageName('x', module, attribute))


@pytest.mark.parametrize('name', [
    'served_by_test', 'served_by_test.py', './served_by_test', './served_by_test.py',
    'conf.deep.served_by_test', 'conf/deep/served_by_test', 'conf/deep/served_by_test.py',
    '{here}/conf/deep/served_by_test', '{here}/conf/deep/served_by_test.py',
])
def test_a_module_may_be_named_in_all_these_ways(module, here, name):
    assert opened(name.format(here=here)).getName() == 'ready'


@pytest.mark.parametrize('attribute, name', [
    ('ready', 'ready'), ('make', 'made'), ('Holder.inner', 'inner'),
])
def test_an_attribute_is_a_storage_or_returns_one(module, attribute, name):
    assert opened('served_by_test', attribute).getName() == name


def test_a_class_makes_its_storage():
    assert isinstance(opened('ZODB.MappingStorage', 'MappingStorage'), MappingStorage)


@pytest.mark.parametrize('other', [
    'conf/deep/served_by_test', './conf/deep/served_by_test.py', 'conf.deep.served_by_test'])
def test_one_module_is_loaded_once_however_it_is_named(module, other):
    served = storages.open_all(storages.openers([
        StorageName('a', other, 'ready'), StorageName('b', 'conf/deep/served_by_test.py', 'ready')]))
    assert served['a'] is served['b']


def test_a_module_finds_what_stands_beside_it(module):
    (module / 'beside_test.py').write_text('name = "neighbour"')
    (module / 'uses_test.py').write_text(
        'import beside_test\nfrom ZODB.MappingStorage import MappingStorage\n'
        's = MappingStorage(beside_test.name)')
    assert opened('conf/deep/uses_test', 's').getName() == 'neighbour'


def test_a_file_with_the_name_of_a_module_in_use_does_not_replace_it(here):
    (here / 'logging.py').write_text(MODULE)
    assert opened('./logging').getName() == 'ready'
    assert sys.modules['logging'] is logging


def test_classes_of_a_module_given_by_path_can_be_found_again(module):
    opened('conf/deep/served_by_test')
    assert sys.modules['served_by_test'].number == 5


@pytest.mark.parametrize('name, attribute, says', [
    ('no_such_module', 'x', r"-S x=no_such_module:x cannot be loaded: ModuleNotFoundError: No module"),
    ('conf.no', 'x', r"No module named 'conf.no'"),
    ('no/such', 'x', r'-S x=no/such:x: there is no file .*/no/such.py; give the path'),
    ('nosuch.py', 'x', r'there is no file .*/nosuch.py'),
    ('served_by_test', 'absent', r"module 'served_by_test' has no attribute 'absent'"),
    ('served_by_test', 'number', r'number is neither a storage nor something that returns one, but 5$'),
    ('served_by_test', 'nothing', r'something that returns one, but None$'),
    ('served_by_test', 'fails', r"does not work: KeyError: 'what\\nnow' \(-D shows where\)"),
    ('served_by_test', 'leaves', r'does not work: SystemExit: 3'),
    ('broken', 'x', r'-S x=broken:x cannot be loaded: SyntaxError: '),
    ('./broken', 'x', r'cannot be loaded: SyntaxError: '),
])
def test_a_module_that_is_of_no_use_is_named(module, here, name, attribute, says):
    (here / 'broken.py').write_text('1 +')
    assert re.search(says, refusal(opened, name, attribute))


def test_a_module_that_failed_is_not_left_half_loaded(here):
    (here / 'half_test.py').write_text('x = 1\n1/0')
    refusal(opened, './half_test')
    assert 'half_test' not in sys.modules


# Several storages

class Closing:
    def __init__(self, fail=False):
        self.closed = 0
        self.fail = fail

    def close(self):
        self.closed += 1
        if self.fail:
            raise ValueError


def test_if_one_cannot_be_opened_none_stays_open():
    first = Closing()

    def fail():
        raise CannotStart('no')
    assert refusal(storages.open_all, {'a': lambda: first, 'b': fail}) == 'no'
    assert first.closed == 1


def test_each_storage_is_closed_once_whatever_happens_to_the_others(caplog):
    bad, good = Closing(fail=True), Closing()
    storages.close_all({'a': bad, 'b': good, 'c': good})
    assert (bad.closed, good.closed) == (1, 1)
    assert 'Closing: cannot be closed' in caplog.text


# Words

def test_a_storage_is_described_by_class_and_name(here):
    storage = FileStorage('a.fs')
    assert storages.describe(storage) == 'FileStorage a.fs'
    storage.close()
    assert storages.describe(MappingStorage()) == 'MappingStorage'
    assert storages.describe(DemoStorage('demo', base=MappingStorage())) == 'DemoStorage demo'
    assert storages.describe(Closing()) == 'Closing'


# ---- the folder for blobs

def test_the_folder_for_blobs_is_created(here):
    storage = storages.open_file(str(here / 'Data.fs'), False, str(here / 'blobs'))
    assert IBlobStorage.providedBy(storage)
    storage.close()
    assert (here / 'blobs' / '.layout').read_text() == 'bushy'
    assert (here / 'blobs' / 'tmp').is_dir()


def test_without_a_folder_for_blobs_there_are_none(here):
    storage = storages.open_file(str(here / 'Data.fs'), False)
    assert not IBlobStorage.providedBy(storage)
    storage.close()


def test_the_cache_of_a_client_is_not_taken_for_a_folder_of_blobs(here):
    folder = here / 'cache'
    folder.mkdir()
    (folder / '.layout').write_text('zeocache')
    assert refusal(storages.open_file, str(here / 'Data.fs'), False, str(folder)) == (
        f"the folder for blobs {folder} cannot be used: it has the layout 'zeocache', as caches of clients"
        ' have; choose another folder')
    assert not (here / 'Data.fs').exists()


def test_what_cannot_be_a_folder_for_blobs_is_named(here):
    (here / 'file').write_text('x')
    assert refusal(storages.open_file, str(here / 'Data.fs'), False, str(here / 'file' / 'blobs')) == (
        f'the folder for blobs {here}/file/blobs cannot be used: Not a directory; choose another'
        ' folder')
    assert refusal(storages.open_file, str(here / 'Data.fs'), True, str(here / 'blobs')) == (
        f'the folder for blobs {here}/blobs cannot be used: it does not exist; choose another'
        ' folder')


# ---- databases that several servers share


class Opener:
    """The section of a storage whose opening fails, each time with the next of these SQLSTATEs."""

    def __init__(self, *codes, keep_history=True):
        self.codes = list(codes)
        self.config = types.SimpleNamespace(keep_history=keep_history, getSectionAttributes=lambda: ())
        self.storage = MappingStorage()

    def open(self):
        if self.codes:
            error = RuntimeError('no')
            error.pgcode = self.codes.pop(0)
            raise error
        return self.storage


def shared(opener):
    return StorageSection('main', 'relstorage', 'zeo.conf:7', opener)


@pytest.mark.parametrize('codes', [[], ['23505'], ['42P07', 'XX000']])
def test_two_servers_may_make_the_tables_at_the_same_moment(codes):
    opener = Opener(*codes)
    assert storages.open_section(shared(opener)) is opener.storage


@pytest.mark.parametrize('codes', [['08006'], [None], ['23505'] * 3])
def test_other_errors_and_too_many_are_told(codes):
    with pytest.raises(CannotStart, match='zeo.conf:7: <relstorage main>: RuntimeError: no'):
        storages.open_section(shared(Opener(*codes)))


def test_a_database_without_history_is_refused_before_it_is_touched():
    section = shared(Opener('never opened', keep_history=False))
    with pytest.raises(CannotStart, match='zeo.conf:7: .*keep-history true'):
        storages.open_section(section)
    assert section.factory.codes
    assert 'keep-history true' in storages.look_for(section)
    assert storages.look_for(shared(Opener())) is None


def test_one_that_cannot_be_served_is_closed_and_named():
    class Dumb(MappingStorage):
        iterator = property()
        closed = False

        def close(self):
            self.closed = True

    opener = Opener()
    opener.storage = Dumb()
    alsoProvides(opener.storage, IMVCCStorage)
    with pytest.raises(CannotStart, match='zeo.conf:7: <relstorage main>: Dumb cannot be served'):
        storages.open_section(shared(opener))
    assert opener.storage.closed


def test_how_a_database_is_reached_is_not_told():
    class RelStorage(MappingStorage):
        pass

    assert storages.describe(RelStorage("RelStorage: <PostgreSQLAdapter dsn='host=db.example'>")) == 'RelStorage'
