"""Client storages of both makes, by the same words, and what tests do with any storage."""

import threading
import time
from collections.abc import Callable
from typing import Any

from transaction.interfaces import TransientError
from ZODB.Connection import TransactionMetaData
from ZODB.utils import z64

import zeo.ClientStorage
import ZEO.ClientStorage
from tests.system.servers import PATIENCE, Server, until

__all__ = ['Recorder', 'Task', 'hears_of', 'open_client', 'persistently', 'store', 'vote']


def open_client(kind: str, server: Server | Any, storage: str = '1', **options: Any) -> Any:
    """A client storage of `kind` 'zeo' or 'ZEO' (PyPI's); ``server`` may be an address as well."""
    address = server.address if isinstance(server, Server) else server
    make = {'zeo': zeo.ClientStorage.ClientStorage, 'ZEO': ZEO.ClientStorage.ClientStorage}[kind]
    options = {'wait_timeout': 60, 'min_disconnect_poll': .1} | options
    return make(address, storage, **options)


def vote(storage: Any, oid: bytes | None = None, serial: bytes = z64,
         record: bytes = b'x') -> TransactionMetaData:
    """Store one record and vote; the transaction is to be finished or aborted."""
    meta = TransactionMetaData()
    storage.tpc_begin(meta)
    try:
        storage.store(oid or storage.new_oid(), serial, record, '', meta)
        storage.tpc_vote(meta)
    except BaseException:
        storage.tpc_abort(meta)
        raise
    return meta


def store(storage: Any, oid: bytes | None = None, serial: bytes = z64, record: bytes = b'x') -> bytes:
    """Commit one record; its tid."""
    tid: bytes = storage.tpc_finish(vote(storage, oid, serial, record))
    return tid


def hears_of(storage: Any, tid: bytes) -> None:
    """Wait until a client knows of a transaction; nothing is asked of the server for it."""
    until(lambda: storage.lastTransaction() >= tid, 'the client hears of a transaction')


def persistently(call: Callable[[], Any]) -> Any:
    """What an application does: again, if it was told that this may help."""
    pause = threading.Event()
    end = time.monotonic() + PATIENCE
    while True:
        try:
            return call()
        except TransientError:
            if time.monotonic() > end:
                raise
            pause.wait(.05)


class Recorder:
    """Stands where a database would, and notes what it is told."""

    def __init__(self) -> None:
        self.tids: list[bytes] = []
        self.caches = 0     # how often all objects were to be invalidated

    def invalidate(self, tid: bytes, oids: Any) -> None:
        self.tids.append(tid)

    def invalidateCache(self) -> None:
        self.caches += 1

    def transform_record_data(self, data: bytes) -> bytes:
        return data

    untransform_record_data = transform_record_data


class Task(threading.Thread):
    """A call in a thread of its own; `result` waits for it and returns, or raises, what it did."""

    def __init__(self, call: Callable[..., Any], *args: Any) -> None:
        super().__init__(name='task', daemon=True)
        self._call = call
        self._args = args
        self._value: Any = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._value = self._call(*self._args)
        except BaseException as error:
            self._error = error

    def result(self) -> Any:
        self.join(PATIENCE)
        assert not self.is_alive(), f'{self._call} does not come to an end'
        if self._error is not None:
            raise self._error
        return self._value
