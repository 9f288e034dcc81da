"""Classes that resolve conflicts are found, and nothing is imported that does not say that it has one."""

import sys
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path

import pytest

from zeo.server.classes import resolving

Write = Callable[..., None]

HAS = 'class Counter:\n    def _p_resolveConflict(self, old, saved, new):\n        return new\n'


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Write the modules of an application, given by their paths; they are forgotten at the end."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def write(**sources: str) -> None:
        for name, source in sources.items():
            path = tmp_path / f'{name}.py'
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)

    resolving.cache_clear()
    yield write
    resolving.cache_clear()
    for name in set(sys.modules) - before:
        del sys.modules[name]


def imported(*names: str) -> list[str]:
    return [name for name in names if name in sys.modules]


@pytest.mark.parametrize('source', [
    HAS,
    HAS.replace('Counter', 'Base') + 'class Counter(Base): pass',
    HAS.replace('Counter', 'Base') + 'Counter = Base',
    'try:\n    import no_such_module_zeo\nexcept ImportError:\n    ' + HAS.replace('\n', '\n    '),
    'def merge(self, old, saved, new): return new\nclass Counter:\n    _p_resolveConflict = merge',
    'from BTrees.Length import Length\nclass Counter(Length): pass',
    'import BTrees.OOBTree\nclass Counter(BTrees.OOBTree.OOBTree): pass',
    'import BTrees.OOBTree as trees\nclass Counter(trees.OOBTree): pass',
    'from BTrees import OOBTree\nclass Counter(OOBTree.OOBTree): pass',
    'from zeo_test_base import Counter',
    'from zeo_test_base import Counter as Other\nclass Counter(Other): pass',
    'from zeo_test_base import *',
    'class Mixin: pass\nfrom zeo_test_base import Counter as Other\nclass Counter(Mixin, Other): pass',
])
def test_a_class_that_has_or_inherits_the_method_is_found(write: Write, source: str) -> None:
    write(zeo_test_shop=source, zeo_test_base=HAS)
    found = resolving('zeo_test_shop', 'Counter')
    assert found is not None and found is sys.modules['zeo_test_shop'].Counter


@pytest.mark.parametrize('source', [
    'class Counter: pass',
    'class Other: pass\nCounter = Other',
    'def Counter(): pass\nCounter._p_resolveConflict = None',
    'class Counter(Counter): pass',
    'from zeo_test_shop import Counter',
    'from zeo_test_shop import *',
    'from .... import Counter',
    'from zeo_test_nowhere import Counter',
    'import zeo_test_nowhere\nclass Counter(zeo_test_nowhere.Counter): pass',
    'class Counter(make()): pass',
    'class Outer:\n    ' + HAS.replace('\n', '\n    '),
    'def outer():\n    ' + HAS.replace('\n', '\n    '),
    '_p_resolveConflict',
    HAS + ')',
    '\0',
])
def test_a_module_without_such_a_class_is_not_imported(write: Write, source: str) -> None:
    write(zeo_test_shop=source + '\n')
    assert resolving('zeo_test_shop', 'Counter') is None
    assert not imported('zeo_test_shop', 'zeo_test_nowhere')


@pytest.mark.parametrize('module, name', [
    ('zeo_test_shop', 'Other'), ('zeo_test_shop', 'Counter._p_resolveConflict'), ('zeo_test_shop', ''),
    ('zeo_test_nowhere', 'Counter'), ('', 'Counter'), ('.', 'Counter'), ('.zeo_test_shop', 'Counter'),
    ('zeo_test_shop.py', 'Counter'), ('zeo_test_shop.Counter', '_p_resolveConflict'),
    ('../zeo_test_shop', 'Counter'), ('zeo_test_shop\0', 'Counter'), ('antigravity', 'Counter'),
    ('os', 'system'), ('builtins', 'object'), ('builtins', 'eval'), ('BTrees', 'OOBTree'),
    ('_ctypes', 'CFuncPtr'), ('zeo.server.classes', 'resolving')])
def test_other_names_are_nothing(write: Write, module: str, name: str) -> None:
    write(zeo_test_shop=HAS)
    before = set(sys.modules)
    assert resolving(module, name) is None
    assert set(sys.modules) == before


def test_what_is_imported_is_asked_itself(write: Write) -> None:
    """It may have made its classes in any way."""
    write(zeo_test_shop='Counter = type("Counter", (), {"_p_resolveConflict": print})\nCount = 1')
    assert resolving('zeo_test_shop', 'Counter') is None
    resolving.cache_clear()
    __import__('zeo_test_shop')
    assert resolving('zeo_test_shop', 'Counter') is sys.modules['zeo_test_shop'].Counter
    assert resolving('zeo_test_shop', 'Count') is None


def test_a_module_is_not_asked_for_names_that_it_makes_when_asked(write: Write) -> None:
    write(zeo_test_shop='def __getattr__(name):\n    raise SystemExit')
    __import__('zeo_test_shop')
    assert resolving('zeo_test_shop', 'Counter') is None


def test_packages_are_imported_with_what_is_in_them_and_not_without(write: Write) -> None:
    write(**{'zeo_test_a/b/c': HAS, 'zeo_test_a/b/d': 'class Counter: pass', 'zeo_test_e/__init__': '',
             'zeo_test_e/f': HAS})
    assert resolving('zeo_test_a.b.d', 'Counter') is None
    assert not imported('zeo_test_a.b.d')
    assert resolving('zeo_test_a.b.c', 'Counter') is not None
    assert resolving('zeo_test_e.f', 'Counter') is not None


def test_the_code_of_a_package_is_not_run_to_look_into_it(write: Write) -> None:
    write(**{'zeo_test_a/__init__': 'raise SystemExit', 'zeo_test_a/b': 'class Counter: pass'})
    assert resolving('zeo_test_a.b', 'Counter') is None
    assert not imported('zeo_test_a', 'zeo_test_a.b')


def test_relative_imports_are_followed(write: Write) -> None:
    write(**{'zeo_test_a/base': HAS,
             'zeo_test_a/shop': 'from .base import Counter as Base\nclass Counter(Base): pass',
             'zeo_test_a/stock': 'from . import base\nclass Counter(base.Counter): pass'})
    assert resolving('zeo_test_a.shop', 'Counter') is not None
    assert resolving('zeo_test_a.stock', 'Counter') is not None


@pytest.mark.parametrize('error', ['RuntimeError', 'SystemExit'])
def test_a_module_that_cannot_be_imported_is_a_warning_and_is_not_tried_again(
        write: Write, caplog: pytest.LogCaptureFixture, error: str) -> None:
    write(zeo_test_shop=HAS + f'raise {error}("no database here")')
    for _ in range(3):
        assert resolving('zeo_test_shop', 'Counter') is None
    [line] = caplog.messages
    assert 'zeo_test_shop.Counter' in line and 'no database here' in line
