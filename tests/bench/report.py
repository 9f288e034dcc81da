"""Results as JSON, as a Markdown table, and as a plot."""

import json
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from tests.bench.measure import median
from tests.bench.sides import SIDES
from tests.bench.workloads import WORKLOADS, Row

#: By workload, then by side: the samples of all rounds.
Results = dict[str, dict[str, list[dict[str, float]]]]

FACTORS = {'µs': 1e6, 'ms': 1e3, '/s': 1.0, 'MB': 1 / 1024**2, 'MB/s': 1 / 1024**2}


def surroundings() -> dict[str, Any]:
    """What the figures depend on beside the code."""
    versions = {}
    for name in ['ZEO', 'ZODB', 'uvloop']:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = 'missing'
    return {'python': platform.python_version(), 'system': platform.platform(),
            'processors': os.cpu_count(), 'load average': os.getloadavg(), **versions}


def figures(results: Results) -> list[dict[str, Any]]:
    """One entry for each row of the table: medians over the rounds, and how zeo compares to ZEO."""
    entries = []
    for workload in WORKLOADS:
        of_sides = results.get(workload.name)
        for row in workload.rows if of_sides else ():
            assert of_sides is not None
            medians = {side: median(sample[row.metric] for sample in samples)
                       for side, samples in of_sides.items() if samples}
            entries.append({'workload': workload.name, 'metric': row.metric, 'words': row.words,
                            'unit': row.unit, 'least': row.least, 'aim': row.aim,
                            'medians': medians, 'ratio': ratio(row, medians),
                            'above floor': ratio(row, medians, 'floor', 'zeo'),
                            'possible': ratio(row, medians, 'floor')})
    return entries


def ratio(row: Row, medians: dict[str, float], side: str = 'zeo', other: str = 'ZEO') -> float | None:
    """How many times better one side is than the other."""
    if not medians.get(side) or not medians.get(other):
        return None
    times = medians[other] / medians[side]
    return 1 / times if row.more_is_better else times


def _times(ratio: float | None) -> str:
    return '' if ratio is None else f'{ratio:.1f}x'


def shown(value: float | None, unit: str) -> str:
    if value is None:
        return ''
    value *= FACTORS[unit]
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f'{value:,.{digits}f}'


def verdict(entry: dict[str, Any]) -> str:
    times = entry['ratio']
    if times is None:
        return ''
    if entry['aim'] and times >= entry['aim']:
        return 'aim'
    return 'yes' if times >= entry['least'] else '**no**'


def table(results: Results) -> str:
    """A Markdown table.

    The last columns say how far zeo is above the bare floor, and how far ZEO is: more than that nobody could win.
    """
    sides = [side for side in SIDES.values() if any(side.name in each for each in results.values())]
    head = ['workload', 'unit', *(side.title for side in sides),
            'zeo : ZEO', 'at least', 'aim', 'met', 'floor : zeo', 'floor : ZEO']
    lines = [head, ['---', *['---:'] * (len(head) - 4), '---', '---:', '---:']]
    for entry in figures(results):
        aim = entry['aim']
        lines.append([
            entry['words'], entry['unit'],
            *(shown(entry['medians'].get(side.name), entry['unit']) for side in sides),
            _times(entry['ratio']), f'{entry["least"]:g}x', f'{aim:g}x' if aim else '–', verdict(entry),
            _times(entry['above floor']), _times(entry['possible'])])
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines) + '\n'


def save(results: Results, folder: Path, options: dict[str, Any]) -> None:
    """Write bench.json and bench.md."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {'surroundings': surroundings(), 'options': options, 'figures': figures(results),
             'samples': results}
    (folder / 'bench.json').write_text(json.dumps(whole, indent=1) + '\n')
    (folder / 'bench.md').write_text(table(results))


def load(path: Path) -> Results:
    """The samples in a bench.json."""
    results: Results = json.loads(path.read_text())['samples']
    return results


def plot(results: Results, path: Path) -> None:
    """Bars: how many times better than ZEO; marks: at least, and aim.  Needs matplotlib."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot

    entries = [entry for entry in figures(results) if entry['ratio'] is not None]
    figure, axes = pyplot.subplots(figsize=(9, 1 + .32 * len(entries)))
    places = range(len(entries))
    colors = {'aim': '#2a7f62', 'yes': '#7fb069', '**no**': '#d1603d'}
    axes.barh(places, [entry['ratio'] for entry in entries],
              color=[colors[verdict(entry)] for entry in entries])
    _marks(axes, entries, 'least', '|', 'at least')
    _marks(axes, entries, 'aim', 'd', 'aim')
    axes.axvline(1, color='black', linewidth=1)
    axes.set_yticks(places, [entry['words'] for entry in entries])
    axes.invert_yaxis()
    axes.set_xlabel('times better than ZEO (asyncio)')
    axes.legend(loc='lower right')
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _marks(axes: Any, entries: Sequence[dict[str, Any]], name: str, marker: str, label: str) -> None:
    points = [(entry[name], place) for place, entry in enumerate(entries) if entry[name]]
    if points:
        axes.scatter(*zip(*points), marker=marker, color='black', zorder=3, s=40, label=label)
