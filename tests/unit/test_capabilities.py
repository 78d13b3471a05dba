"""Hooks: all in order, clean-up in reverse order and to its end, changes all or none."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from banger.base.errors import BangerError, Conflict
from banger.base.model import Vm
from banger.drivers.base import Check, Level
from banger.services.capabilities import Capabilities, Capability, Start
from banger.services.vm_spec import CreateRequest
from fakes import descriptors, failing
from records import a_kernel, a_vm, an_image
from world import World, ended, made_world


class Recording(Capability):
    """Writes down what is called, and fails where it is told to."""

    def __init__(self, name: str, calls: list[str], fails: frozenset[str] = frozenset()) -> None:
        self.name = name
        self._calls = calls
        self._fails = fails

    def _called(self, hook: str) -> None:
        self._calls.append(f"{self.name}.{hook}")
        if hook in self._fails:
            raise failing(f"{self.name} cannot {hook}")

    async def add_start_prereqs(self, start: Start) -> list[Check]:
        self._called("prereqs")
        return [Check(self.name, Level.OK, "")]

    async def create(self, start: Start) -> None:
        self._called("create")

    async def prepare_host(self, start: Start) -> None:
        self._called("prepare")

    def contribute_machine(self, start: Start) -> None:
        self._called("machine")

    def contribute_guest(self, start: Start) -> None:
        self._called("guest")

    async def post_start(self, vm: Vm) -> None:
        self._called("post_start")

    async def apply_config_changes(self, before: Vm, after: Vm) -> None:
        self._called(f"apply {before.name}>{after.name}")
        if "apply" in self._fails and after.name == "new":
            raise Conflict(f"{self.name} refuses")

    async def cleanup(self, vm: Vm) -> None:
        self._called("cleanup")


def three(calls: list[str], **fails: str) -> Capabilities:
    """a, b and c; ``b="cleanup"`` fails there."""
    return Capabilities(
        [Recording(name, calls, frozenset(fails.get(name, "").split())) for name in "abc"]
    )


START = Start(a_vm("box"), an_image("base"), a_kernel())


async def test_the_host_is_prepared_for_all_before_the_machine_and_the_guest_are_described() -> (
    None
):
    calls: list[str] = []
    await three(calls).prepare_host(START)
    assert calls == [f"{name}.{hook}" for hook in ("prepare", "machine", "guest") for name in "abc"]


async def test_what_fails_keeps_the_rest_from_being_prepared() -> None:
    calls: list[str] = []
    with pytest.raises(BangerError, match="b cannot prepare"):
        await three(calls, b="prepare").prepare_host(START)
    assert calls == ["a.prepare", "b.prepare"]


@pytest.mark.parametrize("failing_ones", ["", "a", "b", "c", "ab", "abc"])
async def test_clean_up_goes_in_reverse_order_to_its_end_and_tells_of_the_first_failure(
    failing_ones: str,
) -> None:
    calls: list[str] = []
    capabilities = three(calls, **dict.fromkeys(failing_ones, "cleanup"))
    if failing_ones:
        with pytest.raises(BangerError, match=f"{failing_ones[-1]} cannot cleanup"):
            await capabilities.cleanup(a_vm("box"))
    else:
        await capabilities.cleanup(a_vm("box"))
    assert calls == ["c.cleanup", "b.cleanup", "a.cleanup"]


async def test_a_change_that_one_refuses_is_taken_back_from_all_in_reverse_order() -> None:
    calls: list[str] = []
    with pytest.raises(Conflict, match="b refuses"):
        await three(calls, b="apply").apply_config_changes(a_vm("old"), a_vm("new"))
    assert calls == [
        "a.apply old>new",
        "b.apply old>new",
        "b.apply new>old",
        "a.apply new>old",
    ]


async def test_a_daemon_that_finds_a_vm_running_resumes_all_it_can() -> None:
    calls: list[str] = []
    await three(calls, a="post_start", b="post_start").resume(a_vm("box"))
    assert calls == ["a.post_start", "b.post_start", "c.post_start"]


async def test_a_disk_that_fails_is_told_of_when_the_others_are_done() -> None:
    calls: list[str] = []
    with pytest.raises(BangerError, match="a cannot create"):
        await three(calls, a="create").create(START)
    assert sorted(calls) == ["a.create", "b.create", "c.create"]


@pytest.fixture
async def world(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    async with made_world(short_path, monkeypatch) as made:
        yield made


class Stubborn(Capability):
    name = "stubborn"

    async def cleanup(self, vm: Vm) -> None:
        raise failing("it will not go")


async def test_a_clean_up_that_fails_keeps_the_handles_so_that_it_can_be_done_again(
    world: World,
) -> None:
    vm = await world.create()
    world.capabilities._all = (*world.capabilities._all, Stubborn())
    network_pid = world.handles.get(vm.id).network[0].pid
    with pytest.raises(BangerError, match="it will not go"):
        await world.stop("box")
    assert not world.processes.alive(network_pid)  # the others had their turn
    assert world.paths.vm(vm.id).handles.exists()
    shown = await world.vms.show("box")
    assert shown.runtime.state == "stopped"  # whatever the record says: nothing runs
    world.capabilities._all = world.capabilities._all[:-1]
    await world.stop("box")
    assert not world.paths.vm(vm.id).handles.exists()
    await world.delete("box")
    await world.assert_nothing_left()


async def test_a_machine_that_was_never_launched_leaves_no_descriptor_open(world: World) -> None:
    class Late(Capability):
        name = "late"

        async def prepare_host(self, start: Start) -> None:
            raise failing("too late")

    world.capabilities._all = (*world.capabilities._all, Late())
    before = descriptors()
    done = await ended(world.begin(CreateRequest(name="box", image="base")))
    assert done.error is not None
    assert done.error.message == "too late"
    assert await world.store.vms() == []
    assert descriptors() == before  # its closed end is what ends the network's process
