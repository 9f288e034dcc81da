"""Asks a server how it is without becoming its client, as monitoring does: the word ``ruok``."""

import json
import socket
from collections.abc import Callable
from typing import Any

from zeo.client.dialing import Address
from zeo.client.dialing import SPEAKS_TLS
from zeo.client.dialing import Security
from zeo.client.dialing import connect_unix
from zeo.client.dialing import display
from zeo.client.dialing import no_answer
from zeo.client.dialing import secure
from zeo.errors import ClientDisconnected
from zeo.errors import ProtocolError
from zeo.wire.framing import Inbox
from zeo.wire.framing import Payload
from zeo.wire.framing import frame
from zeo.wire.greeting import PROBE
from zeo.wire.greeting import looks_like_tls

#: The longest answer in bytes.
LIMIT = 16 * 1024 * 1024


def probe(address: Address, timeout: float = 10.0, security: Security | None = None,
          ) -> dict[str, dict[str, Any]]:
    """The status of each storage, by name; no method of the server is called.

    Raises `ClientDisconnected` if no server answers within ``timeout`` seconds for each step.
    """
    try:
        with _connect(address, timeout) as sock:
            inbox = Inbox(LIMIT)
            question = b''.join(frame(PROBE))
            tls = secure(sock, address, security)
            if tls is None:
                _next(sock.recv_into, inbox)  # the greeting, whatever the protocol
                sock.sendall(question)
                told = json.loads(bytes(_next(sock.recv_into, inbox)))
            else:
                tls.shake_hands(sock.sendall)
                _next(tls.recv_into, inbox)
                sock.sendall(tls.seal((question,)))
                told = json.loads(bytes(_next(tls.recv_into, inbox)))
    except TimeoutError:
        error = no_answer(timeout, security is None and not isinstance(address, str))
        raise ClientDisconnected(f'no server answers at {display(address)} ({error})') from None
    except FileNotFoundError:
        raise ClientDisconnected(f'no server answers at {display(address)} (there is no such socket file;'
                                 ' to name a port, give host:port)') from None
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
        connect_unix(sock, address)
    except BaseException:
        sock.close()
        raise
    return sock


def _next(recv_into: Callable[[memoryview], int], inbox: Inbox) -> Payload:
    while (payload := inbox.next()) is None:
        count = recv_into(inbox.buffer())
        if not count:
            raise ConnectionError('the connection was closed')
        inbox.advance(count)
        if looks_like_tls(inbox.beginning(2)):
            raise ConnectionError(SPEAKS_TLS)
    return payload
