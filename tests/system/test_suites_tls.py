"""ZODB's storage suites: our client on our server, with TLS."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.system import suites
from tests.system.certificates import Certificates
from tests.system.servers import Pool
from zeo.wire.certificates import client_context


@pytest.fixture(scope='module')
def pool(certificates: Certificates) -> Iterator[Pool]:
    TestTls.ssl = client_context(certificates.client, authenticate=certificates.ca)
    pool = Pool(tls_certificate=certificates.server, tls_authenticate=certificates.ca)
    yield pool
    pool.close()


class TestTls(suites.OurClient, suites.StorageSuites):
    ssl: Any

    def client(self, address: Any, name: str, **options: Any) -> Any:
        return super().client(address, name, ssl=self.ssl, **options)

    @pytest.mark.soak  # it does nothing but connect, again and again
    def test_race_external_invalidate_vs_disconnect(self) -> None:
        super().test_race_external_invalidate_vs_disconnect()
