"""Every path banger writes, in one table. `docs/state-files.md` says who owns each.

XDG base directories decide where; nothing else in the code joins paths below them. A path made
from outside input (a VM id, an image id) goes through `safe_component` first.
"""

from __future__ import annotations

import os
import pwd
import re
import stat
import zlib
from dataclasses import dataclass, field
from pathlib import Path

from banger.base.errors import BadRequest, NotFound, PermissionDenied, PreconditionFailed
from banger.base.install import INSTALL_FILE, load_installation

#: Longest path `bind` and `connect` take for a Unix socket (sun_path is 108 with its NUL).
UNIX_SOCKET_PATH_MAX = 107

#: Where the sockets of a daemon are that systemd runs; it is made by its unit.
SYSTEM_RUNTIME_DIR = Path("/run/bangerd")

_COMPONENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,127}")


def safe_component(name: str) -> str:
    """`name`, if it can be one path component and nothing else; BadRequest otherwise."""
    if _COMPONENT.fullmatch(name) is None:
        raise BadRequest(f"{name!r} cannot be used as a file name")
    return name


@dataclass(frozen=True)
class VmPaths:
    """The files of one VM, or of a template: durable ones in its state directory, sockets in the
    runtime one."""

    directory: Path
    runtime: Path
    #: See `Paths`.
    system_disk_name: str = field(default="system.qcow2", kw_only=True)
    work_disk_name: str = field(default="work.qcow2", kw_only=True)

    @property
    def system_overlay(self) -> Path:
        return self.directory / self.system_disk_name

    @property
    def work_disk(self) -> Path:
        return self.directory / self.work_disk_name

    @property
    def console_log(self) -> Path:
        return self.directory / "console.log"

    @property
    def hypervisor_log(self) -> Path:
        """What the hypervisor's process prints: normally nothing."""
        return self.directory / "hypervisor.log"

    @property
    def network_log(self) -> Path:
        return self.directory / "network.log"

    @property
    def handles(self) -> Path:
        return self.directory / "handles.json"

    @property
    def memory(self) -> Path:
        """The memory of a machine that others are restored from."""
        return self.directory / "memory"

    @property
    def memory_handed_over(self) -> Path:
        """Empty, and there while a machine may have gone on from the VM's own memory."""
        return self.directory / "memory-handed-over"

    @property
    def machine_state(self) -> Path:
        """Of such a machine, all that is neither memory nor disk."""
        return self.directory / "machine-state"

    @property
    def control_socket(self) -> Path:
        """The hypervisor's control socket (QMP); also how its process is recognised."""
        return self.runtime / "control.sock"

    @property
    def agent_socket(self) -> Path:
        return self.runtime / "agent.sock"


