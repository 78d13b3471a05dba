"""Which drivers there are, and which are used: the settings' names or ``auto``, with the reasons.

Only the composition root imports this: everybody else is handed drivers.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Network
from pathlib import Path
from typing import TypeVar

from banger.base import procfs
from banger.base.errors import BadRequest
from banger.base.jail import has_jail, is_vm_id
from banger.base.model import NetworkMode
from banger.base.paths import VmPaths
from banger.drivers.base import (
    DiskDeviceMaker,
    Hypervisor,
    Level,
    NameServer,
    Network,
    Networks,
    Storage,
    VmNames,
)
from banger.drivers.hypervisor import kvm
from banger.drivers.hypervisor.firecracker import FirecrackerHypervisor
from banger.drivers.hypervisor.firecracker_jail import Jailed
from banger.drivers.hypervisor.firecracker_place import Direct, Place
from banger.drivers.hypervisor.qemu import QemuHypervisor
from banger.drivers.hypervisor.qemu_argv import Accelerator
from banger.drivers.hypervisor.qemu_program import QemuProgram
from banger.drivers.network.bridge import BridgeNetwork
from banger.drivers.network.dns import DnsServer
from banger.drivers.network.user import PasstNetwork
from banger.drivers.storage.dm_snapshot import DmSnapshotStorage
from banger.drivers.storage.qcow2 import Qcow2Storage
from banger.drivers.storage.reflink import ReflinkStorage
from banger.hostops.ops import Bridge, HostOps

AUTO = "auto"

D = TypeVar("D")


@dataclass(frozen=True)
class Choice:
    """One setting, the driver it led to, and why, as text for `banger doctor`."""

    setting: str
    name: str
    reason: str


@dataclass(frozen=True)
class Selection:
    """The drivers in use."""

    hypervisor: Hypervisor
    #: All others that there are.
    other_hypervisors: tuple[Hypervisor, ...]
    storage: Storage
    #: What makes devices of disks: for VMs of another storage than this, too.
    devices: DiskDeviceMaker
    networks: Networks
    choices: tuple[Choice, ...]

    @property
    def reasons(self) -> dict[str, str]:
        """Why these, by setting."""
        return {choice.setting: choice.reason for choice in self.choices}


@dataclass(frozen=True)
class HypervisorSettings:
    """What hypervisors are made with."""

    #: ``auto``, ``kvm`` or ``tcg``.
    accelerator: str
    #: Where it is kept whether KVM runs guests here.
    probe_cache: Path
    firecracker_bin: str
    jailer_enabled: bool
    qemu_bin: str
    #: Who makes jails, and where the sockets of machines are, each in a directory with its id.
    host: HostOps
    runtime_dirs: tuple[Path, ...]
    #: Where it is kept, longer than sockets are, for which machines a jail was asked.
    jails_dir: Path


def _qemu(settings: HypervisorSettings) -> Hypervisor:
    return QemuHypervisor(settings.accelerator, settings.probe_cache, _qemu_program(settings))


def _qemu_program(settings: HypervisorSettings) -> QemuProgram:
    return QemuProgram(_program(settings.qemu_bin))


def _program(setting: str) -> str:
    return os.path.expanduser(setting)  # noqa: PTH111 - it may be a name


def _firecracker(settings: HypervisorSettings) -> FirecrackerHypervisor:
    places: list[Place] = [
        Jailed(settings.host, settings.runtime_dirs, settings.jails_dir),
        Direct(_program(settings.firecracker_bin)),
    ]
    if not settings.jailer_enabled:
        places.reverse()
    place, *earlier = places
    probe = partial(kvm.probe, settings.probe_cache, _qemu_program(settings))
    return FirecrackerHypervisor(place, probe, earlier=earlier)


# The first is what ``auto`` falls back to: it runs everywhere.
_HYPERVISORS: Mapping[str, Callable[[HypervisorSettings], Hypervisor]] = {
    "qemu": _qemu,
    "firecracker": _firecracker,
}
_ACCELERATORS = tuple(accelerator.value for accelerator in Accelerator)
_STORAGES: Mapping[str, Callable[[DmSnapshotStorage, Path], Storage]] = {
    "qcow2": lambda _, __: Qcow2Storage(),
    "reflink": lambda _, vms_dir: ReflinkStorage(vms_dir),
    "dm_snapshot": lambda with_devices, _: with_devices,
}
_NETWORKS = (NetworkMode.BRIDGE, NetworkMode.USER)


def available() -> dict[str, tuple[str, ...]]:
    """The names each setting takes beside ``auto``, best first."""
    return {
        "hypervisor": tuple(_HYPERVISORS),
        "accelerator": _ACCELERATORS,
        "storage": tuple(_STORAGES),
        "network": tuple(mode.value for mode in _NETWORKS),
    }


async def select(
    *,
    hypervisor: str,
    accelerator: str,
    storage: str,
    network: str,
    firecracker_bin: str,
    jailer_enabled: bool,
    qemu_bin: str,
    probe_cache: Path,
    vms_dir: Path,
    runtime_dirs: tuple[Path, ...],
    jails_dir: Path,
    host: HostOps,
    bridge: Bridge,
    tap_pool_size: int,
    names: VmNames,
) -> Selection:
    """The drivers for these settings; changes nothing on the host. `host` does what needs root.

    (Which accelerator ``auto`` means is found out when a machine starts: see
    `QemuHypervisor.choose_accelerator`, which reports it in `checks`.) Raises BadRequest for a
    name there is no driver for.
    """
    _pick("hypervisor", hypervisor, _HYPERVISORS)
    if accelerator not in (AUTO, *_ACCELERATORS):
        raise _unknown("accelerator", accelerator, _ACCELERATORS)
    settings = HypervisorSettings(
        accelerator=accelerator,
        probe_cache=probe_cache,
        firecracker_bin=firecracker_bin,
        jailer_enabled=jailer_enabled,
        qemu_bin=qemu_bin,
        host=host,
        runtime_dirs=runtime_dirs,
        jails_dir=jails_dir,
    )
    why_hypervisor = await _hypervisor_choice(hypervisor, settings, storage, network, vms_dir)
    make_hypervisor = _HYPERVISORS[why_hypervisor.name]
    chosen = make_hypervisor(settings)
    with_devices = DmSnapshotStorage(vms_dir, host, bridge.instance)
    disks, why_storage = _storage_choice(storage, chosen, vms_dir, with_devices)
    networks: dict[NetworkMode, Network] = {
        NetworkMode.BRIDGE: BridgeNetwork(host, bridge, names, pool_size=tap_pool_size),
        NetworkMode.USER: PasstNetwork(bridge.network),
    }
    why_network = _network_choice(network, chosen, networks, host)
    others = [make for make in _HYPERVISORS.values() if make is not make_hypervisor]
    return Selection(
        hypervisor=chosen,
        other_hypervisors=tuple(make(settings) for make in others),
        storage=disks,
        devices=with_devices,
        networks=Networks(default=NetworkMode(why_network.name), by_mode=networks),
        choices=(why_hypervisor, why_storage, why_network),
    )


async def _hypervisor_choice(
    setting: str, settings: HypervisorSettings, storage: str, network: str, vms_dir: Path
) -> Choice:
    """What VMs here depend on, whatever that lacks now: it may be back in a moment, and what they
    are given meanwhile for another would stay. Where none depends on any, Firecracker if all that
    it needs is there and nothing would be worse with it; else QEMU.

    What is cheap to see comes first: only hosts that were made for Firecracker pay for the rest.
    """
    if setting != AUTO:
        return Choice("hypervisor", setting, "as configured")
    if storage == "qcow2" or network == NetworkMode.USER:
        return _not_firecracker(f"{storage if storage == 'qcow2' else network} is configured")
    name, why = await asyncio.to_thread(_settled, settings, storage, vms_dir)
    if name == "qemu":
        return _not_firecracker(why)
    if not name and storage == AUTO and not await ReflinkStorage(vms_dir).makes_clones():
        return _not_firecracker("its disks would be copies, as their file system makes no clones")
    lack = await _lack(_firecracker(settings), proved=not name)
    if name:
        return Choice("hypervisor", name, f"auto: {why}, though {lack}" if lack else f"auto: {why}")
    if lack:
        return _not_firecracker(lack)
    return Choice("hypervisor", "firecracker", "auto: all that it needs is here")


def _not_firecracker(why: str) -> Choice:
    return Choice("hypervisor", "qemu", f"auto: not firecracker: {why}")


def _settled(settings: HypervisorSettings, storage: str, vms_dir: Path) -> tuple[str, str]:
    """The hypervisor that ``auto`` is whatever Firecracker lacks now, and why; empty where that is
    what it depends on."""
    if not settings.host.installed:
        return "qemu", "banger is not installed on this host"
    if name := _running(settings, vms_dir):
        return name, f"{name} runs machines here"
    if any(vms_dir.glob("*/*.qcow2")):
        return "qemu", "there are VMs with qcow2 disks"
    if storage == AUTO and _has_raw_disks(vms_dir):
        return "firecracker", 'there are VMs with raw disks (hypervisor = "qemu" would leave them)'
    return "", ""


def _running(settings: HypervisorSettings, vms_dir: Path) -> str:
    """Which hypervisor runs machines here: of VMs, standbys or templates in the making."""
    # As `/proc` may not show them.
    if any(has_jail(mark.name, os.getuid()) for mark in settings.jails_dir.glob("*")):
        return "firecracker"
    processes = [process for _, process in procfs.own_processes()]
    for name, make in _HYPERVISORS.items():
        for socket in filter(None, map(make(settings).control_socket, processes)):
            # The directory of a VM's machine may be that of a daemon which had its own elsewhere.
            ours = socket.parent.parent in settings.runtime_dirs
            if ours or (is_vm_id(socket.parent.name) and (vms_dir / socket.parent.name).is_dir()):
                return name
    return ""


def _has_raw_disks(vms_dir: Path) -> bool:
    """Whether VMs have raw system disks, which with storage = "auto" Firecracker alone can use.

    But for those of users' networking, which are none of its: their storage was once configured.
    """
    vms = (disk.parent for disk in vms_dir.glob("*/system*.raw"))
    return any(not VmPaths(vm, vm).network_log.exists() for vm in vms)


async def _lack(firecracker: FirecrackerHypervisor, *, proved: bool) -> str:
    """What keeps it from running machines, if anything does; what is used unasked is to be `proved`
    to. KVM, which may take seconds, comes last."""
    for each in await firecracker.program_checks():
        if each.level is Level.FAIL:
            return each.detail
    accelerator = await firecracker.accelerator_check()
    enough = (Level.OK,) if proved else (Level.OK, Level.WARN)
    return "" if accelerator.level in enough else accelerator.detail


def _storage_choice(
    setting: str, hypervisor: Hypervisor, vms_dir: Path, with_devices: DmSnapshotStorage
) -> tuple[Storage, Choice]:
    """What makes disks that the hypervisor can use."""
    make, why = _pick("storage", setting, _STORAGES)
    formats = hypervisor.features.disk_formats
    disks = make(with_devices, vms_dir)
    if disks.format in formats:
        return disks, why
    if setting != AUTO:
        raise BadRequest(
            f"{hypervisor.name} cannot use {disks.format} disks, which {disks.name} storage makes",
            hint='set storage = "auto"',
        )
    made = (make(with_devices, vms_dir) for make in _STORAGES.values())
    disks = next(each for each in made if each.format in formats)
    return disks, Choice("storage", disks.name, f"auto: {hypervisor.name} needs raw disks")


def _network_choice(
    setting: str,
    hypervisor: Hypervisor,
    networks: Mapping[NetworkMode, Network],
    host: HostOps,
) -> Choice:
    """What machines of the hypervisor's can be joined to.

    Else bridging is for hosts that were set up for it: root alone would change those it is on.
    """
    links = hypervisor.features.links
    names = tuple(mode.value for mode in _NETWORKS)
    if setting in names:
        if networks[NetworkMode(setting)].link not in links:
            raise BadRequest(
                f"{hypervisor.name} cannot join machines to {setting} networking",
                hint='set network = "auto"',
            )
        return Choice("network", setting, "as configured")
    if setting != AUTO:
        raise _unknown("network", setting, names)
    if networks[NetworkMode.USER].link not in links:
        return Choice("network", NetworkMode.BRIDGE, f"auto: {hypervisor.name} needs taps")
    if host.installed:
        return Choice("network", NetworkMode.BRIDGE, "auto: banger is installed on this host")
    return Choice("network", NetworkMode.USER, "auto: it needs nothing of this host")


def name_server(
    address: tuple[str, int] | None, names: VmNames, networks: Sequence[IPv4Network]
) -> NameServer:
    """A server, not open yet, that answers with these names and the way back in these networks."""
    return DnsServer(address, names, networks)


def _pick(setting: str, value: str, drivers: Mapping[str, D]) -> tuple[D, Choice]:
    if value != AUTO and value not in drivers:
        raise _unknown(setting, value, tuple(drivers))
    name = next(iter(drivers)) if value == AUTO else value
    if value != AUTO:
        reason = "as configured"
    elif len(drivers) > 1:
        reason = f"auto: preferred over {', '.join(list(drivers)[1:])}"
    else:
        reason = "auto: the only one there is"
    return drivers[name], Choice(setting, name, reason)


def _unknown(setting: str, value: str, names: tuple[str, ...]) -> BadRequest:
    return BadRequest(
        f'there is no {setting} driver "{value}"', hint=f"use {', '.join((AUTO, *names))}"
    )
