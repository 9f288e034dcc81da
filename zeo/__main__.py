"""``python -m zeo`` does nothing; it says what there is to run.

Exit status: 0 if that was asked for with ``--help``, else 2; then the text is on standard error.
"""

import sys
from collections.abc import Sequence

from zeo.programs import NAMES
from zeo.version import __version__

ABOUT = {
    'start': 'serve a database',
    'status': 'show how servers are',
    'pack': 'remove old revisions and garbage',
    'backup': 'back up a database that is in use, or restore it',
    'copy': 'copy a database to or from a server, or compare two',
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Say what can be run; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if list(arguments) == ['--version']:
        print(f'zeo {__version__}')
        return 0
    asked_for = list(arguments) == ['--help']
    stream = sys.stdout if asked_for else sys.stderr
    if arguments and not asked_for:
        first = arguments[0]
        print(f'zeo: run python -m zeo.{first}' if first in NAMES else f'zeo: there is no {first!r} here', file=stream)
    print('Run one of these, --help shows its options:', file=stream)
    for name, what in ABOUT.items():
        print(f'  python -m zeo.{name:8}{what}', file=stream)
    return 0 if asked_for else 2


if __name__ == '__main__':
    sys.exit(main())
