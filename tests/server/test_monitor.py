"""zeo.server.monitor: the small web server beside the storage server."""

import contextlib
import json
import os
import resource
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import pytest
from ZODB.MappingStorage import MappingStorage

from tests.server.talk import SessionPeer
from tests.server.talk import oid
from tests.system.servers import PATIENCE
from tests.system.servers import until
from zeo.server import monitor as module
from zeo.server.monitor import Monitor


@pytest.fixture
def monitor() -> Iterator[Monitor]:
    """One that listens; at the end its threads and its sockets are gone."""
    monitor = Monitor('127.0.0.1', 0)
    monitor.start()
    yield monitor
    address = monitor.address
    monitor.close()
    assert not [each for each in threading.enumerate()
                if 'monitor' in each.name or 'process_request_thread' in each.name]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)


def connection(monitor: Monitor) -> socket.socket:
    return socket.create_connection(monitor.address, timeout=PATIENCE)


def ask(monitor: Monitor, request: bytes) -> bytes:
    """What is answered until the end of the connection."""
    with connection(monitor) as sock:
        sock.sendall(request)
        return b''.join(iter(lambda: sock.recv(4096), b''))


def get(monitor: Monitor, path: str) -> tuple[int, Any, bytes]:
    """Status, head and content."""
    try:
        with urllib.request.urlopen('http://%s:%d' % monitor.address + path, timeout=PATIENCE) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


def health(monitor: Monitor) -> tuple[int, str, dict[str, str]]:
    status, _, content = get(monitor, '/healthz')
    told = json.loads(content)
    return status, told['status'], told['storages']


def test_a_server_with_thousands_of_connections_can_be_asked(monitor: Monitor) -> None:
    few, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and most < 1300:
        pytest.skip('there cannot be so many files')
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(few, 1300), most))
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        assert get(monitor, '/healthz')[0] == 503
    finally:
        for each in files:
            os.close(each)
        resource.setrlimit(resource.RLIMIT_NOFILE, (few, most))


# ---- health


def test_health_follows_the_life_of_a_server(monitor: Monitor, serve: Callable[..., Any]) -> None:
    closing: list[bool] = []
    assert health(monitor) == (503, 'opening', {})
    monitor.tell_about({'1': serve(), 'other': serve(MappingStorage())}, lambda: bool(closing))
    assert health(monitor) == (200, 'ok', {'1': 'ok', 'other': 'ok'})
    closing.append(True)
    assert health(monitor)[:2] == (503, 'closing')


def test_a_storage_that_does_not_answer_is_named(monitor: Monitor, serve: Callable[..., Any]) -> None:
    class Broken(MappingStorage):  # type: ignore[misc]
        fails = False

        def lastTransaction(self) -> Any:
            if self.fails:
                raise OSError('the disk has gone')
            return super().lastTransaction()

    storage = Broken()
    monitor.tell_about({'1': serve(), 'broken': serve(storage)}, lambda: False)
    storage.fails = True
    assert health(monitor) == (503, 'failing', {'1': 'ok', 'broken': 'OSError: the disk has gone'})
    storage.fails = False
    assert health(monitor)[0] == 200


def test_a_storage_that_has_lost_its_own_server_is_named(monitor: Monitor, serve: Callable[..., Any]) -> None:
    class Client(MappingStorage):  # type: ignore[misc]
        def is_connected(self) -> bool:
            return False

    monitor.tell_about({'1': serve(Client())}, lambda: False)
    assert health(monitor) == (503, 'failing', {'1': 'not connected to its own server'})


