"""The fault matrix as data: every stage of every operation, and what is done to it there.

The stages stand here so that each cell is a test with a name; `test_fault_matrix.py` reads the
daemon's log of unharmed operations and fails when these are not exactly the stages there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from product import IMAGE


@dataclass(frozen=True)
class Drivers:
    """What machines are run by, and what is different about them."""

    hypervisor: str = "qemu"
    storage: str = "qcow2"
    #: The files of a machine's disks.
    disks: frozenset[str] = frozenset({"system.qcow2", "work.qcow2"})
    #: Besides the sockets of a running machine.
    runtime_files: frozenset[str] = frozenset()
    #: Of new machines.
    options: tuple[str, ...] = ()
    #: Stages that its operations do not have.
    leaves_out: frozenset[str] = frozenset()
    #: Whether a running machine's system disk is a device, which takes a kernel that has such.
    on_devices: bool = False
    #: What their page says of them.
    note: str = ""

    @property
    def name(self) -> str:
        return f"{self.hypervisor}+{self.storage}"


_RAW = frozenset({"system.raw", "work.raw"})

DEFAULT = Drivers()
DRIVERS = (
    DEFAULT,
    Drivers(
        storage="reflink",
        disks=_RAW,
        note="Disks are raw files: clones where the file system makes them, else sparse copies.",
    ),
    # Bridges are of the whole host: these machines have none.
    Drivers(
        hypervisor="firecracker",
        storage="reflink",
        disks=_RAW,
        runtime_files=frozenset({"firecracker", "metrics"}),
        options=("--network", "none"),
        leaves_out=frozenset({"memory"}),
        note=(
            "Firecracker is stood in for: by a server that speaks its API, and runs guests by QEMU."
            " What is walked is the driver, and all that is above it. Machines have no network."
        ),
    ),
)
#: What no page is about: walked in parts, on a guest as the host, whose kernel has what it takes.
ON_GUEST_HOSTS = (
    Drivers(
        storage="dm_snapshot",
        disks=frozenset({"system.cow", "work.raw"}),
        on_devices=True,
        note="System disks are device-mapper snapshots.",
    ),
)

#: The subject of a cell; stands in an operation's words for its name.
SUBJECT = "SUBJECT"

#: Small: what is tested is who cleans up, not how much.
SMALL = ("--image", IMAGE, "--memory", "256M", "--vcpu", "1")


class Fault(StrEnum):
    """What goes wrong at the moment an operation enters a stage."""

    DAEMON_KILLED = "daemon-killed"
    MACHINE_KILLED = "machine-killed"
    DISK_FULL = "disk-full"
    MACHINE_HANGS = "machine-hangs"
    AGENT_CUT = "agent-cut"


#: What each is, for docs/reliability.md.
EXPLAINED = {
    Fault.DAEMON_KILLED: "SIGKILL to the daemon.",
    Fault.MACHINE_KILLED: "SIGKILL to the VM's hypervisor.",
    Fault.DISK_FULL: (
        "not a byte is free any more on the file system that holds the database, the log and the "
        "files of all VMs (in image builds: the images and kernels). It gets room again when the "
        "command has ended, or after 20 s."
    ),
    Fault.MACHINE_HANGS: (
        "SIGSTOP to the VM's hypervisor, for good: neither it nor the guest's agent answers any"
        " more."
    ),
    Fault.AGENT_CUT: "the agent's socket is removed, so that nobody can connect to the agent.",
}

#: Those that need a machine to do it to.
ON_MACHINES = (Fault.MACHINE_KILLED, Fault.MACHINE_HANGS, Fault.AGENT_CUT)


class Before(StrEnum):
    """The subject, when the operation begins."""

    ABSENT = "absent"
    #: With its disks, and never started.
    MADE = "made"
    STOPPED = "stopped"
    SUSPENDED = "suspended"
    RUNNING = "running"


@dataclass(frozen=True)
class Stage:
    name: str
    #: Whether a machine of the subject's runs when the stage begins.
    machine: bool = False


@dataclass(frozen=True)
class Operation:
    """One command, and the stages that its operation goes through."""

    #: As in the daemon's log.
    name: str
    before: Before
    words: tuple[str, ...]
    stages: tuple[Stage, ...]
    #: Tells operations of one name apart.
    variant: str = ""
    #: It makes an image or a kernel, and needs a home where that is missing.
    builds: bool = False
    #: Whether the home has a template for it; None where that makes no difference.
    template: bool | None = None

    @property
    def title(self) -> str:
        return f"{self.name} ({self.variant})" if self.variant else self.name

    def command(self, subject: str, drivers: Drivers) -> list[str]:
        words = [subject if word == SUBJECT else word for word in self.words]
        return [*words, *drivers.options] if words[:2] == ["vm", "create"] else words

    def stages_of(self, drivers: Drivers) -> tuple[Stage, ...]:
        """Those that it has with these drivers."""
        return tuple(each for each in self.stages if each.name not in drivers.leaves_out)


#: Long enough for any guest here to come up, so that one that never will is not waited for longer.
BOOT = ("--boot-timeout", "60")
_CREATE = ("vm", "create", "-q", *SMALL, *BOOT, "--name", SUBJECT)

#: The stages of every boot.
_START = (
    Stage("prepare"),
    Stage("launch"),
    Stage("boot", machine=True),
    Stage("setup", machine=True),
)
#: Those of a machine that goes on from a saved one, and those of saving one that runs.
_RESTORE = (Stage("prepare"), Stage("restore"), Stage("setup", machine=True))
_CAPTURE = (
    Stage("preflight", machine=True),
    Stage("memory", machine=True),
    Stage("freeze", machine=True),
)
_POWER_OFF = Stage("power_off", machine=True)

#: Stages that are entered or not by chance, when an operation that ends a machine comes to its lock
#: before or after whoever watches that machine's end. The same work is done in `vm.stop`.
BY_CHANCE = {"vm.kill": {"wait", "cleanup"}, "vm.delete": {"wait"}}

OPERATIONS = (
    Operation(
        "vm.create",
        Before.ABSENT,
        _CREATE,
        (
            Stage("preflight"),
            Stage("template"),
            Stage("disks"),
            *_RESTORE,
        ),
        template=True,
    ),
    Operation(
        "vm.create",
        Before.ABSENT,
        (*_CREATE, "--cold"),
        (Stage("preflight"), Stage("disks"), *_START),
        variant="cold",
    ),
    # A machine of its own, which no record names.
    Operation(
        "template.make",
        Before.ABSENT,
        _CREATE,
        (
            Stage("disks"),
            Stage("launch"),
            Stage("boot", machine=True),
            Stage("save", machine=True),
            Stage("sync"),
        ),
        template=False,
    ),
    # What is taken back when a creation fails before its guest runs: no host has 10 TiB of memory,
    # and KVM takes no more than 8 TiB in one piece.
    Operation(
        "vm.discard",
        Before.ABSENT,
        ("vm", "create", "-q", "--image", IMAGE, "--memory", "10T", "--name", SUBJECT),
        (Stage("end"), Stage("remove_files")),
    ),
    Operation(
        "vm.start",
        Before.STOPPED,
        ("vm", "start", "-q", *BOOT, SUBJECT),
        (Stage("preflight"), *_START),
    ),
    Operation(
        "vm.stop",
        Before.RUNNING,
        ("vm", "stop", "-q", SUBJECT),
        (_POWER_OFF, Stage("cleanup")),
    ),
    Operation(
        "vm.restart",
        Before.RUNNING,
        ("vm", "restart", "-q", *BOOT, SUBJECT),
        (Stage("preflight", machine=True), _POWER_OFF, Stage("cleanup"), *_START),
    ),
    Operation(
        "vm.kill",
        Before.RUNNING,
        ("vm", "kill", "-q", SUBJECT),
        (Stage("end", machine=True),),
    ),
    Operation(
        "vm.delete",
        Before.RUNNING,
        ("vm", "delete", "-q", "--force", SUBJECT),
        (Stage("end", machine=True), Stage("remove_files")),
    ),
    Operation(
        "vm.set",
        Before.STOPPED,
        ("vm", "set", "-q", SUBJECT, "--vcpu", "2", "--disk-size", "9G"),
        (Stage("record"), Stage("apply")),
    ),
    Operation(
        "vm.publish",
        Before.RUNNING,
        ("vm", "publish", SUBJECT, "0:80"),
        (Stage("record", machine=True), Stage("apply", machine=True)),
    ),
    # The first start of a machine that was only made.
    Operation(
        "vm.start",
        Before.MADE,
        ("vm", "start", "-q", *BOOT, SUBJECT),
        (
            Stage("preflight"),
            Stage("template"),
            Stage("disks"),
            *_RESTORE,
        ),
        variant="first",
        template=True,
    ),
    Operation(
        "vm.snapshot",
        Before.RUNNING,
        ("vm", "snapshot", "-q", SUBJECT, "taken"),
        (
            *_CAPTURE,
            Stage("sync", machine=True),
        ),
    ),
    Operation(
        "vm.fork",
        Before.RUNNING,
        ("vm", "fork", "-q", SUBJECT, "--count", "1"),
        (
            *_CAPTURE,
            Stage("forks", machine=True),
        ),
    ),
    Operation(
        "vm.suspend",
        Before.RUNNING,
        ("vm", "stop", "-q", "--suspend", SUBJECT),
        (
            *_CAPTURE,
            Stage("sync", machine=True),
            Stage("cleanup", machine=True),
        ),
    ),
    Operation(
        "vm.start",
        Before.SUSPENDED,
        ("vm", "start", "-q", *BOOT, SUBJECT),
        (
            Stage("preflight"),
            *_RESTORE,
        ),
        variant="suspended",
    ),
    # What every start of a daemon does, before it serves.
    Operation(
        "reconcile",
        Before.RUNNING,
        ("vm", "list"),
        (Stage("vms", machine=True), Stage("leftovers", machine=True)),
    ),
)

BUILDS = (
    Operation(
        "vm.create",
        Before.ABSENT,
        _CREATE,
        (Stage("image"),),
        variant="image missing",
        builds=True,
    ),
    Operation(
        "image.build",
        Before.ABSENT,
        ("image", "build", "-q", IMAGE),
        (
            Stage("kernel download"),
            Stage("kernel install"),
            Stage("kernel kernel"),
            Stage("kernel finish"),
            Stage("download"),
            Stage("install"),
            Stage("filesystem"),
            Stage("finish"),
        ),
        builds=True,
    ),
)


@dataclass(frozen=True)
class Cell:
    operation: Operation
    stage: Stage
    fault: Fault
    drivers: Drivers = DEFAULT

    @property
    def point(self) -> str:
        """As in FAULT_VARIABLE."""
        return f"{self.operation.name}:{self.stage.name}"

    @property
    def id(self) -> str:
        variant = f"[{self.operation.variant}]" if self.operation.variant else ""
        of = "" if self.drivers is DEFAULT else f"-{self.drivers.name}"
        return f"{self.point}{variant}-{self.fault}{of}".replace(" ", "_")


def cells(drivers: Drivers) -> Iterator[Cell]:
    """All that there are of these drivers. Builds are the same with all."""
    for operation in (*OPERATIONS, *(BUILDS if drivers is DEFAULT else ())):
        for stage in operation.stages_of(drivers):
            for fault in Fault:
                if stage.machine or fault not in ON_MACHINES:
                    yield Cell(operation, stage, fault, drivers)


#: Those of the default drivers.
ALL = tuple(cells(DEFAULT))

#: Cells of the reduced form besides those of daemons killed in operations on VMs: one or two of
#: each other fault, and two of a build, which takes long.
_CHOSEN = {
    (Fault.MACHINE_KILLED, "vm.create:setup"),
    (Fault.DISK_FULL, "template.make:save"),
    (Fault.MACHINE_KILLED, "vm.start:boot"),
    (Fault.MACHINE_KILLED, "vm.stop:power_off"),
    (Fault.DISK_FULL, "vm.create:disks"),
    (Fault.DISK_FULL, "vm.start:prepare"),
    (Fault.MACHINE_HANGS, "vm.delete:end"),
    (Fault.AGENT_CUT, "vm.kill:end"),
    (Fault.DAEMON_KILLED, "image.build:kernel install"),
    (Fault.DAEMON_KILLED, "image.build:install"),
}

#: Of the other drivers: what they do themselves where others share the work.
_CHOSEN_OF_OTHERS = {
    (Fault.DAEMON_KILLED, "vm.create:restore"),
    (Fault.DAEMON_KILLED, "vm.fork:freeze"),
    (Fault.DAEMON_KILLED, "vm.suspend:sync"),
    (Fault.MACHINE_KILLED, "vm.create:setup"),
    (Fault.MACHINE_HANGS, "vm.delete:end"),
    (Fault.DISK_FULL, "vm.create:disks"),
}

#: What `make test` runs: the daemon killed at every stage of every operation on VMs, and those.
REDUCED = (
    *(
        cell
        for cell in ALL
        if (cell.fault, cell.point) in _CHOSEN
        or (cell.fault is Fault.DAEMON_KILLED and cell.operation.name != "image.build")
    ),
    *(
        cell
        for drivers in DRIVERS[1:]
        for cell in cells(drivers)
        if (cell.fault, cell.point) in _CHOSEN_OF_OTHERS
    ),
)
