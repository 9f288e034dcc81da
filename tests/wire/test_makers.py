"""The few globals that a pickle from the network may name make plain values, and nothing else."""

import pickle

import pytest
from ZEO.asyncio import marshal
from ZODB.POSException import MultipleUndoErrors
from ZODB.POSException import UndoError

from tests.wire.hostile import integer
from tests.wire.hostile import text
from zeo.errors import ProtocolError
from zeo.wire.makers import MAKERS
from zeo.wire.makers import Prefix
from zeo.wire.pickles import load_from_client
from zeo.wire.pickles import load_from_server


def refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        load_from_client(data)


def test_the_names_that_may_occur_are_exactly_these() -> None:
    assert set(MAKERS) == {
        *((module, name) for module in ('builtins', '__builtin__')
          for name in ('dict', 'set', 'frozenset', 'list', 'tuple', 'bytes', 'bytearray', 'str', 'int', 'float',
                       'complex', 'bool', 'object')),
        ('zodbpickle', 'binary'), ('copyreg', '_reconstructor'), ('copy_reg', '_reconstructor'),
        ('_codecs', 'encode'), ('ZopeUndo.Prefix', 'Prefix'),
        ('ZODB.POSException', '_recon'), ('ZODB.POSException', 'UndoError')}


def test_a_call_of_dict_is_a_dict() -> None:
    assert load_from_client(b'cbuiltins\ndict\n)R.') == {}
    assert load_from_client(b'c__builtin__\ndict\n(](X\x01\0\0\0aK\x01\x86etR.') == {'a': 1}


def test_bytes_that_zodb_marks_as_binary_are_bytes() -> None:
    again = load_from_client(b'czodbpickle\nbinary\nC\x03abc\x85R.')
    assert again == b'abc' and type(again) is bytes


@pytest.mark.parametrize('maker, arguments', [
    ('dict', 'K\x01'), ('dict', 'X\x02\0\0\0ab'), ('list', 'X\x02\0\0\0ab'), ('list', 'C\x02ab'), ('tuple', 'N'),
    ('set', 'K\x09'), ('bytes', 'K\x09'), ('bytes', '\x8a\x05\0\0\0\0\x01'), ('bytearray', '\x8a\x05\0\0\0\0\x01'),
    ('int', 'X\x01\0\0\x001'), ('float', 'X\x01\0\0\x001'), ('complex', 'X\x01\0\0\x001'), ('str', 'C\x01a'),
    ('str', ']'), ('str', 'C\x01aX\x06\0\0\0latin1'), ('bytes', 'X\x01\0\0\0aX\x05\0\0\0rot13'), ('bytes', 'C\x01aX\x05\0\0\0utf-7'),
    ('int', 'X\x01\0\0\x001K\x10'), ('object', ''), ('bool', ']'), ('dict', '}}'), ('set', 'NN'),
])
def test_makers_take_plain_values_of_their_kind_only(maker: str, arguments: str) -> None:
    refused(b'\x80\x03cbuiltins\n%b\n(%btR.' % (maker.encode(), arguments.encode('latin1')))


@pytest.mark.parametrize('arguments', [b'C\x01aX\x06\0\0\0latin1', text('a') + text('zlib'), b'', text('\u20ac')])
def test_only_text_is_encoded_and_only_as_latin_1(arguments: bytes) -> None:
    refused(b'\x80\x03c_codecs\nencode\n(' + arguments + b'tR.')


# ---- undo prefixes -----------------------------------------------------------------

PREFIX = b'cZopeUndo.Prefix\nPrefix\n'


def pickled_prefix(*path: str) -> bytes:
    state = b''.join([b'}', text('length'), integer(len(path)), b's', text('path'), b'](', *map(text, path), b'es'])
    return b'\x80\x03' + PREFIX + b')\x81' + state + b'b.'


def test_a_prefix_equals_the_paths_below_it_without_the_name_of_the_user() -> None:
    prefix = load_from_client(pickled_prefix('', 'shop', 'cart'))
    assert type(prefix) is Prefix
    path: object
    for path in ['/shop/cart', '/shop/cart/item', '/shop/cart bob', b'/shop/cart/item bob', '/shop/cart/x y bob']:
        assert prefix == path and path == prefix
    for path in ['/shop', '/shop/cartwheel', '/shop/cartwheel bob', '', 'cart', b'/shop', 5, None, Prefix('/shop')]:
        assert prefix != path
    assert load_from_client(pickled_prefix()) == '/anything'


@pytest.mark.parametrize('protocol', [0, 1])
def test_a_prefix_in_an_old_protocol_is_read(protocol: int) -> None:
    data = b'ccopy_reg\n_reconstructor\n(' + PREFIX + b'c__builtin__\nobject\nNtR}' + text('path') + b'](' + (
        text('a') + b'esb.')
    assert load_from_client(data) == 'a/b'


@pytest.mark.parametrize('state', [
    b'N', b'}', b')', b'}' + text('path') + b'Ns', b'}' + text('path') + b'](K\x01es', b'N}' + text('path') + b']s\x86',
])
def test_a_prefix_without_a_path_is_refused(state: bytes) -> None:
    refused(PREFIX + b')\x81' + state + b'b.')


def test_a_prefix_is_for_asking_not_for_storing() -> None:
    with pytest.raises(TypeError):
        pickle.dumps({'extension': Prefix('/shop')}, 3)


# ---- undo errors -------------------------------------------------------------------

UNDO_ERROR = b'cZODB.POSException\n_recon\n(cZODB.POSException\nUndoError\n'


def test_the_undo_errors_that_zeo_puts_into_a_reply_become_what_they_say() -> None:
    error = MultipleUndoErrors([(b'12345678', UndoError('too late', b'12345678'))])
    data = marshal.encoder(b'Z5', True)(7, 2, '.reply', marshal.reduce_exception(error))
    message_id, flag, name, (class_name, value) = load_from_server(data)
    assert class_name == 'ZODB.POSException.MultipleUndoErrors'
    assert value['_errs'] == [(b'12345678', 'too late')]


@pytest.mark.parametrize('rest', [
    b'}tR', b'NtR', b')tR', b'}' + text('_reason') + b'NstR', b'}' + text('_reason') + b']stR', b't',
    b'}' + text('_reason') + text('why') + b'st)R'], ids=repr)
def test_an_undo_error_without_a_reason_is_refused(rest: bytes) -> None:
    refused(UNDO_ERROR + rest + b'.')
    refused(b'cZODB.POSException\nUndoError\n' + text('why') + b'\x85R.')
