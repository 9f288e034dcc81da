"""ZODB's storage interfaces, said in terms of `zeo.client`: the door that ZODB people know.

Threads of a client, beside the application's own, which read the socket themselves while they wait:

- ``zeo client of STORAGE``: one, connects, verifies, then watches the connection (`zeo.client.supervisor`);
- ``...: inquirer``: asks about revisions in doubt, until it is through (`zeo.client.inquiry`);
- ``...: seeker``: looks for a writable server while a read-only one is in use;
- ``zeo blob cache``: makes room in the blob folder, when there is too much in it.

Locks, from the outermost to the innermost; who holds one may take only those below it:

1. the commit lock: from `tpc_begin` to finish or abort, over calls to the server;
2. sending (`zeo.client.outgoing`): whole frames; by who has the reading turn only tried, for what TLS
   itself has to say;
3. the reading turn (`zeo.client.readingturn`): over recv, and over the effects of what was read;
4. ZODB's own, in what effects call; none of them is held over a call to the server there;
5. the cache's mutex (`zeo.client.cache`): one look or change; a leaf.

The supervisor's condition, the blob cache's mutex and that of TLS (`zeo.wire.tls`) are leaves, too, and not held over any call or send.
"""

import contextlib
import os
import random
import threading
import time
import weakref
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
from itertools import count
from itertools import islice
from typing import IO
from typing import Any

import zope.interface
from ZODB import interfaces
from ZODB.BaseStorage import copy as copy_transactions
from ZODB.blob import FilesystemHelper
from ZODB.blob import copyTransactionsFromTo as copy_transactions_and_blobs
from ZODB.ConflictResolution import ConflictResolvingStorage
from ZODB.POSException import ConflictError
from ZODB.POSException import POSKeyError
from ZODB.POSException import ReadOnlyError
from ZODB.POSException import StorageTransactionError
from ZODB.POSException import Unsupported
from ZODB.utils import maxtid
from ZODB.utils import z64

from zeo.client.blobs import Blobs
from zeo.client.blobs import open_blobs
from zeo.client.blobs import upload
from zeo.client.cache import Cache
from zeo.client.cache import cache_path
from zeo.client.cache import open_cache
from zeo.client.commit import Commit
from zeo.client.dialing import Security
from zeo.client.dialing import display
from zeo.client.dialing import parse_addresses
from zeo.client.iteration import Dropped
from zeo.client.iteration import Transactions
from zeo.client.link import Link
from zeo.client.options import check_options
from zeo.client.outcome import find_out
from zeo.client.supervisor import State
from zeo.client.supervisor import Supervisor
from zeo.client.updates import Updates
from zeo.client.upkeep import Upkeep
from zeo.errors import ClientDisconnected
from zeo.errors import ClientStorageError
from zeo.errors import OutcomeUnknown
from zeo.errors import ProtocolError
from zeo.errors import ServerException
from zeo.wire.commits import finish_request
from zeo.wire.revisions import MOST as AT_A_TIME

__all__ = [
    'ClientDisconnected', 'ClientStorage', 'ClientStorageError', 'OutcomeUnknown', 'ProtocolError',
    'ServerException',
]

MB = 1024 * 1024

#: What this class can do only if the served storage can.
OPTIONAL = {
    (each.__module__, each.__name__): each for each in (
        interfaces.IStorageRestoreable, interfaces.IStorageIteration, interfaces.IStorageUndoable,
        interfaces.IStorageCurrentRecordIteration, interfaces.IExternalGC)}

#: The same, for clients that have a folder for blobs.
_WITH_BLOBS = (interfaces.IBlobStorage, interfaces.IBlobStorageRestoreable)
_IBLOBSTORAGE = interfaces.IBlobStorage.__module__, interfaces.IBlobStorage.__name__

#: A vote whose conflicts this client resolves, and which then meets others, is given up after so many.
VOTE_ROUNDS = 9


