"""Every request that the driver can send to Firecracker, as a record with its method and its path.

The same that Firecracker v1.16.1's own description has (src/firecracker/swagger/firecracker.yaml).
What is configured is told before the machine starts, and refused afterwards; pausing, going on and
saving the other way round; a state is loaded into a machine of which nothing was configured.
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar

import msgspec

#: All but the requests below are answered in some milliseconds; a host that swaps may take longer.
ANSWER_TIMEOUT_S = 15.0
#: Memory is allocated, the kernel read.
_START_TIMEOUT_S = 30.0
#: All of the memory is written; loading maps it.
_SAVE_TIMEOUT_S = 600.0


class Request(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One request: the body is the record. Fields at their defaults are left out, so that a
    release that does not know one yet is only asked for what is used."""

    method: ClassVar[str] = "PUT"
    #: With the names of fields in braces where the path has what they say.
    route: ClassVar[str]
    timeout_s: ClassVar[float] = ANSWER_TIMEOUT_S

    @property
    def path(self) -> str:
        return self.route.format_map(msgspec.structs.asdict(self))


class BootSource(Request, frozen=True, kw_only=True, omit_defaults=True):
    route: ClassVar[str] = "/boot-source"
    kernel_image_path: str
    initrd_path: str
    boot_args: str


#: ``MAX_SUPPORTED_VCPUS`` (`vmm/src/vmm_config/machine_config.rs`).
VCPU_MAX = 32


class MachineConfig(Request, frozen=True, kw_only=True, omit_defaults=True):
    route: ClassVar[str] = "/machine-config"
    vcpu_count: int
    mem_size_mib: int


class Drive(Request, frozen=True, kw_only=True, omit_defaults=True):
    """A raw disk. `drive_id` has letters, digits and underscores only."""

    route: ClassVar[str] = "/drives/{drive_id}"
    drive_id: str
    path_on_host: str
    is_read_only: bool
    #: For a root device Firecracker makes up parameters of the kernel: ours has none.
    is_root_device: bool
    #: ``Writeback``: what the guest flushes is on the disk; ``Unsafe``: it need not be.
    cache_type: str


class DriveUpdate(Request, frozen=True, kw_only=True, omit_defaults=True):
    """Look at the disk's file again: it has another size, or is another one."""

    method: ClassVar[str] = "PATCH"
    route: ClassVar[str] = "/drives/{drive_id}"
    drive_id: str
    path_on_host: str


class NetworkInterface(Request, frozen=True, kw_only=True, omit_defaults=True):
    route: ClassVar[str] = "/network-interfaces/{iface_id}"
    iface_id: str
    guest_mac: str
    host_dev_name: str


class Vsock(Request, frozen=True, kw_only=True, omit_defaults=True):
    route: ClassVar[str] = "/vsock"
    guest_cid: int
    uds_path: str


class Entropy(Request, frozen=True, kw_only=True, omit_defaults=True):
    route: ClassVar[str] = "/entropy"


class Balloon(Request, frozen=True, kw_only=True, omit_defaults=True):
    """Holds `amount_mib` of the guest's memory. What the guest reports as free goes back to the
    host, without the guest's losing it."""

    route: ClassVar[str] = "/balloon"
    amount_mib: int
    deflate_on_oom: bool
    free_page_reporting: bool


class Metrics(Request, frozen=True, kw_only=True, omit_defaults=True):
    """Where the process counts what its devices do: a file, to whose end it adds lines. It is of
    the process and not of its machine: it can be told of before a state is loaded."""

    route: ClassVar[str] = "/metrics"
    metrics_path: str


class ActionType(StrEnum):
    INSTANCE_START = "InstanceStart"
    SEND_CTRL_ALT_DEL = "SendCtrlAltDel"
    FLUSH_METRICS = "FlushMetrics"


class Action(Request, frozen=True, kw_only=True, omit_defaults=True):
    route: ClassVar[str] = "/actions"
    timeout_s: ClassVar[float] = _START_TIMEOUT_S
    action_type: ActionType


class VmState(StrEnum):
    PAUSED = "Paused"
    RESUMED = "Resumed"


class SetState(Request, frozen=True, kw_only=True, omit_defaults=True):
    """Hold the vCPUs, or let them run. Either may be so already."""

    method: ClassVar[str] = "PATCH"
    route: ClassVar[str] = "/vm"
    state: VmState


class SnapshotCreate(Request, frozen=True, kw_only=True, omit_defaults=True):
    """Of a paused machine: all of its memory, and its devices' state, each in a file."""

    route: ClassVar[str] = "/snapshot/create"
    timeout_s: ClassVar[float] = _SAVE_TIMEOUT_S
    snapshot_path: str
    mem_file_path: str


class MemoryBackend(msgspec.Struct, frozen=True, kw_only=True):
    """A file, which is mapped privately: its pages are read as they are needed."""

    backend_path: str
    backend_type: str = "File"


class NetworkOverride(msgspec.Struct, frozen=True, kw_only=True):
    iface_id: str
    host_dev_name: str


class VsockOverride(msgspec.Struct, frozen=True, kw_only=True):
    uds_path: str


class SnapshotLoad(Request, frozen=True, kw_only=True, omit_defaults=True):
    """The machine is paused then."""

    route: ClassVar[str] = "/snapshot/load"
    timeout_s: ClassVar[float] = _SAVE_TIMEOUT_S
    snapshot_path: str
    mem_backend: MemoryBackend
    network_overrides: tuple[NetworkOverride, ...] = ()
    vsock_override: VsockOverride


class InstanceState(StrEnum):
    NOT_STARTED = "Not started"
    RUNNING = "Running"
    PAUSED = "Paused"


class InstanceInfo(msgspec.Struct, frozen=True):
    """What `GET /` says."""

    id: str
    state: InstanceState
    vmm_version: str
