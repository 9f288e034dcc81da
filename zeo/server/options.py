"""What is asked of the server: words of a command line and a configuration file in, one `Options` out.

Nothing here touches the machine but to read the configuration file: no user, no socket, no storage.
What can be wrong about the words alone ends the program with status 2 and one line; what is asked for
and cannot be had is found out later, by others, and told with `CannotStart`.
"""

import argparse
import os
import sys
from collections.abc import Mapping
from collections.abc import Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING
from typing import Any
from typing import NamedTuple
from typing import NoReturn

from zeo.server import values
from zeo.server.limits import Limits
from zeo.server.roles import Rule
from zeo.server.values import StorageName
from zeo.version import __version__

if TYPE_CHECKING:
    from ZConfig.components.logger.logger import EventLogFactory

    from zeo.server.configuration import StorageSection

PROGRAM = 'zeo.start'

DEFAULT_TRANSACTION_TIMEOUT = 30.0  # seconds
DEFAULT_QUEUE_SIZE = 100  # transactions
DEFAULT_POLL_INTERVAL = 0.05  # seconds


class CannotStart(Exception):
    """The server cannot be started as asked.

    The text is one line for whoever typed the command: what is wrong, and what to do about it.
    """


_NOTHING: Mapping[str, Any] = MappingProxyType({})


class Options(NamedTuple):
    """What the words and the file say, checked as far as words can be, with defaults filled in."""

    addresses: tuple[tuple[str, int] | str, ...]
    socket_mode: int = values.DEFAULT_SOCKET_MODE
    file: str | None = None  #: as given; see `data_file`
    storages: 'tuple[StorageName | StorageSection, ...]' = ()
    blob_dir: str | None = None  #: as given; see `blob_folder`
    environment: Mapping[str, str] = _NOTHING
    user: str | None = None
    pid_file: str | None = None  #: as given; see `pid_file`
    log: 'str | EventLogFactory | None' = None
    monitor: tuple[str, int] | None = None
    profile: str | None = None
    debug: bool = False
    read_only: bool = False
    transaction_timeout: float | None = DEFAULT_TRANSACTION_TIMEOUT  #: seconds; None: no limit
    invalidation_queue_size: int = DEFAULT_QUEUE_SIZE
    invalidation_age: float | None = None  #: seconds; None: as many as the queue holds
    client_conflict_resolution: bool = False
    blob_sync: bool = True
    poll_interval: float = DEFAULT_POLL_INTERVAL  #: seconds
    tls_certificate: str | None = None  #: this and the next: see `zeo.wire.certificates`
    tls_key: str | None = None
    tls_password_file: str | None = None
    tls_password_function: str | None = None
    tls_authenticate: str | None = None
    limits: Limits = Limits()
    roles: tuple[Rule, ...] = ()
    configuration: str | None = None  #: the file, as given
    #: ``FILE:LINE`` of the values that are from there, by their names; of an address by itself.
    places: Mapping[str, str] = _NOTHING
    notices: tuple[str, ...] = ()  #: what the configuration file has that has no meaning here
    runner: Mapping[str, Any] = _NOTHING  #: keys of <runner>, for zdaemon
    daemon: bool = False
    check: bool = False


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


def pid_file(options: Options, environment: Mapping[str, str]) -> str | None:
    """The absolute path of the file for the number of the process; None if there is to be none."""
    if options.pid_file is not None:
        return os.path.abspath(options.pid_file)
    if (options.daemon or options.configuration) and (home := environment.get('INSTANCE_HOME')):
        return os.path.abspath(os.path.join(home, 'var', 'ZEO.pid'))
    return os.path.abspath('ZEO.pid') if options.daemon else None


