"""ZODB's storage suites through a server over PostgreSQL: our client and the stock one."""

import gc
from collections.abc import Iterator

import pytest

from tests.system import suites
from tests.system.postgres import Cluster, HostPool


@pytest.fixture(scope='class')
def pool(cluster: Cluster) -> Iterator[HostPool]:
    pool = HostPool(cluster, size=30, poll_interval=1)
    yield pool
    pool.close()
    gc.collect()    # what the class forgot to close is found here, not in the next one


class OverRelStorage:
    """Without what RelStorage itself does not do: it neither resolves conflicts of an undo nor refers to old data."""

    testUndoConflictResolution = None
    testUndoMultipleConflictResolution = None
    testUndoMultipleConflictResolutionReversed = None
    testTransactionalUndoIterator = None


@pytest.mark.soak
class TestOurs(OverRelStorage, suites.OurClient, suites.StorageSuites):
    pass


class TestRecovery(suites.OurClient, suites.RecoverySuite):
    pass


@pytest.mark.soak
class TestStock(OverRelStorage, suites.StockClient, suites.StorageSuites):
    pass
