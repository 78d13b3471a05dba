"""`banger vm publish`, `unpublish` and `ports`: ports of the host that lead into guests."""

from __future__ import annotations

import click
import msgspec

from banger.base.model import PublishedPort, Vm, VmState
from banger.base.ports import (
    GuestPort,
    HostPort,
    format_address,
    is_loopback,
    parse_host_port,
    parse_port,
)
from banger.cli.app import (
    Checked,
    connect,
    json_option,
    note,
    optional_vm_argument,
    vm_argument,
)
from banger.cli.render import print_json, print_table

PORT = Checked("port", parse_port)

publish_option = click.option(
    "-p",
    "--publish",
    "ports",
    type=PORT,
    multiple=True,
    metavar="[HOST:]PORT[:GUEST]",
    help="Let a port of this host lead to one of its own; may be repeated.",
)


@click.command()
@vm_argument
@click.argument("port", metavar="[HOST:]PORT[:GUEST]", type=PORT)
@json_option
def publish(*, vm_ref: str, port: PublishedPort, as_json: bool) -> None:
    """Let a port of this host lead to one of a machine's.

    PORT is the host's, GUEST the machine's when it is another; 0:GUEST takes any free one. The
    address that is listened at is printed. HOST is 127.0.0.1 unless given: only this host gets in.
    """
    with connect() as client:
        params = {"vm": vm_ref, "port": msgspec.to_builtins(port)}
        made = client.call("vm.publish", params, Vm)
    published = _found(made, port)
    if as_json:
        print_json(made)
    else:
        click.echo(format_address(published.host, published.host_port))
    if made.runtime.state is not VmState.RUNNING:
        note(f"vm {made.name} is {made.runtime.state}: the port opens when it starts")
    _warn_if_open(published)


def _found(vm: Vm, wanted: PublishedPort) -> PublishedPort:
    """The port as it is on the record: new ones are last, and any free one has got a number."""
    for port in reversed(vm.spec.published_ports):
        given = msgspec.structs.replace(wanted, host_port=wanted.host_port or port.host_port)
        if port == given:
            return port
    return wanted  # somebody has unpublished it meanwhile


def note_ports(vm: Vm) -> None:
    """Say where the ports of a new machine are."""
    leads = "leads" if vm.runtime.state is VmState.RUNNING else "will lead, once it runs,"
    for port in vm.spec.published_ports:
        where = format_address(port.host, port.host_port)
        note(f"{where} {leads} to port {port.guest_port} of vm {vm.name}")
        _warn_if_open(port)


def _warn_if_open(port: PublishedPort) -> None:
    if not is_loopback(port.host):
        where = format_address(port.host, port.host_port)
        note(f"{where} is open to everybody who reaches this host, not to its users alone")


@click.command()
@vm_argument
@click.argument("port", metavar="[HOST:]PORT", type=Checked("port", parse_host_port))
@json_option
def unpublish(*, vm_ref: str, port: tuple[str, int], as_json: bool) -> None:
    """Close a published port, with its connections."""
    host, host_port = port
    with connect() as client:
        params = {"vm": vm_ref, "host": host, "host_port": host_port}
        made = client.call("vm.unpublish", params, Vm)
    if as_json:
        print_json(made)
    else:
        click.echo(made.name)


@click.command()
@optional_vm_argument
@json_option
def ports(*, vm_ref: str, as_json: bool) -> None:
    """What listens in machines, and how to reach it from this host.

    Of one machine, or of all that run.
    """
    with connect() as client:
        found = client.call("vm.ports", {"vm": vm_ref}, list[GuestPort])
    if as_json:
        print_json(found)
        return
    print_table(
        ("VM", "PORT", "LISTENS AT", "COMMAND", "FROM THIS HOST"),
        [
            (
                each.vm_name,
                str(each.guest_port),
                ", ".join(dict.fromkeys(socket.address for socket in each.sockets)) or "-",
                ", ".join(dict.fromkeys(filter(None, (at.command for at in each.sockets)))) or "-",
                _how_to_reach(each),
            )
            for each in found
        ],
    )


def _how_to_reach(port: GuestPort) -> str:
    ways = ", ".join(map(_way, port.published))
    if own := port.automatic:
        ways = ", ".join(filter(None, (_way(own, f"{port.vm_name}.vm"), ways)))
    if port.problem:
        return f"{ways}: {port.problem}" if ways else f"not from outside: {port.problem}"
    return ways or f"not published: banger vm publish {port.vm_name} {_proposal(port.guest_port)}"


def _way(port: HostPort, name: str = "") -> str:
    where = format_address(port.host, port.host_port)
    remark = port.problem or name
    return f"{where} ({remark})" if remark else where


def _proposal(guest_port: int) -> str:
    """Ports below 1024 are root's on the host: what people take for 80 is 8080."""
    return f"{guest_port + 8000}:{guest_port}" if guest_port < 1024 else str(guest_port)
