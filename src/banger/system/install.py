"""Installing banger as units of the system, and taking that away again, as root.

`/etc/banger/install.toml` comes first and goes last: whatever happens in between, it says what
there is to be taken away. Each step may be repeated. Running machines are nobody's to end: they are
left alone by an upgrade, and stand in the way of whatever would lose sight of them.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import pwd
import socket
import sys
from contextlib import suppress
from pathlib import Path

import msgspec

from banger import __version__
from banger.base import proc
from banger.base.errors import (
    BadRequest,
    BangerError,
    Conflict,
    NotFound,
    PermissionDenied,
    Unavailable,
)
from banger.base.files import sync_directory, write_atomically
from banger.base.install import HELPER_SOCKET, INSTALL_FILE, Installation, load_installation
from banger.base.jail import jailed_vm, may_be_jailed
from banger.base.paths import SYSTEM_RUNTIME_DIR, usual_runtime_dirs
from banger.base.trust import check_programs
from banger.system.systemd import check_booted, systemctl, unit_state
from banger.system.udev import RULES, RULES_FILE
from banger.system.units import DAEMON, HELPER, UNIT_DIR, UNITS, Owner, unit_texts

_STOP_TIMEOUT_S = 300.0
_WITHOUT_PROCESS = ("stopped", "suspended", "error")

#: How long the helper has from its start to its answer.
_HELPER_TIMEOUT_S = 60.0
_HELPER_INTERVAL_S = 0.05


async def install(owner_name: str, python: str) -> Installation:
    """Install, or upgrade what is installed to this version; both daemons run when it returns.

    `owner_name` may be empty: whoever it is installed for, or who called sudo. Raises
    PermissionDenied unless root, PreconditionFailed, Conflict or BadRequest for what is in the way.
    """
    check_root()
    check_booted()
    before = installed()
    owner = _owner(owner_name or _default_owner(before))
    if before is not None and before.owner_uid != owner.uid:
        raise Conflict(
            f"banger is installed for {before.owner}, whose machines {owner.name} could not see",
            hint="take that away first: banger system uninstall",
        )
    check_programs()
    if before is None:
        _check_no_own_daemon(owner)
    _write_files(owner, python, before)
    await systemctl("daemon-reload")
    await systemctl("enable", "--quiet", *UNITS)
    await _restart()
    return load_installation(INSTALL_FILE)


async def restart() -> None:
    """Start both daemons anew. Machines run on."""
    check_root()
    _require_installed()
    await _restart()


async def uninstall(*, force: bool) -> Installation:
    """Stop both daemons and remove what `install` has made; what was installed.

    With machines that run it raises Conflict; with `force` they are stopped. Their disks, images
    and settings are the owner's and stay.
    """
    check_root()
    found = _require_installed()
    await _end_machines(found, force=force)
    await systemctl("disable", "--now", "--quiet", *UNITS)
    _check_no_machines(found, hint="banger system install, and stop them")
    take_down = [sys.executable, "-I", "-m", "banger.hostops.helper", "--take-down"]
    await proc.run(take_down, timeout_s=_STOP_TIMEOUT_S, env=proc.BARE_ENVIRONMENT)
    await systemctl("clean", "--what=runtime", *UNITS)
    _remove_files(found)
    await systemctl("daemon-reload")
    # A unit that had failed would be listed for ever. What has not, is not known any more.
    with suppress(BangerError):
        await systemctl("reset-failed", *UNITS)
    return found


async def _restart() -> None:
    """Restart both; both have answered when it returns. (The daemon tells systemd when it is ready,
    and systemd us; the helper is looked for.)"""
    await systemctl("restart", *UNITS)
    deadline = asyncio.get_running_loop().time() + _HELPER_TIMEOUT_S
    while not helper_answers():
        if asyncio.get_running_loop().time() > deadline or not (await unit_state(HELPER)).starts:
            raise Unavailable(
                "banger-helper does not answer", hint=f"see: journalctl -e -u {HELPER}"
            )
        await asyncio.sleep(_HELPER_INTERVAL_S)


def helper_answers() -> bool | None:
    """Whether somebody listens at the helper's socket; None when it is not ours to try."""
    with socket.socket(socket.AF_UNIX) as end:
        end.settimeout(1.0)
        try:
            end.connect(os.fspath(HELPER_SOCKET))
        except PermissionError:
            return None
        except OSError:
            return False
    return True


def installed() -> Installation | None:
    """What is installed; None when nothing is."""
    try:
        return load_installation(INSTALL_FILE)
    except NotFound:
        return None


def check_root() -> None:
    if os.geteuid() != 0:
        raise PermissionDenied(
            "only root installs units and removes them", hint="put sudo before the command"
        )


def _require_installed() -> Installation:
    check_booted()
    return load_installation(INSTALL_FILE)


def _default_owner(before: Installation | None) -> str:
    if before is not None:
        return before.owner
    uid = os.environ.get("SUDO_UID", "")
    with suppress(KeyError, ValueError):
        return pwd.getpwuid(int(uid)).pw_name
    raise BadRequest("whose machines shall it run?", hint="say it: --owner USER")


