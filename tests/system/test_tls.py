"""TLS between real processes: with both makes of server and client, and what is said if it does not work."""

import hashlib
import os
import random
import socket
import ssl
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import transaction
import ZODB
from ZODB.blob import Blob
from ZODB.POSException import ConflictError

from tests.system.certificates import Certificates
from tests.system.clients import Task, hears_of, open_client, store
from tests.system.cuts import EXCHANGE, Attempts
from tests.system.proxy import DOWN, UP, Proxy
from tests.system.servers import PATIENCE, Server, file_storage, until
from tests.wire.test_tls import limited
from zeo import ClientDisconnected, backup, copy, pack, status
from zeo.ClientStorage import ClientStorage
from zeo.wire.certificates import client_context

Start = Callable[..., Server]

#: Client and server.
SIDES = [('zeo', 'zeo'), ('zeo', 'ZEO'), ('ZEO', 'zeo')]


def secured(certificates: Certificates, **more: Any) -> dict[str, Any]:
    """Options of a server that speaks TLS and wants to know its clients."""
    return {'tls_certificate': certificates.server, 'tls_authenticate': certificates.ca, **more}


def context(certificates: Certificates, own: str | None = None) -> ssl.SSLContext:
    return client_context(own or certificates.client, authenticate=certificates.ca)


@pytest.fixture
def server(start_server: Start, certificates: Certificates) -> Server:
    return start_server(**secured(certificates))


@pytest.fixture
def impatient(start_server: Start, certificates: Certificates, monkeypatch: pytest.MonkeyPatch) -> Server:
    """One that waits only a second for a client's first word, which is five in real life."""
    monkeypatch.setattr(Server, 'constants', {'zeo.server.connection.FIRST_WORD_PATIENCE': 1.0,
                                              'zeo.server.threads.PATIENCE': .2})
    return start_server(**secured(certificates))


def spell(server: Server) -> str:
    return '%s:%d' % server.address  # type: ignore[return-value]


# ---- what works


@pytest.mark.parametrize('client, kind', SIDES)
def test_objects_and_news_get_from_one_client_to_another(
        start_server: Start, open_client: Any, certificates: Certificates, client: str, kind: str) -> None:
    server = start_server(kind, **secured(certificates))
    one, two = (open_client(client, server, ssl=context(certificates)) for _ in range(2))
    oid = one.new_oid()
    for record in b'small', os.urandom(3_000_000), b'small again':
        tid = store(one, oid, one.load(oid)[1] if record != b'small' else bytes(8), record)
        hears_of(two, tid)
        assert two.load(oid) == (record, tid)


@pytest.mark.parametrize('client, kind', SIDES)
def test_blobs_go_through_it(
        start_server: Start, certificates: Certificates, tmp_path: Path, client: str, kind: str) -> None:
    server = start_server(kind, {'1': file_storage(blobs='blobs')}, **secured(certificates))
    data = random.Random(7).randbytes(12_345_678)
    digests = []
    for number in range(2):
        db = ZODB.DB(open_client(client, server, ssl=context(certificates), blob_dir=str(tmp_path / f'{number}')))
        with db.transaction() as connection:
            if number == 0:
                connection.root()['blob'] = Blob(data)
            else:
                with connection.root()['blob'].open() as file:
                    digests.append(hashlib.sha256(file.read()).digest())
        db.close()
    assert digests == [hashlib.sha256(data).digest()]


def test_a_unix_socket_of_the_same_server_stays_as_it_is(start_server: Start, certificates: Certificates) -> None:
    server = start_server(both=True, **secured(certificates))
    for options in {}, {'ssl': True}:
        ClientStorage(server.second_address, **options).close()  # type: ignore[arg-type]


def test_many_threads_of_two_clients_count_right(server: Server, certificates: Certificates) -> None:
    """Loads, commits, conflicts and news in both directions at once, over the same two connections."""
    databases = [ZODB.DB(ClientStorage(server.address, ssl=context(certificates))) for _ in range(2)]
    with databases[0].transaction() as connection:
        connection.root().update(count=0, ballast=os.urandom(200_000))
    databases[1].storage.ping()  # it has heard of that
    rounds = 15

    def count(db: Any) -> None:
        manager = transaction.TransactionManager()
        connection = db.open(manager)
        done = 0
        while done < rounds:
            try:
                with manager:
                    root = connection.root()
                    root['count'] += 1
                    root['ballast'] = root['ballast'][::-1]
                done += 1
            except ConflictError:
                pass
        connection.close()

    with ThreadPoolExecutor(6) as pool:
        for task in [pool.submit(count, db) for db in databases * 3]:
            task.result(PATIENCE)
    for db in databases:
        db.storage.ping()  # it has heard of what the other one did last
        with db.transaction() as connection:
            assert connection.root()['count'] == 6 * rounds
        db.close()


