"""The order of what a server says: each race forced, and each protection taken out once.

A *scenario* brings a server to the point where a race is decided, by gates at which threads stop until
the scenario opens them, and lets it be decided the dangerous way.  Afterwards everything that each
client was told, and how the server is left, is judged by the rules.  A *mutant* is the server without
one of its protections: the same scenario must then break a rule, or it would prove nothing.

Rules, by the letters that appear below:

I  announcements come in the order of their tids, and none is missing
F  so does the answer to one's own finish
L  nothing outdated is called current
N  no answer shows a tid that was not announced before, and none is announced after the answer
P  what was answered to its committer is announced to whoever asks for anything afterwards
R  nothing is missed between register and the first announcement
V  what getInvalidations tells and what is announced are everything
D  nobody hears of a transaction that is not on disk
K  lock and storage belong to one transaction, whose client is there
W  nobody waits for what will not come
H  after an error nobody goes on who may not know of a transaction
S  a client that does not read delays nobody, and is given up
"""

import contextlib
import threading
from collections import deque
from collections.abc import Callable
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from ZODB.POSException import POSKeyError
from ZODB.utils import z64

import zeo.server.connection
from tests.server.talk import PATIENCE
from tests.server.talk import Announcing
from tests.server.talk import GatedStorage
from tests.server.talk import Gate
from tests.server.talk import Gates
from tests.server.talk import Peer
from tests.server.talk import SessionPeer
from tests.server.talk import SocketPeer
from tests.server.talk import in_thread
from tests.server.talk import oid
from tests.system.servers import until
from zeo.errors import ServerException
from zeo.server import writer
from zeo.server.commitlock import CommitLock
from zeo.server.outbox import Outbox
from zeo.server.publisher import Publisher
from zeo.server.served import Served
from zeo.server.transaction import State
from zeo.server.transaction import Transaction
from zeo.StorageServer import StorageServer


