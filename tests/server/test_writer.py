"""Outboxes to sockets: in order, by whoever comes, without ever waiting for a slow client."""

import errno
import os
import select
import socket
import threading
import types
from collections.abc import Callable
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.server.talk import PATIENCE
from tests.server.talk import in_thread
from tests.system.certificates import Certificates
from tests.system.servers import until
from tests.wire.test_tls import Pair as TlsPair
from zeo.server import writer as module
from zeo.server.outbox import Outbox
from zeo.server.writer import Line
from zeo.server.writer import SecureLine
from zeo.server.writer import Writer
from zeo.wire.certificates import client_context
from zeo.wire.certificates import server_context

BLOB = os.urandom(3_000_000)


@pytest.fixture
def writer() -> Iterator[Writer]:
    writer = Writer()
    writer.start()
    yield writer
    writer.close()


class Pair:
    """A line, and the client at its other end."""

    def __init__(self, writer: Writer) -> None:
        ours, self.client = socket.socketpair()
        self.client.settimeout(PATIENCE)
        self.outbox = Outbox()
        self.line = Line(ours, self.outbox, writer)

    def append(self, *parts: bytes) -> None:
        self.outbox.append(parts)

    def read(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count and (more := self.client.recv(min(count - len(data), 2**20))):
            data += more
        return bytes(data)

    def stuff(self) -> int:
        """Send until the client would have to read before there can be more; returns how much."""
        size = 0
        while not self.outbox.backlog:
            self.append(b'x' * 2**18)
            self.line.push()
            size += 2**18
        return size

    def close(self) -> None:
        self.line.close()
        self.client.close()


class SecurePair(Pair):
    """The same with TLS."""

    def __init__(self, writer: Writer, certificates: Certificates) -> None:
        super().__init__(writer)
        self.line.close()
        both = TlsPair(server_context(certificates.server), client_context(authenticate=certificates.ca))
        both.agree()
        self.client.close()
        self.side, self.client = both.client, both.client.sock
        both.server.sock.settimeout(None)
        self.outbox = Outbox()
        self.line = SecureLine(both.server.sock, self.outbox, writer, both.server.tls)

    def read(self, count: int) -> bytes:
        return self.side.read(count)


@pytest.fixture(params=['plain', 'TLS'])
def pairs(request: pytest.FixtureRequest, writer: Writer, certificates: Certificates,
          ) -> Iterator[Callable[[], Pair]]:
    made: list[Pair] = []

    def make() -> Pair:
        made.append(Pair(writer) if request.param == 'plain' else SecurePair(writer, certificates))
        return made[-1]

    yield make
    for pair in made:
        pair.close()


@pytest.fixture
def pair(pairs: Callable[[], Pair]) -> Pair:
    return pairs()


def has_turn(line: Line) -> bool:
    """Whether nobody else is sending; gives the turn back."""
    if not line._turn.acquire(blocking=False):
        return False
    line._turn.release()
    return True


def test_what_was_appended_is_sent_in_order(pair: Pair) -> None:
    pair.append(b'a', b'b')
    pair.append(b'c')
    pair.line.push()
    assert pair.read(3) == b'abc'
    assert pair.outbox.size_sent == 3 if type(pair) is Pair else pair.outbox.size_sent > 3


def test_to_deliver_an_outbox_is_to_push_its_line(pair: Pair) -> None:
    pair.append(b'a')
    pair.outbox.deliver()
    assert pair.read(1) == b'a'


def test_empty_parts_are_sent_too(pair: Pair) -> None:
    pair.append(b'', b'a', b'', b'')
    pair.append(b'')
    pair.append(b'b', b'')
    pair.line.push()
    assert pair.read(2) == b'ab' and has_turn(pair.line)


def test_many_parts_and_large_ones(pair: Pair) -> None:
    data = [os.urandom(size) for size in [1, 3, 10**5, 0, 7] * 100]
    for part in data:
        pair.append(part)
    with ThreadPoolExecutor() as pool:
        read = pool.submit(pair.read, sum(map(len, data)))
        pair.line.push()
        assert read.result(PATIENCE) == b''.join(data)


def test_who_pushes_for_another_never_waits_and_the_writer_sends_the_rest(pair: Pair) -> None:
    sent = pair.stuff()
    assert not has_turn(pair.line)  # the writer has it
    pair.append(b'end')
    pair.line.push()
    assert pair.read(sent + 3) == b'x' * sent + b'end'
    until(lambda: has_turn(pair.line), 'the writer gives the turn back')
    pair.append(b'more')
    pair.line.push()
    assert pair.read(4) == b'more'


def test_a_session_waits_for_its_own_client_a_short_time_in_all(pair: Pair) -> None:
    pair.append(b'x' * 2**22)
    pair.line.push(patience=.05)
    assert not has_turn(pair.line)
    assert pair.read(2**22) == b'x' * 2**22


def test_whoever_sends_for_a_fast_reader_stops_after_a_while(
        pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others append as fast as it reads: a thread that commits would never come back."""
    monkeypatch.setattr(module, '_AT_A_TIME', 1000)

    class Endless(Outbox):
        def take(self, most: int = 0) -> list[bytes]:
            return [b'x' * 100]

    endless = Endless()
    endless.backlog = 1
    pair.line.outbox = endless
    if type(pair) is Pair:
        pair.line._take = endless.take
    assert pair.line.send() is False
    assert endless.size_sent <= 1500
    assert pair.line._rest


def test_the_writer_divides_its_time(pairs: Callable[[], Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, '_AT_A_TIME', 10_000)
    one, two = pairs(), pairs()
    sent = {pair: pair.stuff() for pair in (one, two)}
    for pair in (one, two):
        for _ in range(100):
            pair.append(b'y' * 10_000)
    with ThreadPoolExecutor() as pool:
        for pair, read in [(pair, pool.submit(pair.read, sent[pair] + 10**6)) for pair in (one, two)]:
            assert len(read.result(PATIENCE)) == sent[pair] + 10**6


def test_nothing_is_forgotten_when_many_append_and_push(pair: Pair) -> None:
    """Whoever finds the turn taken goes away; the one who has it has to look again."""
    frames = 2000

    def append(number: int) -> None:
        for each in range(frames):
            pair.append(b'%02d%06d' % (number, each))
            pair.line.push()

    with ThreadPoolExecutor(8) as pool:
        read = in_thread(pair.read, 4 * frames * 8)
        for done in [pool.submit(append, number) for number in range(4)]:
            done.result(PATIENCE)
        data = read.result(PATIENCE)
    assert len(data) == 4 * frames * 8
    found = [data[at:at + 8] for at in range(0, len(data), 8)]
    for number in range(4):
        mine = [int(each[2:]) for each in found if int(each[:2]) == number]
        assert mine == list(range(frames))


def test_a_client_that_has_left_is_noticed_by_who_reads_and_nobody_else(pair: Pair) -> None:
    pair.client.close()
    pair.append(b'x')
    pair.line.push()
    assert pair.outbox.gone and has_turn(pair.line)
    assert pair.line.sock.recv(1) == b''
    pair.line.push()


def test_a_client_that_leaves_while_the_writer_sends_is_let_go(pair: Pair) -> None:
    pair.stuff()
    pair.client.close()
    until(lambda: pair.outbox.gone and has_turn(pair.line), 'the writer has noticed')


def test_who_is_condemned_is_hung_up_on(pair: Pair) -> None:
    pair.outbox.limit = 0
    pair.append(b'x')
    pair.outbox.announce((b'y',), b'\0' * 8, ())
    pair.outbox.deliver()
    assert pair.client.recv(1) == b''
    assert pair.line.sock.recv(1) == b''


def test_hanging_up_wakes_who_reads_and_what_is_left_is_not_sent(pair: Pair) -> None:
    reading = in_thread(pair.line.sock.recv, 1)
    pair.line.hang_up()
    assert reading.result(PATIENCE) == b''
    assert not pair.outbox.append((b'x',))
    assert pair.client.recv(1) == b''


def test_closing_waits_for_the_writer_and_nobody_sends_any_more(pair: Pair) -> None:
    pair.stuff()
    pair.line.close()
    assert pair.line.sock.fileno() == -1
    assert not has_turn(pair.line)  # it is kept for ever
    pair.line.push()
    pair.line.hang_up()
    pair.line.shut(socket.SHUT_RD)


def test_closing_and_hanging_up_together_never_touch_a_socket_that_got_the_same_number(
        writer: Writer) -> None:
    for _ in range(50):
        pair = Pair(writer)
        others: list[socket.socket] = []

        def close(pair: Pair = pair, others: list[socket.socket] = others) -> None:
            pair.line.close()
            others.extend(socket.socketpair())

        hanging = in_thread(pair.line.hang_up)
        closing = in_thread(close)
        hanging.result(PATIENCE)
        closing.result(PATIENCE)
        others[0].send(b'x')
        assert others[1].recv(1) == b'x'
        for each in (*others, pair.client):
            each.close()


def test_shutting_down_holds_off_closing(pair: Pair) -> None:
    """That is what keeps it from hitting another socket."""
    with pair.line._ending:
        closing = in_thread(pair.line.close)
        until(lambda: pair.outbox.gone, 'it is being closed')
        assert pair.line.sock.fileno() != -1
    closing.result(PATIENCE)
    assert pair.line.sock.fileno() == -1


def test_an_error_before_anything_is_sent_ends_this_connection_and_not_the_writer(
        pairs: Callable[[], Pair], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> Any:
        raise MemoryError

    broken, other = pairs(), pairs()
    sent = broken.stuff()
    monkeypatch.setattr(broken.line, '_take', fail)
    broken.append(b'more')
    broken.read(sent)
    until(lambda: broken.outbox.gone and has_turn(broken.line), 'the connection has ended')
    assert 'a client cannot be sent to' in caplog.text
    sent = other.stuff()
    assert len(other.read(sent)) == sent  # by the writer


def test_an_error_that_is_not_the_networks_ends_this_connection_and_not_the_writer(
        pairs: Callable[[], Pair], monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_: Any) -> int:
        raise MemoryError

    broken, other = pairs(), pairs()
    sent = broken.stuff()
    assert not has_turn(broken.line)
    monkeypatch.setattr(broken.line, '_send', fail)
    broken.read(sent)
    until(lambda: broken.outbox.gone, 'the connection has ended')
    monkeypatch.undo()
    sent = other.stuff()
    assert len(other.read(sent)) == sent  # the writer is alive
    assert 'a client cannot be sent to' in caplog.text


# ---- TLS


@pytest.fixture
def secure(writer: Writer, certificates: Certificates) -> Iterator[SecurePair]:
    pair = SecurePair(writer, certificates)
    yield pair
    pair.close()


def test_a_large_part_is_encrypted_in_pieces(secure: SecurePair) -> None:
    data = os.urandom(3 * module._SEALED_AT_A_TIME + 1)
    secure.append(b'head', data, b'tail')
    with ThreadPoolExecutor() as pool:
        read = pool.submit(secure.read, len(data) + 8)
        secure.line.push()
        until(lambda: has_turn(secure.line), 'all is sent')
        assert read.result(PATIENCE) == b'head' + data + b'tail'
    secure.append(data)
    secure.line._turn.acquire()
    assert len(secure.line._take()[0]) < module._SEALED_AT_A_TIME * 1.1
    assert secure.outbox.backlog == len(data) - module._SEALED_AT_A_TIME
    secure.line._turn.release()


def test_what_tls_has_to_say_itself_is_sent_by_who_reads_or_by_who_sends(secure: SecurePair) -> None:
    said = [b'']

    def seal(parts: Any = ()) -> bytes:
        sealed, said[0] = said[0] + b''.join(parts), b''
        return sealed

    secure.line._tls = tls = types.SimpleNamespace(seal=seal, farewell=lambda: b'')  # type: ignore[assignment]
    assert tls.seal() == b''
    said[0] = b'answer'
    secure.line._answer()
    assert secure.client.recv(100) == b'answer'
    said[0] = b'later'
    with secure.line._turn:
        secure.line._answer()
    secure.append(b' than this')
    secure.line.push()
    assert secure.client.recv(100) == b'later than this'


def test_what_tls_has_to_say_waits_for_room_without_keeping_the_reader(secure: SecurePair) -> None:
    sent = secure.stuff()
    secure.line._answer()  # returns, though nothing can be sent
    assert len(secure.read(sent)) == sent


def test_a_client_is_told_that_this_is_the_end(secure: SecurePair) -> None:
    secure.append(b'last words')
    secure.line.push()
    secure.line.close()
    assert secure.read(10) == b'last words'

    def receive(size: int) -> bytes:
        received = secure.client.recv(size)
        assert received, 'the stream was cut'
        return received

    secure.side.tls.receive = receive
    assert secure.side.read(1) == b''


def test_a_line_whose_tls_has_ended_is_gone(secure: SecurePair) -> None:
    secure.line._tls.farewell()
    secure.append(b'too late')
    secure.line.push()
    assert secure.outbox.gone and has_turn(secure.line)


# ---- the writer's thread


def test_a_line_given_over_when_it_is_closed_already_is_given_back(writer: Writer) -> None:
    pair = Pair(writer)
    pair.line._turn.acquire()
    pair.line.sock.close()
    writer.take_over(pair.line)
    until(lambda: pair.outbox.gone and has_turn(pair.line), 'the line is given back')
    pair.client.close()


def test_the_writer_ends_with_lines_in_its_hands() -> None:
    writer = Writer()
    writer.start()
    pair = Pair(writer)
    pair.stuff()
    writer.close()
    assert not any(thread.name == 'zeo writer' for thread in threading.enumerate())
    pair.line._turn.release()
    pair.close()


def test_a_writer_that_was_never_started_can_be_closed() -> None:
    Writer().close()


# ---- files


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    (tmp_path / 'file').write_bytes(BLOB)
    with open(tmp_path / 'file', 'rb') as file:
        yield file.fileno()


@pytest.fixture
def plain(writer: Writer) -> Iterator[Pair]:
    pair = Pair(writer)
    yield pair
    pair.close()


def send_file(pair: Pair, file: int, patience: float = PATIENCE) -> 'Future[bool]':
    return in_thread(pair.line.send_file, b'<', file, 1, len(BLOB) - 1, b'>', patience)


FILE = b'<' + BLOB[1:] + b'>'


def test_a_file_is_sent_between_what_was_said_before_and_what_is_said_after(plain: Pair, file: int) -> None:
    plain.append(b'before')
    sending = send_file(plain, file)
    assert plain.read(7) == b'before<'
    plain.append(b'after')
    plain.line.push()  # does not wait, and does not come in between
    assert plain.read(len(FILE) - 1 + 5) == FILE[1:] + b'after'
    assert sending.result(PATIENCE) is True
    until(lambda: has_turn(plain.line), 'the turn is given back')
    assert plain.outbox.size_sent == 6 + len(FILE) + 5


def test_a_file_waits_for_what_the_writer_has_to_send(plain: Pair, file: int) -> None:
    sent = plain.stuff()
    sending = send_file(plain, file)
    assert plain.read(sent + len(FILE)) == b'x' * sent + FILE
    assert sending.result(PATIENCE) is True


def test_files_and_messages_from_many_threads_are_all_whole(plain: Pair, file: int) -> None:
    def say(number: int) -> None:
        for _ in range(20):
            plain.append(b'[%d' % number, b'%d]' % number)
            plain.line.push()

    talking = [in_thread(say, number) for number in range(4)]
    sending = [send_file(plain, file) for _ in range(4)]
    received = plain.read(4 * len(FILE) + 4 * 20 * 4)
    for each in [*talking, *sending]:
        each.result(PATIENCE)
    for whole, count in [(FILE, 4), *((b'[%d%d]' % (number, number), 20) for number in range(4))]:
        assert received.count(whole) == count
        received = received.replace(whole, b'')
    assert not received


@pytest.mark.parametrize('when', ['before', 'at the writer', 'in the middle'])
def test_a_file_is_not_sent_to_who_has_left(plain: Pair, file: int, when: str) -> None:
    if when == 'before':
        plain.client.close()
    elif when == 'at the writer':
        plain.stuff()
    sending = send_file(plain, file)
    if when == 'in the middle':
        plain.read(100)
    plain.client.close()
    assert sending.result(PATIENCE) is False and plain.outbox.gone
    until(lambda: has_turn(plain.line), 'the turn is given back')


@pytest.mark.parametrize('stuffed', [False, True])
def test_who_takes_nothing_of_a_file_for_long_is_given_up(
        plain: Pair, file: int, stuffed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, '_LOOK_UP', 0.01)
    if stuffed:
        plain.stuff()
    with pytest.raises(TimeoutError, match='does not read'):
        send_file(plain, file, patience=0.05).result(PATIENCE)
    assert plain.outbox.gone


def test_who_reads_slowly_has_time(plain: Pair, file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, '_LOOK_UP', 0.001)
    sending = send_file(plain, file, patience=0.5)
    received = b''
    for _ in range(30):  # the time limit passes often meanwhile
        received += plain.read(1000)
        select.select([], [], [], 0.001)
    received += plain.read(len(FILE) - len(received))
    assert received == FILE and sending.result(PATIENCE) is True


@pytest.mark.parametrize('stuffed', [False, True])
def test_the_end_of_a_connection_ends_the_sending_of_a_file(plain: Pair, file: int, stuffed: bool) -> None:
    if stuffed:
        plain.stuff()
    sending = send_file(plain, file)
    if not stuffed:
        plain.read(100)
    plain.line.close()
    assert sending.result(PATIENCE) is False
    plain.append(b'x')
    assert send_file(plain, file).result(PATIENCE) is False  # the turn is never given any more


def test_a_file_that_ends_early_ends_the_connection_and_is_told(
        plain: Pair, file: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    os.truncate(tmp_path / 'file', 1000)
    assert send_file(plain, file).result(PATIENCE) is False
    assert plain.outbox.gone and 'a blob cannot be sent: [Errno 5] a blob has become shorter' in caplog.text


def test_nothing_is_sent_after_half_a_message(
        plain: Pair, file: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(sock: socket.socket, head: bytes, *_: Any) -> None:
        sock.send(head)
        plain.append(b'by somebody else')
        raise OSError(errno.EIO, 'the disk is broken')

    monkeypatch.setattr(module.pieces, 'send', fail)
    assert send_file(plain, file).result(PATIENCE) is False
    assert plain.read(100) == b'<' and 'the disk is broken' in caplog.text


def test_files_cannot_be_sent_over_tls(secure: SecurePair) -> None:
    assert secure.outbox.send_file is None
