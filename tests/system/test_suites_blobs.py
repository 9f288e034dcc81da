"""ZODB's own suites for blobs: both modes of the client, our client and server and stock ones."""

import doctest
import io
import os
import shutil
import unittest
from collections.abc import Iterator
from typing import Any

import pytest
from ZODB.tests.testblob import storage_reusable_suite
from zope.testing import setupstack

from tests.system.clients import open_client
from tests.system.servers import Pool, Server

#: Client, server, and whether they share the folder.
SIDES = [('zeo', 'zeo', False), ('zeo', 'zeo', True), ('zeo', 'ZEO', False), ('zeo', 'ZEO', True),
         ('ZEO', 'zeo', False), ('ZEO', 'zeo', True)]


class World:
    """Where the storages of a test come from: `storage_reusable_suite` wants to know beforehand."""

    pools: dict[str, Pool] = {}
    sides = SIDES[0]
    free: list[tuple[Server, str]] = []     # storages that nobody has used yet
    opened: list[Any] = []


def create(name: str, blob_dir: str) -> Any:
    client, _, shared = World.sides
    running, storage = World.free.pop()
    if shared:
        os.symlink(os.path.join(running.folder, f'{storage}.blobs'), blob_dir)
    opened = open_client(client, running, storage, blob_dir=blob_dir, shared_blob_dir=shared)
    World.opened.append(opened)
    return opened


def cases() -> list[Any]:
    """All tests of the suite, one by one."""
    def flat(suite: Any) -> Iterator[Any]:
        for each in suite:
            if isinstance(each, unittest.TestSuite):
                yield from flat(each)
            else:
                yield each
    return list(flat(storage_reusable_suite('', create, test_blob_storage_recovery=True)))


def title(case: Any) -> str:
    return case.id().split('.testblob.')[-1].replace('ZODB.tests.', '')


def runs() -> Iterator[Any]:
    """Who runs which test.  Only zeo can copy a blob with its transaction; the protocol cannot."""
    for sides in SIDES:
        client, server, shared = sides
        for number, case in enumerate(cases()):
            if sides[:2] == ('zeo', 'zeo') or 'RecoveryBlobStorage' not in title(case):
                mode = 'shared' if shared else 'cached'
                yield pytest.param(sides, number, id=f'{client}-{server}-{mode}-{title(case)}')


def careful_open(path: Any, mode: str = 'r') -> Any:
    """As `open` is for all users but root: what is not writable is not written."""
    if 'w' in mode and os.path.exists(path) and not os.stat(path).st_mode & 0o222:
        raise PermissionError(path)
    return open(path, mode)


@pytest.fixture(scope='module', autouse=True)
def pools() -> Iterator[None]:
    World.pools = {kind: Pool(kind, blobs=True, size=40) for kind in ('zeo', 'ZEO')}
    yield
    for pool in World.pools.values():
        pool.close()


@pytest.mark.filterwarnings('ignore::ResourceWarning')  # some of the tests forget to close files
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.parametrize('sides, number', list(runs()))
def test_blobs_are_as_zodb_wants_them(sides: Any, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases()[number]
    monkeypatch.setattr(setupstack, 'rmtree', shutil.rmtree)    # which copes with links to folders
    World.sides = sides
    # Beforehand: the tests' idea of a temporary folder is one that they remove.
    World.free = [World.pools[sides[1]].take() for _ in range(2)]
    World.opened = []
    if isinstance(case, doctest.DocTestCase):
        case._dt_test.globs['open'] = careful_open
    result = unittest.TestResult()
    try:
        case.run(result)
    finally:
        for storage in World.opened:
            storage.close()
    assert result.testsRun == 1
    problems = io.StringIO()
    for _, text in result.failures + result.errors:
        problems.write(text)
    assert result.wasSuccessful(), problems.getvalue()
