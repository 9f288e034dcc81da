"""The file of a client's cache: a log of records in a ring of segments.  Knows bytes, not what they mean.

Layout
------

The file starts with 64 bytes of *header*: the magic ``zeocache``, the format's version (1 byte), 1 if
the file was closed cleanly, else 0 (1 byte), two bytes unused, the length of a segment (4 bytes), the
*epoch* (8 random bytes, new each time the log starts over), a digest of the storage's name (16
bytes), the identity of the server (16 bytes, zeros if unknown), the checksum of the summary (4
bytes, zeros if there is none), and a checksum of all that (4 bytes).

Segments of equal length follow.  A segment that was ever used starts with 32 bytes: the first half of
the magic, 4 random bytes, its number (8 bytes, one more than that of the segment begun before it), the
cache's last tid at that moment (8 bytes), the last checksum of the segment before it (4 bytes), and a
checksum (4 bytes).  Records follow one another without gaps.  A record is about one or more revisions that come
in one go.  It starts with a *head*: its checksum (4 bytes), a tag (4 bytes), an end tid (8 bytes), the
number of its *contents* (4 bytes); of each its name, which is an oid and a start tid (8 bytes each);
then of each the length of its body (4 bytes).  The contents follow: the name once more, the *body*,
and the checksum of both (4 bytes, little-endian), so that each proves by itself that it is this body of
that oid and start.  What end, oid, start and body mean is up to the tag.

Other numbers are big-endian, all checksums CRC-32.  Those of segments and heads form a chain: a
segment's starts from the epoch, a head's from the one before it.  So what an earlier round of the
ring, an earlier epoch, or a tail cut off by a crash left behind never reads as part of the log.

The last sixteenth of the file is for the *summary*: its length (8 bytes), where the log ends (see
`SUMMARY`), the segments in use (start and length, 8 bytes each), and then what the log's owner wants
to remember.  It is written when the file is closed, if there is room for it, and believed if the
header has its checksum; it spares the replay, and says nothing that a replay would not.

Why a log
---------

Records are appended and never changed, so whatever is lost at the end, the rest is what the cache
once was: a *prefix*, with the last tid it had then.  Segments are reused in the order in which they
were begun, so whatever is lost at the beginning, later records do not need it.  What is lost in
between is a *gap*, which `Log.replay` reports.

Bodies need not be looked at to replay the log; who reads one later compares the checksum.
"""

import errno
import fcntl
import os
import stat
import struct
import tempfile
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from io import FileIO
from itertools import chain, repeat
from struct import Struct
from typing import NamedTuple

__all__ = ['ALONE', 'COLLECTED', 'MANY', 'RESIDUE', 'SIZE_BITS', 'Content', 'Log', 'Record', 'Unusable', 'claim', 'pack', 'pack_all', 'repack', 'unnamed', 'unpack']

MAGIC = b'zeocache'
SIGN = MAGIC[:4]
VERSION = 3

HEADER = Struct('>8s B B 2x I 8s 16s 16s I')    # then the checksum
SEGMENT = Struct('>4s 4s Q Q I')                # then the checksum
CHECK = Struct('>I')
HEAD = Struct('>I 4s Q I')                      # starting with its own checksum; names and lengths follow
FRONT = Struct('>4s Q I')                       # the same without that
CONTENT_CHECK = Struct('<I')
LENGTH = Struct('>I')                          # of a body, in a head
SUMMARY = Struct('>Q Q Q Q I I')                # the file's maximum length; number, start and position of the open segment,
                                                # last checksum, number of other segments
CLOSED = Struct('>Q Q')                         # start and used length of a segment

FIRST = 64                                      # where the first segment starts
SEGMENT_SIZE = SEGMENT.size + CHECK.size
NAME_SIZE = 8 + 8                               # oid and start
ROW_SIZE = NAME_SIZE + LENGTH.size                      # what a head says of one content
PROOF_SIZE = NAME_SIZE + CONTENT_CHECK.size     # content without the body
AROUND = ROW_SIZE + PROOF_SIZE                  # what a record needs for each body
ALONE = HEAD.size + AROUND                      # a record of one content without its body

assert HEADER.size + CHECK.size == FIRST
assert SEGMENT_SIZE == 32 and CHECK.size + FRONT.size == HEAD.size == 20

#: The CRC-32 of anything that ends with its own CRC-32, least significant byte first.
RESIDUE = 0x2144DF1C