class Stage:
    """A served storage with gates in it and in the server, its clients, and what happened.

    Gates of the server, beside those of `GatedStorage`: ``released``, when the commit lock has just been
    released by somebody who finished; ``subscribed`` in the middle of ``register``; ``published``;
    ``granting``, before a waiter is given the lock; ``claiming``, before a finish claims its transaction.
    """

    def __init__(self, patch: pytest.MonkeyPatch, over: str = 'sessions', storage: Any = None) -> None:
        self.patch = patch
        self.over = over
        self.gates = Gates()
        self.storage = GatedStorage() if storage is None else storage
        self.storage.gates = self.gates
        self.peers: list[Any] = []
        self.commits: dict[bytes, list[bytes]] = {}  # those that are not in the storage
        self.found: set[str] = set()
        self.server: StorageServer | None = None
        if over == 'sockets':
            self.server = StorageServer({'1': self.storage}, [('127.0.0.1', 0)])
            self.server.start()
            self.served = self.server.storages['1']
        else:
            self.served = Served('1', self.storage)
            self.served.start()
        self._put_gate_after(CommitLock, 'release', 'released')
        self._put_gate_after(Publisher, 'subscribe', 'subscribed')
        self._put_gate_after(Publisher, 'publish', 'published')
        self._put_gate_before(Transaction, 'granted', 'granting')
        self._put_gate_before(Transaction, '_move', 'claiming',
                              lambda before, after: after is State.FINISHING)

    def _put_gate_after(self, owner: type, name: str, gate: str) -> None:
        inner = getattr(owner, name)

        def outer(*args: Any) -> Any:
            result = inner(*args)
            self.gates[gate].go_through()
            return result

        self.patch.setattr(owner, name, outer)

    def _put_gate_before(self, owner: type, name: str, gate: str,
                         when: Callable[..., bool] = lambda *_: True) -> None:
        inner = getattr(owner, name)

        def outer(this: Any, *args: Any) -> Any:
            if when(*args):
                self.gates[gate].go_through()
            return inner(this, *args)

        self.patch.setattr(owner, name, outer)

    # ---- who plays

    def client(self, register: bool = True) -> Any:
        if self.server is None:
            self.peers.append(SessionPeer(self.served, register=register))
        else:
            self.peers.append(SocketPeer(self.server.addresses[0], register=register))
            if not register:
                self.peers[-1].send(b'Z5')
                self.peers[-1].start_reading()
        return self.peers[-1]

    def clients(self, number: int) -> list[Any]:
        return [self.client() for _ in range(number)]

    def outbox(self, peer: Peer) -> Outbox:
        """The outbox of a client; all have to be registered, in the order in which they came."""
        return self.served.publisher.subscribers[self.peers.index(peer)]

    # ---- what they do

    def shut(self, name: str) -> Gate:
        """A gate at which the next one will stop, whoever stands at the one before it."""
        gate = self.gates[name] = Gate()
        gate.shut()
        return gate

    @contextlib.contextmanager
    def stopped(self, name: str, function: Callable[..., Any], *args: Any) -> Iterator['Future[Any]']:
        """A call that has come to a gate, and stays there as long as this lasts."""
        gate = self.shut(name)
        future = in_thread(function, *args)
        gate.wait_until_reached()
        yield future
        gate.open()
        future.exception(PATIENCE)

    def commit(self, peer: Peer, *oids: bytes) -> bytes:
        self.vote(peer, *oids)
        return self.finish(peer)

    def vote(self, peer: Peer, *oids: bytes, id: int = 1) -> None:
        peer.begin(id, *[(each, peer.serial(each), b'record') for each in oids])
        peer.call('vote', id)

    def finish(self, peer: Peer) -> bytes:
        tid: bytes = peer.call('tpc_finish', 1)
        return tid

    # ---- and how that is judged

    def broken(self) -> set[str]:
        """The rules that were broken, over all that happened."""
        for peer in self.peers:
            if not peer.ended:
                with contextlib.suppress(EOFError):
                    peer.call('ping')  # so that it has been told everything
        commits = self.commits | {
            each.tid: [record.oid for record in each] for each in self.storage.iterator()}
        for peer in self.peers:
            self.found |= broken_rules(peer, commits)
        return self.found

    def until_all_have_ended(self) -> None:
        """Wait until the server has forgotten all connections that it has hung up on."""
        if self.server is not None:
            until(lambda: not self.server.connections, 'all have ended')  # type: ignore[union-attr]

    def close(self) -> None:
        self.gates.open_all()
        for peer in self.peers:
            peer.close()
        if self.server is None:
            self.served.close()
        else:
            self.server.close()


def broken_rules(peer: Peer, commits: dict[bytes, list[bytes]]) -> set[str]:
    """The rules that the messages to one client break, given all commits by tid."""
    found = set()
    registered = last = z64
    changed: dict[bytes, bytes] = {}  # by oid: the last tid that the client has heard of
    heard = set()

    def hear(tid: bytes, oids: list[bytes]) -> None:
        nonlocal last
        last = max(last, tid)
        heard.add(tid)
        changed.update((each, tid) for each in oids)

    is_registered = False
    for number, flag, name, args in peer.told:
        if name == 'invalidateTransaction':
            tid, oids = args
            if is_registered and tid <= registered:
                found.add('R')
            elif tid <= last:
                found.add('I')
            hear(tid, oids)
        elif name == '.reply' and not flag:
            request, given = peer.asked[number]
            if request == 'register':
                registered, is_registered = args, True
                last = max(last, registered)
            elif request == 'tpc_finish':
                if args <= last:
                    found.add('F')
                hear(args, commits.get(args, []))
            elif request == 'lastTransaction':
                if args > last:
                    found.add('N')
            elif request == 'getInvalidations' and args is not None:
                up_to, oids = args
                if up_to > last:
                    found.add('N')
                if not {each for tid, changes in commits.items() if given[0] < tid <= up_to
                        for each in changes} <= set(oids):
                    found.add('V')
            elif request == 'loadBefore' and args is not None:
                _, start, end = args
                if end is None and start < changed.get(given[0], z64):
                    found.add('L')
                if start > last:
                    found.add('N')
    if not peer.ended:
        for tid in commits:
            if tid > registered and tid not in heard:
                found.add('I' if tid < last else 'R')
    return found


# ---- scenarios ---------------------------------------------------------------------


