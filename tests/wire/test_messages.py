"""Messages: what ZEO writes is read, what zeo writes ZEO reads, and the short cuts change nothing."""

import datetime
import io
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ZEO.asyncio import marshal
from ZODB.POSException import POSKeyError

from zeo.errors import ProtocolError
from zeo.wire import messages
from zeo.wire import pickles
from zeo.wire.framing import Payload
from zeo.wire.framing import Frame

OID = b'\0\0\0\0\0\0\0\x09'
TID = b'\x03\xf0abc(e\x86'
LATER = b'\x03\xf0abct.\n'

eight = st.binary(min_size=8, max_size=8)
records = st.binary(max_size=20) | st.binary(min_size=250, max_size=260) | st.just(bytes(70_000))
requests = st.integers(1, 300) | st.integers(65530, 65540) | st.integers(1, 2**31 - 1) | st.integers(2**31, 2**40)
texts = st.text(max_size=20)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts | st.binary(max_size=300),
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple)
    | st.dictionaries(texts, inner, max_size=3), max_leaves=10)


def payload(frame: Frame) -> bytes:
    data = b''.join(frame)
    assert len(data) - 4 == int.from_bytes(data[:4], 'big')
    return data[4:]


encode_as_client = marshal.encoder(b'Z5')
encode_as_server = marshal.encoder(b'Z5', True)
decode_as_client = marshal.decoder(b'Z5')
decode_as_server = marshal.server_decoder(b'Z5')


def pickled_id(message_id: Any) -> bytes:
    """As it stands in a message of ZEO's."""
    data: bytes = encode_as_client(message_id, 0)
    return data[2:-4]  # between the protocol, and 0, TUPLE2 and STOP


def value_of(message_id: bytes) -> Any:
    return pickle.loads(b'\x80\x03' + message_id + b'.')


# ---- ZEO reads what zeo writes --------------------------------------------------------

@given(requests, eight, eight)
def test_zeo_reads_a_load_request(message_id: int, oid: bytes, tid: bytes) -> None:
    assert decode_as_server(payload(messages.load_request(message_id, oid, tid))) == (
        message_id, False, 'loadBefore', (oid, tid))


@given(requests | st.tuples(eight, eight), records, eight, st.none() | eight)
def test_zeo_reads_a_load_reply(message_id: Any, record: bytes, start: bytes, end: bytes | None) -> None:
    assert decode_as_client(payload(messages.load_reply(pickled_id(message_id), record, start, end))) == (
        message_id, 0, '.reply', (record, start, end))


@given(eight, eight, records, requests)
def test_zeo_reads_a_store(oid: bytes, serial: bytes, record: bytes, transaction_id: int) -> None:
    assert decode_as_server(payload(messages.store_notice(oid, serial, record, transaction_id))) == (
        0, True, 'storea', (oid, serial, record, transaction_id))


rows = st.binary(max_size=300)


@given(rows, st.lists(rows, max_size=3), requests)
def test_many_stores_are_a_message_like_others(heads: bytes, stored: list[bytes], transaction_id: int) -> None:
    data = payload(messages.stores_notice(heads, stored, transaction_id))
    args = heads, b''.join(stored), transaction_id
    assert decode_as_server(data) == (0, True, 'stores', args)
    assert messages.decode_from_client(data) == (b'K\0', True, 'stores', args)


@given(eight, st.lists(rows, max_size=3), st.lists(rows, max_size=3))
def test_many_revisions_are_a_message_like_others(tid: bytes, heads: list[bytes], told: list[bytes]) -> None:
    data = payload(messages.prefetched_notice(tid, heads, told))
    args = tid, b''.join(heads), b''.join(told)
    assert decode_as_client(data) == (0, True, 'prefetched', args)
    assert messages.decode_from_server(data) == (0, True, 'prefetched', args)


@given(requests, requests, st.booleans(), rows, rows, rows, st.lists(rows, max_size=3))
def test_a_transaction_as_a_whole_is_a_message_like_others(
        message_id: int, transaction_id: int, tell_tid: bool, user: bytes, description: bytes, heads: bytes,
        stored: list[bytes]) -> None:
    data = payload(messages.commit_request(message_id, transaction_id, tell_tid, user, description, heads, stored))
    args = transaction_id, tell_tid, user, description, heads, b''.join(stored)
    assert decode_as_server(data) == (message_id, False, 'commit', args)
    found = messages.decode_from_client(data)
    assert (value_of(found[0]), *found[1:]) == (message_id, False, 'commit', args)


