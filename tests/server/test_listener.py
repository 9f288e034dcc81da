"""Who comes in, as the listener hears him; and what it does without files, threads or room."""

import errno
import logging
import os
import socket
import threading
from typing import Any

import pytest
from ZODB.MappingStorage import MappingStorage
from ZODB.utils import z64

from tests.server.running import Connect
from tests.server.running import Start
from tests.server.running import connect
from tests.server.running import is_closed
from tests.server.running import server
from tests.server.running import start
from tests.server.talk import PATIENCE
from tests.server.talk import Gate
from tests.server.talk import in_thread
from tests.server.talk import oid
from tests.system.servers import until
from zeo.server import addresses
from zeo.server import listener as module
from zeo.server import session
from zeo.server.connection import Connection
from zeo.server.limits import Limits
from zeo.server.served import Served
from zeo.StorageServer import StorageServer
from zeo.wire.greeting import GREETING


def test_idle_connections_are_kept_alive_and_small_frames_are_not_held_back(
        connect: Connect, server: StorageServer) -> None:
    connect(server)
    [connection] = server.connections
    sock = connection.line.sock
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == module.KEEPALIVE_IDLE
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == module.KEEPALIVE_INTERVAL
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == module.KEEPALIVE_COUNT
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == module.VANISHED_AFTER * 1000
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT) == module.UNSENT
    assert os.get_blocking(sock.fileno())


# ---- when there are no more files or threads


class Scarce(socket.socket):
    """A listening socket of a process that has run out of files for a while."""

    failures = 3

    def accept(self) -> Any:
        if self.failures:
            self.failures -= 1
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return super().accept()


