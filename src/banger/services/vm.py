"""VMs: finding, showing, stopping, deleting, and streams into their guests.

Every mutating method resolves the reference, takes the lock of the id, reads the record again
under the lock and works on that. All are idempotent where they end something.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import msgspec

from banger.base.errors import Ambiguous, BadRequest, BangerError, Conflict, NotFound, NotRunning
from banger.base.log import OperationLog, get_logger, vm_attributes
from banger.base.model import Vm, VmState, now
from banger.base.opid import current_op_id, new_op_id
from banger.base.paths import Paths
from banger.guest.channel import AgentStream, Exit, call
from banger.guest.requests import FileStat, Request, Shutdown, Stat
from banger.services.agents import Agents
from banger.services.handles import HandleCache
from banger.services.liveness import Liveness
from banger.services.locks import Locks
from banger.store.store import Store

#: The agent gives processes 2 s after TERM and unmounts; systemd stops its services.
STOP_TIMEOUT_S = 30.0
_SHUTDOWN_ANSWER_TIMEOUT_S = 10.0
_CALL_TIMEOUT_S = 20.0
#: From the agent's last word to the end of the machine that powers off.
_ENDING_TIMEOUT_S = 3.0


class VmService:
    def __init__(
        self, paths: Paths, store: Store, handles: HandleCache, liveness: Liveness, agents: Agents
    ) -> None:
        self._paths = paths
        self._store = store
        self._handles = handles
        self._liveness = liveness
        self._agents = agents
        self.locks = Locks()
        self._ending: set[asyncio.Task[None]] = set()

    async def resolve(self, reference: str) -> Vm:
        """The VM of an id, a name, or an unambiguous prefix of either; exact wins.

        Raises BadRequest for an empty reference, NotFound, or Ambiguous with the candidates.
        """
        if not reference:
            raise BadRequest("vm id or name is required")
        vms = await self._store.vms()
        for vm in vms:
            if reference == vm.id:
                return vm
        for vm in vms:
            if reference == vm.name:
                return vm
        matches = [vm for vm in vms if vm.id.startswith(reference) or vm.name.startswith(reference)]
        if len(matches) > 1:
            names = ", ".join(vm.name for vm in matches)
            raise Ambiguous(f'multiple VMs match "{reference}"', hint=f"they are: {names}")
        if not matches:
            raise NotFound(f'vm "{reference}" not found', hint="see: banger vm list")
        return matches[0]

    async def all(self) -> list[Vm]:
        """Every VM, by name, its state as it is now. Takes no lock."""
        return [self._refresh(vm) for vm in await self._store.vms()]

    async def show(self, reference: str) -> Vm:
        return self._refresh(await self.resolve(reference))

    def _refresh(self, vm: Vm) -> Vm:
        if vm.runtime.state is VmState.RUNNING and not self._liveness.vm_alive(vm):
            return _stopped(vm, "its process has ended")
        return vm

    async def running(self, reference: str) -> Vm:
        """The VM, which runs; NotRunning otherwise."""
        vm = await self.show(reference)
        if vm.runtime.state is not VmState.RUNNING:
            reason = f": {vm.runtime.last_error}" if vm.runtime.last_error else ""
            raise NotRunning(f'vm "{vm.name}" is {vm.runtime.state}{reason}')
        return vm

    async def open_stream(self, vm: Vm, request: Request) -> AgentStream:
        """A stream into the guest of a running VM."""
        return await (await self._agents.channel(vm)).open(request)

    async def stat(self, vm: Vm, path: str) -> FileStat | None:
        """What `path` is in the guest, a link to a directory followed; None for nothing there."""
        found = await self._stat(vm, path)
        if found is not None and found.type == "l":
            # Only what is a directory has a "." in it.
            return await self._stat(vm, f"{path}/.") or found
        return found

    async def _stat(self, vm: Vm, path: str) -> FileStat | None:
        channel = await self._agents.channel(vm)
        try:
            answer = await call(channel, Stat(path), timeout_s=_CALL_TIMEOUT_S)
        except NotFound:
            return None
        return FileStat.decode(answer.stdout)

    async def call(self, vm: Vm, request: Request) -> Exit:
        """A request that ends by itself and says nothing; how it ended."""
        channel = await self._agents.channel(vm)
        return (await call(channel, request, timeout_s=_CALL_TIMEOUT_S)).exit

    async def runs_on(self, vm: Vm) -> bool:
        """Whether a VM whose agent was lost still runs, and is not just about to end."""
        return self._liveness.vm_alive(vm) and not await self._liveness.wait_exit(
            vm, _ENDING_TIMEOUT_S
        )

    async def keep(self, vm: Vm) -> None:
        """A VM made for a session outlives it after all; nothing if it is gone."""
        with suppress(NotFound):
            await self._keep(vm)

    async def _keep(self, vm: Vm) -> None:
        async with self.locked(vm.id) as current:
            spec = msgspec.structs.replace(current.spec, ephemeral=False)
            await self._store.update_vm(msgspec.structs.replace(current, spec=spec))

    @asynccontextmanager
    async def locked(self, vm_id: str) -> AsyncIterator[Vm]:
        """The VM, read again under its lock. NotFound when it went away meanwhile."""
        async with self.locks.hold(vm_id):
            vm = await self._store.get_vm(vm_id)
            if vm is None:
                raise NotFound(f'vm "{vm_id}" not found')
            yield vm

    async def stop(self, reference: str) -> Vm:
        """Power the guest off; end it when it does not go. A stopped VM stays as it is."""
        vm_id = (await self._ready(reference)).id
        with OperationLog("vm.stop", vm_id=vm_id) as log:
            async with self.locked(vm_id) as vm:
                log.describe(**vm_attributes(vm))
                if self._liveness.vm_alive(vm):
                    log.stage("power_off")
                    # Watched no longer: that it ends now is no surprise.
                    self._liveness.unwatch(vm.id)
                    await self._power_off(vm)
                elif vm.runtime.state is not VmState.RUNNING:
                    return vm
                log.stage("cleanup")
                return await self._mark_ended(vm, reason="")

    async def delete(self, reference: str, *, force: bool = False) -> Vm:
        """Delete a VM and all its files. Conflict for a running one unless `force`."""
        vm_id = (await self._ready(reference)).id
        with OperationLog("vm.delete", vm_id=vm_id) as log:
            async with self.locked(vm_id) as vm:
                log.describe(**vm_attributes(vm))
                if self._liveness.vm_alive(vm) and not force:
                    raise Conflict(
                        f'vm "{vm.name}" is running',
                        hint=f"stop it first, or: banger vm delete --force {vm.name}",
                    )
                await self.remove(vm, log)
                return vm

    async def remove(self, vm: Vm, log: OperationLog) -> None:
        """End the VM's processes and remove its files, then its row: the caller has the lock.

        The row goes last, so that a deletion that was interrupted can be done again.
        """
        log.stage("end")
        await self._release(vm)
        log.stage("remove_files")
        directory = self._paths.vm(vm.id).directory
        await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
        if directory.exists():
            raise Conflict(f"cannot remove {directory}", hint="look at who owns the files in it")
        await self._store.delete_vm(vm.id)

    async def mark_running(self, vm: Vm) -> Vm:
        """Record that the VM runs, and watch its process."""
        runtime = msgspec.structs.replace(vm.runtime, state=VmState.RUNNING, last_error="")
        moment = now()
        vm = msgspec.structs.replace(vm, runtime=runtime, updated_at=moment, started_at=moment)
        await self._store.update_vm(vm)
        self.watch(vm)
        return vm

    async def mark_failed(self, vm: Vm, error: BangerError) -> Vm:
        """End what runs of it and keep the rest for inspection, with the reason on the record.

        What cannot be ended or removed now is logged: `delete` tries again.
        """
        try:
            await self._release(vm)
        except (BangerError, OSError):
            get_logger().exception("clean-up failed", **vm_attributes(vm))
        runtime = msgspec.structs.replace(vm.runtime, state=VmState.ERROR, last_error=error.message)
        vm = msgspec.structs.replace(vm, runtime=runtime, updated_at=now())
        await self._store.update_vm(vm)
        return vm

    def watch(self, vm: Vm) -> None:
        """Notice when the VM's process ends by itself."""

        def ended() -> None:
            task = asyncio.create_task(self._process_ended(vm.id))
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)

        self._liveness.watch(vm, ended)

    async def settle(self, vm: Vm, reason: str) -> Vm:
        """A VM recorded as running whose process is gone: clean up and record it as stopped."""
        return await self._mark_ended(vm, reason=reason)

    async def close(self) -> None:
        """Wait for clean-ups in progress; running VMs run on."""
        await asyncio.gather(*self._ending, return_exceptions=True)

    async def _process_ended(self, vm_id: str) -> None:
        current_op_id.set(new_op_id())  # not that of the operation which began to watch it
        try:
            async with self.locked(vm_id) as vm:
                if vm.runtime.state is VmState.RUNNING and not self._liveness.vm_alive(vm):
                    get_logger().info("vm ended by itself", vm_id=vm.id, vm_name=vm.name)
                    await self._mark_ended(vm, reason="the guest powered off or its process ended")
        except NotFound:
            pass  # deleted meanwhile
        except BangerError as error:
            get_logger().error("clean-up failed", vm_id=vm_id, error=error.message)

    async def _ready(self, reference: str) -> Vm:
        vm = await self.resolve(reference)
        if vm.runtime.state is VmState.CREATING:
            raise Conflict(
                f'vm "{vm.name}" is still being created',
                hint="wait for it, or interrupt the command that creates it",
            )
        return vm

    async def _power_off(self, vm: Vm) -> None:
        try:
            channel = await self._agents.channel(vm)
            await call(channel, Shutdown(), timeout_s=_SHUTDOWN_ANSWER_TIMEOUT_S)
        except BangerError as error:
            get_logger().warning("agent cannot power off", vm_id=vm.id, error=error.message)
            return
        await self._liveness.wait_exit(vm, STOP_TIMEOUT_S)

    async def _mark_ended(self, vm: Vm, *, reason: str) -> Vm:
        await self._release(vm)
        vm = _stopped(vm, reason)
        await self._store.update_vm(vm)
        return vm

    async def _release(self, vm: Vm) -> None:
        """End the processes, close the channel, remove the sockets, forget the handles."""
        await self._liveness.end(vm)
        await self._agents.drop(vm.id)
        shutil.rmtree(self._paths.vm(vm.id).runtime, ignore_errors=True)
        self._handles.clear(vm.id)


def _stopped(vm: Vm, reason: str) -> Vm:
    runtime = msgspec.structs.replace(vm.runtime, state=VmState.STOPPED, last_error=reason)
    return msgspec.structs.replace(vm, runtime=runtime, updated_at=now())
