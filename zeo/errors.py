"""The exceptions a user of zeo may catch.

The type says whose fault it is: the network's (`ClientDisconnected`, `OutcomeUnknown`), the peer's
(`ProtocolError`), the server's own (`ServerException`).  What concerns the data (`POSKeyError`,
`ConflictError`, `ReadOnlyError`, ...) are ZODB's own exceptions, see `ZODB.POSException`.
"""

from typing import Any

from transaction.interfaces import TransientError
from ZODB.POSException import StorageError

__all__ = [
    'ClientDisconnected', 'ClientStorageError', 'OutcomeUnknown', 'ProtocolError',
    'ServerException',
]


class ClientStorageError(StorageError):  # type: ignore[misc]
    """Something went wrong between a client and its server."""


class ClientDisconnected(ClientStorageError, TransientError):  # type: ignore[misc]
    """There is no connection to a server now, or it was lost during the call.

    A transaction that fails with it may be tried again as a whole (it is a `TransientError`).
    """


class OutcomeUnknown(ClientDisconnected):
    """The connection was lost while a commit was being finished, and no server could be asked in time.

    The transaction may or may not be in the database; look before doing it again.
    """


class ServerException(ClientStorageError):
    """The server reports an error that has no counterpart here.

    ``class_name`` is the dotted name (`str`) of the exception's class in the server, ``value`` its
    attributes (`dict`) or arguments (`tuple`); it is for reading, not for calling.
    """

    def __init__(self, class_name: str, value: Any = ()) -> None:
        super().__init__(class_name, value)
        self.class_name = class_name
        self.value = value

    def __str__(self) -> str:
        if isinstance(self.value, dict):
            details = ', '.join(f'{key}={item!r}' for key, item in self.value.items())
        elif isinstance(self.value, tuple):
            details = ', '.join(map(str, self.value))
        else:
            details = repr(self.value)
        return f'{self.class_name}: {details}' if details else self.class_name


class TlsError(ConnectionError):
    """The two sides do not come to terms about TLS; the text says why, and what to do."""


class ProtocolError(ClientStorageError):
    """The peer sent something that the protocol does not allow, in answer to this very call.

    To try again would end the same way.  Other calls that were waiting get `ClientDisconnected`, if the connection
    is of no more use.
    """
