"""Building without building: arguments, progress, failures, preflight, what an image must lose."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger.base.errors import BangerError, NotFound, PreconditionFailed, Unavailable
from banger.images import preflight
from banger.images.bootstrap import (
    Bootstrap,
    BootstrapProgress,
    bootstrap_failure,
    build_environment,
    mmdebstrap_argv,
)
from banger.images.build import BUILDABLE, RECIPES, build_image, depersonalise, installed_packages
from banger.images.preflight import (
    ensure_free_space,
    keyring_requirement,
    namespaces_requirement,
    subordinate_requirement,
)
from banger.images.userns import contained_argv, remove_tree


def test_a_contained_command_ends_with_us_whoever_we_are() -> None:
    for root in (True, False):
        argv = contained_argv(["true", Path("/x")], root=root)
        assert argv[:5] == ["setpriv", "--pdeathsig", "KILL", "--", "unshare"]
        assert {"--mount", "--pid", "--fork", "--kill-child"} < set(argv)
        assert ("--user" in argv) is not root
        assert argv[-3:] == ["--", "true", "/x"]


def test_mmdebstrap_chooses_the_mirror_and_verifies() -> None:
    argv = mmdebstrap_argv(Bootstrap("minbase", ("git", "jq")), Path("/staging/tree"))
    assert argv[-2:] == ["bookworm", "/staging/tree"]
    assert "--include=git,jq" in argv
    assert not any("://" in word or "trusted" in word.lower() for word in argv)


def test_a_build_sees_the_proxy_and_no_other_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    monkeypatch.setenv("LANG", "de_DE.UTF-8")
    monkeypatch.setenv("APT_CONFIG", "/home/x/apt.conf")
    environment = build_environment(Path("/scratch"))
    assert environment["http_proxy"] == "http://proxy.example:3128"
    assert environment["TMPDIR"] == "/scratch"
    assert environment["LC_ALL"] == "C.UTF-8"
    assert not {"LANG", "APT_CONFIG"} & set(environment)


_OUTPUT = """\
I: automatically chosen format: directory
I: running apt-get update...
Get:1 http://mirror.example/debian bookworm InRelease [151 kB]
Get:3 http://mirror.example/debian bookworm/main amd64 Packages [8693 kB]
I: downloading packages with apt...
0 upgraded, 2 newly installed, 0 to remove and 0 not upgraded.
Need to get 2,000 kB of archives.
Get:1 http://mirror.example/debian bookworm/main amd64 gcc-12-base amd64 12.2.0-14 [500 kB]
Get:2 http://mirror.example/debian bookworm/main amd64 libc6 amd64 2.36-9 [1.5 MB]
I: extracting archives...
I: installing essential packages...
Unpacking gcc-12-base:amd64 (12.2.0-14) ...
Unpacking libc6:amd64 (2.36-9) ...
Setting up gcc-12-base:amd64 (12.2.0-14) ...
Setting up libc6:amd64 (2.36-9) ...
I: installing remaining packages inside the chroot...
0 upgraded, 2 newly installed, 0 to remove and 0 not upgraded.
Need to get 29.7 MB of archives.
Unpacking jq (1.6-2.1) ...
Unpacking git (1:2.39.5) ...
Setting up jq (1.6-2.1) ...
Setting up git (1:2.39.5) ...
"""


def test_progress_counts_bytes_and_packages() -> None:
    seen: list[tuple[str, str, float]] = []
    reader = BootstrapProgress(lambda *step: seen.append(step))
    for line in _OUTPUT.splitlines():
        reader.line(line)
    assert seen == [
        ("download", "package lists", -1),
        ("download", "0.5 of 2.0 MB (gcc-12-base)", 25),
        ("download", "2.0 of 2.0 MB (libc6)", 100),
        ("install", "unpacking", -1),
        ("install", "0 packages (gcc-12-base)", -1),
        ("install", "0 packages (libc6)", -1),
        ("install", "1 packages (gcc-12-base)", -1),
        ("install", "2 packages (libc6)", -1),
        ("install", "2 of 4 packages (jq)", 62.5),
        ("install", "2 of 4 packages (git)", 75),
        ("install", "3 of 4 packages (jq)", 87.5),
        ("install", "4 of 4 packages (git)", 100),
    ]


@pytest.mark.parametrize(
    ("stderr", "kind", "what"),
    [
        ("E: Could not connect to 127.0.0.1:9 (Connection refused)", Unavailable, "mirror"),
        ("W: Temporary failure resolving 'mirror.example'", Unavailable, "mirror"),
        ("dpkg: error: x (--unpack): No space left on device", PreconditionFailed, "disk is full"),
        ("E: GPG error: … NO_PUBKEY 0E98404D386FA1D9", PreconditionFailed, "signatures"),
        ("E: Release file for x is not valid yet", PreconditionFailed, "another time"),
        ("something else\n", Unavailable, "something else"),
    ],
)
def test_a_failure_says_what_it_was_and_what_to_do(
    stderr: str, kind: type[BangerError], what: str
) -> None:
    error = bootstrap_failure("I: running\n" + stderr, Path("/tree"))
    assert type(error) is kind
    assert what in error.message
    assert stderr.strip() in error.message
    assert error.hint


async def test_another_image_name_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="bullseye") as caught:
        await build_image("debian-bullseye", tmp_path, progress=lambda *_: None)
    assert all(name in caught.value.hint for name in BUILDABLE)


def test_the_default_image_has_what_a_developer_needs() -> None:
    assert {
        *("git", "openssh-server", "curl", "ca-certificates", "python3", "build-essential"),
        *("less", "jq", "sudo", "procps", "iproute2", "systemd-sysv"),
    } < set(RECIPES["debian-bookworm"].packages)
    assert not any("linux-image" in name for r in RECIPES.values() for name in r.packages)


def test_free_space_is_asked_for_before_anything_is_made(tmp_path: Path) -> None:
    ensure_free_space(tmp_path, 1)
    with pytest.raises(PreconditionFailed, match=r"needs 1e\+03 TiB|needs \S+ TiB free in"):
        ensure_free_space(tmp_path, 1 << 50)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("ada:100000:65536\n", ""),
        ("# comment\nbob:1:2\n1001:100000:65536\n", ""),
        ("", "no range for ada"),
        ("adam:100000:65536\n", "no range for ada"),
        ("ada:100000:many\n", "no range for ada"),
        ("ada:100000:1000\nada:200000:65536\n", "only 1000"),
    ],
)
def test_the_first_range_of_subordinate_ids_must_hold_all_of_debian(
    text: str, problem: str
) -> None:
    found = subordinate_requirement("/etc/subgid", text, "ada", 1001)
    assert problem in found.problem
    assert bool(found.problem) is bool(problem)
    assert ("--add-subgids" in found.hint) is bool(problem)


@pytest.mark.parametrize(
    ("switches", "hint"),
    [
        ({}, "build as root"),
        ({"/proc/sys/kernel/unprivileged_userns_clone": "0"}, "unprivileged_userns_clone=1"),
        ({"/proc/sys/user/max_user_namespaces": "0"}, "max_user_namespaces="),
        (
            {
                "/proc/sys/kernel/apparmor_restrict_unprivileged_userns": "1",
                "/proc/sys/kernel/unprivileged_userns_clone": "1",
            },
            "apparmor_restrict_unprivileged_userns=0",
        ),
    ],
)
def test_forbidden_namespaces_name_the_switch(switches: dict[str, str], hint: str) -> None:
    found = namespaces_requirement("unshare failed", switches, root=False)
    assert "unshare failed" in found.problem
    assert hint in found.hint
    assert not namespaces_requirement("", switches, root=False).problem
    assert "CAP_SYS_ADMIN" in namespaces_requirement("no", switches, root=True).hint


async def test_everything_missing_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "_TOOLS", ("no-such-tool", "nor-this"))
    monkeypatch.setattr(preflight, "_KEYRING_DIRS", (tmp_path,))
    with pytest.raises(PreconditionFailed) as caught:
        await preflight.ensure_requirements()
    for word in ("no-such-tool", "nor-this", "keys"):
        assert word in caught.value.message
    assert "debian-archive-keyring" in caught.value.hint


def test_the_archive_keys_are_looked_for(tmp_path: Path) -> None:
    assert keyring_requirement((tmp_path,)).hint
    (tmp_path / "debian-archive-keyring.pgp").touch()
    assert not keyring_requirement((tmp_path / "none", tmp_path)).problem


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Path]:
    root = tmp_path / "tree"
    for name, content in {
        "etc/ssh/ssh_host_ed25519_key": "secret",
        "etc/ssh/sshd_config": "keep",
        "etc/hostname": "build-machine",
        "var/lib/systemd/random-seed": "seed",
        "var/lib/apt/lists/mirror_InRelease": "list",
        "var/cache/apt/archives/partial/x.deb": "deb",
        "var/log/apt/term.log": "log",
        "var/log/wtmp": "",
        "tmp/left": "x",
        "run/lock/x": "x",
        "dev/null": "x",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    outside = tmp_path / "outside"
    outside.write_text("of the build machine")
    (root / "etc/resolv.conf").symlink_to(outside)
    yield root
    assert outside.read_text() == "of the build machine"


def test_an_image_keeps_nothing_of_one_machine(tree: Path) -> None:
    depersonalise(tree)
    left = {str(p.relative_to(tree)): p.read_text() for p in tree.rglob("*") if p.is_file()}
    assert left == {
        "etc/ssh/sshd_config": "keep",
        "etc/machine-id": "",
        "etc/resolv.conf": "",
        "etc/hostname": "banger\n",
        "etc/hosts": "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n",
        "var/log/wtmp": "",
    }
    assert not (tree / "etc/resolv.conf").is_symlink()
    assert all((tree / name).is_dir() for name in ("dev", "run", "tmp", "var/lib/apt/lists"))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("127.0.0.1\tlocalhost\n127.0.1.1 build-1\n10.0.0.5 cache\n",
         "127.0.0.1\tlocalhost\n10.0.0.5 cache\n"),
        ("10.0.0.5 cache \udcff\n",
         "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n10.0.0.5 cache \udcff\n"),
    ],
)  # fmt: skip
def test_hosts_that_an_image_knows_stay(tree: Path, before: str, after: str) -> None:
    hosts = tree / "etc/hosts"
    hosts.write_bytes(os.fsencode(before))
    depersonalise(tree)
    assert hosts.read_bytes() == os.fsencode(after)


def test_a_link_cannot_lead_the_cleaning_out_of_the_image(tree: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").touch()
    (tree / "var/tmp").symlink_to(elsewhere)
    with pytest.raises(PreconditionFailed, match="leads out"):
        depersonalise(tree)
    assert (elsewhere / "precious").exists()


def test_packages_are_read_from_dpkgs_status(tmp_path: Path) -> None:
    status = tmp_path / "var/lib/dpkg/status"
    status.parent.mkdir(parents=True)
    status.write_text(
        "Package: jq\nStatus: install ok installed\nVersion: 1.6-2.1\nDescription: x\n y\n\n"
        "Package: gone\nStatus: deinstall ok config-files\nVersion: 1\n\n"
        "Package: git\nStatus: install ok installed\nVersion: 1:2.39.5-0\n"
    )
    assert installed_packages(tmp_path) == ("git=1:2.39.5-0", "jq=1.6-2.1")


async def test_removing_is_idempotent_and_does_not_follow_links(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").touch()
    tree = tmp_path / "tree"
    (tree / "deep/er").mkdir(parents=True)
    (tree / "deep/link").symlink_to(precious)
    await remove_tree(tree)
    await remove_tree(tree)
    assert not tree.exists()
    (tmp_path / "link").symlink_to(precious)
    await remove_tree(tmp_path / "link")
    assert not (tmp_path / "link").is_symlink()
    assert (precious / "file").exists()
