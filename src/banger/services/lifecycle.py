"""The life of a VM after it was made: start, stop, restart, kill, change, delete.

Every method resolves the reference, takes the lock of the id, reads the record again under the
lock, and works on that to its end. All are idempotent: what is as asked for already stays so.
Cancelled half-way, each leaves a record that says the truth.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from banger.base.cancellation import to_its_end
from banger.base.errors import BangerError, Conflict, NotFound
from banger.base.log import get_logger, vm_attributes
from banger.base.model import InitMode, Vm, VmState
from banger.drivers.base import Hypervisor
from banger.guest.channel import call
from banger.guest.requests import Shutdown
from banger.services.agents import Agents
from banger.services.capabilities import Capabilities, Start
from banger.services.disk_room import DiskRoom
from banger.services.image import ImageService
from banger.services.kernel import KernelService
from banger.services.liveness import Liveness
from banger.services.operations import Stages
from banger.services.suspension import Suspension
from banger.services.vm import VmService
from banger.services.vm_spec import check_vcpus
from banger.services.vm_start import BOOT_TIMEOUT_S, GuestLost, VmStarter

#: The agent gives processes 2 s after TERM and unmounts; systemd stops its services.
STOP_TIMEOUT_S = 30.0
#: Only systemd's logind hears the power button; its services need the same time.
BUTTON_TIMEOUT_S = 15.0
_SHUTDOWN_ANSWER_TIMEOUT_S = 10.0


class Lifecycle:
    def __init__(
        self,
        *,
        hypervisor: Hypervisor,
        capabilities: Capabilities,
        images: ImageService,
        kernels: KernelService,
        vms: VmService,
        starter: VmStarter,
        liveness: Liveness,
        agents: Agents,
        suspension: Suspension,
        room: DiskRoom,
    ) -> None:
        self._hypervisor = hypervisor
        self._capabilities = capabilities
        self._images = images
        self._kernels = kernels
        self._vms = vms
        self._starter = starter
        self._liveness = liveness
        self._agents = agents
        self._suspension = suspension
        self._room = room

    async def start(
        self,
        reference: str,
        stages: Stages,
        *,
        boot_timeout_s: float = BOOT_TIMEOUT_S,
        cold: bool = False,
    ) -> Vm:
        """Boot a stopped VM from its disks. One that runs stays as it is.

        One that never ran starts from a template, and a suspended one goes on, unless `cold`.

        Raises PreconditionFailed with all that is missing; GuestLost when the guest does not come
        up: then it is kept, stopped, with the reason.
        """
        found = await self._vms.settled(reference)
        async with self._vms.locked(found, stages) as vm:
            if vm.runtime.state is VmState.RUNNING:
                if self._liveness.vm_alive(vm):
                    return vm
                vm = await self._vms.mark_ended(vm, "")  # it has ended, unnoticed so far
            start = await self._preflight(vm, stages)
            if vm.runtime.state is VmState.SUSPENDED and not cold:
                start.saved = await self._suspension.saved(vm)
            return await self._start(start, stages, boot_timeout_s, cold=cold)

    async def restart(
        self, reference: str, stages: Stages, *, boot_timeout_s: float = BOOT_TIMEOUT_S
    ) -> Vm:
        """Stop the VM in good order and start it again; a stopped one is just started.

        It is not stopped when something that its start needs is missing. Conflict for a suspended
        one: to restart it would lose what it was suspended for.
        """
        found = await self._vms.settled(reference)
        async with self._vms.locked(found, stages) as vm:
            _check_not_suspended(vm, f"banger vm start {vm.name}, then restart it")
            start = await self._preflight(vm, stages)
            if vm.runtime.state is VmState.RUNNING:
                start.vm = await self._stop(vm, stages, reason="")
            return await self._start(start, stages, boot_timeout_s)

    async def _preflight(self, vm: Vm, stages: Stages) -> Start:
        stages.stage("preflight")
        image = await self._images.of_vm(vm)
        kernel = await self._kernels.get(vm.kernel_id)
        return await self._starter.preflight(vm, image, kernel)

    async def _start(
        self, start: Start, stages: Stages, boot_timeout_s: float, *, cold: bool = False
    ) -> Vm:
        vm = start.vm
        try:
            start.vm = await self._vms.mark_starting(vm)
            return await self._starter.run(start, stages, boot_timeout_s=boot_timeout_s, cold=cold)
        except GuestLost as error:
            await to_its_end(self._vms.mark_failed(vm, error))
            raise
        except BaseException as error:
            cancelled = isinstance(error, asyncio.CancelledError)
            reason = "its start was cancelled" if cancelled else f"it could not start: {error}"
            if start.saved is not None and not start.ran:
                await to_its_end(self._suspended_again(vm))
            else:
                await to_its_end(self._end_broken_off(vm, reason))
            raise

    async def _suspended_again(self, vm: Vm) -> None:
        """A suspended VM has not gone on: its memory is as good as before."""
        try:
            await self._vms.mark_suspended_again(vm)
        except (BangerError, OSError) as error:
            get_logger().error("clean-up failed", error=str(error), **vm_attributes(vm))

    async def stop(
        self,
        reference: str,
        stages: Stages,
        *,
        reason: str = "",
        check: Callable[[Vm], None] | None = None,
    ) -> Vm:
        """Power the guest off; end it when it does not go. A stopped VM stays as it is.

        `reason` goes on the record, when it is not the user's own wish; then `check`, called with
        the record under the lock, may raise: much may have happened since it was looked at.
        """
        found = await self._vms.settled(reference)
        async with self._vms.locked(found, stages) as vm:
            if vm.runtime.state not in (VmState.RUNNING, VmState.STARTING):
                return vm
            if check is not None:
                check(vm)
            return await self._stop(vm, stages, reason=reason)

    async def _stop(self, vm: Vm, stages: Stages, *, reason: str) -> Vm:
        try:
            if self._liveness.vm_alive(vm):
                stages.stage("power_off")
                # Watched no longer: that it ends now is no surprise.
                self._liveness.unwatch(vm.id)
                # What it has yet to write may fit: held, it could not even say so.
                async with self._room.powering_off(vm.id):
                    await self._power_off(vm, stages)
            stages.stage("cleanup")
            return await self._vms.mark_ended(vm, reason)
        except BaseException:
            await to_its_end(self._still_there(vm))
            raise

    async def _still_there(self, vm: Vm) -> None:
        """An ending was interrupted: watch the machine again, or record that it has ended."""
        if self._liveness.vm_alive(vm):
            self._vms.watch(vm)
        else:
            await self._end_broken_off(vm, "")

    async def _end_broken_off(self, vm: Vm, reason: str) -> None:
        """End and clean up what went no further. Raises nothing in place of what broke it off."""
        try:
            await self._vms.mark_ended(vm, reason)
        except NotFound:
            pass  # its row was being deleted, and is
        except (BangerError, OSError) as error:
            get_logger().error("clean-up failed", error=str(error), **vm_attributes(vm))

    async def _power_off(self, vm: Vm, stages: Stages) -> None:
        """Ask the agent, then press the button; whatever then still runs is ended by clean-up."""
        try:
            channel = await self._agents.channel(vm)
            await call(channel, Shutdown(), timeout_s=_SHUTDOWN_ANSWER_TIMEOUT_S)
            if await self._liveness.wait_exit(vm, STOP_TIMEOUT_S):
                return
        except BangerError as error:
            get_logger().warning("agent cannot power off", vm_id=vm.id, error=error.message)
        if vm.spec.init is not InitMode.SYSTEMD or await self._liveness.wait_exit(vm, 0):
            return
        stages.stage("power_button", "the agent does not power it off")
        try:
            await self._hypervisor.power_button(Path(vm.runtime.api_socket))
            await self._liveness.wait_exit(vm, BUTTON_TIMEOUT_S)
        except BangerError as error:
            get_logger().warning("no power button", vm_id=vm.id, error=error.message)

    async def kill(self, reference: str, stages: Stages) -> Vm:
        """End the machine at once, as by pulling its plug. A stopped VM stays as it is; a
        suspended one loses its memory.

        It does not wait for the lock: a start, or a stop, that is under way fails, or is done,
        because the machine is gone.
        """
        vm = await self._vms.resolve(reference)
        await self._end_now(vm, stages, "killed")
        async with self._vms.locked(vm, stages) as vm:
            if vm.runtime.state not in (VmState.RUNNING, VmState.STARTING, VmState.SUSPENDED):
                return vm
            stages.stage("cleanup")
            return await to_its_end(self._vms.mark_ended(vm, "killed"))

    async def _end_now(self, vm: Vm, stages: Stages, reason: str) -> None:
        """End the machine without the lock. It stays watched: should this operation go no further,
        its end is recorded all the same, with `reason`."""
        if self._liveness.vm_alive(vm):
            stages.stage("end")
            self._vms.end_reasons[vm.id] = reason
            try:
                await self._liveness.end(vm)
            except BaseException:
                if self._liveness.vm_alive(vm):  # when it ends after all, then not by this
                    self._vms.end_reasons.pop(vm.id, None)
                raise
            # Whoever has the lock may be waiting for its agent to answer.
            await self._agents.drop(vm.id)
        elif self._vms.locks.held(vm.id):
            # If it is being started, its machine is not launched yet: that start will not go on.
            self._vms.end_reasons[vm.id] = reason

    async def delete(
        self,
        reference: str,
        stages: Stages,
        *,
        force: bool = False,
        check: Callable[[Vm], None] | None = None,
    ) -> Vm:
        """Delete a VM and all its files. Conflict for a running one unless `force`.

        `check` is as for `stop`.
        """
        found = await self._vms.settled(reference, half_made=True)
        if force and self._vms.locks.held(found.id):
            # Whoever holds it may be waiting for this machine: it ends without the lock.
            await self._end_now(found, stages, "its deletion was cancelled")
        async with self._vms.locked(found, stages) as vm:
            if self._liveness.vm_alive(vm) and not force:
                raise Conflict(
                    f'vm "{vm.name}" is running',
                    hint=f"stop it first, or: banger vm delete --force {vm.name}",
                )
            if check is not None:
                check(vm)
            try:
                await self._vms.remove(vm, stages)
            except asyncio.CancelledError:
                await to_its_end(self._end_broken_off(vm, "its deletion was cancelled"))
                raise
            return vm

    async def change(
        self, reference: str, changed: Callable[[Vm], Vm], stages: Stages, *, hot: bool
    ) -> Vm:
        """Replace the record by what `changed` makes of it, and make that true.

        Unless `hot`, the VM must not run. When a capability refuses, all is as it was. The record
        is written first: what a daemon that dies has not done, the next start does.
        """
        found = await self._vms.settled(reference)
        async with self._vms.locked(found, stages) as before:
            after = changed(before)
            if after == before:
                return before
            # One that another hypervisor had may have more: all else of it can be changed.
            if after.spec.vcpu_count != before.spec.vcpu_count:
                check_vcpus(after.spec, self._hypervisor, "give it fewer")
            if not hot and self._liveness.vm_alive(before):
                raise Conflict(
                    f'vm "{before.name}" is running', hint=f"first: banger vm stop {before.name}"
                )
            if not hot:
                _check_not_suspended(before, f"drop its memory: banger vm kill {before.name}")
            stages.stage("record")
            try:
                after = await self._vms.save(after)
                stages.stage("apply")
                await self._capabilities.apply_config_changes(before, after)
            except BaseException:
                # Cancelled while it was saved, too: the transaction is done all the same.
                await to_its_end(self._take_back(before))
                raise
            return after

    async def _take_back(self, before: Vm) -> None:
        """Record what was before a change. Raises nothing in place of what broke it off."""
        try:
            await self._vms.save(before)
        except BangerError as error:
            # Another VM may have got the old name meanwhile.
            get_logger().error("change not taken back", error=str(error), **vm_attributes(before))


def _check_not_suspended(vm: Vm, hint: str) -> None:
    if vm.runtime.state is VmState.SUSPENDED:
        raise Conflict(f'vm "{vm.name}" is suspended', hint=hint)
