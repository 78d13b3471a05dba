"""What may be asked of a VM: the request that makes one, the one that changes one, and limits."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from banger.base.config import VCPU_MAX, Config
from banger.base.errors import BadRequest
from banger.base.model import (
    Egress,
    InitMode,
    NetworkMode,
    PublishedPort,
    Reach,
    Snapshot,
    Vm,
    VmSpec,
    check_vm_name,
)
from banger.base.ports import check_ports
from banger.base.reach import check_reach
from banger.base.units import SIZE_MAX_MIB
from banger.drivers.base import Hypervisor
from banger.services.preflight import vcpu_problem
from banger.services.vm_start import BOOT_TIMEOUT_S, check_boot_timeout

T = TypeVar("T")

_MEMORY_MIN_MIB = 128

_FIELD_NAMES = {
    "vcpu_count": "vCPUs:",
    "memory_mib": "memory in MiB:",
    "init": "init",
    "network": "network",
}


class ReachRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a client may say of what a VM reaches; None leaves it as it is."""

    egress: Egress | None = None
    #: Said alone, it means that egress is what is on it.
    allow: tuple[str, ...] | None = None
    isolated: bool | None = None

    def applied(self, reach: Reach) -> Reach:
        """`reach` with this change. Raises BadRequest."""
        egress, allow = self.egress, self.allow
        if egress is None:
            egress = reach.egress if allow is None else Egress.ALLOWLIST
        if allow is None:
            allow = reach.allow if egress is Egress.ALLOWLIST else ()
        isolated = _given(self.isolated, reach.isolated)
        return check_reach(Reach(egress=egress, allow=allow, isolated=isolated))


class CreateRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a client may say about a new VM; what it does not say is the configuration's."""

    name: str = ""
    #: A snapshot that it begins as; it says what is not said here.
    from_snapshot: str = ""
    image: str = ""
    vcpu_count: int | None = None
    memory_mib: int | None = None
    disk_size_mib: int | None = None
    init: InitMode | None = None
    network: NetworkMode | None = None
    reach: ReachRequest = ReachRequest()
    ephemeral: bool = False
    published_ports: tuple[PublishedPort, ...] = ()
    #: False: make its record and its disks, and leave it stopped.
    start: bool = True
    #: Boot it, even where a template would be faster.
    cold: bool = False
    boot_timeout_s: float = BOOT_TIMEOUT_S

    def check(self, config: Config, default_network: NetworkMode) -> VmSpec:
        """The spec of the VM. BadRequest for what can be seen to be wrong without looking further.

        Its init may be AUTO: what the image says.
        """
        if self.name:
            check_vm_name(self.name)
        check_boot_timeout(self.boot_timeout_s)
        spec = VmSpec(
            vcpu_count=_given(self.vcpu_count, config.vm_defaults_vcpu),
            memory_mib=_given(self.memory_mib, config.vm_defaults_memory),
            disk_size_mib=_given(self.disk_size_mib, config.vm_defaults_disk_size),
            system_overlay_size_mib=config.vm_defaults_system_overlay_size,
            init=self.init or config.vm_defaults_init,
            network=self.network or default_network,
            reach=self.reach.applied(Reach(egress=config.vm_defaults_egress)),
            ephemeral=self.ephemeral,
            published_ports=self.published_ports,
        )
        return check_spec(spec)

    def check_copy(self, snapshot: Snapshot) -> VmSpec:
        """The spec of a VM made from `snapshot`. BadRequest for what cannot be with it."""
        old = snapshot.spec
        if self.image and self.image != snapshot.image_name:
            raise BadRequest(
                f'the disks of snapshot "{snapshot.name}" are of image {snapshot.image_name}',
                hint="leave --image away",
            )
        wanted = {
            "vcpu_count": _given(self.vcpu_count, old.vcpu_count),
            "memory_mib": _given(self.memory_mib, old.memory_mib),
            "init": old.init if self.init in (None, InitMode.AUTO) else self.init,
            "network": self.network or old.network,
        }
        with_memory = snapshot.has_memory and not self.cold
        for field, value in wanted.items():
            if with_memory and value != getattr(old, field):
                raise BadRequest(
                    f'snapshot "{snapshot.name}" has the memory of a machine with'
                    f" {_FIELD_NAMES[field]} {getattr(old, field)}, which cannot become {value}",
                    hint="leave it as it is, or boot the disks without the memory: add --cold",
                )
        if with_memory and not self.start:
            raise BadRequest(
                "a VM that is not started cannot keep the memory of a snapshot",
                hint="to have its disks only, add --cold",
            )
        disk_size_mib = _given(self.disk_size_mib, old.disk_size_mib)
        if disk_size_mib < old.disk_size_mib:
            raise BadRequest(
                f"a work disk of {disk_size_mib} MiB is too small: that of snapshot"
                f' "{snapshot.name}" has {old.disk_size_mib} MiB'
            )
        spec = msgspec.structs.replace(
            old,
            **wanted,
            disk_size_mib=disk_size_mib,
            reach=self.reach.applied(old.reach),
            ephemeral=self.ephemeral,
            published_ports=self.published_ports,
        )
        return check_spec(spec)


class ChangeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What `vm set` may change; None leaves it as it is."""

    name: str | None = None
    vcpu_count: int | None = None
    memory_mib: int | None = None
    disk_size_mib: int | None = None
    network: NetworkMode | None = None
    #: Not AUTO: what the image says was settled when the VM was made.
    init: InitMode | None = None
    reach: ReachRequest = ReachRequest()

    @property
    def hot(self) -> bool:
        """Whether a running VM can take this change: a name is not part of its machine, nor is
        what it may reach."""
        shape = (self.vcpu_count, self.memory_mib, self.disk_size_mib, self.network, self.init)
        return all(value is None for value in shape)

    def applied(self, vm: Vm) -> Vm:
        """The record with this change. Raises BadRequest, for a disk that would shrink, too."""
        if self.disk_size_mib is not None and self.disk_size_mib < vm.spec.disk_size_mib:
            raise BadRequest(
                f'the work disk of vm "{vm.name}" cannot shrink from {vm.spec.disk_size_mib} MiB'
                f" to {self.disk_size_mib} MiB",
                hint="make another VM with a smaller disk, and copy what you need",
            )
        if self.init is InitMode.AUTO:
            raise BadRequest("auto is for new machines", hint="use minimal or systemd")
        spec = msgspec.structs.replace(
            vm.spec,
            vcpu_count=_given(self.vcpu_count, vm.spec.vcpu_count),
            memory_mib=_given(self.memory_mib, vm.spec.memory_mib),
            disk_size_mib=_given(self.disk_size_mib, vm.spec.disk_size_mib),
            network=vm.spec.network if self.network is None else self.network,
            init=vm.spec.init if self.init is None else self.init,
            reach=self.reach.applied(vm.spec.reach),
        )
        name = vm.name if self.name is None else check_vm_name(self.name)
        return msgspec.structs.replace(vm, name=name, spec=check_spec(spec))


def check_spec(spec: VmSpec) -> VmSpec:
    """`spec` in normal form, when a machine of this shape is possible; BadRequest otherwise."""
    if not 1 <= spec.vcpu_count <= VCPU_MAX:
        raise BadRequest(f"{spec.vcpu_count} vCPUs are not possible (1 to {VCPU_MAX})")
    if not _MEMORY_MIN_MIB <= spec.memory_mib <= SIZE_MAX_MIB:
        raise BadRequest(
            f"{spec.memory_mib} MiB of memory is not possible",
            hint=f"give at least {_MEMORY_MIN_MIB}M",
        )
    if not 1 <= spec.disk_size_mib <= SIZE_MAX_MIB:
        raise BadRequest(f"a work disk of {spec.disk_size_mib} MiB is not possible")
    if spec.network is NetworkMode.NONE and spec.reach.allow:
        raise BadRequest(
            "a machine without a network reaches nothing: there is nothing to allow",
            hint="with --egress all it may have none",
        )
    return msgspec.structs.replace(spec, published_ports=check_ports(spec.published_ports))


def check_vcpus(spec: VmSpec, hypervisor: Hypervisor, hint: str) -> VmSpec:
    """`spec`, when machines of this hypervisor can have so many vCPUs; BadRequest otherwise."""
    if problem := vcpu_problem(hypervisor, spec.vcpu_count):
        raise BadRequest(problem, hint=hint)
    return spec


def _given(value: T | None, default: T) -> T:
    return default if value is None else value
