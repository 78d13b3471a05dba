"""What building needs from the host: tools, subordinate ids, namespaces, free space."""

from __future__ import annotations

import os
import pwd
import shutil
from dataclasses import dataclass
from pathlib import Path

from banger.base import proc
from banger.base.errors import PreconditionFailed
from banger.base.tools import package_of
from banger.base.units import format_size
from banger.images import userns

_TOOLS = ("mmdebstrap", "mke2fs", "debugfs", "unshare", "setpriv")
_USER_TOOLS = ("newuidmap", "newgidmap")

#: Ids that a Debian system uses: up to nobody and nogroup, 65534.
SUBORDINATE_IDS = 65535

_KEYRING_DIRS = (Path("/usr/share/keyrings"), Path("/etc/apt/trusted.gpg.d"))

#: Switches that forbid user namespaces: file, the value that forbids, the setting that allows.
_SWITCHES = (
    ("/proc/sys/user/max_user_namespaces", "0", "user.max_user_namespaces=15000"),
    ("/proc/sys/kernel/unprivileged_userns_clone", "0", "kernel.unprivileged_userns_clone=1"),
    (
        "/proc/sys/kernel/apparmor_restrict_unprivileged_userns",
        "1",
        "kernel.apparmor_restrict_unprivileged_userns=0",
    ),
)


@dataclass(frozen=True)
class Requirement:
    """One thing a build needs. ``problem`` is empty when it is there."""

    name: str
    problem: str = ""
    hint: str = ""


async def requirements() -> list[Requirement]:
    """Everything a build by this user needs, with how each stands. Never raises."""
    root = os.geteuid() == 0
    found = [_tool(tool) for tool in (_TOOLS if root else _TOOLS + _USER_TOOLS)]
    found.append(keyring_requirement(_KEYRING_DIRS))
    if not root:
        user = pwd.getpwuid(os.geteuid())
        found += [
            subordinate_requirement(file, _read(file), user.pw_name, user.pw_uid)
            for file in ("/etc/subuid", "/etc/subgid")
        ]
    if not any(each.problem for each in found):  # it would only say the same in other words
        problem = await userns.namespaces_problem()
        switches = {file: _read(file).strip() for file, _, _ in _SWITCHES}
        found.append(namespaces_requirement(problem, switches, root=root))
    return found


async def ensure_requirements() -> None:
    """Raise one PreconditionFailed that names all that is missing."""
    missing = [each for each in await requirements() if each.problem]
    if missing:
        raise PreconditionFailed(
            "images cannot be built here: " + "; ".join(each.problem for each in missing),
            hint="; ".join(dict.fromkeys(each.hint for each in missing if each.hint)),
        )


def ensure_free_space(directory: Path, need_bytes: int) -> None:
    """Raise PreconditionFailed when the file system of `directory` has less than that free."""
    free = shutil.disk_usage(directory).free
    if free < need_bytes:
        raise PreconditionFailed(
            f"needs {format_size(need_bytes)} free in {directory}, there is {format_size(free)}",
            hint="free some space there, or point XDG_DATA_HOME at a larger disk",
        )


def keyring_requirement(directories: tuple[Path, ...]) -> Requirement:
    """Debian's archive keys, which other distributions ship in a package of their own."""
    name = "Debian archive keys"
    if any(any(each.glob("debian-archive-*")) for each in directories):
        return Requirement(name)
    return Requirement(
        name,
        "the keys that sign Debian's packages are not installed",
        "install them with: apt-get install debian-archive-keyring",
    )


def subordinate_requirement(file: str, text: str, user: str, uid: int) -> Requirement:
    """Whether the first range of `user` in /etc/subuid or /etc/subgid (subuid(5)) is wide enough.

    Only the first counts: it is the one `unshare --map-auto` takes.
    """
    option = "--add-subuids" if file.endswith("subuid") else "--add-subgids"
    hint = f"run as root: usermod {option} 100000-165535 {user} (a range nobody else has)"
    for line in text.splitlines():
        owner, _, rest = line.strip().partition(":")
        _, _, count = rest.partition(":")
        if owner not in (user, str(uid)) or not count.isdecimal():
            continue
        if int(count) >= SUBORDINATE_IDS:
            return Requirement(file)
        return Requirement(file, f"{file} gives {user} only {count} ids", hint)
    return Requirement(file, f"{file} has no range for {user}", hint)


def namespaces_requirement(problem: str, switches: dict[str, str], *, root: bool) -> Requirement:
    """What a failed attempt to make namespaces means; `switches` are the files of /proc/sys."""
    name = "namespaces" if root else "user namespaces"
    if not problem:
        return Requirement(name)
    if root:
        hint = "run outside the container, or give it CAP_SYS_ADMIN"
    else:
        hint = "build as root, or find out what forbids user namespaces here"
        for file, forbidding, setting in _SWITCHES:
            if switches.get(file) == forbidding:
                hint = f"allow them as root with: sysctl -w {setting}"
    return Requirement(name, f"{name} do not work: {problem}", hint)


def _tool(tool: str) -> Requirement:
    if proc.which(tool) is not None:
        return Requirement(tool)
    return Requirement(
        tool, f"{tool} is not installed", f"install it with: apt-get install {package_of(tool)}"
    )


def _read(file: str) -> str:
    try:
        return Path(file).read_text()
    except OSError:
        return ""
