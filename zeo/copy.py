"""Copy a whole database, or compare two: ``python -m zeo.copy SOURCE TARGET``, see the README."""

import contextlib
import errno
import filecmp
import itertools
import os
import shutil
import stat
import sys
import tempfile
import threading
from collections.abc import Generator
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from ZODB.interfaces import IBlobStorage
from ZODB.interfaces import IBlobStorageRestoreable
from ZODB.interfaces import IStorageRestoreable
from ZODB.POSException import POSKeyError
from ZODB.utils import p64
from ZODB.utils import u64
from ZODB.utils import z64

from zeo import commands
from zeo.client.dialing import Security
from zeo.commands import Failure
from zeo.errors import ClientStorageError
from zeo.server import configuration
from zeo.server import storages
from zeo.server.options import CannotStart
from zeo.wire.records import is_blob_record

PROGRAM = 'zeo.copy'


def main(arguments: Sequence[str] | None = None) -> int:
    """Copy or compare; returns the exit status (`SystemExit` for usage errors)."""
    parser = _parser()
    found = parser.parse_intermixed_args(commands.arguments_or_argv(arguments))
    places = [*map(commands.Server, parser.server_options(found)), *found.places]
    if len(places) != 2:
        parser.error('give SOURCE and TARGET; -p or -U may stand for SOURCE')
    where_from, where_to = places

    def command() -> None:
        security = commands.security(found)
        with contextlib.ExitStack() as at_end:
            source = at_end.enter_context(opened(
                where_from, found.storage, found.source_blobs, PROGRAM, security, read_only=True))
            target = at_end.enter_context(opened(
                where_to, found.target_storage or found.storage, found.target_blobs, PROGRAM,
                security, read_only=found.verify, for_blobs=blobs_of(source)))
            stop = at_end.enter_context(commands.interruption())
            if found.verify:
                count = compare(source, target, stop)
                print(f'{count}: no difference')
                done = 'not compared'
            else:
                count = copy(source, target, stop)
                print(count if count.transactions else 'nothing to copy: the target has it all')
                done = 'left out'
            if count.missing:
                raise Failure(f'{count.missing} blobs were {done}: '
                              + ('the target has no place for them (--target-blobs)' if blobs_of(source)
                                 else 'the source does not say where they are (--source-blobs)'))

    return commands.run(PROGRAM, command)


@dataclass
class Count:
    """How much there was of what."""

    transactions: int = 0
    records: int = 0
    blobs: int = 0
    missing: int = 0  #: blobs that could not be copied, or compared
    size: int = 0  #: bytes of records and blobs

    def __str__(self) -> str:
        return (f'{self.transactions} transactions, {self.records} records, {self.blobs} blobs,'
                f' {commands.size(self.size)}')


# ---- storages -------------------------------------------------------------------------


@contextlib.contextmanager
def opened(where: str | commands.Server, name: str, blobs: str | None, program: str,
           security: Security | None = None, *, read_only: bool, for_blobs: bool = False) -> Iterator[Any]:
    """The storage that is meant: on a server, in a configuration file (``.conf``), or a FileStorage.

    The blobs of a file are in the folder ``blobs``, by default in that which `zeo.start` would look into;
    it is made if blobs may come (``for_blobs``).  Raises `Failure`.  The storage is closed in the end.
    """
    with contextlib.ExitStack() as at_end:
        storage: Any
        if isinstance(where, str) and _is_server(where):
            where = commands.Server(commands.address(where))
        if isinstance(where, commands.Server):
            folder = at_end.enter_context(tempfile.TemporaryDirectory(prefix='zeo-'))
            storage = commands.connect(
                where.address, name, program, security, read_only=read_only, blob_dir=folder,
                blob_cache_size=256 * 1024 * 1024)
        else:
            try:
                storage = _open_here(where, name, blobs, read_only, for_blobs)
            except CannotStart as error:
                raise Failure(str(error)) from None
            except Exception as error:  # of any storage that a configuration may name
                raise Failure(f'{where}: cannot be opened: {commands.in_words(error)}') from None
        at_end.callback(storage.close)
        yield storage


