"""Jails as data: what is asked for, what the jailer is told, and how a jailed machine is known."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from banger.base import jail, proc, procfs
from banger.base.errors import (
    BadRequest,
    Conflict,
    PermissionDenied,
    PreconditionFailed,
    Unavailable,
)
from banger.base.files import remove_hostile_tree, write_atomically
from banger.base.jail import UID_FIRST, UID_LAST, is_vm_id, jail_uid
from banger.base.procfs import UNKNOWN, Process
from banger.drivers.base import Check, Level, Machine
from banger.drivers.hypervisor import firecracker_jail
from banger.drivers.hypervisor.firecracker import FirecrackerHypervisor
from banger.drivers.hypervisor.firecracker_jail import Jailed
from banger.drivers.hypervisor.firecracker_place import Direct, Place
from banger.drivers.hypervisor.kvm import KvmProbe
from banger.drivers.hypervisor.qemu import QemuHypervisor
from banger.drivers.hypervisor.qemu_program import QemuProgram
from banger.hostops import (
    jail_files,
    jail_groups,
    jail_launcher,
    jail_programs,
    jails,
    links,
    mappings,
)
from banger.hostops.client import HelperHost
from banger.hostops.jail_files import Owner
from banger.hostops.jail_launcher import JailFile, JailOrder, jail_root, jailer_argv
from banger.hostops.jail_programs import Programs
from banger.hostops.ops import CheckJail, Done, EndJail, InJail, LaunchJail, Operation
from fakes import JailedProcess

VM_ID, OTHER_ID = "0123456789ab", "ba9876543210"
OWNER = Owner(os.getuid(), frozenset({os.getgid()}))
LAUNCH = LaunchJail(
    vm_id=VM_ID,
    vcpu_count=2,
    memory_mib=512,
    files=(InJail(name="kernel", read_only=True), InJail(name="disks/system", read_only=False)),
    bridge="banger0",
    tap="banger0-0a0b0c",
    inputs=(-1, -1),
)
ORDER = JailOrder(
    vm_id=VM_ID,
    uid=jail_uid(VM_ID),
    firecracker="/usr/local/bin/firecracker-v1.16.1",
    jailer="/usr/local/bin/jailer",
    group="/sys/fs/cgroup/banger-1000/0123456789ab",
    parent_group="banger-1000",
    limits=jail_groups.limits(2, 512),
    files=(JailFile(name="kernel", descriptor=7, read_only=True),),
    console=8,
    log=9,
    network=10,
    has_interface=True,
    report=11,
    parent=1,
)


@given(st.text("0123456789abcdef", min_size=12, max_size=12))
def test_each_machine_has_a_uid_that_nobody_else_is_given(vm_id: str) -> None:
    assert is_vm_id(vm_id)
    assert UID_FIRST <= jail_uid(vm_id) <= UID_LAST
    # sssd's ids are below, systemd's foreign ones above.
    assert UID_FIRST > 2_000_200_000
    assert UID_LAST < 0x7FFE0000


def test_the_jailer_is_told_all_of_it_and_nothing_of_the_callers() -> None:
    assert jailer_argv(ORDER) == (
        *("/usr/local/bin/jailer", "--id", VM_ID),
        *("--exec-file", "/usr/local/bin/firecracker-v1.16.1"),
        *("--uid", "2000757573", "--gid", "2000757573", "--chroot-base-dir", "/run/banger/jail"),
        *("--cgroup-version", "2", "--parent-cgroup", "banger-1000"),
        *("--cgroup", f"memory.max={(512 + 128) << 20}"),
        *("--cgroup", "cpu.max=300000 100000", "--cgroup", "pids.max=18"),
        *("--resource-limit", "no-file=1024"),
        *("--", "--api-sock", "out/api.sock", "--log-path", "log", "--level", "Warning"),
    )
    # As the jailer makes it of the same.
    assert jail_root(ORDER) == Path("/run/banger/jail/firecracker-v1.16.1/0123456789ab/root")


def test_a_large_machine_may_have_more_beside_its_memory() -> None:
    assert jail_groups.limits(1, 65536)[0] == f"memory.max={(65536 + 4096) << 20}"


def test_a_usual_jail_and_one_without_a_network_pass() -> None:
    LAUNCH.check()
    msgspec.structs.replace(LAUNCH, bridge="", tap="").check()
    EndJail(vm_id=VM_ID).check()


@pytest.mark.parametrize(
    "wrong",
    [
        {"vm_id": "../../../etc"},
        {"vm_id": "0123456789AB"},
        {"vcpu_count": 0},
        {"vcpu_count": 65},
        {"memory_mib": 0},
        {"memory_mib": 1 << 40},
        {"inputs": (-1,)},
        {"inputs": (-1, -1, -1)},
        {"tap": "eth0"},
        {"tap": "banger1-0a0b0c"},
        {"tap": ""},
        {"bridge": ""},
        {"bridge": "br0", "tap": "br0-0a0b0c"},
        {"files": (InJail(name="kernel", read_only=True),) * 2},
        *(
            {"files": (InJail(name=name, read_only=True),), "inputs": (-1,)}
            for name in ("", "..", "/etc", "disks/..", "disks/../x", "out", "log", "dev/kvm",
                         "disks/a/b", "firecracker", "disks/", "kernel\n")
        ),
        {
            "files": tuple(InJail(name=f"disks/d{n}", read_only=True) for n in range(14)),
            "inputs": (-1,) * 14,
        },
    ],
)  # fmt: skip
def test_what_no_machine_is_made_of_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(BadRequest):
        msgspec.structs.replace(LAUNCH, **wrong).check()


@pytest.fixture
def opened(tmp_path: Path) -> LaunchJail:
    """A jail's descriptors as the daemon opens them; they go with the test's process."""
    (tmp_path / "out").mkdir(mode=0o700)
    for name in ("kernel", "system"):
        (tmp_path / name).write_bytes(b"x")
    appended = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    flags = {
        "out": os.O_RDONLY | os.O_DIRECTORY,
        **dict.fromkeys(("console", "log"), appended),
        "kernel": os.O_RDONLY,
        "system": os.O_RDWR,
    }
    return LAUNCH.with_descriptors(
        tuple(os.open(tmp_path / name, each, 0o600) for name, each in flags.items())
    )


def test_the_owners_files_are_taken_and_anothers_are_not(opened: LaunchJail) -> None:
    jail_files.check(opened, OWNER)
    with pytest.raises(PermissionDenied, match="belongs to uid"):
        jail_files.check(opened, Owner(OWNER.uid + 1, OWNER.gids))
    names = [each.name for each in jail_files.lent(opened)]
    assert names == ["out", "log", "kernel", "disks/system"]


@pytest.mark.parametrize(
    ("index", "name", "flags", "message"),
    [
        (0, "kernel", os.O_RDONLY, "kind of file"),
        (1, "out", os.O_RDONLY, "kind of file"),
        (1, "console", os.O_WRONLY, "appended"),
        (2, "log", os.O_RDWR | os.O_APPEND, "appended"),
        (3, "out", os.O_RDONLY, "kind of file"),
        (3, "kernel", os.O_WRONLY, "not open for"),
        (3, "kernel", os.O_PATH, "only named"),
        (4, "system", os.O_RDONLY, "not open for"),
    ],
)
def test_what_is_not_open_for_what_is_asked_is_refused(
    opened: LaunchJail, tmp_path: Path, index: int, name: str, flags: int, message: str
) -> None:
    descriptors = list(opened.descriptors)
    descriptors[index] = os.open(tmp_path / name, flags)
    with pytest.raises((BadRequest, PermissionDenied), match=message):
        jail_files.check(opened.with_descriptors(tuple(descriptors)), OWNER)


def test_a_directory_that_others_can_enter_is_no_jails(opened: LaunchJail, tmp_path: Path) -> None:
    (tmp_path / "out").chmod(0o755)
    with pytest.raises(PermissionDenied, match="open to others"):
        jail_files.check(opened, OWNER)


def test_a_name_is_looked_up_without_following_links(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/file").write_text("x")
    (tmp_path / "link").symlink_to("real")
    found = jail_launcher._named(tmp_path / "real/file")
    assert os.fstat(found).st_ino == (tmp_path / "real/file").stat().st_ino
    os.close(found)
    with pytest.raises(NotADirectoryError):
        jail_launcher._named(tmp_path / "link/file")


def test_root_walks_for_the_caller_and_does_not_tell_what_is_there(
    opened: LaunchJail, tmp_path: Path
) -> None:
    wrong = [tmp_path / "none", tmp_path / "system", tmp_path / "kernel/x"]
    said = set()
    for path in wrong:
        with pytest.raises(jail_launcher._Refused) as refused:
            jail_launcher._found(path, os.fstat(opened.inputs[0]))
        said.add(str(refused.value).removeprefix(str(path)))
    assert said == {" is not to be found where it was opened"}


def test_a_path_of_any_bytes_is_told(capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    with pytest.raises(SystemExit):
        jail_launcher._fail(f"{os.fsdecode(bytes([0xFF]))} is not to be found")
    failed = msgspec.json.decode(capsysbinary.readouterr().out, type=jail_launcher.LaunchFailed)
    assert failed.message == "? is not to be found"


def test_a_device_that_is_only_named_is_refused_before_it_is_looked_at(opened: LaunchJail) -> None:
    device = next((each for each in Path("/dev").iterdir() if each.is_block_device()), None)
    if device is None:
        pytest.skip("there is no block device in /dev: load one, modprobe loop")
    named = os.open(device, os.O_PATH)
    wrong = opened.with_descriptors((*opened.descriptors[:-1], named))
    with pytest.raises(PermissionDenied, match="only named"):
        jail_files.check(wrong, OWNER)


@pytest.mark.parametrize("name", ["out", "console", "log", "system"])
def test_what_cannot_be_written_outside_is_not_written_in_a_jail(
    opened: LaunchJail, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    read_only = (tmp_path / name).stat().st_ino
    real = os.statvfs_result((0,) * 10)
    wrong = os.statvfs_result((*(0,) * 8, os.ST_RDONLY, 0))
    monkeypatch.setattr(
        os, "fstatvfs", lambda fd: wrong if os.fstat(fd).st_ino == read_only else real
    )
    with pytest.raises(PermissionDenied, match="nothing can be written"):
        jail_files.check(opened, OWNER)


def test_what_is_only_read_may_be_where_nothing_can_be_written(
    opened: LaunchJail, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = (tmp_path / "kernel").stat().st_ino
    flags = {True: os.ST_RDONLY, False: 0}
    monkeypatch.setattr(
        os,
        "fstatvfs",
        lambda fd: os.statvfs_result((*(0,) * 8, flags[os.fstat(fd).st_ino == kernel], 0)),
    )
    jail_files.check(opened, OWNER)


def test_a_file_of_a_group_that_its_owner_is_not_in_is_refused(opened: LaunchJail) -> None:
    with pytest.raises(PermissionDenied, match="belongs to group"):
        jail_files.check(opened, Owner(OWNER.uid, frozenset({os.getgid() + 1})))
    assert os.getgid() in jail_files.owner_of(os.getuid()).gids
    assert jail_files.owner_of(UID_LAST) == Owner(UID_LAST, frozenset())


@pytest.mark.parametrize("look_up", ["pwd.getpwuid", "grp.getgrgid"])
def test_a_uid_that_somebody_has_is_no_jails(monkeypatch: pytest.MonkeyPatch, look_up: str) -> None:
    jails._check_nobodys(VM_ID)
    monkeypatch.setattr(look_up, {jail_uid(VM_ID): ("mallory",)}.__getitem__)
    with pytest.raises(Conflict, match="mallory has the number"):
        jails._check_nobodys(VM_ID)


def test_a_new_control_group_can_be_killed_and_ends_as_one(tmp_path: Path) -> None:
    group = tmp_path / "banger-7" / VM_ID
    with pytest.raises(PreconditionFailed, match="cannot be killed") as refused:
        jail_groups.make_group(group)
    assert "5.14" in refused.value.hint
    assert not group.exists()
    group.mkdir(mode=0o700)
    group.parent.chmod(0o700)  # as the helper's umask has it
    (group / "cgroup.kill").touch()
    jail_groups.make_group(group)
    assert [each.stat().st_mode & 0o777 for each in (group, group.parent)] == [0o755, 0o755]
    assert (group / "memory.oom.group").read_text() == "1"
    assert not (group / "memory.swap.max").exists()
    (group / "memory.swap.max").write_text("max")
    jail_groups.make_group(group)
    assert (group / "memory.swap.max").read_text() == "0"
    for directory in (tmp_path, tmp_path / "banger-7"):
        assert (directory / "cgroup.subtree_control").read_text() == "+memory"


async def test_clearing_after_a_failed_launch_does_not_hide_why_it_failed(
    opened: LaunchJail, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All steps of it are done, and each that fails is logged."""
    cleared = []

    async def found() -> Programs:
        return Programs("/firecracker", "/jailer")

    async def end(vm_id: str) -> None:
        cleared.append(vm_id)
        raise Unavailable("cannot be killed")

    def remove_uplink(name: str) -> None:
        cleared.append(name)
        raise OSError("no netlink")

    _groups(tmp_path, "cpu memory pids")
    made = jails.Jails(os.getuid(), "firecracker", "jailer")
    monkeypatch.setattr(made._programs, "found", found)
    monkeypatch.setattr(made, "end", end)
    monkeypatch.setattr(jail_groups, "groups_root", lambda: tmp_path)
    monkeypatch.setattr(jails, "_have_base", lambda: None)
    monkeypatch.setattr(jails, "_network", lambda *_: nullcontext(-1))
    monkeypatch.setattr(links, "remove_uplink", remove_uplink)
    with structlog.testing.capture_logs() as logs, pytest.raises(PreconditionFailed, match="kill"):
        await made.launch(opened)
    assert cleared == [VM_ID, opened.tap]
    assert [each["error"] for each in logs] == ["cannot be killed", "no netlink"]