@zope.interface.implementer(interfaces.IMultiCommitStorage, interfaces.IPrefetchStorage)
class ClientStorage(ConflictResolvingStorage):  # type: ignore[misc]
    """A storage that is kept by a server, here or elsewhere.

    Arguments, of which all but the first are best given by name:

    ``addr``: ``(host, port)`` with ``''`` for this host, a port of this host, the path of a Unix domain
    socket, or a sequence of these: servers of the same data in order of preference.

    ``storage``: the name under which the server serves it.

    ``cache_size``: bytes that the cache file may take.  ``cache`` is its path; or ``client`` is a name
    from which, with the directory ``var``, the path is made; by default the environment variable
    ``ZEO_CLIENT`` is that name.  Without any of these the cache is temporary.

    ``name``: what `getName` calls this storage.

    ``wait_timeout``: seconds that an operation waits for a connection before it raises
    `ClientDisconnected`.  ``wait``: the constructor waits like that, too; otherwise one can begin
    without a server and read what is cached.

    ``min_disconnect_poll``, ``max_disconnect_poll``: seconds between attempts to connect; the first
    doubles after each failure until it is the second.

    ``read_only``: never write.  ``read_only_fallback``: if no server lets us write, read from one that
    does not, and change over when there is a better one.

    ``server_sync``: each transaction begins with a round trip, so that it sees everything that was
    committed before it, by whomever.

    ``client_label``: how the server's log calls this client.

    ``blob_dir``: the folder in which blobs are cached, of at most about ``blob_cache_size`` bytes (None:
    no limit); it is looked after each time ``blob_cache_size_check`` percent of that have come in.  With
    ``shared_blob_dir`` it is the folder of the storage itself, which the server and this machine share.
    Without ``blob_dir`` there are no blobs.

    ``ssl``: speak TLS with servers that have a port, and verify who they are: True (their certificates are
    signed by an authority that this machine trusts), a mapping that says more (`zeo.wire.certificates` has its
    keys), or an `ssl.SSLContext`.  ``ssl_server_hostname``: the name in their certificates, if it is not that
    in their address.

    ``start_over``: forget the cache if it turns out to be newer than the server, in place of refusing to
    talk to that server.

    Many threads may use it; their transactions are committed one after another.
    """

    def __init__(self, addr: Any, storage: str = '1', cache_size: int = 20 * MB, name: str = '',
                 wait_timeout: float | None = None, *, min_disconnect_poll: float = 0.1,
                 max_disconnect_poll: float = 30.0, wait: bool = True,
                 wait_for_server_on_startup: bool | None = None, read_only: bool = False,
                 read_only_fallback: bool = False, client_label: str | None = None,
                 client: str | None = None, var: str | None = None,
                 cache: Cache | str | os.PathLike[str] | None = None, server_sync: bool = False,
                 start_over: bool = False, blob_dir: str | os.PathLike[str] | None = None,
                 shared_blob_dir: bool = False, blob_cache_size: int | None = None,
                 blob_cache_size_check: int = 10, ssl: Any = None,
                 ssl_server_hostname: str | None = None) -> None:
        check_options(locals())
        if read_only and read_only_fallback:
            raise ValueError('read_only and read_only_fallback exclude each other')
        if shared_blob_dir and blob_dir is None:
            raise ValueError('shared_blob_dir needs a blob_dir')
        addresses = parse_addresses(addr)
        security = None
        if ssl is not None:
            from zeo.wire import certificates  # who does without does not load OpenSSL

            found = certificates.for_client(ssl, ssl_server_hostname)
            security = None if found is None else Security(*found)
        self._blobs: Blobs | None = None
        self.fshelper: FilesystemHelper | None = None  # tells where files of blobs are
        if blob_dir is not None:
            self._blobs = open_blobs(
                os.fsdecode(blob_dir), shared_blob_dir, blob_cache_size, blob_cache_size_check)
            self.fshelper = self._blobs.helper
        self.__name__ = name or ', '.join(map(display, addresses))
        self._storage = storage
        self._cache_size = cache_size
        self._read_only = bool(read_only)
        self._server_sync = bool(server_sync)
        self._wait_timeout = 30.0 if wait_timeout is None else wait_timeout
        self._options = {
            'read_only': self._read_only, 'fallback': bool(read_only_fallback), 'label': client_label,
            'wait_timeout': self._wait_timeout,
            'min_poll': min_disconnect_poll, 'max_poll': max_disconnect_poll,
            'security': security}
        self._start_over = start_over
        self._info: dict[str, Any] = {}  # what the server says; that of the last connection
        self._server_address: str | None = None
        self._last_link_read_only = False
        self._database: Any = None
        with contextlib.ExitStack() as unless_done:
            if self._blobs is not None:
                unless_done.callback(self._blobs.close)
            if cache is None:
                cache = open_cache(cache_path(storage, client, var), cache_size, storage)
            elif not isinstance(cache, Cache):
                cache = open_cache(os.fsdecode(cache), cache_size, storage, strict=True)
            unless_done.callback(cache.close)
            cache.allow_servers(map(display, addresses))
            self._set_up(cache, addresses)
            unless_done.pop_all()
        _storages.add(self)
        if wait if wait_for_server_on_startup is None else wait_for_server_on_startup:
            try:
                self._supervisor.wait()
            except BaseException:
                self.close()
                raise
        else:
            self._supervisor.start()

    def _set_up(self, cache: Cache, addresses: Sequence[Any]) -> None:
        """Everything that a forked child needs anew."""
        self._cache = cache
        self._upkeep = Upkeep(cache, self._start_over)
        self._upkeep.database = self._database
        self._supervisor = Supervisor(
            addresses, self._storage, self._upkeep, connected=self._connected,
            **self._options)  # type: ignore[arg-type]
        # Held from tpc_begin to the end of the transaction; guards _commit.
        self._commit_lock = threading.Lock()
        self._commit: Commit | None = None
        # Not those of another client, should it be asked about.
        self._transaction_ids = count(random.randrange(2**30))
        self._dropped_iterators = Dropped()

    def _connected(self, link: Link) -> None:
        """A connection is verified, and about to be used (called by the supervisor's thread)."""
        self._info = link.info
        self._cache.set_server(display(link.address))
        self._server_address = display(link.address)
        self._last_link_read_only = link.read_only
        offered = {tuple(each) for each in link.info.get('interfaces', ())}
        provided = [each for name, each in OPTIONAL.items() if name in offered]
        blobs = self._blobs
        if blobs is not None and _IBLOBSTORAGE in offered:
            provided.append(interfaces.IBlobStorage)
            if link.offers('restoreBlob'):
                provided.append(interfaces.IBlobStorageRestoreable)
            arrivals = blobs.arrivals()
            if arrivals is not None:
                link.channel.notices = {**link.channel.notices, **arrivals.notices}
                link.channel.divert(arrivals.divert)
        kept = [each for each in zope.interface.directlyProvidedBy(self)
                if each not in OPTIONAL.values() and each not in _WITH_BLOBS]
        zope.interface.directlyProvides(self, *kept, *provided)

    def _after_fork(self) -> None:
        """In a child: leave the connection and the cache file to the parent, and begin anew."""
        last_tid = self._cache.last_tid
        addresses = self._supervisor.addresses
        self._supervisor.abandon()
        self._cache.abandon()
        if self._blobs is not None:
            self._blobs.abandon()
        if self._supervisor.state is State.CLOSED:
            return
        self._set_up(open_cache(None, self._cache_size, self._storage), addresses)
        # ZODB's own caches are as of this tid, so the first connection has to catch up from there.
        self._cache.set_last_tid(last_tid)

    def close(self) -> None:
        """End the connection; what was cached persistently stays in its file.  May be called again."""
        self._supervisor.close()
        self._cache.close()
        if self._blobs is not None:
            self._blobs.close()

    def _call(self, method: str, *args: Any) -> Any:
        return self._supervisor.wait().channel.call(method, args)

    # ---- about the storage

    def getName(self) -> str:
        return f"{self.__name__} ({'connected' if self.is_connected() else 'disconnected'})"

    def is_connected(self) -> bool:
        """Whether there is a connection to a server now."""
        link = self._supervisor.link
        return link is not None and link.channel.ended is None

    def isReadOnly(self) -> bool:
        return self._read_only or self._last_link_read_only

    is_read_only = isReadOnly

    def sortKey(self) -> str:
        if self._server_address is None:
            raise ClientDisconnected('never connected to a server')
        return f'{self._storage}:{self._server_address}'

    def getSize(self) -> int:
        """In bytes, as the server says now; without a connection, as it said last."""
        size: int = self._asked_again().get('size', 0)
        return size

    def __len__(self) -> int:
        """The number of objects; the same holds for it."""
        length: int = self._asked_again().get('length', 0)
        return length

    def _asked_again(self) -> dict[str, Any]:
        """What the server says, or has said last if it cannot be asked: without a connection, or inside a call."""
        link = self._supervisor.link
        if link is not None and not link.channel.is_inside():
            with contextlib.suppress(ClientDisconnected, ProtocolError):
                link.channel.call('get_info', (), lambda _, info: link.info.update(info))
        return self._info

    def __bool__(self) -> bool:
        return True  # an empty storage is a storage

    def supportsUndo(self) -> bool:
        return bool(self._info.get('supportsUndo'))

    def registerDB(self, db: Any) -> None:
        super().registerDB(db)
        self._database = self._upkeep.database = db

    def new_addr(self, addr: Any) -> None:
        """Look for servers there from now on; the present connection stays as long as it lasts."""
        self._supervisor.new_addresses(parse_addresses(addr))

    def ping(self) -> None:
        """A round trip: afterwards this client knows of everything committed before."""
        self._call('ping')

    def sync(self, force: bool = True) -> None:
        if self._server_sync and force:
            self._call('ping')

    def server_status(self) -> dict[str, Any]:
        """The server's figures."""
        status: dict[str, Any] = self._call('server_status')
        return status

    def lastTransaction(self) -> bytes:
        return self._cache.last_tid

    # ---- loading

    def loadBefore(self, oid: bytes, tid: bytes) -> tuple[bytes, bytes, bytes | None] | None:
        cache = self._cache
        found = cache.loadBefore(oid, tid)
        # A revision may be there before the database has heard of it.  The server's reply comes after.
        if found is not None and found[1] <= cache.last_tid:
            return found
        _check_ids(oid, tid)
        link = self._supervisor.link
        if link is not None:
            try:
                return link.channel.load(oid, tid)
            except ClientDisconnected:
                pass  # the past does not change: the next connection will tell
        return self._supervisor.wait().channel.load(oid, tid)

    def load(self, oid: bytes, version: str = '') -> tuple[bytes, bytes]:
        found = self.loadBefore(oid, maxtid)
        if found is None:
            raise POSKeyError(oid)
        return found[:2]

    def prefetch(self, oids: Iterable[bytes], tid: bytes) -> None:
        """Have these loaded in the background; nothing happens while there is no connection."""
        link = self._supervisor.link
        if link is None:
            return
        loaded, together = self._cache.loadBefore, link.offers('prefetch')
        wanted = iter(oids)
        while some := list(islice(wanted, AT_A_TIME)):
            missing = [oid for oid in some if loaded(oid, tid) is None]
            for oid in missing:
                _check_ids(oid, tid)
            try:
                link.channel.prefetch(missing, tid, together)
            except ClientDisconnected:
                return

    def loadSerial(self, oid: bytes, serial: bytes) -> bytes:
        _check_ids(oid, serial)
        data: bytes = self._call('loadSerial', oid, serial)
        return data

    def getTid(self, oid: bytes) -> bytes:
        tid: bytes = self._call('getTid', oid)
        return tid

    def history(self, oid: bytes, size: int = 1) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = self._call('history', oid, size)
        return entries

    def record_iternext(self, next: bytes | None = None) -> tuple[bytes, bytes, bytes, bytes | None]:
        oid, tid, data, following = self._call('record_iternext', next)
        return oid, tid, data, following

    def iterator(self, start: bytes | None = None, stop: bytes | None = None) -> Transactions:
        channel = self._supervisor.wait().channel
        self._dropped_iterators.report(channel)
        return Transactions(channel, start, stop, self._dropped_iterators)

    # ---- committing

    def new_oid(self) -> bytes:
        if self.isReadOnly():
            raise ReadOnlyError()
        while True:
            # Unused oids go with their connection: a server that was restarted may give them again.
            link = self._supervisor.wait()
            try:
                return link.oids.pop()
            except IndexError:
                link.oids.extend(reversed(link.channel.call('new_oids')))

    def tpc_begin(self, transaction: Any, tid: bytes | None = None, status: str = ' ', *,
                  id: Any = None) -> None:
        """As for any storage; a server whose storage this is gives the ``id`` that its own client has chosen."""
        if self.isReadOnly():
            raise ReadOnlyError()
        commit = self._commit
        if commit is not None and commit.transaction is transaction:
            raise StorageTransactionError('this transaction has begun already')
        if tid is not None:
            _check_ids(tid)
        self._commit_lock.acquire()
        commit = None
        try:
            link = self._supervisor.wait()
            if link.read_only:
                raise ReadOnlyError()
            commit = Commit(transaction, link.channel, link.offered,
                            next(self._transaction_ids) if id is None else id, Updates(self._cache_size))
            commit.begin(tid, status)
        except BaseException as error:
            if commit is not None and commit.begun and not isinstance(error, Exception):
                commit.channel.end(error)  # interrupted: the server may know of what nobody would abort
            self._commit_lock.release()
            raise
        self._commit = commit

    def _committing(self, transaction: Any, *ids: bytes) -> Commit:
        """The transaction in progress, which must be this one."""
        commit = self._commit
        if commit is None or commit.transaction is not transaction:
            if self.isReadOnly():
                raise ReadOnlyError()
            raise StorageTransactionError('this transaction has not begun, or is over')
        if commit.channel.ended is not None:
            raise ClientDisconnected('the connection was lost during this transaction')
        _check_ids(*ids)
        return commit

    def store(self, oid: bytes, serial: bytes | None, data: bytes, version: str,
              transaction: Any) -> None:
        assert not version
        _check_record(data)
        serial = serial or z64
        self._committing(transaction, oid, serial).store(oid, serial, data)

    def restore(self, oid: bytes, serial: bytes, data: bytes | None, version: str,
                prev_txn: bytes | None, transaction: Any) -> None:
        assert not version
        if data is not None:
            _check_record(data)
        commit = self._committing(transaction, oid, serial)
        commit.post('restorea', oid, serial, data, prev_txn)
        commit.updates.change(oid)

    def deleteObject(self, oid: bytes, serial: bytes, transaction: Any) -> None:
        commit = self._committing(transaction, oid, serial)
        commit.post('deleteObject', oid, serial)
        commit.updates.change(oid)

    def checkCurrentSerialInTransaction(self, oid: bytes, serial: bytes, transaction: Any) -> None:
        commit = self._committing(transaction, oid, serial)
        commit.post('checkCurrentSerialInTransaction', oid, serial)

    def undo(self, transaction_id: bytes, transaction: Any) -> None:
        """Undo; which objects that changes is in the result of `tpc_vote`."""
        commit = self._committing(transaction)
        commit.post('undoa', transaction_id)

    def tpc_vote(self, transaction: Any) -> list[bytes] | None:
        commit = self._committing(transaction)
        for _ in range(VOTE_ROUNDS):
            try:
                answer = commit.vote(self._cache.make_ready)
            except ConflictError as error:
                if error.oid is not None:
                    # Should not be needed.  If what is cached is outdated after all, a new attempt
                    # is not to fail for the same reason.
                    self._cache.drop([error.oid])
                raise
            conflicts = [each for each in answer if isinstance(each, dict)]
            for oid in answer:
                if not isinstance(oid, dict):
                    commit.updates.change(oid)
                    commit.resolved.add(oid)
            if not conflicts:
                return list(commit.resolved) or None
            for conflict in conflicts:
                oid = conflict['oid']
                committed, read = conflict['serials']
                data = self.tryToResolveConflict(oid, committed, read, conflict['data'])
                self.store(oid, committed, data, '', transaction)
                commit.resolved.add(oid)
        raise ConflictError(f'other transactions changed the same objects {VOTE_ROUNDS} times '
                            'while their conflicts were resolved')

    def tpc_finish(self, transaction: Any,
                   callback: Callable[[bytes], object] | None = None) -> bytes:
        commit = self._committing(transaction)

        def finished(_: object, tid: Any) -> None:
            self._upkeep.finished(tid, commit.updates, callback)

        try:
            tid: bytes = commit.channel.ask(finish_request, commit.id, effect=finished)
            self._keep_blobs(commit, tid)
            return tid
        except (ClientDisconnected, ProtocolError) as error:
            # If it is committed, cache and database have caught up with it on the next connection like with
            # any other transaction, before `lastTransaction` showed it; so the callback, which tells the
            # database the same again, comes late and does no harm.
            tid = find_out(commit, self._supervisor, self._wait_timeout, error)
            if callback is not None:
                callback(tid)
            self._keep_blobs(commit, tid)
            return tid
        except Exception:
            raise  # nothing happened, says the server; or our callback failed
        except BaseException:
            commit.channel.end('the end of a commit was not awaited')
            raise
        finally:
            self._end(commit)

    # ---- for a server whose storage this is

    @property
    def can_settle(self) -> bool:
        """Whether the server can be asked what became of a transaction."""
        link = self._supervisor.link
        return link is not None and link.offers('settle')

    def voted_tid(self, transaction: Any) -> bytes | None:
        """The tid that a voted transaction will get, if the server can be asked about it."""
        return self._committing(transaction).tid

    def settle(self, tid: bytes, id: Any) -> bool | bytes:
        """End a transaction that was to get this tid, if it is in doubt; whether it is committed."""
        if not self.can_settle:
            self._supervisor.wait()
            if not self.can_settle:
                raise Unsupported('the server cannot be asked what became of a transaction')
        committed: bool | bytes = self._call('settle', tid, id)
        return committed

    def tpc_abort(self, transaction: Any) -> None:
        commit = self._commit
        if commit is None or commit.transaction is not transaction:
            return
        try:
            if commit.begun:
                commit.channel.call('tpc_abort', (commit.id,))
        except (ClientDisconnected, ProtocolError):
            pass  # then the server aborts by itself
        finally:
            self._end(commit)

    def _keep_blobs(self, commit: Commit, tid: bytes) -> None:
        if self._blobs is not None:
            for oid, path in commit.blobs:
                self._blobs.keep(oid, tid, path)

    def _end(self, commit: Commit) -> None:
        commit.updates.close()
        if self._blobs is not None:
            for _, path in commit.blobs:
                self._blobs.discard(path)  # unless it is kept
        try:
            self._dropped_iterators.report(commit.channel)
        except ClientDisconnected:
            pass
        finally:
            self._commit = None
            self._commit_lock.release()

    def tpc_transaction(self) -> Any:
        """The transaction in progress, or None."""
        commit = self._commit
        return None if commit is None else commit.transaction

    # ---- blobs

    def _blob_folder(self) -> Blobs:
        if self._blobs is None:
            raise Unsupported(f'{self.__name__}: this client has no folder for blobs; give it a blob_dir')
        return self._blobs

    def temporaryDirectory(self) -> str:
        """Where new blobs begin: a folder from which they can be taken over without being copied."""
        folder: str = self._blob_folder().helper.temp_dir
        return folder

    def loadBlob(self, oid: bytes, serial: bytes) -> str:
        """The path of a blob's file, which is fetched if need be."""
        _check_ids(oid, serial)
        return self._blob_folder().get(oid, serial, self._fetch_blob)

    def openCommittedBlobFile(self, oid: bytes, serial: bytes, blob: Any = None) -> IO[bytes]:
        """A blob's file, open for reading; it stays in the cache at least until it is closed."""
        _check_ids(oid, serial)
        return self._blob_folder().open(oid, serial, self._fetch_blob, blob)

    def _fetch_blob(self, oid: bytes, serial: bytes) -> None:
        link = self._supervisor.link
        if link is not None:
            try:
                large = link.channel.copies_files and link.offers('pieces')
                link.channel.call('sendBlob', (oid, serial, True) if large else (oid, serial))
                return
            except ClientDisconnected:
                pass  # the past does not change: the next connection will bring it
        self._call('sendBlob', oid, serial)

    def storeBlob(self, oid: bytes, oldserial: bytes | str | None, data: bytes, blobfilename: str,
                  version: str, transaction: Any) -> None:
        """Store an object whose data is in a file, which is taken away."""
        assert not version
        _check_record(data)
        serial = oldserial or z64
        if isinstance(serial, str):  # as in ZODB's own tests of blobs
            serial = serial.encode('latin-1')
        self._send_blob('storeBlob', oid, (oid, serial, data), blobfilename, transaction)
        self._committing(transaction).updates.store(oid, data)

    def restoreBlob(self, oid: bytes, serial: bytes, data: bytes, blobfilename: str,
                    prev_txn: bytes | None, transaction: Any) -> None:
        """The same for a revision of another storage."""
        _check_record(data)
        self._send_blob('restoreBlob', oid, (oid, serial, data, prev_txn), blobfilename, transaction)
        self._committing(transaction).updates.change(oid)

    def _send_blob(self, method: str, oid: bytes, args: tuple[Any, ...], path: str,
                   transaction: Any) -> None:
        commit = self._committing(transaction, *args[:2])
        blobs = self._blob_folder()
        if not interfaces.IBlobStorage.providedBy(self):
            raise Unsupported(f'{self.__name__}: the storage on the server has no blobs; it needs a'
                              ' blob directory')
        taken = blobs.take(oid, path)
        commit.blobs.append((oid, taken))
        if blobs.shared:
            commit.post(method + 'Shared', *args, os.path.basename(taken))
            return
        commit.send()
        commit.channel.post('storeBlobStart')
        upload(taken, commit.channel, commit.large_pieces)
        commit.post(method + 'End', *args)

    # ---- undo information, packing, copying

    def undoInfo(self, first: int = 0, last: int = -20,
                 specification: Any = None) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = self._call('undoInfo', first, last, specification)
        return entries

    def undoLog(self, first: int = 0, last: int = -20,
                filter: Callable[[dict[str, Any]], object] | None = None) -> list[dict[str, Any]]:
        if filter is None:
            entries: list[dict[str, Any]] = self._call('undoLog', first, last)
            return entries
        # A function cannot be sent: get everything in steps, and count what it lets through.
        stop = first - last if last < 0 else last
        found: list[dict[str, Any]] = []
        at, step = 0, 100
        while len(found) < stop:
            some = self._call('undoLog', at, at + step)
            if not some:
                break
            found += [each for each in some if filter(each)]
            at += step
        return found[first:stop]

    def pack(self, t: float | None = None, referencesf: Any = None, wait: bool = True,
             days: float = 0) -> None:
        """Forget what is older than ``t`` (seconds since the epoch) less ``days``.

        The server finds references itself.  If not to ``wait``, packing goes on there.
        """
        if t is None:
            t = time.time()
        self._call('pack', t - days * 86400, bool(wait))

    def copyTransactionsFrom(self, other: Any, verbose: int = 0) -> None:
        """Copy all transactions of another storage, with their tids."""
        if interfaces.IBlobStorageRestoreable.providedBy(self):
            copy_transactions_and_blobs(other, self)
        else:
            copy_transactions(other, self, verbose)


def _check_record(data: bytes) -> None:
    if not isinstance(data, bytes):
        raise TypeError(f'a record is bytes, not {type(data).__name__}')


def _check_ids(*ids: bytes) -> None:
    for each in ids:
        if not isinstance(each, bytes) or len(each) != 8:
            raise ValueError(f'{each!r} is not an object or transaction id of eight bytes')


_storages: 'weakref.WeakSet[ClientStorage]' = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for storage in list(_storages):
        storage._after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
