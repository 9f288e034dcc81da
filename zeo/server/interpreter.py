"""Reads a record, which is a program that some client has sent, and makes plain values and nothing else.

ZODB would run its two pickles.  Here they are read by an interpreter of our own: it imports nothing and calls no name
but those in `_MAKERS`, and what it made is proved to be plain before it is used.

Plain are numbers, text, bytes, containers, dates and times, decimal numbers, UUIDs, and references to persistent
objects, which are `ZODB.ConflictResolution`'s.
"""

import collections
import datetime
import decimal
import encodings.raw_unicode_escape  # noqa: F401  (reading a record must not be what imports it)
import io
import itertools
import pickletools
import sys
import uuid
from collections.abc import Callable
from typing import Any

from ZODB.ConflictResolution import PersistentReference
from ZODB.ConflictResolution import PersistentReferenceFactory

from zeo.wire import makers

#: Records that are longer, in bytes, or have more opcodes, or values of more parts, counted as often as they
#: occur, are not resolved: it would take too long with the commit lock.
LONGEST = 16 * 1024 * 1024
OPCODES = 500_000
PARTS = 1_000_000

#: How deep values may be nested; of how many parts a key of a dictionary may consist.
DEPTH = 100
KEY_PARTS = 1000

#: How many keys may be something else than text, bytes or whole numbers of usual size, whose hashes are
#: different (n equal hashes take n**2 steps).
UNUSUAL_KEYS = 10_000


class Unresolvable(Exception):
    """Why a conflict is not resolved, in words for the debug log."""


class Record:
    """An object as it is stored: the name of its class, arguments for ``__new__``, and its state.

    ``head`` is the first pickle, which tells the class.  Raises `Unresolvable`, or what a damaged record
    leads to.
    """

    def __init__(self, record: bytes, references: PersistentReferenceFactory) -> None:
        if len(record) > LONGEST:
            raise Unresolvable(f'a record of {len(record)} bytes')
        self._reader = _Reader(record, references)
        found = self._reader.next()
        self.head = record[:self._reader.at]
        arguments: Any = ()
        # As `ZODB.serialize` has it: the class, or the class (or its names) with arguments.
        if isinstance(found, tuple) and len(found) == 2:
            found, arguments = found
        match found:
            case _Name(module, name) | (str(module), str(name)):
                self.module, self.name = module, name
            case _:
                raise Unresolvable('a record without a class')
        if not (self.module + self.name).isprintable():
            raise Unresolvable('a class with a name that cannot be logged')
        self._reader.prove_plain(arguments)
        if arguments is not None and type(arguments) is not tuple:
            raise Unresolvable('arguments that are no tuple')
        self.arguments = arguments or ()

    def state(self) -> Any:
        """What the second pickle describes; to be called once."""
        state = self._reader.next()
        self._reader.prove_plain(state)
        return state


class _Name:
    """A class, which is only named: that does no harm, and nothing else."""

    __match_args__ = 'module', 'name'

    def __init__(self, module: str, name: str) -> None:
        self.module = module
        self.name = name


class _Maker:
    """What stands for one of `_MAKERS` while a record is read."""

    def __init__(self, make: Callable[..., Any]) -> None:
        self.make = make


