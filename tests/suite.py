"""The integration suite over other drivers: `pytest tests/integration --drivers qemu+reflink`.

Every home of the session is then configured for these; a test that configures something else itself
still does. Tests that boot no guest, and those about what these drivers have not, are deselected,
and counted by the reason: `about` is how a test says so, and all reasons stand here.

Firecracker is the real one where that runs guests, in jails where its jailer is there, and the
stand-in elsewhere. It knows no user networking, so its machines are on bridges, one for each home:
the whole session is then in a network namespace of its own, which has no way out.
"""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import firecrackers
from banger.drivers import registry
from product import Banger

_CLONE_NEWNS, _CLONE_NEWNET = 0x00020000, 0x40000000
#: Bridges are banger0 to banger99, and banger0 is for tests in namespaces of their own.
_BRIDGES = 99

_BUILD_TIMEOUT_S = 800

#: Set where nothing may stand in for Firecracker in its jails.
JAILED_VARIABLE = "BANGER_TEST_JAILED"

#: What tests are about that not every choice of drivers has, and why that is.
_REASONS = {
    "qemu": "about QEMU itself: its words, its processes, what waits ready",
    "qcow2": "about the layers of qcow2 disks",
    "user": "about user networking, by passt",
    "clients": "about clients of a machine that is saved: Firecracker resets its vsock",
    "discard": "has the guest give up room on its disks, which Firecracker's do not hear of",
    "process": "looks at the machine's process, which the stand-in's is not",
    "outside": "fetches Debian's packages: a session on bridges has no way out",
    "own": "names its drivers itself",
    "guest": "boots no guest: the same with all drivers",
}


def about(what: str) -> pytest.MarkDecorator:
    """The mark of a test that only runs where the drivers have `what`, one of `_REASONS`."""
    return pytest.mark.about(what)


about_qemu = about("qemu")
about_layers = about("qcow2")
about_user_networking = about("user")
about_clients = about("clients")
about_discards = about("discard")
about_processes = about("process")
needs_outside = about("outside")
names_its_drivers = about("own")


@dataclass(frozen=True)
class Suite:
    """What runs the machines of a session."""

    hypervisor: str
    storage: str

    @property
    def network(self) -> str:
        return "bridge" if self.hypervisor == "firecracker" else "user"

    @property
    def stands_in(self) -> bool:
        """Whether the stand-in is taken for Firecracker."""
        if self.hypervisor != "firecracker":
            return False
        return firecrackers.real() is None or bool(firecrackers.missing())

    @property
    def words(self) -> frozenset[str]:
        """What tests may be about."""
        words = {self.hypervisor, self.storage, self.network}
        if not self.stands_in:
            words.add("process")
        if self.hypervisor == "qemu":
            words |= {"clients", "discard", "outside"}
        return frozenset(words)

    def why_not(self, item: pytest.Item) -> str:
        """Why a test is not one of this suite's; empty for one that is."""
        about_ = [mark.args[0] for mark in item.iter_markers("about")]
        if item.get_closest_marker("guest") is None:
            return _REASONS["guest"]
        return next((_REASONS[each] for each in about_ if each not in self.words), "")


@dataclass
class Session:
    """What homes are configured for: by nothing unless `--drivers` says so."""

    suite: Suite | None = None
    #: The network that the session began in, once it has its own.
    outside: int = -1
    #: The bridges of homes, by their directory.
    bridges: dict[Path, int] = field(default_factory=dict)


session = Session()


def parse(text: str) -> Suite:
    """Of ``HYPERVISOR+STORAGE``. Raises pytest.UsageError."""
    hypervisor, _, storage = text.partition("+")
    there = registry.available()
    if hypervisor not in there["hypervisor"] or storage not in there["storage"]:
        raise pytest.UsageError(f"--drivers: {text} is not a hypervisor and a storage of banger's")
    if hypervisor == "firecracker" and os.geteuid() != 0:
        raise pytest.UsageError("--drivers: only root makes bridges: run as root")
    suite = Suite(hypervisor, storage)
    if JAILED_VARIABLE in os.environ:
        missing = (*firecrackers.missing(), *firecrackers.missing_jailer())
        if suite.hypervisor != "firecracker" or missing:
            why = "; ".join(missing) or f"{suite.hypervisor} has none"
            raise pytest.UsageError(f"{JAILED_VARIABLE} is set, and there are no jails: {why}")
    return suite


