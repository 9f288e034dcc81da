"""zeo: a thread-per-connection storage server for ZODB, and its blocking client."""

from zeo.errors import ClientDisconnected
from zeo.errors import ClientStorageError
from zeo.errors import OutcomeUnknown
from zeo.errors import ProtocolError
from zeo.errors import ServerException
from zeo.version import __version__

__all__ = [
    'ClientDisconnected', 'ClientStorageError', 'OutcomeUnknown', 'ProtocolError',
    'ServerException', '__version__',
]
