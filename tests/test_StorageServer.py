"""The server as its clients meet it: addresses, handshake, limits, and the end in order."""

import contextlib
import errno
import gc
import json
import logging
import os
import socket
import ssl
import struct
import threading
import weakref
from collections.abc import Callable
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from ZODB.FileStorage import FileStorage
from ZODB.MappingStorage import MappingStorage
from ZODB.utils import z64

from tests.server.talk import PATIENCE
from tests.server.talk import GatedStorage
from tests.server.talk import SocketPeer
from tests.server.talk import in_thread
from tests.server.talk import oid
from tests.system.certificates import Certificates
from tests.system.servers import until
from zeo import StorageServer as module
from zeo.server import pulse
from zeo.server.limits import FIRST_FRAMES
from zeo.server.limits import Limits
from zeo.server.roles import Role
from zeo.server.roles import Roles
from zeo.server.roles import Rule
from zeo.server.seldom import Ration
from zeo.server.served import Served
from zeo.StorageServer import StorageServer
from zeo.wire import messages
from zeo.wire.certificates import client_context
from zeo.wire.certificates import server_context
from zeo.wire.framing import frame

Start = Callable[..., StorageServer]
Connect = Callable[..., SocketPeer]

LOCAL = ('127.0.0.1', 0)


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a server over a `GatedStorage`; all are closed at the end, and leave nothing behind."""
    before = set(threading.enumerate())
    servers: list[StorageServer] = []

    def start(storages: dict[str, Any] | None = None, addresses: Any = (LOCAL,), **options: Any) -> Any:
        server = StorageServer({'1': GatedStorage()} if storages is None else storages, addresses,
                               **options)
        servers.append(server)
        server.start()
        return server

    yield start
    for server in servers:
        for served in server.storages.values():
            if isinstance(served.storage, GatedStorage):
                served.storage.gates.open_all()
        server.close()
    until(lambda: {each for each in threading.enumerate() if each.name.startswith('zeo')} <= before,
          'no thread is left')


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Connect to a server, at its first address if it is not another one."""
    peers: list[SocketPeer] = []

    def connect(server: Any, **kw: Any) -> SocketPeer:
        address = server.addresses[0] if isinstance(server, StorageServer) else server
        peers.append(SocketPeer(address, **kw))
        return peers[-1]

    yield connect
    for peer in peers:
        peer.close()


@pytest.fixture
def server(start: Start) -> StorageServer:
    return start()


def storage(server: StorageServer) -> GatedStorage:
    found = server.storages['1'].storage
    assert isinstance(found, GatedStorage)
    return found


def open_files() -> int:
    return len(os.listdir('/proc/self/fd'))


def is_closed(peer: SocketPeer) -> bool:
    """Wait for the end of a connection that nobody reads from yet."""
    try:
        while peer.sock.recv(2**16):
            pass
    except ConnectionResetError:
        pass
    return True


# ---- addresses


def test_a_server_listens_on_all_its_addresses(start: Start, connect: Connect, tmp_path: Path) -> None:
    path = str(tmp_path / 'socket')
    server = start(addresses=[('127.0.0.1', 0), ('::1', 0), path])
    assert len(server.addresses) == 3 and path in server.addresses
    assert all(port for _, port in filter(lambda each: each != path, server.addresses))
    one, *others = [connect(address) for address in server.addresses]
    committed = one.commit(oid(1), b'record')
    for other in others:
        other.wait(lambda each: each[2] == 'invalidateTransaction', 'the news')
        assert other.load(oid(1)) == (b'record', committed, None)


def test_a_server_that_cannot_listen_somewhere_listens_nowhere_and_can_be_closed(
        start: Start, server: StorageServer, tmp_path: Path) -> None:
    path = str(tmp_path / 'socket')
    late = StorageServer({'1': MappingStorage()}, [path, server.addresses[0]])
    with pytest.raises(OSError, match='in use'):
        late.start()
    assert not os.path.exists(path) and late.addresses == []
    closing = in_thread(late.close)
    closing.result(PATIENCE)


def test_a_server_that_was_never_started_can_be_closed() -> None:
    server = StorageServer({'1': MappingStorage()}, [LOCAL], transaction_timeout=30)
    server.close()
    server.close()


# ---- handshake


