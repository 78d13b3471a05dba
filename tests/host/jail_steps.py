"""What `test_jails_guest` has the guest host's root do, by the interpreter that banger is installed
for. It prints one object of JSON: each step's outcome, by name."""

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from banger.base.errors import BangerError
from banger.base.jail import jail_uid
from banger.hostops.local import LocalHost
from banger.hostops.ops import (
    BridgeDown,
    BridgeUp,
    Done,
    EndJail,
    InJail,
    LaunchJail,
    MapSnapshot,
    OpenTap,
    UnmapSnapshot,
    bridge_of,
)

ID, OTHER = "0123456789ab", "012345ffffff"
OWNER = 1000
GROUP = Path(f"/sys/fs/cgroup/banger-{OWNER}/{ID}")
NAMESPACES = ("ipc", "mnt", "net", "pid", "uts")
seen: dict[str, Any] = {}
host = LocalHost(OWNER)


def run(line: str) -> str:
    return subprocess.run(line, shell=True, check=True, capture_output=True, text=True).stdout


def make_files(directory: Path) -> None:
    run(f"install -d -o {OWNER} -g {OWNER} -m 700 {directory} {directory}/out")
    for name in ("kernel", "system", "console", "log"):
        path = directory / name
        path.write_bytes(b"x" * 4096 if name in ("kernel", "system") else b"")
        path.chmod(0o600)
        os.chown(path, OWNER, OWNER)


def operation(
    directory: Path, tap: str = "", vm_id: str = ID, device: Path | None = None
) -> LaunchJail:
    appended = os.O_WRONLY | os.O_APPEND
    files = [InJail(name="kernel", read_only=True), InJail(name="disks/system", read_only=False)]
    opened: list[tuple[str | Path, int]] = [
        ("out", os.O_RDONLY | os.O_DIRECTORY),
        *((name, appended) for name in ("console", "log")),
        *(("kernel", os.O_RDONLY), ("system", os.O_RDWR)),
    ]
    if device is not None:
        files.append(InJail(name="disks/mapped", read_only=False))
        opened.append((device, os.O_RDWR))
    return LaunchJail(
        vm_id=vm_id,
        vcpu_count=1,
        memory_mib=256,
        files=tuple(files),
        bridge="banger7" if tap else "",
        tap=tap,
    ).with_descriptors(tuple(os.open(directory / name, flags) for name, flags in opened))


async def launch(operation: LaunchJail) -> Done:
    try:
        return await host.perform(operation)
    finally:
        for each in operation.descriptors:
            os.close(each)


async def refused(step: str, operation: LaunchJail | UnmapSnapshot) -> None:
    try:
        if isinstance(operation, LaunchJail):
            await launch(operation)
        else:
            await host.perform(operation)
        seen[step] = "done"
    except BangerError as error:
        seen[step] = f"{error.code}: {error.message}"


async def tap() -> str:
    done = await host.perform(OpenTap(bridge="banger7"))
    os.close(done.fd)
    return done.name


def said(directory: Path) -> list[str]:
    """What the probe in the jail says, once it has said all."""
    until = time.monotonic() + 60
    while "done\n" not in (text := (directory / "console").read_text()):
        assert time.monotonic() < until, (text, (directory / "log").read_text())
        time.sleep(0.05)
    return text.splitlines()


def left() -> list[str]:
    """What is there of jails: control groups, interfaces, mounts, processes."""
    groups = [str(each) for each in Path("/sys/fs/cgroup").glob("banger-*")]
    links = [each["ifname"] for each in json.loads(run("ip -j link"))]
    mounts = [each for each in Path("/proc/1/mountinfo").read_text().splitlines() if "jail" in each]
    processes = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if "jail_launcher" in words or words.startswith(("/firecracker ", "/usr/local/bin/jailer")):
            processes.append(words)
    return [*groups, *(each for each in links if each.startswith("banger7-")), *mounts, *processes]


async def left_soon() -> list[str]:
    """The kernel takes a network namespace apart when it has time."""
    until = time.monotonic() + 20
    while left() and time.monotonic() < until:
        await asyncio.sleep(0.05)
    return left()


async def a_jail(directory: Path) -> None:
    name = await tap()
    done = await launch(operation(directory, name, device=await mapped(directory)))
    seen["said"] = said(directory)
    seen["uid"] = jail_uid(ID)
    process = Path(f"/proc/{done.pid}")
    seen["group"] = (process / "cgroup").read_text().strip()
    look = f"from banger.base import procfs; print(procfs.look_at({done.pid}))"
    seen["seen by its owner"] = run(
        f"setpriv --reuid {OWNER} --regid {OWNER} --clear-groups {sys.executable} -c '{look}'"
    )
    limits = ("memory.max", "cpu.max", "pids.max", "memory.oom.group")
    seen["limits"] = [(GROUP / each).read_text().strip() for each in limits]
    seen["namespaces of its own"] = [
        each for each in NAMESPACES if (process / "ns" / each).readlink()
        != Path("/proc/self/ns", each).readlink()]  # fmt: skip
    link = json.loads(run(f"ip -j -d link show {name}"))[0]
    seen["uplink"] = [link["linkinfo"]["info_kind"], link["master"], link["operstate"]]
    seen["seen from outside"] = run(
        f"cd {directory}; stat -c '%n %u %g %a' out/* kernel system log"
    )
    await refused("twice", operation(directory, vm_id=ID))
    await refused("one with its uid", operation(directory, vm_id=OTHER))
    await refused("unmapped", UnmapSnapshot(vm_id=ID))
    for _ in range(2):
        await host.perform(EndJail(vm_id=ID))
    os.close(done.fd)
    seen["left"] = await left_soon()


