"""Making a template: boot a machine without an identity, let it come to rest, save it.

Its memory lies in a file from the start, so that saving writes a few dozen KiB. It is connected to
no network, and is told nothing of any VM: what a template does not know, its copies do not share.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from banger.base import procfs
from banger.base.cancellation import to_its_end
from banger.base.errors import BangerError, Internal, Unavailable
from banger.base.files import reserve_if_reading_takes_room, sync_file
from banger.base.log import get_logger
from banger.base.model import Vm
from banger.base.paths import VmPaths, prepare_private_dir
from banger.drivers.base import Hypervisor, Machine, MemoryFile, NetworkAttachment, Networks, Room
from banger.guest.channel import AgentChannel, call
from banger.guest.requests import Exec, Ping
from banger.services.capabilities import Capabilities, Start
from banger.services.disk_room import DiskRoom
from banger.services.guest_wait import console_tail, while_it_runs
from banger.services.machine import machine_of
from banger.services.operations import Progress

#: Far more than a guest takes beside others, even emulated; a VM that boots has as long again.
_BOOT_TIMEOUT_S = 60.0
_PING_TIMEOUT_S = 20.0
#: The guest notices that nobody is connected any more: once, rather than in each copy.
_SETTLE_S = 0.2

#: What nearly every first command needs: read once here, it is in the memory of every copy.
_WARM_UP = Exec(["/bin/sh", "-c", "exec true"])
_WARM_UP_TIMEOUT_S = 20.0


async def make_machine(
    start: Start,
    paths: VmPaths,
    initramfs: Path,
    capabilities: Capabilities,
    hypervisor: Hypervisor,
    networks: Networks,
    room: DiskRoom,
    progress: Progress,
) -> None:
    """Fill the directory of `paths`: disks, memory and the state of a machine at rest.

    `start` is of a VM that there is not, with its files at those paths. Raises BangerError, with
    the end of the console when the guest does not come up. In any case no process is left.
    """
    vm = start.vm
    progress.stage("disks")
    await capabilities.create(start)
    capabilities.contribute_machine(start)
    prepare_private_dir(paths.runtime)
    progress.stage("launch")
    machine = machine_of(start, paths, initramfs, MemoryFile(paths.memory, private=False))
    try:
        async with capabilities.with_disks(start), _interface(vm, networks) as attachment:
            pid = await hypervisor.launch(machine, attachment)
            pidfd = procfs.open_pidfd(
                pid, lambda each: hypervisor.control_socket(each) == machine.control_socket
            )
            try:
                await _boot_and_save(machine, paths, pidfd, hypervisor, room, progress)
            finally:
                if pidfd >= 0:
                    await to_its_end(_end(hypervisor, machine.control_socket, pidfd))
    finally:
        await to_its_end(_clear(hypervisor, paths))
    progress.stage("sync")
    await asyncio.to_thread(_finish, paths)


@asynccontextmanager
async def _interface(vm: Vm, networks: Networks) -> AsyncIterator[NetworkAttachment | None]:
    network = networks.of(vm.spec.network)
    if network is None:
        yield None
    else:
        async with network.unplugged() as attachment:
            yield attachment


async def _boot_and_save(
    machine: Machine,
    paths: VmPaths,
    pidfd: int,
    hypervisor: Hypervisor,
    room: DiskRoom,
    progress: Progress,
) -> None:
    progress.stage("boot", "once, for all later starts")
    try:
        if pidfd < 0:
            raise Unavailable("the machine ended at once")
        resting = _come_to_rest(machine, hypervisor.features.agent_vsock_port)
        await while_it_runs(resting, procfs.wait_exit(pidfd, 2 * _BOOT_TIMEOUT_S))
    except BangerError as error:
        tail = console_tail(paths.console_log, 0)
        said = f"; the end of its console: {tail.splitlines()[-1]}" if tail else ""
        raise Unavailable(f"its guest did not come up: {error.message}{said}") from error
    progress.stage("save")
    async with room.left_alone(machine.vm_id):
        if room.is_held(machine.vm_id):
            raise Unavailable("the host's disk is full")
        await hypervisor.save(machine, paths.machine_state)
        if await room.looked_at(machine.vm_id) is Room.LOST:
            raise Unavailable("the host's disk had no room for what its guest wrote")


async def _come_to_rest(machine: Machine, vsock_port: int) -> None:
    channel = await AgentChannel.connect(
        machine.agent_socket, timeout_s=_BOOT_TIMEOUT_S, vsock_port=vsock_port
    )
    try:
        await call(channel, Ping(), timeout_s=_PING_TIMEOUT_S)
        await call(channel, _WARM_UP, timeout_s=_WARM_UP_TIMEOUT_S)
    finally:
        await channel.close()
    await asyncio.sleep(_SETTLE_S)


async def _end(hypervisor: Hypervisor, control_socket: Path, pidfd: int) -> None:
    try:
        await hypervisor.clear(control_socket)
        if not await procfs.kill(pidfd):
            raise Internal("the process of a template's machine cannot be killed")
    finally:
        os.close(pidfd)


async def _clear(hypervisor: Hypervisor, paths: VmPaths) -> None:
    """Also of a machine whose launch has failed nothing is left: or what it is found by stays."""
    try:
        await hypervisor.clear(paths.control_socket)
    except BangerError as error:
        get_logger().error(
            "a template's machine stays", socket=str(paths.control_socket), error=str(error)
        )
    else:
        shutil.rmtree(paths.runtime, ignore_errors=True)


def _finish(paths: VmPaths) -> None:
    """What a full disk, or a power failure, must not do to the copies: nobody would notice but
    the guests."""
    with paths.memory.open("rb+") as memory:
        reserve_if_reading_takes_room(memory.fileno())
    for path in (paths.memory, paths.machine_state, paths.system_overlay, paths.work_disk):
        sync_file(path)
