"""``python -m zeo.status`` beside real servers of both makes."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests.system import clients
from tests.system.servers import PATIENCE, ROOT, Log, Server, file_storage, freeze
from zeo import commands, status
from zeo.commands import Failure

Start = Callable[..., Server]
Open = Callable[..., Any]


def arguments(server: Server) -> list[str]:
    address = server.address
    return [address if isinstance(address, str) else '%s:%d' % address]


def test_a_table_shows_storages_and_clients(
        start_server: Start, open_client: Open, capsys: pytest.CaptureFixture[str]) -> None:
    server = start_server(storages={'1': file_storage(), 'other': file_storage('other.fs')})
    one = open_client('zeo', server, client_label='shop')
    clients.store(one)
    assert status.main([*arguments(server), '--interval=0.1']) == 0
    shown = capsys.readouterr().out
    assert re.search(r'^127\.0\.0\.1:\d+: zeo \d', shown)
    assert 'storage 1: ' in shown and 'storage other: ' in shown
    assert '  commits        1, 0.0 per second\n' in shown
    assert '  commit lock    free\n' in shown
    assert re.search(r'^  127\.0\.0\.1:\d+ +shop +\d', shown, re.MULTILINE)


def test_only_the_storages_that_are_asked_for_are_shown(
        start_server: Start, capsys: pytest.CaptureFixture[str]) -> None:
    server = start_server(storages={'1': file_storage(), 'other': file_storage('other.fs')})
    assert status.main([*arguments(server), '--interval=0.1', '-S', 'other']) == 0
    shown = capsys.readouterr().out
    assert 'storage other: ' in shown and 'storage 1: ' not in shown
    assert status.main([*arguments(server), '-S', 'other', '-S', 'third']) == 1
    assert capsys.readouterr().err.endswith(
        ': there is no storage third here, but 1, other; name one of these with -S\n')


def test_who_holds_the_commit_lock_and_who_waits_is_shown(
        start_server: Start, open_client: Open, capsys: pytest.CaptureFixture[str]) -> None:
    server = start_server()
    holder, waiter = [open_client('zeo', server, client_label=name) for name in ('holder', 'waiter')]
    held = clients.vote(holder)
    waiting = clients.Task(clients.store, waiter)
    clients.until(lambda: holder.server_status()['waiting'], 'the second waits')
    assert status.main([*arguments(server), '--interval=0.1']) == 0
    holder.tpc_abort(held)
    waiting.result()
    assert re.search(r'  commit lock    held by \S+ \(holder\) for \d+\.\d s; waiting: \S+ \(waiter\)\n',
                     capsys.readouterr().out)


def test_programs_read_json(
        start_server: Start, open_client: Open, capsys: pytest.CaptureFixture[str]) -> None:
    server = start_server()
    clients.store(open_client('zeo', server), record=b'x' * 100_000)
    assert status.main([*arguments(server), '--json', '--interval=0.1']) == 0
    [told] = json.loads(capsys.readouterr().out).values()
    storage = told['storages']['1']
    assert (storage['commits'], storage['commits_per_second'], len(storage['clients'])) == (1, 0.0, 2)
    assert storage['room'] > 0
    assert [each['received'] > 100_000 for each in storage['clients']] == [True, False]
    assert all(each['sent'] > 100 for each in storage['clients'])


def test_a_server_of_another_make_tells_less(
        start_server: Start, open_client: Open, capsys: pytest.CaptureFixture[str]) -> None:
    server = start_server('ZEO')
    one = open_client('ZEO', server)
    held = clients.vote(one)
    assert status.main([*arguments(server), '--interval=0.1']) == 0
    one.tpc_abort(held)
    shown = capsys.readouterr().out
    assert 'a server of another make, which tells less' in shown
    assert re.search(r'  commit lock    held for \d+\.\d s\n', shown)
    assert re.search(r'  clients        \d\n', shown)


def test_a_server_that_is_not_there_does_not_hide_the_others(
        start_server: Start, capsys: pytest.CaptureFixture[str]) -> None:
    server = start_server()
    assert status.main(['/no/such/socket', *arguments(server), '--interval=0.1']) == 1
    told = capsys.readouterr()
    assert 'storage 1: ' in told.out
    [line] = told.err.splitlines()
    assert line.startswith('zeo.status: no server answers at /no/such/socket')


def test_a_server_that_stops_after_it_was_connected_to_is_not_waited_for(
        start_server: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start_server()
    assert server.process is not None
    with status._Server(server.address, [], None) as watched:
        watched.rates(0)
        freeze(server.process)
        try:
            with monkeypatch.context() as hurry, pytest.raises(Failure) as raised:
                hurry.setattr(commands, 'PATIENCE', .2)
                watched.rates(0)
        finally:
            server.process.send_signal(signal.SIGCONT)
        assert str(raised.value) == (
            '%s:%d: the server does not answer within 0.2 seconds: it is stopped, hangs, or is out of reach'
            % server.address)
        assert watched.rates(0)['storages']['1']['commits'] == 0


def test_to_watch_is_to_be_told_again_and_again_until_ctrl_c(start_server: Start) -> None:
    server = start_server()
    process = subprocess.Popen(
        [sys.executable, '-m', 'zeo.status', *arguments(server), '--watch', '--interval=0.1'], text=True,
        env=os.environ | {'PYTHONPATH': str(ROOT)}, stdout=subprocess.PIPE)
    shown = Log(process.stdout)
    shown.wait_for(r'commits        0$')
    shown.wait_for(r'commits        0, 0\.0 per second')
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == 0
    shown.join()


@pytest.mark.parametrize('wrong', [[], ['zeo.sock', '--interval=0'], ['zeo.sock', '--interval=x']])
def test_a_wrong_command_line_is_told_in_one_line(
        wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        status.main(wrong)
    assert ended.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith('zeo.status: ')
