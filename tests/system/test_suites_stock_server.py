"""ZODB's storage suites: our client on the server of PyPI's ZEO."""

from typing import Any

from tests.system import suites


class TestTcp(suites.OurClient, suites.StorageSuites):
    server: dict[str, Any] = {'kind': 'ZEO'}


class TestUnixSocketAndServerHex(suites.OurClient, suites.StorageSuites):
    server: dict[str, Any] = {'kind': 'ZEO', 'unix': True, 'wrapper': 'HexStorage'}
    test_race_external_invalidate_vs_disconnect = None  # half a minute; TestTcp has it


class TestRecovery(suites.OurClient, suites.RecoverySuite):
    server: dict[str, Any] = {'kind': 'ZEO'}


class TestClientResolvesConflicts(suites.OurClient, suites.ConflictSuite):
    server: dict[str, Any] = {'kind': 'ZEO', 'client_conflict_resolution': True}