def begin(suite: Suite) -> None:
    """Have new homes configured for it, in a network of the session's own if that takes bridges."""
    session.suite = suite
    if suite.network == "bridge":
        session.outside = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        _enter_new_network()


def settings(directory: Path) -> Mapping[str, str]:
    """What config.toml of the home at `directory` says unless the test does, by key, as TOML."""
    suite = session.suite
    if suite is None:
        return {}
    chosen = {
        "hypervisor": f'"{suite.hypervisor}"',
        "storage": f'"{suite.storage}"',
        "network": f'"{suite.network}"',
    }
    if suite.hypervisor == "firecracker":
        chosen |= firecrackers.settings(directory, stands_in=suite.stands_in)
        number = session.bridges.setdefault(directory, len(session.bridges) % _BRIDGES + 1)
        chosen["bridge_name"] = f'"banger{number}"'
        chosen["bridge_cidr"] = f'"10.{100 + number}.0.0/24"'
    return chosen


def prepare(runtime: Path) -> None:
    """Spare the daemon with this runtime directory the question whether KVM runs guests."""
    if session.suite is not None and session.suite.hypervisor == "firecracker":
        firecrackers.believe_in_kvm(runtime)


@contextmanager
def outside() -> Iterator[bool]:
    """This thread, and what it starts, is in the network that the session began in. Whether that is
    another one than the session's."""
    if session.outside < 0:
        yield False
        return
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _libc("setns", session.outside, _CLONE_NEWNET)
        try:
            yield True
        finally:
            _libc("setns", own, _CLONE_NEWNET)
    finally:
        os.close(own)


def power_off() -> str:
    """What root of a guest runs to end its machine at once. Firecracker has no power to switch off:
    its machines end with a reset."""
    resets = session.suite is not None and session.suite.hypervisor == "firecracker"
    return f"echo {'b' if resets else 'o'} >/proc/sysrq-trigger"


def have_image(banger: Banger, name: str, directory: str) -> None:
    """Build an image of banger's own, or register the one of `--images`."""
    if not directory:
        with outside() as elsewhere:
            if elsewhere:  # so has to be the daemon
                banger.ok("daemon", "stop")
            done = banger.run("image", "build", name, timeout_s=_BUILD_TIMEOUT_S)
            assert done.returncode == 0, done.stderr.decode()
            if elsewhere:
                banger.ok("daemon", "stop")
        return
    if "debian" not in {each["name"] for each in banger.json("kernel", "list")}:
        modules = Path("/lib/modules", platform.release())
        kernel = ("kernel", "import", Path(directory, "vmlinux"), "--name", "debian")
        banger.ok(*kernel, "--modules", modules)
    rootfs = Path(directory, f"{name}.ext4")
    banger.ok("image", "register", rootfs, "--name", name, "--kernel", "debian")


def deselect(suite: Suite, items: list[pytest.Item]) -> tuple[list[pytest.Item], Counter[str]]:
    """The tests of `items` that are not the suite's, and how many of them for which reason."""
    reasons = {item: suite.why_not(item) for item in items}
    others = [item for item, reason in reasons.items() if reason]
    return others, Counter(reasons[item] for item in others)


def _enter_new_network() -> None:
    """For this process, whose view of /sys follows: what is below /sys/class/net leads to
    /sys/devices/virtual/net, and both are of the namespace in which sysfs was mounted."""
    _libc("unshare", _CLONE_NEWNET | _CLONE_NEWNS)
    subprocess.run(["mount", "--make-rslave", "/"], check=True)
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run(["mount", "-t", "sysfs", "sysfs", directory], check=True)
        for each in ("class/net", "devices/virtual/net"):
            subprocess.run(["mount", "--bind", f"{directory}/{each}", f"/sys/{each}"], check=True)
        subprocess.run(["umount", directory], check=True)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


def _libc(function: str, *words: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, function)(*words) != 0:
        raise OSError(ctypes.get_errno(), function)
