"""The table of methods."""

from zeo.wire.methods import METHODS


def test_every_method_of_the_protocol_has_its_number_of_arguments() -> None:
    for name, method in METHODS.items():
        assert 0 <= method.least <= method.most <= 6, name
    assert {name for name, method in METHODS.items() if method.writes} == {
        'new_oids', 'tpc_begin', 'commit'}


def test_all_methods_that_zeo_clients_call_are_in_the_table() -> None:
    from ZEO.StorageServer import registered_methods
    assert set(registered_methods) - set(METHODS) <= {'new_oid', 'undo', 'get_size_info', 'getExtensionMethods'}
