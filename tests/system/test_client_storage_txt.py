"""ClientStorage.txt is true: its examples are executed, and no option is missing."""

import doctest
import inspect
import re
import shutil
from pathlib import Path

import pytest
from ZODB.FileStorage import FileStorage
from ZODB.MappingStorage import MappingStorage

import zeo.ClientStorage
from zeo.StorageServer import StorageServer
from zeo.wire.certificates import server_context

TEXT = (Path(__file__).parents[2] / 'ClientStorage.txt').read_text(encoding='utf-8')
OPTIONS = list(inspect.signature(zeo.ClientStorage.ClientStorage).parameters.values())


@pytest.fixture
def ports(tmp_path, monkeypatch, certificates):
    """The ports of servers as the text describes them, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('ZEO_CLIENT', raising=False)
    server = StorageServer({'1': FileStorage('Data.fs', blob_dir='blobs'), 'second': MappingStorage()},
                           [('localhost', 0), 'zeo.sock'])
    server.start()
    shutil.copy(certificates.ca, 'server.pem')
    secure = StorageServer({'1': MappingStorage()}, [('localhost', 0)],
                           ssl=server_context(certificates.server))
    secure.start()
    yield {'9999': server.addresses[0][1], '9998': secure.addresses[0][1]}
    server.close()
    secure.close()


def test_the_examples_work_as_they_are_written(ports):
    text = re.sub('9999|9998', lambda found: str(ports[found[0]]), TEXT)
    test = doctest.DocTestParser().get_doctest(
        text, {}, 'ClientStorage.txt', 'ClientStorage.txt', 0)
    said = []
    runner = doctest.DocTestRunner(
        optionflags=doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL, verbose=False)
    assert len(test.examples) > 40
    assert runner.run(test, out=said.append).failed == 0, ''.join(said)


@pytest.mark.parametrize('option', OPTIONS, ids=lambda option: option.name)
def test_the_table_has_every_option_with_its_default(option):
    row = re.search(rf'^{option.name} +(.+?)  ', TEXT, re.MULTILINE)
    assert row is not None
    default = row[1]
    if re.fullmatch(r"'.*'|True|False|[\d.]+", default):
        expected = 30.0 if option.name == 'wait_timeout' else option.default
        assert eval(default) == expected
    elif default.endswith(' MB'):
        assert int(default.split()[0]) * 1024 * 1024 == option.default
    else:
        assert option.default in (None, '', inspect.Parameter.empty)


@pytest.mark.parametrize('option', OPTIONS, ids=lambda option: option.name)
def test_every_option_has_an_entry_of_its_own(option):
    headings = re.findall(r'^(.+)\n-+$', TEXT, re.MULTILINE)
    assert option.name in ', '.join(headings).split(', ')
