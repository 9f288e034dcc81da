"""Scenarios of the soak in which somebody means harm, or does everything wrong."""

import contextlib
import itertools
import json
import os
import random
import re
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ZODB.POSException import ConflictError
from ZODB.utils import z64

from tests.server.talk import SocketPeer
from tests.server.talk import oid
from tests.system.accounts import AT_ONCE
from tests.system.accounts import KEPT
from tests.system.accounts import MB
from tests.system.accounts import Account
from tests.system.accounts import Resources
from tests.system.accounts import client_of
from tests.system.accounts import reset
from tests.system.accounts import seconds
from tests.system.accounts import watched
from tests.system.certificates import Certificates
from tests.system.clients import open_client
from tests.system.clients import store
from tests.system.servers import PATIENCE
from tests.system.servers import ROOT
from tests.system.servers import Server
from tests.system.servers import until
from tests.system.test_hostile_clients import BAD_FRAMES
from tests.system.test_hostile_clients import NO_METHODS
from tests.system.test_hostile_clients import VALUES
from tests.system.test_hostile_clients import Honest
from tests.system.test_hostile_clients import ends
from tests.system.test_hostile_clients import survives_or_ends
from tests.system.test_hostile_clients import undo
from tests.system.test_hostile_records import Watched
from tests.system.test_hostile_records import hostilities
from tests.system.test_tls import CASES
from tests.system.test_tls import context
from tests.system.test_tls import secured
from tests.wire import hostile
from zeo.ClientStorage import ClientStorage
from zeo.wire import messages
from zeo.wire.framing import frame
from zeo.wire.greeting import GREETING
from zeo.wire.methods import METHODS


@contextlib.contextmanager
def beside(server: Server, account: Account) -> Iterator[None]:
    """An honest client works beside what goes on, and must not notice anything."""
    with client_of(server) as storage:
        store(storage)
        with watched(server, account):
            honest = Honest(storage)
            before = len(server.log.lines)
            yield
            honest.judge()
        lines = [line for line in server.log.lines[before:] if 'WARNING' in line or 'ERROR' in line]
        account.expect(len(lines) < 20, f'{len(lines)} warnings in the log')
        account.notes['commits beside'] = f'{honest.commits}, the slowest {honest.slowest * 1000:.0f} ms'
        account.notes['warnings'] = str(len(lines))


# ---- nothing from the wire is executed


def hostile_frames(effort: float) -> Account:
    """Hostile pickles, to decoders of both sides in a process that listens for what they do, and to a server."""
    account = Account()
    count = max(int(100_000 * effort), 2_000)
    done = subprocess.run(
        [sys.executable, '-W', 'error', '-m', 'tests.wire.hostile', '--seed', str(time.time_ns()), '--count', str(count),
         '--largest', '100000'], cwd=ROOT, capture_output=True, text=True, timeout=3600)
    account.tried += count
    if done.returncode:
        account.lost.append(done.stderr[-500:])
    else:
        account.survived += count
        told = json.loads(done.stdout)
        account.notes['decoded'] = f'{told["accepted"]} of {4 * count} times, the slowest in {told["slowest ms"]} ms'
    frames = hostile.frames(time.time_ns(), 100_000)
    sent = 0
    with Server() as server, beside(server, account):
        for number in range(max(int(5_000 * effort), 100)):
            with SocketPeer(server.address, register=number % 4 != 0, reading=False) as peer, \
                    contextlib.suppress(OSError):
                if number % 4 == 0 and number % 8:
                    peer.send(GREETING)
                for data in [frames() for _ in range(5)]:
                    peer.sock.sendall(b''.join(frame(data)))
                    sent += 1
                peer.sock.shutdown(socket.SHUT_WR)
                ends(peer)
            account.expect(True, '')
    account.notes['frames to a server'] = str(sent)
    return account


