"""Answers that tell of many revisions at once, in the order that `zeo.server.outbox` proves to be right.

One mark is taken before the first of them is read, and looked at when all are appended, in one message and in one
step.  So for each of them it was taken before it was read, and nothing was announced from then until it was
appended: the proof for one holds for each.  If something was announced, or one of them shows what is not announced
yet, all of that message are read again, half as many at a time, down to one.  If not even that can be told, it is
left out, and a client that wants it asks for it alone.  So this never waits for an announcement, and ends however
many transactions there are.
"""

from collections.abc import Callable

from ZODB.utils import z64

from zeo.server.backing import Unreachable
from zeo.server.outbox import GONE
from zeo.server.outbox import SENT
from zeo.server.outbox import Outbox
from zeo.wire.revisions import ENOUGH
from zeo.wire.revisions import HEAD
from zeo.wire.revisions import MOST
from zeo.wire.revisions import Found
from zeo.wire.revisions import prefetched_notice

Load = Callable[[bytes, bytes], Found | None]


def tell(outbox: Outbox, load: Load, oids: bytes, tid: bytes, wait_for_room: Callable[[], None]) -> None:
    """Tell of the revisions before ``tid`` of all these objects.

    ``wait_for_room`` is called before each message.  Raises what that raises, and `Unreachable`.
    """
    wanted = [oids[at:at + 8] for at in range(0, len(oids), 8)]
    at, most = 0, MOST
    while at < len(wanted):
        wait_for_room()
        mark = outbox.published
        heads, records, latest = _read(load, wanted[at:at + most], tid)
        outcome = outbox.reply_to_load(prefetched_notice(tid, heads, records), mark, latest)
        if outcome is GONE:
            return
        if outcome is SENT:
            most = min(2 * most, MOST)
        elif most > 1:
            most = max(len(heads) // 2, 1)
            continue
        else:
            outbox.append(prefetched_notice(tid, [_untold(wanted[at])], []))
        at += len(heads)
        outbox.deliver()


def _read(load: Load, oids: list[bytes], tid: bytes) -> tuple[list[bytes], list[bytes], bytes]:
    """What is told of the first of these, their records, and at which tid the latest of the revisions starts."""
    heads, records, latest, size = [], [], z64, 0
    for oid in oids:
        try:
            record, start, end = load(oid, tid)  # type: ignore[misc]  # None is an error, too
            if type(record) is not bytes or len(start) != 8 or end is not None and len(end) != 8:
                raise TypeError('an unusual storage')
        except Unreachable:
            raise
        except Exception:  # who asks for it alone is told, and then it is in the log
            heads.append(_untold(oid))
            continue
        length = len(record)
        heads.append(HEAD.pack(oid, start, end or z64, length))
        records.append(record)
        if start > latest:
            latest = start
        size += length
        if size >= ENOUGH:
            break
    return heads, records, latest


def _untold(oid: bytes) -> bytes:
    return HEAD.pack(oid, z64, z64, 0)
