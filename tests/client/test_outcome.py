"""What became of a transaction whose finish was not answered: who is asked, how often, and what is made of it."""

from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
from ZODB.utils import p64

from zeo.client.outcome import find_out
from zeo.client.supervisor import State
from zeo.errors import ClientDisconnected, OutcomeUnknown, ServerException

TOLD, OTHER = p64(7), p64(8)
LOST = ClientDisconnected('lost while it finished')


class Supervisor:
    """Has a connection each time, over which the next of `answers` comes; an error is raised."""

    def __init__(self, *answers: Any, offered: bool = True, state: State = State.READY) -> None:
        self.answers = list(answers)
        self.offered = offered
        self.state = state
        self.asked: list[Any] = []
        self.patience: list[float] = []

    def wait(self, timeout: float) -> Any:
        self.patience.append(timeout)
        return SimpleNamespace(offers=lambda name: self.offered and name == 'settle', channel=self)

    def call(self, name: str, args: Any) -> Any:
        self.asked.append((name, args))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def found_out(supervisor: Supervisor, tid: bytes | None = TOLD, timeout: float = 60) -> bytes:
    return find_out(SimpleNamespace(tid=tid, id=5), supervisor, timeout, LOST)  # type: ignore[arg-type]


@pytest.mark.parametrize('answer, tid', [(True, TOLD), (OTHER, OTHER)])
def test_a_committed_transaction_has_the_tid_that_was_told_unless_the_server_says_another(
        answer: Any, tid: bytes) -> None:
    supervisor = Supervisor(answer)
    assert found_out(supervisor) == tid
    assert supervisor.asked == [('settle', (TOLD, 5))]


def test_one_that_is_not_committed_failed_with_its_connection() -> None:
    with pytest.raises(ClientDisconnected, match='was not committed .*lost while it finished') as caught:
        found_out(Supervisor(False))
    assert not isinstance(caught.value, OutcomeUnknown) and caught.value.__cause__ is LOST


def test_a_connection_that_is_lost_as_well_is_followed_by_the_next() -> None:
    supervisor = Supervisor(ClientDisconnected('again'), ClientDisconnected('and again'), True)
    assert found_out(supervisor) == TOLD
    assert len(supervisor.asked) == 3


@pytest.mark.parametrize('supervisor, tid, timeout, asked', [
    (Supervisor(), None, 60, 0),                                                # its tid was never told
    (Supervisor(offered=False), TOLD, 60, 0),                                   # a server that cannot be asked
    (Supervisor(ClientDisconnected('again'), True), TOLD, 0, 1),                # no time left
    (Supervisor(ClientDisconnected('again'), True, state=State.CLOSED), TOLD, 60, 1)])
def test_what_nobody_can_say_is_told_to_be_unknown(
        supervisor: Supervisor, tid: bytes | None, timeout: float, asked: int) -> None:
    with pytest.raises(OutcomeUnknown, match='may be committed or not .*lost while it finished'):
        found_out(supervisor, tid, timeout)
    assert len(supervisor.asked) == asked


def test_a_server_that_fails_to_say_is_not_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    supervisor = Supervisor(ServerException('its disk is gone'), True)
    with pytest.raises(OutcomeUnknown):
        found_out(supervisor)
    assert len(supervisor.asked) == 1
    assert 'cannot say what became of a transaction' in caplog.text


def test_all_attempts_together_take_the_time_that_one_may(monkeypatch: pytest.MonkeyPatch) -> None:
    now = count(0, 20)
    monkeypatch.setattr('zeo.client.outcome.time', SimpleNamespace(monotonic=lambda: next(now)))
    supervisor = Supervisor(ClientDisconnected('again'), ClientDisconnected('and again'))
    with pytest.raises(OutcomeUnknown):
        found_out(supervisor, timeout=70)
    assert supervisor.patience == [50, 10]
    now, supervisor = count(0, 20), Supervisor(True)
    assert found_out(supervisor, timeout=10) == TOLD
    assert supervisor.patience == [0]