async def test_the_mapping_of_a_jailed_machine_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []

    async def dmsetup(*words: str) -> str:
        done.append(words[0])
        return f"{mappings.mapping_name(VM_ID)}/{mappings.mapping_uuid(VM_ID, '89abcdef', 7)}\n"

    monkeypatch.setattr(mappings, "_dmsetup", dmsetup)
    monkeypatch.setattr(mappings, "_DRIVER", tmp_path)
    monkeypatch.setattr(jail, "groups_root", lambda: tmp_path)
    _groups(tmp_path, "", f"banger-7/{VM_ID}")
    with pytest.raises(Conflict, match="in a jail"):
        await mappings.remove(VM_ID, 7)
    (tmp_path / "banger-7" / VM_ID / "cgroup.events").write_text("populated 0\nfrozen 0\n")
    await mappings.remove(VM_ID, 7)
    assert done == ["info", "info", "remove"]


def _groups(root: Path, controllers: str, *populated: str) -> None:
    (root / "cgroup.controllers").write_text(controllers)
    for name in populated:
        (root / name).mkdir(parents=True)
        (root / name / "cgroup.events").write_text("populated 1\nfrozen 0\n")


def test_two_machines_never_share_a_uid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jail_groups, "groups_root", lambda: tmp_path)
    _groups(tmp_path, "cpu memory pids io", "banger-7/0123456789ab", "banger-8/fedcba000000")
    made = jails.Jails(7, "firecracker", "jailer")
    made._check_free(tmp_path, "111111000000")
    with pytest.raises(Conflict, match="already"):
        made._check_free(tmp_path, "0123456789ab")
    # Another user's: the uid alone decides.
    with pytest.raises(Conflict, match="has the uid"):
        made._check_free(tmp_path, "fedcba999999")


