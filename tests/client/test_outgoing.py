"""What goes to the server, in whole frames."""

import os
import socket
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.client.conftest import Calls
from tests.client.peer import PATIENCE
from tests.client.peer import Peer
from tests.system.certificates import Certificates
from tests.system.servers import until
from tests.wire.test_tls import Pair
from tests.wire.test_tls import Side
from zeo.client import outgoing as module
from zeo.client.outgoing import Outgoing
from zeo.client.outgoing import SecureOutgoing
from zeo.wire.certificates import client_context
from zeo.wire.certificates import server_context
from zeo.wire.framing import frame
from zeo.wire.messages import HEARTBEAT


class Line:
    def __init__(self) -> None:
        self.sock, theirs = socket.socketpair()
        self.peer = Peer(theirs)
        self.failures: list[BaseException] = []
        self.rung = 0
        self.outgoing: Outgoing = Outgoing(self.sock, self.failures.append, self.ring)

    def ring(self) -> None:
        self.rung += 1

    def is_silent(self) -> bool:
        self.peer.sock.setblocking(False)
        try:
            self.peer.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        finally:
            self.peer.sock.settimeout(PATIENCE)
        return False


class Socket:
    """What a peer that speaks TLS uses in place of its socket."""

    def __init__(self, side: Side) -> None:
        self._side = side
        self.recv_into = side.tls.recv_into

    def __getattr__(self, name: str) -> Any:
        return getattr(self._side.sock, name)


class SecureLine(Line):
    def __init__(self, certificates: Certificates) -> None:
        self.tls = Pair(server_context(certificates.server), client_context(authenticate=certificates.ca))
        self.tls.agree()
        self.sock = self.tls.client.sock
        self.sock.settimeout(None)
        self.peer = Peer(Socket(self.tls.server))  # type: ignore[arg-type]
        self.failures = []
        self.rung = 0
        self.outgoing: Outgoing = SecureOutgoing(
            self.sock, self.failures.append, self.ring, self.tls.client.tls)


@pytest.fixture(params=['plain', 'TLS'])
def line(request: pytest.FixtureRequest, certificates: Certificates) -> Iterator[Line]:
    line = Line() if request.param == 'plain' else SecureLine(certificates)
    yield line
    line.sock.close()
    line.peer.close()


@pytest.fixture
def secure(certificates: Certificates) -> Iterator[SecureLine]:
    line = SecureLine(certificates)
    yield line
    line.sock.close()
    line.peer.close()


