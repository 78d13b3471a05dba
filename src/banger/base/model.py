"""The nouns: VM, image, kernel, operation. Frozen, typed, the same in the store and on the wire.

Sizes are MiB, times are aware datetimes in UTC. A VM is `VmSpec` (what the user asked for) and
`VmRuntime` (state, and paths and addresses derived from its id). What is true of the running
process is `Handles`, which never goes to the database.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated

import msgspec

from banger.base.errors import BadRequest

_VM_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_ARTIFACT_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,126}")


def now() -> datetime:
    return datetime.now(UTC)


def check_vm_name(name: str) -> str:
    """`name` when it is a valid VM name; BadRequest otherwise."""
    if _VM_NAME.fullmatch(name) is None:
        raise BadRequest(
            f'"{name}" is not a valid VM name',
            hint="use 1 to 63 of a-z, 0-9 and '-', starting with a letter or digit",
        )
    return name


def check_artifact_name(name: str) -> str:
    """`name` when it is a valid image or kernel name; BadRequest otherwise."""
    if not is_artifact_name(name):
        raise BadRequest(
            f'"{name}" is not a valid image or kernel name',
            hint="use a-z, 0-9, '.', '_' and '-', starting with a letter or digit",
        )
    return name


def is_artifact_name(name: str) -> bool:
    return _ARTIFACT_NAME.fullmatch(name) is not None


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=False):
    """Base of every model type: immutable, keyword-only, unknown fields ignored when decoded."""


class VmState(StrEnum):
    """CREATING and STARTING belong to the daemon that works on it: the next one settles them."""

    CREATING = "creating"
    STARTING = "starting"
    RUNNING = "running"
    STOPPED = "stopped"
    #: Ended, with its memory kept: a start goes on from there.
    SUSPENDED = "suspended"
    ERROR = "error"


class InitMode(StrEnum):
    """Who is PID 1 once the guest is up; AUTO is what the image says."""

    AUTO = "auto"
    MINIMAL = "minimal"
    SYSTEMD = "systemd"


class NetworkMode(StrEnum):
    """How a machine reaches the network: by which driver."""

    USER = "user"
    BRIDGE = "bridge"
    NONE = "none"


class Egress(StrEnum):
    """What of the outside a machine reaches."""

    ALL = "all"
    ALLOWLIST = "allowlist"
    NONE = "none"


class Reach(Record, frozen=True):
    """What a machine reaches by its network. `base.reach` says what ``allow`` may have."""

    egress: Egress = Egress.ALL
    #: Networks and names, with ALLOWLIST.
    allow: tuple[str, ...] = ()
    #: False: it and others of which this is not true reach each other, where their network can.
    isolated: bool = True


class PublishedPort(Record, frozen=True):
    """A TCP port of the host that leads to one of the guest's."""

    host: str
    host_port: int
    guest_port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.host_port}:{self.guest_port}"


class VmSpec(Record, frozen=True):
    """What was asked for."""

    vcpu_count: int
    memory_mib: int
    disk_size_mib: int
    system_overlay_size_mib: int
    init: InitMode = InitMode.AUTO
    network: NetworkMode = NetworkMode.USER
    reach: Reach = Reach()
    #: Deleted when the session it was made for ends (``vm run --rm``).
    ephemeral: bool = False
    published_ports: tuple[PublishedPort, ...] = ()


class VmRuntime(Record, frozen=True):
    """State, and what is derived from the id: stable over the life of the VM, but for the disks,
    which go on in another file when a snapshot is made."""

    state: VmState
    guest_ip: str = ""
    #: `NAME.vm`, and where this host reaches the VM by that name.
    dns_name: str = ""
    address: str = ""
    api_socket: str = ""
    agent_socket: str = ""
    log_path: str = ""
    vm_dir: str = ""
    system_overlay: str = ""
    work_disk: str = ""
    #: Of a suspended VM: what a machine must have to go on from its memory.
    saved_shape: str = ""
    last_error: str = ""


class WorkspaceMode(StrEnum):
    """How much of a repository goes to the guest."""

    #: HEAD without its history, and the working tree as it is.
    SHALLOW_OVERLAY = "shallow_overlay"
    #: All of its history, references and submodules, and the working tree as it is.
    FULL_COPY = "full_copy"
    #: The history of HEAD, and HEAD checked out: nothing of the working tree.
    METADATA_ONLY = "metadata_only"


