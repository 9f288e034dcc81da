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


class TestOurs(suites.OurClient, suites.StorageSuites):
    pass


class TestRecovery(suites.OurClient, suites.RecoverySuite):
    pass


@pytest.mark.soak
class TestStock(suites.StockClient, suites.StorageSuites):
    pass
