"""Blob data on the client's side: in files of a cache folder of its own, or in the server's, shared."""

from __future__ import annotations

import os
from typing import IO
from typing import TYPE_CHECKING
from typing import Any
from typing import Protocol

from ZODB.blob import FilesystemHelper

from zeo.client.arrivals import Arrivals
from zeo.client.blobcache import BlobCache
from zeo.client.blobfiles import Fetch
from zeo.client.sharedblobs import SharedBlobs
from zeo.wire.chunks import around_upload
from zeo.wire.chunks import upload_notice
from zeo.wire.pieces import cut

if TYPE_CHECKING:
    from zeo.client.channel import Channel

#: Blobs are sent in pieces of so many bytes, unless the server can do with longer ones: those that read 256 KB
#: at a time are slow then.
PIECE = 120_000


class Blobs(Protocol):
    """What both kinds of folder can do."""

    helper: FilesystemHelper
    shared: bool

    def take(self, oid: bytes, path: str) -> str:
        """Move the application's file to the folder, for as long as its transaction lasts."""

    def keep(self, oid: bytes, tid: bytes, path: str) -> None:
        """The transaction has finished: what was taken is this revision."""

    def discard(self, path: str) -> None:
        """Forget a file that was taken, if it is still there."""

    def get(self, oid: bytes, tid: bytes, fetch: Fetch) -> str:
        """The path of a revision's file.  Raises `POSKeyError` if there is none."""

    def open(self, oid: bytes, tid: bytes, fetch: Fetch, blob: Any = None) -> IO[bytes]:
        """A revision's file, for reading; ``blob`` is the `ZODB.blob.Blob` that keeps track of it."""

    def arrivals(self) -> Arrivals | None:
        """What receives blobs from a new connection; those before have ended."""

    def abandon(self) -> None:
        """In a forked child: leave everything that is under way to the parent."""

    def close(self) -> None:
        """Wait until no thread is at work."""


def open_blobs(folder: str, shared: bool, size: int | None, check: int) -> Blobs:
    """The folder for blobs; raises `ClientStorageError`, which names it, if it cannot be used."""
    if shared:
        return SharedBlobs(folder)
    return BlobCache(folder, size, check)


def upload(path: str, channel: Channel, large: bool) -> None:
    """Send the data of a blob, in pieces that may be ``large``."""
    with open(path, 'rb', buffering=0) as file:
        whole = os.fstat(file.fileno()).st_size
        if large and whole > PIECE:
            for at, size in cut(whole):
                head, tail = around_upload(size)
                channel.post_file(head, file.fileno(), at, size, tail)
        else:
            while piece := file.read(PIECE):
                channel.post_frame(upload_notice(piece))
