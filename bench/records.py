"""Records of VMs, as a home has them after some use: for benchmarks of what many of them cost."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterable

from banger.base.model import InitMode, Vm, VmRuntime, VmSpec, VmState, now
from banger.base.paths import Paths
from banger.store.store import Store


def fill(paths: Paths, states: Iterable[VmState]) -> list[Vm]:
    """Record a VM in each of these states in a database that may not be there yet. No daemon may
    run."""
    return asyncio.run(_fill(paths, list(states)))


def empty(paths: Paths) -> None:
    """Remove all records. No daemon may run."""
    asyncio.run(_empty(paths))


async def _fill(paths: Paths, states: list[VmState]) -> list[Vm]:
    paths.state_dir.mkdir(parents=True, mode=0o700, exist_ok=True)
    store = await Store.open(paths.database)
    vms = [_vm(paths, f"vm-{number:04}", state) for number, state in enumerate(states)]
    for vm in vms:
        await store.insert_vm(vm)
    await store.close()
    return vms


async def _empty(paths: Paths) -> None:
    store = await Store.open(paths.database)
    for vm in await store.vms():
        await store.delete_vm(vm.id)
    await store.close()


def _vm(paths: Paths, name: str, state: VmState) -> Vm:
    vm_id = secrets.token_hex(6)
    of_vm = paths.vm(vm_id)
    moment = now()
    return Vm(
        id=vm_id,
        name=name,
        image_id="0" * 12,
        image_name="debian-bookworm",
        kernel_id="0" * 12,
        spec=VmSpec(
            vcpu_count=2,
            memory_mib=2048,
            disk_size_mib=8192,
            system_overlay_size_mib=8192,
            init=InitMode.MINIMAL,
        ),
        runtime=VmRuntime(
            state=state,
            guest_ip="172.16.0.2",
            api_socket=str(of_vm.control_socket),
            agent_socket=str(of_vm.agent_socket),
            log_path=str(of_vm.console_log),
            vm_dir=str(of_vm.directory),
            system_overlay=str(of_vm.system_overlay),
            work_disk=str(of_vm.work_disk),
        ),
        created_at=moment,
        updated_at=moment,
    )