def test_without_control_groups_there_is_no_jail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jail_groups, "groups_root", lambda: tmp_path)
    _groups(tmp_path, "cpu pids")
    with pytest.raises(PreconditionFailed, match="lack what jails are limited by: memory"):
        jail_groups.usable_root()
    monkeypatch.setattr(jail_groups, "groups_root", lambda: None)
    with pytest.raises(PreconditionFailed, match="cpu memory pids"):
        jail_groups.usable_root()


@pytest.mark.parametrize(
    ("release", "good"),
    [
        ("5.13.19", False),
        ("4.18.0-553.el8_10.x86_64", False),
        ("5.4", False),
        ("5.14.0-427.el9.x86_64", True),
        ("5.15.0-105-generic", True),
        ("6.1.0-18-cloud-amd64", True),
        ("10.0", True),
        ("of tomorrow", True),
    ],
)
def test_kernels_that_cannot_kill_control_groups_are_told_by_their_release(
    release: str, good: bool
) -> None:
    assert (jail_groups.kernel_problem(release) == "") == good
    assert good or f"Linux {release} " in jail_groups.kernel_problem(release)


async def test_all_that_jails_lack_is_told_in_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _groups(tmp_path, "cpu pids")
    monkeypatch.setattr(jail_groups, "groups_root", lambda: tmp_path)
    monkeypatch.setattr(jail_groups, "kernel_problem", lambda _: "the kernel is old")
    made = jails.Jails(7, str(tmp_path / "firecracker"), str(tmp_path / "jailer"))
    with pytest.raises(PreconditionFailed) as refused:
        await made.check()
    for lacking in ("firecracker is not", "jailer is not", "kernel is old", "limited by: memory"):
        assert lacking in refused.value.message
    hints = (
        "into /usr/local/bin",
        "boot Linux 5.14",
        "boot with systemd.",
        "jailer_enabled = false",
    )
    assert [refused.value.hint.count(hint) for hint in hints] == [1, 1, 1, 1]

    async def found() -> Programs:
        return Programs("/firecracker", "/jailer")

    monkeypatch.setattr(made._programs, "found", found)
    with pytest.raises(PreconditionFailed, match="the kernel is old; control groups"):
        await made.check()
    _groups(tmp_path, "cpu memory pids")
    monkeypatch.setattr(jail_groups, "kernel_problem", lambda _: "")
    assert await made.check() == "/firecracker"


