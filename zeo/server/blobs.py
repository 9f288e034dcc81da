"""Blob data on its way to the storage, and from it.

An upload is a series of one-way messages: a start, chunks, and an end that names the object.  Its data
goes straight into a file in the storage's own temporary folder, so that at vote the storage takes the
file over by renaming it.  A download is the same series in the other direction; it waits for the client
to read, so that a large blob takes no more memory than a small one.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from typing import IO
from typing import Any

from zeo.server.outbox import Outbox
from zeo.wire import messages

#: A download sends pieces of so many bytes, while no more than so many are still to be sent.
CHUNK = 256 * 1024
BACKLOG = 1024 * 1024

#: A client that takes no data for so many seconds does not get the rest.
PATIENCE = 300.0


class Uploads:
    """The blobs of one transaction: at most one that is arriving, and those that are complete.

    ``storage`` provides `ZODB.interfaces.IBlobStorage`.  All files are removed in the end, unless the
    storage has taken them over.
    """

    def __init__(self, storage: Any) -> None:
        self._folder: str = storage.temporaryDirectory()
        self._arriving: IO[bytes] | None = None
        self._files: list[str] = []

    def start(self) -> None:
        if self._arriving is not None:
            raise ValueError('a blob starts before the one before has ended')
        handle, path = tempfile.mkstemp(prefix='zeo-', suffix='.tmp', dir=self._folder)
        self._files.append(path)
        self._arriving = open(handle, 'wb', buffering=0)

    def chunk(self, data: bytes) -> None:
        if self._arriving is None:
            raise ValueError('a piece of a blob that has not started')
        rest = memoryview(data)
        while rest:
            rest = rest[self._arriving.write(rest):]

    def end(self) -> str:
        """The blob is complete; returns the path of its file."""
        if self._arriving is None:
            raise ValueError('the end of a blob that has not started')
        self._arriving.close()
        self._arriving = None
        return self._files[-1]

    def adopt(self, path: str) -> None:
        """Look after a file that the client has put into the storage's folder itself."""
        if not os.path.isfile(path):
            raise ValueError(f'there is no blob file {path}')
        self._files.append(path)

    def hand_over(self, path: str, keep: bool) -> str:
        """The path under which the storage may take the file away; with ``keep``, may be done again."""
        if not keep:
            return path
        again = path + '.n'
        os.link(path, again)
        self._files.append(again)
        return again

    def close(self) -> None:
        """Remove what the storage has not taken."""
        if self._arriving is not None:
            self._arriving.close()
            self._arriving = None
        for path in self._files:
            with contextlib.suppress(OSError):
                os.unlink(path)
        self._files.clear()


def shared_path(storage: Any, oid: bytes, filename: Any) -> str:
    """Where in the storage's folder a client has put the data of ``oid``; `ValueError` for other places."""
    if not (isinstance(filename, str) and '/' not in filename and os.sep not in filename
            and (filename.endswith('.tmp') or filename[:-1].endswith('.tmp'))):
        raise ValueError(f'not the name of a temporary blob file: {filename!r:.200}')
    return os.path.join(storage.fshelper.getPathForOID(oid), filename)


def send(storage: Any, outbox: Outbox, oid: bytes, tid: bytes) -> None:
    """Send the blob of a revision to a client that waits for it; the reply is up to the caller.

    Raises `POSKeyError` if there is no such blob, and then has sent nothing; `OSError` if its file
    cannot be read; `TimeoutError` if the client does not read.
    """
    with storage.openCommittedBlobFile(oid, tid) as file:
        outbox.append(messages.notice('receiveBlobStart', (oid, tid)))
        for chunk in _chunks(file):
            if not outbox.append(messages.blob_chunk_notice(oid, tid, chunk)):
                return  # the client is gone
            if outbox.backlog > BACKLOG:
                outbox.deliver()
                if not outbox.wait_for_room(BACKLOG // 2, PATIENCE):
                    raise TimeoutError('the client does not read')
        outbox.append(messages.notice('receiveBlobStop', (oid, tid)))


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    while chunk := file.read(CHUNK):
        yield chunk
