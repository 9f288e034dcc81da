"""From text to values: what the words of a command line, and the keys of a configuration file, may be.

Each function takes the text and returns the value, or raises `Wrong`, which names the text and says what
to do.  Nothing here touches the machine.
"""

import argparse
import math
from typing import NamedTuple

from zeo.server.roles import Role
from zeo.server.roles import Rule


#: Permissions of a socket file: the server's user and group may connect, nobody else.
DEFAULT_SOCKET_MODE = 0o660


class Wrong(argparse.ArgumentTypeError, ValueError):
    """The text is no such value.  `argparse` knows it by the one base, ZConfig by the other."""


class StorageName(NamedTuple):
    """Where a storage comes from: ``-S name=module:attribute``."""

    name: str
    module: str
    attribute: str

    def __str__(self) -> str:
        return f'-S {self.name}={self.module}:{self.attribute}'


def port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text[:6]) <= 65535 and len(text) <= 5):
        raise Wrong(f'{text!r} is no port; give a number from 0 to 65535')
    return int(text)


def address(text: str) -> tuple[str, int] | str:
    """An address to listen on: ``host:port``, ``[host]:port``, ``:port`` or ``port`` for all of this
    machine's (the host is then ``''``), or, with a slash in it, the path of a Unix domain socket.
    """
    if '/' in text:
        return path(text)
    host, _, number = text.rpartition(':')
    inner = host.removeprefix('[').removesuffix(']')
    try:
        if (':' in inner) != (inner != host):
            raise Wrong(text)
        return inner, port(number)
    except Wrong:
        raise Wrong(f'{text!r} is no address; give host:port, a port, or the path of a socket file with'
                    ' a slash in it') from None


def monitor(text: str) -> tuple[str, int]:
    """Where the monitor listens: ``host:port``, or a port for this machine only."""
    try:
        found = address(text)
    except Wrong:
        found = text
    if isinstance(found, str):
        raise Wrong(f'{text!r} is no address of a web server; give a port, or host:port') from None
    return found[0] or 'localhost', found[1]


def count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and int(text) > 0):
        raise Wrong(f'{text!r} is no number of transactions; give 1 or more')
    return int(text)


def seconds(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 <= found < math.inf:
        raise Wrong(f'{text!r} is no number of seconds; give 0 or more')
    return found


def some_seconds(text: str) -> float:
    found = seconds(text)
    if not found:
        raise Wrong('0 seconds are too few; give more, or leave the option out')
    return found


def path(text: str) -> str:
    if not text or '\0' in text:
        raise Wrong(f'{text!r} is no file name')
    return text


def mode(text: str) -> int:
    """Permissions of a socket file, in octal digits."""
    if not (len(text) <= 4 and text and not text.strip('01234567') and int(text, 8) <= 0o777):
        raise Wrong(f'{text!r} are no permissions; give octal digits such as 660 or 600')
    return int(text, 8)


def size(text: str) -> int:
    """In bytes: ``1000``, ``64KB``, ``10MB``, ``2GB``."""
    digits = text.rstrip('kmgbKMGB')
    unit = {'': 1, 'KB': 1024, 'MB': 1024**2, 'GB': 1024**3}.get(text[len(digits):].upper())
    if unit is None or not (digits.isascii() and digits.isdigit() and len(digits) <= 12 and int(digits)):
        raise Wrong(f'{text!r} is no size; give a number of bytes, or one with KB, MB or GB')
    return int(digits) * unit


def message_size(text: str) -> int:
    """The same, for the longest message: what introduces a client has room in it."""
    found = size(text)
    if found < 64 * 1024:
        raise Wrong(f'{text!r}: no client could work with messages as short as that; give 64KB or more')
    return found


def connections(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and int(text) > 0):
        raise Wrong(f'{text!r} is no number of connections; give 1 or more')
    return int(text)


def role(text: str) -> Rule:
    """``read=ADDRESS``, ``write=ADDRESS``, ``admin=ADDRESS``, or in place of the address ``cn:NAME``."""
    name, _, who = text.partition('=')
    found = {'read': Role.READ, 'write': Role.WRITE, 'admin': Role.ADMIN}.get(name)
    if found is None or not who.removeprefix('cn:'):
        raise Wrong(f'{text!r} is no role; give read, write or admin, = and an address that the server'
                    ' listens on, or cn: and the name in a certificate')
    if who.startswith('cn:'):
        return Rule(found, certificate=who.removeprefix('cn:'))
    where = address(who)
    return Rule(found, path=where) if isinstance(where, str) else Rule(found, host=where[0], port=where[1])


def storage(text: str) -> StorageName:
    name, _, place = text.partition('=')
    module, _, attribute = place.rpartition(':')
    if not (name and module and attribute):
        raise Wrong(f'{text!r} is not of the form NAME=MODULE:ATTRIBUTE, such as 1=storages:main')
    return StorageName(name, module, attribute)
