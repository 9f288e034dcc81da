"""Plain values to pickles and back, in such a way that a pickle from the network does nothing.

A pickle is a program.  Before it runs here, `inspect` walks over its opcodes once and proves what it
can do at most:

- only opcodes that make plain values occur (no persistent ids, no extension codes, no `INST`/`OBJ`);
- it names no global outside a fixed table (`_MAKERS`);
- nothing is nested deeper than `DEPTH` (hashing a deep tuple recurses on the C stack);
- the memo stays in proportion to the pickle (its index sizes an array), and containers are referred
  to again at most `SHARED` times (sharing is how a small pickle describes an exponentially large
  value).

A pickle without globals is then safe for `pickle.loads`.  One with globals runs in an `Unpickler`
whose `find_class` knows the same fixed table and nothing else; it imports nothing and looks up no
attribute.  What it hands out are not the builtins themselves but makers that take plain values only,
within a budget, and that cannot be altered by the pickle.

The opcodes are described in the standard library's `pickletools`.
"""

import io
import pickle
import pickletools
from collections.abc import Callable
from typing import Any

from zodbpickle import binary

from zeo.errors import ProtocolError

#: What ZEO writes; any protocol is read.
PICKLE_PROTOCOL = 3

#: How deep containers may be nested.
DEPTH = 50

#: How often a pickle may refer to containers it has already described.
SHARED = 4

_Buffer = bytes | bytearray | memoryview


def dumps(value: Any) -> bytes:
    """Pickle plain values; raises whatever `pickle.dumps` raises."""
    return pickle.dumps(value, PICKLE_PROTOCOL)


def loads(data: bytes | bytearray) -> Any:
    """Unpickle plain values from the network; raises `ProtocolError` for everything else."""
    if inspect(data):
        load: Callable[[], Any] = _PlainUnpickler(data).load
    else:
        def load() -> Any:
            return pickle.loads(data)
    try:
        return load()
    except ProtocolError:
        raise
    except Exception as error:  # a damaged pickle may fail with just about anything
        raise ProtocolError(f'a message that cannot be unpickled ({error})') from None


#: Both sides accept the same: no peer has a reason to send more than plain data.
load_from_client = loads
load_from_server = loads


# ---- the walk over the opcodes ----------------------------------------------

def _table() -> tuple[list[int], list[Callable[['_Walk'], None] | None]]:
    """For each opcode: the size of its fixed argument if it makes an atom, else -1; and its step."""
    atoms = [-1] * 256
    steps: list[Callable[[_Walk], None] | None] = [None] * 256
    for name, size in [('NONE', 0), ('NEWTRUE', 0), ('NEWFALSE', 0), ('BININT', 4),
                       ('BININT1', 1), ('BININT2', 2), ('BINFLOAT', 8)]:
        atoms[ord(_CODES[name])] = size
    for name, step in _STEPS.items():
        steps[ord(_CODES[name])] = step
    return atoms, steps