def test_root_runs_no_firecracker_that_others_can_change(tmp_path: Path) -> None:
    program = tmp_path / "firecracker"  # below /tmp, whoever owns it
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    with pytest.raises(PreconditionFailed, match="others can change"):
        jail_programs.trusted(str(program))
    with pytest.raises(PreconditionFailed, match="not installed"):
        jail_programs.trusted(str(tmp_path / "jailer"))


# --- the daemon's side ---


@pytest.mark.parametrize(
    ("group", "found"),
    [
        ("0::/banger-1000/0123456789ab\n", VM_ID),
        ("1:cpu:/x\n0::/banger-1000/0123456789ab\n", VM_ID),
        ("0::/banger-1001/0123456789ab\n", ""),
        ("0::/x/banger-1000/0123456789ab\n", ""),
        ("0::/banger-1000/0123456789ab/more\n", ""),
        ("0::/banger-1000\n", ""),
        ("0::/\n", ""),
        ("1:cpu:/banger-1000/0123456789ab\n", ""),
    ],
)
def test_whose_machine_a_process_is_its_control_group_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: str, found: str
) -> None:
    monkeypatch.setattr(jail, "_PROC", tmp_path)
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "cgroup").write_text(group)
    assert jail.jailed_vm(7, 1000) == found
    assert jail.jailed_vm(8, 1000) == ""


def _firecracker(first: Place, *earlier: Place) -> FirecrackerHypervisor:
    async def probe() -> KvmProbe:
        raise AssertionError("no machine is started")

    return FirecrackerHypervisor(first, probe, earlier=earlier)


def _jailed(*directories: Path) -> Jailed:
    return Jailed(HelperHost(Path("/nowhere")), directories, Path("/nowhere/jails"))


class Without(Jailed):
    """A place of jails without any, or with a release that nobody knows."""

    def __init__(self, *, has_program: bool) -> None:
        super().__init__(HelperHost(Path("/nowhere")), (), Path("/nowhere/jails"))
        self._has_program = has_program

    async def program(self) -> str:
        raise PreconditionFailed("it is of another release")

    async def check(self) -> Check:
        if not self._has_program:
            raise PreconditionFailed("there is no jailer")
        return Check("jailer", Level.OK, "there is one")


def test_a_jailed_machine_is_known_by_its_id_where_its_sockets_are(tmp_path: Path) -> None:
    place = _jailed(tmp_path / "vms", tmp_path / "templates")
    assert place.control_socket(Process(jail=VM_ID)) is None  # another home's
    (tmp_path / "templates" / VM_ID).mkdir(parents=True)
    socket = tmp_path / "templates" / VM_ID / "control.sock"
    assert place.control_socket(Process(jail=VM_ID)) == socket
    argv = ("/firecracker", "--id", VM_ID, *jailer_argv(ORDER)[-6:])
    for wrong in (UNKNOWN, Process(argv), Process(jail="ffffff000000")):
        assert place.control_socket(wrong) is None


@pytest.mark.parametrize("claim", ["qemu", "direct", "jailed"])
def test_a_jailed_machine_cannot_pose_as_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, claim: str
) -> None:
    """Whatever it makes of its arguments, to no hypervisor is it any machine but the one it is."""
    own, others = (tmp_path / each / "control.sock" for each in (VM_ID, OTHER_ID))
    for socket in (own, others):
        socket.parent.mkdir()
    chardev = f"socket,id=control,path={others},server=on,wait=off"
    claims = {
        "qemu": ("qemu-system-x86_64", "-chardev", chardev),
        "direct": ("firecracker", "--api-sock", str(others)),
        "jailed": ("/firecracker", "--id", OTHER_ID, "--api-sock", "out/api.sock"),
    }
    place, direct = _jailed(tmp_path), Direct("")
    qemu = QemuHypervisor("tcg", tmp_path, QemuProgram())
    argv = (*claims[claim], "--id", VM_ID)
    # Of a process of ours, which is no machine in a jail, it would be believed.
    said = [each.control_socket(Process(argv)) for each in (qemu, direct)]
    assert said == {"qemu": [others, None], "direct": [None, others], "jailed": [None, None]}[claim]
    JailedProcess(tmp_path / "proc", VM_ID, monkeypatch).says(*argv)
    ((_, process),) = procfs.own_processes()
    for first, second in ((place, direct), (direct, place)):
        assert _firecracker(first, second).control_socket(process) == own
    assert (direct.control_socket(process), qemu.control_socket(process)) == (None, None)


