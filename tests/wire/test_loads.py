"""The request for a load: what ZEO writes is read, what zeo writes ZEO reads."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.wire.zeos import OID
from tests.wire.zeos import TID
from tests.wire.zeos import decode_as_client
from tests.wire.zeos import decode_as_server
from tests.wire.zeos import eight
from tests.wire.zeos import encode_as_client
from tests.wire.zeos import payload
from tests.wire.zeos import requests
from tests.wire.zeos import value_of
from zeo.wire import messages
from zeo.wire.decoding import decode_from_client
from zeo.wire.loads import load_of
from zeo.wire.loads import load_request


@given(requests, eight, eight)
def test_zeo_reads_a_load_request(message_id: int, oid: bytes, tid: bytes) -> None:
    assert decode_as_server(payload(load_request(message_id, oid, tid))) == (
        message_id, False, 'loadBefore', (oid, tid))


@given(st.tuples(eight, eight) | requests, eight, eight)
def test_a_load_of_zeos_is_read_and_answered_under_its_id(message_id: Any, oid: bytes, tid: bytes) -> None:
    for each in message_id, (oid, tid):
        found = decode_from_client(encode_as_client(each, False, 'loadBefore', (oid, tid)))
        assert found[1:] == (False, 'loadBefore', (oid, tid))
        answered = decode_as_client(payload(messages.reply(found[0], 'result')))
        assert answered == (each, 0, '.reply', 'result')


@pytest.mark.parametrize('message_id, oid, tid', [
    (5, b'short', TID), (5, OID, b'much longer'), (2**31, OID, TID), (5, 'texttext', TID), (5, OID, None)])
def test_an_unusual_load_request_is_written_all_the_same(message_id: int, oid: Any, tid: Any) -> None:
    assert decode_as_server(payload(load_request(message_id, oid, tid))) == (
        message_id, False, 'loadBefore', (oid, tid))


@given(requests | st.tuples(eight, eight), eight, eight)
def test_those_in_a_hurry_know_a_load_by_its_shape(message_id: Any, oid: bytes, tid: bytes) -> None:
    data = encode_as_client(message_id, False, 'loadBefore', (oid, tid))
    found = load_of(data)
    if type(message_id) is int and message_id < 2**31 or message_id == (oid, tid):
        assert found is not None and (value_of(found[0]), *found[1:]) == (message_id, oid, tid)
    else:
        assert found is None
    assert load_of(payload(messages.reply(b'K\x05', oid))) is None


def test_nobody_wants_an_answer_to_what_has_the_id_of_a_heartbeat() -> None:
    assert load_of(encode_as_client(-2, False, 'loadBefore', (OID, TID))) is not None
    assert load_of(encode_as_client(-1, False, 'loadBefore', (OID, TID))) is None
