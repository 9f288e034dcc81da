"""zeo.wire.pieces: from files into sockets and from sockets into files."""

import errno
import os
import socket
import threading
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from zeo.errors import ProtocolError
from zeo.wire import pieces
from zeo.wire.chunks import around_download
from zeo.wire.chunks import upload_in
from zeo.wire.chunks import upload_notice
from zeo.wire.chunks import upload_of
from zeo.wire.framing import Inbox
from zeo.wire.framing import frame
from zeo.wire.pieces import LARGEST
from zeo.wire.pieces import SMALLEST
from zeo.wire.pieces import Destination
from zeo.wire.pieces import Passing
from zeo.wire.pieces import cut
from zeo.wire.pieces import send

DATA = os.urandom(3_000_000)


@pytest.fixture(params=['TCP', 'Unix'])
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[socket.socket, socket.socket]]:
    if request.param == 'Unix':
        one, other = socket.socketpair()
    else:
        with socket.create_server(('127.0.0.1', 0)) as listener:
            one = socket.create_connection(listener.getsockname())
            other, _ = listener.accept()
    one.settimeout(None)
    other.settimeout(None)
    yield one, other
    one.close()
    other.close()


@pytest.fixture
def source(tmp_path: Path) -> Iterator[int]:
    (tmp_path / 'source').write_bytes(DATA)
    with open(tmp_path / 'source', 'rb', buffering=0) as file:
        yield file.fileno()


@pytest.fixture
def destination(tmp_path: Path) -> Iterator[Destination]:
    destination = Destination(open(tmp_path / 'destination', 'wb', buffering=0))
    yield destination
    destination.close()


def no_system_call(*args: Any) -> int:
    raise OSError(errno.EINVAL, 'not with such a file')


# ---- how long they are


def sizes(size: int, *seconds: float) -> list[int]:
    """The lengths of pieces, if they take so long to send."""
    now = 0.0
    found = []
    clock = cut(size, lambda: now)
    for at, piece in clock:
        assert at == sum(found)
        found.append(piece)
        now += seconds[min(len(found), len(seconds)) - 1]
    assert sum(found) == size
    return found


def test_pieces_are_longer_on_a_fast_line() -> None:
    assert sizes(6 * LARGEST, 0.001)[:4] == [SMALLEST, 2 * SMALLEST, 4 * SMALLEST, LARGEST]
    assert max(sizes(6 * LARGEST, 0.001)) == LARGEST


def test_pieces_are_short_on_a_slow_line_and_when_a_line_gets_slow() -> None:
    assert set(sizes(20 * SMALLEST, 1)) == {SMALLEST}
    assert sizes(40 * SMALLEST, .001, .001, .1)[:5] == [SMALLEST, 2 * SMALLEST, 4 * SMALLEST, 2 * SMALLEST, SMALLEST]


@pytest.mark.parametrize('size', [0, 1, SMALLEST - 1, SMALLEST, SMALLEST + 1])
def test_all_of_a_blob_is_cut(size: int) -> None:
    assert sum(sizes(size, 0.007)) == size


def test_no_message_is_longer_than_is_said() -> None:
    head, tail = around_download(b'oidoidoi', b'tidtidti', LARGEST)
    assert len(head) + LARGEST + len(tail) <= pieces.LONGEST_MESSAGE


# ---- from a file


