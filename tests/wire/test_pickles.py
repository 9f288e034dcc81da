"""Plain values go through; everything else is refused before it can do anything.

What a hostile pickle may try is generated in `tests.wire.hostile`, in a process of its own.
"""

import io
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from zodbpickle import binary

from tests.wire import hostile
from tests.wire.hostile import CODE
from tests.wire.hostile import PRIME
from tests.wire.hostile import integer
from tests.wire.hostile import text
from zeo.errors import ProtocolError
from zeo.wire import pickles
from zeo.wire.makers import KEYS
from zeo.wire.makers import MAKERS
from zeo.wire.pickles import CONTAINERS
from zeo.wire.pickles import DEPTH
from zeo.wire.pickles import NUMBER
from zeo.wire.pickles import SHARED
from zeo.wire.pickles import dumps
from zeo.wire.pickles import load_from_client
from zeo.wire.pickles import load_from_server

atoms = (st.none() | st.booleans() | st.integers() | st.integers(2**31, 2**70) | st.floats(allow_nan=False)
         | st.text() | st.binary() | st.binary(min_size=250, max_size=300))
keys = st.text() | st.binary() | st.integers() | st.tuples(st.text(), st.integers())
plain = st.recursive(
    atoms,
    lambda inner: (st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(keys, inner)
                   | st.sets(keys) | st.frozensets(keys)),
    max_leaves=15)


def fast(value: Any, protocol: int) -> bytes:
    """Pickled as ZEO does, without a memo."""
    file = io.BytesIO()
    pickler = pickle.Pickler(file, protocol)
    pickler.fast = True
    pickler.dump(value)
    return file.getvalue()