@pytest.mark.parametrize('direction', [UP, DOWN])
def test_wherever_the_stream_is_cut_the_outcome_is_told_truly(
        server: Server, certificates: Certificates, direction: str) -> None:
    """A sample of what test_fate does without TLS: a cut may be anywhere in an encrypted record."""
    options = {'ssl': context(certificates), 'ssl_server_hostname': 'localhost'}
    direct = ClientStorage(server.address, server_sync=True, **options)  # type: ignore[arg-type]
    attempts = Attempts(direct)
    with Proxy(server.address) as proxy:  # type: ignore[arg-type]
        for cut in range(0, EXCHANGE[direction] + 150, 23):
            storage = ClientStorage(proxy.address, **options)  # type: ignore[arg-type]
            storage.sync()
            proxy.cut_after(cut, direction)
            attempts.commit(storage, cut)
            proxy.mend()
            storage.close()
    direct.close()
    attempts.judge()


def test_bytes_that_come_one_by_one_are_put_together(server: Server, certificates: Certificates) -> None:
    with Proxy(server.address) as proxy:  # type: ignore[arg-type]
        proxy.pieces = 1
        storage = ClientStorage(proxy.address, ssl=context(certificates))
        tid = store(storage, record=b'x' * 300)
        assert storage.lastTransaction() == tid
        storage.close()


def test_a_client_comes_back_to_a_server_that_was_killed(
        server: Server, certificates: Certificates) -> None:
    storage = ClientStorage(server.address, ssl=context(certificates), wait_timeout=60)
    oid = storage.new_oid()
    tid = store(storage, oid)
    server.kill()
    server.start()
    assert store(storage, oid, tid) > tid
    storage.close()


def test_a_child_process_has_a_connection_of_its_own(server: Server, certificates: Certificates) -> None:
    storage = ClientStorage(server.address, ssl=context(certificates))
    oid = storage.new_oid()
    tid = store(storage, oid, record=b'of the parent')
    child = os.fork()
    if not child:
        good = False
        try:
            good = storage.load(oid)[0] == b'of the parent' and bool(store(storage, oid, tid, b'of the child'))
            storage.close()
        finally:
            os._exit(0 if good else 1)
    _, result = os.waitpid(child, 0)
    assert result == 0
    until(lambda: storage.load(oid)[0] == b'of the child', 'the parent hears of it, by its own connection')
    storage.close()


def test_all_commands_reach_the_server(
        server: Server, certificates: Certificates, tmp_path: Path,
        capsys: pytest.CaptureFixture[str]) -> None:
    ZODB.DB(ClientStorage(server.address, ssl=context(certificates))).close()
    words = [f'--tls-authenticate={certificates.ca}', f'--tls-certificate={certificates.client_alone}',
             f'--tls-key={certificates.client_key}', '--tls-hostname=localhost']
    assert status.main([spell(server), '--interval=0.1', *words]) == 0
    assert backup.main([spell(server), str(tmp_path / 'backup'), *words]) == 0
    assert copy.main([spell(server), str(tmp_path / 'copy.fs'), *words]) == 0
    assert pack.main([spell(server), *words]) == 0
    told = capsys.readouterr()
    assert told.err == '' and told.out.count('1 transactions, 1 records') == 2
    locked = [f'--tls-certificate={certificates.locked}', f'--tls-authenticate={certificates.ca}']
    assert status.main([spell(server), '--interval=0.1', *locked,
                        f'--tls-password-file={certificates.password_file}']) == 0
    capsys.readouterr()
    for main, arguments in (status.main, []), (pack.main, []), (backup.main, ['x']), (copy.main, ['x']):
        assert main([spell(server), *arguments, *locked]) == 1
        assert 'TLS: the key in ' in capsys.readouterr().err
    assert status.main([spell(server), '--tls']) == 1
    assert "the server's certificate is not accepted" in capsys.readouterr().err


# ---- what does not work, and why


#: Of a server and a client: what differs from those that come to terms, and what each side says.
CASES: dict[str, tuple[Callable[[Certificates], dict[str, Any]], Callable[[Certificates], Any], str, str]] = {
    'an expired certificate': (
        lambda these: {'tls_certificate': these.expired}, context,
        "the client does not accept the server's certificate: it has expired",
        "the server's certificate is not accepted: certificate has expired"),
    'another host': (
        lambda these: {'tls_certificate': these.wrong_host}, context,
        "the client does not accept the server's certificate: it is for another host",
        "the server's certificate is not accepted: IP address mismatch"),
    'an unknown authority': (
        lambda these: {}, lambda these: client_context(these.client, authenticate=these.other_ca),
        "the client does not accept the server's certificate: it does not trust who has signed it",
        "the server's certificate is not accepted: .*name it, or the authority that has signed it"),
    'no client certificate': (
        lambda these: {}, lambda these: client_context(authenticate=these.ca),
        'the client does not show a certificate, and has to',
        'the server wants to see a certificate of the client'),
    'a stranger': (
        lambda these: {}, lambda these: context(these, these.stranger),
        "the client's certificate is not accepted",
        "the server does not accept the client's certificate: it does not trust who has signed it"),
    'a revoked client': (
        lambda these: {'tls_authenticate': these.ca_with_list}, lambda these: context(these, these.revoked),
        "the client's certificate is not accepted: certificate revoked",
        "the server does not accept the client's certificate: it has been revoked"),
}


