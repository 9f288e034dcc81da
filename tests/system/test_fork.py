"""os.fork() with an open storage: parent and child go on, each with a connection and a cache of its own."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from ZODB import DB

from tests.system.servers import PATIENCE, ROOT, Server
from zeo.ClientStorage import ClientStorage

SCRIPT = """
import os, sys, transaction, warnings, ZODB
from zeo.ClientStorage import ClientStorage

warnings.simplefilter('ignore', DeprecationWarning)  # Python's, of forking with threads
storage = ClientStorage(('127.0.0.1', int(sys.argv[1])), cache=sys.argv[2])
db = ZODB.DB(storage)
with db.transaction() as connection:
    connection.root()['parent'] = 1
link, path = storage._supervisor.wait(), storage._cache.path
child = os.fork()
if child == 0:
    with db.transaction() as connection:
        assert connection.root()['parent'] == 1
        connection.root()['child'] = 1
    assert storage._cache.path is None
    assert storage._supervisor.wait() is not link
    db.close()
    os._exit(0)
_, status = os.waitpid(child, 0)
assert status == 0, status
storage.ping()
assert storage._supervisor.wait() is link and link.channel.ended is None
assert storage._cache.path == path
with db.transaction() as connection:
    assert connection.root()['child'] == 1
    connection.root()['parent'] = 2
db.close()
print('both work')
"""


def test_parent_and_child_both_go_on(start_server: Callable[..., Server], tmp_path: Path) -> None:
    server = start_server()
    path = str(tmp_path / 'cache.zec')
    done = subprocess.run(
        [sys.executable, '-c', SCRIPT, str(server.address[1]), path], cwd=ROOT, text=True,
        capture_output=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (0, 'both work\n'), done.stderr
    db = DB(ClientStorage(server.address, cache=path))  # the file is whole, and nobody's
    with db.transaction() as connection:
        assert dict(connection.root()) == {'parent': 2, 'child': 1}
    db.close()
