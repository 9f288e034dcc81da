"""Pieces of pickle written by hand are what a pickler could have written."""

import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.wire.zeos import plain
from zeo.wire.opcodes import INTS
from zeo.wire.opcodes import pickled_args
from zeo.wire.opcodes import pickled_bytes_head
from zeo.wire.opcodes import pickled_int
from zeo.wire.opcodes import pickled_text


def read(piece: bytes) -> Any:
    """As it stands in a pickle, on a stack that holds something else."""
    return pickle.loads(b'\x80\x03(N%b\x86l.' % piece)[0][1]


@given(st.integers(-2, 300) | st.integers() | st.integers(2**31 - 2, 2**31 + 2) | st.integers(-2**31 - 2, -2**31 + 2))
def test_a_number_is_read_again(number: int) -> None:
    assert read(pickled_int(number)) == number


@given(st.text(max_size=300))
def test_a_text_is_read_again(text: str) -> None:
    assert read(pickled_text(text)) == text


@pytest.mark.parametrize('size', [0, 1, 255, 256, 70_000])
def test_bytes_are_read_again(size: int) -> None:
    assert read(pickled_bytes_head(size) + bytes(size)) == bytes(size)


@given(st.lists(plain, max_size=4))
def test_arguments_are_read_again_with_their_types(args: list[Any]) -> None:
    found = read(pickled_args(args))
    assert found == tuple(args) and list(map(type, found)) == list(map(type, args))


@pytest.mark.parametrize('size, number', [(2, 255), (3, 65535), (5, 2**31 - 1)])
def test_integers_are_known_by_their_size(size: int, number: int) -> None:
    piece = pickle.dumps(number, 3)[2:-1]
    assert (len(piece), piece[0]) == (size, INTS[size])
