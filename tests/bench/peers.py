"""Clients by hand: as little as a server can tell from a client, so that the server is measured alone."""

import io
import pickle
import socket
from typing import Any

from tests.bench.floor import Stream, connect
from tests.bench.measure import wait_until


def _request(number: int, name: str, *args: Any) -> bytes:
    file = io.BytesIO()
    pickler = pickle.Pickler(file, 3)
    pickler.fast = True  # without a memo, as clients do it
    pickler.dump((number, False, name, args))
    return file.getvalue()


#: Made once: while hundreds connect, what a peer does beside the system calls is time that no server can save.
_REGISTER = _request(1, 'register', '1', False)


class Peer:
    """A connection that is registered and then rests."""

    def __init__(self, address: Any) -> None:
        self._stream = Stream(connect(address))

    def greet(self) -> None:
        greeting = self._stream.receive()
        if greeting is None:
            raise ConnectionError('closed by the server')
        self._stream.send(b'Z5')
        self._stream.send(_REGISTER)

    def _reply(self) -> Any:
        payload = self._stream.receive()
        if payload is None:
            raise ConnectionError('closed by the server')
        _, failed, name, result = pickle.loads(payload)
        assert name == '.reply' and not failed, result
        return result

    def registered(self) -> bytes:
        """Wait for the answer to `greet`: the last tid."""
        tid: bytes = self._reply()
        return tid

    def load(self, oid: bytes, tid: bytes) -> Any:
        self._stream.send(_request(2, 'loadBefore', oid, tid))
        return self._reply()

    def close(self) -> None:
        self._stream.sock.close()


def first_contact(address: Any) -> Peer:
    """Connect to a server that is perhaps just starting."""
    found: list[Peer] = []

    def reached() -> bool:
        try:
            peer = Peer(address)
        except OSError:
            return False
        try:
            peer.greet()
            peer.registered()
        except OSError:
            peer.close()
            return False
        found.append(peer)
        return True

    wait_until(reached, f'somebody serves at {address}', 60)
    return found[0]


def connect_many(address: Any, count: int, at_once: int = 50) -> list[Peer]:
    """Register so many clients, ``at_once`` of them together (a server's backlog is limited)."""
    peers: list[Peer] = []
    while len(peers) < count:
        group = [Peer(address) for _ in range(min(at_once, count - len(peers)))]
        peers += group
        for peer in group:
            peer.greet()
        for peer in group:
            peer.registered()
    return peers


def free_port() -> int:
    with socket.create_server(('127.0.0.1', 0)) as sock:
        port: int = sock.getsockname()[1]
        return port
