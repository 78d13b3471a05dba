"""The next daemon: what runs is kept, what is gone is said to be, what nobody owns is removed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from banger.base.errors import PreconditionFailed
from banger.base.model import ProcessId, VmState
from fakes import Hypervisor
from records import a_vm
from world import World, made_world


@pytest.fixture
async def world(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    async with made_world(short_path, monkeypatch) as made:
        yield made


async def next_daemon(world: World) -> World:
    following = await world.restarted()
    await following.reconcile()
    return following


async def test_a_vm_that_runs_is_kept_reachable_and_watched(world: World) -> None:
    vm = await world.create()
    pid = world.liveness.pid(vm)
    following = await next_daemon(world)
    (kept,) = await following.vms.all()
    assert kept == vm
    assert following.liveness.pid(vm) == pid
    assert (await following.agents.channel(vm)).info.version == "9"
    world.processes.end(pid)
    async with asyncio.timeout(10):
        while (await following.store.vms())[0].runtime.state is not VmState.STOPPED:
            await asyncio.sleep(0.005)
    await following.close()


async def test_nothing_is_done_while_another_hypervisor_runs_machines(world: World) -> None:
    """It would take them for gone, and start them once more on the same disks."""
    vm = await world.create()
    await world.close()
    earlier = Hypervisor(world.processes, world.agent)
    earlier.name = "another"
    changed = World(world.paths, world.processes, world.agent, world.store, earlier=earlier)
    changed.drivers = replace(changed.drivers, hypervisor_reason="auto: not another: it rains")
    changed.hypervisor.control_socket = lambda process: None  # type: ignore[method-assign]
    with pytest.raises(PreconditionFailed, match=r"^another runs box, and ") as caught:
        await changed.reconcile()
    assert caught.value.message.endswith("the hypervisor is fake (auto: not another: it rains)")
    assert caught.value.hint.startswith("have the settings as they were, stop what runs")
    assert await changed.store.vms() == [vm]
    world.processes.end(world.liveness.pid(vm))
    await changed.reconcile()
    (stopped,) = await changed.store.vms()
    assert stopped.runtime.state is VmState.STOPPED
    await changed.close()


async def test_nothing_is_done_while_a_machine_cannot_be_seen(world: World) -> None:
    """It would be taken for gone, and what is left of it ended."""
    vm = await world.create()
    pid, argv = world.liveness.pid(vm), world.processes.argv
    world.processes.argv = {}
    following = await world.restarted()
    world.processes.hidden = {"of another home": {1}, vm.id: {2}}
    with pytest.raises(PreconditionFailed, match=r"seen how box fares: .*hidepid") as caught:
        await following.reconcile()
    assert "mount -o remount,hidepid=0 /proc" in caught.value.hint
    assert await following.store.vms() == [vm]
    assert not following.hypervisor.cleared
    world.processes.argv, world.processes.hidden = argv, {"of another home": {1}}
    await following.reconcile()
    assert following.liveness.pid(vm) == pid
    await following.close()


async def test_it_is_no_record_that_makes_a_hidden_machine_ours(world: World) -> None:
    """One of a template that is being made has none."""
    world.paths.jails_dir.mkdir(parents=True)
    (world.paths.jails_dir / "0123456789ab").touch()
    world.processes.hidden = {"0123456789ab": {1}}
    with pytest.raises(PreconditionFailed, match="seen how 0123456789ab fares"):
        await world.reconcile()


async def test_it_can_be_deleted_without_leaving_anything(world: World) -> None:
    await world.create()
    following = await next_daemon(world)
    await following.delete("box", force=True)
    await following.assert_nothing_left()


async def test_a_vm_whose_process_is_gone_is_stopped_with_a_reason(world: World) -> None:
    vm = await world.create()
    await world.close()
    world.processes.end(world.liveness.pid(vm))
    following = await next_daemon(world)
    (stopped,) = await following.store.vms()
    assert stopped.runtime.state is VmState.STOPPED
    assert stopped.runtime.last_error == "its process was gone when bangerd started"
    assert Path(vm.runtime.work_disk).exists()
    assert not Path(vm.runtime.agent_socket).parent.exists()


async def test_a_network_helper_that_outlived_its_machine_is_ended(world: World) -> None:
    vm = await world.create()
    handles = world.handles.get(vm.id)
    await world.close()
    world.processes.on_end.clear()
    world.processes.end(handles.pid)
    assert world.processes.alive(handles.network[0].pid)
    await next_daemon(world)
    assert world.processes.killed == [handles.network[0].pid]


@pytest.mark.parametrize("content", [b"", b"{", b'{"pid":-1}', b'{"pid":1e30}', None])
async def test_handles_that_say_nothing_or_nonsense_stop_nothing(
    world: World, content: bytes | None
) -> None:
    vm, gone = await world.create("runs"), await world.create("gone")
    for each in (vm, gone):
        file = world.paths.vm(each.id).handles
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content)
    await world.close()
    world.processes.end(world.liveness.pid(gone))
    following = await next_daemon(world)
    assert [each.runtime.state for each in await following.vms.all()] == ["stopped", "running"]
    await following.delete("runs", force=True)
    assert not world.processes.argv
    await following.close()


@pytest.mark.parametrize("launched", [False, True])
async def test_a_half_made_vm_is_removed_with_its_process(world: World, launched: bool) -> None:
    vm = await world.create()
    creating = msgspec.structs.replace(
        vm, runtime=msgspec.structs.replace(vm.runtime, state=VmState.CREATING)
    )
    await world.store.update_vm(creating)
    if not launched:
        world.processes.end(world.liveness.pid(vm))
        world.handles.clear(vm.id)
    following = await next_daemon(world)
    await following.assert_nothing_left()


async def test_a_vm_of_a_session_ends_with_the_daemon_of_that_session(world: World) -> None:
    await world.create("session", ephemeral=True)
    kept = await world.create("kept")
    following = await next_daemon(world)
    assert await following.store.vms() == [kept]
    assert following.liveness.vm_alive(kept)
    await following.close()


async def test_a_guest_that_was_lost_is_kept_to_be_looked_into(world: World) -> None:
    vm = a_vm("lost", state=VmState.ERROR, ephemeral=True, last_error="no answer")
    await world.store.insert_vm(vm)
    directory = world.paths.vm(vm.id).directory
    directory.mkdir(parents=True)
    following = await next_daemon(world)
    assert await following.store.vms() == [vm]
    assert directory.exists()


async def test_a_vm_that_was_being_started_is_stopped_with_the_reason(world: World) -> None:
    """Nobody has been told that it runs, and its guest may not have its identity."""
    vm = await world.create()
    await world.vms.save(vm, state=VmState.STARTING)
    following = await next_daemon(world)
    (stopped,) = await following.store.vms()
    assert stopped.runtime.state is VmState.STOPPED
    assert stopped.runtime.last_error == "bangerd ended while it was being started"
    assert world.processes.argv == {}
    assert Path(vm.runtime.work_disk).exists()
    await following.start("box")
    await following.delete("box", force=True)
    await following.assert_nothing_left()


@pytest.mark.parametrize("state", [VmState.STOPPED, VmState.ERROR])
async def test_a_machine_of_a_vm_that_does_not_run_is_ended_and_its_record_stays(
    world: World, state: VmState
) -> None:
    """A clean-up that failed, or an older database that somebody has put back."""
    vm = await world.create()
    handles = world.handles.get(vm.id)
    await world.vms.save(vm, state=state, last_error="as it was")
    world.handles.set(vm.id, handles)
    following = await next_daemon(world)
    (kept,) = await following.store.vms()
    assert (kept.runtime.state, kept.runtime.last_error) == (state, "as it was")
    assert world.processes.argv == {}
    await following.start("box")
    await following.delete("box", force=True)
    await following.assert_nothing_left()


async def test_after_a_reboot_of_the_host_nothing_runs_whoever_has_the_pids_now(
    world: World,
) -> None:
    """All processes gone, sockets and handles of another boot, pids used again by others."""
    vm = await world.create()
    handles = world.handles.get(vm.id)
    await world.close()
    world.processes.end(handles.pid)
    other = world.processes.start("somebody-else")
    file = world.paths.vm(vm.id).handles
    file.write_bytes(
        msgspec.json.encode(
            msgspec.structs.replace(
                handles,
                boot_id="another",
                pid=other,
                pid_start_ticks=1,
                network=(ProcessId(pid=other, start_ticks=1),),
            )
        )
    )
    following = await next_daemon(world)
    (stopped,) = await following.store.vms()
    assert stopped.runtime.state is VmState.STOPPED
    assert world.processes.alive(other)
    assert world.processes.killed == []
    assert not file.exists()
    assert not Path(vm.runtime.agent_socket).parent.exists()
    world.processes.end(other)


async def test_stopped_vms_stay_as_they_are(world: World) -> None:
    await world.create()
    stopped = await world.stop("box")
    following = await next_daemon(world)
    assert await following.store.vms() == [stopped]


async def test_what_no_record_names_is_reported_and_kept_unless_a_dead_daemon_left_it(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    """The database may have been moved away: then the disks of VMs are all somebody has."""
    vm = await world.create()
    foreign = [world.paths.vms_dir / "stray", world.paths.images_dir / "stray"]
    leftover = [world.paths.images_dir / ".deleting-x", world.paths.kernels_dir / ".staging-x"]
    sockets = world.paths.vms_runtime_dir / "stray"
    for directory in (*foreign, *leftover, sockets):
        (directory / "below").mkdir(parents=True)
    (leftover[1] / ".unrecorded").touch()
    following = await next_daemon(world)
    assert all(directory.exists() for directory in foreign)
    assert not any(directory.exists() for directory in (*leftover, sockets))
    said = capsys.readouterr().out
    assert all(f"left alone path={directory}" in said for directory in foreign)
    assert Path(vm.runtime.work_disk).exists()
    assert Path(vm.runtime.agent_socket).exists()
    assert (await following.images.get("base")).name == "base"
    assert Path((await following.images.get("base")).rootfs_path).exists()
    await following.close()


async def test_a_link_among_the_directories_is_not_followed(world: World, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    world.paths.vms_dir.mkdir(parents=True)
    (world.paths.vms_dir / "link").symlink_to(tmp_path / "mine")
    await next_daemon(world)
    assert (tmp_path / "mine" / "file").exists()


async def test_a_machine_without_a_record_is_reported_and_left_alone(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = world.paths.vms_runtime_dir / "stranger"
    directory.mkdir(parents=True)
    stranger = world.processes.start("machine", str(directory / "control.sock"))
    await next_daemon(world)
    assert world.processes.alive(stranger)
    assert directory.exists()
    assert "a machine without a record, left alone" in capsys.readouterr().out
    world.processes.end(stranger)


@pytest.mark.parametrize("name", [".hidden", "with space", "-dash", "ä", "x" * 200])
async def test_an_odd_name_in_the_runtime_directory_stops_nothing(world: World, name: str) -> None:
    (world.paths.vms_runtime_dir / name).mkdir(parents=True)
    await next_daemon(world)
    assert not (world.paths.vms_runtime_dir / name).exists()


async def test_a_vm_that_cannot_be_reconciled_stops_no_other(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = await world.create("a"), await world.create("b")
    following = await world.restarted()
    real = following.handles.set

    def full(vm_id: str, handles: object) -> None:
        if vm_id == first.id:
            raise OSError(28, "No space left on device")
        real(vm_id, handles)  # type: ignore[arg-type]

    monkeypatch.setattr(following.handles, "set", full)
    for vm in (first, second):
        world.paths.vm(vm.id).handles.unlink()
    await following.reconcile()
    assert "vm not reconciled" in capsys.readouterr().out
    assert following.liveness.vm_alive(second)
    await following.close()


async def test_what_may_not_be_found_is_ended_and_what_was_found_is_spared(world: World) -> None:
    vm, gone = await world.create("a"), await world.create("b")
    world.processes.end(world.liveness.pid(gone))
    following = await next_daemon(world)
    assert following.hypervisor.spared == {vm.id}
    await following.close()


async def test_what_an_earlier_daemon_has_started_elsewhere_is_kept(
    world: World, short_path: Path
) -> None:
    """One with another runtime directory. Of what no record leads to only jails are ended, for
    these are known to be ours."""
    vm = await world.create()
    template = world.paths.templates_runtime_dir / "0123456789ab" / "control.sock"
    nobodys = world.paths.vms_runtime_dir / "ba9876543210" / "control.sock"
    for socket in (template, nobodys):
        world.processes.start("machine", str(socket))
    following = await world.restarted(replace(world.paths, runtime_dir=short_path / "other"))
    await following.reconcile()
    assert following.hypervisor.spared == {vm.id}
    (kept,) = await following.vms.all()
    assert (kept, following.liveness.vm_alive(kept)) == (vm, True)
    assert (await following.agents.channel(vm)).info.version == "9"
    await following.close()


async def test_another_hypervisors_machine_is_found_wherever_its_sockets_are(
    world: World, short_path: Path
) -> None:
    vm = await world.create()
    await world.close()
    earlier = Hypervisor(world.processes, world.agent)
    earlier.name = "another"
    paths = replace(world.paths, runtime_dir=short_path / "other")
    changed = World(paths, world.processes, world.agent, world.store, earlier=earlier)
    changed.hypervisor.control_socket = lambda process: None  # type: ignore[method-assign]
    with pytest.raises(PreconditionFailed, match=r"^another runs box, and "):
        await changed.reconcile()
    assert await changed.store.vms() == [vm]
    await changed.close()


async def test_a_template_that_nobody_can_end_stops_nothing_and_is_found_again(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = world.paths.templates_runtime_dir / "0123456789ab"
    directory.mkdir(parents=True)
    stray = world.processes.start("machine", str(directory / "control.sock"))
    following = await world.restarted()
    following.hypervisor.unclearable = True
    await following.reconcile()
    assert directory.exists()
    assert "a template's machine stays" in capsys.readouterr().out
    following.hypervisor.unclearable = False
    await following.reconcile()
    assert not directory.exists()
    assert not world.processes.alive(stray)
