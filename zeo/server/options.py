"""What the command line of the server asks for: words in, one `Options` value out.

Nothing here touches the machine: no file, no user, no socket.  What can be wrong about the words
alone ends the program with status 2 and one line; what is asked for and cannot be had is found out
later, by others, and told with `CannotStart`.
"""

import argparse
import math
import os
import sys
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from zeo.version import __version__

PROGRAM = 'zeo.start'

DEFAULT_TRANSACTION_TIMEOUT = 30.0  # seconds
DEFAULT_QUEUE_SIZE = 100  # transactions


class CannotStart(Exception):
    """The server cannot be started as asked.

    The text is one line for whoever typed the command: what is wrong, and what to do about it.
    """


@dataclass(frozen=True)
class StorageName:
    """Where a storage comes from: ``-S name=module:attribute``."""

    name: str
    module: str
    attribute: str

    def __str__(self) -> str:
        return f'{self.name}={self.module}:{self.attribute}'


@dataclass(frozen=True)
class Options:
    """What the command line says, checked as far as words can be, with defaults filled in."""

    addresses: tuple[tuple[str, int] | str, ...]
    file: str | None  #: as given; see `data_file`
    storages: tuple[StorageName, ...]
    blob_dir: str | None  #: as given; see `blob_folder`
    environment: Mapping[str, str]
    user: str | None
    log: str | None
    profile: str | None
    debug: bool
    read_only: bool
    transaction_timeout: float | None  #: seconds; None: no limit
    invalidation_queue_size: int
    invalidation_age: float | None  #: seconds; None: as many as the queue holds
    client_conflict_resolution: bool


def data_file(options: Options, environment: Mapping[str, str]) -> str | None:
    """The absolute path of the file to serve; None if ``-S`` says what to serve."""
    if options.storages:
        return None
    if options.file is not None:
        return os.path.abspath(options.file)
    if home := environment.get('INSTANCE_HOME'):
        return os.path.abspath(os.path.join(home, 'var', 'Data.fs'))
    return os.path.abspath('Data.fs')


