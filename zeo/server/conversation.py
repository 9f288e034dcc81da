"""One client's conversation: a message in, the method called that it names, an answer out.

Requests that may take long go on elsewhere and are answered when they are done, while the next ones are
served; they neither load nor finish.
"""

import logging
import time
from abc import ABC
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

from ZODB.POSException import ConflictError
from ZODB.POSException import POSError
from ZODB.POSException import POSKeyError
from ZODB.POSException import ReadOnlyError
from ZODB.POSException import Unsupported

from zeo.errors import ProtocolError
from zeo.server.arguments import as_oid
from zeo.server.arguments import as_tid
from zeo.server.backing import Unreachable
from zeo.server.jobs import Jobs
from zeo.server.limits import TooLarge
from zeo.server.outbox import Outbox
from zeo.server.roles import Role
from zeo.server.roles import Roles
from zeo.server.seldom import Seldom
from zeo.server.served import Served
from zeo.server.trace import Trace
from zeo.server.transaction import Answer
from zeo.server.transaction import State
from zeo.server.transaction import Transaction
from zeo.server.transaction import log_failure
from zeo.wire import messages
from zeo.wire.decoding import decode_from_client
from zeo.wire.framing import Payload
from zeo.wire.loads import load_of
from zeo.wire.messages import PickledId
from zeo.wire.methods import METHODS

logger = logging.getLogger(__name__)

#: A request waits while its client has so many bytes still to read, as long as it reads anything in so many
#: seconds.
ROOM = 4 * 1024 * 1024
ROOM_PATIENCE = 60.0

#: Errors that belong to everyday life and are not logged.
EXPECTED = (POSKeyError, ConflictError)

#: Methods that are given a function to answer with, since they may answer later.
_ANSWERING = frozenset({'vote', 'commit', 'tpc_abort', 'undoInfo', 'undoLog', 'pack', 'verify', 'settle',
                        'sendBlob', 'figures'})

#: Methods that are for those with the role of that name, and what they do.
_FOR_ADMINS = {'pack': 'to pack', 'stop_pack': 'to stop a pack', 'undoa': 'to undo'}

#: Methods without which the commit lock would be kept.
_COMMITTING = frozenset({'vote', 'commit', 'tpc_finish', 'tpc_abort'})

#: Those of them that may have to wait for it.
_VOTING = frozenset({'vote', 'commit'})

#: One-way methods that prepare a vote.
_STAGING = frozenset({
    'storea', 'stores', 'checkCurrentSerialInTransaction', 'deleteObject', 'undoa', 'restorea',
    'storeBlobStart', 'storeBlobChunk', 'storeBlobEnd', 'storeBlobShared', 'restoreBlobEnd',
    'restoreBlobShared'})


