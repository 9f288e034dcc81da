"""Two who change the same object at once: resolved by the server, or by the client, or told."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import transaction
import ZODB
from BTrees.IOBTree import IOBTree
from BTrees.Length import Length
from BTrees.OOBTree import OOBTree, OOTreeSet
from ZODB.POSException import ConflictError

from tests.system.clients import hears_of
from tests.system.servers import Server

Open = Callable[..., Any]

pytestmark = pytest.mark.filterwarnings('ignore::ResourceWarning')  # stock clients may leave a file open

SHOP = """
from persistent import Persistent

class Stock(Persistent):
    count = 0

    def _p_resolveConflict(self, old, saved, new):
        saved = dict(saved)
        saved['count'] = saved.get('count', 0) + new.get('count', 0) - old.get('count', 0)
        if saved['count'] < 0:
            raise ValueError('sold out')
        return saved

class Basket(Persistent):
    content = ''
"""


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[ModuleType]:
    """An application's module, which servers can import only if it is put into their folder."""
    (tmp_path / 'zeo_test_shop.py').write_text(SHOP)
    spec = importlib.util.spec_from_file_location('zeo_test_shop', tmp_path / 'zeo_test_shop.py')
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules['zeo_test_shop'] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules['zeo_test_shop']


class Two:
    """Two clients with a database each, who began at the same time."""

    def __init__(self, storages: list[Any], **objects: Any) -> None:
        self.storages = storages
        self.databases = []
        for storage in storages:
            self.databases.append(ZODB.DB(storage))
            for other in storages:
                hears_of(other, storage.lastTransaction())
        self.managers = [transaction.TransactionManager() for _ in storages]
        self.connections = [
            db.open(manager) for db, manager in zip(self.databases, self.managers)]
        self.roots = [connection.root() for connection in self.connections]
        self.roots[0].update(objects)
        self.managers[0].commit()
        self.begin()

    def begin(self) -> None:
        """Both see all there is."""
        for manager in self.managers:
            manager.abort()
        for storage in self.storages:
            hears_of(storage, max(each.lastTransaction() for each in self.storages))
        for manager in self.managers:
            manager.begin()

    def commit(self) -> None:
        for manager in self.managers:
            manager.commit()
        self.begin()

    def close(self) -> None:
        for manager, connection, db in zip(self.managers, self.connections, self.databases):
            manager.abort()
            connection.close()
            db.close()


@pytest.fixture
def two(open_client: Open) -> Iterator[Open]:
    opened: list[Two] = []

    def two(server: Server, kinds: tuple[str, str] = ('zeo', 'zeo'), **objects: Any) -> Two:
        opened.append(Two([open_client(kind, server) for kind in kinds], **objects))
        return opened[-1]

    yield two
    for each in opened:
        each.close()


BY_WHOM = pytest.mark.parametrize('by_clients', [False, True], ids=['by the server', 'by the client'])
KINDS = pytest.mark.parametrize('kinds', [('zeo', 'zeo'), ('ZEO', 'zeo'), ('zeo', 'ZEO')])


@BY_WHOM
@KINDS
def test_both_changes_of_what_can_be_merged_are_kept(
        start_server: Open, two: Open, by_clients: bool, kinds: tuple[str, str]) -> None:
    server = start_server(client_conflict_resolution=by_clients)
    tree = OOBTree({f'old {number}': number for number in range(100)})
    pair = two(server, kinds, length=Length(5), tree=tree, set=OOTreeSet('abc'), numbers=IOBTree())
    for number, root in enumerate(pair.roots):
        root['length'].change(10 ** number)
        root['tree'][f'new {number}'] = number
        root['set'].insert(f'n{number}')
        del root['tree'][f'old {number * 50}']
        root['numbers'][number] = number
    pair.commit()
    for root in pair.roots:
        assert root['length']() == 16
        assert root['tree']['new 0'] == 0 and root['tree']['new 1'] == 1 and len(root['tree']) == 100
        assert {'old 0', 'old 50'}.isdisjoint(root['tree'])
        assert list(root['set']) == ['a', 'b', 'c', 'n0', 'n1']
        assert dict(root['numbers']) == {0: 0, 1: 1}


