"""The drivers: hypervisors, storage and networks behind the protocols of `base`."""
