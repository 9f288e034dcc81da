"""The other side, by hand: a server that says exactly what a test tells it to."""

import socket
from typing import Any
from typing import NamedTuple

from zeo.wire import messages
from zeo.wire.decoding import decode_from_client
from zeo.wire.framing import Frame
from zeo.wire.framing import Inbox
from zeo.wire.framing import frame
from zeo.wire.greeting import GREETING

#: Seconds that anything in these tests may take; never reached on a healthy machine.
PATIENCE = 30.0


def oid(number: int) -> bytes:
    return number.to_bytes(8, 'big')


tid = oid

INFO = {'length': 3, 'size': 812, 'name': 'scripted', 'supportsUndo': False,
        'supports_record_iternext': False, 'interfaces': ()}


class Message(NamedTuple):
    """What a client says."""

    id: bytes
    oneway: bool
    name: str
    args: tuple[Any, ...]


class Peer:
    """The server's end of one connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sock.settimeout(PATIENCE)
        self.inbox = Inbox()
        self.heartbeats = 0

    def payload(self) -> bytes | bytearray:
        """The client's next frame."""
        while (payload := self.inbox.next()) is None:
            size = self.sock.recv_into(self.inbox.buffer())
            if not size:
                raise ConnectionError('the client has closed the connection')
            self.inbox.advance(size)
        return payload

    def read(self, name: str | None = None) -> Message:
        """The client's next message but heartbeats, which must be of that name."""
        while True:
            message = Message(*decode_from_client(self.payload()))
            if not messages.is_heartbeat(message.id):
                break
            self.heartbeats += 1
        assert name is None or message.name == name, message
        return message

    def at_end(self) -> bool:
        """Whether the client has ended the connection, without another word."""
        try:
            return not self.sock.recv(1)
        except ConnectionError:
            return True

    def send(self, *frames: Frame) -> None:
        """All in one piece."""
        self.sock.sendall(b''.join(part for each in frames for part in each))

    def answer(self, message: Message, result: Any) -> None:
        self.send(messages.reply(message.id, result))

    def refuse(self, message: Message, error: BaseException) -> None:
        self.send(messages.error_reply(message.id, error))

    def greet(self) -> None:
        self.send(frame(GREETING))
        assert self.payload() == GREETING

    def welcome(self, last_tid: bytes, **info: Any) -> Message:
        """Greeting, `register` and `get_info`: as far as every connection goes."""
        self.greet()
        registration = self.read('register')
        self.answer(registration, last_tid)
        self.answer(self.read('get_info'), INFO | info)
        return registration

    def close(self) -> None:
        self.sock.close()


class Host:
    """A listening socket on which tests accept by hand."""

    def __init__(self, address: Any = ('127.0.0.1', 0)) -> None:
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        self.listener = socket.socket(family, socket.SOCK_STREAM)
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.listener.bind(address)
        self.listener.listen(16)
        self.listener.settimeout(PATIENCE)
        self.address = self.listener.getsockname()
        self.peers: list[Peer] = []

    def accept(self) -> Peer:
        sock, _ = self.listener.accept()
        self.peers.append(Peer(sock))
        return self.peers[-1]

    def close(self) -> None:
        self.listener.close()
        for peer in self.peers:
            peer.close()
