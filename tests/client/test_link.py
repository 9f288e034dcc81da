"""What is said over a connection before it is used."""

from tests.client.conftest import Calls
from tests.client.conftest import MakeClient
from tests.client.conftest import ready
from tests.client.peer import INFO
from tests.client.peer import Host
from tests.client.peer import oid
from tests.client.peer import tid
from tests.system.servers import until
from zeo.client.supervisor import State
from zeo.wire.announcements import invalidation_notice
from zeo.wire.messages import notice
from zeo.wire.messages import reply


def test_a_server_that_does_not_tell_its_last_transaction_is_asked(
        client: MakeClient, host: Host) -> None:
    one = client(host)
    one.supervisor.start()
    peer = host.accept()
    peer.greet()
    peer.answer(peer.read('register'), None)
    peer.answer(peer.read('lastTransaction'), tid(7))
    peer.answer(peer.read('get_info'), INFO)
    one.supervisor.wait()
    assert one.cache.last_tid == tid(7)


def test_a_known_cache_catches_up(client: MakeClient, host: Host) -> None:
    one = client(host)
    one.known(tid(3))
    one.supervisor.start()
    peer = host.accept()
    peer.welcome(tid(5))
    message = peer.read('getInvalidations')
    assert message.args == (tid(3),)
    assert one.supervisor.state is State.VERIFYING
    peer.answer(message, (tid(5), [oid(1)]))
    one.supervisor.wait()
    assert one.cache.load(oid(1)) is None
    assert one.database.told == [(tid(5), [oid(1)])]


def test_nothing_is_lost_between_the_early_and_the_direct_invalidations(
        client: MakeClient, host: Host) -> None:
    """One before each answer, and one right behind the last; 4 and 5 are in the answer already."""
    one = client(host)
    one.known(tid(3))
    one.supervisor.start()
    peer = host.accept()
    peer.greet()
    registration = peer.read('register')
    peer.send(invalidation_notice(tid(4), [oid(4)]), reply(registration.id, tid(4)))
    message = peer.read('get_info')
    peer.send(invalidation_notice(tid(5), [oid(5)]), reply(message.id, INFO))
    message = peer.read('getInvalidations')
    peer.send(invalidation_notice(tid(6), [oid(6)]),
              reply(message.id, (tid(5), [oid(4), oid(5)])),
              invalidation_notice(tid(7), [oid(1)]))
    one.supervisor.wait()
    until(lambda: one.cache.last_tid == tid(7), 'the last invalidation was processed')
    assert one.database.told == [
        (tid(5), [oid(4), oid(5)]), (tid(6), [oid(6)]), (tid(7), [oid(1)])]
    assert one.cache.loadBefore(oid(1), tid(7)) == (b'one', tid(1), tid(7))


def test_a_server_that_cannot_tell_what_changed_costs_the_cache(client: MakeClient, host: Host) -> None:
    one = client(host)
    one.known(tid(3))
    one.supervisor.start()
    peer = host.accept()
    peer.welcome(tid(5))
    peer.answer(peer.read('getInvalidations'), None)
    one.supervisor.wait()
    assert len(one.cache) == 0
    assert one.database.told == ['all']
    assert one.cache.last_tid == tid(5)


def test_new_figures_replace_the_old(client: MakeClient, host: Host) -> None:
    one = client(host)
    peer = ready(one, host)
    peer.send(notice('info', ({'length': 99},)))
    until(lambda: one.connected[0].info['length'] == 99, 'the figure has come')
    assert one.connected[0].info['name'] == INFO['name']


def test_a_server_that_gives_signs_of_life_is_asked_for_them(client: MakeClient, host: Host) -> None:
    one = client(host)
    peer = ready(one, host, zeo=('verify', 'pulse'))
    assert peer.read('pulse').oneway
    assert one.connected[0].channel._pulsing


def test_others_are_not(client: MakeClient, host: Host, calls: Calls) -> None:
    one = client(host)
    peer = ready(one, host)
    result = calls.start(one.connected[0].channel.call, 'ping')
    peer.answer(peer.read('ping'), None)
    result()
    assert not one.connected[0].channel._pulsing


def test_a_read_only_client_says_so(client: MakeClient, host: Host) -> None:
    one = client(host, read_only=True)
    one.supervisor.start()
    peer = host.accept()
    assert peer.welcome(tid(5)).args == ('1', True)
    assert one.supervisor.wait().read_only
