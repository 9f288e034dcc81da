"""What clients are told of transactions: as much as can be sent.

Anything that can be pickled may be in a transaction's extension, if it was not committed by a client.  Clients read
nothing but plain values, so the others are left out, and the log has a line that says so.
"""

import logging
from typing import Any

from zeo.server.seldom import Seldom
from zeo.wire import pickles

logger = logging.getLogger(__name__)

#: Whoever asks may ask again and again.
_left_out = Seldom(logger)


def entries(name: str, found: Any) -> list[dict[str, Any]]:
    """A history or an undo log of the storage ``name``, whose entries have the extensions of their transactions in them."""
    all_entries: list[dict[str, Any]] = list(found)
    if _can_be_sent(all_entries):  # as they mostly can be
        return all_entries
    return [plain(name, entry) for entry in all_entries]


def plain(name: str, extension: Any, tid: bytes | None = None) -> Any:
    """What can be sent of an extension, or of an entry with its ``tid`` in it, of the storage ``name``."""
    if not isinstance(extension, dict) or not extension or _can_be_sent(extension):
        return extension
    told = {key: value for key, value in extension.items() if _can_be_sent((key, value))}
    missing = ', '.join(sorted(f'{key!r} ({type(value).__name__})' for key, value in extension.items()
                               if key not in told))
    tid = tid or extension.get('tid') or extension.get('id')  # as it is called in an undo log
    _left_out.warning('storage %s: transaction %s: clients are not told of what is no plain data in its extension: %s',
                      name, tid.hex() if isinstance(tid, bytes) else tid, missing)
    return told


def _can_be_sent(value: Any) -> bool:
    try:
        pickles.dumps(value)
    except Exception:  # an application's objects may raise anything
        return False
    return True