@pytest.mark.parametrize('kernel', [True, False])
def test_what_stands_around_the_data_is_sent_with_them(
        ends: tuple[socket.socket, socket.socket], source: int, kernel: bool,
        monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = ends
    if not kernel:
        monkeypatch.setattr(os, 'sendfile', no_system_call)
    counts: list[int] = []
    sender = threading.Thread(target=send, args=(one, b'head', source, 1000, 2_000_000, b'tail', counts.append))
    sender.start()
    received = bytearray()
    while len(received) < 2_000_008:
        received += other.recv(100_000)
    sender.join()
    assert received == b'head' + DATA[1000:2_001_000] + b'tail' and sum(counts) == len(received)


@pytest.mark.parametrize('kernel', [True, False])
def test_a_file_that_ends_early_is_an_error(
        ends: tuple[socket.socket, socket.socket], source: int, kernel: bool,
        monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernel:
        monkeypatch.setattr(os, 'sendfile', no_system_call)
    with pytest.raises(OSError, match='shorter'):
        send(ends[0], b'head', source, len(DATA) - 1000, 1001, b'tail', lambda count: None)


def test_who_waits_for_the_other_side_is_told_so(
        ends: tuple[socket.socket, socket.socket], source: int) -> None:
    ends[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, (0).to_bytes(8, 'little') + (1000).to_bytes(8, 'little'))
    ends[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 10_000)

    class Enough(Exception):
        pass

    def sent(count: int) -> None:
        if not count:
            raise Enough

    with pytest.raises(Enough):
        for _ in range(100):
            send(ends[0], b'head', source, 0, len(DATA), b'tail', sent)


# ---- into a file


def passed(inbox: Inbox, sock: socket.socket, step: int, destination: Destination | None = None,
           ) -> list[bytes | None]:
    """All payloads, received in steps; None stands for the data of one that went elsewhere.

    Pieces that come as payloads, as short ones do and those that begin at an unlucky place, are written to the
    destination.
    """
    found: list[bytes | None] = []
    while True:
        while (payload := inbox.next()) is not None:
            piece = upload_of(payload)
            if piece is None:
                found.append(bytes(payload))
            else:
                assert destination is not None
                destination.write(piece[3][0])
        if inbox.passing is None:
            count = sock.recv_into(inbox.buffer()[:step])
            inbox.advance(count)
        else:
            if inbox.passing.left:
                found.append(None) if found[-1:] != [None] else None
            count = inbox.pass_on(sock)
        if not count:
            return found


def diverting(destination: Destination, failed: Callable[[OSError], object] = lambda error: None) -> Inbox:
    def divert(beginning: memoryview, length: int) -> Passing | None:
        found = upload_in(beginning, length)
        return None if found is None else Passing(*found, destination, failed)
    inbox = Inbox(size=32 * 1024)
    inbox.divert = divert
    return inbox


def stream(*parts: bytes | tuple[int, int]) -> bytes:
    """Ordinary frames, and pieces of `DATA`."""
    found = b''
    for part in parts:
        if isinstance(part, bytes):
            found += b''.join(frame(part))
        else:
            found += b''.join(upload_notice(DATA[part[0]:part[1]]))
    return found


def sending(sock: socket.socket, data: bytes) -> threading.Thread:
    def run() -> None:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
    thread = threading.Thread(target=run)
    thread.start()
    return thread


@pytest.mark.parametrize('step', [1, 5, 37, 1000, 32 * 1024])
@pytest.mark.parametrize('way', ['splice', 'no splice', 'not into this file', 'not from this socket', 'no pipe'])
def test_data_go_to_the_file_and_everything_else_comes_as_always(
        ends: tuple[socket.socket, socket.socket], destination: Destination, tmp_path: Path, step: int, way: str,
        monkeypatch: pytest.MonkeyPatch) -> None:
    splice = os.splice

    def only_from_socket(source: int, target: int, count: int) -> int:
        return no_system_call() if source != ends[1].fileno() else splice(source, target, count)

    def no_files(*args: Any) -> tuple[int, int]:
        raise OSError(errno.EMFILE, 'too many open files')

    match way:
        case 'no splice':
            monkeypatch.delattr(os, 'splice')
            destination = Destination(destination._file)
        case 'not into this file':
            monkeypatch.setattr(os, 'splice', only_from_socket)
        case 'not from this socket':
            monkeypatch.setattr(os, 'splice', no_system_call)
        case 'no pipe':
            monkeypatch.setattr(os, 'pipe', no_files)
    whole = 200_000 if step < 100 else 2_000_000
    data = stream(b'first', (0, 40_000), (40_000, 40_100), b'x' * 50_000, (40_100, whole), b'last', (whole, whole + 33_000))
    sender = sending(ends[0], data)
    payloads = passed(diverting(destination), ends[1], step, destination)
    sender.join()
    assert [each for each in payloads if each is not None] == [b'first', b'x' * 50_000, b'last']
    assert (tmp_path / 'destination').read_bytes() == DATA[:whole + 33_000]
    assert destination.size == whole + 33_000
    if step >= 1000:
        assert None in payloads


def test_the_data_of_the_next_piece_are_left_to_the_kernel(
        ends: tuple[socket.socket, socket.socket], destination: Destination, monkeypatch: pytest.MonkeyPatch) -> None:
    sender = sending(ends[0], stream((0, 1_000_000), (1_000_000, 2_000_000), (2_000_000, 3_000_000)))
    written: list[int] = []
    write = destination.write

    def note(data: bytes | memoryview) -> None:
        written.append(len(data))
        write(data)

    monkeypatch.setattr(destination, 'write', note)
    passed(diverting(destination), ends[1], 32 * 1024)
    sender.join()
    assert destination.size == 3_000_000 and sum(written) <= 32 * 1024  # what came with the first


@pytest.mark.parametrize('where', ['what came first', 'what is in the pipe'])
def test_what_cannot_be_written_is_told_once_and_the_rest_is_thrown_away(
        ends: tuple[socket.socket, socket.socket], destination: Destination, where: str,
        monkeypatch: pytest.MonkeyPatch) -> None:
    splice = os.splice

    def full(source: int, target: int, count: int) -> int:
        if target == destination.fileno():
            raise OSError(errno.ENOSPC, 'No space left on device')
        return splice(source, target, count)

    def failed(error: OSError) -> None:
        failures.append(error)
        assert destination._pipe is None or where == 'what came first'  # it has the rest in it
        destination.close()

    if where == 'what came first':
        destination.close()
        destination = Destination(open('/dev/full', 'wb', buffering=0))
    else:
        monkeypatch.setattr(os, 'splice', full)
    failures: list[OSError] = []
    sender = sending(ends[0], stream((0, 1_000_000), b'next'))
    assert passed(diverting(destination, failed), ends[1], 1000) == [None, b'next']
    sender.join()
    assert [error.errno for error in failures] == [errno.ENOSPC]


def test_no_descriptor_stays_open(destination: Destination, ends: tuple[socket.socket, socket.socket]) -> None:
    before = set(os.listdir('/proc/self/fd'))
    sender = sending(ends[0], stream((0, 1_000_000)))
    passed(diverting(destination), ends[1], 1000)
    sender.join()
    assert len(set(os.listdir('/proc/self/fd')) - before) == 2  # the pipe, kept for the next piece
    destination.close()
    assert set(os.listdir('/proc/self/fd')) < before


def test_a_piece_has_to_end_as_it_is_said(
        ends: tuple[socket.socket, socket.socket], destination: Destination) -> None:
    data = bytearray(stream((0, 100_000)))
    data[-2] ^= 1
    sender = sending(ends[0], bytes(data))
    with pytest.raises(ProtocolError, match='does not end'):
        passed(diverting(destination), ends[1], 1000)
    sender.join()


def test_a_stream_that_ends_within_a_piece_has_ended(
        ends: tuple[socket.socket, socket.socket], destination: Destination) -> None:
    sender = sending(ends[0], stream((0, 100_000))[:-50_000])
    inbox = diverting(destination)
    assert passed(inbox, ends[1], 1000) == [None]
    assert inbox.passing is not None and inbox.passing.left == 50_000 - 3
    sender.join()


def test_a_time_limit_of_the_socket_is_the_readers_business(
        ends: tuple[socket.socket, socket.socket], destination: Destination, tmp_path: Path) -> None:
    data = stream((0, 100_000), b'next')
    ends[1].setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, (0).to_bytes(8, 'little') + (1000).to_bytes(8, 'little'))
    ends[0].sendall(data[:50_000])
    inbox = diverting(destination)
    with pytest.raises(BlockingIOError):
        passed(inbox, ends[1], 1000)
    ends[1].setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, bytes(16))
    sender = sending(ends[0], data[50_000:])
    assert passed(inbox, ends[1], 1000)[-1] == b'next'  # as if nothing had been
    sender.join()
    assert (tmp_path / 'destination').read_bytes() == DATA[:100_000]
