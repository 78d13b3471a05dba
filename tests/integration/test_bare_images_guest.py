"""Machines of images from anywhere: with one static program and nothing else, with links where
directories belong, with users and an entrypoint of their own; and Debian beside them."""

from __future__ import annotations

import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from oci_layouts import Layout, Member, directory, symlink, tar
from product import Banger, until
from static_busybox import static_busybox

pytestmark = pytest.mark.guest

SMALL = ("--memory", "256M", "--vcpu", "1")

_PASSWD = b"root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001::/home/app:/bin/sh\n"
_GROUP = b"root:x:0:\napps:x:1001:\nstaff:x:50:app\nwheel:x:60:\n"


Image = tuple[list[Member], dict[str, Any]]


def program(name: str = "app/busybox") -> Member:
    return Member(name, static_busybox().read_bytes(), mode=0o755)


def one_program() -> Image:
    """By its name no shell, and not where one is looked for."""
    return [program()], {"Env": ["PATH=/app", "GREETING=hello"]}


def misplaced() -> Image:
    """Links that lead nowhere, out of the image or elsewhere in it, and files, for directories."""
    links = {"etc": "/nowhere/etc", "dev": "/app", "sys": "proc", "run": "/newroot/app",
             "tmp": "/app/none", "lib": "usr/lib"}  # fmt: skip
    files = [Member("proc", b"a file"), Member("root", b"a file")]
    return [program(), *files, *(symlink(*pair) for pair in links.items())], {"Env": ["PATH=/app"]}


def devious() -> Image:
    """What is there is not what it is taken for."""
    members = [
        program(),
        directory("usr/etc"),
        symlink("etc", "usr/etc"),
        Member("usr/etc/hosts", kind=tarfile.FIFOTYPE),
        directory("usr/etc/hostname"),
        Member("usr/etc/hostname/kept", b"kept"),
        symlink("usr/etc/resolv.conf", "/app/busybox"),
        symlink("usr/etc/machine-id", "/dev/zero"),
        directory("elsewhere"),
        symlink("root", "/elsewhere"),
        directory("var/tmp", 0o700),
        symlink("tmp", "var/tmp"),
    ]
    return members, {"Env": ["PATH=/app"]}


def with_users() -> Image:
    """As small distributions are: everything is one program, with links to it."""
    listed = subprocess.run([static_busybox(), "--list"], capture_output=True, check=True)
    names = set(listed.stdout.decode().split()) - {"busybox"}
    members = [
        program("bin/busybox"),
        *(symlink(f"bin/{name}", "busybox") for name in sorted(names)),
        Member("etc/passwd", _PASSWD),
        Member("etc/group", _GROUP),
        directory("home/app", uid=1000, gid=1001),
    ]
    config = {
        "Env": ["PATH=/opt/bin:/bin", "GREETING=hello"],
        "User": "app",
        "WorkingDir": "/srv/made/here",
        "Entrypoint": ["/bin/sh", "-c", 'echo "entrypoint: $*"; id -un; pwd', "entry"],
        "Cmd": ["its", "own words"],
    }
    return members, config


IMAGES = {"one": one_program, "misplaced": misplaced, "devious": devious, "users": with_users}


