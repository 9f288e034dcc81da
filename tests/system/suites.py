"""ZODB's own storage test suites, prepared to be run by a client of a real server process.

The classes here are bases: `tests/system/test_suites_*.py` say which client talks to which server.
"""

import threading
from typing import Any

import pytest
from ZODB.tests.BasicStorage import BasicStorage
from ZODB.tests.ConflictResolution import ConflictResolvingStorage
from ZODB.tests.ConflictResolution import ConflictResolvingTransUndoStorage
from ZODB.tests.hexstorage import HexStorage
from ZODB.tests.HistoryStorage import HistoryStorage
from ZODB.tests.IteratorStorage import ExtendedIteratorStorage
from ZODB.tests.IteratorStorage import IteratorStorage
from ZODB.tests.MTStorage import MTStorage
from ZODB.tests.PackableStorage import PackableStorage
from ZODB.tests.PackableStorage import PackableUndoStorage
from ZODB.tests.PersistentStorage import PersistentStorage
from ZODB.tests.racetest import RaceTests
from ZODB.tests.ReadOnlyStorage import ReadOnlyStorage
from ZODB.tests.RecoveryStorage import RecoveryStorage
from ZODB.tests.RevisionStorage import RevisionStorage
from ZODB.tests.StorageTestBase import StorageTestBase
from ZODB.tests.Synchronization import SynchronizedStorage
from ZODB.tests.TransactionalUndoStorage import TransactionalUndoStorage

from tests.system.clients import open_client
from tests.system.servers import Pool


class Suite(StorageTestBase):
    """`_storage` is a client of a fresh storage in a server process."""

    server: dict[str, Any] = {}     # what sort of server: the arguments of `Pool`

    @pytest.fixture(autouse=True)
    def take(self, pool: Pool) -> None:
        self.pool = pool
        self.running, self.name = pool.take()

    def client(self, address: Any, name: str, **options: Any) -> Any:
        """A new client storage; to be said by the class."""
        raise NotImplementedError

    def setUp(self) -> None:
        super().setUp()
        self._opened: list[Any] = []
        self._opened_lock = threading.Lock()    # guards `_opened`: race tests open in many threads
        self.open()

    def tearDown(self) -> None:
        for storage in self._opened:
            storage.close()
        super().tearDown()

    def _new_storage_client(self, **options: Any) -> Any:
        storage = self.client(self.running.address, self.name, **options)
        with self._opened_lock:
            self._opened.append(storage)
        return storage

    def open(self, **options: Any) -> None:
        """Said by suites that close the storage and want it back."""
        self._storage = self._new_storage_client(**options)

    def _do_store_in_separate_thread(self, oid: bytes, revid: bytes, voted: bool) -> threading.Thread:
        """BasicStorage's competing transaction, made by another client: one client serializes its own."""
        def store() -> None:
            rival = Suite.__new__(type(self))
            rival._storage = other
            rival._dostore(oid, revid=revid)

        other = self._new_storage_client()
        thread = threading.Thread(target=store, name='rival', daemon=True)
        thread.start()
        thread.join(.1 if voted else 30)
        return thread


class OurClient:
    """The client of this project; for `Suite.client`."""

    def client(self, address: Any, name: str, **options: Any) -> Any:
        return open_client('zeo', address, name, **options)


@pytest.mark.filterwarnings('ignore::ResourceWarning')  # it sometimes leaves its cache file open
class StockClient:
    """The client of PyPI's ZEO; for `Suite.client`."""

    def client(self, address: Any, name: str, **options: Any) -> Any:
        return open_client('ZEO', address, name, **options)


class StorageSuites(
        Suite,
        BasicStorage,
        RevisionStorage,
        TransactionalUndoStorage,
        PackableStorage,
        PackableUndoStorage,
        SynchronizedStorage,
        ConflictResolvingStorage,
        ConflictResolvingTransUndoStorage,
        HistoryStorage,
        IteratorStorage,
        ExtendedIteratorStorage,
        PersistentStorage,
        MTStorage,
        ReadOnlyStorage,
        RaceTests):
    """All suites of a storage with undo, pack, history and iteration."""


# ZODB decorates these with a clock that jumps ahead at each look.  The server is another process and
# has the real clock, so a pack would be asked for a time in the server's future; here the tests run
# as they are, undecorated, by the real clock.
for _suite in (PackableStorage, PackableUndoStorage, RevisionStorage):
    for _name in ('testPackWhileWriting', 'testPackNowWhileWriting', 'testPackLotsWhileWriting',
                  'testRedundantPack', 'testPackUndoLog', 'testLoadBefore', 'testLoadBeforeOld'):
        if _name in vars(_suite):
            setattr(StorageSuites, _name, vars(_suite)[_name].__wrapped__)


class RecoverySuite(Suite, RecoveryStorage):
    """Copying a whole storage into another one of the same server."""

    testPackWithGCOnDestinationAfterRestore = (
        RecoveryStorage.testPackWithGCOnDestinationAfterRestore.__wrapped__)    # see above

    def setUp(self) -> None:
        super().setUp()
        self._dst = self.new_dest()

    def new_dest(self) -> Any:
        running, name = self.pool.take()
        storage = self.client(running.address, name)
        self._opened.append(storage)
        return storage


class ConflictSuite(Suite, ConflictResolvingStorage):
    """Conflict resolution alone, for servers that leave it to their clients (they cannot for undo)."""


class HexClientStorage(HexStorage):
    """ZODB's wrapper hands invalidations on with an argument that databases no longer take; this does not."""

    db = None

    def invalidate(self, tid: bytes, oids: Any) -> None:
        if self.db is not None:
            self.db.invalidate(tid, oids)

    def invalidateCache(self) -> None:
        if self.db is not None:
            self.db.invalidateCache()


class ClientHex:
    """The client transforms what it stores; the server knows how to find references in it.

    To be named before the class whose client it wraps.
    """

    use_extension_bytes = True      # an attribute set on this wrapper's records shadows the bytes

    def client(self, address: Any, name: str, **options: Any) -> Any:
        return HexClientStorage(super().client(address, name, **options))  # type: ignore[misc]
