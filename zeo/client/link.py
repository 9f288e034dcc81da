"""A registered connection: what is said before it can be used, and what the server has said about the storage."""

from collections.abc import Mapping
from typing import Any

from ZODB.POSException import ReadOnlyError
from ZODB.utils import z64

from zeo.client.channel import Channel
from zeo.client.channel import Notice
from zeo.client.dialing import Line
from zeo.client.dialing import display
from zeo.client.upkeep import Invalidation
from zeo.client.upkeep import Upkeep
from zeo.client.verification import Verdict
from zeo.errors import ClientStorageError
from zeo.errors import ProtocolError
from zeo.errors import ServerException
from zeo.wire.methods import EXTENSIONS

#: Seconds that a server may take for each answer before the connection is ready.
REPLY_PATIENCE = 30.0


class UnknownStorage(ClientStorageError):
    """A server was reached, and does not have the storage."""


class Link:
    """A registered connection, and what the server said about the storage."""

    def __init__(self, line: Line, upkeep: Upkeep) -> None:
        self.address = line.address
        self.early: list[Invalidation] = []  # what arrived before the cache was verified
        self.info: dict[str, Any] = {}
        self.offered: frozenset[str] = frozenset()  # what it can do beyond the protocol, see `methods.EXTENSIONS`
        self.oids: list[bytes] = []  # given by the server and not used yet, the next one last
        self.read_only = False
        self.server_tid = z64
        self.channel = Channel(
            line.sock, line.inbox,
            {'invalidateTransaction': lambda tid, oids: self.early.append((tid, oids))},
            loaded=upkeep.loaded, told=upkeep.told, address=display(line.address), tls=line.tls)
        self.channel.set_timeout(REPLY_PATIENCE)

    def learn(self, info: Mapping[str, Any]) -> None:
        """This is what the server says."""
        self.info.update(info)
        offered = self.info.get(EXTENSIONS)
        self.offered = frozenset(each for each in offered if isinstance(each, str)
                                 ) if isinstance(offered, (tuple, list)) else frozenset()

    def register(self, storage: str, read_only: bool, or_read_only: bool, label: str | None) -> None:
        """Ask for the storage, to write to it unless `read_only`; `or_read_only` if the server has it only so."""
        channel = self.channel
        self.read_only = read_only
        try:
            tid = channel.call('register', (storage, read_only))
        except ReadOnlyError:
            if not or_read_only:
                raise
            self.read_only = True
            tid = channel.call('register', (storage, True))
        except ServerException as error:
            if error.class_name != 'builtins.ValueError' or 'unknown storage' not in str(error):
                raise
            raise UnknownStorage(f'the server at {display(self.address)} has no storage {storage}') from None
        if tid is None:
            tid = channel.call('lastTransaction')
        if not isinstance(tid, bytes) or len(tid) != 8:
            raise ProtocolError(f'the server says its last transaction is {tid!r}')
        self.server_tid = tid
        if label:
            channel.post('set_client_label', (label,))

    def verify(self, upkeep: Upkeep, notices: Mapping[str, Notice]) -> Verdict:
        """Make cache and database as new as the server, and have them kept so; ``notices`` are dealt with from then on.

        The last step of it is done at the dispatch of a reply, so nothing is lost between the
        invalidations put aside until then and those dealt with directly afterwards.
        """
        channel = self.channel
        verdict = Verdict.REFUSE

        def settle(_: object, changes: Any) -> None:
            upkeep.settle(verdict, self.server_tid, changes, self.early, self.offers('verify'))
            self.early = []
            channel.notices = {**notices, 'invalidateTransaction': upkeep.invalidated,
                               'info': self.info.update}

        def judge(_: object, info: dict[str, Any]) -> None:
            nonlocal verdict
            self.learn(info)
            verdict = upkeep.judge(self.server_tid)
            if verdict is not Verdict.CATCH_UP:
                settle(None, None)

        channel.set_timeout(REPLY_PATIENCE)
        channel.call('get_info', (), judge)
        if verdict is Verdict.CATCH_UP:
            channel.call('getInvalidations', (upkeep.cache.last_tid,), settle)
        pulsing = self.offers('pulse')
        if pulsing:
            channel.post('pulse')
        channel.flush()
        channel.set_timeout(None, pulsing)
        return verdict

    def offers(self, extension: str) -> bool:
        """Whether the server can do that beyond the protocol."""
        return extension in self.offered

    def discard(self, reason: str) -> None:
        """End a connection that nobody watches."""
        self.channel.end(reason)
        self.channel.watch()  # which closes it
