"""Whatever happens to the file: what is found in it later is true."""

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from hashlib import blake2b
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from ZODB.utils import p64, z64

from tests.client.truth import FAR_FUTURE, SMALL, Truth, copied, knowledge, renew, teach
from zeo.client.cache import Cache, open_cache
from zeo.client.cachefile import COLLECTED, Log, claim, pack, pack_all, repack, unpack

STORAGE = b'one storage'.ljust(16)
TINY = 64 + 4 * 512     # bytes: four segments of the shortest kind, and no room for a summary


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / 'client@1.zec'


def tags(log: Log) -> list[bytes]:
    """Resume the log; the tags of what is in it, with ``gap`` where something is missing."""
    log.resume()
    result = []
    for gap, _, records, _ in log.replay():
        result += [b'gap'] * gap + [record.tag for record in records]
    return result


def write(log: Log, *numbers: int, body: bytes = bytes(100)) -> None:
    """Append records whose tags are these numbers."""
    for number in numbers:
        if not log.fits(len(body)):
            log.oldest()
            log.begin(number)
        log.append(b'%04d' % number, 0, pack(p64(number), z64, body))


def opened(path: Path, size: int = TINY, storage: bytes = STORAGE) -> Log:
    return Log(claim(str(path)), size, storage)


# The log

def test_what_is_appended_is_found_in_order(path: Path) -> None:
    log = opened(path)
    log.start_over(7)
    write(log, 1, 2, 3, 4, 5)
    place = log.append(b'last', 9, pack(p64(1), p64(2), b'body'))
    log.close(b'')
    log = opened(path)
    assert log.resume()
    (_, last_tid, first, _), (gap, _, second, image) = log.replay()
    assert last_tid == 7 and not gap
    assert [record.tag for record in first + second] == [b'0001', b'0002', b'0003', b'0004', b'0005', b'last']
    assert second[-1][1:] == (1, 2, 9, place)
    assert log.content(place, image) == log.read(place)
    assert unpack(log.read(place)) == (p64(1), p64(2), b'body')
    log.close()


def test_the_oldest_are_given_up_first(path: Path) -> None:
    log = opened(path)
    log.start_over(0)
    write(log, *range(100))
    assert [record.tag for record in log.oldest()] == [b'0090', b'0091', b'0092']
    log.close(b'')
    log = opened(path)
    assert tags(log) == [b'%04d' % number for number in range(90, 100)]
    write(log, *range(100, 110))
    log.close(b'')
    log = opened(path)
    assert tags(log) == [b'%04d' % number for number in range(99, 110)]
    log.close()


def test_a_log_that_was_cut_off_is_continued_where_it_ends(path: Path) -> None:
    log = opened(path)
    log.start_over(0)
    write(log, 1, 2)
    log.flush()
    os.truncate(path, os.path.getsize(path) - 1)
    log.abandon()
    log = opened(path)
    assert tags(log) == [b'0001']
    write(log, 3)
    log.close(b'')
    log = opened(path)
    assert tags(log) == [b'0001', b'0003']
    log.close()


def test_what_was_written_after_the_damage_does_not_come_back(path: Path) -> None:
    """The same records are written again up to where the old ones would go on."""
    log = opened(path)
    log.start_over(0)
    write(log, 1, 2, 3, body=b'')
    log.flush()
    log.abandon()
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'0002', b'????'))
    log = opened(path)
    assert tags(log) == [b'0001']
    write(log, 4, body=b'')
    log.close(b'')
    log = opened(path)
    assert tags(log) == [b'0001', b'0004']
    log.close()


