"""Kernels from elsewhere boot real guests; and what is left when their making is broken off."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bad_server import BadServer, serve, stall
from homes import Home
from product import Banger, finish, read_until, until

_PULL_STAGES = ("catalog", "download", "verify", "unpack", "finish")
_IMPORT_STAGES = ("read", "modules", "finish")
_SMALL = ("--memory", "256M", "--vcpu", "1")


def the_kernel(home: Home) -> dict[str, Any]:
    (kernel,) = [each for each in home.banger.json("kernel", "list") if each["name"] == "debian"]
    return dict(kernel)


def check_nothing_is_left(home: Home, *names: str) -> None:
    """There are the kernels of these names, and nothing in their directory but them."""
    kernels = home.banger.json("kernel", "list")
    assert sorted(each["name"] for each in kernels) == sorted(names)
    there = {str(path) for path in (home.data / "kernels").iterdir()}
    assert there == {each["artifact_dir"] for each in kernels}


@pytest.fixture
def bundle(home: Home, tmp_path: Path) -> Path:
    """The usual kernel as a bundle, and a catalog beside it that calls it ``mine``."""
    file = tmp_path / "debian.tar.zst"
    entry = home.banger.ok("kernel", "export", "debian", file)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    (tmp_path / "catalog.toml").write_text(
        "version = 1\n" + entry.replace('name = "debian"', 'name = "mine"')
    )
    return file


@pytest.fixture
def server(home: Home, bundle: Path) -> Iterator[BadServer]:
    """Serves the bundle; `home` has its catalog."""
    with BadServer(bundle.read_bytes()) as made:
        catalog = bundle.with_name("catalog.toml").read_bytes()
        made.files["/catalog.toml"] = catalog.replace(b"debian.tar.zst", b"file")
        home.banger.ok("daemon", "stop")
        home.configure(f'catalog_url = "{made.url.replace("file", "catalog.toml")}"')
        yield made


@pytest.fixture
def modules(home: Home, tmp_path: Path) -> Path:
    """The modules of the usual kernel as a lib/modules/VERSION directory."""
    kernel = the_kernel(home)
    dest = tmp_path / "modules"
    dest.mkdir()
    request = f"rdump /{kernel['version']} {dest}"
    subprocess.run(["debugfs", "-R", request, kernel["modules_path"]], check=True)
    return dest / str(kernel["version"])


def boots(home: Home, kernel: str) -> None:
    """A machine of the session's root file system starts with it, and has its modules."""
    (image,) = home.banger.json("image", "list")
    home.banger.ok(
        *("image", "import", image["rootfs_path"], "--name", "with-it", "--kernel", kernel)
    )
    version = home.banger.json("kernel", "show", kernel)["version"]
    said = home.banger.ok(
        *("vm", "run", "--rm", "-q", "--image", "with-it", *_SMALL, "--"),
        *("sh", "-c", "uname -r; ls /lib/modules/$(uname -r)/kernel"),
    )
    assert said.split()[0] == version
    assert {"drivers", "fs", "net"} <= set(said.split())
    said = home.banger.fails("kernel", "delete", kernel, status=1)
    assert f'kernel "{kernel}" is used by image with-it' in said
    home.banger.ok("image", "delete", "with-it")
    home.banger.ok("kernel", "delete", kernel)


@pytest.mark.guest
def test_a_kernel_that_was_exported_and_pulled_boots(home: Home, server: BadServer) -> None:
    said = home.banger.ok("kernel", "pull", "mine")
    usual, pulled = the_kernel(home), home.banger.json("kernel", "show", "mine")
    assert said.startswith(f"mine ({usual['version']}, ")
    for name in ("vmlinux", "config", "modules.ext4"):
        first, second = (Path(each["artifact_dir"], name) for each in (usual, pulled))
        assert first.read_bytes() == second.read_bytes()
        assert second.stat().st_blocks < first.stat().st_blocks + 128  # extents are counted, too
    assert pulled["source"] == f"pulled from {server.url}"
    assert list((home.directory / "cache/banger/downloads").iterdir()) == []
    boots(home, "mine")
    check_nothing_is_left(home, "debian")


@pytest.mark.guest
def test_a_kernel_that_was_imported_boots(home: Home, modules: Path) -> None:
    vmlinux = the_kernel(home)["vmlinux_path"]
    (modules / "build").symlink_to("/usr/src/linux")
    home.banger.ok("kernel", "import", vmlinux, "--name", "mine", "--modules", modules)
    boots(home, "mine")
    check_nothing_is_left(home, "debian")


