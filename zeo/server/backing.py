"""What may be asked of a storage that is pulled (`ZODB.interfaces.IMVCCStorage`), and its errors, made plain.

Such a storage has *instances*, each with a snapshot of its own and for one thread at a time; it tells
nobody what others do.  A `Backing` knows how to look for that.  This one needs nothing but what ZODB's
interfaces promise; `zeo.server.relational` knows RelStorage, and does the same with fewer questions.
"""

import contextlib
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

from transaction.interfaces import TransientError
from ZODB import POSException
from ZODB.POSException import ConflictError
from ZODB.POSException import POSKeyError
from ZODB.POSException import ReadConflictError
from ZODB.POSException import StorageError
from ZODB.utils import p64
from ZODB.utils import readable_tid_repr
from ZODB.utils import u64
from ZODB.utils import z64

#: Others' transactions are looked for so often, in seconds, unless somebody asks.
POLL_INTERVAL = 0.05

#: A transaction, and the objects that it changed.
Change = tuple[bytes, list[bytes]]

#: The resolver of conflicts: (oid, committed, old, record, committed record) -> record.
Resolve = Callable[..., bytes]


class Unreachable(StorageError):  # type: ignore[misc]
    """The database cannot be reached now, or what can be reached is not the database as it was."""


class View:
    """One instance of a storage: what it shows is a snapshot; for one thread at a time.

    ``generation`` is the owner's, who notes there how new the snapshot is.
    """

    __slots__ = ('storage', 'generation', 'connection')

    def __init__(self, storage: Any) -> None:
        self.storage = storage
        self.generation = -1
        self.connection: Any = None  # the one that was proven to lead to the right database

    def discard(self) -> None:
        """Let go of what it holds; it is not used again."""
        with contextlib.suppress(Exception):  # its connection may have ended
            self.storage.release()


class Backing:
    """A storage with instances, of which nothing is known but the interface.

    It has to tell transactions apart: `IMVCCStorage` alone does not, with ``iterator`` it does.
    """

    #: Whether it can be asked what became of a transaction, from anywhere.
    keeps_receipts = False

    #: Whether conflicts are found, and resolved, under locks that keep out those who come by other ways.
    resolves = False

    #: Whether all current records can be read one after the other.
    iterates_records = False

    def __init__(self, root: Any) -> None:
        self.root = root

    def open(self) -> View:
        """An instance that has not looked at anything."""
        return View(self.root.new_instance())

    def open_writer(self, resolve: Resolve) -> View:
        """One to commit with."""
        return self.open()

    def refresh(self, view: View, announced: bytes) -> None:
        """A new snapshot.  `Unreachable` if it is older than the transaction that was announced last."""
        view.storage.sync()
        view.storage.poll_invalidations()
        newest = self.newest(view)
        if newest < announced:
            raise older(newest, announced)

    def begin(self, view: View, transaction: Any) -> None:
        """Begin a transaction; the database has answered then."""
        view.storage.tpc_begin(transaction)

    def prepare(self, writer: View) -> None:
        """Wait here, before the turn is taken, for what its commit would have to wait for."""

    def undo(self, writer: View, transaction_id: bytes, transaction: Any) -> Any:
        """Undo a transaction, unless others have changed its objects meanwhile."""
        return writer.storage.undo(transaction_id, transaction)

    def forget(self) -> None:
        """Drop what is cached: the database is not the one that it is from."""

    def newest(self, view: View) -> bytes:
        """The last transaction in the snapshot."""
        tid: bytes = view.storage.lastTransaction() or z64
        return tid

    def changes(self, view: View, after: bytes) -> Iterator[Change]:
        """The transactions in the snapshot that came after this one, in order."""
        newest = self.newest(view)
        if newest > after:
            for transaction in view.storage.iterator(p64(u64(after) + 1), newest):
                yield transaction.tid, [record.oid for record in transaction]

    def changed_since(self, view: View, tid: bytes, most: int) -> list[bytes] | None:
        """The objects changed after a transaction; None if it is not known, or these are too many."""
        changes = self.changes(view, p64(u64(tid) - 1) if tid != z64 else tid)
        if tid != z64 and next(changes, (z64, []))[0] != tid:
            return None
        changed: dict[bytes, None] = {}
        for _, oids in changes:
            changed.update(dict.fromkeys(oids))
            if len(changed) > most:
                return None
        return list(changed)

    def load_serial(self, view: View, oid: bytes, tid: bytes) -> bytes:
        """The record of one revision; `POSKeyError` if there is none (any more)."""
        record: bytes = view.storage.loadSerial(oid, tid)
        return record

    def current(self, view: View, oids: list[bytes]) -> dict[bytes, bytes]:
        """The current revisions of those objects that there are."""
        found = {}
        for oid in oids:
            with contextlib.suppress(POSKeyError):
                found[oid] = view.storage.load(oid)[1]
        return found

    def record_iternext(self, view: View, next: bytes | None) -> tuple[bytes, bytes, bytes, bytes | None]:
        raise NotImplementedError

    # ---- the fate of a transaction ------------------------------------------------------

    def receipt(self, writer: View, last: bytes, token: bytes, tid: bytes | None) -> bytes:
        """What `outcome` has to be given; the transaction is voted.

        ``last`` was committed before it, ``token`` is in its extension; or ``tid`` is its own.
        """
        raise NotImplementedError

    def in_progress(self, view: View, receipt: bytes) -> bool:
        """Whether the transaction may still be committed; the snapshot was taken after its vote."""
        raise NotImplementedError

    def outcome(self, view: View, receipt: bytes) -> bytes | None:
        """The tid of the transaction if the snapshot has it; the snapshot was taken after its end."""
        raise NotImplementedError