def exact(value: Any) -> Any:
    """Equal only if all types in the value are equal, too."""
    if isinstance(value, dict):
        return dict, [(exact(key), exact(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value), [exact(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return type(value), {exact_key(item) for item in value}
    return type(value), value


def exact_key(key: Any) -> Any:
    return (tuple, tuple(exact_key(item) for item in key)) if isinstance(key, tuple) else (type(key), key)


def refused(data: bytes) -> str:
    """Why both sides refuse a pickle."""
    reasons = []
    for load in load_from_client, load_from_server:
        with pytest.raises(ProtocolError) as caught:
            load(data)
        reasons.append(str(caught.value))
    assert reasons[0] == reasons[1]
    return reasons[0]


# ---- plain values ------------------------------------------------------------------

@given(plain)
def test_plain_values_come_back_as_they_were(value: Any) -> None:
    assert exact(load_from_client(dumps(value))) == exact(value)


@given(plain, st.integers(0, 5))
def test_every_protocol_is_read(value: Any, protocol: int) -> None:
    assert exact(load_from_server(fast(value, protocol))) == exact(value)


@given(st.dictionaries(st.text() | st.binary(), st.lists(atoms)), st.integers(3, 5))
def test_every_protocol_is_read_with_a_memo(value: Any, protocol: int) -> None:
    assert exact(load_from_server(pickle.dumps(value, protocol))) == exact(value)


@given(plain, st.integers(0, 5), st.sampled_from([pickle.dumps, fast]))
def test_the_short_proof_claims_nothing_the_long_one_does_not(
        value: Any, protocol: int, dump: Callable[[Any, int], bytes]) -> None:
    data = dump(value, protocol)
    if pickles._is_simple(data):
        assert not pickles._Walk(data, pickles.FROM_CLIENT).prove()


@pytest.mark.parametrize('value', [
    bytearray(b'abc'), bytearray(), 1.5 + 2j, complex(0, 0), frozenset([1]), set(), float('inf'), 10**300, -1,
    {'nested': [({},)]}, binary(b'abc'),
])
@pytest.mark.parametrize('protocol', range(6))
def test_builtin_types_are_read_in_every_form_they_have(value: Any, protocol: int) -> None:
    again = load_from_client(pickle.dumps(value, protocol))
    assert again == value and type(again) is type(value)


def test_a_bytearray_can_be_unpickled_from() -> None:
    assert load_from_client(bytearray(dumps([1]))) == [1]


def test_the_same_text_may_occur_any_number_of_times() -> None:
    value = ['the same'] * 1000
    assert load_from_client(pickle.dumps(value, 3)) == value


# ---- what is refused ---------------------------------------------------------------

ALLOWED = set('''
    INT BININT BININT1 BININT2 LONG LONG1 LONG4 BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8
    BYTEARRAY8 NONE NEWTRUE NEWFALSE UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 FLOAT BINFLOAT EMPTY_LIST
    APPEND APPENDS LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT DICT SETITEM SETITEMS EMPTY_SET ADDITEMS
    FROZENSET DUP MARK GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL REDUCE BUILD NEWOBJ
    PROTO STOP FRAME'''.split())


def test_the_opcodes_that_may_occur_are_exactly_these() -> None:
    steps = {name for name, code in pickles._CODES.items() if pickles._STEPS[code] is not None}
    atoms = {name for name, code in pickles._CODES.items() if pickles._ATOMS[code] or pickles._COUNTED[code]}
    assert steps | atoms | {'STOP'} == ALLOWED
    simple = {name for name, code in pickles._CODES.items() if pickles._KINDS[code] != pickles._OTHER}
    assert simple <= ALLOWED - {'GLOBAL', 'STACK_GLOBAL', 'REDUCE', 'NEWOBJ', 'BUILD', 'DUP', 'GET', 'BINGET',
                                'LONG_BINGET', 'PUT', 'LONG_BINPUT', 'LONG4'}


@pytest.mark.parametrize('name', sorted(set(CODE) - ALLOWED))
def test_no_other_opcode_may_occur(name: str) -> None:
    opcode = hostile.OPCODES[name]
    argument = b'' if opcode.arg is None else b"'x'\n" if opcode.arg.n < 0 else bytes(opcode.arg.n)
    assert 'opcode' in refused(b'\x80\x04N' + CODE[name] + argument + b'.')


def test_bytes_that_are_no_opcode_are_refused() -> None:
    for code in set(range(256)) - {ord(code) for code in CODE.values()}:
        assert 'opcode' in refused(bytes([code]) + b'.')


@pytest.mark.parametrize('name', ['BINUNICODE', 'SHORT_BINBYTES', 'BININT', 'BINFLOAT', 'LONG1', 'BINPUT', 'PROTO',
                                  'FRAME', 'LONG_BINGET', 'BYTEARRAY8'])
def test_an_argument_that_is_cut_off_is_refused(name: str) -> None:
    for size in range(9):
        for data in CODE[name] + b'\1' * size, b'N' + CODE[name] + b'\xff' * size:
            refused(data)


@pytest.mark.parametrize('data', [
    b'', b'.', b'N', b'N.N', b'N..', b'(.', b't.', b'N(tt.', b'\x85.', b'K\x01\x86.', b'a.', b'(a.',
    b']e.', b']u.', b'}(Nu.', b'}(NNe.', b'N(a.', b']N(a.', b'h\0.', b'g1\n.', b'g\n.', b'g-1\n.', b'g 0\n.', b'q\0.',
    b'Np-1\n.', b'Npx\n.', b'2.', b'(2.', b'I1', b'Ix\n.', b'Fx\n.', b'Lx\n.', b'V\\ux\n.', b'X\1\0\0\0\xff.',
    b'U\1\xff.', b'T\xff\xff\xff\xff.', b'\x8b\xff\xff\xff\xff.', b'\x80\x06N.', b'\x80\xffN.', b'}(]Nu.', b'\x8f(]\x90.',
    b'(]\x91.', b'}]Ns.', b'N}b.', b'N(N}b.', b'\x95\xff\0\0\0\0\0\0\0N.',
], ids=repr)
def test_a_damaged_pickle_is_refused(data: bytes) -> None:
    refused(data)


NAMES = [name for name in hostile.NAMES if name not in MAKERS]


@pytest.mark.parametrize('module, name', NAMES, ids=str)
def test_no_other_name_may_occur(module: str, name: str) -> None:
    modules = set(sys.modules)
    called = [b'c%b\n%b\n' % (module.encode(), name.encode()), text(module) + text(name) + b'\x93']
    for the_global in called:
        assert refused(b'\x80\x04' + the_global + b'.')
        for use in b')R', b')\x81', text('echo pwned') + b'\x85R':
            assert 'names' in refused(b'\x80\x04' + the_global + use + b'.')
    assert set(sys.modules) == modules


def test_a_name_in_a_refusal_cannot_forge_log_lines() -> None:
    reason = refused(b'\x80\x04' + text('a\nb') + text('c\r\n' * 1000) + b'\x93.')
    assert '\n' not in reason and '\r' not in reason and len(reason) < 300


@pytest.mark.parametrize('names', [b'K\x01' + text('eval'), text('builtins') + b'C\x04dict', b'NN', b']]'])
def test_a_name_that_is_not_text_is_refused(names: bytes) -> None:
    refused(b'\x80\x04' + names + b'\x93)R.')


DICT = b'cbuiltins\ndict\n'
PREFIX = b'cZopeUndo.Prefix\nPrefix\n'


@pytest.mark.parametrize('data', [
    DICT, DICT + b'\x85', b'](' + DICT + b'e', b']' + DICT + b'a', b'}' + DICT + b'Ns', b'}N' + DICT + b's',
    b'\x8f(' + DICT + b'\x90', b'(' + DICT + b'\x91', b'(N' + DICT + b'NNt', b'(N' + DICT + DICT + b't',
    DICT + b'q\0\x85h\0\x85', DICT + b'2\x86', PREFIX, PREFIX + b'\x85', DICT + DICT + b'\x86R',
    DICT + DICT + b'\x85R', DICT + DICT + b'R',
], ids=repr)
def test_a_maker_cannot_be_part_of_the_result(data: bytes) -> None:
    refused(data + b'.')


@pytest.mark.parametrize('maker', [DICT, PREFIX])
@pytest.mark.parametrize('state', [b'}', b'N', b')', b'}' + text('make') + b'Ns', b'N}' + text('make') + b'Ns\x86',
                                   b'}' + text('__eq__') + b'Ns', b'N}' + text('__eq__') + b'Ns\x86'])
def test_a_maker_cannot_be_altered(maker: bytes, state: bytes) -> None:
    assert 'type for a value' in refused(maker + state + b'b)R.')


@pytest.mark.parametrize('called', [b'N', b'K\x01', text('builtins.eval'), b']', b')', DICT + b')R'])
@pytest.mark.parametrize('call', [b')R', b')\x81'])
def test_a_value_cannot_be_called(called: bytes, call: bytes) -> None:
    assert 'calls a value' in refused(called + call + b'.')


# ---- limits ------------------------------------------------------------------------

def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth - 1):
        value = [value]
    return value


@pytest.mark.parametrize('build', [
    lambda depth: b']' * depth + b'a' * (depth - 1),
    lambda depth: b')' + b'\x85' * (depth - 1),
    lambda depth: b'(' * depth + b't' * depth,
    lambda depth: b'(' * depth + b'\x91' * depth,
    lambda depth: b'}K\x01' * (depth - 1) + b'}' + b's' * (depth - 1),
    lambda depth: b']' + b'q\x00' * 500 + b'(' + b']' * (depth - 1) + b'a' * (depth - 2) + b'e',
], ids=range(6))
def test_values_are_nested_fifty_levels_deep_at_most(build: Callable[[int], bytes]) -> None:
    assert DEPTH == 50
    load_from_client(build(DEPTH) + b'.')
    assert 'deeper' in refused(build(DEPTH + 1) + b'.')


def test_marks_are_nested_little_deeper_than_values() -> None:
    assert 'begins too many' in refused(b'(' * 60 + b't' * 60 + b'.')


def test_containers_are_referred_to_a_few_times_only() -> None:
    assert load_from_client(b']q\0(' + b'h\0' * SHARED + b't\x86.') == ([], ([],) * SHARED)
    assert 'refers' in refused(b']q\0(' + b'h\0' * (SHARED + 1) + b't\x86.')
    assert 'refers' in refused(b']' + b'2\x86' * (SHARED + 1) + b'.')


@pytest.mark.parametrize('use', [b'h\0', b'g0\n', b'j\0\0\0\0', b'2'])
@pytest.mark.parametrize('container', [b')', b']', b'}', b'\x8f', b'N\x85', b'(\x91', b'(t', DICT + b')R', b']K\x01a'])
def test_what_is_empty_when_it_is_named_counts_as_a_container(container: bytes, use: bytes) -> None:
    repeated = (b'(' + container + b'p0\n' + use * (SHARED + 1) + b't.')
    assert 'refers' in refused(repeated)


def test_atoms_and_text_are_referred_to_freely() -> None:
    for atom in b'K\1', text('a'), b'C\1a', b'N', b'G' + bytes(8):
        assert len(load_from_client(b'(' + atom + b'q\0' + b'h\0' * 600 + b't.')) == 601


@pytest.mark.parametrize('put', [b'q\1', b'r\1\0\0\0', b'r\xff\xff\xff\xff', b'p1\n', b'p99999999999\n', b'q\0q\2'])
def test_the_memo_has_no_holes(put: bytes) -> None:
    assert 'holes' in refused(b'(N' + put + b'N2t.')


def test_integers_whose_hashes_collide_can_be_made_at_will() -> None:
    assert {hash(number * PRIME) for number in range(1000)} == {0}


@pytest.mark.parametrize('build', [
    lambda count: fast(dict.fromkeys(range(count)), 3),
    lambda count: fast(set(range(count)), 4),
    lambda count: fast(frozenset(range(count)), 4),
    lambda count: fast(set(range(count)), 3),
    lambda count: b'(' + b''.join(integer(number) + b'N' for number in range(count)) + b'd.',
    lambda count: b'}' + b''.join(integer(number) + b'Ns' for number in range(count)) + b'.',
    lambda count: DICT + b'((' + b''.join(integer(number) + b'N\x86' for number in range(count)) + b'ltR.',
], ids=['dict', 'set', 'frozenset', 'made set', 'DICT', 'SETITEM', 'made dict'])
def test_keys_that_are_not_text_are_limited(build: Callable[[int], bytes]) -> None:
    assert len(load_from_client(build(KEYS))) == KEYS
    assert 'unusual keys' in refused(build(KEYS + 1))


@pytest.mark.parametrize('value', [{str(n): n for n in range(3000)}, {b'%d' % n for n in range(3000)}], ids=['dict', 'set'])
@pytest.mark.parametrize('protocol', [3, 4])
def test_keys_of_text_and_bytes_are_not_limited(value: Any, protocol: int) -> None:
    assert load_from_client(fast(value, protocol)) == value


@pytest.mark.parametrize('build', [
    lambda size: b'\x8b' + size.to_bytes(4, 'little') + b'\x7f' * size,
    lambda size: b'I' + b'1' * size + b'\n',
    lambda size: b'L' + b'1' * (size - 1) + b'L\n',
    lambda size: b'F' + b'1' * size + b'\n',
], ids=['LONG4', 'INT', 'LONG', 'FLOAT'])
def test_numbers_are_limited_in_length(build: Callable[[int], bytes]) -> None:
    size = NUMBER if not build(5).startswith(b'F') else 300
    value = load_from_client(build(size) + b'.')
    assert str(value)
    refused(build(NUMBER + 1) + b'.')


def test_a_message_of_hardly_anything_but_containers_is_refused() -> None:
    assert len(load_from_client(b'(' + b'\x8f' * (CONTAINERS - 1) + b't.')) == CONTAINERS - 1
    assert 'containers' in refused(b'(' + b'\x8f' * CONTAINERS + b't.')
    entries = [{'id': b'12345678', 'size': 5}] * 2 * CONTAINERS
    assert load_from_client(fast(entries, 3)) == entries


def test_a_client_sends_fewer_values_than_a_server() -> None:
    oids = fast([b'12345678'] * pickles.FROM_CLIENT, 3)
    assert len(load_from_server(oids)) == pickles.FROM_CLIENT
    with pytest.raises(ProtocolError, match='more than 250000 parts'):
        load_from_client(oids)


@pytest.mark.parametrize('kind', ['bytearray', 'list', 'tuple', 'set'])
def test_makers_copy_no_more_than_was_sent(kind: str) -> None:
    content, size = (b'B', 5000) if kind == 'bytearray' else (b'(' + b'C\1a' * 5000 + b't', 0)
    if size:
        content += size.to_bytes(4, 'little') + bytes(size)
    make = b'cbuiltins\n%b\n' % kind.encode()
    assert load_from_client(b'(' + make + content + b'\x85Rt.')
    assert 'copies' in refused(b'(' + make + b'q\0' + content + b'q\1\x85R' + b'h\0h\1\x85R' * 4 + b't.')


# ---- what is sent ------------------------------------------------------------------

class Custom:
    pass


@pytest.mark.parametrize('value', [Custom(), Custom, [Custom()], {'a': {'b': Custom}}, len, ValueError('x'), nested(51),
                                   dict.fromkeys(range(KEYS + 1)), 1 << 9000], ids=lambda value: repr(value)[:20])
def test_what_the_other_side_would_refuse_is_not_sent(value: Any) -> None:
    with pytest.raises(pickle.PicklingError, match='only plain values can be sent'):
        dumps(value)


def test_values_that_occur_many_times_are_spelled_out() -> None:
    shared = {'a': [1]}
    value = [shared] * 20
    assert 'refers' in refused(pickle.dumps(value, 3))
    assert load_from_server(dumps(value)) == value


def test_what_contains_itself_is_not_sent() -> None:
    loop: list[Any] = []
    loop += [loop] * 10
    with pytest.raises(ValueError):
        dumps(loop)


# ---- all at once -------------------------------------------------------------------

def run(*args: str, code: str = '') -> subprocess.CompletedProcess[str]:
    command = ['-c', code] if code else ['-m', 'tests.wire.hostile', *args]
    return subprocess.run([sys.executable, '-W', 'error', *command], capture_output=True, text=True, timeout=3600)


def test_thousands_of_hostile_frames_do_nothing() -> None:
    done = run('--seed', '1', '--count', '20000', '--largest', '10000')
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(done.stdout)
    assert figures['frames'] == 20000
    assert figures['accepted'] > 4000  # or they do not get far enough to be dangerous


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize('seed', range(10))
def test_millions_of_hostile_frames_do_nothing(seed: int) -> None:
    done = run('--seed', str(1000 + seed), '--count', '200000', '--largest', '200000')
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize('reader, noticed', [
    ('pickle.loads', 'pickle.find_class'),
    ('lambda data: __import__("json.tool")', 'import'),
    ('lambda data: hostile.sing()', 'the canary sang'),
    ('lambda data: open("/dev/null")', "'open'"),
    ('lambda data: object()', "class 'object'"),
    ('lambda data: [None] * 10**6', 'expansion'),
    ('lambda data: next(seconds for seconds in iter(time.process_time, None) if seconds > 2)', ' s at frame'),
    ('lambda data: 1 // 0', 'ZeroDivisionError'),
])
def test_the_process_that_survives_would_notice(reader: str, noticed: str) -> None:
    code = f"""if True:
        import pickle, time
        from tests.wire import hostile
        hostile.survive(lambda: b'ccanary\\nsing\\n.', 1, [{reader}])"""
    done = run(code=code)
    assert done.returncode == 1 and noticed in done.stderr, done.stderr[-3000:]
