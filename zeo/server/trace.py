"""What ``-D`` shows of a session: each call of its client, with the time until it was answered."""

import logging
import time

from zeo.wire.messages import PickledId

logger = logging.getLogger(__name__)


class Trace:
    """The calls of one session that are not answered yet.

    The session's thread begins them, whoever answers ends them.  An entry is put in and taken out in one
    step each, so this needs no lock.
    """

    def __init__(self) -> None:
        self._begun: dict[PickledId, tuple[str, float]] = {}

    def begin(self, message_id: PickledId, name: str) -> None:
        self._begun[message_id] = name, time.monotonic()

    def end(self, message_id: PickledId, client: str, error: BaseException | None = None) -> None:
        """The call is answered.  Only the first time counts, and only for what was begun."""
        begun = self._begun.pop(message_id, None)
        if begun is not None:
            name, since = begun
            logger.debug('%s: %s took %.2f ms%s', client, name, (time.monotonic() - since) * 1000,
                         '' if error is None else f' ({type(error).__name__})')
