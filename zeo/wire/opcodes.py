"""Pieces of pickle: what nearly all messages are made of, written without a pickler."""

import pickle
from collections.abc import Sequence
from struct import Struct
from typing import Any

from zeo.wire import pickles

#: Eight bytes follow: an oid or a tid.
EIGHT = b'C\x08'

_int4 = Struct('<i').pack
length4 = Struct('<I').pack
length4_at = Struct('<I').unpack_from


def pickled_bytes_head(length: int) -> bytes:
    """What stands before so many bytes."""
    return b'C%c' % length if length < 256 else b'B' + length4(length)


def pickled_int(value: int) -> bytes:
    """A number, as ZEO writes it but for a few of two bytes."""
    if 0 <= value < 256:
        return b'K%c' % value
    if -2**31 <= value < 2**31:
        return b'J' + _int4(value)
    return pickle.dumps(value, pickles.PICKLE_PROTOCOL)[2:-1]


#: The opcodes of integers, by their size.
INTS = {2: 0x4b, 3: 0x4d, 5: 0x4a}
assert [pickled_int(value)[0] for value in (0, -1)] == [INTS[2], INTS[5]]


def pickled_text(text: str) -> bytes:
    """A text."""
    encoded = text.encode()
    return b'X' + length4(len(encoded)) + encoded


def pickled_args(args: Sequence[Any]) -> bytes:
    """The tuple of these.  Raises what `pickles.dumps` raises."""
    if not args:
        return b')'
    if len(args) == 1 and type(args[0]) is int:  # the id of a transaction, mostly
        return pickled_int(args[0]) + b'\x85'
    pickled = [_pickled_plain(each) for each in args]
    if None in pickled:
        return pickles.dumps(tuple(args))[2:-1]
    return b'(%bt' % b''.join(pickled)  # type: ignore[arg-type]


def _pickled_plain(value: Any) -> bytes | None:
    """What nearly all arguments are, written without a memo: then no reader needs the long proof."""
    if value is None:
        return b'N'
    kind = type(value)
    if kind is int:
        return pickled_int(value)
    if kind is bytes and len(value) < 2**31:
        return b'%b%b' % (pickled_bytes_head(len(value)), value)
    if kind is str and value.isascii():
        return pickled_text(value)
    if kind is bool:
        return b'\x88' if value else b'\x89'
    if kind is dict and not value:  # the extension of a transaction
        return b'}'
    if kind is list and not value:  # what most votes report
        return b']'
    return None
