"""A transaction's operations, kept until vote: in memory first, on disk when there are many."""

import errno
import os
import tempfile
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from tests.server.talk import oid
from zeo.server.staging import IN_MEMORY
from zeo.server.staging import OVERHEAD
from zeo.server.staging import Staging

OPERATION = ('store', (oid(1), oid(0), b'record'))


def resident() -> int:
    """Bytes of memory this process has now."""
    with open('/proc/self/statm') as file:
        return int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')


def test_what_is_staged_comes_back_in_order_and_may_be_read_again() -> None:
    kept = Staging()
    operations = [('store', (oid(number), oid(0), b'r')) for number in range(10)]
    for operation in operations:
        kept.append(operation, 1)
    assert list(kept) == operations
    kept.append(OPERATION, 6)
    assert list(kept) == [*operations, OPERATION]
    assert kept.size == 11 * OVERHEAD + 16
    kept.close()
    assert list(kept) == []


@given(sizes=st.lists(st.integers(1, 2000), max_size=30), in_memory=st.integers(0, 5000),
       read_at=st.integers(0, 30))
def test_it_makes_no_difference_what_is_on_disk(
        sizes: list[int], in_memory: int, read_at: int) -> None:
    kept = Staging(in_memory)
    operations = []
    for number, size in enumerate(sizes):
        if number == read_at:
            assert list(kept) == operations
        operations.append(('store', (oid(number), oid(0), bytes([number]) * size)))
        kept.append(operations[-1], size)
    assert list(kept) == list(kept) == operations
    kept.close()


def test_little_needs_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, 'TemporaryFile', lambda **_: pytest.fail('a file was made'))
    kept = Staging()
    kept.append(OPERATION, 6)
    assert list(kept) == [OPERATION]
    kept.close()


def test_the_file_has_no_name_and_is_closed_in_the_end(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    kept = Staging(in_memory=10)
    kept.append(OPERATION, 6)
    assert kept._file is not None
    file = kept._file
    assert os.listdir(tmp_path) == []
    kept.close()
    assert file.closed
    kept.close()


class Full:
    """A temporary file on a disk that is full."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.closed = False

    def write(self, data: Any) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return len(data)

    def seek(self, *_: int) -> int:
        return 0

    def close(self) -> None:
        self.closed = True
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # what was buffered cannot be written


def test_a_full_disk_is_an_error_at_once_and_not_when_it_is_given_up(
        monkeypatch: pytest.MonkeyPatch) -> None:
    file = Full(room=1000)
    monkeypatch.setattr(tempfile, 'TemporaryFile', lambda **_: file)
    kept = Staging(in_memory=100)
    with pytest.raises(OSError, match='No space left'):
        for _ in range(1000):
            kept.append(OPERATION, 6)
    kept.close()
    assert file.closed


def stage(count: int, size: int, in_memory: int = IN_MEMORY) -> tuple[int, int]:
    """Stage and read back; the bytes staged, and by how many the memory grew meanwhile."""
    record = os.urandom(size)
    before = most = resident()
    kept = Staging(in_memory)
    for number in range(count):
        kept.append(('store', (oid(number), oid(0), record[:-8] + oid(number))), size)
        if number % 1000 == 0:
            most = max(most, resident())
    for number, (_, args) in enumerate(kept):
        assert args[0] == oid(number)
        if number % 1000 == 0:
            most = max(most, resident())
    staged = kept.size
    kept.close()
    return staged, most - before


#: Beside what is kept in memory: buffers, and what the allocator does not give back.
SLACK = 16 * 1024 * 1024


@pytest.mark.parametrize('count, size', [
    (20_000, 2000), (40, 1024 * 1024),
    pytest.param(100_000, 10_000, marks=pytest.mark.soak),
    pytest.param(1024, 1024 * 1024, marks=pytest.mark.soak)])
def test_a_large_transaction_takes_little_memory(count: int, size: int) -> None:
    stage(10, size)  # what comes with the first time
    staged, grown = stage(count, size)
    assert staged >= count * size
    assert grown < IN_MEMORY + 2 * size + SLACK


def test_it_would_be_noticed_if_it_were_kept_in_memory() -> None:
    _, grown = stage(20_000, 2000, in_memory=2**40)
    assert grown > IN_MEMORY + 2 * 2000 + SLACK
