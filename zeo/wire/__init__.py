"""What client and server agree on, as bytes and values; no socket, no thread, no clock in here."""
