"""Finds out what became of a transaction whose finish was not answered: the next connection is asked about it."""

import logging
import time

from zeo.client.commit import Commit
from zeo.client.supervisor import State
from zeo.client.supervisor import Supervisor
from zeo.errors import ClientDisconnected
from zeo.errors import OutcomeUnknown

__all__ = ['find_out']

logger = logging.getLogger(__name__)


def find_out(commit: Commit, supervisor: Supervisor, timeout: float, error: Exception) -> bytes:
    """The tid that the transaction got, if the server says within so many seconds that it is committed.

    Raises `ClientDisconnected` if it is not, and `OutcomeUnknown` if nobody can say; ``error`` is why the
    finish was not answered.
    """
    until = time.monotonic() + timeout
    committed = None
    while commit.tid is not None and committed is None:
        try:
            link = supervisor.wait(max(until - time.monotonic(), 0.0))
            if not link.offers('settle'):
                break
            committed = link.channel.call('settle', (commit.tid, commit.id))
        except ClientDisconnected:
            if time.monotonic() >= until or supervisor.state is State.CLOSED:
                break
        except Exception:
            logger.warning('The server cannot say what became of a transaction', exc_info=True)
            break
    if committed is None:
        raise OutcomeUnknown(f'this transaction may be committed or not ({error})') from error
    if not committed:
        raise ClientDisconnected(f'this transaction was not committed ({error})') from error
    # What the server told at vote is the tid, unless it says now which it is.
    tid = committed if isinstance(committed, bytes) else commit.tid
    assert tid is not None
    return tid
