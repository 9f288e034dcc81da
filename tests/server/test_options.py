"""zeo.server.options: the words of the command line, and what they mean."""

import os

import pytest

from zeo.server.backing import POLL_INTERVAL
from zeo.server.limits import Limits
from zeo.server.roles import Role
from zeo.server.roles import Rule
from zeo.server.values import StorageName
from zeo.server.options import blob_folder
from zeo.server.options import data_file
from zeo.server.options import parse
from zeo.version import __version__


def asks(*arguments):
    return parse(['-p', '9999', *arguments])


def refusal(capsys, *arguments):
    """The one line that the program ends with."""
    with pytest.raises(SystemExit) as ended:
        parse(arguments)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert not out and err.count('\n') == 1 and err.startswith('zeo.start: ')
    return err


def test_the_defaults():
    options = asks()
    assert options.addresses == (('localhost', 9999),)
    assert options.file is None and options.storages == () and options.environment == {}
    assert options.blob_dir is None
    assert options.user is None and options.log is None and options.profile is None
    assert not options.debug and not options.read_only and not options.client_conflict_resolution
    assert options.blob_sync
    assert options.transaction_timeout == 30
    assert options.invalidation_queue_size == 100
    assert options.invalidation_age is None and options.poll_interval == POLL_INTERVAL
    assert options.limits == Limits() and options.roles == ()


@pytest.mark.parametrize('short, long, value, attribute, expected', [
    ('-u', '--user', 'zope', 'user', 'zope'),
    ('-P', '--profile', 'prof', 'profile', 'prof'),
    ('-S', '--storage', 'a=b.c:d', 'storages', (StorageName('a', 'b.c', 'd'),)),
    ('-U', '--unix', 'sock', 'addresses', (('localhost', 9999), 'sock')),
    ('-h', '--host', '10.0.0.1', 'addresses', (('10.0.0.1', 9999),)),
    ('-p', '--port', '1', 'addresses', (('localhost', 1),)),
    (None, '--log', 'zeo.log', 'log', 'zeo.log'),
    (None, '--transaction-timeout', '2.5', 'transaction_timeout', 2.5),
    (None, '--transaction-timeout', '0', 'transaction_timeout', None),
    (None, '--invalidation-queue-size', '7', 'invalidation_queue_size', 7),
    (None, '--invalidation-age', '3600', 'invalidation_age', 3600),
    (None, '--poll-interval', '.5', 'poll_interval', .5),
    (None, '--tls-certificate', 'c.pem', 'tls_certificate', 'c.pem'),
    (None, '--role', 'write=9999', 'roles', (Rule(Role.WRITE, port=9999),)),
    (None, '--max-connections', '70', 'limits', Limits(max_connections=70)),
    (None, '--max-connections-per-address', '7', 'limits', Limits(max_connections_per_address=7)),
    (None, '--max-message', '70000', 'limits', Limits(max_message=70000)),
    (None, '--max-transaction', '10MB', 'limits', Limits(max_transaction=10 * 2**20)),
    (None, '--registration-timeout', '.5', 'limits', Limits(registration_timeout=.5)),
    (None, '--idle-timeout', '90', 'limits', Limits(idle_timeout=90)),
])
def test_an_option_with_a_value(short, long, value, attribute, expected):
    for words in [long, value], [f'{long}={value}'], [short, value], [f'{short}{value}']:
        if None not in words and not words[0].startswith('None'):
            assert getattr(asks(*words), attribute) == expected


def test_tls_with_all_that_belongs_to_it():
    options = asks('--tls-certificate=c', '--tls-key=k', '--tls-password-file=p', '--tls-authenticate=a')
    assert (options.tls_certificate, options.tls_key, options.tls_password_file, options.tls_authenticate) == (
        'c', 'k', 'p', 'a')
    assert asks().tls_certificate is None


@pytest.mark.parametrize('word', ['--tls-key=k', '--tls-password-file=p', '--tls-authenticate=a'])
def test_tls_needs_a_certificate(capsys, word):
    assert 'TLS needs a certificate; give it with --tls-certificate' in refusal(capsys, '-p', '1', word)


def test_tls_needs_a_port(capsys):
    assert 'TLS is spoken at a port, not at a socket file' in refusal(
        capsys, '-U', 'sock', '--tls-certificate=c')


@pytest.mark.parametrize('short, long, attribute', [
    ('-D', '--debug', 'debug'),
    (None, '--read-only', 'read_only'),
    (None, '--client-conflict-resolution', 'client_conflict_resolution'),
])
def test_an_option_without_a_value(short, long, attribute):
    assert getattr(asks(long), attribute) is True
    if short:
        assert getattr(asks(short), attribute) is True


def test_blobs_may_be_left_to_the_system():
    assert asks('--no-blob-sync').blob_sync is False


@pytest.mark.parametrize('option', ['-s', '--no-daemon'])
def test_staying_in_the_foreground_is_what_it_does_anyway(option):
    assert asks(option) == asks()


@pytest.mark.parametrize('host', ['', '0.0.0.0', '::'])
def test_all_of_this_machine_may_be_asked_for(host):
    assert asks('-h', host).addresses == ((host, 9999),)


def test_a_socket_file_alone_is_enough():
    assert parse(['-U', '/run/zeo']).addresses == ('/run/zeo',)


def test_environment_variables_and_the_file_may_stand_anywhere():
    options = parse(['A=1', '-p', '1', 'B=x=y', 'my.fs', '-D', 'C='])
    assert options.environment == {'A': '1', 'B': 'x=y', 'C': ''}
    assert options.file == 'my.fs'


