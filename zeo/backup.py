"""Back up a served database while it is in use: ``python -m zeo.backup ADDRESS DIR``, see the README.

A backup is a folder of *parts*.  Each run adds one, with the transactions since the run before:

    DIR/FIRST-LAST/Data.fs      a FileStorage with these transactions (FIRST and LAST are their tids)
    DIR/FIRST-LAST/blobs/       their blobs
    DIR/FIRST-LAST/part.json    what is in it, the SHA-256 of each file, and LAST of the part before

A part is written under another name and gets its own when it is complete, on the disk, and compared with
what the server has.  So whatever happens, all parts that are there are whole.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Generator
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from datetime import timezone
from pathlib import Path
from typing import Any

from persistent.TimeStamp import TimeStamp
from ZODB.FileStorage import FileStorage
from ZODB.interfaces import IBlobStorage
from ZODB.POSException import POSKeyError
from ZODB.utils import maxtid
from ZODB.utils import p64
from ZODB.utils import u64
from zope.interface import directlyProvides

from zeo import commands
from zeo.client.dialing import Security
from zeo.commands import Failure
from zeo.copy import Count
from zeo.copy import blobs_of
from zeo.copy import compare
from zeo.copy import copy
from zeo.copy import last_tid
from zeo.copy import opened
from zeo.copy import records_at
from zeo.copy import transactions

PROGRAM = 'zeo.backup'

_PART = re.compile('([0-9a-f]{16})-([0-9a-f]{16})').fullmatch
_UNFINISHED = 'unfinished'


def main(arguments: Sequence[str] | None = None) -> int:
    """Back up, check or restore; returns the exit status (`SystemExit` for usage errors)."""
    parser = _parser()
    found = parser.parse_intermixed_args(commands.arguments_or_argv(arguments))
    servers = [commands.Server(each) for each in parser.server_options(found)]
    places = [*found.places, *servers] if found.restore else [*servers, *found.places]
    if len(places) != (1 if found.check else 2) or found.check and servers:
        parser.error('give DIR with --check' if found.check else
                     'give DIR and TARGET with --restore' if found.restore else 'give ADDRESS and DIR')
    if found.at is not None and not found.restore:
        parser.error('--at says what to restore; give --restore, too')
    if found.target_blobs is not None and not found.restore:
        parser.error('--target-blobs is for what is restored; give --restore, too')
    if found.source_blobs is not None and (found.restore or found.check):
        parser.error('--source-blobs is for a file that is backed up')

    def command() -> None:
        security = commands.security(found)
        with commands.interruption() as stop:
            if found.check:
                check(Path(places[0]))
                print(Backup(Path(places[0])).describe())
            elif found.restore:
                restore(Path(places[0]), places[1], found.storage, found.target_blobs, found.at, stop,
                        security)
            else:
                with opened(places[0], found.storage, found.source_blobs, PROGRAM, security,
                            read_only=True) as source:
                    back_up(source, Path(places[1]), stop)

    return commands.run(PROGRAM, command)


# ---- making one -------------------------------------------------------------------------


def back_up(source: Any, folder: Path, stop: threading.Event) -> None:
    """Add what is new since the last time; raises `Failure`."""
    if not folder.parent.is_dir():
        raise Failure(f'{folder}: the folder {folder.parent} does not exist; create it, or choose another one')
    if folder.exists() and not folder.is_dir():
        raise Failure(f'{folder} is not a folder; choose another one')
    folder.mkdir(mode=0o700, exist_ok=True)
    with _alone(folder):
        shutil.rmtree(folder / _UNFINISHED, ignore_errors=True)
        backup = Backup(folder)
        backup.check_parts()
        start = None
        if backup.parts:
            last = backup.lastTransaction()
            _check_origin(source, backup, last)
            start = p64(u64(last) + 1)
        end = last_tid(source)
        if end < (start or p64(1)):
            print(f'nothing new since {when(backup.lastTransaction())}' if start
                  else 'nothing to back up: there is no transaction yet')
            return
        work = folder / _UNFINISHED
        try:
            work.mkdir(mode=0o700)
            count, end = _write_part(source, work, start, end, stop)
            if count.transactions:
                first = _first_tid(work)
                _seal(work, count, backup.parts[-1][1] if backup.parts else None)
                os.rename(work, folder / f'{first.hex()}-{end.hex()}')
                _flush(folder)
        except OSError as error:
            raise Failure(f'{folder}: {commands.in_words(error)}; nothing was added to this backup') from None
        finally:
            shutil.rmtree(work, ignore_errors=True)
        if count.transactions:
            print(f'{count}, until {when(end)}')
        if stop.is_set():
            raise Failure('stopped; what is there is whole, and the same command goes on from here')
        if count.missing:
            raise Failure(f'{count.missing} blobs could not be had from the source; all else is there')


def _write_part(source: Any, work: Path, start: bytes | None, end: bytes,
                stop: threading.Event) -> tuple[Count, bytes]:
    part = FileStorage(str(work / 'Data.fs'), blob_dir=str(work / 'blobs') if blobs_of(source) else None)
    try:
        count = copy(_From(source, start), part, stop, end, partial=True)
        end = last_tid(part)
        if count.transactions:
            compare(source, part, threading.Event(), start, end)
    finally:
        part.close()
    for name in ('Data.fs.lock', 'Data.fs.tmp', 'Data.fs.index'):
        (work / name).unlink(missing_ok=True)
    return count, end


class _From:
    """A storage without what is before a tid."""

    def __init__(self, storage: Any, start: bytes | None) -> None:
        self._storage = storage
        self._start = start
        self.loadBlob = getattr(storage, 'loadBlob', None)
        if blobs_of(storage):
            directlyProvides(self, IBlobStorage)

    def iterator(self, start: bytes | None, stop: bytes) -> Any:
        return self._storage.iterator(start or self._start, stop)

    def lastTransaction(self) -> bytes:
        return last_tid(self._storage)

    def getSize(self) -> int:
        size: int = self._storage.getSize() if self._start is None else 0
        return size


def _check_origin(source: Any, backup: 'Backup', last: bytes) -> None:
    """The backup is one of this database, as far as can be seen; raises `Failure`."""
    with contextlib.closing(transactions(source, None, last)) as found:
        first = next(found, None)
        known = first is not None and {(record.oid, record.data) for record in first} <= set(
            backup.records_at(first.tid))
    here, there = backup.records_at(last), records_at(source, last)
    if there is not None:
        known = known and set(there) <= set(here)
    else:  # a pack has removed it, since all its objects have changed again or are gone
        known = known and not any(_current(source, oid) < last for oid, _ in here)
    if not known or last_tid(source) < last:
        raise Failure(f'the backup is one of another database, or the database was set back: it does not'
                      f' have what the backup has as of {when(last)}; choose another folder')


def _current(source: Any, oid: bytes) -> bytes:
    try:
        tid: bytes = source.getTid(oid)
    except POSKeyError:
        tid = maxtid  # gone, which is news, too
    return tid


def _first_tid(work: Path) -> bytes:
    storage = FileStorage(str(work / 'Data.fs'), read_only=True)
    try:
        with contextlib.closing(storage.iterator()) as found:
            tid: bytes = next(found).tid
            return tid
    finally:
        storage.close()
        (work / 'Data.fs.index').unlink(missing_ok=True)


def _seal(work: Path, count: Count, before: bytes | None) -> None:
    """Write what is in a part, and see to it that all of it is on the disk."""
    files = [path for path in sorted(work.rglob('*')) if path.is_file()]
    for path in files:
        _flush(path)
    part = work / 'part.json'
    part.write_text(json.dumps(asdict(count) | {'after': before and before.hex(), 'files': {
        str(path.relative_to(work)): _digest(path) for path in files}}, indent=1) + '\n')
    _flush(part)
    for path in [work, *work.rglob('*')]:
        if path.is_dir():
            _flush(path)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(path: Path) -> str:
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    with open(folder / 'lock', 'a') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Failure(f'{folder}: another backup into this folder is in progress') from None
        yield


# ---- reading one ---------------------------------------------------------------------------


class Backup:
    """A folder of parts, as a storage that can be copied and compared.  Raises `Failure` if it is none."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise Failure(f'{folder}: there is no such folder')
        self.folder = folder
        names = [match for path in folder.iterdir() if (match := _PART(path.name))]
        #: First tid, last tid and folder of each part, in order.
        self.parts = sorted((bytes.fromhex(match[1]), bytes.fromhex(match[2]), folder / match[0])
                            for match in names)
        for (_, last, before), (first, _, after) in zip(self.parts, self.parts[1:]):
            if first <= last:
                raise Failure(f'{before} and {after.name} overlap; one of them does not belong here')
        self._current: Any = None  # the part that is being read
        if any((path / 'blobs').is_dir() for _, _, path in self.parts):
            directlyProvides(self, IBlobStorage)

    def check_parts(self) -> None:
        """Raise `Failure` unless each part can be read, and follows the one before."""
        before = None
        for _, last, path in self.parts:
            after = _told(path)['after']
            if after != before:
                raise Failure(f'{self.folder} is not whole: a part is missing before {path.name}')
            before = last.hex()

    def iterator(self, start: bytes | None = None, stop: bytes | None = None) -> Generator[Any, None, None]:
        for first, last, path in self.parts:
            if (start is None or last >= start) and (stop is None or first <= stop):
                blobs = path / 'blobs'
                # No index is written when it is only read.
                part = FileStorage(str(path / 'Data.fs'), read_only=True,
                                   blob_dir=str(blobs) if blobs.is_dir() else None)
                self._current = part
                try:
                    with contextlib.closing(part.iterator(start, stop)) as found:
                        yield from found
                finally:
                    self._current = None
                    part.close()

    def loadBlob(self, oid: bytes, tid: bytes) -> Any:
        """Of a transaction that is just being read."""
        if not blobs_of(self._current):
            raise POSKeyError(oid)
        return self._current.loadBlob(oid, tid)

    def records_at(self, tid: bytes) -> list[tuple[bytes, bytes | None]]:
        """Of one transaction, if its part is as it was written; raises `Failure`."""
        for first, last, path in self.parts:
            if first <= tid <= last:
                _check_file(path, 'Data.fs', _told(path)['files'].get('Data.fs'))
        return records_at(self, tid) or []

    def lastTransaction(self) -> bytes:
        return self.parts[-1][1] if self.parts else bytes(8)

    def getSize(self) -> int:
        return sum(os.stat(path / 'Data.fs').st_size for _, _, path in self.parts)

    def describe(self) -> str:
        total = Count()
        for _, _, path in self.parts:
            told = _told(path)
            for name in asdict(total):
                setattr(total, name, getattr(total, name) + told[name])
        return f'{total}, parts: {len(self.parts)}, until {when(self.lastTransaction())}'