@given(requests, requests | st.integers() | texts)
def test_zeo_reads_the_end_of_a_transaction(message_id: int, transaction_id: Any) -> None:
    assert decode_as_server(payload(messages.finish_request(message_id, transaction_id))) == (
        message_id, False, 'tpc_finish', (transaction_id,))


@given(eight, st.lists(eight, max_size=5) | st.just([OID] * 2500))
def test_zeo_reads_an_invalidation(tid: bytes, oids: list[bytes]) -> None:
    assert decode_as_client(payload(messages.invalidation_notice(tid, oids))) == (
        0, True, 'invalidateTransaction', (tid, oids))


@given(st.integers(0), st.integers(0))
def test_zeo_reads_sizes(length: int, size: int) -> None:
    assert decode_as_client(payload(messages.info_notice(length, size))) == (
        0, True, 'info', ({'length': length, 'size': size},))


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
    assert messages.decode_from_client(data) == (b'K\0', True, 'tpc_begin', args)


# ---- zeo reads what ZEO writes --------------------------------------------------------

@given(st.tuples(eight, eight) | requests, eight, eight)
def test_a_load_of_zeos_is_read_and_answered_under_its_id(message_id: Any, oid: bytes, tid: bytes) -> None:
    for each in message_id, (oid, tid):
        found = messages.decode_from_client(encode_as_client(each, False, 'loadBefore', (oid, tid)))
        assert found[1:] == (False, 'loadBefore', (oid, tid))
        answered = decode_as_client(payload(messages.reply(found[0], 'result')))
        assert answered == (each, 0, '.reply', 'result')


@given(eight, eight, records, requests | st.integers())
def test_a_store_of_zeos_is_read(oid: bytes, serial: bytes, record: bytes, transaction_id: int) -> None:
    data = encode_as_client(0, True, 'storea', (oid, serial, record, transaction_id))
    assert messages.decode_from_client(data) == (b'K\0', True, 'storea', (oid, serial, record, transaction_id))


@given(requests, records, eight, st.none() | eight)
def test_a_load_reply_of_zeos_is_read(message_id: int, record: bytes, start: bytes, end: bytes | None) -> None:
    data = encode_as_server(message_id, 0, '.reply', (record, start, end))
    for form in data, bytearray(data), memoryview(data):
        found = messages.decode_from_server(form)
        assert found == (message_id, 0, '.reply', (record, start, end))
        assert all(type(part) in (bytes, type(None)) for part in found[3])


@given(eight, st.lists(eight, max_size=5) | st.sampled_from([[OID] * 1000, [OID] * 1001, [OID] * 2500]))
def test_an_invalidation_of_zeos_is_read(tid: bytes, oids: list[bytes]) -> None:
    data = encode_as_server(0, True, 'invalidateTransaction', (tid, oids))
    assert messages.decode_from_server(data) == (0, True, 'invalidateTransaction', (tid, oids))


@given(requests | st.tuples(eight, eight) | plain, st.sampled_from([True, False, 0, 1]), texts, st.lists(plain, max_size=3))
def test_any_message_of_a_zeo_client_is_read(message_id: Any, flag: Any, name: str, args: list[Any]) -> None:
    found = messages.decode_from_client(encode_as_client(message_id, flag, name, tuple(args)))
    assert value_of(found[0]) == message_id
    assert found[1:] == (bool(flag), name, tuple(args))


@given(requests, st.sampled_from([0, 2]), plain)
def test_any_reply_of_a_zeo_server_is_read(message_id: int, flag: int, result: Any) -> None:
    data = encode_as_server(message_id, flag, '.reply', result)
    assert messages.decode_from_server(memoryview(data)) == (message_id, flag, '.reply', result)
    assert messages.decode_from_server(data) == (message_id, flag, '.reply', result)


# ---- short cuts -------------------------------------------------------------------

def generic_from_client(data: bytes | bytearray) -> Any:
    message_id, flag, name, args = pickles.load_from_client(data)
    return message_id, bool(flag), name, tuple(args)


def generic_from_server(data: bytes | bytearray) -> Any:
    return tuple(pickles.load_from_server(data))


def short_from_client(data: Payload) -> Any:
    found = (messages._load_of(data) or messages._commit_of(data) or messages._whole_of(data)
             or messages._store_of(data) or messages._stores_of(data) or messages._upload_of(data))
    return found and (value_of(found[0]), *found[1:3], without_views(found[3]))


