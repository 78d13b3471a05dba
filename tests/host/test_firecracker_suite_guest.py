"""The integration suite with Firecracker itself, in its jails, on a guest as the host, whose nested
KVM runs guests whatever the KVM of the machine that runs the tests does.

It is slow there, so what runs with `--all-hosts` is what every machine needs (`_PARTS`), and with
`--whole-suite` the rest, too, as by `make test-firecracker`. The tests are this checkout's, banger
is the wheel that is installed there.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from _pytest.nodes import Node

import firecrackers
from guest_host import GUESTS_PYTHON, GuestHost, GuestHosts
from product import DEFAULT_IMAGE, IMAGE, Banger
from suite import JAILED_VARIABLE

_TIMEOUT_S = 5400

pytestmark = [pytest.mark.guest, pytest.mark.timeout(_TIMEOUT_S + 1200)]

_TESTS = Path(__file__).parents[1]
#: What the tests import, and banger does not.
_PACKAGES = ("pytest", "pytest-asyncio", "pytest-timeout", "hypothesis", "jsonschema", "PyYAML")
_PLACE = "/root/suite"
_IMAGES = "/srv/images"

#: What of a file's tests runs, as pytest's -k has it; all where nothing is said.
_PARTS = {
    "test_run.py": "",
    "test_exec.py": "",
    "test_copy.py": "",
    "test_lifecycle_guest.py": "",
    "test_snapshots_guest.py": "processes_memory or whatever_goes or suspended or ctrl_c",
    "test_templates_guest.py": "can_go or larger or cold or damaged",
    "test_kill_daemon.py": "",
    "test_reflink_guest.py": "lives or as_they_were",
    "test_workspace_guest.py": "round_trip or whatever_a_guest or one_command or stopped",
}


def _whole(config: pytest.Config) -> bool:
    return bool(config.getoption("--whole-suite"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "part" in metafunc.fixturenames:
        names = sorted(path.name for path in (_TESTS / "integration").glob("test_*.py"))
        metafunc.parametrize("part", names if _whole(metafunc.config) else _PARTS)


@pytest.fixture(scope="session")
def programs(pytestconfig: pytest.Config) -> tuple[Path, Path]:
    """Firecracker and its jailer. Of the session, so that nothing is made before it is skipped."""
    if not pytestconfig.getoption("--all-hosts"):
        pytest.skip("takes an hour: run with --all-hosts, or `make test-firecracker`")
    firecracker, jailer = firecrackers.real(), firecrackers.jailer()
    if firecracker is None or jailer is None:
        pytest.skip(
            "firecracker and jailer are not on PATH: put both there, or set"
            f" {firecrackers.REAL_VARIABLE} to the path of the one, with the other beside it"
        )
    return firecracker, jailer


@pytest.fixture(scope="module")
def suite_host(
    programs: tuple[Path, Path],
    guest_hosts: GuestHosts,
    default_image: str,
    request: pytest.FixtureRequest,
    keeps: Callable[[Node], bool],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[GuestHost]:
    """A host with both programs on root's PATH, the tests, and what they need."""
    host = guest_hosts.new("suite")
    if host.run("test", "-e", "/dev/kvm").returncode != 0:
        pytest.skip(firecrackers.NO_NESTING)
    for source, name in zip(programs, ("firecracker", "jailer"), strict=True):
        host.put(source, f"/usr/local/bin/{name}")
        host.root(f"chown root:root /usr/local/bin/{name}; chmod 755 /usr/local/bin/{name}")
    host.load("tun", "bridge", "veth")
    _put_tests(host, tmp_path_factory.mktemp("packages"))
    _put_images(host, tmp_path_factory.mktemp("images"))
    yield host
    if not keeps(request.node):
        host.banger.ok("vm", "delete", "--force", host.name)


def _put_tests(host: GuestHost, scratch: Path) -> None:
    packages = scratch / "packages"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet")
    as_here = [f"{name}=={version(name)}" for name in _PACKAGES]
    download: list[str | Path] = [*pip, "download", *GUESTS_PYTHON, "-d", packages, *as_here]
    subprocess.run(download, check=True, timeout=300)
    host.root(f"mkdir {_PLACE}")
    host.put(packages, f"{_PLACE}/packages")
    install = "/opt/banger/bin/pip --disable-pip-version-check install --quiet --no-index"
    host.root(f"{install} --find-links {_PLACE}/packages {' '.join(_PACKAGES)}", timeout_s=600)
    ignored = shutil.ignore_patterns("__pycache__", "corpus")
    shutil.copytree(_TESTS, scratch / "tests", ignore=ignored)
    host.put(scratch / "tests", f"{_PLACE}/tests")
    host.put(_TESTS.parent / "pyproject.toml", f"{_PLACE}/pyproject.toml")


def _put_images(host: GuestHost, scratch: Path) -> None:
    """The small image is there; the other is mostly holes, which an archive has not."""
    host.root(f"mkdir {_IMAGES}; ln /srv/vmlinux {_IMAGES}/vmlinux")
    host.root(f"ln /srv/rootfs.ext4 {_IMAGES}/{IMAGE}.ext4")
    rootfs = _default_rootfs(host.banger)
    archive = scratch / "image.tar"
    name = f"--transform=s/.*/{DEFAULT_IMAGE}.ext4/"
    subprocess.run(
        ["tar", "-C", rootfs.parent, "-cSf", archive, name, rootfs.name], check=True, timeout=300
    )
    host.put(archive, f"{_IMAGES}/image.tar")
    archive.unlink()
    host.root(f"cd {_IMAGES}; tar -xSf image.tar; rm image.tar", timeout_s=600)


def _default_rootfs(banger: Banger) -> Path:
    if DEFAULT_IMAGE not in {each["name"] for each in banger.json("image", "list")}:
        done = banger.run("image", "build", "-q", DEFAULT_IMAGE, timeout_s=800)
        assert done.returncode == 0, done.stderr.decode()
    return Path(banger.json("image", "show", DEFAULT_IMAGE)["rootfs_path"])


def test_firecracker_passes(suite_host: GuestHost, part: str, pytestconfig: pytest.Config) -> None:
    chosen = "" if _whole(pytestconfig) else _PARTS[part]
    words = [
        *("env", f"{JAILED_VARIABLE}=1"),
        *("/opt/banger/bin/python", "-m", "pytest", "-q", "-p", "no:cacheprovider"),
        *("-c", f"{_PLACE}/pyproject.toml", f"{_PLACE}/tests/integration/{part}"),
        *("--drivers", "firecracker+reflink", "--images", _IMAGES, "--timeout", "1500"),
        *(("-k", chosen) if chosen else ()),
    ]
    done = suite_host.run(*words, timeout_s=_TIMEOUT_S)
    said = done.stdout.decode(errors="replace")
    print(said)
    whole = said[-8000:] + done.stderr.decode(errors="replace")[-2000:]
    if done.returncode == 5 and _whole(pytestconfig):
        return  # none of its tests is one of this suite
    assert done.returncode == 0, whole
    assert re.search(r"\d+ passed", said), whole
