"""Exceptions to names and values, and back.

An error crosses the wire as the dotted name of its class and its attributes (or its arguments).  Only
the classes in `_RECREATED` are made again on the other side, each by a function of its own that looks
at plain values; every other error becomes a `ServerException` that shows what the server said.
"""

from collections.abc import Callable
from typing import Any

from ZODB import POSException

from zeo.errors import ClientDisconnected
from zeo.errors import OutcomeUnknown
from zeo.errors import ServerException

#: As an error appears in a reply.
Fault = tuple[str, Any]


def describe(error: BaseException) -> Fault:
    """The error as plain values: ``(class name, attributes or arguments)``.

    Live objects, such as the storage in a `StorageTransactionError`, appear as the names of their
    classes; no code of theirs is called.
    """
    kind = type(error)
    attributes = {name: value for name, value in error.__dict__.items() if name != '__notes__'}
    return f'{kind.__module__}.{kind.__name__}', _plain(attributes or error.args)


def _plain(value: Any, depth: int = 10) -> Any:
    """Errors within an error become what they say (`MultipleUndoErrors` holds `UndoError` objects)."""
    kind = type(value)
    if value is None or isinstance(value, (str, bytes, int, float)):
        return value
    if isinstance(value, BaseException):
        return str(value)
    if depth and kind is dict:
        return {_plain(key, depth - 1): _plain(item, depth - 1) for key, item in value.items()}
    if depth and kind in (list, tuple, set, frozenset):
        return kind(_plain(item, depth - 1) for item in value)
    return f'<{kind.__module__}.{kind.__qualname__}>'


def recreate(class_name: Any, value: Any = ()) -> Exception:
    """The exception that an error reply stands for; never raises, whatever the reply contains."""
    make = _RECREATED.get(class_name) if isinstance(class_name, str) else None
    if make is not None:
        try:
            error = make(value)
            str(error)  # some classes look at their values only now
            return error
        except Exception:
            pass  # not of the form that such errors have: show it as it is
    return ServerException(class_name if isinstance(class_name, str) else repr(class_name), value)


def _arguments(kind: type[Exception]) -> Callable[[Any], Exception]:
    def make(value: Any) -> Exception:
        if isinstance(value, dict):
            value = value.get('args', ())
        if not isinstance(value, (tuple, list)):
            value = (value,)
        return kind(*value)
    return make


def _conflict(kind: Callable[..., Exception]) -> Callable[[Any], Exception]:
    def make(value: Any) -> Exception:
        if not isinstance(value, dict):
            return kind(*value)
        serials = value.get('serials')
        error = kind(message=value.get('message'), oid=value.get('oid'),
                     serials=tuple(serials) if serials is not None else None)
        error.class_name = value.get('class_name')  # type: ignore[attr-defined]
        return error
    return make


def _btrees_conflict(value: Any) -> Exception:
    error: Exception = POSException.BTreesConflictError(
        *(value.get(key) for key in ('p1', 'p2', 'p3', 'reason')))
    return error


def _multiple_undo_errors(value: Any) -> Exception:
    errors = value['_errs'] if isinstance(value, dict) else value[0]
    error: Exception = POSException.MultipleUndoErrors([tuple(each) for each in errors])
    return error


def _undo_error(value: Any) -> Exception:
    error: Exception = POSException.UndoError(value.get('_reason'), value.get('_oid'))
    return error


_RECREATED: dict[str, Callable[[Any], Exception]] = {
    'ZODB.POSException.POSKeyError': _arguments(POSException.POSKeyError),
    'ZODB.POSException.ConflictError': _conflict(POSException.ConflictError),
    'ZODB.POSException.ReadConflictError': _conflict(POSException.ReadConflictError),
    'ZODB.POSException.BTreesConflictError': _btrees_conflict,
    'ZODB.POSException.MultipleUndoErrors': _multiple_undo_errors,
    'ZODB.POSException.UndoError': _undo_error,
    'ZODB.POSException.ReadOnlyError': _arguments(POSException.ReadOnlyError),
    'ZODB.POSException.StorageTransactionError':
        _arguments(POSException.StorageTransactionError),
    'ZODB.POSException.Unsupported': _arguments(POSException.Unsupported),
    # From a server whose storage is itself a client, and has lost its own server.
    'zeo.errors.ClientDisconnected': _arguments(ClientDisconnected),
    'zeo.errors.OutcomeUnknown': _arguments(OutcomeUnknown),
    'ZEO.Exceptions.ClientDisconnected': _arguments(ClientDisconnected),
    'builtins.KeyError': _arguments(KeyError),
    'exceptions.KeyError': _arguments(KeyError),
    'builtins.TypeError': _arguments(TypeError),
    'exceptions.TypeError': _arguments(TypeError),
}
