"""The monitor of real servers: with a browser, with nagios, and when its port is taken."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ZODB.Connection import TransactionMetaData
from ZODB.MappingStorage import MappingStorage

from tests.system.clients import store
from tests.system.clients import vote
from tests.system.servers import PATIENCE
from tests.system.servers import ROOT
from tests.system.servers import Server
from tests.system.servers import figures
from tests.system.servers import until
from zeo.server.monitor import Monitor
from zeo.server.packing import Packing
from zeo.server.served import Served

Start = Callable[..., Server]
Open = Callable[..., Any]

BROWSER = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)
needs_a_browser = pytest.mark.skipif(BROWSER is None, reason='there is no Chromium here')


def url(server: Server) -> str:
    return server.log.wait_for(r'the monitor is at (http://\S+)')[1]


def health(server: Server) -> Any:
    with urllib.request.urlopen(url(server) + '/healthz', timeout=PATIENCE) as answer:
        return json.load(answer)


def test_a_probe_each_second_leaves_nothing_behind(start_server: Start) -> None:
    server = start_server(monitor='127.0.0.1:0')
    assert health(server)['status'] == 'ok'
    before, lines = figures(server.process.pid), len(server.log.lines)
    for _ in range(100):
        assert health(server)['storages'] == {'1': 'ok'}
    until(lambda: figures(server.process.pid)['threads'] <= before['threads'], 'their threads have ended')
    after = figures(server.process.pid)
    assert after['files'] <= before['files'] and after['memory'] <= before['memory'] + 5000
    assert len(server.log.lines) == lines


def test_a_port_in_use_is_one_line(start_server: Start, tmp_path: Path) -> None:
    port = url(start_server(monitor='127.0.0.1:0')).rpartition(':')[2]
    done = subprocess.run(
        [sys.executable, '-m', 'zeo.start', '-p', '0', f'--monitor={port}'], cwd=tmp_path,
        env={**os.environ, 'PYTHONPATH': str(ROOT)}, text=True, stderr=subprocess.PIPE, timeout=PATIENCE)
    assert done.returncode == 1
    assert re.fullmatch(rf'.*the monitor: port {port} is in use on 127\.0\.0\.1; .+\n', done.stderr), done.stderr


def test_it_shows_clients_and_how_long_things_take(start_server: Start, open_client: Open) -> None:
    server = start_server(monitor='127.0.0.1:0')
    client = open_client('zeo', server, client_label='shop')
    store(client)
    with urllib.request.urlopen(url(server) + '/figures.json', timeout=PATIENCE) as answer:
        [storage] = json.load(answer)['storages'].values()
    [told] = storage['clients']
    assert (told['label'], told['behind']) == ('shop', 0)
    assert sum(storage['durations']['finish']['counts']) == 1


def test_a_client_that_does_not_read_lags_behind(start_server: Start, open_client: Open) -> None:
    server = start_server(monitor='127.0.0.1:0')
    writer = open_client('zeo', server)
    reader = subprocess.Popen(
        [sys.executable, '-c', 'import sys; from zeo.ClientStorage import ClientStorage\n'
         'ClientStorage(eval(sys.argv[1])); print(flush=True); sys.stdin.read()', repr(server.address)], cwd=ROOT,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert reader.stdout is not None and reader.stdin is not None
    reader.stdout.readline()
    reader.send_signal(signal.SIGSTOP)
    try:
        oids, serial = [writer.new_oid() for _ in range(4000)], bytes(8)
        for _ in range(200):    # announcements of 40 KB each
            serial = store_all(writer, oids, serial)
            lag = max(each['behind'] for each in storage_of(server)['clients'])
            if lag:
                break
        assert lag
    finally:
        reader.send_signal(signal.SIGCONT)
    until(lambda: not any(each['behind'] for each in storage_of(server)['clients']), 'it has caught up')
    reader.communicate()


def store_all(client: Any, oids: list[bytes], serial: bytes) -> bytes:
    transaction = TransactionMetaData()
    client.tpc_begin(transaction)
    for oid in oids:
        client.store(oid, serial, b'x', '', transaction)
    client.tpc_vote(transaction)
    tid: bytes = client.tpc_finish(transaction)
    return tid


def storage_of(server: Server) -> Any:
    with urllib.request.urlopen(url(server) + '/figures.json', timeout=PATIENCE) as answer:
        [storage] = json.load(answer)['storages'].values()
    return storage


@needs_a_browser
def test_the_page_draws_what_happens(start_server: Start, open_client: Open, tmp_path: Path) -> None:
    server = start_server(monitor='127.0.0.1:0')
    client = open_client('zeo', server, client_label='<b>shop</b>')
    store(client)
    held = vote(client)
    page = see(url(server), tmp_path)
    client.tpc_abort(held)
    assert 'serving, version' in text_of(page, 'state')
    assert '&lt;b&gt;shop&lt;/b&gt;' in page and '<b>shop' not in page
    assert re.search(r'by 127\.0\.0\.1:\d+ \(&lt;b&gt;shop&lt;/b&gt;\)', page)      # the holder of the lock
    titles = re.findall('<h2>(.*?)</h2>', page)
    for title in 'Loads per second', 'Commits per second', 'Answering a load', 'Clients', 'Cache lag of clients':
        assert title in titles
    drawn = re.findall(r'<path class="one" d="(M[^"]+)"', page)
    assert len(drawn) >= 5 and all('NaN' not in line for line in drawn), page
    assert widths(page) <= set(range(250, 400)), page    # two beside each other
    assert '>100 µs</text>' in page                       # a scale on which a median and the slowest are both seen


@needs_a_browser
def test_the_page_shows_how_far_a_pack_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    progress = {'share': .25, 'phase': 'copying', 'since': time.time() - 90}
    monkeypatch.setattr(Packing, 'progress', progress)
    served, monitor = Served('1', MappingStorage()), Monitor('127.0.0.1', 0)
    served.start()
    monitor.start()
    monitor.tell_about({'1': served}, lambda: False)
    try:
        page = see('http://%s:%d' % monitor.address, tmp_path, 600)
    finally:
        monitor.close()
        served.close()
    assert '<section id="pack">' in page and text_of(page, 'pack-share') == '25 %'
    assert text_of(page, 'pack-words').startswith('copying, for ')
    assert widths(page) <= set(range(450, 600)), page    # a chart fills the page where it is alone in its row


@needs_a_browser
def test_the_page_says_when_the_server_has_gone(start_server: Start, tmp_path: Path) -> None:
    server = start_server(monitor='127.0.0.1:0')
    address = url(server)
    folder = tmp_path / 'gone'
    folder.mkdir()
    for name in 'page.js', 'page.css', 'index.html':
        text = (ROOT / 'zeo' / 'server' / 'page' / name).read_text()
        (folder / name).write_text(text.replace('"/page', '"page').replace("'/figures", f"'{address}/figures"))
    page = see((folder / 'index.html').as_uri(), tmp_path)      # whose questions are refused
    assert 'no answer since' in text_of(page, 'state') and 'stale' in page


def widths(page: str) -> set[int]:
    """Of the charts, in pixels."""
    found = {int(width) for width in re.findall(r'<svg[^>]* viewBox="0 0 (\d+) \d+"', page)}
    assert found, page
    return found


def see(address: str, folder: Path, width: int = 800) -> str:
    """What a browser has made of the page after some seconds of its own clock."""
    assert BROWSER is not None
    done = subprocess.run(
        [BROWSER, '--headless', '--no-sandbox', '--disable-gpu', f'--user-data-dir={folder}/profile',
         f'--window-size={width},800', '--virtual-time-budget=9000', '--dump-dom', address],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def text_of(page: str, name: str) -> str:
    found = re.search(rf'id="{name}"[^>]*>(.*?)<', page)
    assert found, page
    return found[1]


def test_zeo_nagios_works_on_it(start_server: Start, open_client: Open) -> None:
    server = start_server()
    assert isinstance(server.address, tuple)
    store(open_client('zeo', server))
    done = subprocess.run(
        [sys.executable, '-c', 'import sys, ZEO.nagios; sys.exit(ZEO.nagios.main(sys.argv[1:]))',
         '%s:%d' % server.address], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=PATIENCE)
    assert done.returncode in (0, None) and 'OK' in done.stdout, done.stdout