def test_a_segment_begun_anew_is_not_followed_by_what_was_in_it(path: Path) -> None:
    """Its header says the same again, and the old records would go on from there."""
    log = opened(path)
    log.start_over(0)
    write(log, 0, 1, 2, 3, 4)
    assert log._closed[0] == (64, 512) and log._start == 64 + 512
    log.flush()
    log.abandon()
    data = path.read_bytes()
    path.write_bytes(data[:64 + 512] + b'?' + data[64 + 512 + 1:])
    log = opened(path)
    assert tags(log) == [b'0000', b'0001', b'0002']
    log.begin(3)
    log.close(b'')
    log = opened(path)
    assert tags(log) == [b'0000', b'0001', b'0002']
    log.close()


def test_what_a_shorter_file_has_no_place_for_does_not_come_back_in_a_longer_one(path: Path) -> None:
    size = 64 + 12 * 512
    log = opened(path, size)
    log.start_over(0)
    write(log, *range(33))
    log.close(b'')
    log = opened(path, size - 1024)
    log.resume()
    found = tags(log)
    assert b'gap' not in found and 20 < len(found) < 33
    log.close()
    log = opened(path, size)
    assert tags(log) == found
    log.close()


@pytest.mark.parametrize('damaged', [b'%04d' % number for number in range(91, 99)])
def test_what_is_lost_in_between_is_a_gap(path: Path, damaged: bytes) -> None:
    log = opened(path)
    log.start_over(0)
    write(log, *range(100))
    log.close(b'')
    path.write_bytes(path.read_bytes().replace(damaged, b'????'))
    log = opened(path)
    found = tags(log)
    assert damaged not in found and found.count(b'gap') == 1
    assert int(found[found.index(b'gap') - 1]) == int(damaged) - 1
    assert found[-1] == b'0099'
    log.close()


def test_a_whole_segment_that_is_lost_is_a_gap(path: Path) -> None:
    log = opened(path)
    log.start_over(0)
    write(log, *range(12))
    log.close(b'')
    data = path.read_bytes()
    path.write_bytes(data[:64 + 512] + bytes(512) + data[64 + 1024:])
    log = opened(path)
    assert tags(log) == [b'0000', b'0001', b'0002', b'gap'] + [b'%04d' % number for number in range(6, 12)]
    log.close()


def test_a_log_that_starts_over_forgets_what_was_before(path: Path) -> None:
    log = opened(path)
    log.start_over(0)
    write(log, *range(10))
    log.flush()
    former = path.read_bytes()
    log.start_over(0)
    write(log, 20)
    log.close(b'')
    with open(path, 'ab') as file:      # as if the system had brought back what was cut off
        file.write(former[os.path.getsize(path):])
    log = opened(path)
    assert tags(log) == [b'0020']
    log.close()


def test_many_make_one_record_and_are_found_one_by_one(path: Path) -> None:
    log = opened(path, 1 << 20)
    log.start_over(0)
    write(log, 1)
    bodies = [bytes([number]) * (number * 7 % 50) for number in range(40)]
    places = log.append_all(b'many', pack_all([p64(number) + p64(9) for number in range(40)], bodies))
    write(log, 2)
    log.close(b'')
    log = opened(path, 1 << 20)
    log.resume()
    [(_, _, records, image)] = log.replay()
    assert [record.tag for record in records] == [b'0001'] + 40 * [b'many'] + [b'0002']
    assert [record[1:] for record in records[1:-1]] == [(n, 9, 0, place) for n, place in enumerate(places)]
    for number, place in enumerate(places):
        assert log.content(place, image) == log.read(place)
        assert unpack(log.read(place)) == (p64(number), p64(9), bodies[number])
    log.close()


def test_what_is_packed_together_is_packed_alike() -> None:
    names, bodies = [p64(n) + p64(n + 1) for n in range(5)], [bytes(n * 10) for n in range(5)]
    assert pack_all(names, bodies) == [pack(name[:8], name[8:], body) for name, body in zip(names, bodies)]


