"""From what the options name to open storages: a file, a module's attribute, or a section of a file.

Whatever goes wrong is a `CannotStart` that names the file, the ``-S`` or the section; the details are
in the debug log.
"""

import contextlib
import errno
import functools
import importlib
import importlib.util
import logging
import operator
import os
import sys
from collections.abc import Callable
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING
from typing import Any

from ZODB.blob import LAYOUT_MARKER
from ZODB.blob import FilesystemHelper
from ZODB.FileStorage import FileStorage
from ZODB.FileStorage.FileStorage import packed_version
from ZODB.FileStorage.format import CorruptedError
from ZODB.interfaces import IMVCCStorage
from ZODB.POSException import StorageError
from zc.lockfile import LockError

from zeo.server.backing import sqlstate
from zeo.server.options import CannotStart
from zeo.server.privileges import may_serve
from zeo.server.values import StorageName

if TYPE_CHECKING:
    from zeo.server.configuration import StorageSection

logger = logging.getLogger(__name__)


def check_place(path: str) -> None:
    """Raise `CannotStart` if there is no folder for this (absolute) path, or a device or a pipe there.

    To open a pipe would wait for somebody who writes to it.
    """
    folder = os.path.dirname(path)
    if not os.path.exists(folder):
        raise CannotStart(f'the folder {folder} does not exist; create it, or choose another file')
    if not os.path.isdir(folder):
        raise CannotStart(f'{folder} is not a folder; choose another file')
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise CannotStart(f'{path} is not an ordinary file; choose another one')


def open_file(path: str, read_only: bool, blob_dir: str | None = None) -> Any:
    """The FileStorage of this (absolute) path; it and the folder for its blobs are created if need be."""
    if blob_dir is not None:
        _prepare_blobs(blob_dir, read_only)
        logger.info('%s: blobs are in %s', path, blob_dir)
    try:
        if not read_only and os.path.exists(path) and os.path.getsize(path) == len(packed_version):
            # It has no transaction yet.  FileStorage writes an index also then, and warns that it ignores it.
            with contextlib.suppress(OSError):
                os.unlink(path + '.index')
        return FileStorage(path, read_only=read_only, blob_dir=blob_dir)
    except Exception as error:
        logger.debug('%s: cannot be opened', path, exc_info=True)
        raise CannotStart(_why(error, path, read_only)) from None


def _prepare_blobs(folder: str, read_only: bool) -> None:
    """Make the folder a place for blobs; whatever is wrong with it is not to be blamed on the file."""
    try:
        if read_only and not os.path.isdir(folder):
            raise FileNotFoundError(errno.ENOENT, 'it does not exist')
        marker = os.path.join(folder, LAYOUT_MARKER)
        if os.path.exists(marker):
            with open(marker) as file:
                layout = file.read().strip()
            if layout not in ('bushy', 'lawn'):
                raise OSError(errno.EINVAL, f'it has the layout {layout!r:.30}, as caches of clients have')
        helper = FilesystemHelper(folder)
        helper.create()
        if not read_only and not os.access(helper.temp_dir, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, f'{helper.temp_dir} is not writable')
    except OSError as error:
        raise CannotStart(f'the folder for blobs {folder} cannot be used: {error.strerror or error};'
                          ' choose another folder') from None


def _why(error: Exception, path: str, read_only: bool) -> str:
    match error:
        case LockError():
            return (f'{path} is in use by another process{_holder(path)}; stop it, or choose another'
                    ' file')
        case FileNotFoundError() if read_only:
            return f'{path} does not exist; start once without --read-only to create it'
        case IsADirectoryError():
            return f'{path} is a folder; give the name of a file'
        case OSError(errno=errno.EACCES | errno.EPERM | errno.EROFS, filename=name):
            return (f'{name or path}: {error.strerror}; start as a user who may, give the file and its'
                    ' folder to this one (chown), or choose another file')
        case OSError():
            return f'cannot open {path}: {error.strerror or error}'
        case StorageError() | CorruptedError() | EOFError():
            return (f'{path} is damaged, or is not a FileStorage ({_short(error)}); restore it from a'
                    ' backup, or copy what can be read of it with python -m ZODB.fsrecover')
    return f'cannot open {path}: {_short(error)}'


