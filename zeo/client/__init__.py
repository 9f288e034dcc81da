"""The client's rooms; the door is `zeo.ClientStorage`."""
