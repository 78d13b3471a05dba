"""Machines by the Firecracker driver: real guests, under the stand-in and what it has underneath.

Where Firecracker itself and a KVM that runs guests are there, the same tests run with those.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import struct
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import pytest

import firecrackers
import suite
from banger.base import procfs
from banger.base.errors import PreconditionFailed, Unavailable
from banger.drivers.base import (
    Capture,
    Disk,
    DiskFormat,
    GuestNetwork,
    Level,
    Link,
    Machine,
    MachineStatus,
    MemoryFile,
    NetworkAttachment,
    StateRefused,
)
from banger.drivers.hypervisor import firecracker_api, kvm
from banger.drivers.hypervisor.firecracker import FirecrackerHypervisor
from banger.drivers.hypervisor.firecracker_place import Direct
from banger.drivers.hypervisor.firecracker_requests import SetState, SnapshotCreate
from banger.drivers.hypervisor.kvm import KvmProbe
from banger.drivers.hypervisor.qemu_program import QemuProgram
from banger.guest.binary import agent_binary
from banger.guest.channel import AgentChannel, call
from banger.guest.requests import Exec, Shutdown
from banger.images.initramfs import build_initramfs
from static_busybox import static_busybox

pytestmark = [
    pytest.mark.guest,
    suite.names_its_drivers,
    firecrackers.needs_description,
]

VM_ID = "0123456789ab"
_BOOT_S = 120.0
_EXEC_S = 60.0
#: The guest reports some seconds after it freed: 2 s of its own time.
_FREES_S = 120.0
MIB = 1 << 20


@dataclass(frozen=True)
class Parts:
    """What machines are made of, read only: a kernel of banger's, and a tiny root file system."""

    vmlinux: Path
    initramfs: Path
    modules: Path
    rootfs: Path
    work: Path


def kernel_directory(home: Path) -> Path:
    (kernel,) = (home / "data/banger/kernels").glob("*/kernel.json")
    return kernel.parent


@pytest.fixture(scope="module")
def kernel(image: str) -> Path:
    return kernel_directory(Path(os.environ["HOME"]))


@pytest.fixture(scope="module")
def parts(kernel: Path, tmp_path_factory: pytest.TempPathFactory) -> Parts:
    made = tmp_path_factory.mktemp("parts")
    tree = made / "tree"
    (tree / "bin").mkdir(parents=True)
    shutil.copy(static_busybox(), tree / "bin/busybox")
    for name in ("sh", "cat", "mount", "grep", "ls", "ip", "sync", "head", "rm", "mkdir"):
        (tree / "bin" / name).symlink_to("busybox")
    for disk, source in (("rootfs", tree), ("work", made / "nothing")):
        source.mkdir(exist_ok=True)
        argv: list[str | Path] = ["mke2fs", "-q", "-t", "ext4", "-d", source, made / disk, "32M"]
        subprocess.run(argv, check=True, env=os.environ | {"PATH": os.environ["PATH"] + ":/sbin"})
    initramfs = made / "initramfs"
    build_initramfs(initramfs, agent=agent_binary("x86_64"), modules=kernel / "boot-modules")
    return Parts(
        kernel / "vmlinux", initramfs, kernel / "modules.ext4", made / "rootfs", made / "work"
    )


def _kinds() -> list[str]:
    return ["stand-in", *(["real"] if firecrackers.real() else [])]


@pytest.fixture(params=_kinds())
async def hypervisor(request: pytest.FixtureRequest, tmp_path: Path) -> FirecrackerHypervisor:
    if request.param == "stand-in":

        async def emulated() -> KvmProbe:
            return KvmProbe(True, "emulated")

        program = firecrackers.stand_in(tmp_path)
        return FirecrackerHypervisor(Direct(str(program)), emulated)
    cache = Path(os.environ["HOME"]) / "probe.json"
    answer = await kvm.probe(cache, QemuProgram())
    if not answer.usable:
        pytest.skip(f"Firecracker is there, but {answer.detail}")
    probe = partial(kvm.probe, cache, QemuProgram())
    return FirecrackerHypervisor(Direct(str(firecrackers.real())), probe)


