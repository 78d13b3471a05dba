"""What VMs use, as the host sees it and as their guests say: the types of `vm.stats`.

The host's view is measured, the guest's is the guest's word. Nothing of it is ever in the store.
Sizes are bytes, rates bytes a second, shares percent, moments aware datetimes in UTC.
"""

from __future__ import annotations

from datetime import datetime

from banger.base.model import Image, Record, Vm, VmState


class HostUsage(Record, frozen=True):
    """What a VM takes of this host."""

    #: Of one core, so that two busy vCPUs are 200; None where there is no earlier reading.
    cpu_percent: float | None
    #: Resident, of the hypervisor and the process that serves the network.
    memory_bytes: int
    #: What its disks take, without the image below them.
    disk_bytes: int
    #: What its devices move, as the hypervisor counts it; None where it does not, or there is no
    #: earlier reading. Received (rx) is what the machine receives.
    disk_read_bytes_per_s: float | None = None
    disk_written_bytes_per_s: float | None = None
    rx_bytes_per_s: float | None = None
    tx_bytes_per_s: float | None = None


class GuestDisk(Record, frozen=True):
    """A file system of the guest. What only root may use counts as used."""

    mount: str
    used_bytes: int
    total_bytes: int


class GuestUsage(Record, frozen=True):
    """What the guest says of itself."""

    #: Of all its vCPUs together: 0 to 100; None where there is no earlier reading.
    cpu_percent: float | None
    vcpu_count: int
    #: What cannot be had by new programs; caches can.
    memory_used_bytes: int
    memory_total_bytes: int
    disks: tuple[GuestDisk, ...]
    #: Since its boot, over all interfaces but the loopback.
    rx_bytes: int
    tx_bytes: int
    rx_bytes_per_s: float | None
    tx_bytes_per_s: float | None
    #: Runnable and waiting tasks over the last 1, 5 and 15 minutes.
    load: tuple[float, float, float]
    processes: int
    uptime_s: float


class Sample(Record, frozen=True):
    """One look at a VM. `guest` is None when its agent gave no answer, or none to be believed."""

    at: datetime
    host: HostUsage
    guest: GuestUsage | None


class UsagePoint(Record, frozen=True):
    """What is kept of a sample for graphs; percentages as in `HostUsage` and `GuestUsage`."""

    at: datetime
    host_cpu_percent: float | None
    host_memory_bytes: int
    guest_cpu_percent: float | None
    guest_memory_percent: float | None


class ShownVm(Vm, frozen=True):
    """A VM as `vm.show` gives it: with what its disks take, without the image below them."""

    disk_bytes: int = 0


class DiskUse(Record, frozen=True):
    """What the disks of one VM take of the host's, without the image below them."""

    vm_name: str
    disk_bytes: int


class ShownImage(Image, frozen=True):
    """An image as `image.show` gives it: with the VMs whose disks lie over it."""

    vms: tuple[DiskUse, ...] = ()


class ListedVm(Vm, frozen=True):
    """A VM as `vm.list` gives it: with its last recent sample, None where there is none."""

    usage: Sample | None = None


class VmStats(Record, frozen=True):
    """A VM and what it uses. `latest` is None for one that does not run.

    The history is the machine's that runs now: the oldest first, the latest sample's point last.
    """

    id: str
    name: str
    state: VmState
    vcpu_count: int
    memory_mib: int
    latest: Sample | None
    history: tuple[UsagePoint, ...]
