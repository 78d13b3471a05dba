"""A host or a home that is not as it should be: what is said, and that nothing is made."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

import suite
from homes import Home, little_room
from product import IMAGE, Banger

pytestmark = pytest.mark.guest


def _cannot_run(home: Home) -> str:
    """What a start that must not succeed says; it must leave no VM."""
    said = home.banger.fails("vm", "run", "--image", IMAGE, "--", "true", status=125)
    assert home.banger.json("vm", "list") == []
    assert home.machines() == []
    return said


def test_a_database_of_a_newer_version_is_refused(bare_home: Home) -> None:
    banger = bare_home.banger
    banger.ok("daemon", "restart")
    banger.ok("daemon", "stop")
    database = bare_home.state / "banger.db"

    def set_version(version: int) -> None:
        with closing(sqlite3.connect(database)) as connection:
            connection.execute(f"PRAGMA user_version = {version}")
            connection.commit()

    with closing(sqlite3.connect(database)) as connection:
        (current,) = connection.execute("PRAGMA user_version").fetchone()
    set_version(current + 41)
    said = banger.fails("vm", "list", status=1)
    assert f"the database {database} is from a newer banger" in said
    assert "hint: upgrade banger" in said
    assert bare_home.processes() == []
    set_version(current)
    assert banger.json("vm", "list") == []


def test_a_database_that_is_none_is_refused_and_kept(bare_home: Home) -> None:
    bare_home.state.mkdir(parents=True)
    database = bare_home.state / "banger.db"
    database.write_bytes(b"not a database, but somebody's file" * 100)
    said = bare_home.banger.fails("vm", "list", status=1)
    assert f"cannot use the database {database}: file is not a database" in said
    assert database.read_bytes().startswith(b"not a database")
    database.unlink()


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ('log_level = "loud"', 'unsupported log_level "loud" (use debug, info, warn,', ""),
        ('hypervizor = "qemu"', 'unknown setting "hypervizor"', 'did you mean "hypervisor"?'),
        ("[vm_defaults]\nmemori = 1", 'unknown setting "vm_defaults.memori"', "vm_defaults.memory"),
        ('hypervisor = "xen"', '"xen" is not one of', ""),
        ("[vm_defaults]\nvcpu = 1000", "is not a whole number from 1 to 64", ""),
        ("= =", "is not valid TOML", ""),
    ],
)
def test_a_bad_setting_is_named_and_the_daemon_does_not_start(
    bare_home: Home, text: str, message: str, hint: str
) -> None:
    file = bare_home.configure(text)
    said = bare_home.banger.fails("vm", "list", status=1)
    assert str(file) in said
    assert message in said
    assert hint in said
    assert bare_home.processes() == []
    bare_home.configure('log_level = " WARN "')
    assert bare_home.banger.json("vm", "list") == []


def test_a_bad_log_level_in_the_environment_is_named(bare_home: Home) -> None:
    loud = Banger({**bare_home.banger.environment, "BANGER_LOG_LEVEL": "loud"})
    assert 'unsupported log_level "loud"' in loud.fails("vm", "list", status=1)


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda path: path.chmod(0o755), "its mode is 0755, not 0700"),
        (lambda path: (path.rename(f"{path}-x"), path.symlink_to(f"{path}-x")), "symbolic link"),
        (lambda path: (path.rmdir(), path.touch()), "it is not a directory"),
        pytest.param(
            lambda path: os.chown(path, 65534, 65534),
            "it belongs to uid 65534",
            marks=pytest.mark.skipif(os.geteuid() != 0, reason="run the tests as root for this"),
        ),
    ],
    ids=["mode", "link", "file", "owner"],
)
def test_a_runtime_directory_that_others_could_reach_is_refused(
    bare_home: Home, spoil: object, problem: str
) -> None:
    bare_home.runtime.mkdir(mode=0o700)
    assert callable(spoil)
    spoil(bare_home.runtime)
    said = bare_home.banger.fails("vm", "list", status=1)
    assert f"refusing to use {bare_home.runtime}: " in said
    assert problem in said
    assert bare_home.processes() == []
    if bare_home.runtime.is_dir() and not bare_home.runtime.is_symlink():
        bare_home.runtime.rmdir()
    else:
        bare_home.runtime.unlink()


def test_a_daemon_in_a_directory_that_others_can_change_is_not_spoken_to(bare_home: Home) -> None:
    """It may be anybody's."""
    bare_home.banger.ok("daemon", "start")
    bare_home.runtime.chmod(0o770)
    for words in (("vm", "list"), ("daemon", "status"), ("version",)):
        said = bare_home.banger.fails(*words, status=1)
        assert "its mode is 0770, not 0700" in said
    bare_home.runtime.chmod(0o700)
    assert bare_home.banger.json("vm", "list") == []


def test_a_runtime_directory_with_too_long_a_path_is_refused(bare_home: Home) -> None:
    long = bare_home.directory / ("x" * 90)
    long.mkdir(mode=0o700)
    banger = Banger({**bare_home.banger.environment, "XDG_RUNTIME_DIR": str(long)})
    said = banger.fails("vm", "list", status=1)
    assert "is longer than 107 bytes" in said
    assert "hint: set XDG_RUNTIME_DIR to a shorter path" in said


@pytest.fixture
def poor_path(bare_home: Home) -> Path:
    """A directory for PATH with all that this machine has, but neither QEMU nor passt."""
    directory = bare_home.directory / "bin"
    directory.mkdir()
    for folder in ("/usr/bin", "/bin"):
        for tool in Path(folder).iterdir():
            link = directory / tool.name
            if not tool.name.startswith(("qemu-", "passt")) and not link.exists():
                link.symlink_to(tool)
    return directory


