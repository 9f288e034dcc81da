"""A thread for what has to be done in turn."""

import pytest

from zeo.server.worker import Worker


def test_a_worker_does_all_that_was_submitted_in_order_and_survives_errors(
        caplog: pytest.LogCaptureFixture) -> None:
    worker, done = Worker('test worker'), []

    def fail() -> None:
        raise SystemExit

    worker.submit(lambda: done.append(1))  # before it is started
    worker.start()
    worker.submit(fail)
    worker.submit(lambda: done.append(2))
    worker.close()
    assert done == [1, 2]
    assert 'test worker: a job failed' in caplog.text
