"""Finds the class of a record that is in conflict, and runs no code to find out that it is not needed.

Who imports a module runs it.  So a module is imported for a record only if its source, which is read and
not run, says that the class is there and can resolve conflicts; in any other case the class is taken
from a module that somebody else has imported, or not at all.
"""

import ast
import functools
import importlib
import importlib.util
import logging
import sys
from collections.abc import Iterator
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from typing import Any

logger = logging.getLogger(__name__)

#: What a class has that can resolve conflicts, see `ZODB.ConflictResolution`.
METHOD = '_p_resolveConflict'

#: How many classes and names are followed from one class to its bases, wherever these are.
_STEPS = 100


@functools.lru_cache(maxsize=1000)
def resolving(module: str, name: str) -> type | None:
    """The class of this name if it defines ``_p_resolveConflict``; its module is imported if need be.

    ``name`` is that of a class at the top level of the module.  What was found, or not found, is
    remembered until the process ends.
    """
    try:
        if module not in sys.modules and not _says_so(module, name, set()):
            return None
        found = vars(importlib.import_module(module)).get(name)
    except (Exception, SystemExit) as error:  # a module may raise anything
        logger.warning('%s.%s: conflicts cannot be resolved: %s: %s', module, name,
                       type(error).__name__, error)
        return None
    return found if _resolves(found) else None


def _resolves(found: Any) -> bool:
    return isinstance(found, type) and any(METHOD in vars(each) for each in found.__mro__)


# ---- reading sources ------------------------------------------------------------------


def _says_so(module: str, name: str, seen: set[tuple[str, str]]) -> bool:
    """Whether the class can resolve conflicts, as far as sources tell."""
    if (module, name) in seen or len(seen) > _STEPS:
        return False
    seen.add((module, name))
    if module in sys.modules:
        return _resolves(getattr(sys.modules[module], '__dict__', {}).get(name))
    found = _tree(module)
    if found is None:
        return False
    tree, package = found
    imported = dict(_imports(tree, package))
    for each in _statements(tree):
        match each:
            case ast.ClassDef() if each.name == name:
                if any(METHOD in _bound(inner) for inner in each.body):
                    return True
                places = [_place(module, base, imported) for base in each.bases]
            case ast.ImportFrom() if name in imported and _binds(each, name):
                places = [_split(imported[name])]
            case ast.ImportFrom(names=[ast.alias(name='*')]):
                places = [(_absolute(each, package), name)]
            case ast.Assign() if name in _bound(each):
                places = [_place(module, each.value, imported)]
            case _:
                continue
        if any(_says_so(*place, seen) for place in places if place is not None):
            return True
    return False


def _statements(tree: ast.Module) -> Iterator[ast.stmt]:
    """Those that are run when the module is imported, also under ``if`` and ``try``."""
    left: list[ast.AST] = list(reversed(tree.body))
    while left:
        each = left.pop()
        if isinstance(each, ast.stmt):
            yield each
        if isinstance(each, ast.If | ast.Try | ast.ExceptHandler | ast.With):
            left.extend(ast.iter_child_nodes(each))


def _bound(statement: ast.stmt) -> Sequence[str]:
    """The names that a definition or an assignment gives."""
    match statement:
        case ast.FunctionDef(name=name):
            return [name]
        case ast.Assign(targets=targets):
            return [target.id for target in targets if isinstance(target, ast.Name)]
    return []


def _imports(tree: ast.Module, package: str) -> Iterator[tuple[str, str]]:
    """Names that are imported, and the dotted names of what they stand for."""
    for each in _statements(tree):
        if isinstance(each, ast.Import):
            for alias in each.names:
                first = alias.name.partition('.')[0]
                yield (alias.asname, alias.name) if alias.asname else (first, first)
        elif isinstance(each, ast.ImportFrom):
            for alias in each.names:
                yield alias.asname or alias.name, f'{_absolute(each, package)}.{alias.name}'


def _binds(statement: ast.ImportFrom, name: str) -> bool:
    return any((alias.asname or alias.name) == name for alias in statement.names)


def _absolute(statement: ast.ImportFrom, package: str) -> str:
    try:
        return importlib.util.resolve_name('.' * statement.level + (statement.module or ''), package)
    except ImportError:
        return ''


def _place(module: str, expression: ast.expr, imported: dict[str, str]) -> tuple[str, str] | None:
    """Module and name of what a (dotted) name in a module stands for."""
    text = ast.unparse(expression)
    first, dot, rest = text.partition('.')
    if first in imported:
        return _split(imported[first] + dot + rest)
    return (module, text) if text.isidentifier() else None


def _split(dotted: str) -> tuple[str, str]:
    module, _, name = dotted.rpartition('.')
    return module, name


def _tree(module: str) -> tuple[ast.Module, str] | None:
    """The module's source, parsed, and the name of its package; None if there is no source."""
    spec = _spec(module)
    if spec is None or not spec.has_location or not str(spec.origin).endswith('.py'):
        return None
    with open(str(spec.origin), 'rb') as file:
        return ast.parse(file.read()), spec.parent or ''


def _spec(module: str) -> ModuleSpec | None:
    """As `importlib.util.find_spec`, which would import the packages around the module."""
    path: Sequence[str] | None = None
    spec = None
    name = ''
    for part in module.split('.'):
        name = f'{name}.{part}' if name else part
        spec = None
        if name in sys.modules and name != module:
            path = getattr(sys.modules[name], '__path__', [])
            continue
        for finder in sys.meta_path:
            spec = finder.find_spec(name, path)
            if spec is not None:
                break
        if spec is None:
            return None
        path = spec.submodule_search_locations or []
        if spec.origin is None and name != module:
            path = getattr(importlib.import_module(name), '__path__', [])  # a namespace: no code of its own
    return spec
