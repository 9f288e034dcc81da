"""A server that answers with hostile messages, and a client that survives it: ``python -m tests.system.hostile_server``.

In each round a client connects, works, and is given one hostile message, in the place of any answer or beside
one.  Its call has to end, with a result or an error, and in time; an audit hook listens for imports, calls
and commands, and memory, threads and files are as before in the end.
"""

import argparse
import contextlib
import json
import logging
import os
import random
import socket
import sys
import threading
import time
import types
from collections import Counter
from collections.abc import Callable
from typing import Any

from ZODB.Connection import TransactionMetaData

from tests.client.peer import INFO, Message, Peer, oid, tid
from tests.system.servers import figures, until
from tests.wire import hostile
from zeo.ClientStorage import ClientStorage
from zeo.wire import messages
from zeo.wire.framing import frame
from zeo.wire.greeting import GREETING
from zeo.wire.opcodes import pickled_args

#: How long in seconds a call may take.
IN_TIME = 10.0

#: What nothing from the network may lead to.
EVENTS = ('import', 'exec', 'compile', 'marshal.', 'os.system', 'os.exec', 'os.posix_spawn', 'os.fork', 'subprocess.',
          'pickle.find_class', 'ctypes.', 'builtins.', 'code.', 'shutil.', 'webbrowser.')

VALUES = [None, True, -1, 2**64, 1.5, float('nan'), '', 'text', b'', b'a', bytes(8), b'\xff' * 8, b'x' * 9, (), (1, 2),
          (b'', b'', b''), (b'record', None, None), (b'record', 'text', 5), [], [[]], [None], [b'short'], {}, {'a': 1},
          {'interfaces': 5}, {'interfaces': (('os', 'system'), ('canary', 'Bird'))}, {1}, 1j, 'x' * 100_000,
          [bytes(8)] * 1000, ('os.system', ('echo pwned',)), ('ZODB.POSException.ConflictError', {'oid': 5}),
          ('canary.Bird', ()), (None, None), ('builtins.KeyError', {'args': 7}), ((), ())]

NOTICES = ['invalidateTransaction', 'info', 'prefetched', 'receiveBlobStart', 'receiveBlobChunk', 'receiveBlobStop', 'eval', '.reply']

NO_FRAMES = [b'\xff\xff\xff\xff', b'\0\0\0\0', b'\0\0\1\0half', b'HTTP/1.1 400 Bad\r\n\r\n', b'']

TARGETS = ['greeting', 'register', 'get_info', 'getInvalidations', 'loadBefore', 'loadBefore', 'getTid', 'history',
           'undoInfo', 'new_oids', 'vote', 'tpc_finish', 'server_status', 'ping', 'record_iternext', 'loadSerial']


def honest(message: Message) -> Any:
    return {
        'register': tid(5), 'get_info': INFO, 'lastTransaction': tid(5), 'getInvalidations': (tid(5), []),
        'loadBefore': (b'record', tid(3), None), 'getTid': tid(3), 'history': [], 'undoInfo': [], 'loadSerial': b'record',
        'new_oids': [oid(number) for number in range(100)], 'vote': [], 'tpc_finish': tid(6),
        'server_status': {}, 'record_iternext': (oid(1), tid(3), b'record', None)}.get(message.name)


class HostileServer:
    """Answers each client honestly but for one message."""

    def __init__(self, seed: int, largest: int) -> None:
        self._rnd = random.Random(seed)
        self._frames = hostile.frames(seed, largest)
        self._largest = largest
        self._listener = socket.create_server(('127.0.0.1', 0))
        self.address = self._listener.getsockname()
        self.target = ''
        self.sent = 0
        self._thread = threading.Thread(target=self._accept, name='hostile server', daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=[sock], name='hostile connection', daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError, AssertionError, EOFError):
            peer = Peer(sock)
            sock.sendall(self._message(None) if self._is_the_time('greeting') else b''.join(frame(GREETING)))
            peer.payload()
            while True:
                message = peer.read()
                if message.oneway:
                    continue
                if self._is_the_time(message.name):
                    if self._rnd.random() < .1:  # what may be the beginning of a long frame
                        sock.sendall(self._rnd.choice(NO_FRAMES) or self._rnd.randbytes(50))
                        return
                    sock.sendall(self._message(message))
                sock.sendall(b''.join(messages.reply(message.id, honest(message))))

    def _is_the_time(self, name: str) -> bool:
        if name != self.target:
            return False
        self.target = ''
        self.sent += 1
        return True

    def _message(self, asked: Message | None) -> bytes:
        rnd = self._rnd
        choice = rnd.randrange(10)
        if choice < 3 or asked is None:
            return b''.join(frame(self._frames()))
        if choice < 5:
            piece = hostile.evil(rnd) if rnd.random() < .9 else hostile.explosive(rnd, self._largest)
            return b''.join(frame(b'\x80\x04(' + asked.id + rnd.choice([b'K\x00', b'K\x02']) + hostile.text('.reply')
                                  + piece + b't.'))
        value = rnd.choice(VALUES)
        if choice < 7:
            return b''.join(messages.reply(asked.id, value))
        if choice < 8:
            return b''.join(frame(b'\x80\x03(' + asked.id + b'K\x02' + hostile.text('.reply')
                                  + pickled_args([value])[:-1] + b't.'))
        args = [rnd.choice(VALUES) for _ in range(rnd.randrange(4))]
        return b''.join(messages.notice(rnd.choice(NOTICES), args))

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


