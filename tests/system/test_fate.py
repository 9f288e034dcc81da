"""What became of a commit whose connection was lost while it was being finished.

The stream is cut after every single byte of the exchange from vote to the reply to tpc_finish, in both
directions.  Whatever the client then says has to be true: a tid is returned only for what is in the
database, and an error that is no `OutcomeUnknown` means that it is not.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from ZODB import DB
from ZODB.utils import z64

from tests.system.clients import Task, store
from tests.system.cuts import EXCHANGE, Attempts, commit
from tests.system.proxy import DOWN, UP, Proxy
from tests.system.servers import Server, until
from zeo import ClientDisconnected, OutcomeUnknown
from zeo.ClientStorage import ClientStorage

Start = Callable[..., Server]

RECORD = b'r' * 10


def in_database(storage: Any, oid: bytes) -> bytes:
    storage.sync()
    record: bytes = storage.load(oid)[0]
    return record


@pytest.mark.parametrize('direction', [UP, DOWN])
def test_whatever_byte_the_stream_is_cut_after_the_outcome_is_told_truly(
        start_server: Start, direction: str) -> None:
    server = start_server()
    direct = ClientStorage(server.address, server_sync=True)
    attempts = Attempts(direct)
    with Proxy(server.address) as proxy:
        for cut in range(EXCHANGE[direction]):
            storage = ClientStorage(proxy.address, wait_timeout=60)
            storage.sync()
            proxy.cut_after(cut, direction)
            attempts.commit(storage, cut)
            proxy.mend()
            storage.close()
    direct.close()
    attempts.judge()


def test_the_outcome_is_known_although_the_server_was_killed_and_restarted(start_server: Start) -> None:
    server = start_server()
    # A fixed port, which the restarted server has again, and a proxy that knows when to cut.
    direct = ClientStorage(server.address, wait_timeout=60, server_sync=True)
    oid = direct.new_oid()
    serial = store(direct, oid, record=b'0')
    outcomes: Counter[str] = Counter()
    with Proxy(server.address) as proxy:
        for direction, record in (UP, b'never finished'), (DOWN, b'finished'):
            storage = ClientStorage(proxy.address, wait_timeout=60)

            def cut(direction: str = direction) -> None:
                proxy.cut_after(0, direction)

            task = Task(commit, storage, oid, serial, record, cut)
            if direction is DOWN:
                # The reply was cut off: by then the transaction is on disk.
                def is_there(record: bytes = record) -> bool:
                    return in_database(direct, oid) == record

                until(is_there, 'the transaction is committed')
            server.kill()
            proxy.mend()
            server.start()
            try:
                serial = task.result()
                outcomes['committed'] += 1
            except OutcomeUnknown:
                raise
            except ClientDisconnected:
                outcomes['not committed'] += 1
            assert (in_database(direct, oid) == record) == (direction is DOWN)
            storage.close()
    direct.close()
    assert outcomes == {'committed': 1, 'not committed': 1}


def test_without_a_server_that_can_be_asked_the_outcome_is_unknown_and_says_so(start_server: Start) -> None:
    server = start_server()
    with Proxy(server.address) as proxy:
        storage = ClientStorage(proxy.address, wait_timeout=.3)

        def vanish() -> None:
            proxy.target = ('127.0.0.1', 1)
            proxy.cut_after(0, UP)

        with pytest.raises(OutcomeUnknown, match='may be committed or not'):
            commit(storage, storage.new_oid(), z64, RECORD, vanish)
        storage.close()


def test_a_stock_server_cannot_be_asked(start_server: Start) -> None:
    server = start_server('ZEO')
    with Proxy(server.address) as proxy:
        storage = ClientStorage(proxy.address, wait_timeout=30)
        with pytest.raises(OutcomeUnknown):
            commit(storage, storage.new_oid(), z64, RECORD, lambda: proxy.cut_after(0, UP))
        storage.close()


def test_a_database_goes_on_after_a_commit_whose_reply_was_lost(start_server: Start) -> None:
    server = start_server()
    with Proxy(server.address) as proxy:
        db = DB(ClientStorage(proxy.address, wait_timeout=60))
        one, two = db.open(), db.open()
        with one.transaction_manager as transaction:
            one.root()['n'] = 0
            transaction.note('begin')
        finish = db.storage.tpc_finish

        def cut_then_finish(*args: Any) -> Any:
            proxy.cut_after(0, DOWN)
            return finish(*args)

        db.storage.tpc_finish = cut_then_finish
        with one.transaction_manager:
            one.root()['n'] = 1
        db.storage.tpc_finish = finish
        for connection in one, two:
            connection.sync()
            assert connection.root()['n'] == 1
        with two.transaction_manager:
            two.root()['n'] += 1
        one.sync()
        assert one.root()['n'] == 2
        for connection in one, two:
            connection.close()
        db.close()
