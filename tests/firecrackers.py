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
from banger.drivers.hypervisor.qemu_program import QemuProgram
from firecracker_schema import DESCRIPTION
from stand_in_machine import VSOCK_VARIABLE

if TYPE_CHECKING:  # homes are configured for these programs
    from homes import Home

STAND_IN = Path(__file__).with_name("stand_in_firecracker.py")

#: Names the real one where it is not on the PATH.
REAL_VARIABLE = "BANGER_TEST_FIRECRACKER"

NO_DESCRIPTION = (
    f"Firecracker's description of its API is not at {DESCRIPTION}: put"
    " src/firecracker/swagger/firecracker.yaml of its v1.16.1 there"
)
NO_NESTING = "this machine's own KVM does not nest: load kvm_intel or kvm_amd with nested=1"
_NESTED = [Path(f"/sys/module/{name}/parameters/nested") for name in ("kvm_intel", "kvm_amd")]

#: Of a test with the stand-in, which holds requests to it.
needs_description = pytest.mark.skipif(not DESCRIPTION.exists(), reason=NO_DESCRIPTION)
#: Of one whose daemon takes the stand-in for Firecracker, too.
needs_kvm_device = pytest.mark.skipif(
    kvm._obstacle(kvm.DEVICE) is not None, reason="needs /dev/kvm, if only to be opened"
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
    cached = kvm._Cached(kvm._key(kvm.DEVICE, QemuProgram().path()), True, "as the test says")
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
def _probed() -> kvm.KvmProbe:
    """Whether KVM runs guests here."""
    with tempfile.TemporaryDirectory() as cache:
        return asyncio.run(kvm.probe(Path(cache) / "probes.json", QemuProgram()))


def _no_firecracker() -> list[str]:
    if real() is not None:
        return []
    return [f"firecracker is not on PATH: put it there, or set {REAL_VARIABLE} to its path"]


def missing() -> list[str]:
    """What keeps the real one from running machines here; nothing when it can."""
    answer = _probed()
    unusable = [] if answer.usable else [f"KVM runs no guest here: {answer.detail}"]
    return _no_firecracker() + unusable


def missing_jailer() -> list[str]:
    """What keeps the real one's machines out of jails here; nothing when it is there."""
    if jailer() is not None:
        return []
    return ["jailer, of the same release, is not on PATH: put it there, or beside firecracker"]


def missing_on_guest_host() -> list[str]:
    """What keeps the real one's machines from running in jails on a guest as the host, which this
    machine's KVM need not be fit for: where it is not, the guest and a KVM in it are emulated."""
    nests = not _probed().usable or any(map(_says_yes, _NESTED))
    return _no_firecracker() + missing_jailer() + ([] if nests else [NO_NESTING])


def _says_yes(parameter: Path) -> bool:
    return parameter.exists() and parameter.read_text().strip() in ("Y", "1")


def lacks() -> list[str]:
    """What keeps `make test-firecracker` from running all that it has, and where: first here, then
    on a guest as the host."""
    obstacle = kvm._obstacle(kvm.DEVICE)
    denied = [] if obstacle is None else [obstacle.detail]
    described = [] if DESCRIPTION.exists() else [NO_DESCRIPTION]
    return [
        *(f"here, not the driver's integration tests: {each}" for each in described),
        *(f"here, not a daemon with the stand-in: {each}" for each in denied),
        *(f"here, not with the real Firecracker: {each}" for each in missing()),
        *(
            f"on a guest as the host, not with the real Firecracker in jails: {each}"
            for each in missing_on_guest_host()
        ),
    ]


if __name__ == "__main__":
    for line in lacks():
        print(line)
