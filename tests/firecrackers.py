"""The programs that tests run as Firecracker: the stand-in, and the real one where there is one."""

from __future__ import annotations

import asyncio
import functools
import os
import shlex
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

from banger.drivers.hypervisor import kvm
from firecracker_schema import DESCRIPTION
from stand_in_machine import VSOCK_VARIABLE

if TYPE_CHECKING:  # homes are configured for these programs
    from homes import Home

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
    text = (
        "#!/bin/bash\n"
        f"export PYTHONHOME={shlex.quote(sys.base_prefix)}\n"
        f"export PYTHONPATH={shlex.quote(os.pathsep.join(_libraries()))}\n"
        f"{f'export {VSOCK_VARIABLE}=1' if vsock else ''}\n"
        f"export PATH={shlex.quote(os.environ['PATH'])}\n"
        f'exec -a firecracker {shlex.quote(_interpreter())} {shlex.quote(str(STAND_IN))} "$@"\n'
    )
    # What was saved with it is of another program once its time is another.
    if not program.exists() or program.read_text() != text:
        program.write_text(text)
        program.chmod(0o755)
    return program


def use_stand_in(home: Home) -> None:
    """Have the home's daemon take the stand-in for Firecracker."""
    chosen = {"hypervisor": '"firecracker"'} | settings(home.directory, stands_in=True)
    home.configure("".join(f"{key} = {value}\n" for key, value in chosen.items()))
    believe_in_kvm(home.runtime)


def settings(directory: Path, *, stands_in: bool) -> dict[str, str]:
    """What a home at `directory` has in config.toml for the stand-in, or for the real one, which is
    in jails where its jailer is there: by key, as TOML."""
    if stands_in:
        # What stands in is a program of Python's, which needs more than a jail has.
        return {"firecracker_bin": f'"{stand_in(directory)}"', "jailer_enabled": "false"}
    chosen = {"firecracker_bin": f'"{real()}"'}
    if jailer() is None:
        return chosen | {"jailer_enabled": "false"}
    return chosen | {"jailer_bin": f'"{jailer()}"'}


def believe_in_kvm(runtime: Path) -> None:
    """Have the daemon with this runtime directory believe that KVM runs guests here: it does, or it
    is not what runs vCPUs underneath the stand-in."""
    cached = kvm._Cached(kvm._key(kvm.DEVICE), True, "as the test says")
    runtime.mkdir(mode=0o700, exist_ok=True)
    (runtime / "probes.json").write_bytes(msgspec.json.encode(cached))


def real() -> Path | None:
    """Firecracker itself, if this machine has it."""
    found = os.environ.get(REAL_VARIABLE) or shutil.which("firecracker")
    return Path(found) if found else None


def jailer() -> Path | None:
    """Its jailer: on PATH, or beside the real one."""
    firecracker = real()
    found = shutil.which("jailer") or (
        firecracker and shutil.which("jailer", path=firecracker.parent)
    )
    return Path(found) if found else None


def _libraries() -> list[str]:
    source = Path(__file__).parents[1] / "src"
    return [str(STAND_IN.parent), str(source), sysconfig.get_path("purelib")]


def _interpreter() -> str:
    return os.path.realpath(sys.executable)


@functools.cache
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


def missing_jailer() -> list[str]:
    """What keeps the real one's machines out of jails here; nothing when it is there."""
    if jailer() is not None:
        return []
    return ["jailer, of the same release, is not on PATH: put it there, or beside firecracker"]


if __name__ == "__main__":
    for each in (*missing(), *missing_jailer()):
        print(f"not with the real Firecracker in jails: {each}")
