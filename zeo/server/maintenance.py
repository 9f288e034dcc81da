"""Undo information and packs: what a client asks for seldom, and what takes long and so goes on beside all else."""

import time
from functools import partial
from typing import Any

from ZODB.POSException import StorageError
from ZODB.UndoLogCompatible import UndoLogCompatible

from zeo.server import telling
from zeo.server.arguments import as_number
from zeo.server.conversation import Conversation
from zeo.server.conversation import no_answer
from zeo.server.roles import audit
from zeo.server.transaction import Answer

#: How many transactions are told of in one answer.
MOST_ENTRIES = 10_000

#: The latest time to pack to, in seconds since 1970.
LAST_TIME = 2**35


class Maintenance(Conversation):
    """The methods for it, which `zeo.server.session.Session` has among others."""

    def undoInfo(self, answer: Answer, first: int = 0, last: int = -20,
                 specification: dict[str, Any] | None = None) -> None:
        if specification is not None and not isinstance(specification, dict):
            raise TypeError('what is looked for is a dict')
        self._tell_of_undo('undo info', answer, first, last, specification)

    def undoLog(self, answer: Answer, first: int = 0, last: int = -20) -> None:
        self._tell_of_undo('undo log', answer, first, last, None)

    def _tell_of_undo(self, name: str, answer: Answer, first: int, last: int,
                      specification: dict[str, Any] | None) -> None:
        """Of transactions that can be undone: at most `MOST_ENTRIES`, and as long as somebody wants to know."""
        as_number(first)
        last = max(last, -MOST_ENTRIES) if as_number(last) < 0 else min(last, first + MOST_ENTRIES)
        served = self._served
        assert served is not None
        if not served.supports_undo:
            answer([])
            return
        storage, outbox = served.storage, self.outbox

        def is_wanted(entry: dict[str, Any]) -> bool:
            """What `UndoLogCompatible.undoInfo` asks, and whether it is to go on: a file may be very long."""
            if outbox.gone:
                raise StorageError('nobody waits for the answer')
            return not any(entry.get(key) != value for key, value in (specification or {}).items())

        if isinstance(storage, UndoLogCompatible):
            ask = partial(storage.undoLog, first, last, is_wanted)
        elif name == 'undo log':
            ask = partial(storage.undoLog, first, last)
        else:
            ask = partial(storage.undoInfo, first, last, specification)
        self._beside(name, answer, lambda: telling.entries(served.name, ask()))

    def pack(self, answer: Answer, time: float, wait: bool = True) -> None:
        if not isinstance(time, (int, float)) or not 0 <= time <= LAST_TIME:
            raise TypeError('the time to pack to is a number of seconds since 1970')
        self._beside('pack', answer if wait else no_answer, partial(self._pack, time), always=True)
        if not wait:
            answer(None)

    def _pack(self, time: float) -> None:
        assert self._served is not None
        result = 'done'
        try:
            self._served.pack(time)
        except BaseException as error:
            result = f'failed: {type(error).__name__}: {error}'
            raise
        finally:
            audit.info('%s: storage %s: pack as of %s: %s', self.who, self._served.name, _date(time), result)

    def stop_pack(self) -> bool:
        assert self._served is not None
        return self._served.packing.stop()


def _date(seconds: float) -> str:
    return time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(seconds))