def older(newest: bytes, announced: bytes) -> Unreachable:
    return Unreachable(
        f'the database is older than what clients know: its last transaction is {readable_tid_repr(newest)},'
        f' theirs is {readable_tid_repr(announced)}.  Either this is a standby that lags behind, or it was'
        ' restored from a backup; in that case restart the servers')


# ---- errors -----------------------------------------------------------------------------


def plain(error: Exception) -> Exception:
    """The error as a client may see it: oids, tids and words of our own, no live objects.

    What says that there is no connection to the database is `Unreachable`.
    """
    made: Exception = _plain(error)
    return made


def _plain(error: Exception) -> Any:
    match error:
        case Unreachable():
            return error
        case POSKeyError():
            return POSKeyError(*_ids(error.args[:1]))
        case ReadConflictError():
            return ReadConflictError(**_conflict(error))
        case ConflictError():
            conflict = ConflictError(**_conflict(error))
            conflict.class_name = getattr(error, 'class_name', None)
            return conflict
        case POSException.ReadOnlyError():
            return POSException.ReadOnlyError()
        case POSException.UndoError():
            return POSException.UndoError(_words(getattr(error, '_reason', '')),
                                          *_ids([getattr(error, '_oid', None)]))
        case POSException.StorageTransactionError() if is_transient(error):
            return Unreachable('the connection to the database was lost')
        case POSException.POSError() if is_transient(error):
            return ReadConflictError()
        case POSException.POSError() | KeyError() | TypeError() | ValueError():
            if type(error).__module__ in ('ZODB.POSException', 'builtins'):
                return error if all(isinstance(each, (str, bytes)) for each in error.args) else _named(error)
            return _named(error)
    return Unreachable('the database cannot be reached') if lost(error) else _refusal(error)


def is_transient(error: Exception) -> bool:
    """Whether the storage says that it may be tried again."""
    return isinstance(error, TransientError)


def lost(error: Exception) -> bool:
    """Whether an error means that there is no connection (any more) to a database that can be used."""
    if isinstance(error, OSError):
        return True
    if code := sqlstate(error):
        # Classes 08 and 57P: of connections, and the server is stopped; 25006: it is a standby.
        return code.startswith(('08', '57P')) or code == '25006'
    # The names are those of Python's DB-API (PEP 249).  A DatabaseError that is nothing more special is what
    # psycopg2 raises if the connection ends in the middle of a COPY.
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool({'OperationalError', 'InterfaceError'} & names) or type(error).__name__ == 'DatabaseError'


def sqlstate(error: Exception) -> str:
    """PostgreSQL's code for what is wrong, as psycopg2 and pg8000 tell it; empty if it has not said anything."""
    code = getattr(error, 'pgcode', None)
    if code is None and error.args and isinstance(error.args[0], dict):
        code = error.args[0].get('C')
    return code if isinstance(code, str) else ''


def _refusal(error: Exception) -> Any:
    code = sqlstate(error)
    if code.startswith('40') or code == '55P03':  # serialization, deadlocks, locks that are not given
        return ConflictError()
    return StorageError(f'the database refuses: {type(error).__name__} {code}'.strip())


def _named(error: Exception) -> Any:
    said = next((each for each in error.args if isinstance(each, str)), '')
    return StorageError(f'{type(error).__name__}: {_words(said)}' if said else type(error).__name__)


def _words(said: object) -> str:
    """The first line: what comes below it is for those who look for faults in the database."""
    return (said.splitlines() or [''])[0][:200] if isinstance(said, str) else ''


def _ids(values: Any) -> list[Any]:
    return [each for each in values if isinstance(each, bytes) and len(each) == 8]


def _conflict(error: Any) -> dict[str, Any]:
    oid, serials = error.oid, error.serials
    return {'oid': oid if isinstance(oid, bytes) else None,
            'serials': tuple(_ids(serials)) if serials is not None else None}


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    """What is raised is made `plain`."""
    try:
        yield
    except StopIteration:
        raise
    except Exception as error:
        made = plain(error)
        if made is error:
            raise
        raise made from error
