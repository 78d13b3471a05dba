"""QEMU's command line as a pure function of a machine and a few facts of the host.

The machine is ``microvm``: no PCI, no firmware to wait for, ACPI tables only. ACPI must stay on,
because Debian's kernel finds virtio-mmio devices in no other way. What each guest parameter
bought when booting Debian's 6.1 cloud kernel without KVM is in `docs/architecture.md`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from banger.drivers.base import Disk, Link, Machine

QEMU = "qemu-system-x86_64"

#: The virtio-serial port that the guest agent looks for, by name.
AGENT_PORT = "banger.agent"

#: What a guest sees of the processor: all that the accelerator can give it.
KVM_CPU = "host"
_TCG_CPU = "max"

_SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

# The RTC stays: without one the kernel waits for it twice, a second each time. PIT and PIC go,
# for ACPI describes what replaces them.
# The memory has a name, which a saved state knows it by, whatever it is made of.
_MACHINE = (
    "microvm,x-option-roms=off,pit=off,pic=off,rtc=on,isa-serial=on,memory-backend=memory"
    ",suppress-vmdesc=on"
)

# A saved state is only what devices say of themselves, as the one command writes it that leaves
# the memory out (xen-save-devices-state): `Hypervisor.shape` says what fits what.
_SAVED_STATE = ("-global", "migration.send-configuration=off")

# Errors and warnings still reach the console. A panic resets the machine, and with -no-reboot a
# reset ends QEMU: a guest that cannot boot is gone at once, and its last words are in the log.
_KERNEL_PARAMETERS = ("console=ttyS0", "quiet", "loglevel=5", "panic=-1", "reboot=t")

# An emulated TSC is the host's, for all vCPUs. The kernel compares it with its ticks, of which
# emulation loses some, and believes those: it would have no other clock then, that is late, counts
# in 4 ms, and has it tick while it has nothing to do.
# The self-tests of the kernel's ciphers take a fifth of a second to emulate.
_TCG_KERNEL_PARAMETERS = ("no_timer_check", "tsc=reliable", "cryptomgr.notests")


class Accelerator(StrEnum):
    KVM = "kvm"
    TCG = "tcg"


@dataclass(frozen=True)
class Inherited:
    """Descriptors that QEMU inherits, by number. ``link`` is None where there is no network."""

    #: A connected socket for a control monitor of the process that launches it.
    launch_fd: int
    network_fd: int = -1
    link: Link | None = None


@dataclass(frozen=True)
class HostFacts:
    """What of the host shapes the arguments. ``tsc_khz`` is 0 when it could not be found out."""

    accelerator: Accelerator
    tsc_khz: int


def option_value(text: str | Path) -> str:
    """A value inside an option list: QEMU splits those at commas, and takes two for one."""
    return str(text).replace(",", ",,")


def qemu_argv(
    machine: Machine,
    host: HostFacts,
    inherited: Inherited,
    mac: str = "",
    *,
    incoming: bool = False,
) -> tuple[str, ...]:
    """The whole command line. `mac` is that of the interface when there is a network.

    An `incoming` machine waits to be told of the state that it begins with. The control socket is
    in the line by its path: `control_socket_in` finds it again.
    """
    return (
        QEMU,
        *("-name", f"banger-{option_value(machine.vm_id)}"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-sandbox", _SANDBOX),
        *("-machine", _MACHINE),
        *_SAVED_STATE,
        *_processor(machine, host.accelerator),
        *_memory(machine),
        *("-kernel", str(machine.kernel), "-initrd", str(machine.initramfs)),
        *("-append", " ".join(_kernel_parameters(machine, host))),
        *_control(machine.control_socket, inherited.launch_fd),
        *_console(machine.console_log),
        *_agent(machine.agent_socket),
        *("-device", "virtio-rng-device"),
        *(word for disk in machine.disks for word in _disk(disk)),
        *_network(inherited, mac),
        # Paused, whatever it was when it was saved: its disks are to be looked after first.
        *(("-S", "-incoming", "defer") if incoming else ()),
    )


def shape_of(machine: Machine, host: HostFacts, link: Link | None) -> tuple[str, ...]:
    """The command line of a machine without what differs from one such machine to the next."""
    nowhere = Path("/")
    same = replace(
        machine,
        vm_id="",
        kernel=nowhere,
        initramfs=nowhere,
        disks=tuple(replace(disk, path=nowhere) for disk in machine.disks),
        console_log=nowhere,
        hypervisor_log=nowhere,
        control_socket=nowhere,
        agent_socket=nowhere,
        memory_file=None,
    )
    return qemu_argv(same, host, Inherited(0, 0, link))


def control_socket_in(argv: tuple[str, ...]) -> Path | None:
    """The control socket in a command line of `qemu_argv`; None in any other."""
    if not argv or argv[0].rpartition("/")[2] != QEMU:
        return None
    before, after = _control_chardev(Path("\0")).split("\0")
    for option, value in itertools.pairwise(argv):
        if option == "-chardev" and value.startswith(before) and value.endswith(after):
            path = value[len(before) : len(value) - len(after)].replace(",,", ",")
            if value == _control_chardev(Path(path)):
                return Path(path)
    return None


def _processor(machine: Machine, accelerator: Accelerator) -> tuple[str, ...]:
    smp = ("-smp", str(machine.vcpu_count))
    if accelerator is Accelerator.KVM:
        return ("-accel", "kvm", "-cpu", KVM_CPU, *smp)
    return ("-accel", "tcg,thread=multi", "-cpu", _TCG_CPU, *smp)


def _memory(machine: Machine) -> tuple[str, ...]:
    size = f"id=memory,size={machine.memory_mib}M"
    file = machine.memory_file
    if file is None:
        backend = f"memory-backend-ram,{size}"
    else:
        share = "off" if file.private else "on"
        backend = f"memory-backend-file,{size},share={share},mem-path={option_value(file.path)}"
    return "-m", f"{machine.memory_mib}M", "-object", backend


def _kernel_parameters(machine: Machine, host: HostFacts) -> tuple[str, ...]:
    platform: tuple[str, ...] = ()
    if host.accelerator is Accelerator.TCG:
        platform = _TCG_KERNEL_PARAMETERS
        if host.tsc_khz:
            # An emulated TSC runs at the host's rate, but the guest's attempts to measure that
            # mostly fail, and then it hangs in silence.
            platform = (f"tsc_early_khz={host.tsc_khz}", *platform)
    return (*_KERNEL_PARAMETERS, *platform, *machine.kernel_parameters)


def _control_chardev(socket: Path) -> str:
    return f"socket,id=control,path={option_value(socket)},server=on,wait=off"


def _control(socket: Path, launch_fd: int) -> tuple[str, ...]:
    """QMP for whoever finds the socket, and for the one who launches, who need not look for it."""
    return (
        *("-chardev", _control_chardev(socket)),
        *("-mon", "chardev=control,mode=control"),
        *("-chardev", f"socket,id=launch,fd={launch_fd}"),
        *("-mon", "chardev=launch,mode=control"),
    )


def _console(log: Path) -> tuple[str, ...]:
    # Appended: what a machine said before it was started again is worth keeping.
    chardev = f"file,id=console,path={option_value(log)},append=on"
    return ("-chardev", chardev, "-serial", "chardev:console")


def _agent(socket: Path) -> tuple[str, ...]:
    return (
        *("-chardev", f"socket,id=agent,path={option_value(socket)},server=on,wait=off"),
        *("-device", "virtio-serial-device"),
        *("-device", f"virtserialport,chardev=agent,name={AGENT_PORT}"),
    )


def _disk(disk: Disk) -> tuple[str, ...]:
    """The format is given, never probed: a guest could write another format's header on its disk.

    (A qcow2 overlay's header names its backing file's format: see `drivers.storage.qcow2`.)
    """
    access = "read-only=on" if disk.read_only else "read-only=off,discard=unmap"
    # What the guest discards is given back to the host only if every layer may pass it on.
    # What a device of the host's has been given is with it, not in a cache before it: there is
    # room for so much of that as it has been seen to take.
    driver = "host_device,file.cache.direct=on" if disk.is_device else "file"
    file = f"file.driver={driver},file.filename={option_value(disk.path)}"
    if not disk.read_only:
        file += ",file.discard=unmap"
    node = f"driver={disk.format},node-name={disk.name},{access},{file}"
    return (
        *("-blockdev", node),
        *("-device", f"virtio-blk-device,drive={disk.name},serial={disk.name}"),
    )


def _network(inherited: Inherited, mac: str) -> tuple[str, ...]:
    fd = inherited.network_fd
    match inherited.link:
        case None:
            return ()
        case Link.STREAM:
            backend = f"stream,id=network,server=off,addr.type=fd,addr.str={fd}"
        case Link.TAP:
            # vhost would do without QEMU in between, and needs a device that only root may open.
            backend = f"tap,id=network,fd={fd},vhost=off"
    return "-netdev", backend, "-device", f"virtio-net-device,netdev=network,mac={mac}"