async def test_a_jailed_machine_is_found_by_a_daemon_with_another_runtime_directory(
    prisons: Prisons, tmp_path: Path
) -> None:
    prisons.host.jailer_says = "started"
    started = await prisons.place.start(prisons.machine, {}, None)
    await started.ended
    others = tmp_path / "another"
    following = Jailed(prisons.host, (others,), prisons.marks)
    found = following.control_socket(Process(jail=VM_ID))
    assert found == prisons.socket
    assert following.runs(found)
    (others / VM_ID).mkdir(parents=True)  # which says nothing of where it was started
    assert following.control_socket(Process(jail=VM_ID)) == prisons.socket
    assert following.control_socket(Process(jail=OTHER_ID)) is None
    await following.clear(found)
    assert prisons.host.ended == [VM_ID]
    assert (list(prisons.marks.iterdir()), found.is_symlink()) == ([], False)


@pytest.mark.parametrize("mark", [b"", b"relative", b"/where/nothing/is/any/more"])
def test_a_mark_that_leads_nowhere_leaves_it_to_the_directories_that_there_are(
    prisons: Prisons, mark: bytes
) -> None:
    """Marks of earlier versions are empty."""
    prisons.marks.mkdir()
    (prisons.marks / VM_ID).write_bytes(mark)
    assert prisons.place.control_socket(Process(jail=VM_ID)) == prisons.socket


async def test_without_a_helper_no_machine_is_jailed_and_it_is_said_why() -> None:
    with pytest.raises(PreconditionFailed, match="no helper") as refused:
        await _jailed().program()
    assert "sudo banger system install" in refused.value.hint
    assert "jailer_enabled = false" in refused.value.hint
    assert 'hypervisor = "qemu"' in refused.value.hint
    assert "--network user" not in refused.value.hint  # it cannot have that


