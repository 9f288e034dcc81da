"""What a server knows, and whether a cache says anything else."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from ZODB.utils import p64, z64

from zeo.client.cache import Cache, open_cache

FAR_FUTURE = b'\xff' * 8
SMALL = 64 + 16 * 512       # bytes: 16 segments of the shortest kind


class Truth:
    """All revisions of all objects: what is committed here is what the server would say."""

    def __init__(self) -> None:
        self.revisions: dict[bytes, list[tuple[bytes, bytes]]] = {}
        self.last_tid = z64
        self._latest = 0    # of all tids that were ever given

    def commit(self, *oids: bytes, size: int = 20) -> bytes:
        """A transaction that changes `oids`; each record tells whose it is."""
        self._latest += 10
        self.last_tid = p64(self._latest)
        for oid in oids:
            data = (oid + self.last_tid) * (size // 16 + 1)
            self.revisions.setdefault(oid, []).append((self.last_tid, data[:size]))
        return self.last_tid

    def restore(self, tid: bytes) -> None:
        """The database is restored from a backup that ends at `tid`; later tids stay later than all there were."""
        self.last_tid = tid
        for oid, revisions in list(self.revisions.items()):
            self.revisions[oid] = [revision for revision in revisions if revision[0] <= tid]

    def loadBefore(self, oid: bytes, tid: bytes) -> tuple[bytes, bytes, bytes | None] | None:
        end = None
        for start, data in reversed(self.revisions.get(oid, ())):
            if start < tid:
                return data, start, end
            end = start
        return None

    def end(self, oid: bytes, start: bytes) -> bytes | None:
        return next((tid for tid, _ in self.revisions[oid] if tid > start), None)

    def changed_since(self, tid: bytes) -> list[bytes]:
        return [oid for oid, revisions in self.revisions.items() if revisions and revisions[-1][0] > tid]

    def is_current(self, oid: bytes, start: bytes) -> bool:
        """Whether that is a revision, and the last one."""
        return any(tid == start for tid, _ in self.revisions[oid][-1:])

    def check(self, cache: Cache) -> None:
        """The cache says nothing that is not so (as of its last tid)."""
        for oid, start, end in list(cache.contents()):
            self.check_one(cache, oid, end or FAR_FUTURE)
            assert start in [tid for tid, _ in self.revisions[oid]]
        for oid in self.revisions:
            self.check_one(cache, oid, FAR_FUTURE)
            self.check_one(cache, oid, cache.last_tid)

    def check_one(self, cache: Cache, oid: bytes, before: bytes) -> None:
        found = cache.loadBefore(oid, before)
        if found is None:
            return
        data, start, end = found
        assert (start, data) in self.revisions[oid]
        assert start < before
        truly = self.end(oid, start)
        if end is None:
            assert truly is None or truly > cache.last_tid, 'stale'
        else:
            assert end == truly and before <= end


def teach(cache: Cache, truth: Truth, oid: bytes, before: bytes = FAR_FUTURE) -> None:
    """Load from the server what the cache does not have, as a client does."""
    if cache.loadBefore(oid, before) is None and (found := truth.loadBefore(oid, before)) is not None:
        data, start, end = found
        cache.store(oid, start, end, data)


def renew(cache: Cache, tid: bytes, oids: Iterable[bytes], records: Mapping[bytes, bytes]) -> None:
    """A transaction of this client has changed `oids`; of some of them it has the new records."""
    cache.renew(tid, {**dict.fromkeys(oids), **records}, records.items)


def copied(cache: Cache, to: Path, size: int = SMALL) -> Cache:
    """What a process would find that opens the file after this one was killed."""
    assert cache.path is not None
    to.write_bytes(Path(cache.path).read_bytes())
    return open_cache(str(to), size)


def knowledge(cache: Cache) -> tuple[object, ...]:
    """All that a cache knows."""
    return cache.last_tid, sorted(cache.contents(), key=repr), sorted(cache.suspects())
