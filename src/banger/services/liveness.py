"""Whether a VM runs: the one place that decides it, and the one that ends its processes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import msgspec

from banger.base import procfs
from banger.base.errors import BangerError, Internal
from banger.base.log import get_logger
from banger.base.model import DiskDevices, Handles, ProcessId, Vm, VmState
from banger.base.procfs import UNKNOWN, Process
from banger.drivers.base import Hypervisor, Networks
from banger.services.handles import HandleCache

_QUIT_TIMEOUT_S = 3.0

#: States of a VM that may have a process.
_WITH_A_MACHINE = frozenset({VmState.CREATING, VmState.STARTING, VmState.RUNNING})


class Liveness:
    """Joins what is recorded of a VM's processes with what the kernel says of them."""

    def __init__(self, hypervisor: Hypervisor, networks: Networks, handles: HandleCache) -> None:
        self._hypervisor = hypervisor
        self._networks = networks
        self._handles = handles
        self._boot_id = procfs.boot_id()
        self._watches: dict[str, int] = {}

    def vm_alive(self, vm: Vm) -> bool:
        """Whether the VM's machine runs right now: a running process that is provably its own."""
        if vm.runtime.state not in _WITH_A_MACHINE:
            return False
        handles = self._handles.get(vm.id)
        return (
            handles.pid > 0
            and handles.boot_id == self._boot_id
            # Of one that is hidden from us since it was recorded we read nothing.
            and procfs.start_ticks(handles.pid) in (handles.pid_start_ticks, 0)
            and self._is_machine(vm)(procfs.look_at(handles.pid))
        )

    def is_whole(self, vm: Vm) -> bool:
        """Whether the VM's machine runs, and all that serves its network."""
        return self.vm_alive(vm) and all(
            procfs.start_ticks(each.pid) == each.start_ticks
            for each in self._handles.get(vm.id).network
        )

    def pid(self, vm: Vm) -> int:
        """The recorded pid of the VM's machine, 0 when there is none."""
        return self._handles.get(vm.id).pid

    def handles(self, vm: Vm) -> Handles:
        """What is known of what runs of the VM."""
        return self._handles.get(vm.id)

    def record(self, vm: Vm, *, pid: int, network_pids: Iterable[int], tap: str = "") -> Handles:
        """Remember what there is of a VM that is being launched (pid 0: no machine yet)."""
        handles = Handles(
            pid=pid,
            pid_start_ticks=procfs.start_ticks(pid) if pid else 0,
            boot_id=self._boot_id,
            network=tuple(
                ProcessId(pid=each, start_ticks=procfs.start_ticks(each)) for each in network_pids
            ),
            tap=tap,
            disk=self._handles.get(vm.id).disk,
        )
        self._handles.set(vm.id, handles)
        return handles

    def record_disk(self, vm: Vm, devices: DiskDevices) -> None:
        """Remember what there is of the device of its system disk."""
        handles = self._handles.get(vm.id)
        self._handles.set(vm.id, msgspec.structs.replace(handles, disk=devices))

    def machines(self, processes: Iterable[tuple[int, Process]]) -> dict[Path, int]:
        """The pids of all machines among these processes, by their control sockets."""
        found: dict[Path, int] = {}
        for pid, process in processes:
            if (socket := self._hypervisor.control_socket(process)) is not None:
                found.setdefault(socket, pid)
        return found

    def rediscover(self, vm: Vm, machines: Mapping[Path, int]) -> bool:
        """After a daemon's restart: find the VM's process among `machines`, by its control socket.

        A live process is preferred over the recorded pid; what else was recorded is kept. Whether
        the VM runs.
        """
        pid = machines.get(Path(vm.runtime.api_socket), 0)
        if not pid and vm.runtime.state is VmState.STOPPED:
            return False  # its handles were cleared before it was recorded as stopped
        handles = self._handles.load(vm.id)
        if not pid:
            return False
        found = msgspec.structs.replace(
            handles, pid=pid, pid_start_ticks=procfs.start_ticks(pid), boot_id=self._boot_id
        )
        if found != handles:
            self._handles.set(vm.id, found)
        return True

    def watch(self, vm: Vm, ended: Callable[[], None]) -> None:
        """Call `ended` once when the VM's process ends."""
        pidfd = self._open_machine(vm)
        if pidfd < 0:
            ended()
            return
        loop = asyncio.get_running_loop()

        def fire() -> None:
            self.unwatch(vm.id)
            ended()

        self.unwatch(vm.id)
        self._watches[vm.id] = pidfd
        loop.add_reader(pidfd, fire)

    def unwatch(self, vm_id: str) -> None:
        """Stop watching. Idempotent."""
        pidfd = self._watches.pop(vm_id, -1)
        if pidfd >= 0:
            asyncio.get_running_loop().remove_reader(pidfd)
            os.close(pidfd)

    async def wait_exit(self, vm: Vm, timeout_s: float) -> bool:
        """Whether the VM's process ends within `timeout_s` seconds (at once if it has)."""
        pidfd = self._open_machine(vm)
        if pidfd < 0:
            return True
        try:
            return await procfs.wait_exit(pidfd, timeout_s)
        finally:
            os.close(pidfd)

    async def end(self, vm: Vm) -> None:
        """End the VM's machine now: its hypervisor is asked, then its process killed. What is left
        of one that has ended by itself goes, too.

        Idempotent. Raises Internal when the kernel does not let the process die, BangerError when
        nobody can end it now.
        """
        pidfd = self._open_machine(vm)
        try:
            if pidfd >= 0:
                await self._ask_to_end(vm, pidfd)
            await self._hypervisor.clear(Path(vm.runtime.api_socket))
            if pidfd >= 0:
                await self._kill(vm, pidfd)
        finally:
            if pidfd >= 0:
                os.close(pidfd)

    async def end_network(self, vm: Vm) -> None:
        """End the processes that served the network of a machine that has ended. Idempotent."""
        networks = self._networks.by_mode.values()
        for process in self._handles.get(vm.id).network:
            # They end by themselves when the machine does; only one that hangs is killed.
            # (passt 2023-03 can spin for ever over a connection whose peer has closed.)
            pidfd = procfs.open_pidfd(
                process.pid, lambda it: any(each.owns(it.argv, vm.id) for each in networks)
            )
            if pidfd >= 0:
                try:
                    await procfs.wait_exit(pidfd, 1.0) or await procfs.kill(pidfd)
                finally:
                    os.close(pidfd)

    async def _ask_to_end(self, vm: Vm, pidfd: int) -> None:
        try:
            async with asyncio.timeout(_QUIT_TIMEOUT_S):
                await self._hypervisor.quit(Path(vm.runtime.api_socket))
                await procfs.wait_exit(pidfd, _QUIT_TIMEOUT_S)
        except (BangerError, TimeoutError) as error:
            get_logger().info("hypervisor does not quit", vm_id=vm.id, error=str(error))

    async def _kill(self, vm: Vm, pidfd: int) -> None:
        pid = self._handles.get(vm.id).pid
        try:
            killed = await procfs.kill(pidfd)
        except PermissionError as error:
            raise Internal(
                f'the process of vm "{vm.name}" is in a jail, which nobody can end now',
                hint=f"look at the helper: banger system status; the process has pid {pid}",
            ) from error
        if not killed:
            raise Internal(
                f'the process of vm "{vm.name}" cannot be killed',
                hint=f"look at pid {pid}: its disk may be hanging",
            )

    def _open_machine(self, vm: Vm) -> int:
        pid = self._handles.get(vm.id).pid
        return procfs.open_pidfd(pid, self._is_machine(vm)) if pid else -1

    def _is_machine(self, vm: Vm) -> Callable[[Process], bool]:
        socket = Path(vm.runtime.api_socket)

        def is_it(process: Process) -> bool:
            if process == UNKNOWN:  # it has ended, or is hidden: then its jail says that it lives
                hidden = procfs.hidden_machines().get(vm.id, ())
                return self._handles.get(vm.id).pid in hidden
            return self._hypervisor.control_socket(process) == socket

        return is_it