def test_without_files_the_log_is_not_flooded_and_connections_are_accepted_again(
        start: Start, connect: Connect, caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch) -> None:
    class Impatient(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            assert timeout, 'it pauses'
            return False

    listen = addresses.listen
    monkeypatch.setattr(addresses, 'listen', lambda *args: [
        Scarce(fileno=sock.detach()) for sock in listen(*args)])
    server = start()
    [listener] = server._listeners
    listener._pause = Impatient()
    assert connect(server).call('ping') is None
    until(lambda: 'again' in caplog.text, 'the last line is written')
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2 and 'for now: Too many open files' in lines[0] and 'again' in lines[1]


def test_a_connection_that_gets_no_thread_is_closed_and_the_next_is_served(
        connect: Connect, server: StorageServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, 'start', start)
        peer = connect(server, register=False)
        peer.send(b'what is no greeting')
        assert is_closed(peer)
    connect(server).commit(oid(1), b'record')


def test_without_another_thread_who_is_there_goes_on_and_the_log_has_one_line(
        start: Start, connect: Connect, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def start_no_more(thread: threading.Thread) -> None:
        if thread.name == 'zeo spare':
            raise RuntimeError("can't start new thread")
        begin(thread)

    server = start()
    peer = connect(server)
    peer.call('ping')  # so it has its thread
    begin = threading.Thread.start
    monkeypatch.setattr(threading.Thread, 'start', start_no_more)
    [listener] = server._listeners
    waits = []
    monkeypatch.setattr(listener._pause, 'wait', waits.append)
    for _ in range(10):
        refused = connect(server, register=False)
        refused.send(b'what is no greeting')
        assert is_closed(refused)
        peer.call('ping')
    until(lambda: len(waits) == 10, 'the last one was noticed')
    monkeypatch.undo()
    connect(server).call('ping')
    until(lambda: 'again' in caplog.text, 'the last line is written')
    assert [record.getMessage().partition(': ')[2] for record in caplog.records if record.levelname != 'INFO'] == [
        "no connections can be accepted for now: can't start new thread", 'connections are accepted again']
    assert not [record for record in caplog.records if record.exc_info] and waits == [1.0] * 10


def test_a_connection_that_cannot_be_heard_is_closed_and_the_next_is_served(
        start: Start, connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start(limits=Limits(registration_timeout=0.1))
    [listener] = server._listeners

    def register(*_: Any) -> None:
        raise OSError(errno.ENOMEM, 'Cannot allocate memory')

    with monkeypatch.context() as patched:
        patched.setattr(listener._selector, 'register', register)
        assert is_closed(connect(server, register=False))
        until(lambda: not server.connections, 'nothing is left of it')
    connect(server).commit(oid(1), b'record')


# ---- who has not registered yet


def test_who_says_nothing_has_no_thread_and_goes_when_others_need_the_place(
        start: Start, connect: Connect) -> None:
    server = start(limits=Limits(max_connections=5))
    silent = [connect(server, register=False) for _ in range(20)]
    assert all(peer.greeting == GREETING for peer in silent)
    assert not clients()
    assert all(map(is_closed, silent[:15]))
    connect(server).call('ping')
    assert len(server.connections) == 5


@pytest.mark.parametrize('at_once', [True, False])
def test_the_listener_registers_only_where_no_storage_is_asked(
        start: Start, connect: Connect, monkeypatch: pytest.MonkeyPatch, at_once: bool) -> None:
    """A storage that is asked may take long, and others want to come in."""
    threads = []
    catch_up = Served.catch_up

    def noted(self: Any, *args: Any) -> None:
        threads.append(threading.current_thread().name)
        catch_up(self, *args)

    monkeypatch.setattr(Served, 'catch_up', noted)
    server = start()
    server.storages['1'].announces_itself = not at_once
    connect(server).call('ping')
    assert threads[0].startswith('zeo accept' if at_once else 'zeo client')


def test_more_come_in_while_registering_takes_long(
        start: Start, connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start({'1': MappingStorage(), '2': MappingStorage()})
    may_go_on, told = threading.Event(), []
    slow = server.storages['2']
    slow.announces_itself = True

    def asked() -> bytes:
        told.append(may_go_on.wait(PATIENCE))
        return z64

    monkeypatch.setattr(slow, '_last_tid_of_storage', asked)
    waiting = connect(server, register=False)
    waiting.send(GREETING)
    waiting.ask('register', '2', False)
    connect(server).call('ping')
    may_go_on.set()
    assert waiting.sock.recv(1)  # the answer
    assert told[0], 'the other one did not have to wait for it'


def test_a_log_that_sticks_keeps_nobody_from_coming_in(
        connect: Connect, server: StorageServer, monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture) -> None:
    """A client's own thread writes that it has registered, before anything else that it does."""
    caplog.set_level(logging.INFO)
    gate, lines = Gate(), []

    def handle(record: logging.LogRecord) -> None:
        lines.append((threading.current_thread().name, record.getMessage()))
        gate.go_through()

    monkeypatch.setattr(session.logger, 'handle', handle)
    gate.shut()
    waiting = connect(server)
    label = waiting.ask('set_client_label', 'patient')
    gate.wait_until_reached()
    assert connect(server).call('ping') is None
    gate.open()
    waiting.answer(label)
    stuck, _, labelled = lines
    assert stuck[0] == labelled[0] and stuck[0].startswith('zeo client')
    assert stuck[1].endswith(': uses storage 1') and labelled[1].endswith(': is called patient')


def test_threads_of_who_was_shown_out_are_not_more_than_there_may_be_connections(
        start: Start, connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    """They end when they get the processor, which may take a while: others wait for that."""
    server = start(limits=Limits(max_connections=3))
    may_leave = threading.Event()
    close = Connection.close

    def late(connection: Any) -> None:
        may_leave.wait(PATIENCE)
        close(connection)

    monkeypatch.setattr(Connection, 'close', late)
    strangers = [connect(server, register=False) for _ in range(3)]
    for peer in strangers:
        peer.send(GREETING)
        peer.ask('register', 'nobody', False)
        assert peer.sock.recv(4)  # that there is no such storage
    until(lambda: len(clients()) == 3, 'all have a thread')
    coming = connect(server)  # for which one of them has to leave
    ping = coming.ask('ping')
    until(lambda: bool(server.threads._less._waiters), 'it waits')  # type: ignore[attr-defined]
    assert len(clients()) == 3
    may_leave.set()
    coming.answer(ping)
    assert len(clients()) <= 3


def clients() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name.startswith(('zeo client', 'zeo spare'))]


def test_close_lets_go_of_who_has_not_registered(server: StorageServer, connect: Connect) -> None:
    silent, greeting = (connect(server, register=False) for _ in range(2))
    greeting.send(GREETING)
    in_thread(server.close).result(PATIENCE)
    assert all(map(is_closed, (silent, greeting)))
    assert not server.connections
