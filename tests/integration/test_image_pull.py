"""Images pulled from a real registry, and from one that is not what it should be."""

from __future__ import annotations

import fcntl
import gzip
import os
import random
import shutil
import signal
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from ext4_trees import tree_of
from homes import Home, little_room
from oci_layouts import BUSYBOX, Layout, Member, directory, hard_link, symlink, tar
from product import IMAGE, Banger, finish, read_until, until
from registries import Mirror, Registry, serving

pytestmark = [pytest.mark.guest, pytest.mark.timeout(600)]

STAGES = ("resolve", "fetch", "unpack", "filesystem", "finish")


def _noise(name: str, size: int = 300_000) -> Member:
    """A file that no compression makes smaller, the same for the same name."""
    return Member(name, random.Random(name).randbytes(size))


def _base() -> bytes:
    """A system with a shell and little else."""
    tools = ("sh", "cat", "ls", "stat", "id", "sleep", "true", "false", "env", "pwd")
    return tar(
        directory("bin"),
        Member("bin/busybox", BUSYBOX.read_bytes(), mode=0o755),
        *(hard_link(f"bin/{name}", "bin/busybox") for name in tools),
        directory("root", 0o700),
        Member("root/from-the-image", b"hello"),
    )


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with serving(tmp_path_factory.mktemp("registry") / "r") as running:
        yield running


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with serving(tmp_path_factory.mktemp("secured") / "r", secured=True) as running:
        yield running


@pytest.fixture
def mirror(registry: Registry) -> Iterator[Mirror]:
    mirror = Mirror(registry)
    yield mirror
    mirror.close()


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "layout")


