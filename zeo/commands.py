"""What the commands for those who look after a server have in common.

Addresses and options are written as for ``zeo.start``.  The exit status is 0 if all went well, 1 if
something could not be done, 2 if the command line is wrong; with 1 and 2 there is one line on standard
error for each thing that went wrong.
"""

import argparse
import contextlib
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from typing import NoReturn

from ZODB.FileStorage.format import CorruptedError
from ZODB.POSException import POSError

from zeo import programs
from zeo.client.dialing import Address
from zeo.client.dialing import Security
from zeo.client.dialing import display
from zeo.client.dialing import parse_addresses
from zeo.client.probe import probe
from zeo.ClientStorage import ClientStorage
from zeo.errors import ClientDisconnected
from zeo.errors import ServerException
from zeo.version import __version__
from zeo.wire.methods import EXTENSIONS

#: Seconds to wait for a server that does not answer.
PATIENCE = 10.0


class Failure(Exception):
    """What was asked for cannot be done.  The text is one line for whoever typed the command."""


@dataclass(frozen=True)
class Server:
    """A server, where something else could be named, too."""

    address: Address


class Parser(argparse.ArgumentParser):
    """A command line with the options that all commands share."""

    def __init__(self, program: str, **options: Any) -> None:
        super().__init__(prog=f'python -m {program}', add_help=False, allow_abbrev=False, **options)
        self.program = program
        self._common = common = self.add_argument_group('about this command')
        common.add_argument('--help', action='help', help='show this text and stop')
        common.add_argument('--version', action='version', version=f'zeo {__version__}', help=(
            'show the version and stop'))

    def format_help(self) -> str:
        """What all programs have comes last."""
        self._action_groups.sort(key=lambda group: group is self._common)
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        """One line, and where to read on."""
        self.exit(2, f'{self.program}: {" ".join(message.split())} (--help shows all options)\n')

    def add_server_options(self, title: str = 'where the server is') -> None:
        """``-p``, ``-h`` and ``-U``, which are another way to write an address."""
        where = self.add_argument_group(title)
        where.add_argument('-p', '--port', type=_port, metavar='PORT', help='its TCP port')
        where.add_argument('-h', '--host', metavar='HOST', help=(
            'with -p: the name or address of its machine (default: this one)'))
        where.add_argument('-U', '--unix', metavar='FILE', help='its Unix domain socket')

    def server_options(self, found: argparse.Namespace) -> list[Address]:
        """The addresses that were given with ``-p``, ``-h`` and ``-U``."""
        if found.host is not None and found.port is None:
            self.error('-h says where the port is; give the port with -p')
        addresses: list[Address] = []
        if found.port is not None:
            addresses.append((found.host or 'localhost', found.port))
        if found.unix is not None:
            addresses.append(found.unix)
        return addresses


    def add_tls_options(self) -> None:
        """Those with which `security` is made; they are called as those of the server."""
        tls = self.add_argument_group('TLS, with servers that have a port')
        tls.add_argument('--tls', action='store_true', help=(
            'speak TLS; implied by the following (default: do not)'))
        tls.add_argument('--tls-authenticate', metavar='FILE', help=(
            'the certificate of the server, or of the authority that has signed it, is in this file, or in a'
            ' file of this folder (default: authorities that this machine trusts)'))
        tls.add_argument('--tls-hostname', metavar='NAME', help=(
            "the name in the server's certificate (default: that in the address)"))
        tls.add_argument('--tls-certificate', metavar='FILE', help=(
            'the certificate to show to the server (PEM), if it asks for one'))
        tls.add_argument('--tls-key', metavar='FILE', help=(
            'its private key (default: in the same file)'))
        tls.add_argument('--tls-password-file', metavar='FILE', help=(
            "the key's password is the first line of this file"))


