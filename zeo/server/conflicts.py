"""Resolves conflicts on the server, in the place of ZODB's own code, and runs nothing but what resolves.

A record is a program in two pickles, which some client has sent.  ZODB would run it; here `interpreter` reads it.
The one thing of an application that is run is ``_p_resolveConflict`` (and ``__new__``) of the record's class, if
the committed record has the same class and `zeo.server.classes` finds that it defines that method.

What can be resolved: states that are plain (`interpreter`).  Everything else is an ordinary conflict.
"""

import io
import logging
from collections.abc import Callable
from typing import Any

from ZODB._compat import PersistentPickler
from ZODB.ConflictResolution import PersistentReferenceFactory
from ZODB.ConflictResolution import persistent_id
from ZODB.POSException import ConflictError
from ZODB.POSException import POSKeyError

from zeo.server import classes
from zeo.server.interpreter import Record
from zeo.server.interpreter import Unresolvable
from zeo.server.seldom import Seldom

logger = logging.getLogger(__name__)

_PICKLE_PROTOCOL = 3  # ZODB's


def take_over(storage: Any, by_clients: bool) -> bool:
    """Resolve the conflicts of a storage here, or leave them to the clients.

    Storages that have ZODB's ``tryToResolveConflict``, also those that a wrapper has among its attributes,
    call ours from now on.  False: there is none, and `check` has to be called before anything is stored.
    """
    resolving = [each for each in storages(storage) if hasattr(type(each), 'tryToResolveConflict')]
    for each in resolving:
        each.tryToResolveConflict = _leave_it_to_the_client if by_clients else Resolver(each)
    return bool(resolving)


def storages(storage: Any) -> list[Any]:
    """The storage, and those that it wraps."""
    found = [storage]
    for each in found:
        for inner in getattr(each, '__dict__', {}).values():
            if hasattr(inner, 'loadBefore') and hasattr(inner, 'tpc_vote') and all(
                    inner is not known for known in found):
                found.append(inner)
    return found


def check(storage: Any, oid: bytes, serial: bytes) -> None:
    """Raise the `ConflictError` that the storage would raise, since its own might unpickle the record.

    With the commit lock: what is current now is current when the storage is called.
    """
    try:
        current: bytes = storage.getTid(oid)
    except POSKeyError:  # a new one
        return
    if current != serial:
        raise ConflictError(oid=oid, serials=(current, serial))


def _leave_it_to_the_client(oid: bytes, committed: bytes, old: bytes, record: bytes,
                            committed_data: bytes = b'') -> bytes:
    # With ``data=record`` the error would unpickle what the client sent, to name its class.
    raise ConflictError(oid=oid, serials=(committed, old))


class Resolver:
    """A storage's ``tryToResolveConflict``."""

    def __init__(self, storage: Any) -> None:
        self._load: Callable[[bytes, bytes], bytes] = storage.loadSerial
        self._storage = storage
        self._warnings = Seldom(logger)

    def __call__(self, oid: bytes, committed: bytes, old: bytes, record: bytes,
                 committed_data: bytes = b'') -> bytes:
        """The record that has both changes: ``record`` was made of revision ``old`` of the object.

        Raises `ConflictError`, whatever goes wrong.
        """
        # What ZODB's storages are given if records are stored in another form (compressed, say).
        decode = self._storage._crs_untransform_record_data
        encode: Callable[[bytes], bytes] = self._storage._crs_transform_record_data
        class_name = None
        try:
            references = PersistentReferenceFactory()
            new = Record(decode(record), references)
            class_name = f'{new.module}.{new.name}'
            saved = Record(decode(committed_data or self._load(oid, committed)), references)
            before = Record(decode(self._load(oid, old)), references)
            return encode(_resolved(before, saved, new))
        except (ConflictError, Unresolvable, POSKeyError) as error:
            logger.debug('%s: a conflict is not resolved: %s', class_name, error)
        except Exception as error:
            # Of the application's class, as a rule.  A client need not be told more than that there is a
            # conflict, since it can start again.
            self._warnings.warning('%s: a conflict cannot be resolved: %s: %s', class_name,
                                   type(error).__name__, error)
            logger.debug('%s: where it failed', class_name, exc_info=True)
        conflict = ConflictError(oid=oid, serials=(committed, old))
        conflict.class_name = class_name
        raise conflict


def _resolved(before: Record, saved: Record, new: Record) -> bytes:
    if (saved.module, saved.name) != (new.module, new.name):
        raise Unresolvable(f'it was committed with the class {saved.module}.{saved.name}')
    kind: Any = classes.resolving(new.module, new.name)
    if kind is None:
        raise Unresolvable('there is no such class here that defines _p_resolveConflict')
    resolve = kind.__new__(kind, *new.arguments)._p_resolveConflict
    state = resolve(before.state(), saved.state(), new.state())
    file = io.BytesIO()
    PersistentPickler(persistent_id, file, _PICKLE_PROTOCOL).dump(state)
    return new.head + file.getvalue()
