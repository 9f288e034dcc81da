"""What a session does beside its conversation, since it may take long: a few things at a time, the rest waits.

How much may wait is limited, in number and in size; what nobody will hear of any more is not begun.
"""

import threading
from collections import deque
from collections.abc import Callable

from ZODB.POSException import StorageError

from zeo.server.outbox import Outbox

#: How many jobs are done for one client at a time, and how many may wait.
HELPERS = 16
MOST_JOBS = 1000

#: How many bytes the requests may have, together, that wait or are being dealt with.
MOST_BYTES = 64 * 1024 * 1024

#: A job, the size of its request in bytes, and whether it is also done for who has left.
_Entry = tuple[Callable[[], None], int, bool]


class Jobs:
    """The jobs of one client, who hears of them through ``outbox``.

    Before each there is a call of ``wait_for_room``, which returns when the client has read of what it was
    sent before, or will never do so.  A job raises nothing.
    """

    def __init__(self, outbox: Outbox, wait_for_room: Callable[[], object]) -> None:
        self._outbox = outbox
        self._wait_for_room = wait_for_room
        # Guards all that follows; a leaf.
        self._mutex = threading.Lock()
        self._waiting: deque[_Entry] = deque()
        self._size = 0  # of all requests that wait or are being dealt with
        self._helpers = 0  # how many threads are at work

    def add(self, job: Callable[[], None], size: int, start: Callable[[Callable[[], None]], None], *,
            always: bool = False) -> None:
        """Have a job done soon.  ``start`` runs a function in a new thread.

        `ValueError` if too much is waiting already, `StorageError` if there can be no more threads.
        """
        entry = job, size, always
        with self._mutex:
            if len(self._waiting) >= MOST_JOBS:
                raise ValueError(f'more than {MOST_JOBS} requests that may take long are waiting')
            if self._size and self._size + size > MOST_BYTES:
                raise ValueError(f'requests that may take long are waiting, of {self._size} bytes')
            self._size += size
            self._waiting.append(entry)
            if self._helpers == HELPERS:
                return
            self._helpers += 1
        try:
            start(self._help)
        except RuntimeError as error:  # there can be no more threads now
            with self._mutex:
                self._helpers -= 1
                if entry not in self._waiting:
                    return  # another helper has taken it
                self._waiting.remove(entry)
                self._size -= size
            raise StorageError(f'the server cannot do that now: {error}') from None

    def _help(self) -> None:
        while True:
            with self._mutex:
                if not self._waiting:
                    self._helpers -= 1
                    return
                job, size, always = self._waiting.popleft()
            self._wait_for_room()
            if always or not self._outbox.gone:
                job()
            with self._mutex:
                self._size -= size
