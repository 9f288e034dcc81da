"""Plain values to pickles and back, in such a way that a pickle from the network does nothing.

A pickle is a program.  Before it runs here, its opcodes are read once, without running them, and
that must prove what it can do at most:

- it consists of opcodes that make plain values: no persistent ids, no extension codes, no `INST`
  (nor `STRING`, which may emit warnings, and which nobody has written since Python 2);
- it names no global outside a fixed table (`MAKERS`), and the names stand for functions that make
  plain values and can neither be altered nor be part of the result;
- nothing is nested deeper than `DEPTH` (hashing a deep tuple recurses on the C stack);
- containers are referred to again at most `SHARED` times (sharing is how a small pickle describes an
  exponentially large value), and the memo has no holes (its largest index sizes an array);
- not more than `KEYS` keys are anything but text or bytes, whose hashes nobody can foresee (a
  dictionary of n keys with the same hash takes n**2 steps);
- numbers are not longer than `NUMBER` bytes (reading n digits takes n**2 steps);
- it takes not too many opcodes, and not too many of them make containers (an empty set is one
  byte in a pickle and more than 200 in memory).

There are two ways to prove it.  `_is_simple` does it for nearly all messages: they have so few opcodes,
of so simple kinds, that they keep all of this without looking any closer.  `_Walk` does it for the
others, by following what the pickle would do to its stack.  Both rely on the pickle being read in step
with the unpickler, argument by argument; the opcodes are described in the standard library's
`pickletools`.

A pickle without globals is then left to `pickle.loads`.  One with globals runs in an `Unpickler` whose
`find_class` knows the fixed table and nothing else; it imports nothing and looks up no attribute.
"""

import io
import pickle
import pickletools
from collections.abc import Callable
from itertools import repeat
from struct import Struct
from struct import error as StructError
from typing import Any

from zeo.errors import ProtocolError
from zeo.wire.makers import KEYS
from zeo.wire.makers import MAKERS
from zeo.wire.makers import Prefix

#: What ZEO writes; any protocol is read.
PICKLE_PROTOCOL = 3

#: How deep containers may be nested.
DEPTH = 50

#: How often a pickle may refer to containers it has already described.
SHARED = 4

#: How many bytes, or digits as text, a number may have.
NUMBER = 1000

#: How many opcodes a pickle may have.  Clients have no use for many: records are single opcodes.
#: Servers send lists of oids.
FROM_CLIENT = 250_000
FROM_SERVER = 10_000_000

#: A container may be made for so many bytes of pickle, and some more in any case.
CONTAINER_BYTES = 8
CONTAINERS = 5_000


def dumps(value: Any) -> bytes:
    """Pickle plain values.

    Raises `pickle.PicklingError` for what the other side would refuse, and else what `pickle.dumps`
    raises, which may be anything if the values have code of their own.
    """
    pickled = pickle.dumps(value, PICKLE_PROTOCOL)
    if _is_simple(pickled):
        return pickled
    try:
        _Walk(pickled, FROM_SERVER).prove()
        return pickled
    except ProtocolError:
        pass  # perhaps parts of it occur many times: spell them out
    file = io.BytesIO()
    pickler = pickle.Pickler(file, PICKLE_PROTOCOL)
    pickler.fast = True
    pickler.dump(value)
    pickled = file.getvalue()
    try:
        _Walk(pickled, FROM_SERVER).prove()
    except ProtocolError as error:
        raise pickle.PicklingError(f'only plain values can be sent: {error}') from None
    return pickled


def load_from_client(data: bytes | bytearray) -> Any:
    """Unpickle plain values a client sent; raises `ProtocolError` for everything else."""
    return _load(data, FROM_CLIENT)


def load_from_server(data: bytes | bytearray) -> Any:
    """Unpickle plain values a server sent; raises `ProtocolError` for everything else."""
    return _load(data, FROM_SERVER)


def _load(data: bytes | bytearray, opcodes: int) -> Any:
    try:
        if _is_simple(data) or not _Walk(data, opcodes).prove():
            return pickle.loads(data)
        return _PlainUnpickler(data).load()
    except ProtocolError:
        raise
    except Exception as error:  # a damaged pickle may fail with just about anything
        raise ProtocolError('a message that cannot be unpickled (%.200s)' % error) from None


# ---- the short proof ---------------------------------------------------------------

_CODES = {opcode.name: ord(opcode.code) for opcode in pickletools.opcodes}

_unpack_length = Struct('<I').unpack_from

