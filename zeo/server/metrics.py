"""A server's figures as OpenMetrics text, for Prometheus and its like; needs ``prometheus-client``."""

from collections.abc import Callable
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

try:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import CounterMetricFamily
    from prometheus_client.core import GaugeMetricFamily
    from prometheus_client.core import HistogramMetricFamily
    from prometheus_client.core import InfoMetricFamily
    from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST
    from prometheus_client.openmetrics.exposition import generate_latest
except ImportError:
    AVAILABLE = False
else:
    AVAILABLE = True
    CONTENT_TYPE: str = CONTENT_TYPE_LATEST

MISSING = "/metrics needs prometheus-client: pip install 'threaded-zeo[monitor]'"

Figures = dict[str, Any]

#: Name, what it counts, and how it is found among a storage's figures.
COUNTERS: tuple[tuple[str, str, str], ...] = (
    ('loads', 'Revisions asked for', 'loads'),
    ('stores', 'Records stored', 'stores'),
    ('commits', 'Transactions committed', 'commits'),
    ('aborts', 'Transactions aborted', 'aborts'),
    ('conflicts', 'Votes that met a conflict which was not resolved', 'conflicts'),
    ('conflicts_resolved', 'Conflicts that were resolved', 'conflicts_resolved'),
    ('received_bytes', 'Bytes received from clients', 'received'),
    ('sent_bytes', 'Bytes sent to clients', 'sent'),
)

#: The same for what goes up and down; None is not told.
GAUGES: tuple[tuple[str, str, Callable[[Figures, float], float | None]], ...] = (
    ('size_bytes', 'Size of the storage', lambda storage, now: storage['size']),
    ('objects', 'Objects in the storage', lambda storage, now: storage['length']),
    ('disk_free_bytes', 'Room on the disk of the storage', lambda storage, now: storage['room']),
    ('clients', 'Clients that are connected', lambda storage, now: len(storage['clients'])),
    ('transactions', 'Transactions in progress', lambda storage, now: storage['active_txns']),
    ('waiting', 'Transactions that wait for the commit lock', lambda storage, now: storage['waiting']),
    ('lock_held_seconds', 'For how long the commit lock has been held',
     lambda storage, now: now - storage['holder']['since'] if storage['holder'] else 0),
    ('unsent_bytes', 'Bytes that clients have not read yet',
     lambda storage, now: sum(each['unsent'] for each in storage['clients'])),
    ('behind_transactions', 'Transactions that the client farthest behind has not been told of',
     lambda storage, now: max((each['behind'] for each in storage['clients']), default=0)),
    ('pack_ratio', 'How much of the pack in progress is done',
     lambda storage, now: storage['pack'] and storage['pack']['share']),
    ('start_time_seconds', 'When the server was started', lambda storage, now: storage['started']),
)

#: Name of a duration among the figures, and what it is.
DURATIONS = {
    'load': 'How long it took to answer a load',
    'vote_wait': 'How long a vote waited for the commit lock',
    'finish': 'How long it took to finish a transaction',
}


def exposition(figures: Figures) -> bytes:
    """The figures of `zeo.server.figures.of_server` as OpenMetrics text."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(figures))
    text: bytes = generate_latest(registry)
    return text


class _Collector:
    def __init__(self, figures: Figures) -> None:
        self._figures = figures

    def collect(self) -> Iterator[Any]:
        storages = self._figures['storages'].items()
        now = self._figures['now']
        version = InfoMetricFamily('zeo', 'The server')
        version.add_metric([], {'version': self._figures['version']})
        yield version
        for name, words, key in COUNTERS:
            counter = CounterMetricFamily(f'zeo_{name}', words, labels=['storage'])
            for storage, values in storages:
                counter.add_metric([storage], values[key])
            yield counter
        for name, words, value in GAUGES:
            gauge = GaugeMetricFamily(f'zeo_{name}', words, labels=['storage'])
            for storage, values in storages:
                if (found := value(values, now)) is not None:
                    gauge.add_metric([storage], found)
            yield gauge
        for name, words in DURATIONS.items():
            histogram = HistogramMetricFamily(f'zeo_{name}_seconds', words, labels=['storage'])
            for storage, values in storages:
                duration = values['durations'][name]
                names = [*map(repr, duration['bounds']), '+Inf']
                histogram.add_metric([storage], list(zip(names, accumulate(duration['counts']))),
                                     sum_value=duration['seconds'])
            yield histogram