@dataclass(frozen=True)
class Paths:
    """The table. Build it with `Paths.from_environment`, or by hand in a test."""

    config_dir: Path
    data_dir: Path
    state_dir: Path
    runtime_dir: Path
    cache_dir: Path
    #: Of a VM's disks, as the storage in use calls them.
    system_disk_name: str = field(default="system.qcow2", kw_only=True)
    work_disk_name: str = field(default="work.qcow2", kw_only=True)

    @classmethod
    def from_environment(cls) -> Paths:
        """The user's paths by XDG, and on a system that banger is installed on for this user the
        runtime directory of its unit, for the same database is not to be two daemons'; touches
        nothing. Raises PreconditionFailed when what is installed is not to be believed."""
        home = Path(os.environ.get("HOME") or Path.home())
        state_dir = _xdg("XDG_STATE_HOME", home / ".local" / "state")
        runtime = os.environ.get("XDG_RUNTIME_DIR", "")
        if _is_usual(state_dir) and _is_owner():
            runtime_dir = SYSTEM_RUNTIME_DIR
        elif runtime.startswith("/"):
            runtime_dir = Path(runtime) / "banger"
        else:
            runtime_dir = _fallback_runtime_dir(state_dir)
        return cls(
            config_dir=_xdg("XDG_CONFIG_HOME", home / ".config"),
            data_dir=_xdg("XDG_DATA_HOME", home / ".local" / "share"),
            state_dir=state_dir,
            runtime_dir=runtime_dir,
            cache_dir=_xdg("XDG_CACHE_HOME", home / ".cache"),
        )

    @property
    def of_system(self) -> bool:
        """Whether systemd runs the daemon, and nobody else is to start one."""
        return self.runtime_dir == SYSTEM_RUNTIME_DIR

    @property
    def config_file(self) -> Path:
        return self.config_dir / "config.toml"

    @property
    def database(self) -> Path:
        return self.state_dir / "banger.db"

    @property
    def daemon_log(self) -> Path:
        return self.state_dir / "bangerd.log"

    @property
    def daemon_socket(self) -> Path:
        return self.runtime_dir / "bangerd.sock"

    @property
    def daemon_lock(self) -> Path:
        return self.runtime_dir / "bangerd.lock"

    @property
    def home_lock(self) -> Path:
        """The lock of whichever daemon has this database, wherever its sockets are."""
        return self.state_dir / "bangerd.lock"

    @property
    def probe_cache(self) -> Path:
        """Answers of slow probes (does KVM run a vCPU?), valid for one boot of the host."""
        return self.runtime_dir / "probes.json"

    @property
    def images_dir(self) -> Path:
        return self.data_dir / "images"

    @property
    def kernels_dir(self) -> Path:
        return self.data_dir / "kernels"

    @property
    def vms_dir(self) -> Path:
        return self.state_dir / "vms"

    @property
    def vms_runtime_dir(self) -> Path:
        return self.runtime_dir / "vms"

    @property
    def jails_dir(self) -> Path:
        """A file for each machine for which a jail was asked, until that has ended; in it is where
        the directory with its sockets is, and where what the jail makes."""
        return self.state_dir / "jails"

    @property
    def templates_dir(self) -> Path:
        return self.state_dir / "templates"

    @property
    def templates_runtime_dir(self) -> Path:
        return self.runtime_dir / "templates"

    @property
    def downloads_dir(self) -> Path:
        """What was fetched, and what has not come whole yet, by its sha256; it may go any time."""
        return self.cache_dir / "downloads"

    @property
    def blobs_dir(self) -> Path:
        """Layers of images that were pulled, by digest."""
        return self.cache_dir / "blobs"

    @property
    def pulls_dir(self) -> Path:
        """What skopeo needs while it pulls, a directory each."""
        return self.cache_dir / "pulls"

    def image_dir(self, image_id: str) -> Path:
        return self.images_dir / safe_component(image_id)

    def kernel_dir(self, kernel_id: str) -> Path:
        return self.kernels_dir / safe_component(kernel_id)

    def vm(self, vm_id: str) -> VmPaths:
        component = safe_component(vm_id)
        return self.machine(self.vms_dir / component, self.vms_runtime_dir / component)

    @property
    def ssh_key(self) -> Path:
        """The private key that guests let in, unless the user names another."""
        return self.data_dir / "ssh" / "id_ed25519"

    @property
    def ssh_known_hosts(self) -> Path:
        """The keys that guests have, as OpenSSH wants them."""
        return self.state_dir / "ssh" / "known_hosts"

    @property
    def ssh_config(self) -> Path:
        """What `banger ssh-config --install` includes in the user's own."""
        return self.config_dir / "ssh_config"

    @property
    def results_dir(self) -> Path:
        """What commands in several forks came to."""
        return self.state_dir / "results"

    @property
    def builds_dir(self) -> Path:
        """What the builds of images of one's own printed."""
        return self.state_dir / "builds"

    @property
    def scratch_dir(self) -> Path:
        """What is made on the way of a repository into a guest or out of it; nothing else."""
        return self.state_dir / "scratch"

    @property
    def snapshots_dir(self) -> Path:
        return self.state_dir / "snapshots"

    def snapshot_dir(self, snapshot_id: str) -> Path:
        return self.snapshots_dir / safe_component(snapshot_id)

    def template(self, template_id: str) -> VmPaths:
        component = safe_component(template_id)
        return self.machine(self.templates_dir / component, self.templates_runtime_dir / component)

    def machine(self, directory: Path, runtime: Path) -> VmPaths:
        """Of a machine with these directories."""
        return VmPaths(
            directory,
            runtime,
            system_disk_name=self.system_disk_name,
            work_disk_name=self.work_disk_name,
        )


