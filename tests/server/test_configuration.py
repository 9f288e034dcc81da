"""zeo.server.configuration: the configuration file, and where in it a mistake is."""

import os
import re
from io import StringIO
from pathlib import Path

import pytest
import ZConfig
import ZEO

from zeo.server.limits import Limits
from zeo.server.roles import Role
from zeo.server.roles import Rule
from tests.system.servers import ROOT
from zeo.server import configuration
from zeo.server.configuration import Mistake
from zeo.server.options import CannotStart
from zeo.server.options import _parser
from zeo.server.options import parse
from zeo.server.options import pid_file
from zeo.server.storages import look_for
from zeo.server.storages import open_section
from zeo.server.values import StorageName

#: What ZEO's server understands.
ZEOS = ZConfig.loadSchema(os.path.join(os.path.dirname(ZEO.__file__), 'schema.xml'))

STORAGE = '<mappingstorage main/>\n'
ZEO_SECTION = '<zeo>\n  address 9999\n</zeo>\n'


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('INSTANCE_HOME', raising=False)
    return tmp_path


def asks(text, *words):
    Path('zeo.conf').write_text(text)
    return parse(['-C', 'zeo.conf', *words])


def refusal(capsys, text, *words):
    with pytest.raises(SystemExit) as ended:
        asks(text, *words)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert not out and err.count('\n') == 1
    return err.removeprefix('zeo.start: ').rstrip('\n')


def test_every_key_is_an_option():
    options = asks('''
<zeo>
    address localhost:9999
    address /run/zeo.sock
    socket-mode 600
    read-only true
    transaction-timeout 2.5
    invalidation-queue-size 7
    invalidation-age 3600
    client-conflict-resolution on
    blob-sync off
    poll-interval 0.2
    role admin=/run/zeo.sock
    role read=cn:guest
    max-connections 70
    max-connections-per-address 7
    max-message 64KB
    max-transaction 2gb
    registration-timeout 3
    idle-timeout 300
    user zope
    pid-file /run/zeo.pid
</zeo>
''' + STORAGE)
    assert options.addresses == (('localhost', 9999), '/run/zeo.sock')
    assert options.socket_mode == 0o600
    assert options.read_only and options.client_conflict_resolution and not options.blob_sync
    assert options.transaction_timeout == 2.5
    assert options.invalidation_queue_size == 7 and options.invalidation_age == 3600
    assert options.poll_interval == 0.2
    assert options.roles == (Rule(Role.ADMIN, path='/run/zeo.sock'), Rule(Role.READ, certificate='guest'))
    assert options.limits == Limits(2**16, 2**31, 70, 7, 3.0, 300.0)
    assert options.user == 'zope' and options.pid_file == '/run/zeo.pid'
    assert options.notices == () and options.log is None


SSL = '<zeo>\n  address 9999\n  <ssl>\n%s\n  </ssl>\n</zeo>\n' + STORAGE


def test_a_section_says_what_the_options_for_tls_say():
    options = asks(SSL % 'certificate /c\nkey k\npassword-file p\npassword-function m.f\nauthenticate a')
    assert (options.tls_certificate, options.tls_key, options.tls_password_file,
            options.tls_password_function, options.tls_authenticate) == ('/c', 'k', 'p', 'm.f', 'a')
    assert asks(SSL % 'certificate c', '--tls-certificate=other').tls_certificate == 'other'


@pytest.mark.parametrize('lines, says', [
    ('key k', 'TLS needs a certificate'), ('certificate c\ncheck-hostname off', 'are for clients'),
    ('certificate c\nserver-hostname x', 'are for clients'), ('cert c', 'zeo.conf:4: ')])
def test_what_is_wrong_about_tls_is_said(capsys, lines, says):
    assert says in refusal(capsys, SSL % lines)


def test_what_the_file_leaves_out_has_the_same_defaults_as_on_the_command_line():
    options, by_words = asks(ZEO_SECTION + STORAGE), parse(['-p', '9999'])
    for name in ('socket_mode', 'read_only', 'transaction_timeout', 'invalidation_queue_size',
                 'invalidation_age', 'client_conflict_resolution', 'blob_sync', 'limits', 'roles', 'user', 'pid_file', 'log', 'debug',
                 'poll_interval'):
        assert getattr(options, name) == getattr(by_words, name)