def test_the_server_speaks_first(connect: Connect, server: StorageServer) -> None:
    assert connect(server, register=False).greeting == b'Z5'


@pytest.mark.parametrize('answer', [b'X5', b'Z4', b'Z309', b'M5', b'Z6', b'z5', b'Z5 ', b'GET / HTTP/1.0'])
def test_an_answer_in_another_protocol_ends_the_connection(
        connect: Connect, server: StorageServer, answer: bytes, caplog: pytest.LogCaptureFixture) -> None:
    peer = connect(server, register=False)
    peer.send(answer)
    assert is_closed(peer)
    until(lambda: not server.connections, 'it is forgotten')
    assert 'does not speak Z5' in caplog.text


def test_a_probe_is_told_the_status_of_all_storages(start: Start, connect: Connect) -> None:
    server = start({'one': GatedStorage(), 'two': GatedStorage()})
    peer = connect(server, register=False)
    peer.send(messages.PROBE)
    report = peer.receive()
    assert report is not None and report.isascii()
    status = json.loads(report)
    assert status.keys() == {'one', 'two'} and status['one']['last-transaction'] == '0' * 16
    assert peer.receive() is None


def test_who_has_no_role_is_told_no_status_either(
        start: Start, connect: Connect, caplog: pytest.LogCaptureFixture) -> None:
    server = start(roles=Roles([Rule(Role.ADMIN, certificate='somebody else')]))
    peer = connect(server, register=False)
    peer.send(messages.PROBE)
    assert peer.receive() is None
    assert 'refused to use this server: it has no role' in caplog.text
    rule = Rule(Role.READ, port=server.addresses[0][1])  # type: ignore[arg-type]
    server.roles = Roles([rule])
    peer = connect(server, register=False)
    peer.send(messages.PROBE)
    assert json.loads(peer.receive() or b'').keys() == {'1'}


