"""Records are read, and nothing in them is run."""

import collections
import datetime
import decimal
import pickle
import time
import uuid
from typing import Any

import pytest
import zodbpickle
from BTrees.Length import Length
from BTrees.OOBTree import OOBTree
from ZODB.ConflictResolution import PersistentReference
from ZODB.POSException import ConflictError
from zope.interface import Interface
from zope.interface import alsoProvides
from zope.interface import implementer

from tests.server.keepers import BIRD
from tests.server.keepers import HERE
from tests.server.keepers import KEEPER
from tests.server.keepers import SING
from tests.server.keepers import Bird
from tests.server.keepers import Keeper
from tests.server.keepers import Made
from tests.server.keepers import Reference
from tests.server.keepers import effects
from tests.server.keepers import record
from tests.server.keepers import refused
from tests.server.keepers import resolve
from tests.server.keepers import state_of
from tests.server.talk import oid
from tests.wire.hostile import PRIME
from tests.wire.hostile import integer
from zeo.server import interpreter


@pytest.fixture(autouse=True)
def silence() -> None:
    effects.clear()
    Made.made.clear()


class IKeeper(Interface):
    pass


class IOther(Interface):
    pass


@implementer(IKeeper)
class Provider(Keeper):
    """As they are in Zope."""

    value = 0


# ---- what is resolved


ZONE = datetime.timezone(datetime.timedelta(hours=2), 'summer')
VALUES = [
    None, True, False, 0, -1, 255, 65536, 2**31, -2**40, 2**100, 10**400, 1.5, 1j, '', 'text \u20ac \U0001f40d',
    'x' * 300, b'', b'bytes', b'x' * 300, bytearray(b'more'), (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [],
    [1, [2, [3]]], {}, {'a': {'b': [1, (2, {'c': None})]}}, {(1, 'a'): 1, 1.5: 2, None: 3, frozenset([1]): 4},
    set(), {1, 2}, frozenset(), frozenset(['a', b'b']), {(1, 2)}, collections.OrderedDict(b=1, a=2),
    collections.deque([1, 2]), collections.deque([1], 3), datetime.date(2026, 1, 2),
    datetime.datetime(2026, 1, 2, 3, 4, 5, 6), datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc),
    datetime.datetime(2026, 1, 2, tzinfo=ZONE), datetime.time(1, 2), datetime.timedelta(1, 2, 3),
    decimal.Decimal('1.50'), decimal.Decimal('NaN'), uuid.UUID(int=7), {uuid.UUID(int=2**128 - 1): 1},
    zodbpickle.binary(b'x'), {datetime.date(2026, 1, 2): 1},
]


@pytest.mark.parametrize('protocol', [2, 3])
@pytest.mark.parametrize('value', VALUES, ids=lambda value: type(value).__name__)
def test_states_of_plain_values_are_resolved(value: Any, protocol: int) -> None:
    old, saved = record(Keeper, {'value': 1}, protocol), record(Keeper, {'value': 2}, protocol)
    new = record(Keeper, {'value': value, 'again': [value]}, protocol)
    resolved = state_of(resolve(new, saved, old))
    if type(value) is not zodbpickle.binary:  # which is text for Python 2
        assert repr(resolved) == repr({'value': value, 'again': [value]})
    assert [state['value'] for state in effects[0][:2]] == [1, 2]


def test_what_zodb_cannot_read_is_not_resolved() -> None:
    for protocol in 4, 5:
        refused(pickle.dumps(Keeper, protocol) + pickle.dumps({'value': {1}}, protocol))


REFERENCES = [
    b'\x80' * 8, (b'\0' * 8, None), (b'\0' * 8, ('shop', 'Stock')), ['m', ('other', b'\0' * 8, ('shop', 'Stock'))],
    ['n', ('other', b'\0' * 8)], ['w', (b'\0' * 8,)], ['w', (b'\0' * 8, 'other')], [b'\0' * 8]]


