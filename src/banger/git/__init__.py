"""Git repositories of the host: looked at, packed for a guest, and changed by a guest's patch."""
