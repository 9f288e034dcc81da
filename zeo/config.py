"""The section ``<clientstorage>`` of ZConfig, which ``%import zeo`` makes known (see component.xml)."""

from typing import Any

from ZODB.config import BaseConfig

from zeo.ClientStorage import ClientStorage

#: Keys that are named like the storage's options, but for the hyphens.
SAME = (
    'storage', 'name', 'cache_size', 'client', 'var', 'wait', 'wait_timeout', 'min_disconnect_poll',
    'max_disconnect_poll', 'read_only', 'read_only_fallback', 'server_sync', 'client_label', 'start_over',
    'blob_dir', 'shared_blob_dir', 'blob_cache_size', 'blob_cache_size_check', 'ssl')


class ClientStorageSection(BaseConfig):  # type: ignore[misc]
    """What stands in a section; ``open`` makes a storage of it."""

    def open(self) -> ClientStorage:
        found = self.config
        options: dict[str, Any] = {
            name: getattr(found, name) for name in SAME if getattr(found, name) is not None}
        return ClientStorage([each.address for each in found.server], cache=found.cache_path, **options)
