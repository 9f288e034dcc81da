"""The account that a scenario of the soak gives: what was tried, what became of it, what the server has left."""

import contextlib
import dataclasses
import os
import socket
import struct
import time
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any
from typing import NamedTuple

from tests.server.talk import SocketPeer
from tests.system.clients import open_client
from tests.system.servers import Server
from tests.system.servers import until

MB = 1024 * 1024

#: How much more memory in bytes a server may have after a scenario: what the allocator keeps, and caches.
KEPT = 24 * MB

#: A commit that goes on "at once" takes no longer than this, in seconds, on a busy machine.
AT_ONCE = 5.0

#: How long in seconds a server has for giving back the threads and files of clients that have left.
BACK = 20.0


class Resources(NamedTuple):
    """What a process has: memory in bytes, threads, open files (but those that a FileStorage keeps in reserve)."""

    memory: int
    threads: int
    files: int

    @classmethod
    def of(cls, pid: int) -> 'Resources':
        with open(f'/proc/{pid}/status') as file:
            words = dict(line.split(':', 1) for line in file)
        return cls(int(words['VmRSS'].split()[0]) * 1024, int(words['Threads']), len(_files(pid)))

    def __str__(self) -> str:
        return f'{self.memory / MB:.0f} MB, {self.threads} threads, {self.files} files'


def _files(pid: int) -> list[str]:
    folder, names = f'/proc/{pid}/fd', []
    for number in os.listdir(folder):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            names.append(os.readlink(os.path.join(folder, number)))
    return [name for name in names if not name.endswith('.fs')]


@dataclasses.dataclass
class Account:
    """What was tried in a scenario, and what became of it."""

    tried: int = 0
    survived: int = 0
    lost: list[str] = dataclasses.field(default_factory=list)
    notes: dict[str, str] = dataclasses.field(default_factory=dict)
    before: Resources | None = None
    after: Resources | None = None

    def expect(self, truth: bool, what: str) -> None:
        """One thing tried; ``what`` is lost if it is not so."""
        self.tried += 1
        if truth:
            self.survived += 1
        else:
            self.lost.append(what)

    def __str__(self) -> str:
        words = [f'tried {self.tried}, survived {self.survived}, lost {len(self.lost)}']
        words += [f'{what} {value}' for what, value in self.notes.items()]
        if self.before and self.after:
            words.append(f'server {self.before} -> {self.after}')
        return '; '.join(words)


@contextlib.contextmanager
def watched(server: Server, account: Account, kept: int = KEPT) -> Iterator[None]:
    """The server must have no more threads and files afterwards than before, and about the same memory."""
    pid = server.process.pid
    account.before = Resources.of(pid)
    yield
    def back() -> bool:
        account.after = Resources.of(pid)
        return (account.after.threads <= account.before.threads
                and account.after.files <= account.before.files)
    try:
        until(back, 'threads and files are given back', BACK)
    except AssertionError:
        pass
    account.expect(account.after.threads <= account.before.threads, f'threads: {account.after}')
    account.expect(account.after.files <= account.before.files, f'files: {account.after}')
    account.expect(account.after.memory <= account.before.memory + kept, f'memory: {account.after}')


@contextlib.contextmanager
def client_of(server: Server, **options: Any) -> Iterator[Any]:
    client = open_client('zeo', server, **options)
    try:
        yield client
    finally:
        client.close()


def reset(peer: SocketPeer) -> None:
    """Let a client vanish: what it has sent and not been told is gone, and the server is told so."""
    peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
    peer.close()


def seconds(call: Callable[..., Any], *args: Any) -> float:
    begin = time.perf_counter()
    call(*args)
    return time.perf_counter() - begin
