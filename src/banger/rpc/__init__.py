"""The protocol between clients and the daemon: JSON lines over a Unix socket."""