def a_load_meets_a_commit(stage: Stage) -> None:
    """It has read the storage; before it answers, the object is changed and that announced."""
    loader, committer = stage.clients(2)
    stage.commit(committer, oid(1))
    with stage.stopped('loaded', loader.load, oid(1)):
        stage.commit(committer, oid(1))


def a_load_meets_a_commit_twice(stage: Stage) -> None:
    """Also when it is done again."""
    loader, committer = stage.clients(2)
    stage.commit(committer, oid(1))
    first = stage.shut('loaded')
    load = in_thread(loader.load, oid(1))
    first.wait_until_reached()
    stage.commit(committer, oid(1))
    second = stage.shut('loaded')
    first.open()
    until(lambda: load.done() or second._reached.is_set(), 'it is done again')
    stage.commit(committer, oid(1))
    second.open()
    load.result(PATIENCE)


def a_load_meets_a_commit_after_one_that_failed(stage: Stage) -> None:
    """The one before was done again, and then there was no such object any more."""
    loader, committer = stage.clients(2)
    stage.commit(committer, oid(1), oid(2))
    load_before = stage.storage.loadBefore
    with stage.stopped('loaded', loader.load, oid(1)) as load:
        stage.commit(committer, oid(1))

        def gone(oid: bytes, tid: bytes) -> None:
            raise POSKeyError(oid)

        stage.storage.loadBefore = gone
    assert isinstance(load.exception(), (POSKeyError, type(None)))
    stage.storage.loadBefore = load_before
    with stage.stopped('loaded', loader.load, oid(2)):
        stage.commit(committer, oid(2))


def a_load_reads_what_is_not_announced_yet(stage: Stage) -> None:
    loader, committer = stage.clients(2)
    stage.commit(committer, oid(1))
    stage.vote(committer, oid(1))
    with stage.stopped('finished', stage.finish, committer):
        load = in_thread(loader.load, oid(1))
        until(lambda: load.done() or stage.outbox(loader)._waiting, 'it waits')
    load.result(PATIENCE)


def a_load_waits_for_an_announcement_and_its_client_leaves(stage: Stage) -> None:
    loader, committer = stage.clients(2)
    stage.commit(committer, oid(1))
    stage.vote(committer, oid(1))
    with stage.stopped('finished', stage.finish, committer):
        in_thread(loader.load, oid(1))
        outbox = stage.outbox(loader)
        until(lambda: outbox._waiting, 'it waits')
        outbox.end()
        try:
            until(lambda: not outbox._waiting, 'it does not wait any longer', timeout=2)
        except AssertionError:
            stage.found.add('W')
        loader.ended = True


def a_newcomer_loads_what_is_old(stage: Stage) -> None:
    stage.commit(stage.client(), oid(1))
    newcomer = stage.client()
    with stage.patch.context() as patch:
        patch.setattr(Outbox, 'wait_for_announcement', lambda *_: stage.found.add('W'))
        newcomer.load(oid(1))


def one_commit_follows_close_upon_another(stage: Stage) -> None:
    """The lock is released; before that thread goes on, the next one commits."""
    first, second, observer = stage.clients(3)
    stage.vote(first, oid(1))
    with stage.stopped('released', stage.finish, first):
        stage.commit(second, oid(2))
    observer.call('ping')


def somebody_asks_when_the_committer_has_its_answer(stage: Stage) -> None:
    committer, observer = stage.clients(2)
    before = stage.outbox(committer).announced
    stage.vote(committer, oid(1))
    with stage.stopped('released', stage.finish, committer):
        answered = stage.outbox(committer).announced > before
        observer.call('ping')
        if answered and not observer.invalidations():
            stage.found.add('P')


def a_transaction_is_not_on_disk_yet(stage: Stage) -> None:
    committer, observer = stage.clients(2)
    before = stage.outbox(observer).announced
    stage.vote(committer, oid(1))
    with stage.stopped('finishing', stage.finish, committer):
        if stage.outbox(observer).announced > before:
            stage.found.add('D')


def a_newcomer_registers_while_others_commit(stage: Stage) -> None:
    committer = stage.client()
    stage.commit(committer, oid(1))
    newcomer = stage.client(register=False)
    with stage.stopped('subscribed', newcomer.call, 'register', '1', False):
        stage.commit(committer, oid(1))