class Conversation(ABC):
    """Deals with messages; the methods that they name are those of `zeo.server.session.Session`.

    ``client`` names the client in the log (its address, and later its label).  ``hang_up`` ends the connection;
    any thread may call it.  ``roles`` say what it may do, who has connected to ``address``.
    ``may_log`` says whether there may be another line about it that tells of everyday life.
    ``heard`` is called, in the thread that handles messages, when the client gives a sign of life.
    """

    def __init__(self, outbox: Outbox, client: str, hang_up: Callable[[], None], roles: Roles, address: Any,
                 may_log: Callable[[], bool], heard: Callable[[], None]) -> None:
        self.outbox = outbox
        self.client = client
        self.connected = time.time()
        self.received = 0  # bytes
        self.label = ''
        self.certificate_name: str | None = None  # in the certificate that it has shown, if any
        self._address = client
        self._listening = address
        self._hang_up = hang_up
        self._roles = roles
        self._role = Role.NOTHING
        self._read_only = False
        self._refusals = Seldom(logger)
        self._may_log = may_log
        self._heard = heard
        self._served: Served | None = None  # once it is registered
        self._transaction: Transaction | None = None
        self._size = 0  # of the request that is dealt with, in bytes
        self._jobs: Jobs | None = None  # made for the first that there is, as most have none
        self._trace = Trace()

    @property
    def is_registered(self) -> bool:
        return self._served is not None

    @property
    def read_only(self) -> bool:
        """Whether it may not write, once it is registered."""
        return self._read_only

    @property
    def who(self) -> str:
        """For the audit log; what the client says itself comes last, since it may say anything."""
        shown = '' if self.certificate_name is None else f', certificate {printable(self.certificate_name)}'
        return self._address + shown + (self.label and f' ({self.label})')

    def _current(self) -> Transaction | None:
        """The transaction in progress."""
        transaction = self._transaction
        if transaction is not None and transaction.ended:
            self._transaction = transaction = None
        return transaction

    # ---- a message comes in ------------------------------------------------------------

    def handle(self, payload: Payload) -> None:
        """Do what a message asks for.

        Raises `ProtocolError` if the connection has to be closed.  Errors of a request are answered;
        those of a one-way message cannot be, so they end the connection, too.
        """
        load = load_of(payload)
        if load is not None and self._served is not None:
            if self.outbox.backlog > ROOM:
                self._wait_for_room()
            try:
                self._load(*load)
            except Exception as error:
                self._failed(load[0], 'loadBefore', error)
            return
        message_id, oneway, name, args = decode_from_client(payload)
        if messages.is_heartbeat(message_id):
            self._heard()
            return
        self._size = len(payload)
        if self.outbox.backlog > ROOM and not oneway:
            self._wait_unless_it_ends(name, args)
        method = METHODS.get(name)
        if method is None or (self._served is None) != (name == 'register'):
            raise ProtocolError(f'{name[:100]!r} cannot be called now' if method else
                                f'there is no method {name[:100]!r}')
        try:
            if not method.least <= len(args) <= method.most:
                raise TypeError(f'{name} takes {method.least} to {method.most} arguments,'
                                f' not {len(args)}')
            if method.writes and self._read_only:
                raise ReadOnlyError()
            if name in _FOR_ADMINS and self._role < Role.ADMIN:
                raise self._forbidden(_FOR_ADMINS[name], 'only for the role admin')
            if name in _ANSWERING:
                answer = no_answer if oneway else partial(self._answer, message_id)
                getattr(self, name)(answer, *args)
            elif name == 'tpc_finish':
                self._finish(None if oneway else message_id, *args)
            elif name == 'loadBefore' and not oneway:
                self._load(message_id, as_oid(args[0]), as_tid(args[1]))
            else:
                result = getattr(self, name)(*args)
                if not oneway:
                    self.outbox.append(messages.reply(message_id, result))
        except Exception as error:
            if not oneway:
                self._failed(message_id, name, error)
            elif not self._is_reported_later(name, error):
                raise ProtocolError(f'{name} failed: {in_words(error)}') from None

    def handle_and_tell(self, payload: Payload) -> None:
        """`handle`, and tell the debug log how long it took."""
        message_id, oneway, name, _ = decode_from_client(payload)
        if not messages.is_heartbeat(message_id):
            self._trace.begin(message_id, name[:100])
        self.handle(payload)
        if oneway or name not in _ANSWERING:
            self._trace.end(message_id, self.client)

    def _answer(self, message_id: PickledId, result: Any = None,
                error: BaseException | None = None) -> None:
        if isinstance(error, Unreachable):
            self._database_is_lost(error)
        if error is not None:
            frame = messages.error_reply(message_id, error)
        else:
            frame = messages.reply(message_id, result)
        self.outbox.append(frame)
        self._trace.end(message_id, self.client, error)

    def _database_is_lost(self, error: Unreachable) -> None:
        """The client waits, or goes to another server, which is what clients do without a connection."""
        self._refusals.warning('%s: is disconnected: %s', self.client, error)
        self.outbox.end()
        self._hang_up()

    def _failed(self, message_id: PickledId, name: str, error: Exception) -> None:
        if isinstance(error, Unreachable):
            self._database_is_lost(error)
        elif not isinstance(error, (POSError, TypeError, ValueError, KeyError)) and self._served is not None:
            log_failure(self._served, self.client, name, error)
        elif not isinstance(error, EXPECTED) and self._may_log():
            self._refusals.info('%s: %s was refused: %s', self.client, name, in_words(error))
        self.outbox.append(messages.error_reply(message_id, error))
        self._trace.end(message_id, self.client, error)

    def _is_reported_later(self, name: str, error: Exception) -> bool:
        """Whether the vote will say what went wrong with a one-way message."""
        transaction = self._current()
        if transaction is None or name not in _STAGING:
            return False
        if isinstance(error, (OSError, Unsupported, TooLarge, ReadOnlyError)):  # no room, as a rule
            transaction.fail(error)
        return transaction.failure is not None

    def _wait_for_room(self) -> None:
        """Let the client read what it has asked for, before there is more."""
        if not self._have_room():
            raise ProtocolError('it does not read what it asked for')

    def _have_room(self) -> bool:
        """The same; False if the client does not read."""
        if self.outbox.backlog <= ROOM:
            return True
        self.outbox.deliver()
        return self.outbox.wait_for_room(ROOM, ROOM_PATIENCE)

    def _let_it_read(self) -> None:
        """The same, in any thread: a client that does not read is disconnected."""
        if not self._have_room():
            self.outbox.condemned = True
            self._hang_up()

    def _wait_unless_it_ends(self, name: str, args: tuple[Any, ...]) -> None:
        """`_wait_for_room`, but what ends a voted transaction never waits, and a commit only if there is very
        much to be read: everybody else may be waiting for it.
        """
        if name in _COMMITTING:
            transaction = self._transaction
            if self.outbox.backlog <= self.outbox.limit or (
                    name not in _VOTING and transaction is not None and transaction.state is State.VOTED
                    and args[:1] == (transaction.id,)):
                return
        self._wait_for_room()

    def _beside(self, name: str, answer: Answer, job: Callable[[], Any], always: bool = False) -> None:
        """Do what may take long in a thread of its own, and answer when it is done.

        With ``always`` it is also done if the client has left.
        """
        assert self._served is not None
        served: Served = self._served

        def run() -> None:
            try:
                answer(job())
            except Exception as error:
                if not isinstance(error, POSError) or answer is no_answer:
                    log_failure(served, self.client, name, error)
                answer(error=error)
            self.outbox.deliver()
        if self._jobs is None:
            self._jobs = Jobs(self.outbox, self._let_it_read)
        self._jobs.add(run, self._size, partial(served.run_beside, name), always=always)

    def _forbidden(self, what: str, why: str) -> ReadOnlyError:
        """What to raise; the attempt is in the audit log."""
        host = self._address.rpartition(':')[0]
        self._roles.refusals.of(f'{host} {self.certificate_name} {what}').warning(
            '%s: refused %s: %s', self.who, what, why)
        return ReadOnlyError(f'you are refused {what}: {why}')

    # ---- what is answered at its place in the order of announcements -----------------------

    @abstractmethod
    def _load(self, message_id: PickledId, oid: bytes, tid: bytes) -> None:
        """Do ``loadBefore``, and answer."""

    @abstractmethod
    def _finish(self, message_id: PickledId | None, id: Any) -> None:
        """Do ``tpc_finish``, and answer, unless it was a one-way message (None)."""


def in_words(error: Exception) -> str:
    """An error in one line for the log, whatever a client has put into it."""
    try:
        text = str(error)
    except Exception:  # an integer may be too long for it
        text = 'details that cannot be shown'
    return f'{type(error).__name__}: {printable(text[:200])}'


def printable(text: str) -> str:
    return ''.join(char if char.isprintable() else '?' for char in text)


def no_answer(result: Any = None, error: BaseException | None = None) -> None:
    pass
