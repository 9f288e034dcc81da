"""How long things took, counted by classes of duration."""

from bisect import bisect_left
from collections.abc import Iterable
from typing import Any

#: The longest duration of each class, in seconds; longer ones have a class of their own.
BOUNDS = (25e-6, 50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 50e-3, .1, .25, .5, 1., 2.5,
          5., 10.)


class Histogram:
    """Counts of durations.  One thread at a time observes; any thread may look, and sees a moment's state."""

    __slots__ = ('counts', 'seconds')

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)
        self.seconds = 0.0  # all of them together

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.seconds += seconds

    def plus(self, others: Iterable['Histogram']) -> 'Histogram':
        """The sum of this one and others."""
        total = Histogram()
        for each in (self, *others):
            total.counts = [one + other for one, other in zip(total.counts, each.counts)]
            total.seconds += each.seconds
        return total

    def figures(self) -> dict[str, Any]:
        """As plain values: how many took at most so long, not counting those of the class before."""
        return {'bounds': list(BOUNDS), 'counts': list(self.counts), 'seconds': self.seconds}