assert zlib.crc32(b'zeo' + CONTENT_CHECK.pack(zlib.crc32(b'zeo'))) == RESIDUE

#: No content may be longer, however large the cache: its length shares 8 bytes with its offset.
SIZE_BITS = 24
LARGEST = (1 << SIZE_BITS) - 1

#: A file has some 16 segments, more if they would be longer than 4 MB: reading one anew, when its
#: turn to be reused has come, holds up who wants to change the cache for a millisecond or two.
SEGMENTS = 16
SHORTEST, LONGEST = 512, 4 << 20
FEWEST = 4

#: So many bytes are collected before they are written.
COLLECTED = 64 << 10

#: So many contents a record may have.
MANY = 256

#: So many bytes are read when records are looked for, but not their bodies.  More than any head has.
PIECE = 64 << 10

assert HEAD.size + MANY * ROW_SIZE < PIECE


class Unusable(Exception):
    """The file holds no log that could be continued; says why."""


class Record(NamedTuple):
    """A content, as it was found in the log."""

    tag: bytes
    oid: int
    start: int
    end: int
    place: int          # of the content


def unnamed() -> FileIO:
    """A temporary file without a name: it is gone when it is closed, or its process killed."""
    descriptor, name = tempfile.mkstemp(prefix='zeo-', suffix='.zec')
    os.unlink(name)
    return FileIO(descriptor, 'r+')


def claim(path: str) -> FileIO:
    """Open the file, for this process alone; OSError if that cannot be.

    The lock (flock) belongs to the open file: a forked child does not give it up by closing its copy.
    """
    file = FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o600), 'r+')
    try:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError('it is no regular file')
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError('another client has it open') from None
        # Whoever names a cache's file `Data.fs` by mistake shall not lose it.
        beginning = os.pread(file.fileno(), 4096, 0)
        if beginning and SIGN not in beginning and not path.endswith('.zec'):
            raise OSError('it is something else than a cache')
    except BaseException:
        file.close()
        raise
    return file


#: What is appended: name (oid and start), body, checksum.
Content = tuple[bytes, bytes, bytes]


def pack(oid: bytes, start: bytes, body: bytes) -> Content:
    """Content, ready to be appended; the body is not copied."""
    name = oid + start
    return name, body, CONTENT_CHECK.pack(zlib.crc32(body, zlib.crc32(name)))


def pack_all(names: Iterable[bytes], bodies: Iterable[bytes]) -> list[Content]:
    """The same for many: a loop without a line of Python in it."""
    names, bodies = list(names), list(bodies)
    return list(zip(names, bodies, map(CONTENT_CHECK.pack, map(zlib.crc32, bodies, map(zlib.crc32, names)))))


def repack(content: bytes) -> Content:
    """What was read, whatever it is, ready to be appended."""
    return content[:NAME_SIZE], content[NAME_SIZE:-CONTENT_CHECK.size], content[-CONTENT_CHECK.size:]


def unpack(content: bytes) -> tuple[bytes, bytes, bytes] | None:
    """Oid, start and body; None if this is not what was packed."""
    if zlib.crc32(content) != RESIDUE:
        return None
    return content[:8], content[8:16], content[16:-4]


