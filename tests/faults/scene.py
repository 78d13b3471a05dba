"""A home in which things go wrong: its bystander, and the account of all that is in it.

The account knows what each record may have on the host; what else there is was left behind.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import leftovers
from homes import Home
from matrix import SMALL, Drivers
from product import until

#: What may be in the directories of a VM, by the state of its record; and the layers of its disks.
_FILES = {"network.log"}
_FILES |= {"console.log", "console.log.old", "hypervisor.log", "hypervisor.log.old"}
_FILES_OF = {"running": {"handles.json"}, "suspended": {"memory", "machine-state"}}
_LAYER = re.compile(r"(system|work)(-[0-9a-f]{12})?\.qcow2")
_SOCKETS = {"control.sock", "agent.sock"}

_RUNTIME = {"bangerd.sock", "bangerd.lock", "start.lock", "probes.json", "vms", "templates"}
_STATE = {"banger.db", "banger.db-wal", "banger.db-shm", "bangerd.log", "vms", "templates"}
_STATE |= {"snapshots", "bangerd.lock"}
_TEMPLATE = {"memory", "machine-state", "hypervisor.log", "console.log"}
_IMAGE = re.compile(r"rootfs\.ext4|work-seed(-\d+)?\.ext4|image\.json")
_KERNEL = re.compile(
    r"vmlinux|config|kernel\.json|modules\.ext4|boot-modules|initramfs-[0-9a-f]{12}\.cpio"
)

#: A network ends when its machine has: that takes a moment.
_SETTLES_S = 5.0

BYSTANDER = "bystander"

#: Counts, and tells the longest pause between two counts since it was last looked at, in hundredths
#: of a second by the guest's clock. Nothing of it touches a disk.
_COUNTING = """
echo $$ >/run/pid
count=0 longest=0 last=
while :; do
    read up rest </proc/uptime
    up=${up%.*}${up#*.}
    pause=$((up - ${last:-$up}))
    [ $pause -le $longest ] || longest=$pause
    if [ -e /run/looked ]; then rm /run/looked; longest=0; fi
    last=$up count=$((count + 1))
    echo $count $longest >/run/count
    sleep 0.5
done
"""
_TELL = """
read pid </run/pid
kill -0 $pid || exit 1
while read count longest </run/count; [ -z "$longest" ]; do sleep 0.1; done
read boot </proc/sys/kernel/random/boot_id
echo $pid $boot $count $longest
: >/run/looked
"""


@dataclass(frozen=True)
class Sighting:
    """The bystander at one moment. Two are of one undisturbed machine when all but the count and
    the longest pause are equal."""

    machine_pid: int
    process_pid: int
    boot_id: str
    count: int
    longest_pause_s: float


class Scene:
    def __init__(self, home: Home, drivers: Drivers, small_disk: Path | None = None) -> None:
        """Start the bystander in `home`, whose state or artifacts are on `small_disk` if given."""
        self.home = home
        self.drivers = drivers
        #: The options of every new machine.
        self.small = (*SMALL, *drivers.options)
        self._small_disk = small_disk
        banger = home.banger
        new = ("vm", "run", "-q", "-d", *self.small, "--name", BYSTANDER)
        banger.ok(*new, "--", "sh", "-c", _COUNTING)
        # It may not have counted yet.
        banger.guest(BYSTANDER, "until [ -s /run/count ]; do sleep 0.1; done")
        self.bystander_id: str = self.record(BYSTANDER)["id"]
        self._last = self._look()

    @property
    def small_disk(self) -> Path:
        assert self._small_disk is not None
        return self._small_disk

    def _look(self) -> Sighting:
        (machine,) = self._machines(self.bystander_id)
        pid, boot_id, count, longest = self.home.banger.guest(BYSTANDER, _TELL).split()
        return Sighting(machine.pid, int(pid), boot_id, int(count), int(longest) / 100)

    def check_bystander(self) -> float:
        """It is the same machine and process as ever, reachable, and goes on counting.

        The longest pause it made since the last look, in seconds.
        """
        (seen,) = until(self._counted_on, "the bystander counts", 10)
        first, self._last = self._last, seen
        assert (seen.machine_pid, seen.process_pid, seen.boot_id) == (
            first.machine_pid,
            first.process_pid,
            first.boot_id,
        )
        return seen.longest_pause_s

    def _counted_on(self) -> list[Sighting]:
        seen = self._look()
        return [seen] if seen.count > self._last.count else []

    def vms(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.home.banger.json("vm", "list")
        return found

    def record(self, name: str) -> dict[str, Any]:
        """The record of the VM of this name; empty when there is none."""
        return next((vm for vm in self.vms() if vm["name"] == name), {})

    def state(self, name: str) -> str:
        """The state of the VM of this name; empty when there is none."""
        record = self.record(name)
        return str(record["runtime"]["state"]) if record else ""

    def _machines(self, vm_id: str) -> list[leftovers.Process]:
        return [each for each in self.home.machines() if vm_id in each.command]

    def subject_machines(self) -> list[leftovers.Process]:
        """The machines that are not the bystander's. Asks no daemon."""
        return [each for each in self.home.machines() if self.bystander_id not in each.command]

    def subject_agent_sockets(self) -> list[Path]:
        """Those of agents that are not the bystander's. Asks no daemon."""
        sockets = self.home.runtime.glob("*/*/agent.sock")
        return [each for each in sockets if each.parent.name != self.bystander_id]

    def daemons(self) -> list[leftovers.Process]:
        return [each for each in self.home.processes() if "banger.daemon.main" in each.command]

    def check_records(self) -> None:
        """Each record says the truth about its processes, and none that work goes on."""
        shown = {vm["id"]: self.home.banger.json("vm", "show", vm["id"]) for vm in self.vms()}
        for vm_id, vm in shown.items():
            state = vm["runtime"]["state"]
            assert state in ("running", "stopped", "suspended", "error"), vm
            expected = 1 if state == "running" else 0
            assert len(self._machines(vm_id)) == expected, (state, self._machines(vm_id))
            if state == "error":
                assert vm["runtime"]["last_error"]

    def check_account(self) -> None:
        """Nothing is on the host that no record accounts for.

        (Locks need no look: the kernel drops them with the process that held them.)
        """
        deadline = time.monotonic() + _SETTLES_S
        while left := list(self._unaccounted()):
            assert time.monotonic() < deadline, "left behind: " + "; ".join(left)
            time.sleep(0.1)

    def _unaccounted(self) -> Iterator[str]:
        vms = self.vms()
        running = {vm["id"] for vm in vms if vm["runtime"]["state"] == "running"}
        yield from self._processes(running)
        yield from self._ports(vms)
        yield from self._mounts()
        yield from self._devices(running)
        home = self.home
        yield from _others(home.runtime, _RUNTIME)
        yield from _others(home.state, _STATE)
        yield from _others(home.runtime / "vms", running)
        yield from _others(home.state / "vms", {vm["id"] for vm in vms})
        for vm in vms:
            runs, state = vm["id"] in running, vm["runtime"]["state"]
            files = home.state / "vms" / vm["id"]
            disks = {Path(vm["runtime"][each]).name for each in ("system_overlay", "work_disk")}
            disks |= {each.name for each in files.glob("*.qcow2") if _LAYER.fullmatch(each.name)}
            yield from _others(files, _FILES | disks | _FILES_OF.get(state, set()))
            runtime = _SOCKETS | self.drivers.runtime_files if runs else set()
            yield from _others(home.runtime / "vms" / vm["id"], runtime)
        templates = {each["id"] for each in home.banger.json("template", "list")}
        yield from _others(home.runtime / "templates", set())
        yield from _others(home.state / "templates", templates)
        for template_id in templates:
            yield from _others(
                home.state / "templates" / template_id, _TEMPLATE | self.drivers.disks
            )
        snapshots = {each["id"] for each in home.banger.json("snapshot", "list")}
        yield from _others(home.state / "snapshots", snapshots)
        for kind, pattern in (("image", _IMAGE), ("kernel", _KERNEL)):
            recorded = {each["artifact_dir"] for each in home.banger.json(kind, "list")}
            for directory in (home.data / f"{kind}s").glob("*"):
                if str(directory) not in recorded:
                    yield f"{directory} (of no record)"
                    continue
                for entry in directory.iterdir():
                    if not pattern.fullmatch(entry.name):
                        yield str(entry)

    def _processes(self, running: set[str]) -> Iterator[str]:
        daemons = self.daemons()
        if len(daemons) != 1:
            yield f"{len(daemons)} daemons"
        for process in self.home.processes():
            of_a_vm = any(vm_id in process.command for vm_id in running)
            if process not in daemons and not of_a_vm:
                yield str(process)
        # The filter of a VM's network names nothing but its VM: all that this home ever had.
        for vm_id in self._ids_in_log() - running:
            for process in leftovers.processes_naming(vm_id):
                yield str(process)

    def _ids_in_log(self) -> set[str]:
        return set(re.findall(r'"vm_id": ?"([0-9a-f]{12})"', self.home.log))

    def _ports(self, vms: list[dict[str, Any]]) -> Iterator[str]:
        """TCP ports of the host where the daemon listens, or does not, against the records.

        What listens in a guest is open at its VM's address by itself, and so is the name server.
        """
        running = [vm for vm in vms if vm["runtime"]["state"] == "running"]
        published = {
            (port["host"], port["host_port"])
            for vm in running
            for port in vm["spec"]["published_ports"]
        }
        own = {vm["runtime"]["address"] for vm in running}
        names = self.home.banger.json("daemon", "status")["dns"]
        open_ = {
            (host, port)
            for host, port in _listening_at(self.home.daemon_pid())
            if host not in own and f"{host}:{port}" != names
        }
        for where in open_ ^ published:
            yield f"port {where}, " + ("not served" if where in published else "of nobody")

    def _mounts(self) -> Iterator[str]:
        for mount in leftovers.mounts_of(self.home.directory):
            if self._small_disk is None or " tmpfs " not in mount:
                yield mount

    def _devices(self, running: set[str]) -> Iterator[str]:
        """Loop devices and mappings against the machines that run on such."""
        ids = running if self.drivers.on_devices else set()
        loops = leftovers.loops_of(self.home.directory)
        changes = [str(self.home.state / "vms" / vm_id / "system.cow") for vm_id in ids]
        # One device of the image for all.
        others = [file for file in loops.values() if not file.endswith("/rootfs.ext4")]
        if sorted(others) != sorted(changes) or len(loops) - len(others) != bool(ids):
            yield f"the loop devices {loops}, and {ids} run"
        mappings = leftovers.mappings_over(loops)
        if mappings != {f"banger-{vm_id}" for vm_id in ids}:
            yield f"the mappings {mappings}, and {ids} run"


def _listening_at(pid: int) -> set[tuple[str, int]]:
    """The IPv4 addresses and TCP ports that a process listens at (proc_net(5): state 0A)."""
    sockets = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            sockets.add(str(descriptor.readlink()))
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {
        # The address is one word in the machine's byte order.
        (str(IPv4Address(bytes.fromhex(fields[1][:8])[::-1])), int(fields[1][9:], 16))
        for fields in lines
        if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets
    }


def _others(directory: Path, known: set[str]) -> Iterator[str]:
    """What is in `directory` besides entries of `known` names."""
    with suppress(FileNotFoundError):
        for entry in sorted(directory.iterdir()):
            if entry.name not in known:
                yield str(entry)
