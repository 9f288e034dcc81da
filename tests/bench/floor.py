"""The bare floor: what each workload costs at least, with blocking sockets and the pickles of the protocol.

No order is kept, nothing is cached, nothing is checked, nobody is ever late; see `tests.bench.floorserver` for
the other side.  A commit is two round trips, as the protocol wants it: all that is stored goes with the vote.  A
blob is one message, and then its data, copied by the kernel from the file to the socket, and from there into a
file.
"""

import contextlib
import fcntl
import os
import pickle
import socket
import struct
import threading
from collections.abc import Sequence
from typing import Any

#: What a pipe may hold, usually.
PIPE = 1024 * 1024

_pack = struct.Struct('>I').pack
_unpack = struct.Struct('>I').unpack_from


class Stream:
    """Frames over a socket; one thread at a time."""

    def __init__(self, sock: socket.socket, size: int = 4096) -> None:
        self.sock = sock
        self._buffer = bytearray(size)
        self._view = memoryview(self._buffer)
        self._begin = self._end = 0  # what was received, and not yet asked for
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, *payloads: bytes) -> None:
        if len(payloads[0]) < 32 * 1024:
            self.sock.sendall(b''.join([_pack(len(payload)) + payload for payload in payloads]))
        else:
            for payload in payloads:
                self.sock.sendall(_pack(len(payload)))
                self.sock.sendall(payload)

    @property
    def more(self) -> bool:
        """Whether more was received than has been asked for, though perhaps not all of it."""
        return self._begin < self._end

    def receive(self) -> memoryview | None:
        """The next payload; None at the end.  It is overwritten by the next call."""
        while (have := self._end - self._begin) < 4 or have < (need := 4 + _unpack(self._buffer, self._begin)[0]):
            if self._begin:
                if have:
                    self._view[:have] = bytes(self._view[self._begin:self._end])
                self._begin, self._end = 0, have
            if have >= 4 and need > len(self._buffer):  # kept for the next one: new memory is dear
                buffer = bytearray(need)
                buffer[:have] = self._view[:have]
                self._buffer, self._view = buffer, memoryview(buffer)
            count = self.sock.recv_into(self._view[have:])
            if not count:
                return None
            self._end += count
        payload = self._view[self._begin + 4:self._begin + need]
        self._begin += need
        return payload


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


class Client:
    """What a client storage would be if it could do nothing but what is measured.

    Threads wait for each other, each for a whole call.
    """

    def __init__(self, address: Any, blob_dir: str = '') -> None:
        self._stream = Stream(connect(address), 64 * 1024)
        self._lock = threading.Lock()  # held for a whole call
        self._number = 0
        self._prefetched = 0  # how many replies are on their way
        self._stores: list[tuple[bytes, bytes, bytes]] = []  # of the transaction
        self._folder = blob_dir
        if blob_dir:
            os.mkdir(blob_dir)
        self._stream.receive()  # the greeting
        self._stream.send(b'Z5')
        self._call('register', '1', False)

    def _call(self, name: str, *args: Any) -> Any:
        with self._lock:
            self._stream.send(self._request(name, *args))
            return self._reply()

    def _request(self, name: str, *args: Any) -> bytes:
        self._number += 1
        return pickle.dumps((self._number, False, name, args), 3)

    def _reply(self) -> Any:
        while True:
            payload = self._stream.receive()
            assert payload is not None
            _, _, name, result = pickle.loads(payload)
            if name == '.reply':  # else others have committed
                return result

    def loadBefore(self, oid: bytes, tid: bytes) -> Any:
        if self._prefetched:
            self._prefetched -= 1
            return self._reply()
        return self._call('loadBefore', oid, tid)

    def prefetch(self, oids: Sequence[bytes], tid: bytes) -> None:
        """They must be loaded next, in the same order."""
        self._stream.send(*[self._request('loadBefore', oid, tid) for oid in oids])
        self._prefetched = len(oids)

    # ---- transactions

    def new_oid(self) -> bytes:
        return bytes(8)

    def tpc_begin(self, transaction: Any) -> None:
        self._stores = []

    def store(self, oid: bytes, serial: bytes, record: bytes, version: str, transaction: Any) -> None:
        self._stores.append((oid, serial, record))

    def tpc_vote(self, transaction: Any) -> None:
        if self._stores:
            self._call('vote', self._stores)

    def tpc_finish(self, transaction: Any, told: Any = None) -> bytes:
        return self._call('finish') if self._stores else bytes(8)

    def registerDB(self, db: Any) -> None:
        """Do nothing any more but listen, in a thread."""
        threading.Thread(target=self._listen, args=(db.invalidate,), daemon=True).start()

    def _listen(self, invalidate: Any) -> None:
        with contextlib.suppress(OSError):
            while (payload := self._stream.receive()) is not None:
                invalidate(*pickle.loads(payload)[3])

    # ---- blobs

    def temporaryDirectory(self) -> str:
        return self._folder

    def storeBlob(self, oid: bytes, serial: bytes, record: bytes, path: str, version: str, transaction: Any) -> None:
        self._call('storeBlob', os.stat(path).st_size)
        send_file(self._stream, path)
        self._reply()

    def loadBlob(self, oid: bytes, tid: bytes) -> str:
        path = os.path.join(self._folder, 'fetched')
        size = self._call('loadBlob')
        self._stream.send(b'go on')
        receive_file(self._stream, path, size, False)
        return path

    def close(self) -> None:
        self._stream.sock.close()
