"""What is said before the first message: the version of the protocol, or that a probe has come, or TLS."""

import json
from typing import Any

from zeo.wire.framing import Payload

#: What a server says first, and what a client answers.
GREETING = b'Z5'

#: What a monitoring probe answers instead.
PROBE = b'ruok'

#: The first byte of what a peer says that speaks TLS: an alert, or the handshake.
TLS_BEGINS_WITH = {21, 22}

#: What says in the clear that TLS is spoken here: a fatal alert (handshake_failure).
TLS_ALERT = bytes([21, 3, 1, 0, 2, 2, 40])


def looks_like_tls(first: bytes) -> bool:
    """Whether these first two bytes of a stream are those of TLS; no short frame begins with them."""
    return len(first) == 2 and first[0] in TLS_BEGINS_WITH and first[1] == 3


def answer_to_greeting(greeting: Payload) -> bytes | None:
    """What a client answers to a server's greeting; None if it cannot talk to that server."""
    encoding, version = bytes(greeting[:1]), bytes(greeting[1:])
    if encoding == b'Z' and min(version, b'5') == b'5':
        return GREETING
    return None


def status_report(status: dict[str, dict[str, Any]]) -> bytes:
    """The answer to a probe: the status of each storage, by name."""
    return json.dumps(status).encode('ascii')