def hostile_records(effort: float) -> Account:
    """Hostile records in conflicts, which a server resolves, or not, and never runs."""
    account, servers = Account(), []

    def start(**options: Any) -> Server:
        servers.append(Server(**options).start())
        return servers[-1]

    with tempfile.TemporaryDirectory(prefix='zeo-') as folder:
        watching = Watched(start, Path(folder))
        try:
            account.notes['told'] = hostilities(watching, time.time_ns(), max(int(10_000 * effort), 100), 50_000)
            account.tried = account.survived = watching.tried
        except AssertionError as error:
            account.lost.append(str(error)[:500])
        finally:
            watching.close()
            servers[0].close()
    return account


def hostile_server(effort: float) -> Account:
    """A hostile server, and a client that ends each call with a result or an error, and does nothing else."""
    account, rounds = Account(), max(int(1_000 * effort), 20)
    done = subprocess.run(
        [sys.executable, '-m', 'tests.system.hostile_server', '--seed', str(time.time_ns()), '--rounds', str(rounds)],
        cwd=ROOT, capture_output=True, text=True, timeout=3600)
    account.tried = rounds
    if done.returncode:
        account.lost.append(done.stderr[-1000:])
    else:
        account.survived = rounds
        account.notes.update((key, str(value)) for key, value in json.loads(done.stdout).items())
    return account


# ---- limits


def bad_manners(effort: float) -> Account:
    """Half-open connections, bytes from time to time, frames that are none, calls of everything with anything."""
    account = Account()
    times = max(int(10 * effort), 1)
    with Server(registration_timeout=1, max_message='8MB', max_connections=300) as server, beside(server, account):
        half_open = []
        for number in range(max(int(5_000 * effort), 350)):
            half_open.append(socket.create_connection(server.address, PATIENCE))
            if number % 500 == 499:
                with SocketPeer(server.address) as peer:
                    account.expect(peer.call('ping') is None, 'somebody else')
        account.notes['half-open'] = str(len(half_open))
        account.expect(len(os.listdir(f'/proc/{server.process.pid}/task')) < 400, 'too many threads')  # type: ignore[union-attr]
        slow = half_open[-20:]
        pause = threading.Event()
        for each, data in itertools.product(range(100), slow):
            with contextlib.suppress(ConnectionError):
                data.sendall(b'\0\0\1\0Z5'[each:each + 1] or b'x')
            if data is slow[-1]:
                pause.wait(.02)
        for sock in half_open:
            sock.settimeout(PATIENCE)
            with sock, contextlib.suppress(ConnectionError):
                while sock.recv(1000):
                    pass
            account.expect(True, 'it is cut off')
        for _, data in itertools.product(range(times), BAD_FRAMES):
            with SocketPeer(server.address) as peer:
                peer.sock.sendall(data)
                peer.wait_for_end()
            account.expect(True, 'it is cut off')
        for _, name in itertools.product(range(times), NO_METHODS):
            with SocketPeer(server.address) as peer:
                peer.ask(name, 1)
                peer.wait_for_end()
            account.expect(True, 'it is cut off')
        became = dict.fromkeys(['answered', 'error', 'ended'], 0)
        rnd = random.Random()
        with contextlib.ExitStack() as peers:
            peer = peers.enter_context(SocketPeer(server.address))
            for _ in range(max(int(500 * effort), 10)):
                for name, method in METHODS.items():
                    args = [rnd.choice(VALUES) for _ in range(rnd.randrange(method.most + 2))]
                    if name == 'pack':
                        args[:1] = ['now']  # the honest client's records are none that can be packed
                    outcome = survives_or_ends(peer, name, *args)
                    became[outcome] += 1
                    account.expect(outcome != 'answered' or method.least <= len(args) <= method.most, name)
                    if outcome == 'ended' or name in ('tpc_begin', 'commit'):
                        peers.close()
                        peer = peers.enter_context(SocketPeer(server.address))
                    peer.told.clear()
        account.notes['calls'] = ', '.join(f'{count} {what}' for what, count in became.items())
    return account


