"""Clients that do what clients must not do, to a real server, while an honest one works beside them.

The offender gets an error or is cut off; the log does not fill; the honest client notices nothing; and in
the end memory, threads and files of the server are what they were.
"""

import contextlib
import itertools
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from ZODB.Connection import TransactionMetaData
from ZODB.POSException import ReadOnlyError, StorageError
from ZODB.utils import z64

import zeo
from tests.server.talk import SocketPeer, oid
from tests.system.certificates import Certificates
from tests.system.clients import store
from tests.system.servers import PATIENCE, Server, figures, until
from zeo.wire.greeting import GREETING
from zeo.wire.methods import METHODS

Start = Callable[..., Server]
Open = Callable[..., Any]


class Honest(threading.Thread):
    """Commits and reads, one after the other, and notes how long the slowest one took, in seconds."""

    def __init__(self, storage: Any) -> None:
        super().__init__(name='honest client', daemon=True)
        self._storage = storage
        self._stop_now = threading.Event()
        self.commits = 0
        self.slowest = 0.0
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            number = self._storage.new_oid()
            serial = z64
            while not self._stop_now.is_set():
                began = time.monotonic()
                serial = store(self._storage, number, serial, b'%d' % self.commits)
                assert self._storage.load(number) == (b'%d' % self.commits, serial)
                assert self._storage.getTid(number) == serial
                self.commits += 1
                self.slowest = max(self.slowest, time.monotonic() - began)
        except BaseException as error:
            self.error = error

    def judge(self) -> None:
        self._stop_now.set()
        self.join(PATIENCE)
        assert self.error is None and not self.is_alive(), self.error
        assert self.commits and self.slowest < 5


