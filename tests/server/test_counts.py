"""What is counted."""

import time

from zeo.server.counts import Statistics
from zeo.server.counts import Traffic
from zeo.server.histogram import Histogram


def test_counting_begins_at_nothing_and_now() -> None:
    before = time.time()
    counts = Statistics()
    assert before <= counts.started <= time.time()
    assert not any(value for name, value in vars(counts).items() if type(value) is int)


def test_the_traffic_of_many_is_the_sum_of_each() -> None:
    loads = [Histogram() for _ in range(3)]
    for each, seconds in zip(loads, (.001, .1, 2.)):
        each.observe(seconds)
    one, two, three = (Traffic(number, 10 * number, each) for number, each in enumerate(loads, 1))
    whole = one.plus([two, three])
    assert whole[:2] == (6, 60)
    assert whole.loads.figures() == loads[0].plus(loads[1:]).figures()
    assert one[:2] == (1, 10) and one.plus([])[:2] == (1, 10)
