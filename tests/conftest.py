"""What all tests share: a private home, the product in it, `--keep-guests`, and a look at what was
left behind.

No test sees the developer's own banger: HOME and the XDG directories are below one directory made
for the session. What still names that directory at the end was started by this session: it is
ended, and is an error.
"""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from _pytest.nodes import Node

import leftovers
import suite
from homes import new_home
from product import DEFAULT_IMAGE, IMAGE, Banger

_failed = pytest.StashKey[bool]()
_kept = pytest.StashKey[list[str]]()
_deselected = pytest.StashKey[Counter[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--keep-guests",
        action="store_true",
        help="keep the VMs and files of tests that fail, and say where they are",
    )
    parser.addoption(
        "--all-faults",
        action="store_true",
        help="walk the whole fault matrix, and write its page",
    )
    parser.addoption(
        "--all-hosts",
        action="store_true",
        help="run what takes long on guest hosts, too",
    )
    parser.addoption(
        "--whole-suite",
        action="store_true",
        help="with Firecracker on a guest host: run all of the integration suite, not parts of it",
    )
    parser.addoption(
        "--drivers",
        metavar="HYPERVISOR+STORAGE",
        default="",
        help="run the integration tests over these drivers, like firecracker+reflink; of the fault"
        " matrix, walk that of these as a whole, and write its page",
    )
    parser.addoption(
        "--images",
        metavar="DIRECTORY",
        default="",
        help="take the images NAME.ext4 and their kernel, vmlinux, of this directory: build none",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_kept] = []
    config.stash[_deselected] = Counter()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Quick tests first: a slip shows before any guest boots."""
    items.sort(key=lambda item: "unit" not in item.path.parts)
    if name := config.getoption("--drivers"):
        integration = [item for item in items if "integration" in item.path.parts]
        others, reasons = suite.deselect(suite.parse(name), integration)
        config.hook.pytest_deselected(items=others)
        config.stash[_deselected] = reasons
        items[:] = [item for item in items if item not in set(others)]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Which tests of the suite were not asked for with these drivers."""
    for reason, count in sorted(config.stash[_deselected].items()):
        terminalreporter.write_line(f"DESELECTED [{count}] {reason}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        for node in item.listchain():
            node.stash[_failed] = True
    return report


@pytest.fixture(scope="session")
def keeps(pytestconfig: pytest.Config) -> Callable[[Node], bool]:
    """Whether the guest of a test, or of a module of tests, is to be kept: it failed, or one of
    them, and `--keep-guests` was given. For fixtures with a scope; others take `keep_guest`."""

    def kept(node: Node) -> bool:
        wanted: bool = pytestconfig.getoption("--keep-guests")
        keep = wanted and node.stash.get(_failed, False)
        if keep:
            pytestconfig.stash[_kept].append(node.nodeid)
        return keep

    return kept


@pytest.fixture
def keep_guest(request: pytest.FixtureRequest, keeps: Callable[[Node], bool]) -> Callable[[], bool]:
    """Whether the guest of this test is to be kept.

    For the teardown of a fixture that owns a VM: ``if not keep_guest(): delete it``.
    """
    return lambda: keeps(request.node)


@dataclass(frozen=True)
class PrivateHome:
    """The session's own HOME; `environment` has the variables that lead there."""

    directory: Path

    @property
    def environment(self) -> dict[str, str]:
        home = self.directory
        return {
            "HOME": str(home),
            "XDG_CONFIG_HOME": str(home / "config"),
            "XDG_CACHE_HOME": str(home / "cache"),
            "XDG_DATA_HOME": str(home / "data"),
            "XDG_STATE_HOME": str(home / "state"),
            "XDG_RUNTIME_DIR": str(home / "run"),
        }


@pytest.fixture(scope="session", autouse=True)
def private_home(request: pytest.FixtureRequest) -> Iterator[PrivateHome]:
    """Point HOME and XDG_* at a directory of this session; nothing of it outlives the session."""
    # In /tmp whatever TMPDIR says: the path of a Unix socket is limited to 107 bytes.
    home = PrivateHome(Path(tempfile.mkdtemp(prefix="bt-", dir="/tmp")))
    new_home(home.directory)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in home.environment.items():
            patch.setenv(name, value)
        yield home
    if kept := request.config.stash[_kept]:
        settings = " ".join(f"{name}={value}" for name, value in home.environment.items())
        print(f"\nkept for {', '.join(kept)}:\n  export {settings}\n  banger vm list")
        return
    processes = leftovers.processes_of(home.directory)
    for process in processes:
        leftovers.end(process, home.directory)
    held = list(leftovers.mounts_and_loops_of(home.directory))
    if not held:  # never delete through a mount
        shutil.rmtree(home.directory)
    left = [*map(str, processes), *held]
    assert not left, "left behind: " + "; ".join(left)


@pytest.fixture(scope="session")
def banger(private_home: object) -> Iterator[Banger]:  # it sets the environment
    """The command, with a daemon that is stopped at the session's end."""
    # A shell's background jobs are started with SIGINT ignored, and would pass that on.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    command = Banger()
    yield command
    command.run("daemon", "stop")


@pytest.fixture(scope="session")
def image(banger: Banger, pytestconfig: pytest.Config) -> str:
    """The small Debian image, built once for the session."""
    suite.have_image(banger, IMAGE, pytestconfig.getoption("--images"))
    return IMAGE


@pytest.fixture(scope="session")
def default_image(banger: Banger, pytestconfig: pytest.Config) -> str:
    """The name of the default image: its first use builds it, unless that cannot be."""
    images = pytestconfig.getoption("--images")
    if images or suite.session.outside >= 0:
        suite.have_image(banger, DEFAULT_IMAGE, images)
    return DEFAULT_IMAGE