def test_a_transaction_timeout_of_0_is_none():
    assert asks('<zeo>\naddress 1\ntransaction-timeout 0\n</zeo>' + '\n' + STORAGE).transaction_timeout is None


@pytest.mark.parametrize('words, attribute, expected', [
    (['-p', '1'], 'addresses', (('localhost', 1),)),
    (['-U', 's'], 'addresses', ('s',)),
    (['--socket-mode=600'], 'socket_mode', 0o600),
    (['--no-read-only'], 'read_only', False),
    (['--no-client-conflict-resolution'], 'client_conflict_resolution', False),
    (['--blob-sync'], 'blob_sync', True),
    (['--transaction-timeout=1'], 'transaction_timeout', 1),
    (['--transaction-timeout=0'], 'transaction_timeout', None),
    (['--invalidation-queue-size=1'], 'invalidation_queue_size', 1),
    (['--invalidation-age=1'], 'invalidation_age', 1),
    (['--poll-interval=1'], 'poll_interval', 1),
    (['--role=read=9'], 'roles', (Rule(Role.READ, port=9),)),
    (['--idle-timeout=9'], 'limits', Limits(idle_timeout=9)),
    (['-u', 'x'], 'user', 'x'),
    (['--pid-file=x'], 'pid_file', 'x'),
    (['--log=x'], 'log', 'x'),
    (['my.fs'], 'file', 'my.fs'),
    (['my.fs'], 'storages', ()),
    (['-S', '1=m:x'], 'storages', (StorageName('1', 'm', 'x'),)),
])
def test_the_command_line_overrides_the_file(words, attribute, expected):
    text = '''
<zeo>
    address 9999
    socket-mode 666
    read-only true
    transaction-timeout 7
    invalidation-queue-size 7
    invalidation-age 7
    client-conflict-resolution true
    blob-sync false
    user zope
    pid-file zeo.pid
</zeo>
<eventlog/>
''' + STORAGE
    assert getattr(asks(text), attribute) != expected
    assert getattr(asks(text, *words), attribute) == expected


def test_the_address_may_be_given_by_the_command_line_alone():
    assert asks(STORAGE, '-p', '1').addresses == (('localhost', 1),)


def test_storages_have_the_names_of_their_sections_and_one_may_be_without(folder):
    options = asks(ZEO_SECTION + '<mappingstorage B/>\n<filestorage>\n  path Data.fs\n</filestorage>\n')
    b, one = options.storages
    assert (b.name, b.kind, b.place) == ('b', 'mappingstorage', 'zeo.conf:4')
    assert (one.name, one.kind, one.place) == ('1', 'filestorage', 'zeo.conf:5')
    storage = open_section(one)
    assert os.path.samefile(storage.getName(), folder / 'Data.fs')
    storage.close()


def test_packages_bring_their_own_storages():
    options = asks(ZEO_SECTION + '%import zeo\n<clientstorage up>\n  server localhost:1\n</clientstorage>\n')
    assert [section.kind for section in options.storages] == ['clientstorage']


def test_environment_variables_of_the_command_line_can_be_used(monkeypatch):
    monkeypatch.setenv('NUMBER', 'to be restored')
    options = asks('<zeo>\naddress $(NUMBER)\n</zeo>\n' + STORAGE, 'NUMBER=17')
    assert options.addresses == (('', 17),)


def test_a_file_may_include_another_where_mistakes_are_found_too(capsys):
    Path('more.conf').write_text('\n<zeo>\naddress x\n</zeo>\n')
    assert refusal(capsys, '%include more.conf\n' + STORAGE).startswith("more.conf:3: 'x' is no address")


# A file of ZEO's

