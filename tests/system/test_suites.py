"""ZODB's storage suites: our client on our server."""

from typing import Any

import pytest

from tests.system import suites


class TestTcp(suites.OurClient, suites.StorageSuites):
    pass


class TestUnixSocket(suites.OurClient, suites.StorageSuites):
    server: dict[str, Any] = {'unix': True}


class TestServerHex(suites.OurClient, suites.StorageSuites):
    """The served storage is a wrapper that transforms all records."""

    server: dict[str, Any] = {'wrapper': 'HexStorage'}


@pytest.mark.soak  # TestServerHex does the same at the other end
class TestClientHex(suites.ClientHex, suites.OurClient, suites.StorageSuites):
    """The client is in such a wrapper."""

    server: dict[str, Any] = {'unix': True, 'wrapper': 'ServerHexStorage'}


class TestRecoveryTcp(suites.OurClient, suites.RecoverySuite):
    pass


class TestRecoveryUnixSocket(suites.OurClient, suites.RecoverySuite):
    server: dict[str, Any] = {'unix': True}


class TestRecoveryServerHex(suites.OurClient, suites.RecoverySuite):
    server: dict[str, Any] = {'wrapper': 'HexStorage'}


class TestRecoveryClientHex(suites.ClientHex, suites.OurClient, suites.RecoverySuite):
    server: dict[str, Any] = {'unix': True, 'wrapper': 'ServerHexStorage'}


class TestClientResolvesConflicts(suites.OurClient, suites.ConflictSuite):
    server: dict[str, Any] = {'client_conflict_resolution': True}
