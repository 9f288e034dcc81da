"""Framing: whatever the network does to a stream of frames, the payloads come out as they went in."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zeo.errors import ProtocolError
from zeo.wire import framing
from zeo.wire.framing import Inbox
from zeo.wire.framing import frame


def receive(inbox: Inbox, data: bytes, steps: list[int]) -> list[bytes]:
    """Put data into an inbox, so many bytes at a time (again and again); the payloads it gives out."""
    payloads: list[bytes] = []
    left = memoryview(data)
    for step in itertools.cycle(steps):
        buffer = inbox.buffer()
        assert len(buffer) > 0
        size = min(step, len(buffer), len(left))
        buffer[:size] = left[:size]
        del buffer
        left = left[size:]
        inbox.advance(size)
        while (payload := inbox.next()) is not None:
            payloads.append(bytes(payload))  # it may be lent
        if not left:
            return payloads
    raise AssertionError


def test_a_frame_is_its_length_in_four_bytes_and_its_payload() -> None:
    assert frame(b'abc') == (b'\0\0\0\x03abc',)
    assert frame(b'ab', b'', b'c') == (b'\0\0\0\x03abc',)


def test_a_long_part_is_not_copied() -> None:
    record = bytes(100_000)
    parts = frame(b'head', record, b'tail')
    assert parts[2] is record
    assert b''.join(parts) == (100_008).to_bytes(4, 'big') + b'head' + record + b'tail'


def test_a_long_frame_has_no_empty_parts() -> None:
    assert [len(part) for part in frame(bytes(100_000))] == [4, 100_000]


def test_a_payload_longer_than_the_prefix_can_say_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert framing.LONGEST == 2**32 - 1
    monkeypatch.setattr(framing, 'LONGEST', 100_000)
    assert len(b''.join(frame(bytes(100_000)))) == 100_004
    with pytest.raises(ProtocolError, match='100001 bytes'):
        frame(bytes(100_000), b'x')


@given(st.lists(st.binary(min_size=1, max_size=300), max_size=20),
       st.lists(st.integers(1, 100), min_size=1, max_size=20),
       st.integers(16, 200))
def test_frames_come_out_whole_however_the_stream_was_cut(
        payloads: list[bytes], steps: list[int], size: int) -> None:
    stream = b''.join(part for payload in payloads for part in frame(payload))
    assert receive(Inbox(size=size), stream, steps) == payloads


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=6),
       st.lists(st.integers(1, 2000), min_size=1, max_size=6), st.sampled_from([0, 500, 5000]))
def test_frames_longer_than_the_first_step_grow_as_they_arrive(
        lengths: list[int], steps: list[int], keep: int) -> None:
    payloads = [bytes([number + 1]) * length for number, length in enumerate(lengths)]
    stream = b''.join(part for payload in payloads for part in frame(payload))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(framing, '_FIRST_STEP', 64)
        assert receive(Inbox(size=32, keep=keep), stream, steps) == payloads


def test_many_frames_that_arrive_at_once_come_out_one_by_one() -> None:
    inbox = Inbox()
    stream = b''.join(itertools.chain(*(frame(b'%d' % number) for number in range(1000))))
    assert receive(inbox, stream, [len(stream)]) == [b'%d' % number for number in range(1000)]
    assert inbox.next() is None


def test_the_buffer_is_small_until_many_bytes_come_at_once() -> None:
    inbox = Inbox(size=2**16)
    for _ in range(100):
        receive(inbox, frame(bytes(400))[0], [404])
    assert len(inbox.buffer()) < 512  # what Python keeps memory for itself
    receive(inbox, frame(bytes(1000))[0] * 10, [10_040])
    assert len(inbox.buffer()) == 2**16


@pytest.mark.parametrize('length', [4091, 4092, 4093, 4096, 10_000, 2**16 - 4, 2**16 - 3, 2**17])
@pytest.mark.parametrize('step', [1, 3, 4095, 4096, 4097, 2**20])
def test_frames_of_any_length_come_out_whole_while_the_buffer_grows(length: int, step: int) -> None:
    payloads = [b'first', bytes([1]) * length, b'last', bytes([2]) * length]
    stream = b''.join(itertools.chain(*map(frame, payloads)))
    assert receive(Inbox(size=2**16), stream, [step]) == payloads


@given(st.lists(st.integers(1, 9000), min_size=1, max_size=20),
       st.lists(st.integers(1, 20_000), min_size=1, max_size=20))
def test_received_is_advance_and_next(lengths: list[int], steps: list[int]) -> None:
    stream = b''.join(itertools.chain(*(frame(bytes([length % 256]) * length) for length in lengths)))
    one, other = Inbox(), Inbox()
    found = []
    for step in itertools.cycle(steps):
        buffer = one.buffer()
        assert len(buffer) == len(other.buffer())
        count = min(step, len(buffer), len(stream))
        buffer[:count] = other.buffer()[:count] = stream[:count]
        del buffer
        stream = stream[count:]
        payload = one.received(count)
        other.advance(count)
        while payload is not None:
            assert payload == other.next()
            found.append(len(payload))
            payload = one.next()
        assert other.next() is None
        if not stream:
            break
    assert found == lengths


def test_received_refuses_what_next_refuses() -> None:
    inbox = Inbox(limit=5)
    inbox.buffer()[:10] = frame(b'123456')[0]
    with pytest.raises(ProtocolError):
        inbox.received(10)


def test_a_length_of_zero_that_is_received_alone_is_refused() -> None:
    inbox = Inbox()
    inbox.buffer()[:4] = bytes(4)
    with pytest.raises(ProtocolError, match='a frame of 0 bytes'):
        inbox.received(4)


def test_a_frame_that_fills_the_buffer_is_received() -> None:
    inbox = Inbox()
    size = len(inbox.buffer())
    for length in size - 4, size - 3, 1:
        stream = frame(bytes([length % 256]) * length)[0]
        payload = None
        while stream:
            count = min(len(inbox.buffer()), len(stream))
            inbox.buffer()[:count], stream = stream[:count], stream[count:]
            payload = inbox.received(count)
        assert payload == bytes([length % 256]) * length
        assert inbox.next() is None


def test_a_payload_keeps_its_value_when_the_next_one_arrives() -> None:
    inbox = Inbox(size=16)
    first, = receive(inbox, frame(b'first')[0], [100])
    receive(inbox, frame(b'SECOND')[0], [100])
    assert first == b'first'


def test_a_long_payload_is_lent_as_a_view_of_memory_that_is_kept() -> None:
    inbox = Inbox(size=16, keep=200)

    def lent(length: int) -> memoryview:
        stream = frame(bytes([length]) * length)[0]
        while stream:
            buffer = inbox.buffer()
            count = min(len(buffer), len(stream))
            buffer[:count], stream = stream[:count], stream[count:]
            payload = inbox.received(count)
        assert payload == bytes([length]) * length
        assert isinstance(payload, memoryview)
        return payload

    memory = lent(200).obj
    assert lent(100).obj is memory
    assert lent(199).obj is memory
    assert receive(inbox, frame(b'short')[0], [100]) == [b'short']
    assert lent(200).obj is memory


def test_what_is_longer_than_the_memory_kept_gets_its_own() -> None:
    inbox = Inbox(size=16, keep=200)
    payloads = []
    for letter in b'a', b'b':
        receive(inbox, frame(letter * 300)[0][:-1], [1000])
        inbox.buffer()[:1] = letter
        payloads.append(inbox.received(1))
    assert payloads == [b'a' * 300, b'b' * 300]


@pytest.mark.parametrize('limit, length', [(10, 0), (10, 11), (10, 2**32 - 1), (2**32 - 1, 0)])
def test_a_length_of_zero_or_beyond_the_limit_is_refused(limit: int, length: int) -> None:
    inbox = Inbox(limit)
    with pytest.raises(ProtocolError, match=f'a frame of {length} bytes'):
        receive(inbox, length.to_bytes(4, 'big'), [4])


def test_a_payload_as_long_as_the_limit_is_taken() -> None:
    assert receive(Inbox(10), frame(b'0123456789')[0], [3]) == [b'0123456789']


def test_the_limit_may_be_raised_between_frames() -> None:
    inbox = Inbox(limit=5)
    assert receive(inbox, frame(b'12345')[0], [100]) == [b'12345']
    inbox.limit = 6
    assert receive(inbox, frame(b'123456')[0], [100]) == [b'123456']
    inbox.limit = 5
    with pytest.raises(ProtocolError):
        receive(inbox, frame(b'123456')[0], [100])


def test_a_length_alone_allocates_little() -> None:
    inbox = Inbox()
    assert receive(inbox, b'\xff\xff\xff\xff', [4]) == []
    assert len(inbox.buffer()) <= 4 * 2**20


def test_memory_grows_with_what_has_arrived_not_with_what_was_announced() -> None:
    inbox = Inbox()
    assert receive(inbox, b'\xff\xff\xff\xff' + bytes(5 * 2**20), [2**16]) == []
    assert len(inbox.buffer()) <= 4 * 2**20


def test_the_beginning_of_what_was_received_can_be_looked_at() -> None:
    inbox = Inbox()
    assert inbox.beginning(2) == b''
    inbox.buffer()[:1] = b'a'
    inbox.advance(1)
    assert inbox.beginning(2) == b'a'
    inbox.buffer()[:4] = b'bcde'
    inbox.advance(4)
    assert inbox.beginning(2) == b'ab'


@pytest.mark.parametrize('size', [480, 600, 1024])
def test_what_is_received_in_pieces_of_any_length_is_what_was_sent(size: int) -> None:
    """Also if a piece is as long as a frame that was there before."""
    payloads = [bytes([65 + number]) * length for number, length in enumerate([1, 9, 9, 470, 1, 476, 3, 1500, 16, 480])]
    for step in range(1, 500):
        inbox, found = Inbox(size=size), []
        stream = b''.join(part for payload in payloads for part in frame(payload))
        while stream:
            view = inbox.buffer()
            count = min(step, len(view), len(stream))
            view[:count] = stream[:count]
            stream = stream[count:]
            payload = inbox.received(count)
            while payload is not None:
                found.append(bytes(payload))
                payload = inbox.next()
        assert found == payloads, step