def _owner(name: str) -> Owner:
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        raise NotFound(f'there is no user "{name}"') from None
    if entry.pw_uid == 0:
        raise BadRequest(
            "root's machines need no helper, and no owner but an ordinary user is safe",
            hint="name an ordinary user: --owner USER",
        )
    return Owner(entry.pw_name, entry.pw_uid, entry.pw_gid)


def _check_no_own_daemon(owner: Owner) -> None:
    """The owner's machines until now are known to a daemon of his own. Two daemons on one database
    would be the end of it, and the unit's would not find the sockets of what runs."""
    for directory in usual_runtime_dirs(owner.uid):
        if _is_locked(directory / "bangerd.lock"):
            raise Conflict(
                f"{owner.name}'s own bangerd runs, and one is enough",
                hint=f"as {owner.name}: banger vm stop the machines, then: banger daemon stop",
            )
        if _machines(owner.uid, directory):
            raise Conflict(
                f"machines of {owner.name}'s own bangerd run",
                hint=f"as {owner.name}: banger vm stop them, then: banger daemon stop",
            )


def _is_locked(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _machines(owner_uid: int, runtime_dir: Path) -> list[int]:
    """The owner's processes whose command line names a socket of a machine below `runtime_dir`, and
    those in his jails, which name none."""
    needle = os.fsencode(runtime_dir / "vms") + b"/"
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            status, pid = process.stat(), int(process.name)
            own = status.st_uid == owner_uid and needle in (process / "cmdline").read_bytes()
            if own or (may_be_jailed(status) and jailed_vm(pid, owner_uid)):
                found.append(pid)
    return found


def _write_files(owner: Owner, python: str, before: Installation | None) -> None:
    texts = {UNIT_DIR / name: text for name, text in unit_texts(owner, python).items()}
    if RULES_FILE.parent.is_dir():  # else there is no udev
        texts[RULES_FILE] = RULES
    created = set(before.created) if before else set()
    created |= {str(path) for path in (INSTALL_FILE, *texts) if not path.exists()}
    directory = INSTALL_FILE.parent
    if not directory.exists():
        created.add(str(directory))
        directory.mkdir(mode=0o755)
        directory.chmod(0o755)  # whatever the umask is
    found = Installation(
        owner=owner.name,
        owner_uid=owner.uid,
        version=__version__,
        python=python,
        created=tuple(sorted(created)),
    )
    _write(INSTALL_FILE, install_text(found))
    for path, text in texts.items():
        _write(path, text)


def _write(path: Path, text: str) -> None:
    write_atomically(path, text.encode(), mode=0o644)
    path.chmod(0o644)
    sync_directory(path.parent)


def install_text(installation: Installation) -> str:
    """`INSTALL_FILE`, in TOML: its strings and lists of them are JSON's."""
    fields = msgspec.structs.asdict(installation)
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items()]
    text = "# Written by: banger system install\n" + "\n".join(lines) + "\n"
    return text.replace("\x7f", "\\u007f")  # of which JSON thinks nothing


def _remove_files(found: Installation) -> None:
    """Remove what was made, and nothing that the file names beside that."""
    for name in UNITS:
        _remove(UNIT_DIR / name, found)
    _remove(RULES_FILE, found)
    _remove(INSTALL_FILE, found)
    if str(INSTALL_FILE.parent) in found.created:
        with suppress(OSError):  # somebody keeps more in it
            INSTALL_FILE.parent.rmdir()


def _remove(path: Path, found: Installation) -> None:
    if str(path) in found.created:
        path.unlink(missing_ok=True)
        sync_directory(path.parent)


async def _end_machines(found: Installation, *, force: bool) -> None:
    if not (await unit_state(DAEMON)).runs:
        _check_no_machines(found, hint="they can be stopped then: systemctl start bangerd")
        return
    entry = pwd.getpwuid(found.owner_uid)
    identity = ("--reuid", str(entry.pw_uid), "--regid", str(entry.pw_gid), "--init-groups")
    banger = (
        "setpriv",
        *identity,
        "--reset-env",
        "--",
        found.python,
        "-I",
        "-m",
        "banger.cli.main",
    )
    listed = await proc.run([*banger, "vm", "list", "--json"], timeout_s=_STOP_TIMEOUT_S)
    names = [
        each["name"]
        for each in json.loads(listed.stdout)
        if each["runtime"]["state"] not in _WITHOUT_PROCESS
    ]
    if names and not force:
        raise Conflict(
            f"machines of {found.owner} run: {', '.join(names)}",
            hint="stop them, or let them be stopped: banger system uninstall --force",
        )
    if names:
        await proc.run([*banger, "vm", "stop", "--quiet", *names], timeout_s=_STOP_TIMEOUT_S)


def _check_no_machines(found: Installation, *, hint: str) -> None:
    if left := _machines(found.owner_uid, SYSTEM_RUNTIME_DIR):
        raise Conflict(
            f"machines of {found.owner} run, as processes {', '.join(map(str, left))}", hint=hint
        )


def kept(found: Installation) -> list[Path]:
    """The owner's own directories, which nobody but he removes."""
    try:
        home = Path(pwd.getpwuid(found.owner_uid).pw_dir)
    except KeyError:  # the account is gone, and its home is whoever removed it had in mind
        return []
    places = (".config", ".local/share", ".local/state", ".cache")
    return [path for place in places if (path := home / place / "banger").is_dir()]