def a_newcomer_registers_when_the_storage_is_ahead(stage: Stage) -> None:
    committer = stage.client()
    stage.commit(committer, oid(1))
    stage.vote(committer, oid(1))
    with stage.stopped('finished', stage.finish, committer):
        stage.client().call('lastTransaction')


def a_newcomer_asks_what_changed_when_that_is_just_announced(stage: Stage) -> None:
    committer = stage.client()
    before = stage.commit(committer, oid(1))
    stage.vote(committer, oid(2))
    with stage.stopped('published', stage.finish, committer):
        stage.client().call('getInvalidations', before)


def the_lock_is_granted_to_who_has_left(stage: Stage) -> None:
    holder, leaving, waiting = stage.clients(3)
    stage.vote(holder, oid(1))
    for number, peer in [(2, leaving), (3, waiting)]:
        peer.begin(number, (oid(number), z64, b'record'))
        peer.ask('vote', number)
        until(lambda number=number: stage.served.lock.waiting == number - 1, 'it waits')
    with stage.stopped('granting', stage.finish, holder):
        leaving.close()
        until(lambda: len(stage.served.publisher.subscribers) == 2, 'it has left')
    has_it: Any = stage.served.lock.holder
    if has_it is None or has_it.id != 3:
        stage.found.add('K')


def finish_and_time_out_come_together(stage: Stage) -> None:
    committer = stage.client()
    stage.vote(committer, oid(1))
    transaction: Any = stage.served.lock.holder
    with stage.stopped('claiming', stage.finish, committer):
        transaction.expired()
    stage.until_all_have_ended()
    if {'tpc_abort', 'tpc_finish'} <= set(stage.storage.calls):
        stage.found.add('K')


def a_finish_fails_when_all_is_on_disk(stage: Stage) -> None:
    committer, observer = stage.clients(2)
    before = stage.commit(committer, oid(1))
    stage.vote(committer, oid(1))
    stage.storage.finish_error = OSError(5, 'as it happens')
    with contextlib.suppress(EOFError, ServerException):
        stage.finish(committer)
    stage.storage.finish_error = None
    until(lambda: stage.served.lock.holder is None, 'the lock is released')
    try:
        until(lambda: committer.ended and observer.ended, 'they were hung up on', timeout=2)
    except AssertionError:
        stage.found.add('H')
    newcomer = stage.client()
    told = newcomer.call('getInvalidations', before)
    if newcomer.call('lastTransaction') <= before:
        stage.found.add('R')
    elif told is not None and oid(1) not in told[1]:
        stage.found.add('V')


def a_committer_is_lost_while_it_finishes(stage: Stage) -> None:
    committer, other, _ = stage.clients(3)
    stage.vote(committer, oid(1))
    with stage.stopped('finishing', stage.finish, committer):
        stage.outbox(committer).end()
        committer.ended = True
    stage.commit(other, oid(2))


def an_own_commit_stands_between_those_of_others(stage: Stage) -> None:
    """The storage is itself a client: another transaction comes before its ``tpc_finish`` returns."""
    committer, observer = stage.clients(2)

    def somebody_else() -> None:
        stage.commits[stage.storage.somebody_commits(oid(2))] = [oid(2)]

    stage.storage.between = somebody_else
    try:
        stage.commit(committer, oid(1))
    except EOFError:
        stage.found.add('F')  # there was no place left for the answer


def no_mark(stage: Stage) -> None:
    inner = Outbox.reply_to_load
    stage.patch.setattr(Outbox, 'reply_to_load', lambda self, frame, mark, start, **kw: inner(
        self, frame, self.published, start, **kw))


def announcements_do_not_touch_a_watch(stage: Stage) -> None:
    inner = Outbox.announce
    stage.patch.setattr(Outbox, 'announce', lambda self, frame, tid, oids: inner(self, frame, tid, ()))


def a_watch_holds_for_the_next_load(stage: Stage) -> None:
    inner = Outbox.reply_to_load
    stage.patch.setattr(Outbox, 'reply_to_load', lambda self, *args, watching, **kw: inner(
        self, *args, watching=self._watched is not None, **kw))


