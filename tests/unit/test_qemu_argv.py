"""QEMU's command line, as data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.base.procfs import UNKNOWN, Process
from banger.drivers.base import Disk, DiskFormat, Link, Machine, MemoryFile
from banger.drivers.hypervisor.qemu import QemuHypervisor, tsc_khz
from banger.drivers.hypervisor.qemu_argv import (
    Accelerator,
    HostFacts,
    Inherited,
    control_socket_in,
    option_value,
    qemu_argv,
)
from banger.drivers.hypervisor.qemu_program import QemuProgram

MACHINE = Machine(
    vm_id="vm-1",
    vcpu_count=2,
    memory_mib=512,
    kernel=Path("/k/vmlinux"),
    initramfs=Path("/k/initramfs"),
    kernel_parameters=("banger.init=minimal",),
    disks=(
        Disk("system", Path("/v/system.qcow2"), DiskFormat.QCOW2),
        Disk("modules", Path("/k/modules"), DiskFormat.RAW, read_only=True),
    ),
    console_log=Path("/v/console.log"),
    hypervisor_log=Path("/v/hypervisor.log"),
    control_socket=Path("/r/control.sock"),
    agent_socket=Path("/r/agent.sock"),
)
TCG = HostFacts(Accelerator.TCG, tsc_khz=2596120)
KVM = HostFacts(Accelerator.KVM, tsc_khz=2596120)


def words(host: HostFacts = TCG, machine: Machine = MACHINE, network_fd: int = -1) -> str:
    link = None if network_fd < 0 else Link.STREAM
    return " ".join(qemu_argv(machine, host, Inherited(7, network_fd, link), "02:00:00:00:00:01"))


def test_the_whole_command_line() -> None:
    for_tcg = "tsc_early_khz=2596120 no_timer_check tsc=reliable cryptomgr.notests"
    system_file = "file.driver=file,file.filename=/v/system.qcow2,file.discard=unmap"
    assert qemu_argv(MACHINE, TCG, Inherited(7, 8, Link.STREAM), "02:00:00:00:00:01") == (
        "qemu-system-x86_64",
        *("-name", "banger-vm-1"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        "-sandbox",
        "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        "-machine",
        (
            "microvm,x-option-roms=off,pit=off,pic=off,rtc=on,isa-serial=on,memory-backend=memory"
            ",suppress-vmdesc=on"
        ),
        *("-global", "migration.send-configuration=off"),
        *("-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2"),
        *("-m", "512M", "-object", "memory-backend-ram,id=memory,size=512M"),
        *("-kernel", "/k/vmlinux", "-initrd", "/k/initramfs"),
        "-append",
        f"console=ttyS0 quiet loglevel=5 panic=-1 reboot=t {for_tcg} banger.init=minimal",
        *("-chardev", "socket,id=control,path=/r/control.sock,server=on,wait=off"),
        *("-mon", "chardev=control,mode=control"),
        *("-chardev", "socket,id=launch,fd=7", "-mon", "chardev=launch,mode=control"),
        *("-chardev", "file,id=console,path=/v/console.log,append=on"),
        *("-serial", "chardev:console"),
        *("-chardev", "socket,id=agent,path=/r/agent.sock,server=on,wait=off"),
        *("-device", "virtio-serial-device"),
        *("-device", "virtserialport,chardev=agent,name=banger.agent"),
        *("-device", "virtio-rng-device"),
        "-blockdev",
        f"driver=qcow2,node-name=system,read-only=off,discard=unmap,{system_file}",
        *("-device", "virtio-blk-device,drive=system,serial=system"),
        "-blockdev",
        "driver=raw,node-name=modules,read-only=on,file.driver=file,file.filename=/k/modules",
        *("-device", "virtio-blk-device,drive=modules,serial=modules"),
        *("-netdev", "stream,id=network,server=off,addr.type=fd,addr.str=8"),
        *("-device", "virtio-net-device,netdev=network,mac=02:00:00:00:00:01"),
    )


def test_a_device_of_the_hosts_is_opened_without_a_cache() -> None:
    disk = Disk("system", Path("/dev/mapper/d"), DiskFormat.RAW, is_device=True)
    device = "file.driver=host_device,file.cache.direct=on,file.filename=/dev/mapper/d"
    node = f"driver=raw,node-name=system,read-only=off,discard=unmap,{device},file.discard=unmap"
    assert node in words(machine=replace(MACHINE, disks=(disk,)))


def test_equal_machines_have_equal_arguments() -> None:
    assert words() == words(machine=replace(MACHINE))


def test_without_a_network_there_is_no_interface() -> None:
    assert "-netdev" not in words()
    assert "virtio-net" not in words()


def test_qemus_own_user_networking_is_never_used() -> None:
    assert "user" not in words(network_fd=8).replace("-no-user-config", "")


def test_kvm_gives_the_guest_the_hosts_processor_and_no_help_with_its_clock() -> None:
    assert "-accel kvm -cpu host" in words(KVM)
    for parameter in ("tsc_early_khz", "no_timer_check", "tsc=", "cryptomgr.notests"):
        assert parameter not in words(KVM)


def test_an_unknown_tsc_rate_is_left_out() -> None:
    assert "tsc_early_khz" not in words(HostFacts(Accelerator.TCG, tsc_khz=0))


@pytest.mark.parametrize(
    ("text", "quoted"), [("/a", "/a"), ("/a,b", "/a,,b"), ("/a,,b", "/a,,,,b"), ("/a=b", "/a=b")]
)
def test_commas_are_doubled_in_option_values(text: str, quoted: str) -> None:
    assert option_value(Path(text)) == quoted


@given(st.text(min_size=1))
def test_a_quoted_value_is_one_value_to_qemu(text: str) -> None:
    # As QEMU reads it (util/keyval.c): a comma ends a value unless another one follows.
    assert option_value(text).replace(",,", "") == text.replace(",", "")
    assert option_value(text).replace(",,", ",") == text


def test_every_path_with_commas_is_quoted() -> None:
    odd = replace(
        MACHINE,
        disks=(Disk("system", Path("/v,id=x/d"), DiskFormat.RAW),),
        console_log=Path("/v,id=x/c"),
        control_socket=Path("/v,id=x/q"),
        agent_socket=Path("/v,id=x/a"),
    )
    line = words(machine=odd)
    assert line.count("/v,,id=x/") == 4
    assert "/v,id=x" not in line


def test_a_process_is_recognised_by_its_control_socket() -> None:
    argv = qemu_argv(MACHINE, TCG, Inherited(7))
    found = QemuHypervisor("auto", Path("/nowhere"), QemuProgram()).control_socket
    assert found(Process(argv)) == MACHINE.control_socket
    elsewhere = Process(("/usr/bin/qemu-system-x86_64", *argv[1:]))
    assert found(elsewhere) == MACHINE.control_socket
    assert found(Process(("tail", *argv[1:]))) is None
    assert found(UNKNOWN) is None


@given(st.text(st.characters(exclude_characters="\0/"), min_size=1))
def test_any_control_socket_is_recognised(name: str) -> None:
    odd = replace(MACHINE, control_socket=Path("/r") / name / "control.sock")
    assert control_socket_in(qemu_argv(odd, TCG, Inherited(7))) == odd.control_socket


@pytest.mark.parametrize(
    "value",
    [
        "socket,id=control,path=/r,server=off,path=/s,server=on,wait=off",
        "socket,id=control,path=/r,server=on",
        "socket,id=agent,path=/r,server=on,wait=off",
        "socket,id=control,path=,server=on,wait=off",
        "socket,id=control,path=,,server=on,wait=off",
    ],
)
def test_another_chardev_is_not_taken_for_a_control_socket(value: str) -> None:
    assert control_socket_in(("qemu-system-x86_64", "-chardev", value)) is None
    assert control_socket_in(("qemu-system-x86_64", "-chardev")) is None


def test_the_tsc_rate_is_half_of_bogomips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr("banger.drivers.hypervisor.qemu._CPUINFO", cpuinfo)
    cpuinfo.write_text("processor\t: 0\nbogomips\t: 5192.24\n")
    assert tsc_khz() == 2596120
    cpuinfo.write_text("processor\t: 0\n")
    assert tsc_khz() == 0


@pytest.mark.parametrize(("private", "share"), [(True, "off"), (False, "on")])
def test_memory_in_a_file_is_shared_or_private(private: bool, share: str) -> None:
    machine = replace(MACHINE, memory_file=MemoryFile(Path("/t/a,b"), private=private))
    backend = f"memory-backend-file,id=memory,size=512M,share={share},mem-path=/t/a,,b"
    assert f"-object {backend} " in words(machine=machine)


def test_an_incoming_machine_waits_for_its_state() -> None:
    argv = qemu_argv(MACHINE, TCG, Inherited(7), incoming=True)
    assert argv[-3:] == ("-S", "-incoming", "defer")
    assert argv[:-3] == qemu_argv(MACHINE, TCG, Inherited(7))