def _is_server(text: str) -> bool:
    host, colon, port = text.rpartition(':')
    if colon and '/' not in text and port.isdigit():
        return True
    try:
        return stat.S_ISSOCK(os.stat(text).st_mode)
    except OSError:
        return False


def _open_here(path: str, name: str, blobs: str | None, read_only: bool, for_blobs: bool) -> Any:
    if path.endswith('.conf'):
        if blobs is not None:
            raise ValueError('where its blobs are is said in the configuration file itself')
        sections = configuration.read(path)['sections']
        chosen = sections if len(sections) == 1 else [each for each in sections if each.name == name]
        if not chosen:
            names = ', '.join(each.name for each in sections) or 'none'
            raise ValueError(f'it has no storage {name}, but {names}; name one of these with -S')
        return chosen[0].factory.open()
    if read_only and not os.path.exists(path):
        raise FileNotFoundError('there is no such file')
    if read_only and blobs is not None and not os.path.isdir(blobs):
        raise FileNotFoundError(f'there is no folder {blobs}')
    if blobs is None and (os.path.isdir(path + '.blobs') or for_blobs and not read_only):
        blobs = path + '.blobs'
    if problem := storages.look_for_file(os.path.abspath(path), read_only):
        raise CannotStart(problem)  # before FileStorage makes its other files
    return storages.open_file(path, read_only, blobs)


def blobs_of(storage: Any) -> bool:
    """Whether the storage has blobs."""
    return bool(IBlobStorage.providedBy(storage))


def last_tid(storage: Any) -> bytes:
    tid: bytes = storage.lastTransaction() or z64
    return tid


def transactions(storage: Any, start: bytes | None, stop: bytes) -> Generator[Any, None, None]:
    """Those from one tid to another; the iterator's file is closed in the end."""
    iterator = storage.iterator(start, stop)
    try:
        yield from iterator
    finally:
        close = getattr(iterator, 'close', None)
        if close is not None:
            close()


# ---- copying ---------------------------------------------------------------------------


def copy(source: Any, target: Any, stop: threading.Event, end: bytes | None = None,
         partial: bool = False) -> Count:
    """Copy what the target does not have, up to ``end``, by default what is now the source's last one.

    A target that has transactions already has to end with one that is in the source, too.  Each
    transaction is there as a whole or not at all, so a copy that was stopped can be taken up again.
    Raises `Failure`; but with ``partial`` it just returns when it is to stop.
    """
    if not can_restore(target):
        raise Failure('the target cannot take transactions with the times and ids that they have')
    end = last_tid(source) if end is None else end
    done = last_tid(target)
    start = None
    if done != z64:
        _check_same_end(source, target, done)
        start = p64(u64(done) + 1)
    count = Count()
    again = 'nothing of this is kept, the same command begins again' if partial else (
        'the same command goes on from here')
    with commands.Progress('copying', max(source.getSize() - target.getSize(), 1)) as bar, (
            _kindly(count, again)):
        for transaction in transactions(source, start, end):
            if stop.is_set():
                if partial:
                    break
                raise Failure(f'stopped after {count}; {again}')
            copy_transaction(transaction, source, target, count)
            bar.at(count.size, f'{count.transactions} transactions')
    return count


