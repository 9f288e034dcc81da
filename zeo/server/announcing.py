"""Storages whose transactions come from elsewhere too, and who announce them by themselves (a `ClientStorage`)."""

from collections.abc import Iterable
from typing import TYPE_CHECKING
from typing import Any

from ZODB.BaseStorage import BaseStorage
from ZODB.MappingStorage import MappingStorage

from zeo.server.publisher import deliver
from zeo.wire.records import references

if TYPE_CHECKING:
    from zeo.server.served import Served


def announces_itself(storage: Any) -> bool:
    """Whether a storage tells its wrapper of transactions (as a `ClientStorage` does).

    Storages that keep their own data have inherited a ``registerDB`` that does nothing; those that
    wrap another storage have it in the attribute ``base``, DemoStorage also in ``changes``.
    """
    inner = [getattr(storage, name) for name in ('base', 'changes') if hasattr(storage, name)]
    if inner:
        return any(map(announces_itself, inner))
    register = getattr(storage, 'registerDB', None)
    if register is None:
        return False
    function = getattr(register, '__func__', register)
    return function not in _SILENT and not isinstance(storage, BaseStorage)


_SILENT = (BaseStorage.registerDB, MappingStorage.registerDB)


class Wrapper:
    """What a served storage may call, see `ZODB.interfaces.IStorageWrapper`: it announces its transactions here."""

    def __init__(self, served: 'Served') -> None:
        self._served = served

    def invalidate(self, tid: bytes, oids: Iterable[bytes]) -> None:
        served = self._served
        try:
            served.catch_up(tid)
            deliver(served.publisher.publish(tid, [bytes(oid) for oid in oids]))
        except BaseException:  # some may have been told and others not
            served.hang_up_on_everybody()
            raise

    def invalidateCache(self) -> None:
        self._served.hang_up_on_everybody()

    def references(self, record: bytes, oids: list[bytes] | None = None) -> list[bytes]:
        return references(record, oids)

    def transform_record_data(self, data: bytes) -> bytes:
        return data

    def untransform_record_data(self, data: bytes) -> bytes:
        return data