def test_no_more_than_a_little_waits_to_be_written(path: Path) -> None:
    log = opened(path, 1 << 20)
    log.start_over(0)
    place = 0
    for number in range(100):
        place = log.append(b'data', 0, pack(p64(number), z64, bytes(1024)))
        assert len(log.pending) <= COLLECTED // 1024
        assert unpack(log.read(place))
    assert os.path.getsize(path) > 0
    log.flush()
    assert not log.pending and unpack(log.read(place)) == (p64(99), z64, bytes(1024))
    log.close(b'')


def test_a_file_changed_by_somebody_else_is_noticed_before_it_is_reused(path: Path) -> None:
    log = opened(path)
    log.start_over(0)
    write(log, *range(12))
    log.flush()
    path.write_bytes(path.read_bytes().replace(b'0001', b'????'))
    with pytest.raises(OSError, match='somebody else'):
        log.oldest()
    log.abandon()

def test_a_closed_log_touches_no_file_that_has_its_number_now(path: Path) -> None:
    log = opened(path)
    log.start_over(7)
    write(log, 1)
    log.close()
    with open(path.with_name('other'), 'w+b') as other:     # gets the lowest number that is free
        for change in log.flush, lambda: log.mark(clean=True), lambda: log.start_over(8), lambda: log.read(64 << 32 | 1):
            with pytest.raises(OSError, match='Bad file descriptor'):
                change()
        assert other.read() == b''



@pytest.mark.parametrize('content', [b'', b'\0', bytes(3), bytes(4), bytes(20), bytes(1000), b'\xff' * 100])
def test_what_was_not_packed_is_not_unpacked(content: bytes) -> None:
    found = unpack(content)
    assert found is None or found[0] != z64


def test_what_was_read_can_be_appended_again_whatever_it_is() -> None:
    assert repack(b''.join(pack(p64(1), p64(2), b'some body'))) == pack(p64(1), p64(2), b'some body')
    assert b''.join(repack(bytes(range(100)))) == bytes(range(100))


def test_packed_content_does_not_survive_any_flipped_bit() -> None:
    content = b''.join(pack(p64(1), p64(2), b'some body'))
    assert unpack(content) == (p64(1), p64(2), b'some body')
    for position in range(len(content)):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[position] ^= 1 << bit
            assert unpack(bytes(damaged)) is None


@pytest.mark.parametrize('change, reason', [
    (lambda data: b'', None),
    (lambda data: data[:10], 'cut off'),
    (lambda data: data[:64], 'nothing in it'),
    (lambda data: b'ZEC3' + data[4:], 'look like a cache'),
    (lambda data: bytes(5000), 'look like a cache'),
    (lambda data: data[:8] + b'\1' + data[9:], 'version 1'),
    (lambda data: data[:20] + b'?' + data[21:], 'header is damaged')])
def test_a_file_that_cannot_be_used_starts_empty_with_one_line_in_the_log(
        path: Path, caplog: Any, change: Any, reason: str | None) -> None:
    cache = open_cache(str(path), SMALL)
    cache.store(p64(1), p64(10), None, b'one')
    cache.close()
    path.write_bytes(change(path.read_bytes()))
    for _ in range(2):      # the second time all is well again
        cache = open_cache(str(path), SMALL, strict=True)
        assert [reason in message for message in caplog.messages] == ([True] if reason else [])
        if not len(cache):
            cache.store(p64(1), p64(10), None, b'two')
        assert cache.load(p64(1)) == (b'two', p64(10))
        cache.close()


@pytest.mark.parametrize('former', [SMALL, SMALL + 1024])
def test_an_older_summary_is_not_believed(path: Path, former: int) -> None:
    """One written when the cache had another size may still lie there."""
    a, b = p64(1), p64(2)
    cache = open_cache(str(path), former)
    cache.store(a, p64(10), None, b'one')
    cache.close()
    for size in 2 * SMALL - former + 1024, former:
        cache = open_cache(str(path), size)
        if cache.load(a):
            cache.invalidate(p64(20), [a])
            cache.set_last_tid(p64(20))
        assert cache.load(a) is None and cache.last_tid == p64(20)
        cache.store(b, p64(20), None, b'two')
        cache.close()


