"""From addresses to sockets on which a server has greeted."""

import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.client.conftest import Calls
from tests.client.peer import Host
from tests.system.certificates import Certificates
from zeo.client import dialing
from zeo.client.dialing import Line
from zeo.client.dialing import NobodyListens
from zeo.client.dialing import Security
from zeo.client.dialing import dial
from zeo.client.dialing import display
from zeo.client.dialing import parse_addresses
from zeo.errors import ClientDisconnected
from zeo.wire.certificates import client_context
from zeo.wire.certificates import server_context
from zeo.wire.framing import frame
from zeo.wire.greeting import TLS_ALERT
from zeo.wire.tls import Tls


@pytest.mark.parametrize('given, parsed', [
    (('example.org', 8100), [('example.org', 8100)]),
    (['example.org', 8100], [('example.org', 8100)]),
    (('', 8100), [('localhost', 8100)]),
    ((None, 8100), [('localhost', 8100)]),
    (8100, [('localhost', 8100)]),
    ('/run/zeo.sock', ['/run/zeo.sock']),
    ([('a', 1), '/b', 3], [('a', 1), '/b', ('localhost', 3)]),
    ((('a', 1), ('b', 2)), [('a', 1), ('b', 2)]),
    (('/a', '/b'), ['/a', '/b']),
    (Path('/a'), ['/a']),
    (('a.sock', 'b.sock'), ['a.sock', 'b.sock']),
    (('one', './two'), ['one', './two']),
    ((Path('one'), Path('two')), ['one', 'two']),
    (['one', 'two', 'three'], ['one', 'two', 'three']),
    ([Path('/a'), ('b', 1)], ['/a', ('b', 1)]),
    (('::1', 8100), [('::1', 8100)]),
    (('[::1]', 8100), [('::1', 8100)]),
])
def test_addresses_are_understood(given: Any, parsed: Any) -> None:
    assert parse_addresses(given) == parsed


@pytest.mark.parametrize('given', [
    None, '', [], (), 0, 65536, -1, True, ('a', 0), ('a', 'b', ''), ('a', '8100'), 'a:8100', ':8100', '8100', (1, 'a', None), {},
    b'/path', Path(':1'), ('a', 1.5), [('a', 1), None], ('a', True), '/a\0b'])
def test_what_is_no_address_is_a_clear_error(given: Any) -> None:
    with pytest.raises(ValueError, match='not the address of a server'):
        parse_addresses(given)


@pytest.mark.parametrize('given', [
    ('localhost', '9999x'), ('db.example.org', '0x270f'), ['localhost', ' 9999'], ('localhost', 'zeo'), ('', 'x')])
def test_a_port_with_a_slip_in_it_is_not_taken_for_a_socket_file(given: Any) -> None:
    with pytest.raises(ValueError, match='a port is a number; of a socket file in this folder, give the path: ./'):
        parse_addresses(given)


def test_addresses_are_shown_as_people_write_them() -> None:
    assert [display(('a', 1)), display(('::1', 1)), display('/a')] == ['a:1', '[::1]:1', '/a']


@pytest.fixture
def interruption() -> Iterator[tuple[socket.socket, socket.socket]]:
    read, write = socket.socketpair()
    yield read, write
    read.close()
    write.close()


@pytest.fixture
def refused() -> tuple[str, int]:
    """An address where nobody listens."""
    with socket.socket() as sock:
        sock.bind(('127.0.0.1', 0))
        return sock.getsockname()  # type: ignore[no-any-return]


def first(addresses: Any, interruption: Any) -> Line | None:
    lines = dial(addresses, interruption[0])
    try:
        return next((line for line in lines if line is not None), None)
    finally:
        lines.close()


def test_a_server_that_greets_is_found(host: Host, interruption: Any, calls: Calls) -> None:
    line = calls.start(first, [host.address], interruption)
    host.accept().greet()
    found = line()
    assert found.address == host.address
    found.sock.close()


def test_a_unix_socket_is_an_address(tmp_path: Path, interruption: Any, calls: Calls) -> None:
    host = Host(str(tmp_path / 's'))
    line = calls.start(first, [str(tmp_path / 's')], interruption)
    host.accept().greet()
    line().sock.close()
    host.close()