class Workspace(Record, frozen=True):
    """A git repository of the host that was given to a VM."""

    #: What was asked for, and the repository that it is in.
    source_path: str
    repo_root: str
    repo_name: str
    guest_path: str
    mode: WorkspaceMode
    #: The host's, when it was prepared; the branch is empty when HEAD was detached.
    head_commit: str
    current_branch: str
    #: That of the guest's copy.
    branch_name: str
    #: What an export is compared with: what was shipped, as a commit of the guest's copy.
    base_commit: str
    prepared_at: datetime
    #: Where the guest's HEAD began.
    start_commit: str = ""
    #: Where in it those are that came along, each with what it was as a commit.
    submodules: tuple[tuple[str, str], ...] = ()


class ShippedFile(Record, frozen=True):
    """A file that would go; bytes of its name that are no UTF-8 are shown as ``\\xff``."""

    path: str
    size_bytes: int


class Plan(Record, frozen=True):
    """What would be shipped."""

    repo_root: str
    guest_path: str
    mode: WorkspaceMode
    head_commit: str
    base_commit: str
    files: tuple[ShippedFile, ...]
    #: With the objects of the repository.
    size_bytes: int


class FileChange(Record, frozen=True):
    """One file of a patch; lines are None for a binary one."""

    path: str
    insertions: int | None
    deletions: int | None


class Vm(Record, frozen=True):
    id: str
    name: str
    image_id: str
    image_name: str
    kernel_id: str
    spec: VmSpec
    runtime: VmRuntime
    created_at: datetime
    updated_at: datetime
    started_at: datetime | None = None
    #: What its disks were copied from: ``snapshot NAME`` or ``vm NAME``; empty for none.
    copied_from: str = ""
    #: When somebody last used it. Kept beside the record, so that noting it needs no lock.
    touched_at: datetime | None = None
    #: Kept beside the record, too: a transfer does not have the VM's lock.
    workspace: Workspace | None = None


#: What the system calls take; a file that says otherwise is corrupt.
Pid = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]


class ProcessId(Record, frozen=True):
    """A process of one boot: its pid, and when it started (field 22 of ``/proc/PID/stat``)."""

    pid: Pid
    start_ticks: int


class DiskDevices(Record, frozen=True):
    """What was made of the host's devices for a VM's disk, recorded before and after each step.

    Devices go by their names (``loop0``); empty: not made yet, as far as is known.
    """

    #: The file of its image, which VMs share.
    base: str = ""
    base_loop: str = ""
    changes_loop: str = ""
    #: Of device-mapper's.
    mapping: str = ""


class Handles(Record, frozen=True):
    """What is true of the running process. In memory and in the VM's ``handles.json`` only."""

    pid: Pid = 0
    #: Field 22 of ``/proc/PID/stat``: with the pid it names one process of this boot.
    pid_start_ticks: int = 0
    boot_id: str = ""
    #: Those that serve its network.
    network: tuple[ProcessId, ...] = ()
    #: Its interface on a bridge of the host.
    tap: str = ""
    #: Of its system disk, where that is no file.
    disk: DiskDevices = DiskDevices()


class ImageConfig(Record, frozen=True):
    """What an image says of the programs that run in it: the ``config`` of an OCI image
    (https://github.com/opencontainers/image-spec/blob/main/config.md), in our names."""

    #: ``K=V``
    env: tuple[str, ...] = ()
    #: ``USER``, ``UID``, ``USER:GROUP`` or ``UID:GID``; empty: root.
    user: str = ""
    working_dir: str = ""
    #: What a command's words are given to, and those words when there are none.
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()


class Image(Record, frozen=True):
    """A root file system. ``rootfs_path`` is raw ext4; ``work_seed_path`` becomes ``/root``."""

    id: str
    name: str
    kernel_id: str
    artifact_dir: str
    rootfs_path: str
    work_seed_path: str
    init: InitMode
    size_bytes: int
    created_at: datetime
    packages: tuple[str, ...] = ()
    config: ImageConfig = ImageConfig()
    #: Where it is from, in words for people; of an image that was pulled, its reference.
    source: str = ""
    #: Of the manifest of an image that was pulled: ``sha256:HEX``.
    digest: str = ""
    #: Of one that is used where it lies, outside of ``artifact_dir``: what its file was when it was
    #: registered (`images.ext4.file_identity`). Empty: the file is banger's own.
    registered: str = ""

    #: Nobody here has made its work seed: only guests look into it.
    foreign_seed: bool = False

    @property
    def managed(self) -> bool:
        return not self.registered