def replies_may_run_ahead(stage: Stage) -> None:
    for name in ('reply_to_load', 'reply_with_history'):
        inner = getattr(Outbox, name)
        stage.patch.setattr(Outbox, name, lambda *args, inner=inner, **kw: inner(
            *args, **kw | {'ahead': True}))


def the_end_wakes_nobody(stage: Stage) -> None:
    def end(self: Outbox) -> None:
        self.gone = True

    stage.patch.setattr(Outbox, '_end', end)


def who_subscribes_is_taken_to_know_nothing(stage: Stage) -> None:
    stage.patch.setattr(Outbox, 'start_at', lambda *_: None)


def after_release(stage: Stage) -> Callable[[Callable[[], Any]], None]:
    """A function that puts off something until this thread has released the commit lock."""
    late = threading.local()
    inner = CommitLock.release

    def release(*args: Any) -> None:
        inner(*args)
        todo, late.todo = getattr(late, 'todo', []), []
        for each in todo:
            each()

    stage.patch.setattr(CommitLock, 'release', release)

    def put_off(action: Callable[[], Any]) -> None:
        late.todo = [*getattr(late, 'todo', []), action]

    return put_off


def publish_after_release(stage: Stage) -> None:
    inner, put_off = Publisher.publish, after_release(stage)

    def publish(self: Publisher, tid: bytes, oids: Any, committer: Any = None, answer: Any = ()) -> Any:
        def late() -> None:
            try:
                inner(self, tid, oids, committer, answer)
            except ValueError:  # too late for everybody else
                committer.append(answer)

        put_off(late)
        return []

    stage.patch.setattr(Publisher, 'publish', publish)


def answer_after_release(stage: Stage) -> None:
    inner, put_off = Publisher.publish, after_release(stage)

    def publish(self: Publisher, tid: bytes, oids: Any, committer: Any = None, answer: Any = ()) -> Any:
        put_off(lambda: committer.append(answer))
        return inner(self, tid, oids, committer, ())

    stage.patch.setattr(Publisher, 'publish', publish)


def answer_and_tell_the_others_later(stage: Stage) -> None:
    inner, put_off = Publisher.publish, after_release(stage)

    def publish(self: Publisher, tid: bytes, oids: Any, committer: Any = None, answer: Any = ()) -> Any:
        committer.announce(answer, tid, oids)
        put_off(lambda: inner(self, tid, oids, committer, ()))
        return [committer]

    stage.patch.setattr(Publisher, 'publish', publish)


def a_loss_ends_the_finish(stage: Stage) -> None:
    inner = Publisher.publish

    def publish(self: Publisher, tid: bytes, oids: Any, committer: Any = None, answer: Any = ()) -> Any:
        return [] if committer.gone else inner(self, tid, oids, committer, answer)

    stage.patch.setattr(Publisher, 'publish', publish)


def publish_from_within_the_storage(stage: Stage) -> None:
    stage.served.announces_itself = True


def read_the_last_tid_then_subscribe(stage: Stage) -> None:
    inner = Publisher.subscribe
    before: dict[int, bytes] = {}

    def subscribe(self: Publisher, outbox: Outbox) -> None:
        before[threading.get_ident()] = self._last_tid
        stage.gates['subscribed'].go_through()
        inner(self, outbox)

    stage.patch.setattr(Publisher, 'subscribe', subscribe)
    stage.patch.setattr(Publisher, 'last_tid', property(
        lambda self: before.get(threading.get_ident(), self._last_tid)))


def take_the_last_tid_from_the_storage(stage: Stage) -> None:
    stage.patch.setattr(Publisher, 'last_tid', property(lambda _: stage.storage.lastTransaction()))


def remember_it_later(stage: Stage) -> None:
    inner = Publisher.publish

    def publish(self: Publisher, *args: Any) -> list[Outbox]:
        recent, late = self._recent, []

        class Late(deque[Any]):
            append = late.append

        self._recent = Late(recent, recent.maxlen)
        told = inner(self, *args)
        self._recent = deque([*recent, *late], recent.maxlen)
        return told

    stage.patch.setattr(Publisher, 'publish', publish)


