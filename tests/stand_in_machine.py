"""The machine of `stand_in_firecracker`: QEMU's microvm, emulated, made of what the API was told.

What Firecracker has and QEMU here has not: vsock that can be saved (no vhost-vsock, no KVM). The
Unix socket speaks as Firecracker's does, and leads to the guest agent's virtio-serial port; so the
parameter that would have the agent listen on a vsock is taken from the kernel's. Disks have serials
that mean nothing, as Firecracker's do.
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import itertools
import json
import os
import signal
import socket
import struct
import tempfile
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qemu.qmp import QMPClient

from banger.drivers.hypervisor.qemu import tsc_khz
from banger.drivers.hypervisor.qemu_argv import AGENT_PORT
from stand_in_vsock import StandInVsock

#: With this in the environment guests have a vsock of their own (`stand_in_vsock`). Their machines
#: cannot be saved: QEMU does not save that device.
VSOCK_VARIABLE = "STAND_IN_VSOCK"

#: Before QEMU's state in the file: what it is; a sum of all that follows, so that what is cut off
#: is not loaded; and the resources as JSON, with its length.
_MAGIC = b"stand-in-1.16.1\n"
_SUM = struct.Struct(">I")
_LENGTH = struct.Struct(">I")

_TAP_COUNTS = ("tx_bytes", "rx_bytes")

_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x2, 0x1000, 0x4000
_PR_SET_PDEATHSIG = 1


class LoadFailed(Exception):
    """A state that cannot be loaded, as Firecracker says it."""


@dataclass
class Resources:
    """What a machine is made of: bodies of requests, by id where there are several, in order."""

    boot_source: dict[str, Any] = field(default_factory=dict)
    machine_config: dict[str, Any] = field(
        default_factory=lambda: {"vcpu_count": 1, "mem_size_mib": 128}
    )
    drives: dict[str, dict[str, Any]] = field(default_factory=dict)
    interfaces: dict[str, dict[str, Any]] = field(default_factory=dict)
    vsock: dict[str, Any] = field(default_factory=dict)
    entropy: bool = False
    balloon: dict[str, Any] = field(default_factory=dict)

    def saved(self) -> bytes:
        return json.dumps(vars(self)).encode()


def open_tap(name: str) -> int:
    """A tap of the host, by its name: opened with the flags that Firecracker has."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
        fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