def _holder(path: str) -> str:
    """The process that has the lock file, as far as it says."""
    try:
        with open(path + '.lock', encoding='ascii', errors='replace') as file:
            number = file.read(100).strip(' \n\0')
    except OSError:
        return ''
    return f' ({number})' if number.isdigit() else ''


def open_named(name: StorageName) -> Any:
    """The storage that ``-S`` names; its module is loaded only once, however it is named."""
    with _blaming(name, 'cannot be loaded'):
        module = _load(name)
    with _blaming(name, 'does not work'):
        try:
            found = operator.attrgetter(name.attribute)(module)
        except AttributeError as error:
            raise CannotStart(f'{name}: {error}') from None
        if not is_storage(found) and callable(found):
            found = found()
    if not is_storage(found):
        raise CannotStart(
            f'{name}: {name.attribute} is neither a storage nor something that returns one, but'
            f' {_short_repr(found)}')
    return _fit(name, found)


class _blaming:
    """Whatever somebody's module raises becomes a `CannotStart` that names the ``-S``."""

    def __init__(self, name: StorageName, what: str) -> None:
        self.name, self.what = name, what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        # A module that calls sys.exit() must not end us without a word.
        if isinstance(error, Exception | SystemExit) and not isinstance(error, CannotStart):
            logger.debug('%s: %s', self.name, self.what, exc_info=error)
            raise CannotStart(
                f'{self.name} {self.what}: {_short(error)} (-D shows where)') from None


def open_section(section: 'StorageSection') -> Any:
    """The storage of a section of the configuration file."""
    if problem := _look_for_history(section):
        raise CannotStart(problem)
    try:
        storage = _open(section)
    except Exception as error:
        logger.debug('%s: cannot be opened', section, exc_info=True)
        file = section.file
        if file is not None:
            why = _why(error, os.path.abspath(file.path), bool(file.read_only))
        else:
            why = f'{_short(error)} (-D shows where)'
        raise CannotStart(f'{section}: {why}') from None
    return _fit(section, storage)


def _open(section: 'StorageSection') -> Any:
    """Open it, once more if another server has been making the same tables at the same moment."""
    for _ in range(2):
        try:
            return section.factory.open()
        except Exception as error:
            if sqlstate(error) not in _MADE_TWICE:
                raise
            logger.info('%s: once more: %s', section, _short(error))
    return section.factory.open()


#: PostgreSQL's words for it: unique_violation, duplicate_table, duplicate_function, duplicate_object,
#: internal_error ("tuple concurrently updated").
_MADE_TWICE = ('23505', '42P07', '42723', '42710', 'XX000')


def _look_for_history(section: 'StorageSection') -> str | None:
    """What `gateway.fronted` would say, before tables are made that are of no use."""
    if section.kind == 'relstorage' and not getattr(section.factory.config, 'keep_history', True):
        from zeo.server import relational

        return f'{section}: {relational.NEEDS_HISTORY}'
    return None


def _fit(source: 'StorageName | StorageSection', storage: Any) -> Any:
    """The storage; `CannotStart` if it is of a kind that cannot be served."""
    if not IMVCCStorage.providedBy(storage):
        return storage
    from zeo.server import gateway  # few are of that kind

    try:
        gateway.backing_of(storage)
    except ValueError as error:
        storage.close()
        raise CannotStart(f'{source}: {error}') from None
    return storage


def look_for(source: 'StorageName | StorageSection') -> str | None:
    """What keeps a storage from being opened, as far as can be seen without opening or importing it."""
    if isinstance(source, StorageName):
        try:
            with _blaming(source, 'cannot be loaded'):
                _find(source)
        except CannotStart as error:
            return str(error)
        return None
    if problem := _look_for_history(source):
        return problem
    for file in source.files():
        if problem := look_for_file(os.path.abspath(file.path), bool(file.read_only)):
            return f'{source}: {problem}'
    return None