def _xdg(variable: str, fallback: Path) -> Path:
    # The XDG specification says that a relative value is to be ignored.
    value = os.environ.get(variable, "")
    return (Path(value) if value.startswith("/") else fallback) / "banger"


def _fallback_runtime_dir(state_dir: Path) -> Path:
    """Where sockets go without XDG_RUNTIME_DIR.

    Who sets another HOME wants another banger, not the daemon that works on the usual one: its
    state has a directory of its own. A fixed name in /tmp is safe only because
    `prepare_private_dir` refuses one that is a link, has another owner, or is open to others.
    """
    other = "" if _is_usual(state_dir) else f"-{zlib.crc32(os.fsencode(state_dir)):08x}"
    return Path(f"/tmp/banger-runtime-{os.getuid()}{other}")  # noqa: S108


def _is_usual(state_dir: Path) -> bool:
    """Whether it is where this user's state is when the environment says nothing else."""
    try:
        home = pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:  # in a container any uid may run without an entry
        home = "/"
    return state_dir == Path(home) / ".local" / "state" / "banger"


def _is_owner() -> bool:
    """Whether banger is installed on this system for this user."""
    try:
        return load_installation(INSTALL_FILE).owner_uid == os.getuid()
    except NotFound:
        return False


def usual_runtime_dirs(uid: int) -> tuple[Path, ...]:
    """Where the sockets of a user's own daemon are, as far as can be known without him."""
    return (
        Path(f"/run/user/{uid}/banger"),
        Path(f"/tmp/banger-runtime-{uid}"),  # noqa: S108 - as `_fallback_runtime_dir` has it
    )


def way_to(runtime_dir: Path) -> str:
    """What to do for commands to find the daemon whose sockets are there: the reverse of
    `Paths.from_environment`, for a home of which the daemon is elsewhere than it says."""
    if runtime_dir == SYSTEM_RUNTIME_DIR:
        return "it is the system's: sudo systemctl stop bangerd ends it, and its machines run on"
    if runtime_dir.name == "banger":
        return f"to use that one, set XDG_RUNTIME_DIR to {runtime_dir.parent}"
    return "to use that one, unset XDG_RUNTIME_DIR"


def prepare_private_dir(directory: Path) -> None:
    """Make `directory` (0700) or check that it is a directory of ours that nobody else can enter.

    Idempotent. Raises PermissionDenied as `check_private_dir` does.
    """
    try:
        directory.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        pass
    except OSError as error:
        raise PreconditionFailed(f"cannot make {directory}: {error.strerror}") from error
    check_private_dir(directory)


def check_private_dir(directory: Path) -> None:
    """Raise PermissionDenied for a link, another owner or a mode that lets others in.

    In /tmp anybody may have put it there first, with a socket of his own in it. What is not there
    is FileNotFoundError.
    """
    info = directory.lstat()
    if stat.S_ISLNK(info.st_mode):
        problem = "it is a symbolic link"
    elif not stat.S_ISDIR(info.st_mode):
        problem = "it is not a directory"
    elif info.st_uid != os.getuid():
        problem = f"it belongs to uid {info.st_uid}"
    elif stat.S_IMODE(info.st_mode) & 0o077:
        problem = f"its mode is {stat.S_IMODE(info.st_mode):04o}, not 0700"
    else:
        return
    raise PermissionDenied(
        f"refusing to use {directory}: {problem}",
        hint="remove it, or set XDG_RUNTIME_DIR to a directory of your own",
    )


def check_socket_path(path: Path) -> None:
    """Raise PreconditionFailed when the kernel would refuse this path for a Unix socket."""
    if len(os.fsencode(path)) > UNIX_SOCKET_PATH_MAX:
        raise PreconditionFailed(
            f"socket path {path} is longer than {UNIX_SOCKET_PATH_MAX} bytes",
            hint="set XDG_RUNTIME_DIR to a shorter path",
        )
