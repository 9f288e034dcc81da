"""A client's transaction in progress: what it sends to the server, and what is remembered of it here.

If the server offers ``stores`` (see `zeo.wire.methods.EXTENSIONS`), small records travel many in one message,
and a transaction that has nothing but few of these is begun, stored and voted by one request.
"""

from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Sequence
from typing import Any

from zeo.client.channel import Channel
from zeo.client.updates import Updates
from zeo.wire.commits import store_notice
from zeo.wire.stores import Batch
from zeo.wire.stores import commit_request
from zeo.wire.stores import stores_notice

__all__ = ['Commit']

#: So many bytes of records travel together; then the server has something to do meanwhile.
TOGETHER = 32 * 1024

#: Records of so many bytes travel by themselves, and are not copied.
LARGE = 16 * 1024


class Commit:
    """The transaction between `tpc_begin` and its end.  It belongs to one connection.

    ``offered`` is what the server can do beyond the protocol.
    """

    __slots__ = ('transaction', 'channel', 'id', 'begun', 'updates', 'resolved', 'tells_tid', 'tid', 'blobs',
                 'large_pieces', '_batch', '_gathers')

    def __init__(self, transaction: Any, channel: Channel, offered: Collection[str], id: Any,
                 updates: Updates) -> None:
        self.transaction = transaction
        self.channel = channel
        self.large_pieces = channel.copies_files and 'pieces' in offered
        self.tells_tid = 'settle' in offered  # the server can be asked what became of it
        self.tid: bytes | None = None  # what it will get, if the server has told
        self.id = id  # how the server knows it
        self.begun = False  # the server knows of it, or is about to
        self.updates = updates
        self.resolved: set[bytes] = set()  # stored otherwise than the application said
        self.blobs: list[tuple[bytes, str]] = []  # oids, and files that wait for the end
        self._batch = Batch()
        self._gathers = 'stores' in offered

    def begin(self, tid: bytes | None, status: str) -> None:
        """Tell the server, unless that can be done with what comes next."""
        meta = self.transaction
        if (not self._gathers or meta.extension or tid is not None or status != ' '
                or type(meta.user) is not bytes or type(meta.description) is not bytes):
            self._begin(tid, status)

    def _begin(self, tid: bytes | None = None, status: str = ' ') -> None:
        meta = self.transaction
        self.begun = True  # before: who interrupts this leaves a transaction that can be aborted
        self.channel.post('tpc_begin', (self.id, meta.user, meta.description, meta.extension, tid, status))

    def store(self, oid: bytes, serial: bytes, record: bytes) -> None:
        """A new revision; what is not sent now is sent before anything else is."""
        if not self._gathers or len(record) >= LARGE or not record:
            self.send()
            self.channel.post_frame(store_notice(oid, serial, record, self.id))
        elif self._batch.add(oid, serial, record) >= TOGETHER:
            self.send()
        self.updates.store(oid, record)

    def post(self, name: str, *args: Any) -> None:
        """Send something else that the transaction does."""
        self.send()
        self.channel.post(name, (*args, self.id))

    def send(self) -> None:
        """Let the channel have all so far."""
        if not self.begun:
            self._begin()
        if self._batch:
            self.channel.post_frame(stores_notice(*self._batch.take(), self.id))

    def vote(self, meanwhile: Callable[[], object]) -> Sequence[Any]:
        """What the server reports about the objects of the transaction; something is done while it votes."""
        if not self.begun:
            meta = self.transaction
            self.begun = True
            heads, records = self._batch.take()
            answer = self.channel.ask(commit_request, self.id, self.tells_tid, meta.user, meta.description,
                                      heads, records, meanwhile=meanwhile)
        else:
            self.send()
            answer = self.channel.call('vote', (self.id, True) if self.tells_tid else (self.id,),
                                       meanwhile=meanwhile)
        if self.tells_tid and isinstance(answer, tuple):
            answer, self.tid = answer
        return answer or ()
