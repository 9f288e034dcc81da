"""What a client may pass to a method: the values that are taken, and errors that say what is wrong with others."""

from typing import Any

from ZODB.utils import z64

#: The largest number that may be asked for of anything.
MOST = 2**62


def as_oid(value: Any) -> bytes:
    if not isinstance(value, bytes) or len(value) != 8:
        raise ValueError('an oid is 8 bytes')
    return value


def as_new_oid(value: Any) -> bytes:
    """An oid under which something is stored: storages give later ones to new objects."""
    if as_oid(value)[:4] == b'\xff\xff\xff\xff':
        raise ValueError('an oid that leaves no room for later ones')
    return value  # type: ignore[no-any-return]


def as_tid(value: Any) -> bytes:
    if not isinstance(value, bytes) or len(value) != 8:
        raise ValueError('a tid is 8 bytes')
    return value


def as_serial(value: Any) -> bytes:
    """Of the revision that was changed.  Stock clients pass on ZODB's None, or text, for a new object."""
    return z64 if value is None or value == '\0' * 8 else as_tid(value)


def as_number(value: Any) -> int:
    if not isinstance(value, int) or abs(value) > MOST:
        raise TypeError('a whole number of usual size is expected')
    return value


def as_record(value: Any) -> bytes:
    if not isinstance(value, bytes):
        raise TypeError('a record is bytes')
    if not value:
        raise ValueError('a record is never empty')  # it would make a FileStorage unreadable
    return value


def as_bytes(value: Any) -> bytes:
    if isinstance(value, str):
        return value.encode('utf-8', 'surrogateescape')
    if not isinstance(value, bytes):
        raise TypeError('bytes or text is expected')
    return value