#: How many opcodes the short proof looks at: so few that they cannot make too many keys.
_SIMPLE = KEYS

# What the short proof knows of an opcode: its whole size, up to 9, or one of these.
_COUNTED_1, _COUNTED_4, _ABSORBS, _ENDS, _OTHER = range(10, 15)


def _kinds() -> bytes:
    kinds = bytearray([_OTHER]) * 256
    for kind, names in {
        1: 'NONE NEWTRUE NEWFALSE EMPTY_TUPLE EMPTY_LIST EMPTY_DICT EMPTY_SET MARK MEMOIZE',
        2: 'PROTO BININT1 BINPUT',
        3: 'BININT2',
        5: 'BININT',
        9: 'BINFLOAT FRAME',
        _COUNTED_1: 'LONG1 SHORT_BINBYTES SHORT_BINUNICODE SHORT_BINSTRING',
        _COUNTED_4: 'BINBYTES BINUNICODE',
        _ABSORBS: 'TUPLE1 TUPLE2 TUPLE3 TUPLE LIST DICT APPEND APPENDS SETITEM SETITEMS'
                  ' ADDITEMS FROZENSET',
        _ENDS: 'STOP',
    }.items():
        for name in names.split():
            kinds[_CODES[name]] = kind
    return bytes(kinds)


_KINDS = _kinds()


def _is_simple(data: bytes | bytearray) -> bool:
    """Whether a pickle is too short and simple to do anything but make plain values.

    Each opcode adds one level of depth at most, and only by absorbing others; so their number bounds
    the depth.  Nothing here refers to anything again, and memo indexes have one byte.
    """
    at = absorbing = 0
    try:
        for _ in repeat(None, _SIMPLE):
            kind = _KINDS[data[at]]
            if kind < 10:
                at += kind
            elif kind == _COUNTED_1:
                at += 2 + data[at + 1]
            elif kind == _COUNTED_4:
                at += 5 + _unpack_length(data, at + 1)[0]
            elif kind == _ABSORBS:
                at += 1
                absorbing += 1
            else:
                return kind == _ENDS and absorbing < DEPTH and at + 1 == len(data)
    except (IndexError, StructError):
        pass  # it ends too early; the long proof says so
    return False


# ---- the long proof ----------------------------------------------------------------

# What the walk knows of a value on the pickle's stack.  A container is one more than the greatest of
# its contents, and 2 at least, even if it is empty: it may be filled later, after it was put into the
# memo.  The last two are far beyond `DEPTH`, so that no container can hold them.
_TEXT = 0  # text or bytes
_ATOM = 1  # a number, None, ...
_RECIPE = 1000  # the arguments of `copyreg._reconstructor`, or of ZODB's for errors
_MAKER = 1001  # one of `MAKERS`


def _sizes(sizes: dict[str, int]) -> bytes:
    by_code = bytearray(256)
    for name, size in sizes.items():
        by_code[_CODES[name]] = size
    return bytes(by_code)


_ATOMS = _sizes({'NONE': 1, 'NEWTRUE': 1, 'NEWFALSE': 1, 'BININT1': 2, 'BININT2': 3, 'BININT': 5,
                 'BINFLOAT': 9})
_COUNTED = _sizes({'SHORT_BINBYTES': 1, 'BINBYTES': 4, 'BINBYTES8': 8, 'BYTEARRAY8': 8,
                   'SHORT_BINUNICODE': 1, 'BINUNICODE': 4, 'BINUNICODE8': 8,
                   'SHORT_BINSTRING': 1, 'BINSTRING': 4})
_STOP = _CODES['STOP']


