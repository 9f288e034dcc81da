"""The suites with a stock client on a stock server: shows that the harness itself is right.

Not part of the ordinary run (its name matches no pattern of pytest's):
``python -m pytest tests/system/reference_suites.py``.
"""

from typing import Any

from tests.system import suites


class Stock(suites.StockClient):
    """A stock client on a stock server."""

    server: dict[str, Any] = {'kind': 'ZEO'}


class TestStorage(Stock, suites.StorageSuites):
    pass


class TestRecovery(Stock, suites.RecoverySuite):
    pass


class TestClientResolvesConflicts(Stock, suites.ConflictSuite):
    server = Stock.server | {'client_conflict_resolution': True}


class TestServerHex(Stock, suites.StorageSuites):
    server = Stock.server | {'unix': True, 'wrapper': 'HexStorage'}


class TestClientHex(suites.ClientHex, Stock, suites.StorageSuites):
    server = Stock.server | {'wrapper': 'ServerHexStorage'}
