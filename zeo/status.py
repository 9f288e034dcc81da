"""How servers are: ``python -m zeo.status ADDRESS``, see the README."""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

from persistent.TimeStamp import TimeStamp

from zeo import commands
from zeo.client.dialing import Address
from zeo.client.dialing import Security
from zeo.client.dialing import display
from zeo.client.probe import probe
from zeo.commands import Failure
from zeo.errors import ClientDisconnected

PROGRAM = 'zeo.status'

#: What is counted, and its name when it is told per second.
RATES = {'loads': 'loads_per_second', 'stores': 'stores_per_second', 'commits': 'commits_per_second'}

#: Go to the upper left corner, and erase what is right of the cursor, and below it.
_HOME, _REST_OF_LINE, _REST_OF_SCREEN = '\033[H', '\033[K', '\033[J'


def main(arguments: Sequence[str] | None = None) -> int:
    """Tell how servers are; returns the exit status (`SystemExit` for usage errors)."""
    parser = _parser()
    found = parser.parse_intermixed_args(commands.arguments_or_argv(arguments))
    addresses = found.addresses + parser.server_options(found)
    if not addresses:
        parser.error('no server is named: give its address')
    if found.watch:
        return commands.run(PROGRAM, lambda: _watch(
            [_Server(where, found.storages, commands.security(found)) for where in addresses],
            found.interval, found.json))
    failed = []

    def tell() -> None:
        security = commands.security(found)
        told = {}
        for where in addresses:
            with _Server(where, found.storages, security) as server:
                try:
                    told[display(where)] = server.rates(found.interval)
                except (Failure, ClientDisconnected) as error:
                    failed.append(error)
                    commands.complain(PROGRAM, commands.in_words(error))
        if found.json:
            print(json.dumps(told, indent=2))
        elif told:
            print('\n\n'.join('\n'.join(table(where, each)) for where, each in told.items()))

    return commands.run(PROGRAM, tell) or bool(failed)


def _watch(servers: Sequence['_Server'], interval: float, as_json: bool) -> None:
    """Tell again and again, in place if on a terminal, until Ctrl-C."""
    in_place = sys.stdout.isatty() and not as_json
    with commands.interruption() as stop:
        try:
            while not stop.is_set():
                told: dict[str, Any] = {}
                lines: list[str] = []
                for server in servers:
                    where = server.where
                    try:
                        told[where] = server.rates(0)
                        lines += [*table(where, told[where]), '']
                    except (Failure, ClientDisconnected) as error:
                        told[where] = {'error': commands.in_words(error)}
                        lines += [f'{where}: {commands.in_words(error)}', '']
                if as_json:
                    print(json.dumps(told), flush=True)
                elif in_place:
                    print(_HOME + '\n'.join(line + _REST_OF_LINE for line in lines) + _REST_OF_SCREEN,
                          end='', flush=True)
                else:
                    print('\n'.join(lines), flush=True)
                stop.wait(interval)
        finally:
            for server in servers:
                server.close()


class _Server:
    """A server that is asked, perhaps several times; between two times the connection is kept."""

    def __init__(self, where: Address, wanted: Sequence[str], security: Security | None) -> None:
        self.where = display(where)
        self._where = where
        self._wanted = wanted  # storages; none: all
        self._security = security
        self._client: commands.Client | None = None
        self._last: dict[str, Any] | None = None
        self._names: tuple[str, ...] = ()

    def rates(self, interval: float) -> dict[str, Any]:
        """The figures, with what was counted per second since the last time, or in the next seconds."""
        if self._last is None:
            self._last = self._figures()
            if interval:
                time.sleep(interval)
            else:
                return self._last
        before, now = self._last, self._figures()
        self._last = now
        seconds = now['now'] - before['now']
        for name, storage in now['storages'].items():
            earlier = before['storages'].get(name)
            # A server that was started again counts from zero.
            if earlier is not None and seconds > 0 and earlier['start'] == storage['start']:
                for count, rate in RATES.items():
                    storage[rate] = (storage[count] - earlier[count]) / seconds
        return now

    def _figures(self) -> dict[str, Any]:
        told = self._all_figures()
        if self._wanted:
            told['storages'] = {name: told['storages'][name] for name in self._wanted}
        return told

    def _all_figures(self) -> dict[str, Any]:
        """What a server tells about itself; of another make it tells less."""
        try:
            if self._client is None:
                self._names = tuple(probe(self._where, commands.PATIENCE, self._security))
                for name in self._wanted:
                    commands.check_storage(self._where, name, self._names)
                # Read only: that is served in any case, and cannot do any harm.
                self._client = commands.connect(
                    self._where, self._names[0], PROGRAM, self._security, read_only=True)
            with self._client.answered_in_time(self.where):
                figures = self._client.figures()
            if figures is not None:
                return figures
            storages: dict[str, Any] = probe(self._where, commands.PATIENCE, self._security)
            told = {'version': None, 'now': time.time(), 'storages': storages}
            # Sizes are told to those who use the storage.
            with self._client.answered_in_time(self.where):
                info = self._client.info()
            storages[self._names[0]].update(size=info['size'], length=info['length'])
            return told
        except Exception:
            self.close()  # and look for it anew the next time
            raise

    def close(self) -> None:
        client, self._client, self._last = self._client, None, None
        if client is not None:
            client.close()

    def __enter__(self) -> '_Server':
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


