"""What can be told about a server to those who look after it: plain values, for the ``figures`` method."""

import time
from collections.abc import Mapping
from typing import Any

from zeo.server.served import Served
from zeo.version import __version__


def of_server(storages: Mapping[str, Served]) -> dict[str, Any]:
    """All that is known now.  Times are in seconds since the epoch, by the server's clock; sizes in bytes."""
    return {'version': __version__, 'now': time.time(),
            'storages': {name: of_storage(served) for name, served in storages.items()}}


def of_storage(served: Served) -> dict[str, Any]:
    """Counts, sizes, the commit lock, the pack in progress, clients.  What a storage cannot tell is None."""
    sizes: dict[str, int | None]
    try:
        sizes = dict(served.sizes())
    except Exception:  # it may be a client of a server that is gone
        sizes = {'length': None, 'size': None}
    traffic = served.traffic()
    counts = served.statistics
    holder, since = served.lock.holder, served.lock.since
    return {
        **served.status(), **sizes,
        'started': counts.started,
        'received': traffic.received,
        'sent': traffic.sent,
        'durations': {'load': traffic.loads.figures(), 'vote_wait': counts.vote_wait.figures(),
                      'finish': counts.finish.figures()},
        'room': served.packing.room,
        'pack': served.packing.progress,
        'holder': None if holder is None or since is None else {
            'client': getattr(holder, 'client', ''), 'since': since},
        'queue': [getattr(waiter, 'client', '') for waiter in served.lock.queue],
        'clients': [each.own_figures() for each in list(served.sessions)],
    }