class _Walk:
    """What a pickle would do to its stack, and to the limits."""

    __slots__ = ('data', 'opcodes', 'at', 'stack', 'marks', 'memo', 'shared', 'keys', 'containers',
                 'has_makers')

    def __init__(self, data: bytes | bytearray, opcodes: int) -> None:
        self.data = data
        self.opcodes = opcodes
        self.at = 0
        self.stack: list[int] = []
        self.marks: list[int] = []
        self.memo: list[int] = []
        self.shared = 0
        self.keys = 0
        self.containers = 0
        self.has_makers = False

    def prove(self) -> bool:
        """Whether the pickle names makers; raises `ProtocolError` if it is not proved harmless."""
        data = self.data
        push = self.stack.append
        at = 0
        try:
            for _ in repeat(None, self.opcodes):
                code = data[at]
                size = _ATOMS[code]
                if size:
                    at += size
                    push(_ATOM)
                    continue
                size = _COUNTED[code]
                if size:
                    at += 1
                    at += size + (data[at] if size == 1
                                  else int.from_bytes(data[at:at + size], 'little'))
                    push(_TEXT)
                    continue
                if code == _STOP:
                    break
                step = _STEPS[code]
                if step is None:
                    raise ProtocolError(f'a message with the pickle opcode {chr(code)!r}')
                self.at = at + 1
                step(self)
                at = self.at
            else:
                raise ProtocolError(f'a message of more than {self.opcodes} parts')
            result, = self.top(1)
        except (IndexError, ValueError):
            raise ProtocolError('a damaged message') from None
        if at + 1 != len(data):
            raise ProtocolError('a message with something behind its end')
        if result >= _RECIPE:
            raise ProtocolError('a message that is a type')
        if self.containers > CONTAINERS and self.containers * CONTAINER_BYTES > len(data):
            raise ProtocolError('a message of hardly anything but containers')
        return self.has_makers

    # ---- arguments that stand in the pickle

    def number(self, size: int) -> int:
        at = self.at
        self.at = at + size
        return int.from_bytes(self.data[at:at + size], 'little')

    def line(self, limit: int) -> bytes:
        end = self.data.find(b'\n', self.at, self.at + limit + 1)
        if end < 0:
            raise ProtocolError('a message with an endless line or number')
        line = bytes(self.data[self.at:end])
        self.at = end + 1
        return line

    def index(self) -> int:
        line = self.line(20)
        if not line.isdigit():
            raise ValueError
        return int(line)

    def proto(self) -> None:
        if self.number(1) > pickle.HIGHEST_PROTOCOL:
            raise ProtocolError('a message in an unknown pickle protocol')

    def skip_number(self, size: int) -> None:
        length = self.number(size)
        if length > NUMBER:
            raise ProtocolError(f'a message with a number of {length} bytes')
        self.at += length
        self.stack.append(_ATOM)

    def skip_number_line(self) -> None:
        self.line(NUMBER)
        self.stack.append(_ATOM)

    def skip_text_line(self) -> None:
        self.line(len(self.data))
        self.stack.append(_TEXT)

    # ---- values on the stack

    def mark(self) -> None:
        if len(self.marks) > DEPTH:
            raise ProtocolError('a message that begins too many things at once')
        self.marks.append(len(self.stack))

    def from_mark(self) -> list[int]:
        """Take what was pushed since the last mark."""
        mark = self.marks.pop()
        values = self.stack[mark:]
        del self.stack[mark:]
        return values

    def top(self, count: int) -> list[int]:
        """Take ``count`` values."""
        start = len(self.stack) - count
        if start < (self.marks[-1] if self.marks else 0):
            raise IndexError
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def push_container(self, contents: list[int]) -> None:
        self.containers += 1
        self.push_deeper(max(contents, default=_ATOM))

    def push_deeper(self, content: int) -> None:
        if content > DEPTH:
            raise ProtocolError('a message with a type for a value' if content >= _RECIPE else
                                f'a message nested deeper than {DEPTH} levels')
        self.stack.append(max(content, _ATOM) + 1)

    def push_tuple(self, contents: list[int]) -> None:
        if len(contents) == 3 and _MAKER in contents and contents[2] <= _ATOM:
            self.stack.append(_RECIPE)
        elif len(contents) == 2 and contents[0] == _MAKER and contents[1] < _RECIPE:
            self.stack.append(_RECIPE)  # what is made of it is a text, however deep the state may be
        else:
            self.push_container(contents)

    def grow(self, contents: list[int]) -> None:
        """The container on top of the stack gets new contents."""
        self.push_deeper(max(max(contents, default=0), self.top(1)[0] - 1))

    def count_keys(self, keys: list[int]) -> list[int]:
        self.keys += len(keys) - keys.count(_TEXT)
        if self.keys > KEYS:
            raise ProtocolError(f'a message with more than {KEYS} unusual keys')
        return keys

    def push_dict(self) -> None:
        contents = self.from_mark()
        self.count_keys(contents[::2])
        self.push_container(contents)

    def set_items(self, contents: list[int]) -> None:
        self.count_keys(contents[::2])
        self.grow(contents)

    # ---- what occurs again

    def put(self, index: int) -> None:
        if index > len(self.memo):
            raise ProtocolError('a message whose memo has holes')
        self.memo[index:index + 1] = self.stack[-1:]

    def again(self, value: int) -> None:
        if _ATOM < value < _RECIPE:
            self.shared += 1
            if self.shared > SHARED:
                raise ProtocolError('a message that refers to its own parts too often')
        self.stack.append(value)

    def duplicate(self) -> None:
        value, = self.top(1)
        self.stack.append(value)
        self.again(value)

    # ---- globals and their use

    def name(self) -> None:
        name = self.line(100).decode(), self.line(100).decode()
        if name not in MAKERS:
            raise ProtocolError('a message that names %.100r.%.100r' % name)
        self.push_maker()

    def name_from_stack(self) -> None:
        self.top(2)  # these are values: `find_class` looks at them
        self.push_maker()

    def push_maker(self) -> None:
        self.has_makers = True
        self.stack.append(_MAKER)

    def make(self) -> None:
        maker, arguments = self.top(2)
        if maker != _MAKER:
            raise ProtocolError('a message that calls a value')
        self.push_container([_ATOM if arguments == _RECIPE else arguments])


