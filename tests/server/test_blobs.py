"""zeo.server.blobs: uploads, downloads, and that nothing is left behind."""

import os
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ZODB.POSException
from ZODB.blob import Blob
from ZODB.blob import BlobStorage
from ZODB.blob import is_blob_record as zodbs_is_blob_record
from ZODB.FileStorage import FileStorage
from ZODB.POSException import StorageError
from ZODB.utils import maxtid
from ZODB.utils import z64

from tests.server.talk import SessionPeer
from tests.server.talk import oid
from tests.server.talk import tid
from zeo.errors import ProtocolError
from zeo.errors import ServerException
from zeo.server import blobs
from zeo.server.limits import Limits
from zeo.server.served import Served
from zeo.wire import pieces
from zeo.wire.chunks import around_upload

Serve = Callable[..., Served]
Connect = Callable[..., SessionPeer]

RECORD = b'the record of a blob'


@pytest.fixture
def storage(tmp_path: Path) -> Any:
    return FileStorage(str(tmp_path / 'Data.fs'), blob_dir=str(tmp_path / 'blobs'))


@pytest.fixture
def served(serve: Serve, storage: Any) -> Served:
    return serve(storage)


@pytest.fixture
def peer(served: Served, connect: Connect) -> SessionPeer:
    return connect(served)


def temporary(storage: Any) -> list[str]:
    return os.listdir(storage.temporaryDirectory())


def upload(peer: SessionPeer, number: int, *pieces: bytes, serial: bytes = z64, id: Any = 1) -> None:
    peer.tell('storeBlobStart')
    for piece in pieces:
        peer.tell('storeBlobChunk', piece)
    peer.tell('storeBlobEnd', oid(number), serial, RECORD, id)


def content(storage: Any, number: int, tid: bytes) -> bytes:
    with storage.openCommittedBlobFile(oid(number), tid) as file:
        data: bytes = file.read()
    return data


# ---- uploads


def test_what_is_uploaded_is_committed(peer: SessionPeer, storage: Any) -> None:
    peer.begin()
    upload(peer, 1, b'a' * 300_000, b'b' * 59_000, b'')
    assert len(temporary(storage)) == 1
    assert peer.call('vote', 1) == []
    tid = peer.call('tpc_finish', 1)
    assert content(storage, 1, tid) == b'a' * 300_000 + b'b' * 59_000
    assert storage.load(oid(1)) == (RECORD, tid)
    assert not temporary(storage)


def test_stock_clients_store_the_record_as_well(peer: SessionPeer, storage: Any) -> None:
    peer.begin(1, (oid(1), z64, RECORD))
    upload(peer, 1, b'data')
    peer.call('vote', 1)
    tid = peer.call('tpc_finish', 1)
    assert content(storage, 1, tid) == b'data'


def test_blobs_and_ordinary_objects_in_one_transaction(peer: SessionPeer, storage: Any) -> None:
    peer.begin(1, (oid(1), z64, b'before'))
    upload(peer, 2)
    peer.tell('storea', oid(3), z64, b'between', 1)
    upload(peer, 4, b'four')
    upload(peer, 5, b'fi', b've')
    peer.call('vote', 1)
    tid = peer.call('tpc_finish', 1)
    assert [content(storage, number, tid) for number in (2, 4, 5)] == [b'', b'four', b'five']
    assert storage.load(oid(1))[0] == b'before' and storage.load(oid(3))[0] == b'between'
    assert not temporary(storage)


def test_the_others_are_told_of_a_changed_blob(
        peer: SessionPeer, served: Served, connect: Connect) -> None:
    other = connect(served)
    peer.begin()
    upload(peer, 7, b'data')
    peer.call('vote', 1)
    tid = peer.call('tpc_finish', 1)
    other.call('ping')
    assert other.invalidations() == [(tid, [oid(7)])]


