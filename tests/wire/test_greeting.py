"""What is said before the first message."""

import json
from typing import Any

import pytest

from zeo.wire.greeting import answer_to_greeting
from zeo.wire.greeting import status_report


@pytest.mark.parametrize('greeting, answer', [
    (b'Z5', b'Z5'), (b'Z6', b'Z5'), (b'Z51', b'Z5'), (b'Z4', None), (b'Z309', None), (b'Z3101', None), (b'M5', None),
    (b'X5', None), (b'Z', None), (b'', None), (b'5', None)])
def test_a_client_answers_servers_that_speak_its_version(greeting: bytes, answer: bytes | None) -> None:
    assert answer_to_greeting(greeting) == answer
    assert answer_to_greeting(bytearray(greeting)) == answer


def test_a_status_report_is_ascii_json() -> None:
    status: Any = {'1': {'loads': 5, 'start': 'Sun'}, 'caf\u00e9': {'lock_time': None}}
    assert json.loads(status_report(status).decode('ascii')) == status