_STEPS: list[Callable[[_Walk], None] | None] = [None] * 256
for _name, _step in {
    'PROTO': _Walk.proto,
    'FRAME': lambda walk: walk.number(8),  # how much follows; we have it all
    'INT': _Walk.skip_number_line,
    'LONG': _Walk.skip_number_line,
    'FLOAT': _Walk.skip_number_line,
    'LONG1': lambda walk: walk.skip_number(1),
    'LONG4': lambda walk: walk.skip_number(4),
    'UNICODE': _Walk.skip_text_line,
    'MARK': _Walk.mark,
    'EMPTY_TUPLE': lambda walk: walk.push_container([]),
    'EMPTY_LIST': lambda walk: walk.push_container([]),
    'EMPTY_DICT': lambda walk: walk.push_container([]),
    'EMPTY_SET': lambda walk: walk.push_container([]),
    'TUPLE': lambda walk: walk.push_tuple(walk.from_mark()),
    'TUPLE1': lambda walk: walk.push_tuple(walk.top(1)),
    'TUPLE2': lambda walk: walk.push_tuple(walk.top(2)),
    'TUPLE3': lambda walk: walk.push_tuple(walk.top(3)),
    'LIST': lambda walk: walk.push_container(walk.from_mark()),
    'DICT': _Walk.push_dict,
    'FROZENSET': lambda walk: walk.push_container(walk.count_keys(walk.from_mark())),
    'APPEND': lambda walk: walk.grow(walk.top(1)),
    'APPENDS': lambda walk: walk.grow(walk.from_mark()),
    'SETITEM': lambda walk: walk.set_items(walk.top(2)),
    'SETITEMS': lambda walk: walk.set_items(walk.from_mark()),
    'ADDITEMS': lambda walk: walk.grow(walk.count_keys(walk.from_mark())),
    'PUT': lambda walk: walk.put(walk.index()),
    'BINPUT': lambda walk: walk.put(walk.number(1)),
    'LONG_BINPUT': lambda walk: walk.put(walk.number(4)),
    'MEMOIZE': lambda walk: walk.put(len(walk.memo)),
    'GET': lambda walk: walk.again(walk.memo[walk.index()]),
    'BINGET': lambda walk: walk.again(walk.memo[walk.number(1)]),
    'LONG_BINGET': lambda walk: walk.again(walk.memo[walk.number(4)]),
    'DUP': _Walk.duplicate,
    'GLOBAL': _Walk.name,
    'STACK_GLOBAL': _Walk.name_from_stack,
    'REDUCE': _Walk.make,
    'NEWOBJ': _Walk.make,
    'BUILD': lambda walk: walk.grow(walk.top(1)),
}.items():
    _STEPS[_CODES[_name]] = _step


# ---- the globals -------------------------------------------------------------------

class _PlainUnpickler(pickle.Unpickler):
    """An unpickler that knows the names in `MAKERS` and nothing else."""

    def __init__(self, data: bytes | bytearray) -> None:
        super().__init__(io.BytesIO(data))
        self.budget = len(data)  # what makers may copy: as much as was sent

    def find_class(self, module: str, name: str) -> Any:
        make = MAKERS.get((module, name))
        if make is None:
            raise ProtocolError('a message that names %.100r.%.100r' % (module, name))
        return make if make is Prefix else _Maker(self, make)


class _Maker:
    """Stands for a global in a pickle: called with plain values, it makes a plain value."""

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
