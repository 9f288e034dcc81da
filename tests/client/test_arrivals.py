"""zeo.client.arrivals: blobs on their way from the server."""

import errno
import logging
import os
import tempfile
from pathlib import Path

import pytest

from tests.client.peer import oid
from tests.client.peer import tid
from zeo.client.arrivals import Arrivals
from zeo.wire.chunks import around_download
from zeo.wire.chunks import around_upload

ONE, TWO = (oid(1), tid(1)), (oid(2), tid(1))


class Place:
    """Where blobs go that have arrived."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.blobs: dict[tuple[bytes, bytes], bytes] = {}
        self.full = False
        self.arrivals = Arrivals('the cache', str(folder), self.put)

    def put(self, path: str, oid: bytes, tid: bytes) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, 'No space left on device')
        self.blobs[oid, tid] = Path(path).read_bytes()
        Path(path).unlink()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def temporary(place: Place) -> int:
    return len(list(place.folder.iterdir()))


def test_a_half_arrived_blob_never_looks_whole(place: Place) -> None:
    place.arrivals.start(*ONE)
    place.arrivals.add(*ONE, b'some')
    assert temporary(place) == 1
    place.arrivals.lost()
    place.arrivals.complete(*ONE)
    assert not place.blobs and not temporary(place)


def test_blobs_may_arrive_mixed_up(place: Place) -> None:
    for key in ONE, TWO:
        place.arrivals.start(*key)
    for piece in b'some', b'', b'data':
        place.arrivals.add(*ONE, piece)
        place.arrivals.add(*TWO, memoryview(2 * piece))
    for key in ONE, TWO:
        place.arrivals.complete(*key)
    assert place.blobs == {ONE: b'somedata', TWO: b'somesomedatadata'} and not temporary(place)


def test_a_blob_that_starts_again_is_the_second_one(place: Place) -> None:
    for data in b'wrong', b'right':
        place.arrivals.start(*ONE)
        place.arrivals.add(*ONE, data)
    place.arrivals.complete(*ONE)
    assert place.blobs == {ONE: b'right'} and not temporary(place)


def divert(place: Place, key: tuple[bytes, bytes], data: bytes) -> bool:
    """Have a long piece arrive, unless it is wanted as a message."""
    head, tail = around_download(*key, len(data))
    passing = place.arrivals.divert(memoryview(head[4:]), len(head) - 4 + len(data) + len(tail))
    if passing is None:
        return False
    passing.take(memoryview(data))
    return True


def test_the_data_of_long_pieces_go_straight_to_the_file_of_their_blob(place: Place) -> None:
    for key in ONE, TWO:
        place.arrivals.start(*key)
    assert divert(place, ONE, b'a' * 1000) and divert(place, TWO, b'b' * 1000)
    place.arrivals.add(*ONE, b'c')
    for key in ONE, TWO:
        place.arrivals.complete(*key)
    assert place.blobs == {ONE: b'a' * 1000 + b'c', TWO: b'b' * 1000}


def test_long_pieces_of_nothing_are_not_wanted(place: Place) -> None:
    assert not divert(place, ONE, b'a' * 1000)
    head, _ = around_upload(1000)  # nothing that a server sends
    assert place.arrivals.divert(memoryview(head[4:]), len(head) - 1 + 1000) is None


def test_a_full_disk_in_a_long_piece_is_told(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, 'mkstemp', lambda **_: (os.open('/dev/full', os.O_WRONLY), 'a file'))
    place.arrivals.start(*ONE)
    assert divert(place, ONE, b'a' * 1000)
    assert not divert(place, ONE, b'a' * 1000)
    place.arrivals.complete(*ONE)
    assert place.arrivals.failures[ONE].errno == errno.ENOSPC and not place.blobs


def test_pieces_of_nothing_are_ignored(place: Place) -> None:
    place.arrivals.add(*ONE, b'data')
    place.arrivals.complete(*ONE)
    assert not place.blobs


def test_what_cannot_be_stored_is_told_until_it_starts_again(
        place: Place, caplog: pytest.LogCaptureFixture) -> None:
    place.full = True
    place.arrivals.start(*ONE)
    place.arrivals.complete(*ONE)
    assert place.arrivals.failures[ONE].errno == errno.ENOSPC and not temporary(place)
    [record] = caplog.records
    assert record.levelno == logging.ERROR and 'a blob cannot be put into the cache' in record.message
    place.full = False
    place.arrivals.start(*ONE)
    assert not place.arrivals.failures
    place.arrivals.lost()


def test_what_cannot_be_begun_is_told(place: Place) -> None:
    place.folder.rmdir()
    place.arrivals.start(*ONE)
    place.arrivals.add(*ONE, b'data')
    place.arrivals.complete(*ONE)
    assert place.arrivals.failures[ONE].errno == errno.ENOENT and not place.blobs


def test_the_files_of_a_parent_process_stay(place: Place) -> None:
    place.arrivals.start(*ONE)
    place.arrivals.abandon()
    place.arrivals.lost()
    assert temporary(place) == 1
