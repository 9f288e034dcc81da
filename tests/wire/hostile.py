"""Hostile pickles by the thousand, and a process that survives them: ``python -m tests.wire.hostile``.

It decodes frames of every evil kind while an audit hook listens, and ends with an error at the first
import, call, look-up, file, or other event that the interpreter reports; at the first value that is
not plain; and at the first frame that costs more time or memory than its size excuses.  A crash of
the interpreter ends it, too.
"""

import argparse
import json
import pickle
import pickletools
import random
import resource
import sys
import time
import types
from collections.abc import Callable
from typing import Any

from zeo.errors import ProtocolError
from zeo.wire import makers
from zeo.wire import messages
from zeo.wire import pickles
from zeo.wire.announcements import invalidation_notice
from zeo.wire.commits import store_notice
from zeo.wire.decoding import decode_from_client
from zeo.wire.decoding import decode_from_server
from zeo.wire.framing import Frame
from zeo.wire.loads import load_request
from zeo.wire.replies import load_reply

OPCODES = {opcode.name: opcode for opcode in pickletools.opcodes}
CODE = {name: opcode.code.encode('latin-1') for name, opcode in OPCODES.items()}

#: Those that unpickling plain values takes.
HARMLESS = [opcode for opcode in pickletools.opcodes
            if opcode.name not in ('INST', 'OBJ', 'PERSID', 'BINPERSID', 'EXT1', 'EXT2', 'EXT4', 'NEWOBJ_EX',
                                   'STRING', 'POP', 'POP_MARK', 'NEXT_BUFFER', 'READONLY_BUFFER', 'STOP')]

#: What attackers have used, and what lies near what is allowed.
NAMES = [
    ('builtins', 'eval'), ('builtins', 'exec'), ('builtins', 'getattr'), ('builtins', 'setattr'),
    ('builtins', '__import__'), ('builtins', 'open'), ('builtins', 'compile'), ('builtins', 'type'),
    ('builtins', 'breakpoint'), ('builtins', 'input'), ('builtins', 'globals'), ('builtins', 'vars'),
    ('builtins', 'range'), ('builtins', 'map'), ('builtins', 'memoryview'), ('builtins', 'slice'),
    ('builtins', 'dict.fromkeys'), ('builtins', 'object.__subclasses__'), ('builtins', '__dict__'),
    ('builtins', 'print'), ('builtins', 'BaseException'), ('builtins', 'KeyError'),
    ('__builtin__', 'eval'), ('__builtin__', 'apply'), ('__builtin__', 'file'),
    ('os', 'system'), ('posix', 'system'), ('nt', 'system'), ('os', 'popen'), ('os', 'unlink'),
    ('subprocess', 'Popen'), ('subprocess', 'check_output'), ('pty', 'spawn'), ('shutil', 'rmtree'),
    ('functools', 'partial'), ('functools', 'reduce'), ('operator', 'attrgetter'),
    ('operator', 'methodcaller'), ('operator', 'itemgetter'), ('operator', 'setitem'),
    ('types', 'FunctionType'), ('types', 'CodeType'), ('importlib', 'import_module'),
    ('copyreg', '__newobj__'), ('copyreg', 'add_extension'), ('copyreg', 'pickle'),
    ('copyreg', '_reconstructor'), ('copy_reg', '_reconstructor'), ('copyreg', 'dispatch_table'),
    ('pickle', 'loads'), ('_pickle', 'Unpickler'), ('marshal', 'loads'), ('ctypes', 'CDLL'),
    ('zodbpickle', 'binary'), ('zodbpickle', 'loads'), ('zodbpickle.pickle', 'loads'),
    ('zodbpickle', '__builtins__'), ('ZopeUndo.Prefix', 'Prefix'), ('ZopeUndo', 'Prefix'),
    ('ZODB.POSException', 'POSKeyError'), ('ZODB.POSException', '_recon'), ('ZODB.POSException', 'UndoError'), ('ZODB.broken', 'find_global'),
    ('zeo.wire.makers', 'MAKERS'), ('zeo.wire.makers', 'Prefix'), ('_codecs', 'encode'),
    ('_codecs', 'decode'), ('codecs', 'encode'), ('canary', 'sing'), ('canary', 'Bird'),
    ('never_imported', 'anything'), ('this', 's'), ('antigravity', 'geohash'), ('', ''),
    ('sys', 'modules'), ('__main__', 'CODE'), ('builtins', 'bool'), ('builtins', 'frozenset'),
    *((module, name) for module in ('builtins', '__builtin__')
      for name in ('dict', 'list', 'tuple', 'set', 'bytes', 'bytearray', 'str', 'int', 'float',
                   'complex', 'object')),
]
TEXTS = ['', 'a', 'latin1', 'utf-16', 'rot13', 'zlib', 'loadBefore', '.reply', '__class__', '__reduce__',
         '__setstate__', '__dict__', 'path', 'make', 'unpickler', 'echo pwned', '9' * 50, '\u20ac',
         '\U0001f40d', 'x' * 300]