def test_a_kernel_without_what_machines_need_is_refused(home: Home, modules: Path) -> None:
    kernel = the_kernel(home)
    words = ("kernel", "import", kernel["vmlinux_path"], "--name", "mine")
    said = home.banger.fails(*words, status=1)
    assert "does not say what is built into it" in said
    said = home.banger.fails(*words, "--config", kernel["config_path"], status=1)
    assert "has no module failover" in said
    listed = (modules / "modules.dep").read_text()
    (modules / "modules.dep").write_text(listed.replace("virtio_console", "other"))
    said = home.banger.fails(*words, "--modules", modules, status=1)
    assert "has no module virtio_console" in said
    check_nothing_is_left(home, "debian")


def test_modules_without_their_list_are_refused_with_how_to_make_it(
    home: Home, modules: Path
) -> None:
    (modules / "modules.dep").unlink()
    words = ("kernel", "import", the_kernel(home)["vmlinux_path"], "--name", "mine")
    said = home.banger.fails(*words, "--modules", modules, status=1)
    assert f"{modules} has no modules.dep" in said
    assert "depmod -b DIR" in said
    check_nothing_is_left(home, "debian")


def test_a_pull_goes_on_after_the_daemon_was_killed(home: Home, server: BadServer) -> None:
    half = len(server.content) // 2
    server.deeds = [serve, stall(half)]
    pulling = home.banger.start("kernel", "pull", "mine")
    assert pulling.stderr is not None
    read_until(pulling.stderr, b"download")
    parts = home.directory / "cache/banger/downloads"
    until(lambda: any(path.stat().st_size > 1 << 20 for path in parts.glob("*.part")), "a part")
    home.kill_daemon(signal.SIGKILL)
    assert finish(pulling)[0] == 1
    check_nothing_is_left(home, "debian")
    home.banger.ok("kernel", "pull", "mine")
    check_nothing_is_left(home, "debian", "mine")
    assert list(parts.iterdir()) == []
    begun = str(server.ranges[-1])
    assert begun.startswith("bytes=")
    assert int(begun.removeprefix("bytes=").removesuffix("-")) > 1 << 20


def test_ctrl_c_takes_a_pull_back_and_keeps_what_has_come(home: Home, server: BadServer) -> None:
    server.deeds = [serve, stall(len(server.content) // 2)]
    pulling = home.banger.start("kernel", "pull", "mine")
    assert pulling.stderr is not None
    read_until(pulling.stderr, b"download")
    said = home.banger.fails("image", "cache", "prune", status=1)
    assert "the cache is in use" in said
    pulling.send_signal(signal.SIGINT)
    assert finish(pulling)[0] == 130
    check_nothing_is_left(home, "debian")
    home.banger.ok("kernel", "pull", "mine")
    assert str(server.ranges[-1]).startswith("bytes=")


@pytest.mark.parametrize("stage", _PULL_STAGES)
def test_the_daemon_is_killed_in_each_stage_of_a_pull(
    home: Home, server: BadServer, stage: str
) -> None:
    faulty = Banger(home.banger.environment | {"BANGER_FAULT": f"SIGKILL@kernel.pull:{stage}"})
    assert faulty.run("kernel", "pull", "mine").returncode == 1
    home.await_end_of_processes()
    check_nothing_is_left(home, "debian")
    home.banger.ok("kernel", "pull", "mine")
    check_nothing_is_left(home, "debian", "mine")
    assert list((home.directory / "cache/banger/downloads").iterdir()) == []


@pytest.mark.parametrize("stage", _IMPORT_STAGES)
def test_the_daemon_is_killed_in_each_stage_of_an_import(
    home: Home, modules: Path, stage: str
) -> None:
    words = ("kernel", "import", the_kernel(home)["vmlinux_path"], "--name", "mine")
    home.banger.ok("daemon", "stop")
    faulty = Banger(home.banger.environment | {"BANGER_FAULT": f"SIGKILL@kernel.import:{stage}"})
    assert faulty.run(*words, "--modules", modules).returncode == 1
    home.await_end_of_processes()
    check_nothing_is_left(home, "debian")
    home.banger.ok(*words, "--modules", modules)
    check_nothing_is_left(home, "debian", "mine")


def test_the_daemon_is_killed_in_an_export(home: Home, tmp_path: Path) -> None:
    home.banger.ok("daemon", "stop")
    for stage in ("pack", "finish"):
        fault = {"BANGER_FAULT": f"SIGKILL@kernel.export:{stage}"}
        faulty = Banger(home.banger.environment | fault)
        assert faulty.run("kernel", "export", "debian", tmp_path / "bundle").returncode == 1
        home.await_end_of_processes()
        check_nothing_is_left(home, "debian")
        assert list(tmp_path.iterdir()) == []
        home.banger.ok("daemon", "stop")


def test_two_pulls_of_one_kernel_are_one(home: Home, server: BadServer) -> None:
    pulls = [home.banger.start("kernel", "pull", "mine") for _ in range(2)]
    assert [finish(each)[0] for each in pulls] in ([0, 0], [0, 1], [1, 0])
    check_nothing_is_left(home, "debian", "mine")
    assert [asked.path for asked in server.requests].count("/file") == 1