def test_what_was_used_is_known_after_a_restart(path: Path) -> None:
    size = 1 << 18
    used, unused = range(100), range(100, 200)
    cache = open_cache(str(path), size)
    for oid in (*used, *unused):
        cache.store(p64(oid), p64(1), None, bytes(500))
    for oid in used:
        cache.load(p64(oid))
    cache.close()
    cache = open_cache(str(path), size)
    for oid in range(1000, 1000 + size // 500):
        cache.store(p64(oid), p64(1), None, bytes(500))
    kept = [sum(cache.load(p64(oid)) is not None for oid in oids) for oids in (used, unused)]
    cache.close()
    assert kept[0] > 90 and kept[1] == 0


def test_after_a_kill_nothing_damaged_is_listed(path: Path) -> None:
    cache = open_cache(str(path), SMALL)
    cache.store(p64(1), p64(10), None, b'first record')
    cache.store(p64(2), p64(10), None, b'second record')
    cache.flush()
    cache.abandon()
    path.write_bytes(path.read_bytes().replace(b'first', b'FIRST'))
    for _ in range(2):
        cache = open_cache(str(path), SMALL)
        assert list(cache.contents()) == [(p64(2), p64(10), None)]
        cache.close()


def test_a_damaged_magic_is_not_taken_for_somebody_elses_file(tmp_path: Path) -> None:
    path = tmp_path / 'without the usual ending'
    open_cache(str(path), SMALL, strict=True).close()
    path.write_bytes(b'?' + path.read_bytes()[1:])
    open_cache(str(path), SMALL, strict=True).close()


# Every kind of damage

def history(cache: Cache, truth: Truth) -> list[bytes]:
    """A bit of everything in a tiny cache; gives all last tids there were."""
    last_tids = [z64]
    a, b, c, d = map(p64, range(1, 5))

    def move() -> None:
        cache.set_last_tid(truth.last_tid)
        cache.flush()                           # else it is noted only now and then
        last_tids.append(truth.last_tid)

    def commit(*oids: bytes) -> None:
        cache.invalidate(truth.commit(*oids), oids)
        move()
        for oid in oids:
            teach(cache, truth, oid)

    commit(a, b, c, d)
    commit(b)
    commit(c)
    truth.commit(d)                             # while away
    cache.suspect_all()
    move()
    cache.confirm(truth.last_tid, [a, c])
    tid = truth.commit(a)
    teach(cache, truth, a)                      # ahead of its invalidation
    cache.invalidate(tid, [a])
    move()
    truth.commit(c)
    cache.drop([c])
    move()
    commit(b)
    for number in range(3):
        commit(p64(10 + number), b)
    return last_tids


@pytest.fixture(scope='module', params=['killed', 'clean', 'clean with summary'])
def damageable(request: pytest.FixtureRequest) -> Iterator[tuple[Path, bytes, Truth, list[bytes], int, int]]:
    """A small cache file, closed or not: path, bytes, truth, the last tids it had, revisions, size."""
    truth = Truth()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, 'x.zec')
        size = TINY + 600 * ('summary' in request.param)
        cache = open_cache(str(path), size)
        last_tids = history(cache, truth)
        cache.flush()
        data = path.read_bytes()
        number = len(cache)
        cache.close()
        if 'clean' in request.param:
            data = path.read_bytes()
        assert number > 8 and len(data) > TINY * 0.8
        # Without a damaged summary there is no reason to replay.
        path.write_bytes(data)
        log = opened(path, size, blake2b(b'1', digest_size=16).digest())
        assert (log.resume(), log.recall() is not None) == (
            'clean' in request.param, 'summary' in request.param)
        log.close()
        yield path, data, truth, last_tids, number, size


