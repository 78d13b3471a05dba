"""What Firecracker is told of a machine, as data, and what its errors become."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.base.errors import Unavailable
from banger.base.procfs import Process
from banger.drivers.base import Disk, DiskFormat, Link, Machine, MachineLost, MemoryFile
from banger.drivers.hypervisor import firecracker_faults
from banger.drivers.hypervisor import firecracker_machine as told
from banger.drivers.hypervisor.firecracker import FirecrackerHypervisor, parse_version
from banger.drivers.hypervisor.firecracker_api import conversation
from banger.drivers.hypervisor.firecracker_faults import FirecrackerRefused, error_of
from banger.drivers.hypervisor.firecracker_place import Direct, firecracker_argv
from banger.drivers.hypervisor.firecracker_requests import (
    Action,
    BootSource,
    Drive,
    NetworkInterface,
    NetworkOverride,
    SetState,
    SnapshotLoad,
    VmState,
    Vsock,
)
from banger.drivers.hypervisor.kvm import KvmProbe
from stand_in_firecracker import serve_client

MACHINE = Machine(
    vm_id="0123456789ab",
    vcpu_count=2,
    memory_mib=512,
    kernel=Path("/k/vmlinux"),
    initramfs=Path("/k/initramfs"),
    kernel_parameters=("banger.init=minimal",),
    disks=(
        Disk("system", Path("/v/system.raw"), DiskFormat.RAW),
        Disk("work", Path("/v/work.raw"), DiskFormat.RAW),
        Disk("modules", Path("/k/modules.ext4"), DiskFormat.RAW, read_only=True),
    ),
    console_log=Path("/v/console.log"),
    hypervisor_log=Path("/v/hypervisor.log"),
    control_socket=Path("/r/control.sock"),
    agent_socket=Path("/r/agent.sock"),
)
INTERFACE = told.Interface("banger0-7", "02:00:00:00:00:07")


def test_disks_are_told_of_in_the_order_that_the_guest_is_told() -> None:
    requests = told.boot_requests(MACHINE, None, "/r/agent.sock")
    drives = [each for each in requests if isinstance(each, Drive)]
    assert [each.drive_id for each in drives] == ["system", "work", "modules"]
    assert [each.is_read_only for each in drives] == [False, False, True]
    (boot,) = (each for each in requests if isinstance(each, BootSource))
    words = boot.boot_args.split()
    assert "banger.disks=system,work,modules" in words
    assert {"reboot=k", "banger.end=reset", "banger.vsock=1023", "banger.init=minimal"} <= set(
        words
    )
    assert isinstance(requests[-1], Action)


def test_every_file_that_it_is_told_of_is_lent_by_that_name() -> None:
    lent = told.lent_for_boot(MACHINE)
    requests = told.boot_requests(MACHINE, None, "/r/agent.sock")
    named = {each.path_on_host for each in requests if isinstance(each, Drive)}
    named |= {
        name
        for each in requests
        if isinstance(each, BootSource)
        for name in (each.kernel_image_path, each.initrd_path)
    }
    assert named == set(lent)
    assert lent["disks/work"].path == Path("/v/work.raw")


def test_names_of_disks_are_the_same_in_the_machine_that_goes_on() -> None:
    restored = told.lent_for_restore(MACHINE, Path("/t/state"), Path("/t/memory"))
    booted = told.lent_for_boot(MACHINE)
    assert {each for each in restored if each.startswith("disks/")} <= set(booted)


def test_an_interface_is_joined_to_its_tap_again_when_a_machine_goes_on() -> None:
    boot = told.boot_requests(MACHINE, INTERFACE, "/r/a")
    (interface,) = (each for each in boot if isinstance(each, NetworkInterface))
    assert (interface.host_dev_name, interface.guest_mac) == (INTERFACE.tap, INTERFACE.mac)
    (load,) = (
        each for each in told.restore_requests(INTERFACE, "/r/a") if isinstance(each, SnapshotLoad)
    )
    assert load.network_overrides == (
        NetworkOverride(iface_id=interface.iface_id, host_dev_name=INTERFACE.tap),
    )
    assert load.vsock_override.uds_path == "/r/a"


@given(st.text())
def test_a_context_id_is_a_guests_and_the_same_at_each_boot(vm_id: str) -> None:
    assert 3 <= told.context_id(vm_id) < (1 << 32) - 1
    assert told.context_id(vm_id) == told.context_id(vm_id)


def test_machines_differ_in_their_context_ids() -> None:
    ids = {
        each.guest_cid
        for number in range(100)
        for each in told.boot_requests(replace(MACHINE, vm_id=f"{number:012x}"), None, "/r/a")
        if isinstance(each, Vsock)
    }
    assert len(ids) == 100


def test_a_shape_has_no_paths_and_no_names_in_it() -> None:
    other = replace(MACHINE, vm_id="b", kernel=Path("/x"), control_socket=Path("/y"))
    assert told.shape_of(other, Link.TAP) == told.shape_of(MACHINE, Link.TAP)
    assert told.shape_of(MACHINE, None) != told.shape_of(MACHINE, Link.TAP)
    assert told.shape_of(replace(MACHINE, memory_mib=256), None) != told.shape_of(MACHINE, None)


@pytest.mark.parametrize("program", ["firecracker", "/opt/firecracker-v1.16.1-x86_64"])
def test_its_command_line_is_recognised_and_no_other(program: str) -> None:
    argv = firecracker_argv(program, "a", "/r/control.sock", "/v/log")
    assert Direct(program).control_socket(Process(argv)) == Path("/r/control.sock")
    for wrong in (("sh", *argv[1:]), argv[:2], (), (*argv[:4], "out/api.sock")):
        assert Direct(program).control_socket(Process(wrong)) is None


@pytest.mark.parametrize(
    ("said", "version"),
    [
        (b"Firecracker v1.16.1\n\n", (1, 16, 1)),
        (b"Firecracker v1.16.0-dirty\n", (1, 16, 0)),
        (b"Jailer v1.16.1\n", ()),
        (b"", ()),
    ],
)
def test_a_release_is_read_from_what_it_says(said: bytes, version: tuple[int, ...]) -> None:
    assert parse_version(said) == version


_LOADED = "Load snapshot error: Failed to restore from snapshot: "
_STATE = f"{_LOADED}Failed to get snapshot state from file: Failed to "
_START = "Start microvm error: "

#: By what it is known by: as 1.16.1 says it, with errors of the system's as musl or glibc names
#: them.
FAULTS = {
    "(os error 12)": (
        f"{_START}Invalid Memory Configuration: Cannot create mmap region: Out of memory (os error"
        " 12)"
    ),
    "(os error 24)": (
        "Drive config error: Unable to create the virtio block device: Virtio backend error: Error"
        " manipulating the backing file: No file descriptors available (os error 24) disks/work"
    ),
    "(os error 98)": (
        "Vsock config error: Cannot create backend for vsock device: Error binding to the host-side"
        " Unix socket: Address in use (os error 98)"
    ),
    "not supported after starting the microVM": (
        "The requested operation is not supported after starting the microVM."
    ),
    "not supported before starting the microVM": (
        "The requested operation is not supported before starting the microVM."
    ),
    "Error creating KVM object": (
        f"{_START}Kvm error: Error creating KVM object: Permission denied (os error 13) Make sure"
        " the user launching the firecracker process is configured on the /dev/kvm file's ACL."
    ),
    "Kvm error:": f"{_START}Kvm error: The host kernel reports an invalid KVM API version: 11",
    "snapshot not allowed after configuring": (
        "Load snapshot error: Loading a microVM snapshot not allowed after configuring"
        " boot-specific resources."
    ),
    "Invalid data version": f"{_STATE}load snapshot state from file: Invalid data version: 9.0.0",
    "CRC64 validation failed": f"{_STATE}load snapshot state from file: CRC64 validation failed",
    "the tap device": (
        "Network config error: Cannot open/create the tap device: Error while creating ifreq"
        " structure: Operation not permitted (os error 1). Invalid TUN/TAP Backend provided by"
        " banger0-7. Check our documentation on setting up the network devices."
    ),
    "No space left on device": (
        "Create snapshot error: Cannot write memory file: No space left on device (os error 28)"
    ),
    "The kernel file cannot be opened": (
        "Boot source error: The kernel file cannot be opened: Permission denied (os error 13)"
    ),
    "without kernel configuration": f"{_START}Cannot start microvm without kernel configuration.",
    "The initrd file cannot be opened": (
        "Boot source error: The initrd file cannot be opened due to invalid path or invalid"
        " permissions. No such file or directory (os error 2)"
    ),
    "Error with initrd initialization": (
        f"{_START}Error with initrd initialization: Failed to compute the initrd address.."
    ),
    "the virtio block device": (
        "Drive config error: Unable to create the virtio block device: Virtio backend error: Error"
        " manipulating the backing file: Permission denied (os error 13) disks/work"
    ),
    "Cannot initialize the metrics system": (
        "Metrics error: Cannot initialize the metrics system due to bad user input: No such file or"
        " directory (os error 2)"
    ),
    "Amount of pages requested is too large": (
        "Balloon config error: Amount of pages requested is too large."
    ),
    "Permission denied": (
        "Create snapshot error: Cannot perform open on the snapshot backing file: Permission denied"
        " (os error 13)"
    ),
    "Failed to get snapshot state from file": (
        f"{_STATE}open snapshot file: No such file or directory (os error 2)"
    ),
    "Failed to restore from snapshot": (
        f"{_LOADED}Failed to load guest memory: Error creating guest memory from file: Failed to"
        " load guest memory: No such file or directory (os error 2)"
    ),
    "The memory size (MiB) is": (
        "Machine config error: The memory size (MiB) is either 0, or not a multiple of the"
        " configured page size."
    ),
    "The number of vCPUs must be": (
        "Machine config error: The number of vCPUs must be greater than 0, less than 32 and must be"
        " 1 or an even number if SMT is enabled."
    ),
    "Cannot set the memory regions": (
        f"{_START}Error with the KvmVm object: Cannot set the memory regions: Invalid argument (os"
        " error 22)"
    ),
}


def test_of_every_fault_that_is_known_there_is_an_example() -> None:
    assert [each.says for each in firecracker_faults._KNOWN] == list(FAULTS)
    meanings = {each.meaning for each in firecracker_faults._KNOWN}
    assert len(meanings) == len(FAULTS)


@pytest.mark.parametrize("known", firecracker_faults._KNOWN, ids=lambda known: known.says)
def test_a_fault_says_what_it_means_and_what_to_do(known: firecracker_faults._Known) -> None:
    fault = FAULTS[known.says]
    error = error_of("PUT /somewhere", fault, "0123456789ab")
    assert type(error) is known.error
    assert error.message == f"Firecracker refuses PUT /somewhere: {known.meaning}: {fault}"
    assert error.hint
    assert "{" not in error.hint
    # What can be pasted.
    assert ("banger vm" in error.hint) == ("0123456789ab" in error.hint)


@pytest.mark.parametrize("fault", [FAULTS["(os error 12)"], FAULTS["(os error 98)"]])
def test_what_the_host_lacks_is_not_held_against_a_saved_state(fault: str) -> None:
    """Of a refusal, a template would be thrown away."""
    error = error_of("PUT /snapshot/load", f"{_LOADED}{fault}", "0123456789ab")
    assert type(error) is Unavailable


def test_a_fault_that_nobody_knows_is_passed_on_with_where_to_look() -> None:
    error = error_of("PUT /x", "what?", "0123456789ab")
    assert error.message == "Firecracker refuses PUT /x: what?"
    assert isinstance(error, FirecrackerRefused)
    assert error.fault == "what?"
    assert "vms/0123456789ab/hypervisor.log" in error.hint
    assert "banger vm logs 0123456789ab" in error.hint


@pytest.mark.parametrize(
    ("directory", "vm"), [("0123456789ab", "0123456789ab"), ("elsewhere", "NAME")]
)
async def test_a_refused_request_names_the_machine_by_its_id(
    tmp_path: Path, directory: str, vm: str
) -> None:
    socket = tmp_path / directory / "control.sock"
    socket.parent.mkdir()

    async def answer(method: str, path: str, body: bytes) -> tuple[int, object | None]:
        return 400, {"fault_message": FAULTS["not supported after starting the microVM"]}

    turn = asyncio.Lock()
    server = await asyncio.start_unix_server(
        lambda reader, writer: serve_client(answer, turn, reader, writer), socket
    )
    async with server, conversation(socket) as client:
        with pytest.raises(FirecrackerRefused) as refused:
            await client.tell(SetState(state=VmState.PAUSED))
    assert refused.value.hint == f"end it: banger vm kill {vm}"


class _Agreeing:
    """A client whose Firecracker does all that it is told."""

    async def tell(self, request: object) -> None:
        pass


@pytest.mark.parametrize("ran", [False, True])
async def test_whether_a_machine_may_have_run_is_known_when_the_host_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ran: bool
) -> None:
    """By that it is decided whether a suspended machine keeps its memory."""

    @asynccontextmanager
    async def started(*_: object) -> AsyncIterator[SimpleNamespace]:
        if ran:
            yield SimpleNamespace(client=_Agreeing(), pid=1)
        raise BlockingIOError(errno.EAGAIN, "no process can be made now")

    async def probe() -> KvmProbe:
        return KvmProbe(True, "not asked")

    monkeypatch.setattr(FirecrackerHypervisor, "_started", started)
    machine = replace(MACHINE, disks=(), memory_file=MemoryFile(tmp_path / "memory", private=True))
    with pytest.raises(MachineLost if ran else BlockingIOError, match="no process"):
        await FirecrackerHypervisor(Direct("firecracker"), probe).restore(
            machine, None, tmp_path / "state"
        )
