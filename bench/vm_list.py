"""``banger vm list`` with 1,000 records, beside an interpreter that does nothing."""

from __future__ import annotations

import asyncio
import secrets
import subprocess
import sys

from banger.base.model import InitMode, Vm, VmRuntime, VmSpec, VmState, now
from banger.base.paths import Paths
from banger.store.store import Store
from bench.home import Home
from bench.measure import Figure, Target, compare, timed

_RECORDS = 1000
_ROUNDS = 20


def measure(home: Home) -> list[Figure]:  # noqa: ARG001 - a home of its own, without real VMs
    with Home() as own:
        asyncio.run(_fill(own.paths))
        assert own.banger("vm", "list").count("\n") == _RECORDS + 1
        figure = compare(
            f"banger vm list, {_RECORDS} records",
            lambda: timed(lambda: own.banger("vm", "list")),
            floor_name="python -c pass",
            floor=lambda: timed(_bare_python),
            rounds=_ROUNDS,
            target=Target(times=8),
        )
        asyncio.run(_empty(own.paths))
        return [figure]


def _bare_python() -> None:
    subprocess.run([sys.executable, "-c", "pass"], stdin=subprocess.DEVNULL, check=True)


async def _fill(paths: Paths) -> None:
    """Stopped VMs, as they are after some use."""
    paths.state_dir.mkdir(parents=True, mode=0o700)
    store = await Store.open(paths.database)
    moment = now()
    for number in range(_RECORDS):
        vm_id = secrets.token_hex(6)
        of_vm = paths.vm(vm_id)
        vm = Vm(
            id=vm_id,
            name=f"vm-{number:04}",
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
                state=VmState.STOPPED,
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
        await store.insert_vm(vm)
    await store.close()


async def _empty(paths: Paths) -> None:
    store = await Store.open(paths.database)
    for vm in await store.vms():
        await store.delete_vm(vm.id)
    await store.close()
