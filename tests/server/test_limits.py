"""zeo.server.limits: who is let in, and who has to leave."""

import resource

import pytest
from ZODB.POSException import StorageError

from tests.server.talk import SessionPeer
from zeo.server import limits
from zeo.server.limits import Door
from zeo.server.limits import Full
from zeo.server.limits import Limits
from zeo.server.served import Served


def test_there_is_room_up_to_the_limit_and_again_when_somebody_has_left() -> None:
    door = Door(2, None)
    for guest in 'ab':
        assert door.enter(guest, 'here') is None
        door.registered(guest)
    with pytest.raises(Full, match='2 connections'):
        door.enter('c', 'there')
    door.leave('a')
    assert door.enter('c', 'there') is None


def test_the_stranger_who_came_first_makes_room() -> None:
    door = Door(3, None)
    for guest in 'abc':
        door.enter(guest, None)
    door.registered('a')
    assert door.enter('d', None) == 'b'
    assert door.enter('e', None) == 'c'
    door.registered('b')  # a moment too late: it has left
    door.leave('b')
    assert door.enter('f', None) == 'd'


def test_an_address_has_a_limit_of_its_own() -> None:
    door = Door(10, 2)
    door.enter('a', 'there')
    for guest in 'bc':
        door.enter(guest, 'here')
    assert door.enter('d', 'here') == 'b'  # not 'a', who came first
    for guest in 'cd':
        door.registered(guest)
    with pytest.raises(Full, match='2 connections from this address'):
        door.enter('e', 'here')
    assert door.enter('e', 'there') is None
    door.leave('c')
    assert door.enter('f', 'here') is None


def test_where_addresses_do_not_count_only_the_whole_does() -> None:
    door = Door(3, 1)
    for guest in 'abc':
        assert door.enter(guest, None) is None
        door.registered(guest)
    with pytest.raises(Full):
        door.enter('d', None)


def test_nothing_is_left_of_those_who_have_left() -> None:
    door = Door(100, 100)
    for guest in range(100):
        door.enter(guest, str(guest % 3))
    for guest in [*range(100), 5, 'nobody']:
        door.leave(guest)
    assert not (door._inside or door._at or door._strangers)


@pytest.mark.parametrize('files, connections', [
    (1024, 924), (100, 75), (resource.RLIM_INFINITY, 2**31)])
def test_some_files_are_kept_for_other_things(
        monkeypatch: pytest.MonkeyPatch, files: int, connections: int) -> None:
    monkeypatch.setattr(limits.resource, 'getrlimit', lambda which: (files, files))
    assert limits.files_for_connections() == connections


@pytest.mark.parametrize('files, connections, iterators', [
    (1024, 5000, 50), (100, 5000, 12), (20_000, 5000, 7450), (limits.resource.RLIM_INFINITY, 5000, 2**31)])
def test_iterators_leave_files_for_other_things(
        monkeypatch: pytest.MonkeyPatch, files: int, connections: int, iterators: int) -> None:
    monkeypatch.setattr(limits.resource, 'getrlimit', lambda which: (files, files))
    assert limits.files_for_iterators(connections) == iterators


def test_an_allowance_is_what_is_not_used() -> None:
    allowance = limits.Allowance(2)
    assert [allowance.take() for _ in range(3)] == [True, True, False]
    allowance.give_back()
    assert [allowance.take() for _ in range(2)] == [True, False]


def test_a_transaction_that_is_too_large_fails_at_its_vote(serve: object, connect: object) -> None:
    served: Served = serve()  # type: ignore[operator]
    peer: SessionPeer = connect(served)  # type: ignore[operator]
    peer.session._limits = Limits(max_transaction=5000)
    for size, fits in [(2000, True), (2001, True), (4700, True), (4701, False), (100_000, False)]:
        peer.begin(1, (size.to_bytes(8, 'big'), bytes(8), b'x' * size))
        if fits:
            peer.call('vote', 1)
            peer.call('tpc_abort', 1)
        else:
            with pytest.raises(StorageError, match='more than 5000 bytes'):
                peer.call('vote', 1)
    peer.begin(2, *((number.to_bytes(8, 'big'), bytes(8), b'x') for number in range(20)))
    with pytest.raises(StorageError, match='more than 5000 bytes'):
        peer.call('vote', 2)
    assert peer.call('ping') is None


def test_the_ids_of_what_is_to_be_undone_count_as_well(serve: object, connect: object) -> None:
    served: Served = serve()  # type: ignore[operator]
    peer: SessionPeer = connect(served)  # type: ignore[operator]
    peer.session._limits = Limits(max_transaction=5000)
    peer.begin(1)
    peer.tell('undoa', b'x' * 5000, 1)
    with pytest.raises(StorageError, match='more than 5000 bytes'):
        peer.call('vote', 1)
