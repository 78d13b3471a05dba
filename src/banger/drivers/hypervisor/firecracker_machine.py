"""What Firecracker is told of a machine: pure functions of it, and of the names that files have.

Disks are told of in the order that they have in the guest, whose agent finds them by that: the
serials that Firecracker gives them are made of inode numbers. A machine of Firecracker's cannot
power off: it ends when it resets, which ``reboot=k`` does by the i8042 controller.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from banger.drivers.base import Link, Machine
from banger.drivers.hypervisor.firecracker_place import DISKS, Lent
from banger.drivers.hypervisor.firecracker_requests import (
    Action,
    ActionType,
    Balloon,
    BootSource,
    Drive,
    Entropy,
    MachineConfig,
    MemoryBackend,
    NetworkInterface,
    NetworkOverride,
    Request,
    SnapshotLoad,
    Vsock,
    VsockOverride,
)
from banger.guest import vsock

#: As Firecracker knows them.
KERNEL = "kernel"
INITRAMFS = "initramfs"
STATE = "state"
MEMORY = "memory"

_INTERFACE = "eth0"

# The controller is asked for nothing but the reset: each probe of it costs the boot some time.
_KERNEL_PARAMETERS = (
    *("console=ttyS0", "quiet", "loglevel=5", "panic=-1", "reboot=k"),
    *("i8042.noaux", "i8042.nomux", "i8042.dumbkbd"),
    *(f"banger.vsock={vsock.AGENT_PORT}", "banger.end=reset"),
)

#: Of a guest: 0 to 2 and the last are taken (vsock(7)).
_CID_FIRST, _CID_LAST = 3, (1 << 32) - 2


@dataclass(frozen=True)
class Interface:
    """The tap that a machine's interface is joined to, and the address that the guest's has."""

    tap: str
    mac: str


def disk_name(disk: str) -> str:
    """The name by which Firecracker knows a disk, in every machine the same."""
    return f"{DISKS}/{disk}"


def lent_for_boot(machine: Machine) -> dict[str, Lent]:
    """The files that a machine which boots is made of, by their names."""
    return _disks(machine) | {
        KERNEL: Lent(machine.kernel, read_only=True),
        INITRAMFS: Lent(machine.initramfs, read_only=True),
    }


def lent_for_restore(machine: Machine, state: Path, memory: Path) -> dict[str, Lent]:
    """Those of a machine that goes on from a state."""
    return _disks(machine) | {
        STATE: Lent(state, read_only=True),
        MEMORY: Lent(memory, read_only=True),
    }


def _disks(machine: Machine) -> dict[str, Lent]:
    return {disk_name(disk.name): Lent(disk.path, disk.read_only) for disk in machine.disks}


def boot_requests(
    machine: Machine, interface: Interface | None, agent_socket: str
) -> tuple[Request, ...]:
    """All that is told of a machine that boots, in order; `agent_socket` as it is known there."""
    return (
        MachineConfig(vcpu_count=machine.vcpu_count, mem_size_mib=machine.memory_mib),
        BootSource(
            kernel_image_path=KERNEL,
            initrd_path=INITRAMFS,
            boot_args=" ".join(kernel_parameters(machine)),
        ),
        *(
            Drive(
                drive_id=disk.name,
                path_on_host=disk_name(disk.name),
                is_read_only=disk.read_only,
                is_root_device=False,
                cache_type="Writeback",
            )
            for disk in machine.disks
        ),
        *(
            (
                NetworkInterface(
                    iface_id=_INTERFACE, guest_mac=interface.mac, host_dev_name=interface.tap
                ),
            )
            if interface is not None
            else ()
        ),
        Vsock(guest_cid=context_id(machine.vm_id), uds_path=agent_socket),
        Entropy(),
        # Empty: it is there for what the guest reports.
        Balloon(amount_mib=0, deflate_on_oom=True, free_page_reporting=True),
        Action(action_type=ActionType.INSTANCE_START),
    )


def restore_requests(interface: Interface | None, agent_socket: str) -> tuple[Request, ...]:
    """All that is told of a machine that goes on from a state, up to where it is paused in it."""
    taps = (
        (NetworkOverride(iface_id=_INTERFACE, host_dev_name=interface.tap),)
        if interface is not None
        else ()
    )
    return (
        SnapshotLoad(
            snapshot_path=STATE,
            mem_backend=MemoryBackend(backend_path=MEMORY),
            network_overrides=taps,
            vsock_override=VsockOverride(uds_path=agent_socket),
        ),
    )


def kernel_parameters(machine: Machine) -> tuple[str, ...]:
    """Firecracker adds where its devices are."""
    disks = ",".join(disk.name for disk in machine.disks)
    return (*_KERNEL_PARAMETERS, f"banger.disks={disks}", *machine.kernel_parameters)


def context_id(vm_id: str) -> int:
    """The vsock address that a guest boots with.

    One that goes on from a saved state has that of the state, which cannot be told another. The
    host knows each by its socket: two may have the same.
    """
    digest = hashlib.sha256(vm_id.encode()).digest()
    return _CID_FIRST + int.from_bytes(digest[:8], "big") % (_CID_LAST - _CID_FIRST + 1)


def shape_of(machine: Machine, link: Link | None) -> Mapping[str, object]:
    """What a saved state depends on of a machine, as data."""
    return {
        "vcpu_count": machine.vcpu_count,
        "memory_mib": machine.memory_mib,
        "kernel_parameters": kernel_parameters(machine),
        "disks": [(disk.name, disk.read_only) for disk in machine.disks],
        "link": link,
    }
