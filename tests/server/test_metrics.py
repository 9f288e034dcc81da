"""zeo.server.metrics: what monitoring reads is what the figures say."""

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from prometheus_client.openmetrics.parser import text_string_to_metric_families
from ZODB.FileStorage import FileStorage
from ZODB.MappingStorage import MappingStorage

from tests.server.talk import SessionPeer
from tests.server.talk import oid
from tests.system.servers import ROOT
from zeo.server import figures
from zeo.server import metrics
from zeo.server.histogram import BOUNDS
from zeo.server.session import MeasuredSession


def read(text: bytes) -> dict[tuple[str, str, str], float]:
    """Values by name, storage and `le`, as Prometheus' own parser finds them."""
    return {(sample.name, sample.labels.get('storage', ''), sample.labels.get('le', '')): sample.value
            for family in text_string_to_metric_families(text.decode()) for sample in family.samples}


def test_it_tells_what_is_in_the_figures(
        file_storage: FileStorage, serve: Callable[..., Any], connect: Callable[..., SessionPeer]) -> None:
    served = serve(file_storage)
    one, two = connect(served, session=MeasuredSession), connect(served)
    tid = one.commit(oid(1), b'record')
    one.load(oid(1), tid)
    one.begin(7, (oid(2), bytes(8), b'held'))
    one.call('vote', 7)
    told = figures.of_server({'1': served})
    values = read(metrics.exposition(told))
    storage = told['storages']['1']
    for name, key in ('loads_total', 'loads'), ('stores_total', 'stores'), ('commits_total', 'commits'), \
            ('aborts_total', 'aborts'), ('received_bytes_total', 'received'), ('sent_bytes_total', 'sent'), \
            ('size_bytes', 'size'), ('objects', 'length'), ('transactions', 'active_txns'), \
            ('disk_free_bytes', 'room'), ('waiting', 'waiting'), ('start_time_seconds', 'started'):
        assert values[f'zeo_{name}', '1', ''] == storage[key], name
    assert values['zeo_commits_total', '1', ''] == values['zeo_loads_total', '1', ''] == 1
    assert values['zeo_clients', '1', ''] == 2
    assert 0 < values['zeo_lock_held_seconds', '1', ''] < 60
    assert ('zeo_pack_ratio', '1', '') not in values
    for name, count in ('load', 1), ('vote_wait', 2), ('finish', 1):
        assert values[f'zeo_{name}_seconds_count', '1', ''] == count, name
        assert values[f'zeo_{name}_seconds_bucket', '1', '+Inf'] == count
        assert 0 < values[f'zeo_{name}_seconds_sum', '1', ''] < 60
        buckets = [values[f'zeo_{name}_seconds_bucket', '1', repr(bound)] for bound in BOUNDS]
        assert buckets == sorted(buckets)
    one.call('tpc_abort', 7)
    two.close()


def test_all_storages_are_told_of_and_any_name_is_only_a_name(serve: Callable[..., Any]) -> None:
    names = ['main', 'with "quotes"\\ and\nlines', '<b>']
    values = read(metrics.exposition(figures.of_server({name: serve(MappingStorage()) for name in names})))
    assert {storage for name, storage, _ in values if name == 'zeo_clients'} == set(names)


def test_a_pack_is_told_of_while_it_lasts() -> None:
    told: dict[str, Any] = {'version': '1', 'now': time.time(), 'storages': {}}
    duration = {'bounds': [1.0], 'counts': [0, 0], 'seconds': 0.0}
    told['storages']['1'] = {
        **dict.fromkeys(['loads', 'stores', 'commits', 'aborts', 'conflicts', 'conflicts_resolved', 'received', 'sent',
                         'size', 'length', 'active_txns', 'waiting', 'started'], 1),
        'room': None, 'holder': None, 'clients': [], 'pack': {'share': .25},
        'durations': {'load': duration, 'vote_wait': duration, 'finish': duration}}
    values = read(metrics.exposition(told))
    assert values['zeo_pack_ratio', '1', ''] == .25 and values['zeo_lock_held_seconds', '1', ''] == 0
    assert ('zeo_disk_free_bytes', '1', '') not in values


def test_without_the_library_everything_else_works() -> None:
    code = ('import sys; sys.modules["prometheus_client"] = None\n'
            'from zeo.server import metrics, monitor\n'
            'assert not metrics.AVAILABLE\n'
            'one = monitor.Monitor("127.0.0.1", 0); one.tell_about({}, lambda: False)\n'
            'print(one.answer("/metrics"), one.answer("/healthz")[0]); one.close()\n')
    shown = subprocess.run([sys.executable, '-c', code], cwd=ROOT, text=True, capture_output=True, timeout=60)
    assert shown.stdout == f"(501, 'text/plain', {metrics.MISSING.encode() + bytes([10])!r}) 200\n", shown.stderr
