"""A machine as the host of tests: Debian with systemd, its own kernel, and banger installed in it.

What the kernel or the init of the machine that runs the tests may lack is there: units,
device-mapper, vsock, modules, and a KVM that works because it is nested in a guest. It is made once
for a session, as an image of banger's own, booted once, set up, and saved; what tests get are
copies of the saved machine, which cost two seconds each and may be ruined.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from banger.base import proc
from banger.images.bootstrap import build_environment
from banger.images.userns import contained
from product import IMAGE, TIMEOUT_S, Banger, DidNotEnd

_NAME = "guest-host"
_CHECKOUT = Path(__file__).parents[2]
_BUILD_TIMEOUT_S = 600

#: Its Python is Debian's; the one that runs the tests may be another.
GUESTS_PYTHON = [
    *("--only-binary=:all:", "--python-version", "3.11", "--implementation", "cp"),
    *(f"--platform=manylinux{tag}_x86_64" for tag in ("2014", "_2_17", "_2_28")),
]

#: systemd's bus comes after our agent, which answers before systemd runs.
_UP = "until systemctl is-system-running --wait 2>/dev/null | grep -q running; do sleep 0.2; done"

#: Files of an image and a kernel, rather than a bundle of both: those are unpacked and verified,
#: which under emulation takes a minute instead of ten seconds.
_GIVE_ALICE_AN_IMAGE = f"""
mkdir -p ~/.config/banger
echo 'standby_limit = 0' >~/.config/banger/config.toml
banger kernel import -q /srv/vmlinux --name debian --modules /lib/modules/$(uname -r)
banger image register -q /srv/rootfs.ext4 --name {IMAGE} --kernel debian
echo 'default_image_name = "{IMAGE}"' >>~/.config/banger/config.toml
banger daemon stop
"""


@dataclass(frozen=True)
class GuestHost:
    """One such machine. Its ordinary user, `alice`, may open /dev/kvm and has a small image."""

    banger: Banger
    name: str
    #: What it was at when it hung: tests that share it are not to wait for it, too.
    hung_at: list[tuple[str | Path, ...]] = field(default_factory=list)

    def run(
        self,
        *words: str | Path,
        user: str = "root",
        stdin: bytes = b"",
        timeout_s: float = TIMEOUT_S,
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a command in it to its end, whatever its status, in the user's home."""
        assert not self.hung_at, f"{self.name} has hung since {self.hung_at}"
        home = "/root" if user == "root" else f"/home/{user}"
        where = ("vm", "exec", "-u", user, "-w", home, self.name)
        try:
            return self.banger.run(*where, "--", *words, stdin=stdin, timeout_s=timeout_s)
        except DidNotEnd:
            self.hung_at.append(words)
            raise

    def root(self, script: str, *, stdin: bytes = b"", timeout_s: float = TIMEOUT_S) -> str:
        """The output of a shell script that root runs, which must succeed."""
        return self._script(script, "root", stdin, timeout_s)

    def alice(self, script: str, *, stdin: bytes = b"", timeout_s: float = TIMEOUT_S) -> str:
        """The output of a shell script that alice runs, which must succeed."""
        return self._script(script, "alice", stdin, timeout_s)

    def _script(self, script: str, user: str, stdin: bytes, timeout_s: float) -> str:
        done = self.run("sh", "-euc", script, user=user, stdin=stdin, timeout_s=timeout_s)
        said = (done.stdout.decode(), done.stderr.decode())
        assert done.returncode == 0, (script, done.returncode, *said)
        return said[0]

    def put(self, source: Path, destination: str) -> None:
        """Copy a file or folder into it."""
        self.banger.ok("vm", "cp", source, f"{self.name}:{destination}")

    def get(self, source: str, destination: Path) -> None:
        """Copy a file or folder out of it."""
        self.banger.ok("vm", "cp", f"{self.name}:{source}", destination)

    def reboot(self) -> None:
        """Power it off and on: nothing is left but what is on its disks."""
        self.banger.ok("vm", "restart", "-q", self.name)
        self.root(_UP)

    def journal(self, unit: str) -> str:
        """What a unit has printed. A copy of a machine has another machine-id than its journal
        began with."""
        return self.root(f"journalctl --merge -o cat -u {unit}")

    def load(self, *modules: str) -> None:
        """Load modules of its kernel. Idempotent."""
        self.root(f"modprobe -a {' '.join(modules)}")


@dataclass(frozen=True)
class GuestHosts:
    """The saved machine, and copies of it."""

    banger: Banger
    snapshot: str

    def new(self, name: str) -> GuestHost:
        """A copy that runs, with everything as it was saved."""
        self.banger.ok("vm", "create", "-q", "--from-snapshot", self.snapshot, "--name", name)
        return GuestHost(self.banger, name)


def make_guest_hosts(banger: Banger, scratch: Path) -> GuestHosts:
    """Make the image, boot it, set the machine up, save it. `scratch` is a directory to be.

    Takes 80 s on two cores under emulation, half of it for Debian's packages.
    """
    archive = _make_archive(banger, scratch)
    banger.ok(
        "image", "import", "-q", archive, "--name", _NAME, "--kernel", _kernel(banger)["name"]
    )
    shutil.rmtree(scratch)
    # One vCPU: its kernel patches its own code when the first user of KVM comes and the last one
    # goes. Emulated by QEMU before 8.1 another vCPU may go on with the old code for ever, which
    # docs/architecture.md tells of. Nor is one slower here.
    size = ("--memory", "4G", "--vcpu", "1")
    banger.ok("vm", "create", "-q", "--image", _NAME, "--init", "systemd", *size, "--name", _NAME)
    host = GuestHost(banger, _NAME)
    host.root(_UP)
    host.alice(_GIVE_ALICE_AN_IMAGE)
    banger.ok("vm", "snapshot", "-q", _NAME, _NAME)
    banger.ok("vm", "delete", "--force", _NAME)
    return GuestHosts(banger, _NAME)


def _make_archive(banger: Banger, scratch: Path) -> Path:
    """The root file system as a tar, by `guest_root.sh`."""
    srv, archive = scratch / "srv", scratch / "root.tar"
    srv.mkdir(parents=True)
    _make_wheels(srv / "wheels")
    rootfs = Path(banger.json("image", "show", IMAGE)["rootfs_path"])
    for file in (rootfs, Path(_kernel(banger)["vmlinux_path"])):
        subprocess.run(["cp", "--sparse=always", file, srv], check=True)
    script = Path(__file__).with_name("guest_root.sh")
    _ok(contained(["sh", script, srv, archive]), build_environment(scratch))
    return archive


def _make_wheels(folder: Path) -> None:
    """This checkout as a wheel, and the wheels it needs."""
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")
    _ok([*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", folder, _CHECKOUT], os.environ)
    (wheel,) = folder.glob("banger-*.whl")
    _ok([*pip, "download", *GUESTS_PYTHON, "-d", folder, wheel], os.environ)


def _kernel(banger: Banger) -> dict[str, str]:
    """The record of the small image's kernel."""
    kernel_id = banger.json("image", "show", IMAGE)["kernel_id"]
    (kernel,) = (each for each in banger.json("kernel", "list") if each["id"] == kernel_id)
    return dict(kernel)


def _ok(argv: proc.Argv, environment: Mapping[str, str]) -> None:
    done = subprocess.run(
        argv,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=_BUILD_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, (argv, done.returncode, done.stdout.decode()[-4000:])
