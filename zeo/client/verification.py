"""What to do with a cache when a connection is made: keep, catch up, drop, or refuse.

Pure: nothing but tids in, a verdict out.
"""

from enum import Enum

from ZODB.utils import readable_tid_repr
from ZODB.utils import z64

from zeo.errors import ClientStorageError

__all__ = ['CacheIsNewer', 'Verdict', 'decide']


class Verdict(Enum):
    """What becomes of the cache."""

    START = 'nothing is known yet: valid as of the server\'s last tid'
    KEEP = 'nothing happened: valid as it is'
    CATCH_UP = 'ask the server what changed since'
    DOUBT = 'ask the server about each object, and serve what is proven to be current'
    DROP = 'of unknown age: start with an empty one'
    REFUSE = 'newer than the server: do not talk to that server'


class CacheIsNewer(ClientStorageError):
    """The server's last transaction is older than what the cache has already seen."""

    def __init__(self, cache_tid: bytes, server_tid: bytes) -> None:
        super().__init__(
            f'the cache is newer than the server: it is valid as of {readable_tid_repr(cache_tid)}, '
            f'the last transaction of the server is {readable_tid_repr(server_tid)}.  Either this is '
            'the wrong server, or its database was restored from a backup; in that case open the '
            'storage once with start_over=True, which forgets what is cached')
        self.cache_tid = cache_tid
        self.server_tid = server_tid

    def __reduce__(self) -> tuple[type, tuple[bytes, bytes]]:
        return CacheIsNewer, (self.cache_tid, self.server_tid)


def decide(cache_tid: bytes, empty: bool, server_tid: bytes) -> Verdict:
    """The verdict on a cache that is valid as of ``cache_tid`` (`z64`: not known).

    ``empty`` says that nothing is cached; that saves nobody from catching up, because ZODB's object
    caches may hold what this one has evicted.
    """
    if cache_tid == z64:
        return Verdict.START if empty else Verdict.DROP
    if cache_tid == server_tid:
        return Verdict.KEEP
    if cache_tid < server_tid:
        return Verdict.CATCH_UP
    return Verdict.REFUSE
