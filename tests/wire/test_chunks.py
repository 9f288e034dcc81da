"""Messages that carry pieces of blobs."""

import pytest

from tests.wire.zeos import OID
from tests.wire.zeos import TID
from tests.wire.zeos import payload
from zeo.wire.chunks import around_download
from zeo.wire.chunks import around_upload
from zeo.wire.chunks import blob_chunk_notice
from zeo.wire.chunks import download_in
from zeo.wire.chunks import upload_in
from zeo.wire.chunks import upload_notice
from zeo.wire.decoding import decode_from_client
from zeo.wire.decoding import decode_from_server


def test_a_piece_of_a_blob_is_neither_copied_when_it_is_sent_nor_when_it_is_read() -> None:
    piece = bytes(100_000)
    for frame, read in [(upload_notice(piece), decode_from_client),
                        (blob_chunk_notice(OID, TID, piece), decode_from_server)]:
        assert any(part is piece for part in frame)
        data = payload(frame)
        view = read(data)[3][-1]    # type: ignore[operator]
        assert isinstance(view, memoryview) and view.obj is data and view == piece


# ---- long pieces of blobs, whose data go elsewhere


def test_where_the_data_of_a_piece_are_can_be_told_from_its_beginning() -> None:
    data = bytes(300)
    oid, tid = b'oidoidoi', b'tidtidti'
    for payload, (header, tail), found in [
            (b''.join(upload_notice(data))[4:], around_upload(300), upload_in),
            (b''.join(blob_chunk_notice(oid, tid, data))[4:], around_download(oid, tid, 300),
             download_in)]:
        assert header[4:] + data + tail == payload and int.from_bytes(header[:4], 'big') == len(payload)
        *whose, head, size, end = found(memoryview(payload[:len(header) - 4]), len(payload))  # type: ignore
        assert (head, size, end) == (len(header) - 4, 300, tail)
        assert whose in ([], [oid, tid])


@pytest.mark.parametrize('kind', ['up', 'down'])
def test_what_is_not_exactly_the_beginning_of_a_piece_is_none(kind: str) -> None:
    data = bytes(300)
    if kind == 'up':
        found, (header, tail), variable = upload_in, around_upload(300), set[int]()
    else:
        head, tail = around_download(b'oidoidoi', b'tidtidti', 300)
        found, header = download_in, head  # type: ignore[assignment]
        at = head.index(b'oidoidoi') - 4
        variable = {*range(at, at + 8), *range(at + 10, at + 18)}
    payload = header[4:] + data + tail
    beginning = header[4:]
    assert found(memoryview(payload), len(payload)) is not None
    for length in len(payload) - 1, len(payload) + 1, 2**32 - 1:
        assert found(memoryview(payload), length) is None
    for size in range(len(beginning)):
        assert found(memoryview(beginning)[:size], len(payload)) is None
    for at in set(range(len(beginning))) - variable:
        altered = bytearray(beginning)
        altered[at] ^= 1
        assert found(memoryview(altered), len(payload)) is None
    short = (around_upload(200) if kind == 'up' else around_download(bytes(8), bytes(8), 200))[0]
    assert found(memoryview(short[4:]), len(short) - 4 + 200 + len(tail)) is None
