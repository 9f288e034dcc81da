"""The benchmark runs, and reports what it measured.  What it measures is nobody's business here."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_benchmark_compares_two_sides_and_writes_its_reports(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, '-m', 'tests.bench', 'cache-hit', 'load-1k', '--quick', '--rounds', '1',
         '--sides', 'zeo,ZEO,floor', '--no-plot', '--output', str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / 'bench.json').read_text())
    assert [(each['workload'], each['metric']) for each in report['figures']] == [
        ('load-1k', 'median'), ('load-1k', 'cpu'), ('cache-hit', 'median')]
    assert all(each['ratio'] > 0 for each in report['figures'])
    assert set(report['figures'][0]['medians']) == {'zeo', 'ZEO', 'floor'}
    table = (tmp_path / 'bench.md').read_text()
    assert len(table.splitlines()) == 2 + 3
    assert 'cold load, 1 KB' in table and table in done.stdout


def test_the_benchmark_refuses_a_side_it_does_not_know() -> None:
    done = subprocess.run([sys.executable, '-m', 'tests.bench', '--sides', 'nobody'],
                          cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert 'there is no side nobody' in done.stderr