def blob_folder(options: Options, file: str) -> str | None:
    """The absolute path of the folder for the blobs of a data file; None if it is to have no blobs."""
    if options.blob_dir is not None:
        return os.path.abspath(options.blob_dir)
    default = file + '.blobs'
    return default if os.path.isdir(default) else None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, and where to read on."""
        self.exit(2, f'{PROGRAM}: {" ".join(message.split())} (--help shows all options)\n')


def parse(arguments: Sequence[str]) -> Options:
    """Read the command line; ends the program (`SystemExit`) if it asks for help or is wrong."""
    parser = _parser()
    if not arguments:
        parser.print_help(sys.stderr)
        parser.exit(2)
    found = parser.parse_intermixed_args(arguments)

    environment, files = {}, []
    for word in found.words:
        name, equals, value = word.partition('=')
        if equals and name.isidentifier():
            environment[name] = value
        else:
            files.append(word)

    if found.port is None and found.unix is None:
        parser.error('no address to listen on: give a port with -p, a socket file with -U, or both')
    if found.host is not None and found.port is None:
        parser.error('-h says where the port is; give the port with -p')
    if len(files) > 1:
        parser.error(f'more than one file name: {", ".join(files)}; give one, or use -S')
    if files and found.storages:
        parser.error(f'both a file name ({files[0]}) and -S; name the file\'s storage with -S, too')
    if found.blob_dir is not None and found.storages:
        parser.error('--blob-dir is for a file; what -S names says itself where its blobs are')
    names = [storage.name for storage in found.storages]
    for name in names:
        if names.count(name) > 1:
            parser.error(f'two storages have the name {name!r}; each -S needs a name of its own')

    addresses: list[tuple[str, int] | str] = []
    if found.port is not None:
        addresses.append(('localhost' if found.host is None else found.host, found.port))
    if found.unix is not None:
        addresses.append(found.unix)

    return Options(
        addresses=tuple(addresses),
        file=files[0] if files else None,
        storages=tuple(found.storages),
        blob_dir=found.blob_dir,
        environment=environment,
        user=found.user,
        log=found.log,
        profile=found.profile,
        debug=found.debug,
        read_only=found.read_only,
        transaction_timeout=found.transaction_timeout or None,
        invalidation_queue_size=found.invalidation_queue_size,
        invalidation_age=found.invalidation_age,
        client_conflict_resolution=found.client_conflict_resolution,
    )


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=f'python -m {PROGRAM}',
        usage='%(prog)s [options] [NAME=VALUE ...] [file]',
        description='Serve ZODB storages to other processes and machines.',
        epilog='At least one of -p and -U is needed.  start.txt explains every option with an'
               ' example.  The server stays in the foreground; SIGTERM or Ctrl-C ends it in order,'
               ' SIGHUP reopens its log file.',
        add_help=False, allow_abbrev=False)

    where = parser.add_argument_group('where to listen')
    where.add_argument('-p', '--port', type=_port, metavar='PORT', help=(
        'listen on this TCP port; 0 chooses a free one and logs which'))
    where.add_argument('-h', '--host', metavar='HOST', help=(
        "with -p: listen on this host's addresses; '' is all of this machine, open to others"
        ' (default: the loopback addresses, which only this machine can reach)'))
    where.add_argument('-U', '--unix', type=_path, metavar='FILE', help=(
        'listen on a Unix domain socket with this path'))

    what = parser.add_argument_group('what to serve')
    what.add_argument('words', nargs='*', metavar='file', help=(
        "FileStorage to serve as storage '1'; it is created if need be"
        ' (default: Data.fs, in $INSTANCE_HOME/var if INSTANCE_HOME is set, else here).'
        '  NAME=VALUE sets an environment variable'))
    what.add_argument(
        '-S', '--storage', dest='storages', action='append', default=[], type=_storage,
        metavar='NAME=MODULE:ATTRIBUTE', help=(
            'in place of a file, serve the storage that is an attribute of a module, or is returned'
            ' by it, under this name; MODULE is a dotted name or the path of a file; repeatable'))
    what.add_argument('--blob-dir', type=_path, metavar='DIR', help=(
        "keep the file's blobs in this folder, which is created if need be (default: the file's name"
        ' with .blobs, if there is such a folder; else there are no blobs)'))
    what.add_argument('--read-only', action='store_true', help='refuse everything that writes')

    how = parser.add_argument_group('how to serve')
    how.add_argument(
        '--transaction-timeout', type=_seconds, metavar='SECONDS',
        default=DEFAULT_TRANSACTION_TIMEOUT, help=(
            'give up on a client that has voted and does not go on for so long; 0: never'
            ' (default: %(default)g)'))
    how.add_argument(
        '--invalidation-queue-size', type=_count, metavar='N', default=DEFAULT_QUEUE_SIZE, help=(
            'remember so many transactions, for clients that come back (default: %(default)d)'))
    how.add_argument('--invalidation-age', type=_some_seconds, metavar='SECONDS', help=(
        'for clients that come back later, look up in the storage what changed, as long as that is'
        ' not longer ago than this (default: such clients check their whole cache)'))
    how.add_argument('--client-conflict-resolution', action='store_true', help=(
        'leave the resolution of write conflicts to the clients, which have the classes'))

    process = parser.add_argument_group('the process')
    process.add_argument('-u', '--user', metavar='USER', help=(
        "become this user (name or number) before anything is opened; only root can (default, for"
        " root: 'nobody', if nobody can write the file and its folder)"))
    process.add_argument('-s', '--no-daemon', action='store_true', help=(
        'stay in the foreground (the default)'))
    process.add_argument('-D', '--debug', action='store_true', help=(
        'stay in the foreground and log in detail'))
    process.add_argument('--log', type=_path, metavar='FILE', help=(
        'append the log to this file; SIGHUP reopens it (default: standard error)'))
    process.add_argument('-P', '--profile', type=_path, metavar='FILE', help=(
        'profile all threads and write the result to this file at the end, for the module pstats'))
    process.add_argument('--help', action='help', help='show this text and stop')
    process.add_argument('--version', action='version', version=f'zeo {__version__}', help=(
        'show the version and stop'))
    return parser


# The types of arguments: text in, value out; what is raised names the text and says what to do.

def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text[:6]) <= 65535 and len(text) <= 5):
        raise argparse.ArgumentTypeError(f'{text!r} is no port; give a number from 0 to 65535')
    return int(text)


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and int(text) > 0):
        raise argparse.ArgumentTypeError(f'{text!r} is no number of transactions; give 1 or more')
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f'{text!r} is no number of seconds; give 0 or more')
    return seconds


def _some_seconds(text: str) -> float:
    seconds = _seconds(text)
    if not seconds:
        raise argparse.ArgumentTypeError('0 seconds are too few; give more, or leave the option out')
    return seconds


def _path(text: str) -> str:
    if not text or '\0' in text:
        raise argparse.ArgumentTypeError(f'{text!r} is no file name')
    return text


def _storage(text: str) -> StorageName:
    name, _, place = text.partition('=')
    module, _, attribute = place.rpartition(':')
    if not (name and module and attribute):
        raise argparse.ArgumentTypeError(
            f'{text!r} is not of the form NAME=MODULE:ATTRIBUTE, such as 1=storages:main')
    return StorageName(name, module, attribute)
