"""A profile of all threads of a process, in the form that `pstats` reads.

`cProfile` sees one thread only, in some versions of Python, and mixes up all of them in others; so the
interpreter's profile hook is used here directly, one `_ThreadProfile` to a thread, with no lock between.
Times are seconds of the wall clock, as in `cProfile`: who waits for a socket is seen waiting.
"""

import marshal
import sys
import threading
import time
from types import FrameType
from typing import Any
from typing import BinaryIO

#: File, line and name of a function, as `pstats` has it.
Function = tuple[str, int, str]


class _Figures:
    """What is known of one function: in all, or as called by one other."""

    __slots__ = 'calls', 'outer', 'own', 'total'

    def __init__(self) -> None:
        self.calls = 0
        self.outer = 0      # calls that are not recursive
        self.own = 0.0      # seconds, without functions that it called
        self.total = 0.0    # seconds, with them; a recursive call is not counted twice

    def add(self, calls: int, outer: int, own: float, total: float) -> None:
        self.calls += calls
        self.outer += outer
        self.own += own
        self.total += total


class _Table:
    """Figures for each function, and for each pair of a function and who called it."""

    def __init__(self) -> None:
        self.functions: dict[Function, _Figures] = {}
        self.callers: dict[tuple[Function, Function], _Figures] = {}

    def merge(self, other: '_Table') -> None:
        tables: list[tuple[dict[Any, _Figures], dict[Any, _Figures]]] = [
            (self.functions, other.functions), (self.callers, other.callers)]
        for mine, others in tables:
            # A list at once, as the other thread may still be at work.
            for key, figures in list(others.items()):
                mine.setdefault(key, _Figures()).add(
                    figures.calls, figures.outer, figures.own, figures.total)


class _Call:
    """A call that has not returned yet."""

    __slots__ = 'frame', 'function', 'start', 'inner'

    def __init__(self, frame: FrameType | None, function: Function, start: float) -> None:
        self.frame = frame  # None for a built-in function
        self.function = function
        self.start = start
        self.inner = 0.0    # seconds in functions that it called


class _ThreadProfile:
    """What one thread does; only that thread calls `event`."""

    def __init__(self) -> None:
        self.thread = threading.current_thread()
        self.table = _Table()
        self._stack: list[_Call] = []
        self._depth: dict[Function, int] = {}  # how often each function is on the stack

    def event(self, frame: FrameType, event: str, argument: Any) -> None:
        """The hook for `sys.setprofile`."""
        now = time.perf_counter()
        if event == 'call':
            code = frame.f_code
            self._enter(frame, (code.co_filename, code.co_firstlineno, code.co_name), now)
        elif event == 'c_call':
            name = getattr(argument, '__qualname__', '?')
            module = getattr(argument, '__module__', None)
            self._enter(None, ('~', 0, f'<built-in {module}.{name}>' if module else f'<{name}>'), now)
        elif event == 'return':
            # A function that was running when profiling began returns without having been called.
            if any(call.frame is frame for call in self._stack):
                while self._leave(now) is not frame:
                    pass
        elif self._stack and self._stack[-1].frame is None:
            self._leave(now)

    def _enter(self, frame: FrameType | None, function: Function, now: float) -> None:
        self._depth[function] = self._depth.get(function, 0) + 1
        self._stack.append(_Call(frame, function, now))

    def _leave(self, now: float) -> FrameType | None:
        call = self._stack.pop()
        function, total = call.function, now - call.start
        self._depth[function] -= 1
        outer = not self._depth[function]
        figures = (1, int(outer), total - call.inner, total if outer else 0.0)
        self._row(self.table.functions, function).add(*figures)
        if self._stack:
            caller = self._stack[-1]
            caller.inner += total
            self._row(self.table.callers, (function, caller.function)).add(*figures)
        return call.frame

    @staticmethod
    def _row(rows: dict[Any, _Figures], key: Any) -> _Figures:
        figures = rows.get(key)
        if figures is None:
            figures = rows[key] = _Figures()
        return figures


class Profiler:
    """Profiles the thread that starts it and all threads that are started later."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()  # guards the next two; taken when a thread begins, and at the end
        self._profiles: list[_ThreadProfile] = []
        self._ended = _Table()  # of threads that have ended

    def start(self) -> None:
        threading.setprofile(self._first_event)
        sys.setprofile(self._add_thread().event)

    def stop(self) -> None:
        """Threads that are still running go on being profiled, and are not heard of any more."""
        sys.setprofile(None)
        threading.setprofile(None)

    def _first_event(self, frame: FrameType, event: str, argument: Any) -> None:
        """The hook that a new thread finds; it puts its own in place."""
        profile = self._add_thread()
        sys.setprofile(profile.event)
        profile.event(frame, event, argument)

    def _add_thread(self) -> _ThreadProfile:
        profile = _ThreadProfile()
        with self._mutex:
            # A server has a thread for each connection there ever was: keep their sum only.
            ended = [other for other in self._profiles if not other.thread.is_alive()]
            for other in ended:
                self._ended.merge(other.table)
                self._profiles.remove(other)
            self._profiles.append(profile)
        return profile

    def dump(self, file: BinaryIO) -> None:
        """Write what is known so far, for ``pstats.Stats(file name)``."""
        table = _Table()
        with self._mutex:
            table.merge(self._ended)
            for profile in self._profiles:
                table.merge(profile.table)
        callers: dict[Function, dict[Function, tuple[int, int, float, float]]] = {}
        for (function, caller), row in table.callers.items():
            # Calls and outer calls stand the other way round here than below: so pstats wants it.
            callers.setdefault(function, {})[caller] = row.calls, row.outer, row.own, row.total
        marshal.dump({
            function: (row.outer, row.calls, row.own, row.total, callers.get(function, {}))
            for function, row in table.functions.items()}, file)
