"""TLS for one connection: two of them, with bytes carried between them by hand or over a socket."""

import random
import re
import socket
import ssl
import threading
import warnings
from collections.abc import Callable
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.system.certificates import Certificates
from zeo.errors import TlsError
from zeo.wire.certificates import client_context
from zeo.wire.certificates import server_context
from zeo.wire.greeting import TLS_ALERT
from zeo.wire.greeting import looks_like_tls
from zeo.wire.tls import MOST_ANSWERS
from zeo.wire.tls import Tls

PATIENCE = 30.0


class Failed(Exception):
    """What the handshake came to, as the two sides say it; empty for who has noticed nothing."""

    def __init__(self, server: str, client: str) -> None:
        super().__init__(server, client)
        self.server = server
        self.client = client


class Side:
    """One end of a connection: TLS over a socket."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, server_side: bool,
                 hostname: str | None = None) -> None:
        self.sock = sock
        self.sock.settimeout(PATIENCE)
        self.tls = Tls(context, sock.recv, server_side=server_side, hostname=hostname)
        self.right = threading.Lock()  # to send
        self.answers = 0
        self.tls.answer = self.answer

    def answer(self) -> None:
        self.answers += 1
        if self.right.acquire(False):
            self.sock.sendall(self.tls.seal())
            self.right.release()

    def send(self, *parts: bytes) -> None:
        with self.right:
            self.sock.sendall(self.tls.seal(parts))

    def read(self, size: int) -> bytes:
        data = bytearray(size)
        filled = 0
        while filled < size:
            count = self.tls.recv_into(memoryview(data)[filled:])
            if not count:
                break
            filled += count
        return bytes(data[:filled])

    def close(self) -> None:
        self.sock.close()


class Pair:
    """A server and a client that have come to terms."""

    def __init__(self, server: ssl.SSLContext, client: ssl.SSLContext, hostname: str = 'localhost') -> None:
        ours, theirs = socket.socketpair()
        self.server = Side(ours, server, True)
        self.client = Side(theirs, client, False, hostname)

    def agree(self) -> None:
        """Raises `Failed`.  In TLS 1.3 a client may learn only afterwards that it is not wanted."""
        def attempt(side: Side) -> str:
            try:
                side.tls.shake_hands(side.sock.sendall)
                if side is self.server:
                    side.send(b'!')
                else:
                    assert side.read(1) == b'!'
            except OSError as error:
                side.sock.shutdown(socket.SHUT_WR)
                return str(error)
            return ''

        with ThreadPoolExecutor(2) as pool:
            said = [each.result(PATIENCE) for each in
                    [pool.submit(attempt, side) for side in (self.server, self.client)]]
        if any(said):
            raise Failed(*said)

    def close(self) -> None:
        self.server.close()
        self.client.close()


def agreed(server: ssl.SSLContext, client: ssl.SSLContext, hostname: str = 'localhost') -> str | None:
    """Raises `Failed` if they do not come to terms; returns what the server knows of the client."""
    pair = Pair(server, client, hostname)
    try:
        pair.agree()
        return pair.server.tls.peer_name()
    finally:
        pair.close()


def limited(context: ssl.SSLContext, version: ssl.TLSVersion) -> ssl.SSLContext:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DeprecationWarning)
        context.minimum_version = context.maximum_version = version
        context.set_ciphers('ALL:@SECLEVEL=0')
    return context


VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]


@pytest.fixture(params=VERSIONS, ids=lambda version: version.name)
def pair(request: pytest.FixtureRequest, certificates: Certificates) -> Iterator[Pair]:
    context = limited(server_context(certificates.server, authenticate=certificates.ca), request.param)
    pair = Pair(context, client_context(certificates.client, authenticate=certificates.ca))
    pair.agree()
    yield pair
    pair.close()


def test_what_is_sent_arrives_encrypted_on_the_way(pair: Pair) -> None:
    secret = b'what is said' * 1000
    sealed = pair.server.tls.seal((secret[:5], secret[5:]))
    assert secret[:10] not in sealed
    pair.server.sock.sendall(sealed)
    assert pair.client.read(len(secret)) == secret
    pair.client.send(b'and back')
    assert pair.server.read(8) == b'and back'


def test_bytes_that_arrive_one_by_one_are_put_together(pair: Pair) -> None:
    sealed = iter([bytes([each]) for each in pair.server.tls.seal((b'hello',))])
    pair.client.tls.receive = lambda size: next(sealed)
    assert pair.client.read(5) == b'hello'
    assert next(sealed, None) is None


def test_the_server_knows_the_name_in_the_clients_certificate(pair: Pair, certificates: Certificates) -> None:
    assert pair.server.tls.peer_name() == 'ada'
    assert pair.client.tls.peer_name() == 'server'


def test_a_certificate_without_a_common_name_has_its_first_other_name(certificates: Certificates) -> None:
    anybody = server_context(certificates.server)
    assert agreed(anybody, client_context(certificates.client, authenticate=certificates.ca)) is None
    strangers = server_context(certificates.server, authenticate=certificates.other_ca)
    client = client_context(certificates.stranger, authenticate=certificates.ca)
    assert agreed(strangers, client) == 'eve@example.org'


def test_the_order_is_kept_however_many_send_while_one_reads(pair: Pair) -> None:
    """Each side sends from four threads and reads in one, all at once; both directions are full."""
    rounds = 150
    chance = random.Random(5)
    sizes = [chance.choice([1, 100, 20_000, 60_000]) for _ in range(rounds)]

    def send(side: Side, number: int) -> None:
        for index, size in enumerate(sizes):
            side.send(number.to_bytes(1, 'big') + index.to_bytes(4, 'big') + size.to_bytes(4, 'big'),
                      bytes([number]) * size)

    def read(side: Side) -> None:
        next_index = [0] * 4
        for _ in range(4 * rounds):
            head = side.read(9)
            number, index, size = head[0], int.from_bytes(head[1:5], 'big'), int.from_bytes(head[5:], 'big')
            assert (index, size) == (next_index[number], sizes[index])
            next_index[number] += 1
            assert side.read(size) == bytes([number]) * size

    with ThreadPoolExecutor(10) as pool:
        tasks = [pool.submit(read, side) for side in (pair.server, pair.client)]
        tasks += [pool.submit(send, side, number) for side in (pair.server, pair.client)
                  for number in range(4)]
        for task in tasks:
            task.result(PATIENCE)


def test_who_waits_for_the_socket_does_not_keep_others_from_sending(pair: Pair) -> None:
    waits, goes_on = threading.Event(), threading.Event()
    receive = pair.server.sock.recv

    def slow(size: int) -> bytes:
        waits.set()
        assert goes_on.wait(PATIENCE)
        return receive(size)

    pair.server.tls.receive = slow
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(pair.server.read, 3)
        assert waits.wait(PATIENCE)
        pair.server.send(b'meanwhile')
        assert pair.client.read(9) == b'meanwhile'
        pair.client.send(b'yes')
        goes_on.set()
        assert reading.result(PATIENCE) == b'yes'


@pytest.fixture
def inquisitive(certificates: Certificates) -> Iterator[Pair]:
    """A server that asks for a certificate after the handshake (TLS 1.3): then the client's reading
    makes something to be sent."""
    server = server_context(certificates.server, authenticate=certificates.ca)
    client = client_context(certificates.client, authenticate=certificates.ca)
    server.post_handshake_auth = client.post_handshake_auth = True
    pair = Pair(server, client)
    pair.agree()
    assert pair.server.tls.peer_name() is None
    pair.server.tls._object.verify_client_post_handshake()
    yield pair
    pair.close()


def test_what_reading_makes_is_sent_at_once_if_nobody_is_sending(inquisitive: Pair) -> None:
    inquisitive.server.send(b'who are you?')
    assert inquisitive.client.read(12) == b'who are you?'
    assert inquisitive.client.answers
    inquisitive.server.sock.setblocking(False)
    with pytest.raises(BlockingIOError):
        inquisitive.server.read(1)  # there is nothing for us but the answer
    assert inquisitive.server.tls.peer_name() == 'ada'


def test_what_reading_makes_goes_before_what_somebody_sends_next(inquisitive: Pair) -> None:
    inquisitive.server.send(b'?')
    with inquisitive.client.right:
        assert inquisitive.client.read(1) == b'?'
    inquisitive.client.send(b'!')
    assert inquisitive.server.read(1) == b'!'
    assert inquisitive.server.tls.peer_name() == 'ada'


def test_who_reads_no_more_can_still_send(pair: Pair) -> None:
    """As a server does that is being closed."""
    pair.client.sock.sendall(pair.client.tls.seal((b'not read any more',))[:-1])
    pair.client.sock.shutdown(socket.SHUT_WR)
    assert pair.server.read(1) == b''
    pair.server.send(b'last words')
    assert pair.client.read(10) == b'last words'


@pytest.mark.parametrize('properly', [True, False])
def test_the_end_of_the_stream_is_an_end_with_and_without_a_farewell(pair: Pair, properly: bool) -> None:
    pair.server.send(b'last words')
    if properly:
        pair.server.sock.sendall(pair.server.tls.farewell())
    pair.server.sock.shutdown(socket.SHUT_WR)
    assert pair.client.read(100) == b'last words'
    assert pair.client.read(100) == b''


def test_a_stream_that_is_cut_in_a_record_gives_nothing_of_it(pair: Pair) -> None:
    pair.server.sock.sendall(pair.server.tls.seal((b'half of it',))[:-1])
    pair.server.sock.shutdown(socket.SHUT_WR)
    assert pair.client.read(100) == b''


def test_after_a_farewell_nothing_more_can_be_sent(pair: Pair) -> None:
    assert pair.server.tls.farewell()
    with pytest.raises(OSError):
        pair.server.tls.seal((b'one more thing',))


def test_a_farewell_does_not_wait_for_who_is_at_work(pair: Pair) -> None:
    with pair.server.tls._mutex:  # as a signal handler finds it that interrupts
        assert pair.server.tls.farewell() == b''


def test_damaged_bytes_end_the_connection_and_the_peer_learns_why(pair: Pair) -> None:
    sealed = bytearray(pair.server.tls.seal((b'hello',)))
    sealed[-1] ^= 1
    pair.server.sock.sendall(sealed)
    with pytest.raises(TlsError, match='the TLS of the server is in error: .*bad'):
        pair.client.read(1)
    with pytest.raises(TlsError, match='the TLS of the client is in error: .*alert bad record mac'):
        pair.server.read(1)


# ---- what the two sides say when they do not come to terms


Context = Callable[[Certificates], ssl.SSLContext]


def any_client(these: Certificates) -> ssl.SSLContext:
    return client_context(authenticate=these.ca)


def demanding(these: Certificates) -> ssl.SSLContext:
    return server_context(these.server, authenticate=these.ca)


CASES: dict[str, tuple[Context, Context, str, str]] = {
    'an unknown authority': (
        lambda these: server_context(these.server), lambda these: client_context(authenticate=these.other_ca),
        "the client does not accept the server's certificate: it does not trust who has signed it",
        "the server's certificate is not accepted: .*; if it is the right one, name it, or the authority"),
    'an expired certificate': (
        lambda these: server_context(these.expired), any_client,
        "the client does not accept the server's certificate: it has expired",
        "the server's certificate is not accepted: certificate has expired"),
    'another host': (
        lambda these: server_context(these.wrong_host), any_client,
        "the client does not accept the server's certificate: it is for another host, or damaged",
        "the server's certificate is not accepted: Hostname mismatch, .* not valid for 'localhost'"),
    'no client certificate': (
        demanding, any_client,
        'the client does not show a certificate, and has to',
        'the server .*wants to see a certificate of the client'),
    'a client that is not known': (
        demanding, lambda these: client_context(these.stranger, authenticate=these.ca),
        "the client's certificate is not accepted: .*name it, or the authority that has signed it",
        "the server does not accept the client's certificate: it does not trust who has signed it"),
}


@pytest.mark.parametrize('version', VERSIONS, ids=lambda version: version.name)
@pytest.mark.parametrize('case', CASES)
def test_both_sides_say_the_real_reason(
        certificates: Certificates, case: str, version: ssl.TLSVersion) -> None:
    server, client, server_says, client_says = CASES[case]
    with pytest.raises(Failed) as caught:
        agreed(limited(server(certificates), version), client(certificates))
    assert_like(server_says, caught.value.server)
    assert_like(client_says, caught.value.client)


def assert_like(pattern: str, text: str) -> None:
    assert re.fullmatch(pattern + '.*', text), text


@pytest.mark.parametrize('old', ['server', 'client'])
def test_a_version_that_is_too_old_is_told(certificates: Certificates, old: str) -> None:
    server, client = server_context(certificates.server), any_client(certificates)
    limited(server if old == 'server' else client, ssl.TLSVersion.TLSv1_1)
    with pytest.raises(Failed) as caught:
        agreed(server, client)
    said = caught.value.client if old == 'server' else caught.value.server
    assert_like(f'the {old} .*(version of TLS|cannot be spoken to)', said)
    assert caught.value.client and caught.value.server


def test_ciphers_that_do_not_meet_are_told(certificates: Certificates) -> None:
    server = limited(server_context(certificates.server), ssl.TLSVersion.TLSv1_2)
    client = any_client(certificates)
    server.set_ciphers('ECDHE-ECDSA-AES128-GCM-SHA256')
    client.set_ciphers('ECDHE-ECDSA-AES256-GCM-SHA384')
    with pytest.raises(Failed) as caught:
        agreed(server, client)
    assert_like('the client knows none of the ciphers that are accepted here', caught.value.server)
    assert_like('the server does not agree to the TLS that is spoken here', caught.value.client)


@pytest.mark.parametrize('said', [b'\0\0\0\2Z5', b'GET / HTTP/1.0\r\n\r\n', b'SSH-2.0-'])
@pytest.mark.parametrize('server_side', [True, False])
def test_a_peer_that_does_not_speak_tls_is_told_from_one_that_does(
        certificates: Certificates, said: bytes, server_side: bool) -> None:
    context = server_context(certificates.server) if server_side else any_client(certificates)
    tls = Tls(context, lambda size: said, server_side=server_side,
              hostname=None if server_side else 'localhost')
    with pytest.raises(TlsError, match='does not speak TLS'):
        tls.shake_hands(lambda data: None)
    assert not tls.has_begun


def test_a_peer_that_leaves_during_the_handshake_is_a_lost_connection(certificates: Certificates) -> None:
    tls = Tls(any_client(certificates), lambda size: b'', hostname='localhost')
    with pytest.raises(ConnectionError, match='the server closed the connection during the TLS') as caught:
        tls.shake_hands(lambda data: None)
    assert not isinstance(caught.value, TlsError)


def test_a_handshake_can_be_gone_on_with_when_there_is_more(certificates: Certificates) -> None:
    pair = Pair(server_context(certificates.server), any_client(certificates))
    for side in pair.server, pair.client:
        side.sock.setblocking(False)
    done: list[Side] = []
    for _ in range(20):
        for side in pair.client, pair.server:
            try:
                side.tls.shake_hands(side.sock.sendall)
                done.append(side)
            except BlockingIOError:
                pass
        if len(set(done)) == 2:
            break
    assert set(done) == {pair.client, pair.server}
    pair.close()


@pytest.mark.parametrize('first, is_tls', [
    (b'\x16\x03', True), (TLS_ALERT[:2], True), (b'\x16', False), (b'', False), (b'\0\0', False),
    (b'\x17\x03', False)])
def test_tls_is_known_by_its_first_two_bytes(first: bytes, is_tls: bool) -> None:
    assert looks_like_tls(first) is is_tls


def test_an_unforeseen_error_is_told_in_openssls_words(certificates: Certificates) -> None:
    tls = Tls(any_client(certificates), lambda size: b'\x16\x03\x03\0\x05hello', hostname='localhost')
    with pytest.raises(TlsError, match='the TLS of the server is in error: [a-z ]+'):
        tls.shake_hands(lambda data: None)


def test_a_peer_that_asks_for_new_keys_and_reads_nothing_is_given_up(
        pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request takes an answer, of which TLS makes as many as are asked for."""
    class Asked:
        def read(self, *_: object) -> int:
            pair.server.tls._outgoing.write(bytes(1000))
            raise ssl.SSLWantReadError

    pair.server.right.acquire()  # somebody is sending, and cannot go on
    monkeypatch.setattr(pair.server.tls, '_object', Asked())
    pair.server.tls.receive = lambda _: b'key update'
    with pytest.raises(TlsError, match='asks for new keys and does not read'):
        pair.server.tls.recv_into(memoryview(bytearray(100)))
    assert pair.server.answers == MOST_ANSWERS // 1000 + 1
