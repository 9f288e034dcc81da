"""Plain bytes to encrypted ones and back: TLS (RFC 8446, RFC 5246) for one connection.

What reads the socket and what sends over it stay as they are without TLS: where they would hand a socket
over, they hand over a `Tls`, and where they would send parts of frames, they send what `Tls.seal` makes of
them.  Nothing here waits, but for the ``receive`` that `Tls` is given.

*Threads.*  One thread reads and others send, and an `ssl.SSLObject` may be used by one thread at a time.
So it works on memory alone (`ssl.MemoryBIO`), and each look at it is under one mutex, a leaf: nothing else
is called while it is held, and who waits for the socket, to read or to write, does not hold it.

*Order.*  Encrypted bytes have to reach the socket in the order in which the SSLObject made them.  It makes
them under the mutex and appends them to one buffer, which is first in, first out.  They are taken from
there only by who has the right to send over the socket (the turn to write of the server, the client's right
to send), who keeps it until they are sent, or leaves them to whoever has it next.  So there is one queue
into the buffer, one queue out of it, and nothing overtakes.

*What reading makes.*  A read may answer the peer (a new key, a request for a certificate, an alert).
That is appended to the same buffer, so it stands in the right place.  The reader then says so (`answer`):
if nobody is sending, it is sent at once; if somebody is, with the next message at the latest.

*The end.*  A stream that ends without TLS's own end (close_notify) is one that ends: nothing is concluded
from the end of a stream but that the connection is lost, and a frame that is not whole is not used.  The
SSLObject is not told, for it would refuse to send, too; a server that is being closed stops reading first.
"""

import contextlib
import ssl
from collections.abc import Callable
from collections.abc import Sequence
from threading import Lock
from typing import Any

from zeo.errors import TlsError
from zeo.wire.greeting import TLS_BEGINS_WITH

#: Bytes to be received from the socket at a time; four records of TLS are not longer.
SIZE = 64 * 1024

#: So many bytes of TLS's own answers may wait to be read by the peer.
MOST_ANSWERS = 64 * 1024

#: Why the peer does not want us, by the name of its alert.
_ALERTS = {
    'UNKNOWN_CA': "does not accept the {own}'s certificate: it does not trust who has signed it",
    'CERTIFICATE_EXPIRED': "does not accept the {own}'s certificate: it has expired",
    'CERTIFICATE_REVOKED': "does not accept the {own}'s certificate: it has been revoked",
    'CERTIFICATE_UNKNOWN': "does not accept the {own}'s certificate",
    'BAD_CERTIFICATE': "does not accept the {own}'s certificate: it is for another host, or damaged",
    'UNSUPPORTED_CERTIFICATE': "does not accept the {own}'s certificate: it is for another purpose",
    'CERTIFICATE_REQUIRED': 'wants to see a certificate of the {own}',
    'PROTOCOL_VERSION': 'does not speak a version of TLS that is accepted here',
    'HANDSHAKE_FAILURE': 'does not agree to the TLS that is spoken here; perhaps it wants to see a'
                         ' certificate of the {own}',
    'INSUFFICIENT_SECURITY': 'asks for a safer cipher',
}

#: Why we do not want the peer, by the name of OpenSSL's error.
_REASONS = {
    'PEER_DID_NOT_RETURN_A_CERTIFICATE': 'does not show a certificate, and has to',
    'UNSUPPORTED_PROTOCOL': 'speaks a version of TLS that is too old',
    'VERSION_TOO_LOW': 'speaks a version of TLS that is too old',
    'NO_SHARED_CIPHER': 'knows none of the ciphers that are accepted here',
    'NO_PROTOCOLS_AVAILABLE': 'cannot be spoken to in any version of TLS that is accepted here',
}

#: Verification failed because nobody known here has signed the certificate (X509_V_ERR_...).
_UNSIGNED = {18, 19, 20, 21}