@suite.about_qemu
@suite.about_layers
def test_all_that_is_missing_is_told_at_once_with_what_to_install(
    home: Home, poor_path: Path
) -> None:
    banger = Banger({**home.banger.environment, "PATH": str(poor_path)})
    said = banger.fails("vm", "run", "--image", IMAGE, "--", "true", status=125)
    assert "cannot start a VM here: " in said
    for tool, package in (
        ("qemu-system-x86_64", "qemu-system-x86"),
        ("qemu-img", "qemu-utils"),
        ("passt", "passt"),
    ):
        assert f"{tool} is not installed" in said
        assert f"apt-get install {package}" in said
    assert banger.json("vm", "list") == []
    done = banger.run("doctor", "--json")
    assert done.returncode == 1
    for word in (b"qemu-system-x86", b"qemu-utils", b"apt-get install passt"):
        assert word in done.stdout


@suite.about_qemu
def test_the_doctor_says_what_would_be_used_and_why(banger: Banger, image: str) -> None:
    checks = {each["name"]: each for each in banger.json("doctor")}
    assert {"hypervisor", "storage", "network", "accelerator", "disk space"} <= checks.keys()
    assert {each["level"] for each in checks.values()} <= {"ok", "warn"}
    assert "qemu" in checks["hypervisor"]["detail"]
    assert all(each["hint"] for each in checks.values() if each["level"] == "warn")
    table = banger.ok("doctor")
    assert all(name in table for name in checks)


@pytest.fixture
def full_disk(home: Home) -> Iterator[Home]:
    """A home with little room for the files of VMs."""
    with little_room(home.state / "vms", "64m"):
        yield home


def test_too_little_disk_space_is_told_with_the_numbers(full_disk: Home) -> None:
    said = _cannot_run(full_disk)
    # Disks that are copies need room for those, too.
    where = re.escape(str(full_disk.state / "vms"))
    assert re.search(rf"disk space: {where} has 64 MiB free, [\d.]+ [MG]iB are needed", said)
    assert "make room" in said


def test_a_damaged_image_is_named_before_anything_is_made(home: Home) -> None:
    rootfs = Path(home.banger.json("image", "show", IMAGE)["rootfs_path"])
    size = rootfs.stat().st_size
    os.truncate(rootfs, size // 2)
    said = _cannot_run(home)
    assert f'image "{IMAGE}": ' in said
    assert re.search(r"it is cut off: \d+ GiB of a \d+ GiB file system", said)
    os.truncate(rootfs, 0)
    os.truncate(rootfs, size)
    assert "it is not an ext4 file system" in _cannot_run(home)
    rootfs.unlink()
    assert "No such file or directory" in _cannot_run(home)


def test_a_damaged_kernel_and_missing_modules_are_told_together(home: Home) -> None:
    (kernel,) = home.data.glob("kernels/*")
    (kernel / "vmlinux").write_bytes(b"\x7fELF, but no more")
    (kernel / "modules.ext4").unlink()
    said = _cannot_run(home)
    assert "cannot be used as a kernel" in said
    assert "modules of kernel" in said
    shutil.rmtree(kernel)
    assert "cannot be used as a kernel" in _cannot_run(home)


def test_an_image_in_use_stays_and_is_deleted_afterwards(home: Home) -> None:
    banger = home.banger
    said = banger.fails("image", "build", IMAGE, status=1)
    assert f'image "{IMAGE}" already exists' in said
    banger.ok("vm", "run", "-q", "-d", "--image", IMAGE, "--name", "user")
    for state in ("running", "stopped"):
        assert banger.state("user") == state
        said = banger.fails("image", "delete", IMAGE, status=1)
        assert f'image "{IMAGE}" is used by user' in said
        banger.ok("vm", "stop", "user")
    banger.ok("vm", "delete", "user")
    directory = Path(banger.json("image", "show", IMAGE)["artifact_dir"])
    assert directory.is_dir()
    assert banger.ok("image", "delete", IMAGE) == f"{IMAGE}\n"
    assert not directory.exists()
    assert IMAGE not in {each["name"] for each in banger.json("image", "list")}
    said = banger.fails("image", "delete", IMAGE, status=1)
    assert f'image "{IMAGE}" not found' in said
    assert f"banger image build {IMAGE}" in said


def test_what_cannot_be_built_is_said(banger: Banger) -> None:
    said = banger.fails("image", "build", "windows", status=1)
    assert 'banger does not know how to build "windows"' in said
    assert "debian-bookworm-minimal" in said


@suite.about_qemu
def test_more_memory_than_there_is_ends_in_an_error_with_the_log(home: Home) -> None:
    said = home.banger.fails("vm", "run", "--image", IMAGE, "--memory", "10T", "--", "true",
                             status=125)  # fmt: skip
    assert "error: QEMU exited with status 1: " in said
    assert "memory" in said or "address" in said
    assert home.banger.json("vm", "list") == []
    assert home.machines() == []


def test_a_state_directory_that_cannot_be_written_is_an_error_without_a_traceback(
    bare_home: Home,
) -> None:
    (bare_home.directory / "state").write_text("a file where a directory must be")
    said = bare_home.banger.fails("vm", "list", status=1)
    assert said.startswith("error: ")
    assert "Traceback" not in said
    (bare_home.directory / "state").unlink()