class _Reader:
    """Reads pickles that follow each other; opcodes and their arguments are `pickletools`' affair."""

    def __init__(self, record: bytes, references: PersistentReferenceFactory) -> None:
        self._file = io.BytesIO(record)
        self._references = references
        self._memo: dict[int, Any] = {}
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._unusual = 0  # keys
        self._parts = PARTS  # so many may be looked at, see `prove_plain`

    @property
    def at(self) -> int:
        return self._file.tell()

    def next(self) -> Any:
        """What the next pickle describes; it may still contain what is not plain."""
        try:
            return self._next()
        except Unresolvable:
            raise
        except Exception as error:  # a damaged record may fail with just about anything
            raise Unresolvable(f'a record that cannot be read ({error!s:.200})') from None

    def _next(self) -> Any:
        self._stack.clear()
        self._marks.clear()
        for opcode, argument, _ in itertools.islice(pickletools.genops(self._file), OPCODES):
            name = opcode.name
            if name in _ARGUMENTS:
                self._stack.append(argument)
            elif name in _CONSTANTS:
                self._stack.append(_CONSTANTS[name]())
            elif name in _STEPS:
                _STEPS[name](self, argument)
            elif name == 'STOP':
                return self._stack.pop()
            elif name != 'PROTO':
                raise Unresolvable(f'the opcode {name}')
        raise Unresolvable(f'more than {OPCODES} opcodes')

    def mark(self, _: Any) -> None:
        self._marks.append(len(self._stack))

    def since_mark(self) -> list[Any]:
        mark = self._marks.pop()
        values = self._stack[mark:]
        del self._stack[mark:]
        return values

    def put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def text(self, value: str) -> None:
        """Python 2's."""
        if not value.isascii():
            raise Unresolvable('text in no known encoding')
        self._stack.append(value)

    def collect(self, count: int) -> None:
        start = len(self._stack) - count
        if start < 0:
            raise Unresolvable('a damaged record')
        values = tuple(self._stack[start:])
        del self._stack[start:]
        self._stack.append(values)

    def extend(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) not in (list, collections.deque):
            raise Unresolvable('something is appended to what is no list')
        target.extend(values)

    def update(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) not in (dict, collections.OrderedDict):
            raise Unresolvable('items are set in what is no dictionary')
        for key, value in zip(values[::2], values[1::2], strict=True):
            target[self.key(key)] = value

    def key(self, value: Any) -> Any:
        """What may be hashed, now and later."""
        kind = type(value)
        if kind is not str and kind is not bytes and not (kind is int and abs(value) < _MODULUS):
            self.prove_plain(value, KEY_PARTS)
            self._unusual += 1
            if self._unusual > UNUSUAL_KEYS:
                raise Unresolvable(f'more than {UNUSUAL_KEYS} unusual keys')
        return value

    def name(self, names: str) -> None:
        module, _, name = names.partition(' ')
        self._stack.append(_MAKERS.get((module, name)) or _Name(module, name))

    def pop_pair(self) -> tuple[Any, Any]:
        second, first = self._stack.pop(), self._stack.pop()
        return first, second

    def make(self, _: Any) -> None:
        maker, arguments = self.pop_pair()
        if type(maker) is not _Maker or type(arguments) is not tuple:
            raise Unresolvable(f'{_called(maker)} is called')
        self.prove_plain(arguments)
        if maker.make in (set, frozenset):
            arguments = tuple([self.key(each) for each in argument] for argument in arguments)
        self._stack.append(maker.make(*arguments))

    def make_instance(self, _: Any) -> None:
        maker, arguments = self.pop_pair()
        if maker is not _UUID or arguments != ():
            raise Unresolvable(f'an instance of {_called(maker)}')
        self._stack.append(uuid.UUID.__new__(uuid.UUID))

    def build(self, _: Any) -> None:
        instance, state = self.pop_pair()
        if type(instance) is not uuid.UUID or type(state) is not dict:
            raise Unresolvable('the state of an object')
        number = state.get('int')
        if type(number) is not int or not 0 <= number < 1 << 128 or hasattr(instance, 'int'):
            raise Unresolvable('a damaged UUID')
        instance.__setstate__({'int': number})  # type: ignore[attr-defined]
        self._stack.append(instance)

    def refer(self, _: Any) -> None:
        """To another object, in one of the forms of `ZODB.serialize`; its class is given by its name."""
        match self._stack.pop():
            case [oid, _Name(module, name)] if isinstance(oid, bytes | str):
                reference: Any = oid, (module, name)
            case ['m', (database, oid, _Name(module, name))]:
                reference = ['m', (database, oid, (module, name))]
            case other:
                reference = other
        self.prove_plain(reference, 20)
        self._stack.append(self._references.persistent_load(reference))

    def prove_plain(self, value: Any, most: int | None = None) -> None:
        """Raise `Unresolvable` unless a value is plain, and of so few parts, counted as often as they occur.

        So nothing that looks at all of it, to hash or to compare it, takes long or recurses deep.
        """
        left = [(value, 0)]
        count = 0
        while left:
            each, depth = left.pop()
            count += 1
            if count > (self._parts if most is None else most) or depth > DEPTH:
                raise Unresolvable('a value that is nested too deep, or refers to its own parts too often')
            kind = type(each)
            if kind in _CONTAINERS:
                depth += 1
                left.extend([(inner, depth) for inner in each])
                if kind in (dict, collections.OrderedDict):
                    left.extend([(inner, depth) for inner in each.values()])
            elif kind not in _ATOMS or kind is uuid.UUID and not hasattr(each, 'int'):  # never finished
                raise Unresolvable(f'{_called(each)}, which is no plain value')
        if most is None:
            self._parts -= count