@pytest.mark.parametrize('reference', REFERENCES, ids=repr)
def test_references_are_kept_as_they_are(reference: Any) -> None:
    new = record(Keeper, {'child': Reference(reference), 'more': [Reference(reference)]})
    resolved = state_of(resolve(new))
    assert resolved['child'].data == resolved['more'][0].data == reference
    old, saved, state = effects[0]
    assert type(old['child']) is PersistentReference
    assert old['child'] is saved['child'] is state['child'] is state['more'][0]


def test_a_reference_names_its_class_and_does_not_load_it() -> None:
    new = (pickle.dumps(Keeper, 3) + b'\x80\x03}X\x01\x00\x00\x00a' + b'C\x08' + oid(7)
           + b'cno_such_module\nThing\n\x86Qs.')
    assert state_of(resolve(new))['a'].data == (oid(7), ('no_such_module', 'Thing'))
    assert effects[0][0]['a'].klass == ('no_such_module', 'Thing')


@pytest.mark.parametrize('kind', [
    (Made, None), (Made, ()), (Made, (1, 'a')), ((Made.__module__, 'Made'), None),
    ((Made.__module__, 'Made'), (1, 'a'))])
def test_the_class_may_have_arguments(kind: Any) -> None:
    resolved = resolve(record(kind, {'value': 1}))
    assert resolved.startswith(record(kind, None)[:-4])
    assert state_of(resolved) == {'value': 1}
    assert Made.made == [kind[1] or ()]


def test_lengths_and_trees_are_resolved() -> None:
    old, saved, new = (record(Length, number) for number in (10, 11, 15))
    assert state_of(resolve(new, saved, old)) == 16
    old, saved, new = (record(OOBTree, OOBTree(dict.fromkeys(keys, 1)).__getstate__())
                       for keys in ('ab', 'abc', 'abd'))
    tree = OOBTree()
    tree.__setstate__(state_of(resolve(new, saved, old)))
    assert dict(tree) == dict.fromkeys('abcd', 1)


def test_cycles_through_a_reference_are_no_matter_but_others_are() -> None:
    cycle: dict[str, Any] = {}
    cycle['self'] = cycle
    refused(record(Keeper, cycle))


# ---- what is not