def test_a_file_name_with_an_equals_sign_can_be_given_with_its_folder():
    assert asks('./a=b').file == './a=b'


def test_storages_are_repeatable_and_may_have_odd_names():
    options = asks('-S', 'a b=m:x', '-S', '2=/some/where=1/m.py:y.z')
    assert options.storages == (
        StorageName('a b', 'm', 'x'), StorageName('2', '/some/where=1/m.py', 'y.z'))


# Which file

def test_the_file_is_what_was_given():
    assert data_file(asks('my.fs'), {'INSTANCE_HOME': '/srv'}) == os.path.abspath('my.fs')


def test_the_file_is_in_the_instance_home_if_that_is_set():
    assert data_file(asks(), {'INSTANCE_HOME': '/srv'}) == '/srv/var/Data.fs'


@pytest.mark.parametrize('environment', [{}, {'INSTANCE_HOME': ''}])
def test_the_file_is_in_the_current_folder_otherwise(environment):
    assert data_file(asks(), environment) == os.path.abspath('Data.fs')


def test_there_is_no_file_when_storages_are_named():
    assert data_file(asks('-S', '1=m:x'), {}) is None


# What is wrong

@pytest.mark.parametrize('arguments, says', [
    (['Data.fs'], 'no address to listen on: give a port with -p, a socket file with -U, or both'),
    (['-h', 'x', '-U', 'sock'], '-h says where the port is; give the port with -p'),
    (['-p', 'x'], "'x' is no port; give a number from 0 to 65535"),
    (['-p', '65536'], "'65536' is no port"),
    (['-p', '-1'], '-p/--port'),
    (['-p', '9' * 5000], 'is no port'),
    (['-p', ''], "'' is no port"),
    (['-p', '²'], "is no port"),
    (['-p'], 'expected one argument'),
    (['-U', ''], "'' is no file name"),
    (['-p', '1', 'a', 'b'], 'more than one file name: a, b; give one, or use -S'),
    (['-p', '1', 'a', '-S', '1=m:x'], 'both a file name (a) and -S'),
    (['-p', '1', '-S', '1=m:x', '-S', '1=m:y'], "two storages have the name '1'"),
    (['-p', '1', '-S', '1=m:x', '--blob-dir', 'blobs'], '--blob-dir is for a file'),
    (['-p', '1', '-S', 'm:x'], 'not of the form NAME=MODULE:ATTRIBUTE, such as 1=storages:main'),
    (['-p', '1', '-S', '1=m'], 'not of the form'),
    (['-p', '1', '-S', '=m:x'], 'not of the form'),
    (['-p', '1', '-S', '1=:x'], 'not of the form'),
    (['-p', '1', '-S', '1=m:'], 'not of the form'),
    (['-p', '1', '--transaction-timeout=-1'], 'no number of seconds; give 0 or more'),
    (['-p', '1', '--transaction-timeout=inf'], 'no number of seconds'),
    (['-p', '1', '--transaction-timeout=nan'], 'no number of seconds'),
    (['-p', '1', '--transaction-timeout=soon'], 'no number of seconds'),
    (['-p', '1', '--invalidation-age=0'], '0 seconds are too few'),
    (['-p', '1', '--invalidation-queue-size=0'], 'no number of transactions; give 1 or more'),
    (['-p', '1', '--invalidation-queue-size=1.5'], 'no number of transactions'),
    (['-p', '1', '--max-connections=0'], 'no number of connections; give 1 or more'),
    (['-p', '1', '--max-message=1XB'], 'no size; give a number of bytes, or one with KB, MB or GB'),
    (['-p', '1', '--max-message=0GB'], 'no size'),
    (['-p', '1', '--max-message=65535'], "'65535': no client could work with messages as short as that; give 64KB or more"),
    (['-p', '1', '--max-message=-1'], 'no size'),
    (['-p', '1', '--max-message=MB'], 'no size'),
    (['-p', '1', '--max-message=1KMB'], 'no size'),
    (['-p', '1', '--idle-timeout=0'], '0 seconds are too few'),
    (['-p', '1', '--role=boss=9999'], 'no role; give read, write or admin'),
    (['-p', '1', '--role=read=x'], 'is no address'),
    (['-p', '1', '--nonsense'], 'unrecognized arguments: --nonsense'),
    (['-p', '1', '--read'], 'unrecognized arguments: --read'),
])
def test_a_mistake_is_one_line_that_names_it(capsys, arguments, says):
    assert says in refusal(capsys, *arguments)


def test_without_arguments_it_shows_its_usage_and_fails(capsys):
    with pytest.raises(SystemExit) as ended:
        parse([])
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert not out
    assert err.startswith('usage: python -m zeo.start [options] [NAME=VALUE ...] [file]\n')
    assert '--transaction-timeout' in err


def test_help_is_no_failure(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(['--help'])
    assert ended.value.code == 0
    assert '--invalidation-age' in capsys.readouterr().out


def test_the_version_is_shown(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(['--version'])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f'zeo {__version__}\n'


def test_blobs_are_where_the_option_says(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert blob_folder(asks('--blob-dir', 'blobs'), '/x/Data.fs') == str(tmp_path / 'blobs')


def test_blobs_are_beside_the_file_if_there_is_a_folder(tmp_path):
    file = str(tmp_path / 'Data.fs')
    assert blob_folder(asks(), file) is None
    (tmp_path / 'Data.fs.blobs').write_text('a file')
    assert blob_folder(asks(), file) is None
    (tmp_path / 'Data.fs.blobs').unlink()
    (tmp_path / 'Data.fs.blobs').mkdir()
    assert blob_folder(asks(), file) == file + '.blobs'
