"""Keeps a verified connection to a server: connect, register, verify, watch, and again when it is lost.

One background thread goes round the table of states below.  While the connection is ready, that thread
is the channel's watcher.  A client that prefers a writable server and had to take a read-only one has a
second thread that looks for a better one; it hands over a connection that is registered and has nothing
verified yet, then it ends.
"""

import copy
import logging
import random
import socket
import threading
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from enum import Enum
from time import monotonic

from ZODB.POSException import POSError

from zeo.client.channel import Channel
from zeo.client.channel import Notice
from zeo.client.dialing import Address
from zeo.client.dialing import Line
from zeo.client.dialing import NobodyListens
from zeo.client.dialing import Security
from zeo.client.dialing import dial
from zeo.client.dialing import display
from zeo.client.dialing import is_asking
from zeo.client.inquiry import inquire
from zeo.client.link import REPLY_PATIENCE
from zeo.client.link import Link
from zeo.client.link import UnknownStorage
from zeo.client.upkeep import Upkeep
from zeo.errors import ClientDisconnected
from zeo.errors import ClientStorageError

logger = logging.getLogger(__name__)

#: If there are others, a server may take so many for each answer to its registration; twice as many after each
#: round in which none was found, up to `REPLY_PATIENCE`.
FIRST_PATIENCE = 5.0

#: A connection that was ready for so many seconds was a good one: the next attempt is made at once.
GOOD_AFTER = 5.0

#: While somebody waits for a connection, seconds between attempts are no more than this.
WAITED_FOR = 1.0

#: Seconds for which a read-only server is kept in hand while a writable one may still answer.
HOPE = 1.0

#: Longer waits are made of several, since the operating system has a limit.
AT_A_TIME = 3600.0

#: Seconds that `Supervisor.close` waits for each thread, which has been told to end.
JOIN = 5.0

#: So many different reasons are logged why there is no connection, each once.
MOST_REASONS = 20

#: So many rounds in which nobody listened are nothing to be warned of: a server may just be starting.
EARLY = 3


class State(Enum):
    """What the background thread is about."""

    RESTING = 'not started'
    CONNECTING = 'looking for a server'
    VERIFYING = 'making sure that what is cached is right'
    READY = 'connected'
    LOST = 'waiting before the next attempt'
    CLOSED = 'closed'


NEXT = {
    State.RESTING: {State.CONNECTING, State.CLOSED},
    State.CONNECTING: {State.VERIFYING, State.LOST, State.CLOSED},
    State.VERIFYING: {State.READY, State.CONNECTING, State.LOST, State.CLOSED},
    State.READY: {State.LOST, State.CLOSED},
    State.LOST: {State.CONNECTING, State.CLOSED},
    State.CLOSED: set(),
}


