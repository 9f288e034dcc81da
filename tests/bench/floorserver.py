"""The server of the bare floor: ``python -m tests.bench.floorserver ADDRESS FILE [unsynced]``.

Serves a FileStorage, where ``ADDRESS`` is ``HOST:PORT`` or the path of a Unix socket.  A connection is a thread;
of two that commit one waits for the other in the storage, from its vote on.  Blobs are synced, unless
``unsynced`` is given.
"""

import contextlib
import os
import pickle
import socket
import sys
import threading
from typing import Any

from tests.bench.floor import Stream, receive_file, send_file


class Server:
    def __init__(self, address: Any, path: str, sync: bool) -> None:
        from ZODB.Connection import TransactionMetaData
        from ZODB.FileStorage import FileStorage
        self._transaction = TransactionMetaData
        self._storage = FileStorage(path)
        self._blob = path + '.blobs/floor.blob'
        self._sync = sync
        self._streams: set[Stream] = set()
        self._voted: tuple[Any, list[bytes]] = None, []
        if isinstance(address, str):
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(address)
            self._listener.listen(100)
        else:
            self._listener = socket.create_server(address, backlog=100)

    def run(self) -> None:
        while True:
            sock, _ = self._listener.accept()
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        stream = Stream(sock)
        with sock, contextlib.suppress(OSError):
            stream.send(b'Z5')
            if stream.receive() is not None:
                self._streams.add(stream)
                self._converse(stream)
        self._streams.discard(stream)

    def _converse(self, stream: Stream) -> None:
        load = self._storage.loadBefore
        replies: list[bytes] = []
        while (payload := stream.receive()) is not None:
            message_id, _, name, args = pickle.loads(payload)
            result = load(*args) if name == 'loadBefore' else getattr(self, name)(stream, *args)
            replies.append(pickle.dumps((message_id, 0, '.reply', result), 3))
            if not stream.more:  # else there will be another reply to go with it
                stream.send(*replies)
                replies.clear()
                if name == 'loadBlob':
                    stream.receive()
                    send_file(stream, self._blob)
                elif name == 'storeBlob':
                    receive_file(stream, self._blob, *args, self._sync)
                    stream.send(pickle.dumps((message_id, 0, '.reply', None), 3))

    def register(self, stream: Stream, name: str, read_only: bool) -> bytes:
        last: bytes = self._storage.lastTransaction()
        return last

    def vote(self, stream: Stream, stores: list[tuple[bytes, bytes, bytes]]) -> None:
        transaction = self._transaction()
        self._storage.tpc_begin(transaction)
        self._voted = transaction, [oid for oid, _, _ in stores]
        for oid, serial, record in stores:
            self._storage.store(oid, serial, record, '', transaction)
        self._storage.tpc_vote(transaction)

    def finish(self, stream: Stream) -> bytes:
        transaction, oids = self._voted
        tid: bytes = self._storage.tpc_finish(transaction)
        message = pickle.dumps((0, True, 'invalidateTransaction', (tid, oids)), 3)
        for each in self._streams.copy():
            if each is not stream:
                with contextlib.suppress(OSError):
                    each.send(message)
        return tid

    def loadBlob(self, stream: Stream) -> int:
        return os.stat(self._blob).st_size

    def storeBlob(self, stream: Stream, size: int) -> None:
        """The data comes after the reply."""


if __name__ == '__main__':
    where, file, *unsynced = sys.argv[1:]
    host, _, port = where.rpartition(':')
    Server(where if '/' in where else (host, int(port)), file, not unsynced).run()