#: 2**61 - 1: multiples of it have the hash 0.
PRIME = sys.hash_info.modulus


def text(value: str) -> bytes:
    encoded = value.encode()
    return CODE['BINUNICODE'] + len(encoded).to_bytes(4, 'little') + encoded


def integer(value: int) -> bytes:
    data: bytes = pickle.dumps(value, 2)
    return data[2:-1]


def a_global(rnd: random.Random, names: list[tuple[str, str]] = NAMES) -> bytes:
    module, name = rnd.choice(names)
    if rnd.random() < 0.6:
        return CODE['GLOBAL'] + module.encode() + b'\n' + name.encode() + b'\n'
    return text(module) + text(name) + CODE['STACK_GLOBAL']


def an_atom(rnd: random.Random) -> bytes:
    if rnd.random() < 0.03:
        return an_odd_atom(rnd)
    choice = rnd.randrange(9)
    if choice < 2:
        return rnd.choice([b'N', b'\x88', b'\x89', b')', b']', b'}', b'\x8f'])
    if choice < 4:
        return integer(rnd.choice([0, 1, -1, 255, 256, 65536, 2**31, -2**40, PRIME, 1 << 200]))
    if choice < 6:
        return text(rnd.choice(TEXTS))
    if choice < 8:
        data = rnd.randbytes(rnd.choice([0, 1, 8, 8, 40, 300]))
        return (b'C%c' % len(data) if len(data) < 256 else
                b'B' + len(data).to_bytes(4, 'little')) + data
    return b'G' + rnd.randbytes(8)


def an_odd_atom(rnd: random.Random) -> bytes:
    choice = rnd.randrange(4)
    if choice == 0:
        return rnd.choice([b'I%d\n', b'L%dL\n', b'F%d\n', b'I0x%d\n', b'F1e%d\n', b'I0%d\n', b'Lx%d\n']) % (
            rnd.choice([0, 1, 12345, 10**300]))
    if choice == 1:
        return rnd.choice([b"S'plain'\n", b"S'\\d\\x'\n", b'Vtext\\u20ac\n', b'V\\u12\n', b'U\x02ab',
                           b'U\x02\xff\xff', b'T\xff\xff\xff\xff', b'\x96' + bytes(8),
                           b'\x8e\x03' + bytes(7) + b'abc', b'\x8d\x01' + bytes(7) + b'a'])
    if choice == 2:
        return integer(2**15000)
    return a_global(rnd)


def an_argument(rnd: random.Random, opcode: pickletools.OpcodeInfo) -> bytes:
    """Some argument for an opcode, not always a good one."""
    if opcode.arg is None:
        return b''
    size = opcode.arg.n
    if size >= 0:
        return rnd.choice([bytes(size), bytes([rnd.randrange(6)]) + bytes(size - 1), rnd.randbytes(size)])
    if size == pickletools.UP_TO_NEWLINE:
        lines = 2 if opcode.name in ('GLOBAL', 'INST') else 1
        return b''.join(rnd.choice([b'0', b'1', b'-1', b'', b'os', b'system', b'builtins', b'eval', b"'x'",
                                    b'99999', b'1_0', b' 1', b'1\x00x']) + b'\n' for _ in range(lines))
    width = {pickletools.TAKEN_FROM_ARGUMENT1: 1, pickletools.TAKEN_FROM_ARGUMENT4: 4,
             pickletools.TAKEN_FROM_ARGUMENT4U: 4, pickletools.TAKEN_FROM_ARGUMENT8U: 8}[size]
    count = rnd.choice([0, 1, 2, 8])
    told = count if rnd.random() < 0.9 else rnd.choice([2**7, 2**8 - 1, 2**31, 2**32 - 1, 2**60, 2**64 - 1])
    return (told % (1 << 8 * width)).to_bytes(width, 'little') + bytes(count)


