"""The configuration file of the server (ZConfig): a file in, the values of options out.

What may stand in the file is in schema.xml.  The sections and keys of ZEO 6.2's server are understood;
those of them that have no meaning here are told.  Reading opens no storage and no log.
"""

import os
from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import ZConfig
import ZODB.config
from ZConfig.cfgparser import ZConfigParser
from ZConfig.loader import ConfigLoader
from ZConfig.matcher import SchemaMatcher

SCHEMA = Path(__file__).with_name('schema.xml')

#: Keys of ZEO's and zdaemon's that are understood, and have no meaning here; each with the reason.
WITHOUT_MEANING = {
    ('zeo', 'msgpack'): 'clients are spoken to in the protocol that all of them know',
    ('runner', 'program'): '-d starts this server',
    ('runner', 'python'): '-d starts this server',
    ('runner', 'zdrun'): '-d starts zdaemon as it is installed',
    ('runner', 'daemon'): 'the option -d says so',
    ('runner', 'start-test-program'): '-d waits until the server is ready',
    ('runner', 'start-timeout'): '-d waits until the server is ready',
    ('runner', 'stop-timeout'): 'a server ends when what is being finished is finished',
    ('runner', 'hang-around'): 'zdaemon ends with the server',
    ('runner', 'default-to-interactive'): 'there is no interactive mode',
    ('runner', 'logfile'): 'the server logs where <eventlog> says',
    ('runner', 'prompt'): 'there is no interactive mode',
    ('runner', 'eventlog'): 'the server logs where <eventlog> outside of <runner> says',
}


class Mistake(Exception):
    """What is wrong with the file, in one line that begins with ``FILE:LINE:``."""


@dataclass(frozen=True)
class StorageSection:
    """Where a storage comes from: a section of the configuration file."""

    name: str
    kind: str  #: such as ``filestorage``
    place: str  #: ``FILE:LINE`` of its beginning
    factory: Any  #: its ``open()`` returns the storage

    @property
    def file(self) -> Any:
        """The values of a ``<filestorage>``; None for other kinds."""
        return self.factory.config if isinstance(self.factory, ZODB.config.FileStorage) else None

    def files(self) -> Iterator[Any]:
        """The values of every ``<filestorage>`` that this is, or that is in it, however deep."""
        yield from _files(self.factory)

    def __str__(self) -> str:
        return f'{self.place}: <{self.kind} {self.name}>'


def read(path: str) -> dict[str, Any]:
    """The values that the file gives to options, by their names; those it does not give are left out.

    Raises `Mistake`.
    """
    loader = _Loader(ZConfig.loadSchema(str(SCHEMA)))
    try:
        open(path, 'rb').close()  # ZConfig has longer words for a file that is not there
        found, _ = loader.loadURL(Path(path).absolute().as_uri())
    except Exception as error:  # of ZConfig, of a file, or of whatever a package of %import does
        raise Mistake(_in_words(error, path, loader)) from None
    return _options(found, loader)


def _files(factory: Any) -> Iterator[Any]:
    config = getattr(factory, 'config', None)
    if isinstance(factory, ZODB.config.FileStorage):
        yield config
    elif config is not None:
        for value in (getattr(config, name) for name in config.getSectionAttributes()):
            for inner in value if isinstance(value, list) else [value]:
                yield from _files(inner)


def _in_words(error: Exception, path: str, loader: '_Loader') -> str:
    """One line that begins with the place of the mistake, as exactly as it is known."""
    line, url = getattr(error, 'lineno', None), getattr(error, 'url', None)
    if line is not None and line > 0 and url:
        place = f'{_path(url)}:{line}'
    else:
        place = loader.place() or path
    match error:
        case ZConfig.DataConversionError():
            text = str(error.exception)
        case ZConfig.ConfigurationError():
            text = error.message
        case OSError() if error.strerror:
            text = error.strerror
        case _:
            text = f'{type(error).__name__}: {error}'
    return f'{place}: {" ".join(text.split())}'


