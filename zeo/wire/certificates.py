"""From files with certificates and keys to the `ssl.SSLContext` of a server or a client.

Both sides are asked for the same things, by the same names:

``certificate``: the file with one's own certificate, and those between it and its authority (PEM).

``key``: the file with its private key, if that is not in the same file.

``password_file``: a file whose first line is the key's password.  ``password_function`` returns it: a
callable, or the dotted name of one.

``authenticate``: the certificates that the other side has to have, or of the authorities that have to have
signed it: a file, or a folder of files.  ``'SIGNED'`` are the authorities that this machine trusts anyway.
If there are revocation lists in the files, they are obeyed.

TLS 1.2 is the oldest version that is spoken.
"""

import importlib
import os
import ssl
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

Path = str | os.PathLike[str]
PasswordFunction = str | Callable[[], str | bytes]

#: The authorities that this machine trusts (ZEO also writes DYNAMIC).
SIGNED = {'SIGNED', 'DYNAMIC'}

#: What a client may be asked for beside what both are.
CLIENT_KEYS = ('certificate', 'key', 'password_file', 'password_function', 'authenticate',
               'check_hostname', 'server_hostname')


class Unusable(ValueError):
    """A file cannot be used as asked; the text is one line that names it and says what to do."""


def server_context(certificate: Path, key: Path | None = None, *, password_file: Path | None = None,
                   password_function: PasswordFunction | None = None,
                   authenticate: Path | None = None) -> ssl.SSLContext:
    """For a server, whose clients need a certificate if ``authenticate`` says which.

    Raises `Unusable`.
    """
    context = _context(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0  # nobody resumes a session
    _load_own(context, certificate, key, password_file, password_function)
    if authenticate is not None:
        _load_others(context, authenticate, ssl.Purpose.CLIENT_AUTH)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(certificate: Path | None = None, key: Path | None = None, *,
                   password_file: Path | None = None,
                   password_function: PasswordFunction | None = None,
                   authenticate: Path | None = None, check_hostname: bool = True) -> ssl.SSLContext:
    """For a client, which verifies the server's certificate and, with ``check_hostname``, its name.

    Raises `Unusable`.
    """
    context = _context(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = check_hostname
    if certificate is not None:
        _load_own(context, certificate, key, password_file, password_function)
    elif key is not None:
        raise Unusable(f'the key {os.fspath(key)} is of no use without a certificate; name that, too')
    _load_others(context, 'SIGNED' if authenticate is None else authenticate, ssl.Purpose.SERVER_AUTH)
    return context


def section(found: Any) -> dict[str, Any]:
    """What stands in a section ``<ssl>`` of ZConfig (ssl.xml)."""
    return {name: value for name in CLIENT_KEYS if (value := getattr(found, name)) is not None}


def for_client(asked: Any, hostname: str | None = None) -> tuple[ssl.SSLContext, str | None] | None:
    """What ``ssl=`` of a client means: a context, and the name of the server if it is not its address.

    ``asked`` is None or False for no TLS, True for the authorities that this machine trusts, a context,
    or a mapping with some of `CLIENT_KEYS`.  Raises `Unusable`, and `TypeError`.
    """
    if asked is None or asked is False:
        return None
    if isinstance(asked, ssl.SSLContext):
        return asked, hostname
    if asked is True:
        asked = {}
    if not isinstance(asked, Mapping):
        raise TypeError(f'ssl is {type(asked).__name__}; give an ssl.SSLContext, a mapping, or True')
    options = {name: value for name, value in asked.items() if value is not None}
    if unknown := options.keys() - set(CLIENT_KEYS):
        raise TypeError(f'ssl has no {", ".join(sorted(map(str, unknown)))}, but {", ".join(CLIENT_KEYS)}')
    named = options.pop('server_hostname', None)
    return client_context(**options), hostname or named


def _context(protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    # A certificate that is listed is trusted for what it is, whoever has signed it.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def _load_own(context: ssl.SSLContext, certificate: Path, key: Path | None, password_file: Path | None,
              password_function: PasswordFunction | None) -> None:
    certificate = os.fspath(certificate)
    key = certificate if key is None else os.fspath(key)
    if b'-----BEGIN CERTIFICATE-----' not in _read(certificate, 'certificate'):
        raise Unusable(f'there is no certificate in {certificate}; give a file in PEM format')
    if b'PRIVATE KEY-----' not in _read(key, 'key'):
        raise Unusable(f'there is no private key in {key}; name the file that has it as the key')
    asked = False

    def password() -> str | bytes:
        nonlocal asked
        asked = True
        if password_file is not None:
            path = os.fspath(password_file)
            return _read(path, 'password file').split(b'\n', 1)[0].removesuffix(b'\r')
        if password_function is not None:
            return _function(password_function)()
        raise Unusable(f'the key in {key} has a password; give the file with it, or a function')

    try:
        context.load_cert_chain(certificate, key, password)
    except ssl.SSLError as error:
        if error.reason == 'KEY_VALUES_MISMATCH':
            raise Unusable(f'the key in {key} is not that of the certificate in {certificate}') from None
        if asked:
            raise Unusable(f'the password of the key in {key} is wrong') from None
        raise Unusable(f'the certificate in {certificate} cannot be used with the key in {key}:'
                       f' {error.reason or error}') from None


def _load_others(context: ssl.SSLContext, authenticate: Path, purpose: ssl.Purpose) -> None:
    path = os.fspath(authenticate)
    if path in SIGNED:
        context.load_default_certs(purpose)
        return
    if os.path.isdir(path):
        try:
            files = sorted(os.path.join(path, name) for name in os.listdir(path) if name[0] != '.')
        except OSError as error:
            raise Unusable(f'cannot read the folder {path}: {error.strerror}') from None
        if not files:
            raise Unusable(f'there is no certificate in the folder {path}; put those to authenticate there')
    else:
        files = [path]
    for file in files:
        _read(file, 'certificates to authenticate')
        try:
            context.load_verify_locations(file)
        except ssl.SSLError:
            raise Unusable(f'there is no certificate to authenticate in {file}; give files in PEM format'
                           ) from None
    if context.cert_store_stats()['crl']:
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF


def _read(path: str, what: str) -> bytes:
    try:
        with open(path, 'rb') as file:
            return file.read()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise Unusable(f'cannot read the {what} {path}: {reason}') from None


def _function(named: PasswordFunction) -> Callable[[], str | bytes]:
    if not isinstance(named, str):
        return named
    module, _, name = named.rpartition('.')
    try:
        found: Callable[[], str | bytes] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise Unusable(f'there is no function {named} that tells the password: {error}') from None
    return found
