"""Messages as ZEO writes and reads them, and what to put into them."""

import pickle
from typing import Any

from hypothesis import strategies as st
from ZEO.asyncio import marshal

from zeo.wire.framing import Frame

OID = b'\0\0\0\0\0\0\0\x09'
TID = b'\x03\xf0abc(e\x86'
LATER = b'\x03\xf0abct.\n'

eight = st.binary(min_size=8, max_size=8)
records = st.binary(max_size=20) | st.binary(min_size=250, max_size=260) | st.just(bytes(70_000))
requests = st.integers(1, 300) | st.integers(65530, 65540) | st.integers(1, 2**31 - 1) | st.integers(2**31, 2**40)
texts = st.text(max_size=20)
rows = st.binary(max_size=300)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts | st.binary(max_size=300),
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple)
    | st.dictionaries(texts, inner, max_size=3), max_leaves=10)


def payload(frame: Frame) -> bytes:
    data = b''.join(frame)
    assert len(data) - 4 == int.from_bytes(data[:4], 'big')
    return data[4:]


encode_as_client = marshal.encoder(b'Z5')
encode_as_server = marshal.encoder(b'Z5', True)
decode_as_client = marshal.decoder(b'Z5')
decode_as_server = marshal.server_decoder(b'Z5')


def pickled_id(message_id: Any) -> bytes:
    """As it stands in a message of ZEO's."""
    data: bytes = encode_as_client(message_id, 0)
    return data[2:-4]  # between the protocol, and 0, TUPLE2 and STOP


def value_of(message_id: bytes) -> Any:
    return pickle.loads(b'\x80\x03' + message_id + b'.')


class Stubborn:
    """What cannot be pickled."""

    def __reduce__(self) -> Any:
        raise RuntimeError('no')


#: How ZEO reads the answer in place of a result that cannot be sent.
COULD_NOT = ('builtins.ValueError', ("Couldn't pickle response",))
