"""zeo: a thread-per-connection storage server for ZODB, and its blocking client."""

from zeo import programs

if programs.is_one():
    programs.begin()  # before the rest is read, which takes a moment

from zeo import client
from zeo import server
from zeo.convenience import DB
from zeo.convenience import connection
from zeo.convenience import make_callable
from zeo.convenience import client as _client
from zeo.convenience import server as _server
from zeo.errors import ClientDisconnected
from zeo.errors import ClientStorageError
from zeo.errors import OutcomeUnknown
from zeo.errors import ProtocolError
from zeo.errors import ServerException
from zeo.version import __version__

__all__ = [
    'ClientDisconnected', 'ClientStorageError', 'DB', 'OutcomeUnknown', 'ProtocolError',
    'ServerException', '__version__', 'client', 'connection', 'server',
]

make_callable(client, _client)
make_callable(server, _server)
