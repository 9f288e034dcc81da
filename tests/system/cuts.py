"""Commits whose stream is cut while they are being finished, and what clients say became of them."""

from collections import Counter
from typing import Any

from ZODB.Connection import TransactionMetaData

from tests.system.clients import store
from tests.system.proxy import DOWN, UP
from zeo import ClientDisconnected, OutcomeUnknown

__all__ = ['EXCHANGE', 'Attempts', 'commit']

#: More bytes than go in either direction from vote to the end.
EXCHANGE = {UP: 400, DOWN: 300}


def commit(storage: Any, oid: bytes, serial: bytes, record: bytes, before_finish: Any = None) -> bytes:
    meta = TransactionMetaData()
    storage.tpc_begin(meta)
    try:
        storage.store(oid, serial, record, '', meta)
        storage.tpc_vote(meta)
        if before_finish is not None:
            before_finish()
        tid: bytes = storage.tpc_finish(meta)
    except BaseException:
        storage.tpc_abort(meta)
        raise
    return tid


class Attempts:
    """Commits of one object.  Whatever the client says of each has to be true.

    A tid is returned only for what is in the database, and an error that is no `OutcomeUnknown` means that it is
    not.  ``direct`` is a client with ``server_sync`` whose stream is not cut.
    """

    def __init__(self, direct: Any) -> None:
        self._direct = direct
        self.oid: bytes = direct.new_oid()
        self.record = b'0'      # what is in the database
        self.serial = store(direct, self.oid, record=self.record)
        self.outcomes: Counter[str] = Counter()

    def commit(self, storage: Any, cut: int, before_finish: Any = None) -> None:
        """Commit, by a client whose stream is cut after so many bytes, and look."""
        record = b'%d, cut after %d' % (self.outcomes.total(), cut)
        try:
            tid = commit(storage, self.oid, self.serial, record, before_finish)
        except OutcomeUnknown:
            raise AssertionError(f'the outcome is not known, cut after {cut} bytes') from None
        except ClientDisconnected:
            self.outcomes['not committed'] += 1
        else:
            self.outcomes['committed'] += 1
            self.record, self.serial = record, tid
            assert storage.lastTransaction() >= tid
            assert storage.load(self.oid) == (record, tid)
        self._direct.sync()
        assert self._direct.load(self.oid) == (self.record, self.serial)
        assert self._direct.getTid(self.oid) == self.serial

    def judge(self) -> None:
        """There has to have been either outcome."""
        assert self.outcomes['not committed'] and self.outcomes['committed'], self.outcomes
