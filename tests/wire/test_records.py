"""Records that are looked at without being read."""

import pickle
import resource
from collections.abc import Callable
from typing import Any

import pytest
from BTrees.OOBTree import OOBTree
from persistent.mapping import PersistentMapping
from ZODB.blob import Blob
from ZODB.blob import is_blob_record as zodbs
from ZODB.POSException import StorageError
from ZODB.serialize import ObjectWriter
from ZODB.serialize import referencesf
from ZODB.tests.util import DB

from zeo.wire.records import is_blob_record
from zeo.wire.records import references

HEAD = b'\x80\x03cpersistent.mapping\nPersistentMapping\n.\x80\x03'


def record_of(value: Any) -> bytes:
    record: bytes = ObjectWriter().serialize(value)
    return record


def records() -> list[bytes]:
    """Those of a small database with all kinds of things in it."""
    db = DB()
    with db.transaction() as connection:
        root = connection.root()
        root['many'] = PersistentMapping({f'number {number}': PersistentMapping() for number in range(100)})
        root['tree'] = tree = OOBTree()
        for number in range(500):
            tree[f'p123456 r\xff\xff\xff {number}'] = 'rrrrrrr' * number
        root['text'] = [1, 2.5, None, 'r\u20ac' * 300, 10**50, b'p99999999\n', [[]] * 300]
    found = [record.data for transaction in db.storage.iterator() for record in transaction]
    db.close()
    return found


def test_references_are_those_that_zodb_finds() -> None:
    for record in records():
        assert references(record) == referencesf(record)
    oids: list[bytes] = [b'before']
    assert references(records()[0], oids) is oids


@pytest.mark.parametrize('put', [b'r\0\0\0\x10', b'r\xff\xff\xff\x7f', b'r\xff\xff\xff\xff', b'p268435456\n', b'p+99999999\n',
                                 b'p 99999999\n', b'p-9999999\n'])
@pytest.mark.parametrize('place', [
    lambda put: HEAD + b'N' + put + b'.', lambda put: HEAD + b'(X\4\0\0\0textC\2\xff\xffcos\nsystem\nN' + put + b't.',
    lambda put: b'\x80\x03cpersistent.mapping\nPersistentMapping\n' + put + b'.\x80\x03}.',
    lambda put: HEAD + b'B\3\1\0\0' + b'r' * 259 + b'U\2\xff\xffI5\nL5L\nF5\nG' + bytes(8) + b'N' + put + b'0000000.'])
def test_a_memo_that_would_take_much_memory_is_refused(put: bytes, place: Callable[[bytes], bytes]) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(StorageError, match='memo has holes'):
        references(place(put))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 100_000


def test_a_record_with_a_large_memo_is_read() -> None:
    state = pickle.dumps([str(number) for number in range(70_000)], 3)
    assert b'r\xff\xff\0\0' in state and references(HEAD + state) == []


@pytest.mark.parametrize('record', [b'', b'r', b'r\xff\xff\xff\xff', b'p9999999', b'X\xff\xff\xff\xffr\xff\xff\xff\xff', HEAD,
                                    HEAD + b'\xffr\xff\xff\xff\xff', b'cp99999999', b'cos\nr\xff\xff\xff\xff'])
def test_a_damaged_record_is_nothing_that_is_read_any_other_way(record: bytes) -> None:
    def outcome(function: Callable[[bytes], Any]) -> Any:
        try:
            return function(record)
        except StorageError:
            raise
        except Exception as error:
            return type(error)
    if record != b'r\xff\xff\xff\xff':  # a memo of nothing
        assert outcome(references) == outcome(referencesf)


BLOB = record_of(Blob())


@pytest.mark.parametrize('record, expected', [
    (BLOB, True), (b'cZODB.blob\nBlob\nq\1.N.', True), (b'\x80\2cZODB.blob\nBlob\n.\x80\2N.', True),
    (b'', False), (HEAD + b'X\x09\0\0\0ZODB.blob.', False), (record_of(PersistentMapping({'ZODB.blob': 'Blob'})), False),
    (b'\x80\x03cZODB.blob\nBlob\n)\x86.\x80\x03N.', False), (b'\x80\x03cZODB.blob\nBlobFile\n.\x80\x03N.', False)])
def test_a_blob_is_what_zodb_takes_for_one(record: bytes, expected: bool) -> None:
    assert is_blob_record(record) is bool(zodbs(record)) is expected
    assert not is_blob_record(None)


@pytest.mark.parametrize('evil', [b'C\4dataq\1\x85q\2R', b')\x81', b'C\4data\x85RN\x86', b'Nr\xff\xff\xff\x0f0'])
def test_a_record_that_pretends_to_be_a_blob_makes_none(evil: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Blob, '__init__', lambda *_: pytest.fail('a blob is made'))
    assert not is_blob_record(b'\x80\x03cZODB.blob\nBlob\n' + evil + b'.\x80\x03N.')