def soup(rnd: random.Random) -> bytes:
    """Opcodes one after the other, each with something that looks like its argument."""
    pieces = [rnd.choice([b'\x80\x03', b'\x80\x04', b'\x80\x05', b'', b'\x80\xff'])]
    for _ in range(rnd.randrange(1, 40)):
        if rnd.random() < 0.5:
            pieces.append(an_atom(rnd))
        else:
            opcode = rnd.choice(pickletools.opcodes if rnd.random() < 0.2 else HARMLESS)
            pieces.append(CODE[opcode.name] + an_argument(rnd, opcode))
    return b''.join(pieces) + b'.'


def program(rnd: random.Random) -> bytes:
    """Opcodes that find on the stack what they need, mostly, so that much of it is carried out."""
    pieces = [b'\x80' + bytes([rnd.randrange(2, 6)])]
    stack: list[str] = []
    marks: list[int] = []
    memo = 0
    for _ in range(rnd.randrange(1, 60)):
        above = len(stack) - (marks[-1] if marks else 0)
        choice = rnd.randrange(20)
        if choice < 6 or not stack:
            pieces.append(an_atom(rnd))
            stack.append('value')
        elif choice == 6:
            pieces.append(rnd.choice([b']', b'}', b'\x8f']))
            stack.append('container')
        elif choice == 7 and len(marks) < 60:
            pieces.append(b'(')
            marks.append(len(stack))
        elif choice < 10 and marks:
            pieces.append(rnd.choice([b't', b'l', b'd', b'\x91']))
            del stack[marks.pop():]
            stack.append('container')
        elif choice == 10 and marks and len(stack) > above:
            odd = rnd.random() < 0.05
            pieces.append(rnd.choice([b'o', b'1'] if odd else [b'e', b'u', b'\x90']))
            del stack[marks.pop():]
        elif choice == 11 and above > 1:
            odd = rnd.random() < 0.05
            pieces.append(rnd.choice([b'b', b'R', b'\x81', b'\x93'] if odd else [b'a', b'\x86']))
            stack.pop()
        elif choice == 12 and above > 2:
            pieces.append(b'\x92' if rnd.random() < 0.05 else rnd.choice([b's', b'\x87']))
            del stack[-2:]
        elif choice == 13 and above:
            pieces.append(rnd.choice([b'R', b'\x81', b'b']) if rnd.random() < 0.05 else b'\x85')
        elif choice == 14 and above:
            pieces.append(rnd.choice([b'q%c' % min(memo, 255), b'\x94', b'p%d\n' % memo]))
            memo += 1
        elif choice == 15 and memo:
            at = rnd.randrange(memo)
            pieces.append(rnd.choice([b'h%c' % min(at, 255), b'g%d\n' % at, b'j' + at.to_bytes(4, 'little')]))
            stack.append('value')
        elif choice == 16 and above:
            pieces.append(b'2')
            stack.append('value')
        elif choice == 17:
            maker = a_global(rnd, [name for name in NAMES if name in makers.MAKERS])
            arguments = b''.join(an_atom(rnd) for _ in range(rnd.randrange(4)))
            pieces.append(maker + b'(' + arguments + b't' + rnd.choice([b'R', b'R', b'\x81', b'R}b']))
            stack.append('value')
    if marks:
        pieces.append(b't' * len(marks))
        del stack[marks[0]:]
        stack.append('container')
    if len(stack) > 1:
        pieces.append(b'l' if rnd.random() < 0.05 else b'')
        pieces.insert(1, b'(')
        pieces.append(b't')
    return b''.join(pieces) + b'.'


def honest(rnd: random.Random) -> bytes:
    oid, tid = rnd.randbytes(8), rnd.randbytes(8)
    frames: list[Callable[[], Frame]] = [
        lambda: load_request(rnd.randrange(2**31), oid, tid),
        lambda: load_reply(b'K\x07', rnd.randbytes(rnd.choice([0, 20, 300])), oid,
                                    rnd.choice([None, tid])),
        lambda: store_notice(oid, tid, rnd.randbytes(rnd.choice([0, 20, 300])),
                                      rnd.randrange(2**40)),
        lambda: invalidation_notice(tid, [rnd.randbytes(8) for _ in range(rnd.randrange(4))]),
        lambda: messages.notice('tpc_begin', (7, b'user', b'note', {'a': [1, 2.5, None]}, None, ' ')),
        lambda: messages.reply(b'K\x08', [{'id': oid, 'time': 1.5, 'size': 2**40}, (), set()]),
        lambda: messages.error_reply(b'K\x09', KeyError(oid)),
    ]
    return b''.join(rnd.choice(frames)())[4:]


