"""zeo.server.histogram."""

import pytest

from zeo.server.histogram import BOUNDS
from zeo.server.histogram import Histogram


@pytest.mark.parametrize('seconds, place', [
    (0, 0), (BOUNDS[0], 0), (BOUNDS[0] * 1.001, 1), (.001, BOUNDS.index(.001)), (10, len(BOUNDS) - 1),
    (10.01, len(BOUNDS)), (1e9, len(BOUNDS))])
def test_a_duration_belongs_to_the_class_with_the_next_bound(seconds: float, place: int) -> None:
    histogram = Histogram()
    histogram.observe(seconds)
    assert [place for place, count in enumerate(histogram.counts) if count] == [place]
    assert histogram.seconds == seconds


def test_a_sum_has_all_of_them_and_leaves_its_parts_alone() -> None:
    one, two, three = Histogram(), Histogram(), Histogram()
    for histogram, seconds in (one, .25), (two, .25), (two, 20), (three, 0):
        histogram.observe(seconds)
    told = one.plus([two, three]).figures()
    assert told['seconds'] == 20.5 and sum(told['counts']) == 4
    assert dict(zip(told['bounds'], told['counts']))[.25] == 2 and told['counts'][-1] == 1
    assert sum(one.counts) == 1 and one.seconds == .25
