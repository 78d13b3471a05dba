"""The system tools banger calls, and the Debian package that has each."""

from __future__ import annotations

_PACKAGES = {
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-img": "qemu-utils",
    "passt": "passt",
    "mke2fs": "e2fsprogs",
    "resize2fs": "e2fsprogs",
    "debugfs": "e2fsprogs",
    "mmdebstrap": "mmdebstrap",
    "unshare": "util-linux",
    "setpriv": "util-linux",
    "fallocate": "util-linux",
    "prlimit": "util-linux",
    "newuidmap": "uidmap",
    "newgidmap": "uidmap",
    "tar": "tar",
    "git": "git",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "skopeo": "skopeo",
    "nft": "nftables",
    "resolvectl": "systemd-resolved",
    "dmsetup": "dmsetup",
}


def package_of(tool: str) -> str:
    """The Debian package that ships `tool`, or an empty string for one banger does not know."""
    return _PACKAGES.get(tool, "")
