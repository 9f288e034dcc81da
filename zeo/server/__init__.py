"""The server's rooms; the door is `zeo.StorageServer`."""