def test_a_server_that_cannot_end_long_transactions_any_more_is_not_healthy(
        monitor: Monitor, serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    served = serve()
    monitor.tell_about({'1': served}, lambda: False)
    monkeypatch.setattr(type(served.lock), 'clock_is_alive', False)
    assert health(monitor) == (503, 'failing', {'1': 'the commit clock has ended'})


# ---- figures


def test_figures_are_told_in_both_forms(
        monitor: Monitor, serve: Callable[..., Any], connect: Callable[..., SessionPeer]) -> None:
    assert get(monitor, '/figures.json')[0] == get(monitor, '/metrics')[0] == 503
    served = serve()
    monitor.tell_about({'1': served}, lambda: False)
    connect(served).commit(oid(1), b'record')
    status, head, content = get(monitor, '/figures.json')
    assert (status, head['Content-Type']) == (200, 'application/json')
    assert json.loads(content)['storages']['1']['commits'] == 1
    status, head, content = get(monitor, '/metrics')
    assert status == 200 and head['Content-Type'].startswith('application/openmetrics-text')
    assert b'\nzeo_commits_total{storage="1"} 1.0\n' in content and content.endswith(b'# EOF\n')


# ---- the page, and what is not there


@pytest.mark.parametrize('path, kind', [
    ('/', 'text/html'), ('/?x', 'text/html'), ('/page.css', 'text/css'), ('/page.js', 'text/javascript')])
def test_the_page_runs_and_shows_only_what_comes_from_here(monitor: Monitor, path: str, kind: str) -> None:
    status, head, content = get(monitor, path)
    assert status == 200 and head.get_content_type() == kind and content
    assert "default-src 'none'" in head['Content-Security-Policy']
    assert b'http://' not in content.replace(b'http://www.w3.org/2000/svg', b'') and b'https://' not in content


@pytest.mark.parametrize('path', ['/etc/passwd', '/../monitor.py', '/page/index.html', '/%2e%2e/monitor.py'])
def test_nothing_else_is_there(monitor: Monitor, path: str) -> None:
    status, _, content = get(monitor, path)
    assert status == 404 and b'/healthz' in content


@pytest.mark.parametrize('method', [b'POST', b'PUT', b'DELETE', b'OPTIONS', b'X'])
def test_it_takes_no_orders(monitor: Monitor, method: bytes) -> None:
    assert ask(monitor, method + b' / HTTP/1.1\r\nContent-Length: 0\r\n\r\n').split()[1] == b'405'


def test_a_head_is_answered_without_the_content(monitor: Monitor) -> None:
    head, content = ask(monitor, b'HEAD / HTTP/1.1\r\n\r\n').split(b'\r\n\r\n')
    assert head.split()[1] == b'200' and not content


# ---- who is slow, rude, or many


@pytest.mark.parametrize('words', [
    b'', b'\r\n\r\n', b'\xff' * 100 + b'\r\n\r\n', b'GET\r\n\r\n', b'GET / HTTP/9.9\r\n\r\n', b'GET / HTTP/1.1\r\n: \r\n\r\n',
    b'GET / HTTP/1.1\r\n' + b'X: y\r\n' * 2000 + b'\r\n', b'GET /' + b'x' * 2 * module.LONGEST_HEAD])
def test_nonsense_ends_with_its_connection(monitor: Monitor, words: bytes) -> None:
    with connection(monitor) as sock:
        with contextlib.suppress(ConnectionError):  # it did not read all of that
            sock.sendall(words)
            with contextlib.suppress(OSError):  # it has hung up already
                sock.shutdown(socket.SHUT_WR)
            while sock.recv(4096):
                pass
    assert get(monitor, '/')[0] == 200


def test_who_sends_slowly_is_not_waited_for(monitor: Monitor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, 'PATIENCE', .3)
    begin = time.monotonic()
    pause = threading.Event()
    with connection(monitor) as sock, pytest.raises(OSError, match='Broken pipe|reset'):
        while time.monotonic() - begin < PATIENCE:
            sock.sendall(b'x')
            pause.wait(.01)


def test_many_at_once_do_not_take_more_than_their_share(monitor: Monitor) -> None:
    silent = [connection(monitor) for _ in range(module.AT_ONCE)]
    requests = lambda: [each for each in threading.enumerate() if 'process_request_thread' in each.name]  # noqa: E731
    until(lambda: len(requests()) == module.AT_ONCE, 'each has a thread')
    with connection(monitor) as one_more:
        assert one_more.recv(1) == b''
    assert len(requests()) == module.AT_ONCE
    for each in silent:
        each.close()
    until(lambda: get_or_none(monitor) == 200, 'there is room again')


def get_or_none(monitor: Monitor) -> int | None:
    try:
        return get(monitor, '/')[0]
    except OSError:
        return None


def test_requests_are_not_logged(monitor: Monitor, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level('INFO')
    for path in '/', '/healthz', '/nowhere':
        get(monitor, path)
    ask(monitor, b'nonsense\r\n\r\n')
    assert not caplog.records


def test_a_port_in_use_is_named(monitor: Monitor) -> None:
    port = monitor.address[1]
    with pytest.raises(OSError, match=f'port {port} is in use on 127.0.0.1'):
        Monitor('127.0.0.1', port)


def test_one_that_was_not_started_can_be_closed() -> None:
    Monitor('127.0.0.1', 0).close()