class Supervisor:
    """Has a `Link` whenever a server can be reached; `wait` gives it to callers.

    ``connected`` is called with a link that is verified, before any caller gets it, by the background
    thread.  It may post one-way messages and not call the server.  ``notices`` are one-way messages from
    the server that somebody else takes care of.
    """

    def __init__(self, addresses: Sequence[Address], storage: str, upkeep: Upkeep, *,
                 connected: Callable[[Link], None], read_only: bool = False, fallback: bool = False,
                 label: str | None = None, wait_timeout: float = 30.0, min_poll: float = 0.1,
                 max_poll: float = 30.0, notices: Mapping[str, Notice] | None = None,
                 security: Security | None = None) -> None:
        self.addresses = list(addresses)
        self.link: Link | None = None  # for callers; set while READY
        self._storage = storage
        self._upkeep = upkeep
        self._connected = connected
        self._read_only = read_only
        self._fallback = fallback
        self._label = label
        self._wait_timeout = wait_timeout
        self._min_poll = min_poll
        self._max_poll = max(min_poll, max_poll)
        self._notices = dict(notices or {})
        self._security = security
        # Guards all that follows and is notified whenever some of it changes.  Reentrant, because a
        # signal handler may close while its thread waits for a connection.
        self._changed = threading.Condition(threading.RLock())
        self._state = State.RESTING
        self._failure: Exception | None = None  # why the last attempt failed
        self._failures = 0  # rounds since there was a good connection; the background thread's own
        self._was_connected = False
        self._told: set[str] = set()  # the reasons that were logged since there was a connection
        self._waiters = 0
        self._open: set[Channel] = set()  # all channels there are, to end them when closing
        self._better: Link | None = None  # a writable server's, found by the seeker
        self._thread: threading.Thread | None = None
        self._seeker: threading.Thread | None = None
        # Readable from the moment of closing: interrupts dialing.
        self._interruption, self._interrupt = socket.socketpair()

    # ---- for callers

    @property
    def state(self) -> State:
        return self._state

    def start(self) -> None:
        """Begin to look for a server; nothing if that has begun."""
        with self._changed:
            if self._state is State.RESTING and self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name=f'zeo client of {self._storage}', daemon=True)
                self._thread.start()

    def wait(self, timeout: float | None = None) -> Link:
        """A link that is ready, waiting for it up to ``timeout`` seconds (default: `wait_timeout`).

        Raises `ClientDisconnected`.
        """
        link = self.link
        if link is not None and link.channel.ended is None:
            return link
        if any(channel.is_inside() for channel in list(self._open)):
            raise ClientStorageError('a callback of the storage may not wait for a connection')
        self.start()
        until = monotonic() + (self._wait_timeout if timeout is None else timeout)
        with self._changed:
            self._waiters += 1
            self._changed.notify_all()
            try:
                while True:
                    link = self.link
                    if self._state is State.CLOSED:
                        raise ClientDisconnected('the storage is closed')
                    if link is not None and link.channel.ended is None:
                        return link
                    rest = until - monotonic()
                    if rest <= 0 or self._is_in_vain():
                        raise self._explanation()
                    self._changed.wait(min(rest, AT_A_TIME))
            finally:
                self._waiters -= 1

    def _is_in_vain(self) -> bool:
        """Whether the only server there is does not have the storage, and never had: most likely a slip of the pen."""
        return isinstance(self._failure, UnknownStorage) and not self._was_connected and len(self.addresses) == 1

    def _explanation(self) -> Exception:
        failure = self._failure
        if isinstance(failure, ClientStorageError) and not isinstance(failure, ClientDisconnected):
            return copy.copy(failure)  # without the frames of others who got it
        if failure is None:  # one that accepts and says nothing is waited for longer than some have time
            said = f'no answer yet from {", ".join(map(display, self.addresses))}'
        else:
            said = _said(failure)
        error = ClientDisconnected(f'not connected to a server: {said}')
        error.__cause__ = failure
        return error

    def new_addresses(self, addresses: Sequence[Address]) -> None:
        """Use these from the next attempt on."""
        with self._changed:
            self.addresses = list(addresses)
            self._changed.notify_all()

    def close(self) -> None:
        """End the connection, from any state; afterwards nothing is changed by it any more.

        Returns at once, except that threads end before (in a call or callback: do not wait for them).
        """
        with self._changed:
            self._move(State.CLOSED)
            self.link = None
            threads = [self._thread, self._seeker]
            started = self._thread is not None
            channels = list(self._open)
            self._changed.notify_all()
        try:
            self._interrupt.send(b'.')
        except OSError:
            pass
        for channel in channels:
            channel.end('the storage was closed')
        if any(channel.is_inside() for channel in channels):
            return
        for thread in threads:
            if thread is not None and thread is not threading.current_thread():
                until = monotonic() + JOIN
                while thread.is_alive() and not is_asking(thread) and monotonic() < until:
                    thread.join(0.05)
                if thread.is_alive():
                    logger.warning('%s goes on to end in the background', thread.name)
        if not started:
            self._close_interruption()

    def abandon(self) -> None:
        """In a forked child, where the threads do not exist: close the copies of descriptors."""
        for channel in self._open:
            channel.abandon()
        self._close_interruption()

    def _close_interruption(self) -> None:
        self._interrupt.close()
        self._interruption.close()

    # ---- the round

    def _move(self, state: State) -> bool:
        """Go to another state; False if everything is over."""
        with self._changed:
            if self._state is State.CLOSED:
                return False
            assert state in NEXT[self._state], (self._state, state)
            self._state = state
            self._changed.notify_all()
            return True

    def _run(self) -> None:
        try:
            while self._move(State.CONNECTING):
                lasted = 0.0
                try:
                    link = self._connect()
                    began = monotonic()
                    self._attend(link)
                    lasted = monotonic() - began
                except Exception as error:
                    self._note(error)
                good = lasted > GOOD_AFTER or self._better is not None
                self._failures = 0 if good else self._failures + 1
                if not self._move(State.LOST):
                    break
                if not good:
                    self._pause(self._failures - 1)
        finally:
            seeker = self._seeker
            if seeker is not None:
                seeker.join()
            if self._better is not None:
                self._forget(self._better, 'the storage was closed')
            self._close_interruption()

    def _connect(self) -> Link:
        """A verified link.  Raises the reason why there is none."""
        failure: Exception | None = None
        with self._changed:
            better, self._better = self._better, None
        if better is not None:
            try:
                return self._verified(better)
            except Exception as error:
                failure = error
                self._forget(better, str(error))
        in_hand: Link | None = None
        until = 0.0
        lines = dial(self.addresses, self._interruption, self._security)
        try:
            for line in lines:
                if line is not None:
                    try:
                        link = self._registered(line, self._fallback)
                        if link.read_only and self._fallback:
                            if in_hand is None:
                                in_hand, until = link, monotonic() + HOPE
                            else:
                                self._forget(link, 'not needed')
                        else:
                            return self._verified(link)
                    except Exception as error:
                        failure = error
                        logger.debug('%s: %s', display(line.address), _said(error))
                if in_hand is not None and monotonic() > until:
                    break
            if in_hand is not None:
                link, in_hand = in_hand, None
                return self._verified(link)
        finally:
            lines.close()
            if in_hand is not None:
                self._forget(in_hand, 'not needed')
        raise failure or ClientDisconnected('interrupted')

    def _registered(self, line: Line, or_read_only: bool) -> Link:
        link = Link(line, self._upkeep)
        channel = link.channel
        with self._changed:
            self._open.add(channel)
            closed = self._state is State.CLOSED
        try:
            if closed:
                raise ClientDisconnected('the storage is closed')
            if len(self.addresses) > 1:
                channel.set_timeout(min(FIRST_PATIENCE * 2 ** min(self._failures, 10), REPLY_PATIENCE))
            link.register(self._storage, self._read_only, or_read_only, self._label)
        except BaseException as error:
            self._forget(link, str(error))
            raise
        return link

    def _forget(self, link: Link, reason: str) -> None:
        link.discard(reason)
        with self._changed:
            self._open.discard(link.channel)

    def _verified(self, link: Link) -> Link:
        """Make cache and database as new as the server, and have them kept so."""
        try:
            if not self._move(State.VERIFYING):
                raise ClientDisconnected('the storage is closed')
            verdict = link.verify(self._upkeep, self._notices)
            logger.info('Connected to %s, storage %s%s; cache: %s', display(link.address), self._storage,
                        ' (read-only)' if link.read_only else '', verdict.value)
            self._connected(link)
        except BaseException as error:
            self._forget(link, str(error))
            self._move(State.CONNECTING)
            raise
        return link

    def _attend(self, link: Link) -> None:
        """Let callers have the link, and be its watcher until it has ended."""
        with self._changed:
            ready = self._move(State.READY)
            if ready:
                self._failure = None
                self._was_connected = True
                self._told.clear()
                self.link = link
        if not ready:
            self._forget(link, 'the storage was closed')
            return
        inquirer = None
        try:
            self._begin_to_seek(link)
            if next(self._upkeep.cache.suspects(), None) is not None:
                inquirer = threading.Thread(
                    target=inquire, args=(link.channel, self._upkeep.cache), daemon=True,
                    name=f'zeo client of {self._storage}: inquirer')
                inquirer.start()
            link.channel.watch()
        except RuntimeError as error:  # no more threads can be started
            link.discard(str(error))
            raise
        finally:
            if inquirer is not None and inquirer.ident is not None:
                inquirer.join()  # its calls have failed
            with self._changed:
                self.link = None
                self._open.discard(link.channel)
                closed = self._state is State.CLOSED
            if not closed:
                logger.warning('Lost the connection to %s: %s', display(link.address),
                               link.channel.ended)

    def _note(self, failure: Exception) -> None:
        with self._changed:
            if self._state is State.CLOSED:
                return
            trace = failure.__traceback__
            self._failure = failure.with_traceback(None)  # nobody is to keep what its frames hold
            reason = _said(failure)
            early = isinstance(failure, NobodyListens) and self._failures < EARLY
            known = early or reason in self._told or len(self._told) >= MOST_REASONS
            if not known:
                self._told.add(reason)
        ours = not isinstance(failure, (OSError, POSError))  # it should not have happened
        logger.log(logging.DEBUG if known else logging.ERROR if ours else logging.WARNING,
                   'No connection to storage %s: %s', self._storage, reason,
                   exc_info=(type(failure), failure, trace) if ours else None)

    def _is_closed(self) -> bool:
        return self._state is State.CLOSED

    def _pause(self, failures: int) -> None:
        """Wait before the next attempt: longer each time, and not all clients at once."""
        delay = min(self._min_poll * 2 ** min(failures, 30), self._max_poll)
        delay *= random.uniform(0.75, 1.25)
        began = monotonic()
        with self._changed:
            addresses = self.addresses
            while not self._is_closed() and self.addresses is addresses:
                rest = began + (min(delay, WAITED_FOR) if self._waiters else delay) - monotonic()
                if rest <= 0:
                    break
                self._changed.wait(min(rest, AT_A_TIME))

    # ---- the seeker

    def _begin_to_seek(self, link: Link) -> None:
        """Look for a better server, if this one is read-only and need not be."""
        with self._changed:
            if self._fallback and link.read_only and self._seeker is None:
                seeker = threading.Thread(
                    target=self._seek, name=f'zeo client of {self._storage}: seeker', daemon=True)
                seeker.start()
                self._seeker = seeker

    def _seek(self) -> None:
        """Look for a writable server while the one in use is read-only."""
        failures = 0
        while True:
            self._pause(failures)
            failures += 1
            with self._changed:
                if self.link is None or not self.link.read_only or self._is_closed():
                    self._seeker = None
                    return
            found = self._find_writable()
            if found is None:
                continue
            with self._changed:
                used = self.link
                if used is not None and used.read_only and not self._is_closed():
                    self._better, found = found, None
                    self._seeker = None
            if found is not None:
                self._forget(found, 'not needed')
                continue
            assert used is not None
            used.channel.end('a writable server is there')
            return

    def _find_writable(self) -> Link | None:
        lines = dial(self.addresses, self._interruption, self._security)
        try:
            for line in lines:
                if line is not None:
                    try:
                        return self._registered(line, False)
                    except Exception as error:
                        logger.debug('%s: %s', display(line.address), _said(error))
        except ClientDisconnected:
            pass
        finally:
            lines.close()
        return None


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__