def judge(path: Path, truth: Truth, last_tids: list[bytes], use: bool = True, size: int = TINY) -> int:
    """Open the file; nothing it says is wrong, now and when it is used; gives the number of revisions."""
    cache = open_cache(str(path), size)
    try:
        assert cache.last_tid in last_tids
        number = len(cache)
        truth.check(cache)
        if not use:
            return number
        cache.confirm(truth.last_tid, [oid for oid, start in cache.suspects() if truth.end(oid, start) is None])
        cache.drop(truth.changed_since(cache.last_tid))
        cache.set_last_tid(truth.last_tid)
        truth.check(cache)
        cache.flush()  # which may have to make room
        known = knowledge(cache)
    finally:
        cache.close()
    cache = open_cache(str(path), size)
    assert knowledge(cache) == known
    cache.close()
    return number


def test_the_undamaged_file_keeps_everything(damageable: Any) -> None:
    path, data, truth, last_tids, number, size = damageable
    path.write_bytes(data)
    assert judge(path, truth, last_tids, size=size) == number


def test_no_flipped_bit_makes_it_say_anything_wrong(damageable: Any, caplog: Any) -> None:
    path, data, truth, last_tids, number, size = damageable
    caplog.set_level(logging.CRITICAL)
    kept = 0
    for position in range(len(data)):
        for bit in range(8) if position < 200 or position > 64 + 4 * 512 else [position % 8]:
            damaged = bytearray(data)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            found = judge(path, truth, last_tids, use=position % 8 == 0, size=size)
            kept += found if position >= 64 else 0      # nothing can be kept without the header
    # And damage costs no more than what it hits, and what may have been ended by it.
    assert kept > number * (len(data) - 64) * 0.4