def _told(path: Path) -> dict[str, Any]:
    """What a part tells about itself; raises `Failure` if it does not."""
    try:
        told = json.loads((path / 'part.json').read_text())
        if not (isinstance(told, dict) and isinstance(told['files'], dict)
                and {'after', *asdict(Count())} <= set(told) and (path / 'Data.fs').is_file()):
            raise ValueError('it is not complete')
    except (OSError, ValueError, KeyError) as error:
        raise Failure(f'{path} is damaged: {commands.in_words(error)}') from None
    return told


def _check_file(path: Path, name: str, digest: Any) -> None:
    try:
        if _digest(path / name) != digest:
            raise Failure(f'{path / name} is damaged')
    except OSError as error:
        raise Failure(f'{path} is damaged: {commands.in_words(error)}') from None


def check(folder: Path) -> None:
    """Raise `Failure` unless every part and every file is there, and as it was written."""
    backup = Backup(folder)
    if not backup.parts:
        raise Failure(f'{folder}: there is no backup in this folder')
    backup.check_parts()
    for _, _, path in backup.parts:
        for name, digest in _told(path)['files'].items():
            _check_file(path, name, digest)


def restore(folder: Path, target: str | commands.Server, storage: str, blobs: str | None, at: bytes | None,
            stop: threading.Event, security: Security | None) -> None:
    """Make a database of a backup, as of its end or an earlier time; raises `Failure`."""
    check(folder)
    backup = Backup(folder)
    if at is not None and at < backup.parts[0][0]:
        raise Failure(f'there is nothing yet at that time; the backup begins at {when(backup.parts[0][0])}')
    with opened(target, storage, blobs, PROGRAM, security, read_only=False,
                for_blobs=blobs_of(backup)) as restored:
        end = backup.lastTransaction() if at is None else min(at, backup.lastTransaction())
        if last_tid(restored) > end:
            raise Failure(f'the target has transactions until {when(last_tid(restored))}, which is later than what'
                          ' is to be restored; choose an empty target')
        copied = copy(backup, restored, stop, end)
        # This counts all, also what was there already because a restore before this one was stopped.
        count = compare(backup, restored, stop, None, end)
        last, has_blobs = last_tid(restored), blobs_of(restored)
    print(f'{count}, until {when(last)}')
    if missing := max(copied.missing, count.missing):
        raise Failure(f'{missing} blobs were left out: ' + (
            'they are not in the backup' if has_blobs or not blobs_of(backup) else
            'the target has no place for them (--target-blobs)'))


