"""The bare floor: what a load costs at least, with blocking sockets and the pickles of the protocol.

No order is kept, nothing is cached, nothing is checked.  ``python -m tests.bench.floor ADDRESS FILE``
serves a FileStorage, where ``ADDRESS`` is ``HOST:PORT`` or the path of a Unix socket.
"""

import pickle
import socket
import struct
import sys
import threading
from typing import Any

_pack = struct.Struct('>I').pack
_unpack = struct.Struct('>I').unpack_from


class Stream:
    """Frames over a socket; one thread at a time."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._buffer = bytearray(64 * 1024)
        self._view = memoryview(self._buffer)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, payload: bytes) -> None:
        if len(payload) < 32 * 1024:
            self.sock.sendall(_pack(len(payload)) + payload)
        else:
            self.sock.sendall(_pack(len(payload)))
            self.sock.sendall(payload)

    def receive(self) -> memoryview | None:
        """The next payload; None at the end.  It is overwritten by the next call."""
        have = 0
        while have < 4:
            have += self.sock.recv_into(self._view[have:]) or 5
            if have == 5:
                return None
        need = 4 + _unpack(self._buffer)[0]
        if need > len(self._view):  # kept for the next one: new memory is dear
            self._buffer = bytearray(need)
            self._buffer[:have] = self._view[:have]
            self._view = memoryview(self._buffer)
        while have < need:
            have += self.sock.recv_into(self._view[have:need])
        return self._view[4:need]


def listen(address: Any) -> socket.socket:
    if isinstance(address, str):
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(address)
        sock.listen(100)
        return sock
    return socket.create_server(address, backlog=100)


def connect(address: Any) -> socket.socket:
    if isinstance(address, str):
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(address)
        except BaseException:
            sock.close()
            raise
        return sock
    return socket.create_connection(address)


def serve(address: Any, path: str) -> None:
    from ZODB.FileStorage import FileStorage
    storage = FileStorage(path)
    listener = listen(address)
    while True:
        sock, _ = listener.accept()
        threading.Thread(target=_converse, args=(Stream(sock), storage), daemon=True).start()


def _converse(stream: Stream, storage: Any) -> None:
    load = storage.loadBefore
    while (payload := stream.receive()) is not None:
        message_id, _, name, args = pickle.loads(payload)
        stream.send(pickle.dumps((message_id, 0, '.reply', load(*args)), 3))


class Client:
    """What a client storage would be if it could do nothing but load."""

    def __init__(self, address: Any) -> None:
        self._stream = Stream(connect(address))
        self._number = 0

    def loadBefore(self, oid: bytes, tid: bytes) -> Any:
        self._number += 1
        self._stream.send(pickle.dumps((self._number, False, 'loadBefore', (oid, tid)), 3))
        payload = self._stream.receive()
        assert payload is not None
        return pickle.loads(payload)[3]

    def close(self) -> None:
        self._stream.sock.close()


if __name__ == '__main__':
    where, file = sys.argv[1:]
    host, _, port = where.rpartition(':')
    serve(where if '/' in where else (host, int(port)), file)