def test_a_file_of_zeos_server_is_understood_and_what_has_no_meaning_is_told():
    Path('python').touch()
    text = '''
%define INSTANCE .
<zeo>
  address 8100
  read-only false
  invalidation-queue-size 100
  invalidation-age 1000.5
  transaction-timeout 300
  pid-filename $INSTANCE/ZEO.pid
  client-conflict-resolution false
  msgpack false
</zeo>
<filestorage 1>
  path $INSTANCE/Data.fs
  blob-dir $INSTANCE/blobs
</filestorage>
<eventlog>
  level info
  <logfile>
    path $INSTANCE/zeo.log
  </logfile>
</eventlog>
<runner>
  program runzeo -C zeo.conf
  socket-name $INSTANCE/zeo.zdsock
  daemon true
  forever false
  backoff-limit 5
  exit-codes 0, 2
  directory $INSTANCE
  default-to-interactive true
  user zope
  python $INSTANCE/python
  zdrun $INSTANCE/python
  logfile $INSTANCE/zeo.log
  <eventlog/>
</runner>
'''
    ZConfig.loadConfigFile(ZEOS, StringIO(text))  # it is one of ZEO's
    options = asks(text)
    assert options.addresses == (('', 8100),)
    assert options.pid_file == './ZEO.pid' and options.user == 'zope'
    assert options.transaction_timeout == 300 and options.invalidation_age == 1000.5
    assert options.runner == {'socket_name': './zeo.zdsock', 'forever': False, 'backoff_limit': 5,
                              'exit_codes': '0, 2', 'directory': '.'}
    told = [re.fullmatch(r'zeo\.conf:(\d+): (\S+) in <(\S+)> has no meaning here: .+', notice).groups()
            for notice in options.notices]
    assert told == [('11', 'msgpack', 'zeo'), ('24', 'program', 'runner'), ('26', 'daemon', 'runner'),
                    ('31', 'default-to-interactive', 'runner'), ('33', 'python', 'runner'),
                    ('34', 'zdrun', 'runner'), ('35', 'logfile', 'runner'), ('36', 'eventlog', 'runner')]


def keys(schema, kind):
    section = schema.gettype(kind)
    return {name or info.sectiontype.name for name, info in section}


def test_no_key_of_zeos_schema_and_of_zdaemons_is_unknown():
    ours = ZConfig.loadSchema(str(configuration.SCHEMA))
    for kind in 'zeo', 'runner', 'ssl':
        assert keys(ZEOS, kind) <= keys(ours, kind)
    assert {'zeo', 'runner', 'eventlog'} <= set(ours.gettypenames())


def test_every_option_that_is_not_about_the_command_itself_has_a_key_or_a_section():
    options = {option[2:] for action in _parser()._actions for option in action.option_strings[:2]
               if option.startswith('--') and not option.startswith('--no-')}
    elsewhere = {
        'help', 'version', 'configuration', 'check', 'daemon', 'debug', 'profile',  # the command itself
        'port', 'host', 'unix', 'monitor',      # addresses
        'storage', 'blob-dir', 'log',           # storages and <eventlog>
        'tls-certificate', 'tls-key', 'tls-password-file', 'tls-authenticate'}  # <ssl>
    ours = keys(ZConfig.loadSchema(str(configuration.SCHEMA)), 'zeo')
    assert options - elsewhere <= ours
    text = (ROOT / 'start.txt').read_text(encoding='utf-8')
    for key in ours - options - {'pid-filename', 'msgpack'}:  # ZEO's
        assert re.search(rf'["<\s]{key}[">\s]', text), f'{key} is not in start.txt'


def test_all_that_has_no_meaning_is_in_the_schema():
    ours = ZConfig.loadSchema(str(configuration.SCHEMA))
    for kind, key in configuration.WITHOUT_MEANING:
        assert key in keys(ours, kind) or (kind, key) == ('runner', 'eventlog')


@pytest.mark.parametrize('words, home, expected', [
    ([], None, None),
    ([], 'site', 'site/var/ZEO.pid'),
    (['--pid-file=x'], 'site', 'x'),
])
def test_the_pid_file_is_where_zeos_would_be(folder, words, home, expected):
    options = asks(ZEO_SECTION + STORAGE, *words)
    assert pid_file(options, {'INSTANCE_HOME': home} if home else {}) == (
        expected and str(folder / expected))
    assert pid_file(parse(['-p', '1']), {'INSTANCE_HOME': 'site'}) is None


# What is wrong