def short_from_server(data: Payload) -> Any:
    found = (messages._reply_of(data) or messages._info_of(data) or messages._invalidation_of(data)
             or messages._download_of(data))
    return found and (*found[:3], without_views(found[3]))


def without_views(args: Any) -> Any:
    """Pieces of blobs are views of the message."""
    if isinstance(args, tuple):
        return tuple(bytes(each) if isinstance(each, memoryview) else each for each in args)
    return args


def typed(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value), [typed(item) for item in value]
    return type(value), value


FROM_CLIENT = {
    'load': messages.load_request(300, OID, TID),
    'load of ZEO': (b'', encode_as_client((OID, TID), False, 'loadBefore', (OID, TID))),
    'short load of ZEO': (b'', encode_as_client(7, False, 'loadBefore', (OID, TID))),
    'other load of ZEO': (b'', encode_as_client(300, False, 'loadBefore', (OID, TID))),
    'vote': messages.request(300, 'vote', (1234567,)),
    'vote of zeo': messages.request(300, 'vote', (1234567, True)),
    'finish': messages.request(70_000, 'tpc_finish', (1234567,)),
    'finish of zeo': messages.finish_request(300, 7),
    'abort': messages.request(300, 'tpc_abort', (-1234567,)),
    'store': messages.store_notice(OID, TID, b'record' * 3, 1234567),
    'long store': messages.store_notice(OID, TID, b'record' * 50, 7),
    'store of ZEO': (b'', encode_as_client(0, True, 'storea', (OID, TID, b'record', 0x7f0012345678))),
    'stores': messages.stores_notice(OID + TID, [b'record' * 3, b'other'], 1234567),
    'commit': messages.commit_request(300_000, 1234567, True, b'user', b'', OID + TID, [b'record' * 3, b'other']),
    'upload': (b'', payload(messages.upload_notice(b'piece' * 3))),
    'long upload': (b'', payload(messages.upload_notice(b'piece' * 60))),
    'upload of ZEO': (b'', encode_as_client(0, True, 'storeBlobChunk', (b'piece' * 60,))),
    'empty store of ZEO': (b'', encode_as_client(0, True, 'storea', (OID, TID, b'', 300))),
}
FROM_SERVER = {
    'load reply': messages.load_reply(b'K\x07', b'record', TID, None),
    'long load reply': messages.load_reply(b'J\x07\x01\0\0', b'record' * 50, TID, LATER),
    'current load reply': messages.load_reply(b'J\x07\x01\0\0', b'record' * 50, TID, None),
    'empty load reply': messages.load_reply(b'M\x07\x01', b'', TID, LATER),
    'tid reply': messages.reply(b'J\x07\x01\0\0', TID),
    'record reply': messages.reply(b'K\x07', b'record' * 50),
    'empty reply': messages.reply(b'J\x07\x01\0\0', None),
    'vote reply': messages.reply(b'J\x07\x01\0\0', []),
    'vote reply of zeo': messages.reply(b'J\x07\x01\0\0', ([], TID)),
    'sizes': messages.info_notice(7, 123_456_789),
    'download': messages.blob_chunk_notice(OID, TID, b'piece' * 3),
    'long download': messages.blob_chunk_notice(OID, TID, b'piece' * 60),
    'download of ZEO': (b'', encode_as_server(0, True, 'receiveBlobChunk', (OID, TID, b'piece' * 60))),
    'invalidation': messages.invalidation_notice(TID, [OID, LATER]),
    'single invalidation': messages.invalidation_notice(TID, [OID]),
    'single invalidation of ZEO': (b'', encode_as_server(0, True, 'invalidateTransaction', (TID, [OID]))),
    'invalidation of ZEO': (b'', encode_as_server(0, True, 'invalidateTransaction', (TID, [OID, OID, TID]))),
}
CASES = [pytest.param(short, generic, b''.join(frame)[4 if len(frame) == 1 else 0:], id=name)
         for short, generic, frames in [(short_from_client, generic_from_client, FROM_CLIENT),
                                        (short_from_server, generic_from_server, FROM_SERVER)]
         for name, frame in frames.items()]
Reader = Callable[[Payload], Any]


@pytest.mark.parametrize('short, generic, data', CASES)
def test_messages_of_fixed_shape_are_known(short: Reader, generic: Reader, data: bytes) -> None:
    assert typed(short(data)) == typed(short(bytearray(data))) == typed(short(memoryview(data)))
    assert short(data) is not None


