"""The commands that change the life of machines: `banger vm create`, `start`, `stop` and so on."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import click
import msgspec

from banger.base.errors import BangerError
from banger.base.model import ErrorInfo, InitMode, NetworkMode, Vm
from banger.base.units import format_size, parse_duration_s
from banger.cli.app import (
    VM_NAME,
    Checked,
    complete_vm,
    connect,
    json_option,
    note,
    print_error,
    vm_argument,
)
from banger.cli.checks import CheckLine, print_checks
from banger.cli.machine import (
    boot_timeout_option,
    cold_option,
    disk_size_option,
    machine_options,
    machine_request,
    memory_option,
    quiet_option,
    reach_options,
    reach_request,
    vcpu_option,
)
from banger.cli.ports import note_ports
from banger.cli.progress import watched_call
from banger.cli.render import print_json, print_table

DURATION = Checked("duration", parse_duration_s)

vms_argument = click.argument(
    "vm_refs", metavar="NAME...", nargs=-1, required=True, shell_complete=complete_vm
)

#: Who waits for "running" may wait for good, and so may who waits for "healthy".
_GOALS = ("stopped", "running", "healthy", "deleted")


class HealthReport(msgspec.Struct):
    """What `vm.health` answers."""

    vm: str
    state: str
    healthy: bool
    checks: list[CheckLine]


class PrunedVm(msgspec.Struct):
    """One entry of what `vm.prune` answers."""

    vm: Vm
    size_bytes: int
    error: ErrorInfo | None = None


@click.command()
@machine_options
@click.option("--no-start", is_flag=True, help="Make it and its disks, and leave it stopped.")
@json_option
def create(*, no_start: bool, quiet: bool, as_json: bool, **machine: Any) -> None:
    """Make a machine, start it, and print its name. It runs until it is stopped."""
    request = machine_request(machine) | {"start": not no_start}
    with connect() as client:
        made = watched_call(client, "vm.create", request, Vm, title="vm", quiet=quiet)
    if not quiet:
        note_ports(made)
    _print(made, as_json=as_json)


@click.command()
@vms_argument
@boot_timeout_option
@cold_option
@quiet_option
@json_option
def start(
    *, vm_refs: tuple[str, ...], boot_timeout: float | None, cold: bool, quiet: bool, as_json: bool
) -> int:
    """Start machines from their disks. One that runs stays as it is.

    One that never ran starts from a template, as a new one does, and a suspended one goes on,
    unless --cold.
    """
    params: dict[str, Any] = {"cold": cold}
    if boot_timeout is not None:
        params["boot_timeout_s"] = boot_timeout
    return _each(vm_refs, "vm.start", params, quiet=quiet, as_json=as_json, cancels=True)


@click.command()
@vms_argument
@boot_timeout_option
@quiet_option
@json_option
def restart(
    *, vm_refs: tuple[str, ...], boot_timeout: float | None, quiet: bool, as_json: bool
) -> int:
    """Stop machines in good order and start them again; a stopped one is just started."""
    params = {} if boot_timeout is None else {"boot_timeout_s": boot_timeout}
    return _each(vm_refs, "vm.restart", params, quiet=quiet, as_json=as_json, cancels=True)


@click.command()
@vms_argument
@click.option("--suspend", is_flag=True, help="Keep their memory: `vm start` lets them go on.")
@quiet_option
@json_option
def stop(*, vm_refs: tuple[str, ...], suspend: bool, quiet: bool, as_json: bool) -> int:
    """Power machines off. Their disks stay.

    A guest that does not go within half a minute is ended. With --suspend guests are not told:
    their processes and their memory are kept on disk, and go on with `banger vm start`.
    """
    params = {"suspend": suspend}
    return _each(vm_refs, "vm.stop", params, quiet=quiet, as_json=as_json, cancels=suspend)


@click.command()
@vms_argument
@quiet_option
@json_option
def kill(*, vm_refs: tuple[str, ...], quiet: bool, as_json: bool) -> int:
    """End machines at once, as by pulling their plug. Their disks stay.

    What a guest has not yet written is lost, and the memory of a suspended one. It ends a start or
    a stop that hangs, too.
    """
    return _each(vm_refs, "vm.kill", {}, quiet=quiet, as_json=as_json)


@click.command()
@vms_argument
@click.option("-f", "--force", is_flag=True, help="Delete running ones too.")
@quiet_option
@json_option
def delete(*, vm_refs: tuple[str, ...], force: bool, quiet: bool, as_json: bool) -> int:
    """Delete machines and their disks, for good."""
    return _each(vm_refs, "vm.delete", {"force": force}, quiet=quiet, as_json=as_json)


@click.command("set")
@vm_argument
@click.option("--name", type=VM_NAME, help="A new name; a running guest gets it, too.")
@vcpu_option
@memory_option
@disk_size_option
@click.option(
    "--network",
    type=click.Choice([mode.value for mode in NetworkMode]),
    help="How it reaches the network.",
)
@reach_options
@click.option(
    "--init",
    type=click.Choice([InitMode.MINIMAL.value, InitMode.SYSTEMD.value]),
    help="Who is PID 1: banger's own init, or the image's systemd.",
)
@quiet_option
@json_option
def set_(*, vm_ref: str, quiet: bool, as_json: bool, **options: Any) -> None:
    """Change a machine: its name and what it may reach at any time, the rest while it is stopped.

    A disk grows only; the guest grows the file system on it at its next start.
    """
    change = {
        "name": options["name"],
        "vcpu_count": options["vcpu"],
        "memory_mib": options["memory"],
        "disk_size_mib": options["disk_size"],
        "network": options["network"],
        "init": options["init"],
        "reach": reach_request(options) or None,
    }
    change = {name: value for name, value in change.items() if value is not None}
    if not change:
        raise click.UsageError("say what to change: --name, --vcpu, --memory, --disk-size, ...")
    with connect() as client:
        params = {"vm": vm_ref, "change": change}
        changed = watched_call(client, "vm.set", params, Vm, title=f"vm {vm_ref}", quiet=quiet)
    _print(changed, as_json=as_json)


@click.command()
@vm_argument
@click.option(
    "--for",
    "goal",
    type=click.Choice(_GOALS),
    default="stopped",
    show_default=True,
    help="What to wait for. Healthy: it runs and its agent answers.",
)
@click.option("--timeout", type=DURATION, help="Give up after so long, like 90s (status 1).")
@json_option
def wait(*, vm_ref: str, goal: str, timeout: float | None, as_json: bool) -> None:
    """Wait until a machine is stopped, running, healthy or deleted; print its name."""
    with connect() as client:
        params = {"vm": vm_ref, "goal": goal, "timeout_s": timeout}
        _print(client.call("vm.wait", params, Vm), as_json=as_json)


@click.command()
@vms_argument
@json_option
def touch(*, vm_refs: tuple[str, ...], as_json: bool) -> int:
    """Note that machines are in use: auto_stop_stale_after counts from now on."""
    return _each(vm_refs, "vm.touch", {}, quiet=True, as_json=as_json)


@click.command()
@vm_argument
@json_option
def health(*, vm_ref: str, as_json: bool) -> int:
    """Whether a machine is well: process, vCPUs, agent, disk. Status 1 when it is not."""
    with connect() as client:
        report = client.call("vm.health", {"vm": vm_ref}, HealthReport)
    if as_json:
        print_json(report)
    else:
        print_checks(report.checks)
    return 0 if report.healthy else 1


@click.command()
@click.option(
    "--unused-for",
    type=DURATION,
    default="0",
    metavar="DURATION",
    help="Only those that nobody has used for so long, like 24h.",
)
@click.option("-n", "--dry-run", is_flag=True, help="Only say what would be deleted.")
@click.option("-f", "--force", is_flag=True, help="Do not ask.")
@quiet_option
@json_option
def prune(*, unused_for: float, dry_run: bool, force: bool, quiet: bool, as_json: bool) -> int:
    """Delete all machines that do not run, and their disks, for good."""
    params: dict[str, Any] = {"unused_for_s": unused_for}
    with connect() as client:
        if not dry_run and not force:
            candidates = client.call("vm.prune", params | {"dry_run": True}, list[PrunedVm])
            if not _confirmed([each.vm.name for each in candidates]):
                note("nothing was deleted")
                return 1
            params["only"] = [each.vm.id for each in candidates]
        pruned = watched_call(
            client,
            "vm.prune",
            params | {"dry_run": dry_run},
            list[PrunedVm],
            title="prune",
            quiet=quiet,
        )
    return _report_pruned(pruned, dry_run=dry_run, as_json=as_json)


def _confirmed(names: Sequence[str]) -> bool:
    """Ask on the terminal; without one, --force must have said it."""
    if not names:
        return True
    if not sys.stdin.isatty():
        raise click.UsageError("there is no terminal to ask on: add --force, or --dry-run to look")
    note(f"to be deleted with their disks: {', '.join(names)}")
    return click.confirm("go on?", err=True)


def _report_pruned(pruned: list[PrunedVm], *, dry_run: bool, as_json: bool) -> int:
    """Print what became of each; the exit status."""
    gone = [each for each in pruned if each.error is None]
    if as_json:
        print_json(pruned)
    elif gone:
        rows = [(each.vm.name, format_size(each.size_bytes)) for each in gone]
        print_table(("NAME", "SIZE"), rows)
    for each in pruned:
        if (info := each.error) is not None:
            print_error(BangerError(info.message, hint=info.hint, op_id=info.op_id))
    total = format_size(sum(each.size_bytes for each in gone))
    machines = f"{len(gone)} machine{'' if len(gone) == 1 else 's'}"
    note(f"{machines} {'would go' if dry_run else 'deleted'}, {total} of disk")
    return 0 if len(gone) == len(pruned) else 1


def _each(
    vm_refs: tuple[str, ...],
    method: str,
    params: dict[str, Any],
    *,
    quiet: bool,
    as_json: bool,
    cancels: bool = False,
) -> int:
    """Call a method for each, and print the names, or the records, of those it was done to.

    Returns the exit status: an error is printed and does not keep the others from their turn.
    """
    done: list[Vm] = []
    status = 0
    for vm_ref in vm_refs:
        try:
            with connect() as client:
                vm = watched_call(
                    client,
                    method,
                    {"vm": vm_ref, **params},
                    Vm,
                    title=f"vm {vm_ref}",
                    quiet=quiet,
                    cancels=cancels,
                )
        except BangerError as error:
            print_error(error)
            status = 1
            continue
        except KeyboardInterrupt:
            if cancels:
                _tell_state(vm_ref)
            raise
        done.append(vm)
        if not as_json:
            click.echo(vm.name)
    if as_json:
        print_json(done)
    return status


def _tell_state(vm_ref: str) -> None:
    """Say what an interrupted start or restart has left: the machine may have run before."""
    with suppress(BangerError), connect() as client:
        vm = client.call("vm.show", {"vm": vm_ref}, Vm)
        note(f"vm {vm.name} is {vm.runtime.state}")


def _print(vm: Vm, *, as_json: bool) -> None:
    if as_json:
        print_json(vm)
    else:
        click.echo(vm.name)
