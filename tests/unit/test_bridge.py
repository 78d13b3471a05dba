"""The bridge driver: what it asks of whoever has the privileges, and when."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from banger.base.errors import BangerError, Unavailable
from banger.base.model import Egress, Reach
from banger.drivers.base import Level, Plug, Plugged
from banger.drivers.network import bridge
from banger.drivers.network.bridge import BridgeNetwork
from banger.hostops.client import HelperHost
from banger.hostops.ops import (
    BridgeUp,
    Done,
    Guest,
    OpenTap,
    Operation,
    SetGuests,
    bridge_of,
)
from banger.services.addresses import Addresses

BRIDGE = bridge_of("banger0", "10.99.0.0/24")
OPEN = Reach()
CLOSED = Reach(egress=Egress.NONE)


class Host:
    """Notes what is asked of it; every tap is a descriptor that can be closed."""

    problem = ""
    hint = ""
    installed = False

    def __init__(self) -> None:
        self.asked: list[Operation] = []
        #: What is refused from now on, and for how many times.
        self.refuses: dict[type[Operation], int] = {}
        #: What is done, and its answer lost.
        self.loses: dict[type[Operation], int] = {}
        self.descriptors: list[int] = []

    async def perform(self, operation: Operation) -> Done:
        operation.check()
        kind = type(operation)
        if self.refuses.get(kind, 0):
            self.refuses[kind] -= 1
            raise Unavailable(f"no {kind.__name__}")
        self.asked.append(operation)
        if self.loses.get(kind, 0):
            self.loses[kind] -= 1
            raise Unavailable(f"the answer of {kind.__name__} is lost")
        if isinstance(operation, OpenTap):
            self.descriptors.append(os.open(os.devnull, os.O_RDONLY))
            name = f"{operation.bridge}-{len(self.descriptors):06x}"
            return Done(name=name, fd=self.descriptors[-1])
        return Done()

    def kinds(self) -> list[str]:
        return [type(each).__name__ for each in self.asked]

    @property
    def guests(self) -> tuple[Guest, ...]:
        """Who is let through, as was asked for last."""
        last = [each for each in self.asked if isinstance(each, SetGuests)][-1]
        return last.guests

    def open_taps(self) -> int:
        return sum(Path(f"/proc/self/fd/{each}").exists() for each in set(self.descriptors))


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
async def network(host: Host) -> AsyncIterator[BridgeNetwork]:
    made = BridgeNetwork(host, BRIDGE, Addresses({}), pool_size=0)
    yield made
    await made.close()


def plug(vm_id: str, number: int, reach: Reach = OPEN) -> Plug:
    return Plug(vm_id, Path("/nowhere"), reach, f"10.99.0.{number}")


async def join(network: BridgeNetwork, vm_id: str, number: int, reach: Reach = OPEN) -> Plugged:
    """A machine that runs: its end of the tap is closed here."""
    attachment = await network.attach(plug(vm_id, number, reach))
    os.close(attachment.fd)
    return Plugged(vm_id, reach, f"10.99.0.{number}", attachment.tap)


async def test_the_bridge_comes_with_the_first_machine(host: Host, network: BridgeNetwork) -> None:
    attachment = await network.attach(plug("one", 10, CLOSED))
    os.close(attachment.fd)
    assert host.kinds() == ["BridgeUp", "SetGuests", "OpenTap", "SetGuests"]
    assert attachment.guest.address == "10.99.0.10/24"
    assert (attachment.guest.gateway, attachment.guest.dns) == ("10.99.0.1", "10.99.0.1")
    (guest,) = host.guests
    assert (guest.tap, guest.mac) == (attachment.tap, attachment.guest.mac)
    assert not guest.everywhere
    host.asked.clear()
    await join(network, "two", 11)
    assert host.kinds() == ["OpenTap", "SetGuests"]
    assert len(host.guests) == 2


async def test_it_goes_with_the_daemon_when_nobody_is_on_it(
    host: Host, network: BridgeNetwork
) -> None:
    await join(network, "one", 10)
    await network.close()
    assert "BridgeDown" not in host.kinds()
    await network.detach("one")
    assert host.guests == ()
    await network.detach("one")  # again: nothing
    await network.close()
    assert host.kinds()[-2:] == ["SetGuests", "BridgeDown"]


async def test_a_machine_that_is_not_let_through_has_no_tap(
    host: Host, network: BridgeNetwork
) -> None:
    await join(network, "one", 10)
    host.refuses[SetGuests] = 2
    with pytest.raises(BangerError, match="no SetGuests"):
        await network.attach(plug("two", 11))
    assert host.open_taps() == 0
    await network.detach("two")
    await join(network, "three", 12)
    assert [each.address for each in host.guests] == ["10.99.0.10", "10.99.0.12"]


async def test_tables_that_somebody_emptied_are_made_again(
    host: Host, network: BridgeNetwork
) -> None:
    await join(network, "one", 10)
    host.asked.clear()
    host.refuses[SetGuests] = 1
    await join(network, "two", 11)
    assert host.kinds() == ["OpenTap", "BridgeUp", "SetGuests"]
    assert len(host.guests) == 2


async def test_tables_are_set_again_while_a_machine_needs_them(
    host: Host, network: BridgeNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge, "_RENEW_S", 0.0)
    await join(network, "one", 10)
    host.asked.clear()
    host.refuses[BridgeUp] = 1  # the helper is just starting, say
    async with asyncio.timeout(5):
        while host.kinds()[-2:] != ["BridgeUp", "SetGuests"]:
            await asyncio.sleep(0)
    await network.detach("one")
    host.asked.clear()
    for _ in range(10):
        await asyncio.sleep(0)
    assert host.asked == []


async def test_what_changes_is_told_and_forgets_what_names_led_to(
    host: Host, network: BridgeNetwork
) -> None:
    machine = await join(network, "one", 10)
    host.asked.clear()
    await network.apply(machine)  # as it is
    assert host.asked == []
    reach = Reach(egress=Egress.ALLOWLIST, allow=("10.0.0.0/8", "example.org"), isolated=False)
    await network.apply(Plugged("one", reach, machine.address, machine.tap))
    (change,) = host.asked
    assert isinstance(change, SetGuests)
    assert change.forget == (machine.address,)
    (guest,) = change.guests
    assert (guest.everywhere, guest.allow, guest.sociable) == (False, ("10.0.0.0/8",), True)


async def test_a_change_that_fails_is_none(host: Host, network: BridgeNetwork) -> None:
    machine = await join(network, "one", 10)
    host.refuses[SetGuests] = 2
    with pytest.raises(BangerError):
        await network.apply(Plugged("one", CLOSED, machine.address, machine.tap))
    await join(network, "two", 11)
    assert [each.everywhere for each in host.guests] == [True, True]


async def test_machines_that_a_daemon_finds_are_let_through_all_at_once(host: Host) -> None:
    network = BridgeNetwork(host, BRIDGE, Addresses({}), pool_size=0)
    found = [Plugged(f"vm-{n}", OPEN, f"10.99.0.{n}", f"banger0-{n:06x}") for n in (10, 11, 12)]
    await network.resume(found)
    assert host.kinds() == ["BridgeUp", "SetGuests"]
    assert len(host.guests) == 3
    await network.close()
    assert "BridgeDown" not in host.kinds()


async def test_a_few_taps_wait_and_are_closed_at_the_end(host: Host) -> None:
    network = BridgeNetwork(host, BRIDGE, Addresses({}), pool_size=2)
    await join(network, "one", 10)
    assert network._filling is not None
    await network._filling
    assert host.open_taps() == 2
    host.asked.clear()
    await join(network, "two", 11)
    assert host.kinds()[0] == "SetGuests"  # its tap was there
    await network.close()
    assert host.open_taps() == 0


async def test_a_machine_can_have_an_interface_that_leads_nowhere(
    host: Host, network: BridgeNetwork
) -> None:
    async with network.unplugged() as nowhere:
        os.close(nowhere.fd)
    assert host.guests == ()


async def test_without_privileges_it_says_what_to_do() -> None:
    network = BridgeNetwork(HelperHost(Path("/nowhere")), BRIDGE, Addresses({}), pool_size=0)
    (check,) = await network.checks()
    assert check.level is Level.FAIL
    assert "system install; or do without: --network user" in check.hint
    await network.resume([])
    with pytest.raises(BangerError, match="needs root"):
        await network.attach(plug("one", 10))
    await network.close()


async def test_a_change_whose_end_is_not_known_is_made_again_when_it_is_taken_back(
    host: Host, network: BridgeNetwork
) -> None:
    """A helper that dies after it has done it, and a client that was cancelled, look like that."""
    machine = await join(network, "one", 10, CLOSED)
    host.loses[SetGuests] = 2
    with pytest.raises(BangerError):
        await network.apply(Plugged("one", OPEN, machine.address, machine.tap))
    assert [each.everywhere for each in host.guests] == [True]  # so it is, and nobody was told
    host.asked.clear()
    await network.apply(machine)
    assert [each.everywhere for each in host.guests] == [False]


async def test_an_answer_that_comes_too_late_opens_nothing(
    host: Host, network: BridgeNetwork
) -> None:
    allowed = Reach(egress=Egress.ALLOWLIST, allow=("example.org",))
    machine = await join(network, "one", 10, allowed)
    asked = network._may_ask(machine.address)
    assert asked is not None
    await network._let_through(machine.address, asked, [("192.0.2.1", 60)])
    assert host.kinds()[-1] == "AllowResolved"
    host.asked.clear()
    for reach in (CLOSED, Reach(egress=Egress.ALLOWLIST, allow=("other.example.org",))):
        await network.apply(Plugged("one", reach, machine.address, machine.tap))
        with pytest.raises(BangerError, match="changed meanwhile"):
            await network._let_through(machine.address, asked, [("192.0.2.1", 60)])
    await network.detach("one")
    with pytest.raises(BangerError, match="changed meanwhile"):
        await network._let_through(machine.address, asked, [("192.0.2.1", 60)])
    assert "AllowResolved" not in host.kinds()


async def test_a_bridge_that_could_not_go_on_comes_with_the_next_machine(host: Host) -> None:
    network = BridgeNetwork(host, BRIDGE, Addresses({}), pool_size=0)
    found = [Plugged("vm-10", CLOSED, "10.99.0.10", "banger0-00000a")]
    host.refuses[BridgeUp] = 1
    with pytest.raises(BangerError):
        await network.resume(found)
    await network.apply(found[0])
    assert [each.address for each in host.guests] == ["10.99.0.10"]
    await join(network, "two", 11)
    assert "BridgeUp" in host.kinds()
    assert [each.address for each in host.guests] == ["10.99.0.10", "10.99.0.11"]
    await network.close()


async def test_what_names_led_to_is_forgotten_of_machines_that_may_ask_none(host: Host) -> None:
    """A daemon may have died between a record and what it says."""
    network = BridgeNetwork(host, BRIDGE, Addresses({}), pool_size=0)
    allowed = Reach(egress=Egress.ALLOWLIST, allow=("example.org",))
    found = [
        Plugged("vm-10", CLOSED, "10.99.0.10", "banger0-00000a"),
        Plugged("vm-11", allowed, "10.99.0.11", "banger0-00000b"),
    ]
    await network.resume(found)
    last = host.asked[-1]
    assert isinstance(last, SetGuests)
    assert last.forget == ("10.99.0.10",)
    await network.close()


async def test_machines_of_another_bridge_keep_nobody_off_this_one(host: Host) -> None:
    """Settings were changed while they ran."""
    network = BridgeNetwork(host, BRIDGE, Addresses({}), pool_size=0)
    await network.resume(
        [
            Plugged("vm-10", OPEN, "10.55.0.10", "banger0-00000a"),
            Plugged("vm-11", OPEN, "10.99.0.11", "banger1-00000b"),
            Plugged("vm-12", OPEN, "10.99.0.12", "banger0-00000c"),
        ]
    )
    assert [each.address for each in host.guests] == ["10.99.0.12"]
    await network.apply(Plugged("vm-10", CLOSED, "10.55.0.10", "banger0-00000a"))
    assert [each.address for each in host.guests] == ["10.99.0.12"]
    await network.close()