class StandInMachine:
    """One machine, from its start to its end. `ended` gets QEMU's status."""

    def __init__(self, name: str, resources: Resources, taps: Mapping[str, int]) -> None:
        """`name` is for who lists processes. `taps` are descriptors, by the interface: they stay
        open as long as the process runs, as Firecracker's do."""
        self._name = name
        self._resources = resources
        self._taps = dict(taps)
        self._qmp = QMPClient("stand-in")
        self._memory = os.memfd_create("memory")
        os.truncate(self._memory, int(resources.machine_config["mem_size_mib"]) << 20)
        self._vsock: asyncio.Server | None = None
        self._device: StandInVsock | None = None
        self._agent_address = f"\0banger-stand-in-{os.getpid()}"
        self._client: asyncio.Task[None] | None = None
        self._ports = itertools.count(1 << 30)  # as Firecracker counts those of the host's side
        self.paused = False
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def start(self, state: bytes | None = None) -> None:
        """Run it; with a state it is paused there, and has that memory."""
        # QEMU wants its kernel also where the memory has it: by a name that leads there from a
        # directory of another machine, too.
        boot = self._resources.boot_source
        boot |= {name: os.path.realpath(path) for name, path in boot.items() if "path" in name}
        ours, theirs = socket.socketpair()
        agent = socket.socket(socket.AF_UNIX)
        agent.bind(self._agent_address)
        agent.listen(1)
        if VSOCK_VARIABLE in os.environ:
            self._device = StandInVsock(int(self._resources.vsock["guest_cid"]))
        with theirs, agent:
            device = (self._device.qemu.fileno(),) if self._device else ()
            fds = (
                *device,
                theirs.fileno(),
                agent.fileno(),
                self._memory,
                *self._taps.values(),
            )
            process = await asyncio.create_subprocess_exec(
                *self._argv(theirs.fileno(), agent.fileno(), incoming=state is not None),
                pass_fds=fds,
                preexec_fn=_die_with_parent,
            )
        self._process = process
        self._reaping = asyncio.ensure_future(self._reap(process))
        await self._qmp.connect(ours)
        if state is not None:
            self.paused = True
            with tempfile.TemporaryFile() as file:
                file.write(state)
                file.seek(0)
                await self._migrate(file.fileno())
        await self._open_vsock()

    async def _reap(self, process: asyncio.subprocess.Process) -> None:
        self.ended.set_result(await process.wait())

    def _argv(self, qmp: int, agent: int, *, incoming: bool) -> list[str]:
        config, boot = self._resources.machine_config, self._resources.boot_source
        memory = f"{config['mem_size_mib']}M"
        argv = [
            *("qemu-system-x86_64", "-name", self._name, "-nodefaults", "-no-user-config"),
            *("-display", "none"),
            *("-no-reboot", "-accel", "tcg,thread=multi", "-cpu", "max"),
            *("-machine", "microvm,x-option-roms=off,pit=off,pic=off,rtc=on,memory-backend=memory"),
            *("-global", "migration.send-configuration=off"),
            *("-smp", str(config["vcpu_count"]), "-m", memory, "-object"),
            f"memory-backend-file,id=memory,size={memory},share=on,mem-path=/dev/fd/{self._memory}",
            *("-kernel", boot["kernel_image_path"], "-append", _parameters(boot)),
            *(("-initrd", boot["initrd_path"]) if "initrd_path" in boot else ()),
            *("-chardev", f"socket,id=qmp,fd={qmp}", "-mon", "chardev=qmp,mode=control"),
            *("-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"),
            *("-chardev", f"socket,id=agent,fd={agent},server=on,wait=off"),
            *("-device", "virtio-serial-device"),
            *("-device", f"virtserialport,chardev=agent,name={AGENT_PORT}"),
        ]
        if self._device:
            argv += ["-chardev", f"socket,id=vsock,fd={self._device.qemu.fileno()}"]
            argv += ["-device", "vhost-user-vsock-device,chardev=vsock"]
        for number, (name, drive) in enumerate(self._resources.drives.items()):
            path = drive["path_on_host"].replace(",", ",,")
            read_only = "on" if drive["is_read_only"] else "off"
            file = f"file.driver=file,file.filename={path}"
            argv += ["-blockdev", f"driver=raw,node-name={name},read-only={read_only},{file}"]
            argv += ["-device", f"virtio-blk-device,drive={name},serial=650010{number}"]
        for name, interface in self._resources.interfaces.items():
            argv += ["-netdev", f"tap,id={name},fd={self._taps[name]},vhost=off"]
            argv += ["-device", f"virtio-net-device,netdev={name},mac={interface['guest_mac']}"]
        if self._resources.entropy:
            argv += ["-device", "virtio-rng-device"]
        if self._resources.balloon:
            reports = "on" if self._resources.balloon.get("free_page_reporting") else "off"
            argv += ["-device", f"virtio-balloon-device,free-page-reporting={reports}"]
        return argv + (["-S", "-incoming", "defer"] if incoming else [])

    async def close(self) -> None:
        """End it, if it runs."""
        with suppress(ProcessLookupError):
            self._process.kill()
        await self._reaping

    async def counts(self) -> list[int]:
        """Bytes: read and written by its disks, received and sent by it over its taps."""
        disks: Any = await self._qmp.execute("query-blockstats")
        links = [
            Path("/sys/class/net", each["host_dev_name"], "statistics")
            for each in self._resources.interfaces.values()
        ]
        return [
            *(sum(disk["stats"][key] for disk in disks) for key in ("rd_bytes", "wr_bytes")),
            # What a tap sends is what the machine receives.
            *(sum(int((link / key).read_text()) for link in links) for key in _TAP_COUNTS),
        ]

    async def pause(self) -> None:
        await self._qmp.execute("stop")
        self.paused = True

    async def resume(self) -> None:
        await self._qmp.execute("cont")
        self.paused = False

    async def update_drive(self, name: str, path: Path) -> None:
        """Firecracker opens the path again; here it has to be the same file, in another size."""
        size = path.stat().st_size
        if not os.path.samefile(path, self._resources.drives[name]["path_on_host"]):  # noqa: PTH121
            raise LookupError(name)
        await self._qmp.execute("block_resize", {"node-name": name, "size": size})

    # States.

    async def save(self, state: Path, memory: Path) -> None:
        """Of a paused machine, which can go on. Firecracker writes all of the memory, too."""
        with tempfile.TemporaryDirectory() as scratch, state.open("wb") as file:
            devices = Path(scratch, "devices")
            arguments = {"filename": str(devices), "live": False}
            await self._qmp.execute("xen-save-devices-state", arguments)
            header = self._resources.saved()
            content = _LENGTH.pack(len(header)) + header + devices.read_bytes()
            file.write(_MAGIC + _SUM.pack(zlib.crc32(content)) + content)
        with memory.open("wb") as file:
            _copy(self._memory, file.fileno())

    @classmethod
    async def load(
        cls, name: str, state: Path, memory: Path, taps: dict[str, str], vsock: str | None
    ) -> StandInMachine:
        """A paused machine. Raises LoadFailed: a process of Firecracker's ends with it."""
        resources, devices = _read_state(state)
        for interface, tap in taps.items():
            if interface not in resources.interfaces:
                raise LoadFailed("Failed to get snapshot state from file: Unknown Network Device.")
            resources.interfaces[interface]["host_dev_name"] = tap
        if vsock is not None:
            if not resources.vsock:
                raise LoadFailed("Failed to get snapshot state from file: Unknown Vsock Device.")
            resources.vsock["uds_path"] = vsock
        failed = "Failed to build microVM from snapshot: Failed to restore devices: "
        try:
            opened = {
                key: open_tap(interface["host_dev_name"])
                for key, interface in resources.interfaces.items()
            }
        except OSError as error:
            raise LoadFailed(
                f"{failed}Cannot open/create the tap device: {error.strerror}"
            ) from error
        machine = cls(name, resources, opened)
        try:
            with memory.open("rb") as file:
                _copy(file.fileno(), machine._memory)
        except OSError as error:
            raise LoadFailed(
                "Failed to load guest memory: Error creating guest memory from file: Failed to load"
                f" guest memory: {error.strerror} (os error {error.errno})"
            ) from error
        try:
            for drive in resources.drives.values():
                os.close(os.open(drive["path_on_host"], os.O_RDONLY))
            await machine.start(devices)
        except OSError as error:
            raise LoadFailed(f"{failed}{error.strerror} (os error {error.errno})") from error
        return machine

    async def _migrate(self, descriptor: int) -> None:
        ignored = [{"capability": "x-ignore-shared", "state": True}]
        await self._qmp.execute("migrate-set-capabilities", {"capabilities": ignored})
        self._qmp.send_fd_scm(descriptor)
        await self._qmp.execute("getfd", {"fdname": "state"})
        await self._qmp.execute("migrate-incoming", {"uri": "fd:state"})
        while True:
            answer: Any = await self._qmp.execute("query-migrate")
            if answer.get("status") in ("completed", "failed"):
                break
            await asyncio.sleep(0.002)
        if answer["status"] == "failed":
            raise LoadFailed("Failed to build microVM from snapshot: the state does not fit")

    # vsock: src/vmm/src/devices/virtio/vsock/unix/muxer.rs

    async def _open_vsock(self) -> None:
        path = self._resources.vsock.get("uds_path")
        if path and self._device:
            await self._device.listen(path)
        elif path:
            self._vsock = await asyncio.start_unix_server(self._host_connects, path)

    def _host_connects(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._client is not None:  # the agent has one client, the newest
            self._client.cancel()
        self._client = asyncio.ensure_future(self._bridge(reader, writer))

    async def _bridge(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            word, _, port = (await reader.readline()).decode().strip().partition(" ")
            if word != "CONNECT" or f"banger.vsock={port}" not in self._guest_words():
                return  # nobody listens there
            # A process of the guest's accepts it: until then nothing is answered.
            to_guest, from_guest = await asyncio.open_unix_connection(self._agent_address)
            writer.write(f"OK {next(self._ports)}\n".encode())
            try:
                done, pending = await asyncio.wait(
                    {
                        asyncio.ensure_future(_pump(reader, from_guest)),
                        asyncio.ensure_future(_pump(to_guest, writer)),
                    },
                    return_when=asyncio.FIRST_COMPLETED,
                )
                for each in (*done, *pending):
                    each.cancel()
            finally:
                from_guest.close()
        finally:
            writer.close()

    def _guest_words(self) -> list[str]:
        words: list[str] = self._resources.boot_source.get("boot_args", "").split()
        return words


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while piece := await reader.read(65536):
            writer.write(piece)
            await writer.drain()


def _parameters(boot: dict[str, Any]) -> str:
    """The kernel's: what is KVM's own business (time), and how a microvm of QEMU's ends."""
    words = [
        "reboot=t" if word == "reboot=k" else word
        for word in boot.get("boot_args", "").split()
        if not word.startswith("banger.vsock=") or VSOCK_VARIABLE in os.environ
    ]
    # Without tsc=reliable: with a clock that lets it rest, a guest that has freed memory and has
    # nothing to do says so late, as its kernel puts that off.
    return " ".join((*words, f"tsc_early_khz={tsc_khz()}", "no_timer_check", "cryptomgr.notests"))


def _read_state(path: Path) -> tuple[Resources, bytes]:
    failed = "Failed to get snapshot state from file: "
    try:
        content = path.read_bytes()
    except OSError as error:
        raise LoadFailed(
            f"{failed}Failed to open snapshot file: {error.strerror} (os error {error.errno})"
        ) from error
    begins = len(_MAGIC) + _SUM.size
    head, content = content[:begins], content[begins:]
    if head != _MAGIC + _SUM.pack(zlib.crc32(content)):
        raise LoadFailed(
            f"{failed}Failed to load snapshot state from file: CRC64 validation failed"
        )
    end = _LENGTH.size + _LENGTH.unpack_from(content)[0]
    return Resources(**json.loads(content[_LENGTH.size : end])), content[end:]


def _copy(source: int, target: int) -> None:
    """A file with holes."""
    size = os.fstat(source).st_size
    os.ftruncate(target, size)
    at = 0
    while at < size:
        try:
            at = os.lseek(source, at, os.SEEK_DATA)
        except OSError:
            return
        end = os.lseek(source, at, os.SEEK_HOLE)
        while at < end:
            at += os.pwrite(target, os.pread(source, min(1 << 20, end - at), at), at)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
