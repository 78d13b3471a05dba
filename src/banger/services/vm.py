"""VMs as they are recorded: finding, listing, streams into their guests, and the state they are in.

What changes a VM's life is `lifecycle`; both work under the VM's lock, with the record read again.
"""

from __future__ import annotations

import asyncio
import shutil
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from pathlib import Path

import msgspec

from banger.base.cancellation import to_its_end
from banger.base.errors import BangerError, Conflict, NotFound, NotRunning
from banger.base.files import remove_hostile_tree, sync_directory
from banger.base.log import get_logger, vm_attributes
from banger.base.model import ImageConfig, Vm, VmState, now
from banger.base.opid import current_op_id, new_op_id
from banger.base.paths import Paths
from banger.guest.channel import AgentStream, Exit, call
from banger.guest.requests import FileStat, Request, Stat
from banger.services.addresses import Addresses
from banger.services.agents import Agents
from banger.services.capabilities import Capabilities
from banger.services.handles import HandleCache
from banger.services.liveness import Liveness
from banger.services.locks import Locks, Rank
from banger.services.operations import Stages
from banger.services.references import find
from banger.store.store import Store

_CALL_TIMEOUT_S = 20.0
#: From the agent's last word to the end of the machine that powers off.
_ENDING_TIMEOUT_S = 3.0