def parse(arguments: Sequence[str]) -> Options:
    """Read the command line and the configuration file that it names.

    Ends the program (`SystemExit`) if it asks for help or is wrong.  The environment variables that it
    sets are set if there is a file, which may refer to them.
    """
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

    stated: dict[str, Any] = {'addresses': (), 'sections': (), 'places': {}, 'roles': ()}
    if found.configuration is not None:
        from zeo.server import configuration  # takes a while, and few need it
        os.environ.update(environment)
        try:
            stated |= configuration.read(found.configuration)
        except configuration.Mistake as mistake:
            parser.exit(2, f'{PROGRAM}: {mistake}\n')
    parser.set_defaults(**stated)
    found = parser.parse_intermixed_args(arguments)  # once more: what the file says are the defaults now

    if found.host is not None and found.port is None:
        parser.error('-h says where the port is; give the port with -p')
    if len(files) > 1:
        parser.error(f'more than one file name: {", ".join(files)}; give one, or use -S')
    if files and found.storages:
        parser.error(f'both a file name ({files[0]}) and -S; name the file\'s storage with -S, too')
    storages = found.storages or ([] if files else found.sections)
    if found.blob_dir is not None and storages:
        parser.error('--blob-dir is for a file; a storage that has a name says itself where its blobs are')
    names = [storage.name for storage in storages]
    for name in names:
        if names.count(name) > 1:
            parser.error(f'two storages have the name {name!r}; each -S needs a name of its own')
    if found.configuration is not None and not (storages or files):
        parser.exit(2, f'{PROGRAM}: {found.configuration}: nothing to serve: give a section for each storage,'
                       ' such as <filestorage main>\n')

    addresses: list[tuple[str, int] | str] = []
    if found.port is not None:
        addresses.append(('localhost' if found.host is None else found.host, found.port))
    if found.unix is not None:
        addresses.append(found.unix)
    if not (addresses or found.addresses or os.environ.get('LISTEN_FDS')):
        parser.error('no address to listen on: give a port with -p, a socket file with -U, or both')
    if found.tls_certificate is None:
        if found.tls_key or found.tls_password_file or found.tls_authenticate:
            parser.error('TLS needs a certificate; give it with --tls-certificate')
    elif hasattr(found, 'tls_check_hostname') or hasattr(found, 'tls_server_hostname'):
        parser.error('check-hostname and server-hostname in <ssl> are for clients')
    elif not os.environ.get('LISTEN_FDS') and all(
            isinstance(address, str) for address in addresses or found.addresses):
        parser.error('TLS is spoken at a port, not at a socket file; give a port with -p')

    if found.daemon and not found.debug and found.log is None:
        parser.error('-d leaves the terminal; say with --log which file the log goes to')

    places = {name: place for name, place in stated['places'].items()
              if getattr(found, name, None) == stated.get(name)}
    return Options(**{name: getattr(found, name) for name in Options._fields if hasattr(found, name)} | {
        'addresses': tuple(addresses or found.addresses),
        'storages': tuple(storages),
        'file': files[0] if files else None,
        'environment': environment,
        'places': places,
        'transaction_timeout': found.transaction_timeout or None,
        'limits': Limits(**{name: getattr(found, name) for name in Limits._fields
                            if getattr(found, name) is not None}),
        'roles': tuple(found.role or found.roles),
        'daemon': found.daemon and not found.debug,
    })


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=f'python -m {PROGRAM}',
        usage='%(prog)s [options] [NAME=VALUE ...] [file]',
        description='Serve ZODB storages to other processes and machines.',
        epilog='At least one of -p, -U and -C is needed.  start.txt explains every option with an'
               ' example.  SIGTERM or Ctrl-C ends the server in order, SIGHUP reopens its log file.',
        add_help=False, allow_abbrev=False)

    file = parser.add_argument_group('configuration file')
    file.add_argument('-C', '--configuration', type=values.path, metavar='FILE', help=(
        'read this file (ZConfig) first; options that are given here, too, count here'))
    file.add_argument('--check', action='store_true', help=(
        'only check the options and the file, open nothing; status 2 if something is wrong'))

    where = parser.add_argument_group('where to listen')
    where.add_argument('-p', '--port', type=values.port, metavar='PORT', help=(
        'listen on this TCP port; 0 chooses a free one and logs which'))
    where.add_argument('-h', '--host', metavar='HOST', help=(
        "with -p: listen on this host's addresses; '' is all of this machine, open to others"
        ' (default: the loopback addresses, which only this machine can reach)'))
    where.add_argument('-U', '--unix', type=values.path, metavar='FILE', help=(
        'listen on a Unix domain socket with this path'))
    where.add_argument(
        '--socket-mode', type=values.mode, metavar='MODE', default=values.DEFAULT_SOCKET_MODE, help=(
            'with -U: who may connect, as permissions of the socket file in octal digits (default: 660,'
            " the server's user and group)"))

    what = parser.add_argument_group('what to serve')
    what.add_argument('words', nargs='*', metavar='file', help=(
        "FileStorage to serve as storage '1'; it is created if need be"
        ' (default: Data.fs, in $INSTANCE_HOME/var if INSTANCE_HOME is set, else here).'
        '  NAME=VALUE sets an environment variable'))
    what.add_argument(
        '-S', '--storage', dest='storages', action='append', default=[], type=values.storage,
        metavar='NAME=MODULE:ATTRIBUTE', help=(
            'in place of a file, serve the storage that is an attribute of a module, or is returned'
            ' by it, under this name; MODULE is a dotted name or the path of a file; repeatable'))
    what.add_argument('--blob-dir', type=values.path, metavar='DIR', help=(
        "keep the file's blobs in this folder, which is created if need be (default: the file's name"
        ' with .blobs, if there is such a folder; else there are no blobs)'))
    what.add_argument(
        '--read-only', action=argparse.BooleanOptionalAction, help=(
            'refuse everything that writes'))

    how = parser.add_argument_group('how to serve')
    how.add_argument(
        '--transaction-timeout', type=values.seconds, metavar='SECONDS',
        default=DEFAULT_TRANSACTION_TIMEOUT, help=(
            'give up on a client that has voted and does not go on for so long; 0: never'
            ' (default: %(default)g)'))
    how.add_argument(
        '--invalidation-queue-size', type=values.count, metavar='N', default=DEFAULT_QUEUE_SIZE, help=(
            'remember so many transactions, for clients that come back (default: %(default)d)'))
    how.add_argument('--invalidation-age', type=values.some_seconds, metavar='SECONDS', help=(
        'for clients that come back later, look up in the storage what changed, as long as that is'
        ' not longer ago than this (default: such clients check their whole cache)'))
    how.add_argument(
        '--client-conflict-resolution', action=argparse.BooleanOptionalAction, help=(
            'leave the resolution of write conflicts to the clients, which have the classes'))
    how.add_argument('--blob-sync', action=argparse.BooleanOptionalAction, help=(
        'have blobs on the disk before their transaction is answered (the default); --no-blob-sync leaves it to'
        ' the system when they get there'))
    how.add_argument(
        '--poll-interval', type=values.some_seconds, metavar='SECONDS', default=DEFAULT_POLL_INTERVAL, help=(
            'look so often for transactions of other servers, if the storage is a database that they share'
            ' (default: %(default)g)'))

    tls = parser.add_argument_group('TLS, at addresses with a port')
    tls.add_argument('--tls-certificate', type=values.path, metavar='FILE', help=(
        "speak TLS, with the certificate in this file (PEM), and those between it and its authority"
        " (default: no TLS)"))
    tls.add_argument('--tls-key', type=values.path, metavar='FILE', help=(
        'the private key is in this file (default: in that of the certificate)'))
    tls.add_argument('--tls-password-file', type=values.path, metavar='FILE', help=(
        "the key's password is the first line of this file (default: it has none)"))
    tls.add_argument('--tls-authenticate', type=values.path, metavar='FILE', help=(
        'demand a certificate of clients: one that is in this file, or in a file of this folder, or is signed'
        ' by one there (default: everybody is served)'))

    who = parser.add_argument_group('who may do what')
    who.add_argument(
        '--role', action='append', default=[], type=values.role, metavar='ROLE=WHO', help=(
            'who connects to this address (of those that are listened on), or with WHO = cn:NAME shows a'
            ' certificate with this name, may read, or also write, or also pack and undo (admin);'
            ' repeatable (default: everybody may do everything)'))
    who.add_argument('--max-connections', type=values.connections, metavar='N', help=(
        'accept so many connections at a time (default: 5000, or 100 less than the files that may be open)'))
    who.add_argument('--max-connections-per-address', type=values.connections, metavar='N', help=(
        'accept so many connections from one address, not counting Unix domain sockets (default: no limit)'))
    who.add_argument('--max-message', type=values.message_size, metavar='SIZE', help=(
        'a message, and so the record of an object, may have so many bytes; KB, MB and GB can be given'
        ' (default: 1GB)'))
    who.add_argument('--max-transaction', type=values.size, metavar='SIZE', help=(
        'a transaction may have so many bytes, with its blobs (default: 32GB)'))
    who.add_argument('--registration-timeout', type=values.some_seconds, metavar='SECONDS', help=(
        'disconnect who has not introduced himself so long after he has connected (default: 30)'))
    who.add_argument('--idle-timeout', type=values.some_seconds, metavar='SECONDS', help=(
        'disconnect who says nothing for so long; clients say something every minute (default: never)'))

    process = parser.add_argument_group('the process')
    process.add_argument('-u', '--user', metavar='USER', help=(
        "become this user (name or number) before anything is opened; only root can (default, for"
        " root: 'nobody', if nobody can write the file and its folder)"))
    process.add_argument('-d', '--daemon', action='store_true', help=(
        'go into the background once it is ready, and be looked after by zdaemon there (extra daemon)'))
    process.add_argument('-s', '--no-daemon', dest='daemon', action='store_false', default=False, help=(
        'stay in the foreground (the default)'))
    process.add_argument('--pid-file', type=values.path, metavar='FILE', help=(
        'write the number of the process to this file, while the server is ready (default: none; with -d'
        ' or -C: ZEO.pid in $INSTANCE_HOME/var, if INSTANCE_HOME is set; else with -d: ZEO.pid here)'))
    process.add_argument('-D', '--debug', action='store_true', help=(
        'stay in the foreground and log in detail'))
    process.add_argument('--log', type=values.path, metavar='FILE', help=(
        'append the log to this file; SIGHUP reopens it (default: standard error)'))
    process.add_argument('--monitor', type=values.monitor, metavar='[HOST:]PORT', help=(
        'tell how the server is at this address: a page for browsers, /healthz, and /metrics for'
        ' Prometheus (HOST is this machine only, unless it is given)'))
    process.add_argument('-P', '--profile', type=values.path, metavar='FILE', help=(
        'profile all threads and write the result to this file at the end, for the module pstats'))
    process.add_argument('--help', action='help', help='show this text and stop')
    process.add_argument('--version', action='version', version=f'zeo {__version__}', help=(
        'show the version and stop'))
    parser.set_defaults(read_only=False, client_conflict_resolution=False, blob_sync=True)
    return parser
