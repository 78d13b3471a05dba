"""What the launcher of jails makes with the kernel, where no guest is needed for it."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from banger.hostops import jail_launcher
from banger.hostops.jail_launcher import JailFile

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="run the tests as root for jails")

_UID = 0x77400001
_BRIDGE = """
import subprocess
from banger.hostops import jail_kernel, jail_network
jail_kernel.unshare(jail_kernel.CLONE_NEWNET)
jail_network.make_bridge()
subprocess.run(["ip", "-j", "-d", "link", "show", "bridge0"], check=True)
"""
_SESSION = """
import ctypes, os
from banger.hostops import jail_kernel
number = jail_kernel._SYS_KEYCTL[os.uname().machine]
print(ctypes.CDLL(None).syscall(number, 0, -3, 0), flush=True)  # KEYCTL_GET_KEYRING_ID
"""
_BECOME = f"""
import sys, types
from banger.hostops import jail_launcher
jail_launcher.jailer_argv = lambda order: (sys.executable, "-I", "-c", {_SESSION!r})
jail_launcher._become_jailer(types.SimpleNamespace(console=1, log=2))
"""


def _python(code: str) -> str:
    argv = [sys.executable, "-I", "-c", code]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def test_the_bridge_in_a_jail_learns_nothing() -> None:
    """What a guest sends would fill the memory of the host's kernel."""
    (link,) = json.loads(_python(_BRIDGE))
    data = link["linkinfo"]["info_data"]
    assert (data["ageing_time"], data["mcast_snooping"]) == (0, 0)


def test_the_jailer_has_a_session_keyring_of_its_own() -> None:
    before, after = _python(_SESSION + _BECOME).split()
    assert int(after) > 0
    assert before != after


@pytest.mark.parametrize(("read_only", "mode"), [(True, 0o440), (False, 0o660)])
def test_a_device_in_a_jail_is_roots_and_lent(tmp_path: Path, read_only: bool, mode: int) -> None:
    device = next((each for each in Path("/dev").iterdir() if each.is_block_device()), None)
    if device is None:
        pytest.skip("there is no block device in /dev: load one, modprobe loop")
    descriptor = os.open(device, os.O_PATH)
    file = JailFile(name="disks/mapped", descriptor=descriptor, read_only=read_only)
    jail_launcher._place(file, -1, tmp_path, _UID)
    os.close(descriptor)
    status = (tmp_path / file.name).stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (0, _UID, mode)
    assert status.st_rdev == device.stat().st_rdev
