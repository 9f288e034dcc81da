"""What goes to the server, in whole frames."""

import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tests.client.conftest import Calls
from tests.client.peer import PATIENCE
from tests.client.peer import Peer
from tests.system.servers import until
from zeo.client import outgoing as module
from zeo.client.outgoing import Outgoing
from zeo.wire.framing import frame
from zeo.wire.messages import HEARTBEAT


class Line:
    def __init__(self) -> None:
        self.sock, theirs = socket.socketpair()
        self.peer = Peer(theirs)
        self.failures: list[BaseException] = []
        self.rung = 0
        self.outgoing = Outgoing(self.sock, self.failures.append, self.ring)

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


@pytest.fixture
def line() -> Iterator[Line]:
    line = Line()
    yield line
    line.sock.close()
    line.peer.close()


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
    assert len(line.peer.sock.recv(1000, socket.MSG_PEEK)) == 4 * 5
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
    assert len(line.failures) == 1


def test_a_sign_of_life_does_not_wait(line: Line, calls: Calls) -> None:
    line.outgoing.beat(HEARTBEAT)
    assert frame(bytes(line.peer.payload())) == HEARTBEAT
    sending = calls.start(line.outgoing.send, frame(bytes(5_000_000)))
    until(lambda: line.outgoing.stuck, 'the sender is stuck')
    line.outgoing.beat(HEARTBEAT)  # somebody is sending
    assert len(line.peer.payload()) == 5_000_000
    sending()
    assert line.is_silent()


def test_a_sign_of_life_that_fits_in_part_is_completed_before_anything_else(line: Line) -> None:
    send = line.outgoing._send
    line.outgoing._send = lambda data, flags: send(data[:5], flags)
    line.outgoing.beat(HEARTBEAT)
    line.outgoing._send = send
    line.outgoing.beat(HEARTBEAT)
    line.outgoing.send(frame(b'next'))
    assert frame(bytes(line.peer.payload())) == HEARTBEAT
    assert line.peer.payload() == b'next'


def test_no_sign_of_life_is_needed_where_the_buffer_is_full(line: Line) -> None:
    line.sock.setblocking(False)
    try:
        while True:
            line.sock.send(bytes(10_000))
    except BlockingIOError:
        pass
    line.outgoing.beat(HEARTBEAT)
    assert line.failures == []
    line.peer.close()
    line.outgoing.beat(HEARTBEAT)
    assert len(line.failures) == 1
