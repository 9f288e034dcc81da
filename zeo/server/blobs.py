"""Blob data on its way to the storage, and from it.

An upload is a series of one-way messages: a start, chunks, and an end that names the object.  Its data
goes straight into a file in the storage's own temporary folder, so that at vote the storage takes the
file over by renaming it.  A download is the same series in the other direction; it waits for the client
to read, so that a large blob takes no more memory than a small one.
"""

import contextlib
import errno
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from typing import IO
from typing import Any

from ZODB.interfaces import IBlobStorageRestoreable

from zeo.server.outbox import Outbox
from zeo.server.outbox import SendFile
from zeo.wire import messages
from zeo.wire import records
from zeo.wire.chunks import around_download
from zeo.wire.chunks import blob_chunk_notice
from zeo.wire.pieces import Destination
from zeo.wire.pieces import cut

logger = logging.getLogger(__name__)

#: A download sends pieces of so many bytes, while no more than so many are still to be sent.
CHUNK = 120_000
BACKLOG = 512 * 1024

#: A client that takes no data for so many seconds does not get the rest.
PATIENCE = 300.0


#: When so many bytes have arrived, the system begins to write them to the disk.
WRITE_AT = 4 * 1024 * 1024

#: Temporary files that are older than this, in seconds, were left behind by a server that was killed.
LEFT_BEHIND = 24 * 3600.0

_PREFIX = 'zeo-'


class _Upload(Destination):
    """The file of a blob that is arriving.

    With ``sync`` its data have to be on the disk before a vote is answered.  So they are on their way there
    while more arrives, and in the end there is little to wait for.
    """

    def __init__(self, file: IO[bytes], sync: bool) -> None:
        super().__init__(file)
        self._sync = sync
        self._begun = 0  # to be written, of so many bytes

    def _wrote(self, count: int) -> None:
        self.size += count
        if self._sync and self.size - self._begun >= WRITE_AT and hasattr(os, 'posix_fadvise'):
            # Linux forgets what it has on disk, and begins to write what it has not: all of it.
            os.posix_fadvise(self.fileno(), self._begun, self.size - self._begun, os.POSIX_FADV_DONTNEED)
            self._begun = self.size

    def settle(self) -> None:
        if self._sync:
            os.fdatasync(self.fileno())


class Uploads:
    """The blobs of one transaction: at most one that is arriving, and those that are complete.

    ``storage`` provides `ZODB.interfaces.IBlobStorage`.  Without ``sync`` it is up to the system when the
    data get to the disk.  All files are removed in the end, unless the storage has taken them over.  An
    `OSError` names the file, or the folder.
    """

    def __init__(self, storage: Any, sync: bool = True) -> None:
        self._sync = sync
        self._folder: str = os.path.abspath(storage.temporaryDirectory())
        self._arriving: _Upload | None = None
        self._files: list[str] = []

    def start(self) -> None:
        if self._arriving is not None:
            raise ValueError('a blob starts before the one before has ended')
        handle, path = tempfile.mkstemp(prefix=_PREFIX, suffix='.tmp', dir=self._folder)
        self._files.append(path)
        self._arriving = _Upload(open(handle, 'wb', buffering=0), self._sync)

    @property
    def arriving(self) -> Destination:
        """Where the pieces go of the blob that has started."""
        if self._arriving is None:
            raise ValueError('a piece of a blob that has not started')
        return self._arriving

    def chunk(self, data: bytes | memoryview) -> None:
        with _naming(self._files[-1] if self._files else ''):
            self.arriving.write(data)

    def named(self, error: OSError) -> OSError:
        """The same error with the name of the file that is arriving."""
        return OSError(error.errno, error.strerror, self._files[-1])

    def end(self) -> str:
        """The blob is complete, and with ``sync`` on disk; returns the path of its file."""
        file = self._arriving
        if file is None:
            raise ValueError('the end of a blob that has not started')
        path = self._files[-1]
        with _naming(path):
            file.settle()  # the storage only renames it, and then its commit is answered
            self._arriving = None
            file.close()
        return path

    def adopt(self, path: str) -> None:
        """Look after a file that the client has put into the storage's folder itself."""
        if not os.path.isfile(path):
            raise FileNotFoundError(
                errno.ENOENT, 'the client has put no blob file there; is its shared blob_dir the folder'
                ' of the storage on the server?', path)
        self._files.append(path)
        if self._sync:
            with _naming(path), open(path, 'rb', buffering=0) as file:
                os.fdatasync(file.fileno())

    def hand_over(self, path: str, keep: bool) -> str:
        """The path under which the storage may take the file away; with ``keep``, may be done again."""
        if not keep:
            return path
        again = path + '.n'
        if again not in self._files:
            self._files.append(again)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(again)
        try:
            os.link(path, again)
        except OSError:  # a file system without links
            shutil.copyfile(path, again)
        return again

    def close(self) -> None:
        """Remove what the storage has not taken."""
        file, self._arriving = self._arriving, None
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()
        for path in self._files:
            with contextlib.suppress(OSError):
                os.unlink(path)
        self._files.clear()


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    """Let an error tell which file it is about."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None


def take_over(storage: Any) -> None:
    """Let a storage find out in our way which records are those of blobs, when it packs or undoes."""
    if hasattr(type(storage), 'is_blob_record'):
        def is_blob_record(record: bytes | None) -> bool:
            # What registerDB has set, if records are stored in another form (compressed, say).
            decode = getattr(storage, '_BlobStorageMixin__untransform_record_data', None)
            return records.is_blob_record(decode(record) if record and decode else record)
        storage.is_blob_record = is_blob_record


def extensions(storage: Any) -> tuple[str, ...]:
    """What can be done with the storage's blobs beyond the protocol, see `zeo.wire.methods.EXTENSIONS`."""
    return ('restoreBlob',) if IBlobStorageRestoreable.providedBy(storage) else ()


