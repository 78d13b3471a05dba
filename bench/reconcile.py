"""The start of a daemon that has 1,000 records to look at, beside one that has none.

Of the records 800 are of stopped VMs; 200 say that they run, and do not: they are what a host that
was switched off leaves, with the files of their processes. Each start finds it all anew.
"""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import msgspec

from banger.base.model import Handles, Vm, VmState
from banger.base.paths import Paths, prepare_private_dir
from banger.rpc.client import Client
from bench.home import Home
from bench.measure import Figure, Target, compare, timed
from bench.records import empty, fill

_STOPPED = 800
_GONE = 200
_ROUNDS = 15


def measure(home: Home) -> list[Figure]:  # noqa: ARG001 - a home of its own, without real VMs
    with Home() as own:
        paths = own.paths
        prepare_private_dir(paths.runtime_dir)
        vms = fill(paths, [VmState.STOPPED] * _STOPPED + [VmState.RUNNING] * _GONE)
        for vm in vms:
            _lay_out(paths, vm)
        full = own.directory / "full.db"
        shutil.move(paths.database, full)
        try:
            return [
                compare(
                    f"start of bangerd, {len(vms)} records",
                    lambda: _start_s(own, full, vms),
                    floor_name="the same without records",
                    floor=lambda: _start_s(own, None, []),
                    rounds=_ROUNDS,
                    target=Target(times=2),
                )
            ]
        finally:
            empty(paths)


def _start_s(own: Home, database: Path | None, vms: list[Vm]) -> float:
    """From nothing to a daemon that answers, in seconds; it is stopped again."""
    paths = own.paths
    for file in paths.state_dir.glob("banger.db*"):
        file.unlink()
    if database is not None:
        shutil.copyfile(database, paths.database)
    for vm in vms:
        if vm.runtime.state is VmState.RUNNING:
            _lay_out(paths, vm)

    def start() -> None:
        with Client.connect(paths) as client:
            client.call("operations.list", {}, list[object])

    start_s = timed(start)
    with closing(sqlite3.connect(paths.database)) as records:
        (unsettled,) = records.execute(
            "SELECT count(*) FROM vms WHERE json_extract(record, '$.runtime.state') != 'stopped'"
        ).fetchone()
    assert unsettled == 0
    own.banger("daemon", "stop")
    return start_s


def _lay_out(paths: Paths, vm: Vm) -> None:
    """The files of a VM; of one that ran, those of its processes, too."""
    of_vm = paths.vm(vm.id)
    of_vm.directory.mkdir(parents=True, exist_ok=True)
    if vm.runtime.state is VmState.RUNNING:
        # No pid is that high: nobody can have it.
        gone = Handles(pid=1 << 30, pid_start_ticks=1, boot_id="another")
        of_vm.handles.write_bytes(msgspec.json.encode(gone))
        of_vm.runtime.mkdir(parents=True, exist_ok=True)
        for socket in (of_vm.control_socket, of_vm.agent_socket):
            socket.touch()
