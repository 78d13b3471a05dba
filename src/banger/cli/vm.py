"""The group `banger vm`, and those of its commands that ask once and draw the answer."""

from __future__ import annotations

from collections.abc import Iterator

import click
import msgspec

from banger.base.model import Record, Vm, VmState
from banger.base.units import format_age
from banger.base.usage import ListedVm, ShownVm
from banger.cli import figures
from banger.cli.app import connect, json_option, vm_argument
from banger.cli.figures import print_fitting
from banger.cli.lazy import LazyGroup
from banger.cli.render import print_json, print_table, seconds_since

_COMMANDS = {
    "run": ("banger.cli.run:run", "Run a command, or a shell, in a fresh machine."),
    "create": ("banger.cli.lifecycle:create", "Make a machine, and start it."),
    "list": ("banger.cli.vm:list_vms", "The machines that are there."),
    "show": ("banger.cli.vm:show", "Everything recorded of one machine."),
    "start": ("banger.cli.lifecycle:start", "Start machines from their disks."),
    "stop": ("banger.cli.lifecycle:stop", "Power machines off. Their disks stay."),
    "restart": ("banger.cli.lifecycle:restart", "Stop machines and start them again."),
    "kill": ("banger.cli.lifecycle:kill", "End machines at once, as by pulling their plug."),
    "snapshot": ("banger.cli.snapshot:take", "Keep a machine as it is now, for others."),
    "fork": ("banger.cli.snapshot:fork", "Copy a running machine, processes and all."),
    "delete": ("banger.cli.lifecycle:delete", "Delete machines and their disks, for good."),
    "prune": ("banger.cli.lifecycle:prune", "Delete all machines that do not run."),
    "set": ("banger.cli.lifecycle:set_", "Change a machine's name, vCPUs, memory or disk."),
    "wait": ("banger.cli.lifecycle:wait", "Wait until a machine is stopped, or running."),
    "touch": ("banger.cli.lifecycle:touch", "Note that machines are in use."),
    "health": ("banger.cli.lifecycle:health", "Whether a machine is well."),
    "stats": ("banger.cli.stats:stats", "What machines use, once or with --watch."),
    "publish": ("banger.cli.ports:publish", "Let a port of this host lead to one of a machine's."),
    "unpublish": ("banger.cli.ports:unpublish", "Close a published port, with its connections."),
    "ports": ("banger.cli.ports:ports", "What listens in machines, and how to reach it."),
    "exec": ("banger.cli.run:exec_", "Run a command in a running machine."),
    "shell": ("banger.cli.run:shell", "A login shell in a running machine."),
    "ssh": ("banger.cli.ssh:ssh", "OpenSSH's client, on a running machine."),
    "proxy": ("banger.cli.ssh:proxy", "Join stdin and stdout to a machine's TCP port."),
    "workspace": ("banger.cli.workspace:workspace", "Git repositories in machines."),
    "results": ("banger.cli.results:results", "What a command in several forks came to."),
    "cp": ("banger.cli.copy:cp", "Copy files between host and machine."),
    "logs": ("banger.cli.run:logs", "A machine's serial console."),
}

#: Headings of the list, each with its rank: the lowest are the last to go on a narrow terminal.
_LIST_COLUMNS = {"NAME": 0, "STATE": 1, "IMAGE": 4, "ADDRESS": 8, "UP": 5,
                 "CPU": 2, "MEMORY": 3, "VCPU": 6, "DISK": 7}  # fmt: skip


@click.command(cls=LazyGroup, table=_COMMANDS)
def vm() -> None:
    """Create, use and end virtual machines."""


@click.command("list")
@json_option
def list_vms(*, as_json: bool) -> None:
    """The machines that are there."""
    with connect() as client:
        vms = client.call("vm.list", {}, list[ListedVm])
    if as_json:
        print_json(vms)
        return
    print_fitting(
        tuple(_LIST_COLUMNS),
        [
            (
                each.name,
                each.runtime.state.value,
                each.image_name,
                (_is_running(each) and each.runtime.address) or "-",
                format_age(seconds_since(each.started_at)) if _is_running(each) else "-",
                figures.cpu(each.usage),
                figures.memory(each.usage),
                str(each.spec.vcpu_count),
                figures.size(each.spec.disk_size_mib << 20),
            )
            for each in vms
        ],
        ranks=tuple(_LIST_COLUMNS.values()),
    )


def _is_running(vm: Vm) -> bool:
    return vm.runtime.state is VmState.RUNNING


@click.command()
@vm_argument
@json_option
def show(*, vm_ref: str, as_json: bool) -> None:
    """Everything recorded of one machine."""
    with connect() as client:
        found = client.call("vm.show", {"vm": vm_ref}, ShownVm)
    if as_json:
        print_json(found)
        return
    print_table(("FIELD", "VALUE"), list(_fields(found)))


def _fields(vm: Vm) -> Iterator[tuple[str, str]]:
    """What has a value, of the record, its spec and its runtime; a field may have several lines."""
    for record in (vm, vm.spec, vm.spec.reach, vm.runtime, vm.workspace):
        for key, value in ({} if record is None else msgspec.structs.asdict(record)).items():
            if not isinstance(value, Record):
                for number, line in enumerate(_text(value).splitlines()):
                    yield ("" if number else key), line


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return "" if value is None else str(msgspec.to_builtins(value))
