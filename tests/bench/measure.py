"""Clocks, memory, and processes that do what they are told: what every measurement here needs."""

import contextlib
import multiprocessing
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

#: Seconds that a worker may take for one job; never reached unless something hangs.
PATIENCE = 300.0

# Fork, so that a worker is there in milliseconds; the process that forks has no other thread.
_context = multiprocessing.get_context('fork')


# ---- clocks

def cpu_seconds(pid: int) -> float:
    """User and system CPU time that a process has used, threads that have ended included."""
    # What clock_getcpuclockid(3) computes; in nanoseconds, unlike /proc/PID/stat.
    return time.clock_gettime((~pid << 3) | 2)


class Cpu:
    """CPU time of several processes together, from the beginning of a `with` block to its end."""

    seconds = 0.0

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = [pid for pid in pids if pid]

    def __enter__(self) -> 'Cpu':
        self._before = sum(map(cpu_seconds, self._pids))
        return self

    def __exit__(self, *exc: object) -> None:
        self.seconds = sum(map(cpu_seconds, self._pids)) - self._before


def timed(function: Callable[[Any], Any], arguments: Sequence[Any]) -> list[float]:
    """How many seconds each call took."""
    clock = time.perf_counter
    times = []
    for argument in arguments:
        begin = clock()
        function(argument)
        times.append(clock() - begin)
    return times


def percentile(values: Sequence[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


median = statistics.median


# ---- other things to look at

def resident_bytes(pid: int) -> int:
    """How much memory a process occupies (resident set size)."""
    with open(f'/proc/{pid}/statm') as file:
        return int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')


def open_files(pid: int) -> int:
    return len(os.listdir(f'/proc/{pid}/fd'))


def pause(seconds: float) -> None:
    time.sleep(seconds)


def wait_until(condition: Callable[[], bool], what: str, timeout: float = PATIENCE) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f'still not so after {timeout} seconds: {what}')
        pause(.001)


# ---- worker processes

class Worker:
    """A process that runs one job after the other.

    A job is a module-level function.  Its first argument is the worker's own `SimpleNamespace`, where
    jobs keep what later jobs need; it is made with ``prepare`` (a job, too) and its arguments.
    """

    def __init__(self, prepare: Callable[..., Any], *args: Any) -> None:
        self._pipe, end = _context.Pipe()
        self._process = _context.Process(target=_work, args=(end,), daemon=True)
        self._process.start()
        end.close()
        pid = self._process.pid
        assert pid is not None
        self.pid = pid
        self.call(prepare, *args)

    def begin(self, job: Callable[..., Any], *args: Any) -> None:
        """Start a job; `result` waits for its end."""
        self._pipe.send((job, args))

    def result(self) -> Any:
        if not self._pipe.poll(PATIENCE):
            raise TimeoutError('a worker process does not answer')
        good, result = self._pipe.recv()
        if not good:
            raise RuntimeError(f'a job failed in a worker process:\n{result}')
        return result

    def call(self, job: Callable[..., Any], *args: Any) -> Any:
        self.begin(job, *args)
        return self.result()

    def interrupt(self) -> None:
        """Make the job, which looks at ``space.told_to_stop()``, come to its end."""
        self._pipe.send(None)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._pipe.send('end')
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._pipe.close()

    def __enter__(self) -> 'Worker':
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@contextlib.contextmanager
def workers(count: int, prepare: Callable[..., Any], *args: Any) -> Iterator[list[Worker]]:
    """Several workers alike."""
    with contextlib.ExitStack() as at_end:
        yield [at_end.enter_context(Worker(prepare, *args)) for _ in range(count)]


def all_call(team: Sequence[Worker], job: Callable[..., Any], *args: Any) -> list[Any]:
    """Have all workers do the same at the same time; each gets its number as the last argument."""
    for number, worker in enumerate(team):
        worker.begin(job, *args, number)
    return [worker.result() for worker in team]


def _work(pipe: Connection) -> None:
    space = SimpleNamespace(told_to_stop=pipe.poll)
    while True:
        order = pipe.recv()
        if order == 'end':
            os._exit(0)  # whatever client is open here: its end is not what is measured
        if order is None:
            continue
        job, args = order
        try:
            answer = True, job(space, *args)
        except BaseException:
            answer = False, traceback.format_exc()
        pipe.send(answer)