class _Walk:
    """The state of `inspect`: where we are, and the depth of each value on the pickle's stack."""

    __slots__ = ('data', 'at', 'stack', 'marks', 'memo', 'shared', 'has_globals')

    def __init__(self, data: bytes | bytearray) -> None:
        self.data = data
        self.at = 0
        self.stack: list[int] = []
        self.marks: list[int] = []
        self.memo: dict[int, int] = {}
        self.shared = 0
        self.has_globals = False

    def skip_counted(self, size: int) -> None:
        at = self.at
        count = int.from_bytes(self.data[at:at + size], 'little')
        self.at = at + size + count
        self.stack.append(0)

    def line(self) -> bytes:
        end = self.data.find(b'\n', self.at)
        if end < 0:
            raise ProtocolError('a message that ends in the middle of a line')
        line = bytes(self.data[self.at:end])
        self.at = end + 1
        return line

    def number(self, size: int) -> int:
        at = self.at
        self.at = at + size
        return int.from_bytes(self.data[at:at + size], 'little')

    def from_mark(self) -> int:
        """Take what was pushed since the last mark; the greatest depth among it."""
        mark = self.marks.pop()
        depth = max(self.stack[mark:], default=0)
        del self.stack[mark:]
        return depth

    def top(self, count: int) -> int:
        """Take ``count`` values; the greatest depth among them."""
        if self.marks and len(self.stack) - count < self.marks[-1]:
            raise ProtocolError('a message that mixes up its stack')
        depth = max(self.stack[-count:])
        if len(self.stack) < count:
            raise IndexError
        del self.stack[-count:]
        return depth

    def push_container(self, content: int) -> None:
        if content >= DEPTH:
            raise ProtocolError(f'a message nested deeper than {DEPTH} levels')
        self.stack.append(content + 1)

    def grow(self, content: int) -> None:
        """The container on top of the stack has got new content of that depth."""
        self.push_container(max(content, self.stack.pop() - 1))

    def put(self, index: int) -> None:
        if index > len(self.data):
            raise ProtocolError('a message whose memo is out of proportion')
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        self.again(self.memo[index])

    def again(self, depth: int) -> None:
        """Refer once more to a value of that depth."""
        if depth:
            self.shared += 1
            if self.shared > SHARED:
                raise ProtocolError('a message that refers to its own parts too often')
        self.stack.append(depth)

    def name(self, name: tuple[str, str]) -> None:
        if name not in _MAKERS:
            raise ProtocolError('a message that names %.200s.%.200s' % name)
        self.has_globals = True
        self.stack.append(0)


def _proto(walk: _Walk) -> None:
    if walk.number(1) > pickle.HIGHEST_PROTOCOL:
        raise ProtocolError('a message in an unknown pickle protocol')


def _frame(walk: _Walk) -> None:
    walk.at += 8  # how much follows, for readers from files; we have it all


def _text_line(walk: _Walk) -> None:
    walk.line()
    walk.stack.append(0)


def _mark(walk: _Walk) -> None:
    walk.marks.append(len(walk.stack))


def _setitem(walk: _Walk) -> None:
    walk.grow(walk.top(2))


def _global(walk: _Walk) -> None:
    walk.name((walk.line().decode(), walk.line().decode()))


def _stack_global(walk: _Walk) -> None:
    walk.top(2)  # the names are values here: find_class looks at them
    walk.has_globals = True
    walk.stack.append(0)


def _reduce(walk: _Walk) -> None:
    walk.push_container(walk.top(2))


def _build(walk: _Walk) -> None:
    walk.grow(walk.top(1))


