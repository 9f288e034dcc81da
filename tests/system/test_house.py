"""The house stands as it is meant to: floors, sockets, a test module for each module, types."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# The floors, from the ground.  A module imports from its own floor or from below, never from above;
# what is not named here stands on the floor of its room.
FLOORS = {
    'zeo.errors': 0, 'zeo.version': 0, 'zeo.programs': 0, 'zeo.wire': 0,
    'zeo.server': 1, 'zeo.client': 1,
    'zeo.server.session': 2, 'zeo.server.writer': 2, 'zeo.server.monitor': 2, 'zeo.server.connection': 2,
    'zeo.server.listener': 2, 'zeo.client.channel': 2, 'zeo.client.readingturn': 2,
    'zeo.client.commit': 3, 'zeo.client.inquiry': 3, 'zeo.client.link': 3, 'zeo.client.outcome': 3,
    'zeo.StorageServer': 3, 'zeo.client.supervisor': 3, 'zeo.client.iteration': 3,
    'zeo.ClientStorage': 4, 'zeo.start': 4, 'zeo.convenience': 4,
    'zeo.uri': 5, 'zeo.config': 5,
    'zeo.__main__': 5, 'zeo.commands': 5, 'zeo.pack': 6, 'zeo.status': 6, 'zeo.copy': 6, 'zeo.backup': 7,
    'zeo': 4,
}
ROOMS = ('zeo.wire', 'zeo.server', 'zeo.client')
SOCKETS = {'zeo.start', 'zeo.StorageServer', 'zeo.server.addresses', 'zeo.server.connection',
           'zeo.server.daemon', 'zeo.server.listener', 'zeo.server.monitor', 'zeo.server.servicemanager',
           'zeo.server.writer',
           'zeo.client.dialing', 'zeo.client.outgoing', 'zeo.client.probe',
           'zeo.client.readingturn', 'zeo.client.supervisor', 'zeo.wire.certificates', 'zeo.wire.pieces', 'zeo.wire.tls'}

MODULES = {
    '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__'): path
    for path in sorted((ROOT / 'zeo').rglob('*.py'))}


def imports(path: Path) -> set[str]:
    """The names of all modules that the file imports, wherever in it, but for what only types need."""
    names = set()
    tree = ast.parse(path.read_text())
    for_types = {inner for node in ast.walk(tree)
                 if isinstance(node, ast.If) and ast.unparse(node.test) == 'TYPE_CHECKING'
                 for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path} has a relative import'
            for alias in node.names:
                name = f'{node.module}.{alias.name}'
                names.add(name if name in MODULES else str(node.module))
    return names


def floor(module: str) -> int:
    """A new module outside the rooms has to be given a floor above."""
    return FLOORS[module] if module in FLOORS else FLOORS[str(room(module))]


def room(module: str) -> str | None:
    return next((name for name in ROOMS if module.startswith(name + '.')), None)


def inner_imports() -> list[tuple[str, str]]:
    return [(module, name) for module, path in MODULES.items()
            for name in sorted(imports(path)) if name in MODULES]


def test_imports_never_point_up() -> None:
    up = [(module, name) for module, name in inner_imports() if floor(name) > floor(module)]
    assert not up


def test_modules_do_not_import_each_other_in_circles() -> None:
    left = {module: {name for name in imports(path) if name in MODULES}
            for module, path in MODULES.items()}
    while True:
        imported = set().union(*left.values())
        ends = {module for module, names in left.items()
                if not names & left.keys() or module not in imported}
        if not ends:
            break
        left = {module: names - ends for module, names in left.items() if module not in ends}
    assert not left


def test_server_and_client_know_the_wire_but_never_each_other() -> None:
    across = [(module, name) for module, name in inner_imports()
              if {room(module), room(name)} == {'zeo.server', 'zeo.client'}
              or room(module) == 'zeo.wire' and room(name) != 'zeo.wire' and name != 'zeo.errors']
    assert not across


def test_only_those_who_talk_to_the_network_import_socket() -> None:
    talkers = {module for module, path in MODULES.items()
               if imports(path) & {'socket', 'socketserver', 'ssl', 'asyncio'}}
    assert talkers <= SOCKETS


def test_every_module_has_its_test_module() -> None:
    missing = [module for module, path in MODULES.items() if path.name != '__init__.py'
               if module != 'zeo.version'   # one number; the distribution's metadata are made of it
               and not (ROOT / 'tests' / path.relative_to(ROOT / 'zeo').parent
                        / f'test_{path.name}').exists()]
    assert not missing


def test_the_type_checker_is_quiet() -> None:
    checked = subprocess.run([sys.executable, '-m', 'mypy'], cwd=ROOT, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=170)
    assert checked.returncode == 0, checked.stdout
