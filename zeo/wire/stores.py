"""Many stores in one message: what is told of each in one row, and all the records in another.

Of each object there are its oid and the serial of the revision that was changed, 8 bytes each, and the length
of its record as four bytes, unsigned and big-endian.  So the two sides have next to nothing to do for each.
"""

from struct import Struct

HEAD = Struct('>8s8sI')
assert HEAD.size == 20

#: So many stores, and bytes of records, one message may have: each store takes memory before it can be counted.
MOST, MOST_BYTES = 2**16, 16 * 1024 * 1024

#: What is stored: oid, serial, record.
Store = tuple[bytes, bytes, bytes]

#: How an oid begins that leaves no room for later ones.
_LAST_OIDS = b'\xff\xff\xff\xff'


class Batch:
    """Stores that wait to be sent together; ``size`` is how many bytes of records they have."""

    __slots__ = ('size', '_heads', '_records')

    def __init__(self) -> None:
        self.size = 0
        self._heads: list[bytes] = []
        self._records: list[bytes] = []

    def add(self, oid: bytes, serial: bytes, record: bytes) -> int:
        """One more, with ids of 8 bytes each; returns `size`."""
        length = len(record)
        self._heads.append(HEAD.pack(oid, serial, length))
        self._records.append(record)
        self.size += length
        return self.size

    def take(self) -> tuple[bytes, list[bytes]]:
        """All heads, and the records; then it is empty."""
        heads, records = b''.join(self._heads), self._records
        self._heads, self._records, self.size = [], [], 0
        return heads, records

    def __bool__(self) -> bool:
        return bool(self._heads)


def unpack(heads: bytes, records: bytes) -> list[Store]:
    """What is stored; `TypeError` or `ValueError` if a store like that would not be taken singly, either."""
    if type(heads) is not bytes or type(records) is not bytes or len(heads) % HEAD.size:
        raise TypeError('stores are rows of bytes')
    if len(heads) > MOST * HEAD.size or len(records) > MOST_BYTES:
        raise ValueError(f'more than {MOST} stores, or {MOST_BYTES} bytes, in one message')
    stores = []
    at = 0
    for oid, serial, length in HEAD.iter_unpack(heads):
        if not length:
            raise ValueError('a record is never empty')
        if oid >= _LAST_OIDS:
            raise ValueError('an oid that leaves no room for later ones')
        stores.append((oid, serial, records[at:at + length]))
        at += length
    if at != len(records):
        raise ValueError('stores whose lengths are not those of their records')
    return stores