def when(tid: bytes) -> str:
    """A tid as a local time."""
    return datetime.fromtimestamp(TimeStamp(tid).timeTime()).isoformat(' ', 'seconds')


def _at(text: str) -> bytes:
    """The last tid that a transaction may have had at a local time."""
    try:
        utc = datetime.fromisoformat(text).timestamp()
        if len(text) <= 10:
            raise argparse.ArgumentTypeError(f'{text!r} is a day; give the time, too: "{text} 23:59:59"')
        moment = datetime.fromtimestamp(utc, timezone.utc)
        tid: bytes = TimeStamp(moment.year, moment.month, moment.day, moment.hour, moment.minute,
                               moment.second + moment.microsecond / 1e6).raw()
        # A time in whole seconds means: until that second is over.
        return tid if moment.microsecond else p64(u64(tid) + int(2**32 / 60) - 1)
    except (ValueError, OverflowError, OSError):
        raise argparse.ArgumentTypeError(
            f'{text!r} is no time; give it like "2030-12-31 23:59:59"') from None


def _parser() -> commands.Parser:
    parser = commands.Parser(
        PROGRAM, usage='%(prog)s [options] ADDRESS DIR\n'
                       '       %(prog)s --check DIR\n'
                       '       %(prog)s --restore [--at TIME] [options] DIR TARGET',
        description='Back up a database that is in use, with its blobs: each time what is new.',
        epilog='ADDRESS is a server (host:port, :port, or the path of a socket); a file can be backed up,'
               ' too.  TARGET is the file of a FileStorage, or an empty storage on a server.')
    parser.add_argument('places', nargs='*', metavar='ADDRESS DIR', help=(
        'what to back up, and the folder of the backup, which may be new'))
    parser.add_server_options('the server, if ADDRESS or TARGET is left out')
    what = parser.add_argument_group('what to do')
    what.add_argument('-S', '--storage', metavar='NAME', default='1', help=(
        'the name of the storage on a server (default: 1)'))
    mode = what.add_mutually_exclusive_group()
    mode.add_argument('--check', action='store_true', help='see whether a backup is still as it was written')
    mode.add_argument('--restore', action='store_true', help='make a database of a backup')
    what.add_argument('--at', type=_at, metavar='TIME', help=(
        'restore what was committed until this local time, such as "2030-12-31 23:59:59"'))
    what.add_argument('--source-blobs', metavar='DIR', help=(
        "the blob folder, if a file is backed up (default: the file's name with .blobs, if there is one)"))
    what.add_argument('--target-blobs', metavar='DIR', help=(
        "the blob folder, if the target is a file (default: the file's name with .blobs)"))
    parser.add_tls_options()
    return parser


if __name__ == '__main__':
    sys.exit(main())
