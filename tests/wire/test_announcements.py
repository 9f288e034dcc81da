"""What a server announces: what ZEO writes is read, what zeo writes ZEO reads."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.wire.zeos import OID
from tests.wire.zeos import TID
from tests.wire.zeos import decode_as_client
from tests.wire.zeos import eight
from tests.wire.zeos import encode_as_server
from tests.wire.zeos import payload
from zeo.wire.announcements import info_notice
from zeo.wire.announcements import invalidation_notice
from zeo.wire.decoding import decode_from_server


@given(eight, st.lists(eight, max_size=5) | st.just([OID] * 2500))
def test_zeo_reads_an_invalidation(tid: bytes, oids: list[bytes]) -> None:
    assert decode_as_client(payload(invalidation_notice(tid, oids))) == (
        0, True, 'invalidateTransaction', (tid, oids))


@given(st.integers(0), st.integers(0))
def test_zeo_reads_sizes(length: int, size: int) -> None:
    assert decode_as_client(payload(info_notice(length, size))) == (
        0, True, 'info', ({'length': length, 'size': size},))


@given(eight, st.lists(eight, max_size=5) | st.sampled_from([[OID] * 1000, [OID] * 1001, [OID] * 2500]))
def test_an_invalidation_of_zeos_is_read(tid: bytes, oids: list[bytes]) -> None:
    data = encode_as_server(0, True, 'invalidateTransaction', (tid, oids))
    assert decode_from_server(data) == (0, True, 'invalidateTransaction', (tid, oids))


@pytest.mark.parametrize('tid, oids', [
    (TID, [OID, b'short']), (TID, [OID, b'12345', b'12345678901']), (b'short', [OID]), (TID, (OID,)), (TID, [])])
def test_an_unusual_invalidation_is_written_all_the_same(tid: bytes, oids: Any) -> None:
    assert decode_as_client(payload(invalidation_notice(tid, oids))) == (
        0, True, 'invalidateTransaction', (tid, list(oids)))
