"""All messages of ZEO's are read, and the short cuts change nothing."""

import pickle
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.wire.zeos import LATER
from tests.wire.zeos import OID
from tests.wire.zeos import TID
from tests.wire.zeos import decode_as_client
from tests.wire.zeos import eight
from tests.wire.zeos import encode_as_client
from tests.wire.zeos import encode_as_server
from tests.wire.zeos import payload
from tests.wire.zeos import plain
from tests.wire.zeos import requests
from tests.wire.zeos import texts
from tests.wire.zeos import value_of
from zeo.errors import ProtocolError
from zeo.wire import messages
from zeo.wire import pickles
from zeo.wire.announcements import info_notice
from zeo.wire.announcements import info_of
from zeo.wire.announcements import invalidation_notice
from zeo.wire.announcements import invalidation_of
from zeo.wire.chunks import blob_chunk_notice
from zeo.wire.chunks import download_of
from zeo.wire.chunks import upload_notice
from zeo.wire.chunks import upload_of
from zeo.wire.commits import finish_request
from zeo.wire.commits import step_of
from zeo.wire.commits import store_notice
from zeo.wire.commits import store_of
from zeo.wire.decoding import decode_from_client
from zeo.wire.decoding import decode_from_server
from zeo.wire.framing import Payload
from zeo.wire.loads import load_message_of
from zeo.wire.loads import load_request
from zeo.wire.replies import load_reply
from zeo.wire.replies import reply_of
from zeo.wire.stores import commit_of
from zeo.wire.stores import commit_request
from zeo.wire.stores import stores_notice
from zeo.wire.stores import stores_of


@given(requests | st.tuples(eight, eight) | plain, st.sampled_from([True, False, 0, 1]), texts, st.lists(plain, max_size=3))
def test_any_message_of_a_zeo_client_is_read(message_id: Any, flag: Any, name: str, args: list[Any]) -> None:
    found = decode_from_client(encode_as_client(message_id, flag, name, tuple(args)))
    assert value_of(found[0]) == message_id
    assert found[1:] == (bool(flag), name, tuple(args))


@given(requests, st.sampled_from([0, 2]), plain)
def test_any_reply_of_a_zeo_server_is_read(message_id: int, flag: int, result: Any) -> None:
    data = encode_as_server(message_id, flag, '.reply', result)
    assert decode_from_server(memoryview(data)) == (message_id, flag, '.reply', result)
    assert decode_from_server(data) == (message_id, flag, '.reply', result)


# ---- short cuts -------------------------------------------------------------------

def generic_from_client(data: bytes | bytearray) -> Any:
    message_id, flag, name, args = pickles.load_from_client(data)
    return message_id, bool(flag), name, tuple(args)


def generic_from_server(data: bytes | bytearray) -> Any:
    return tuple(pickles.load_from_server(data))


def short_from_client(data: Payload) -> Any:
    found = (load_message_of(data) or step_of(data) or commit_of(data)
             or store_of(data) or stores_of(data) or upload_of(data))
    return found and (value_of(found[0]), *found[1:3], without_views(found[3]))


