"""Contexts from files: what is wrong with a file is said in one line."""

import inspect
import os
import shutil
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.system.certificates import Certificates
from tests.wire.test_tls import Failed
from tests.wire.test_tls import agreed
from zeo.wire import certificates as module
from zeo.wire.certificates import Unusable
from zeo.wire.certificates import client_context
from zeo.wire.certificates import for_client
from zeo.wire.certificates import server_context


def test_nothing_older_than_tls_1_2_is_spoken(certificates: Certificates) -> None:
    for context in server_context(certificates.server), client_context():
        assert context.minimum_version == ssl.TLSVersion.TLSv1_2


def test_a_client_verifies_certificate_and_host_unless_it_is_told_not_to_look_at_the_host(
        certificates: Certificates) -> None:
    context = client_context()
    assert context.verify_mode == ssl.CERT_REQUIRED and context.check_hostname
    assert context.cert_store_stats()['x509_ca'] == ssl.create_default_context().cert_store_stats()['x509_ca']
    context = client_context(authenticate=certificates.ca, check_hostname=False)
    assert context.verify_mode == ssl.CERT_REQUIRED and not context.check_hostname


def test_clients_of_a_server_are_authenticated_if_it_is_said_against_what(certificates: Certificates) -> None:
    assert server_context(certificates.server).verify_mode == ssl.CERT_NONE
    for authenticate in certificates.ca, 'SIGNED', 'DYNAMIC':
        context = server_context(certificates.server, authenticate=authenticate)
        assert context.verify_mode == ssl.CERT_REQUIRED


def test_the_password_comes_from_the_first_line_of_a_file_or_from_a_function(
        certificates: Certificates) -> None:
    def secret() -> str:
        return 'a secret'

    client_context(certificates.locked, password_file=certificates.password_file)
    for function in secret, 'tests.system.certificates.password':
        server_context(certificates.locked, password_function=function)


def test_the_key_may_be_in_a_file_of_its_own(certificates: Certificates) -> None:
    client_context(certificates.client_alone, certificates.client_key)


WRONG: list[tuple[Callable[[Certificates], Any], str]] = [
    (lambda these: server_context('/no/such.pem'), 'cannot read the certificate /no/such.pem: No such file'),
    (lambda these: server_context(str(these.folder)), 'cannot read the certificate .*: Is a directory'),
    (lambda these: server_context('a\0b'), 'cannot read the certificate a'),
    (lambda these: server_context(these.server, '/no/such.pem'), 'cannot read the key /no/such.pem: No such'),
    (lambda these: server_context(these.client_key), 'there is no certificate in .*client_key.pem'),
    (lambda these: server_context(these.client_alone), 'no private key in .*client_alone.pem; name the file'),
    (lambda these: server_context(these.server, these.client_key),
     'the key in .*client_key.pem is not that of the certificate in .*server.pem'),
    (lambda these: server_context(these.locked), 'the key in .*locked.pem has a password; give the file'),
    (lambda these: server_context(these.locked, password_file=these.ca),
     'the password of the key in .*locked.pem is wrong'),
    (lambda these: server_context(these.locked, password_file='/no/such'),
     'cannot read the password file /no/such'),
    (lambda these: server_context(these.locked, password_function='no.such'), 'there is no function no.such'),
    (lambda these: server_context(these.locked, password_function='x'), 'there is no function x'),
    (lambda these: server_context(these.server, authenticate='/no/such'),
     'cannot read the certificates to authenticate /no/such: No such file'),
    (lambda these: client_context(authenticate=these.client_key), 'no certificate to authenticate in .*key.pem'),
    (lambda these: client_context(key=these.client_key), 'the key .* is of no use without a certificate'),
]


@pytest.mark.parametrize('make, says', WRONG, ids=[says for _, says in WRONG])
def test_a_file_that_cannot_be_used_is_named(
        certificates: Certificates, make: Callable[[Certificates], Any], says: str) -> None:
    with pytest.raises(Unusable, match=says) as caught:
        make(certificates)
    assert '\n' not in str(caught.value)