@dataclass
class Scene:
    """Machines in directories of their own, ended with the test."""

    hypervisor: FirecrackerHypervisor
    parts: Parts
    directory: Path
    sockets: list[Path] = field(default_factory=list)

    def machine(self, name: str, **changed: object) -> Machine:
        """One with new disks."""
        place = self.directory / name
        place.mkdir()
        for disk, source in (("system", self.parts.rootfs), ("work", self.parts.work)):
            subprocess.run(["cp", "--sparse=always", source, place / disk], check=True)
        self.sockets.append(place / "control.sock")
        machine = Machine(
            vm_id=f"{VM_ID}-{name}",
            vcpu_count=1,
            memory_mib=160,
            kernel=self.parts.vmlinux,
            initramfs=self.parts.initramfs,
            kernel_parameters=("banger.init=minimal",),
            disks=(
                Disk("system", place / "system", DiskFormat.RAW),
                Disk("work", place / "work", DiskFormat.RAW),
                Disk("modules", self.parts.modules, DiskFormat.RAW, read_only=True),
            ),
            console_log=place / "console.log",
            hypervisor_log=place / "hypervisor.log",
            control_socket=place / "control.sock",
            agent_socket=place / "agent.sock",
        )
        return replace(machine, **changed)  # type: ignore[arg-type]

    @asynccontextmanager
    async def agent(self, machine: Machine) -> AsyncIterator[AgentChannel]:
        channel = await AgentChannel.connect(
            machine.agent_socket,
            timeout_s=_BOOT_S,
            vsock_port=self.hypervisor.features.agent_vsock_port,
        )
        try:
            yield channel
        finally:
            await channel.close()

    async def run(self, machine: Machine, script: str) -> str:
        """The output of a script in the guest."""
        async with self.agent(machine) as channel:
            result = await call(channel, Exec(["/bin/sh", "-c", script]), timeout_s=_EXEC_S)
        assert result.exit.value == 0, result
        return result.stdout.decode()


@pytest.fixture
async def scene(
    hypervisor: FirecrackerHypervisor, parts: Parts, private_home: object
) -> AsyncIterator[Scene]:
    # Short: sockets go below it.
    directory = Path(os.environ["HOME"]) / f"fc{os.urandom(3).hex()}"
    directory.mkdir()
    made = Scene(hypervisor, parts, directory)
    yield made
    for control_socket in made.sockets:
        try:
            await hypervisor.quit(control_socket)
        except Unavailable:
            continue
    shutil.rmtree(directory)