async def test_an_installations_helper_that_is_not_there_just_now_is_asked(
    prisons: Prisons, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asks waits for it to be started again; until then nothing says what is lacking."""
    monkeypatch.setattr(prisons.host, "problem", "there is no helper")
    assert await prisons.place.program() == str(prisons.firecracker)
    monkeypatch.setattr(prisons.host, "installed", False)
    with pytest.raises(PreconditionFailed, match="there is no helper"):
        await prisons.place.check()


@pytest.mark.parametrize("has_program", [True, False])
async def test_all_that_machines_in_jails_lack_is_told(has_program: bool) -> None:
    """Of KVM, too, where there is no jail; where there is one, of the program in it."""

    async def probe() -> KvmProbe:
        return KvmProbe(False, "there is no device", "load its module")

    place = Without(has_program=has_program)
    program, accelerator, *jail = await FirecrackerHypervisor(place, probe).checks()
    assert program.level is Level.FAIL
    assert (accelerator.level, accelerator.detail) == (Level.FAIL, "there is no device")
    assert accelerator.hint == 'load its module; without KVM: hypervisor = "qemu"'
    assert [each.name for each in jail] == (["jailer"] if has_program else [])


async def test_a_machine_with_a_device_of_its_own_does_not_need_the_daemons() -> None:
    async def probe() -> KvmProbe:
        return KvmProbe(False, "no rights", "have them", denied=True)

    jailed = await FirecrackerHypervisor(_jailed(), probe).accelerator_check()
    assert (jailed.level, "no rights" in jailed.detail) == (Level.WARN, True)
    assert "have them" in jailed.hint
    direct = await FirecrackerHypervisor(Direct(""), probe).accelerator_check()
    assert direct.level is Level.FAIL


def test_what_a_jail_has_made_is_taken_out_of_its_reach(tmp_path: Path) -> None:
    made, path = tmp_path / "made", tmp_path / "state"
    made.write_text("state")
    path.write_text("an earlier one")
    firecracker_jail._take(made, path)
    assert (path.read_text(), made.exists()) == ("state", False)


def test_a_link_that_a_jail_has_made_leads_nowhere(tmp_path: Path) -> None:
    made, path, secret = tmp_path / "made", tmp_path / "state", tmp_path / "secret"
    secret.write_text("secret")
    made.symlink_to(secret)
    with pytest.raises(OSError, match="symbolic links"):
        firecracker_jail._take(made, path)
    made.unlink()
    os.link(secret, made)
    with pytest.raises(OSError, match="not a file of its own"):
        firecracker_jail._take(made, path)
    assert (secret.read_text(), path.exists()) == ("secret", False)


@pytest.mark.parametrize("kind", ["pipe", "directory"])
async def test_what_is_no_file_is_not_taken(tmp_path: Path, kind: str) -> None:
    world = Prisons(tmp_path)
    made, path = world.out / "state", tmp_path / "state"
    world.out.mkdir()
    world.socket.symlink_to(world.out / "api.sock")
    os.mkfifo(made) if kind == "pipe" else made.mkdir()
    path.write_text("an earlier one")
    with pytest.raises(Unavailable, match="state cannot be had"):
        await world.place.collect(world.socket, path)
    assert not path.exists()


def test_a_file_from_another_file_system_keeps_its_holes_and_is_ours_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, path = tmp_path / "made", tmp_path / "state"
    with made.open("wb") as file:
        file.truncate(1 << 40)
        file.seek(1 << 30)
        file.write(b"state")
    made.chmod(0o666)

    def elsewhere(*_: object) -> None:
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(Path, "rename", elsewhere)
    firecracker_jail._take(made, path)
    status = path.stat()
    assert (status.st_size, status.st_mode & 0o777, made.exists()) == (1 << 40, 0o600, False)
    assert status.st_blocks < 4096
    with path.open("rb") as copy:
        copy.seek(1 << 30)
        assert copy.read(5) == b"state"


def test_only_another_file_system_leads_to_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, path = tmp_path / "made", tmp_path / "state"
    made.write_text("state")

    def refused(*_: object) -> None:
        raise PermissionError(errno.EPERM, "no")

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(PermissionError):
        firecracker_jail._take(made, path)
    assert not path.exists()


def test_a_tree_goes_however_deep_and_whatever_its_permissions(tmp_path: Path) -> None:
    tree, secret = tmp_path / "tree", tmp_path / "secret"
    secret.write_text("secret")
    tree.mkdir()
    (tree / "link").symlink_to(tmp_path)
    here = os.open(tree, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(os.open("file", os.O_CREAT, 0, dir_fd=below))
        os.fchmod(here, 0)
        os.close(here)
        here = below
    os.close(here)
    remove_hostile_tree(tree)
    remove_hostile_tree(tree)
    assert not tree.exists()
    assert secret.exists()


def test_a_tree_goes_although_a_log_in_it_is_just_being_cut(tmp_path: Path) -> None:
    for _ in range(20):
        tree = tmp_path / "tree"
        tree.mkdir()

        def cut_logs(tree: Path = tree) -> None:
            with suppress(FileNotFoundError):
                for _ in range(1000):
                    write_atomically(tree / "log.old", b"", durable=False)

        with ThreadPoolExecutor(1) as other:
            cutting = other.submit(cut_logs)
            while not list(tree.iterdir()):  # until it is being cut
                pass
            remove_hostile_tree(tree)
            cutting.result()
        assert not tree.exists()


class Host:
    """Implements `HostOps`; notes what it was asked for."""

    problem = hint = ""
    installed = True

    def __init__(self, firecracker: Path) -> None:
        self.firecracker = str(firecracker)
        self.asked: list[Operation] = []
        self.fails: set[type[Operation]] = set()
        self.launching: asyncio.Event | None = None
        #: With which it ends at once.
        self.jailer_says = ""

    async def perform(self, operation: Operation) -> Done:
        self.asked.append(operation)
        if self.launching is not None and isinstance(operation, LaunchJail):
            self.launching.set()
            await asyncio.Event().wait()
        if type(operation) in self.fails:
            raise Unavailable("no helper")
        if self.jailer_says and isinstance(operation, LaunchJail):
            os.write(operation.log, self.jailer_says.encode())
            pidfd, end = os.pipe()
            os.close(end)  # so that it can be read, as of a process that has ended
            return Done(pid=1, fd=pidfd)
        return Done(name=self.firecracker if isinstance(operation, CheckJail) else "")

    @property
    def ended(self) -> list[str]:
        return [each.vm_id for each in self.asked if isinstance(each, EndJail)]


class Prisons:
    """A place of jails, and a machine that may be started in one."""

    def __init__(self, directory: Path) -> None:
        self.firecracker = directory / "firecracker"
        self.firecracker.write_text("a release")
        self.host = Host(self.firecracker)
        self.marks = directory / "jails"
        self.place = Jailed(self.host, (directory / "vms",), self.marks)
        self.out = directory / "jail"
        self.socket = directory / "vms" / VM_ID / "control.sock"
        self.socket.parent.mkdir(parents=True)
        self.machine = Machine(
            vm_id=VM_ID,
            vcpu_count=1,
            memory_mib=128,
            kernel=directory / "kernel",
            initramfs=directory / "initramfs",
            kernel_parameters=(),
            disks=(),
            console_log=directory / "console.log",
            hypervisor_log=directory / "hypervisor.log",
            control_socket=self.socket,
            agent_socket=self.socket.with_name("agent.sock"),
        )

    def lives(self, monkeypatch: pytest.MonkeyPatch, *vm_ids: str) -> None:
        monkeypatch.setattr(firecracker_jail, "has_jail", lambda vm_id, _: vm_id in vm_ids)


@pytest.fixture
def prisons(tmp_path: Path) -> Prisons:
    return Prisons(tmp_path)


async def test_a_jail_that_could_not_be_made_is_ended(prisons: Prisons) -> None:
    prisons.host.fails = {LaunchJail}
    with pytest.raises(Unavailable, match="no helper"):
        await prisons.place.start(prisons.machine, {}, None)
    assert prisons.host.ended == [VM_ID]
    assert not prisons.socket.is_symlink()
    assert list(prisons.marks.iterdir()) == []


async def test_what_a_jailer_has_said_is_told_though_it_has_ended_by_then(
    prisons: Prisons, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends while whoever has started it tells that it runs."""

    async def known(_: FirecrackerHypervisor) -> tuple[str, tuple[int, ...]]:
        return str(prisons.firecracker), (1, 16, 1)

    monkeypatch.setattr(FirecrackerHypervisor, "_known", known)
    prisons.host.jailer_says = "Failed to chroot: no room\n"
    machine = prisons.machine
    for path in (machine.kernel, machine.initramfs):
        path.touch()
    machine.hypervisor_log.write_text("an older start's complaint\n" * 100)
    with pytest.raises(Unavailable) as failed:
        await _firecracker(prisons.place).launch(machine, None)
    assert "; it has ended: Failed to chroot: no room; inspect " in failed.value.message
    assert str(machine.hypervisor_log) in failed.value.message
    assert prisons.host.ended == [VM_ID]


async def test_a_jail_that_nobody_waits_for_any_more_is_ended(prisons: Prisons) -> None:
    prisons.host.launching = asyncio.Event()
    starting = asyncio.create_task(prisons.place.start(prisons.machine, {}, None))
    await prisons.host.launching.wait()
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert prisons.host.ended == [VM_ID]


async def test_where_a_jailed_machine_could_not_be_seen_none_is_started(
    prisons: Prisons, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = await prisons.place.check()
    assert (check.name, check.level) == ("jailer", Level.OK)
    prisons.host.asked.clear()
    monkeypatch.setattr(procfs, "hides_others", lambda: True)
    with pytest.raises(PreconditionFailed, match="hidepid") as refused:
        await prisons.place.start(prisons.machine, {}, None)
    assert prisons.host.asked == []
    assert not prisons.marks.exists()
    check = await prisons.place.check()
    assert (check.name, check.level) == ("jailer", Level.FAIL)
    assert (check.detail, check.hint) == (refused.value.message, refused.value.hint)
    assert "mount -o remount,hidepid=0 /proc" in check.hint


async def test_the_helper_is_asked_once_until_the_program_changes_or_all_is_checked(
    prisons: Prisons,
) -> None:
    for _ in range(2):
        assert await prisons.place.program() == str(prisons.firecracker)
    assert prisons.host.asked == [CheckJail()]
    prisons.firecracker.write_text("a later release")
    for _ in range(2):
        await prisons.place.program()
    assert prisons.host.asked == [CheckJail()] * 2
    await prisons.place.check()
    assert prisons.host.asked == [CheckJail()] * 3
    prisons.firecracker.unlink()
    prisons.host.fails = {CheckJail}
    for ask in (prisons.place.program, prisons.place.check):
        with pytest.raises(Unavailable, match="no helper"):
            await ask()


async def _without_kvm() -> KvmProbe:
    return KvmProbe(False, "there is no device")


@pytest.mark.parametrize("mode", [0o700, 0o600])
async def test_a_firecracker_that_is_for_others_to_run_is_said_to_be(
    prisons: Prisons, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    """Root's side has found it, and need not be let in by any mode."""
    prisons.firecracker.chmod(mode)
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    path = str(prisons.firecracker)
    for place in (prisons.place, Direct(path)):
        checks = await FirecrackerHypervisor(place, _without_kvm).checks()
        found = checks[0]
        assert (found.level, found.detail) == (
            Level.FAIL,
            f"{path} cannot be executed by this user",
        )
        assert found.hint.startswith(f"chmod 755 {path}, ")


@pytest.mark.parametrize(
    ("error", "detail"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), "cannot be executed by this user"),
        (OSError(errno.ESTALE, "Stale file handle"), "cannot be executed: Stale file handle"),
    ],
)
async def test_a_firecracker_that_cannot_be_looked_at_fails_a_check_and_nothing_else(
    prisons: Prisons, monkeypatch: pytest.MonkeyPatch, error: OSError, detail: str
) -> None:
    """With `auto`, the daemon would not start."""
    stat = os.stat

    def refuse(path: Any, *given: Any, **named: Any) -> os.stat_result:
        if path == str(prisons.firecracker):
            raise error
        return stat(path, *given, **named)

    monkeypatch.setattr(os, "stat", refuse)
    checks = await FirecrackerHypervisor(prisons.place, _without_kvm).checks()
    assert (checks[0].level, checks[0].detail) == (Level.FAIL, f"{prisons.firecracker} {detail}")


async def test_a_file_that_is_no_program_of_this_host_fails_a_check(
    prisons: Prisons, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.ENOEXEC, "Exec format error")

    prisons.firecracker.chmod(0o755)
    monkeypatch.setattr(proc, "run", run)
    checks = await FirecrackerHypervisor(prisons.place, _without_kvm).checks()
    assert (checks[0].level, checks[0].detail) == (
        Level.FAIL,
        f"{prisons.firecracker} cannot be executed: Exec format error",
    )


async def test_what_is_counted_takes_little_room_wherever_its_machine_runs(
    prisons: Prisons,
) -> None:
    """Before it has its socket it counts as one without a jail: that is no more true then."""
    hypervisor = _firecracker(prisons.place, Direct("firecracker"))
    with pytest.raises(Unavailable, match="cannot be read"):
        await hypervisor.drain(prisons.socket)
    prisons.out.mkdir()
    prisons.socket.symlink_to(prisons.out / "api.sock")
    metrics = prisons.out / "metrics"
    metrics.write_bytes((b" " * 6000 + b"\n") * 200)
    await hypervisor.drain(prisons.socket)
    assert metrics.stat().st_size == 6001 * 200
    assert metrics.stat().st_blocks * 512 < 6001 * 2


async def test_a_jail_is_ended_once(prisons: Prisons) -> None:
    prisons.marks.mkdir()
    (prisons.marks / VM_ID).touch()
    prisons.socket.symlink_to(prisons.out / "api.sock")
    await prisons.place.quit(prisons.socket)
    await prisons.place.clear(prisons.socket)
    assert prisons.host.ended == [VM_ID]
    assert not prisons.socket.is_symlink()


@pytest.mark.parametrize("jailed_first", [True, False])
async def test_a_jail_is_ended_though_its_sockets_are_gone(
    prisons: Prisons, jailed_first: bool
) -> None:
    """And whether machines are started in jails now or not."""
    prisons.marks.mkdir()
    (prisons.marks / VM_ID).touch()
    places = (prisons.place, Direct(""))
    hypervisor = _firecracker(*(places if jailed_first else reversed(places)))
    for _ in range(2):
        await hypervisor.clear(prisons.socket)
    assert prisons.host.ended == [VM_ID]
    assert list(prisons.marks.iterdir()) == []


@pytest.mark.parametrize("by", ["its end", "the next daemon"])
async def test_what_a_jail_made_goes_though_its_sockets_are_gone(prisons: Prisons, by: str) -> None:
    """As after a reboot of the host in the middle of a snapshot."""
    prisons.host.jailer_says = "started"
    started = await prisons.place.start(prisons.machine, {}, None)
    await started.ended
    (prisons.out / "memory").write_bytes(b"gigabytes")
    prisons.socket.unlink()
    if by == "its end":
        await prisons.place.clear(prisons.socket)
    else:
        await prisons.place.end_strays(())
    assert not prisons.out.exists()
    assert list(prisons.marks.iterdir()) == []


async def test_a_jail_that_is_no_more_takes_no_machine_with_it(prisons: Prisons) -> None:
    """One that was started without a jail after it, and whose process is the daemon's to end."""
    prisons.marks.mkdir()
    (prisons.marks / VM_ID).touch()
    prisons.socket.touch()
    await _firecracker(Direct(""), prisons.place).clear(prisons.socket)
    assert prisons.socket.exists()
    assert list(prisons.marks.iterdir()) == []


async def test_only_a_jail_that_nobody_is_in_may_be_forgotten_without_its_end(
    prisons: Prisons, monkeypatch: pytest.MonkeyPatch
) -> None:
    prisons.host.fails = {EndJail}
    prisons.socket.symlink_to(prisons.out / "api.sock")
    prisons.lives(monkeypatch, VM_ID)
    with pytest.raises(Unavailable, match="no helper"):
        await prisons.place.clear(prisons.socket)
    assert prisons.socket.is_symlink()
    prisons.lives(monkeypatch)
    await prisons.place.clear(prisons.socket)
    assert not prisons.socket.is_symlink()


class Lagging:
    """The removal of a jail's files, the next one of which takes until it may go on."""

    def __init__(self) -> None:
        self.waits = False
        self.under_way = threading.Event()
        self.goes_on = threading.Event()

    def remove(self, directory: Path) -> None:
        if self.waits:
            self.waits = False
            self.under_way.set()
            self.goes_on.wait(10)
        remove_hostile_tree(directory)


@pytest.fixture
def lagging(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lagging]:
    lagging = Lagging()
    monkeypatch.setattr(firecracker_jail, "remove_hostile_tree", lagging.remove)
    yield lagging
    lagging.goes_on.set()


@pytest.mark.parametrize("lags", ["clear", "cancelled clear", "cancelled start"])
async def test_a_machine_is_not_started_until_its_last_jail_is_cleared(
    prisons: Prisons, lagging: Lagging, lags: str
) -> None:
    """What is still under way for that would take the next one's traces and files away."""
    place, machine = prisons.place, prisons.machine

    async def next_jail() -> None:
        if lags == "clear":
            await place.clear(prisons.socket)  # of a machine that is found to have ended
        await place.start(machine, {}, None)

    prisons.host.jailer_says = "it has begun"
    if "clear" in lags:
        await place.start(machine, {}, None)
    lagging.waits = True
    begun = place.clear(prisons.socket) if "clear" in lags else place.start(machine, {}, None)
    earlier: asyncio.Task[object] = asyncio.create_task(begun)
    await asyncio.to_thread(lagging.under_way.wait, 10)
    if "cancelled" in lags:
        earlier.cancel()
    starting = asyncio.create_task(next_jail())
    assert await asyncio.wait({starting}, timeout=0.5) == (set(), {starting})
    lagging.goes_on.set()
    await asyncio.wait({earlier, starting})
    assert earlier.cancelled() is ("cancelled" in lags)
    await starting
    assert prisons.socket.readlink() == prisons.out / "api.sock"
    assert prisons.out.is_dir()
    assert [each.name for each in prisons.marks.iterdir()] == [VM_ID]
    assert isinstance(prisons.host.asked[-1], LaunchJail)
    await place.clear(prisons.socket)
    assert not place._locks


async def test_a_jail_is_ended_though_nothing_but_itself_leads_to_it(
    prisons: Prisons, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was made just after its end, which took away what it is known by."""
    await prisons.place.clear(prisons.socket)
    assert prisons.host.ended == []
    prisons.lives(monkeypatch, VM_ID)
    await prisons.place.clear(prisons.socket)
    assert prisons.host.ended == [VM_ID]


async def test_jails_of_ours_that_nobody_knows_are_ended_and_no_others(
    prisons: Prisons, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, stray, dead, other_home = (f"{number:012x}" for number in range(4))
    prisons.marks.mkdir()
    for vm_id in (running, stray, dead):
        (prisons.marks / vm_id).touch()
    prisons.lives(monkeypatch, running, stray, other_home)
    prisons.host.fails = {EndJail}
    await prisons.place.end_strays({running})
    assert (prisons.marks / stray).exists()
    prisons.host.fails = set()
    await prisons.place.end_strays({running})
    assert prisons.host.ended == [stray, stray]
    assert [each.name for each in prisons.marks.iterdir()] == [running]


def test_whether_a_has_jail_its_control_group_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jail, "groups_root", lambda: tmp_path)
    events = tmp_path / "banger-1000" / VM_ID / "cgroup.events"
    assert not jail.has_jail(VM_ID, 1000)
    events.parent.mkdir(parents=True)
    events.write_text("populated 1\nfrozen 0\n")
    assert jail.has_jail(VM_ID, 1000)
    events.write_text("populated 0\nfrozen 0\n")
    assert not jail.has_jail(VM_ID, 1000)