class Kernel(Record, frozen=True):
    """An uncompressed ELF kernel and its modules: all as an ext4 disk, those to boot as files.

    ``config_path`` is empty where its configuration is not known.
    """

    id: str
    name: str
    version: str
    architecture: str
    artifact_dir: str
    vmlinux_path: str
    boot_modules_path: str
    modules_path: str
    config_path: str
    size_bytes: int
    created_at: datetime
    #: Where it is from, in words for people.
    source: str = ""


class Template(Record, frozen=True):
    """A machine that was booted once and saved before it had an identity: others start from it.

    ``key`` is a digest of all that it was made from. Its disks and memory lie in ``directory``.
    """

    id: str
    key: str
    image_id: str
    image_name: str
    kernel_id: str
    vcpu_count: int
    memory_mib: int
    #: Of the work disk that it was made with; one that is to be larger is grown.
    disk_size_mib: int
    init: InitMode
    network: NetworkMode
    directory: str
    size_bytes: int
    created_at: datetime
    #: When a machine was last started from it. Kept beside the record, as of a VM.
    used_at: datetime


class Snapshot(Record, frozen=True):
    """A VM as it was: its disks and, of one that ran, its memory. VMs are made from it.

    Its files lie in ``directory``, the layers of its disks shared with the VM it is of.
    """

    id: str
    name: str
    vm_id: str
    vm_name: str
    image_id: str
    image_name: str
    kernel_id: str
    #: Of the VM; the shape of the machine when there is memory.
    spec: VmSpec
    #: What a machine must have to go on from the memory (`Hypervisor.shape`); empty: there is none.
    shape: str
    directory: str
    #: The names of the topmost files of the disks.
    system_disk: str
    work_disk: str
    size_bytes: int
    #: For how long the machine did not run.
    paused_ms: float
    created_at: datetime
    #: That the VM had been given.
    workspace: Workspace | None = None

    @property
    def has_memory(self) -> bool:
        return bool(self.shape)


class ForkState(StrEnum):
    RUNNING = "running"
    #: The command has ended, whatever its status.
    DONE = "done"
    #: There is no status: the machine was lost, or somebody broke it off.
    FAILED = "failed"


class ForkResult(Record, frozen=True):
    """How one of the forks of a run fared. Its log and its patch lie beside the results."""

    number: int
    vm_id: str
    vm_name: str
    state: ForkState = ForkState.RUNNING
    #: Of the command, as a shell gives it; None while it runs and when it failed.
    exit_code: int | None = None
    error: str = ""
    seconds: float = 0
    #: Of the patch; None without one.
    files: int | None = None
    insertions: int = 0
    deletions: int = 0


class Results(Record, frozen=True):
    """One command run in several forks of a VM: what `vm run --fork` leaves in its folder."""

    name: str
    directory: str
    #: Empty when there was no repository.
    repo_root: str
    command: tuple[str, ...]
    created_at: datetime
    forks: tuple[ForkResult, ...] = ()


class OperationState(StrEnum):
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class ErrorInfo(Record, frozen=True):
    """An error as it goes over the wire."""

    code: str
    message: str
    hint: str = ""
    op_id: str = ""


class Operation(Record, frozen=True):
    """One long piece of work. ``percent`` is -1 where it cannot be known."""

    id: str
    kind: str
    target: str
    state: OperationState
    stage: str
    detail: str
    percent: float
    started_at: datetime
    finished_at: datetime | None = None
    error: ErrorInfo | None = None
    #: What the user should hear of beside the result: why it took another way than usual.
    notes: tuple[str, ...] = ()
    vm: Vm | None = None
    image: Image | None = None
    kernel: Kernel | None = None
    template: Template | None = None
    snapshot: Snapshot | None = None
    results: Results | None = None

    @property
    def done(self) -> bool:
        return self.state is not OperationState.RUNNING


class DaemonStatus(Record, frozen=True):
    """What `daemon.status` answers: the daemon, where its files are, and what it works with."""

    version: str
    pid: int
    uptime_s: float
    socket: str
    log_path: str
    database: str
    vms: int
    running_vms: int
    hypervisor: str
    storage: str
    network: str
    #: Why these: a setting, or what ``auto`` has found.
    hypervisor_reason: str = ""
    storage_reason: str = ""
    network_reason: str = ""
    #: Machines that wait for the next start.
    standbys: int = 0
    #: Where names are answered, or why they are not.
    dns: str = ""