async def ends(pid: int) -> None:
    """The process ends, and is reaped, within 10 s."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert await procfs.wait_exit(pidfd, 10)
    finally:
        os.close(pidfd)


async def test_a_guest_boots_finds_its_disks_and_ends_by_itself(scene: Scene) -> None:
    machine = scene.machine("a")
    pid = await scene.hypervisor.launch(machine, None)
    assert scene.hypervisor.control_socket(procfs.look_at(pid)) == machine.control_socket
    mounts = await scene.run(machine, "mount")
    assert "/dev/vda on / type ext4 (rw" in mounts
    assert "/dev/vdb on /root type ext4 (rw" in mounts
    assert "/dev/vdc on /lib/modules type ext4 (ro" in mounts
    assert await scene.hypervisor.disks(machine.control_socket) == {
        disk.name: disk.path for disk in machine.disks
    }
    async with scene.agent(machine) as channel:
        await call(channel, Shutdown(), timeout_s=_EXEC_S)
    await ends(pid)
    with pytest.raises(Unavailable, match="does not answer"):
        await scene.hypervisor.status(machine.control_socket)


async def test_a_machine_is_held_let_run_on_and_ended(scene: Scene) -> None:
    machine = scene.machine("a")
    pid = await scene.hypervisor.launch(machine, None)
    status = scene.hypervisor.status
    assert await status(machine.control_socket) is MachineStatus.RUNNING
    await scene.hypervisor.pause(machine.control_socket)
    assert await status(machine.control_socket) is MachineStatus.PAUSED
    await scene.hypervisor.resume(machine.control_socket)
    assert await scene.run(machine, "echo hello") == "hello\n"
    await scene.hypervisor.power_button(machine.control_socket)
    await scene.hypervisor.quit(machine.control_socket)
    await ends(pid)
    with pytest.raises(Unavailable):
        await scene.hypervisor.quit(machine.control_socket)


@pytest.mark.parametrize("hypervisor", [each for each in _kinds() if each == "real"], indirect=True)
async def test_ctrl_alt_del_reaches_the_guests_kernel(scene: Scene) -> None:
    """Which restarts at once where nobody has asked for these keys; what stands in has none."""
    machine = scene.machine("pressed")
    pid = await scene.hypervisor.launch(machine, None)
    assert await scene.run(machine, "echo hello") == "hello\n"
    await scene.hypervisor.power_button(machine.control_socket)
    await ends(pid)


async def test_what_its_devices_move_is_counted(scene: Scene) -> None:
    machine = scene.machine("counts")
    await scene.hypervisor.launch(machine, None)
    await scene.run(machine, "true")
    before = await scene.hypervisor.traffic(machine.control_socket)
    assert before.disk_read_bytes > 1 << 20
    await scene.run(machine, "head -c 4194304 /dev/urandom >/root/x; sync")
    after = await scene.hypervisor.traffic(machine.control_socket)
    written = after.disk_written_bytes - before.disk_written_bytes
    assert 4 << 20 <= written < 64 << 20
    taken = machine.control_socket.with_name("metrics").stat()
    assert taken.st_blocks * 512 <= 8192, "what was read takes no room"


async def test_memory_that_the_guest_frees_goes_back_to_the_host(scene: Scene) -> None:
    machine = scene.machine("frees", memory_mib=256)
    pid = await scene.hypervisor.launch(machine, None)
    await scene.run(machine, "mkdir /tmp/m && mount -t tmpfs m /tmp/m")
    at_rest = resident_bytes(pid)
    await scene.run(machine, "head -c 67108864 /dev/urandom >/tmp/m/x")
    full = resident_bytes(pid)
    assert full > at_rest + (48 << 20)
    await scene.run(machine, "rm /tmp/m/x")
    async with asyncio.timeout(_FREES_S):
        while resident_bytes(pid) > full - (48 << 20):  # nobody tells of it
            await asyncio.sleep(0.1)
    assert await scene.run(machine, "echo well") == "well\n"


def resident_bytes(pid: int) -> int:
    """Of the process and its children: the stand-in's machine is QEMU's."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    total = 0
    for each in (pid, *map(int, children)):
        found = procfs.usage(each, procfs.start_ticks(each))
        total += found.resident_bytes if found else 0
    return total


async def test_a_new_client_takes_the_place_of_the_last(scene: Scene) -> None:
    machine = scene.machine("a")
    await scene.hypervisor.launch(machine, None)
    async with scene.agent(machine) as first, await first.open(Exec(["/bin/cat"])):
        assert await scene.run(machine, "echo second") == "second\n"
        await asyncio.wait_for(first.wait_closed(), 10)
    assert await scene.run(machine, "echo third") == "third\n"


async def test_copies_of_a_saved_machine_go_on_with_disks_of_their_own(scene: Scene) -> None:
    memory = scene.directory / "memory"
    source = scene.machine("a", memory_file=MemoryFile(memory, private=False))
    pid = await scene.hypervisor.launch(source, None)
    await scene.run(source, "echo kept > /run/kept; echo disk > /root/kept; sync")
    await scene.hypervisor.save(source, scene.directory / "state")
    await scene.hypervisor.quit(source.control_socket)
    await ends(pid)
    assert memory.stat().st_size == source.memory_mib * MIB
    assert memory.stat().st_blocks * 512 < memory.stat().st_size

    for name in ("b", "c"):
        copy = scene.machine(name, memory_file=MemoryFile(memory, private=True))
        for disk in source.disks[:2]:
            shutil.copy(disk.path, scene.directory / name / disk.name)
        larger = tuple(replace(disk, size_mib=48) for disk in copy.disks[:2])
        copy = replace(copy, disks=(*larger, copy.disks[2]))
        assert await scene.hypervisor.shape(copy, None) == await scene.hypervisor.shape(
            source, None
        )
        await scene.hypervisor.restore(copy, None, scene.directory / "state")
        script = "cat /run/kept /root/kept; cat /sys/block/vdb/size"
        assert await scene.run(copy, script) == f"kept\ndisk\n{48 * MIB // 512}\n"
        await scene.run(copy, f"echo {name} > /root/mine; sync")
    for name in ("b", "c"):
        of_name = replace(source, agent_socket=scene.directory / name / "agent.sock")
        assert await scene.run(of_name, "cat /root/mine") == f"{name}\n"


