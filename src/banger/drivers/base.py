"""What a driver is: three small protocols, with frozen records of what goes in and comes out.

Services call these and never ask which driver they have. A driver knows nothing of the database,
of VM records or of locks: it is given paths and numbers, and gives back facts. All methods are
idempotent where they undo something.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Network
from pathlib import Path
from typing import Protocol

from banger.base.errors import Unavailable
from banger.base.model import DiskDevices, NetworkMode, Reach
from banger.base.procfs import Process


class Level(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Check:
    """One line of `banger doctor` and one item of a preflight: what, how it stands, what to do."""

    name: str
    level: Level
    detail: str
    hint: str = ""


class DiskFormat(StrEnum):
    RAW = "raw"
    QCOW2 = "qcow2"


@dataclass(frozen=True)
class Disk:
    """A block device of the guest, which knows it by its name: the device's serial.

    (The order of ``/dev/vd*`` is the hypervisor's business.) Names: system, work, modules.
    """

    name: str
    path: Path
    format: DiskFormat
    read_only: bool = False
    #: Whether it is a block device of the host's rather than a file.
    is_device: bool = False
    #: `Hypervisor.restore` makes the device at least this large: 0 leaves it as it was saved.
    size_mib: int = 0


@dataclass(frozen=True)
class GuestNetwork:
    """What the guest sets on its interface. ``address`` has its prefix length: a.b.c.d/n."""

    mac: str
    address: str
    gateway: str
    dns: str


class Link(StrEnum):
    """What a machine's interface is joined to, a descriptor that its hypervisor inherits."""

    #: A connected stream socket: each frame after its length.
    STREAM = "stream"
    #: A tap of the host, with a virtio header before each frame.
    TAP = "tap"


@dataclass(frozen=True)
class Plug:
    """A machine that is to be joined to a network. ``log`` is for what serves it."""

    vm_id: str
    log: Path
    reach: Reach
    #: The guest's, of `Network.guests`; empty where all have the same.
    address: str = ""


@dataclass(frozen=True)
class NetworkAttachment:
    """A network ready for a machine: what the guest sets, and what the host side made for it.

    ``fd`` is for the hypervisor to inherit (the driver that launches closes our copy), or -1.
    ``pids`` are the processes that serve it, ``tap`` the interface of the host that does.
    """

    guest: GuestNetwork
    link: Link
    fd: int = -1
    pids: tuple[int, ...] = ()
    tap: str = ""


@dataclass(frozen=True)
class Plugged:
    """A machine that is joined to a network and runs, and what it may reach now."""

    vm_id: str
    reach: Reach
    address: str = ""
    tap: str = ""
    pids: tuple[int, ...] = ()


@dataclass(frozen=True)
class MemoryFile:
    """The file that a machine's memory lies in.

    A private one is only read: what the machine writes goes to copies of its pages, so any number
    of machines can share it. A shared one holds what the machine has written.
    """

    path: Path
    private: bool


@dataclass(frozen=True)
class Machine:
    """All that shapes one virtual machine. Equal machines give equal arguments."""

    vm_id: str
    vcpu_count: int
    memory_mib: int
    kernel: Path
    initramfs: Path
    #: Parameters of the guest agent (``banger.…``); the driver adds what its platform needs.
    kernel_parameters: tuple[str, ...]
    disks: tuple[Disk, ...]
    console_log: Path
    hypervisor_log: Path
    control_socket: Path
    agent_socket: Path
    #: None: memory of its own, which goes with it.
    memory_file: MemoryFile | None = None


@dataclass(frozen=True)
class Capture:
    """What `Hypervisor.capture` makes of a running machine."""

    #: New files: its memory, and all that is neither memory nor disk.
    memory: Path
    state: Path
    #: Disk name -> an empty layer over the file that it is in now: it goes on in that one.
    overlays: dict[str, Path]
    #: Awaited while the machine is paused and nothing is on its way to its disks: they are copied,
    #: where there are no layers for them to go on in.
    at_rest: Callable[[], Awaitable[None]] | None = None
    #: False: it stays paused, and is good for nothing but `quit`.
    runs_on: bool = True


@dataclass(frozen=True)
class HypervisorFeatures:
    """What services may ask of it. A flag is here once some service reads it."""

    disk_formats: frozenset[DiskFormat]
    #: What a machine's interface can be joined to.
    links: frozenset[Link]
    #: The most that a machine can have.
    vcpu_max: int
    #: Where the guest's agent listens: `Machine.agent_socket` is then one of `guest.vsock`. 0: the
    #: socket leads to the agent itself.
    agent_vsock_port: int = 0
    #: Whether a machine that was held is as it was when it runs on: its agent, too.
    holds_well: bool = True


class StateRefused(Unavailable):
    """A machine cannot go on from this saved state: there is something wrong with that."""


class MachineLost(Unavailable):
    """A restored machine was let run, and then lost: its guest may have written to its disks."""


class MachineStatus(StrEnum):
    """What a hypervisor says of a machine whose process runs."""

    RUNNING = "running"
    PAUSED = "paused"
    #: Held at a write that the host's disk had no room for; `Hypervisor.resume` tries it again.
    DISK_FULL = "disk-full"


@dataclass(frozen=True)
class Traffic:
    """What a machine's devices have moved since some moment: only differences mean anything.

    In bytes, as the guest sees it; of the network None where nobody counts.
    """

    disk_read_bytes: int
    disk_written_bytes: int
    network_in_bytes: int | None = None
    network_out_bytes: int | None = None


class Hypervisor(Protocol):
    """Starts and ends machines. The process it starts outlives this daemon."""

    name: str
    features: HypervisorFeatures

    async def checks(self) -> list[Check]:
        """What this driver needs from the host, each with how it stands. Never raises."""
        ...

    async def launch(self, machine: Machine, network: NetworkAttachment | None) -> int:
        """Start the machine and return its pid once its control socket answers.

        Raises PreconditionFailed when the hypervisor is missing, Unavailable (with the end of its
        log) when it exits or never answers; then nothing of it is left.
        """
        ...

    async def restore(
        self, machine: Machine, network: NetworkAttachment | None, state: Path
    ) -> int:
        """Start the machine from where `save` left one, with that one's memory, and let it run on.

        It must have the `shape` of the machine that was saved. Returns and raises as `launch`;
        StateRefused when the hypervisor was there and could not take the state, MachineLost when
        the machine may have run.
        """
        ...

    async def save(self, machine: Machine, state: Path) -> None:
        """Pause the machine, which was launched with a shared memory file, have all of its memory
        in that, and write to `state` the rest of it. Its disks are then as the guest left them,
        and it is good for nothing but `quit`.

        Raises Unavailable when it cannot be saved.
        """
        ...

    async def capture(
        self, control_socket: Path, pid: int, capture: Capture, stages: Callable[[str], None]
    ) -> float:
        """Copy a machine that runs as process `pid`: `restore` starts others from the copy.

        It is paused only for the end of it, in which its disks go on in their overlays: for how
        many seconds is the result. However this ends it runs on. Raises Unavailable or
        PermissionDenied when it cannot be copied, OSError when there is no room for the copy; then
        `disks` tells where the disks are.
        """
        ...

    async def discard(self, control_socket: Path, paths: Collection[Path]) -> None:
        """Remove what captures to files with these names may have left unfinished elsewhere than
        there, while none is under way. Idempotent; what stays is logged."""
        ...

    async def disks(self, control_socket: Path) -> dict[str, Path]:
        """The file that each disk of a machine is written to, by the disk's name.

        Raises Unavailable when the hypervisor cannot be asked.
        """
        ...

    async def collapse(
        self, control_socket: Path, disk: str, tell: Callable[[float], None]
    ) -> None:
        """Bring all that lies between a disk and its image into the file that is written to.

        The machine runs on. `tell` hears how far it is, in percent. Raises Unavailable.
        """
        ...

    async def shape(self, machine: Machine, link: Link | None) -> str:
        """What a saved state fits: machines of one shape can be restored from each other's.

        It tells of the machine's devices, of the hypervisor and of the host; paths and names are
        not part of it. `link` is what its interface is joined to, if it has one. Raises
        PreconditionFailed when the hypervisor is missing.
        """
        ...

    async def quit(self, control_socket: Path) -> None:
        """End the machine at once. Raises Unavailable when the hypervisor cannot be asked."""
        ...

    async def clear(self, control_socket: Path) -> None:
        """End the machine and what belongs to it where only who has the privileges can: nothing
        for one that is the user's own. It may have ended by itself. Idempotent.

        Raises BangerError when nobody can.
        """
        ...

    async def end_strays(self, running: Collection[str]) -> None:
        """End what an earlier daemon of this home has started and left, where it may not be found
        by its control socket any more: but for the machines with these ids. What cannot be ended
        is logged."""
        ...

    async def power_button(self, control_socket: Path) -> None:
        """Press the machine's power button; what the guest makes of it is its own business.

        Raises Unavailable when the hypervisor cannot be asked.
        """
        ...

    async def status(self, control_socket: Path) -> MachineStatus:
        """Whether the machine's vCPUs run. Raises Unavailable when it cannot be asked."""
        ...

    async def traffic(self, control_socket: Path) -> Traffic:
        """What the machine's devices have moved. Raises Unavailable when it cannot be asked."""
        ...

    async def drain(self, control_socket: Path) -> None:
        """Bound what the hypervisor has noted for `traffic`, whether or not anybody asks for that;
        the machine is not asked. Raises Unavailable when it cannot be bounded."""
        ...

    async def pause(self, control_socket: Path) -> None:
        """Hold the machine until `resume`. Raises Unavailable when it cannot be asked."""
        ...

    async def resume(self, control_socket: Path) -> None:
        """Let a machine that is held run on. Raises Unavailable when it cannot be asked."""
        ...

    def control_socket(self, process: Process) -> Path | None:
        """The control socket of the machine that a process is, if it is one."""
        ...


class Storage(Protocol):
    """Disks of VMs over the read-only files of images."""

    name: str
    format: DiskFormat

    @property
    def layering(self) -> Layering | None:
        """None: a disk is one file, which is copied while nobody writes to it."""
        ...

    def file_name(self, disk: str) -> str:
        """What the file of a disk is called (``system``, ``work``). Its suffix says what it is:
        what another storage has made is called otherwise."""
        ...

    async def checks(self) -> list[Check]: ...

    async def create_overlay(self, base: Path, overlay: Path, size_mib: int) -> None:
        """A copy-on-write disk of at least `size_mib` over `base` (raw), which stays untouched.

        The result is never smaller than `base`. Replaces an unfinished `overlay`.
        """
        ...

    async def size_mib(self, overlay: Path) -> int:
        """How large the guest sees this disk, which no machine has open, in whole MiB."""
        ...

    async def grow(self, overlay: Path, size_mib: int) -> None:
        """Give the disk, which no machine has open, at least `size_mib`; its content is checked.

        Nothing happens to one that is as large already. Raises PreconditionFailed when the disk
        is damaged or cannot grow; it is then as it was.
        """
        ...

    async def copy_overlay(self, overlay: Path, copy: Path) -> None:
        """A disk of its own with the content of a small `overlay`, over the same base.

        Neither depends on the other. Replaces `copy`.
        """
        ...

    async def share(self, disk: Path, directory: Path) -> None:
        """Have a disk that nobody writes to, now or (with layers) any more, in `directory`, too.

        It has its name there, and stays what it is now, whatever becomes of `disk`.
        """
        ...

    async def branch(self, frozen: Path, disk: Path) -> None:
        """A disk that begins as `frozen`, which `share` has made, and does not depend on it."""
        ...

    def room_bytes(self, disk: str, source: Path) -> int:
        """What a disk (``system``, ``work``) that begins as `source` takes of the host's at once,
        but for a few MiB."""
        ...

    def allocated_bytes(self, disk: Path) -> int:
        """What the disk alone takes of the host's, 0 for none. What it shares with others is not
        counted where the file system can tell."""
        ...


class Room(StrEnum):
    """How much may still be written to a disk whose room is kept for it."""

    AMPLE = "ample"
    #: Less than there should be. A machine that was held for want of it stays held.
    TIGHT = "tight"
    #: What a machine writes next may find none: it is to be held.
    SHORT = "short"
    #: It has found none. What was written before is whole; the machine has to be started anew.
    LOST = "lost"


class DiskDeviceMaker(Protocol):
    """What a storage can do besides whose system disks are devices while a machine runs.

    `disk` is the file that such a disk has at all times. All but `open` is done for machines of
    this storage whichever one is configured.
    """

    def serves(self, disk: Path) -> bool:
        """Whether a disk is one of these, by the name of its file."""
        ...

    def node(self, vm_id: str) -> Path:
        """Where the device of a machine is."""
        ...

    async def open(
        self, vm_id: str, base: Path, disk: Path, record: Callable[[DiskDevices], None]
    ) -> None:
        """Make the device of a disk over `base`. `record` hears of it, before and after.

        Raises PreconditionFailed where it cannot be, other errors of whoever makes it; then
        `close` takes away what there is.
        """
        ...

    async def close(self, vm_id: str, disk: Path) -> None:
        """Take away what `open` has made, when no machine has it open. Idempotent. Raises Conflict
        for what somebody else keeps busy."""
        ...

    async def sweep(self, vm_ids: Collection[str]) -> None:
        """Take away what was made for machines that are none of these."""
        ...

    async def tend(self, vm_id: str, disk: Path) -> Room:
        """Keep room for what the machine writes, as far as that can be done in some seconds.

        Raises OSError, BangerError.
        """
        ...

    async def is_lost(self, vm_id: str) -> bool:
        """Whether something that the machine wrote has found no room. Raises BangerError where
        nobody can tell within some seconds."""
        ...


class Layering(Protocol):
    """What a storage can do besides whose disks consist of files over one another.

    A layer and what it lies over are in one directory and go together.
    """

    async def add_layer(self, disk: Path, overlay: Path) -> None:
        """An empty disk over `disk`, of its size, for what is written from now on.

        The layer names `disk` by its name only.
        """
        ...

    async def layers(self, disk: Path) -> list[Path]:
        """The files that a disk consists of, the topmost first, without its image's.

        It may be in use.
        """
        ...

    async def collapse(self, disk: Path) -> None:
        """Bring all that lies between a disk, which no machine has open, and its image into it."""
        ...

    async def collapse_bytes(self, disk: Path) -> int:
        """The most that a collapse of this disk, which may be in use, takes of the host's: what was
        brought together is there twice until nobody else has its layers."""
        ...


@dataclass(frozen=True)
class Networks:
    """The networks there are, and which of them a VM is joined to that names none."""

    default: NetworkMode
    by_mode: Mapping[NetworkMode, Network]

    def of(self, mode: NetworkMode) -> Network | None:
        """None for a VM without one."""
        return self.by_mode.get(mode)

    def link(self, mode: NetworkMode) -> Link | None:
        network = self.of(mode)
        return network.link if network is not None else None


class Network(Protocol):
    """Connects machines to the world, as each may reach it."""

    name: str
    link: Link
    #: The addresses that guests have, each its own; None: all have the same.
    guests: IPv4Network | None

    async def checks(self) -> list[Check]: ...

    def refusal(self, reach: Reach) -> Check | None:
        """What of it this network cannot hold machines to, as a failed check; None: it can."""
        ...

    async def resume(self, machines: Sequence[Plugged]) -> None:
        """These run, and no others: a daemon has started. What is left of others goes.

        Raises BangerError when they cannot be served; what runs is as it was then.
        """
        ...

    async def attach(self, plug: Plug) -> NetworkAttachment:
        """Make the host side for one machine, which reaches what it may from its first packet."""
        ...

    async def apply(self, machine: Plugged) -> None:
        """Have it reach what it may now, connections that it has included. Idempotent."""
        ...

    async def detach(self, vm_id: str) -> None:
        """The machine has ended, and with it what `attach` made: forget it. Idempotent."""
        ...

    def unplugged(self) -> AbstractAsyncContextManager[NetworkAttachment]:
        """The same interface, leading nowhere, for as long as the context is open."""
        ...

    def owns(self, argv: tuple[str, ...], vm_id: str) -> bool:
        """Whether a process with this command line is one of those that `attach` started."""
        ...

    async def close(self) -> None:
        """The daemon ends; machines run on."""
        ...


class VmNames(Protocol):
    """What VMs are called, for a name server. Asked for each query, so it must be quick."""

    def address_of(self, vm_name: str) -> str:
        """Empty when there is no VM of that name."""
        ...

    def name_of(self, address: str) -> str:
        """The VM that has this address; empty when none has."""
        ...


class NameServer(Protocol):
    """Answers by DNS what `VmNames` says."""

    #: ``HOST:PORT``; empty when it is turned off.
    where: str
    #: Why it does not listen, when it should.
    problem: str

    async def open(self) -> None:
        """Listen, if that can be. Raises nothing: see `problem`."""
        ...

    async def close(self) -> None: ...