@pytest.mark.parametrize('text, says', [
    ('<zeo>\n  address x\n</zeo>\n' + STORAGE, "zeo.conf:2: 'x' is no address; give host:port"),
    ('<zeo>\n  address 1\n  nonsense 1\n</zeo>\n', "zeo.conf:3: 'nonsense' is not a known key name"),
    ('<zeo>\n  address 1\n  read-only perhaps\n</zeo>\n', 'zeo.conf:3: '),
    ('<zeo>\n  address 1\n  read-only on\n  read-only off\n</zeo>\n', "zeo.conf:4: 'read-only' does not"),
    ('<zeo>\n  address 1\n  transaction-timeout -1\n</zeo>\n', "zeo.conf:3: '-1' is no number of seconds"),
    ('<zeo>\n  address 1\n  socket-mode rw\n</zeo>\n', "zeo.conf:3: 'rw' are no permissions"),
    ('<zeo>\n  address 1\n', 'zeo.conf:2: unclosed sections not allowed'),
    ('<oops>\n</oops>\n', "zeo.conf:1: unknown type name: 'oops'"),
    ('\n%import no_such_package\n', 'zeo.conf:2: could not load package no_such_package'),
    ('%include no.conf\n', 'zeo.conf:1: error opening file'),
    ('<mappingstorage/>\n<mappingstorage 1/>\n', "zeo.conf:2: two storages have the name '1'; give each"),
    ('<mappingstorage 1/>\n<mappingstorage 1/>\n', 'zeo.conf:2: section names must not be re-used'),
    ('<filestorage>\n path no/Data.fs\n</filestorage>\n', 'zeo.conf:2: The directory named as part of'),
    ('<filestorage>\n</filestorage>\n', "zeo.conf:2: no values for 'path'; 1 required"),
    (ZEO_SECTION, 'zeo.conf: nothing to serve: give a section for each storage, such as <filestorage main>'),
    (STORAGE, 'no address to listen on: give a port with -p, a socket file with -U, or both'),
    ('<eventlog>\n<logfile>\npath x\nformat %(y)s\n</logfile>\n</eventlog>\n', 'zeo.conf:'),
])
def test_a_mistake_is_one_line_with_file_and_line(capsys, text, says):
    assert refusal(capsys, text).startswith(says)


def test_a_file_that_cannot_be_read_is_named(folder, capsys):
    for name, says in [('no.conf', 'No such file or directory'), ('.', 'Is a directory')]:
        with pytest.raises(SystemExit) as ended:
            parse(['-C', name])
        assert (ended.value.code, capsys.readouterr().err) == (2, f'zeo.start: {name}: {says}\n')
    (folder / 'latin.conf').write_bytes(b'# \xe9\n')
    with pytest.raises(Mistake, match='^latin.conf: UnicodeDecodeError'):
        configuration.read('latin.conf')


def test_blobs_beside_a_section_are_refused(capsys):
    assert refusal(capsys, ZEO_SECTION + STORAGE, '--blob-dir=x').startswith('--blob-dir is for a file')


# Looking and opening

def test_looking_for_a_storage_opens_and_makes_nothing(folder):
    [section] = asks(ZEO_SECTION + '<filestorage>\npath Data.fs\n</filestorage>\n').storages
    assert look_for(section) is None
    assert [path.name for path in folder.iterdir()] == ['zeo.conf']
    (folder / 'Data.fs').write_bytes(b'this is no FileStorage')
    assert look_for(section).startswith(
        f'zeo.conf:4: <filestorage 1>: {folder}/Data.fs is damaged, or is not a FileStorage (')
    (folder / 'Data.fs').unlink()
    (folder / 'Data.fs').mkdir()
    assert look_for(section) == (
        f'zeo.conf:4: <filestorage 1>: {folder}/Data.fs is a folder; give the name of a file')


def test_files_are_looked_for_in_sections_within_sections(folder):
    [section] = asks(ZEO_SECTION + '''
<blobstorage outer>
    blob-dir blobs
    <demostorage>
        <filestorage base>
            path base.fs
            read-only true
        </filestorage>
    </demostorage>
</blobstorage>
''').storages
    assert look_for(section) == (f'zeo.conf:5: <blobstorage outer>: {folder}/base.fs does not exist; start once'
                                 ' without --read-only to create it')


def test_the_places_of_values_are_known_unless_the_command_line_overrides_them():
    text = '<zeo>\naddress 1\nuser zope\npid-filename x\n</zeo>\n' + STORAGE
    assert asks(text).places.items() >= {
        "('', 1)": 'zeo.conf:2', 'user': 'zeo.conf:3', 'pid_file': 'zeo.conf:4'}.items()
    assert 'user' not in asks(text, '-u', 'other').places


def test_any_error_of_a_section_is_one_line():
    [section] = asks(ZEO_SECTION + '<demostorage x>\n<mappingstorage a/>\n<mappingstorage b/>\n'
                     '</demostorage>\n').storages
    with pytest.raises(CannotStart, match=r'^zeo\.conf:4: <demostorage x>: ValueError: Too many base storages'):
        open_section(section)
