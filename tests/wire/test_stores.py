"""Many stores in one message."""

from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from tests.wire.zeos import decode_as_server
from tests.wire.zeos import payload
from tests.wire.zeos import requests
from tests.wire.zeos import rows
from tests.wire.zeos import value_of
from zeo.wire.decoding import decode_from_client
from zeo.wire.stores import HEAD
from zeo.wire.stores import MOST
from zeo.wire.stores import MOST_BYTES
from zeo.wire.stores import Batch
from zeo.wire.stores import commit_request
from zeo.wire.stores import stores_notice
from zeo.wire.stores import unpack

OID, TID = b'\0\0\0\0\0\0\0\x01', b'\x03\xc0\xff\xee\x12\x34\x56\x78'

eight = st.binary(min_size=8, max_size=8)
oids = eight.filter(lambda each: each < b'\xff' * 4)


@given(st.lists(st.tuples(oids, eight, st.binary(min_size=1, max_size=300))))
def test_what_is_put_together_comes_apart_again(stores: list[tuple[bytes, bytes, bytes]]) -> None:
    batch = Batch()
    assert not batch
    for number, store in enumerate(stores, 1):
        assert batch.add(*store) == batch.size == sum(len(record) for _, _, record in stores[:number])
    assert bool(batch) is bool(stores)
    heads, records = batch.take()
    assert unpack(heads, b''.join(records)) == stores
    assert not batch and batch.take() == (b'', []) and not batch.size


@pytest.mark.parametrize('heads, records', [
    (HEAD.pack(OID, TID, 3), b'ab'), (HEAD.pack(OID, TID, 3), b'abcd'), (HEAD.pack(OID, TID, 3), b''), (b'', b'abc'),
    (HEAD.pack(OID, TID, 2**32 - 1), b'abc'), (HEAD.pack(OID, TID, 0), b''),
    (HEAD.pack(OID, TID, 3) + HEAD.pack(OID, TID, 0), b'abc'), (HEAD.pack(b'\xff' * 8, TID, 3), b'abc'),
    (HEAD.pack(b'\xff' * 4 + bytes(4), TID, 3), b'abc')])
def test_what_would_not_be_taken_singly_is_refused(heads: bytes, records: bytes) -> None:
    with pytest.raises(ValueError):
        unpack(heads, records)


@pytest.mark.parametrize('heads, records', [
    (HEAD.pack(OID, TID, 3)[:-1], b'abc'), (HEAD.pack(OID, TID, 3) + b'x', b'abc'), (None, b''), (b'', 'text'),
    (bytearray(HEAD.pack(OID, TID, 3)), b'abc'), (HEAD.pack(OID, TID, 3), bytearray(b'abc')), (5, 6), ([], [])])
def test_what_are_no_rows_is_refused(heads: Any, records: Any) -> None:
    with pytest.raises(TypeError):
        unpack(heads, records)


@pytest.mark.parametrize('count, size', [(MOST + 1, MOST + 1), (1, MOST_BYTES + 1)])
def test_what_is_too_much_for_one_message_is_refused_before_it_takes_memory(count: int, size: int) -> None:
    head = HEAD.pack(OID, TID, size // count)
    with pytest.raises(ValueError, match='in one message'):
        unpack(head * count, bytes(size))
    size -= 1
    assert len(unpack(head * (count - 1) if count > 1 else HEAD.pack(OID, TID, size), bytes(size))) == max(count - 1, 1)


@given(rows, st.lists(rows, max_size=3), requests)
def test_many_stores_are_a_message_like_others(heads: bytes, stored: list[bytes], transaction_id: int) -> None:
    data = payload(stores_notice(heads, stored, transaction_id))
    args = heads, b''.join(stored), transaction_id
    assert decode_as_server(data) == (0, True, 'stores', args)
    assert decode_from_client(data) == (b'K\0', True, 'stores', args)


@given(requests, requests, st.booleans(), rows, rows, rows, st.lists(rows, max_size=3))
def test_a_transaction_as_a_whole_is_a_message_like_others(
        message_id: int, transaction_id: int, tell_tid: bool, user: bytes, description: bytes, heads: bytes,
        stored: list[bytes]) -> None:
    data = payload(commit_request(message_id, transaction_id, tell_tid, user, description, heads, stored))
    args = transaction_id, tell_tid, user, description, heads, b''.join(stored)
    assert decode_as_server(data) == (message_id, False, 'commit', args)
    found = decode_from_client(data)
    assert (value_of(found[0]), *found[1:]) == (message_id, False, 'commit', args)
