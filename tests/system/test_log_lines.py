"""The log of a real server: what is in it, what is not, and that all of it has one form."""

import ast
import re
import socket
import struct
from collections.abc import Callable
from typing import Any

import pytest

from tests.server.talk import SocketPeer, oid
from tests.system.servers import ROOT, Server
from zeo.client.probe import probe

Open = Callable[..., Any]
HELLO = b'\0\0\0\2Z5'


def connection(server: Server) -> socket.socket:
    family = socket.AF_UNIX if isinstance(server.address, str) else socket.AF_INET
    client = socket.socket(family)
    client.settimeout(60)
    client.connect(server.address)
    return client


def lines_since(server: Server, begin: int) -> list[str]:
    """What was logged until now: a client that comes and goes marks the place."""
    with SocketPeer(server.address) as peer:
        peer.call('set_client_label', f'mark {begin}')
    server.log.wait_for(rf'\(mark {begin}\): has left')
    return [line for line in server.log.lines[begin:]
            if not re.search('uses storage|is called|has left', line)]


def test_a_health_probe_leaves_nothing_in_the_log(start_server: Open) -> None:
    server = start_server()
    begin = len(server.log.lines)
    for _ in range(20):
        assert list(probe(server.address, 60)) == ['1']
    assert lines_since(server, begin) == []


def scan(server: Server) -> None:
    """Come and go, politely and rudely, with half of a greeting and with anything else."""
    for _ in range(3):
        for rude in False, True:
            for words in b'', b'\0', b'\0\0\0', HELLO, HELLO + b'\0\0\0\5', b'GET / HTTP/1.0\r\n\r\n', \
                    b'\xff' * 100, b'\x16\x03\x01\x02\0', HELLO + b'\0\0\0\4junk', b'\0\0\0\0':
                with connection(server) as client:
                    assert client.recv(6, socket.MSG_WAITALL) == HELLO
                    client.sendall(words)
                    if rude:        # a reset in place of an orderly end
                        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))


@pytest.mark.parametrize('unix', [False, True])
def test_a_port_scan_is_one_warning_at_most(start_server: Open, unix: bool) -> None:
    server = start_server(unix=unix)
    begin = len(server.log.lines)
    scan(server)
    [line] = lines_since(server, begin)
    assert re.search(r' WARNING zeo\.StorageServer: \S+: disconnected: ', line)


def test_debugging_shows_each_call_with_its_duration(start_server: Open) -> None:
    server = start_server(debug=True)
    with SocketPeer(server.address) as peer:
        tid = peer.commit(oid(1), b'record')
        peer.load(oid(1), tid)
        with pytest.raises(Exception, match='.'):
            peer.load(oid(2), tid)
    server.log.wait_for('has left')
    took = [match.groups() for line in server.log.lines
            if (match := re.search(r' DEBUG zeo\.server\.trace: \S+: (\w+) took \d+\.\d\d ms(?: \((\w+)\))?$', line))]
    assert [name for name, error in took if error is None] == [
        'register', 'tpc_begin', 'storea', 'vote', 'tpc_finish', 'loadBefore']
    assert ('loadBefore', 'POSKeyError') in took


def test_without_debugging_no_call_is_shown(start_server: Open) -> None:
    server = start_server()
    with SocketPeer(server.address) as peer:
        peer.commit(oid(1), b'record')
    server.log.wait_for('has left')
    assert ' took ' not in str(server.log)


def logged() -> list[tuple[str, ast.expr]]:
    """Place and text of each line that the server may log, by a logger or by what keeps it from being flooded."""
    found = []
    for path in [*(ROOT / 'zeo' / 'server').glob('*.py'), ROOT / 'zeo' / 'StorageServer.py']:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and path.name not in ('seldom.py', 'options.py') and re.fullmatch(
                    r'(?s).*\.(log|debug|info|warning|error|exception|critical)', ast.unparse(node.func)):
                text = node.args[ast.unparse(node.func).endswith('.log'):][:1]
                if text and (isinstance(text[0], ast.Constant) or 'logger' in ast.unparse(node.func)):
                    found.append((f'{path.name}:{node.lineno}', text[0]))
    return found


def test_every_line_says_first_whom_it_is_about() -> None:
    wrong = [(place, ast.unparse(text)) for place, text in logged()
             if not re.match(r"['\"](%s|%s\.%s|storage %s): ", ast.unparse(text))]
    assert not wrong and len(logged()) > 30


def test_what_the_text_says_about_the_log_is_what_the_server_logs() -> None:
    told = (ROOT / 'start.txt').read_text()
    section = re.search(r'^The log\n=+\n(.+?)^Rotating the log\n', told, flags=re.MULTILINE | re.DOTALL)
    assert section
    for event in 'uses storage', 'is called', 'has left', 'lost:', 'disconnected:', 'packing as of', 'packed in':
        assert event in section[1]
        assert any(event in ast.unparse(text) for _, text in logged()), event
