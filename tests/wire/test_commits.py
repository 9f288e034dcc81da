"""The steps of a commit: what ZEO writes is read, what zeo writes ZEO reads."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.wire.zeos import OID
from tests.wire.zeos import TID
from tests.wire.zeos import decode_as_server
from tests.wire.zeos import eight
from tests.wire.zeos import encode_as_client
from tests.wire.zeos import payload
from tests.wire.zeos import records
from tests.wire.zeos import requests
from tests.wire.zeos import texts
from zeo.wire.commits import finish_request
from zeo.wire.commits import store_notice
from zeo.wire.decoding import decode_from_client


@given(eight, eight, records, requests)
def test_zeo_reads_a_store(oid: bytes, serial: bytes, record: bytes, transaction_id: int) -> None:
    assert decode_as_server(payload(store_notice(oid, serial, record, transaction_id))) == (
        0, True, 'storea', (oid, serial, record, transaction_id))


@given(requests, requests | st.integers() | texts)
def test_zeo_reads_the_end_of_a_transaction(message_id: int, transaction_id: Any) -> None:
    assert decode_as_server(payload(finish_request(message_id, transaction_id))) == (
        message_id, False, 'tpc_finish', (transaction_id,))


@given(eight, eight, records, requests | st.integers())
def test_a_store_of_zeos_is_read(oid: bytes, serial: bytes, record: bytes, transaction_id: int) -> None:
    data = encode_as_client(0, True, 'storea', (oid, serial, record, transaction_id))
    assert decode_from_client(data) == (b'K\0', True, 'storea', (oid, serial, record, transaction_id))


@pytest.mark.parametrize('args', [
    (b'short', TID, b'record', 5), (OID, b'long' * 3, b'record', 5), (OID, TID, None, 5), (OID, TID, 'text', 5),
    (OID, TID, b'record', 2**80), (OID, TID, b'record', -5)])
def test_an_unusual_store_is_written_all_the_same(args: Any) -> None:
    assert decode_as_server(payload(store_notice(*args))) == (0, True, 'storea', args)


def test_a_long_record_is_stored_without_being_copied() -> None:
    record = bytes(100_000)
    assert any(part is record for part in store_notice(OID, TID, record, 5))
