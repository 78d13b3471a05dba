"""The fault matrix over device-mapper snapshots, on a guest as the host, whose kernel has these.

It is slow there, so what runs are cells in which devices are at stake (`_CELLS`), and all with
`--whole-suite`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from _pytest.nodes import Node

from guest_host import GuestHost, GuestHosts
from tests_on_host import put_tests, run_words

_TIMEOUT_S = 14400

pytestmark = [pytest.mark.guest, pytest.mark.timeout(_TIMEOUT_S + 1200)]

#: Where devices are made, kept and taken away, and what harms those who do it.
_CELLS = (
    "vm.create:disks-daemon-killed",
    "vm.create:disks-disk-full",
    "vm.create:restore-daemon-killed",
    "vm.create:setup-machine-killed",
    "template.make:save-daemon-killed",
    "vm.discard:end-daemon-killed",
    "vm.start:prepare-disk-full",
    "vm.start:launch-daemon-killed",
    "vm.start:boot-machine-hangs",
    "vm.stop:cleanup-daemon-killed",
    "vm.delete:end-daemon-killed",
    "vm.delete:end-machine-hangs",
    "vm.fork:freeze-daemon-killed",
    "vm.suspend:sync-daemon-killed",
    "vm.start:restore[suspended]-daemon-killed",
)


@pytest.fixture
def matrix_host(
    guest_hosts: GuestHosts,
    request: pytest.FixtureRequest,
    keeps: Callable[[Node], bool],
    tmp_path: Path,
) -> Iterator[GuestHost]:
    """A host with device-mapper and the tests."""
    host = guest_hosts.new("matrix")
    host.load("tun", "loop", "dm_snapshot")
    put_tests(host, tmp_path)
    yield host
    if not keeps(request.node):
        host.banger.ok("vm", "delete", "--force", host.name)


@pytest.fixture
def cells(pytestconfig: pytest.Config) -> tuple[str, ...]:
    """What each test that is to run has in its name. Builds of images are as everywhere."""
    if not pytestconfig.getoption("--all-hosts"):
        pytest.skip("takes half an hour: run with --all-hosts")
    if pytestconfig.getoption("--whole-suite"):
        return ("test_after_a_fault", "test_every_stage_of_an_operation")
    return _CELLS


def test_faults_leave_no_devices(cells: tuple[str, ...], matrix_host: GuestHost) -> None:
    words = run_words("faults/test_fault_matrix.py", " or ".join(cells))
    done = matrix_host.run(*words, "--drivers", "qemu+dm_snapshot", timeout_s=_TIMEOUT_S)
    said = done.stdout.decode(errors="replace")
    print(said)
    whole = said[-8000:] + done.stderr.decode(errors="replace")[-2000:]
    assert done.returncode == 0, whole
    passed = re.findall(r"(\d+) passed", said)
    assert passed, whole
    assert int(passed[0]) >= len(cells), whole
