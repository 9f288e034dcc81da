"""What is told about a server to those who look after it."""

import time
from collections.abc import Callable
from typing import Any

from ZODB.FileStorage import FileStorage
from ZODB.MappingStorage import MappingStorage

from tests.server.talk import SessionPeer
from tests.server.talk import oid
from zeo.server import figures
from zeo.server.served import Served

Serve = Callable[..., Served]
Connect = Callable[..., SessionPeer]


def ask(peer: SessionPeer, storage: str = '1') -> dict[str, Any]:
    told: dict[str, Any] = peer.call('figures')['storages'][storage]
    return told


def test_every_client_is_named_until_it_leaves(serve: Serve, connect: Connect) -> None:
    served = serve()
    one, two = connect(served), connect(served, read_only=True)
    two.call('set_client_label', 'two')
    first, second = ask(one)['clients']
    assert (first['label'], first['read_only']) == ('', False)
    assert (second['label'], second['read_only']) == ('two', True)
    assert 0 <= time.time() - second['since'] < 60
    two.close()
    assert [each['label'] for each in ask(one)['clients']] == ['']


def test_who_holds_the_commit_lock_and_who_waits_is_told(serve: Serve, connect: Connect) -> None:
    served = serve(MappingStorage())
    watcher, holder, waiter = connect(served), connect(served), connect(served)
    holder.call('set_client_label', 'holder')
    waiter.call('set_client_label', 'waiter')
    assert ask(watcher)['holder'] is None
    holder.begin(1, (oid(1), bytes(8), b'one'))
    holder.call('vote', 1)
    waiter.begin(1, (oid(2), bytes(8), b'two'))
    vote = waiter.ask('vote', 1)
    told = ask(watcher)
    assert told['holder']['client'].endswith('(holder)')
    assert 0 <= time.time() - told['holder']['since'] < 60
    assert [each.endswith('(waiter)') for each in told['queue']] == [True]
    holder.call('tpc_abort', 1)
    waiter.answer(vote)
    waiter.call('tpc_abort', 1)
    assert ask(watcher)['holder'] is None


def test_all_storages_are_told_of_and_what_one_of_them_cannot_tell_is_none(
        file_storage: FileStorage, serve: Serve, connect: Connect) -> None:
    class Speechless(MappingStorage):  # type: ignore[misc]
        def getSize(self) -> int:
            raise OSError('the disk has gone')

    peer = connect({'1': serve(file_storage), 'other': serve(Speechless())})
    told = peer.call('figures')['storages']
    assert told['1']['size'] == file_storage.getSize()
    assert told['1']['room'] > 0
    assert told['1']['pack'] is None
    assert told['other']['size'] is None
    assert told['other']['room'] is None


def test_the_clock_of_the_server_goes_with_the_figures() -> None:
    assert abs(figures.of_server({})['now'] - time.time()) < 60
