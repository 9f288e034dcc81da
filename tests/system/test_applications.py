"""What the README says for applications, executed as it stands there, against a real server."""

import configparser
import io
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ZConfig
import ZODB

from tests.system.clients import Task
from tests.system.servers import PATIENCE, ROOT, Server, file_storage
from tests.test_uri import installed

__all__ = ['installed']

Start = Callable[..., Server]


def example(name: str) -> str:
    """What stands in the README in the code block below ``<!-- NAME -->``."""
    found = re.search(rf'^<!-- {name} -->\n```\w*\n(.*?)^```$', (ROOT / 'README.md').read_text(),
                      flags=re.MULTILINE | re.DOTALL)
    assert found, f'the README has no example {name}'
    return found[1]


@pytest.fixture
def server(start_server: Start) -> Server:
    return start_server('zeo', {'1': file_storage(blobs='blobs')})


@pytest.fixture
def written(server: Server) -> Callable[[str], str]:
    """An example, with the address of the server in place of localhost:9999."""
    assert isinstance(server.address, tuple)
    host, port = server.address

    def written(name: str) -> str:
        text = example(name)
        assert '9999' in text and 'localhost' in text
        return text.replace('localhost', host).replace('9999', str(port))

    return written


def test_the_script_counts_however_many_run_it_at_once(written: Callable[[str], str]) -> None:
    def run() -> int:
        done = subprocess.run([sys.executable, '-c', written('script')], cwd=ROOT, stdout=subprocess.PIPE,
                              text=True, check=True, timeout=PATIENCE)
        return int(done.stdout)

    assert run() == 1
    tasks = [Task(run) for _ in range(3)]
    assert max(task.result() for task in tasks) == 4


def test_flask_with_threads(written: Callable[[str], str]) -> None:
    names: dict[str, Any] = {'__name__': 'application'}
    exec(written('flask'), names)

    def visit() -> str:
        answer = names['app'].test_client().get('/')
        assert answer.status_code == 200
        text: str = answer.get_data(as_text=True)
        return text

    try:
        tasks = [Task(visit) for _ in range(4)]
        answers = {task.result() for task in tasks}
        assert answers == {f'visit {number}' for number in range(1, 5)}
    finally:
        names['db'].close()


@pytest.fixture
def pyramid_app(written: Callable[[str], str], installed: None) -> Iterator[Any]:
    from pyramid.config import Configurator
    from pyramid_zodbconn import get_connection

    text = configparser.ConfigParser(interpolation=None)
    text.read_string(written('pyramid'))

    def visit(request: Any) -> dict[str, int]:
        root = get_connection(request).root()
        root['visits'] = root.get('visits', 0) + 1
        return {'visits': root['visits']}

    config = Configurator(settings=dict(text['app:main']))
    config.add_route('visit', '/')
    config.add_view(visit, route_name='visit', renderer='json')
    yield config.make_wsgi_app()
    for db in config.registry._zodb_databases.values():
        db.close()


@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::UserWarning')  # of its libraries
def test_pyramid(pyramid_app: Any) -> None:
    from webob import Request

    for number in range(1, 4):
        answer = Request.blank('/').get_response(pyramid_app)
        assert (answer.status_code, answer.json) == (200, {'visits': number})
    [db] = pyramid_app.registry._zodb_databases.values()
    assert db.getCacheSize() == 20000 and type(db.storage).__module__ == 'zeo.ClientStorage'


ZOPE = """
<schema>
  <import package="ZODB"/>
  <!-- as in Zope's own schema, without what only Zope understands -->
  <sectiontype name="zodb_db" datatype="ZODB.config.ZODBDatabase" implements="ZODB.database" extends="zodb">
    <multikey name="mount-point" required="yes" attribute="mount_points"/>
  </sectiontype>
  <multisection type="ZODB.database" name="+" required="yes" attribute="databases"/>
</schema>
"""


def test_zope(written: Callable[[str], str], tmp_path: Path) -> None:
    (tmp_path / 'var').mkdir()
    config, _ = ZConfig.loadConfigFile(
        ZConfig.loadSchemaFile(io.StringIO(ZOPE)),
        io.StringIO(f'%define INSTANCE {tmp_path}\n' + written('zope')))
    [section] = config.databases
    db = section.open()
    assert db.database_name == 'main' and db.getCacheSize() == 30000
    with db.transaction() as connection:
        connection.root()['picture'] = ZODB.blob.Blob(b'data')
    db.close()
    assert list((tmp_path / 'var' / 'blobcache').rglob('*.blob'))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith('zeo client of')]
