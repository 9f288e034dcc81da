"""README's section "Look after it" is true: its commands are executed, and show what is shown there.

Any number stands for any number, and the widths of columns may differ.
"""

import re
from datetime import datetime
from datetime import timedelta

import ZODB

from tests.system.servers import ROOT
from tests.system.test_start_txt import World
from tests.system.test_start_txt import free_port
from tests.system.test_start_txt import world
from zeo.ClientStorage import ClientStorage

__all__ = ['world']  # a fixture

SECTION = (ROOT / 'README.md').read_text(encoding='utf-8').split('## Look after it\n')[1].split('\n## ')[0]


def steps() -> list[tuple[str, str]]:
    """Each command with what is shown below it."""
    blocks = re.findall(r'^```console\n(.*?)^```', SECTION, re.MULTILINE | re.DOTALL)
    return [(command, shown) for block in blocks
            for command, shown in re.findall(r'^\$ (.+)\n((?:(?!\$ ).*\n)*)', block, re.MULTILINE)]


def like(shown: str) -> str:
    """A pattern for the same with other numbers, sizes, times and tids."""
    number = r'\b[0-9a-f]{16}\b|\d+(?:\.\d+)*(?:\.dev\d+)?(?: (?:B|kB|MB|s)\b)?|\b(?:Mon|Nov)\b|\s+'

    def pattern(match: re.Match[str]) -> str:
        found = match[0]
        if found.isspace():
            return r'\s+'
        if re.fullmatch('[0-9a-f]{16}', found):
            return '[0-9a-f]{16}'
        if found.isalpha():
            return r'\w{3}'
        if found[-1].isalpha() and ' ' in found:
            return r'[\d.]+ (B|kB|MB|s)'
        return r'[\d.]+(dev\d+)?'

    parts, at = [], 0
    for match in re.finditer(number, shown):
        parts += [re.escape(shown[at:match.start()]), pattern(match)]
        at = match.end()
    return ''.join([*parts, re.escape(shown[at:])])


def test_the_commands_do_what_they_show(world: World) -> None:
    port = str(free_port())
    world.command(f'python -m zeo.start -p {port}', ['... INFO zeo: ready on ...'])
    db = ZODB.DB(ClientStorage(('127.0.0.1', int(port)), client_label='shop'))
    for number in range(30):
        with db.transaction() as connection:
            connection.root()[number % 10] = b'x' * 6000
    later = (datetime.now() + timedelta(minutes=1)).isoformat(' ', 'seconds')
    commands = []
    for command, shown in steps():
        command = re.sub(r'"20[^"]+"', f'"{later}"', command.replace('9999', port))
        output = world.run(command)
        assert re.fullmatch(like(shown.strip().replace('9999', port)), output.strip()), (command, output)
        commands.append(command.split()[2])
    db.close()
    assert set(commands) == {'zeo.status', 'zeo.backup', 'zeo.pack', 'zeo.copy'}
