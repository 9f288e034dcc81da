"""Pack storages on servers: ``python -m zeo.pack ADDRESS``, see the README."""

import argparse
import math
import sys
import threading
import time
from collections.abc import Sequence
from datetime import datetime

from zeo import commands
from zeo.client.dialing import Address
from zeo.client.dialing import Security
from zeo.client.dialing import display
from zeo.commands import Failure
from zeo.errors import ClientDisconnected

PROGRAM = 'zeo.pack'

#: Seconds between two looks at how far a pack is.
INTERVAL = 0.3


def main(arguments: Sequence[str] | None = None) -> int:
    """Pack one storage after the other; returns the exit status (`SystemExit` for usage errors)."""
    parser = _parser()
    found = parser.parse_intermixed_args(commands.arguments_or_argv(arguments))
    addresses = found.addresses + parser.server_options(found)
    if not addresses:
        parser.error('no server is named: give its address')
    pack_time = time.time() - 86400 * (found.days or 0) if found.at is None else found.at
    failures = []

    def pack_all() -> None:
        security = commands.security(found)
        with commands.interruption() as stop:
            for where in addresses:
                for storage in found.storages or ['1']:
                    if stop.is_set():
                        raise Failure(f'{display(where)}, storage {storage}: not packed')
                    try:
                        pack(where, storage, pack_time, stop, found.force, security)
                    except (Failure, ClientDisconnected) as error:
                        failures.append(error)
                        commands.complain(PROGRAM, commands.in_words(error))

    return commands.run(PROGRAM, pack_all) or bool(failures)


def pack(where: Address, storage: str, pack_time: float, stop: threading.Event, force: bool,
         security: Security | None = None) -> None:
    """Pack one storage and tell what came of it; raises `Failure`.

    When ``stop`` is set the server is asked to stop the pack, which then has changed nothing.
    """
    title = f'{display(where)}, storage {storage}'
    client = commands.connect(where, storage, PROGRAM, security)
    try:
        before = client.info()['size']
        figures = client.figures()
        if figures is not None:
            room = figures['storages'][storage]['room']
            if room is not None and room < before and not force:
                raise Failure(
                    f'{title}: a pack may need {commands.size(before)} on the disk of the server, which has'
                    f' {commands.size(room)} left; make room, or pack nevertheless with --force')
        began = time.monotonic()
        _Pack(client, storage, pack_time).wait(title, before, stop)
        after = client.info()['size']
    finally:
        client.close()
    saved = f'{100 * (before - after) / before:.0f} % less' if after < before else 'nothing to remove'
    print(f'{title}: {commands.size(before)} before, {commands.size(after)} after ({saved}),'
          f' {commands.duration(time.monotonic() - began)}', flush=True)


class _Pack:
    """A pack in progress: a thread waits for its end, while another may look how far it is."""

    def __init__(self, client: commands.Client, storage: str, pack_time: float) -> None:
        self._client = client
        self._storage = storage
        self._time = pack_time
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name='zeo pack', daemon=True)

    def _run(self) -> None:
        try:
            self._client.pack(self._time)
        except BaseException as error:
            self._error = error

    def wait(self, title: str, total: int, stop: threading.Event) -> None:
        """Until it has ended; raises `Failure` if it did not succeed."""
        self._thread.start()
        with commands.Progress(f'packing {title}', total if self._client.offers('figures') else None) as bar:
            while self._thread.is_alive():
                try:
                    if stop.is_set() and not self._client.stop_pack():
                        self._thread.join(INTERVAL)
                        if self._thread.is_alive() and not self._progresses():
                            raise Failure(f'{title}: this server cannot stop a pack; it goes on there')
                    self._show(bar, total)
                except ClientDisconnected:
                    pass  # so says the thread
                self._thread.join(INTERVAL)
        if self._error is None:
            return
        if isinstance(self._error, ClientDisconnected):
            raise Failure(f'{title}: the connection was lost; the pack may go on there'
                          f' ({commands.in_words(self._error)})')
        words = commands.in_words(self._error)
        named = f'storage {self._storage} '  # which is in the title, too
        raise Failure(title.removesuffix(named.rstrip()) + words if words.startswith(named) else f'{title}: {words}')

    def _progresses(self) -> bool:
        """Whether the server is of a kind that can stop a pack, and this pack is of one."""
        figures = self._client.figures()
        running = figures and figures['storages'][self._storage]['pack']
        return bool(figures) and (running is None or running['share'] is not None)

    def _show(self, bar: commands.Progress, total: int) -> None:
        figures = self._client.figures()
        progress = figures and figures['storages'][self._storage]['pack']
        if progress:
            bar.at((progress['share'] or 0.0) * total, progress['phase'])
        else:
            bar.at(0)


def _parser() -> commands.Parser:
    parser = commands.Parser(
        PROGRAM, usage='%(prog)s [options] ADDRESS ...',
        description='Remove old revisions and garbage from storages on servers, and wait for the end.',
        epilog='Ctrl-C stops a pack; the database is then as it was.')
    parser.add_argument('addresses', nargs='*', metavar='ADDRESS', type=commands.address, help=(
        'of a server: host:port, :port for this machine, or the path of a socket file'))
    parser.add_server_options()
    parser.add_tls_options()
    what = parser.add_argument_group('what to pack')
    what.add_argument('-S', '--storage', dest='storages', action='append', metavar='NAME', help=(
        'the storage to pack; repeatable (default: 1)'))
    when = what.add_mutually_exclusive_group()
    when.add_argument('--days', type=_days, metavar='N', help=(
        'keep what was current at any time in the last N days (default: 0)'))
    when.add_argument('--at', type=_time, metavar='TIME', help=(
        'keep what was current at this time or later, such as 2030-12-31 or "2030-12-31 23:59:59"'))
    what.add_argument('--force', action='store_true', help=(
        'pack even if the disk of the server may be too small'))
    return parser


def _days(text: str) -> float:
    try:
        days = float(text)
    except ValueError:
        days = math.nan
    if not 0 <= days <= 36500:
        raise argparse.ArgumentTypeError(f'{text!r} is no number of days; give 0 or more')
    return days


def _time(text: str) -> float:
    try:
        seconds = datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError):
        seconds = math.nan
    if not 0 <= seconds <= time.time():
        raise argparse.ArgumentTypeError(
            f'{text!r} is no time in the past; give it like 2020-12-31 or "2020-12-31 23:59:59"')
    return seconds


if __name__ == '__main__':
    sys.exit(main())
