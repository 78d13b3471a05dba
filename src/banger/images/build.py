"""The images banger makes itself: Debian's packages as a root file system and a work seed.

Everything is made in a directory of the caller, who renames it when it is complete. The tree is
written once, and once more as ext4 by mke2fs.
"""

from __future__ import annotations

import asyncio
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from banger.base.errors import NotFound, PreconditionFailed
from banger.images import preflight
from banger.images.bootstrap import Bootstrap, bootstrap
from banger.images.ext4 import MIB
from banger.images.progress import Progress
from banger.images.root import RootFiles, make_root
from banger.images.unpack import Directory, Unpacked
from banger.images.userns import temporary_tree

#: All of them fit the usual sizes.
_CONTENT = Unpacked(
    root=Directory(mode=0o755, uid=0, gid=0, entries=0, bytes=0),
    home=Directory(mode=0o700, uid=0, gid=0, entries=0, bytes=0),
)


@dataclass(frozen=True)
class Recipe:
    """How to make one image. ``need_bytes`` is the free space that building takes at its peak."""

    packages: tuple[str, ...]
    need_bytes: int


_SMALL = ("ca-certificates", "iproute2", "procps")

RECIPES = {
    "debian-bookworm": Recipe(
        packages=(
            *_SMALL,
            *("build-essential", "curl", "git", "jq", "less", "openssh-server", "python3", "sudo"),
            # For --init systemd; kmod, as several of its units load modules.
            *("dbus", "kmod", "libpam-systemd", "systemd-sysv"),
            # What a developer misses at once.
            *("bzip2", "file", "iputils-ping", "nano", "netbase", "patch", "pkg-config"),
            *("python3-pip", "python3-venv", "rsync", "tar", "unzip", "vim-tiny", "xz-utils"),
        ),
        need_bytes=2560 * MIB,
    ),
    "debian-bookworm-minimal": Recipe(packages=_SMALL, need_bytes=1024 * MIB),
}

#: Names that `build_image` takes.
BUILDABLE = tuple(RECIPES)


@dataclass(frozen=True)
class ImageBuild:
    """A finished image: its files, and what is installed as name=version."""

    files: RootFiles
    packages: tuple[str, ...]


async def build_image(name: str, dest: Path, *, progress: Progress) -> ImageBuild:
    """Make the image `name` of `RECIPES` in the directory `dest`.

    Stages ``download``, ``install``, ``filesystem``. On failure or when cancelled, no process and
    no mount is left, and only files in `dest`, for the caller to remove (`userns.remove_tree`).
    Raises NotFound for another name, PreconditionFailed for what is missing on the host,
    Unavailable when packages cannot be fetched.
    """
    recipe = RECIPES.get(name)
    if recipe is None:
        raise NotFound(
            f'there is no recipe for an image "{name}"', hint=f"known are: {', '.join(BUILDABLE)}"
        )
    await preflight.ensure_requirements()
    preflight.ensure_free_space(dest, recipe.need_bytes)
    async with temporary_tree(dest / "scratch") as scratch:
        tree = scratch / "tree"
        await bootstrap(Bootstrap("minbase", recipe.packages), tree, scratch, progress)
        packages = await asyncio.to_thread(installed_packages, tree)
        await asyncio.to_thread(depersonalise, tree)
        files = await make_root(tree, _CONTENT, dest, progress=progress)
    return ImageBuild(files, packages)


def installed_packages(tree: Path) -> tuple[str, ...]:
    """``name=version`` of what dpkg has installed in `tree`, sorted."""
    text = (tree / "var/lib/dpkg/status").read_text(encoding="utf-8", errors="replace")
    found = []
    for paragraph in text.split("\n\n"):
        fields = dict(re.findall(r"^(Package|Version|Status): (.*)$", paragraph, re.MULTILINE))
        known = fields.keys() >= {"Package", "Version"}
        if known and fields.get("Status", "").endswith(" installed"):
            found.append(f"{fields['Package']}={fields['Version']}")
    return tuple(sorted(found))


#: Secrets and identities that all machines of the image would share, and what the build has left
#: behind. The content of directories goes, not they themselves.
_REMOVE = (
    *("etc/ssh/ssh_host_*", "etc/machine-id", "var/lib/dbus/machine-id"),
    *("var/lib/systemd/random-seed", "var/lib/systemd/credential.secret", "var/lib/urandom/*"),
    *("etc/resolv.conf", "etc/hostname", "etc/.pwd.lock"),
    *("var/lib/apt/lists/*", "var/cache/apt/*", "var/cache/debconf/*-old", "var/lib/dpkg/*-old"),
    *("tmp/*", "var/tmp/*", "run/*"),
    # As an ordinary user cannot make device nodes, no image has them: the guest mounts a devtmpfs.
    "dev/*",
)
_WRITE = {
    # Empty: systemd makes one at the first boot, our init when it is told who it is.
    "etc/machine-id": "",
    "etc/resolv.conf": "",
    "etc/hostname": "banger\n",
}
_HOSTS = "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n"
_HOSTS_MAX_BYTES = 1 << 20
#: As Debian has it: the line of the machine's own name.
_OWN_ADDRESS = "127.0.1.1"


#: Debian's unit takes for granted that the package's installation made host keys.
_SSH_UNIT = "usr/lib/systemd/system/ssh.service"
_SSH_HOST_KEYS = {
    "etc/systemd/system/ssh.service.d/host-keys.conf": """\
[Service]
ExecStartPre=
ExecStartPre=/usr/bin/ssh-keygen -A
ExecStartPre=/usr/sbin/sshd -t
""",
}


def _hosts(tree: Path) -> str:
    """/etc/hosts without the name of the machine that it is from."""
    path = tree / "etc/hosts"
    _check_inside(tree, path)
    if path.is_symlink() or not path.is_file() or path.stat().st_size > _HOSTS_MAX_BYTES:
        return _HOSTS
    text = path.read_text(encoding="utf-8", errors="surrogateescape")
    lines = [each for each in text.splitlines(keepends=True) if each.split()[:1] != [_OWN_ADDRESS]]
    return "".join(lines) if any("localhost" in each for each in lines) else _HOSTS + "".join(lines)


def depersonalise(tree: Path) -> None:
    """Take out of `tree` what belongs to one machine: the one that built it, or one that boots it.

    Root's files in the tree are ours in user namespaces too, so this needs none. Paths that a
    link in the tree would lead out of it are refused with PreconditionFailed.
    """
    for pattern in _REMOVE:
        for path in sorted(tree.glob(pattern)):
            _check_inside(tree, path)
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    for log in sorted((tree / "var/log").rglob("*")):
        if log.is_file() and not log.is_symlink() and log.stat().st_size:
            _check_inside(tree, log)
            log.unlink()  # not those that are empty: login expects wtmp, btmp and lastlog
    with_sshd = (tree / _SSH_UNIT).is_file()
    write = _WRITE | {"etc/hosts": _hosts(tree)} | (_SSH_HOST_KEYS if with_sshd else {})
    for name, content in write.items():
        path = tree / name
        _check_inside(tree, path)
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_text(content, encoding="utf-8", errors="surrogateescape")
        path.chmod(0o644)


def _check_inside(tree: Path, path: Path) -> None:
    if not path.parent.resolve().is_relative_to(tree.resolve()):
        raise PreconditionFailed(f"{path} leads out of the image")
