"""Certificates for tests, made when they are needed: good ones, and those that are wrong in one way each."""

import datetime
from pathlib import Path
from typing import Any

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization

__all__ = ['PASSWORD', 'Certificates', 'password']

PASSWORD = 'a secret'

#: How this machine is called in the certificate of a server, when nothing is wrong with it.
HOSTS = ('localhost', '127.0.0.1', '::1')


class Certificates:
    """Files in ``folder``; each certificate is with its private key unless it is said otherwise.

    ``ca``: the authority that has signed all others but ``stranger``, which ``other_ca`` has signed.
    ``server``, and ``wrong_host`` and ``expired``; ``client`` (common name: ada), and ``locked``, which is
    the same with a password; ``client_alone`` has no key, ``client_key`` nothing but the key.  ``revoked`` is
    a client of which the list in ``ca_with_list`` says that it is no longer to be trusted.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._authority = trustme.CA()
        other = trustme.CA()
        self.ca = self._write('ca', self._authority.cert_pem.bytes())
        self.other_ca = self._write('other_ca', other.cert_pem.bytes())
        self.server = self._issue('server', *HOSTS, common_name='server')
        self.wrong_host = self._issue('wrong_host', 'elsewhere.example')
        past = datetime.datetime(2020, 1, 1)
        self.expired = self._issue('expired', *HOSTS, not_before=past,
                                   not_after=past + datetime.timedelta(days=30))
        client = self._authority.issue_cert('ada@example.org', common_name='ada')
        certificate, = client.cert_chain_pems
        key = client.private_key_pem.bytes()
        self.client = self._write('client', certificate.bytes() + key)
        self.client_alone = self._write('client_alone', certificate.bytes())
        self.client_key = self._write('client_key', key)
        self.locked = self._write('locked', certificate.bytes() + _locked(key))
        self.password_file = self._write('password', f'{PASSWORD}\nand nothing else\n'.encode())
        self.stranger = self._write(
            'stranger', other.issue_cert('eve@example.org').private_key_and_cert_chain_pem.bytes())
        revoked = self._authority.issue_cert('bob@example.org', common_name='bob')
        self.revoked = self._write('revoked', revoked.private_key_and_cert_chain_pem.bytes())
        self.ca_with_list = self._write(
            'ca_with_list', self._authority.cert_pem.bytes() + self._list(revoked.cert_chain_pems[0].bytes()))

    def _issue(self, name: str, *identities: str, **options: Any) -> str:
        issued = self._authority.issue_cert(*identities, **options)
        return self._write(name, issued.private_key_and_cert_chain_pem.bytes())

    def _write(self, name: str, content: bytes) -> str:
        path = self.folder / f'{name}.pem'
        path.write_bytes(content)
        return str(path)

    def _list(self, revoked: bytes) -> bytes:
        now = datetime.datetime.now(datetime.timezone.utc)
        authority = x509.load_pem_x509_certificate(self._authority.cert_pem.bytes())
        key: Any = serialization.load_pem_private_key(self._authority.private_key_pem.bytes(), None)
        entry = x509.RevokedCertificateBuilder().revocation_date(now).serial_number(
            x509.load_pem_x509_certificate(revoked).serial_number).build()
        made = x509.CertificateRevocationListBuilder().issuer_name(authority.subject).last_update(
            now - datetime.timedelta(days=1)).next_update(
            now + datetime.timedelta(days=1)).add_revoked_certificate(entry).sign(key, hashes.SHA256())
        return made.public_bytes(serialization.Encoding.PEM)


def _locked(key: bytes) -> bytes:
    return serialization.load_pem_private_key(key, None).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(PASSWORD.encode()))


def password() -> str:
    """For ``password_function``."""
    return PASSWORD
