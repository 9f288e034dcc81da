"""What is counted: of a storage, and of the traffic with its clients."""

import time
from collections.abc import Iterable
from typing import NamedTuple

from zeo.server.histogram import Histogram


class Statistics:
    """Counts since the server started; each is changed under the commit lock or is only indicative."""

    def __init__(self) -> None:
        self.started = time.time()
        self.loads = 0
        self.stores = 0
        self.commits = 0
        self.aborts = 0
        self.conflicts = 0
        self.conflicts_resolved = 0
        # How long votes waited for the commit lock, and finishing took; counted under that lock.
        self.vote_wait = Histogram()
        self.finish = Histogram()


class Traffic(NamedTuple):
    """Bytes received from clients and sent to them, and how long loads took, where that is measured."""

    received: int
    sent: int
    loads: Histogram

    def plus(self, others: 'Iterable[Traffic]') -> 'Traffic':
        all_of_them = [self, *others]
        return Traffic(sum(each.received for each in all_of_them), sum(each.sent for each in all_of_them),
                       Histogram().plus(each.loads for each in all_of_them))