def shared_path(storage: Any, oid: bytes, filename: Any) -> str:
    """Where in the storage's folder a client has put the data of ``oid``; `ValueError` for other places."""
    if not (isinstance(filename, str) and '/' not in filename and os.sep not in filename
            and (filename.endswith('.tmp') or filename[:-1].endswith('.tmp'))):
        raise ValueError(f'not the name of a temporary blob file: {filename!r:.200}')
    return os.path.join(storage.fshelper.getPathForOID(oid), filename)


def remove_leftovers(storage: Any) -> None:
    """Remove what a server left in the storage's temporary folder that was killed during an upload."""
    oldest = time.time() - LEFT_BEHIND
    with contextlib.suppress(OSError), os.scandir(storage.temporaryDirectory()) as files:
        for file in files:
            with contextlib.suppress(OSError):
                if file.name.startswith(_PREFIX) and file.stat().st_mtime < oldest:
                    os.unlink(file.path)
                    logger.info('%s: removed, as it was left behind', file.path)


def send(storage: Any, outbox: Outbox, oid: bytes, tid: bytes, large: bool = False) -> None:
    """Send the blob of a revision to a client that waits for it; the reply is up to the caller.

    Other messages may come between its pieces, also those of another blob: each says whose it is.  The
    pieces may be ``large``, if the client can do with that.

    Raises `POSKeyError` if there is no such blob, and then has sent nothing; `OSError` if its file
    cannot be read; `TimeoutError` if the client does not read.
    """
    with storage.openCommittedBlobFile(oid, tid) as file:
        outbox.append(messages.notice('receiveBlobStart', (oid, tid)))
        size = os.fstat(file.fileno()).st_size
        send_file = outbox.send_file
        if large and size > CHUNK and send_file is not None:
            sent = _send_large(send_file, file.fileno(), size, oid, tid)
        else:
            sent = _send_small(outbox, file, oid, tid)
        if sent:
            outbox.append(messages.notice('receiveBlobStop', (oid, tid)))


def _send_small(outbox: Outbox, file: IO[bytes], oid: bytes, tid: bytes) -> bool:
    """False if the client is gone."""
    while chunk := file.read(CHUNK):
        if not outbox.append(blob_chunk_notice(oid, tid, chunk)):
            return False
        if outbox.backlog > BACKLOG:
            outbox.deliver()
            if not outbox.wait_for_room(BACKLOG // 2, PATIENCE):
                raise TimeoutError('the client does not read')
    return True


def _send_large(send_file: SendFile, file: int, whole: int, oid: bytes, tid: bytes) -> bool:
    """The same without reading the file here."""
    for at, size in cut(whole):
        head, tail = around_download(oid, tid, size)
        if not send_file(head, file, at, size, tail, PATIENCE):
            return False
    return True
