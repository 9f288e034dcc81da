"""Interrupts code where a signal handler could: at one place after the other, until there is none left.

CPython handles signals in the main thread between two of its instructions, and only behind some: when a function
begins, when one in C returns, when a loop begins anew.
"""

import dis
import sys
from collections.abc import Callable, Iterator
from functools import cache
from types import CodeType, FrameType, ModuleType
from typing import Any


class Interrupted(BaseException):
    """As KeyboardInterrupt, but nobody else's."""


class Interruption:
    """Raises `Interrupted` at the place with that number in the code of some modules."""

    def __init__(self, number: int, modules: tuple[ModuleType, ...]) -> None:
        self.where: str | None = None
        self._left = number
        self._files = {module.__file__ for module in modules}
        self._before: dict[FrameType, str] = {}     # by frame: its last instruction

    def run(self, function: Callable[..., Any], *args: Any) -> None:
        """Call the function; its exceptions are of no interest."""
        before = sys.gettrace()
        sys.settrace(self._trace)
        try:
            function(*args)
        except (Interrupted, Exception):
            pass
        finally:
            sys.settrace(before)
            self._before.clear()

    def _trace(self, frame: FrameType, event: str, _: object) -> Any:
        if event == 'call':
            if frame.f_back in self._before:
                self._before[frame.f_back] = ''     # it called a function in Python: no place behind that
            if frame.f_code.co_filename not in self._files:
                return None
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
            self._before[frame] = ''
        elif event == 'opcode':
            last = self._before.get(frame, '')
            self._before[frame] = _instructions(frame.f_code).get(frame.f_lasti, '')
            if last.startswith(('RESUME', 'CALL', 'JUMP_BACKWARD')):
                self._left -= 1
                if self._left == 0:
                    self.where = f'{frame.f_code.co_name}, line {frame.f_lineno}'
                    raise Interrupted
        elif event == 'return':
            self._before.pop(frame, None)
        return self._trace


@cache
def _instructions(code: CodeType) -> dict[int, str]:
    return {each.offset: each.opname for each in dis.get_instructions(code)}


def everywhere(*modules: ModuleType) -> Iterator[Interruption]:
    """One interruption after the other, up to one that has found no place."""
    yield Interruption(0, modules)      # Python 3.12 tells little of instructions the first time
    number, found = 0, True
    while found:
        number += 1
        interruption = Interruption(number, modules)
        yield interruption
        found = interruption.where is not None
    assert number > 1 or sys.version_info >= (3, 13), 'there are too few places'     # which tells of few, or none
