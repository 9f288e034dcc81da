"""Many revisions in one message."""

from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given
from ZODB.utils import z64

from tests.wire.zeos import decode_as_client
from tests.wire.zeos import payload
from tests.wire.zeos import rows
from zeo.errors import ProtocolError
from zeo.wire.decoding import decode_from_server
from zeo.wire.revisions import HEAD
from zeo.wire.revisions import prefetched_notice
from zeo.wire.revisions import unpack

OID, TID = b'\0\0\0\0\0\0\0\x01', b'\x03\xc0\xff\xee\x12\x34\x56\x78'

eight = st.binary(min_size=8, max_size=8)
found = st.tuples(st.binary(min_size=1, max_size=300), eight, st.none() | eight.filter(lambda end: end != z64))


@given(st.lists(st.tuples(eight, st.none() | found)))
def test_what_is_put_together_comes_apart_again(revisions: list[tuple[bytes, Any]]) -> None:
    heads, records = b'', b''
    for oid, revision in revisions:
        record, start, end = revision or (b'', z64, None)
        heads += HEAD.pack(oid, start, end or z64, len(record))
        records += record
    assert unpack(heads, records) == revisions


@pytest.mark.parametrize('heads, records', [
    (HEAD.pack(OID, TID, z64, 3), b'ab'), (HEAD.pack(OID, TID, z64, 3), b'abcd'), (HEAD.pack(OID, TID, z64, 3), b''),
    (b'', b'abc'), (HEAD.pack(OID, TID, z64, 2**32 - 1), b'abc'), (HEAD.pack(OID, TID, z64, 0), b'abc'),
    (HEAD.pack(OID, TID, z64, 3)[:-1], b'abc'), (HEAD.pack(OID, TID, z64, 3) + b'x', b'abc'), (None, b''),
    (b'', 'text'), (bytearray(HEAD.pack(OID, TID, z64, 3)), b'abc'), (HEAD.pack(OID, TID, z64, 3), bytearray(b'abc')),
    (5, 6), ([], [])])
def test_what_are_no_revisions_is_refused(heads: Any, records: Any) -> None:
    with pytest.raises(ProtocolError):
        unpack(heads, records)


@given(eight, st.lists(rows, max_size=3), st.lists(rows, max_size=3))
def test_many_revisions_are_a_message_like_others(tid: bytes, heads: list[bytes], told: list[bytes]) -> None:
    data = payload(prefetched_notice(tid, heads, told))
    args = tid, b''.join(heads), b''.join(told)
    assert decode_as_client(data) == (0, True, 'prefetched', args)
    assert decode_from_server(data) == (0, True, 'prefetched', args)