def floods(effort: float) -> Account:
    """Requests without end, whose answers nobody reads; whoever asks is made to wait, and given up."""
    account = Account()
    with Server() as server, client_of(server) as client, contextlib.ExitStack() as watching:
        long = b''.join(messages.notice('tpc_begin', (b'x' * 5 * MB, b'', b'', {})))
        revisions = b'x' * 16 * 10_000
        attacks = [
            (b'', messages.request(5, 'get_info'), 5_000), (b'', messages.request(5, 'ping'), 20_000),
            (b'', messages.request(5, 'new_oids'), 5_000), (long, messages.request(5, 'vote', (2,)), 100),
            (long, messages.request(5, 'tpc_finish', (2,)), 100), (b'', messages.request(5, 'verify', (revisions,)), 300),
            (b'', messages.request(5, 'undoInfo', (0, -10_000)), 2_000), (b'', messages.request(5, 'figures'), 2_000),
            (long, messages.request(5, 'tpc_begin', (2, b'', b'', {})), 100),
            (b''.join(messages.notice('tpc_begin', (1, b'', b'', {}))), messages.request(5, 'tpc_abort', (2,)), 20_000)]
        if effort < .1:
            attacks = random.sample(attacks, 3)
        free = max(seconds(store, client) for _ in range(20))
        pid = server.process.pid  # type: ignore[union-attr]
        alone = Resources.of(pid)
        slowest, most, asked = 0.0, 0, 0
        for again in range(max(int(4 * effort), 1) + 1):
            if again == 1:  # what is kept of the first time is kept once
                until(lambda: Resources.of(pid).threads <= alone.threads, 'those of the first time are gone')
                watching.enter_context(watched(server, account))
            for first, each, count in attacks:
                peer = SocketPeer(server.address, reading=False)
                peer.sock.settimeout(.5)
                peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                with contextlib.suppress(TimeoutError, ConnectionError):
                    peer.sock.sendall(first)
                    for _ in range(10):
                        peer.sock.sendall(b''.join(each) * (count // 10))
                        asked += count // 10
                        slowest = max(slowest, seconds(store, client))
                most = max(most, Resources.of(pid).memory)
                slowest = max(slowest, seconds(store, client))
                account.expect(True, '')
                reset(peer)
        assert account.before is not None
        account.expect(most < account.before.memory + KEPT + 150 * MB, f'{most / MB:.0f} MB')
        account.expect(slowest < AT_ONCE, f'{slowest:.1f} s for a commit')
        account.notes['requests'] = str(asked)
        account.notes['slowest commit'] = f'{free * 1000:.0f} -> {slowest * 1000:.0f} ms'
        account.notes['memory meanwhile'] = f'{most / MB:.0f} MB'
    return account


# ---- a network that swallows everything

#: A client that votes, says so, and waits.
HOLDER = """
import sys
from tests.system.clients import open_client, vote
client = open_client('zeo', ('10.98.0.2', {port}))
client.tpc_finish(vote(client))
vote(client)
print('voted', flush=True)
sys.stdin.read()
"""


def _ip(*words: str) -> None:
    subprocess.run(['ip', *words], check=True, capture_output=True, timeout=PATIENCE)


@contextlib.contextmanager
def cable() -> Iterator[str]:
    """Another machine, 10.98.0.1, with a cable to this one, 10.98.0.2; its name."""
    name = f'zeo{os.getpid()}'
    _ip('netns', 'add', name)
    try:
        _ip('link', 'add', name, 'type', 'veth', 'peer', 'name', 'cable', 'netns', name)
        _ip('addr', 'add', '10.98.0.2/24', 'dev', name)
        _ip('link', 'set', name, 'up')
        _ip('-n', name, 'addr', 'add', '10.98.0.1/24', 'dev', 'cable')
        _ip('-n', name, 'link', 'set', 'cable', 'up')
        yield name
    finally:
        subprocess.run(['ip', 'link', 'del', name], capture_output=True, timeout=PATIENCE)
        subprocess.run(['ip', 'netns', 'del', name], capture_output=True, timeout=PATIENCE)


def can_have_a_network() -> bool:
    """Whether this process may make one."""
    if os.geteuid() != 0 or shutil.which('ip') is None:
        return False
    try:
        with cable():
            return True
    except (subprocess.CalledProcessError, OSError):
        return False


def black_hole(effort: float) -> Account:
    """The machine of a client vanishes from the network, without FIN, while the client holds the commit lock."""
    account, waits = Account(), []
    with cable() as there, Server(host='10.98.0.2', both=True, transaction_timeout=0.5) as server, \
            contextlib.ExitStack() as at_end:
        assert server.second_address is not None
        other = at_end.enter_context(contextlib.closing(open_client('zeo', server.second_address)))
        store(other)
        with watched(server, account):
            for _ in range(max(int(10 * effort), 1)):
                process = subprocess.Popen(
                    ['ip', 'netns', 'exec', there, sys.executable, '-c', HOLDER.format(port=server.address[1])],
                    cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
                with process:
                    assert process.stdout is not None
                    assert process.stdout.readline() == 'voted\n'
                    _ip('-n', there, 'link', 'set', 'cable', 'down')
                    waits.append(seconds(store, other))
                    process.kill()
                _ip('-n', there, 'link', 'set', 'cable', 'up')
                account.expect(waits[-1] < 0.5 + AT_ONCE, f'the next commit took {waits[-1]:.1f} s')
            account.notes['the next commit after'] = f'{max(waits):.2f} s at most, of which 0.5 are the time-out'
    return account


# ---- starting wrong


def wrong_starts(effort: float) -> Account:
    """Servers that cannot be started: one line that says what to do, exit status 1 or 2, no traceback."""
    account, statuses = Account(), dict.fromkeys([1, 2], 0)
    with tempfile.TemporaryDirectory(prefix='zeo-') as folder, \
            Server(both=True, folder=os.path.join(folder, 'running')) if os.mkdir(
                os.path.join(folder, 'running')) is None else contextlib.nullcontext() as server:
        assert isinstance(server, Server)
        for name, content in {'damaged.fs': b'this is no FileStorage at all', 'no-socket': b'', 'wrong.conf': b'<zeo>\n',
                              'empty.pem': b'', 'module.py': b'storage = 1 / 0\n'}.items():
            Path(folder, name).write_bytes(content)
        os.mkdir(os.path.join(folder, 'a-folder'))
        os.mkdir(os.path.join(folder, 'closed'), 0o700)
        assert not isinstance(server.address, str)
        port = str(server.address[1])
        cases: list[tuple[int, list[str], str]] = [
            (1, ['-p', '0', 'running/Data.fs'], 'in use|locked|another'), (1, ['-p', port, 'Data.fs'], f'port {port} is in use'),
            (1, ['-U', 'running/second', 'Data.fs'], 'another server is listening'),
            (1, ['-U', 'no-socket', 'Data.fs'], 'is not a socket'), (1, ['-U', 'nowhere/socket', 'Data.fs'], 'create the folder'),
            (1, ['-U', 'x' * 200, 'Data.fs'], 'too long'), (1, ['-p', '0', 'nowhere/Data.fs'], 'folder'),
            (1, ['-p', '0', 'a-folder'], 'a-folder'), (1, ['-p', '0', 'damaged.fs'], 'damaged.fs'),
            (1, ['-h', '198.51.100.1', '-p', '0', 'Data.fs'], 'not an address of this machine'),
            (1, ['-h', 'no.such.host.invalid', '-p', '0', 'Data.fs'], 'not known'),
            (1, ['-p', '0', '-u', 'nobody-of-this-name', 'Data.fs'], 'there is no user'),
            (1, ['-p', '0', '--log', 'nowhere/log', 'Data.fs'], 'log file'),
            (1, ['-p', '0', '--pid-file', 'nowhere/pid', 'Data.fs'], 'pid'),
            (1, ['-p', '0', '-P', 'nowhere/profile', 'Data.fs'], 'profile'),
            (1, ['-p', '0', '-S', '1=module:storage'], 'module'), (1, ['-p', '0', '-S', '1=no_module_of_this_name:x'], 'no_module'),
            (1, ['-p', '0', '--tls-certificate=empty.pem', 'Data.fs'], 'no certificate in'),
            (1, ['-p', '0', '--tls-certificate=nowhere.pem', 'Data.fs'], 'cannot read the certificate'),
            (2, ['-p', 'many', 'Data.fs'], 'port'), (2, ['-p', '70000', 'Data.fs'], 'port'), (2, ['--no-such-option'], 'no-such-option'),
            (2, ['-p', '0', '--transaction-timeout=long', 'Data.fs'], 'transaction-timeout'), (2, ['-C', 'nowhere.conf'], 'nowhere.conf'),
            (2, ['-C', 'wrong.conf'], 'wrong.conf'), (2, ['-p', '0', '--role=boss=1', 'Data.fs'], 'role'), (2, ['Data.fs'], '-p')]
        if os.geteuid() == 0:
            cases += [(1, ['-p', '0', '-u', 'nobody', 'closed/Data.fs'], 'cannot write'),
                      (1, ['-U', 'closed/socket', '-u', 'nobody', 'Data.fs'], 'cannot write')]
        for _ in range(max(int(2 * effort), 1)):
            for status, words, says in cases:
                if effort < .1 and random.random() > .3:
                    continue
                done = subprocess.run([sys.executable, '-m', 'zeo.start', *words], cwd=folder, text=True, capture_output=True,
                                      timeout=PATIENCE, env=dict(os.environ, PYTHONPATH=str(ROOT)))
                lines = [line for line in done.stderr.splitlines() if not re.match('[0-9-]{10} .* WARNING ', line)]  # the log
                account.expect(
                    done.returncode == status and 'Traceback' not in done.stderr and re.search(says, done.stderr) is not None
                    and (len(lines) == 1 or status == 2), f'{" ".join(words)}: {done.returncode}: {done.stderr[-300:]}')
                statuses[done.returncode] = statuses.get(done.returncode, 0) + 1
        with client_of(server) as client:  # who was there goes on
            account.expect(store(client) > z64, 'the server that was there')
        with contextlib.closing(open_client('zeo', server.second_address)) as client:
            account.expect(store(client) > z64, 'the server that was there, at its socket')
        server.kill()
        account.expect(os.path.exists(str(server.second_address)), 'a dead server leaves its socket')
        server.start()
        with contextlib.closing(open_client('zeo', server.second_address)) as client:
            account.expect(store(client) > z64, 'a server that takes over the socket of a dead one')
    account.notes['exit status'] = ', '.join(f'{count} x {status}' for status, count in statuses.items())
    return account


# ---- TLS, roles


def tls(effort: float) -> Account:
    """Each make of client with each make of server, all that is refused, and handshakes that never end."""
    account = Account()
    with tempfile.TemporaryDirectory(prefix='zeo-') as folder, contextlib.ExitStack() as servers:
        these = Certificates(Path(folder))
        ours = servers.enter_context(Server(**secured(these)))
        plain = servers.enter_context(Server())
        for kind, make in [('zeo', 'zeo'), ('zeo', 'ZEO'), ('ZEO', 'zeo')]:
            server = ours if make == 'zeo' else servers.enter_context(Server(make, **secured(these)))
            for _ in range(max(int(20 * effort), 1)):
                with contextlib.closing(open_client(kind, server, ssl=context(these))) as client:
                    number = client.new_oid()
                    tid = store(client, number)
                    account.expect(client.loadBefore(number, b'\x7f' + b'\xff' * 7)[:2] == (b'x', tid), f'{kind} with {make}')
        for name, (of_server, of_client, server_says, client_says) in CASES.items():
            if effort < .1 and random.random() > .2:
                continue
            with Server(**secured(these, **of_server(these))) as server:
                try:
                    ClientStorage(server.address, ssl=of_client(these), wait_timeout=.5).close()
                except Exception as error:
                    account.expect(re.search(client_says, str(error)) is not None, f'{name}: {error}')
                    until(lambda: any(re.search(server_says, line) for line in server.log.lines), name)
                else:
                    account.expect(False, name)
        mixed: list[tuple[Server, dict[str, Any], str]] = [(plain, {'ssl': context(these)}, 'does not speak TLS')]
        if effort >= .1:
            mixed.append((ours, {}, 'speaks TLS: ask for it'))  # takes five seconds
        for server, options, says in mixed:
            try:
                ClientStorage(server.address, wait_timeout=6 if server is ours else .5, **options).close()
            except Exception as error:
                account.expect(says in str(error), str(error))
            else:
                account.expect(False, says)
        with client_of(ours, ssl=context(these)) as client, watched(ours, account):
            slowest = 0.0
            for number in range(max(int(500 * effort), 20)):
                sock = socket.create_connection(ours.address, PATIENCE)
                sock.sendall([b'', b'\x16\x03\x01\x02\0\1\0\1\xfc\3\3', b'GET / HTTP/1.0\r\n\r\n', os.urandom(500)][number % 4])
                if number % 3:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
                    sock.close()
                    account.expect(True, '')
                else:
                    with _spoken(ours, these) as spoken:  # half a conversation, then the end, or plain bytes
                        spoken.sendall(b''.join(frame(GREETING)))
                        if number % 2:
                            os.write(spoken.fileno(), b'plain')
                    sock.close()
                    account.expect(True, '')
                slowest = max(slowest, seconds(store, client))
            account.expect(slowest < AT_ONCE, f'a commit beside took {slowest:.1f} s')
            account.notes['the slowest commit beside'] = f'{slowest * 1000:.0f} ms'
    return account


def _spoken(server: Server, these: Certificates) -> ssl.SSLSocket:
    sock = socket.create_connection(server.address, PATIENCE)
    return context(these).wrap_socket(sock, server_hostname='127.0.0.1')


def roles(effort: float) -> Account:
    """What each role may do, by address and by certificate, again and again; the log tells of it, seldom."""
    account = Account()
    record = b'\x80\x03N.\x80\x03N.'
    #: what each role may: connect for reading, for writing, undo, pack
    may = {'read': (True, False, False, False), 'write': (True, True, False, False), 'admin': (True, True, True, True),
           None: (False, False, False, False)}
    with tempfile.TemporaryDirectory(prefix='zeo-') as folder:
        these = Certificates(Path(folder))
        for role, by_name in itertools.product(may, [False, True]):
            if effort < .1 and random.random() > .3:
                continue
            if by_name:
                server = Server(**secured(these))
                server.options['role'] = f'{role or "admin"}=cn:{"ada" if role else "somebody"}'
            else:
                server = Server(unix=True)
                server.options['role'] = f'{role}={server.address}' if role else 'admin=cn:ada'
            how = {'ssl': context(these)} if by_name else {}
            with server:
                for _ in range(max(int(20 * effort), 1)):
                    truths = tuple(_is_possible(call, server, how, record) for call in (_read, _write, _undo, _pack))
                    for truth, expected in zip(truths, may[role], strict=True):
                        account.expect(truth == expected, f'{role}: {truths}')
                lines = [line for line in server.log.lines if 'WARNING zeo.audit' in line]
                account.expect(len(lines) <= 4 and bool(lines) == (role != 'admin'), f'{role}: {len(lines)} refusals logged')
    account.notes['roles'] = 'read, write, admin and none, each by address and by certificate'
    return account


def _is_possible(call: Callable[[Any], Any], server: Server, how: dict[str, Any], record: bytes) -> bool:
    try:
        reading = call is _read
        with contextlib.closing(ClientStorage(server.address, wait_timeout=.3, read_only=reading, **how)) as client:
            if call in (_undo, _pack):  # something to undo, and the object from which a pack begins
                with contextlib.suppress(ConflictError):
                    store(client, oid(0), z64, record)
                store(client, record=record)
            call(client)
    except Exception:
        return False
    return True


def _read(client: Any) -> None:
    client.server_status()


def _write(client: Any) -> None:
    store(client, record=b'\x80\x03N.\x80\x03N.')


def _undo(client: Any) -> None:
    [last, *_] = client.undoLog(0, 1)
    undo(client, last['id'])


def _pack(client: Any) -> None:
    client.pack(time.time(), wait=True)


NEED_A_NETWORK: dict[str, Callable[[float], Account]] = {'black-hole': black_hole}
SCENARIOS: dict[str, Callable[[float], Account]] = {
    'hostile-frames': hostile_frames, 'hostile-records': hostile_records, 'hostile-server': hostile_server,
    'bad-manners': bad_manners, 'floods': floods, 'wrong-starts': wrong_starts, 'tls': tls, 'roles': roles,
    **NEED_A_NETWORK}
