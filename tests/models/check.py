"""Run Spin over the models: every proof must hold, every planted mistake must be found.

A model that finds nothing wrong proves something only if it would have found it. So each protection
of the design has a switch in the model that takes it out, and a run here that must then end
in an error, and in one of the kind that the protection is there to prevent.

Needs `spin` and a C compiler (`apt-get install spin gcc`).
"""

import argparse
import concurrent.futures
import dataclasses
import os
import pathlib
import re
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable
from collections.abc import Sequence

HERE = pathlib.Path(__file__).parent

# The invariants of ordering.pml and gateway.pml, by the letters that their headers give them.
CHECKS = {'I': 1, 'F': 2, 'L': 4, 'P': 8, 'R': 16, 'V': 32, 'N': 64, 'C': 128, 'K': 256}

# Two kinds of error that are no violated invariant of one's own choosing.
DEADLOCK = 'deadlock'
ANY = 'any error'


@dataclasses.dataclass(frozen=True)
class Run:
    """One search through all states of a model, and what it has to come to."""

    model: str                   # file name without .pml
    flags: tuple[str, ...]       # -D switches, without the -D
    finds: str | None = None     # None: a proof, no error. Else the letter in CHECKS, DEADLOCK or ANY.
    quick: bool = False          # done in a few seconds, and worth it each time

    @property
    def name(self) -> str:
        return ' '.join((self.model, *self.flags))

    @property
    def switches(self) -> list[str]:
        """The arguments for spin and the C compiler."""
        flags = [f'-D{flag}' for flag in self.flags]
        if self.finds in CHECKS:
            flags.append(f'-DCHECKS={CHECKS[self.finds]}')
        elif self.finds == DEADLOCK:
            flags.append('-DCHECKS=0')
        return flags


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a run."""

    run: Run
    complete: bool               # every state within the bounds was looked at
    error: str | None            # what the search found, in Spin's words
    states: int
    depth: int
    seconds: float
    megabytes: float
    trouble: str = ''            # why there is no outcome at all

    @property
    def as_it_should_be(self) -> bool:
        if self.trouble:
            return False
        if self.run.finds is None:
            return self.complete and self.error is None
        if self.error is None:
            return False
        if self.run.finds == DEADLOCK:
            return 'invalid end state' in self.error
        if self.run.finds in CHECKS:
            return 'assertion violated' in self.error
        return True

    @property
    def said(self) -> str:
        if self.trouble:
            return self.trouble
        if self.error is not None:
            return self.error
        return 'no error' if self.complete else 'no error, but not all states were seen'


def _proofs(model: str, quick: Sequence[str], others: Sequence[str]) -> list[Run]:
    runs = [Run(model, tuple(flags.split()), quick=True) for flags in quick]
    return runs + [Run(model, tuple(flags.split())) for flags in others]


def _mistakes(model: str, table: Iterable[tuple[str, str]], quick: Iterable[str] = ()) -> list[Run]:
    """A run for each mistake and each kind of error that it must lead to."""
    wanted = set(quick)
    return [Run(model, tuple(flags.split()), finds, quick=bool(wanted & set(flags.split())))
            for flags, kinds in table for finds in kinds.split(', ')]


ORDERING = _proofs(
    'ordering',
    quick=['CONNECTOR=0', 'CONNECTOR=0 LOADER=0 PARALLEL_LOADS'],
    others=[
        'LOADER=0',
        'CONNECTOR=0 OIDS=2', 'LOADER=0 OIDS=2',
        'CONNECTOR=0 MAXT=3 COMMITS0=2', 'LOADER=0 MAXT=3 COMMITS0=2',
        'CONNECTOR=0 LOADS2=2', 'CONNECTOR=0 LOADS0=1', 'CONNECTOR=0 PINGS=1',
        'CONNECTOR=0 LOSSES=2', 'LOADER=0 LOSSES=2',
        'CONNECTOR=0 PUBLISH_FAILS', 'LOADER=0 PUBLISH_FAILS',
        'CONNECTOR=0 OUR_CLIENT', 'LOADER=0 OUR_CLIENT',
        'CONNECTOR=0 OUR_CLIENT WAIT_ENDS CHECKS=447', 'LOADER=0 OUR_CLIENT WAIT_ENDS CHECKS=447',
        'CONNECTOR=0 OIDS=2 PREFETCH',
        'CONNECTOR=0 HERE', 'LOADER=0 HERE', 'CONNECTOR=0 HERE MAXT=3 COMMITS0=2', 'CONNECTOR=0 HERE VOTE_BREAKS',
    ],
) + _mistakes('ordering', [
    ('CONNECTOR=0 NO_MARK', 'L, C'),
    ('CONNECTOR=0 MARK_LATE', 'L, C'),
    ('CONNECTOR=0 AGAIN_BLINDLY', 'L, C'),
    ('CONNECTOR=0 NO_AHEAD', 'N, C'),
    ('CONNECTOR=0 NO_WAKE', DEADLOCK),
    ('LOADER=0 NO_BASELINE', 'N'),
    ('LOADER=0 NO_BASELINE', DEADLOCK),
    ('CONNECTOR=0 REPLY_LATE', 'I, F, C'),
    ('CONNECTOR=0 PUBLISH_LATE', 'I, F'),
    ('CONNECTOR=0 PUBLISH_LATE PINGS=1', 'P, N'),
    ('CONNECTOR=0 PUBLISH_EARLY', 'L, C'),
    ('LOADER=0 SUBSCRIBE_SECOND', 'R'),
    ('LOADER=0 SUBSCRIBE_SECOND OIDS=2', 'C'),
    ('LOADER=0 TID_FROM_STORAGE', 'N, C'),
    ('LOADER=0 RING_LAST', 'R'),
    ('LOADER=0 RING_LAST', DEADLOCK),
    ('CONNECTOR=0 LOSS_ENDS_FINISH', 'I'),
    ('CONNECTOR=0 LOSS_ENDS_FINISH', DEADLOCK),
    ('CONNECTOR=0 NO_CLAIM', 'K, C'),
    ('CONNECTOR=0 NO_REFUSE', 'K'),
    ('LOADER=0 PUBLISH_FAILS NO_RING_RESET', 'R'),
    ('CONNECTOR=0 LOADER=0 PARALLEL_LOADS NO_OWN_COUNT', 'L, C'),
    ('CONNECTOR=0 WAIT_ENDS', 'N, C'),
    ('CONNECTOR=0 OIDS=2 PREFETCH PREFETCH_MARK_LATE', 'L, C'),
    ('CONNECTOR=0 OIDS=2 PREFETCH PREFETCH_AGAIN_BLINDLY', 'L, C'),
    ('CONNECTOR=0 OIDS=2 PREFETCH PREFETCH_LAST_AHEAD', 'N'),
    ('CONNECTOR=0 HERE HERE_UNCLAIMED', 'K'),
    ('CONNECTOR=0 HERE REPLY_LATE', 'I, F, C'),
    ('CONNECTOR=0 HERE VOTE_BREAKS BROKEN_KEEPS', DEADLOCK),
], quick=['NO_MARK', 'NO_OWN_COUNT'])

READING_TURN = _proofs(
    'reading_turn',
    quick=['CALLS=1 INV=0'],
    others=[
        'CALLS=1', 'CALLS=2', 'CALLS=1 INV=2', 'CALLS=1 ROOM=2', 'N=3 CALLS=1 INV=0 PARTS=1 WAITING',
        'CALLS=1 LEAVING WAITING', 'CALLS=1 LEAVING INV=0 PARTS=1', 'CALLS=1 DYING', 'CALLS=1 CLOSING INV=0 PARTS=1', 'CALLS=1 BEATING',
    ],
) + _mistakes('reading_turn', [
    ('CALLS=1 MISTAKE_FREE_AND_GO', ANY),
    ('CALLS=1 MISTAKE_LOOK_THEN_FREE', ANY),
    ('CALLS=1 MISTAKE_PARK_BLINDLY', ANY),
    ('CALLS=1 LEAVING MISTAKE_KEEP_GIFT', ANY),
    ('CALLS=1 LEAVING MISTAKE_DONE_WILL_DO', ANY),
    ('CALLS=1 LEAVING MISTAKE_RAISE_WITH_TURN', ANY),
    ('CALLS=1 MISTAKE_LEAD_THEN_SEND', ANY),
    ('CALLS=1 INV=2 MISTAKE_WATCHER_SLEEPS', ANY),
    ('CALLS=1 LEAVING MISTAKE_COUNT_LEAK', ANY),
    ('CALLS=1 ROOM=2 MISTAKE_POLL_ONLY', ANY),
    ('CALLS=1 MISTAKE_WATCHER_FREES', ANY),
    ('CALLS=1 CLOSING MISTAKE_CHECK_THEN_REG', ANY),
    ('CALLS=1 CLOSING MISTAKE_MUTE_DEATH', ANY),
    ('CALLS=1 LEAVING MISTAKE_DROP_EFFECT', ANY),
    ('CALLS=1 CLOSING MISTAKE_CLOSE_EARLY', ANY),
    ('CALLS=1 CLOSING MISTAKE_CLOSE_NOW', ANY),
    ('CALLS=1 MISTAKE_TWO_WAKERS', ANY),
    ('CALLS=1 MISTAKE_LOOK_NO_MORE', ANY),
    ('CALLS=2 INV=0 MISTAKE_PROMISE_AGAIN', ANY),
    ('CALLS=1 BEATING MISTAKE_LEAVE_TO_ANYONE', ANY),
    ('CALLS=1 LEAVING MISTAKE_BREAK_PROMISE', ANY),
], quick=['MISTAKE_LOOK_THEN_FREE'])

GATEWAY = _proofs(
    'gateway',
    quick=['MOVER=0 LOADER=0'],
    others=[
        'MOVER=0', 'LOADER=0', 'MOVER=0 PINGS=1', 'MOVER=0 KILLS=1', 'LOADER=0 KILLS=1',
        'MOVER=0 LOADER=0 MAXT=3 COMMITS1=2',
        'MOVER=0 LOADER=0 PACKS=1', 'MOVER=0 LOADER=0 PACKS=1 OIDS=2 COMMITS0=0 COMMITS1=2',
        'MOVER=0 PACKS=1 COMMITS0=0 COMMITS1=2', 'LOADER=0 PACKS=1 COMMITS0=0 COMMITS1=1 MAXT=1',
    ],
) + _mistakes('gateway', [
    ('MOVER=0 NO_TURN', 'I, F'),
    ('MOVER=0 TURN_LATE', 'F'),
    ('MOVER=0 LOADER=0 MAXT=3 COMMITS1=2 MERGED', 'I'),
    ('MOVER=0 GENERATION_LATE', 'L, C'),
    ('MOVER=0 GENERATION_SECOND', 'L, C'),
    ('MOVER=0 SNAPSHOT_KEPT', 'L, C'),
    ('MOVER=0 NO_MARK', 'L, C'),
    ('MOVER=0 NO_AHEAD', 'N'),
    ('MOVER=0 FOREIGN_LATE', 'F'),
    ('MOVER=0 FOREIGN_TO_OTHERS', 'F'),
    ('MOVER=0 PINGS=1 PING_BLINDLY', 'P'),
    ('LOADER=0 COMMITS1=0 MAXT=1 REGISTER_BLINDLY', 'R'),
    ('LOADER=0 COMMITS1=0 MAXT=1 TID_FROM_DATABASE', 'R'),
    ('MOVER=0 LOADER=0 PACKS=1 OIDS=2 COMMITS0=0 COMMITS1=2 PACKED_BLINDLY', 'C'),
    ('MOVER=0 LOADER=0 PACKS=1 AFRESH_QUIETLY', 'I'),
], quick=['SNAPSHOT_KEPT'])

RUNS = ORDERING + READING_TURN + GATEWAY


def why_not() -> str | None:
    """Why the models cannot be run on this machine; None if they can."""
    missing = [tool for tool in ('spin', 'gcc') if shutil.which(tool) is None]
    return f"{' and '.join(missing)} not installed" if missing else None


def switches_in(model: str) -> set[str]:
    """All the names that the model's source asks about with #ifdef or defined()."""
    text = (HERE / f'{model}.pml').read_text()
    return set(re.findall(r'^#ifn?def (\w+)', text, re.MULTILINE)) | set(re.findall(r'defined\((\w+)\)', text))


