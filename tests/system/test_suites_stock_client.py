"""ZODB's storage suites: the client of PyPI's ZEO on our server."""

from typing import Any

from tests.system import suites


class TestTcp(suites.StockClient, suites.StorageSuites):
    pass


class TestUnixSocketAndServerHex(suites.StockClient, suites.StorageSuites):
    server: dict[str, Any] = {'unix': True, 'wrapper': 'HexStorage'}
    test_race_external_invalidate_vs_disconnect = None  # half a minute; TestTcp has it


class TestRecovery(suites.StockClient, suites.RecoverySuite):
    pass


class TestClientResolvesConflicts(suites.StockClient, suites.ConflictSuite):
    server: dict[str, Any] = {'client_conflict_resolution': True}