def agree(short: Reader, generic: Reader, data: bytes) -> bool:
    """Whether the short cut takes the data; then it must say what the generic way says."""
    found = short(data)
    if found is None:
        return False
    meant = generic(data)
    assert found == meant, data
    assert typed(found[2:]) == typed(meant[2:]), data
    return True


@pytest.mark.parametrize('short, generic, data', CASES)
def test_short_cuts_read_no_near_miss_otherwise_than_the_generic_way(
        short: Reader, generic: Reader, data: bytes) -> None:
    agree(short, generic, data)
    taken = 0
    for at in range(len(data)):
        for byte in range(256) if at < 80 or at > len(data) - 40 else (0, 0x43):
            taken += agree(short, generic, data[:at] + bytes([byte]) + data[at + 1:])
        taken += agree(short, generic, data[:at])
        taken += agree(short, generic, data[:at] + data[at + 1:])
        taken += agree(short, generic, data[:at] + b'N' + data[at:])
        taken += agree(short, generic, data[:at] + b'C\x08' + data[at:])
    agree(short, generic, data + b'.')
    assert taken > 0  # some bytes may be anything


@pytest.mark.parametrize('short, generic, data', CASES)
@given(st.data())
def test_short_cuts_agree_with_the_generic_way_about_damaged_messages(
        short: Reader, generic: Reader, data: bytes, draw: st.DataObject) -> None:
    damaged = bytearray(data)
    for _ in range(draw.draw(st.integers(1, 4))):
        at = draw.draw(st.integers(0, len(damaged) - 1))
        damaged[at:at + draw.draw(st.integers(0, 2))] = draw.draw(
            st.binary(max_size=2) | st.sampled_from([b'C\x08', b'B\0\0\0\0', b'N', b't.', b'\x86', b'J', b'\x8a\x01']))
    agree(short, generic, bytes(damaged))


# ---- values that do not fit the shapes ------------------------------------------------

@pytest.mark.parametrize('message_id, oid, tid', [
    (5, b'short', TID), (5, OID, b'much longer'), (2**31, OID, TID), (5, 'texttext', TID), (5, OID, None)])
def test_an_unusual_load_request_is_written_all_the_same(message_id: int, oid: Any, tid: Any) -> None:
    assert decode_as_server(payload(messages.load_request(message_id, oid, tid))) == (
        message_id, False, 'loadBefore', (oid, tid))


@pytest.mark.parametrize('result', [
    (b'record', b'short', None), (b'record', TID, b'long' * 3), (b'record', None, None), (None, TID, None),
    ('text', TID, None), (bytearray(b'record'), TID, None), (b'record', 'texttext', None), (b'record', TID, 5)])
def test_an_unusual_load_reply_is_written_all_the_same(result: Any) -> None:
    assert messages.decode_from_server(payload(messages.load_reply(b'K\x05', *result))) == (5, 0, '.reply', result)


@pytest.mark.parametrize('args', [
    (b'short', TID, b'record', 5), (OID, b'long' * 3, b'record', 5), (OID, TID, None, 5), (OID, TID, 'text', 5),
    (OID, TID, b'record', 2**80), (OID, TID, b'record', -5)])
def test_an_unusual_store_is_written_all_the_same(args: Any) -> None:
    assert decode_as_server(payload(messages.store_notice(*args))) == (0, True, 'storea', args)


@pytest.mark.parametrize('tid, oids', [
    (TID, [OID, b'short']), (TID, [OID, b'12345', b'12345678901']), (b'short', [OID]), (TID, (OID,)), (TID, [])])
def test_an_unusual_invalidation_is_written_all_the_same(tid: bytes, oids: Any) -> None:
    assert decode_as_client(payload(messages.invalidation_notice(tid, oids))) == (
        0, True, 'invalidateTransaction', (tid, list(oids)))


def test_a_piece_of_a_blob_is_neither_copied_when_it_is_sent_nor_when_it_is_read() -> None:
    piece = bytes(100_000)
    for frame, read in [(messages.upload_notice(piece), messages.decode_from_client),
                        (messages.blob_chunk_notice(OID, TID, piece), messages.decode_from_server)]:
        assert any(part is piece for part in frame)
        data = payload(frame)
        view = read(data)[3][-1]    # type: ignore[operator]
        assert isinstance(view, memoryview) and view.obj is data and view == piece


def test_a_long_record_is_sent_without_being_copied() -> None:
    record = bytes(100_000)
    for frame in (messages.load_reply(b'K\x05', record, TID, None), messages.store_notice(OID, TID, record, 5),
                  messages.reply(b'K\x05', record)):
        assert any(part is record for part in frame)