def check(run: Run, megabytes: int, seconds: float) -> Outcome:
    """Search all states of one model, within so much memory and time."""
    begun = time.monotonic()

    def failed(trouble: str) -> Outcome:
        return Outcome(run, False, None, 0, 0, time.monotonic() - begun, 0, trouble)

    def bounded() -> None:
        limit = (megabytes + 256) << 20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    with tempfile.TemporaryDirectory(prefix='zeo-model-') as folder:
        shutil.copy(HERE / f'{run.model}.pml', folder)
        # A mistake is found long before the compiler has optimized the search for it.
        optimize = '-O0' if run.finds else '-O2'
        depth = '-m1000000' if run.model == 'reading_turn' else '-m20000'
        verifier = ['./pan', '-n', depth]
        # No look-out for deadlocks: where an invariant shall be seen to break, a deadlock may come first, and
        # reading_turn asks by itself what is true when nothing can happen any more.
        if run.model == 'reading_turn' or run.finds in CHECKS:
            verifier.append('-E')
        try:
            for command in (['spin', *run.switches, '-a', f'{run.model}.pml'],
                            ['gcc', optimize, '-w', '-DSAFETY', '-DCOLLAPSE', f'-DMEMLIM={megabytes}',
                             '-o', 'pan', 'pan.c']):
                done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=seconds)
                if done.returncode:
                    return failed(f'{command[0]}: {(done.stderr or done.stdout).strip()[-300:]}')
            done = subprocess.run(verifier, cwd=folder, capture_output=True, text=True, timeout=seconds,
                                  preexec_fn=bounded)
        except subprocess.TimeoutExpired as late:
            return failed(f'{late.cmd[0]} was not done after {seconds:.0f} seconds')
    return _read(run, done.stdout + done.stderr, time.monotonic() - begun)


