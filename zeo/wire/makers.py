"""What the names of globals in a pickle from the network stand for.

Each is a function that takes plain values of its kind and makes a plain value; there are no others.
`pickles` says how they are called, and why they can be neither altered nor part of a result.
"""

from collections.abc import Callable
from typing import Any

from zeo.errors import ProtocolError

#: How many keys of dictionaries and elements of sets may be something other than text or bytes.
KEYS = 500


def _sequence(kind: Callable[..., Any]) -> Callable[..., Any]:
    def make(items: Any = ()) -> Any:
        if not isinstance(items, (list, tuple, set, frozenset, dict)):
            raise ProtocolError('a message that makes a container from something else')
        return kind(items)
    return make


def _with_keys(kind: Callable[..., Any]) -> Callable[..., Any]:
    make_any = _sequence(kind)

    def make(items: Any = ()) -> Any:
        if len(items) > KEYS and not all(isinstance(item, (bytes, str)) for item in items):
            raise ProtocolError(f'a message with more than {KEYS} unusual keys')
        return make_any(items)
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


def _object() -> Any:
    raise ProtocolError('a message that makes an object without properties')


def _reconstruct(kind: Any, base: Any, state: Any) -> Any:
    """`copyreg._reconstructor`, which protocols 0 and 1 use for instances of classes."""
    if kind is not Prefix:
        raise ProtocolError('a message that makes an unknown kind of object')
    return Prefix()


def _undo_error() -> Any:
    raise ProtocolError('a message that makes an error without a reason')


def _error_text(kind: Any, state: Any) -> Any:
    """What an error says that stands within another: stock servers send ZODB's undo errors so."""
    reason = state.get('_reason') if isinstance(state, dict) else None
    if not isinstance(reason, str):
        raise ProtocolError('a message that makes an error without a reason')
    return reason


class Prefix:
    """Equal to any path that begins with the same names: `ZopeUndo.Prefix.Prefix`.

    Zope asks with it for the transactions of one folder.  It compares with the user name of a
    transaction, which there consists of the path of the user folder, a space and the name.
    """

    __slots__ = ('path',)
    __hash__ = None  # type: ignore[assignment]

    path: list[str]

    def __new__(cls, path: str = '') -> 'Prefix':
        self = super().__new__(cls)
        self.path = path.split('/')
        return self

    def __reduce__(self) -> Any:
        raise TypeError('an undo prefix is for asking, not for storing')

    def __setstate__(self, state: Any) -> None:
        path = state.get('path') if isinstance(state, dict) else None
        if not isinstance(path, list) or not all(isinstance(name, str) for name in path):
            raise ProtocolError('an undo prefix without its path')
        self.path = path

    def __eq__(self, other: object) -> bool:
        if isinstance(other, bytes):
            other = other.decode('utf-8', 'replace')
        if not isinstance(other, str):
            return NotImplemented
        path = other.split('/')
        if ' ' in path[-1]:
            path[-1] = path[-1].rpartition(' ')[0]
        return path[:len(self.path)] == self.path


MAKERS: dict[tuple[str, str], Any] = {
    ('zodbpickle', 'binary'): _bytes_like(bytes),
    ('copyreg', '_reconstructor'): _reconstruct,
    ('copy_reg', '_reconstructor'): _reconstruct,
    ('_codecs', 'encode'): _encode,
    ('ZopeUndo.Prefix', 'Prefix'): Prefix,
    ('ZODB.POSException', '_recon'): _error_text,
    ('ZODB.POSException', 'UndoError'): _undo_error,
}
for _builtins in ('builtins', '__builtin__'):
    MAKERS.update({
        (_builtins, 'dict'): _with_keys(dict),
        (_builtins, 'set'): _with_keys(set),
        (_builtins, 'frozenset'): _with_keys(frozenset),
        (_builtins, 'list'): _sequence(list),
        (_builtins, 'tuple'): _sequence(tuple),
        (_builtins, 'bytes'): _bytes_like(bytes),
        (_builtins, 'bytearray'): _bytes_like(bytearray),
        (_builtins, 'str'): _text,
        (_builtins, 'int'): _number(int),
        (_builtins, 'float'): _number(float),
        (_builtins, 'complex'): _number(complex),
        (_builtins, 'bool'): _number(bool),
        (_builtins, 'object'): _object,
    })