async def mapped(directory: Path) -> Path:
    """The device of the machine's own mapping; another machine's is refused."""
    for name in ("base", "changes"):
        path = directory / name
        with path.open("wb") as file:
            file.truncate(4 << 20)
        os.chown(path, OWNER, OWNER)
    with open(directory / "base", "rb") as base, open(directory / "changes", "rb+") as changes:
        made = await host.perform(
            MapSnapshot(vm_id=ID, instance="89abcdef", base=base.fileno(), changes=changes.fileno())
        )
    device = Path("/dev/mapper", made.name)
    until = time.monotonic() + 20
    while not device.exists() and time.monotonic() < until:
        time.sleep(0.05)
    await refused("another's mapping", operation(directory, vm_id="ffffff000000", device=device))
    return device


async def killed(directory: Path) -> None:
    """A machine that ends by itself, and who asks for a jail, or makes it, killed at any moment."""
    done = await launch(operation(directory, await tap()))
    os.kill(done.pid, signal.SIGKILL)
    os.waitstatus_to_exitcode  # noqa: B018
    select.select([done.fd], [], [], 20)
    os.close(done.fd)
    seen["ended by itself"] = await left_but_groups()
    await host.perform(EndJail(vm_id=ID))
    seen["killed"] = []
    for step in range(6):
        seen["killed"] += await killed_after(directory, step * 0.24)
    moments = [(False, 0.0), *((True, step * 0.05) for step in range(5))]
    seen["launcher killed"] = [await launcher_killed(directory, *each) for each in moments]


async def left_but_groups() -> list[str]:
    until = time.monotonic() + 20
    while [each for each in left() if "cgroup" not in each] and time.monotonic() < until:
        await asyncio.sleep(0.05)
    return [each for each in left() if "cgroup" not in each]


async def killed_after(directory: Path, delay_s: float) -> list[str]:
    """What is left when who launches a jail was killed then; after `EndJail`."""
    name = await tap()
    child = os.fork()
    if child == 0:
        try:
            asyncio.run(LocalHost(OWNER).perform(operation(directory, name)))
            time.sleep(60)
        finally:
            os._exit(0)
    await asyncio.sleep(0.2 + delay_s)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    await host.perform(EndJail(vm_id=ID))
    return await left_soon()


async def launcher_killed(directory: Path, in_group: bool, delay_s: float) -> list[Any]:
    """What we are told when the process that makes a jail for us was killed then; and what is left
    as we are told it, and after `EndJail`. One that was killed too late has made the jail."""
    launching = asyncio.create_task(launch(operation(directory, await tap())))
    pid = await launcher(in_group=in_group)
    await asyncio.sleep(delay_s)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    try:
        done = await launching
        os.close(done.fd)
        told, there = "done", []
    except BangerError as error:
        told, there = f"{error.code}: {error.message}", left()
    await host.perform(EndJail(vm_id=ID))
    return [told, [*there, *await left_soon()]]


async def launcher(*, in_group: bool) -> int:
    """The process that makes a jail for us, as soon as there is one; or once it is in the machine's
    control group, if it was seen there."""
    until = time.monotonic() + 60
    while not (found := run("pgrep -o -f jail_launche[r] || true").strip()):
        assert time.monotonic() < until
        await asyncio.sleep(0.002)
    while in_group and Path("/proc", found).exists():
        with suppress(FileNotFoundError):
            if found in (GROUP / "cgroup.procs").read_text().split():
                break
        await asyncio.sleep(0.002)
    return int(found)


async def refusals(directory: Path) -> None:
    await host.perform(EndJail(vm_id=ID))
    memory = Path("/mnt/memory")
    memory.mkdir(exist_ok=True)
    run(f"mount -t tmpfs none {memory}")
    make_files(memory / "vm")
    await refused("in memory", operation(memory / "vm"))
    for step in ("deleted", "another"):
        opened = operation(directory)
        (directory / "kernel").unlink()
        if step == "another":
            (directory / "other").write_text("another's")
            (directory / "kernel").symlink_to("other")
        await refused(step, opened)
        (directory / "kernel").unlink(missing_ok=True)
        (directory / "kernel").write_text("kernel")
        os.chown(directory / "kernel", OWNER, OWNER)
    for wrong, mended in (("chmod o+w", "chmod o-w"), ("chown 1000", "chown 0")):
        run(f"{wrong} /usr/local/bin/jailer")
        await refused(wrong, operation(memory / "vm"))
        run(f"{mended} /usr/local/bin/jailer")
    seen["left after refusals"] = await left_soon()


async def main() -> None:
    await host.perform(BridgeUp(bridge=bridge_of("banger7", "10.99.0.0/24"), resolver_port=5355))
    directory = Path("/home/alice/jail")
    make_files(directory)
    await a_jail(directory)
    await host.perform(UnmapSnapshot(vm_id=ID))
    await killed(directory)
    await refusals(directory)
    await host.perform(BridgeDown(bridge="banger7"))


asyncio.run(main())
json.dump(seen, sys.stdout)