def work(storage: ClientStorage, target: str) -> Any:
    """What makes a client send a request of that name."""
    if target in ('vote', 'tpc_finish'):
        meta = TransactionMetaData()
        storage.tpc_begin(meta)
        try:
            storage.store(oid(7), bytes(8), b'record', '', meta)
            storage.tpc_vote(meta)
            return storage.tpc_finish(meta)
        except BaseException:
            storage.tpc_abort(meta)
            raise
    calls: dict[str, Callable[[], Any]] = {
        'getTid': lambda: storage.getTid(oid(1)), 'history': lambda: storage.history(oid(1), 5),
        'undoInfo': lambda: storage.undoInfo(), 'new_oids': storage.new_oid, 'server_status': storage.server_status,
        'ping': storage.ping, 'record_iternext': lambda: storage.record_iternext(),
        'loadSerial': lambda: storage.loadSerial(oid(1), tid(2))}
    return calls.get(target, lambda: storage.load(oid(1)))()


def survive(seed: int, rounds: int, largest: int) -> dict[str, Any]:
    """Figures; raises `AssertionError` at the first bad surprise."""
    canary = types.ModuleType('canary')
    canary.Bird, canary.sing = hostile.Bird, hostile.sing  # type: ignore[attr-defined]
    sys.modules['canary'] = canary
    logging.getLogger('zeo').setLevel(logging.CRITICAL)
    rnd = random.Random(seed)
    server = HostileServer(seed, largest)
    events: list[Any] = []
    listening = False

    def listen(event: str, args: Any) -> None:
        if listening and event.startswith(EVENTS):
            events.append((event, args))

    sys.addaudithook(listen)
    became: Counter[str] = Counter()
    slowest = 0.0
    before: dict[str, int] = {}
    for number in range(-50, rounds):
        if number == 0:
            before, listening = figures(os.getpid()), True
            server.sent = 0
        target = server.target = rnd.choice(TARGETS) if number >= -40 else ''
        began = time.monotonic()
        storage = None
        try:
            storage = ClientStorage(server.address, wait_timeout=2, min_disconnect_poll=.01, max_disconnect_poll=.1)
            work(storage, target)
        except Exception as error:
            became['an error'] += number >= 0
            if isinstance(error, (AttributeError, AssertionError, NameError, RecursionError, MemoryError)):
                became[f'{type(error).__name__}'] += 1
        else:
            became['a result'] += number >= 0
        finally:
            if storage is not None:
                storage.close()
        slowest = max(slowest, time.monotonic() - began)
        assert slowest < IN_TIME, f'{slowest:.1f} s for {target} in round {number}'
        assert not events, f'{events[:3]} for {target} in round {number}'
        assert not hostile.Bird.songs, f'the canary sang for {target} in round {number}'
    listening = False
    server.close()
    after: dict[str, int] = {}

    def back() -> bool:
        after.update(figures(os.getpid()))
        return after['threads'] <= before['threads'] and after['files'] <= before['files']

    until(back, 'threads have ended and files are closed', 20)
    assert after['memory'] < before['memory'] + 50_000 + largest // 10, (before, after)
    return {'rounds': rounds, 'hostile messages': server.sent, **became, 'slowest ms': round(slowest * 1000),
            'memory MB': f'{before["memory"] // 1024} -> {after["memory"] // 1024}', 'threads': after['threads'],
            'files': after['files']}


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--rounds', type=int, default=500)
    parser.add_argument('--largest', type=int, default=100_000)
    options = parser.parse_args()
    print(json.dumps(survive(options.seed, options.rounds, options.largest)))