COUNTED = b'cuuid\nUUID\n'
CALLS = [
    SING + b')R', SING + b'K\x01\x85R', BIRD + b')R', BIRD + b')\x81', BIRD + b')\x81}b', BIRD + b')}\x92',
    b'(i' + HERE + b'\nsing\n', b'(' + SING + b'o', b'(' + BIRD + b'K\x01o', BIRD + b'}b', BIRD + b')R}b',
    SING, BIRD, KEEPER, KEEPER + b')R', KEEPER + b')\x81',
    KEEPER + b'N}X\x12\x00\x00\x00_p_resolveConflictNs\x86b', KEEPER + b'}b', b']' + BIRD + b'a',
    b'}' + BIRD + b'Ns', b'\x8f(' + BIRD + b'\x90', BIRD + b'\x85', b'(' + BIRD + b'N' + b'd',
    b'cbuiltins\neval\nX\x04\x00\x00\x001 +1\x85R', b'cbuiltins\ngetattr\n(' + BIRD + b'X\x01\x00\x00\x00atR',
    b'ccopyreg\n_reconstructor\n(' + BIRD + b'cbuiltins\nobject\nNtR',
    b'ccopyreg\n__newobj__\n' + BIRD + b'\x85R', b'cfunctools\npartial\n' + SING + b'\x85R',
    b'ccollections\nOrderedDict\n](' + SING + b'K\x01\x86e\x85R', b'ccollections\ndeque\n' + BIRD + b'\x85R',
    b'cbuiltins\nset\n' + BIRD + b'\x85R', b'cbuiltins\nset\nK\x01\x85R', b'cbuiltins\nset\n',
    b'cbuiltins\nset\n)\x81', b'cuuid\nUUID\n', COUNTED + b'}b', COUNTED + b')R', COUNTED + b')\x81',
    COUNTED + b')\x81}X\x03\x00\x00\x00intNsb', COUNTED + b'N}X\x03\x00\x00\x00intK\x01s\x86b',
    COUNTED + b')\x81}X\x03\x00\x00\x00intJ\xff\xff\xff\xffsb', COUNTED + b')\x81N}X\x03\x00\x00\x00intNs\x86b',
    b'cdatetime\ndatetime\n', b'cdatetime\ndatetime\n)R', b'cdatetime\ndatetime\n}\x85R',
    b'cdatetime\ndatetime\n)\x81', b'cdecimal\nDecimal\nG' + b'\0' * 8 + b'\x85R',
    b'cdecimal\nDecimal\nX\x01\x00\x00\x00a\x85R', b'cbuiltins\nbytearray\n' + integer(2**40) + b'\x85R',
    b'cbuiltins\nbytes\n' + integer(2**40) + b'\x85R', b'cbuiltins\nbytes\n' + BIRD + b'\x85R',
    b'Pid\n', b'\x82\x01', b'\x83\x01\x00', b'\x97', b'NQ', b'K\x01Q', b'}Q', b']Q', b')Q',
    BIRD + b'Q', b']' + BIRD + b'aQ', BIRD + BIRD + b'\x86Q', b'C\x01a}' + BIRD + b'\x87Q',
    b'C\x01aC\x01b' + BIRD + b'\x86\x86Q', b'](X\x01\x00\x00\x00m' + BIRD + b'eQ', b']](]]eaQ',
    b'X\x02\x00\x00\x00os' + b'X\x06\x00\x00\x00system' + b'\x93)R', b'NN\x93', b']]\x93', b'}}\x93)R',
    b'N(', b'0', b'N0', b'(', b't', b'e', b'a', b's', b'u', b'd', b'l', b'\x86', b'R', b'b', b'\x81', b'h\x00',
    b'U\x01\xff', b"S'a'\n", b'T\xff\xff\xff\xff', b'B\xff\xff\xff\x7fa', b'\x8e' + b'\xff' * 8, b'I1_0x\n',
    b'Na', b'NNNs', b'](NNu', b'N(Ne', b'N(Ns', b'](N\x90', b'}(Nu', b'\xff', b'', b'L' + b'9' * 5000 + b'L\n',
]


@pytest.mark.parametrize('evil', CALLS, ids=repr)
def test_nothing_else_is_called_made_or_altered(evil: bytes) -> None:
    good = record(Keeper, {})
    head, tail = pickle.dumps(Keeper, 3), pickle.dumps({}, 3)
    before = dict(vars(Keeper)), dict(vars(Bird)), dict(vars(uuid.UUID)), dict(vars(datetime.datetime))
    for bad in (head + b'\x80\x04' + evil + b'.',
                head + b'\x80\x04}X\x01\x00\x00\x00a' + evil + b's.',
                head + b'\x80\x04' + evil + b'0N.' + b'N.',
                b'\x80\x04' + KEEPER + evil + b'\x86.' + tail,
                b'\x80\x04' + evil + b')\x86.' + tail,
                b'\x80\x04' + KEEPER + evil + b'\x85\x86.' + tail,
                b'\x80\x04X\x01\x00\x00\x00a' + evil + b'\x86N\x86.' + tail):
        for records in [(bad, good, good), (good, bad, good), (good, good, bad), (bad, bad, bad)]:
            try:
                resolve(*records)
            except ConflictError:
                assert not effects
            else:  # it was thrown away again
                assert [len(each) for each in effects] == [3]
                effects.clear()
    assert before == (dict(vars(Keeper)), dict(vars(Bird)), dict(vars(uuid.UUID)), dict(vars(datetime.datetime)))