def _called(value: Any) -> str:
    return f'{value.module}.{value.name}' if type(value) is _Name else f'a {type(value).__name__}'


_MODULUS = sys.hash_info.modulus

_ATOMS = {type(None), bool, int, float, complex, str, bytes, bytearray, datetime.date, datetime.time,
          datetime.datetime, datetime.timedelta, datetime.timezone, decimal.Decimal, uuid.UUID,
          PersistentReference}
_CONTAINERS = {tuple, list, set, frozenset, dict, collections.OrderedDict, collections.deque}


def _decimal(text: Any) -> decimal.Decimal:
    if not isinstance(text, str) or len(text) > 1000:
        raise Unresolvable('a decimal number of something else than digits')
    return decimal.Decimal(text)


def _ordered(items: Any = ()) -> 'collections.OrderedDict[Any, Any]':
    if items:  # Python 2's; its keys would have to be looked at
        raise Unresolvable('an ordered dictionary of another kind')
    return collections.OrderedDict()


_UUID = _Maker(uuid.UUID)

#: What a record may call, or make an instance of: nothing that looks at anything but its arguments.
_MAKERS = {
    ('datetime', 'date'): _Maker(datetime.date),
    ('datetime', 'datetime'): _Maker(datetime.datetime),
    ('datetime', 'time'): _Maker(datetime.time),
    ('datetime', 'timedelta'): _Maker(datetime.timedelta),
    ('datetime', 'timezone'): _Maker(datetime.timezone),
    ('decimal', 'Decimal'): _Maker(_decimal),
    ('collections', 'OrderedDict'): _Maker(_ordered),
    ('collections', 'deque'): _Maker(collections.deque),
    ('uuid', 'UUID'): _UUID,
}
for _name in ('zodbpickle.binary', '_codecs.encode', 'builtins.bytes', 'builtins.bytearray',
              'builtins.complex'):
    _module, _, _last = _name.rpartition('.')
    _MAKERS[_module, _last] = _Maker(makers.MAKERS[_module, _last])
for _kind in (set, frozenset):
    _MAKERS['builtins', _kind.__name__] = _Maker(_kind)
_MAKERS.update({('__builtin__', name): maker for (module, name), maker in _MAKERS.items()
                if module == 'builtins'})

# Opcodes, up to protocol 3, which is the latest that ZODB reads.

#: Those whose argument is the value.
_ARGUMENTS = frozenset({
    'INT', 'BININT', 'BININT1', 'BININT2', 'LONG', 'LONG1', 'LONG4', 'FLOAT', 'BINFLOAT', 'UNICODE',
    'BINUNICODE', 'SHORT_BINBYTES', 'BINBYTES'})

_CONSTANTS: dict[str, Callable[[], Any]] = {
    'NONE': lambda: None, 'NEWTRUE': lambda: True, 'NEWFALSE': lambda: False,
    'EMPTY_TUPLE': tuple, 'EMPTY_LIST': list, 'EMPTY_DICT': dict}

_STEPS: dict[str, Callable[[_Reader, Any], None]] = {
    'SHORT_BINSTRING': _Reader.text,
    'BINSTRING': _Reader.text,
    'MARK': _Reader.mark,
    'TUPLE1': lambda reader, _: reader.collect(1),
    'TUPLE2': lambda reader, _: reader.collect(2),
    'TUPLE3': lambda reader, _: reader.collect(3),
    'TUPLE': lambda reader, _: reader._stack.append(tuple(reader.since_mark())),
    'LIST': lambda reader, _: reader._stack.append(reader.since_mark()),
    'APPEND': lambda reader, _: reader.extend([reader._stack.pop()]),
    'APPENDS': lambda reader, _: reader.extend(reader.since_mark()),
    'SETITEM': lambda reader, _: reader.update(list(reversed([reader._stack.pop(), reader._stack.pop()]))),
    'SETITEMS': lambda reader, _: reader.update(reader.since_mark()),
    'PUT': _Reader.put,
    'BINPUT': _Reader.put,
    'LONG_BINPUT': _Reader.put,
    'GET': _Reader.get,
    'BINGET': _Reader.get,
    'LONG_BINGET': _Reader.get,
    'GLOBAL': _Reader.name,
    'REDUCE': _Reader.make,
    'NEWOBJ': _Reader.make_instance,
    'BUILD': _Reader.build,
    'BINPERSID': _Reader.refer,
}