# ---- replies that cannot be sent -----------------------------------------------------

class Stubborn:
    def __reduce__(self) -> Any:
        raise RuntimeError('no')


COULD_NOT = ('builtins.ValueError', ("Couldn't pickle response",))


@pytest.mark.parametrize('result', [
    pytest.param(Stubborn(), id='an object'), pytest.param([Stubborn()], id='a list'),
    pytest.param(lambda: None, id='a function'), pytest.param(Stubborn, id='a class'),
    pytest.param({1: Stubborn}, id='a dictionary')])
def test_a_result_that_cannot_be_sent_is_answered_by_an_error(result: Any) -> None:
    assert decode_as_client(payload(messages.reply(b'K\x05', result))) == (5, 2, '.reply', COULD_NOT)
    assert decode_as_client(payload(messages.load_reply(b'K\x05', result, TID, None))) == (5, 2, '.reply', COULD_NOT)


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
    for frame in (messages.reply(b'K\x05', bytes(30_000)), messages.reply(b'K\x05', [bytes(30_000)]),
                  messages.load_reply(b'K\x05', bytes(30_000), TID, None)):
        assert decode_as_client(payload(frame)) == (5, 2, '.reply', COULD_NOT)


def test_a_request_that_cannot_be_sent_raises() -> None:
    with pytest.raises(pickle.PicklingError):
        messages.request(5, 'tpc_begin', [Stubborn])
    with pytest.raises(RuntimeError):
        messages.notice('tpc_begin', [Stubborn()])


# ---- messages that are none -----------------------------------------------------------

def pickled(value: Any) -> bytes:
    return pickle.dumps(value, 3)


@pytest.mark.parametrize('value', [
    None, 5, 'text', b'four', 'four', {1: 1, 2: 2, 3: 3, 4: 4}, (), (1, 0, 'name'), (1, 0, 'name', (), 5), (1, 0, b'name', ()),
    (1, 0, None, ()), (1, 0, 5, ())], ids=repr)
def test_what_does_not_have_the_four_fields_is_refused(value: Any) -> None:
    for decode in messages.decode_from_client, messages.decode_from_server:
        with pytest.raises(ProtocolError):
            decode(pickled(value))


@pytest.mark.parametrize('args', [None, 5, 'text', b'bytes', {1: 2}, {1}], ids=repr)
def test_arguments_that_are_not_a_sequence_are_refused(args: Any) -> None:
    with pytest.raises(ProtocolError, match='arguments'):
        messages.decode_from_client(pickled((1, False, 'ping', args)))


def test_tuples_and_lists_are_the_same_to_the_reader() -> None:
    assert messages.decode_from_client(pickled([1, False, 'ping', [5]])) == (b'K\x01', False, 'ping', (5,))
    assert messages.decode_from_server(pickled([1, 0, '.reply', [5]])) == (1, 0, '.reply', [5])


@pytest.mark.parametrize('value', [(None, 0, '.reply', ()), ('1', 0, '.reply', ()), ([], 0, '.reply', ()),
                                   ((1, 2), 0, '.reply', ()), (1, None, '.reply', ()), (1, '', '.reply', ())], ids=repr)
def test_an_id_or_flag_of_a_server_that_is_not_a_number_is_refused(value: Any) -> None:
    with pytest.raises(ProtocolError, match='id or flag'):
        messages.decode_from_server(pickled(value))


def test_an_id_that_cannot_be_sent_back_is_refused() -> None:
    with pytest.raises(ProtocolError, match='sent back'):
        messages.decode_from_client(b'\x80\x03(cZopeUndo.Prefix\nPrefix\n)\x81\x89X\x04\0\0\0ping)t.')


@pytest.mark.parametrize('message_id', [-1, 0, 1, 255, 256, 65535, 65536, 2**31 - 1, 2**31, -2**31, 2**70, True, None,
                                        'text', b'bytes', (OID, TID), (), [1], {'a': 1}, 1.5], ids=repr)
def test_an_id_comes_back_as_it_was_whatever_it_is(message_id: Any) -> None:
    found, *_ = messages.decode_from_client(encode_as_client(message_id, False, 'ping', ()))
    again = decode_as_client(payload(messages.reply(found, None)))[0]
    assert again == message_id and type(again) is type(message_id)




def test_a_heartbeat_is_known_by_its_id() -> None:
    for message_id in -1, 0, 1, 2**32 - 1, (-1,), None:
        for name in '.reply', 'loadBefore', 'storea':
            data = encode_as_client(message_id, 0, name, (OID, TID))
            assert messages.is_heartbeat(messages.decode_from_client(data)[0]) is (message_id == -1)


