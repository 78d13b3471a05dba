"""The floor for everything that involves a guest: QEMU and the guest agent, without banger.

The same kernel, initramfs, disks, network and command line as banger's own (`qemu_argv`), started
and spoken to directly. What banger adds to that (its CLI, its daemon, records, clean-up) is what
the benchmarks are about.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from ipaddress import IPv4Network
from pathlib import Path

from qemu.qmp import QMPClient, QMPError

from banger.base.config import load_config
from banger.base.model import Image, Kernel, Reach
from banger.base.paths import Paths
from banger.drivers.base import Disk, DiskFormat, Machine, MemoryFile, Plug
from banger.drivers.hypervisor.qemu import QemuHypervisor, tsc_khz
from banger.drivers.hypervisor.qemu_argv import HostFacts, Inherited, qemu_argv
from banger.drivers.hypervisor.qemu_monitor import load_state, save_state
from banger.drivers.hypervisor.qemu_program import QemuProgram
from banger.drivers.network.user import PasstNetwork
from banger.drivers.storage.qcow2 import Qcow2Storage
from banger.guest.channel import AgentChannel, call
from banger.guest.requests import Exec

KEPT_FROM = IPv4Network("10.213.0.0/16")
_BOOT_TIMEOUT_S = 240.0
_SETTLE_S = 0.2
_VM_ID = "bench"
_DISKS = ("system.qcow2", "work.qcow2")


class BareQemu:
    """Boots machines of banger's default shape from `image`."""

    def __init__(self, paths: Paths, directory: Path, image: Image, kernel: Kernel) -> None:
        self._paths = paths
        self._image = image
        # Whichever banger booted it with: it is made on the first `vm run`.
        (self._initramfs,) = Path(kernel.artifact_dir).glob("initramfs-*.cpio")
        self._kernel = kernel
        self._directory = directory
        directory.mkdir()

    @asynccontextmanager
    async def guest(self) -> AsyncIterator[AgentChannel]:
        """A booted guest's channel; the guest is gone afterwards."""
        async with self._machine() as machine, self._booted(machine) as channel:
            yield channel

    async def cold_true_s(self) -> float:
        """From nothing but disks to the end of ``true`` in the guest, in seconds."""
        async with self._machine() as machine:
            begin = time.perf_counter()
            async with self._booted(machine) as channel:
                await true_s(channel)
                return time.perf_counter() - begin

    async def save(self) -> None:
        """Boot once and save, for `warm_true_s`."""
        async with self._machine() as machine:
            memory = MemoryFile(self._directory / "memory", private=False)
            async with self._started(replace(machine, memory_file=memory)) as qmp:
                channel = await _connected(machine.agent_socket)
                await true_s(channel)
                await channel.close()
                await asyncio.sleep(_SETTLE_S)
                await save_state(qmp, self._directory / "state")
        for name in _DISKS:
            (self._directory / name).rename(self._directory / f"saved-{name}")

    async def warm_true_s(self) -> float:
        """From what was saved, restored by hand, to the end of ``true`` in the guest."""
        machine = self._described(MemoryFile(self._directory / "memory", private=True))
        begin = time.perf_counter()
        try:
            for name in _DISKS:
                shutil.copyfile(self._directory / f"saved-{name}", self._directory / name)
            async with self._started(machine, incoming=True) as qmp:
                await load_state(qmp, self._directory / "state", ())
                await qmp.execute("cont")
                channel = await _connected(machine.agent_socket)
                await true_s(channel)
                took_s = time.perf_counter() - begin
                await channel.close()
        finally:
            _remove_sockets(machine)
        return took_s

    @asynccontextmanager
    async def _machine(self) -> AsyncIterator[Machine]:
        config = load_config(self._paths.config_file)
        storage = Qcow2Storage()
        system, work = (self._directory / name for name in _DISKS)
        await storage.create_overlay(
            Path(self._image.rootfs_path), system, config.vm_defaults_system_overlay_size
        )
        await storage.create_overlay(
            Path(self._image.work_seed_path), work, config.vm_defaults_disk_size
        )
        machine = self._described(None)
        try:
            yield machine
        finally:
            _remove_sockets(machine)

    def _described(self, memory: MemoryFile | None) -> Machine:
        config = load_config(self._paths.config_file)
        system, work = (self._directory / name for name in _DISKS)
        return Machine(
            vm_id=_VM_ID,
            vcpu_count=config.vm_defaults_vcpu,
            memory_mib=config.vm_defaults_memory,
            kernel=Path(self._kernel.vmlinux_path),
            initramfs=self._initramfs,
            kernel_parameters=(f"banger.init={self._image.init}",),
            disks=(
                Disk("system", system, DiskFormat.QCOW2),
                Disk("work", work, DiskFormat.QCOW2),
                Disk("modules", Path(self._kernel.modules_path), DiskFormat.RAW, read_only=True),
            ),
            console_log=self._directory / "console.log",
            hypervisor_log=self._directory / "qemu.log",
            control_socket=self._directory / "control.sock",
            agent_socket=self._directory / "agent.sock",
            memory_file=memory,
        )

    @asynccontextmanager
    async def _booted(self, machine: Machine) -> AsyncIterator[AgentChannel]:
        async with self._started(machine):
            channel = await _connected(machine.agent_socket)
            try:
                yield channel
            finally:
                await channel.close()

    @asynccontextmanager
    async def _started(
        self, machine: Machine, *, incoming: bool = False
    ) -> AsyncIterator[QMPClient]:
        """A QEMU process and the first conversation with it; it is killed at the end."""
        hypervisor = QemuHypervisor("auto", self._paths.probe_cache, QemuProgram())
        accelerator, _ = await hypervisor.choose_accelerator()
        network = await PasstNetwork(KEPT_FROM).attach(
            Plug(machine.vm_id, self._directory / "network.log", Reach())
        )
        ours, theirs = socket.socketpair()
        with ours, theirs, machine.hypervisor_log.open("ab") as log:
            inherited = Inherited(theirs.fileno(), network.fd, network.link)
            facts = HostFacts(accelerator, tsc_khz())
            qemu = subprocess.Popen(
                qemu_argv(machine, facts, inherited, network.guest.mac, incoming=incoming),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(theirs.fileno(), network.fd),
            )
            os.close(network.fd)
            qmp = QMPClient("bench")
            try:
                await qmp.connect(ours)
                yield qmp
            finally:
                qemu.kill()
                await asyncio.to_thread(qemu.wait)
                with suppress(QMPError, EOFError, OSError):
                    await qmp.disconnect()


def _remove_sockets(machine: Machine) -> None:
    for path in (machine.control_socket, machine.agent_socket):
        path.unlink(missing_ok=True)


async def _connected(agent_socket: Path) -> AgentChannel:
    """The channel to a machine that has its sockets: QMP answers when they are there."""
    return await AgentChannel.connect(agent_socket, timeout_s=_BOOT_TIMEOUT_S)


async def true_s(channel: AgentChannel) -> float:
    """One ``true`` through the agent, in seconds."""
    begin = time.perf_counter()
    result = await call(channel, Exec(["true"]), timeout_s=60)
    assert result.exit.value == 0
    return time.perf_counter() - begin
