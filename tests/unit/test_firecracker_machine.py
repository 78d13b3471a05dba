"""What Firecracker is told of a machine, as data, and what its errors become."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.base.errors import PermissionDenied, PreconditionFailed, Unavailable
from banger.base.procfs import Process
from banger.drivers.base import Disk, DiskFormat, Link, Machine
from banger.drivers.hypervisor import firecracker_machine as told
from banger.drivers.hypervisor.firecracker import parse_version
from banger.drivers.hypervisor.firecracker_faults import FirecrackerRefused, error_of
from banger.drivers.hypervisor.firecracker_place import Direct, firecracker_argv
from banger.drivers.hypervisor.firecracker_requests import (
    Action,
    BootSource,
    Drive,
    NetworkInterface,
    NetworkOverride,
    SnapshotLoad,
    Vsock,
)

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


@pytest.mark.parametrize(
    ("fault", "kind", "meaning"),
    [
        (
            "The requested operation is not supported after starting the microVM.",
            FirecrackerRefused,
            "runs already",
        ),
        (
            (
                "Start microvm error: Kvm error: Error creating KVM object: Permission denied (os"
                " error 13) Make sure the user launching the firecracker process is configured on"
                " the /dev/kvm file's ACL."
            ),
            PreconditionFailed,
            "no usable KVM",
        ),
        (
            (
                "Load snapshot error: Failed to restore from snapshot: Failed to get snapshot state"
                " from file: Failed to load snapshot state from file: Invalid data version: 9.0.0"
            ),
            FirecrackerRefused,
            "another release's",
        ),
        (
            (
                "Drive config error: Unable to create the virtio block device: Virtio backend"
                " error: Error manipulating the backing file: Permission denied (os error 13)"
                " disks/work"
            ),
            Unavailable,
            "cannot use a disk",
        ),
        (
            "Create snapshot error: Cannot write memory file: No space left on device (os error 2)",
            Unavailable,
            "the disk is full",
        ),
        ("Logger error: Permission denied (os error 13)", PermissionDenied, "may not open a file"),
    ],
)
def test_a_fault_says_what_it_means(fault: str, kind: type[Exception], meaning: str) -> None:
    error = error_of("PUT /somewhere", fault)
    assert type(error) is kind
    assert meaning in error.message
    assert fault in error.message
    assert error.hint


def test_a_fault_that_nobody_knows_is_passed_on() -> None:
    assert error_of("PUT /x", "what?").message == "Firecracker refuses PUT /x: what?"
