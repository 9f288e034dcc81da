"""Chooses the tids of transactions, before the storage would.

A tid is a time: its first four bytes say which minute, the others how much of that has passed, as
`persistent.TimeStamp` has it.
"""

import random
import time

from persistent.TimeStamp import TimeStamp
from ZODB.utils import newTid
from ZODB.utils import u64
from ZODB.utils import z64


class Tids:
    """One later than the other, for one storage.  Belongs to who has the commit lock."""

    def __init__(self) -> None:
        self._last: bytes = z64  # that was chosen
        self._minute = -60.0  # time.time() at which that minute began
        self._head = b''  # how its tids begin

    def choose(self, last_tid: bytes) -> bytes:
        """That of now; never one that was chosen before, nor one up to the storage's ``last_tid``."""
        after = max(last_tid, self._last)
        chosen = self._now()
        if chosen <= after:
            chosen = newTid(after)
            if self._last == z64 and u64(chosen) == u64(after) + 1:
                # The clock is behind the storage, and a server before this one, which was killed, may have
                # chosen the same for a transaction that is not committed.
                chosen = chosen[:4] + random.randint(int.from_bytes(chosen[4:], 'big'), 2**32 - 1).to_bytes(4, 'big')
        self._last = chosen
        return chosen

    def _now(self) -> bytes:
        """What `newTid` says, but the calendar is asked once a minute only, which takes longer than all the rest."""
        now = time.time()
        if not 0 <= now - self._minute < 60:
            self._minute = now // 60 * 60
            self._head = TimeStamp(*time.gmtime(now)[:5], 0).raw()[:4]
        return self._head + int((now - self._minute) / 60 * 2**32).to_bytes(4, 'big')