def test_a_damaged_certificate_is_named(certificates: Certificates, tmp_path: Path) -> None:
    damaged = tmp_path / 'damaged.pem'
    text = Path(certificates.client).read_text()
    damaged.write_text(text.replace(text[100:140], 'A' * 40))
    with pytest.raises(Unusable, match='damaged.pem'):
        client_context(damaged)


def test_a_folder_of_certificates_is_read_as_a_whole(certificates: Certificates, tmp_path: Path) -> None:
    with pytest.raises(Unusable, match=f'there is no certificate in the folder {tmp_path}'):
        server_context(certificates.server, authenticate=tmp_path)
    for path in certificates.ca, certificates.other_ca:
        shutil.copy(path, tmp_path)
    (tmp_path / '.hidden').write_text('not looked at')
    context = server_context(certificates.server, authenticate=tmp_path)
    for own in certificates.client, certificates.stranger:
        agreed(context, client_context(own, authenticate=certificates.ca))
    (tmp_path / 'README').write_text('no certificate')
    with pytest.raises(Unusable, match=f'no certificate to authenticate in {tmp_path}/README'):
        server_context(certificates.server, authenticate=tmp_path)


def test_a_folder_that_cannot_be_read_is_named(
        certificates: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def listdir(path: str) -> list[str]:
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr(os, 'listdir', listdir)  # root may read anything
    with pytest.raises(Unusable, match=f'cannot read the folder {tmp_path}: Permission denied'):
        client_context(authenticate=tmp_path)


def test_a_listed_certificate_is_accepted_and_no_other_of_its_authority(certificates: Certificates) -> None:
    context = server_context(certificates.server, authenticate=certificates.client_alone)
    agreed(context, client_context(certificates.client, authenticate=certificates.ca))
    with pytest.raises(Failed):
        agreed(context, client_context(certificates.revoked, authenticate=certificates.ca))


def test_a_list_of_revoked_certificates_is_obeyed(certificates: Certificates) -> None:
    context = server_context(certificates.server, authenticate=certificates.ca_with_list)
    agreed(context, client_context(certificates.client, authenticate=certificates.ca))
    with pytest.raises(Failed) as caught:
        agreed(context, client_context(certificates.revoked, authenticate=certificates.ca))
    assert "the client's certificate is not accepted: certificate revoked" in caught.value.server
    assert "does not accept the client's certificate: it has been revoked" in caught.value.client


@pytest.mark.parametrize('asked', [None, False])
def test_a_client_may_do_without(asked: Any) -> None:
    assert for_client(asked) is None


def test_a_client_asks_for_tls_in_several_ways(certificates: Certificates) -> None:
    context = ssl.create_default_context()
    assert for_client(context, 'db') == (context, 'db')
    for asked in True, {}:
        found = for_client(asked)
        assert found is not None and found[0].verify_mode == ssl.CERT_REQUIRED and found[1] is None
    found = for_client({'authenticate': certificates.ca, 'server_hostname': 'db', 'check_hostname': False,
                        'certificate': None})
    assert found is not None and found[1] == 'db' and not found[0].check_hostname
    assert for_client({'server_hostname': 'db'}, 'other')[1] == 'other'  # type: ignore[index]


def test_all_keys_are_what_the_context_of_a_client_takes() -> None:
    taken = set(inspect.signature(client_context).parameters) | {'server_hostname'}
    assert set(module.CLIENT_KEYS) == taken


@pytest.mark.parametrize('asked, says', [
    ('yes', 'ssl is str; give'), ({'cert': 'x'}, 'ssl has no cert, but certificate, key')])
def test_what_cannot_be_meant_is_refused(asked: Any, says: str) -> None:
    with pytest.raises(TypeError, match=says):
        for_client(asked)
