"""A connection as its client meets it: handshake, limits, TLS, and what is left of it."""

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
from functools import partial
from typing import Any

import pytest
from ZODB.utils import z64

from tests.server.running import LOCAL
from tests.server.running import Connect
from tests.server.running import Start
from tests.server.running import connect
from tests.server.running import is_closed
from tests.server.running import open_files
from tests.server.running import server
from tests.server.running import start
from tests.server.talk import PATIENCE
from tests.server.talk import Gate
from tests.server.talk import GatedStorage
from tests.server.talk import SocketPeer
from tests.server.talk import in_thread
from tests.server.talk import oid
from tests.system.certificates import Certificates
from tests.system.servers import until
from zeo.server import connection as module
from zeo.server.limits import FIRST_FRAMES
from zeo.server.limits import Limits
from zeo.server.roles import Role
from zeo.server.roles import Roles
from zeo.server.roles import Rule
from zeo.server.seldom import Ration
from zeo.server.writer import Line
from zeo.StorageServer import StorageServer
from zeo.wire import messages
from zeo.wire.certificates import client_context
from zeo.wire.certificates import server_context
from zeo.wire.framing import frame
from zeo.wire.greeting import GREETING
from zeo.wire.greeting import PROBE
from zeo.wire.greeting import TLS_ALERT


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
    peer.send(PROBE)
    report = peer.receive()
    assert report is not None and report.isascii()
    status = json.loads(report)
    assert status.keys() == {'one', 'two'} and status['one']['last-transaction'] == '0' * 16
    assert peer.receive() is None


def test_who_has_no_role_is_told_no_status_either(
        start: Start, connect: Connect, caplog: pytest.LogCaptureFixture) -> None:
    server = start(roles=Roles([Rule(Role.ADMIN, certificate='somebody else')]))
    peer = connect(server, register=False)
    peer.send(PROBE)
    assert peer.receive() is None
    assert 'refused to use this server: it has no role' in caplog.text
    rule = Rule(Role.READ, port=server.addresses[0][1])  # type: ignore[arg-type]
    server.roles = Roles([rule])
    peer = connect(server, register=False)
    peer.send(PROBE)
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


@pytest.mark.parametrize('at_once', [True, False])
def test_who_was_told_that_it_has_registered_makes_room_for_nobody(
        start: Start, connect: Connect, monkeypatch: pytest.MonkeyPatch, at_once: bool) -> None:
    """Not even for who comes in at another address while the answer is hardly sent."""
    server = start(addresses=[LOCAL, LOCAL], limits=Limits(max_connections=1))
    server.storages['1'].announces_itself = not at_once
    gate, push = Gate(), Line.push

    def pushed(line: Line, *args: Any) -> None:
        push(line, *args)
        if any(each.line is line and each.session.is_registered for each in server.connections):
            gate.go_through()

    monkeypatch.setattr(Line, 'push', pushed)
    gate.shut()
    peer = connect(server, register=False)
    peer.send(GREETING)
    number = peer.ask('register', '1', False)
    gate.wait_until_reached()
    late = connect(server.addresses[1], register=False)
    gate.open()
    assert late.greeting is None, 'there is no room'
    peer.start_reading()
    assert peer.answer(number) == z64
    assert peer.call('ping') is None


def test_frames_are_short_before_register_and_long_after_it(connect: Connect, server: StorageServer) -> None:
    peer = connect(server, register=False)
    peer.sock.sendall(struct.pack('>I', FIRST_FRAMES + 1))
    assert is_closed(peer)
    peer = connect(server, register=False, reading=False)
    peer.send(GREETING)
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


# ---- TLS


@pytest.fixture
def secure(start: Start, certificates: Certificates) -> StorageServer:
    return start(ssl=server_context(certificates.server, authenticate=certificates.ca))


def test_the_name_in_its_certificate_is_known_of_a_client(
        secure: StorageServer, certificates: Certificates) -> None:
    context = client_context(certificates.client, authenticate=certificates.ca)
    with socket.create_connection(secure.addresses[0]) as sock:  # type: ignore[arg-type]
        with context.wrap_socket(sock, server_hostname='localhost') as peer:
            assert peer.recv(6) == b''.join(frame(GREETING))
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
            assert peer.recv(6) == b''.join(frame(GREETING))
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
        assert sock.recv(100) == TLS_ALERT
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