@BY_WHOM
def test_a_class_of_the_application_may_say_how_changes_are_merged(
        start_server: Open, two: Open, shop: ModuleType, by_clients: bool) -> None:
    server = start_server(client_conflict_resolution=by_clients)
    if not by_clients:
        Path(server.folder, 'zeo_test_shop.py').write_text(SHOP)    # the client's own is enough for it
    pair = two(server, stock=shop.Stock())
    for number in range(1, 4):
        for root in pair.roots:
            root['stock'].count += number
        pair.commit()
    assert [root['stock'].count for root in pair.roots] == [12, 12]
    status = pair.storages[0].server_status()
    assert status['conflicts'] == 0 and status['conflicts_resolved'] == (0 if by_clients else 3)


@BY_WHOM
def test_who_resolved_a_conflict_sees_the_result_and_goes_on(
        start_server: Open, two: Open, by_clients: bool) -> None:
    pair = two(start_server(client_conflict_resolution=by_clients), length=Length())
    for number in range(10):
        for which, root in enumerate(pair.roots):
            root['length'].change(1 + 99 * which)
        for manager in pair.managers[::1 if number % 2 else -1]:
            manager.commit()
        for storage in pair.storages:
            hears_of(storage, max(each.lastTransaction() for each in pair.storages))
        pair.begin()
        assert [root['length']() for root in pair.roots] == [101 * (number + 1)] * 2


@BY_WHOM
def test_what_cannot_be_merged_is_a_conflict(
        start_server: Open, two: Open, shop: ModuleType, by_clients: bool) -> None:
    server = start_server(client_conflict_resolution=by_clients)
    Path(server.folder, 'zeo_test_shop.py').write_text(SHOP)
    pair = two(server, basket=shop.Basket(), tree=OOBTree(), stock=shop.Stock())
    changes: list[Callable[[Any, int], None]] = [
        lambda root, number: setattr(root['basket'], 'content', f'{number}'),   # has no way to merge
        lambda root, number: root['tree'].__setitem__('same', number),          # both the same key
        lambda root, number: setattr(root['stock'], 'count', -5)]               # its way fails
    for change in changes:
        for number, root in enumerate(pair.roots):
            change(root, number)
        pair.managers[0].commit()
        with pytest.raises(ConflictError):
            pair.managers[1].commit()
        pair.begin()
        change(pair.roots[1], 7)        # the second attempt begins with what the first one has met
        pair.managers[1].commit()
        pair.begin()
    assert pair.roots[0]['basket'].content == '7' and pair.roots[0]['tree']['same'] == 7


@KINDS
def test_a_class_that_the_server_does_not_have_is_an_ordinary_conflict(
        start_server: Open, two: Open, shop: ModuleType, kinds: tuple[str, str]) -> None:
    server = start_server()
    pair = two(server, kinds, stock=shop.Stock())
    for root in pair.roots:
        root['stock'].count += 1
    pair.managers[0].commit()
    with pytest.raises(ConflictError) as caught:
        pair.managers[1].commit()
    assert caught.value.oid == pair.roots[1]['stock']._p_oid
    pair.begin()
    assert [root['stock'].count for root in pair.roots] == [1, 1]
    pair.roots[1]['stock'].count += 1
    pair.managers[1].commit()
    pair.begin()
    assert pair.roots[0]['stock'].count == 2


def test_many_conflicts_in_one_transaction_are_resolved_together(start_server: Open, two: Open) -> None:
    pair = two(start_server(client_conflict_resolution=True), lengths=IOBTree(
        {number: Length() for number in range(50)}))
    for root in pair.roots:
        for length in root['lengths'].values():
            length.change(1)
    pair.commit()
    assert [length() for length in pair.roots[0]['lengths'].values()] == [2] * 50
