"""Errors cross the wire by name and come back as the same errors, or as something that shows them."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from ZODB import POSException
from ZODB.POSException import BTreesConflictError
from ZODB.POSException import ConflictError
from ZODB.POSException import MultipleUndoErrors
from ZODB.POSException import POSKeyError
from ZODB.POSException import ReadConflictError
from ZODB.POSException import ReadOnlyError
from ZODB.POSException import StorageTransactionError
from ZODB.POSException import UndoError

from zeo.errors import ClientDisconnected
from zeo.errors import OutcomeUnknown
from zeo.errors import ServerException
from zeo.wire import faults
from zeo.wire import pickles
from zeo.wire.faults import describe
from zeo.wire.faults import recreate

OID = b'\0\0\0\0\0\0\0\x09'
T1 = b'\x03\xf0\0\0\0\0\0\x01'
T2 = b'\x03\xf0\0\0\0\0\0\x02'


def conflict() -> ConflictError:
    error = ConflictError(oid=OID, serials=(T2, T1))
    error.class_name = 'shop.Basket'
    return error


def across(error: BaseException) -> Exception:
    """The error as the other side gets it."""
    return recreate(*pickles.load_from_server(pickles.dumps(describe(error))))


@pytest.mark.parametrize('error, described', [
    (POSKeyError(OID), ('ZODB.POSException.POSKeyError', (OID,))),
    (conflict(), ('ZODB.POSException.ConflictError', {
        'message': 'database conflict error', 'oid': OID, 'class_name': 'shop.Basket',
        'serials': (T2, T1)})),
    (ConflictError('mine'), ('ZODB.POSException.ConflictError', {
        'message': 'mine', 'oid': None, 'class_name': None, 'serials': None})),
    (ReadConflictError(oid=OID, serials=(T2, T1)), ('ZODB.POSException.ReadConflictError', {
        'message': 'database read conflict error', 'oid': OID, 'class_name': None,
        'serials': (T2, T1)})),
    (BTreesConflictError(1, 2, 3, 4), ('ZODB.POSException.BTreesConflictError', {
        'p1': 1, 'p2': 2, 'p3': 3, 'reason': 4})),
    (ReadOnlyError(), ('ZODB.POSException.ReadOnlyError', ())),
    (StorageTransactionError(None, 17), ('ZODB.POSException.StorageTransactionError', (None, 17))),
    (KeyError(5), ('builtins.KeyError', (5,))),
    (TypeError('a', 'b'), ('builtins.TypeError', ('a', 'b'))),
    (UndoError('too late', OID), ('ZODB.POSException.UndoError', {'_reason': 'too late', '_oid': OID})),
], ids=lambda value: type(value).__name__ if isinstance(value, Exception) else '')
def test_an_error_that_both_sides_know_comes_back_the_same(
        error: Exception, described: tuple[str, Any]) -> None:
    assert describe(error) == described
    again = across(error)
    assert type(again) is type(error)
    assert again.args == error.args or again.__dict__
    assert again.__dict__ == error.__dict__
    assert str(again) == str(error)


def test_the_errors_within_multiple_undo_errors_come_back_as_text() -> None:
    again: Any = across(MultipleUndoErrors([(OID, UndoError('too late', OID)), (OID, 'no reason')]))
    assert type(again) is MultipleUndoErrors
    assert [oid for oid, reason in again._errs] == [OID, OID]
    assert 'too late' in str(again) and 'no reason' in str(again)


@pytest.mark.parametrize('name, value, kind', [
    ('exceptions.KeyError', (5,), KeyError),
    ('exceptions.TypeError', ('five',), TypeError),
    ('ZODB.POSException.POSKeyError', [OID], POSKeyError),
    ('ZODB.POSException.ConflictError', {'message': 'x', 'oid': OID, 'serials': [T2, T1], 'more': 1},
     ConflictError),
    ('ZODB.POSException.BTreesConflictError', {'p1': 0, 'p2': 0, 'p3': 0, 'reason': 0, 'more': 1},
     BTreesConflictError),
])
def test_what_other_versions_send_is_understood(name: str, value: Any, kind: type[Exception]) -> None:
    assert type(recreate(name, value)) is kind


def test_a_conflict_keeps_its_class_name_and_its_serials_as_a_pair() -> None:
    again: Any = recreate('ZODB.POSException.ConflictError', {
        'message': 'x', 'oid': OID, 'class_name': 'shop.Basket', 'serials': [T2, T1]})
    assert (again.oid, again.class_name, again.serials) == (OID, 'shop.Basket', (T2, T1))


@pytest.mark.parametrize('error', [
    ValueError('unknown storage: 2'), OSError(28, 'No space left on device'), ZeroDivisionError(),
    POSException.StorageError('broken'), UnicodeDecodeError('ascii', b'\xff', 0, 1, 'ordinal'),
], ids=repr)
def test_any_other_error_is_shown_not_made(error: Exception) -> None:
    again = across(error)
    assert type(again) is ServerException
    kind = type(error)
    assert again.class_name == f'{kind.__module__}.{kind.__name__}'
    assert again.value == error.args


def test_notes_that_somebody_added_to_an_error_do_not_hide_its_arguments() -> None:
    error = POSKeyError(OID)
    error.add_note('while loading the root')
    assert describe(error) == ('ZODB.POSException.POSKeyError', (OID,))


@pytest.mark.parametrize('name', [
    'os.system', 'builtins.eval', 'builtins.SystemExit', 'builtins.KeyboardInterrupt', 'KeyError',
    'ZODB.POSException.ConflictError.__init__', 'zeo.errors.ServerException', '', None, 5, ('a',), [],
])
def test_no_other_name_makes_anything(name: Any) -> None:
    again = recreate(name, ('echo pwned',))
    assert type(again) is ServerException
    assert isinstance(again.class_name, str)


@settings(max_examples=60)
@given(st.sampled_from(sorted(faults._RECREATED)),
       st.recursive(st.none() | st.integers() | st.text() | st.binary() | st.floats(),
                    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(
                        st.sampled_from(['message', 'oid', 'serials', 'class_name', '_errs', '_reason', '_oid',
                                         'p1', 'p2', 'p3', 'reason', 'args']), inner), max_leaves=6))
def test_whatever_a_server_says_about_an_error_it_can_be_raised_and_shown(name: str, value: Any) -> None:
    error = recreate(name, value)
    assert isinstance(error, Exception)
    str(error), repr(error)
    assert type(error) is ServerException or faults._RECREATED[name](value).__class__ is type(error)


@pytest.mark.parametrize('name, kind', [
    ('zeo.errors.ClientDisconnected', ClientDisconnected), ('zeo.errors.OutcomeUnknown', OutcomeUnknown),
    ('ZEO.Exceptions.ClientDisconnected', ClientDisconnected)])
def test_a_server_that_lost_its_own_server_is_as_good_as_lost(name: str, kind: type[Exception]) -> None:
    again = faults.recreate(name, ('no server',))
    assert type(again) is kind and str(again) == 'no server'
