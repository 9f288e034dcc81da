"""A PostgreSQL of one's own, in a temporary folder, and zeo servers over it, each as on a host of its own.

A `Cluster` is one PostgreSQL server with any number of databases.  It listens on a Unix socket only, and
runs as another user if this is root, whom PostgreSQL refuses.  A `Host` is a zeo server whose configuration
file has a ``<relstorage>`` section.  Nothing here sleeps.
"""

import contextlib
import glob
import importlib.util
import itertools
import os
import pwd
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.system.servers import PATIENCE, Server, Storage, until

__all__ = ['Cluster', 'Host', 'HostPool', 'hosts', 'open_directly', 'relstorage', 'why_not']

#: A database with RelStorage's tables and nothing in them, which new ones are copied from.
TEMPLATE = 'zeo_template'


def programs() -> str | None:
    """The folder with PostgreSQL's programs: that of the path, or where Debian and others put them."""
    found = shutil.which('initdb')
    if found and shutil.which('postgres', path=os.path.dirname(found)):
        return os.path.dirname(found)
    places = [os.path.dirname(path) for pattern in ('/usr/lib/postgresql/*/bin', '/usr/pgsql-*/bin',
                                                    '/usr/local/pgsql/bin', '/opt/homebrew/opt/postgresql*/bin')
              for path in glob.glob(f'{pattern}/initdb')
              if os.path.exists(os.path.join(os.path.dirname(path), 'postgres'))]
    return max(places, key=lambda place: [int(number) for number in re.findall(r'\d+', place)], default=None)


def why_not() -> str | None:
    """The reason why there can be no PostgreSQL here; None if there can."""
    for module in 'relstorage', 'psycopg2':
        if importlib.util.find_spec(module) is None:
            return f'{module} is not installed'
    if programs() is None:
        return 'PostgreSQL is not installed'
    if os.geteuid() == 0 and _user() is None:
        return 'this is root, whom PostgreSQL refuses, and there is no user nobody'
    return None


def _user() -> pwd.struct_passwd | None:
    """Who is to run PostgreSQL if this is root."""
    for name in 'postgres', 'nobody':
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    return None