async def test_a_machine_is_captured_while_it_runs(scene: Scene) -> None:
    machine = scene.machine("a")
    pid = await scene.hypervisor.launch(machine, None)
    await scene.run(machine, "echo before > /run/when")
    memory, state = scene.directory / "memory", scene.directory / "state"
    copy = scene.machine("b", memory_file=MemoryFile(memory, private=True))

    async def copy_disks() -> None:
        assert await scene.hypervisor.status(machine.control_socket) is MachineStatus.PAUSED
        for disk in machine.disks[:2]:
            shutil.copy(disk.path, scene.directory / "b" / disk.name)

    told: list[str] = []
    capture = Capture(memory, state, {}, copy_disks)
    paused_s = await scene.hypervisor.capture(machine.control_socket, pid, capture, told.append)
    assert 0 < paused_s < 30
    assert told == ["freeze"]
    await scene.run(machine, "echo after > /run/when")
    await scene.hypervisor.restore(copy, None, state)
    assert await scene.run(copy, "cat /run/when") == "before\n"
    assert await scene.run(machine, "cat /run/when") == "after\n"


async def test_a_machine_whose_copy_takes_too_long_runs_on_once_it_is_written(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then nobody is answered."""
    machine = scene.machine("a")
    pid = await scene.hypervisor.launch(machine, None)
    await scene.run(machine, "echo kept > /run/kept")
    memory, state = scene.directory / "memory", scene.directory / "state"
    os.mkfifo(state)  # it waits for who reads from that
    monkeypatch.setattr(SnapshotCreate, "timeout_s", 2.0)
    monkeypatch.setattr(SetState, "timeout_s", 1.0)
    monkeypatch.setattr(firecracker_api, "ANSWER_TIMEOUT_S", 1.0)
    try:
        capture = Capture(memory, state, {})
        with pytest.raises(Unavailable, match="PUT /snapshot/create within 2 s"):
            await scene.hypervisor.capture(machine.control_socket, pid, capture, lambda _: None)
        with pytest.raises(Unavailable, match="GET / within 1 s"):
            await scene.hypervisor.status(machine.control_socket)
    finally:
        await asyncio.to_thread(state.read_bytes)
    monkeypatch.undo()
    await scene.hypervisor.status(machine.control_socket)
    await scene.hypervisor.resume(machine.control_socket)
    assert await scene.run(machine, "cat /run/kept") == "kept\n"


async def test_what_cannot_be_gone_on_from_is_refused_and_leaves_nothing(scene: Scene) -> None:
    (scene.directory / "state").write_bytes(b"none" * 1000)
    (scene.directory / "memory").write_bytes(bytes(MIB))
    memory = MemoryFile(scene.directory / "memory", private=True)
    machine = scene.machine("a", memory_file=memory)
    with pytest.raises(StateRefused, match="the saved state") as caught:
        await scene.hypervisor.restore(machine, None, scene.directory / "state")
    assert "--cold" in caught.value.hint
    assert not _firecrackers_of(scene.directory)


async def test_a_machine_without_its_kernel_leaves_nothing(scene: Scene) -> None:
    machine = scene.machine("a", kernel=scene.directory / "none")
    with pytest.raises(PreconditionFailed, match="cannot open the kernel"):
        await scene.hypervisor.launch(machine, None)
    assert not _firecrackers_of(scene.directory)


def _firecrackers_of(directory: Path) -> list[int]:
    own = procfs.own_processes()
    return [pid for pid, process in own if str(directory) in " ".join(process.argv)]


async def test_the_agent_is_reached_by_a_vsock(scene: Scene, tmp_path: Path) -> None:
    """Under the real Firecracker all of these tests are of that; the stand-in has it here alone."""
    if (tmp_path / "firecracker").exists():

        async def emulated() -> KvmProbe:
            return KvmProbe(True, "emulated")

        program = firecrackers.stand_in(tmp_path, vsock=True)
        scene.hypervisor = FirecrackerHypervisor(Direct(str(program)), emulated)
    machine = scene.machine("a")
    pid = await scene.hypervisor.launch(machine, None)
    assert "vmw_vsock_virtio_transport" in await scene.run(machine, "cat /proc/modules")
    async with scene.agent(machine) as first:
        data = os.urandom(1 << 20)  # several windows of both sides
        echoed = await call(
            first, Exec(["/bin/cat"]), stdin=data, timeout_s=_EXEC_S, limit_bytes=2 << 20
        )
        assert echoed.stdout == data
        assert await scene.run(machine, "echo second") == "second\n"
        await asyncio.wait_for(first.wait_closed(), 10)
    async with scene.agent(machine) as channel:
        await call(channel, Shutdown(), timeout_s=_EXEC_S)
    await ends(pid)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root makes taps: run as root")


def open_tap(name: str) -> int:
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    flags = 0x2 | 0x1000 | 0x4000  # IFF_TAP, IFF_NO_PI, IFF_VNET_HDR
    fcntl.ioctl(tap, 0x400454CA, struct.pack("16sH22x", name.encode(), flags))
    return tap


def attachment(tap: str) -> NetworkAttachment:
    guest = GuestNetwork("02:00:00:00:00:07", "10.0.0.2/24", "10.0.0.1", "10.0.0.1")
    return NetworkAttachment(guest, Link.TAP, fd=open_tap(tap), tap=tap)


@needs_root
async def test_a_tap_goes_with_its_machine(scene: Scene) -> None:
    tap = f"bt{os.urandom(4).hex()}"
    machine = scene.machine("a")
    pid = await scene.hypervisor.launch(machine, attachment(tap))
    assert "02:00:00:00:00:07" in await scene.run(machine, "ip link show eth0")
    link = Path("/sys/class/net") / tap
    assert link.exists()
    await scene.hypervisor.quit(machine.control_socket)
    await ends(pid)
    await _gone(link)


@needs_root
async def test_a_tap_goes_when_a_machine_does_not_start(scene: Scene) -> None:
    tap = f"bt{os.urandom(4).hex()}"
    machine = scene.machine("a", kernel=scene.directory / "none")
    with pytest.raises(PreconditionFailed):
        await scene.hypervisor.launch(machine, attachment(tap))
    await _gone(Path("/sys/class/net") / tap)


@needs_root
async def test_a_tap_goes_when_its_process_ends_by_itself(scene: Scene) -> None:
    """And what is told is why that was, not what became of the tap."""
    tap = f"bt{os.urandom(4).hex()}"
    memory, state = scene.directory / "memory", scene.directory / "state"
    memory.write_bytes(bytes(1 << 20))
    state.write_bytes(b"nothing that was ever saved")
    machine = scene.machine("a", memory_file=MemoryFile(memory, private=True))
    with pytest.raises(StateRefused):
        await scene.hypervisor.restore(machine, attachment(tap), state)
    await _gone(Path("/sys/class/net") / tap)


async def _gone(link: Path) -> None:
    """The kernel closes the files of a process that has ended in its own time."""
    async with asyncio.timeout(10):
        while link.exists():
            await asyncio.sleep(0.02)


async def test_the_host_is_asked_for_what_it_needs(scene: Scene, tmp_path: Path) -> None:
    assert [each.level for each in await scene.hypervisor.checks()][:2] == [Level.OK, Level.OK]

    async def none() -> KvmProbe:
        return KvmProbe(False, "/dev/kvm is not there")

    program = firecrackers.stand_in(tmp_path)
    without = await FirecrackerHypervisor(Direct(str(program)), none).checks()
    assert [each.level for each in without][:2] == [Level.OK, Level.FAIL]
    missing = await FirecrackerHypervisor(Direct("/nowhere/firecracker"), none).checks()
    assert missing[0].level is Level.FAIL
    assert "firecracker_bin" in missing[0].hint
    for version in ("1.4.0", "1.16.0", "1.17.0"):
        other = tmp_path / f"firecracker-{version}"
        other.write_text(f"#!/bin/sh\necho Firecracker v{version}\n")
        other.chmod(0o755)
        (check, *_) = await FirecrackerHypervisor(Direct(str(other)), none).checks()
        assert f"v{version}, which banger has not been made for" in check.detail
    # Its machines would not be found again.
    called = program.rename(tmp_path / "fc")
    (check, *_) = await FirecrackerHypervisor(Direct(str(called)), none).checks()
    assert "is not called firecracker" in check.detail
