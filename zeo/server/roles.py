"""Who may do what: roles by the address that a client has connected to, or by its certificate.

Without roles everybody may do everything that clients of ZEO can do.
"""

import enum
import logging
import os
from collections.abc import Sequence
from typing import NamedTuple

from zeo.server.seldom import SeldomEach

#: One line for each pack and undo, and for what was refused for want of a role.
audit = logging.getLogger('zeo.audit')


class Role(enum.IntEnum):
    """What one may do; each includes those before."""

    NOTHING = 0
    READ = 1
    WRITE = 2
    ADMIN = 3  #: pack and undo


class Rule(NamedTuple):
    """Who has a role: clients with a certificate of this name, or those who connect to an address.

    That is the ``path`` of a Unix domain socket, or a ``port``, with a ``host`` or with ``''`` for any.
    """

    role: Role
    certificate: str | None = None
    host: str = ''
    port: int | None = None
    path: str | None = None

    def holds_for(self, address: object, certificate: str | None) -> bool:
        if self.certificate is not None:
            return self.certificate == certificate
        match address:
            case str(path):
                return self.path is not None and os.path.abspath(path) == os.path.abspath(self.path)
            case (str(host), int(port)):
                return self.port == port and (
                    not self.host or self.host == host
                    or self.host == 'localhost' and host in ('127.0.0.1', '::1'))
        return False


class Roles:
    """What the rules say together: the highest role counts."""

    def __init__(self, rules: Sequence[Rule] = ()) -> None:
        self._rules = tuple(rules)
        self.refusals = SeldomEach(audit)  # clients may try the same again and again

    def of(self, address: object, certificate: str | None) -> Role:
        """The role of a client that has connected to an address that the server listens on."""
        if not self._rules:
            return Role.ADMIN
        return max((rule.role for rule in self._rules if rule.holds_for(address, certificate)),
                   default=Role.NOTHING)