def test_addresses_that_fail_are_passed_over(
        host: Host, refused: Any, tmp_path: Path, interruption: Any, calls: Calls) -> None:
    line = calls.start(first, [refused, str(tmp_path / 'none'), host.address], interruption)
    host.accept().greet()
    line().sock.close()


def test_a_server_that_is_silent_does_not_hold_up_the_next(
        host: Host, second_host: Host, interruption: Any, calls: Calls) -> None:
    line = calls.start(first, [host.address, second_host.address], interruption)
    silent = host.accept()
    second_host.accept().greet()
    found = line()
    assert found.address == second_host.address
    found.sock.close()
    assert silent.at_end()


@pytest.mark.parametrize('greeting', [b'Z4', b'Z309', b'Z3101', b'M5', b'HTTP/1.1 400'])
def test_a_server_of_another_protocol_is_left_without_a_request(
        host: Host, interruption: Any, calls: Calls, greeting: bytes) -> None:
    line = calls.start(first, [host.address], interruption)
    peer = host.accept()
    peer.send(frame(greeting))
    with pytest.raises(ClientDisconnected, match='protocol'):
        line()
    assert peer.at_end()


def test_a_server_of_a_later_protocol_is_answered_with_ours(
        host: Host, interruption: Any, calls: Calls) -> None:
    line = calls.start(first, [host.address], interruption)
    peer = host.accept()
    peer.send(frame(b'Z6'))
    assert peer.payload() == b'Z5'
    line().sock.close()


@pytest.mark.parametrize('said', [b'GET / HTTP/1.1\r\n\r\n', b'\0\0\0\0', b''])
def test_what_is_no_server_fails_at_once(
        host: Host, interruption: Any, calls: Calls, said: bytes) -> None:
    line = calls.start(first, [host.address], interruption)
    peer = host.accept()
    peer.sock.sendall(said)
    peer.sock.shutdown(socket.SHUT_WR)
    with pytest.raises(ClientDisconnected):
        line()


def test_a_silent_server_fails_after_a_while(
        host: Host, interruption: Any, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialing, 'PATIENCE', 0.05)
    line = calls.start(first, [host.address], interruption)
    host.accept()
    with pytest.raises(ClientDisconnected, match='no answer'):
        line()


def test_failing_names_every_address_and_why(refused: Any, tmp_path: Path, interruption: Any) -> None:
    path = str(tmp_path / 'none')
    with pytest.raises(ClientDisconnected) as raised:
        first([refused, path], interruption)
    assert display(refused) in str(raised.value)
    assert path in str(raised.value)


def test_dialing_can_be_interrupted(host: Host, interruption: Any, calls: Calls) -> None:
    line = calls.start(first, [host.address], interruption)
    peer = host.accept()
    interruption[1].send(b'.')
    assert line() is None
    assert peer.at_end()


def test_a_connection_does_not_delay_and_finds_dead_peers(
        host: Host, interruption: Any, calls: Calls) -> None:
    line = calls.start(first, [host.address], interruption)
    host.accept().greet()
    sock = line().sock
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    if hasattr(socket, 'TCP_KEEPIDLE'):
        idle, interval, probes = (
            sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name))
            for name in ('TCP_KEEPIDLE', 'TCP_KEEPINTVL', 'TCP_KEEPCNT'))
        assert idle + interval * probes <= dialing.DEAD_AFTER
    if hasattr(socket, 'TCP_USER_TIMEOUT'):
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) \
            == dialing.DEAD_AFTER * 1000
    sock.close()


def test_a_unix_server_that_does_not_accept_is_an_error(
        tmp_path: Path, interruption: Any, calls: Calls) -> None:
    path = str(tmp_path / 's')
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(0)
    filling = socket.socket(socket.AF_UNIX)
    filling.connect(path)
    try:
        with pytest.raises(ClientDisconnected, match='does not accept'):
            first([path], interruption)
    finally:
        filling.close()
        listener.close()


