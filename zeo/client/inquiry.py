"""Asks the server, in the background, which of the cached revisions are still current.

A client that was away for longer than the server remembers cannot be told what changed.  Then nothing
that was current is served until it is proven; but it need not be loaded again if it did not change.  So
the server is asked about the tids of what is cached, many objects at a time, while the client works.

*Nothing has to be ordered here but what is ordered anyway.*  A revision that the server calls current
was so when it looked, which was after this connection had been registered.  A change since then is
announced on this connection.  If the announcement stands before the answer, it has ended the revision,
which is in doubt no more, and `Cache.confirm` passes over it; if it stands behind, it ends it then.
"""

import logging
from itertools import islice
from time import monotonic

from zeo.client.cache import Cache
from zeo.client.channel import Channel
from zeo.errors import ClientStorageError
from zeo.errors import ProtocolError

logger = logging.getLogger(__name__)

#: About so many objects is asked at a time.
BATCH = 500


def inquire(channel: Channel, cache: Cache) -> None:
    """Settle what is in doubt, or as much of it as can be settled before the connection ends."""
    began = monotonic()
    suspects = cache.suspects()
    kept = forgotten = 0
    try:
        while batch := list(islice(suspects, BATCH)):

            def answered(_: object, outdated: object, batch: list[tuple[bytes, bytes]] = batch) -> None:
                nonlocal kept, forgotten
                if not isinstance(outdated, bytes) or len(outdated) % 8:
                    raise ProtocolError('an answer about cached revisions that is no sequence of oids')
                changed = {outdated[at:at + 8] for at in range(0, len(outdated), 8)}
                cache.drop_suspects(changed)
                cache.confirm(cache.last_tid, [oid for oid, _ in batch if oid not in changed])
                forgotten += len(changed)
                kept += len(batch) - len(changed)

            channel.call('verify', (b''.join([oid + start for oid, start in batch]),), answered)
    except ClientStorageError as error:
        logger.info('%d cached objects were verified when the connection ended (%s)',
                    kept + forgotten, error)
    else:
        logger.info('All cached objects are verified: %d are still current, %d are not (%.1f s)',
                    kept, forgotten, monotonic() - began)