def test_no_lost_block_makes_it_say_anything_wrong(damageable: Any, caplog: Any) -> None:
    path, data, truth, last_tids, number, size = damageable
    caplog.set_level(logging.CRITICAL)
    for length in 16, 100, 512:
        for position in range(0, len(data), max(16, length // 2)):
            for filling in bytes(length), b'\xff' * length, data[:length], data[64:64 + length], data[-length:]:
                path.write_bytes(data[:position] + filling + data[position + length:])
                judge(path, truth, last_tids, use=length == 100, size=size)


def test_no_truncation_makes_it_say_anything_wrong(damageable: Any, caplog: Any) -> None:
    path, data, truth, last_tids, number, size = damageable
    caplog.set_level(logging.CRITICAL)
    for length in range(0, len(data), 3):
        path.write_bytes(data[:length])
        judge(path, truth, last_tids, use=length % 8 == 0, size=size)


def test_no_moment_at_which_it_is_killed_makes_it_say_anything_wrong(tmp_path: Path, caplog: Any, monkeypatch: Any) -> None:
    """Every write is cut off after each of its bytes, or is lost while later ones are not."""
    caplog.set_level(logging.CRITICAL)
    writes: list[tuple[int, bytes]] = []
    pwrite = os.pwrite
    monkeypatch.setattr('zeo.client.cachefile.COLLECTED', 1)
    monkeypatch.setattr(os, 'pwrite', lambda fd, data, offset: writes.append((offset, data)) or pwrite(fd, data, offset))
    truth = Truth()
    cache = open_cache(str(tmp_path / 'original.zec'), TINY)
    last_tids = history(cache, truth)
    cache.close()
    monkeypatch.undo()
    path = tmp_path / 'found.zec'
    image = b''
    for number, (offset, data) in enumerate(writes):
        for cut in range(0, len(data), 7):
            path.write_bytes(placed(image, offset, data[:cut]))
            judge(path, truth, last_tids)
        without = image
        for later_offset, later in writes[number + 1:]:
            without = placed(without, later_offset, later)
        path.write_bytes(without)
        judge(path, truth, last_tids)
        image = placed(image, offset, data)


def test_no_kill_makes_it_forget_what_this_client_has_changed(tmp_path: Path, caplog: Any, monkeypatch: Any) -> None:
    """The last tid in the file never runs ahead of the transactions that were set aside, in any segment."""
    caplog.set_level(logging.CRITICAL)
    path, found = tmp_path / 'original.zec', tmp_path / 'found.zec'
    pwrite, images = os.pwrite, []
    monkeypatch.setattr('zeo.client.cachefile.COLLECTED', 1)
    monkeypatch.setattr(os, 'pwrite', lambda *args: (pwrite(*args), images.append(path.read_bytes()))[0])
    truth = Truth()
    cache = open_cache(str(path), SMALL)
    last_tids = [z64]
    aside = 0
    for number in range(140):
        oids = [p64(number % 17), p64(100 + number % 5)]
        tid = truth.commit(*oids)
        renew(cache, tid, oids, {oid: truth.revisions[oid][-1][1] for oid in oids})
        cache.set_last_tid(tid)
        last_tids.append(tid)
        aside = max(aside, len(cache._former))
        truth.check_one(cache, oids[0], FAR_FUTURE)
    assert aside > 20
    monkeypatch.undo()
    cache.close()
    assert len(images) > 50
    for image in images:
        found.write_bytes(image)
        judge(found, truth, last_tids, use=False, size=SMALL)


def placed(image: bytes, offset: int, data: bytes) -> bytes:
    return image[:offset].ljust(offset, b'\0') + data + image[offset + len(data):]


# Everything at once

class CacheMachine(RuleBasedStateMachine):
    """A client's life with its cache: commits, loads, absences, restarts, crashes, damage."""

    oids = st.lists(st.integers(1, 12).map(p64), min_size=1, max_size=4, unique=True)

    @initialize(segments=st.integers(4, 20))
    def begin(self, segments: int) -> None:
        logging.disable(logging.CRITICAL)
        self.directory = Path(tempfile.mkdtemp())
        self.path = self.directory / 'x.zec'
        self.size = 64 + segments * 512
        self.truth = Truth()
        self.last_tids = {z64}
        self.undamaged = True
        self.restored = False
        self.cache = self.open()

    def open(self) -> Cache:
        self.verified = False
        return open_cache(str(self.path), self.size, strict=True)

    @property
    def up_to_date(self) -> bool:
        return self.trusted and self.cache.last_tid == self.truth.last_tid

    @property
    def trusted(self) -> bool:
        """Whether what is cached is what the database once said, in the only past it has."""
        return self.verified or not self.restored

    def move(self) -> None:
        self.cache.set_last_tid(self.truth.last_tid)
        self.last_tids.add(self.truth.last_tid)

    @precondition(lambda self: self.up_to_date)
    @rule(oids=oids, size=st.integers(0, 30) | st.integers(0, 300), own=st.integers(0, 4) | st.none())
    def commit(self, oids: list[bytes], size: int, own: int | None) -> None:
        tid = self.truth.commit(*oids, size=size)
        if own is None:
            self.cache.invalidate(tid, oids)
        else:
            renew(self.cache, tid, oids, {oid: self.truth.revisions[oid][-1][1] for oid in oids[:own]})
        self.move()

    @precondition(lambda self: self.up_to_date)
    @rule(oids=oids)
    def meet_a_reply_ahead_of_its_invalidation(self, oids: list[bytes]) -> None:
        tid = self.truth.commit(*oids)
        teach(self.cache, self.truth, oids[0])
        self.cache.invalidate(tid, oids)
        self.move()

    @rule(oids=oids, size=st.integers(0, 300))
    def be_away_meanwhile(self, oids: list[bytes], size: int) -> None:
        self.truth.commit(*oids, size=size)

    @precondition(lambda self: not self.up_to_date)
    @rule(how=st.sampled_from(['catch up', 'suspect', 'drop']), proven=st.integers(0, 12))
    def reconnect(self, how: str, proven: int) -> None:
        if how == 'catch up':
            self.cache.forget_later()
            self.cache.drop(self.truth.changed_since(self.cache.last_tid))
        elif how == 'suspect':
            self.cache.suspect_all()
        else:
            self.cache.clear(self.truth.last_tid)
        self.move()
        self.verified = True
        self.prove(proven)

    @precondition(lambda self: self.up_to_date)
    @rule(number=st.integers(0, 12))
    def prove(self, number: int) -> None:
        suspects = list(self.cache.suspects())[:number]
        self.cache.confirm(self.truth.last_tid, [each[0] for each in suspects if self.truth.is_current(*each)])
        self.cache.drop([each[0] for each in suspects if not self.truth.is_current(*each)])

    @precondition(lambda self: self.up_to_date)
    @rule(oids=oids, back=st.integers(0, 60))
    def load(self, oids: list[bytes], back: int) -> None:
        before = p64(max(0, int.from_bytes(self.truth.last_tid) + 1 - back))
        for oid in oids:
            teach(self.cache, self.truth, oid, before)

    @rule(times=st.integers(1, 5), oids=oids)
    def use(self, times: int, oids: list[bytes]) -> None:
        for oid in oids * times:
            self.cache.load(oid)

    @rule()
    def the_file_says_what_memory_says(self) -> None:
        if self.undamaged:
            self.cache.flush()
            copy = copied(self.cache, self.directory / 'copy.zec', self.size)
            assert knowledge(copy) == knowledge(self.cache)
            copy.close()

    @rule(grow=st.sampled_from([-1024, 0, 0, 1024]))
    def restart(self, grow: int) -> None:
        known = knowledge(self.cache)
        self.cache.close()
        self.size = max(TINY, self.size + grow)
        self.cache = self.open()
        if self.undamaged and grow >= 0:
            assert knowledge(self.cache) == known

    @rule(flushed=st.booleans(), cut=st.integers(0, 400))
    def crash(self, flushed: bool, cut: int) -> None:
        if flushed:
            self.cache.flush()
        data = self.path.read_bytes()
        self.cache.abandon()
        self.path.unlink()
        self.path.write_bytes(data[:len(data) - cut])
        self.cache = self.open()
        assert self.cache.last_tid in self.last_tids

    @rule(back=st.integers(0, 5), how=st.sampled_from(['catch up', 'suspect']), proven=st.integers(0, 12))
    def give_up_the_future(self, back: int, how: str, proven: int) -> None:
        """The client is killed, and the database restored from a backup, which is as old as the cache, or younger."""
        self.cache._settle()
        self.cache._log.flush()
        self.crash(flushed=False, cut=0)
        tids = {tid for revisions in self.truth.revisions.values() for tid, _ in revisions}
        self.truth.restore(sorted([self.cache.last_tid] + [tid for tid in tids if tid > self.cache.last_tid])[:back + 1][-1])
        self.restored = True
        self.reconnect(how, proven)

    @rule(positions=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=3), byte=st.integers(1, 255),
          live=st.booleans())
    def damage(self, positions: list[float], byte: int, live: bool) -> None:
        self.undamaged = False
        if not live:
            self.cache.close()
        data = bytearray(self.path.read_bytes())
        for position in positions:
            data[int(position * len(data))] ^= byte
        with FileIO(str(self.path), 'r+') as file:
            file.write(data)
        if not live:
            self.cache = self.open()
            assert self.cache.last_tid in self.last_tids

    @invariant()
    def nothing_is_wrong(self) -> None:
        if hasattr(self, 'cache') and self.trusted:
            self.truth.check(self.cache)

    def teardown(self) -> None:
        if hasattr(self, 'cache'):
            self.cache.close()
            shutil.rmtree(self.directory)
        logging.disable(logging.NOTSET)


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(
    max_examples=80, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck))
