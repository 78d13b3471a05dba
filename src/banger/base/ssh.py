"""What OpenSSH is told to reach a guest: names, a key, and what hosts are known by."""

from __future__ import annotations

from banger.base.model import Record

#: ``NAME.vm`` is the VM called NAME.
SUFFIX = ".vm"
USER = "root"


class SshFiles(Record, frozen=True):
    """Files of the host's: the private key that guests let in, and the keys that guests have."""

    key: str
    known_hosts: str


class SshAccess(Record, frozen=True):
    """A guest that lets the key in; its own keys are among those that are known."""

    vm_name: str
    files: SshFiles