def test_who_comes_and_goes_does_not_fill_the_log(
        start: Start, connect: Connect, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level('INFO')
    monkeypatch.setattr(Ration, 'MOST', 10)
    server = start()
    for _ in range(20):
        peer = connect(server)
        peer.tell('set_client_label', 'often')
        with pytest.raises(Exception):
            peer.call('vote', 1)
        peer.close()
    until(lambda: not server.connections, 'all have left')
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 11 and sum('so often' in line for line in lines) == 1


def test_without_another_thread_who_is_there_goes_on_and_the_log_has_one_line(
        start: Start, connect: Connect, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def start_no_more(thread: threading.Thread) -> None:
        if thread.name == 'zeo spare':
            raise RuntimeError("can't start new thread")
        begin(thread)

    server = start()
    peer = connect(server)
    peer.call('ping')  # so it has its thread
    begin = threading.Thread.start
    monkeypatch.setattr(threading.Thread, 'start', start_no_more)
    [listener] = server._listeners
    waits = []
    monkeypatch.setattr(listener._pause, 'wait', waits.append)
    for _ in range(10):
        refused = connect(server, register=False)
        refused.send(b'what is no greeting')
        assert is_closed(refused)
        peer.call('ping')
    until(lambda: len(waits) == 10, 'the last one was noticed')
    monkeypatch.undo()
    connect(server).call('ping')
    until(lambda: 'again' in caplog.text, 'the last line is written')
    assert [record.getMessage().partition(': ')[2] for record in caplog.records if record.levelname != 'INFO'] == [
        "no connections can be accepted for now: can't start new thread", 'connections are accepted again']
    assert not [record for record in caplog.records if record.exc_info] and waits == [1.0] * 10


@pytest.mark.parametrize('say', [
    lambda peer: None,
    lambda peer: peer.sock.sendall(b'\0\0'),
    lambda peer: peer.send(b'Z5'),
    lambda peer: (peer.send(b'Z5'), peer.ask('register', 'nobody', False))],
    ids=['nothing', 'half a frame', 'no register', 'register in vain'])
def test_who_takes_too_long_to_introduce_himself_is_disconnected(
        start: Start, connect: Connect, say: Callable[[SocketPeer], Any],
        caplog: pytest.LogCaptureFixture) -> None:
    server = start(limits=Limits(registration_timeout=.1))
    peer = connect(server, register=False)
    say(peer)
    assert is_closed(peer)
    assert 'took too long to introduce itself' in caplog.text


def test_who_keeps_talking_does_not_get_more_time(start: Start, connect: Connect) -> None:
    peer = connect(start(limits=Limits(registration_timeout=.1)), register=False)
    peer.send(b'Z5')
    with pytest.raises(OSError):
        while True:
            peer.ask('register', 'nobody', False)


def test_who_is_registered_has_all_the_time(start: Start, connect: Connect) -> None:
    server = start(limits=Limits(registration_timeout=.1))
    peer, late = connect(server), connect(server, register=False)
    assert is_closed(late)  # so much time has gone by
    assert peer.call('ping') is None


@pytest.mark.parametrize('secure', [False, True], ids=['plain', 'TLS'])
def test_who_gave_signs_of_life_and_then_gives_none_has_vanished(
        start: Start, certificates: Certificates, monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture, secure: bool) -> None:
    """Its transaction is ended; who goes on giving signs, or never gave any, may be silent."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(module, 'SILENCE', .6)
    options = {'ssl': server_context(certificates.server)} if secure else {}
    server = start(transaction_timeout=None, limits=Limits(idle_timeout=None if secure else 60), **options)
    context = client_context(certificates.client, authenticate=certificates.ca)

    def come_in(*signs: bytes) -> SocketPeer:
        peer = SocketPeer(server.addresses[0], wrap=partial(context.wrap_socket, server_hostname='localhost')
                          if secure else lambda sock: sock)
        peers.callback(peer.close)
        for sign in signs:
            peer.sock.sendall(sign)
        return peer

    beat, pulse = (b''.join(each) for each in (messages.HEARTBEAT, messages.notice('pulse')))
    with contextlib.ExitStack() as peers:
        beating, quiet, waiting = come_in(beat), come_in(), come_in()
        vanished = [come_in(pulse), come_in(beat), come_in(pulse, beat)]
        vanished[0].begin(1, (oid(1), z64, b'x'))
        vanished[0].call('vote', 1)
        waiting.begin(1, (oid(2), z64, b'x'))
        vote = waiting.ask('vote', 1)
        for peer in vanished:
            while not peer.wait_for_end(.05):
                beating.sock.sendall(beat)
        waiting.answer(vote)
        waiting.call('tpc_finish', 1)
        for peer in beating, quiet:
            assert peer.call('ping') is None
    until(lambda: not server.connections, 'all is given back')
    assert caplog.text.count('it has not said anything for 0.6 s') == len(vanished)


def test_who_is_lost_because_the_network_gave_up_was_not_late(
        start: Start, connect: Connect, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The kernel's time-out (`TCP_USER_TIMEOUT`) is a `TimeoutError`, too."""
    caplog.set_level(logging.INFO)

    def converse(*_: Any) -> None:
        raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))

    monkeypatch.setattr(module.Connection, '_converse', converse)
    server = start()
    connect(server).wait_for_end()
    until(lambda: not server.connections, 'it is forgotten')
    assert ': lost: Connection timed out' in caplog.text
    assert 'introduce itself' not in caplog.text


def test_frames_are_short_before_register_and_long_after_it(connect: Connect, server: StorageServer) -> None:
    peer = connect(server, register=False)
    peer.sock.sendall(struct.pack('>I', FIRST_FRAMES + 1))
    assert is_closed(peer)
    peer = connect(server, register=False, reading=False)
    peer.send(messages.GREETING)
    peer.ask('register', '1', False)
    peer.begin(1, (oid(1), z64, b'x' * FIRST_FRAMES * 10))  # without waiting for an answer
    peer.start_reading()
    peer.call('vote', 1)
    peer.call('tpc_finish', 1)


@pytest.mark.parametrize('data', [
    b'\0\0\0\0', struct.pack('>I', Limits().max_message + 1), b'\xff' * 4, b'\0\0\0\3abc'],
    ids=['empty', 'too long', '4 GB', 'nonsense'])
def test_what_is_no_frame_or_no_message_ends_that_connection_only(
        connect: Connect, server: StorageServer, data: bytes, caplog: pytest.LogCaptureFixture) -> None:
    bad, good = connect(server), connect(server)
    bad.sock.sendall(data)
    bad.wait_for_end()
    until(lambda: len(server.connections) == 1, 'it is forgotten')
    assert good.call('ping') is None
    lines = [record for record in caplog.records if 'disconnected' in record.getMessage()]
    assert len(lines) == 1 and not lines[0].exc_info


