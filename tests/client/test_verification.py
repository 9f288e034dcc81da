"""The verdict on a cache, by a table."""

import pickle

import pytest
from ZODB.utils import z64

from tests.client.peer import tid
from zeo.client.verification import CacheIsNewer
from zeo.client.verification import Verdict
from zeo.client.verification import decide


@pytest.mark.parametrize('cache_tid, empty, server_tid, verdict', [
    (z64, True, z64, Verdict.START),
    (z64, True, tid(5), Verdict.START),
    (z64, False, tid(5), Verdict.DROP),
    (z64, False, z64, Verdict.DROP),
    (tid(5), True, tid(5), Verdict.KEEP),
    (tid(5), False, tid(5), Verdict.KEEP),
    (tid(4), False, tid(5), Verdict.CATCH_UP),
    (tid(4), True, tid(5), Verdict.CATCH_UP),  # ZODB may have what this cache has evicted
    (tid(6), False, tid(5), Verdict.REFUSE),
    (tid(6), True, tid(5), Verdict.REFUSE),
    (tid(6), False, z64, Verdict.REFUSE),
])
def test_what_becomes_of_a_cache(cache_tid: bytes, empty: bool, server_tid: bytes,
                                 verdict: Verdict) -> None:
    assert decide(cache_tid, empty, server_tid) is verdict


def test_the_refusal_names_both_tids_and_what_to_do() -> None:
    text = str(CacheIsNewer(tid(0x1234), tid(0x99)))
    assert '0000000000001234' in text or '0x1234' in text
    assert '0000000000000099' in text or '0x99' in text
    assert 'start_over' in text


def test_the_refusal_may_go_to_another_process() -> None:
    error = pickle.loads(pickle.dumps(CacheIsNewer(tid(5), tid(3))))
    assert (error.cache_tid, error.server_tid, str(error)) == (tid(5), tid(3), str(CacheIsNewer(tid(5), tid(3))))
