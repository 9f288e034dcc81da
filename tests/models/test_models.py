"""The models hold, and would notice if they did not."""

import pathlib
import re

import pytest

from tests.models import check
from tests.models.check import ANY
from tests.models.check import DEADLOCK
from tests.models.check import Outcome
from tests.models.check import Run

REASON = check.why_not()
needs_spin = pytest.mark.skipif(REASON is not None, reason=f'{REASON} (apt-get install spin gcc)')

# What is bounded, and how much, rather than a protection taken out or an event let in.
SIZES = {
    'ordering': {'CHECKS', 'MAXT', 'COMMITS0', 'COMMITS1', 'LOADS0', 'LOADS2', 'LOADS3', 'PINGS', 'LOSSES',
                 'LOADER', 'CONNECTOR', 'TIMEOUT', 'OIDS'},
    'gateway': {'CHECKS', 'MAXT', 'COMMITS0', 'COMMITS1', 'LOADS', 'PINGS', 'LOADER', 'MOVER', 'OIDS', 'KILLS', 'PACKS'},
    'reading_turn': {'N', 'CALLS', 'INV', 'ROOM', 'PARTS'},
}


def run_of(run: Run) -> str:
    return f'{run.name} finds {run.finds or "nothing"}'


def found(finds: str | None, error: str | None, complete: bool = True) -> Outcome:
    return Outcome(Run('ordering', (), finds), complete, error, 10, 10, 1.0, 100.0)


@pytest.mark.parametrize('model', sorted(SIZES))
def test_every_switch_of_a_model_is_run(model):
    used = {flag.partition('=')[0] for run in check.RUNS if run.model == model for flag in run.flags}
    assert check.switches_in(model) - SIZES[model] <= used
    assert used <= check.switches_in(model)     # a misspelt switch would take nothing out


@pytest.mark.parametrize('model', sorted(SIZES))
def test_every_switch_of_a_model_is_explained_at_its_head(model):
    text = (pathlib.Path(check.__file__).parent / f'{model}.pml').read_text()
    head, body = text[:text.index('*/')], text[text.index('*/'):]
    names = set(re.findall(r'#ifn?def (\w+)', body)) - {'CHECKS', 'LOADS3', 'TIMEOUT'}
    names = {name.removeprefix('MISTAKE_') for name in names}
    assert {name for name in names if not re.search(rf'\b(D|)(MISTAKE_)?{name}\b', head)} == set()


@pytest.mark.parametrize('outcome, good', [
    (found(None, None), True),
    (found(None, None, complete=False), False),
    (found(None, 'assertion violated x'), False),
    (found('L', 'assertion violated x'), True),
    (found('L', 'invalid end state (at depth 3)'), False),
    (found('L', None), False),
    (found(DEADLOCK, 'invalid end state (at depth 3)'), True),
    (found(DEADLOCK, 'assertion violated x'), False),
    (found(ANY, 'assertion violated x'), True),
    (found(ANY, None), False),
    (Outcome(Run('ordering', (), ANY), False, None, 0, 0, 1.0, 0, 'gcc: no'), False),
])
def test_only_a_complete_search_proves_and_only_the_expected_error_counts(outcome, good):
    assert outcome.as_it_should_be is good


@needs_spin
@pytest.mark.parametrize('run', [run for run in check.RUNS if run.quick], ids=run_of)
def test_the_design_holds_and_a_planted_mistake_is_found(run):
    outcome = check.check(run, megabytes=1000, seconds=150)
    assert outcome.as_it_should_be, outcome.said


@needs_spin
def test_a_search_that_runs_out_of_memory_proves_nothing():
    outcome = check.check(Run('ordering', ('CONNECTOR=0',)), megabytes=150, seconds=150)
    assert not outcome.as_it_should_be


@pytest.mark.models
@pytest.mark.timeout(1000)
@needs_spin
@pytest.mark.parametrize('run', check.RUNS, ids=run_of)
def test_all_proofs_and_all_planted_mistakes(run):
    outcome = check.check(run, megabytes=4000, seconds=900)
    assert outcome.as_it_should_be, outcome.said
