"""Templates: made once for each kind of machine, never in the way, and never part of a VM."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from msgspec.structs import replace as replace_record

from banger.base.errors import (
    Ambiguous,
    BadRequest,
    BangerError,
    Cancelled,
    Conflict,
    NotFound,
    Unavailable,
)
from banger.base.model import (
    Image,
    InitMode,
    Kernel,
    NetworkMode,
    Operation,
    OperationState,
    Template,
    Vm,
    VmSpec,
    VmState,
)
from banger.drivers.base import Machine, StateRefused
from banger.guest import requests
from banger.services.capabilities import Start
from banger.services.vm_spec import CreateRequest
from fakes import failing
from records import a_vm
from world import World, ended, made_world


@pytest.fixture
async def world(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    async with made_world(short_path, monkeypatch, template_limit=3) as made:
        yield made


REQUEST = CreateRequest(name="box", image="base")


async def create(world: World, name: str = "box", **fields: object) -> Operation:
    return await ended(world.begin(CreateRequest(name=name, image="base", **fields)))  # type: ignore[arg-type]


def restored(world: World) -> list[Machine]:
    """The machines that were started from a template."""
    private = [
        each.memory_file is not None and each.memory_file.private for each in machines(world)
    ]
    return [each for each, is_private in zip(machines(world), private, strict=True) if is_private]


def machines(world: World) -> list[Machine]:
    return world.hypervisor.machines


async def only_template(world: World) -> Template:
    (template,) = await world.templates.all()
    return template


def template_files(world: World) -> list[Path]:
    return [
        entry
        for parent in (world.paths.templates_dir, world.paths.templates_runtime_dir)
        if parent.is_dir()
        for entry in parent.iterdir()
    ]


# Making and using


async def test_the_first_start_makes_a_template_and_later_ones_use_it(world: World) -> None:
    first, second = await world.create("a"), await world.create("b")
    template = await only_template(world)
    booted, *copies = machines(world)
    assert booted.vm_id == template.id
    assert [each.vm_id for each in copies] == [first.id, second.id]
    assert copies == restored(world)
    assert {each.memory_file for each in copies} == {copies[0].memory_file}
    for vm in (first, second):
        assert vm.runtime.state is VmState.RUNNING
        # The disk of the template, which lies over the image, copied.
        image = await world.images.get("base")
        assert Path(vm.runtime.system_overlay).read_text() == f"{image.rootfs_path} 8192"
    assert not any(str(booted.control_socket) in argv for argv in world.processes.argv.values())
    assert [each.name for each in template_files(world)] == [template.id]


async def test_a_template_knows_nothing_of_any_vm_and_is_told_nothing(world: World) -> None:
    await world.create("a")
    kinds = world.agent.opened
    # The agent is asked whether it is there, and for a first command; the one SETUP is the VM's.
    assert kinds == [requests.Ping.KIND, requests.Exec.KIND, requests.Setup.KIND]


async def test_each_copy_is_told_who_it_is_and_gets_entropy_of_its_own(world: World) -> None:
    for name in ("a", "b"):
        await world.create(name)
    first, second = world.agent.setups
    hostname, machine_id, entropy = 1, 2, 7
    assert (first[hostname], second[hostname]) == (b"a", b"b")
    assert first[machine_id] != second[machine_id]
    assert first[entropy] != second[entropy]
    assert len(first[entropy]) == 256


async def test_many_at_once_share_one_making(world: World) -> None:
    done = await asyncio.gather(*(create(world, f"box-{number}") for number in range(8)))
    assert {each.state for each in done} == {OperationState.COMPLETED}
    assert len(restored(world)) == 8
    assert len(machines(world)) == 9
    assert len(await world.templates.all()) == 1


async def test_cold_makes_and_uses_none(world: World) -> None:
    assert (await create(world, cold=True)).state is OperationState.COMPLETED
    assert restored(world) == []
    assert await world.templates.all() == []


async def test_without_a_limit_there_are_none(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with made_world(short_path, monkeypatch, template_limit=0) as world:
        await world.create()
        assert await world.templates.all() == []


@pytest.mark.parametrize(
    "fields",
    [
        {"vcpu_count": 1},
        {"memory_mib": 256},
        {"network": NetworkMode.NONE},
        {"disk_size_mib": 200},
    ],
    ids=str,
)
async def test_another_kind_of_machine_has_another_template(
    world: World, fields: dict[str, object]
) -> None:
    await world.create("a")
    await world.create("b", **fields)
    await world.create("c", **fields)
    assert len(await world.templates.all()) == 2
    assert len(restored(world)) == 3


async def test_what_changes_below_leads_to_another_template(world: World) -> None:
    await world.create("a")
    world.hypervisor.version = "2"
    await world.create("b")
    assert len(await world.templates.all()) == 2


async def test_each_thing_it_is_made_from_is_in_its_key(world: World) -> None:
    image, kernel = await world.images.get("base"), await world.kernels.get("kernel")
    spec = (await world.create("a", cold=True)).spec

    async def key(image: Image, kernel: Kernel, spec: VmSpec, initramfs: str = "i-1") -> str:
        vm = replace_record(a_vm("box"), spec=spec)
        return await world.templates.key(Start(vm, image, kernel), Path(initramfs))

    keys = [
        await key(image, kernel, spec),
        await key(replace_record(image, id="other"), kernel, spec),
        await key(image, replace_record(kernel, id="other"), spec),
        await key(image, kernel, spec, "i-2"),
        await key(image, kernel, replace_record(spec, system_overlay_size_mib=9999)),
        await key(image, kernel, replace_record(spec, vcpu_count=7)),
    ]
    assert len(set(keys)) == len(keys)
    assert await key(image, kernel, replace_record(spec, ephemeral=True)) == keys[0]


async def test_larger_work_disks_share_a_template_and_grow(world: World) -> None:
    await world.create("usual")
    large = await world.create("large", disk_size_mib=10000)
    assert len(await world.templates.all()) == 1
    usual_disk, large_disk = (
        next(disk for disk in each.disks if disk.name == "work") for each in restored(world)
    )
    assert (usual_disk.size_mib, large_disk.size_mib) == (0, 10000)
    work_size = 10
    assert work_size not in world.agent.setups[0]
    assert int.from_bytes(world.agent.setups[1][work_size], "big") == 10000 << 20
    assert large.spec.disk_size_mib == 10000


async def test_small_work_disks_share_one_of_the_seeds_size(world: World) -> None:
    for name, size_mib in (("a", 200), ("b", 300)):
        await world.create(name, disk_size_mib=size_mib)
    template = await only_template(world)
    assert template.disk_size_mib <= 200


async def test_a_vm_that_has_run_boots_its_own_disks(world: World) -> None:
    vm = await world.create("box")
    disk = Path(vm.runtime.work_disk)
    await world.stop("box")
    disk.write_text("what the guest wrote 8192")
    await world.start("box")
    assert len(restored(world)) == 1
    assert machines(world)[-1].memory_file is None
    assert disk.read_text() == "what the guest wrote 8192"


async def test_a_vm_that_was_only_made_starts_from_a_template(world: World) -> None:
    await world.create("box", start=False)
    assert await world.templates.all() == []
    vm = await world.start("box")
    assert [each.vm_id for each in restored(world)] == [vm.id]
    assert vm.runtime.state is VmState.RUNNING


async def test_start_takes_cold_for_it(world: World) -> None:
    await world.create("box", start=False)
    await world.start("box", cold=True)
    assert restored(world) == []


# Never in the way


async def test_a_template_that_cannot_be_made_is_a_line_and_a_boot(world: World) -> None:
    world.hypervisor.save_gate.fail = Unavailable("no room")
    done = await create(world)
    assert done.state is OperationState.COMPLETED
    (line,) = done.notes
    assert line == "no template for this machine, it boots: no room"
    assert template_files(world) == []
    assert [argv[0] for argv in world.processes.argv.values()].count("machine") == 1
    # For a while nobody tries again.
    world.hypervisor.save_gate.fail = None
    done = await create(world, "other")
    assert "no room" in done.notes[0]
    assert await world.templates.all() == []


async def test_a_template_of_a_guest_that_does_not_come_up_leaves_nothing(world: World) -> None:
    world.hypervisor.boots = False
    world.hypervisor.console = b"[1.0] panic\x1b: no root\n"
    done = await create(world)
    assert done.state is OperationState.FAILED  # neither does the VM
    assert "panic?: no root" in done.notes[0]
    assert template_files(world) == []


async def test_a_restore_that_fails_is_a_line_and_a_boot_on_disks_of_its_own(world: World) -> None:
    world.hypervisor.restore_gate.fail = StateRefused("load of migration failed")
    done = await create(world)
    assert done.state is OperationState.COMPLETED
    assert done.notes == (
        "starting from a template failed, the machine boots: load of migration failed",
    )
    assert done.vm is not None
    assert world.liveness.vm_alive(done.vm)
    assert restored(world) == []
    assert await world.templates.all() == []  # it is of no use to anybody
    assert template_files(world) == []
    again = await create(world, "again")
    assert "load of migration failed" in again.notes[0]
    assert len(machines(world)) == 3  # no other was made


async def test_a_vm_that_was_only_made_boots_when_a_restore_fails(world: World) -> None:
    await world.create("box", start=False)
    world.hypervisor.restore_gate.fail = StateRefused("no")
    vm = await world.start("box")
    assert vm.runtime.state is VmState.RUNNING
    assert Path(vm.runtime.work_disk).read_text().endswith(" 8192")


async def test_disks_that_cannot_be_copied_are_made(world: World) -> None:
    world.storage.copy_gate.fail = failing("disk full")
    done = await create(world)
    assert done.state is OperationState.COMPLETED
    assert "disk full" in done.notes[0]
    assert len(await world.templates.all()) == 1  # which is not to blame


async def test_a_time_limit_that_is_too_short_costs_nobody_the_template(world: World) -> None:
    await world.create("a")
    world.agent.exits[requests.Setup.KIND] = None  # no answer, for a while
    asyncio.get_running_loop().call_later(0.9, world.agent.exits.clear)
    done = await create(world, "b", boot_timeout_s=1)
    assert "longer than 1 s" in done.notes[0]
    assert len(await world.templates.all()) == 1


async def test_a_template_whose_files_are_gone_is_made_again(world: World) -> None:
    await world.create("a")
    first = await only_template(world)
    world.paths.template(first.id).memory.unlink()
    done = await create(world, "b")
    assert done.notes == ()
    second = await only_template(world)
    assert second.id != first.id
    assert [each.name for each in template_files(world)] == [second.id]


async def test_killed_while_it_is_restored_it_does_not_boot_after_all(world: World) -> None:
    await world.create("a")
    await world.create("box", start=False)
    world.agent.exits[requests.Setup.KIND] = None  # never answers
    opened = len(world.agent.opened)
    starting = asyncio.create_task(world.start("box"))
    async with asyncio.timeout(10):
        while len(world.agent.opened) == opened:
            await asyncio.sleep(0.01)
    launched = len(machines(world))
    await world.kill("box")
    with pytest.raises(Cancelled):
        await starting
    assert len(machines(world)) == launched
    assert (await world.vms.show("box")).runtime.state is VmState.STOPPED
    assert len(await world.templates.all()) == 1


async def test_killed_while_a_template_is_made_for_it_it_ends_at_once(world: World) -> None:
    await world.create("box", start=False)
    world.hypervisor.save_gate.block = True
    starting = asyncio.create_task(world.start("box"))
    await world.hypervisor.save_gate.reached.wait()
    async with asyncio.timeout(5):
        await world.kill("box")
    with pytest.raises(Cancelled):
        await starting
    assert (await world.vms.show("box")).runtime.state is VmState.STOPPED
    assert template_files(world) == []


async def test_a_template_that_takes_too_long_is_not_waited_for(world: World) -> None:
    world.hypervisor.save_gate.block = True
    done = await create(world, boot_timeout_s=1)
    assert done.state is OperationState.COMPLETED
    assert done.notes == ("no template within 1 s, the machine boots",)
    assert template_files(world) == []


async def test_a_vm_whose_first_start_failed_keeps_its_disks(world: World) -> None:
    vm = await world.create("box", start=False)
    world.agent.exits[requests.Setup.KIND] = b"\2\0\0\0\5no"
    with pytest.raises(BangerError):
        await world.start("box", boot_timeout_s=1, cold=True)
    disk = Path(vm.runtime.work_disk)
    disk.write_text("what the guest wrote 8192")
    world.agent.exits.clear()
    await world.start("box")
    assert restored(world) == []
    assert disk.read_text() == "what the guest wrote 8192"


async def test_machines_of_systemd_boot(world: World) -> None:
    done = await create(world, init=InitMode.SYSTEMD)
    assert (done.state, done.notes) == (OperationState.COMPLETED, ())
    assert await world.templates.all() == []


async def test_a_host_without_a_network_is_not_the_templates_fault(world: World) -> None:
    await world.create("a")
    world.network.gate.fail = Unavailable("passt does not start")
    asyncio.get_running_loop().call_later(0.3, setattr, world.network.gate, "fail", None)
    done = await create(world, "b")
    assert "passt does not start" in str(done.notes) + str(done.error)
    assert len(await world.templates.all()) == 1


async def test_guests_that_do_not_come_up_twice_cost_the_template(world: World) -> None:
    await world.create("a")
    for name in ("b", "c"):
        assert len(await world.templates.all()) == 1
        world.agent.exits[requests.Setup.KIND] = b"\x02\x00\x00\x00\x05broken"
        failed = await create(world, name)
        assert failed.error is not None
        world.agent.exits.clear()
    assert await world.templates.all() == []


async def test_cancelled_while_a_template_is_made_nothing_of_either_is_left(world: World) -> None:
    world.hypervisor.save_gate.block = True
    creation = world.begin(REQUEST)
    await world.hypervisor.save_gate.reached.wait()
    await world.operations.cancel(creation.record.id)
    await world.assert_nothing_left()
    assert template_files(world) == []
    assert {each.state for each in world.operations.all()} == {OperationState.CANCELLED}


async def test_one_that_goes_leaves_the_making_to_others(world: World) -> None:
    world.hypervisor.save_gate.block = True
    first = world.begin(REQUEST)
    await world.hypervisor.save_gate.reached.wait()
    second = world.begin(CreateRequest(name="other", image="base"))
    async with asyncio.timeout(20):
        while "save" not in second.record.detail:  # it hears of the making that it has joined
            await asyncio.sleep(0.01)
    await world.operations.cancel(first.record.id)
    making = [each for each in world.operations.all() if each.kind == "template.make"]
    assert [each.state for each in making] == [OperationState.RUNNING]
    await world.operations.cancel(second.record.id)
    assert template_files(world) == []


async def test_a_cancelled_making_is_no_reason_to_go_without(world: World) -> None:
    """Somebody ended the operation itself: this machine boots, the next one tries again."""
    world.hypervisor.save_gate.block = True
    creation = world.begin(REQUEST)
    await world.hypervisor.save_gate.reached.wait()
    (making,) = (each for each in world.operations.all() if each.kind == "template.make")
    await world.operations.cancel(making.id)
    done = await ended(creation)
    assert done.state is OperationState.COMPLETED
    world.hypervisor.save_gate.block = False
    assert (await create(world, "next")).notes == ()
    assert len(await world.templates.all()) == 1


async def test_memory_that_the_host_has_not_is_not_looked_for_on_its_disk(world: World) -> None:
    done = await create(world, memory_mib=10 << 20)
    assert "has less than 10485760 MiB of memory" in done.notes[0]
    (booted,) = machines(world)
    assert booted.memory_file is None


# Bounds


async def test_the_one_that_was_used_longest_ago_is_evicted(world: World) -> None:
    for name, vcpu_count in (("a", 1), ("b", 2), ("c", 3), ("again", 1), ("d", 4)):
        await world.create(name, vcpu_count=vcpu_count)
    assert [each.vcpu_count for each in await world.templates.all()] == [4, 1, 3]
    assert len(template_files(world)) == 3


async def test_what_is_evicted_no_longer_counts(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = iter([1 << 30, 7 << 30, 2 << 30])
    monkeypatch.setattr("banger.services.templates.allocated_bytes", lambda _: next(sizes))
    async with made_world(short_path, monkeypatch, template_limit=9) as world:
        for name, vcpu_count in (("a", 1), ("b", 2), ("c", 3)):
            await world.create(name, vcpu_count=vcpu_count)
        assert [each.vcpu_count for each in await world.templates.all()] == [3, 1]


async def test_a_lower_limit_holds_from_the_next_start_of_the_daemon_on(world: World) -> None:
    for name, vcpu_count in (("a", 1), ("b", 2)):
        await world.create(name, vcpu_count=vcpu_count)
    world.config = replace(world.config, template_limit=0)
    following = await world.restarted()
    await following.reconcile()
    assert await following.templates.all() == []
    assert template_files(following) == []
    await following.close()


async def test_one_that_goes_between_lookup_and_use_is_no_scandal(world: World) -> None:
    await world.create("a")
    template = await only_template(world)
    await world.templates.delete(template.id)
    with pytest.raises(NotFound, match="removed meanwhile"), world.templates.in_use(template):
        pass
    assert world.templates._users == {}


async def test_they_are_bounded_in_bytes_but_the_newest_stays(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "banger.services.templates.allocated_bytes", lambda _: 5 << 30, raising=True
    )
    async with made_world(short_path, monkeypatch, template_limit=9) as world:
        for name, vcpu_count in (("a", 1), ("b", 2)):
            await world.create(name, vcpu_count=vcpu_count)
        assert [each.vcpu_count for each in await world.templates.all()] == [2]


async def test_one_that_a_machine_is_started_from_is_neither_evicted_nor_deleted(
    world: World,
) -> None:
    await world.create("a", vcpu_count=1)
    template = await only_template(world)
    with world.templates.in_use(template):
        for name, vcpu_count in (("b", 2), ("c", 3), ("d", 4)):
            await world.create(name, vcpu_count=vcpu_count)
        assert template.id in [each.id for each in await world.templates.all()]
        with pytest.raises(Conflict):
            await world.templates.delete(template.id)
        assert template.id not in [
            each.id for each in await world.templates.prune(everything=True, dry_run=True)
        ]
    assert (await world.templates.delete(template.id)).id == template.id


# Looking and removing


async def test_a_reference_is_an_id_or_its_beginning(world: World) -> None:
    for name, vcpu_count in (("a", 1), ("b", 2)):
        await world.create(name, vcpu_count=vcpu_count)
    first, second = await world.templates.all()
    assert await world.templates.resolve(first.id) == first
    with pytest.raises(BadRequest):
        await world.templates.resolve("")
    with pytest.raises(NotFound, match='template "zz" not found'):
        await world.templates.resolve("zz")
    common = next((one for one in "0123456789abcdef" if first.id[0] == second.id[0] == one), "")
    if common:
        with pytest.raises(Ambiguous):
            await world.templates.resolve(common)
    else:
        assert await world.templates.resolve(second.id[0]) == second


async def test_prune_takes_what_no_start_would_use(world: World) -> None:
    await world.create("a")
    assert await world.templates.prune(everything=False, dry_run=False) == []
    world.hypervisor.version = "2"
    old = await only_template(world)
    assert await world.templates.prune(everything=False, dry_run=True) == [old]
    assert await world.templates.all() == [old]
    assert await world.templates.prune(everything=False, dry_run=False) == [old]
    assert await world.templates.all() == []
    assert template_files(world) == []


async def test_prune_all_takes_all_and_vms_run_on(world: World) -> None:
    vm = await world.create("a")
    assert len(await world.templates.prune(everything=True, dry_run=False)) == 1
    assert world.liveness.vm_alive(vm)
    await world.stop("a")
    assert (await world.start("a")).runtime.state is VmState.RUNNING


async def test_an_image_takes_its_templates_with_it(world: World) -> None:
    image = await world.images.get("base")
    await world.create("a")
    await world.delete("a", force=True)
    await world.images.delete("base")
    await world.templates.forget_image(image.id)
    assert await world.templates.all() == []
    assert template_files(world) == []


# The next daemon


async def test_a_daemon_that_died_while_it_made_one_leaves_nothing(world: World) -> None:
    world.hypervisor.save_gate.block = True
    world.begin(REQUEST)
    await world.hypervisor.save_gate.reached.wait()
    (machine,) = machines(world)
    argv = ("machine", str(machine.control_socket))
    following = await world.restarted()
    # As after SIGKILL: the machine of the template runs, and its directories are there.
    machine.control_socket.parent.mkdir(parents=True)
    pid = world.processes.start(*argv)
    staging = world.paths.templates_dir / ".staging-0123"
    staging.mkdir(parents=True)
    (staging / ".unrecorded").touch()
    (staging / "memory").write_bytes(b"half")
    await following.reconcile()
    assert not world.processes.alive(pid)
    assert template_files(following) == []
    await following.close()


async def test_templates_outlive_the_daemon_but_not_their_image(world: World) -> None:
    await world.create("a")
    template = await only_template(world)
    following = await world.restarted()
    await following.reconcile()
    assert [each.id for each in await following.templates.all()] == [template.id]
    await following.store.delete_image(template.image_id)
    last = await following.restarted()
    await last.reconcile()
    assert await last.templates.all() == []
    assert template_files(last) == []
    await last.close()


def test_a_vm_says_nothing_of_a_template() -> None:
    """So none can keep one alive, and none is lost with one."""
    assert not [field for field in Vm.__struct_fields__ if "template" in field]


async def test_a_template_whose_machine_nobody_can_end_stays_to_be_found(world: World) -> None:
    world.hypervisor.gate.fail = Unavailable("no helper")
    world.hypervisor.unclearable = True
    await create(world)
    (directory,) = world.paths.templates_runtime_dir.iterdir()
    assert directory / "control.sock" in world.hypervisor.cleared
