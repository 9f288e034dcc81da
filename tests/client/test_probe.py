"""Asking how a server is without becoming its client."""

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.servers import Server
from zeo.client.probe import probe
from zeo.errors import ClientDisconnected


@pytest.mark.parametrize('kind', ['zeo', 'ZEO'])
@pytest.mark.parametrize('unix', [False, True])
def test_a_server_of_either_make_tells_of_its_storages(
        kind: str, unix: bool, start_server: Callable[..., Server]) -> None:
    server = start_server(kind, unix=unix)
    told = probe(server.address)
    assert list(told) == ['1']
    assert told['1']['connections'] == 0


def test_where_no_server_is_that_is_told() -> None:
    with pytest.raises(ClientDisconnected, match='no server answers at /no/such/file .there is no such socket file;'
                                                 ' to name a port, give host:port'):
        probe('/no/such/file')


def test_a_file_that_is_no_socket_is_told_from_a_server_that_is_away(tmp_path: Path) -> None:
    (tmp_path / 'Data.fs').touch()
    with pytest.raises(ClientDisconnected, match='Data.fs .this is a file, and not the socket of a server'):
        probe(str(tmp_path / 'Data.fs'))


def test_who_says_nothing_is_not_waited_for_longer_than_the_time_out() -> None:
    with socket.create_server(('127.0.0.1', 0)) as silent:
        with pytest.raises(ClientDisconnected, match='no answer within 0.1 seconds; perhaps it is stopped, or hangs;'
                           ' or the server speaks TLS'):
            probe(silent.getsockname(), timeout=0.1)
