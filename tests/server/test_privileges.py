"""zeo.server.privileges: who is found, what is tried, and that root is really given up.

What changes the user of the process happens in a process of its own.
"""

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import textwrap

import pytest

from zeo.server import privileges
from zeo.server.options import CannotStart
from zeo.server.privileges import User

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason='only root can become another user')
needs_nobody = pytest.mark.skipif(
    'nobody' not in {user.pw_name for user in pwd.getpwall()}, reason='there is no user nobody here')


def has_no_account(uid):
    try:
        pwd.getpwuid(uid)
    except KeyError:
        return True
    return False


UNUSED = next(uid for uid in range(54321, 99999) if has_no_account(uid))


def in_a_process(code, *arguments):
    """What this code prints, in a process that imports everything before it changes its user."""
    head = 'import os, sys\nfrom zeo.server import privileges\nfrom zeo.server.privileges import *\n'
    done = subprocess.run(
        [sys.executable, '-c', head + textwrap.dedent(code), *map(str, arguments)],
        capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def world():
    """A folder that other users can reach (pytest's own are for one user only)."""
    folder = tempfile.mkdtemp(prefix='zeo-')
    os.chmod(folder, 0o755)
    yield folder
    shutil.rmtree(folder)


# Finding

def test_a_user_is_found_by_name_and_by_number():
    me = pwd.getpwuid(os.getuid())
    user = privileges.find_user(me.pw_name)
    assert (user.name, user.uid, user.gid) == (me.pw_name, me.pw_uid, me.pw_gid)
    assert me.pw_gid in user.groups
    assert privileges.find_user(str(me.pw_uid)) == user


def test_a_number_without_an_account_has_one_harmless_group():
    user = privileges.find_user(str(UNUSED))
    assert user.uid == UNUSED and user.groups == (user.gid,) and user.gid not in (0, UNUSED)


@pytest.mark.parametrize('text', ['no-such-user', '', '-1', '1.5', '²'])
def test_an_unknown_user_is_named(text):
    with pytest.raises(CannotStart, match='there is no user'):
        privileges.find_user(text)


@pytest.mark.parametrize('text', [str(2 ** 32 - 1), str(2 ** 32), '9' * 5000])
def test_a_number_that_means_no_change_to_the_kernel_is_refused(text):
    with pytest.raises(CannotStart, match='too high'):
        privileges.find_user(text)


# Becoming

@needs_root
@needs_nobody
def test_root_is_given_up_for_good_groups_included():
    printed = in_a_process('''
        os.setgroups([0, 1, 2])
        nobody = find_user('nobody')
        become(nobody)
        print(os.getresuid() == (nobody.uid,) * 3, os.getresgid() == (nobody.gid,) * 3,
              set(os.getgroups()) == set(nobody.groups))
        for regain in lambda: os.setuid(0), lambda: os.setgid(0), lambda: os.setgroups([0]):
            try:
                regain()
            except PermissionError:
                print('no way back')
    ''')
    assert printed.split('\n') == ['True True True'] + 3 * ['no way back']


@needs_root
def test_a_number_without_an_account_can_be_become():
    printed = in_a_process('''
        settle(sys.argv[1], lambda: None)
        print(os.geteuid(), 0 in os.getgroups(), os.getegid())
    ''', UNUSED).split()
    assert printed[:2] == [str(UNUSED), 'False'] and printed[2] != '0'


def test_what_the_kernel_refuses_is_told(monkeypatch):
    def refuse(groups):
        raise PermissionError(1, 'Operation not permitted')
    monkeypatch.setattr(os, 'setgroups', refuse)
    with pytest.raises(CannotStart, match='cannot become user zope: Operation not permitted; start as'):
        privileges.become(User('zope', 1, 1, (1,)))


# Asking

@needs_root
@needs_nobody
def test_another_user_is_asked_and_this_process_stays_as_it_is():
    assert in_a_process('''
        print(ask_as(find_user('nobody'), lambda: f'is {os.geteuid()}'), os.geteuid())
        print(ask_as(find_user('nobody'), lambda: None))
        print(ask_as(find_user('nobody'), lambda: 1 / 0))
    ''') == f'is {pwd.getpwnam("nobody").pw_uid} 0\nNone\ncould not be asked'


@needs_root
@needs_nobody
def test_a_user_who_cannot_be_become_is_out_of_reach():
    assert in_a_process('''
        def refuse(uid):
            raise PermissionError(1, 'Operation not permitted')
        os.setuid = refuse
        print(ask_as(find_user('nobody'), lambda: None))
    ''').startswith('is out of reach (cannot become user nobody: Operation not permitted')


# Deciding

def settled(monkeypatch, wanted, *, euid=0, nobody_says=None, complaint=None):
    """What `settle` returns, and who it became."""
    became = []
    monkeypatch.setattr(os, 'geteuid', lambda: became[-1].uid if became else euid)
    monkeypatch.setattr(privileges, 'find_user', lambda text: {
        'nobody': User('nobody', 65534, 65534, ()), 'zope': User('zope', 77, 77, ()),
        'root': User('root', 0, 0, ())}[text])
    monkeypatch.setattr(privileges, 'become', became.append)
    monkeypatch.setattr(privileges, 'ask_as', lambda user, complaint: nobody_says)
    monkeypatch.setattr(privileges, '_missing_library', lambda user: None)
    warning = privileges.settle(wanted, lambda: complaint)
    return warning, [user.name for user in became]


def test_root_becomes_nobody_where_nobody_can_work(monkeypatch):
    assert settled(monkeypatch, None) == (None, ['nobody'])


def test_root_goes_on_with_a_warning_where_nobody_cannot(monkeypatch):
    warning, became = settled(monkeypatch, None, nobody_says='cannot write /srv')
    assert not became
    assert warning == (
        'going on as root, since user nobody cannot write /srv; to give up root, name a user with -u'
        ' who can work with these files (-u root keeps root without this warning)')


def test_root_goes_on_with_a_warning_where_there_is_no_nobody(monkeypatch):
    monkeypatch.setattr(os, 'geteuid', lambda: 0)

    def nobody_at_all(text):
        raise CannotStart('none')
    monkeypatch.setattr(privileges, 'find_user', nobody_at_all)
    assert 'since there is no user nobody' in privileges.settle(None, lambda: None)


def test_an_ordinary_user_stays_what_he_is(monkeypatch):
    assert settled(monkeypatch, None, euid=1000, complaint='cannot write') == (None, [])


def test_a_wanted_user_is_become(monkeypatch):
    assert settled(monkeypatch, 'zope') == (None, ['zope'])


def test_root_may_be_wanted(monkeypatch):
    assert settled(monkeypatch, 'root') == (None, [])


def test_who_is_that_user_already_may_say_so(monkeypatch):
    assert settled(monkeypatch, 'zope', euid=77) == (None, [])


def test_only_root_can_become_another(monkeypatch):
    with pytest.raises(CannotStart, match=r'only root can become another user \(zope\); start as that'):
        settled(monkeypatch, 'zope', euid=1000)


def test_a_wanted_user_who_could_not_work_is_an_error(monkeypatch):
    with pytest.raises(CannotStart, match=r'user zope cannot write /srv; change that \(chown\), or'):
        settled(monkeypatch, 'zope', complaint='cannot write /srv')


def test_a_library_that_the_user_cannot_read_is_worth_a_warning(monkeypatch, tmp_path):
    monkeypatch.setattr(privileges.errors, '__file__', str(tmp_path / 'absent' / '__init__.py'))
    assert privileges._missing_library(User('zope', 1, 1, ())).startswith(
        f'user zope cannot read {tmp_path}/absent: modules that are needed later')


# Files

def asked(question, *arguments):
    """What a user who is not root is told; asked in a process of its own where this one is root."""
    if os.geteuid() != 0:
        return getattr(privileges, question)(*arguments)
    printed = in_a_process(f'''
        become(find_user('nobody'))
        print({question}(*{arguments!r}))
    ''')
    return None if printed == 'None' else printed


@pytest.fixture
def owned(world):
    """A folder that the one who is asked may write."""
    folder = os.path.join(world, 'owned')
    os.mkdir(folder)
    os.chmod(folder, 0o777)
    return folder


@needs_nobody
class TestFiles:

    def test_a_new_file_needs_a_folder_that_can_be_written(self, owned):
        assert asked('may_serve', owned + '/Data.fs', False) is None
        os.chmod(owned, 0o555)
        assert asked('may_serve', owned + '/Data.fs', False) == f'cannot write the folder {owned}'

    def test_the_folder_counts_even_if_the_file_is_there(self, owned):
        with open(owned + '/Data.fs', 'w') as file:
            os.fchmod(file.fileno(), 0o666)
        assert asked('may_serve', owned + '/Data.fs', False) is None
        os.chmod(owned, 0o555)
        assert asked('may_serve', owned + '/Data.fs', False) == f'cannot write the folder {owned}'

    @pytest.mark.parametrize('suffix', ['', '.lock', '.tmp'])
    def test_files_that_are_there_must_be_writable(self, owned, suffix):
        path = f'{owned}/Data.fs{suffix}'
        with open(path, 'w') as file:
            os.fchmod(file.fileno(), 0o444)
        assert asked('may_serve', owned + '/Data.fs', False) == f'cannot write {path}'

    def test_reading_is_enough_for_a_server_that_only_reads(self, owned):
        with open(owned + '/Data.fs', 'w') as file:
            os.fchmod(file.fileno(), 0o444)
        os.chmod(owned, 0o555)
        assert asked('may_serve', owned + '/Data.fs', True) is None
        os.chmod(owned + '/Data.fs', 0o000)
        assert asked('may_serve', owned + '/Data.fs', True) == f'cannot read {owned}/Data.fs'

    def test_blobs_need_a_folder_that_can_be_written_or_made(self, owned):
        blobs = owned + '/Data.fs.blobs'
        assert asked('may_keep_blobs', blobs, False) is None
        os.chmod(owned, 0o555)
        assert asked('may_keep_blobs', blobs, False) == f'cannot write the folder {owned}'
        os.mkdir(blobs)
        os.chmod(blobs, 0o777)
        assert asked('may_keep_blobs', blobs, False) is None
        os.mkdir(blobs + '/tmp')
        os.chmod(blobs + '/tmp', 0o555)
        assert asked('may_keep_blobs', blobs, False) == f'cannot write the folder {blobs}/tmp'
        os.chmod(blobs, 0o555)
        assert asked('may_keep_blobs', blobs, True) is None
        os.chmod(blobs, 0o000)
        assert asked('may_keep_blobs', blobs, True) == f'cannot read {blobs}'
        os.chmod(blobs, 0o700)

    def test_a_folder_out_of_reach_cannot_be_written(self, owned, world):
        os.chmod(world, 0o700)
        if os.geteuid() != 0:
            os.chmod(world, 0o600)
        assert asked('may_serve', owned + '/Data.fs', False) == f'cannot write the folder {owned}'
        os.chmod(world, 0o700)

    def test_a_log_may_be_made_or_written(self, owned):
        path = owned + '/log'
        assert asked('may_write', [path]) is None
        with open(path, 'w') as file:
            os.fchmod(file.fileno(), 0o444)
        assert asked('may_write', [path]) == f'cannot write {path}'
        os.chmod(owned, 0o555)
        assert asked('may_write', [owned + '/other']) == f'cannot write the folder {owned}'
