"""Records of objects that resolve conflicts, or do not, or would do harm."""

import io
from typing import Any

import pytest
from persistent import Persistent
from ZODB._compat import PersistentPickler
from ZODB._compat import PersistentUnpickler
from ZODB.POSException import ConflictError

from tests.server.talk import oid
from zeo.server.conflicts import Resolver

#: What was done to the objects of this module.
effects: list[Any] = []


class Keeper(Persistent):
    """The last one wins."""

    def _p_resolveConflict(self, old: Any, saved: Any, new: Any) -> Any:
        effects.append((old, saved, new))
        return new


class Made(Keeper):
    """With arguments for ``__new__``."""

    made: list[Any] = []

    def __new__(cls, *args: Any) -> 'Made':
        cls.made.append(args)
        return Persistent.__new__(cls)


class Stubborn(Persistent):
    pass


class Broken(Persistent):
    def _p_resolveConflict(self, *states: Any) -> Any:
        raise RuntimeError('not today')


def sing(*args: Any) -> list[Any]:
    effects.append(args)
    return effects


class Bird:
    """Sings if anything is done to it."""

    def __init__(self, *args: Any) -> None:
        sing(*args)

    def __setstate__(self, state: Any) -> None:
        sing(state)


class Reference:
    """Becomes a reference to a persistent object in a record."""

    def __init__(self, data: Any) -> None:
        self.data = data


def record(kind: Any, state: Any, protocol: int = 3) -> bytes:
    file = io.BytesIO()
    pickler = PersistentPickler(lambda each: each.data if type(each) is Reference else None, file, protocol)
    pickler.dump(kind)
    pickler.dump(state)
    return file.getvalue()


class Revisions:
    """All that a resolver asks of a storage: the two revisions on which the new record is not based."""

    def __init__(self, old: bytes, saved: bytes) -> None:
        self._records = {b'old': old, b'saved': saved}

    def loadSerial(self, oid: bytes, serial: bytes) -> bytes:
        return self._records[serial]

    @staticmethod
    def _crs_untransform_record_data(data: bytes) -> bytes:
        return data

    _crs_transform_record_data = _crs_untransform_record_data


def resolve(new: bytes, saved: bytes | None = None, old: bytes | None = None) -> bytes:
    revisions = Revisions(new if old is None else old, new if saved is None else saved)
    return Resolver(revisions)(oid(1), b'saved', b'old', new)


def state_of(data: bytes) -> Any:
    """As a client reads it, with references as they stand there."""
    unpickler = PersistentUnpickler(None, Reference, io.BytesIO(data))
    unpickler.load()
    return unpickler.load()


def refused(new: bytes, **others: bytes) -> None:
    with pytest.raises(ConflictError) as caught:
        resolve(new, **others)
    assert caught.value.oid == oid(1) and caught.value.serials == (b'saved', b'old')
    assert not effects


#: Pieces of pickle that name what is here.
HERE = __name__.encode()
SING = b'c' + HERE + b'\nsing\n'
BIRD = b'c' + HERE + b'\nBird\n'
KEEPER = b'c' + HERE + b'\nKeeper\n'

#: Runs with `pickle.loads`, and with ZODB's ways to look at a record.
SINGING = b'\x80\x03N0' + SING + b')R.' + b'N.'
