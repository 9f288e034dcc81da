"""Compare zeo with ZEO on this machine: ``python -m tests.bench [--quick] [WORKLOAD ...]``."""

import argparse
import contextlib
import importlib.util
import logging
import sys
import time
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from tests.bench import report
from tests.bench.sides import SIDES
from tests.bench.workloads import WORKLOADS, Rounds, Workload

#: Without these, a side is left out.
NEEDS = {'uvloop': ('ZEO', 'uvloop'), 'ZEO': ('ZEO',)}


def main() -> int:
    options = parse()
    logging.disable()  # a ZEO client logs much when an invalidation overtakes its own commit
    wanted = options.sides or [name for name in SIDES if name != 'uvloop' or not options.quick]
    sides = [name for name in wanted if _installed(name)]
    for name in set(wanted) - set(sides):
        print(f'{name} is not installed and left out', file=sys.stderr)
    scale, rounds = (.25, 2) if options.quick else (1.0, 7)
    rounds = options.rounds or rounds
    results: report.Results = {}
    begin = time.monotonic()
    for workload in WORKLOADS:
        if not any(fnmatch(workload.name, pattern) for pattern in options.workloads):
            continue
        names = [name for name in workload.sides if name in sides]
        print(f'{time.monotonic() - begin:5.0f} s  {workload.name}', file=sys.stderr, flush=True)
        results[workload.name] = compare(workload, names, scale, rounds)
    print(report.table(results))
    report.save(results, options.output, {'rounds': rounds, 'scale': scale})
    if not options.no_plot:
        with contextlib.suppress(ImportError):
            report.plot(results, options.output / 'bench.png')
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog='python -m tests.bench', description=__doc__)
    parser.add_argument('workloads', nargs='*', default=['*'], metavar='WORKLOAD',
                        help='names or patterns; all of: ' + ', '.join(each.name for each in WORKLOADS))
    parser.add_argument('--quick', action='store_true', help='less of everything, under a minute')
    parser.add_argument('--rounds', type=int, help='so many interleaved rounds')
    parser.add_argument('--sides', type=_sides, metavar='SIDE,...',
                        help='who takes part: ' + ','.join(SIDES) + ' (--quick: without uvloop)')
    parser.add_argument('--output', type=Path, default=Path('bench'), metavar='FOLDER',
                        help='where bench.json, bench.md and bench.png are written (%(default)s)')
    parser.add_argument('--no-plot', action='store_true')
    options = parser.parse_args()
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f'--output: {options.output}: {error.strerror}')
    return options


def _sides(text: str) -> list[str]:
    names = text.split(',')
    if unknown := set(names) - set(SIDES):
        raise argparse.ArgumentTypeError('there is no side ' + ', '.join(unknown))
    return names


def _installed(side: str) -> bool:
    return all(importlib.util.find_spec(name) for name in NEEDS.get(side, ()))


def compare(workload: Workload, names: Sequence[str], scale: float,
            rounds: int) -> dict[str, list[dict[str, float]]]:
    """Run a workload for some sides, round by round; who begins a round ended the one before."""
    with contextlib.ExitStack() as at_end:
        running: dict[str, Rounds] = {}
        for name in names:
            generator = workload.function(SIDES[name], scale, **workload.arguments)
            at_end.callback(generator.close)
            running[name] = generator
        samples: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        order = list(names)
        for number in range(rounds + 1):
            for name in order:
                sample = next(running[name])
                if number:  # the first round only warms up
                    samples[name].append(sample)
            order.reverse()
        return samples


if __name__ == '__main__':
    sys.exit(main())