class Log:
    """Appends records to a file, finds them again, makes room by giving up the oldest.

    Not locked; its owner lets one thread at a time change it.  `read` may be called at any time.
    All methods may raise OSError.  After that, or any other exception, nothing but `start_over`
    makes the log usable again; the file remains what it was, up to some record.

    `storage` and `server` are 16 bytes each.
    """

    def __init__(self, file: FileIO, size: int, storage: bytes) -> None:
        self._file = file
        self._fd = file.fileno()
        self._size = size
        self.storage = storage
        self.server = bytes(16)
        self.segment: int = max(SHORTEST, min(self._ring() // SEGMENTS, LONGEST))
        self._epoch = bytes(8)
        self._summary_check = 0
        #: The segments in use but the open one, oldest first: where they start, how much is used.
        self._closed: deque[tuple[int, int]] = deque()
        self._free: list[int] = []
        #: The open segment: its number, where it starts, where the next record goes, the checksum to
        #: chain to.  0, 0: none is open.
        self._number = self._start = self._position = self._check = 0
        #: How often a segment was begun.  A place is given to something else only after that changed.
        self.begun = 0
        #: What was appended and is not in the file yet belongs at `_written`.  Contents among it, by place.
        #: Replaced, never emptied, and only when the file has them: `read` does not lock.
        self._chunks: list[bytes] = []
        self._written = 0
        self.pending: dict[int, Content] = {}

    def _ring(self) -> int:
        return self._size - FIRST - self._size // SEGMENTS

    def _slots(self) -> int:
        return max(FEWEST, self._ring() // self.segment)

    def _starts(self) -> list[int]:
        """Where segments may be, the first one last."""
        return [FIRST + slot * self.segment for slot in reversed(range(self._slots()))]

    @property
    def room(self) -> int:
        """The length of the longest body that a segment can take."""
        return min(LARGEST - PROOF_SIZE, self.segment - SEGMENT_SIZE - ALONE)

    @property
    def filled(self) -> int:
        """How many bytes of records the open segment has."""
        return self._position - self._start - SEGMENT_SIZE

    @property
    def extent(self) -> int:
        """The file never gets longer than this."""
        return max(self._size, FIRST + FEWEST * SHORTEST)

    @property
    def empty(self) -> bool:
        """Whether the file is a new one."""
        return os.fstat(self._fd).st_size == 0

    # Beginning and end

    def start_over(self, last_tid: int) -> None:
        """Begin an empty log."""
        self._epoch, self._summary_check = os.urandom(8), 0
        self._chunks, self.pending = [], {}
        os.ftruncate(self._fd, 0)
        self.mark(clean=False)
        self._closed.clear()
        self._free = self._starts()
        self._number = self._start = self._position = 0
        self.begin(last_tid)

    def close(self, summary: bytes | None = None) -> None:
        """Close the file: cleanly, and with a `summary` for who opens it next, unless that is None."""
        try:
            if summary is not None:
                self.flush()
                self._summary_check = self._summarize(summary)
                self.mark(clean=True)
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)      # a child may have inherited it
            self.abandon()

    def _summarize(self, summary: bytes) -> int:
        """Write the summary, if there is room for it; gives its checksum."""
        data = b''.join([SUMMARY.pack(self.extent, self._number, self._start, self._position, self._check,
                                      len(self._closed)),
                         *(CLOSED.pack(*segment) for segment in self._closed), summary])
        data = len(data).to_bytes(8) + data
        offset = FIRST + self._slots() * self.segment
        if offset + len(data) > self.extent:
            return 0
        self._write(data, offset)
        return zlib.crc32(data)

    def recall(self) -> bytes | None:
        """The summary, if there is a sound one; then the log can be continued, and need not be replayed."""
        offset = FIRST + self._slots() * self.segment
        data = os.pread(self._fd, self.extent - offset, offset)
        data = data[:8 + int.from_bytes(data[:8])]
        expected, self._summary_check = self._summary_check, 0
        if not expected or zlib.crc32(data) != expected:
            return None
        extent, number, start, position, check, closed = SUMMARY.unpack_from(data, 8)
        if extent != self.extent:
            return None
        self._number, self._start, self._position, self._check = number, start, position, check
        self._written = self._position
        end = 8 + SUMMARY.size + closed * CLOSED.size
        self._closed = deque(CLOSED.iter_unpack(data[8 + SUMMARY.size:end]))
        used = {self._start, *(start for start, _ in self._closed)}
        self._free = [start for start in self._starts() if start not in used]
        return data[end:]

    def abandon(self) -> None:
        """Close this process' copy of the file, which stays another one's to write and to lock."""
        self._fd = -1       # the number may soon be that of another file
        self._file.close()

    def mark(self, clean: bool) -> None:
        """Write the header; `clean` says that nothing will be appended."""
        header = HEADER.pack(MAGIC, VERSION, clean, self.segment, self._epoch, self.storage, self.server,
                             self._summary_check)
        self._write(header + CHECK.pack(zlib.crc32(header)), 0)

    # Appending

    def fits(self, length: int, count: int = 1) -> bool:
        """Whether a record of so many bodies, which have that length together, fits into the open segment."""
        return self._position + HEAD.size + count * AROUND + length <= self._start + self.segment

    def append(self, tag: bytes, end: int, content: Content) -> int:
        """Append a record of one content that `fits`, made with `pack`; tells its place."""
        name, body, body_check = content
        size = len(body)
        head = FRONT.pack(tag, end, 1) + name + LENGTH.pack(size)
        self._check = check = zlib.crc32(head, self._check)
        self._chunks += CHECK.pack(check), head, name, body, body_check
        at = self._position + HEAD.size + ROW_SIZE
        place = at << SIZE_BITS | PROOF_SIZE + size
        self._position = at + PROOF_SIZE + size
        self.pending[place] = content
        if self._position - self._written >= COLLECTED:
            self.flush()
        return place

    def append_all(self, tag: bytes, contents: list[Content]) -> list[int]:
        """Append a record of all these that `fits`, with no end; tells their places."""
        names, bodies, _ = zip(*contents)
        sizes = list(map(len, bodies))
        count = len(sizes)
        head = b''.join([FRONT.pack(tag, 0, count), *names, struct.pack(f'>{count}I', *sizes)])
        self._check = check = zlib.crc32(head, self._check)
        self._chunks += CHECK.pack(check), head, *chain.from_iterable(contents)
        at = self._position + HEAD.size + count * ROW_SIZE
        places = []
        for size in sizes:
            size += PROOF_SIZE
            places.append(at << SIZE_BITS | size)
            at += size
        self._position = at
        self.pending.update(zip(places, contents))
        if at - self._written >= COLLECTED:
            self.flush()
        return places

    def flush(self) -> None:
        """Let the file have all that was appended; after a kill that is what is found."""
        if self._chunks:
            body = self._chunks[-2] if len(self._chunks) > 1 else b''
            if len(body) >= COLLECTED:      # not copied, and written before what makes it a record
                check = self._chunks[-1]
                self._write(check, self._position - len(check))
                self._write(body, self._position - len(check) - len(body))
                self._write(b''.join(self._chunks[:-2]), self._written)
            else:
                self._write(b''.join(self._chunks), self._written)
            self._chunks, self.pending = [], {}
            self._written = self._position

    def oldest(self) -> list[Record]:
        """The records that are lost when `begin` is called next.  Long bodies are not read."""
        records: list[Record] = []
        if self._free:
            return records
        position, used = self._closed[0]
        base, at, check = 0, SEGMENT_SIZE, 0    # where in the segment the image begins, where in it to go on
        image = os.pread(self._fd, min(PIECE, self.segment), position)
        if self._segment_header(image[:SEGMENT_SIZE]):
            check = int.from_bytes(image[SEGMENT.size:SEGMENT_SIZE], 'big')
            found, at, check = self._records(image, position, self.segment, at, check)
            while found:
                records += found
                base, at = base + at, 0
                if base >= used:
                    break
                image = os.pread(self._fd, min(PIECE, self.segment - base), position + base)
                found, at, check = self._records(image, position + base, self.segment - base, at, check)
        if base + at != used:
            raise OSError(errno.EIO, 'somebody else changed or damaged the file')
        return records

    def content(self, place: int, image: bytes) -> bytes:
        """The content there, in the bytes of its segment."""
        start = ((place >> SIZE_BITS) - FIRST) % self.segment
        return image[start:start + (place & LARGEST)]

    def begin(self, last_tid: int) -> None:
        """Begin a segment, in the place of the oldest one if none is free."""
        self.flush()
        if self._start:
            self._closed.append((self._start, self._position - self._start))
        self._start = self._free.pop() if self._free else self._closed.popleft()[0]
        self._number += 1
        self.begun += 1
        header = SEGMENT.pack(SIGN, os.urandom(4), self._number, last_tid, self._check)
        self._check = zlib.crc32(header, zlib.crc32(self._epoch))
        self._chunks = [header + CHECK.pack(self._check)]
        self._written = self._start
        self._position = self._start + SEGMENT_SIZE

    def _write(self, data: bytes, offset: int) -> None:
        if os.pwrite(self._fd, data, offset) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    # Reading

    def read(self, place: int) -> bytes:
        """The content there, whatever it is now."""
        content = self.pending.get(place)
        if content is None:
            return os.pread(self._fd, place & LARGEST, place >> SIZE_BITS)
        return b''.join(content)

    def resume(self) -> bool:
        """Read the header of a file that exists; tells whether it was closed cleanly.  Unusable, if it cannot be."""
        data = os.pread(self._fd, FIRST, 0)
        header, check = data[:HEADER.size], data[HEADER.size:HEADER.size + CHECK.size]
        if len(check) < CHECK.size:
            raise Unusable('its header is cut off')
        if header[:len(MAGIC)] != MAGIC:
            raise Unusable('it does not look like a cache')
        if header[len(MAGIC)] != VERSION:
            raise Unusable(f'its format is version {header[len(MAGIC)]}, not {VERSION}')
        if CHECK.unpack(check) != (zlib.crc32(header),):
            raise Unusable('its header is damaged')
        _, _, clean, segment, epoch, storage, server, summary_check = HEADER.unpack(header)
        if storage != self.storage:
            raise Unusable('it belongs to another storage')
        if not self.segment // 4 <= segment <= max(self.segment, self._ring() // FEWEST):
            raise Unusable('it was made for another size')
        self.segment, self._epoch, self.server, self._summary_check = segment, epoch, server, summary_check
        os.ftruncate(self._fd, min(os.fstat(self._fd).st_size, self.extent))
        return bool(clean)

    def replay(self) -> Iterator[tuple[bool, int, list[Record], bytes]]:
        """All that can be read, a segment at a time, oldest first.  Then the log can be continued.

        Gives for each segment: whether there is a gap before it; the last tid when it was begun; its
        records; its bytes.  The first segment has no gap before it, because nothing does.
        """
        # Behind that may be a segment of a longer file, or a summary.  What is lost now must not come back later.
        end = FIRST + self._slots() * self.segment
        if os.fstat(self._fd).st_size > end:
            os.ftruncate(self._fd, end)
        headers = {}
        for position in self._starts():
            header = self._segment_header(os.pread(self._fd, SEGMENT_SIZE, position))
            if header is None:
                self._free.append(position)
            else:
                number, last_tid, before = header
                headers[number] = position, last_tid, before
        if not headers:
            raise Unusable('nothing in it can be read')
        self._summary_check = self._start = 0
        for number in sorted(headers):
            position, last_tid, before = headers[number]
            gap = False
            if self._start:
                gap = number != self._number + 1 or before != self._check
                self._closed.append((self._start, self._position - self._start))
            image = self._image(position)
            check = int.from_bytes(image[SEGMENT.size:SEGMENT_SIZE], 'big')
            records, end, self._check = self._records(image, position, len(image), SEGMENT_SIZE, check)
            self._number, self._start = number, position
            self._position = self._written = position + end
            yield gap, last_tid, records, image

    def _segment_header(self, data: bytes) -> tuple[int, int, int] | None:
        header = data[:SEGMENT.size]
        if (len(data) < SEGMENT_SIZE or header[:len(SIGN)] != SIGN or
                data[SEGMENT.size:SEGMENT_SIZE] != CHECK.pack(zlib.crc32(header, zlib.crc32(self._epoch)))):
            return None
        _, _, number, last_tid, before = SEGMENT.unpack(header)
        return number, last_tid, before

    def _image(self, position: int) -> bytes:
        """A segment's bytes; none if it does not start with its header."""
        image = os.pread(self._fd, self.segment, position)
        return image if self._segment_header(image[:SEGMENT_SIZE]) else b''

    def _records(self, image: bytes, position: int, length: int, at: int, check: int
                 ) -> tuple[list[Record], int, int]:
        """The records from `at` on, up to the first that cannot be one; where that is; the checksum there.

        `image` is what lies at `position`, `length` where the segment ends, `check` the checksum to chain to.
        Of a record that is cut off by that end there is nothing; a body whose bytes are wrong, or beyond the image, is.
        """
        records: list[Record] = []
        crc, end_of_image = zlib.crc32, len(image)
        while (rows := at + HEAD.size) <= end_of_image:
            head_check, tag, end, count = HEAD.unpack_from(image, at)
            following = rows + count * ROW_SIZE
            if following > end_of_image or head_check != crc(image[at + CHECK.size:following], check):
                break
            numbers = struct.unpack_from(f'>{2 * count}Q{count}I', image, rows)
            places = []
            for size in numbers[2 * count:]:
                size += PROOF_SIZE
                places.append(position + following << SIZE_BITS | size)
                following += size
            if following > length:
                break
            # what `Record` does, in a third of the time
            records += map(tuple.__new__, repeat(Record), zip(
                repeat(tag), numbers[:2 * count:2], numbers[1:2 * count:2], repeat(end), places))
            at, check = following, head_check
        return records, at, check