def test_while_there_is_nothing_new_the_caller_is_asked_to_wait(
        host: Host, interruption: Any) -> None:
    lines = dial([host.address], interruption[0])
    assert next(lines) is None
    lines.close()




# ---- TLS


@pytest.mark.parametrize('said', [TLS_ALERT, b'\x16\x03\x03\0\x7a'])
def test_a_server_that_speaks_tls_is_recognized(
        host: Host, interruption: Any, calls: Calls, said: bytes) -> None:
    line = calls.start(first, [host.address], interruption)
    host.accept().sock.sendall(said)
    with pytest.raises(ClientDisconnected, match='the server speaks TLS: ask for it with ssl=True'):
        line()


def test_a_host_without_its_port_is_told_from_a_server_that_is_away(interruption: Any) -> None:
    with pytest.raises(ClientDisconnected, match=r'localhost: there is no such socket file; a port is named by'):
        first(['localhost'], interruption)


def test_what_is_no_socket_is_told_from_a_server_that_is_away(interruption: Any, tmp_path: Path) -> None:
    (tmp_path / 'file').touch()
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(tmp_path / 'sock'))
    for name, text in {'.': ': this is a folder, and', 'file': 'file: this is a file, and not the socket of a server',
                       'sock': 'sock: .Errno 111. Connection refused'}.items():
        with pytest.raises(ClientDisconnected, match=text):
            first([str(tmp_path / name)], interruption)


def test_a_server_that_says_nothing_may_wait_for_tls(
        host: Host, interruption: Any, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialing, 'PATIENCE', .05)
    with pytest.raises(ClientDisconnected, match='no answer within 0.05 seconds; perhaps it is stopped, or hangs;'
                       ' or the server speaks TLS'):
        first([host.address], interruption)
    with pytest.raises(ClientDisconnected, match=r'within 0.05 seconds; perhaps it is stopped, or hangs\)'):
        first_with_tls([host.address], interruption, client_context())


def first_with_tls(addresses: Any, interruption: Any, context: ssl.SSLContext,
                   hostname: str | None = 'localhost') -> Line | None:
    lines = dial(addresses, interruption[0], Security(context, hostname))
    try:
        return next((line for line in lines if line is not None), None)
    finally:
        lines.close()


def test_what_comes_with_the_end_of_the_handshake_is_not_forgotten(
        host: Host, interruption: Any, calls: Calls, certificates: Certificates) -> None:
    """In TLS 1.2, the server's last word and its greeting may arrive together."""
    server = server_context(certificates.server)
    server.maximum_version = ssl.TLSVersion.TLSv1_2
    context = client_context(authenticate=certificates.ca)
    line = calls.start(first_with_tls, [host.address], interruption, context, None)
    sock = host.accept().sock
    tls = Tls(server, sock.recv, server_side=True)
    last = [b'']
    sent: list[bytes] = []

    def send(said: bytes) -> None:
        if sent:
            last[0] = said  # the second flight, which ends the handshake
        else:
            sock.sendall(said)
        sent.append(said)

    tls.shake_hands(send)
    sock.sendall(last[0] + tls.seal(frame(b'Z5')))
    found = line()
    assert found.tls is not None
    found.sock.close()


def test_a_name_that_no_certificate_can_have_is_a_failure_of_that_address(
        host: Host, interruption: Any, calls: Calls) -> None:
    with pytest.raises(ClientDisconnected, match='no server answers') as raised:
        first_with_tls([host.address], interruption, client_context(), '.local')
    assert not isinstance(raised.value, NobodyListens)


def test_where_nobody_listens_a_server_may_be_just_starting(tmp_path: Path, host: Host, interruption: Any) -> None:
    host.close()
    with pytest.raises(NobodyListens, match='no server answers .*refused; .*no such socket file'):
        list(dial([host.address, str(tmp_path / 'none')], interruption[0]))


def test_a_unix_socket_is_left_without_tls(tmp_path: Path, interruption: Any, calls: Calls) -> None:
    host = Host(str(tmp_path / 's'))
    line = calls.start(first_with_tls, [str(tmp_path / 's')], interruption, client_context())
    host.accept().greet()
    found = line()
    assert found.tls is None
    found.sock.close()
    host.close()