_CODES = {opcode.name: opcode.code for opcode in pickletools.opcodes}
_STEPS: dict[str, Callable[[_Walk], None]] = {
    'PROTO': _proto,
    'FRAME': _frame,
    'INT': _text_line, 'LONG': _text_line, 'FLOAT': _text_line, 'STRING': _text_line,
    'UNICODE': _text_line,
    'LONG1': lambda walk: walk.skip_counted(1),
    'LONG4': lambda walk: walk.skip_counted(4),
    'SHORT_BINBYTES': lambda walk: walk.skip_counted(1),
    'BINBYTES': lambda walk: walk.skip_counted(4),
    'BINBYTES8': lambda walk: walk.skip_counted(8),
    'BYTEARRAY8': lambda walk: walk.skip_counted(8),
    'SHORT_BINSTRING': lambda walk: walk.skip_counted(1),
    'BINSTRING': lambda walk: walk.skip_counted(4),
    'SHORT_BINUNICODE': lambda walk: walk.skip_counted(1),
    'BINUNICODE': lambda walk: walk.skip_counted(4),
    'BINUNICODE8': lambda walk: walk.skip_counted(8),
    'MARK': _mark,
    'EMPTY_LIST': lambda walk: walk.push_container(0),
    'EMPTY_DICT': lambda walk: walk.push_container(0),
    'EMPTY_TUPLE': lambda walk: walk.push_container(0),
    'EMPTY_SET': lambda walk: walk.push_container(0),
    'TUPLE': lambda walk: walk.push_container(walk.from_mark()),
    'LIST': lambda walk: walk.push_container(walk.from_mark()),
    'DICT': lambda walk: walk.push_container(walk.from_mark()),
    'FROZENSET': lambda walk: walk.push_container(walk.from_mark()),
    'TUPLE1': lambda walk: walk.push_container(walk.top(1)),
    'TUPLE2': lambda walk: walk.push_container(walk.top(2)),
    'TUPLE3': lambda walk: walk.push_container(walk.top(3)),
    'APPEND': lambda walk: walk.grow(walk.top(1)),
    'SETITEM': _setitem,
    'APPENDS': lambda walk: walk.grow(walk.from_mark()),
    'SETITEMS': lambda walk: walk.grow(walk.from_mark()),
    'ADDITEMS': lambda walk: walk.grow(walk.from_mark()),
    'POP_MARK': lambda walk: (walk.from_mark(), None)[1],
    'PUT': lambda walk: walk.put(int(walk.line())),
    'BINPUT': lambda walk: walk.put(walk.number(1)),
    'LONG_BINPUT': lambda walk: walk.put(walk.number(4)),
    'MEMOIZE': lambda walk: walk.put(len(walk.memo)),
    'GET': lambda walk: walk.get(int(walk.line())),
    'BINGET': lambda walk: walk.get(walk.number(1)),
    'LONG_BINGET': lambda walk: walk.get(walk.number(4)),
    'DUP': lambda walk: walk.again(walk.stack[-1]),
    'GLOBAL': _global,
    'STACK_GLOBAL': _stack_global,
    'REDUCE': _reduce,
    'NEWOBJ': _reduce,
    'BUILD': _build,
}
_ATOMS, _STEP = _table()
_STOP = ord(_CODES['STOP'])


def inspect(data: bytes | bytearray) -> bool:
    """Prove that a pickle can only make plain values; True if it names globals of the fixed table.

    Raises `ProtocolError` if it cannot be proved.  Linear in the number of opcodes.
    """
    walk = _Walk(data)
    push = walk.stack.append
    try:
        while True:
            code = data[walk.at]
            size = _ATOMS[code]
            if size >= 0:
                walk.at += 1 + size
                push(0)
                continue
            walk.at += 1
            step = _STEP[code]
            if step is not None:
                step(walk)
            elif code == _STOP:
                break
            else:
                raise ProtocolError(f'a message with the pickle opcode {chr(code)!r}')
    except (IndexError, KeyError, ValueError):
        raise ProtocolError('a damaged message') from None
    if walk.at != len(data) or len(walk.stack) != 1 or walk.marks:
        raise ProtocolError('a damaged message')
    return walk.has_globals


# ---- the globals ---------------------------------------------------------------

class _PlainUnpickler(pickle.Unpickler):
    """An unpickler that knows the names in `_MAKERS` and gives out harmless makers for them."""

    def __init__(self, data: bytes | bytearray) -> None:
        super().__init__(io.BytesIO(data))
        self.budget = len(data)  # elements that makers may copy: what was sent, not more

    def find_class(self, module: str, name: str) -> Any:
        try:
            make = _MAKERS[module, name]
        except (KeyError, TypeError):
            raise ProtocolError('a message that names %.200s.%.200s' % (module, name)) from None
        return make if isinstance(make, type) else _Maker(self, make)


class _Maker:
    """Stands for a builtin in a pickle: callable with plain values, and not to be altered."""

    __slots__ = ('unpickler', 'make')

    def __init__(self, unpickler: _PlainUnpickler, make: Callable[..., Any]) -> None:
        self.unpickler = unpickler
        self.make = make

    def __call__(self, *args: Any) -> Any:
        for arg in args:
            if isinstance(arg, (bytes, bytearray, str, list, tuple, set, frozenset, dict)):
                self.unpickler.budget -= len(arg)
        if self.unpickler.budget < 0:
            raise ProtocolError('a message that copies its own parts too often')
        return self.make(*args)

    def __setstate__(self, state: Any) -> None:
        raise ProtocolError('a message that tries to alter a type')


