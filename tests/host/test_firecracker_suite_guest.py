"""The integration suite with Firecracker itself, in its jails, on a guest as the host, whose nested
KVM runs guests whatever the KVM of the machine that runs the tests does.

It is slow there, so what runs with `--all-hosts` is what every machine needs (`_PARTS`), and with
`--whole-suite` the rest, too, as by `make test-firecracker`. The tests are this checkout's, banger
is the wheel that is installed there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from _pytest.nodes import Node

import firecrackers
from guest_host import GuestHost, GuestHosts
from suite import JAILED_VARIABLE
from tests_on_host import put_default_image, put_tests, run_words

_TIMEOUT_S = 5400

pytestmark = [pytest.mark.guest, pytest.mark.timeout(_TIMEOUT_S + 1200)]

_INTEGRATION = Path(__file__).parents[1] / "integration"

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
        names = sorted(path.name for path in _INTEGRATION.glob("test_*.py"))
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
    scratch = tmp_path_factory.mktemp("tests")
    put_tests(host, scratch)
    put_default_image(host, scratch)
    yield host
    if not keeps(request.node):
        host.banger.ok("vm", "delete", "--force", host.name)


def test_firecracker_passes(suite_host: GuestHost, part: str, pytestconfig: pytest.Config) -> None:
    chosen = "" if _whole(pytestconfig) else _PARTS[part]
    words = [
        *("env", f"{JAILED_VARIABLE}=1", *run_words(f"integration/{part}", chosen)),
        *("--drivers", "firecracker+reflink", "--timeout", "1500"),
    ]
    done = suite_host.run(*words, timeout_s=_TIMEOUT_S)
    said = done.stdout.decode(errors="replace")
    print(said)
    whole = said[-8000:] + done.stderr.decode(errors="replace")[-2000:]
    if done.returncode == 5 and _whole(pytestconfig):
        return  # none of its tests is one of this suite
    assert done.returncode == 0, whole
    assert re.search(r"\d+ passed", said), whole
