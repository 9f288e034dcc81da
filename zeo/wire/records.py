"""What is asked of records without reading them as their classes would: is this a blob's, to what does it refer.

ZODB's own functions for this run the record's pickles in part, and a record is a program that some client has
written.  `ZODB.blob.is_blob_record` lets it make blobs, with files; and both let it ask for a memo of any size: 20
bytes of a pickle can take gigabytes.
"""

import pickletools
import re
from struct import Struct
from struct import error as StructError

from ZODB.POSException import StorageError
from ZODB.serialize import referencesf

#: The first pickle of a blob's record: the class, put into the memo or not.
_is_blobs = re.compile(
    rb'(\x80[\x00-\x05])?cZODB\.blob\nBlob\n(q.|r....|p[0-9]{1,9}\n|\x94)?\.', re.DOTALL).match


def is_blob_record(record: bytes | None) -> bool:
    """Whether an object is a blob: what `ZODB.blob.is_blob_record` says of records that ZODB has written."""
    return record is not None and _is_blobs(record) is not None


def references(record: bytes, oids: list[bytes] | None = None) -> list[bytes]:
    """What `ZODB.serialize.referencesf` returns; `StorageError` for a memo that is much larger than the record."""
    if _may_be_sparse(record) is not None and _is_sparse(record):
        raise StorageError('a record whose memo has holes: it would take much memory to read it')
    found: list[bytes] = referencesf(record, oids)
    return found


# ---- the memo
#
# Indexes up to this are no matter, and few records have larger ones.

_HARMLESS = 65_536

#: What may be the use of a large index, or just some text.
_may_be_sparse = re.compile(rb'r..(?!\x00\x00)|p[0-9 +_-]{6}', re.DOTALL).search

_OPCODES = {opcode.name: ord(opcode.code) for opcode in pickletools.opcodes}
_LONG_BINPUT, _PUT, _STOP = _OPCODES['LONG_BINPUT'], _OPCODES['PUT'], _OPCODES['STOP']

# Of each opcode: its whole size, or where its size is found.
_COUNTED_1, _COUNTED_4, _COUNTED_8, _LINE, _LINES, _UNKNOWN = range(20, 26)


def _sizes() -> bytes:
    sizes = bytearray([_UNKNOWN]) * 256
    for opcode in pickletools.opcodes:
        if opcode.arg is None:
            size = 1
        elif opcode.arg.n >= 0:
            size = 1 + opcode.arg.n
        elif opcode.arg.n == pickletools.UP_TO_NEWLINE:
            size = _LINES if opcode.name in ('GLOBAL', 'INST') else _LINE
        else:
            size = {pickletools.TAKEN_FROM_ARGUMENT1: _COUNTED_1, pickletools.TAKEN_FROM_ARGUMENT4: _COUNTED_4,
                    pickletools.TAKEN_FROM_ARGUMENT4U: _COUNTED_4,
                    pickletools.TAKEN_FROM_ARGUMENT8U: _COUNTED_8}[opcode.arg.n]
        sizes[ord(opcode.code)] = size
    return bytes(sizes)


_SIZES = _sizes()
_length4_at = Struct('<I').unpack_from
_length8_at = Struct('<Q').unpack_from


def _is_sparse(record: bytes) -> bool:
    """Whether one of the record's two pickles puts something into its memo far behind all else."""
    at = 0
    most = max(_HARMLESS, len(record))
    try:
        for _ in 'class', 'state':
            while True:
                code = record[at]
                size = _SIZES[code]
                if size < _COUNTED_1:
                    if code == _LONG_BINPUT and _length4_at(record, at + 1)[0] > most:
                        return True
                    at += size
                    if code == _STOP:
                        break
                elif size == _COUNTED_1:
                    at += 2 + record[at + 1]
                elif size == _COUNTED_4:
                    at += 5 + _length4_at(record, at + 1)[0]
                elif size == _COUNTED_8:
                    at += 9 + _length8_at(record, at + 1)[0]
                elif size == _UNKNOWN:
                    return False  # whoever reads it finds out
                else:
                    end = record.index(b'\n', at)
                    if code == _PUT and end - at > 6 and not 0 <= int(record[at + 1:end]) <= most:
                        return True
                    at = end + 1 if size == _LINE else record.index(b'\n', end + 1) + 1
    except (IndexError, StructError, ValueError):
        pass  # damaged: whoever reads it finds out
    return False