def damaged(rnd: random.Random) -> bytes:
    """An honest message with a few bytes changed, left out or put in."""
    data = bytearray(honest(rnd))
    for _ in range(rnd.randrange(1, 4)):
        at = rnd.randrange(len(data))
        choice = rnd.randrange(4)
        if choice == 0:
            data[at] = rnd.randrange(256)
        elif choice == 1:
            data[at:at] = rnd.choice([rnd.randbytes(1), an_atom(rnd), a_global(rnd) + b')R'])
        elif choice == 2:
            del data[at:at + rnd.randrange(1, 5)]
        else:
            data[at] ^= 1 << rnd.randrange(8)
        if not data:
            return b'.'
    return bytes(data)


def attack(rnd: random.Random) -> bytes:
    return in_message(rnd, evil(rnd))


def evil(rnd: random.Random) -> bytes:
    """The known ways to make an unpickler call, import or alter something; a piece of a pickle."""
    called = a_global(rnd)
    module, name = rnd.choice(NAMES)
    arguments = rnd.choice([text('echo pwned') + b'\x85', b')', b'(' + an_atom(rnd) + an_atom(rnd) + b't'])
    return rnd.choice([
        called + arguments + b'R',
        called + arguments + b'\x81',
        called + arguments + b'}\x92',
        called,
        called + b'\x94' + b'0h\x00' + arguments + b'R',
        b'(' + text('echo pwned') + b'i' + module.encode() + b'\n' + name.encode() + b'\n',
        b'(' + called + text('echo pwned') + b'o',
        called + b'}' + text('make') + a_global(rnd) + b'sb',
        called + b'N}' + text('make') + called + b's\x86b',
        called + arguments + b'R}' + text('path') + called + b'sb',
        called + arguments + b'\x81N}' + text('path') + b']s\x86b',
        called + arguments + b'\x81}' + text('__class__') + called + b'sb',
        b'P' + text('id') + b'\n', b'N' + b'Q', b'Pid\n',
        b'\x82\x01', b'\x83\x01\x00', b'\x84\x01\x00\x00\x00', b'\x97', b'\x97\x98',
        rnd.choice([b'N', b'K\x01', b']', b'}']) + text('eval') + b'\x93',
        a_global(rnd, [('copyreg', '_reconstructor')]) + b'(' + called + called + an_atom(rnd) + b'tR',
        a_global(rnd, [('ZODB.POSException', '_recon')]) + called + b'}' + text('_reason') + called + b's\x86R',
        called + called + an_atom(rnd) + b'\x86R',
        b']' + called + b'aq\x00h\x00', b'}' + called + b'Ns', b'\x8f(' + called + b'\x90',
        called + b'\x85\x85', called + called + b'\x86R', called + called + b'R',
    ])


def in_message(rnd: random.Random, evil: bytes) -> bytes:
    place = rnd.randrange(7)
    fields = [integer(7), b'\x89', text('get_info'), b')']
    if place < 4:
        fields[place] = evil
    elif place == 4:
        fields[3] = evil + b'\x85'
    elif place == 5:
        return b'\x80\x04' + evil + b'.'
    else:
        fields[3] = b'(' + integer(7) + b'C\x00C\x00}' + text('key') + evil + b'st'
    return b'\x80\x04(' + b''.join(fields) + b't.'


def bomb(rnd: random.Random, largest: int) -> bytes:
    return in_message(rnd, explosive(rnd, largest))


