"""The bare floor: what a load costs at least, with blocking sockets and the pickles of the protocol.

No order is kept, nothing is cached, nothing is checked.  ``python -m tests.bench.floor ADDRESS FILE``
serves a FileStorage, where ``ADDRESS`` is ``HOST:PORT`` or the path of a Unix socket.

A blob is one message, and then its data, copied by the kernel from the file to the socket, and from there
into a file, which is synced then, unless ``unsynced`` is given, too.
"""

import fcntl
import os
import pickle
import socket
import struct
import sys
import threading
from typing import Any

#: What a pipe may hold, usually.
PIPE = 1024 * 1024

_pack = struct.Struct('>I').pack
_unpack = struct.Struct('>I').unpack_from


class Stream:
    """Frames over a socket; one thread at a time."""

    def __init__(self, sock: socket.socket, room: int = 64 * 1024) -> None:
        self.sock = sock
        self._buffer = bytearray(room)
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


def send_file(stream: Stream, path: str) -> None:
    """Send the whole file."""
    with open(path, 'rb') as file:
        at, size = 0, os.fstat(file.fileno()).st_size
        while at < size:
            at += os.sendfile(stream.sock.fileno(), file.fileno(), at, size - at)


def receive_file(stream: Stream, path: str, size: int, sync: bool) -> None:
    """Receive a whole file; nothing else may have been received with it."""
    ear, mouth = os.pipe()
    fcntl.fcntl(mouth, fcntl.F_SETPIPE_SZ, PIPE)
    with open(path, 'wb', buffering=0) as file:
        while size:
            count = os.splice(stream.sock.fileno(), mouth, min(size, PIPE))
            size -= count
            while count:
                count -= os.splice(ear, file.fileno(), count)
        if sync:
            os.fdatasync(file.fileno())
    os.close(ear)
    os.close(mouth)


def serve(address: Any, path: str, sync: bool = True) -> None:
    from ZODB.FileStorage import FileStorage
    storage = FileStorage(path)
    listener = listen(address)
    while True:
        sock, _ = listener.accept()
        threading.Thread(target=_converse, args=(Stream(sock), storage, path, sync), daemon=True).start()


def _converse(stream: Stream, storage: Any, path: str, sync: bool) -> None:
    load = storage.loadBefore
    blob = path + '.blobs/floor.blob'
    while (payload := stream.receive()) is not None:
        message_id, _, name, args = pickle.loads(payload)
        if name == 'loadBefore':
            stream.send(pickle.dumps((message_id, 0, '.reply', load(*args)), 3))
        elif name == 'loadBlob':
            stream.send(pickle.dumps((message_id, 0, '.reply', os.stat(blob).st_size), 3))
            stream.receive()
            send_file(stream, blob)
        else:
            stream.send(pickle.dumps((message_id, 0, '.reply', None), 3))
            receive_file(stream, blob, *args, sync)
            stream.send(pickle.dumps((message_id, 0, '.reply', None), 3))


class Client:
    """What a client storage would be if it could do nothing but load, and send and get one blob."""

    def __init__(self, address: Any, blob_dir: str = '') -> None:
        self._stream = Stream(connect(address))
        self._number = 0
        self._folder = blob_dir
        if blob_dir:
            os.mkdir(blob_dir)

    def loadBefore(self, oid: bytes, tid: bytes) -> Any:
        return self._call('loadBefore', oid, tid)

    def _call(self, name: str, *args: Any) -> Any:
        self._number += 1
        self._stream.send(pickle.dumps((self._number, False, name, args), 3))
        payload = self._stream.receive()
        assert payload is not None
        return pickle.loads(payload)[3]

    def temporaryDirectory(self) -> str:
        return self._folder

    def new_oid(self) -> bytes:
        return bytes(8)

    def tpc_begin(self, transaction: Any) -> None:
        """There are no transactions."""

    def storeBlob(self, oid: bytes, serial: bytes, record: bytes, path: str, version: str, transaction: Any) -> None:
        self._call('storeBlob', os.stat(path).st_size)
        send_file(self._stream, path)
        assert self._stream.receive()

    def tpc_vote(self, transaction: Any) -> None:
        """There are no transactions."""

    def tpc_finish(self, transaction: Any) -> bytes:
        return bytes(8)

    def loadBlob(self, oid: bytes, tid: bytes) -> str:
        path = os.path.join(self._folder, 'fetched')
        size = self._call('loadBlob')
        self._stream.send(b'go on')
        receive_file(self._stream, path, size, False)
        return path

    def close(self) -> None:
        self._stream.sock.close()


if __name__ == '__main__':
    where, file, *unsynced = sys.argv[1:]
    host, _, port = where.rpartition(':')
    serve(where if '/' in where else (host, int(port)), file, not unsynced)