def grant_without_asking(stage: Stage) -> None:
    inner = Transaction.granted

    def granted(self: Transaction) -> bool:
        inner(self)
        return True

    stage.patch.setattr(Transaction, 'granted', granted)


def look_then_claim(stage: Stage) -> None:
    def move(self: Transaction, before: State, after: State) -> bool:
        if self.state is not before:
            return False
        if after is State.FINISHING:
            stage.gates['claiming'].go_through()
        self.state = after
        return True

    stage.patch.setattr(Transaction, '_move', move)


def hang_up_and_leave_the_ring(stage: Stage) -> None:
    def start_afresh(self: Publisher, last_tid: bytes) -> list[Outbox]:
        for outbox in self._subscribers:
            outbox.end()
        return list(self._subscribers)

    stage.patch.setattr(Publisher, 'start_afresh', start_afresh)


def hang_up_on_nobody(stage: Stage) -> None:
    def start_afresh(self: Publisher, last_tid: bytes) -> list[Outbox]:
        self._last_tid = last_tid
        return []

    stage.patch.setattr(Publisher, 'start_afresh', start_afresh)


def publish_when_the_storage_has_returned(stage: Stage) -> None:
    stage.served.announces_itself = False


#: Each scenario, with the mutants that it is to find out, and the rules that they break.
SCENARIOS: list[tuple[Callable[[Stage], None], dict[Callable[[Stage], None], str]]] = [
    (a_load_meets_a_commit, {no_mark: 'L'}),
    (a_load_meets_a_commit_twice, {no_mark: 'L', announcements_do_not_touch_a_watch: 'L'}),
    (a_load_meets_a_commit_after_one_that_failed, {a_watch_holds_for_the_next_load: 'L'}),
    (a_load_reads_what_is_not_announced_yet, {replies_may_run_ahead: 'N'}),
    (a_load_waits_for_an_announcement_and_its_client_leaves, {the_end_wakes_nobody: 'W'}),
    (a_newcomer_loads_what_is_old, {who_subscribes_is_taken_to_know_nothing: 'W'}),
    (one_commit_follows_close_upon_another, {publish_after_release: 'I', answer_after_release: 'F'}),
    (somebody_asks_when_the_committer_has_its_answer, {answer_and_tell_the_others_later: 'P'}),
    (a_transaction_is_not_on_disk_yet, {publish_from_within_the_storage: 'D'}),
    (a_newcomer_registers_while_others_commit, {read_the_last_tid_then_subscribe: 'R'}),
    (a_newcomer_registers_when_the_storage_is_ahead, {take_the_last_tid_from_the_storage: 'R'}),
    (a_newcomer_asks_what_changed_when_that_is_just_announced, {remember_it_later: 'V'}),
    (the_lock_is_granted_to_who_has_left, {grant_without_asking: 'K'}),
    (finish_and_time_out_come_together, {look_then_claim: 'K'}),
    (a_finish_fails_when_all_is_on_disk, {hang_up_and_leave_the_ring: 'R', hang_up_on_nobody: 'H'}),
    (a_committer_is_lost_while_it_finishes, {a_loss_ends_the_finish: 'I'}),
    (an_own_commit_stands_between_those_of_others, {publish_when_the_storage_has_returned: 'F'}),
]


@contextlib.contextmanager
def staged(patch: pytest.MonkeyPatch, over: str, scenario: Callable[[Stage], None]) -> Iterator[Stage]:
    storage = None
    if scenario is an_own_commit_stands_between_those_of_others:
        storage = Announcing()
    stage = Stage(patch, over, storage)
    try:
        yield stage
    finally:
        stage.close()


@pytest.mark.parametrize('over', ['sessions', 'sockets'])
@pytest.mark.parametrize('scenario', [scenario for scenario, _ in SCENARIOS],
                         ids=lambda scenario: scenario.__name__)
def test_no_rule_is_broken(
        monkeypatch: pytest.MonkeyPatch, scenario: Callable[[Stage], None], over: str) -> None:
    with staged(monkeypatch, over, scenario) as stage:
        scenario(stage)
        assert stage.broken() == set()