class Tls:
    """One connection's encryption.

    ``receive`` returns at most so many bytes from the socket, as `socket.recv` does; it may be replaced.
    ``answer`` is called by a thread that reads, with no lock held, when there is something to be sent
    (by who has the right to: `seal` without parts).  ``hostname`` is the name that the server's certificate
    has to have, for a client that checks it.
    """

    __slots__ = ('receive', 'answer', '_object', '_incoming', '_outgoing', '_mutex', '_peer', '_begun')

    def __init__(self, context: ssl.SSLContext, receive: Callable[[int], bytes], *,
                 server_side: bool = False, hostname: str | None = None) -> None:
        self.receive = receive
        self.answer: Callable[[], object] = _nobody_answers
        # The mutex guards these three: what was received, what is to be sent, and what lies between.
        self._mutex = Lock()
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._object = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_side, server_hostname=hostname)
        self._peer = 'client' if server_side else 'server'
        self._begun = False  # the peer has said something

    # ---- the beginning

    def shake_hands(self, send: Callable[[bytes], object]) -> None:
        """Come to terms with the peer; ``send`` sends all it is given.

        Raises `TlsError`; `ConnectionError` if the stream ends; and what ``send`` and ``receive`` raise,
        where it can be called again after a `BlockingIOError`.
        """
        while True:
            failure: TlsError | None = None
            done = False
            with self._mutex:
                try:
                    self._object.do_handshake()
                    done = True
                except ssl.SSLWantReadError:
                    pass
                except ssl.SSLError as error:
                    failure = self._explained(error)
                said = self._outgoing.read()
            if failure is not None:
                with contextlib.suppress(OSError):
                    send(said)  # the peer learns why
                raise failure
            if said:
                send(said)
            if done:
                return
            data = self.receive(SIZE)
            if not data:
                raise ConnectionError(f'the {self._peer} closed the connection during the TLS handshake')
            if not self._begun and data[0] not in TLS_BEGINS_WITH:
                raise TlsError(self._without_tls())
            self._begun = True
            with self._mutex:
                self._incoming.write(data)

    @property
    def has_begun(self) -> bool:
        """Whether the peer has said anything in its handshake."""
        return self._begun

    def peer_name(self) -> str | None:
        """The common name in the peer's certificate, or its first other name; None if it has none.

        It is the name of a certificate that was verified.
        """
        with self._mutex:
            certificate: Any = self._object.getpeercert() or {}
        for group in certificate.get('subject', ()):
            for key, value in group:
                if key == 'commonName':
                    return str(value)
        for _, value in certificate.get('subjectAltName', ()):
            return str(value)
        return None

    # ---- afterwards

    def recv_into(self, buffer: memoryview) -> int:
        """What `socket.recv_into` does, with plain bytes; 0 at the end of the stream.  One thread at a time.

        Raises `TlsError`, and what ``receive`` raises.
        """
        data = b''
        while True:
            count = -1
            failure: TlsError | None = None
            with self._mutex:
                if data:
                    self._incoming.write(data)
                try:
                    count = self._object.read(len(buffer), buffer)  # type: ignore[assignment]
                except ssl.SSLWantReadError:
                    pass
                except ssl.SSLZeroReturnError:
                    count = 0
                except ssl.SSLError as error:
                    failure = self._explained(error)
                pending = self._outgoing.pending
            if pending:
                self.answer()
                if pending > MOST_ANSWERS:
                    raise TlsError(f'the {self._peer} asks for new keys and does not read the answers')
            if failure is not None:
                raise failure
            if count >= 0:
                return count
            data = self.receive(SIZE)
            if not data:
                return 0

    def seal(self, parts: Sequence[bytes | memoryview] = ()) -> bytes:
        """The parts encrypted, behind what is still to be sent.  By who has the right to send.

        Raises `OSError` if the connection has ended.
        """
        plain = parts[0] if len(parts) == 1 else b''.join(parts)
        with self._mutex:
            if plain:
                self._object.write(plain)
            return self._outgoing.read()

    def farewell(self) -> bytes:
        """TLS's own end of the stream, to be sent last; nothing if that would have to wait.

        Also from a signal handler that has interrupted any of the methods above.
        """
        if not self._mutex.acquire(False):
            return b''
        try:
            with contextlib.suppress(ssl.SSLError):
                self._object.unwrap()
            return self._outgoing.read()
        finally:
            self._mutex.release()

    # ---- in words

    def _explained(self, error: ssl.SSLError) -> TlsError:
        peer, own = self._peer, 'server' if self._peer == 'client' else 'client'
        reason = error.reason or ''
        _, is_alert, alert = reason.partition('ALERT_')
        if isinstance(error, ssl.SSLCertVerificationError):
            text = f"the {peer}'s certificate is not accepted: {error.verify_message.rstrip('.')}"
            if error.verify_code in _UNSIGNED:
                text += '; if it is the right one, name it, or the authority that has signed it, as one to' \
                        ' authenticate'
        elif is_alert and alert in _ALERTS:
            text = f'the {peer} {_ALERTS[alert].format(own=own)}'
        elif reason in _REASONS:
            text = f'the {peer} {_REASONS[reason]}'
        else:
            text = f'the TLS of the {peer} is in error: {reason.lower().replace("_", " ") or error}'
        return TlsError(text)

    def _without_tls(self) -> str:
        if self._peer == 'client':
            return 'the client does not speak TLS, and has to'
        return 'the server does not speak TLS at this address: leave ssl (--tls) out, or give another address'


def _nobody_answers() -> None:
    pass