@contextlib.contextmanager
def _kindly(count: Count, again: str) -> Iterator[None]:
    """What breaks off a copy is told with how far it is, and what to do now."""
    try:
        yield
    except OSError as error:
        text = commands.in_words(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            text = f'no room is left for the target, or for temporary files ({tempfile.gettempdir()})'
        raise Failure(f'after {count}: {text}; {again}') from None
    except ClientStorageError as error:
        raise Failure(f'after {count}: {commands.in_words(error)}; {again}') from None


def can_restore(storage: Any) -> bool:
    if isinstance(storage, commands.Client):
        return bool(IStorageRestoreable.providedBy(storage))
    return hasattr(storage, 'restore')


def _check_same_end(source: Any, target: Any, tid: bytes) -> None:
    there, here = records_at(source, tid), records_at(target, tid)
    if there is None or here is None or sorted(there, key=itemgetter(0)) != sorted(here, key=itemgetter(0)):
        raise Failure(f'the target has transactions already, and its last one, {tid.hex()}, is not in the'
                      ' source; choose an empty target')


def records_at(storage: Any, tid: bytes) -> list[tuple[bytes, bytes | None]] | None:
    """The records of one transaction; None if there is no such transaction."""
    with contextlib.closing(transactions(storage, tid, tid)) as found:
        for transaction in found:
            return [(record.oid, record.data) for record in transaction]
    return None


def copy_transaction(transaction: Any, source: Any, target: Any, count: Count) -> None:
    """Copy one transaction with its blobs."""
    with_blobs = blobs_of(source) and blobs_of(target)
    target.tpc_begin(transaction, transaction.tid, transaction.status)
    try:
        for record in transaction:
            count.records += 1
            count.size += len(record.data or b'')
            path = None
            if record.data is not None and is_blob_record(record.data):
                path = _blob_file(source, record) if with_blobs else None
                if path is None:
                    count.missing += 1
            if path is None:
                target.restore(record.oid, record.tid, record.data, '', record.data_txn, transaction)
            else:
                count.blobs += 1
                count.size += os.stat(path).st_size
                _restore_blob(record, _own_copy(path, target), target, transaction)
        target.tpc_vote(transaction)
        target.tpc_finish(transaction)
    except BaseException:
        target.tpc_abort(transaction)
        raise
    count.transactions += 1


def _restore_blob(record: Any, path: str, target: Any, transaction: Any) -> None:
    if IBlobStorageRestoreable.providedBy(target) or not isinstance(target, commands.Client):
        target.restoreBlob(record.oid, record.tid, record.data, path, record.data_txn, transaction)
        return
    # A server of ZEO's cannot restore blobs.  But in a transaction that has been begun with its tid, what is stored
    # gets this tid, too, as if it were restored.
    try:
        before = target.getTid(record.oid)
    except POSKeyError:
        before = z64
    target.storeBlob(record.oid, before, record.data, path, '', transaction)


def _blob_file(storage: Any, record: Any) -> str | None:
    try:
        path: str = storage.loadBlob(record.oid, record.tid)
    except POSKeyError:
        return None  # packed away, while the record is kept for the sake of its transaction
    return path


def _own_copy(path: str, target: Any) -> str:
    """A copy of a blob's file that the target may take away."""
    handle, name = tempfile.mkstemp(prefix='zeo-', suffix='.tmp', dir=target.temporaryDirectory())
    with open(handle, 'wb') as to, open(path, 'rb') as file:
        shutil.copyfileobj(file, to, 1024 * 1024)
    return name


# ---- comparing -------------------------------------------------------------------------


def compare(source: Any, target: Any, stop: threading.Event, start: bytes | None = None,
            end: bytes | None = None) -> Count:
    """Raise `Failure`, which names the first difference, unless both have the same transactions.

    Compared are those from ``start`` to ``end``, by default what is now the source's last one.  Blobs that
    only one of them can have are counted as missing.
    """
    count = Count()
    whole = end is None
    end = last_tid(source) if end is None else end
    both_have_blobs = blobs_of(source) and blobs_of(target)
    with commands.Progress('comparing', max(source.getSize(), 1)) as bar, contextlib.ExitStack() as at_end:
        one = at_end.enter_context(contextlib.closing(transactions(source, start, end)))
        two = at_end.enter_context(contextlib.closing(transactions(target, start, end)))
        for left, right in itertools.zip_longest(one, two):
            if stop.is_set():
                raise Failure(f'stopped after {count} without a difference')
            if left is None or right is None:
                raise Failure(f'the {"source" if left is None else "target"} has no transaction'
                              f' {(left or right).tid.hex()}')
            _compare_heads(left, right)
            for a, b in _by_object(left, right):
                if a is None or b is None or a.data != b.data:
                    raise Failure(f'transaction {left.tid.hex()}: object {(a or b).oid.hex()} differs')
                count.records += 1
                count.size += len(a.data or b'')
                if a.data is not None and is_blob_record(a.data):
                    if both_have_blobs:
                        count.size += _compare_blobs(source, target, a, b)
                        count.blobs += 1
                    elif not blobs_of(source) or _blob_file(source, a) is not None:
                        count.missing += 1
            count.transactions += 1
            bar.at(count.size, f'{count.transactions} transactions')
    if whole and last_tid(target) > end:
        raise Failure(f'the target has transactions after {end.hex()}, the last one of the source')
    return count


def _by_object(left: Any, right: Any) -> Iterator[tuple[Any, Any]]:
    """The records of both, each with the other's of the same object, or None.

    Their order has no meaning, and a server of ZEO's puts blobs last; those that have no counterpart yet
    are kept.
    """
    kept: tuple[dict[bytes, list[Any]], ...] = ({}, {})
    for pair in itertools.zip_longest(left, right):
        if None not in pair and pair[0].oid == pair[1].oid:
            yield pair
            continue
        for side, record in enumerate(pair):
            if record is None:
                continue
            others = kept[1 - side].get(record.oid)
            if others:
                other = others.pop(0)
                yield (other, record) if side else (record, other)
            else:
                kept[side].setdefault(record.oid, []).append(record)
    yield from ((record, None) for records in kept[0].values() for record in records)
    yield from ((None, record) for records in kept[1].values() for record in records)


def _compare_heads(left: Any, right: Any) -> None:
    if left.tid != right.tid:
        missing = 'target' if left.tid < right.tid else 'source'
        raise Failure(f'the {missing} has no transaction {min(left.tid, right.tid).hex()}')
    for name in ('user', 'description', 'extension'):
        if getattr(left, name) != getattr(right, name):
            raise Failure(f'transaction {left.tid.hex()}: the {name} differs')


def _compare_blobs(source: Any, target: Any, left: Any, right: Any) -> int:
    one, two = _blob_file(source, left), _blob_file(target, right)
    if one is None and two is None:
        return 0
    what = f'transaction {left.tid.hex()}: the blob of object {left.oid.hex()}'
    if one is None or two is None:
        raise Failure(f'{what} is missing in the {"source" if one is None else "target"}')
    if not filecmp.cmp(one, two, shallow=False):
        raise Failure(f'{what} differs')
    return os.stat(one).st_size


def _parser() -> commands.Parser:
    parser = commands.Parser(
        PROGRAM, usage='%(prog)s [options] SOURCE TARGET',
        description='Copy all transactions of a database, with their blobs, or compare two databases.',
        epilog='SOURCE and TARGET are each a server (host:port, :port, or the path of a socket), a'
               " configuration file of ZODB's or of a server (its name ends with .conf), or the file of a FileStorage."
               '  A copy that was stopped goes on when it is started again.')
    parser.add_argument('places', nargs='*', metavar='SOURCE TARGET', help=(
        'what to copy, and where to; a file is created if need be'))
    parser.add_server_options('what to copy, if SOURCE is left out')
    what = parser.add_argument_group('what to copy')
    what.add_argument('-S', '--storage', metavar='NAME', default='1', help=(
        'the name of the storage on a server, or in a configuration file of several (default: 1)'))
    what.add_argument('--target-storage', metavar='NAME', help=(
        'the same for the target, if it is another name there'))
    what.add_argument('--source-blobs', metavar='DIR', help=(
        "the blob folder, if the source is a file (default: the file's name with .blobs, if there is one)"))
    what.add_argument('--target-blobs', metavar='DIR', help=(
        "the same for the target; it is made if need be"))
    what.add_argument('--verify', action='store_true', help=(
        'compare: copy nothing, and tell the first difference, if there is one'))
    parser.add_tls_options()
    return parser


if __name__ == '__main__':
    sys.exit(main())
