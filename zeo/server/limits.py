"""How much one client may have of the server, and who has to leave if there are too many.

Depth and number of parts of a message are limited as well, where messages are read (`zeo.wire.pickles`).
"""

import resource
import threading
from collections import Counter
from collections.abc import Hashable
from typing import NamedTuple

from ZODB.POSException import StorageError

#: The longest frame in bytes that a client may send before it is registered.
FIRST_FRAMES = 64 * 1024

#: The same for a registered client that may only read.
READERS_FRAMES = 1024 * 1024

#: So many files the process may open for other things than connections, as far as it may open any.
FILES_BESIDE = 100


class Limits(NamedTuple):
    """The options of these names; sizes are in bytes, times in seconds, None is no limit."""

    max_message: int = 1024**3
    max_transaction: int = 32 * 1024**3
    max_connections: int = 5000
    max_connections_per_address: int | None = None
    registration_timeout: float = 30.0
    idle_timeout: float | None = None


class TooLarge(StorageError):  # type: ignore[misc]
    """A transaction has more bytes than it may."""


class Full(Exception):
    """Nobody can make room for another connection; the text says which limit was reached."""


def files_for_connections() -> int:
    """How many connections the process can have, with the files that it may open."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**31 if files == resource.RLIM_INFINITY else files - min(FILES_BESIDE, files // 4)


def files_for_iterators(connections: int) -> int:
    """How many iterators, each with a file of its own, may be open beside so many connections."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return 2**31
    return max(min(FILES_BESIDE, files // 4), files - connections - FILES_BESIDE) // 2


class Allowance:
    """So many of something for all clients together.  Any thread may call the methods, which never wait."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._mutex = threading.Lock()  # guards `_used`; a leaf
        self._used = 0

    def take(self) -> bool:
        """Whether there was one more."""
        with self._mutex:
            if self._used >= self.most:
                return False
            self._used += 1
            return True

    def give_back(self) -> None:
        with self._mutex:
            self._used -= 1


class Door:
    """Who is inside.  Strangers, who have not registered yet, make room for others; nobody else does.

    So half-open connections, however many, keep nobody out.  Not thread safe: `StorageServer` guards it.
    """

    def __init__(self, most: int, most_per_address: int | None) -> None:
        self.most = most
        self._most_per_address = most_per_address
        self._inside: dict[Hashable, str | None] = {}  # guests and their addresses
        self._at: Counter[str] = Counter()  # how many of them, by address
        self._strangers: dict[Hashable, None] = {}  # those of them who have not registered, the oldest first

    def enter(self, guest: Hashable, address: str | None) -> Hashable | None:
        """Let somebody in; returns who has to leave for it, if anybody.

        ``address`` is None where addresses do not count.  Raises `Full`.
        """
        leaving = None
        if address is not None and self._most_per_address is not None \
                and self._at[address] >= self._most_per_address:
            leaving = next((each for each in self._strangers if self._inside[each] == address), None)
            if leaving is None:
                raise Full(f'there are {self._most_per_address} connections from this address')
        elif len(self._inside) >= self.most:
            leaving = next(iter(self._strangers), None)
            if leaving is None:
                raise Full(f'there are {self.most} connections')
        if leaving is not None:
            self.leave(leaving)
        self._inside[guest] = address
        self._strangers[guest] = None
        if address is not None:
            self._at[address] += 1
        return leaving

    def registered(self, guest: Hashable) -> None:
        """It is no stranger any more, unless it had to leave a moment ago."""
        self._strangers.pop(guest, None)

    def leave(self, guest: Hashable) -> None:
        """It has left, or is about to."""
        self._strangers.pop(guest, None)
        address = self._inside.pop(guest, None)
        if address is not None:
            self._at[address] -= 1
            if not self._at[address]:
                del self._at[address]