def _path(url: str) -> str:
    """The file that a URL names, relative to the current folder if it is in there."""
    path = url2pathname(urlsplit(url).path)
    inside = os.path.relpath(path)
    return path if inside.startswith(os.pardir) else inside


def _options(found: Any, loader: '_Loader') -> dict[str, Any]:
    zeo, runner = _given(found.zeo), _given(found.runner)
    options = {name: value for name, value in zeo.items() if name not in ('pid_filename', 'msgpack', 'ssl')}
    options |= {f'tls_{name}': value for name, value in zeo.get('ssl', {}).items()}
    if 'pid_filename' in zeo:
        options.setdefault('pid_file', zeo['pid_filename'])
    if 'user' in runner:
        options.setdefault('user', runner['user'])
    options['runner'] = {name: value for name, value in runner.items()
                         if name != 'user' and ('runner', name.replace('_', '-')) not in WITHOUT_MEANING}
    if found.eventlog is not None:
        options['log'] = found.eventlog
    options['sections'] = _sections(found.storages, loader)
    names = {'pid-filename': 'pid_file', 'ssl': 'tls_certificate'}
    options['places'] = {names.get(key, key.replace('-', '_')): place
                         for kind, key, place in loader.keys if kind in ('zeo', 'runner')}
    listening = [place for kind, key, place in loader.keys if (kind, key) == ('zeo', 'address')]
    options['places'] |= zip(map(str, zeo.get('addresses', ())), listening)
    options['notices'] = tuple(
        f'{place}: {key} in <{kind}> has no meaning here: {WITHOUT_MEANING[kind, key]}'
        for kind, key, place in loader.keys if (kind, key) in WITHOUT_MEANING)
    return options


def _given(section: Any) -> Mapping[str, Any]:
    """The keys of a section that are given."""
    if section is None:
        return {}
    return {name: value for name in section.getSectionAttributes()
            if (value := getattr(section, name)) not in (None, [])}


def _sections(factories: list[Any], loader: '_Loader') -> tuple[StorageSection, ...]:
    """The sections of storages, named; one without a name is ``'1'``, as with ZEO."""
    sections: dict[str, StorageSection] = {}
    for factory, (kind, name, place) in zip(factories, loader.storages, strict=True):
        section = StorageSection(name or '1', kind, place, factory)
        if section.name in sections:
            raise Mistake(f'{place}: two storages have the name {section.name!r}; give each section a name of'
                          f' its own, as in <{kind} main>')
        sections[section.name] = section
    return tuple(sections.values())


class _Loader(ConfigLoader):  # type: ignore[misc]
    """ZConfig's, which also notes where it finds what."""

    def __init__(self, schema: Any) -> None:
        super().__init__(schema)
        self._parsers: list[_Parser] = []
        #: Kind of section, key and place of each key.
        self.keys: list[tuple[str, str, str]] = []
        #: Kind, name and place of each section of a storage that is to be served.
        self.storages: list[tuple[str, str | None, str]] = []

    def place(self) -> str | None:
        """``FILE:LINE`` that is being read, or that could not be read; None if all has been read."""
        return self._parsers[-1].place() if self._parsers else None

    def _parse_resource(self, matcher: Any, resource: Any, defines: Any = None) -> None:
        self._parsers.append(_Parser(resource, self, defines))
        self._parsers[-1].parse(matcher)
        self._parsers.pop()  # not if that fails: `place` is where

    def startSection(self, parent: Any, type_: str, name: str | None) -> Any:
        matcher = super().startSection(parent, type_, name)
        place = self.place() or ''
        if isinstance(parent, SchemaMatcher):
            if type_ not in ('zeo', 'runner', 'eventlog'):
                self.storages.append((type_, name, place))
        else:
            self.keys.append((parent.type.name, type_, place))
        return matcher


class _Parser(ZConfigParser):  # type: ignore[misc]
    """ZConfig's, which also says where it is."""

    def place(self) -> str:
        return f'{_path(self.url)}:{self.lineno}'

    def handle_key_value(self, section: Any, rest: str) -> None:
        super().handle_key_value(section, rest)
        self.context.keys.append((section.type.name, rest.split()[0].lower(), self.place()))