@pytest.fixture
def hostility(start_server: Start, open_client: Open, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Start a server with an honest client; at the end nobody must have noticed anything."""
    monkeypatch.setattr(Server, 'constants', {'zeo.server.threads.PATIENCE': .2})
    states: list[tuple[Server, Honest, dict[str, int]]] = []

    def start(**options: Any) -> Server:
        server = start_server(**{'registration_timeout': 1, 'max_message': '8MB', **options})
        for _ in range(3):  # what is made at first use
            with SocketPeer(server.address) as peer:
                peer.commit(oid(2**41), b'x')
                peer.load(oid(2**41))
        storage = open_client('zeo', server)
        store(storage)
        assert server.process is not None
        states.append((server, Honest(storage), figures(server.process.pid)))
        return server

    yield start
    [(server, honest, before)] = states
    honest.judge()
    assert server.process is not None
    pid = server.process.pid
    until(lambda: figures(pid)['threads'] <= before['threads'], 'threads have ended')
    # (A FileStorage keeps a file for each of those who have ever read at the same time.)
    until(lambda: figures(pid)['files'] <= before['files'] + 3, 'files are closed')
    after = figures(pid)
    assert after['memory'] < before['memory'] + 30_000
    lines = [line for line in server.log.lines if 'disconnected' in line or 'refused: ' in line]
    once = {line.split()[4] for line in lines}  # for each connection, what it is refused is told once
    assert len([line for line in lines if 'WARNING' in line]) <= 10 and len(lines) <= 10 + len(once), lines
    print(f'{honest.commits} commits beside, the slowest {honest.slowest * 1000:.0f} ms;'
          f' memory {before["memory"]} -> {after["memory"]} kB')


def ends(peer: SocketPeer) -> None:
    """The server hangs up, whatever it has said before."""
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        while peer.sock.recv(2**16):
            pass


def survives_or_ends(peer: SocketPeer, *say: Any) -> str:
    """What became of a request: 'answered', 'error', or 'ended'."""
    try:
        peer.call(*say)
        return 'answered'
    except EOFError:
        return 'ended'
    except (ConnectionResetError, BrokenPipeError):
        return 'ended'
    except Exception:
        return 'error'


BAD_FRAMES = [
    b'\xff\xff\xff\xff', b'\0\0\0\0', struct.pack('>I', 8 * 2**20 + 1), b'\0\0\0\3abc', b'\0\0\0\1.',
    b'\0\0\0\4ruok', b'\0\0\0\2Z5', b'GET / HTTP/1.1\r\n\r\n', b'\x16\x03\x01\x02\0\1\0\1\xfc\3\3' + bytes(300)]


def test_frames_that_are_none_end_their_connection(hostility: Any) -> None:
    server = hostility()
    for _, data in itertools.product(range(10), BAD_FRAMES):
        with SocketPeer(server.address, register=False) as peer:
            if data[4:] != b'Z5':
                peer.sock.sendall(data)
                ends(peer)
        with SocketPeer(server.address, register=False) as peer:  # after the handshake
            peer.send(GREETING)
            peer.sock.sendall(data)
            ends(peer)
        with SocketPeer(server.address) as peer:  # registered
            peer.sock.sendall(data)
            peer.wait_for_end()


def test_frames_that_never_end_take_no_memory_and_no_time_of_others(hostility: Any) -> None:
    server = hostility()
    peers = []
    for length in [1, 100, 64 * 1024, 2**20, 8 * 2**20] * 20:
        peers.append(SocketPeer(server.address))
        peers[-1].sock.sendall(struct.pack('>I', length) + b'x' * min(length - 1, 1000))
    with SocketPeer(server.address) as peer:
        assert peer.call('ping') is None
    assert figures(server.process.pid)['memory'] < 1_000_000  # the length alone would be 370 MB, twice
    for peer in peers:
        peer.close()


def test_a_large_frame_is_refused_from_who_may_only_read(hostility: Any) -> None:
    server = hostility()
    with SocketPeer(server.address, read_only=True) as reader, SocketPeer(server.address) as writer:
        writer.begin(1, (oid(2**40), z64, b'x' * 2**21))
        assert writer.call('vote', 1) == []
        writer.call('tpc_abort', 1)
        reader.sock.sendall(struct.pack('>I', 2**20 + 1))
        reader.wait_for_end()


@pytest.mark.parametrize('data', [
    GREETING, b'', b'Z5' + bytes(60_000)], ids=['before register', 'in the handshake', 'a long frame'])
def test_a_byte_from_time_to_time_is_not_enough(hostility: Any, data: bytes) -> None:
    server = hostility(registration_timeout=0.5)
    with SocketPeer(server.address, register=False) as peer:
        if data == GREETING:
            peer.send(data)
        stream = struct.pack('>I', 60_000) + bytes(60_000)
        began = time.monotonic()
        pause = threading.Event()
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            for byte in stream:
                peer.sock.sendall(bytes([byte]))
                pause.wait(.02)
                assert time.monotonic() - began < PATIENCE, 'it is still connected'
        assert time.monotonic() - began > .4


@pytest.mark.parametrize('count', [1_000, pytest.param(10_000, marks=[pytest.mark.soak, pytest.mark.timeout(900)])])
def test_thousands_of_half_open_connections_keep_nobody_out(hostility: Any, count: int) -> None:
    server = hostility(registration_timeout=30, max_connections=300)
    half_open: list[socket.socket] = []
    try:
        for number in range(count):
            half_open.append(socket.create_connection(server.address, PATIENCE))
            if number % 200 == 199:
                with SocketPeer(server.address) as peer:
                    assert peer.call('ping') is None
        assert figures(server.process.pid)['threads'] < 400
        assert figures(server.process.pid)['files'] < 400
    finally:
        for sock in half_open:
            sock.close()


def test_registered_clients_are_as_many_as_allowed_and_none_of_them_is_cut_off(hostility: Any) -> None:
    server = hostility(max_connections=20)
    with contextlib.ExitStack() as peers:
        inside = [peers.enter_context(SocketPeer(server.address)) for _ in range(19)]
        for _ in range(20):
            assert not comes_in(server)
        server.log.wait_for('refused: there are 20 connections')
        for peer in inside:
            assert peer.call('ping') is None
        inside[0].close()
        until(lambda: comes_in(server), 'there is room again')


def comes_in(server: Server) -> bool:
    """Whether a new connection is greeted."""
    with socket.create_connection(server.address, PATIENCE) as sock:
        with contextlib.suppress(ConnectionResetError):
            return sock.recv(100) != b''
    return False


def test_one_address_may_have_so_many_and_a_socket_file_any_number(hostility: Any) -> None:
    server = hostility(max_connections_per_address=5, both=True)
    with contextlib.ExitStack() as peers:
        for _ in range(4):  # and the honest one
            peers.enter_context(SocketPeer(server.address))
        assert not comes_in(server)
        for _ in range(10):
            assert peers.enter_context(SocketPeer(server.second_address)).call('ping') is None


def test_who_is_silent_for_too_long_is_cut_off_if_that_is_wanted(hostility: Any) -> None:
    server = hostility(idle_timeout=.5)
    with SocketPeer(server.address) as silent, SocketPeer(server.address) as talking:
        while not silent.ended:
            talking.call('ping')
        assert talking.call('ping') is None
    server.log.wait_for('it has not said anything for 0.5 s')


def test_a_transaction_that_is_too_large_fails_and_its_client_goes_on(
        hostility: Any, open_client: Open) -> None:
    server = hostility(max_transaction='100KB')
    client = open_client('zeo', server)
    with pytest.raises(StorageError, match='more than 102400 bytes'):
        store(client, record=b'x' * 200_000)
    with SocketPeer(server.address) as peer:
        peer.begin(1)
        for number in range(3000):  # of nothing
            peer.tell('checkCurrentSerialInTransaction', oid(number), z64, 1)
        with pytest.raises(Exception, match='more than 102400 bytes'):
            peer.call('vote', 1)
        assert peer.call('ping') is None
    store(client, record=b'x' * 50_000)
    client.close()


# ---- messages

NO_METHODS = ['eval', '__class__', '__init__', 'close', 'handle', 'new_oid', '_load', '_finish', 'store',
              'tpc_vote', 'zeoLoad', 'getSerial', '', 'x' * 10_000, 'ping\n2026 ERROR zeo: fake', '.reply', 'who']


def test_unknown_methods_end_the_connection(hostility: Any) -> None:
    server = hostility()
    for name, say in itertools.product(NO_METHODS, [SocketPeer.ask, SocketPeer.tell]):
        with SocketPeer(server.address) as peer:
            say(peer, name, 1, 2)
            peer.wait_for_end()


def test_nothing_can_be_called_before_register_and_that_only_once(hostility: Any) -> None:
    server = hostility()
    for name in [*METHODS, *NO_METHODS]:
        with SocketPeer(server.address, register=False) as peer:
            peer.send(GREETING)
            peer.ask(name, *[z64] * getattr(METHODS.get(name), 'least', 0))
            if name == 'register':
                continue  # of a storage that there is not
            ends(peer)
    with SocketPeer(server.address) as peer:
        assert survives_or_ends(peer, 'register', '1', False) in ('error', 'ended')


VALUES = [None, True, 0, -1, 2**31, 2**64, -2**64, 1.5, float('nan'), float('inf'), '', 'a', 'x' * 1000, b'', b'a',
          z64, b'\xff' * 8, b'x' * 9, (), (1,), [], [[]], {}, {'a': 1}, {1}, 1j, [z64] * 3, ((z64, z64),)]


def test_wrong_numbers_and_kinds_of_arguments_are_errors_or_the_end(hostility: Any) -> None:
    server = hostility()
    became: dict[str, int] = {'answered': 0, 'error': 0, 'ended': 0}
    peer = SocketPeer(server.address)
    try:
        for name, method in METHODS.items():
            counts = [method.least - 1, method.most + 1, method.most + 50]
            calls = [(1,) * count for count in counts if count >= 0]
            for count in range(method.least, method.most + 1):
                calls += [(value,) * count for value in VALUES]
                calls += [tuple(VALUES[(at + 5 * place) % len(VALUES)] for place in range(count))
                          for at in range(0, len(VALUES), 3)]
            if name == 'pack':  # the honest client's records are none that can be packed
                calls = [args for args in calls if not args or args[0] not in (True, 0, 2**31)]
            for args in calls:
                outcome = survives_or_ends(peer, name, *args)
                assert outcome != 'answered' or method.least <= len(args) <= method.most
                became[outcome] += 1
                if outcome == 'ended' or name in ('tpc_begin', 'commit', 'register'):
                    peer.close()
                    peer = SocketPeer(server.address)
                peer.told.clear()
    finally:
        peer.close()
    print(became)
    assert became['error'] > 1000


def test_steps_of_a_commit_in_a_wrong_order_are_errors_or_the_end(hostility: Any) -> None:
    server = hostility()
    with SocketPeer(server.address) as peer:
        for name in 'tpc_finish', 'vote':
            with pytest.raises(StorageError):
                peer.call(name, 1)
        assert peer.call('tpc_abort', 1) is None
        peer.begin(1, (oid(2**40), z64, b'x'))
        for id in 1, 2:
            with pytest.raises(StorageError):
                peer.call('tpc_finish', id)  # without a vote
        peer.call('vote', 1)
        with pytest.raises(StorageError):
            peer.call('vote', 1)
        with pytest.raises(StorageError):
            peer.call('tpc_finish', 2)
        peer.call('tpc_finish', 1)
        with pytest.raises(StorageError):
            peer.call('tpc_finish', 1)
    for name, args in [('storea', (oid(1), z64, b'x', 1)), ('deleteObject', (oid(1), z64, 1)),
                       ('undoa', (b'x', 1)), ('restorea', (oid(1), z64, b'x', None, 1)),
                       ('checkCurrentSerialInTransaction', (oid(1), z64, 1)), ('storeBlobStart', ()),
                       ('storeBlobChunk', (b'x',)), ('stores', (b'', b'', 1)), ('storeBlobEnd', (oid(1), z64, b'x', 1))]:
        with SocketPeer(server.address) as peer:  # without tpc_begin
            peer.tell(name, *args)
            peer.wait_for_end()
        with SocketPeer(server.address) as peer:
            assert survives_or_ends(peer, name, *args) == 'error'
            assert peer.call('ping') is None


# ---- roles


@pytest.mark.parametrize('kind', ['zeo', 'ZEO'])
@pytest.mark.filterwarnings('ignore::ResourceWarning')  # stock clients may leave a file open
def test_roles_by_address_hold_for_clients_of_either_make(open_client: Open, kind: str) -> None:
    server = Server(both=True)
    server.options['role'] = f'admin={server.second_address}'
    with server:
        admin = open_client(kind, server.second_address)
        store(admin, z64, record=b'\x80\x03N.\x80\x03N.')
        admin.pack(time.time(), wait=True)
        server.log.wait_for('INFO zeo.audit: .*storage 1: pack as of .*: done')
        assert not admin.isReadOnly()
        with pytest.raises(Exception):
            open_client(kind, server, wait_timeout=1)
        server.log.wait_for('WARNING zeo.audit: .*refused to use this server')
        admin.close()
    server = Server(unix=True)
    server.options['role'] = f'read={server.address}'
    with server:
        reader = open_client(kind, server, read_only_fallback=True)
        assert reader.isReadOnly()
        with pytest.raises(ReadOnlyError):
            store(reader)
        server.log.wait_for('WARNING zeo.audit: .*refused to write')
        with pytest.raises(ReadOnlyError):
            reader.pack(time.time(), wait=True)
        reader.close()
    server = Server(unix=True)
    server.options['role'] = f'write={server.address}'
    with server:
        writer = open_client(kind, server)
        store(writer)
        with pytest.raises(ReadOnlyError, match='only for the role admin'):
            writer.pack(time.time(), wait=True)
        [last] = writer.undoLog(0, 1)
        with pytest.raises(Exception, match='only for the role admin'):
            undo(writer, last['id'])
        store(writer)
        writer.close()


def test_roles_by_the_name_in_a_certificate_hold(open_client: Open, certificates: Certificates) -> None:
    server = Server(tls_certificate=certificates.server, tls_authenticate=certificates.ca)
    ada = {'ssl': {'authenticate': certificates.ca, 'certificate': certificates.client}}
    bob = {'ssl': {'authenticate': certificates.ca, 'certificate': certificates.revoked}}  # of which no list tells
    server.options['role'] = 'write=cn:ada'
    with server:
        writer = open_client('zeo', server, **ada)
        store(writer)
        with pytest.raises(ReadOnlyError, match='only for the role admin'):
            writer.pack(time.time(), wait=True)
        server.log.wait_for(r'WARNING zeo.audit: 127.0.0.1:\d+, certificate ada: refused to pack: only for')
        with pytest.raises(zeo.ClientStorageError, match='no role for you'):
            open_client('zeo', server, wait_timeout=1, **bob)
        server.log.wait_for(r'WARNING zeo.audit: 127.0.0.1:\d+, certificate bob: refused to use this server')
        writer.close()
    server = Server(tls_certificate=certificates.server, tls_authenticate=certificates.ca)
    server.options['role'] = 'admin=cn:bob'
    with server:
        admin = open_client('zeo', server, **bob)
        store(admin, z64, record=b'\x80\x03N.\x80\x03N.')
        admin.pack(time.time(), wait=True)
        server.log.wait_for(r'INFO zeo.audit: 127.0.0.1:\d+, certificate bob: storage 1: pack as of .*: done')
        admin.close()


def undo(storage: Any, tid: bytes) -> None:
    meta = TransactionMetaData()
    storage.tpc_begin(meta)
    try:
        storage.undo(tid, meta)
        storage.tpc_vote(meta)
        storage.tpc_finish(meta)
    finally:
        storage.tpc_abort(meta)
