"""zeo.server.values: text in, value out; or an error that says what to do."""

import argparse

import pytest

from zeo.server import values
from zeo.server.values import StorageName
from zeo.server.values import Wrong


@pytest.mark.parametrize('text, expected', [
    ('9999', ('', 9999)),
    (':9999', ('', 9999)),
    ('localhost:0', ('localhost', 0)),
    ('10.0.0.1:65535', ('10.0.0.1', 65535)),
    ('[::1]:9999', ('::1', 9999)),
    ('[::]:9999', ('::', 9999)),
    ('/run/zeo.sock', '/run/zeo.sock'),
    ('./a:1', './a:1'),
])
def test_an_address(text, expected):
    assert values.address(text) == expected


@pytest.mark.parametrize('text', ['', 'localhost', 'localhost:', '::1:9999', '[::1]', 'a:70000', 'zeo.sock',
                                  'a:-1', '[a]:1'])
def test_what_is_no_address(text):
    with pytest.raises(Wrong, match='is no address; give host:port, a port, or the path of a socket file'):
        values.address(text)


@pytest.mark.parametrize('text, expected', [('660', 0o660), ('0600', 0o600), ('777', 0o777), ('0', 0)])
def test_permissions_are_octal(text, expected):
    assert values.mode(text) == expected


@pytest.mark.parametrize('text', ['', 'rw', '0o660', '1777', '8', '-1', '00660', '²'])
def test_what_are_no_permissions(text):
    with pytest.raises(Wrong, match='are no permissions; give octal digits such as 660'):
        values.mode(text)


def test_numbers_and_names_are_checked():
    assert values.port('0') == 0 and values.count('1') == 1
    assert values.seconds('0') == 0 and values.some_seconds('0.5') == 0.5
    assert values.path('a b') == 'a b'
    assert values.storage('a=b.c:d') == StorageName('a', 'b.c', 'd')
    for convert, text in [(values.port, 'x'), (values.count, '0'), (values.seconds, '-1'),
                          (values.some_seconds, '0'), (values.path, '\0'), (values.storage, 'a=b')]:
        with pytest.raises(Wrong):
            convert(text)


def test_what_is_wrong_is_understood_by_the_command_line_and_by_the_configuration_file():
    assert issubclass(Wrong, argparse.ArgumentTypeError) and issubclass(Wrong, ValueError)


@pytest.mark.parametrize('text', ['', 'x', '99999', '/run/web.sock', 'localhost:'])
def test_what_is_no_address_of_the_monitor(text):
    with pytest.raises(Wrong, match='is no address of a web server; give a port, or host:port'):
        values.monitor(text)