def test_data_are_on_disk_before_the_vote_is_answered(
        peer: SessionPeer, storage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    sync = os.fdatasync

    def fdatasync(number: int) -> None:
        sync(number)
        done.append(os.readlink(f'/proc/self/fd/{number}'))

    monkeypatch.setattr(blobs.os, 'fdatasync', fdatasync)
    peer.begin()
    upload(peer, 1, b'data')
    assert done == [os.path.join(storage.temporaryDirectory(), name) for name in temporary(storage)]
    path = shared_file(storage, 2, 'zeo-x.tmp', b'data')
    peer.tell('storeBlobShared', oid(2), z64, RECORD, 'zeo-x.tmp', 1)
    assert done[1:] == [path]
    peer.call('vote', 1)
    peer.call('tpc_finish', 1)


@pytest.mark.parametrize('finished', [False, True])
def test_an_aborted_upload_leaves_nothing(peer: SessionPeer, storage: Any, finished: bool) -> None:
    peer.begin()
    upload(peer, 1, b'data')
    peer.tell('storeBlobStart')
    peer.tell('storeBlobChunk', b'data')
    assert len(temporary(storage)) == 2
    if finished:
        peer.tell('storeBlobEnd', oid(2), z64, RECORD, 1)
        peer.call('vote', 1)
    peer.call('tpc_abort', 1)
    assert not temporary(storage)
    assert [name for _, _, files in os.walk(storage.blob_dir) for name in files] == ['.layout']


def test_a_lost_connection_leaves_nothing_of_its_upload(peer: SessionPeer, storage: Any) -> None:
    peer.begin()
    upload(peer, 1, b'data')
    peer.tell('storeBlobStart')
    peer.tell('storeBlobChunk', b'data')
    peer.close()
    assert not temporary(storage)


def test_a_conflict_leaves_nothing_of_an_upload(peer: SessionPeer, storage: Any) -> None:
    first = peer.commit(oid(1), b'one')
    peer.commit(oid(1), b'two')
    peer.begin(2)
    upload(peer, 5, b'data', id=2)
    peer.tell('storea', oid(1), first, b'three', 2)
    with pytest.raises(ZODB.POSException.ConflictError):
        peer.call('vote', 2)
    assert not temporary(storage)


def test_a_blob_can_be_voted_for_again_when_the_client_has_resolved_conflicts(
        serve: Serve, connect: Connect, storage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = connect(serve(storage, client_conflict_resolution=True))
    first = peer.commit(oid(1), b'one')
    for number, link in enumerate([os.link, _no_links]):
        monkeypatch.setattr(blobs.os, 'link', link)
        second = peer.commit(oid(1), b'two')
        peer.begin(2)
        upload(peer, 5 + number, b'data', id=2)
        peer.tell('storea', oid(1), first, b'three', 2)
        for _ in range(2):
            [conflict] = peer.call('vote', 2)
            assert conflict['serials'] == (second, first)
        peer.tell('storea', oid(1), second, b'resolved', 2)
        assert peer.call('vote', 2) == []
        tid = peer.call('tpc_finish', 2)
        assert content(storage, 5 + number, tid) == b'data'
        assert not temporary(storage)


def _no_links(*_: Any) -> None:
    raise PermissionError('this file system has no links')


@pytest.mark.parametrize('names', [
    ['storeBlobChunk'], ['storeBlobEnd'], ['storeBlobStart', 'storeBlobStart'],
    ['storeBlobStart', 'storeBlobEnd', 'storeBlobChunk']])
def test_pieces_out_of_order_end_the_connection(peer: SessionPeer, storage: Any, names: list[str]) -> None:
    args = {'storeBlobStart': (), 'storeBlobChunk': (b'data',), 'storeBlobEnd': (oid(1), z64, RECORD, 1)}
    peer.begin()
    with pytest.raises(ProtocolError):
        for name in names:
            peer.tell(name, *args[name])
    peer.close()
    assert not temporary(storage)


@pytest.mark.parametrize('name, args', [
    ('storeBlobStart', ()), ('storeBlobChunk', (b'data',)), ('storeBlobEnd', (oid(1), z64, RECORD, 1)),
    ('storeBlobShared', (oid(1), z64, RECORD, 'x.tmp', 1)),
    ('restoreBlobEnd', (oid(1), tid(5), RECORD, None, 1))])
def test_without_a_transaction_a_blob_ends_the_connection(
        peer: SessionPeer, storage: Any, name: str, args: Any) -> None:
    with pytest.raises(ProtocolError):
        peer.tell(name, *args)
    assert not temporary(storage)


def test_a_transaction_that_has_voted_takes_no_more_blobs(peer: SessionPeer, storage: Any) -> None:
    peer.begin()
    peer.call('vote', 1)
    with pytest.raises(ProtocolError):
        peer.tell('storeBlobStart')
    assert not temporary(storage)


# ---- what goes wrong is told by the vote, and names the file


def test_a_full_disk_is_told_by_the_vote(
        peer: SessionPeer, storage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    paths: list[str] = []

    def full(prefix: str, suffix: str, dir: str) -> tuple[int, str]:
        paths.append(f'{dir}/{prefix}full{suffix}')
        Path(paths[-1]).write_bytes(b'')
        return os.open('/dev/full', os.O_WRONLY), paths[-1]

    with monkeypatch.context() as patch:
        patch.setattr(blobs.tempfile, 'mkstemp', full)
        peer.begin()
        upload(peer, 1, b'data', b'data')
        upload(peer, 2, b'data')
    [path] = paths     # the second one was not even begun
    assert not os.path.exists(path)     # and the room is free at once
    with pytest.raises(ServerException) as caught:
        peer.call('vote', 1)
    assert 'No space left on device' in str(caught.value) and path in str(caught.value)
    peer.begin(2)
    upload(peer, 3, b'data', id=2)
    peer.call('vote', 2)
    assert content(storage, 3, peer.call('tpc_finish', 2)) == b'data'


def test_a_missing_folder_is_told_by_the_vote(peer: SessionPeer, storage: Any) -> None:
    os.rmdir(storage.temporaryDirectory())
    peer.begin()
    upload(peer, 1, b'data')
    with pytest.raises(ServerException) as caught:
        peer.call('vote', 1)
    assert 'No such file or directory' in str(caught.value)
    assert storage.temporaryDirectory() in str(caught.value)


def test_a_storage_without_blobs_says_so(serve: Serve, connect: Connect, tmp_path: Path) -> None:
    peer = connect(serve(FileStorage(str(tmp_path / 'Data.fs'))))
    peer.begin()
    upload(peer, 1, b'data')
    with pytest.raises(ServerException, match='has no blobs: it needs a blob directory'):
        peer.call('vote', 1)
    with pytest.raises(ZODB.POSException.Unsupported, match='has no blobs: it needs a blob directory'):
        peer.call('sendBlob', oid(1), tid(1))


# ---- long pieces, whose data go straight to the file


def pass_piece(peer: SessionPeer, data: bytes) -> bool:
    """Have a long piece arrive, unless the session wants to have it as a message."""
    head, tail = around_upload(len(data))
    passing = peer.session.divert(memoryview(head[4:] + data[:10]), len(head) - 4 + len(data) + len(tail))
    if passing is None:
        return False
    assert (passing.head, passing.left, passing.tail) == (len(head) - 4, len(data), tail)
    passing.take(memoryview(data))
    return True


def test_long_and_short_pieces_make_one_blob(peer: SessionPeer, storage: Any) -> None:
    peer.begin()
    peer.tell('storeBlobStart')
    assert pass_piece(peer, b'a' * 1000)
    peer.tell('storeBlobChunk', b'b' * 10)
    assert pass_piece(peer, b'c' * 1000)
    peer.tell('storeBlobEnd', oid(1), z64, RECORD, 1)
    peer.call('vote', 1)
    assert content(storage, 1, peer.call('tpc_finish', 1)) == b'a' * 1000 + b'b' * 10 + b'c' * 1000


@pytest.mark.parametrize('state', ['nothing', 'begun', 'ended', 'voted', 'failed', 'too large'])
def test_a_long_piece_that_should_not_come_is_handled_as_others_are(
        peer: SessionPeer, storage: Any, state: str) -> None:
    peer.session._limits = Limits(max_transaction=10_000 if state == 'too large' else 10**9)
    if state != 'nothing':
        peer.begin()
    if state == 'ended':
        upload(peer, 1, b'data')
    elif state == 'voted':
        upload(peer, 1, b'data')
        peer.call('vote', 1)
    elif state == 'failed':
        os.rmdir(storage.temporaryDirectory())
        upload(peer, 1, b'data')
    elif state == 'too large':
        peer.tell('storeBlobStart')
        assert pass_piece(peer, b'x' * 9000)
    assert not pass_piece(peer, b'x' * 1001)
    if state in ('failed', 'too large'):
        peer.tell('storeBlobChunk', b'x' * 1001)  # the vote will say so
        with pytest.raises(StorageError):
            peer.call('vote', 1)
    else:
        with pytest.raises(ProtocolError):
            peer.tell('storeBlobChunk', b'x' * 1001)


def test_a_full_disk_in_a_long_piece_is_told_by_the_vote(
        peer: SessionPeer, storage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(prefix: str, suffix: str, dir: str) -> tuple[int, str]:
        return os.open('/dev/full', os.O_WRONLY), f'{dir}/full'

    peer.begin()
    with monkeypatch.context() as patch:
        patch.setattr(blobs.tempfile, 'mkstemp', full)
        peer.tell('storeBlobStart')
    assert pass_piece(peer, b'x' * 1000)
    assert not pass_piece(peer, b'x' * 1000)
    peer.tell('storeBlobChunk', b'x' * 1000)
    peer.tell('storeBlobEnd', oid(1), z64, RECORD, 1)
    with pytest.raises(ServerException, match=f'No space left on device.*{storage.temporaryDirectory()}/full'):
        peer.call('vote', 1)


def test_a_blob_is_on_its_way_to_the_disk_while_it_arrives(
        peer: SessionPeer, storage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[tuple[int, int]] = []
    monkeypatch.setattr(blobs.os, 'posix_fadvise', lambda file, at, size, advice: begun.append((at, size)))
    monkeypatch.setattr(blobs, 'WRITE_AT', 10_000)
    peer.begin()
    upload(peer, 1, *[b'x' * 4_000] * 11)
    assert begun == [(0, 12_000), (12_000, 12_000), (24_000, 12_000)]


def test_it_may_be_left_to_the_system_when_data_get_to_the_disk(
        serve: Serve, connect: Connect, storage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> None:
        raise AssertionError('the disk is not waited for')

    monkeypatch.setattr(blobs.os, 'fdatasync', never)
    monkeypatch.setattr(blobs.os, 'posix_fadvise', never)
    monkeypatch.setattr(blobs, 'WRITE_AT', 10_000)
    peer = connect(serve(storage, blob_sync=False))
    peer.begin()
    upload(peer, 1, *[b'x' * 4_000] * 11)
    shared_file(storage, 2, 'zeo-x.tmp', b'data')
    peer.tell('storeBlobShared', oid(2), z64, RECORD, 'zeo-x.tmp', 1)
    peer.call('vote', 1)
    tid = peer.call('tpc_finish', 1)
    assert [content(storage, number, tid) for number in (1, 2)] == [b'x' * 44_000, b'data']


@pytest.mark.parametrize('most, offered', [(pieces.LONGEST_MESSAGE, True), (pieces.LONGEST_MESSAGE - 1, False)])
def test_long_pieces_are_offered_if_messages_may_be_so_long(peer: SessionPeer, most: int, offered: bool) -> None:
    peer.session._limits = Limits(max_message=most)
    for _ in range(2):
        info = peer.call('get_info')
        assert list(info['zeo']).count('pieces') == offered


def test_a_large_download_is_sent_from_the_file(peer: SessionPeer) -> None:
    sent: list[bytes] = []

    def send_file(head: bytes, file: int, at: int, size: int, tail: bytes, patience: float) -> bool:
        peer.outbox.deliver()  # as it does
        sent.append(os.pread(file, size, at))
        peer._hear(head[4:] + sent[-1] + tail)
        return len(sent) < 4 or not gone

    data = os.urandom(3 * pieces.LARGEST)
    tid = stored(peer, data)
    gone = False
    peer.outbox.send_file = send_file
    peer.call('sendBlob', oid(1), tid)
    assert not sent  # not asked for
    del peer.told[:]
    peer.call('sendBlob', oid(1), tid, True)
    assert b''.join(sent) == data
    names = [name for _, flag, name, _ in peer.told if flag]
    assert names == ['receiveBlobStart', *['receiveBlobChunk'] * len(sent), 'receiveBlobStop']
    gone = True
    del sent[:], peer.told[:]
    peer.call('sendBlob', oid(1), tid, True)
    assert len(sent) == 4 and not peer.notices('receiveBlobStop')


# ---- the folder that client and server share


def shared_file(storage: Any, number: int, name: str, data: bytes) -> str:
    folder = storage.fshelper.getPathForOID(oid(number), create=True)
    path = os.path.join(folder, name)
    Path(path).write_bytes(data)
    return path


@pytest.mark.parametrize('name', ['zeo-x.tmp', 'zeo-x.tmp-'])
def test_a_file_in_the_shared_folder_is_taken_over(peer: SessionPeer, storage: Any, name: str) -> None:
    path = shared_file(storage, 1, name, b'data')
    peer.begin()
    peer.tell('storeBlobShared', oid(1), z64, RECORD, name, 1)
    peer.call('vote', 1)
    assert content(storage, 1, peer.call('tpc_finish', 1)) == b'data'
    assert not os.path.exists(path)


def test_a_file_in_the_shared_folder_is_removed_with_its_transaction(
        peer: SessionPeer, storage: Any) -> None:
    path = shared_file(storage, 1, 'zeo-x.tmp', b'data')
    peer.begin()
    peer.tell('storeBlobShared', oid(1), z64, RECORD, 'zeo-x.tmp', 1)
    peer.close()
    assert not os.path.exists(path)


def test_a_folder_that_is_not_really_shared_is_told_by_the_vote(peer: SessionPeer, storage: Any) -> None:
    peer.begin()
    peer.tell('storeBlobShared', oid(1), z64, RECORD, 'zeo-x.tmp', 1)
    with pytest.raises(ServerException, match='is its shared blob_dir the folder of the storage'):
        peer.call('vote', 1)


@pytest.mark.parametrize('name', [
    'x', '../x.tmp', '/etc/passwd', '0x0123456789abcdef.blob', 'x.tmpxx', '', '.', 17, b'x.tmp', None])
def test_no_other_file_can_be_named(peer: SessionPeer, storage: Any, name: Any) -> None:
    peer.begin()
    with pytest.raises(ProtocolError):
        peer.tell('storeBlobShared', oid(1), z64, RECORD, name, 1)


# ---- copying from another storage


@pytest.mark.parametrize('shared', [False, True])
def test_a_blob_is_restored_with_its_tid(peer: SessionPeer, storage: Any, shared: bool) -> None:
    assert 'restoreBlob' in peer.call('get_info')['zeo']
    peer.begin(1, tid=tid(5 << 40), status=' ')
    if shared:
        shared_file(storage, 1, 'zeo-x.tmp', b'data')
        peer.tell('restoreBlobShared', oid(1), tid(5 << 40), RECORD, None, 'zeo-x.tmp', 1)
    else:
        peer.tell('storeBlobStart')
        peer.tell('storeBlobChunk', b'data')
        peer.tell('restoreBlobEnd', oid(1), tid(5 << 40), RECORD, None, 1)
    peer.call('vote', 1)
    assert peer.call('tpc_finish', 1) == tid(5 << 40)
    assert content(storage, 1, tid(5 << 40)) == b'data'
    assert storage.load(oid(1)) == (RECORD, tid(5 << 40))


def test_a_blob_is_restored_only_with_the_tid_of_its_transaction(
        peer: SessionPeer, storage: Any) -> None:
    peer.begin(1, tid=tid(5 << 40), status=' ')
    peer.tell('storeBlobStart')
    peer.tell('restoreBlobEnd', oid(1), tid(4 << 40), RECORD, None, 1)
    with pytest.raises(ServerException, match='cannot be restored'):
        peer.call('vote', 1)
    assert not temporary(storage)


def test_restoring_is_offered_where_the_storage_can_do_it(
        serve: Serve, connect: Connect, tmp_path: Path) -> None:
    without = connect(serve(FileStorage(str(tmp_path / 'one.fs'))))
    assert 'restoreBlob' not in without.call('get_info')['zeo']
    wrapped = connect(serve(BlobStorage(str(tmp_path / 'blobs'), FileStorage(str(tmp_path / 'two.fs')))))
    assert 'restoreBlob' in wrapped.call('get_info')['zeo']


# ---- downloads


def stored(peer: SessionPeer, data: bytes, number: int = 1) -> bytes:
    peer.begin()
    upload(peer, number, data)
    peer.call('vote', 1)
    tid: bytes = peer.call('tpc_finish', 1)
    return tid


@pytest.mark.parametrize('size', [0, 1, blobs.CHUNK, blobs.CHUNK + 1, 5 * blobs.CHUNK])
def test_a_download_is_start_pieces_stop_and_reply(peer: SessionPeer, size: int) -> None:
    data = os.urandom(size)
    tid = stored(peer, data)
    number = peer.ask('sendBlob', oid(1), tid)
    assert peer.answer(number) is None
    heard = [(flag and name, args) for _, flag, name, args in peer.told][-3 - -(-size // blobs.CHUNK):]
    assert heard[0] == ('receiveBlobStart', (oid(1), tid))
    assert heard[-2] == ('receiveBlobStop', (oid(1), tid))
    pieces = heard[1:-2]
    assert all(name == 'receiveBlobChunk' and args[:2] == (oid(1), tid) for name, args in pieces)
    assert b''.join(args[2] for _, args in pieces) == data


@pytest.mark.parametrize('number, before', [(2, maxtid), (1, tid(1))])
def test_of_a_blob_that_is_not_there_nothing_is_sent(
        peer: SessionPeer, number: int, before: bytes) -> None:
    stored(peer, b'data')
    with pytest.raises(ZODB.POSException.POSKeyError):
        peer.call('sendBlob', oid(number), before)
    assert not peer.notices('receiveBlobStart')


class Slow:
    """A client that reads only when the test wants it."""

    def __init__(self, peer: SessionPeer) -> None:
        self.peer = peer
        self.most = 0
        self.full = threading.Event()   # somebody wanted to send and could not
        self.reads = threading.Event()
        self._listen = peer.outbox.deliver
        peer.outbox.deliver = self.deliver

    def deliver(self) -> None:
        self.most = max(self.most, self.peer.outbox.backlog)
        if self.reads.is_set():
            self._listen()
        else:
            self.full.set()


def helpers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith('zeo blob')]


@pytest.fixture
def slow(peer: SessionPeer) -> Iterator[Slow]:
    slow = Slow(peer)
    slow.reads.set()
    yield slow
    slow.reads.set()
    slow.deliver()


def test_a_download_waits_for_a_client_that_does_not_read(peer: SessionPeer, slow: Slow) -> None:
    data = os.urandom(8 * blobs.BACKLOG)
    tid = stored(peer, data)
    slow.reads.clear()
    number = peer.ask('sendBlob', oid(1), tid)
    assert slow.full.wait(30)
    slow.reads.set()
    slow.deliver()
    assert peer.answer(number) is None
    assert b''.join(args[2] for args in peer.notices('receiveBlobChunk')) == data
    assert slow.most <= blobs.BACKLOG + 2 * blobs.CHUNK


def test_a_client_that_never_reads_gets_an_error_in_the_end(
        peer: SessionPeer, slow: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blobs, 'PATIENCE', 0.05)
    tid = stored(peer, b'x' * 3 * blobs.BACKLOG)
    slow.reads.clear()
    number = peer.ask('sendBlob', oid(1), tid)
    for thread in helpers():
        thread.join(30)
    slow.reads.set()
    slow.deliver()
    with pytest.raises(ServerException, match='does not read'):
        peer.answer(number)
    assert not peer.notices('receiveBlobStop')


def test_a_download_ends_when_its_client_has_left(peer: SessionPeer, slow: Slow) -> None:
    tid = stored(peer, b'x' * 3 * blobs.BACKLOG)
    slow.reads.clear()
    peer.ask('sendBlob', oid(1), tid)
    assert slow.full.wait(30)
    [helper] = helpers()
    peer.close()
    helper.join(30)
    assert not helper.is_alive()


def test_small_loads_are_answered_in_the_middle_of_a_download(peer: SessionPeer, slow: Slow) -> None:
    small = peer.commit(oid(9), b'small')
    tid = stored(peer, b'x' * 4 * blobs.BACKLOG)
    slow.reads.clear()
    download = peer.ask('sendBlob', oid(1), tid)
    load = peer.ask('loadBefore', oid(9), maxtid)
    slow.reads.set()
    slow.deliver()
    assert peer.answer(load) == (b'small', small, None)
    peer.answer(download)
    order = [number for number, flag, _, _ in peer.told if not flag]
    assert order.index(load) < order.index(download)


# ---- after a crash


def test_only_old_files_of_a_killed_server_are_removed(serve: Serve, storage: Any) -> None:
    folder = Path(storage.temporaryDirectory())
    for name, age in [('zeo-old.tmp', 2), ('zeo-new.tmp', 0), ('BUC-old.tmp', 2)]:
        (folder / name).write_bytes(b'data')
        then = os.stat(folder / name).st_mtime - age * blobs.LEFT_BEHIND
        os.utime(folder / name, (then, then))
    serve(storage)
    assert sorted(temporary(storage)) == ['BUC-old.tmp', 'zeo-new.tmp']


@pytest.mark.parametrize('wrapped', [False, True])
def test_a_record_that_pretends_to_be_a_blob_makes_none_when_it_is_undone_or_packed(
        serve: Serve, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrapped: bool) -> None:
    """As ZODB's own check would, which runs the record."""
    made: list[Any] = []
    monkeypatch.setattr(Blob, '__init__', lambda *args: made.append(args))
    evil = b'\x80\x03cZODB.blob\nBlob\n(C\x04datatR.\x80\x03N.'
    zodbs_is_blob_record(evil)
    assert made.pop()  # it would
    storage = FileStorage(str(tmp_path / 'evil.fs'), **{} if wrapped else {'blob_dir': str(tmp_path / 'evil')})
    served = serve(BlobStorage(str(tmp_path / 'evil'), storage) if wrapped else storage)
    peer = connect(served)
    root = b'\x80\x03cpersistent.mapping\nPersistentMapping\n.\x80\x03C\x08' + oid(5) + b'Q.'
    peer.commit(oid(0), root)
    peer.commit(oid(5), evil)
    peer.commit(oid(5), evil + b'N.')
    [last, *_] = peer.call('undoLog', 0, 1)
    peer.begin(7)
    peer.tell('undoa', last['id'], 7)
    peer.call('vote', 7)
    peer.call('tpc_finish', 7)
    peer.commit(oid(5), evil + b'N.')
    peer.call('pack', time.time())
    assert made == []


def test_a_record_with_a_memo_that_takes_all_memory_is_not_packed(
        serve: Serve, connect: Connect, file_storage: FileStorage) -> None:
    peer = connect(serve(file_storage))
    peer.commit(oid(0), b'\x80\x03cpersistent.mapping\nPersistentMapping\n.\x80\x03Nr\xff\xff\xff\x0f.')
    with pytest.raises(StorageError, match='memo has holes'):
        peer.call('pack', time.time())
    assert peer.commit(oid(1), b'record')