# ---- for people to read ----------------------------------------------------------------


def table(where: str, figures: dict[str, Any]) -> Iterator[str]:
    """The lines that show a server's figures."""
    version = figures['version']
    yield f'{where}: ' + (f'zeo {version}' if version else 'a server of another make, which tells less')
    for name, storage in figures['storages'].items():
        yield ''
        yield from _storage(name, storage, figures['now'])


def _storage(name: str, storage: dict[str, Any], now: float) -> Iterator[str]:
    length = storage.get('length')
    yield (f'storage {name}: {commands.size(storage.get("size"))},'
           f' {"?" if length is None else length} objects, since {storage["start"]}')
    yield f'  last commit    {_last(storage["last-transaction"])}'
    for count in ('loads', 'stores', 'commits'):
        rate = storage.get(RATES[count])
        yield f'  {count:<14} {storage[count]}' + ('' if rate is None else f', {rate:.1f} per second')
    yield (f'  conflicts      {storage["conflicts"]}, {storage["conflicts_resolved"]} resolved;'
           f' {storage["aborts"]} aborts')
    yield f'  commit lock    {_lock(storage, now)}'
    if storage.get('pack'):
        pack = storage['pack']
        share = '' if pack['share'] is None else f'{100 * pack["share"]:.0f} %, '
        yield f'  pack           {share}{pack["phase"]}, for {commands.duration(now - pack["since"])}'
    clients = storage.get('clients')
    if clients is None:
        yield f'  clients        {storage["connections"]}'
        return
    yield f'  clients        {len(clients)}'
    rows = [('', 'address', 'label', 'connected', 'bytes in', 'bytes out', 'unread', 'lag')]
    rows += [('', each['address'], each['label'] or '-', commands.duration(now - each['since']),
              commands.size(each['received']), commands.size(each['sent']), commands.size(each['unsent']),
              str(each['behind'])) for each in clients]
    if clients:
        widths = [max(map(len, column)) for column in zip(*rows)]
        for row in rows:
            yield '  '.join(text.ljust(width) for text, width in zip(row, widths)).rstrip()


def _lock(storage: dict[str, Any], now: float) -> str:
    holder = storage.get('holder')
    if holder is not None:
        text = f'held by {holder["client"]} for {commands.duration(now - holder["since"])}'
    elif 'holder' not in storage and storage['lock_time']:
        text = f'held for {commands.duration(now - storage["lock_time"])}'
    else:
        text = 'free'
    queue = storage.get('queue')
    if queue:
        text += f'; waiting: {", ".join(queue)}'
    elif storage['waiting']:
        text += f'; {storage["waiting"]} waiting'
    return text


def _last(tid: str) -> str:
    raw = bytes.fromhex(tid)
    if not any(raw):
        return 'none'
    seconds = time.localtime(TimeStamp(raw).timeTime())
    return f'{time.strftime("%Y-%m-%d %H:%M:%S", seconds)} ({tid})'


def _parser() -> commands.Parser:
    parser = commands.Parser(
        PROGRAM, usage='%(prog)s [options] ADDRESS ...',
        description='Show how servers are: their storages, clients, commit lock, and packs.')
    parser.add_argument('addresses', nargs='*', metavar='ADDRESS', type=commands.address, help=(
        'of a server: host:port, :port for this machine, or the path of a socket file'))
    parser.add_server_options()
    parser.add_tls_options()
    how = parser.add_argument_group('what to show, and how')
    how.add_argument('-S', '--storage', dest='storages', action='append', default=[], metavar='NAME', help=(
        'show only this storage; repeatable (default: all)'))
    how.add_argument('--json', action='store_true', help='for programs; with --watch, one line each time')
    how.add_argument('--watch', action='store_true', help='refresh in place until Ctrl-C')
    how.add_argument('--interval', type=_seconds, metavar='SECONDS', default=1.0, help=(
        'how long loads and commits per second are counted; with --watch, between two looks'
        ' (default: %(default)g)'))
    return parser


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f'{text!r} is no number of seconds; give 0.1 or more')
    return seconds


if __name__ == '__main__':
    sys.exit(main())
