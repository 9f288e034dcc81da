"""The server as a whole: addresses, signs of life, and the end in order."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest
from ZODB.FileStorage import FileStorage
from ZODB.MappingStorage import MappingStorage
from ZODB.utils import z64

from tests.server.running import LOCAL
from tests.server.running import Connect
from tests.server.running import Start
from tests.server.running import connect
from tests.server.running import is_closed
from tests.server.running import server
from tests.server.running import start
from tests.server.running import storage
from tests.server.talk import PATIENCE
from tests.server.talk import SocketPeer
from tests.server.talk import in_thread
from tests.server.talk import oid
from tests.system.servers import until
from zeo import StorageServer as module
from zeo.server import connection
from zeo.server import pulse
from zeo.StorageServer import StorageServer

# ---- addresses


def test_a_server_listens_on_all_its_addresses(start: Start, connect: Connect, tmp_path: Path) -> None:
    path = str(tmp_path / 'socket')
    server = start(addresses=[('127.0.0.1', 0), ('::1', 0), path])
    assert len(server.addresses) == 3 and path in server.addresses
    assert all(port for _, port in filter(lambda each: each != path, server.addresses))
    one, *others = [connect(address) for address in server.addresses]
    committed = one.commit(oid(1), b'record')
    for other in others:
        other.wait(lambda each: each[2] == 'invalidateTransaction', 'the news')
        assert other.load(oid(1)) == (b'record', committed, None)


def test_a_server_that_cannot_listen_somewhere_listens_nowhere_and_can_be_closed(
        start: Start, server: StorageServer, tmp_path: Path) -> None:
    path = str(tmp_path / 'socket')
    late = StorageServer({'1': MappingStorage()}, [path, server.addresses[0]])
    with pytest.raises(OSError, match='in use'):
        late.start()
    assert not os.path.exists(path) and late.addresses == []
    closing = in_thread(late.close)
    closing.result(PATIENCE)


def test_a_server_that_was_never_started_can_be_closed() -> None:
    server = StorageServer({'1': MappingStorage()}, [LOCAL], transaction_timeout=30)
    server.close()
    server.close()


# ---- the end


def test_clients_that_want_it_hear_that_the_server_lives_whatever_keeps_it_busy(
        start: Start, connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, 'PULSE_INTERVAL', 0.02)
    server = start()
    storage: Any = server.storages['1'].storage
    gate = storage.gates['loading']
    gate.shut()
    one, other = connect(server), connect(server)
    one.tell('pulse')
    load = one.ask('loadBefore', oid(1), z64)
    gate.wait_until_reached()

    def beats(peer: SocketPeer) -> int:
        return sum(name == 'pulse' for _, _, name, _ in peer.told)

    until(lambda: beats(one) > 3, 'there are signs of life')
    assert not beats(other)
    gate.open()
    with pytest.raises(KeyError):
        one.answer(load)


def test_close_ends_everything(start: Start, connect: Connect, tmp_path: Path) -> None:
    path = str(tmp_path / 'socket')
    kept = FileStorage(str(tmp_path / 'Data.fs'))
    server = start({'1': kept}, [LOCAL, path])
    address = server.addresses[0]
    peers = [connect(server), connect(path), connect(server, register=False)]
    peers[0].commit(oid(1), b'record')
    server.close()
    for peer in peers[:2]:
        peer.wait_for_end()
    assert is_closed(peers[2])
    assert not os.path.exists(path)
    with pytest.raises(ConnectionRefusedError):
        SocketPeer(address)
    again = FileStorage(str(tmp_path / 'Data.fs'))  # it is closed and unlocked
    assert again.load(oid(1))[0] == b'record'
    server = start({'1': again}, [address, path])  # the same port at once
    connect(server)


def test_close_may_be_called_again_and_by_many(server: StorageServer) -> None:
    closing = [in_thread(server.close) for _ in range(3)]
    for each in closing:
        each.result(PATIENCE)
    server.close()


def test_close_lets_a_finishing_transaction_finish(
        connect: Connect, server: StorageServer) -> None:
    peer = connect(server)
    peer.begin(1, (oid(1), z64, b'record'))
    peer.call('vote', 1)
    gate = storage(server).gates['finishing']
    gate.shut()
    finish = peer.ask('tpc_finish', 1)
    gate.wait_until_reached()
    closing = in_thread(server.close)
    until(lambda: server._closing and not server._listeners[0]._thread.is_alive(), 'it is closing')
    assert not closing.done()
    gate.open()
    committed = peer.answer(finish)  # acknowledged
    closing.result(PATIENCE)
    assert server.storages['1'].publisher.last_tid == committed
    assert 'tpc_abort' not in storage(server).calls


def test_a_finish_is_waited_for_however_long_it_takes(
        connect: Connect, server: StorageServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, 'CLOSING_PATIENCE', .01)
    peer = connect(server)
    peer.begin(1, (oid(1), z64, b'record'))
    peer.call('vote', 1)
    gate = storage(server).gates['finishing']
    gate.shut()
    peer.ask('tpc_finish', 1)
    gate.wait_until_reached()
    closing = in_thread(server.close)
    peer.wait_for_end()  # it was hung up on
    assert not closing.done()
    gate.open()
    closing.result(PATIENCE)
    assert storage(server).calls == ['tpc_begin', 'tpc_vote', 'tpc_finish']


def test_close_aborts_what_is_voted_and_cancels_what_waits_before_the_storage_is_closed(
        connect: Connect, server: StorageServer) -> None:
    voted, waiting, begun = (connect(server) for _ in range(3))
    for number, peer in enumerate((voted, waiting, begun)):
        peer.begin(1, (oid(number), z64, b'record'))
    voted.call('vote', 1)
    waiting.ask('vote', 1)
    waiting.call('ping')
    begun.call('ping')
    kept = storage(server)
    close = kept._storage.close
    kept._storage.close = lambda: (kept.calls.append('close'), close())
    server.close()
    assert kept.calls[:2] == ['tpc_begin', 'tpc_vote']
    assert kept.calls[-2:] == ['tpc_abort', 'close']
    assert kept.calls.count('tpc_finish') == 0
    assert server.storages['1'].active_txns == 0


def test_clients_that_do_not_read_hold_up_the_end_only_once(
        connect: Connect, server: StorageServer, monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture) -> None:
    """However many they are: all are given time together."""
    monkeypatch.setattr(module, 'CLOSING_PATIENCE', .2)
    monkeypatch.setattr(connection, 'LAST_WORDS_PATIENCE', PATIENCE)
    connect(server).commit(oid(1), b'x' * 2**22)
    stuck = [connect(server, reading=False) for _ in range(10)]
    for peer in stuck:
        for _ in range(5):
            peer.ask('loadBefore', oid(1), b'\x7f' + b'\xff' * 7)
    until(lambda: sum(each.session.outbox._waiting for each in server.connections) == 10,
          'all wait for room')
    in_thread(server.close).result(PATIENCE)
    assert caplog.text.count('does not end by itself') == 10


def test_the_last_words_are_sent_but_not_waited_for_endlessly(
        connect: Connect, server: StorageServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, 'LAST_WORDS_PATIENCE', .1)
    peer = connect(server)
    peer.commit(oid(1), b'x' * 2**22)
    stuck = connect(server, reading=False)
    stuck.ask('loadBefore', oid(1), b'\x7f' + b'\xff' * 7)
    stuck.sock.shutdown(socket.SHUT_WR)
    until(lambda: len(server.connections) == 1, 'it is given up')


def test_a_storage_under_two_names_is_closed_once_and_one_that_fails_does_not_keep_the_others(
        start: Start, connect: Connect, caplog: pytest.LogCaptureFixture) -> None:
    closed = []

    class Closing(MappingStorage):
        def close(self) -> None:
            closed.append(self)
            raise OSError(5, 'as it happens')

    one, two = Closing(), Closing()
    server = start({'a': one, 'b': one, 'c': two})
    assert server.storages['a'] is server.storages['b'] is not server.storages['c']
    first, second = connect(server, name='a'), connect(server, name='b')
    committed = first.commit(oid(1), b'record')
    second.wait(lambda each: each[2] == 'invalidateTransaction', 'the news')
    assert second.load(oid(1)) == (b'record', committed, None)
    server.close()
    assert sorted(map(id, closed)) == sorted(map(id, (one, two)))
    assert caplog.text.count('cannot be closed') == 2


def test_who_connects_while_the_server_closes_is_not_served(
        connect: Connect, server: StorageServer) -> None:
    ours, theirs = socket.socketpair()
    server.close()
    assert server.admit(ours, 'late') is None
    assert theirs.recv(1) == b'' and ours.fileno() == -1
    theirs.close()