def look_for_file(path: str, read_only: bool) -> str | None:
    """What keeps the FileStorage of this (absolute) path from being opened, or made."""
    try:
        check_place(path)
        if os.path.exists(path) or read_only:
            with open(path, 'rb') as file:
                if (begin := file.read(len(packed_version))) not in (b'', packed_version):
                    raise CorruptedError(f'it begins with {begin!r}')
    except CannotStart as error:
        return str(error)
    except Exception as error:
        return _why(error, path, read_only)
    problem = may_serve(path, read_only)
    return problem and f'this user {problem}'


def is_storage(found: object) -> bool:
    """Whether it can be served; a class that makes storages cannot."""
    return not isinstance(found, type) and all(
        hasattr(found, name) for name in ('loadBefore', 'tpc_begin', 'tpc_vote', 'tpc_finish', 'close'))


def _find(name: StorageName) -> str | None:
    """The path of the module's file if it is named by its path; None if it is to be imported.

    Raises `CannotStart` or `ModuleNotFoundError` if there is no such module.
    """
    text = name.module
    if os.sep not in text and not text.endswith('.py'):
        # `python -m` looks into the current folder; so do we, when started otherwise.
        if not {'', os.getcwd()} & set(sys.path):
            sys.path.append(os.getcwd())
        top = text.partition('.')[0]
        if top not in sys.modules and importlib.util.find_spec(top) is None:
            raise ModuleNotFoundError(f'No module named {top!r}')
        return None
    path = os.path.abspath(text if text.endswith('.py') else text + '.py')
    if not os.path.exists(path):
        raise CannotStart(f'{name}: there is no file {path}; give the path of a Python module')
    return path


def _load(name: StorageName) -> ModuleType:
    """The module of a dotted name, or in the file of a path, with or without ``.py``."""
    path = _find(name)
    if path is None:
        return importlib.import_module(name.module)
    for loaded in list(sys.modules.values()):
        if getattr(loaded, '__file__', None) == path:
            return loaded
    folder, file = os.path.split(path)
    # What the module imports may stand beside it; but it must not stand in the way of anything else.
    if folder not in sys.path:
        sys.path.append(folder)
    title = file.removesuffix('.py')
    if title in sys.modules or not title.isidentifier():
        title = f'{__name__}:{path}'
    spec = importlib.util.spec_from_file_location(title, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[title] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[title]
        raise
    return module


def open_all(openers: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """Open storages one after the other; if one cannot be opened, none stays open."""
    storages: dict[str, Any] = {}
    try:
        for name, opener in openers.items():
            storages[name] = opener()
    except BaseException:
        close_all(storages)
        raise
    return storages


def openers(sources: 'Sequence[StorageName | StorageSection]') -> dict[str, Callable[[], Any]]:
    """For each ``-S`` and each section, how to open it."""
    return {source.name: functools.partial(open_named, source) if isinstance(source, StorageName)
            else functools.partial(open_section, source) for source in sources}


def close_all(storages: dict[str, Any]) -> None:
    """Close each storage once, whatever happens to the others."""
    for storage in {id(storage): storage for storage in storages.values()}.values():
        try:
            storage.close()
        except Exception:
            logger.exception('%s: cannot be closed', describe(storage))


def describe(storage: Any) -> str:
    """Class and name, such as ``FileStorage /srv/Data.fs``."""
    kind = type(storage).__name__
    try:
        name = ' '.join(str(storage.getName()).split())
    except Exception:  # a name is for reading; a storage without one is served all the same
        name = ''
    # RelStorage's own name for itself is a description of its parts, with the dsn.
    return f'{kind} {name}' if name and name != kind and not name.startswith(f'{kind}: <') else kind


def _short(error: BaseException) -> str:
    text = ' '.join(str(error).split())
    kind = type(error).__name__
    return f'{kind}: {text}' if text else kind


def _short_repr(found: object) -> str:
    text = ' '.join(repr(found).split())
    return text if len(text) < 80 else f'an object of {type(found).__name__}'