def security(found: argparse.Namespace) -> Security | None:
    """What the options say about TLS; raises `Failure` if a file cannot be used."""
    options = {
        'authenticate': found.tls_authenticate, 'certificate': found.tls_certificate, 'key': found.tls_key,
        'password_file': found.tls_password_file}
    if not (found.tls or found.tls_hostname or any(options.values())):
        return None
    from zeo.wire import certificates  # who does without does not load OpenSSL

    try:
        return Security(certificates.client_context(**options), found.tls_hostname)
    except certificates.Unusable as error:
        raise Failure(f'TLS: {error}') from None


def address(text: str) -> Address:
    """``host:port``, ``:port`` for this machine, ``[address]:port``, or the path of a socket file."""
    host, colon, port = text.rpartition(':')
    try:
        if colon and '/' not in text and port.isascii() and port.isdigit():
            inner = host.removeprefix('[').removesuffix(']')
            if (':' in inner) != (inner != host):
                raise ValueError
            return parse_addresses((inner, int(port)))[0]
        return parse_addresses(text)[0]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f'{text!r} is no address; give host:port, :port for this machine,'
            ' or the path of a socket file') from None


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and 0 < int(text) <= 65535):
        raise argparse.ArgumentTypeError(f'{text!r} is no port; give a number from 1 to 65535')
    return int(text)


def run(program: str, command: Callable[[], None]) -> int:
    """Run a command to its end; returns the exit status."""
    programs.begun()
    for name in ('zeo', 'ZODB'):
        logging.getLogger(name).addHandler(logging.NullHandler())  # what matters is raised
    try:
        command()
        sys.stdout.flush()
    except KeyboardInterrupt:
        complain(program, 'stopped')
        return 1
    except BrokenPipeError:  # by `head`, say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Failure, POSError, CorruptedError, OSError) as error:
        complain(program, in_words(error))
        return 1
    return 0


def complain(program: str, text: str) -> None:
    print(f'{program}: {text}', file=sys.stderr, flush=True)


def in_words(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, OSError) and error.strerror:
        text = f'{error.filename}: {error.strerror}' if error.filename else error.strerror
    elif isinstance(error, ServerException) and isinstance(error.value, tuple) and error.value:
        text = ', '.join(map(str, error.value))  # without the name of a class in the server
    else:
        text = str(error) or type(error).__name__
    return ' '.join(re.sub(r'\[Errno -?\d+\] ', '', text).split())  # numbers that are inside of other texts


# ---- servers -------------------------------------------------------------------------


class Client(ClientStorage):
    """A storage on a server, with what only those want to know who look after it."""

    def info(self) -> dict[str, Any]:
        """What the server says about the storage now."""
        info: dict[str, Any] = self._call('get_info')
        return info

    def offers(self, extension: str) -> bool:
        return extension in self._info.get(EXTENSIONS, ())

    def figures(self) -> dict[str, Any] | None:
        """What the server tells about itself (`zeo.server.figures`); None if it is of another make."""
        told: dict[str, Any] | None = self._call('figures') if self.offers('figures') else None
        return told

    @contextlib.contextmanager
    def answered_in_time(self, where: str) -> Iterator[None]:
        """Calls may take `PATIENCE` seconds meanwhile; if they take longer it is closed, and raises `Failure`.

        The kernel keeps the connection of a stopped process alive; to find that out otherwise takes minutes.
        """
        late = threading.Event()

        def give_up() -> None:
            late.set()
            self.close()

        timer = threading.Timer(PATIENCE, give_up)
        timer.daemon = True
        timer.start()
        try:
            yield
        except ClientDisconnected:
            if not late.is_set():
                raise
            raise Failure(f'{where}: the server does not answer within {PATIENCE:g} seconds: it is stopped,'
                          ' hangs, or is out of reach') from None
        finally:
            timer.cancel()
            timer.join()

    def stop_pack(self) -> bool:
        """Have the pack in progress stopped, if that is possible."""
        return self.offers('figures') and bool(self._call('stop_pack'))