def test_requests_that_come_together_are_answered_in_order(connect: Connect, server: StorageServer) -> None:
    peer = connect(server)
    numbers = range(1000, 2000)
    peer.sock.sendall(b''.join(b''.join(messages.request(number, 'ping')) for number in numbers))
    for number in numbers:
        assert peer.answer(number) is None
    assert [each[0] for each in peer.told][-1000:] == list(numbers)


def test_a_message_may_come_byte_by_byte(connect: Connect, server: StorageServer) -> None:
    peer = connect(server)
    for each in b''.join(messages.request(1000, 'ping')):
        peer.sock.sendall(bytes([each]))
    assert peer.answer(1000) is None


def test_what_was_answered_before_an_error_is_sent(connect: Connect, server: StorageServer) -> None:
    peer = connect(server)
    peer.sock.sendall(b''.join(messages.request(1000, 'ping')) + b'\0\0\0\0')
    assert peer.answer(1000) is None
    peer.wait_for_end()


def test_idle_connections_are_kept_alive_and_small_frames_are_not_held_back(
        connect: Connect, server: StorageServer) -> None:
    connect(server)
    [connection] = server.connections
    sock = connection.line.sock
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == module.KEEPALIVE_IDLE
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == module.KEEPALIVE_INTERVAL
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == module.KEEPALIVE_COUNT
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == module.VANISHED_AFTER * 1000
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT) == module.UNSENT
    assert os.get_blocking(sock.fileno())


# ---- TLS


@pytest.fixture
def secure(start: Start, certificates: Certificates) -> StorageServer:
    return start(ssl=server_context(certificates.server, authenticate=certificates.ca))


def test_the_name_in_its_certificate_is_known_of_a_client(
        secure: StorageServer, certificates: Certificates) -> None:
    context = client_context(certificates.client, authenticate=certificates.ca)
    with socket.create_connection(secure.addresses[0]) as sock:  # type: ignore[arg-type]
        with context.wrap_socket(sock, server_hostname='localhost') as peer:
            assert peer.recv(6) == b''.join(frame(messages.GREETING))
            [connection] = secure.connections
            assert connection.session.certificate_name == 'ada'


def test_without_tls_there_is_no_name(connect: Connect, server: StorageServer) -> None:
    connect(server)
    assert [each.session.certificate_name for each in server.connections] == [None]


@pytest.mark.parametrize('said', [b'\x16', b'\x16\x03\x01\x02\x00\x01'])
def test_a_handshake_of_tls_that_does_not_come_to_an_end_is_cut_off(
        secure: StorageServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
        said: bytes) -> None:
    monkeypatch.setattr(module, 'FIRST_WORD_PATIENCE', .1)
    with socket.create_connection(secure.addresses[0]) as sock:  # type: ignore[arg-type]
        sock.sendall(said)
        sock.settimeout(PATIENCE)
        assert sock.recv(100) == b''
    until(lambda: not secure.connections, 'it is forgotten')
    assert 'took too long to introduce itself' in caplog.text


def test_who_has_come_to_terms_about_tls_and_then_is_silent_is_cut_off(
        start: Start, certificates: Certificates) -> None:
    secure = start(ssl=server_context(certificates.server), limits=Limits(registration_timeout=.3))
    context = client_context(certificates.client, authenticate=certificates.ca)
    with socket.create_connection(secure.addresses[0]) as sock:  # type: ignore[arg-type]
        with context.wrap_socket(sock, server_hostname='localhost') as peer:
            peer.settimeout(PATIENCE)
            assert peer.recv(6) == b''.join(frame(messages.GREETING))
            assert peer.recv(6) == b''


def test_who_says_a_byte_of_a_record_now_and_then_gets_no_more_time(
        start: Start, certificates: Certificates) -> None:
    secure = start(ssl=server_context(certificates.server), limits=Limits(registration_timeout=.3))
    context = client_context(certificates.client, authenticate=certificates.ca)
    with socket.create_connection(secure.addresses[0]) as sock:  # type: ignore[arg-type]
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        talk = context.wrap_bio(incoming, outgoing, server_hostname='localhost')
        while True:
            try:
                talk.do_handshake()
                break
            except ssl.SSLWantReadError:
                sock.sendall(outgoing.read())
                incoming.write(sock.recv(2**16))
        talk.write(bytes(16_000))
        with pytest.raises(OSError):
            for each in outgoing.read():
                sock.sendall(bytes([each]))
                threading.Event().wait(.01)


