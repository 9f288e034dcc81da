"""Client storages of both makes, by the same words."""

from typing import Any

import zeo.ClientStorage
import ZEO.ClientStorage
from tests.system.servers import Server

__all__ = ['open_client']


def open_client(kind: str, server: Server | Any, storage: str = '1', **options: Any) -> Any:
    """A client storage of `kind` 'zeo' or 'ZEO' (PyPI's); ``server`` may be an address as well."""
    address = server.address if isinstance(server, Server) else server
    make = {'zeo': zeo.ClientStorage.ClientStorage, 'ZEO': ZEO.ClientStorage.ClientStorage}[kind]
    options = {'wait_timeout': 60, 'min_disconnect_poll': .1} | options
    return make(address, storage, **options)
