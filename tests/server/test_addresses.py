"""zeo.server.addresses: names to listening sockets, and who may take over a socket file."""

import errno
import fcntl
import os
import socket
import stat
import threading

import pytest

from zeo.server import addresses


def close(sockets):
    for listening in sockets:
        listening.close()


def have_ipv6_loopback():
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(('::1', 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not have_ipv6_loopback(), reason='this machine has no ::1')


@pytest.fixture
def taken():
    """A port of 127.0.0.1 that is in use."""
    with socket.socket() as other:
        other.bind(('127.0.0.1', 0))
        other.listen()
        yield other.getsockname()[1]


# What can be an address

@pytest.mark.parametrize('address', [('', 0), ('localhost', 65535), ('::1', 1), 'zeo.sock', '/run/1:2/zeo', './9999'])
def test_hosts_with_ports_and_paths_can_be_addresses(address):
    addresses.check(address)


@pytest.mark.parametrize('address', ['localhost:9999', ':9999', '9999', '', 'a\0b', 9999, None, (), ('a',), ('a', '1'),
                                     ('a', -1), ('a', 65536), ('a', True), (None, 1), b'zeo.sock'])
def test_anything_else_cannot(address):
    with pytest.raises(ValueError, match='is no address to listen on: give'):
        addresses.check(address)


# Which addresses a name means

@pytest.mark.parametrize('host, hosts', [
    ('', ['0.0.0.0', '::']),
    ('::', ['0.0.0.0', '::']),
    ('localhost', ['127.0.0.1', '::1']),
    ('0.0.0.0', ['0.0.0.0']),
    ('127.0.0.2', ['127.0.0.2']),
    ('::1', ['::1']),
])
def test_a_host_means_these_addresses(host, hosts):
    found = addresses.resolve(host, 9999)
    assert [address[0] for _, address in found] == hosts
    assert {address[1] for _, address in found} == {9999}
    assert [family == socket.AF_INET6 for family, _ in found] == [':' in host for host in hosts]


def test_localhost_does_not_ask_the_hosts_file(monkeypatch):
    monkeypatch.setattr(socket, 'getaddrinfo', None)
    assert addresses.resolve('localhost', 1)[0][1] == ('127.0.0.1', 1)


def test_a_name_with_several_addresses_means_all_of_them_once_and_ipv4_first(monkeypatch):
    def answers(host, port, **options):
        six = (socket.AF_INET6, socket.SOCK_STREAM, 6, '', ('::1', port, 0, 0))
        four = (socket.AF_INET, socket.SOCK_STREAM, 6, '', ('127.0.0.1', port))
        return [six, four, six]
    monkeypatch.setattr(socket, 'getaddrinfo', answers)
    assert addresses.resolve('here', 5) == [
        (socket.AF_INET, ('127.0.0.1', 5)), (socket.AF_INET6, ('::1', 5, 0, 0))]


@pytest.mark.parametrize('host', ['no-such-host.invalid', 'x' * 70 + '.invalid', 'a..b'])
def test_an_unknown_host_is_named(host):
    with pytest.raises(OSError, match=f"the host '{host}' is not known here"):
        addresses.resolve(host, 9999)


# Listening on TCP

@needs_ipv6
def test_port_0_gives_all_families_the_same_port():
    sockets = addresses.listen('localhost', 0)
    try:
        assert [s.family for s in sockets] == [socket.AF_INET, socket.AF_INET6]
        ports = {s.getsockname()[1] for s in sockets}
        assert len(ports) == 1 and 0 not in ports
        for listening in sockets:
            socket.create_connection(listening.getsockname()[:2], timeout=10).close()
    finally:
        close(sockets)


@needs_ipv6
def test_port_0_tries_again_when_the_port_is_taken_in_the_other_family(monkeypatch):
    real, refused = addresses._listen_on_all, []

    def unlucky_once(found, port, backlog):
        if not refused:
            refused.append(port)
            raise OSError(errno.EADDRINUSE, 'taken')
        return real(found, port, backlog)
    monkeypatch.setattr(addresses, '_listen_on_all', unlucky_once)
    close(addresses.listen('localhost', 0))
    assert refused == [0]


def test_a_port_in_use_is_named_and_nothing_stays_open(taken):
    with pytest.raises(OSError, match=f'port {taken} is in use on 127.0.0.1; .*another port') as caught:
        addresses.listen('localhost', taken)
    assert caught.value.errno == errno.EADDRINUSE


@needs_ipv6
def test_a_port_in_use_in_the_second_family_closes_the_first():
    with socket.socket(socket.AF_INET6) as other:
        other.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        other.bind(('::1', 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(OSError, match='in use on ::1'):
            addresses.listen('localhost', port)
        close(addresses.listen('127.0.0.1', port))  # it is free again


def test_an_address_of_another_machine_is_refused():
    with pytest.raises(OSError, match='192.0.2.1 is not an address of this machine'):
        addresses.listen('192.0.2.1', 0)


def test_a_missing_family_is_left_out(monkeypatch):
    found = [(socket.AF_INET, ('127.0.0.1', 0)), (socket.AF_INET, ('192.0.2.1', 0))]
    monkeypatch.setattr(addresses, 'resolve', lambda host, port: found)
    sockets = addresses.listen('somewhere', 0)
    try:
        assert [s.getsockname()[0] for s in sockets] == ['127.0.0.1']
    finally:
        close(sockets)


@pytest.mark.parametrize('number, says', [
    (errno.EACCES, 'ports below 1024 are for root'),
    (errno.ENOBUFS, 'cannot listen on 127.0.0.1:80'),
])
def test_other_errors_are_explained(number, says):
    explained = addresses._explain(OSError(number, os.strerror(number)), ('127.0.0.1', 80))
    assert explained.errno == number
    assert says in str(explained)


# Socket files

@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return 'sock'


def test_a_socket_file_is_made_and_listened_on(path):
    with addresses.listen_unix(path), socket.socket(socket.AF_UNIX) as client:
        client.connect(path)


def test_the_socket_file_of_a_dead_server_is_taken_over(path):
    addresses.listen_unix(path).close()
    assert os.path.exists(path)
    with addresses.listen_unix(path), socket.socket(socket.AF_UNIX) as client:
        client.connect(path)


def test_the_socket_file_of_a_living_server_is_refused(path):
    with addresses.listen_unix(path), socket.socket(socket.AF_UNIX) as client:
        with pytest.raises(OSError, match='another server is listening on sock; stop it, or'):
            addresses.listen_unix(path)
        client.connect(path)  # and it is still there


def test_a_server_whose_backlog_is_full_counts_as_living(path):
    with addresses.listen_unix(path, backlog=0):
        waiting = [socket.socket(socket.AF_UNIX) for _ in range(200)]
        try:
            for client in waiting:
                client.setblocking(False)
            assert errno.EAGAIN in {client.connect_ex(path) for client in waiting}
            with pytest.raises(OSError, match='another server is listening'):
                addresses.listen_unix(path)
        finally:
            close(waiting)


def test_a_file_that_is_no_socket_is_refused_and_kept(path):
    with open(path, 'w') as file:
        file.write('precious')
    with pytest.raises(OSError, match='sock is there and is not a socket; move it away, or choose'):
        addresses.listen_unix(path)
    with open(path) as file:
        assert file.read() == 'precious'


def test_a_link_is_refused_and_kept(path):
    addresses.listen_unix('elsewhere').close()
    os.symlink('elsewhere', path)
    with pytest.raises(OSError, match='is not a socket'):
        addresses.listen_unix(path)
    assert os.path.islink(path)


def test_a_path_that_is_too_long_is_refused(path):
    with pytest.raises(OSError, match=r'too long \(108 bytes\); choose one of at most 107 bytes'):
        addresses.listen_unix('x' * 108)
    addresses.listen_unix('x' * 107).close()


@pytest.mark.parametrize('mask', [0o000, 0o022, 0o077])
@pytest.mark.parametrize('mode', [0o660, 0o600, 0o666])
def test_a_socket_file_has_its_mode_and_never_more(path, monkeypatch, mode, mask):
    seen = []

    class Watched(socket.socket):
        def bind(self, address):
            super().bind(address)
            seen.append(stat.S_IMODE(os.stat(address).st_mode))

    monkeypatch.setattr(socket, 'socket', Watched)
    before = os.umask(mask)
    try:
        with addresses.listen_unix(path, mode):
            assert stat.S_IMODE(os.stat(path).st_mode) == mode
    finally:
        os.umask(before)
    assert seen == [mode & ~mask]


def test_by_default_only_the_owner_and_the_group_may_connect(path):
    with addresses.listen_unix(path):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o660


def test_a_missing_folder_is_named(path):
    with pytest.raises(OSError, match='folder nowhere: No such file or directory; create the folder'):
        addresses.listen_unix('nowhere/sock')


def test_only_one_server_at_a_time_may_look_remove_and_bind(path, monkeypatch):
    """Two servers find the same stale file: the second looks only when the first has bound."""
    addresses.listen_unix(path).close()
    looking, go_on, outcome = threading.Event(), threading.Event(), []
    real = addresses._remove_if_stale

    def stop_after_looking(path):
        real(path)
        if not looking.is_set():
            looking.set()
            assert go_on.wait(30)
    monkeypatch.setattr(addresses, '_remove_if_stale', stop_after_looking)

    def first():
        with addresses.listen_unix(path) as listening, socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            outcome.append(listening.getsockname())

    thread = threading.Thread(target=first)
    thread.start()
    try:
        assert looking.wait(30)
        monkeypatch.setattr(addresses, 'PATIENCE', 0)
        with pytest.raises(OSError, match='locked by another process'):
            addresses.listen_unix(path)
    finally:
        go_on.set()
        thread.join(30)
    assert outcome == [path]


def test_the_lock_on_the_folder_is_given_back(path):
    addresses.listen_unix(path).close()
    handle = os.open('.', os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(handle)


def test_a_socket_file_of_ours_is_removed(path):
    addresses.listen_unix(path).close()
    addresses.remove_socket_file(path, addresses.socket_file(path))
    assert not os.path.exists(path)


def test_a_socket_file_that_is_no_longer_ours_is_kept(path):
    addresses.listen_unix(path).close()
    ours = addresses.socket_file(path)
    os.rename(path, 'old')  # kept, so that its inode is not given to the new one
    addresses.listen_unix(path).close()
    addresses.remove_socket_file(path, ours)
    assert os.path.exists(path)


def test_removing_a_socket_file_twice_is_no_error(path):
    addresses.listen_unix(path).close()
    ours = addresses.socket_file(path)
    addresses.remove_socket_file(path, ours)
    addresses.remove_socket_file(path, ours)


# Words

@pytest.mark.parametrize('address, text, local', [
    (('127.0.0.1', 9999), '127.0.0.1:9999', True),
    (('::1', 9999, 0, 0), '[::1]:9999', True),
    (('::1', 9999), '[::1]:9999', True),
    (('0.0.0.0', 1), '0.0.0.0:1', False),
    (('::', 1, 0, 0), '[::]:1', False),
    (('10.0.0.1', 1), '10.0.0.1:1', False),
    ('/run/zeo', '/run/zeo', True),
])
def test_addresses_in_words(address, text, local):
    assert addresses.describe(address) == text
    assert addresses.only_this_machine(address) is local