@pytest.mark.parametrize('case', CASES)
def test_both_sides_say_the_real_reason(
        start_server: Start, certificates: Certificates, case: str, caplog: pytest.LogCaptureFixture) -> None:
    of_server, of_client, server_says, client_says = CASES[case]
    server = start_server(**secured(certificates, **of_server(certificates)))
    with pytest.raises(ClientDisconnected, match=client_says):
        ClientStorage(server.address, ssl=of_client(certificates), wait_timeout=.5)
    server.log.wait_for(rf'WARNING zeo\.\S+: 127\.0\.0\.1:\d+: disconnected: .*{server_says}')
    assert len([each for each in caplog.records if each.levelname == 'WARNING']) == 1  # it has tried often
    good = {} if 'tls_certificate' in of_server(certificates) else {'ssl': context(certificates)}
    if good:
        ClientStorage(server.address, **good).close()


def test_a_server_without_tls_and_a_client_with_it_say_so(
        start_server: Start, certificates: Certificates) -> None:
    for kind in 'zeo', 'ZEO':
        server = start_server(kind)
        with pytest.raises(ClientDisconnected, match='the server does not speak TLS at this address: leave'):
            ClientStorage(server.address, ssl=context(certificates), wait_timeout=.5)
        if kind == 'zeo':
            server.log.wait_for(r'127\.0\.0\.1:\d+: disconnected: the client speaks TLS, and this address does not')


def test_a_server_with_tls_and_a_client_without_it_say_so(impatient: Server) -> None:
    with pytest.raises(ClientDisconnected, match='the server speaks TLS: ask for it with ssl=True'):
        ClientStorage(impatient.address, wait_timeout=3)
    impatient.log.wait_for(r'127\.0\.0\.1:\d+: disconnected: the client does not begin to speak TLS, and has to')


def test_a_version_that_is_too_old_is_refused(server: Server, certificates: Certificates) -> None:
    old = limited(context(certificates), ssl.TLSVersion.TLSv1_1)
    with pytest.raises(ClientDisconnected, match='does not speak a version of TLS that is accepted here'):
        ClientStorage(server.address, ssl=old, wait_timeout=.5)
    server.log.wait_for('disconnected: the client speaks a version of TLS that is too old')


def test_the_reason_is_told_in_the_end_by_a_client_that_does_not_wait_at_first(
        server: Server, certificates: Certificates) -> None:
    storage = ClientStorage(server.address, ssl=context(certificates, certificates.stranger), wait=False,
                            wait_timeout=1)
    with pytest.raises(ClientDisconnected, match="the server does not accept the client's certificate"):
        storage.load(bytes(8))
    storage.close()


# ---- nobody else is disturbed


def test_handshakes_that_do_not_come_to_an_end_disturb_nobody_and_leave_nothing(
        impatient: Server, certificates: Certificates) -> None:
    """Silent ones, ones that stop in the middle, ones that say a byte now and then, ones that leave, ones
    that say nonsense: beside them, clients connect and work."""
    storage = ClientStorage(impatient.address, ssl=context(certificates))
    oid = storage.new_oid()
    tid = store(storage, oid)
    process = Path(f'/proc/{impatient.process.pid}')  # type: ignore[union-attr]

    def held() -> tuple[int, int]:
        return len(list((process / 'fd').iterdir())), len(list((process / 'task').iterdir()))

    before = held()
    hello = client_hello(certificates)
    sockets = []
    for number in range(60):
        sock = socket.create_connection(impatient.address)
        sockets.append(sock)
        if number % 6 == 1:
            sock.sendall(hello[:50])
        elif number % 6 == 2:
            sock.sendall(hello)
        elif number % 6 == 3:
            sock.close()
        elif number % 6 == 4:
            sock.sendall(b'GET / HTTP/1.0\r\n\r\n')
        elif number % 6 == 5:
            sock.sendall(b'\x16\x03\x03\xff\xff' + bytes(1000))
    until(lambda: held()[1] >= before[1] + 10, 'they are there')
    ClientStorage(impatient.address, ssl=context(certificates)).close()
    store(storage, oid, tid)
    dribbling = threading.Event()

    def dribble() -> None:
        sock = socket.create_connection(impatient.address)
        with sock:
            try:
                for each in hello:
                    sock.sendall(bytes([each]))
                    dribbling.wait(.1)
            except OSError:
                return
            raise AssertionError('it was given all the time it took')

    task = Task(dribble)
    # Who has not said a whole word is cut off after a second; who has said hello, after thirty.
    task.result()
    for sock in sockets:
        sock.close()
    # (A thread that had just become free was perhaps counted before.)
    until(lambda: all(now <= then for now, then in zip(held(), before)), 'nothing is left')
    storage.close()


def client_hello(certificates: Certificates) -> bytes:
    outgoing = ssl.MemoryBIO()
    talker = context(certificates).wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname='localhost')
    with pytest.raises(ssl.SSLWantReadError):
        talker.do_handshake()
    return outgoing.read()