@pytest.fixture(scope="module", autouse=True)
def images(banger: Banger, image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """All of them, beside Debian, whose kernel they boot with."""
    for name, make in IMAGES.items():
        members, config = make()
        layout = Layout(tmp_path_factory.mktemp(name) / "layout")
        layout.image([tar(*members)], config)
        banger.ok("image", "pull", "-q", f"oci:{layout.folder}", "--name", name)
    yield
    for name in IMAGES:
        banger.ok("image", "delete", name)


@pytest.fixture(scope="module")
def one(banger: Banger) -> Iterator[str]:
    """A machine with one program, shared by tests that leave it as it was."""
    name = banger.ok("run", "-d", "-q", "--image", "one", *SMALL).strip()
    yield name
    banger.run("vm", "delete", "--force", name)


@pytest.fixture(scope="module")
def users(banger: Banger) -> Iterator[str]:
    name = banger.ok("run", "-d", "-q", "--image", "users", *SMALL).strip()
    yield name
    banger.run("vm", "delete", "--force", name)


COLD_AND_WARM = pytest.mark.parametrize("start", [("--cold",), ()], ids=["cold", "template"])


@COLD_AND_WARM
@pytest.mark.parametrize("name", ["one", "misplaced", "devious"])
def test_a_machine_of_nearly_nothing_runs_a_command(
    banger: Banger, name: str, start: tuple[str, ...]
) -> None:
    """The second one may be a standby that has waited."""
    script = "echo $PATH; grep -c ' /root ext4' /proc/mounts; cat /etc/hostname; echo x > /tmp/x"
    script += "; grep -c localhost /etc/hosts; busybox --list | wc -l >&2; exit 7"
    for number in range(2):
        words = ("--name", f"{name}-{number}", "--", "busybox", "sh", "-c", script)
        done = banger.run("run", "--rm", "-q", "--image", name, *SMALL, *start, *words)
        assert done.returncode == 7, done.stderr
        assert done.stdout.decode() == f"/app\n1\n{name}-{number}\n2\n"
        assert int(done.stderr) > 100


@COLD_AND_WARM
def test_debian_has_its_own_environment(banger: Banger, image: str, start: tuple[str, ...]) -> None:
    words = ("--", "sh", "-c", "echo $PATH; id -un; pwd; exit 7")
    done = banger.run("run", "--rm", "-q", "--image", image, *SMALL, *start, *words)
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    assert (done.returncode, done.stdout.decode()) == (7, f"{path}\nroot\n/root\n")


def test_the_image_itself_is_not_touched(banger: Banger) -> None:
    """What is made in place of its links is on the machine's own disk."""
    rootfs = Path(banger.json("image", "show", "misplaced")["rootfs_path"])
    before = rootfs.stat()
    banger.ok("run", "--rm", "-q", "--image", "misplaced", *SMALL, "--", "busybox", "true")
    after = rootfs.stat()
    assert (after.st_mtime_ns, after.st_blocks) == (before.st_mtime_ns, before.st_blocks)


def test_where_the_image_has_something_else_the_guest_has_what_it_needs(banger: Banger) -> None:
    script = "cd /; test -f etc/hosts; test -f etc/hostname; test ! -L etc/resolv.conf; "
    script += "test $(wc -c < etc/machine-id) = 33; test -f /etc/hostname.banger-old/kept; "
    script += "test -L etc; test -L tmp; stat -c %a /var/tmp; test ! -L root; ls /elsewhere"
    words = ("--", "busybox", "sh", "-ec", script)
    ran = banger.ok("run", "--rm", "-q", "--image", "devious", *SMALL, *words)
    assert ran == "700\n"


def test_files_go_in_and_out_without_a_tar(banger: Banger, one: str, tmp_path: Path) -> None:
    (tmp_path / "tree/sub").mkdir(parents=True)
    (tmp_path / "tree/sub/file").write_bytes(b"content")
    banger.ok("vm", "cp", tmp_path / "tree", f"{one}:/root/there")
    banger.ok("vm", "cp", f"{one}:/root/there", tmp_path / "back")
    assert (tmp_path / "back/sub/file").read_bytes() == b"content"
    banger.ok("vm", "exec", one, "--", "busybox", "rm", "-r", "/root/there")


def test_what_is_not_in_the_image_is_said(banger: Banger, one: str, tmp_path: Path) -> None:
    said = banger.fails("vm", "shell", one, status=127)
    assert said == "/bin/sh: there is no such shell in the guest\n"
    assert "command not found" in banger.fails("vm", "exec", one, "--", "sh", status=127)
    assert "Permission denied" in banger.fails("vm", "exec", one, "--", "/etc/hosts", status=126)
    assert "there is no user app" in banger.fails("vm", "exec", "-u", "app", one, "--", "busybox",
                                                  status=125)  # fmt: skip
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    commit = ("-c", "user.name=n", "-c", "user.email=e", "commit", "-q", "--allow-empty", "-m", "m")
    subprocess.run(["git", "-C", tmp_path, *commit], check=True)
    said = banger.fails("vm", "workspace", "prepare", "-q", one, tmp_path, status=1)
    assert "the guest lacks a program that repositories need there: sh: command not found" in said
    assert "hint: use an image with a shell" in said


def test_it_lives_as_any_machine(banger: Banger) -> None:
    name = banger.ok("run", "-d", "-q", "--image", "one", *SMALL).strip()
    try:
        banger.ok("vm", "exec", name, "--", "busybox", "sh", "-c", "echo kept > /root/f; sync")
        assert banger.json("vm", "health", name)["healthy"]
        assert "fatal" not in banger.ok("vm", "logs", name)
        for verb in (("stop",), ("stop", "--suspend")):
            banger.ok("vm", *verb, "-q", name)
            banger.ok("vm", "start", "-q", name)
            assert banger.ok("vm", "exec", name, "--", "busybox", "cat", "/root/f") == "kept\n"
        banger.ok("vm", "snapshot", "-q", name, f"{name}-snap")
        (copy,) = banger.ok("vm", "fork", "-q", name).split()
        assert banger.ok("vm", "exec", copy, "--", "busybox", "cat", "/root/f") == "kept\n"
    finally:
        made = [each["name"] for each in banger.json("vm", "list")]
        banger.run("vm", "delete", "--force", *(each for each in made if each.startswith(name)))
        banger.run("snapshot", "delete", f"{name}-snap")


def test_an_image_without_a_program_of_its_own_has_a_shell_or_nothing(banger: Banger) -> None:
    said = banger.fails("run", "--rm", "-q", "--image", "one", *SMALL, status=127)
    assert "there is no such shell in the guest" in said


def test_the_images_own_program_is_run(banger: Banger) -> None:
    run = ("run", "--rm", "-q", "--image", "users", *SMALL)
    as_said = "\napp\n/srv/made/here\n"
    assert banger.ok(*run) == f"entrypoint: its own words{as_said}"
    assert banger.ok(*run, "--", "mine") == f"entrypoint: mine{as_said}"
    assert banger.ok(*run, "--entrypoint", "echo", "--", "mine") == "mine\n"
    assert banger.ok(*run, "--entrypoint", "", "--", "echo", "mine") == "mine\n"
    assert banger.ok(*run, "-u", "root", "--entrypoint", "id", "--", "-un") == "root\n"
    assert banger.fails(*run, "--entrypoint", "none", status=127) == "none: command not found\n"
    assert "Permission denied" in banger.fails(*run, "--entrypoint", "/etc/passwd", status=126)


def test_detached_it_is_started_and_left(banger: Banger, users: str) -> None:
    """The machine they share was started so; another is told what to do."""
    until(lambda: "entrypoint: its own words" in banger.ok("vm", "logs", users), "it has run")
    words = ("-e", "A=b", "--entrypoint", "sh", "--", "-c", "echo $A $GREETING > ~/out")
    name = banger.ok("run", "-d", "-q", "--image", "users", *SMALL, *words).strip()
    try:
        script = "until [ -s ~/out ]; do sleep 0.1; done; cat ~/out"
        assert banger.ok("vm", "exec", name, "--", "sh", "-c", script) == "b hello\n"
    finally:
        banger.run("vm", "delete", "--force", name)


def test_every_command_is_run_as_the_image_says(banger: Banger, users: str) -> None:
    script = "echo $GREETING $PATH; id -u; id -g; id -G; pwd; echo $HOME"
    said = banger.ok("vm", "exec", "-e", "GREETING=ours", users, "--", "sh", "-c", script)
    assert said == "ours /opt/bin:/bin\n1000\n1001\n1001 50\n/srv/made/here\n/home/app\n"
    for user, ids in (("root", "0 0"), ("app:wheel", "1000 60"), ("7:8", "7 8"), ("7", "7 0")):
        script = "echo $(id -u) $(id -g)"
        said = banger.ok("vm", "exec", "-u", user, users, "--", "sh", "-c", script)
        assert said == f"{ids}\n"
    assert banger.ok("vm", "exec", "-w", "/tmp", users, "--", "pwd") == "/tmp\n"
    said = banger.fails("vm", "exec", "-w", "/none", users, "--", "pwd", status=125)
    assert "cannot enter directory /none" in said
    assert banger.ok("vm", "shell", users, stdin=b"id -un; pwd; exit\n") == "app\n/srv/made/here\n"
    said = banger.fails("vm", "exec", "-w", "/root", users, "--", "pwd", status=125)
    assert 'its image runs programs as "app"; as another user: -u root' in said


def test_the_commands_of_forks_are_run_as_the_image_says(banger: Banger) -> None:
    run = ("run", "--rm", "-q", "--image", "users", *SMALL, "--fork", "2", "--name", "forked")
    banger.ok(*run, "--", "mine")
    try:
        for number in ("0", "1"):
            said = banger.ok("vm", "results", "forked", "--log", number)
            assert said == "entrypoint: mine\napp\n/srv/made/here\n"
    finally:
        banger.run("vm", "results", "forked", "--delete")


def test_a_repository_has_a_shell_not_the_images_program(banger: Banger, tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / "file").write_text("content")
    subprocess.run(["git", "-C", tmp_path, "add", "file"], check=True)
    commit = ("-c", "user.name=n", "-c", "user.email=e", "commit", "-q", "-m", "m")
    subprocess.run(["git", "-C", tmp_path, *commit], check=True)
    run = ("run", "--rm", "-q", "--image", "users", *SMALL, "-u", "root")
    assert banger.ok(*run, tmp_path, stdin=b"cat file; exit\n") == "content"
    words = ("--entrypoint", "", "--", "cat", "file")
    assert banger.ok(*run, tmp_path, *words) == "content"