class Cluster:
    """One PostgreSQL server; its data are removed in the end.

    ``durable``: what is committed is forced to the disk, as it is in real life.  `kill` loses nothing even
    without, since the system goes on.
    """

    def __init__(self, durable: bool = False, **settings: Any) -> None:
        place = programs()
        assert place is not None, why_not()
        self._programs = place
        self.folder = tempfile.mkdtemp(prefix='zeo-pg-')
        self._data = os.path.join(self.folder, 'data')
        self._log = Path(self.folder, 'log')
        self._identity: dict[str, Any] = {}
        if os.geteuid() == 0:
            user = _user()
            assert user is not None
            os.chown(self.folder, user.pw_uid, user.pw_gid)
            os.chmod(self.folder, 0o755)    # its socket is for everybody
            self._identity = {'user': user.pw_uid, 'group': user.pw_gid, 'extra_groups': []}
        self._settings = {
            'listen_addresses': '', 'unix_socket_directories': self.folder, 'max_connections': 500,
            'shared_buffers': '32MB', 'fsync': durable, 'full_page_writes': durable, 'jit': False,
            'max_wal_senders': 2, 'lc_messages': 'C', 'logging_collector': False,
        } | settings
        self.process: subprocess.Popen[bytes] | None = None
        self._names = map('zeo_{}'.format, itertools.count(1))
        self._environment = {'PATH': os.environ.get('PATH', os.defpath), 'LC_ALL': 'C'}
        try:
            self._run('initdb', '-D', self._data, '-U', 'postgres', '-A', 'trust', '-E', 'UTF8', '--locale=C',
                      '--no-sync', '--no-instructions')
        except BaseException:
            self.close()
            raise

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run([os.path.join(self._programs, program), *arguments], cwd=self.folder,
                              env=self._environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, timeout=PATIENCE, text=True, **self._identity)
        assert done.returncode == 0, done.stdout

    # -- the server

    def start(self) -> 'Cluster':
        """Start, wait until it answers."""
        assert self.process is None, 'it is running already'
        settings = [part for name, value in self._settings.items()
                    for part in ('-c', f'{name}={value}')]
        with open(self._log, 'ab') as log:
            self.process = subprocess.Popen(
                [os.path.join(self._programs, 'postgres'), '-D', self._data, *settings], cwd=self.folder,
                env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **self._identity)
        until(self._answers, f'PostgreSQL answers; its log ends:\n{self.log()}')
        return self

    def _answers(self) -> bool:
        import psycopg2

        assert self.process is not None
        assert self.process.poll() is None, f'PostgreSQL ended:\n{self.log()}'
        try:
            psycopg2.connect(self.dsn('postgres')).close()
        except psycopg2.OperationalError:
            return False
        return True

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """End it and wait: SIGINT ends all sessions in order, SIGQUIT does so at once."""
        process, self.process = self.process, None
        assert process is not None, 'it is not running'
        process.send_signal(how)
        process.wait(PATIENCE)

    def kill(self) -> None:
        """SIGKILL to the postmaster and all its processes, at once; wait for their end."""
        process, self.process = self.process, None
        assert process is not None, 'it is not running'
        process.send_signal(signal.SIGSTOP)     # so that it starts no more of them
        children = self._children(process.pid)
        process.kill()
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(PATIENCE)
        # Not ours, so they cannot be waited for; a new postmaster refuses to start beside one of them.
        until(lambda: not any(map(_lives, children)), 'the processes of PostgreSQL have ended')

    def _children(self, parent: int) -> list[int]:
        found = []
        for place in glob.glob('/proc/[0-9]*/stat'):
            with contextlib.suppress(OSError):
                pid, rest = int(place.split('/')[2]), Path(place).read_text().rpartition(')')[2].split()
                if int(rest[1]) == parent:
                    found.append(pid)
        return found

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """It answers nobody, and nobody is told: all its processes are stopped as long as this lasts."""
        assert self.process is not None
        everybody = [self.process.pid, *self._children(self.process.pid)]
        for pid in everybody:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in everybody:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def log(self) -> str:
        """The end of what it has logged."""
        return '\n'.join(self._log.read_text(errors='replace').splitlines()[-30:]) if self._log.exists() else ''

    def close(self) -> None:
        try:
            if self.process is not None:
                self.stop(signal.SIGQUIT)
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> 'Cluster':
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- databases

    def dsn(self, database: str) -> str:
        return f'dbname={database} host={self.folder} user=postgres'

    def execute(self, statement: str, database: str = 'postgres') -> list[Any]:
        """Run one statement outside of a transaction; what it returns, if anything."""
        import psycopg2

        with contextlib.closing(psycopg2.connect(self.dsn(database))) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(statement)
                return cursor.fetchall() if cursor.description else []

    @contextlib.contextmanager
    def set(self, name: str, value: str) -> Iterator[None]:
        """A setting is another one as long as this lasts."""
        self.execute(f"ALTER SYSTEM SET {name} = '{value}'")
        self.execute('SELECT pg_reload_conf()')
        until(lambda: self.execute(f'SHOW {name}') == [(value,)], f'{name} is {value}')
        try:
            yield
        finally:
            self.execute(f'ALTER SYSTEM RESET {name}')
            self.execute('SELECT pg_reload_conf()')

    def database(self, like: str | None = None) -> str:
        """A new database, with RelStorage's tables and no object, or just as another one is now.

        ``like=''``: there is nothing in it at all.
        """
        name = next(self._names)
        if like is None:
            like = TEMPLATE
            if not self.execute(f"SELECT 1 FROM pg_database WHERE datname = '{TEMPLATE}'"):
                self.execute(f'CREATE DATABASE {TEMPLATE}')
                open_directly(self.dsn(TEMPLATE)).close()
        # Nobody may use what is copied; who has just gone is still there for a moment.
        until(lambda: not like or not self.connections(like), f'nobody uses {like}')
        self.execute(f'CREATE DATABASE {name} TEMPLATE {like or "template1"}')
        return name

    def connections(self, database: str) -> int:
        """How many sessions there are in a database."""
        [[number]] = self.execute(f"SELECT count(*) FROM pg_stat_activity WHERE datname = '{database}'")
        return int(number)

    def hang_up(self, database: str) -> int:
        """End all sessions of a database, as an administrator may; returns how many there were."""
        return len(self.execute(
            f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{database}'"))


def _lives(pid: int) -> bool:
    """Whether a process is there, and not only its place in the table."""
    try:
        return Path('/proc', str(pid), 'stat').read_text().rpartition(')')[2].split()[0] not in 'ZX'
    except OSError:
        return False


def open_directly(dsn: str, **options: Any) -> Any:
    """RelStorage itself, in this process, with nothing of ours between."""
    from relstorage.adapters.postgresql import PostgreSQLAdapter
    from relstorage.options import Options
    from relstorage.storage import RelStorage

    chosen = Options(**{'keep_history': True} | options)
    return RelStorage(PostgreSQLAdapter(dsn=dsn, options=chosen), options=chosen)


def relstorage(dsn: str, **options: Any) -> Storage:
    """What stands in a server's configuration file for a database."""
    lines = [f'{name.replace("_", "-")} {value}' for name, value in ({'keep_history': True} | options).items()]
    section = '\n'.join(['%import relstorage', '<relstorage NAME>', *lines,
                         '<postgresql>', f'dsn {dsn}', '</postgresql>', '</relstorage>', ''])
    return Storage('', section)


class Host(Server):
    """A zeo server whose storages stand in its configuration file; all options stand there, too."""

    def _zeo(self) -> list[str]:
        address = self.address if isinstance(self.address, str) else '%s:%d' % self.address
        lines = ['<zeo>', f'address {address}',
                 *(f'{name.replace("_", "-")} {value}' for name, value in self.options.items()), '</zeo>']
        for name, storage in self.storages.items():
            assert storage.section is not None
            lines.append(storage.section.replace('NAME', name))
        configuration = Path(self.folder, f'zeo{self._runs}.conf')
        configuration.write_text('\n'.join(lines) + '\n')
        return ['-W', 'error::ResourceWarning', '-X', 'faulthandler', '-m', 'zeo.start', '-C', str(configuration)]

    def judge(self) -> None:
        """Assert that the log shows no traceback but RelStorage's, which shows each connection that it has lost."""
        logger = ''
        for number, line in enumerate(self.log.lines):
            if record := re.match(r'\d{4}-\d\d-\d\d \S+ [A-Z]+ ([\w.]+): ', line):
                logger = record[1]
            if ('Traceback' in line and not logger.startswith('relstorage.') or 'Exception ignored' in line
                    or line.startswith('Fatal Python error')):
                raise AssertionError('\n'.join(self.log.lines[max(number - 5, 0):number + 60]))


@contextlib.contextmanager
def hosts(dsn: str, number: int, **options: Any) -> Iterator[list[Host]]:
    """So many zeo servers over one database; at the end they are stopped and judged."""
    with contextlib.ExitStack() as at_end:
        yield [at_end.enter_context(Host('zeo', {'1': relstorage(dsn)}, **options)) for _ in range(number)]


class HostPool:
    """A fresh database for each test, many of them served by the same processes: one storage for each.

    With several ``servers``, all of them serve all databases, under the same names.  Other arguments are
    options of the servers.
    """

    def __init__(self, cluster: Cluster, servers: int = 1, size: int = 20, **options: Any) -> None:
        self._cluster = cluster
        self._number = servers
        self._size = size
        self._options = options
        self.servers: list[Host] = []
        self._names: Iterator[str] = iter(())
        self.databases: dict[str, str] = {}     # by the names of storages
        self.taken = ''     # the name that was taken last

    def take(self) -> tuple[Host, str]:
        """The first of the running servers, and the name of a storage that nobody has used yet."""
        name = next(self._names, None)
        if name is None:
            self.close()
            names = [str(number) for number in range(1, self._size + 1)]
            self.databases = {name: self._cluster.database() for name in names}
            storages = {name: relstorage(self._cluster.dsn(database)) for name, database in self.databases.items()}
            for _ in range(self._number):
                self.servers.append(Host('zeo', storages, **self._options))
                self.servers[-1].start()
            self._names = iter(names)
            name = next(self._names)
        self.taken = name
        return self.servers[0], name

    def close(self) -> None:
        servers, self.servers = self.servers, []
        self._names = iter(())
        with contextlib.ExitStack() as at_end:
            for server in servers:
                at_end.callback(server.close)
