"""The exceptions: what may be caught as what, and what they say."""

import pickle

import pytest
from transaction.interfaces import TransientError
from ZODB.POSException import POSError
from ZODB.POSException import StorageError

from zeo import errors
from zeo.errors import ClientDisconnected
from zeo.errors import ClientStorageError
from zeo.errors import OutcomeUnknown
from zeo.errors import ProtocolError
from zeo.errors import ServerException


@pytest.mark.parametrize('name', errors.__all__)
def test_whoever_catches_storage_errors_catches_all_of_these(name: str) -> None:
    assert issubclass(getattr(errors, name), ClientStorageError)
    assert issubclass(ClientStorageError, StorageError) and issubclass(StorageError, POSError)


def test_a_transaction_that_lost_its_connection_may_be_tried_again() -> None:
    assert issubclass(ClientDisconnected, TransientError)


def test_an_unknown_outcome_is_a_lost_connection_too() -> None:
    assert issubclass(OutcomeUnknown, ClientDisconnected)


@pytest.mark.parametrize('kind', [ProtocolError, ServerException])
def test_what_will_not_go_away_is_not_to_be_tried_again(kind: type[Exception]) -> None:
    assert not issubclass(kind, TransientError)


@pytest.mark.parametrize('value, shown', [
    ((), 'builtins.OSError'),
    ((28, 'No space left on device'), 'builtins.OSError: 28, No space left on device'),
    ({'_reason': 'too late', '_oid': None}, "builtins.OSError: _reason='too late', _oid=None"),
    ('odd', "builtins.OSError: 'odd'"),
    ([1, 2], 'builtins.OSError: [1, 2]'),
])
def test_a_server_exception_shows_what_the_server_said(value: object, shown: str) -> None:
    error = ServerException('builtins.OSError', value)
    assert (error.class_name, error.value) == ('builtins.OSError', value)
    assert str(error) == shown


def test_a_server_exception_can_be_pickled() -> None:
    again = pickle.loads(pickle.dumps(ServerException('builtins.OSError', (28,))))
    assert (again.class_name, again.value, str(again)) == ('builtins.OSError', (28,), 'builtins.OSError: 28')
