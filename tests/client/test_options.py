"""Options of a storage that nobody can mean."""

import inspect
import math
import os
from pathlib import Path
from typing import Any

import pytest

from zeo.client.options import CHECKS
from zeo.client.options import LARGEST_CACHE
from zeo.client.options import check_options
from zeo.ClientStorage import ClientStorage

NO_TEXT = [None, 5, b'1', '\ud800']
NO_FLAG = ['no', None, 1.5]
NO_PATH = [5, '', b'', 'a\0b', '.\0']
NO_PAUSE = [None, '5', True, -1, 0, math.nan, math.inf]
WRONG: dict[str, list[Any]] = {
    'storage': NO_TEXT, 'name': NO_TEXT, 'client_label': NO_TEXT[1:], 'client': NO_TEXT[1:],
    'ssl_server_hostname': NO_TEXT[1:],
    'cache_size': [None, '20MB', 1.5e6, True, -1, LARGEST_CACHE + 1],
    'wait_timeout': ['5', True, -1, math.nan, -math.inf], 'min_disconnect_poll': NO_PAUSE, 'max_disconnect_poll': NO_PAUSE,
    'wait': NO_FLAG, 'wait_for_server_on_startup': ['no', 1.5], 'read_only': NO_FLAG, 'read_only_fallback': NO_FLAG,
    'server_sync': NO_FLAG, 'start_over': NO_FLAG, 'shared_blob_dir': NO_FLAG,
    'var': NO_PATH, 'cache': NO_PATH, 'blob_dir': NO_PATH,
    'blob_cache_size': ['1MB', True, -1, 1e9], 'blob_cache_size_check': [None, '10', -1, 100, 12.5]}

RIGHT: dict[str, list[Any]] = {
    'storage': ['1', '', 'a/b', 'ä'], 'name': ['', 'shop'], 'client_label': [None, '', 'w\n'],
    'client': [None, '', '../up'], 'ssl_server_hostname': [None, 'db'],
    'cache_size': [0, 1, LARGEST_CACHE], 'wait_timeout': [None, 0, 0.5, math.inf],
    'min_disconnect_poll': [1, 0.001], 'max_disconnect_poll': [1, 1e300],
    'wait': [True, 0], 'wait_for_server_on_startup': [None, False], 'read_only': [True], 'read_only_fallback': [True],
    'server_sync': [1], 'start_over': [True], 'shared_blob_dir': [False],
    'cache': [None, 'x.zec', b'x.zec', Path('x.zec')], 'var': [None, '.', Path('/var'), b'var'], 'blob_dir': [None, 'blobs', Path('blobs')],
    'blob_cache_size': [None, 0, 10**12], 'blob_cache_size_check': [0, 10, 99]}


@pytest.mark.parametrize('name, value', [(name, value) for name, values in WRONG.items() for value in values])
def test_what_nobody_can_mean_is_refused_by_the_options_name(name: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=f'^{name} is .*, not {"." if value == "" else ""}'):
        check_options({name: value})


@pytest.mark.parametrize('name, value', [(name, value) for name, values in RIGHT.items() for value in values])
def test_what_can_be_meant_is_accepted(name: str, value: Any) -> None:
    check_options({name: value, 'something else': object()})


def test_all_options_are_looked_at_and_their_defaults_are_right() -> None:
    parameters = inspect.signature(ClientStorage).parameters
    defaults = {name: each.default for name, each in parameters.items()}
    check_options(defaults)
    assert parameters.keys() - CHECKS.keys() == {'addr', 'ssl'}  # which are looked at elsewhere
    assert CHECKS.keys() == WRONG.keys() == RIGHT.keys()


@pytest.mark.parametrize('options', [
    {'cache_size': '20MB'}, {'wait_timeout': '5'}, {'blob_cache_size': -1}, {'cache': 5}, {'cache': 'a\0b'},
    {'cache': ''}, {'cache': 'missing/x.zec'}, {'ssl': 5}, {'cache': '.', 'blob_dir': 'blobs'}])
def test_a_storage_that_cannot_be_opened_leaves_nothing_open(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    monkeypatch.chdir(tmp_path)
    before = set(os.listdir('/proc/self/fd'))
    kept: BaseException | None = None
    try:
        ClientStorage('socket', **options)
    except Exception as error:
        kept = error  # with its traceback, in which everything lives on that was not closed
    assert kept is not None
    assert set(os.listdir('/proc/self/fd')) == before
