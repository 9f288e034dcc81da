"""Any message: what zeo writes ZEO reads."""

import datetime
import io
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ZODB.POSException import POSKeyError

from tests.wire.zeos import COULD_NOT
from tests.wire.zeos import OID
from tests.wire.zeos import TID
from tests.wire.zeos import Stubborn
from tests.wire.zeos import decode_as_client
from tests.wire.zeos import decode_as_server
from tests.wire.zeos import eight
from tests.wire.zeos import encode_as_client
from tests.wire.zeos import payload
from tests.wire.zeos import pickled_id
from tests.wire.zeos import plain
from tests.wire.zeos import requests
from tests.wire.zeos import texts
from zeo.errors import ProtocolError
from zeo.wire import messages
from zeo.wire import pickles
from zeo.wire.decoding import decode_from_client
from zeo.wire.decoding import decode_from_server


@given(requests, texts, st.lists(plain, max_size=3))
def test_zeo_reads_any_request_and_any_notice(message_id: int, name: str, args: list[Any]) -> None:
    assert decode_as_server(payload(messages.request(message_id, name, args))) == (
        message_id, False, name, tuple(args))
    assert decode_as_server(payload(messages.notice(name, args))) == (0, True, name, tuple(args))
    assert decode_as_client(payload(messages.notice(name, args))) == (0, True, name, tuple(args))


@given(requests | st.tuples(eight, eight) | plain, plain)
def test_zeo_reads_any_reply_under_any_id(message_id: Any, result: Any) -> None:
    assert decode_as_client(payload(messages.reply(pickled_id(message_id), result))) == (
        message_id, 0, '.reply', result)


def test_zeo_reads_an_error() -> None:
    assert decode_as_client(payload(messages.error_reply(b'K\x05', POSKeyError(OID)))) == (
        5, 2, '.reply', ('ZODB.POSException.POSKeyError', (OID,)))


def test_zeo_reads_a_heartbeat() -> None:
    assert decode_as_server(payload(messages.HEARTBEAT)) == (-1, 0, '.reply', None)


@pytest.mark.parametrize('extension', [{}, {'a': [1]}])
def test_the_beginning_of_a_transaction_needs_no_long_proof(extension: dict[str, Any]) -> None:
    args = (17, b'', b'', extension, None, ' ')
    data = payload(messages.notice('tpc_begin', args))
    assert pickles._is_simple(data) or extension
    assert decode_from_client(data) == (b'K\0', True, 'tpc_begin', args)


# ---- replies that cannot be sent -----------------------------------------------------

@pytest.mark.parametrize('result', [
    pytest.param(Stubborn(), id='an object'), pytest.param([Stubborn()], id='a list'),
    pytest.param(lambda: None, id='a function'), pytest.param(Stubborn, id='a class'),
    pytest.param({1: Stubborn}, id='a dictionary')])
def test_a_result_that_cannot_be_sent_is_answered_by_an_error(result: Any) -> None:
    assert decode_as_client(payload(messages.reply(b'K\x05', result))) == (5, 2, '.reply', COULD_NOT)


class Odd(Exception):
    """An error with something that the other side would refuse."""

    def __init__(self, detail: Any) -> None:
        self.detail = detail


class Text(str):
    pass


@pytest.mark.parametrize('detail', [Text('x'), 1 << 9000], ids=['subclass', 'number'])
def test_an_error_that_cannot_be_sent_is_answered_by_another(detail: Any) -> None:
    assert decode_as_client(payload(messages.error_reply(b'K\x05', Odd(detail)))) == (5, 2, '.reply', COULD_NOT)


def test_a_result_too_long_for_a_frame_is_answered_by_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('zeo.wire.framing.LONGEST', 20_000)
    for frame in messages.reply(b'K\x05', bytes(30_000)), messages.reply(b'K\x05', [bytes(30_000)]):
        assert decode_as_client(payload(frame)) == (5, 2, '.reply', COULD_NOT)


def test_a_request_that_cannot_be_sent_raises() -> None:
    with pytest.raises(pickle.PicklingError):
        messages.request(5, 'tpc_begin', [Stubborn])
    with pytest.raises(RuntimeError):
        messages.notice('tpc_begin', [Stubborn()])


def test_a_heartbeat_is_known_by_its_id() -> None:
    for message_id in -1, 0, 1, 2**32 - 1, (-1,), None:
        for name in '.reply', 'loadBefore', 'storea':
            data = encode_as_client(message_id, 0, name, (OID, TID))
            assert messages.is_heartbeat(decode_from_client(data)[0]) is (message_id == -1)


@pytest.mark.parametrize('value', [None, ()])
def test_the_heartbeats_of_clients_are_read(value: Any) -> None:
    """ZEO sends None for the arguments of this one message."""
    message_id, oneway, name, args = decode_from_client(encode_as_client(-1, 0, '.reply', value))
    assert messages.is_heartbeat(message_id) and not oneway


@pytest.mark.parametrize('flag', [0, 2, False, True])
@pytest.mark.parametrize('number', [0, 1, 255, 256, 65535, 65536, 2**31 - 1])
@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
def test_whose_answer_it_is_can_be_told_of_an_answer_that_cannot_be_decoded(
        number: int, flag: object, protocol: int) -> None:
    file = io.BytesIO()
    pickler = pickle.Pickler(file, protocol)
    pickler.fast = True
    pickler.dump((number, flag, '.reply', datetime.date(2026, 1, 1)))
    assert messages.answered_by(file.getvalue()) == (number if protocol < 4 else None)
    assert messages.answered_by(file.getvalue().replace(b'.reply', b'_reply')) is None
    with pytest.raises(ProtocolError):
        decode_from_server(file.getvalue())


@pytest.mark.parametrize('payload', [b'', b'\x80\x03(K', b'\x80\x03(K\x05', b'cos\nsystem\n.'])
def test_of_other_rubbish_it_cannot(payload: bytes) -> None:
    assert messages.answered_by(payload) is None
