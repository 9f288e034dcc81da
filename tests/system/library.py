"""Real input, end to end: Python's own library in a ZODB, put there, searched, changed and packed by many.

    python -m tests.system.library [--quick] [--server zeo|ZEO] [--client zeo|ZEO] [--unix] ...

Four processes put the source files of the standard library into one database: a persistent document for
each file, a persistent object for each function and class in it, and an index of words in BTrees, in
which all of them write at once.  The server is restarted.  Then others search while some change
documents, and the server is restarted under their hands; the changes are undone, or, where that is no
longer possible, edited back; it is packed while documents are being changed and searched.  After
another restart every document is compared with its file, byte for byte, every definition with the
syntax tree, and the index with the text, in both directions.  Exit status 1 on any discrepancy.

At any time, in any transaction of any process: a document is found under a word if and only if the word is
in its text.  A client that mixes two states of the database, or takes an old one for current,
will sooner or later see that not be so.
"""

import argparse
import ast
import functools
import pathlib
import random
import re
import sys
import sysconfig
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import persistent
from BTrees.check import check as check_order
from BTrees.IIBTree import IITreeSet
from BTrees.IOBTree import IOBTree
from BTrees.OOBTree import OOBTree
from ZODB.POSException import UndoError
from ZODB.serialize import referencesf
from ZODB.utils import z64

from tests.system.team import Client
from tests.system.team import Discrepancy
from tests.system.team import Place
from tests.system.team import Team
from tests.system.team import expect

WORD = re.compile(rb'[A-Za-z_][A-Za-z0-9_]{3,}')


# ---- what is stored -------------------------------------------------------------


class Document(persistent.Persistent):  # type: ignore[misc]
    """A file: its name relative to the library, its bytes, and the definitions in it."""

    def __init__(self, name: str, source: bytes) -> None:
        self.name = name
        self.rewrite(source)

    def rewrite(self, source: bytes) -> None:
        self.source = source
        self.definitions = tuple(Definition(self, *found) for found in definitions_in(source))


class Definition(persistent.Persistent):  # type: ignore[misc]
    """A function or a class: where it is, and its own text."""

    def __init__(self, document: Document, kind: str, name: str, first: int, last: int, text: bytes) -> None:
        self.document = document
        self.kind = kind
        self.name = name
        self.first = first
        self.last = last
        self.text = text

    def as_found(self) -> tuple[str, str, int, int, bytes]:
        return self.kind, self.name, self.first, self.last, self.text


