"""The messages that carry a piece of a blob, up to the server or down to the client."""

from zeo.wire.framing import HEADER
from zeo.wire.framing import Frame
from zeo.wire.framing import Payload
from zeo.wire.framing import frame
from zeo.wire.messages import END
from zeo.wire.messages import IS_NOTICE
from zeo.wire.messages import NO_ID
from zeo.wire.messages import START
from zeo.wire.messages import FromClient
from zeo.wire.messages import FromServer
from zeo.wire.opcodes import EIGHT
from zeo.wire.opcodes import length4_at
from zeo.wire.opcodes import pickled_bytes_head
from zeo.wire.opcodes import pickled_text

_IS_BLOB_CHUNK = START + IS_NOTICE + pickled_text('receiveBlobChunk') + EIGHT
_ENDS_DOWNLOAD = b'\x87' + END
_DOWNLOAD_HEAD = len(_IS_BLOB_CHUNK) + 18 + 5


def blob_chunk_notice(oid: bytes, tid: bytes, data: bytes) -> Frame:
    """``receiveBlobChunk(oid, tid, data)``; a long piece is not copied."""
    return frame(_IS_BLOB_CHUNK + oid + EIGHT + tid + pickled_bytes_head(len(data)), data,
                 _ENDS_DOWNLOAD)


def around_download(oid: bytes, tid: bytes, size: int) -> tuple[bytes, bytes]:
    """What stands before and after so many bytes of data (more than 255) in ``receiveBlobChunk``."""
    head = _IS_BLOB_CHUNK + oid + EIGHT + tid + pickled_bytes_head(size)
    return HEADER.pack(len(head) + size + len(_ENDS_DOWNLOAD)) + head, _ENDS_DOWNLOAD


def download_in(beginning: memoryview, length: int) -> tuple[bytes, bytes, int, int, bytes] | None:
    """If so begins a long ``receiveBlobChunk`` of so many bytes: oid and tid, and where the data are.

    That is how many bytes stand before them, how many they are, and what has to stand after them.
    """
    head = bytes(beginning[:_DOWNLOAD_HEAD])
    at = len(_IS_BLOB_CHUNK)
    if head[:at] != _IS_BLOB_CHUNK or head[at + 8:at + 10] != EIGHT:
        return None
    size = _long_bytes(head, _DOWNLOAD_HEAD, length - len(_ENDS_DOWNLOAD))
    return None if size is None else (head[at:at + 8], head[at + 10:at + 18], len(head), size, _ENDS_DOWNLOAD)


def download_of(data: Payload) -> FromServer | None:
    """``receiveBlobChunk``; the piece is not copied, but a `memoryview` of the message, and only lent like that."""
    if data[:len(_IS_BLOB_CHUNK)] != _IS_BLOB_CHUNK:
        return None
    at = len(_IS_BLOB_CHUNK) + 18
    piece = _last_bytes(data, at, _ENDS_DOWNLOAD)
    if piece is None or data[at - 10:at - 8] != EIGHT:
        return None
    return 0, 1, 'receiveBlobChunk', (bytes(data[at - 18:at - 10]), bytes(data[at - 8:at]), piece)


_IS_UPLOAD = START + IS_NOTICE + pickled_text('storeBlobChunk')
_ENDS_UPLOAD = b'\x85' + END
_UPLOAD_HEAD = len(_IS_UPLOAD) + 5


def upload_notice(data: bytes) -> Frame:
    """``storeBlobChunk(data)``; it is not copied."""
    head = _IS_UPLOAD + pickled_bytes_head(len(data))
    return HEADER.pack(len(head) + len(data) + len(_ENDS_UPLOAD)) + head, data, _ENDS_UPLOAD


def around_upload(size: int) -> tuple[bytes, bytes]:
    """What stands before and after so many bytes of data (more than 255) in ``storeBlobChunk``."""
    head = _IS_UPLOAD + pickled_bytes_head(size)
    return HEADER.pack(len(head) + size + len(_ENDS_UPLOAD)) + head, _ENDS_UPLOAD


def upload_in(beginning: memoryview, length: int) -> tuple[int, int, bytes] | None:
    """If so begins a long ``storeBlobChunk`` of so many bytes: where the data are, as in `download_in`."""
    head = bytes(beginning[:_UPLOAD_HEAD])
    if head[:len(_IS_UPLOAD)] != _IS_UPLOAD:
        return None
    size = _long_bytes(head, _UPLOAD_HEAD, length - len(_ENDS_UPLOAD))
    return None if size is None else (len(head), size, _ENDS_UPLOAD)


def upload_of(data: Payload) -> FromClient | None:
    """``storeBlobChunk``; the piece is not copied, but a `memoryview` of the message."""
    if data[:len(_IS_UPLOAD)] != _IS_UPLOAD:
        return None
    piece = _last_bytes(data, len(_IS_UPLOAD), _ENDS_UPLOAD)
    return None if piece is None else (NO_ID, True, 'storeBlobChunk', (piece,))


def _long_bytes(head: bytes, whole: int, end: int) -> int | None:
    """The length of the bytes whose pickle begins with the last 5 of ``whole`` and ends at ``end``, if so it does."""
    if len(head) < whole or head[-5] != 0x42:
        return None
    size: int = length4_at(head, whole - 4)[0]
    return size if whole + size == end else None


def _last_bytes(data: Payload, at: int, end: bytes) -> memoryview | None:
    """The bytes that are pickled at ``at`` if nothing but ``end`` comes after them."""
    code = data[at:at + 1]
    if code == b'B' and len(data) >= at + 5:
        length = length4_at(data, at + 1)[0]
        at += 5
    elif code == b'C' and len(data) >= at + 2:
        length = data[at + 1]
        at += 2
    else:
        return None
    if len(data) != at + length + len(end) or data[at + length:] != end:
        return None
    return memoryview(data)[at:at + length]