def check_storage(where: Address, storage: str, names: Iterable[str]) -> None:
    """Raise `Failure` if the storage is not one of those that the server has."""
    if storage not in (names := list(names)):
        raise Failure(f'{display(where)}: there is no storage {storage} here, but {", ".join(names)};'
                      ' name one of these with -S')


def connect(where: Address, storage: str, program: str, security: Security | None = None,
            **options: Any) -> Client:
    """Open a storage on a server; raises `Failure` if that is not possible."""
    # First, as a client would go on asking, in case the server is just starting.
    check_storage(where, storage, probe(where, PATIENCE, security))
    defaults: dict[str, Any] = {
        'wait_timeout': PATIENCE, 'client_label': program, 'cache_size': 1024 * 1024}
    if security is not None:
        defaults['ssl'], defaults['ssl_server_hostname'] = security
    try:
        return Client(where, storage, **(defaults | options))
    except Exception as error:
        raise Failure(f'{display(where)}: {in_words(error)}') from None


# ---- for people to read -----------------------------------------------------------------


def size(number: float | None) -> str:
    """So many bytes, in three or four digits."""
    if number is None:
        return '?'
    units = iter(['B', 'kB', 'MB', 'GB', 'TB'])
    unit = next(units)
    while abs(number) >= 1000 and unit != 'TB':
        number, unit = number / 1000, next(units)
    return f'{number:.0f} B' if unit == 'B' else f'{number:.1f} {unit}'


def duration(seconds: float) -> str:
    """A time span, in its two largest units."""
    if seconds < 60:
        return f'{max(seconds, 0):.1f} s'
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f'{days} d {hours} h'
    return f'{hours} h {minutes} min' if hours else f'{minutes} min {seconds} s'


class Progress:
    """How far something is, on standard error: a bar on a terminal if there is tqdm, else lines.

    ``total`` is None if nobody knows how much there is to do.
    """

    #: A line is written after so many seconds at the earliest.
    PAUSE = 5.0

    #: Of a bar.  What is done in bytes is left out, so that there is room for it on a narrow terminal, too.
    FORMAT = '{desc}: {percentage:3.0f} % |{bar}| {rate_fmt}, {remaining} left{postfix}'

    def __init__(self, title: str, total: int | None, unit: str = 'B') -> None:
        self._title = title
        self._total = total
        self._unit = unit
        self._bar: Any = None
        self._began = self._told = time.monotonic()
        if sys.stderr.isatty():
            with contextlib.suppress(ImportError):
                from tqdm import tqdm

                self._bar = tqdm(desc=title, total=total, unit=unit, unit_scale=True, leave=False,
                                 bar_format=None if total is None else self.FORMAT)

    def at(self, done: float, note: str = '') -> None:
        """So much is done of the total; a note says what is being done."""
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(done - self._bar.n)
            return
        now = time.monotonic()
        if now - self._told < self.PAUSE:
            return
        self._told = now
        if self._total:
            text = f'{100 * done / self._total:.0f} %'
            if done:
                text += f', about {duration((now - self._began) * (self._total - done) / done)} left'
        else:
            text = size(done) if self._unit == 'B' else f'{done:.0f}'
        print(f'{self._title}: {text}{f" ({note})" if note else ""}', file=sys.stderr, flush=True)

    def __enter__(self) -> 'Progress':
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()


@contextlib.contextmanager
def interruption() -> Iterator[threading.Event]:
    """Meanwhile Ctrl-C and SIGTERM set the event, in place of ending the program anywhere."""
    asked = threading.Event()
    signals = signal.SIGINT, signal.SIGTERM
    before = [signal.signal(number, lambda *_: asked.set()) for number in signals]
    try:
        yield asked
    finally:
        for number, handler in zip(signals, before):
            signal.signal(number, handler)


def arguments_or_argv(arguments: Sequence[str] | None) -> Sequence[str]:
    return sys.argv[1:] if arguments is None else arguments