def short_from_server(data: Payload) -> Any:
    found = (reply_of(data) or info_of(data) or invalidation_of(data)
             or download_of(data))
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
    'load': load_request(300, OID, TID),
    'load of ZEO': (b'', encode_as_client((OID, TID), False, 'loadBefore', (OID, TID))),
    'short load of ZEO': (b'', encode_as_client(7, False, 'loadBefore', (OID, TID))),
    'other load of ZEO': (b'', encode_as_client(300, False, 'loadBefore', (OID, TID))),
    'vote': messages.request(300, 'vote', (1234567,)),
    'vote of zeo': messages.request(300, 'vote', (1234567, True)),
    'finish': messages.request(70_000, 'tpc_finish', (1234567,)),
    'finish of zeo': finish_request(300, 7),
    'abort': messages.request(300, 'tpc_abort', (-1234567,)),
    'store': store_notice(OID, TID, b'record' * 3, 1234567),
    'long store': store_notice(OID, TID, b'record' * 50, 7),
    'store of ZEO': (b'', encode_as_client(0, True, 'storea', (OID, TID, b'record', 0x7f0012345678))),
    'stores': stores_notice(OID + TID, [b'record' * 3, b'other'], 1234567),
    'commit': commit_request(300_000, 1234567, True, b'user', b'', OID + TID, [b'record' * 3, b'other']),
    'upload': (b'', payload(upload_notice(b'piece' * 3))),
    'long upload': (b'', payload(upload_notice(b'piece' * 60))),
    'upload of ZEO': (b'', encode_as_client(0, True, 'storeBlobChunk', (b'piece' * 60,))),
    'empty store of ZEO': (b'', encode_as_client(0, True, 'storea', (OID, TID, b'', 300))),
}
FROM_SERVER = {
    'load reply': load_reply(b'K\x07', b'record', TID, None),
    'long load reply': load_reply(b'J\x07\x01\0\0', b'record' * 50, TID, LATER),
    'current load reply': load_reply(b'J\x07\x01\0\0', b'record' * 50, TID, None),
    'empty load reply': load_reply(b'M\x07\x01', b'', TID, LATER),
    'tid reply': messages.reply(b'J\x07\x01\0\0', TID),
    'record reply': messages.reply(b'K\x07', b'record' * 50),
    'empty reply': messages.reply(b'J\x07\x01\0\0', None),
    'vote reply': messages.reply(b'J\x07\x01\0\0', []),
    'vote reply of zeo': messages.reply(b'J\x07\x01\0\0', ([], TID)),
    'sizes': info_notice(7, 123_456_789),
    'download': blob_chunk_notice(OID, TID, b'piece' * 3),
    'long download': blob_chunk_notice(OID, TID, b'piece' * 60),
    'download of ZEO': (b'', encode_as_server(0, True, 'receiveBlobChunk', (OID, TID, b'piece' * 60))),
    'invalidation': invalidation_notice(TID, [OID, LATER]),
    'single invalidation': invalidation_notice(TID, [OID]),
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


# ---- messages that are none -----------------------------------------------------------

def pickled(value: Any) -> bytes:
    return pickle.dumps(value, 3)


@pytest.mark.parametrize('value', [
    None, 5, 'text', b'four', 'four', {1: 1, 2: 2, 3: 3, 4: 4}, (), (1, 0, 'name'), (1, 0, 'name', (), 5), (1, 0, b'name', ()),
    (1, 0, None, ()), (1, 0, 5, ())], ids=repr)
def test_what_does_not_have_the_four_fields_is_refused(value: Any) -> None:
    for decode in decode_from_client, decode_from_server:
        with pytest.raises(ProtocolError):
            decode(pickled(value))


@pytest.mark.parametrize('args', [None, 5, 'text', b'bytes', {1: 2}, {1}], ids=repr)
def test_arguments_that_are_not_a_sequence_are_refused(args: Any) -> None:
    with pytest.raises(ProtocolError, match='arguments'):
        decode_from_client(pickled((1, False, 'ping', args)))


def test_tuples_and_lists_are_the_same_to_the_reader() -> None:
    assert decode_from_client(pickled([1, False, 'ping', [5]])) == (b'K\x01', False, 'ping', (5,))
    assert decode_from_server(pickled([1, 0, '.reply', [5]])) == (1, 0, '.reply', [5])


@pytest.mark.parametrize('value', [(None, 0, '.reply', ()), ('1', 0, '.reply', ()), ([], 0, '.reply', ()),
                                   ((1, 2), 0, '.reply', ()), (1, None, '.reply', ()), (1, '', '.reply', ())], ids=repr)
def test_an_id_or_flag_of_a_server_that_is_not_a_number_is_refused(value: Any) -> None:
    with pytest.raises(ProtocolError, match='id or flag'):
        decode_from_server(pickled(value))


def test_an_id_that_cannot_be_sent_back_is_refused() -> None:
    with pytest.raises(ProtocolError, match='sent back'):
        decode_from_client(b'\x80\x03(cZopeUndo.Prefix\nPrefix\n)\x81\x89X\x04\0\0\0ping)t.')


@pytest.mark.parametrize('message_id', [-1, 0, 1, 255, 256, 65535, 65536, 2**31 - 1, 2**31, -2**31, 2**70, True, None,
                                        'text', b'bytes', (OID, TID), (), [1], {'a': 1}, 1.5], ids=repr)
def test_an_id_comes_back_as_it_was_whatever_it_is(message_id: Any) -> None:
    found, *_ = decode_from_client(encode_as_client(message_id, False, 'ping', ()))
    again = decode_as_client(payload(messages.reply(found, None)))[0]
    assert again == message_id and type(again) is type(message_id)
