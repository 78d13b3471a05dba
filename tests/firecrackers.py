"""The programs that tests run as Firecracker: the stand-in, and the real one where there is one."""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

import msgspec
import pytest

from banger.drivers.hypervisor import kvm
from firecracker_schema import DESCRIPTION
from homes import Home
from stand_in_machine import VSOCK_VARIABLE

STAND_IN = Path(__file__).with_name("stand_in_firecracker.py")

#: Names the real one where it is not on the PATH.
REAL_VARIABLE = "BANGER_TEST_FIRECRACKER"

#: Of a test with the stand-in, which holds requests to it.
needs_description = pytest.mark.skipif(
    not DESCRIPTION.exists(), reason=f"Firecracker's description is not at {DESCRIPTION}"
)
#: Of one whose daemon takes the stand-in for Firecracker, too.
needs_kvm_device = pytest.mark.skipif(
    bool(kvm._obstacle(kvm.DEVICE)), reason="needs /dev/kvm, if only to be opened"
)


def stand_in(directory: Path, *, vsock: bool = False) -> Path:
    """A program in `directory` that runs the stand-in, and looks like Firecracker to who looks at
    its command line. With a `vsock` its guests have one, and cannot be saved."""
    program = directory / ("firecracker-vsock" if vsock else "firecracker")
    # Python finds its libraries by its own name, unless it is told where they are.
    program.write_text(
        "#!/bin/bash\n"
        f"export PYTHONHOME={shlex.quote(sys.base_prefix)}\n"
        f"export PYTHONPATH={shlex.quote(os.pathsep.join(_libraries()))}\n"
        f"{f'export {VSOCK_VARIABLE}=1' if vsock else ''}\n"
        f"export PATH={shlex.quote(os.environ['PATH'])}\n"
        f'exec -a firecracker {shlex.quote(_interpreter())} {shlex.quote(str(STAND_IN))} "$@"\n'
    )
    program.chmod(0o755)
    return program


def use_stand_in(home: Home) -> None:
    """Have the home's daemon take the stand-in for Firecracker."""
    # What stands in is a program of Python's, which needs more than a jail has.
    settings = f'firecracker_bin = "{stand_in(home.directory)}"\njailer_enabled = false\n'
    home.configure(f'hypervisor = "firecracker"\n{settings}')
    # What underneath runs vCPUs is not KVM: this host's is believed to, though.
    cached = kvm._Cached(kvm._key(kvm.DEVICE), True, "as the test says")
    home.runtime.mkdir(mode=0o700, exist_ok=True)
    (home.runtime / "probes.json").write_bytes(msgspec.json.encode(cached))


def real() -> Path | None:
    """Firecracker itself, if this machine has it."""
    found = os.environ.get(REAL_VARIABLE) or shutil.which("firecracker")
    return Path(found) if found else None


def _libraries() -> list[str]:
    source = Path(__file__).parents[1] / "src"
    return [str(STAND_IN.parent), str(source), sysconfig.get_path("purelib")]


def _interpreter() -> str:
    return os.path.realpath(sys.executable)


def missing() -> list[str]:
    """What keeps the real one from running machines here; nothing when it can."""
    found = []
    if real() is None:
        found.append(
            f"firecracker is not on PATH: put it there, or set {REAL_VARIABLE} to its path"
        )
    with tempfile.TemporaryDirectory() as cache:
        answer = asyncio.run(kvm.probe(Path(cache) / "probes.json"))
    if not answer.usable:
        found.append(f"KVM runs no guest here: {answer.detail}")
    return found


if __name__ == "__main__":
    for each in missing():
        print(f"not with the real Firecracker: {each}")
