"""Transactions far larger than what a server should take in memory."""

import os
from collections.abc import Callable

import pytest
from ZODB.utils import z64

from tests.server.talk import SocketPeer
from tests.server.talk import oid
from tests.system.servers import Server

MB = 1024 * 1024

#: What a server may take beside one record: what is staged in memory, buffers of the socket and of the
#: file, the storage's index, and what the allocator keeps.
SLACK = 40 * MB

#: Seconds that a gigabyte may take.
LONG = 600.0


def peak(server: Server) -> int:
    """The most memory in bytes that the server's process has had so far (`VmHWM`)."""
    assert server.process is not None
    with open(f'/proc/{server.process.pid}/status') as file:
        [line] = [line for line in file if line.startswith('VmHWM')]
    return int(line.split()[1]) * 1024


@pytest.mark.timeout(900)
@pytest.mark.parametrize('count, size', [
    (50_000, 1000), (50, 2 * MB),
    pytest.param(100_000, 10_000, marks=pytest.mark.soak),
    pytest.param(1024, MB, marks=pytest.mark.soak),
    pytest.param(8, 128 * MB, marks=pytest.mark.soak)])
def test_a_large_transaction_takes_little_memory_of_the_server(
        start_server: Callable[..., Server], count: int, size: int) -> None:
    server = start_server(transaction_timeout=int(LONG))
    with SocketPeer(server.address) as peer:
        peer.sock.settimeout(LONG)
        peer.commit(oid(0), b'the first one')
        before = peak(server)
        record = os.urandom(size - 8)
        peer.begin(2)
        for number in range(1, count + 1):
            peer.tell('storea', oid(number), z64, record + oid(number), 2)
        assert peer.answer(peer.ask('vote', 2), LONG) == []
        committed = peer.answer(peer.ask('tpc_finish', 2), LONG)
        grown = peak(server) - before
        for number in (1, count):
            assert peer.load(oid(number)) == (record + oid(number), committed, None)
    print(f'{count} records of {size} bytes: {grown / MB:.0f} MB')
    assert grown < 3 * size + SLACK
