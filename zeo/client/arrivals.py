"""Blobs on their way from the server into temporary files."""

import contextlib
import logging
import os
import tempfile
from collections.abc import Callable
from functools import partial

from zeo.wire.chunks import download_in
from zeo.wire.pieces import Destination
from zeo.wire.pieces import Passing

logger = logging.getLogger(__name__)


class Arrivals:
    """The blobs that arrive over one connection for the cache in ``folder``.

    Each is written to a file in the folder ``temporary``; ``put_in_place`` is called with the path of one that
    is complete, its oid and its tid, and may raise OSError.

    The methods `start`, `add`, `divert` and `complete` are called by the thread that reads, one at a time; they
    raise nothing, since a full disk is no reason to end the connection.  ``failures`` says by oid and
    tid why a blob could not be stored.
    """

    def __init__(self, folder: str, temporary: str, put_in_place: Callable[[str, bytes, bytes], object]) -> None:
        self._folder = folder
        self._temporary = temporary
        self._put_in_place = put_in_place
        self._files: dict[tuple[bytes, bytes], tuple[Destination, str]] = {}
        self.failures: dict[tuple[bytes, bytes], OSError] = {}

    @property
    def notices(self) -> dict[str, Callable[..., None]]:
        """What the server sends, and what is to be done with it."""
        return {'receiveBlobStart': self.start, 'receiveBlobChunk': self.add,
                'receiveBlobStop': self.complete}

    def start(self, oid: bytes, tid: bytes) -> None:
        """A blob begins to arrive."""
        self._drop((oid, tid))
        self.failures.pop((oid, tid), None)
        try:
            handle, path = tempfile.mkstemp(prefix='zeo-', suffix='.tmp', dir=self._temporary)
            self._files[oid, tid] = Destination(open(handle, 'wb', buffering=0)), path
        except OSError as error:
            self._fail((oid, tid), error)

    def add(self, oid: bytes, tid: bytes, data: bytes | memoryview) -> None:
        """A piece of it."""
        found = self._files.get((oid, tid))
        if found is None:
            return  # it could not be begun, or written to
        file, _ = found
        try:
            file.write(data)
        except OSError as error:
            self._fail((oid, tid), error)

    def divert(self, beginning: memoryview, length: int) -> Passing | None:
        """If so begins a message with a long piece: have its data go straight to the file, in place of `add`."""
        found = download_in(beginning, length)
        if found is None:
            return None
        oid, tid, head, size, tail = found
        blob = self._files.get((oid, tid))
        return None if blob is None else Passing(head, size, tail, blob[0], partial(self._fail, (oid, tid)))

    def complete(self, oid: bytes, tid: bytes) -> None:
        """All of it is there."""
        found = self._files.pop((oid, tid), None)
        if found is None:
            return
        file, path = found
        try:
            file.close()
            self._put_in_place(path, oid, tid)
        except OSError as error:
            unlink(path)
            self._fail((oid, tid), error)

    def _fail(self, key: tuple[bytes, bytes], error: OSError) -> None:
        logger.error('a blob cannot be put into %s: %s', self._folder, error)
        self._drop(key)
        self.failures[key] = error

    def _drop(self, key: tuple[bytes, bytes]) -> None:
        found = self._files.pop(key, None)
        if found is not None:
            file, path = found
            with contextlib.suppress(OSError):
                file.close()
            unlink(path)

    def lost(self) -> None:
        """The connection has ended, and nobody reads from it: what was arriving will not be completed."""
        for key in list(self._files):
            self._drop(key)

    def abandon(self) -> None:
        """In a forked child: the files are the parent's."""
        for file, _ in self._files.values():
            file.close()
        self._files.clear()


def unlink(path: str) -> None:
    """Remove a file, if that is possible."""
    with contextlib.suppress(OSError):
        os.unlink(path)
