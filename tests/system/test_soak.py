"""Each scenario of the soak, in short; and that it would notice a loss."""

from collections.abc import Callable

import pytest

from tests.system import accounts
from tests.system import hostilities
from tests.system import soak
from tests.system.servers import Server


#: What ordinary tests do to real servers as well.
ELSEWHERE = {'hostile-frames', 'hostile-records', 'bad-manners', 'wrong-starts', 'tls', 'roles'}


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=pytest.mark.soak) if name in ELSEWHERE else name for name in soak.SCENARIOS])
def test_the_server_survives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in soak.NEED_A_DISK and not soak.can_have_disks():
        pytest.skip('nothing can be mounted here')
    if name in hostilities.NEED_A_NETWORK and not hostilities.can_have_a_network():
        pytest.skip('no network can be made here')
    # Each scenario ends when the server has given back its threads.
    monkeypatch.setattr(Server, 'constants', {'zeo.server.threads.PATIENCE': .2})
    account = soak.SCENARIOS[name](.02)
    print(account)
    assert account.tried and not account.lost, account


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_the_server_survives_for_minutes(capfd: pytest.CaptureFixture[str]) -> None:
    assert soak.main([]) == 0, capfd.readouterr().out


# ---- it would notice


def test_a_commit_that_is_answered_before_it_is_on_disk_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, 'SYNCED', soak.SYNCED.replace('    os.rename', '    0 and os.rename'))
    assert soak.power_cut(.02).lost


def test_a_commit_that_is_lost_is_noticed(start_server: Callable[..., Server]) -> None:
    server, account = start_server(), soak.Account()
    writers = soak.Writers(server, 1)
    soak.until(lambda: writers.acknowledged, 'there are commits')
    writers.stop()
    server.stop()
    writers.acknowledged[b'never was'] = b''
    soak._compare(f'{server.folder}/Data.fs', writers, account)
    assert account.lost == [f'{b"never was".hex()} was acknowledged and is not there']
    server.start()


def test_what_a_server_does_not_give_back_is_noticed(
        start_server: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounts, 'BACK', .1)
    server, account = start_server(), soak.Account()
    with soak.client_of(server) as client:
        with soak.watched(server, account):
            client.ping()
            stays = soak.SocketPeer(server.address)
        stays.close()
    assert [each.split(':')[0] for each in account.lost] == ['threads', 'files']
