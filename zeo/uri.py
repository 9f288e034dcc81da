"""URIs of storages for zodburi, which finds `resolve` by an entry point: ``tzeo://HOST:PORT?OPTION=...``.

    tzeo://localhost:9999                               a port of this machine
    tzeo://[::1]:9999,db2.example.com:9999?storage=main several servers of the same data
    tzeo:///var/run/zeo.sock?wait_timeout=5             a Unix domain socket

The options are those of `zeo.ClientStorage.ClientStorage`, and zodburi's for the database (such as
``connection_cache_size``), which are handed on.  Nothing here needs zodburi.
"""

import math
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl
from urllib.parse import unquote
from urllib.parse import urlsplit

from zeo.ClientStorage import ClientStorage

SCHEME = 'tzeo'

#: So begin the names of options that say more about TLS; without, they are those of `zeo.wire.certificates`.
TLS = 'ssl_'

_TRUE = {'1', 'on', 'true', 't', 'yes'}
_FALSE = {'0', 'off', 'false', 'f', 'no', ''}
_UNITS = {'kb': 1024, 'mb': 1024**2, 'gb': 1024**3}


def resolve(uri: str) -> tuple[Callable[[], ClientStorage], dict[str, str]]:
    """How to open the storage, and the options that are meant for the database.

    Raises `ValueError`, which says what is wrong with the URI.
    """
    parts = urlsplit(uri)
    if parts.scheme != SCHEME:
        raise ValueError(f'{uri}: this is not a {SCHEME}:// URI')
    try:
        addresses = _addresses(parts.netloc, unquote(parts.path))
        options, others = _options(dict(parse_qsl(parts.query, keep_blank_values=True)))
        tls = {name.removeprefix(TLS): options.pop(name) for name in list(options) if name.startswith(TLS)}
        if tls and options.setdefault('ssl', True):
            options['ssl'] = tls
    except ValueError as error:
        raise ValueError(f'{uri}: {error}') from None

    def factory() -> ClientStorage:
        return ClientStorage(addresses, **options)

    return factory, others


def _addresses(netloc: str, path: str) -> list[tuple[str, int] | str]:
    if not netloc:
        if not path.strip('/'):
            raise ValueError('there is neither HOST:PORT nor the path of a socket')
        return [path]
    if path.strip('/'):
        raise ValueError(f'there is both a host ({netloc}) and a path ({path}); three slashes begin a path')
    return [_host_and_port(text) for text in netloc.split(',')]


def _host_and_port(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(':')
    if not colon or not port.isdecimal() or not port.isascii() or '@' in host:
        raise ValueError(f'{text!r} is not of the form HOST:PORT')
    return unquote(host).removeprefix('[').removesuffix(']'), int(port)


def _options(words: dict[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Those of the storage, converted, and all others."""
    options = {}
    for name, convert in OPTIONS.items():
        if name in words:
            text = words.pop(name)
            try:
                options[name] = convert(text)
            except ValueError as error:
                raise ValueError(f'{name}={text}: {error}') from None
    return options, words


def _flag(text: str) -> bool:
    if text.lower() in _TRUE:
        return True
    if text.lower() in _FALSE:
        return False
    raise ValueError('give true or false')


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ValueError('give a number of seconds')
    return seconds


def _bytes(text: str) -> int:
    number, unit = text.strip().lower(), 1
    if number[-2:] in _UNITS:
        number, unit = number[:-2].strip(), _UNITS[number[-2:]]
    if not (number.isascii() and number.isdecimal()):
        raise ValueError('give a number of bytes, such as 20000000, 200MB or 1GB')
    return int(number) * unit


def _percent(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise ValueError('give a percentage')
    return int(text)


OPTIONS: dict[str, Callable[[str], Any]] = {
    'storage': str,
    'name': str,
    'cache_size': _bytes,
    'cache': str,
    'client': str,
    'var': str,
    'wait': _flag,
    'wait_for_server_on_startup': _flag,
    'wait_timeout': _seconds,
    'min_disconnect_poll': _seconds,
    'max_disconnect_poll': _seconds,
    'read_only': _flag,
    'read_only_fallback': _flag,
    'server_sync': _flag,
    'client_label': str,
    'start_over': _flag,
    'blob_dir': str,
    'shared_blob_dir': _flag,
    'blob_cache_size': _bytes,
    'blob_cache_size_check': _percent,
    'ssl': _flag,
    'ssl_certificate': str,
    'ssl_key': str,
    'ssl_password_file': str,
    'ssl_password_function': str,
    'ssl_authenticate': str,
    'ssl_check_hostname': _flag,
    'ssl_server_hostname': str,
}