def _read(run: Run, said: str, seconds: float) -> Outcome:
    """The outcome, from what a verifier printed."""
    def number(pattern: str) -> float:
        found = re.search(pattern, said)
        return float(found[1]) if found else 0.0

    counted = re.search(r'depth reached (\d+), errors: (\d+)', said)
    if counted is None:
        return Outcome(run, False, None, 0, 0, seconds, 0, f'no result: {said.strip()[-300:]}')
    error = None
    if int(counted[2]):
        found = re.search(r'^pan:\d+: (.*)', said, re.MULTILINE)
        error = found[1] if found else 'an error without a name'
    complete = 'Search not completed' not in said and 'too small' not in said
    return Outcome(run, complete, error, int(number(r'([\d.e+]+) states, stored')), int(counted[1]), seconds,
                   number(r'([\d.]+)\s+total actual memory usage'))


def check_all(runs: Sequence[Run], megabytes: int, seconds: float, jobs: int = 1) -> Iterable[Outcome]:
    """The outcomes, in the order of `runs`; the memory is what each of the `jobs` may have."""
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(lambda run: check(run, megabytes, seconds), runs)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog='python -m tests.models', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('words', nargs='*', help='only runs whose names contain all of these')
    parser.add_argument('--quick', action='store_true', help='only what is done in a few seconds')
    parser.add_argument('--memory', type=int, default=4000, metavar='MB', help='for one run (4000)')
    parser.add_argument('--seconds', type=float, default=900, help='for one run (900)')
    parser.add_argument('--jobs', type=int, default=max(1, (os.cpu_count() or 2) // 2),
                        help='runs at a time (half of the processors)')
    options = parser.parse_args(arguments)

    reason = why_not()
    if reason:
        print(f'The models cannot be run: {reason}.')
        return 2
    runs = [run for run in RUNS
            if (run.quick or not options.quick) and all(word in run.name for word in options.words)]
    print(f'{"":4} {"must find":9} {"states":>10} {"MB":>5} {"s":>5}  run')
    wrong = 0
    for outcome in check_all(runs, options.memory, options.seconds, options.jobs):
        good = outcome.as_it_should_be
        wrong += not good
        print(f'{"ok" if good else "BAD":4} {outcome.run.finds or "nothing":9} {outcome.states:>10} '
              f'{outcome.megabytes:>5.0f} {outcome.seconds:>5.1f}  {outcome.run.name}'
              + ('' if good else f'\n     {outcome.said}'), flush=True)
    proofs = sum(run.finds is None for run in runs)
    print(f'{proofs} proofs, {len(runs) - proofs} planted mistakes: '
          + (f'{wrong} not as they should be' if wrong else 'all as they should be'))
    return 1 if wrong or not runs else 0
