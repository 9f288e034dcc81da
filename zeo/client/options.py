"""What a user may say when a storage is opened, looked at before anything is opened.

Pure.  A mistake is a `TypeError` or `ValueError` that names the option and says what it takes.
"""

import math
import os
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

from zeo.client.cache import Cache

#: No cache file may be longer, in bytes: its index in memory would take more than most machines have.
LARGEST_CACHE = 2**40

_MOST_BYTES = 2**62


def check_options(given: Mapping[str, Any]) -> None:
    """Raise if an option that is known here, by the name it has for users, has no possible value."""
    for name, check in CHECKS.items():
        if name in given:
            check(name, given[name])


def _text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise TypeError(f'{name} is text, not {value!r}')
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f'{name} is text that can be encoded, not {value!r} ({error.reason})') from None


def _path(name: str, value: Any) -> None:
    try:
        path = os.fsdecode(value)
    except TypeError:
        raise TypeError(f'{name} is the path of a file or folder, not {value!r}') from None
    if not path or '\0' in path:
        raise ValueError(f'{name} is the path of a file or folder, not {value!r}')


def _cache(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, Cache):
        _path(name, value)


def _flag(name: str, value: Any) -> None:
    if not isinstance(value, int):
        raise TypeError(f'{name} is true or false, not {value!r}')


def _seconds(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f'{name} is a number of seconds, not {value!r}')
    if not value >= 0:
        raise ValueError(f'{name} is a number of seconds, not {value!r}')


def _pause(name: str, value: Any) -> None:
    _seconds(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f'{name} is a number of seconds greater than 0, not {value!r}')


def _whole(what: str, limit: int) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f'{name} is {what} (an integer), not {value!r}')
        if not 0 <= value <= limit:
            raise ValueError(f'{name} is {what}, 0 to {limit}, not {value!r}')

    return check


def _maybe(check: Callable[[str, Any], None]) -> Callable[[str, Any], None]:
    def check_unless_none(name: str, value: Any) -> None:
        if value is not None:
            check(name, value)

    return check_unless_none


CHECKS: dict[str, Callable[[str, Any], None]] = {
    'storage': _text,
    'cache_size': _whole('a number of bytes', LARGEST_CACHE),
    'name': _text,
    'wait_timeout': _maybe(_seconds),
    'min_disconnect_poll': _pause,
    'max_disconnect_poll': _pause,
    'wait': _flag,
    'wait_for_server_on_startup': _maybe(_flag),
    'read_only': _flag,
    'read_only_fallback': _flag,
    'client_label': _maybe(_text),
    'client': _maybe(_text),
    'cache': _cache,
    'var': _maybe(_path),
    'server_sync': _flag,
    'start_over': _flag,
    'blob_dir': _maybe(_path),
    'shared_blob_dir': _flag,
    'blob_cache_size': _maybe(_whole('a number of bytes', _MOST_BYTES)),
    'blob_cache_size_check': _whole('a percentage', 99),
    'ssl_server_hostname': _maybe(_text),
}