def _of_items(kind: Callable[..., Any]) -> Callable[..., Any]:
    def make(items: Any = ()) -> Any:
        if not isinstance(items, (list, tuple, set, frozenset, dict)):
            raise ProtocolError('a message that makes a container from something else')
        return kind(items)
    return make


def _bytes_like(kind: Callable[..., Any]) -> Callable[..., Any]:
    def make(content: Any = b'', encoding: str | None = None) -> Any:
        if encoding is not None:
            content = _encode(content, encoding)
        if not isinstance(content, (bytes, bytearray, list, tuple)):
            raise ProtocolError('a message that makes bytes from something else')
        return kind(content)
    return make


def _encode(text: Any, encoding: Any = 'latin1') -> bytes:
    """`_codecs.encode`, which protocols 0 to 2 use for bytes."""
    if not isinstance(text, str) or encoding not in ('latin1', 'latin-1'):
        raise ProtocolError('a message that encodes text in an unusual way')
    return text.encode('latin-1')


def _number(kind: Callable[..., Any]) -> Callable[..., Any]:
    def make(*args: Any) -> Any:
        if not all(isinstance(arg, (int, float)) for arg in args):
            raise ProtocolError('a message that makes a number from something else')
        return kind(*args)
    return make


def _text(content: Any = '') -> str:
    if not isinstance(content, str):
        raise ProtocolError('a message that makes text from something else')
    return content


def _reconstruct(kind: Any, base: Any, state: Any) -> Any:
    """`copyreg._reconstructor`, which protocols 0 and 1 use for instances of classes."""
    if kind is Prefix:
        return Prefix()
    if not isinstance(kind, _Maker):
        raise ProtocolError('a message that makes an unknown kind of object')
    return kind(state)


class Prefix:
    """Equal to any text that starts with a path: `ZopeUndo.Prefix.Prefix` as undo filters send it."""

    __slots__ = ('path', 'length')
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, path: Any = '') -> None:
        self.path = path if isinstance(path, (str, bytes)) else ''
        self.length = len(self.path)

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise ProtocolError('an undo prefix without its path')
        self.__init__(state.get('value', state.get('path', '')))  # type: ignore[misc]

    def __eq__(self, other: object) -> bool:
        if isinstance(other, bytes) and isinstance(self.path, str):
            return other.startswith(self.path.encode())
        if isinstance(other, str) and isinstance(self.path, bytes):
            return other.startswith(self.path.decode('utf-8', 'replace'))
        return isinstance(other, (bytes, str)) and other[:self.length] == self.path


_MAKERS: dict[tuple[str, str], Any] = {
    ('zodbpickle', 'binary'): _bytes_like(binary),
    ('copyreg', '_reconstructor'): _reconstruct,
    ('copy_reg', '_reconstructor'): _reconstruct,
    ('_codecs', 'encode'): _encode,
    ('ZopeUndo.Prefix', 'Prefix'): Prefix,
}
for _builtins in ('builtins', '__builtin__'):
    _MAKERS.update({
        (_builtins, 'dict'): _of_items(dict),
        (_builtins, 'list'): _of_items(list),
        (_builtins, 'tuple'): _of_items(tuple),
        (_builtins, 'set'): _of_items(set),
        (_builtins, 'frozenset'): _of_items(frozenset),
        (_builtins, 'bytes'): _bytes_like(bytes),
        (_builtins, 'bytearray'): _bytes_like(bytearray),
        (_builtins, 'str'): _text,
        (_builtins, 'int'): _number(int),
        (_builtins, 'float'): _number(float),
        (_builtins, 'complex'): _number(complex),
        (_builtins, 'bool'): _number(bool),
        (_builtins, 'object'): lambda: None,
    })
