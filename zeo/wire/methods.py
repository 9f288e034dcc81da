"""What a client may ask of a server: the table of methods, and the words that tell what is beyond the protocol."""

from typing import NamedTuple

#: The key in the answer to ``get_info`` under which a zeo server names what it can do beyond the
#: protocol, as a sequence of words.  Other clients do not look there and never see any of it.
#:
#: ``restoreBlob``
#:     ``restoreBlobEnd(oid, tid, record, previous_tid, id)`` in place of ``storeBlobEnd``, and
#:     ``restoreBlobShared(oid, tid, record, previous_tid, filename, id)``: for copying transactions.
#: ``verify``
#:     ``verify(revisions)``: of many ``oid + tid`` (16 bytes each, joined) those oids whose current
#:     revision is another one (joined).
#: ``settle``
#:     ``vote(id, True)`` returns ``(usual result, tid)``; ``settle(tid, id)``, asked on a later
#:     connection, ends that transaction if it is still in doubt and says whether it is committed.  In place
#:     of a tid there may be other bytes; then the answer is the tid, or False.
#: ``pieces``
#:     Pieces of blobs may have up to `zeo.wire.pieces.LARGEST` bytes, and ``sendBlob(oid, tid, True)`` is
#:     answered in such; without that they have `zeo.server.blobs.CHUNK` bytes at most.
#: ``figures``
#:     ``figures()``: what `zeo.server.figures` tells of the server, as plain values; ``stop_pack()``:
#:     stop the pack in progress, if that is possible: whether it is.
#: ``stores``
#:     ``stores(heads, records, id)``, with what `zeo.wire.stores` puts there, in place of many ``storea``; and
#:     ``commit(id, tell_tid, user, description, heads, records)`` in place of ``tpc_begin``, stores, and
#:     ``vote(id, tell_tid)``, which it is answered like.  Who stores so is not sent ``info`` with the answer to
#:     ``tpc_finish``: it asks, with ``get_info``, when somebody wants to know the size.
#: ``prefetch``
#:     After the notice ``prefetch(oids, tid)``, with at most `zeo.wire.revisions.MOST` oids (joined), the server
#:     tells of each of them once, as ``loadBefore(oid, tid)`` would, by notices ``prefetched(tid, heads, records)``
#:     with what `zeo.wire.revisions` puts there.
#: ``pulse``
#:     After the notice ``pulse()`` the server gives a sign of life, the notice ``pulse()``, every
#:     `PULSE_INTERVAL` seconds unless it has something else to say; whatever its storages are busy with.
#:     The client has to give signs of life then, too (`zeo.wire.messages.HEARTBEAT`), every minute.
EXTENSIONS = 'zeo'

#: Seconds between two signs of life of a server.
PULSE_INTERVAL = 10.0


class Method(NamedTuple):
    """A method that clients may call: how many arguments it takes, and whether it changes data."""

    least: int
    most: int
    writes: bool = False


METHODS: dict[str, Method] = {
    # session
    'register': Method(2, 2),
    'get_info': Method(0, 0),
    'lastTransaction': Method(0, 0),
    'ping': Method(0, 0),
    'set_client_label': Method(1, 1),
    'getInvalidations': Method(1, 1),
    'server_status': Method(0, 0),
    # loading
    'loadBefore': Method(2, 2),
    'loadSerial': Method(2, 2),
    'getTid': Method(1, 1),
    'history': Method(1, 2),
    'record_iternext': Method(0, 1),
    # two-phase commit
    'new_oids': Method(0, 1, writes=True),
    'tpc_begin': Method(4, 6, writes=True),
    'storea': Method(4, 4),
    'checkCurrentSerialInTransaction': Method(3, 3),
    'deleteObject': Method(3, 3),
    'undoa': Method(2, 2),
    'restorea': Method(5, 5),
    'vote': Method(1, 2),
    'tpc_finish': Method(1, 1),
    'tpc_abort': Method(1, 1),
    # undo information, packing
    'undoInfo': Method(0, 3),
    'undoLog': Method(0, 2),
    'pack': Method(1, 2),
    # blobs
    'storeBlobStart': Method(0, 0),
    'storeBlobChunk': Method(1, 1),
    'storeBlobEnd': Method(4, 4),
    'storeBlobShared': Method(5, 5),
    'sendBlob': Method(2, 3),
    'restoreBlobEnd': Method(5, 5),
    'restoreBlobShared': Method(6, 6),
    # iteration
    'iterator_start': Method(2, 2),
    'iterator_next': Method(1, 1),
    'iterator_record_start': Method(2, 2),
    'iterator_record_next': Method(1, 1),
    'iterator_gc': Method(1, 1),
    # extensions, see `EXTENSIONS`
    'verify': Method(1, 1),
    'settle': Method(2, 2),
    'stores': Method(3, 3),
    'prefetch': Method(2, 2),
    'commit': Method(6, 6, writes=True),
    'figures': Method(0, 0),
    'stop_pack': Method(0, 0),
    'pulse': Method(0, 0),
}