@pytest.fixture(scope="module")
def small(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The reference of an image of two layers, in the registry."""
    layout = Layout(tmp_path_factory.mktemp("small") / "layout")
    layout.image([_base(), tar(_noise("data"), Member("second", b"2"))])
    return registry.push(layout.folder, "team/small:1.0")


def _images(banger: Banger) -> list[str]:
    return [each["name"] for each in banger.json("image", "list") if each["name"] != IMAGE]


def _left(home: Home) -> list[str]:
    """What a pull that did not end well has left, beside layers that are whole."""
    known = {each["id"] for each in home.banger.json("image", "list")}
    images = [each.name for each in (home.data / "images").iterdir() if each.name not in known]
    pulls = home.directory / "cache/banger/pulls"
    return [*images, *(str(each) for each in pulls.rglob("*"))]


def test_pulled_and_run(home: Home, small: str) -> None:
    banger = home.banger
    said = banger.ok("image", "pull", "--insecure", small)
    assert said.startswith("small-1.0 (")
    shown = banger.json("image", "show", "small-1.0")
    assert shown["source"] == f"docker://{small}"
    assert shown["digest"].startswith("sha256:")
    for cold in ([], ["--cold"]):
        done = banger.run("vm", "run", *cold, "--rm", "--image", "small-1.0", "--",
                          "sh", "-c", "cat /root/from-the-image /second; exit 7")  # fmt: skip
        assert (done.returncode, done.stdout) == (7, b"hello2"), done.stderr


def test_the_same_again_is_up_to_date_and_another_of_its_name_a_conflict(
    home: Home, registry: Registry, small: str, layout: Layout
) -> None:
    banger = home.banger
    banger.ok("image", "pull", "--insecure", small, "--name", "mine")
    done = banger.run("image", "pull", "--insecure", small, "--name", "mine")
    assert done.returncode == 0
    assert b"image mine is up to date" in done.stderr
    again = ("image", "pull", "--insecure", small, "--name", "mine", "--kernel")
    assert 'kernel "none" not found' in banger.fails(*again, "none", status=1)
    banger.ok(*again, "debian")
    layout.image([_base(), tar(Member("other"))])
    other = registry.push(layout.folder, "team/other:1.0")
    said = banger.fails("image", "pull", "--insecure", other, "--name", "mine", status=1)
    assert 'image "mine" already exists, and is another' in said
    assert "banger image delete mine" in said


def test_layers_are_fetched_once(home: Home, registry: Registry, layout: Layout) -> None:
    """What another image has brought, or an earlier try, is not asked for again."""
    banger = home.banger
    shared = _base()
    layout.image([shared, tar(Member("one"))])
    one = registry.push(layout.folder, "team/one:1")
    layout.image([shared, tar(Member("two"))])
    two = registry.push(layout.folder, "team/two:1")
    mirror = Mirror(registry)
    try:
        for name, reference in (("one", one), ("two", two)):
            through = reference.replace(registry.address, mirror.address)
            banger.ok("image", "pull", "--insecure", through, "--name", name)
    finally:
        mirror.close()
    assert len(mirror.sent) == len(set(mirror.sent)) == 5  # two configurations, three layers


def test_tls_and_a_password(home: Home, secured: Registry, layout: Layout) -> None:
    banger = home.banger
    layout.image([_base()])
    reference = secured.push(layout.folder, "team/secret:1")
    said = banger.fails("image", "pull", reference, status=1)
    assert "its certificate is not one this machine trusts" in said
    secured.trust(home.directory)
    said = banger.fails("image", "pull", reference, status=1)
    assert f"skopeo login {secured.address}" in said
    secured.log_in(home.directory, "wrong")
    assert "skopeo login" in banger.fails("image", "pull", reference, status=1)
    secured.log_in(home.directory)
    assert banger.ok("image", "pull", reference).startswith("secret-1 (")
    assert "sesame" not in home.log


def test_what_is_not_there(home: Home, registry: Registry, small: str) -> None:
    banger = home.banger
    name = small.partition(":1.0")[0]
    said = banger.fails("image", "pull", "--insecure", f"{name}:2.0", status=1)
    assert "there is no such image" in said
    said = banger.fails("image", "pull", small, status=1)
    assert "does not speak TLS" in said
    assert "--insecure" in said
    said = banger.fails("image", "pull", "--insecure", "127.0.0.1:1/a/b", status=1)
    assert "cannot be reached" in said
    said = banger.fails("image", "pull", "not a reference", status=1)
    assert "is not a reference of an image" in said
    assert _images(banger) == []
    assert _left(home) == []


def test_another_processor(home: Home, registry: Registry, tmp_path: Path) -> None:
    foreign = Layout(tmp_path / "foreign", architecture="s390x")
    foreign.image([_base()])
    reference = registry.push(foreign.folder, "team/foreign:1")
    said = home.banger.fails("image", "pull", "--insecure", reference, status=1)
    assert "is made for linux/s390x, this machine is linux/" in said
    assert _left(home) == []


def test_an_index_of_several(home: Home, registry: Registry, tmp_path: Path) -> None:
    banger = home.banger
    several = Layout(tmp_path / "several")
    ours = several.image([_base(), tar(Member("ours"))])
    theirs = several.image([tar(Member("theirs"))], architecture="s390x")
    several.many([("s390x", theirs), ("amd64", ours)])
    reference = registry.push(several.folder, "team/several:1")
    banger.ok("image", "pull", "--insecure", reference, "--name", "several")
    assert "/ours" in tree_of(Path(banger.json("image", "show", "several")["rootfs_path"]))
    several.many([("s390x", theirs)])
    reference = registry.push(several.folder, "team/without:1")
    said = banger.fails("image", "pull", "--insecure", reference, status=1)
    assert "is not made for linux/" in said
    assert "it is for: linux/s390x" in said


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        ("cut", "what was sent is not what was announced"),
        ("other", "what was sent is not what was announced"),
        ("stall", "the registry has sent nothing for 30 s"),
    ],
)
def test_a_mirror_that_fails_half_way(
    home: Home, registry: Registry, mirror: Mirror, small: str, harm: str, why: str
) -> None:
    reference = small.replace(registry.address, mirror.address)
    mirror.harm = harm
    said = home.banger.fails("image", "pull", "--insecure", reference, status=1)
    assert why in said
    assert "try again" in said
    assert _images(home.banger) == []
    assert _left(home) == []
    mirror.harm = ""
    assert home.banger.ok("image", "pull", "--insecure", reference).startswith("small-1.0")


def test_a_layer_in_the_cache_that_was_damaged_is_fetched_anew(home: Home, small: str) -> None:
    banger = home.banger
    banger.ok("image", "pull", "--insecure", small, "--name", "first")
    blobs = home.directory / "cache/banger/blobs/sha256"
    largest = max(blobs.iterdir(), key=lambda each: each.stat().st_size)
    os.truncate(largest, 1000)
    banger.ok("image", "pull", "--insecure", small, "--name", "second")
    first, second = (
        tree_of(Path(banger.json("image", "show", name)["rootfs_path"]))
        for name in ("first", "second")
    )
    assert first == second


def _other_digest(layout: Layout) -> None:
    layout.image([_base()], rootfs={"type": "layers", "diff_ids": ["sha256:" + "0" * 64]})


def _too_few_digests(layout: Layout) -> None:
    layout.image([_base()], rootfs={"type": "layers", "diff_ids": []})


def _traversal(layout: Layout) -> None:
    layout.image([tar(Member("../../escaped"))])


def _through_a_link(layout: Layout) -> None:
    layout.image([tar(symlink("way", "../../..")), tar(Member("way/escaped"))])


def _twice(layout: Layout) -> None:
    layout.image([tar(Member("a"), Member("a"))])


def _cut_off(layout: Layout) -> None:
    described = layout.image([_base(), tar(_noise("a"))])
    blob = max((layout.folder / "blobs/sha256").iterdir(), key=lambda each: each.stat().st_size)
    assert blob.name not in described["digest"]
    os.truncate(blob, blob.stat().st_size // 2)


def _no_layers(layout: Layout) -> None:
    layout.image([])


def _endless_environment(layout: Layout) -> None:
    layout.image([_base()], {"Env": [f"V{number}={'x' * 1000}" for number in range(100)]})


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (_other_digest, "is not what the image says"),
        (_too_few_digests, "and digests of 0"),
        (_traversal, "../../escaped leads out of the image"),
        (_through_a_link, "way is a link that leads out of the image"),
        (_twice, "a is in it twice"),
        (_cut_off, "cannot pull"),
        (_no_layers, "has no layers"),
        (_endless_environment, "more than 64 KiB of environment"),
    ],
)
def test_a_hostile_image_is_refused_and_nothing_is_left(
    home: Home, layout: Layout, spoil: Callable[[Layout], None], why: str
) -> None:
    spoil(layout)
    said = home.banger.fails("image", "pull", f"oci:{layout.folder}", status=1)
    assert why in said
    assert _images(home.banger) == []
    assert _left(home) == []


def test_folders_and_archives(home: Home, layout: Layout, tmp_path: Path) -> None:
    banger = home.banger
    layout.image([_base(), tar(Member("mark"))])
    for transport in ("oci-archive", "docker-archive"):
        target = f"{transport}:{tmp_path}/{transport}.tar:team/x:1"
        subprocess.run(["skopeo", "copy", "--quiet", f"oci:{layout.folder}", target], check=True)
    trees = []
    for number, reference in enumerate((
        f"oci:{os.path.relpath(layout.folder)}",
        f"oci-archive:{tmp_path}/oci-archive.tar",
        f"docker-archive:{tmp_path}/docker-archive.tar",
    )):  # fmt: skip
        banger.ok("image", "pull", reference, "--name", f"x{number}")
        trees.append(tree_of(Path(banger.json("image", "show", f"x{number}")["rootfs_path"])))
    assert "/mark" in trees[0]
    assert trees[0] == trees[1] == trees[2]


def test_what_an_image_says_of_its_program_is_kept(home: Home, layout: Layout) -> None:
    config: dict[str, Any] = {
        "Env": ["PATH=/bin", "GREETING=a=b", "broken", "=x"],
        "User": "1000:1000",
        "WorkingDir": "work",
        "Entrypoint": ["/bin/sh", "-c"],
        "Cmd": ["true"],
        "Labels": {"a": "b"},
    }
    layout.image([_base()], config)
    home.banger.ok("image", "pull", f"oci:{layout.folder}", "--name", "told")
    assert home.banger.json("image", "show", "told")["config"] == {
        "env": ["PATH=/bin", "GREETING=a=b"],
        "user": "1000:1000",
        "working_dir": "/work",
        "entrypoint": ["/bin/sh", "-c"],
        "cmd": ["true"],
    }


def test_pulled_back_it_is_the_same_tree(
    home: Home, registry: Registry, layout: Layout, tmp_path: Path
) -> None:
    """Debian as banger builds it, pushed by the usual tools, pulled back and booted."""
    banger = home.banger
    built = Path(banger.json("image", "show", IMAGE)["rootfs_path"])
    layer = tmp_path / "layer.tar"
    script = (
        'mount -o ro,loop,noload "$1" /mnt && exec tar -C /mnt --exclude=./lost+found'
        " --xattrs --xattrs-include='*' --numeric-owner --sort=name -cf \"$2\" ."
    )
    subprocess.run(["unshare", "--mount", "sh", "-c", script, "sh", built, layer], check=True)
    layout.image([layer.read_bytes()])
    reference = registry.push(layout.folder, "team/debian:12")
    banger.ok("image", "pull", "--insecure", reference, "--name", "back")
    back = Path(banger.json("image", "show", "back")["rootfs_path"])
    assert tree_of(back) == tree_of(built)
    listing = "find / -xdev | sort | sha256sum; stat -c %a%u%g /usr/bin/passwd /root; id -u"
    there, here = (
        banger.ok("vm", "run", "--rm", "--quiet", "--image", name, "--", "sh", "-c", listing)
        for name in (IMAGE, "back")
    )
    assert there == here


def test_two_requests_share_one_pull(
    home: Home, registry: Registry, mirror: Mirror, small: str
) -> None:
    reference = small.replace(registry.address, mirror.address)
    mirror.harm = "wait"
    words = ("image", "pull", "--insecure", reference, "--name", "shared")
    first, second = (home.banger.start(*words) for _ in range(2))
    until(lambda: mirror.sent, "the pull asks for a blob")
    (running,) = _running(home)
    read_until(first.stderr or 0, b"fetch")
    read_until(second.stderr or 0, b"fetch")
    mirror.harm = ""
    for each in (first, second):
        status, out, _ = finish(each)
        assert (status, out[:7]) == (0, b"shared ")
    assert running["target"] == "shared"
    assert len(mirror.sent) == len(set(mirror.sent)) == 3


def _running(home: Home) -> list[dict[str, Any]]:
    operations = home.banger.json("operations", "list")
    return [each for each in operations
            if each["kind"] == "image.pull" and each["state"] == "running"]  # fmt: skip


def _held_up(
    home: Home, registry: Registry, mirror: Mirror, reference: str, harm: str, *options: str
) -> subprocess.Popen[bytes]:
    """A pull to whose first blob this happens."""
    mirror.harm = harm
    through = reference.replace(registry.address, mirror.address)
    pulling = home.banger.start("image", "pull", "--insecure", *options, through)
    until(lambda: mirror.sent, "the pull asks for a blob")
    return pulling


def test_two_pulls_at_once_count_what_comes_for_each(
    home: Home, registry: Registry, mirror: Mirror, small: str, layout: Layout
) -> None:
    """A pull may bring little more than its manifest announces; what others bring is not its."""
    layout.image([_base(), tar(_noise("large", 100 << 20))])
    large = registry.push(layout.folder, "team/large:1")
    waiting = _held_up(home, registry, mirror, small, "wait")
    home.banger.ok("image", "pull", "--insecure", large)
    mirror.harm = ""
    status, out, said = finish(waiting)
    assert (status, out[:10]) == (0, b"small-1.0 "), said


def test_somebody_else_stops_a_pull(
    home: Home, registry: Registry, mirror: Mirror, small: str
) -> None:
    pulling = _held_up(home, registry, mirror, small, "stall")
    (running,) = _running(home)
    assert home.banger.ok("operations", "cancel", running["id"]) == f"{running['id']}\n"
    status, _, said = finish(pulling)
    assert (status, b"cancelled" in said) == (1, True), said
    assert _running(home) == []
    assert _left(home) == []
    again = home.banger.run("operations", "cancel", running["id"])
    assert (again.returncode, b"had ended" in again.stderr) == (0, False), again.stderr


def test_a_name_that_was_taken_meanwhile_is_a_conflict(
    home: Home, registry: Registry, mirror: Mirror, small: str, tmp_path: Path
) -> None:
    pulling = _held_up(home, registry, mirror, small, "wait", "--name", "mine")
    archive = tmp_path / "a.tar"
    archive.write_bytes(_base())
    home.banger.ok("image", "import", "--name", "mine", archive)
    mirror.harm = ""
    status, _, said = finish(pulling)
    assert status == 1
    assert b'image "mine" already exists' in said
    assert home.banger.json("image", "show", "mine")["source"] == str(archive)
    assert _left(home) == []


def test_ctrl_c_takes_a_pull_back(
    home: Home, registry: Registry, mirror: Mirror, small: str
) -> None:
    reference = small.replace(registry.address, mirror.address)
    mirror.harm = "stall"
    pulling = home.banger.start("image", "pull", "--insecure", reference)
    assert pulling.stderr is not None
    read_until(pulling.stderr, b"fetch")
    until(lambda: mirror.sent, "the pull asks for a blob")
    pulling.send_signal(2)
    status, _, said = finish(pulling)
    assert status == 130, said
    assert _images(home.banger) == []
    assert _left(home) == []
    assert not [each for each in home.processes() if "skopeo" in each.command]


@pytest.mark.parametrize("stage", STAGES)
def test_the_daemon_is_killed_in_each_stage_of_a_pull(home: Home, small: str, stage: str) -> None:
    faulty = Banger(home.banger.environment | {"BANGER_FAULT": f"SIGKILL@image.pull:{stage}"})
    faulty.run("image", "pull", "--insecure", small)
    home.await_end_of_processes()
    assert _images(home.banger) == []
    assert _left(home) == []
    assert home.banger.ok("image", "pull", "--insecure", small).startswith("small-1.0")


def test_a_daemon_that_is_killed_takes_its_skopeo_along(
    home: Home, registry: Registry, mirror: Mirror, small: str
) -> None:
    """One that waits for a registry which is silent would wait for ever."""
    pulling = _held_up(home, registry, mirror, small, "stall")
    home.kill_daemon(9)
    finish(pulling)
    home.await_end_of_processes()
    assert _images(home.banger) == []
    assert _left(home) == []


def test_the_cache_is_listed_and_emptied(home: Home, small: str) -> None:
    banger = home.banger
    banger.ok("image", "pull", "--insecure", small)
    cache = home.directory / "cache/banger"
    there = [each for each in (cache / "blobs").rglob("*") if each.is_file()]
    told = banger.json("image", "cache", "prune", "--dry-run")
    assert told["files"] == len(there)
    assert all(each.exists() for each in there)
    assert "removed" in banger.ok("image", "cache", "prune")
    assert [each for each in cache.rglob("*") if each.is_file() and each.name != "lock"] == []
    banger.ok("image", "delete", "small-1.0")
    banger.ok("image", "pull", "--insecure", small)


def test_the_cache_stays_within_its_limit(home: Home, small: str) -> None:
    home.configure('image_cache_limit = "1M"')
    home.banger.run("daemon", "stop")
    home.banger.ok("image", "pull", "--insecure", small)
    blobs = home.directory / "cache/banger/blobs"
    assert sum(each.stat().st_size for each in blobs.rglob("*")) <= 1 << 20


def test_a_pull_that_fails_leaves_the_cache_within_its_limit(
    home: Home, registry: Registry, small: str, layout: Layout
) -> None:
    home.configure('image_cache_limit = "1M"')
    home.banger.run("daemon", "stop")
    layout.image([_base(), tar(_noise("late", 3_000_000))])
    reference = registry.push(layout.folder, "team/late:1")
    mirror = Mirror(registry, from_bytes=2_500_000)  # the first layer is whole by then
    try:
        mirror.harm = "cut"
        through = reference.replace(registry.address, mirror.address)
        home.banger.fails("image", "pull", "--insecure", through, status=1)
        assert len(set(mirror.sent)) > 1
    finally:
        mirror.close()
    blobs = home.directory / "cache/banger/blobs"
    assert sum(each.stat().st_size for each in blobs.rglob("*") if each.is_file()) <= 1 << 20


def test_the_cache_is_not_emptied_below_a_pull(
    home: Home, registry: Registry, mirror: Mirror, small: str
) -> None:
    pulling = _held_up(home, registry, mirror, small, "wait")
    said = home.banger.fails("image", "cache", "prune", status=1)
    assert "the cache is in use: something is being pulled" in said
    mirror.harm = ""
    assert finish(pulling)[0] == 0
    home.banger.ok("image", "cache", "prune")


def test_who_removes_from_the_cache_is_waited_for_and_delays_nobody(home: Home, small: str) -> None:
    cache = home.directory / "cache/banger"
    cache.mkdir(parents=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as another daemon of this user would
        pulling = home.banger.start("image", "pull", "--insecure", small)
        until(lambda: _running(home), "the pull begins")
        assert home.banger.run("vm", "list", timeout_s=10).returncode == 0
        assert pulling.poll() is None
    status, out, said = finish(pulling)
    assert (status, out[:10]) == (0, b"small-1.0 "), said


def test_an_archive_that_unpacks_to_more_than_an_image_may_hold(
    home: Home, layout: Layout, tmp_path: Path
) -> None:
    """skopeo unpacks it before anything of it is known."""
    home.configure('image_size_limit = "16M"')
    home.banger.run("daemon", "stop")
    archive = tmp_path / "bomb.tar.gz"
    member = tarfile.TarInfo("zeros")
    member.size = 8 << 30
    piece = gzip.compress(bytes(64 << 20), 1)
    archive.write_bytes(gzip.compress(member.tobuf()) + piece * (member.size >> 26))
    said = home.banger.fails("image", "pull", f"docker-archive:{archive}", status=1)
    assert "holds more than 16 MiB, which it may not" in said
    assert _images(home.banger) == []
    assert _left(home) == []
    assert not [each for each in home.processes() if "skopeo" in each.command]


@pytest.fixture
def small_disk(home: Home) -> Iterator[Home]:
    """A home whose images have 300 MiB."""
    home.banger.run("daemon", "stop")
    images = home.data / "images"
    rest = home.data / "rest"
    images.rename(rest)
    with little_room(images, "300m"):
        for each in rest.iterdir():
            (images / each.name).symlink_to(each)
        yield home


@pytest.mark.parametrize("stage", ["unpack", "filesystem", "finish"])
def test_the_disk_gets_full_in_a_stage_of_a_pull(small_disk: Home, small: str, stage: str) -> None:
    home, images = small_disk, small_disk.data / "images"
    stopping = Banger(home.banger.environment | {"BANGER_FAULT": f"SIGSTOP@image.pull:{stage}"})
    pulling = stopping.start("image", "pull", "--insecure", small)
    daemon = until(home.stopped_daemon, f"the daemon stops before {stage}")
    filler = images / "filler"
    with suppress(OSError):
        filler.write_bytes(bytes(300 << 20))
    os.kill(daemon, signal.SIGCONT)
    status, _, said = finish(pulling)
    filler.unlink()
    if stage != "finish":  # what that writes may still find room
        assert status == 1
    if status:
        assert b"No space left on device" in said or b"is full" in said, said
        assert _images(home.banger) == []
        assert home.banger.ok("image", "pull", "--insecure", small).startswith("small-1.0")
    assert _left(home) == []


def test_machines_share_their_image(home: Home, small: str) -> None:
    """Each costs what it has written; `image show` and `vm show` say how much."""
    banger = home.banger
    banger.ok("image", "pull", "--insecure", small, "--name", "shared")
    for number in range(3):
        banger.ok("vm", "create", "--image", "shared", "--name", f"m{number}")
    shown = banger.json("image", "show", "shared")
    assert [each["vm_name"] for each in shown["vms"]] == ["m0", "m1", "m2"]
    for each in shown["vms"]:
        assert 0 < each["disk_bytes"] < 32 << 20
        assert banger.json("vm", "show", each["vm_name"])["disk_bytes"] > 0
    assert "of its own" in banger.ok("image", "show", "shared")


def test_where_skopeo_is_missing_that_is_said(home: Home, small: str, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("env", "sh"):
        found = shutil.which(name)
        assert found is not None
        (tools / name).symlink_to(found)
    home.banger.run("daemon", "stop")
    without = Banger(home.banger.environment | {"PATH": str(tools)})
    said = without.fails("image", "pull", "--insecure", small, status=1)
    assert "skopeo is not installed" in said
    assert "apt-get install skopeo" in said