def test_the_socket_is_closed_in_the_end_even_if_the_right_to_send_was_lost(
        line: Line, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A signal handler raised just when somebody had taken it."""
    monkeypatch.setattr(module, 'LAST_SENDER', .02)
    line.outgoing._lock.acquire()
    line.outgoing.close()
    assert line.sock.fileno() == -1
    assert 'under its sender' in caplog.text


@pytest.mark.parametrize('lost', [False, True])
def test_who_comes_late_to_send_finds_the_socket_closed(
        line: Line, calls: Calls, monkeypatch: pytest.MonkeyPatch, lost: bool) -> None:
    """And does not wait for somebody who will not come."""
    monkeypatch.setattr(module, 'LAST_SENDER', .02)
    if lost:
        line.outgoing._lock.acquire()
    sending = calls.start(line.outgoing.send, frame(b'too late')) if lost else None
    line.outgoing.close()
    for result in sending, calls.start(line.outgoing.send, frame(b'later still')):
        assert result is None or result() is None
    assert {type(failure) for failure in line.failures} == {OSError}


def test_a_frame_of_several_parts_is_sent_whole(line: Line) -> None:
    parts = frame(b'a' * 10_000, b'b' * 20_000)
    assert len(parts) > 1
    line.outgoing.send(parts)
    assert line.peer.payload() == b'a' * 10_000 + b'b' * 20_000


def test_posted_frames_wait_for_the_next_and_go_with_it_in_one_write(
        line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(3):
        line.outgoing.post(frame(b'%d' % n))
    assert line.is_silent()
    line.outgoing.send(frame(b'3'))
    assert len(line.peer.sock.recv(1000, socket.MSG_PEEK)) == 4 * 5 + (type(line) is SecureLine and 22)
    assert [line.peer.payload() for _ in range(4)] == [b'0', b'1', b'2', b'3']


def test_many_posted_frames_do_not_pile_up(line: Line, calls: Calls) -> None:
    reading = calls.start(lambda: [len(line.peer.payload()) for _ in range(200)])
    for _ in range(200):
        line.outgoing.post(frame(bytes(10_000)))
        assert line.outgoing._size < module.POSTED_UP_TO
    line.outgoing.send()
    assert reading() == [10_000] * 200


def test_large_records_are_sent_behind_small_ones(line: Line, calls: Calls) -> None:
    reading = calls.start(lambda: [len(line.peer.payload()) for _ in range(3)])
    for size in 10, 5_000_000, 20:
        line.outgoing.post(frame(bytes(size)))
    line.outgoing.send()
    assert reading() == [10, 5_000_000, 20]


def test_a_sender_that_cannot_go_on_says_so(line: Line, calls: Calls) -> None:
    sending = calls.start(line.outgoing.send, frame(bytes(5_000_000)))
    until(lambda: line.outgoing.stuck, 'the sender is stuck')
    assert line.rung == 1
    assert len(line.peer.payload()) == 5_000_000
    sending()
    assert not line.outgoing.stuck


def test_a_failure_is_reported_and_not_raised(line: Line) -> None:
    line.peer.close()
    line.outgoing.send(frame(b'into the void'))
    assert [type(each) for each in line.failures] == [BrokenPipeError]


def test_an_interruption_in_the_middle_is_reported_and_raised(
        line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> int:
        raise KeyboardInterrupt

    line.outgoing._send = interrupted
    with pytest.raises(KeyboardInterrupt):
        line.outgoing.send(frame(b'x'))
    assert {type(each) for each in line.failures} == {KeyboardInterrupt}


class Gate:
    """A sending that waits until it is opened."""

    def __init__(self, line: Line) -> None:
        self._send = line.outgoing._send
        self.reached, self.opened = threading.Event(), threading.Event()
        line.outgoing._send = self

    def __call__(self, data: Any, flags: int) -> int:
        self.reached.set()
        assert self.opened.wait(PATIENCE)
        return self._send(data, flags)


def test_what_is_to_be_sent_is_left_to_who_is_sending(line: Line, calls: Calls) -> None:
    gate = Gate(line)
    sending = calls.start(line.outgoing.send, frame(b'one'))
    assert gate.reached.wait(PATIENCE)
    line.outgoing.send(frame(b'two'))  # returns at once
    line.outgoing.send(frame(b'three', bytes(100_000)))
    line.outgoing.send(frame(b'four'))
    reading = calls.start(lambda: [line.peer.payload()[:5] for _ in range(4)])
    gate.opened.set()
    sending()
    assert reading() == [b'one', b'two', b'three', b'four']
    assert not line.outgoing._relieving and not line.outgoing._lock.locked()


def test_requests_that_were_left_go_out_in_one_write(line: Line, calls: Calls) -> None:
    gate = Gate(line)
    sending = calls.start(line.outgoing.send, frame(b'0'))
    assert gate.reached.wait(PATIENCE)
    for n in range(1, 4):
        line.outgoing.send(frame(b'%d' % n))
    sent: list[int] = []
    send, gate._send = gate._send, lambda data, flags: sent.append(len(data)) or send(data, flags)
    gate.opened.set()
    sending()
    assert len(sent) == 2
    assert [line.peer.payload() for _ in range(4)] == [b'0', b'1', b'2', b'3']


def test_who_sends_for_others_is_relieved_by_one_of_them(line: Line, calls: Calls) -> None:
    """However many go on: here one more whenever something is sent."""
    outgoing = line.outgoing
    send = outgoing._send
    rounds = module.TAKEN_ON + 1
    came: list[threading.Thread] = []
    sent_by: list[threading.Thread] = []
    first = threading.current_thread()

    def sending(data: Any, flags: int) -> int:
        sent_by.append(threading.current_thread())
        if len(sent_by) <= rounds:
            came.append(threading.Thread(target=outgoing.send, args=(frame(b'%d' % len(came)),)))
            came[-1].start()
            until(lambda: outgoing._left, 'it wants to be sent')
            if len(sent_by) < rounds:
                came[-1].join(PATIENCE)  # it has left that to us
                assert not came[-1].is_alive()
        return send(data, flags)

    outgoing._send = sending
    outgoing.send(frame(b'mine'))
    came[-1].join(PATIENCE)
    assert sent_by == [first] * rounds + [came[-1]]
    assert [line.peer.payload() for _ in range(rounds + 1)] == [b'mine', *(b'%d' % n for n in range(rounds))]
    assert not outgoing._left and not outgoing._relieving and not outgoing._lock.locked()


def test_nothing_is_left_to_one_that_does_not_look_for_it(line: Line, calls: Calls) -> None:
    with line.outgoing._lock:  # a sign of life is sent
        sending = calls.start(line.outgoing.send, frame(b'request'))
        until(lambda: line.outgoing._left, 'it wants to be sent')
    sending()
    assert line.peer.payload() == b'request'


def test_who_leaves_before_he_has_looked_again_ends_the_connection(line: Line) -> None:
    class Interrupted:
        def __enter__(self) -> None:
            pass

        def __exit__(self, *exc: object) -> None:
            line.outgoing._left.append(frame(b'left by another one'))
            raise KeyboardInterrupt

    line.outgoing._lock = Interrupted()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        line.outgoing.send(frame(b'x'))
    assert [type(each) for each in line.failures] == [KeyboardInterrupt]


def test_a_sign_of_life_does_not_wait(line: Line, calls: Calls) -> None:
    line.outgoing.beat(HEARTBEAT)
    assert frame(bytes(line.peer.payload())) == HEARTBEAT
    sending = calls.start(line.outgoing.send, frame(bytes(5_000_000)))
    until(lambda: line.outgoing.stuck, 'the sender is stuck')
    line.outgoing.beat(HEARTBEAT)  # somebody is sending
    assert len(line.peer.payload()) == 5_000_000
    sending()
    assert line.is_silent()


def test_a_sign_of_life_takes_what_was_posted_along(line: Line) -> None:
    """It may lie there for an hour, and the server hears nothing meanwhile."""
    for _ in range(2):
        line.outgoing.post(frame(b'posted'))
        assert line.outgoing.beat(HEARTBEAT)
        assert line.peer.payload() == b'posted'
        assert frame(bytes(line.peer.payload())) == HEARTBEAT
    assert line.is_silent()


def test_a_sign_of_life_that_fits_in_part_is_completed_before_anything_else(line: Line) -> None:
    send = line.outgoing._send
    line.outgoing._send = lambda data, flags: send(data[:5], flags)
    line.outgoing.beat(HEARTBEAT)
    line.outgoing._send = send
    line.outgoing.beat(HEARTBEAT)
    line.outgoing.send(frame(b'next'))
    for _ in range(1 if isinstance(line, SecureLine) else 2):  # there the rest is sign enough
        assert frame(bytes(line.peer.payload())) == HEARTBEAT
    assert line.peer.payload() == b'next'


def test_no_sign_of_life_is_needed_where_the_buffer_is_full(line: Line) -> None:
    line.sock.setblocking(False)
    try:
        while True:
            line.sock.send(bytes(10_000))
    except BlockingIOError:
        pass
    line.outgoing.post(frame(b'posted'))
    line.outgoing.beat(HEARTBEAT)
    if not isinstance(line, SecureLine):  # which encrypts it and keeps that
        assert line.outgoing._posted == list(frame(b'posted'))
    assert line.failures == []
    line.peer.close()
    line.outgoing.beat(HEARTBEAT)
    assert len(line.failures) == 1


# ---- TLS


class Sayings:
    """Encrypts nothing, and has something to say itself."""

    def __init__(self) -> None:
        self.own = b''

    def seal(self, parts: Any = ()) -> bytes:
        sealed, self.own = self.own + b''.join(parts), b''
        return sealed

    def farewell(self) -> bytes:
        return b'farewell'


@pytest.fixture
def sayings(secure: SecureLine) -> Sayings:
    secure.outgoing._tls = sayings = Sayings()  # type: ignore[attr-defined]
    return sayings


def received(line: SecureLine) -> bytes:
    return line.tls.server.sock.recv(1000)


def test_what_tls_has_to_say_itself_is_sent_at_once_or_before_what_comes_next(
        secure: SecureLine, sayings: Sayings) -> None:
    sayings.own = b'answer'
    secure.tls.client.tls.answer()
    assert received(secure) == b'answer'
    sayings.own = b'later'
    with secure.outgoing._lock:  # somebody is sending
        secure.tls.client.tls.answer()
    secure.outgoing.send((b' than this',))
    assert received(secure) == b'later than this'


@pytest.mark.parametrize('alive', [True, False])
def test_what_the_kernel_does_not_take_at_once_goes_before_what_comes_next(
        secure: SecureLine, sayings: Sayings, alive: bool) -> None:
    send = secure.outgoing._send
    secure.outgoing._send = lambda data, flags: send(data[:4], flags)
    sayings.own = b'answer'
    secure.tls.client.tls.answer()
    secure.outgoing._send = send
    if alive:
        secure.outgoing.beat((b'not needed',))  # the rest is sign enough
        assert received(secure) == b'answer'
    secure.outgoing.send((b', next',))
    assert received(secure) == (b', next' if alive else b'answer, next')


def test_the_server_is_told_that_nothing_more_is_sent_unless_somebody_is_sending(
        secure: SecureLine, sayings: Sayings) -> None:
    with secure.outgoing._lock:
        secure.outgoing.farewell()
    assert secure.is_silent()
    secure.outgoing.farewell()
    assert received(secure) == b'farewell'
    secure.peer.close()
    secure.outgoing.farewell()
    assert secure.failures == []


def test_small_parts_are_encrypted_together_and_large_ones_in_pieces(
        secure: SecureLine, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    seal = secure.tls.client.tls.seal
    monkeypatch.setattr(module, 'SEALED_AT_A_TIME', 1000)
    secure.outgoing._tls = types.SimpleNamespace(  # type: ignore[attr-defined]
        seal=lambda parts: sizes.append(sum(map(len, parts))) or seal(parts))
    reading = calls.start(lambda: [len(secure.peer.payload()) for _ in range(3)])
    secure.outgoing.post(frame(bytes(100)))
    secure.outgoing.send(frame(bytes(200)))
    secure.outgoing.send(frame(bytes(2500)))
    assert reading() == [100, 200, 2500]
    assert sizes == [308, 1000, 1000, 504]


def test_what_can_no_longer_be_encrypted_is_a_failure(secure: SecureLine) -> None:
    secure.tls.client.tls.farewell()
    secure.outgoing.send(frame(b'too late'))
    assert len(secure.failures) == 1
    secure.outgoing.beat(HEARTBEAT)
    assert len(secure.failures) == 2


# ---- files


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    (tmp_path / 'file').write_bytes(b'x' * 5_000_000)
    with open(tmp_path / 'file', 'rb') as file:
        yield file.fileno()


@pytest.fixture
def plain() -> Iterator[Line]:
    line = Line()
    yield line
    line.sock.close()
    line.peer.close()


HEAD = (4_000_002).to_bytes(4, 'big') + b'<'


def test_a_file_goes_out_behind_what_was_posted_and_before_what_comes_then(
        plain: Line, file: int, calls: Calls) -> None:
    reading = calls.start(lambda: [plain.peer.payload() for _ in range(3)])
    plain.outgoing.post(frame(b'before'))
    plain.outgoing.send_file(HEAD, file, 1_000_000, 4_000_000, b'>')
    plain.outgoing.send(frame(b'after'))
    assert reading() == [b'before', b'<' + b'x' * 4_000_000 + b'>', b'after']


def test_a_file_that_ends_early_is_a_failure(plain: Line, file: int) -> None:
    plain.outgoing.send_file(HEAD, file, 4_995_000, 4_000_000, b'>')
    plain.sock.close()
    received = b''
    while more := plain.peer.sock.recv(10_000):
        received += more
    assert len(received) == len(HEAD) + 5_000
    assert [str(each) for each in plain.failures] == ['[Errno 5] a blob has become shorter while it was sent']


def test_an_interruption_while_a_file_is_sent_is_reported_and_raised(
        plain: Line, file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, 'sendfile', interrupted)
    with pytest.raises(KeyboardInterrupt):
        plain.outgoing.send_file(HEAD, file, 0, 4_000_000, b'>')
    assert [type(each) for each in plain.failures] == [KeyboardInterrupt] and not plain.outgoing.stuck


def test_who_sends_a_file_lets_others_read_meanwhile(plain: Line, file: int, calls: Calls) -> None:
    sending = calls.start(plain.outgoing.send_file, HEAD, file, 0, 4_000_000, b'>')
    until(lambda: plain.outgoing.stuck, 'it is sent')
    assert plain.rung == 1
    assert plain.peer.payload() == b'<' + b'x' * 4_000_000 + b'>'
    sending()
    assert not plain.outgoing.stuck


@pytest.mark.parametrize('how', ['post', 'send_file'])
def test_an_interruption_while_something_is_posted_ends_the_connection(
        line: Line, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """What others have posted may be lost with it, and they wait for the answers."""
    def interrupted(frame: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(line.outgoing), '_transmit', lambda self, frame: interrupted(frame))
    with pytest.raises(KeyboardInterrupt):
        if how == 'post':
            line.outgoing.post((bytes(module.LARGE),))
        else:
            line.outgoing.send_file(b'', 0, 0, 0, b'')
    assert [type(failure) for failure in line.failures] == [KeyboardInterrupt]
