"""Asks a server how it is without becoming its client, as monitoring does: the word ``ruok``."""

import json
import socket
from typing import Any

from zeo.client.dialing import Address
from zeo.client.dialing import display
from zeo.errors import ClientDisconnected
from zeo.errors import ProtocolError
from zeo.wire.framing import Inbox
from zeo.wire.framing import frame
from zeo.wire.messages import PROBE

#: The longest answer in bytes.
LIMIT = 16 * 1024 * 1024


def probe(address: Address, timeout: float = 10.0) -> dict[str, dict[str, Any]]:
    """The status of each storage, by name; no method of the server is called.

    Raises `ClientDisconnected` if no server answers within ``timeout`` seconds for each step.
    """
    try:
        with _connect(address, timeout) as sock:
            inbox = Inbox(LIMIT)
            _next(sock, inbox)  # the greeting, whatever the protocol
            sock.sendall(b''.join(frame(PROBE)))
            told = json.loads(bytes(_next(sock, inbox)))
    except (OSError, ValueError, ProtocolError) as error:
        raise ClientDisconnected(f'no server answers at {display(address)} ({error})') from None
    if not isinstance(told, dict) or not all(isinstance(each, dict) for each in told.values()):
        raise ClientDisconnected(f'what answers at {display(address)} does not tell how it is')
    return told


def _connect(address: Address, timeout: float) -> socket.socket:
    if not isinstance(address, str):
        return socket.create_connection(address, timeout)
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.settimeout(timeout)
        sock.connect(address)
    except BaseException:
        sock.close()
        raise
    return sock


def _next(sock: socket.socket, inbox: Inbox) -> bytes | bytearray:
    while (payload := inbox.next()) is None:
        count = sock.recv_into(inbox.buffer())
        if not count:
            raise ConnectionError('the connection was closed')
        inbox.advance(count)
    return payload