def explosive(rnd: random.Random, largest: int) -> bytes:
    """Few bytes that want to become a lot of memory or time; a piece of a pickle."""
    n = int(largest ** rnd.random()) + 1
    counted = rnd.choice(['BINBYTES8', 'BYTEARRAY8', 'BINUNICODE8', 'BINBYTES', 'BINUNICODE', 'LONG4',
                          'BINSTRING', 'FRAME'])
    width = 4 if counted in ('BINBYTES', 'BINUNICODE', 'LONG4', 'BINSTRING') else 8
    digits = bytes(rnd.choice(b'0123456789') for _ in range(1)) * n
    bombs: list[Callable[[], bytes]] = [
        lambda: rnd.choice([b'(', b'](', b'}K\x01(', b'\x8f(']) * n,
        lambda: b')' + rnd.choice([b'\x85', b'\x85\x85', b'\x85q\x00', b'\x8520']) * n,
        lambda: b']' * n + b'a' * (n - 1),
        lambda: b'(' * n + b't' * n,
        lambda: b'(' * n + b'\x91' * n,
        lambda: b'}' + b'N' * 0 + b'K\x01}' * n + b's' * n,
        lambda: b')' + b'2\x86' * n,
        lambda: b')' + b'22\x87' * min(n, 60),
        lambda: b']\x94' + b''.join(b'](h%ch%ce\x94' % (i, i) for i in range(min(n, 250))),
        lambda: b')\x85q\x00' + b'h\x00h\x00\x86q\x00' * n,
        lambda: b')\x85q\x00' + b'h\x00h\x00\x86q\x00' * 30 + b'}' + b'h\x00Ns',
        lambda: b'K\x01\x85' + b'2\x86' * 3 + b'q\x000}(' + b'h\x00N' * n + b'u',
        lambda: b']q\x00' + b'h\x00a' * n,
        lambda: b'}q\x00K\x01h\x00s', lambda: b']q\x00h\x00\x85a', lambda: b'\x8fq\x00(h\x00\x90',
        lambda: b'Nr' + rnd.choice([n, 2**31, 2**32 - 1]).to_bytes(4, 'little'),
        lambda: b'Np%d\n' % rnd.choice([n, 2**31, 2**60, 10**400]),
        lambda: b'N' + b'\x94' * n, lambda: b'\x8f' * n + b'0' * (n - 1), lambda: b'(' + b'\x8f' * n + b't',
        lambda: b'(' + b'}NNs' * n + b'l', lambda: b'(' + b'(K\x01\x91' * n + b'l', lambda: b'(' + b'N' * n + b't',
        lambda: CODE[counted] + rnd.choice([2**20, 2**31, 2**32 - 1, 2**40, 2**60, 2**63, 2**64 - 1]).to_bytes(
            8, 'little')[:width] + bytes(10),
        lambda: b'L' + digits + b'L\n', lambda: b'I' + digits + b'\n', lambda: b'F' + digits + b'\n',
        lambda: b'I0x' + digits + b'\n', lambda: b'V' + b'\\u20ac' * n + b'\n', lambda: b'S' + b"'" + b'\\x41' * n + b"'\n",
        lambda: b'p' + digits + b'\n', lambda: b'\x8b' + n.to_bytes(4, 'little') + b'\x7f' * n,
        lambda: b'}(' + b''.join(integer(PRIME * i) + b'N' for i in range(1, n // 12 + 2)) + b'u',
        lambda: b'}' + b''.join(integer(PRIME * i) + b'Ns' for i in range(1, n // 12 + 2)),
        lambda: b'(' + b''.join(integer(PRIME * i) for i in range(1, n // 12 + 2)) + b'\x91',
        lambda: b'cbuiltins\nset\n((' + b''.join(integer(PRIME * i) for i in range(1, n // 12 + 2)) + b'ltR',
        lambda: b'cbuiltins\ndict\n((' + b''.join(integer(PRIME * i) + b'N\x86' for i in range(1, n // 12 + 2))
        + b'ltR',
        lambda: b'cbuiltins\nbytes\n' + integer(2**40) + b'\x85R',
        lambda: b'cbuiltins\nbytearray\n' + integer(2**40) + b'\x85R',
        lambda: b'cbuiltins\nbytearray\nq\x000B' + n.to_bytes(4, 'little') + bytes(n) + b'q\x010('
        + b'h\x00h\x01\x85R' * 300 + b't',
        lambda: b'cbuiltins\nset\nq\x000(' + b'h\x00)R' * n + b't',
        lambda: b'cbuiltins\nlist\nq\x000)' + b'h\x00j\x01\x00\x00\x00' * 0 + b'\x85h\x00' * 0 + b'',
        lambda: b'c' + b'a' * n + b'\n' + b'b' * n + b'\n', lambda: b'X' + n.to_bytes(4, 'little') + b'\xff' * n,
    ]
    return rnd.choice(bombs)()


def records(seed: int, largest: int, classes: list[tuple[str, str]]) -> Callable[[], bytes]:
    """A source of hostile records of objects, which pretend to be of one of the classes, as a rule."""
    rnd = random.Random(seed)

    def a_head() -> bytes:
        module, name = rnd.choice(classes if rnd.random() < 0.9 else NAMES)
        return CODE['GLOBAL'] + module.encode() + b'\n' + name.encode() + b'\n'

    def something() -> bytes:
        choice = rnd.random()
        if choice < 0.03:
            return explosive(rnd, largest)
        if choice < 0.3:
            return rnd.choice([soup, program, program])(rnd)[2:-1]
        return evil(rnd)

    def next_record() -> bytes:
        places: list[Callable[[], bytes]] = [
            lambda: a_head() + b'.\x80\x03' + something() + b'.',
            lambda: a_head() + b'.\x80\x03}' + text('count') + something() + b's.',
            lambda: a_head() + b'.\x80\x03(' + something() + something() + b't.',
            lambda: a_head() + b'.\x80\x03' + something() + b'0K\x01.',
            lambda: a_head() + something() + b'\x86.\x80\x03}.',
            lambda: a_head() + something() + b'\x85\x86.\x80\x03}.',
            lambda: something() + b'0' + a_head() + b'.\x80\x03}.',
            lambda: something() + b'.\x80\x03}.',
            lambda: something() + b')\x86.\x80\x03}.',
            lambda: soup(rnd) + soup(rnd)]
        return b'\x80\x03' + rnd.choice(places)()
    return next_record


def frames(seed: int, largest: int) -> Callable[[], bytes]:
    """A source of hostile frames; the bombs are about ``largest`` bytes long at most."""
    rnd = random.Random(seed)
    kinds: list[Callable[[random.Random], bytes]] = [soup, soup, program, program, program, damaged, damaged,
                                                     attack, attack]

    def next_frame() -> bytes:
        if rnd.random() < 0.03:
            return bomb(rnd, largest)
        return rnd.choice(kinds)(rnd)
    return next_frame


# ---- the process that survives them ---------------------------------------------------

PLAIN = {type(None), bool, int, float, complex, str, bytes, bytearray, tuple, list, dict, set, frozenset,
         makers.Prefix}


def strangers(value: Any) -> set[type]:
    """The types in a value that are not plain."""
    found = set()
    seen = set()
    left = [value]
    while left:
        each = left.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        kind = type(each)
        if kind not in PLAIN:
            found.add(kind)
        elif kind in (tuple, list, set, frozenset):
            left.extend(each)
        elif kind is dict:
            left.extend(each)
            left.extend(each.values())
    return found


class Bird:
    """Sings if anything is done to it."""

    songs = 0

    def __new__(cls, *args: Any) -> 'Bird':
        Bird.songs += 1
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        Bird.songs += 1


def sing(*args: Any) -> None:
    Bird.songs += 1


READERS: list[Callable[[bytes], Any]] = [
    decode_from_client, decode_from_server, pickles.load_from_client,
    pickles.load_from_server]


def survive(next_frame: Callable[[], bytes], count: int,
            readers: list[Callable[[bytes], Any]] = READERS) -> dict[str, Any]:
    """Decode so many frames and return figures; raises `AssertionError` at the first bad surprise."""
    canary = types.ModuleType('canary')
    canary.Bird, canary.sing = Bird, sing  # type: ignore[attr-defined]
    sys.modules['canary'] = canary
    events: list[Any] = []
    listening = False

    def listen(event: str, args: Any) -> None:
        if listening:
            events.append((event, args))

    sys.addaudithook(listen)
    accepted = size = largest = 0
    worst = 0.0
    modules = set(sys.modules)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        data = next_frame()
        size += len(data)
        largest = max(largest, len(data))
        for read in readers:
            value = None
            listening = True
            start = time.process_time()
            try:
                value = read(data)
            except ProtocolError:
                pass
            else:
                accepted += 1
            finally:
                seconds = time.process_time() - start
                listening = False
            where = f'frame {number}, {read.__name__}, {data[:200]!r}'
            assert not events, f'{events} at {where}'
            assert not Bird.songs, f'the canary sang at {where}'
            assert not (odd := strangers(value)), f'{odd} at {where}'
            assert seconds < 0.5 + len(data) * 4e-6, f'{seconds} s at {where}'
            assert len(repr(value)) < 10_000 + 200 * len(data), f'expansion at {where}'
            worst = max(worst, seconds)
    new = set(sys.modules) - modules
    assert not new, f'imported: {new}'
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) // 1024
    assert grown < 50 + largest * 100 // 2**20, f'grown by {grown} MB'
    return {'frames': count, 'bytes': size, 'accepted': accepted, 'slowest ms': round(worst * 1000, 1),
            'grown MB': grown}


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--count', type=int, default=30_000)
    parser.add_argument('--largest', type=int, default=100_000)
    options = parser.parse_args()
    print(json.dumps(survive(frames(options.seed, options.largest), options.count)))