@pytest.mark.parametrize('over', ['sessions', 'sockets'])
@pytest.mark.parametrize('scenario, mutant, rule', [
    (scenario, mutant, rule) for scenario, mutants in SCENARIOS for mutant, rule in mutants.items()],
    ids=lambda each: getattr(each, '__name__', each))
def test_without_its_protection_the_rule_is_broken(
        monkeypatch: pytest.MonkeyPatch, scenario: Callable[[Stage], None],
        mutant: Callable[[Stage], None], rule: str, over: str) -> None:
    with staged(monkeypatch, over, scenario) as stage:
        mutant(stage)
        scenario(stage)
        assert rule in stage.broken()


# ---- clients that do not read ------------------------------------------------------------


def no_limit(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(zeo.server.connection, 'Outbox', Outbox)


def send_and_wait(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(writer, 'DONT_WAIT', 0)


def broken_by_a_client_that_does_not_read(patch: pytest.MonkeyPatch, path: str,
                                          mutant: Callable[[pytest.MonkeyPatch], None]) -> str:
    """What happens to others: '' if nothing, 'delayed', or 'kept' if it was not given up."""
    patch.setattr(zeo.server.connection, 'Outbox', partial(Outbox, limit=100_000))
    mutant(patch)
    server = StorageServer({'1': GatedStorage()}, [path])
    server.start()
    stuck, committer = SocketPeer(path, reading=False), SocketPeer(path)
    oids = [oid(number) for number in range(1000)]
    try:
        until(lambda: len(server.connections) == 2, 'both are there')
        until(lambda: len(server.storages['1'].publisher.subscribers) == 2, 'both are registered')
        tid = z64
        for _ in range(100):
            committer.begin(1, *[(each, tid, b'record') for each in oids])
            committer.call('vote', 1)
            committer.call('tpc_finish', 1)
            try:
                in_thread(committer.call, 'ping').result(3)
            except TimeoutError:
                return 'delayed'
            tid = committer.call('lastTransaction')
            if len(server.storages['1'].publisher.subscribers) == 1:
                return ''
        return 'kept'
    finally:
        stuck.close()
        committer.close()
        server.close()


@pytest.mark.parametrize('mutant, expected', [
    (lambda _: None, ''), (no_limit, 'kept'), (send_and_wait, 'delayed')],
    ids=['as it is', 'no limit', 'send and wait'])
def test_a_client_that_does_not_read_delays_nobody_and_is_given_up(
        monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
        mutant: Callable[[pytest.MonkeyPatch], None], expected: str) -> None:
    assert broken_by_a_client_that_does_not_read(
        monkeypatch, str(tmp_path / 'socket'), mutant) == expected


def test_what_a_client_is_told_is_judged_at_all() -> None:
    """The judge itself: each message out of order is found."""
    def told(*messages: Any, asked: Any = (), commits: Any = ()) -> set[str]:
        peer = Peer()
        peer.asked = {number: each for number, each in enumerate(asked, 1)}
        peer.told = list(messages)
        return broken_rules(peer, dict(commits))

    one, two, three = (oid(number) for number in (1, 2, 3))

    def news(tid: bytes, *oids: bytes) -> Any:
        return (0, 1, 'invalidateTransaction', (tid, list(oids)))

    load = ('loadBefore', (one, three))
    assert told(news(one, one), news(two, one)) == set()
    assert told(news(two), news(one)) == {'I'}
    assert told(news(two), (1, 0, '.reply', one), asked=[('tpc_finish', (1,))]) == {'F'}
    assert told(news(two, one), (1, 0, '.reply', (b'', one, None)), asked=[load]) == {'L'}
    assert told((1, 0, '.reply', (b'', one, None)), asked=[load]) == {'N'}
    assert told(news(three), commits={two: [one], three: []}) == {'I'}
    assert told((1, 0, '.reply', one), commits={two: [one]}, asked=[('register', ())]) == {'R'}
    assert told((1, 0, '.reply', two), news(two), asked=[('register', ())]) == {'R'}
    assert told((1, 0, '.reply', two), (2, 0, '.reply', (two, [])), commits={two: [one]},
                asked=[('register', ()), ('getInvalidations', (one,))]) == {'V'}
