"""What the driver tells Firecracker is what Firecracker takes, in the order that it demands.

The same requests go to the stand-in and, where there is one, to the real program: what the
stand-in says to them is what the real one says.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import firecrackers
import suite
from banger.base import proc
from banger.base.errors import BangerError, PreconditionFailed, Unavailable
from banger.drivers.hypervisor.firecracker import FirecrackerHypervisor
from banger.drivers.hypervisor.firecracker_api import FirecrackerClient, conversation
from banger.drivers.hypervisor.firecracker_faults import FirecrackerRefused
from banger.drivers.hypervisor.firecracker_metrics import Meter
from banger.drivers.hypervisor.firecracker_place import firecracker_argv
from banger.drivers.hypervisor.firecracker_requests import (
    Action,
    ActionType,
    Balloon,
    BootSource,
    Drive,
    DriveUpdate,
    Entropy,
    InstanceState,
    MachineConfig,
    MemoryBackend,
    Metrics,
    NetworkInterface,
    NetworkOverride,
    Request,
    SetState,
    SnapshotCreate,
    SnapshotLoad,
    VmState,
    Vsock,
    VsockOverride,
)
from banger.services import machine_logs
from firecracker_schema import Description
from tiny_guest import speaking_guest

pytestmark = [firecrackers.needs_description, suite.names_its_drivers]

_START_S = 20.0
START = Action(action_type=ActionType.INSTANCE_START)


@dataclass
class Peer:
    """A process that waits to be told of a machine."""

    client: FirecrackerClient
    process: subprocess.Popen[bytes]
    ended: asyncio.Future[int]
    directory: Path
    kind: str

    def drive(self, name: str = "system", *, read_only: bool = False) -> Drive:
        path = self.directory / f"{name}.raw"
        if not path.exists():
            path.write_bytes(bytes(1 << 20))
        return Drive(
            drive_id=name,
            path_on_host=str(path),
            is_read_only=read_only,
            is_root_device=False,
            cache_type="Writeback",
        )

    def boot_source(self) -> BootSource:
        kernel, initramfs = self.directory / "kernel", self.directory / "initramfs"
        kernel.write_bytes(speaking_guest(b"hello, host\n"))
        initramfs.write_bytes(bytes(512))
        return BootSource(
            kernel_image_path=str(kernel), initrd_path=str(initramfs), boot_args="console=ttyS0"
        )

    def vsock(self) -> Vsock:
        return Vsock(guest_cid=3, uds_path=str(self.directory / "vsock"))

    def load(self) -> SnapshotLoad:
        return SnapshotLoad(
            snapshot_path=str(self.directory / "state"),
            mem_backend=MemoryBackend(backend_path=str(self.directory / "memory")),
            vsock_override=VsockOverride(uds_path=str(self.directory / "vsock")),
        )

    async def configure(self) -> None:
        """All that a machine without a network is made of."""
        for each in (
            self.boot_source(),
            MachineConfig(vcpu_count=1, mem_size_mib=64),
            self.drive(),
            self.drive("modules", read_only=True),
            self.vsock(),
            Entropy(),
            Balloon(amount_mib=0, deflate_on_oom=True, free_page_reporting=True),
            Metrics(metrics_path=str(self.directory / "metrics")),
        ):
            await self.client.tell(each)

    async def end(self) -> None:
        if not self.ended.done():
            os.kill(self.process.pid, signal.SIGTERM)
        await asyncio.shield(self.ended)

    async def refusal(self, request: Request) -> BangerError:
        with pytest.raises(BangerError) as caught:
            await self.client.tell(request)
        return caught.value


def _programs() -> list[str]:
    return ["stand-in", *(["real"] if firecrackers.real() else [])]


@pytest.fixture(params=_programs())
async def peer(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Peer]:
    async with running(request.param, tmp_path) as peer:
        yield peer


class running:  # noqa: N801 - a context
    """A process of the kind, in the directory, from its first answer to its end."""

    def __init__(self, kind: str, directory: Path, name: str = "api.sock") -> None:
        self._kind, self._directory, self._socket = kind, directory, directory / name

    async def __aenter__(self) -> Peer:
        real = firecrackers.real() if self._kind == "real" else None
        program = real or firecrackers.stand_in(self._directory)
        argv = firecracker_argv(
            str(program), "contract", str(self._socket), str(self._socket.with_suffix(".log"))
        )
        self._process = proc.spawn_detached(argv, log=self._directory / "output")
        self._ended = proc.watch(self._process)
        self._conversation = conversation(self._socket)
        await _listens(self._socket, self._ended)
        client = await self._conversation.__aenter__()
        await _answers(client, self._ended)
        self._peer = Peer(client, self._process, self._ended, self._directory, self._kind)
        return self._peer

    async def __aexit__(self, *what: object) -> None:
        await self._conversation.__aexit__(None, None, None)
        await self._peer.end()


async def _listens(socket: Path, ended: asyncio.Future[int]) -> None:
    while not await asyncio.to_thread(socket.exists) and not ended.done():
        await asyncio.wait({ended}, timeout=0.002)


async def _answers(client: FirecrackerClient, ended: asyncio.Future[int]) -> None:
    """Nobody tells that a socket is there, so this tries again and again."""
    async with asyncio.timeout(_START_S):
        while True:
            try:
                await client.instance()
            except Unavailable:
                assert not ended.done()
                await asyncio.sleep(0.02)
            else:
                return


REQUESTS: tuple[Request, ...] = (
    BootSource(kernel_image_path="/k", initrd_path="/i", boot_args="quiet"),
    MachineConfig(vcpu_count=2, mem_size_mib=512),
    Drive(
        drive_id="system",
        path_on_host="/s",
        is_read_only=False,
        is_root_device=False,
        cache_type="Writeback",
    ),
    DriveUpdate(drive_id="system", path_on_host="/s"),
    NetworkInterface(iface_id="eth0", guest_mac="02:00:00:00:00:01", host_dev_name="tap0"),
    Vsock(guest_cid=3, uds_path="/v"),
    Entropy(),
    Balloon(amount_mib=0, deflate_on_oom=True, free_page_reporting=True),
    Metrics(metrics_path="/m"),
    *(Action(action_type=each) for each in ActionType),
    *(SetState(state=each) for each in VmState),
    SnapshotCreate(snapshot_path="/s", mem_file_path="/m"),
    SnapshotLoad(
        snapshot_path="/s",
        mem_backend=MemoryBackend(backend_path="/m"),
        network_overrides=(NetworkOverride(iface_id="eth0", host_dev_name="tap1"),),
        vsock_override=VsockOverride(uds_path="/v"),
    ),
)


def test_every_request_that_there_is_is_as_firecracker_describes_it() -> None:
    import msgspec

    description = Description()
    for request in REQUESTS:
        body = msgspec.json.decode(msgspec.json.encode(request))
        description.check(request.method, request.path, body)
    assert {type(each) for each in REQUESTS} == set(Request.__subclasses__())


async def test_a_process_without_a_machine_says_so(peer: Peer) -> None:
    instance = await peer.client.instance()
    assert (instance.id, instance.state) == ("contract", InstanceState.NOT_STARTED)
    assert instance.vmm_version.count(".") == 2


async def test_who_goes_in_the_middle_of_a_request_is_no_end(peer: Peer) -> None:
    """As a daemon that is killed."""
    for said in (b"", b"GET / HT", b"PUT /actions HTTP/1.1\r\nContent-Length: 9\r\n\r\n{"):
        _, writer = await asyncio.open_unix_connection(peer.directory / "api.sock")
        writer.write(said)
        writer.close()
        await writer.wait_closed()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(peer.ended), 1)
    assert (await peer.client.instance()).state is InstanceState.NOT_STARTED


async def test_a_machine_is_configured_in_any_order(peer: Peer) -> None:
    await peer.configure()
    await peer.client.tell(peer.boot_source())  # as often as one likes
    assert (await peer.client.instance()).state is InstanceState.NOT_STARTED


@pytest.mark.parametrize(
    "too_early",
    [
        SetState(state=VmState.PAUSED),
        SetState(state=VmState.RESUMED),
        SnapshotCreate(snapshot_path="/s", mem_file_path="/m"),
        DriveUpdate(drive_id="system", path_on_host="/s"),
        Action(action_type=ActionType.SEND_CTRL_ALT_DEL),
        Action(action_type=ActionType.FLUSH_METRICS),
    ],
    ids=lambda request: type(request).__name__,
)
async def test_what_needs_a_machine_is_refused_before_there_is_one(
    peer: Peer, too_early: Request
) -> None:
    error = await peer.refusal(too_early)
    assert isinstance(error, FirecrackerRefused)
    assert "has not been started" in error.message
    assert error.fault == "The requested operation is not supported before starting the microVM."


async def test_a_machine_without_a_kernel_does_not_start(peer: Peer) -> None:
    assert "without kernel configuration" in (await peer.refusal(START)).message


async def test_files_that_are_missing_are_told_of_at_once(peer: Peer) -> None:
    kernel = await peer.refusal(
        BootSource(kernel_image_path="/nowhere/k", initrd_path="/nowhere/i", boot_args="")
    )
    assert isinstance(kernel, PreconditionFailed)
    assert "cannot open the kernel" in kernel.message
    assert "No such file or directory (os error 2)" in kernel.message
    initramfs = await peer.refusal(
        BootSource(
            kernel_image_path=peer.boot_source().kernel_image_path,
            initrd_path="/nowhere/i",
            boot_args="",
        )
    )
    assert "cannot open the initramfs" in initramfs.message
    drive = await peer.refusal(
        Drive(
            drive_id="system",
            path_on_host="/nowhere/disk",
            is_read_only=False,
            is_root_device=False,
            cache_type="Writeback",
        )
    )
    assert isinstance(drive, Unavailable)
    assert "cannot use a disk" in drive.message
    assert drive.hint


async def test_what_is_not_as_described_is_refused(peer: Peer) -> None:
    memory = await peer.refusal(MachineConfig(vcpu_count=1, mem_size_mib=0))
    assert isinstance(memory, PreconditionFailed)
    assert "cannot have that much memory" in memory.message
    dashed = await peer.refusal(
        Drive(
            drive_id="a-b",
            path_on_host="/s",
            is_read_only=False,
            is_root_device=False,
            cache_type="Writeback",
        )
    )
    assert "can only contain alphanumeric characters and underscores" in dashed.message
    cache = await peer.refusal(
        Drive(
            drive_id="a",
            path_on_host="/s",
            is_read_only=False,
            is_root_device=False,
            cache_type="Sometimes",
        )
    )
    assert "deserializing the json body" in cache.message


async def test_a_machine_has_no_more_vcpus_than_firecracker_takes(peer: Peer) -> None:
    most = FirecrackerHypervisor.features.vcpu_max
    await peer.client.tell(MachineConfig(vcpu_count=most, mem_size_mib=64))
    vcpus = await peer.refusal(MachineConfig(vcpu_count=most + 1, mem_size_mib=64))
    assert isinstance(vcpus, PreconditionFailed)
    assert "cannot have that many vCPUs: from 1 to 32" in vcpus.message
    fault = "Machine config error: The number of vCPUs must be greater than 0, less than 32 and"
    assert fault in vcpus.message


async def test_it_counts_into_one_file_for_good(peer: Peer) -> None:
    nowhere = await peer.refusal(Metrics(metrics_path="/nowhere/metrics"))
    assert "cannot count into a file" in nowhere.message
    await peer.client.tell(Metrics(metrics_path=str(peer.directory / "metrics")))
    again = await peer.refusal(Metrics(metrics_path=str(peer.directory / "other")))
    assert "cannot count into a file" in again.message


async def test_what_it_logs_goes_on_at_its_place_when_the_log_is_cut(peer: Peer) -> None:
    """The daemon counts on it: what is before that place takes no room."""
    log = peer.directory / "api.log"
    await peer.refusal(Metrics(metrics_path="/nowhere/metrics"))
    length = log.stat().st_size
    assert machine_logs.cut(log, 0)
    assert log.with_name("api.log.old").stat().st_size == length
    await peer.refusal(Metrics(metrics_path="/nowhere/metrics"))
    content = log.read_bytes()
    assert content[:length] == bytes(length)
    assert content[length:].strip(b"\0")


async def test_a_balloon_is_not_larger_than_the_memory(peer: Peer) -> None:
    await peer.client.tell(MachineConfig(vcpu_count=1, mem_size_mib=64))
    error = await peer.refusal(
        Balloon(amount_mib=65, deflate_on_oom=True, free_page_reporting=True)
    )
    assert "cannot have this balloon" in error.message


async def test_a_tap_that_is_not_there_or_not_ours_is_told_of(peer: Peer) -> None:
    # For root, one that is not there would be made.
    name = "x" * 20 if os.geteuid() == 0 else "banger-none"
    error = await peer.refusal(
        NetworkInterface(iface_id="eth0", guest_mac="02:00:00:00:00:01", host_dev_name=name)
    )
    assert type(error) is Unavailable  # not what is merely passed on
    assert "cannot open the machine's tap" in error.message


async def test_a_state_is_not_loaded_into_a_configured_machine(peer: Peer) -> None:
    await peer.client.tell(peer.drive())
    error = await peer.refusal(peer.load())
    assert "into a machine that was configured" in error.message
    assert not peer.ended.done()


@pytest.mark.parametrize("content", [None, b"", b"no state at all" * 100])
async def test_a_state_that_is_none_ends_the_process(peer: Peer, content: bytes | None) -> None:
    if content is not None:
        (peer.directory / "state").write_bytes(content)
    (peer.directory / "memory").write_bytes(bytes(1 << 20))
    # This alone is no configuration of the machine.
    await peer.client.tell(Metrics(metrics_path=str(peer.directory / "metrics")))
    error = await peer.refusal(peer.load())
    assert isinstance(error, FirecrackerRefused)
    assert "banger vm start --cold" in error.hint
    assert await asyncio.wait_for(asyncio.shield(peer.ended), 10) != 0


async def test_a_machine_with_more_memory_than_kvm_takes_does_not_start(peer: Peer) -> None:
    if peer.kind == "real" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("the real one needs /dev/kvm to come to its memory")
    await peer.client.tell(peer.boot_source())
    await peer.client.tell(MachineConfig(vcpu_count=1, mem_size_mib=10 << 20))
    error = await peer.refusal(START)
    assert isinstance(error, PreconditionFailed)
    assert "does not give the machine that much memory" in error.message
    assert "Cannot set the memory regions: Invalid argument (os error 22)" in error.message
    assert (await peer.client.instance()).state is InstanceState.NOT_STARTED


# What follows needs a machine that runs. The real one needs KVM for it; not one that gets anywhere,
# as the guest is asked for nothing.


@pytest.fixture(params=_programs())
async def machine(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Peer]:
    async with running(request.param, tmp_path) as peer:
        await peer.configure()
        try:
            await peer.client.tell(START)
        except PreconditionFailed as error:
            pytest.skip(f"the real one does not start a machine here: {error.message}")
        yield peer


@pytest.mark.guest
async def test_what_was_configured_stays_once_it_runs(machine: Peer) -> None:
    for late in (
        machine.boot_source(),
        MachineConfig(vcpu_count=1, mem_size_mib=64),
        machine.vsock(),
        Entropy(),
        machine.load(),
        START,
    ):
        error = await machine.refusal(late)
        assert isinstance(error, FirecrackerRefused)
        assert "runs already" in error.message, late
    assert "PCI is not enabled" in (await machine.refusal(machine.drive())).message


@pytest.mark.guest
async def test_what_it_counted_since_it_was_asked_last_is_a_line(machine: Peer) -> None:
    meter = Meter(machine.directory / "metrics")
    meter.read()  # one is there from the start
    for _ in range(2):
        await machine.client.tell(Action(action_type=ActionType.FLUSH_METRICS))
        lines = meter.path.read_bytes().strip(b"\0")
        assert lines.count(b"\n") == 1
        assert set(json.loads(lines)) >= {"block", "net"}
        assert meter.read().disk_written_bytes == 0
        assert not meter.path.read_bytes().strip(b"\0"), "what was read takes no room"


@pytest.mark.guest
async def test_a_machine_is_held_and_let_run_on_as_often_as_one_likes(machine: Peer) -> None:
    for state, said in (
        (VmState.RESUMED, InstanceState.RUNNING),
        (VmState.PAUSED, InstanceState.PAUSED),
        (VmState.PAUSED, InstanceState.PAUSED),
        (VmState.RESUMED, InstanceState.RUNNING),
    ):
        await machine.client.tell(SetState(state=state))
        assert (await machine.client.instance()).state is said


@pytest.mark.guest
async def test_only_a_machine_that_is_held_is_saved_and_goes_on_elsewhere(
    machine: Peer, tmp_path: Path
) -> None:
    create = SnapshotCreate(
        snapshot_path=str(tmp_path / "state"), mem_file_path=str(tmp_path / "memory")
    )
    assert "unavailable while running" in (await machine.refusal(create)).message
    await machine.client.tell(SetState(state=VmState.PAUSED))
    await machine.client.tell(create)
    await machine.client.tell(SetState(state=VmState.RESUMED))
    await machine.end()  # the disk is one machine's at a time
    async with running(machine.kind, tmp_path, "copy.sock") as copy:
        override = VsockOverride(uds_path=str(tmp_path / "vsock-copy"))
        load = SnapshotLoad(
            snapshot_path=create.snapshot_path,
            mem_backend=MemoryBackend(backend_path=create.mem_file_path),
            vsock_override=override,
        )
        await copy.client.tell(load)
        assert (await copy.client.instance()).state is InstanceState.PAUSED
        os.truncate(tmp_path / "system.raw", 2 << 20)
        grown = DriveUpdate(drive_id="system", path_on_host=str(tmp_path / "system.raw"))
        await copy.client.tell(grown)
        await copy.client.tell(SetState(state=VmState.RESUMED))
        assert (tmp_path / "vsock-copy").is_socket()


async def test_who_does_not_answer_is_told_of_with_the_time_that_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("banger.drivers.hypervisor.firecracker_api.ANSWER_TIMEOUT_S", 0.2)
    async with running("stand-in", tmp_path) as peer:
        os.kill(peer.process.pid, signal.SIGSTOP)
        try:
            with pytest.raises(Unavailable, match=r"does not answer GET / within 0.2 s: it hangs"):
                await peer.client.instance()
        finally:
            os.kill(peer.process.pid, signal.SIGCONT)
        monkeypatch.undo()
        assert (await peer.client.instance()).state is InstanceState.NOT_STARTED


async def test_who_is_not_there_or_is_somebody_else_is_told_of(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="does not answer at"):
        async with conversation(tmp_path / "nobody"):
            pass

    async def talk(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nwhat")
        await writer.drain()
        writer.close()

    async with (
        await asyncio.start_unix_server(talk, tmp_path / "other"),
        conversation(tmp_path / "other") as client,
    ):
        with pytest.raises(Unavailable, match="is not Firecracker"):
            await client.instance()
