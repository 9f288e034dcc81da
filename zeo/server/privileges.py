"""Giving up root: which user the server becomes, and what a user may do with its files.

The rule: a user who is named is obeyed, or the server does not start.  Without a name, root becomes
``nobody`` where that works, and stays root where it does not.  Whether it works is not computed from
owners and modes but tried, by a child process that has given up root already; so access control lists,
capabilities and containers have their say.

This module must be used before threads are started: they could not be relied on to follow.
"""

import os
import pwd
from collections.abc import Callable
from collections.abc import Iterable
from typing import NamedTuple

from zeo import errors
from zeo.server.options import CannotStart

#: Says what the current user cannot do, as the end of a sentence ("cannot write ..."), or None.
Complaint = Callable[[], str | None]


class User(NamedTuple):
    """A user with all groups, as the kernel knows them."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]


def find_user(text: str) -> User:
    """The user with this name or number.

    A number that no account has gets the group of ``nobody``, and no others.
    """
    try:
        account = pwd.getpwnam(text)
    except KeyError:
        if not (text.isascii() and text.isdigit()):
            raise CannotStart(
                f'there is no user {text!r}; give the name or the number of one with -u') from None
        # The highest number is -1 to the kernel: "leave it as it is".
        if len(text) > 10 or int(text) >= 2 ** 32 - 1:
            raise CannotStart(f'{text} is too high for the number of a user') from None
        try:
            account = pwd.getpwuid(int(text))
        except KeyError:
            group = _group_of_nobody()
            return User(text, int(text), group, (group,))
    return User(account.pw_name, account.pw_uid, account.pw_gid,
                tuple(os.getgrouplist(account.pw_name, account.pw_gid)))


def _group_of_nobody() -> int:
    try:
        return pwd.getpwnam('nobody').pw_gid
    except KeyError:
        return 65534  # what the kernel shows in place of a group that it cannot


def become(user: User) -> None:
    """Give up root for good, groups first: afterwards it is too late for them."""
    try:
        os.setgroups(user.groups)
        os.setgid(user.gid)
        os.setuid(user.uid)
    except OSError as error:
        raise CannotStart(
            f'cannot become user {user.name}: {error.strerror}; start as that user, without -u'
        ) from None
    assert os.getresuid() == (user.uid,) * 3 and os.getresgid() == (user.gid,) * 3
    assert set(os.getgroups()) <= {user.gid, *user.groups}


def settle(wanted: str | None, complaint: Complaint) -> str | None:
    """Become the user that is `wanted`, or ``nobody`` by default.

    Returns a warning for the log, or None.  Raises `CannotStart` if a wanted user cannot be, or
    could not work, that is, if `complaint` called as that user returns something.
    """
    root = os.geteuid() == 0
    if wanted is not None:
        user = find_user(wanted)
        if root and user.uid != 0:
            become(user)
        elif user.uid != os.geteuid():
            raise CannotStart(
                f'only root can become another user ({user.name}); start as that user, without -u')
        if problem := complaint():
            raise CannotStart(
                f'user {user.name} {problem}; change that (chown), or choose another user with -u')
        return _missing_library(user)
    if not root:
        return None
    try:
        user = find_user('nobody')
    except CannotStart:
        reason: str | None = 'there is no user nobody'
    else:
        reason = ask_as(user, complaint)
        if reason is None:
            become(user)
            return _missing_library(user)
        reason = f'user nobody {reason}'
    return (f'going on as root, since {reason}; to give up root, name a user with -u who can work with'
            ' these files (-u root keeps root without this warning)')


def _missing_library(user: User) -> str | None:
    """What is imported already works on; so this is worth a warning and no more."""
    for module in os, errors:
        if not os.access(str(module.__file__), os.R_OK):
            return (f'user {user.name} cannot read {os.path.dirname(str(module.__file__))}: modules'
                    ' that are needed later will not be found; install Python and zeo where that user'
                    ' can read them, or choose another user with -u')
    return None


def ask_as(user: User, complaint: Complaint) -> str | None:
    """What `complaint` returns when `user` asks it; this process stays as it is."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        answer = 'could not be asked'
        try:
            become(user)
            answer = complaint() or ''
        except CannotStart as error:
            answer = f'is out of reach ({error})'
        finally:
            os.write(writing, os.fsencode(answer))
            os._exit(0)
    os.close(writing)
    with open(reading, 'rb') as pipe:
        answer = os.fsdecode(pipe.read())
    os.waitpid(child, 0)
    return answer or None


# What a user may do with files.  All of these ask for the effective user; each is a `Complaint`.

def may_write(paths: Iterable[str]) -> str | None:
    """These files can be written, or else made."""
    for path in map(os.path.abspath, paths):
        if os.path.lexists(path):
            if not _access(path, os.W_OK):
                return f'cannot write {path}'
        elif problem := may_make_files_in(os.path.dirname(path)):
            return problem
    return None


def may_make_files_in(folder: str) -> str | None:
    """New files can be made in this folder."""
    if _access(folder, os.W_OK | os.X_OK):
        return None
    return f'cannot write the folder {folder}'


def may_serve(path: str, read_only: bool) -> str | None:
    """A FileStorage's file can be served: it and what FileStorage keeps beside it.

    The folder counts even if all files are there, as packing and saving the index make new ones.
    """
    if read_only:
        return None if _access(path, os.R_OK) else f'cannot read {path}'
    if problem := may_make_files_in(os.path.dirname(path)):
        return problem
    for suffix in '', '.lock', '.tmp':
        if os.path.lexists(path + suffix) and not _access(path + suffix, os.R_OK | os.W_OK):
            return f'cannot write {path + suffix}'
    return None


def may_keep_blobs(folder: str, read_only: bool) -> str | None:
    """Blobs can be kept in this folder, or it can be made."""
    if read_only:
        return None if _access(folder, os.R_OK | os.X_OK) else f'cannot read {folder}'
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    for each in folder, os.path.join(folder, 'tmp'):
        if os.path.lexists(each) and (problem := may_make_files_in(each)):
            return problem
    return None


def _access(path: str, mode: int) -> bool:
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)