class VmService:
    def __init__(
        self,
        paths: Paths,
        store: Store,
        handles: HandleCache,
        liveness: Liveness,
        agents: Agents,
        capabilities: Capabilities,
        addresses: Addresses,
    ) -> None:
        self._paths = paths
        self._store = store
        self._handles = handles
        self._liveness = liveness
        self._agents = agents
        self._capabilities = capabilities
        self._addresses = addresses
        self.locks = Locks(Rank.VM)
        #: Why machines end that somebody is ending without their lock, by the VM's id.
        self.end_reasons: dict[str, str] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._sessions: Counter[str] = Counter()
        self._changed = asyncio.Event()

    async def resolve(self, reference: str) -> Vm:
        """The VM of an id, a name, or an unambiguous prefix of either; exact wins.

        Raises BadRequest for an empty reference, NotFound, or Ambiguous with the candidates.
        """
        return find(
            await self._store.vms(), reference, noun="vm", plural="VMs", name=lambda vm: vm.name
        )

    async def settled(self, reference: str, *, half_made: bool = False) -> Vm:
        """The VM of a reference; Conflict while it is being created.

        One whose creation failed, with no room to record even that, is only given who wants
        `half_made` ones.
        """
        vm = await self.resolve(reference)
        if vm.runtime.state is not VmState.CREATING:
            return vm
        if self.locks.held(vm.id):
            raise Conflict(
                f'vm "{vm.name}" is still being created',
                hint="wait for it, or interrupt the command that creates it",
            )
        if not half_made:
            raise Conflict(
                f'vm "{vm.name}" was not created to its end',
                hint=f"banger vm delete --force {vm.name}, and create it again",
            )
        return vm

    async def all(self) -> list[Vm]:
        """Every VM, by name, its state as it is now. Takes no lock."""
        return [await self._refresh(vm) for vm in await self._store.vms()]

    async def show(self, reference: str) -> Vm:
        return await self._refresh(await self.resolve(reference))

    async def _refresh(self, vm: Vm) -> Vm:
        """The VM as it is now, where the record is late or could not be written."""
        if self._cut_short(vm):
            # Read again: the operation may have ended, and another begun, since the record was.
            vm = await self._store.get_vm(vm.id) or vm
            if self._cut_short(vm) and vm.runtime.state is VmState.CREATING:
                return _entered(vm, VmState.ERROR, "it was not created to its end")
            if self._cut_short(vm) and self.memory_is_good(vm):
                return _entered(vm, VmState.SUSPENDED, "")
            if self._cut_short(vm):
                return _entered(vm, VmState.STOPPED, "its start failed")
        if vm.runtime.state is VmState.RUNNING and not self._liveness.vm_alive(vm):
            return _entered(vm, VmState.STOPPED, "its process has ended")
        return vm

    def _cut_short(self, vm: Vm) -> bool:
        """Whether work on it has failed when there was no room to record even that."""
        at_work = vm.runtime.state in (VmState.CREATING, VmState.STARTING)
        return at_work and not self.locks.held(vm.id)

    async def running(self, reference: str) -> Vm:
        """The VM, which runs; NotRunning otherwise."""
        vm = await self.show(reference)
        if vm.runtime.state is not VmState.RUNNING:
            reason = f": {vm.runtime.last_error}" if vm.runtime.last_error else ""
            hints = {
                VmState.STOPPED: f"start it: banger vm start {vm.name}",
                VmState.SUSPENDED: f"let it go on: banger vm start {vm.name}",
                VmState.CREATING: f"banger vm wait {vm.name} --for running",
                VmState.STARTING: f"banger vm wait {vm.name} --for running",
                VmState.ERROR: f"banger vm logs {vm.name}",
            }
            raise NotRunning(
                f'vm "{vm.name}" is {vm.runtime.state}{reason}',
                hint=hints.get(vm.runtime.state, ""),
            )
        return vm

    @asynccontextmanager
    async def locked(self, found: Vm, stages: Stages | None = None) -> AsyncIterator[Vm]:
        """A VM that was found, read again under its lock. NotFound when it went away meanwhile.

        With `stages`, having to wait is a stage, and the log's records name the VM.
        """
        if stages is not None and self.locks.held(found.id):
            stages.stage("wait", "for another operation on this machine")
        async with self.hold(found.id):
            vm = await self._store.get_vm(found.id)
            if vm is None:
                raise NotFound(f'vm "{found.name}" not found')
            if vm.runtime.state is VmState.STARTING and self.memory_is_good(vm):
                # It did not start, when there was no room to record even that.
                vm = _entered(vm, VmState.SUSPENDED, "")
            if stages is not None:
                stages.describe(**vm_attributes(vm))
            yield vm

    @asynccontextmanager
    async def hold(self, vm_id: str) -> AsyncIterator[None]:
        """The VM's lock. A wish to end the machine that whoever had it was starting goes with it,
        when there is no machine: the next start is none of its business."""
        async with self.locks.hold(vm_id):
            try:
                yield
            finally:
                if not self._handles.get(vm_id).pid:
                    self.end_reasons.pop(vm_id, None)

    # Streams and requests into a guest.

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

    async def image_config(self, vm: Vm) -> ImageConfig:
        """What the VM's image says of the programs in it; nothing when its record is gone."""
        image = await self._store.get_image(vm.image_id)
        return ImageConfig() if image is None else image.config

    def has_machine(self, vm: Vm) -> bool:
        """Whether a machine of it runs now: also while it is being started."""
        return self._liveness.vm_alive(vm)

    async def runs_on(self, vm: Vm) -> bool:
        """Whether a VM whose agent was lost still runs, and is not just about to end."""
        return self._liveness.vm_alive(vm) and not await self._liveness.wait_exit(
            vm, _ENDING_TIMEOUT_S
        )

    # Use: what nobody uses may be stopped by itself.

    @asynccontextmanager
    async def in_use(self, vm: Vm) -> AsyncIterator[None]:
        """A session: the VM is in use until it ends, and was used last when it ended."""
        self._sessions[vm.id] += 1
        try:
            await self.touch(vm.id)
            yield
        finally:
            self._sessions[vm.id] -= 1
            if not self._sessions[vm.id]:
                del self._sessions[vm.id]
            await asyncio.shield(self.touch(vm.id))

    async def touch(self, vm_id: str) -> datetime:
        """Note that the VM is used now, and say when that is. Takes no lock."""
        moment = now()
        await self._store.touch_vm(vm_id, moment)
        return moment

    def has_sessions(self, vm_id: str) -> bool:
        return self._sessions[vm_id] > 0

    # State: each of these is called with the VM's lock held.

    async def mark_starting(self, vm: Vm) -> Vm:
        """Record that a start is under way: should this daemon die, the next one ends it.

        What a clean-up that failed has left of an earlier run is ended first: two machines must
        not have the same disks. (That somebody has killed it meanwhile is not forgotten.)
        """
        await self._release(vm, again=True)
        # Its sockets go where this daemon has its own, which may be another place than last time.
        paths = self._paths.vm(vm.id)
        runtime = msgspec.structs.replace(
            vm.runtime,
            api_socket=str(paths.control_socket),
            agent_socket=str(paths.agent_socket),
        )
        vm = msgspec.structs.replace(vm, runtime=runtime)
        return await self.save(vm, state=VmState.STARTING, last_error="")

    async def mark_running(self, vm: Vm) -> Vm:
        """Record that the VM runs, and watch its process."""
        moment = await self.touch(vm.id)
        self.drop_memory(vm)  # it is mapped, and the next start must not go on from it
        vm = msgspec.structs.replace(vm, started_at=moment, touched_at=moment)
        vm = await self.save(vm, state=VmState.RUNNING, last_error="")
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
        self.drop_memory(vm)
        # Kept, it is nobody's session any more: the next daemon would remove it once it is mended.
        spec = msgspec.structs.replace(vm.spec, ephemeral=False)
        vm = msgspec.structs.replace(vm, spec=spec)
        return await self.save(vm, state=VmState.ERROR, last_error=error.message)

    async def mark_ended(self, vm: Vm, reason: str) -> Vm:
        """End what still runs of it, clean up, and record that it is stopped, and why."""
        await self._release(vm)
        if not self.memory_is_good(vm):  # its room may be what the record needs
            self.drop_memory(vm)
        stopped = await self.save(vm, state=VmState.STOPPED, last_error=reason)
        self.drop_memory(vm)
        return stopped

    async def mark_suspended(self, vm: Vm) -> Vm:
        """Record that the VM is suspended, its memory being saved; then end what runs of it.

        In this order: a daemon that dies between the two leaves a machine that nobody needs.
        """
        self._paths.vm(vm.id).memory_handed_over.unlink(missing_ok=True)
        suspended = await self.save(vm, state=VmState.SUSPENDED)
        await self._release(vm)
        return suspended

    async def mark_suspended_again(self, vm: Vm) -> Vm:
        """End what there is of a start that came to nothing: its memory is as good as before."""
        await self._release(vm)
        self._paths.vm(vm.id).memory_handed_over.unlink(missing_ok=True)
        return await self.save(vm, state=VmState.SUSPENDED)

    def drop_memory(self, vm: Vm) -> None:
        """Forget the memory that was kept of a VM, if some was."""
        paths = self._paths.vm(vm.id)
        for path in (paths.memory, paths.machine_state, paths.memory_handed_over):
            path.unlink(missing_ok=True)

    def hand_over_memory(self, vm: Vm) -> None:
        """A machine goes on from the memory that was kept of a VM, if some was: from now on its
        disks may be others than that memory knows."""
        paths = self._paths.vm(vm.id)
        if paths.memory.is_file():
            paths.memory_handed_over.touch(mode=0o600)
            sync_directory(paths.directory)

    def memory_is_good(self, vm: Vm) -> bool:
        """Whether the memory that was kept of a VM is there, and no machine has gone on from it."""
        paths = self._paths.vm(vm.id)
        kept = paths.memory.is_file() and paths.machine_state.is_file()
        return kept and not paths.memory_handed_over.exists()

    async def remove_unrecorded(self, vm: Vm, marker: str) -> None:
        """End a machine that was made for no VM yet, and remove its files, `marker` last: by that
        the next daemon knows what is left of them."""
        await self._release(vm)
        self._addresses.forget(vm.id)
        await to_its_end(asyncio.to_thread(_remove_but, self._paths.vm(vm.id).directory, marker))

    async def start_over(self, vm: Vm) -> None:
        """End and clean up an attempt to start; the VM is about to be started in another way,
        unless somebody has killed it by then."""
        await self._release(vm, again=True)

    async def end_stray(self, vm: Vm) -> None:
        """End what runs of a VM that is recorded as one that does not; the record stays."""
        await self._release(vm)

    async def save(self, vm: Vm, *, state: VmState | None = None, last_error: str = "") -> Vm:
        """Replace the record; with `state` the VM enters it. The record as it is then."""
        if state is not None:
            vm = _entered(vm, state, last_error)
        vm = msgspec.structs.replace(self._addresses.claimed(vm), updated_at=now())
        try:
            await self._store.update_vm(vm)
        except NotFound:
            self._addresses.forget(vm.id)  # its row was being deleted, and is
            raise
        self._addresses.note(vm)
        self._ring()
        return vm

    async def insert(self, vm: Vm) -> Vm:
        """Record a new VM, which nobody else knows of; the record as it is then, with its address.

        Raises Conflict when its name is taken. Cancelled or failed, there is no record.
        """
        vm = self._addresses.claimed(vm)
        try:
            await self._store.insert_vm(vm)
        except asyncio.CancelledError:
            # The transaction is done all the same.
            await to_its_end(self._store.delete_vm(vm.id))
            self._addresses.forget(vm.id)
            raise
        except BaseException:
            self._addresses.forget(vm.id)
            raise
        self._addresses.note(vm)
        return vm

    async def addressed(self, vm: Vm) -> Vm:
        """The VM with a name and an address on its record: older ones have none."""
        return vm if self._addresses.claimed(vm) == vm else await self.save(vm)

    async def remove(self, vm: Vm, stages: Stages) -> None:
        """End the VM's processes and remove its files, then its row.

        The row goes last, so that a deletion that was interrupted can be done again.
        """
        stages.stage("end")
        await self._release(vm)
        stages.stage("remove_files")
        directory = self._paths.vm(vm.id).directory
        # A thread goes on when its caller is cancelled: not without the lock.
        try:
            await to_its_end(asyncio.to_thread(remove_hostile_tree, directory))
        except OSError as error:
            hint = "look at who owns the files in it"
            raise Conflict(f"cannot remove {directory}: {error.strerror}", hint=hint) from error
        await self._store.delete_vm(vm.id)
        self._addresses.forget(vm.id)
        self._ring()

    async def _release(self, vm: Vm, *, again: bool = False) -> None:
        """End the machine and what belongs to its run; then forget its handles.

        With `again` it is about to be started once more, if nobody has ended it meanwhile.
        """
        self._liveness.unwatch(vm.id)
        await self._liveness.end(vm)
        await self._agents.drop(vm.id)
        await self._capabilities.cleanup(vm)
        shutil.rmtree(self._paths.vm(vm.id).runtime, ignore_errors=True)
        self._handles.clear(vm.id)
        if not again:
            self.end_reasons.pop(vm.id, None)

    async def keep(self, vm: Vm) -> None:
        """A VM made for a session outlives it after all; nothing if it is gone."""
        with suppress(NotFound):
            async with self.locked(vm) as current:
                spec = msgspec.structs.replace(current.spec, ephemeral=False)
                await self.save(msgspec.structs.replace(current, spec=spec))

    # What happens by itself.

    def watch(self, vm: Vm) -> None:
        """Notice when the VM's process ends by itself."""

        def ended() -> None:
            task = asyncio.create_task(self._process_ended(vm))
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)

        self._liveness.watch(vm, ended)

    async def _process_ended(self, watched: Vm) -> None:
        current_op_id.set(new_op_id())  # not that of the operation which began to watch it
        # Whoever has the lock may be waiting for its agent to answer.
        await self._agents.drop(watched.id)
        try:
            async with self.locked(watched) as vm:
                if vm.runtime.state is VmState.RUNNING and not self._liveness.vm_alive(vm):
                    reason = self.end_reasons.get(
                        vm.id, "the guest powered off or its process ended"
                    )
                    get_logger().info("vm ended", reason=reason, **vm_attributes(vm))
                    await self.mark_ended(vm, reason)
        except NotFound:
            pass  # deleted meanwhile
        except (BangerError, OSError) as error:
            get_logger().error("clean-up failed", error=str(error), **vm_attributes(watched))

    async def changes(self) -> AsyncGenerator[None, None]:
        """Now, and after each change of any VM's record (some may be skipped)."""
        while True:
            changed = self._changed
            yield
            await changed.wait()

    def _ring(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def close(self) -> None:
        """Wait for clean-ups in progress; running VMs run on."""
        await asyncio.gather(*self._ending, return_exceptions=True)


def _entered(vm: Vm, state: VmState, reason: str) -> Vm:
    runtime = msgspec.structs.replace(vm.runtime, state=state, last_error=reason)
    return msgspec.structs.replace(vm, runtime=runtime)


def _remove_but(directory: Path, last: str) -> None:
    """Remove a directory, and the file `last` in it after all others. Idempotent."""
    if not directory.is_dir():
        return
    for entry in directory.iterdir():
        if entry.is_dir():
            remove_hostile_tree(entry)
        elif entry.name != last:
            entry.unlink()
    (directory / last).unlink(missing_ok=True)
    directory.rmdir()