def definitions_in(source: bytes) -> list[tuple[str, str, int, int, bytes]]:
    """Kind, name, first and last line, and text of each function and class; none if it is not Python."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')     # the library's older corners
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            return []                       # there are files that are broken on purpose
    lines = source.splitlines(keepends=True)
    return [(type(node).__name__, node.name, node.lineno, node.end_lineno or 0,
             b''.join(lines[node.lineno - 1:node.end_lineno]))
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]


def words_in(source: bytes) -> set[str]:
    return {word.decode() for word in WORD.findall(source)}


def files_of_the_library(most: int = 0, tests: bool = False) -> list[str]:
    """Names of source files, relative to the library; a fair choice of ``most`` of them, if not 0."""
    folder = library()
    names = []
    for path in sorted(folder.rglob('*.py')):
        parts = path.relative_to(folder).parts
        if 'site-packages' in parts or 'dist-packages' in parts:
            continue
        if not tests and ('test' in parts or 'tests' in parts):
            continue
        names.append('/'.join(parts))
    if 0 < most < len(names):
        names = sorted(random.Random(1).sample(names, most))
    return names


def library() -> pathlib.Path:
    """Where the library is."""
    return pathlib.Path(sysconfig.get_path('stdlib'))


def read(name: str) -> bytes:
    return (library() / name).read_bytes()


# ---- how it is changed -----------------------------------------------------------------


def known_under(root: Any, words: Sequence[str]) -> list[Any]:
    """For each word the set of the numbers of documents, or None; they are fetched together."""
    sets = [root['words'].get(word) for word in words]
    root._p_jar.prefetch([each for each in sets if each is not None and each._p_changed is None])
    return sets


def index(root: Any, number: int, old: set[str], new: set[str]) -> None:
    """Make a document known under its new words, and under the others no longer."""
    added, gone = sorted(new - old), sorted(old - new)
    for word, numbers in zip(added, known_under(root, added)):
        if numbers is None:
            root['words'][word] = IITreeSet([number])
        else:
            numbers.insert(number)
    for word, numbers in zip(gone, known_under(root, gone)):
        expect(numbers is not None and number in numbers, f'document {number} is not found under {word!r}')
        numbers.remove(number)      # an empty set stays: somebody else may just be adding to it


def rewrite(root: Any, number: int, source: bytes) -> None:
    """Give a document another text, unless it has it already."""
    document = root['documents'][number]
    if document.source != source:
        index(root, number, words_in(document.source), words_in(source))
        document.rewrite(source)


# ---- what the processes do -----------------------------------------------------------


def found(client: Client) -> None:
    """An empty library."""
    def work(root: Any) -> None:
        root['documents'] = IOBTree()
        root['words'] = OOBTree()

    client.do(work, 'an empty library')


def put(client: Client, numbered: Sequence[tuple[int, str]]) -> None:
    """Store files under their numbers, some 50 KB in a transaction."""
    def work(root: Any, batch: Sequence[tuple[int, str]]) -> None:
        for number, name in batch:
            if number not in root['documents']:
                source = read(name)
                root['documents'][number] = Document(name, source)
                index(root, number, set(), words_in(source))

    batch: list[tuple[int, str]] = []
    for position, (number, name) in enumerate(numbered, 1):
        batch.append((number, name))
        if position == len(numbered) or sum(len(read(name)) for _, name in batch) > 50_000:
            client.do(functools.partial(work, batch=batch), f'put {len(batch)} files')
            client.step()
            batch = []


def change(client: Client, numbers: Sequence[int], round: int) -> None:
    """Keep the first half of the documents' lines, and add words that nobody else has."""
    def work(root: Any, number: int) -> None:
        lines = read(root['documents'][number].name).splitlines(keepends=True)
        lines = lines[:len(lines) // 2]
        lines.append(f'# altered_by_{client.label} in_round_number_{round}_in_place_{number}\n'.encode())
        rewrite(root, number, b''.join(lines))

    for number in numbers:
        client.do(functools.partial(work, number=number), f'change {number}')
        client.step()


def edit_back(client: Client, number: int) -> None:
    """Give a document the text of its file."""
    client.do(lambda root: rewrite(root, number, read(root['documents'][number].name)), f'edit {number}')


def change_and_edit_back(client: Client, numbers: Sequence[int]) -> None:
    """Change documents and edit them back, again and again."""
    for round in range(1_000_000):
        change(client, numbers, round)
        for number in numbers:
            edit_back(client, number)
        if client.over():
            break


def edit(client: Client, numbers: Sequence[int]) -> None:
    """Give documents the texts of their files."""
    for number in numbers:
        edit_back(client, number)


def undo(client: Client, numbers: Sequence[int]) -> None:
    """Undo the changes of these documents, the last one first; edit back where that cannot be done.

    It cannot where the index was changed since in a way that BTrees do not merge.
    """
    def work(root: Any, number: int, change: bytes) -> None:
        document = root['documents'][number]
        if document.source != read(document.name):
            client.db.undo(change, root._p_jar.transaction_manager.get())

    notes = {f'change {number}': number for number in numbers}
    changes = [each for each in client.db.undoInfo(0, -10_000) if each['description'] in notes]
    expect(len(changes) == len(notes), f'{len(changes)} of {len(notes)} changes can be undone')
    for each in changes:
        number = notes[each['description']]
        try:
            client.do(functools.partial(work, number=number, change=each['id']), f'undo {number}')
            client.figures['undone'] += 1
        except UndoError:
            edit_back(client, number)
            client.figures['not undone but edited back'] += 1


def pack(client: Client) -> None:
    """Pack, so that nothing but the present is left."""
    storage = client.db.storage
    before = storage.getSize()
    client.db.pack()
    client.figures['KB before'] = before // 1024
    client.figures['KB after'] = storage.getSize() // 1024


def search(client: Client) -> None:
    """Look words up until it is over: what is found, and nothing else, must contain them."""
    def work(root: Any) -> int:
        documents = root['documents']
        document = documents[number := client.chance.randint(0, documents.maxKey())]
        words = sorted(words_in(document.source))
        for word, numbers in zip(words, known_under(root, words)):
            expect(numbers is not None and number in numbers,
                   f'{client.label}: {document.name} contains {word!r} and is not found under it')
        for word in client.chance.sample(words, min(3, len(words))):
            for other in client.chance.sample(list(root['words'][word]), 1):
                expect(word in words_in(documents[other].source),
                       f'{client.label}: {documents[other].name} is found under {word!r} but has no such word')
        return len(words)

    while not client.over():
        client.figures['words looked up'] += client.do(work)


def compare(client: Client, numbered: Sequence[tuple[int, str]]) -> None:
    """Each document must be its file, byte for byte, and its definitions what the syntax tree says."""
    def work(root: Any, number: int, name: str) -> None:
        document = root['documents'].get(number)
        expect(document is not None, f'{name} is missing')
        source = read(name)
        expect(document.name == name, f'{name} is called {document.name}')
        expect(document.source == source, f'{name} is not what its file is')
        expect([each.as_found() for each in document.definitions] == definitions_in(source),
               f'{name} has other definitions than its file')
        expect(all(each.document is document for each in document.definitions),
               f'a definition in {name} belongs to another document')
        client.figures['documents'] += 1
        client.figures['bytes'] += len(source)
        client.figures['definitions'] += len(document.definitions)

    for number, name in numbered:
        client.do(functools.partial(work, number=number, name=name))


def compare_index(client: Client, names: Sequence[str]) -> None:
    """The index must say what the files say: no word more, none less."""
    text: dict[str, set[int]] = {}
    for number, name in enumerate(names):
        for word in words_in(read(name)):
            text.setdefault(word, set()).add(number)

    def work(root: Any) -> None:
        known = {word: set(numbers) for word, numbers in root['words'].items()}
        # The words that changes had brought are known still, but nowhere to be found.
        known = {word: numbers for word, numbers in known.items() if numbers}
        for word in sorted(known.keys() | text.keys()):
            expect(known.get(word) == text.get(word),
                   f'{word!r} is in documents {text.get(word)} and found in {known.get(word)}')
        expect(list(root['documents']) == list(range(len(names))), 'there are other documents than files')
        for tree in (root['documents'], root['words']):
            tree._check()
            check_order(tree)

    client.do(work)
    client.figures['words'] = len(text)


def compare_records(client: Client) -> None:
    """After the last pack every record must be reachable, and everything that is referred to be there."""
    references: dict[bytes, list[bytes]] = {}
    token = None
    while True:
        oid, _, record, token = client.db.storage.record_iternext(token)
        references[oid] = referencesf(record)
        if token is None:
            break
    reached: set[bytes] = set()
    ahead = [z64]
    while ahead:
        oid = ahead.pop()
        if oid not in reached:
            expect(oid in references, f'there is no object {oid.hex()}, to which others refer')
            reached.add(oid)
            ahead += references[oid]
    expect(reached == set(references), f'{len(references) - len(reached)} objects outlived the pack')
    client.figures['objects'] = len(reached)


# ---- the whole story --------------------------------------------------------------------


class Account:
    """Tells what was done, with figures."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._since = self._begun
        self.figures: Counter[str] = Counter()

    def tell(self, what: str, figures: Counter[str]) -> None:
        now = time.monotonic()
        told = ', '.join(f'{value:,} {name}' for name, value in figures.items())
        print(f'{now - self._since:7.1f} s  {what}: {told}', flush=True)
        self._since = now
        self.figures += figures

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begun


def with_a_server(server: Any, options: argparse.Namespace, account: Account) -> Counter[str]:
    """All that is done to the database; the figures of the last comparison."""
    names = files_of_the_library(options.files, options.tests)
    numbered = list(enumerate(names))
    some = random.Random(2).sample(range(len(names)), min(options.changes, len(names)))
    mine, yours = some[::2], some[1::2]
    # The address is known from the first start on; restarts are at the same.
    place = Place(server.address, options.client, options.cache_size * 1024)
    with Team(place, options.processes) as team:
        team.figures(team.start(found))
        for part in range(options.processes):
            team.start(put, numbered[part::options.processes])
        figures = team.end()
    account.tell(f'{options.processes} processes put {len(names)} files', figures)

    server.restart()
    with Team(place, 5) as team:
        searching = [team.start(search) for _ in range(2)]
        changing = [team.start(change, each, 0) for each in (mine, yours)]
        team.wait_for_steps(len(some) // 2)
        server.restart()
        account.tell('2 change documents, 2 search, the server was restarted', team.figures(*changing))
        undoing = [team.start(undo, some), team.start(edit, some[:len(some) // 4])]
        account.tell('1 undoes that, 1 edits back, 2 search', team.figures(*undoing))
        again = [team.start(change_and_edit_back, each[:10]) for each in (mine, yours)]
        packing = team.start(pack)
        account.tell('1 packs, 2 change and edit back, 2 search', team.figures(packing))
        team.end()
        account.tell('those two come to an end', team.figures(*again))
        account.tell('what the searchers did', team.figures(*searching))

    with Team(place, 1) as team:
        team.start(pack)
        account.tell('packed again, nobody else being there', team.end())
    server.restart()
    with Team(place, options.processes) as team:
        for part in range(options.processes):
            team.start(compare, numbered[part::options.processes])
        team.start(compare_index, names)
        team.start(compare_records)
        figures = team.end()
    account.tell('restarted, and compared with the files', figures)
    expect(figures['documents'] == len(names), f'only {figures["documents"]} of {len(names)} were compared')
    return figures


def tell_the_story(options: argparse.Namespace) -> None:
    from tests.system.servers import Server

    account = Account()
    with Server(options.server, unix=options.unix) as server:
        try:
            figures = with_a_server(server, options, account)
        except BaseException:
            print(f'The server said:\n{server.log}', file=sys.stderr)
            raise
    if figures['objects'] < options.objects:
        raise Discrepancy(f'{figures["objects"]} objects are not as many as were asked for')
    print(f'{account.seconds:7.1f} s  in all: {figures["objects"]:,} objects, '
          f'{account.figures["transactions"]:,} transactions, {account.figures["conflicts"]:,} conflicts and '
          f'{account.figures["lost connections"]:,} lost connections retried; no discrepancy')


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog='python -m tests.system.library', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--quick', action='store_true', help='a few files only')
    parser.add_argument('--files', type=int, default=0, help='how many files at most (all)')
    parser.add_argument('--tests', action='store_true', help="the library's own tests, too: three times as much")
    parser.add_argument('--changes', type=int, default=100, help='how many documents are changed (100)')
    parser.add_argument('--processes', type=int, default=4, help='that put files in at the same time (4)')
    parser.add_argument('--server', choices=('zeo', 'ZEO'), default='zeo', help="ours, or PyPI's")
    parser.add_argument('--client', choices=('zeo', 'ZEO'), default='zeo')
    parser.add_argument('--unix', action='store_true', help='over a Unix domain socket')
    parser.add_argument('--cache-size', type=int, default=8192, metavar='KB', help="of each client's file (8192)")
    options = parser.parse_args(arguments)
    if options.quick:
        options.files, options.changes = options.files or 40, min(options.changes, 20)
    # All files of a library without its tests make more than that.
    options.objects = 0 if options.files else 20_000

    try:
        tell_the_story(options)
    except Discrepancy as discrepancy:
        print(f'DISCREPANCY: {discrepancy}')
        return 1
    return 0


if __name__ == '__main__':
    from tests.system import library as myself     # what goes to other processes has its module's true name
    raise SystemExit(myself.main())
