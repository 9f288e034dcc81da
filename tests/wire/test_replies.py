"""Replies of fixed shape: what ZEO writes is read, what zeo writes ZEO reads."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.wire.zeos import COULD_NOT
from tests.wire.zeos import TID
from tests.wire.zeos import Stubborn
from tests.wire.zeos import decode_as_client
from tests.wire.zeos import eight
from tests.wire.zeos import encode_as_server
from tests.wire.zeos import payload
from tests.wire.zeos import pickled_id
from tests.wire.zeos import records
from tests.wire.zeos import requests
from zeo.wire import messages
from zeo.wire.decoding import decode_from_server
from zeo.wire.replies import load_reply


@given(requests | st.tuples(eight, eight), records, eight, st.none() | eight)
def test_zeo_reads_a_load_reply(message_id: Any, record: bytes, start: bytes, end: bytes | None) -> None:
    assert decode_as_client(payload(load_reply(pickled_id(message_id), record, start, end))) == (
        message_id, 0, '.reply', (record, start, end))


@given(requests, records, eight, st.none() | eight)
def test_a_load_reply_of_zeos_is_read(message_id: int, record: bytes, start: bytes, end: bytes | None) -> None:
    data = encode_as_server(message_id, 0, '.reply', (record, start, end))
    for form in data, bytearray(data), memoryview(data):
        found = decode_from_server(form)
        assert found == (message_id, 0, '.reply', (record, start, end))
        assert all(type(part) in (bytes, type(None)) for part in found[3])


@pytest.mark.parametrize('result', [
    (b'record', b'short', None), (b'record', TID, b'long' * 3), (b'record', None, None), (None, TID, None),
    ('text', TID, None), (bytearray(b'record'), TID, None), (b'record', 'texttext', None), (b'record', TID, 5)])
def test_an_unusual_load_reply_is_written_all_the_same(result: Any) -> None:
    assert decode_from_server(payload(load_reply(b'K\x05', *result))) == (5, 0, '.reply', result)


def test_a_long_record_is_sent_without_being_copied() -> None:
    record = bytes(100_000)
    for frame in load_reply(b'K\x05', record, TID, None), messages.reply(b'K\x05', record):
        assert any(part is record for part in frame)


@pytest.mark.parametrize('result', [
    pytest.param(Stubborn(), id='an object'), pytest.param(lambda: None, id='a function')])
def test_a_record_that_cannot_be_sent_is_answered_by_an_error(result: Any) -> None:
    assert decode_as_client(payload(load_reply(b'K\x05', result, TID, None))) == (5, 2, '.reply', COULD_NOT)


def test_a_record_too_long_for_a_frame_is_answered_by_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('zeo.wire.framing.LONGEST', 20_000)
    assert decode_as_client(payload(load_reply(b'K\x05', bytes(30_000), TID, None))) == (5, 2, '.reply', COULD_NOT)