@pytest.mark.parametrize('value', [None, ()])
def test_the_heartbeats_of_clients_are_read(value: Any) -> None:
    """ZEO sends None for the arguments of this one message."""
    message_id, oneway, name, args = messages.decode_from_client(encode_as_client(-1, 0, '.reply', value))
    assert messages.is_heartbeat(message_id) and not oneway


# ---- the handshake, and the table ------------------------------------------------------

@pytest.mark.parametrize('greeting, answer', [
    (b'Z5', b'Z5'), (b'Z6', b'Z5'), (b'Z51', b'Z5'), (b'Z4', None), (b'Z309', None), (b'Z3101', None), (b'M5', None),
    (b'X5', None), (b'Z', None), (b'', None), (b'5', None)])
def test_a_client_answers_servers_that_speak_its_version(greeting: bytes, answer: bytes | None) -> None:
    assert messages.answer_to_greeting(greeting) == answer
    assert messages.answer_to_greeting(bytearray(greeting)) == answer


def test_a_status_report_is_ascii_json() -> None:
    status: Any = {'1': {'loads': 5, 'start': 'Sun'}, 'caf\u00e9': {'lock_time': None}}
    assert json.loads(messages.status_report(status).decode('ascii')) == status


def test_every_method_of_the_protocol_has_its_number_of_arguments() -> None:
    for name, method in messages.METHODS.items():
        assert 0 <= method.least <= method.most <= 6, name
    assert {name for name, method in messages.METHODS.items() if method.writes} == {
        'new_oids', 'tpc_begin', 'commit'}


def test_all_methods_that_zeo_clients_call_are_in_the_table() -> None:
    from ZEO.StorageServer import registered_methods
    assert set(registered_methods) - set(messages.METHODS) <= {'new_oid', 'undo', 'get_size_info', 'getExtensionMethods'}


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
        messages.decode_from_server(file.getvalue())


@pytest.mark.parametrize('payload', [b'', b'\x80\x03(K', b'\x80\x03(K\x05', b'cos\nsystem\n.'])
def test_of_other_rubbish_it_cannot(payload: bytes) -> None:
    assert messages.answered_by(payload) is None


# ---- long pieces of blobs, whose data go elsewhere


def test_where_the_data_of_a_piece_are_can_be_told_from_its_beginning() -> None:
    data = bytes(300)
    oid, tid = b'oidoidoi', b'tidtidti'
    for payload, (header, tail), found in [
            (b''.join(messages.upload_notice(data))[4:], messages.around_upload(300), messages.upload_in),
            (b''.join(messages.blob_chunk_notice(oid, tid, data))[4:], messages.around_download(oid, tid, 300),
             messages.download_in)]:
        assert header[4:] + data + tail == payload and int.from_bytes(header[:4], 'big') == len(payload)
        *whose, head, size, end = found(memoryview(payload[:len(header) - 4]), len(payload))  # type: ignore
        assert (head, size, end) == (len(header) - 4, 300, tail)
        assert whose in ([], [oid, tid])


@pytest.mark.parametrize('kind', ['up', 'down'])
def test_what_is_not_exactly_the_beginning_of_a_piece_is_none(kind: str) -> None:
    data = bytes(300)
    if kind == 'up':
        found, (header, tail), variable = messages.upload_in, messages.around_upload(300), set[int]()
    else:
        head, tail = messages.around_download(b'oidoidoi', b'tidtidti', 300)
        found, header = messages.download_in, head  # type: ignore[assignment]
        at = head.index(b'oidoidoi') - 4
        variable = {*range(at, at + 8), *range(at + 10, at + 18)}
    payload = header[4:] + data + tail
    beginning = header[4:]
    assert found(memoryview(payload), len(payload)) is not None
    for length in len(payload) - 1, len(payload) + 1, 2**32 - 1:
        assert found(memoryview(payload), length) is None
    for size in range(len(beginning)):
        assert found(memoryview(beginning)[:size], len(payload)) is None
    for at in set(range(len(beginning))) - variable:
        altered = bytearray(beginning)
        altered[at] ^= 1
        assert found(memoryview(altered), len(payload)) is None
    short = (messages.around_upload(200) if kind == 'up' else messages.around_download(bytes(8), bytes(8), 200))[0]
    assert found(memoryview(short[4:]), len(short) - 4 + 200 + len(tail)) is None