@pytest.mark.parametrize('module, name', [('\x1b[2J', 'Stock'), ('shop', 'a\nb'), ('\u2028', 'x')])
def test_a_name_that_cannot_be_logged_is_not_told(module: str, name: str) -> None:
    with pytest.raises(ConflictError) as caught:
        resolve(record(((module, name), ()), {}))
    assert caught.value.class_name is None


def test_what_a_class_provides_is_no_matter_but_what_an_object_provides_is_not_plain() -> None:
    keeper = Provider()
    keeper.value = 1
    assert state_of(resolve(record(Provider, keeper.__getstate__()))) == {'value': 1}
    effects.clear()
    alsoProvides(keeper, IOther)
    refused(record(Provider, keeper.__getstate__()))


# ---- limits


def test_a_record_that_is_too_long_is_not_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    good = record(Keeper, {})
    monkeypatch.setattr(interpreter, 'LONGEST', len(good))
    resolve(good)
    effects.clear()
    refused(record(Keeper, {'a': 1}))


def test_a_record_of_too_many_parts_is_not_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter, 'OPCODES', 100)
    resolve(record(Keeper, [None] * 90))
    effects.clear()
    refused(record(Keeper, [None] * 110))
    monkeypatch.setattr(interpreter, 'OPCODES', 1000)
    monkeypatch.setattr(interpreter, 'PARTS', 100)
    refused(record(Keeper, [None] * 110))


def deep(levels: int) -> Any:
    value: Any = ()
    for _ in range(levels):
        value = (value,)
    return value


DOUBLED = b')' + b'2\x86' * 60
BOMBS = [
    b')' + b'\x85' * 100_000, b']' * 100_000 + b'a' * 99_999, b'}' + b')' + b'\x85' * 100_000 + b'Ns',
    b')q\x00' + b'h\x00h\x00\x86q\x00' * 60, b'}' + b')q\x00' + b'h\x00h\x00\x86q\x00' * 60 + b'Ns',
    b'}' + b')q\x00' + b'h\x00h\x00\x86q\x00' * 30 + b'\x85' * 2 + b'Ns',
    b']q\x00h\x00a', b'}q\x00K\x01h\x00s', b']q\x00' + b'h\x00a' * 10_000,
    b'}(' + b''.join(integer(PRIME * each) + b'N' for each in range(1, 20_000)) + b'u',
    b'\x8f(' + b''.join(integer(PRIME * each) for each in range(1, 20_000)) + b'\x90',
    b'(' + b''.join(integer(PRIME * each) for each in range(1, 20_000)) + b'\x91',
    b'cbuiltins\nset\n](' + b''.join(integer(PRIME * each) for each in range(1, 20_000)) + b'e\x85R',
    b'](' + b'K\x01' * 50_000 + b'eq\x00' + b'(' + b'cbuiltins\nset\nh\x00\x85R0' * 5000 + b'l',
]


@pytest.mark.parametrize('bomb', BOMBS, ids=lambda bomb: repr(bomb[:20]))
def test_a_small_record_costs_little_time(bomb: bytes) -> None:
    began = time.process_time()
    for bad in (pickle.dumps(Keeper, 3) + bomb + b'.', KEEPER + bomb + b'\x86.' + b'N.'):
        refused(bad)
    assert time.process_time() - began < 5


def test_values_may_be_nested_as_deep_as_the_limit_and_no_deeper() -> None:
    for put in (lambda value: {'value': value}, lambda value: {'key': {value: 1}}):
        resolve(record(Keeper, put(deep(interpreter.DEPTH - 3))))
        effects.clear()
        refused(record(Keeper, put(deep(interpreter.DEPTH + 1))))


def test_large_states_are_resolved() -> None:
    value = {'by number': dict.fromkeys(range(50_000)), 'by day': {
        datetime.date.fromordinal(number): [number, str(number)] for number in range(1, 9_000)}}
    assert state_of(resolve(record(Keeper, value))) == value
