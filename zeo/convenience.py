"""A database over the network in one call: for scripts, tests and notebooks.

``zeo.client(...)`` and ``zeo.server(...)`` are spelled like the packages that client and server are made
of; so those packages can be called (`make_callable`).

The doors behind these functions (`zeo.ClientStorage`, `zeo.StorageServer`) are imported when they are
used, so that a client does not load the server, nor the other way round.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING
from typing import Any

if TYPE_CHECKING:
    from zeo.ClientStorage import ClientStorage


def client(addr: Any, storage: str = '1', **options: Any) -> ClientStorage:
    """A `zeo.ClientStorage.ClientStorage`, with its options."""
    from zeo.ClientStorage import ClientStorage

    return ClientStorage(addr, storage, **options)


def DB(addr: Any, storage: str = '1', *, database: Mapping[str, Any] | None = None, **options: Any) -> Any:
    """A `ZODB.DB` over the server at ``addr``; the options are those of the storage.

    ``database`` holds options of the `ZODB.DB` itself, such as ``cache_size``.
    """
    import ZODB

    opened = client(addr, storage, **options)
    try:
        return ZODB.DB(opened, **(database or {}))
    except BaseException:
        opened.close()
        raise


def connection(addr: Any, storage: str = '1', **options: Any) -> Any:
    """An open connection to a database of its own (see `DB`), which is closed with the connection."""
    db = DB(addr, storage, **options)
    try:
        return db.open_then_close_db_when_connection_closes()
    except BaseException:
        db.close()
        raise


def server(path: str | None = None, *, address: tuple[str, int] | str | os.PathLike[str] = ('localhost', 0),
           storage: Any = None, blob_dir: str | None = None, **options: Any) -> tuple[Any, Callable[[], None]]:
    """Serve a database from threads of this process; returns its address and a function that ends it.

    ``path`` is that of a FileStorage; without it, and without a ``storage``, the data is in memory and
    gone in the end.  Blobs are kept in the folder ``blob_dir``.  ``address`` is where to listen:
    ``(host, port)``, with port 0 for a free one, or the path of a Unix domain socket.  The options are
    those of `zeo.StorageServer.StorageServer`.

    Raises `ValueError` for what cannot be an address, or a number of seconds; `TypeError` for what is no
    storage; and `OSError` if the address cannot be listened on or the file cannot be opened.  The text says
    what to do.
    """
    from zeo.server import addresses
    from zeo.server import storages
    from zeo.server.options import CannotStart
    from zeo.StorageServer import StorageServer

    if isinstance(address, os.PathLike):
        address = os.fspath(address)
    addresses.check(address)
    for name in 'transaction_timeout', 'invalidation_age':
        seconds = options.get(name)
        if seconds is not None and not (isinstance(seconds, (int, float)) and seconds > 0):
            raise ValueError(f'{name} is a number of seconds greater than 0, or None, not {seconds!r}')
    if storage is not None and not storages.is_storage(storage):
        raise TypeError(f'{storage!r:.80} is no storage; a file is named by its path, as the first argument')

    if storage is None:
        if path is None:
            from ZODB.MappingStorage import MappingStorage

            storage = MappingStorage()
            if blob_dir is not None:
                from ZODB.blob import BlobStorage

                storage = BlobStorage(blob_dir, storage)
        else:
            path = os.path.abspath(path)
            if problem := storages.look_for_file(path, False):
                raise OSError(problem)
            try:
                storage = storages.open_file(path, False, blob_dir)
            except CannotStart as error:
                raise OSError(str(error)) from None
    elif path is not None or blob_dir is not None:
        raise TypeError('either a path, with a folder for blobs, or a storage can be served, not both')
    try:
        serving = StorageServer({'1': storage}, [address], **options)
    except BaseException:
        storage.close()
        raise
    try:
        serving.start()
    except BaseException:
        serving.close()
        raise
    return serving.addresses[0], serving.close


def make_callable(package: ModuleType, function: Callable[..., Any]) -> None:
    """Let a package be called like the function of the same name (see `types.ModuleType` about how)."""
    package.__class__ = type('Package', (ModuleType,), {
        '__call__': staticmethod(function), '__doc__': function.__doc__})
