"""Signs of life, and their end."""

import logging
import threading

import pytest

from tests.server.talk import PATIENCE
from zeo.server.pulse import Pulse


def test_the_pulse_beats_until_it_is_closed() -> None:
    beats = threading.Semaphore(0)
    pulse = Pulse(beats.release, 0.01)
    pulse.start()
    for _ in range(3):
        assert beats.acquire(timeout=PATIENCE)
    pulse.close()
    assert not any(thread.name == 'zeo pulse' for thread in threading.enumerate())


def test_it_can_be_closed_before_it_was_started() -> None:
    Pulse(lambda: None).close()


def test_it_goes_on_after_a_failure(caplog: pytest.LogCaptureFixture) -> None:
    beats = threading.Semaphore(0)

    def beat() -> None:
        beats.release()
        raise RuntimeError('not this time')

    pulse = Pulse(beat, 0.01)
    with caplog.at_level(logging.ERROR):
        pulse.start()
        for _ in range(2):
            assert beats.acquire(timeout=PATIENCE)
        pulse.close()
    assert 'could not be given a sign of life' in caplog.text