def test_who_says_nothing_where_tls_is_spoken_is_told_so(
        secure: StorageServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(module, 'FIRST_WORD_PATIENCE', .1)
    with socket.create_connection(secure.addresses[0]) as sock:  # type: ignore[arg-type]
        sock.settimeout(PATIENCE)
        assert sock.recv(100) == messages.TLS_ALERT
    until(lambda: 'the client does not begin to speak TLS, and has to' in caplog.text, 'it is logged')


def test_a_server_with_a_handshake_in_progress_closes_at_once(secure: StorageServer) -> None:
    with socket.create_connection(secure.addresses[0]):  # type: ignore[arg-type]
        until(lambda: bool(secure.connections), 'it is there')
        in_thread(secure.close).result(module.FIRST_WORD_PATIENCE - 1)


def test_who_looks_whether_the_port_is_open_leaves_no_warning(
        secure: StorageServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    serve, served = secure.serve, threading.Event()
    monkeypatch.setattr(secure, 'serve', lambda *args: (serve(*args), served.set()))
    socket.create_connection(secure.addresses[0]).close()  # type: ignore[arg-type]
    assert served.wait(30)
    assert not [each for each in caplog.records if each.levelname != 'DEBUG']


# ---- connections end


def test_the_lock_of_a_client_that_is_killed_is_free_at_once(
        connect: Connect, server: StorageServer) -> None:
    victim, other = connect(server), connect(server)
    victim.begin(1, (oid(1), z64, b'record'))
    victim.call('vote', 1)
    other.begin(1, (oid(2), z64, b'record'))
    vote = other.ask('vote', 1)
    victim.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
    victim.close()  # by a reset, as when its process is killed with data unread
    assert other.answer(vote) == []
    other.call('tpc_finish', 1)


def test_a_transaction_that_takes_too_long_frees_the_lock_and_the_connection_is_forgotten(
        start: Start, connect: Connect) -> None:
    """In ZEO 6.2 the connection was closed, and the lock stayed with it."""
    server = start(transaction_timeout=.1)
    slow, other = connect(server), connect(server)
    slow.begin(1, (oid(1), z64, b'record'))
    slow.call('vote', 1)
    other.begin(1, (oid(2), z64, b'record'))
    assert other.call('vote', 1) == []
    other.call('tpc_finish', 1)
    slow.wait_for_end()
    until(lambda: other.call('server_status')['connections'] == 1, 'it is not counted')


@pytest.mark.parametrize('name, args', [
    ('no_such_method', ()), ('storea', (oid(1), z64, b'record', 5)), ('handle', (b'',))])
def test_a_client_that_is_cut_off_leaves_no_lock_behind(
        connect: Connect, server: StorageServer, name: str, args: tuple[Any, ...]) -> None:
    """In ZEO 6.2 it did."""
    bad, other = connect(server), connect(server)
    bad.begin(1, (oid(1), z64, b'record'))
    bad.call('vote', 1)
    bad.tell(name, *args)
    bad.wait_for_end()
    other.commit(oid(2), b'record')
    assert other.call('server_status')['connections'] == 1


def test_clients_that_leave_are_no_news(
        connect: Connect, server: StorageServer, caplog: pytest.LogCaptureFixture) -> None:
    for linger in (0, 1):
        peer = connect(server)
        peer.commit(oid(1), b'record')
        peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', linger, 0))
        peer.close()
    until(lambda: not server.connections, 'they are forgotten')
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


def test_nothing_is_left_of_connections_that_have_ended(connect: Connect, server: StorageServer) -> None:
    connect(server).commit(oid(1), b'record')
    files, threads = open_files(), threading.active_count()
    for _ in range(100):
        with SocketPeer(server.addresses[0]) as peer:
            peer.begin(1, (oid(2), z64, b'x'))
    until(lambda: len(server.connections) == 1, 'they are forgotten')
    assert threading.active_count() <= threads + 20, 'the threads were used again'
    assert open_files() == files
    assert server.storages['1'].status()['connections'] == 1
    assert server.storages['1'].status()['active_txns'] == 0


def test_a_connection_that_has_ended_is_freed_without_the_garbage_collector(
        connect: Connect, server: StorageServer) -> None:
    gc.disable()
    try:
        peer = connect(server)
        [connection] = server.connections
        parts = [weakref.ref(each) for each in (connection, connection.line, connection.session)]
        del connection
        peer.call('figures')  # which is answered by a job
        peer.close()
        until(lambda: not any(part() for part in parts), 'all is freed')
    finally:
        gc.enable()


def test_an_error_in_our_own_code_ends_one_connection_and_is_logged(
        connect: Connect, server: StorageServer, monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture) -> None:
    handle = module.Session.handle

    def failing(self: Any, payload: bytes) -> None:
        assert b'get_info' not in payload
        handle(self, payload)

    monkeypatch.setattr(module.Session, 'handle', failing)
    bad, good = connect(server), connect(server)
    bad.ask('get_info')
    bad.wait_for_end()
    until(lambda: len(server.connections) == 1, 'it is forgotten')
    assert good.call('ping') is None
    [record] = [record for record in caplog.records if record.exc_info]
    assert 'because of an error here' in record.getMessage()


# ---- when there are no more files or threads


class Scarce(socket.socket):
    """A listening socket of a process that has run out of files for a while."""

    failures = 3

    def accept(self) -> Any:
        if self.failures:
            self.failures -= 1
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return super().accept()


def test_without_files_the_log_is_not_flooded_and_connections_are_accepted_again(
        start: Start, connect: Connect, caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch) -> None:
    class Impatient(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            assert timeout, 'it pauses'
            return False

    listen = module.listening.listen
    monkeypatch.setattr(module.listening, 'listen', lambda *args: [
        Scarce(fileno=sock.detach()) for sock in listen(*args)])
    server = start()
    [listener] = server._listeners
    listener._pause = Impatient()
    assert connect(server).call('ping') is None
    until(lambda: 'again' in caplog.text, 'the last line is written')
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2 and 'for now: Too many open files' in lines[0] and 'again' in lines[1]


def test_a_connection_that_gets_no_thread_is_closed_and_the_next_is_served(
        connect: Connect, server: StorageServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, 'start', start)
        peer = connect(server, register=False)
        peer.send(b'what is no greeting')
        assert is_closed(peer)
    connect(server).commit(oid(1), b'record')


def test_a_connection_that_cannot_be_heard_is_closed_and_the_next_is_served(
        start: Start, connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start(limits=Limits(registration_timeout=0.1))
    [listener] = server._listeners

    def register(*_: Any) -> None:
        raise OSError(errno.ENOMEM, 'Cannot allocate memory')

    with monkeypatch.context() as patched:
        patched.setattr(listener._selector, 'register', register)
        assert is_closed(connect(server, register=False))
        until(lambda: not server.connections, 'nothing is left of it')
    connect(server).commit(oid(1), b'record')


# ---- who has not registered yet


def test_who_says_nothing_has_no_thread_and_goes_when_others_need_the_place(
        start: Start, connect: Connect) -> None:
    server = start(limits=Limits(max_connections=5))
    silent = [connect(server, register=False) for _ in range(20)]
    assert all(peer.greeting == messages.GREETING for peer in silent)
    assert not clients()
    assert all(map(is_closed, silent[:15]))
    connect(server).call('ping')
    assert len(server.connections) == 5


@pytest.mark.parametrize('at_once', [True, False])
def test_the_listener_registers_only_where_no_storage_is_asked(
        start: Start, connect: Connect, monkeypatch: pytest.MonkeyPatch, at_once: bool) -> None:
    """A storage that is asked may take long, and others want to come in."""
    threads = []
    catch_up = Served.catch_up

    def noted(self: Any, *args: Any) -> None:
        threads.append(threading.current_thread().name)
        catch_up(self, *args)

    monkeypatch.setattr(Served, 'catch_up', noted)
    server = start()
    server.storages['1'].announces_itself = not at_once
    connect(server).call('ping')
    assert threads[0].startswith('zeo accept' if at_once else 'zeo client')


def test_more_come_in_while_registering_takes_long(
        start: Start, connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start({'1': MappingStorage(), '2': MappingStorage()})
    may_go_on, told = threading.Event(), []
    slow = server.storages['2']
    slow.announces_itself = True

    def asked() -> bytes:
        told.append(may_go_on.wait(PATIENCE))
        return z64

    monkeypatch.setattr(slow, '_last_tid_of_storage', asked)
    waiting = connect(server, register=False)
    waiting.send(messages.GREETING)
    waiting.ask('register', '2', False)
    connect(server).call('ping')
    may_go_on.set()
    assert waiting.sock.recv(1)  # the answer
    assert told[0], 'the other one did not have to wait for it'


def test_threads_of_who_was_shown_out_are_not_more_than_there_may_be_connections(
        start: Start, connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    """They end when they get the processor, which may take a while: others wait for that."""
    server = start(limits=Limits(max_connections=3))
    may_leave = threading.Event()
    close = module.Connection.close

    def late(connection: Any) -> None:
        may_leave.wait(PATIENCE)
        close(connection)

    monkeypatch.setattr(module.Connection, 'close', late)
    strangers = [connect(server, register=False) for _ in range(3)]
    for peer in strangers:
        peer.send(messages.GREETING)
        peer.ask('register', 'nobody', False)
        assert peer.sock.recv(4)  # that there is no such storage
    until(lambda: len(clients()) == 3, 'all have a thread')
    coming = connect(server)  # for which one of them has to leave
    ping = coming.ask('ping')
    until(lambda: bool(server.threads._less._waiters), 'it waits')  # type: ignore[attr-defined]
    assert len(clients()) == 3
    may_leave.set()
    coming.answer(ping)
    assert len(clients()) <= 3


def clients() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name.startswith(('zeo client', 'zeo spare'))]


def test_close_lets_go_of_who_has_not_registered(server: StorageServer, connect: Connect) -> None:
    silent, greeting = (connect(server, register=False) for _ in range(2))
    greeting.send(messages.GREETING)
    in_thread(server.close).result(PATIENCE)
    assert all(map(is_closed, (silent, greeting)))
    assert not server.connections


# ---- the end


def test_clients_that_want_it_hear_that_the_server_lives_whatever_keeps_it_busy(
        start: Start, connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, 'PULSE_INTERVAL', 0.02)
    server = start()
    storage: Any = server.storages['1'].storage
    gate = storage.gates['loading']
    gate.shut()
    one, other = connect(server), connect(server)
    one.tell('pulse')
    load = one.ask('loadBefore', oid(1), z64)
    gate.wait_until_reached()

    def beats(peer: SocketPeer) -> int:
        return sum(name == 'pulse' for _, _, name, _ in peer.told)

    until(lambda: beats(one) > 3, 'there are signs of life')
    assert not beats(other)
    gate.open()
    with pytest.raises(KeyError):
        one.answer(load)


def test_close_ends_everything(start: Start, connect: Connect, tmp_path: Path) -> None:
    path = str(tmp_path / 'socket')
    kept = FileStorage(str(tmp_path / 'Data.fs'))
    server = start({'1': kept}, [LOCAL, path])
    address = server.addresses[0]
    peers = [connect(server), connect(path), connect(server, register=False)]
    peers[0].commit(oid(1), b'record')
    server.close()
    for peer in peers[:2]:
        peer.wait_for_end()
    assert is_closed(peers[2])
    assert not os.path.exists(path)
    with pytest.raises(ConnectionRefusedError):
        SocketPeer(address)
    again = FileStorage(str(tmp_path / 'Data.fs'))  # it is closed and unlocked
    assert again.load(oid(1))[0] == b'record'
    server = start({'1': again}, [address, path])  # the same port at once
    connect(server)


def test_close_may_be_called_again_and_by_many(server: StorageServer) -> None:
    closing = [in_thread(server.close) for _ in range(3)]
    for each in closing:
        each.result(PATIENCE)
    server.close()


def test_close_lets_a_finishing_transaction_finish(
        connect: Connect, server: StorageServer) -> None:
    peer = connect(server)
    peer.begin(1, (oid(1), z64, b'record'))
    peer.call('vote', 1)
    gate = storage(server).gates['finishing']
    gate.shut()
    finish = peer.ask('tpc_finish', 1)
    gate.wait_until_reached()
    closing = in_thread(server.close)
    until(lambda: server._closing and not server._listeners[0]._thread.is_alive(), 'it is closing')
    assert not closing.done()
    gate.open()
    committed = peer.answer(finish)  # acknowledged
    closing.result(PATIENCE)
    assert server.storages['1'].publisher.last_tid == committed
    assert 'tpc_abort' not in storage(server).calls


def test_a_finish_is_waited_for_however_long_it_takes(
        connect: Connect, server: StorageServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, 'CLOSING_PATIENCE', .01)
    peer = connect(server)
    peer.begin(1, (oid(1), z64, b'record'))
    peer.call('vote', 1)
    gate = storage(server).gates['finishing']
    gate.shut()
    peer.ask('tpc_finish', 1)
    gate.wait_until_reached()
    closing = in_thread(server.close)
    peer.wait_for_end()  # it was hung up on
    assert not closing.done()
    gate.open()
    closing.result(PATIENCE)
    assert storage(server).calls == ['tpc_begin', 'tpc_vote', 'tpc_finish']


def test_close_aborts_what_is_voted_and_cancels_what_waits_before_the_storage_is_closed(
        connect: Connect, server: StorageServer) -> None:
    voted, waiting, begun = (connect(server) for _ in range(3))
    for number, peer in enumerate((voted, waiting, begun)):
        peer.begin(1, (oid(number), z64, b'record'))
    voted.call('vote', 1)
    waiting.ask('vote', 1)
    waiting.call('ping')
    begun.call('ping')
    kept = storage(server)
    close = kept._storage.close
    kept._storage.close = lambda: (kept.calls.append('close'), close())
    server.close()
    assert kept.calls[:2] == ['tpc_begin', 'tpc_vote']
    assert kept.calls[-2:] == ['tpc_abort', 'close']
    assert kept.calls.count('tpc_finish') == 0
    assert server.storages['1'].active_txns == 0


def test_clients_that_do_not_read_hold_up_the_end_only_once(
        connect: Connect, server: StorageServer, monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture) -> None:
    """However many they are: all are given time together."""
    monkeypatch.setattr(module, 'CLOSING_PATIENCE', .2)
    monkeypatch.setattr(module, 'LAST_WORDS_PATIENCE', PATIENCE)
    connect(server).commit(oid(1), b'x' * 2**22)
    stuck = [connect(server, reading=False) for _ in range(10)]
    for peer in stuck:
        for _ in range(5):
            peer.ask('loadBefore', oid(1), b'\x7f' + b'\xff' * 7)
    until(lambda: sum(connection.session.outbox._waiting for connection in server.connections) == 10,
          'all wait for room')
    in_thread(server.close).result(PATIENCE)
    assert caplog.text.count('does not end by itself') == 10


def test_the_last_words_are_sent_but_not_waited_for_endlessly(
        connect: Connect, server: StorageServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, 'LAST_WORDS_PATIENCE', .1)
    peer = connect(server)
    peer.commit(oid(1), b'x' * 2**22)
    stuck = connect(server, reading=False)
    stuck.ask('loadBefore', oid(1), b'\x7f' + b'\xff' * 7)
    stuck.sock.shutdown(socket.SHUT_WR)
    until(lambda: len(server.connections) == 1, 'it is given up')


def test_a_storage_under_two_names_is_closed_once_and_one_that_fails_does_not_keep_the_others(
        start: Start, connect: Connect, caplog: pytest.LogCaptureFixture) -> None:
    closed = []

    class Closing(MappingStorage):
        def close(self) -> None:
            closed.append(self)
            raise OSError(5, 'as it happens')

    one, two = Closing(), Closing()
    server = start({'a': one, 'b': one, 'c': two})
    assert server.storages['a'] is server.storages['b'] is not server.storages['c']
    first, second = connect(server, name='a'), connect(server, name='b')
    committed = first.commit(oid(1), b'record')
    second.wait(lambda each: each[2] == 'invalidateTransaction', 'the news')
    assert second.load(oid(1)) == (b'record', committed, None)
    server.close()
    assert sorted(map(id, closed)) == sorted(map(id, (one, two)))
    assert caplog.text.count('cannot be closed') == 2


def test_who_connects_while_the_server_closes_is_not_served(
        connect: Connect, server: StorageServer) -> None:
    ours, theirs = socket.socketpair()
    server.close()
    assert server.admit(ours, 'late') is None
    assert theirs.recv(1) == b'' and ours.fileno() == -1
    theirs.close()
