"""A stand-in for Firecracker v1.16.1, for machines without its binary or without KVM. Tests only.

It is a program with the same command line, and speaks the same HTTP on its Unix socket. Each
request is checked against Firecracker's own description of its API (`firecracker_schema`), and
against the order that it demands: what `PrebootApiController` and `RuntimeApiController` of
src/vmm/src/rpc_interface.rs take, before a machine runs and afterwards, and what they say of the
rest. The machine is QEMU's (`stand_in_machine`): the kernel, the drives and the tap are real.

What it has not: KVM, a jailer, seccomp, rate limiters, MMDS, hot plugging, a balloon that holds
anything, metrics of more than disks and networks.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import h11

from firecracker_schema import Description, Undescribed
from stand_in_machine import LoadFailed, Resources, StandInMachine, open_tap

VERSION = "1.16.1"

_NOT_BEFORE = "The requested operation is not supported before starting the microVM."
_NOT_AFTER = "The requested operation is not supported after starting the microVM."

_VCPU_MAX = 32

#: Where the last region of memory begins, two gaps below it left out (src/vmm/src/arch/x86_64), and
#: what KVM takes in one: 2³¹ - 1 pages.
_LAST_REGION_MIB = 255 << 10
_REGION_MAX_KIB = (8 << 30) - 4


class Refused(Exception):
    """Answered with 400 and this fault message."""


class Finished(Exception):
    """As `Refused`; the process ends then."""


def _os_error(error: OSError) -> str:
    """As Rust's standard library says it."""
    return f"{error.strerror} (os error {error.errno})"


class Api:
    """The requests, in the two states that a process has. Lives as long as the process."""

    def __init__(self, instance_id: str, description: Description) -> None:
        self._id = instance_id
        self._name = f"stand-in-{instance_id}"
        self._description = description
        # Any byte is parsed; that it is too many is said of the machine.
        self._description.take("MachineConfiguration", "vcpu_count", 0, 255)
        self._resources = Resources()
        self._taps: dict[str, int] = {}
        self._machine: StandInMachine | None = None
        self._configured = False
        self._metrics: int | None = None
        self._counted = [0, 0, 0, 0]
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def answer(self, method: str, path: str, body: bytes) -> tuple[int, object | None]:
        """Status and body, None for an empty one."""
        try:
            parsed = self._parse(method, path, body)
            handlers = _BEFORE if self._machine is None else _AFTER
            key = f"{method} /{path.split('/')[1]}"
            if key == "PUT /snapshot":
                key = f"{method} {path}"
            if (handler := handlers.get(key)) is None:
                raise Refused(_NOT_BEFORE if self._machine is None else _NOT_AFTER)
            answer = await handler(self, parsed)
        except (Refused, Finished) as refusal:
            if isinstance(refusal, Finished):
                self.end(1)
            return self._checked(method, path, 400, {"fault_message": str(refusal)})
        return self._checked(method, path, 204 if answer is None else 200, answer)

    def _checked(
        self, method: str, path: str, status: int, answer: object | None
    ) -> tuple[int, object | None]:
        if status < 400:
            self._description.check_answer(method, path, status, answer)
        return status, answer

    def _parse(self, method: str, path: str, body: bytes) -> dict[str, Any]:
        """`ParsedRequest::try_from` of src/firecracker/src/api_server/parsed_request.rs."""
        if method == "GET" and body:
            raise Refused("GET request cannot have a body.")
        if method in ("PUT", "PATCH") and not body:
            raise Refused(f"Empty {method} request.")
        json_error = "An error occurred when deserializing the json body of a request: "
        try:
            parsed = json.loads(body) if body else None
        except ValueError as error:
            raise Refused(f"{json_error}{error}.") from error
        name = path.split("/")[2] if path.count("/") == 2 else ""
        by_id = path.split("/")[1] in ("drives", "network-interfaces", "pmem")
        if by_id and not name:
            raise Refused("The ID cannot be empty.")
        if by_id and not all(each == "_" or each.isalnum() for each in name):
            raise Refused(
                "API Resource IDs can only contain alphanumeric characters and underscores."
            )
        try:
            self._description.check(method, path, parsed)
        except Undescribed as error:
            if "there is no" in str(error):
                raise Refused(f"Invalid request method and/or path: {method} {path}.") from error
            raise Refused(f"{json_error}{error}.") from error
        fields: dict[str, Any] = parsed or {}
        if by_id and name not in (fields.get("drive_id"), fields.get("iface_id"), fields.get("id")):
            raise Refused("The id from the path does not match the id from the body!")
        if path == "/snapshot/load" and ("mem_backend" in fields) == ("mem_file_path" in fields):
            raise Refused(f"{json_error}either `mem_file_path` or `mem_backend` must be there.")
        return fields

    # Before the machine runs.

    async def boot_source(self, body: dict[str, Any]) -> None:
        self._configured = True
        for field, what in (
            ("kernel_image_path", "The kernel file cannot be opened: "),
            (
                "initrd_path",
                "The initrd file cannot be opened due to invalid path or invalid permissions. ",
            ),
        ):
            try:
                if field in body:
                    Path(body[field]).open("rb").close()
            except OSError as error:
                raise Refused(f"Boot source error: {what}{_os_error(error)}") from error
        self._resources.boot_source = body

    async def machine_config(self, body: dict[str, Any]) -> None:
        self._configured = True
        if not 1 <= body["vcpu_count"] <= _VCPU_MAX:
            raise Refused(
                "Machine config error: The number of vCPUs must be greater than 0, less than"
                f" {_VCPU_MAX} and must be 1 or an even number if SMT is enabled."
            )
        if not body["mem_size_mib"]:
            raise Refused(
                "Machine config error: The memory size (MiB) is either 0, or not a multiple of the"
                " configured page size."
            )
        self._resources.machine_config |= body

    async def drive(self, body: dict[str, Any]) -> None:
        self._configured = True
        try:
            flags = os.O_RDONLY if body["is_read_only"] else os.O_RDWR
            os.close(os.open(body["path_on_host"], flags))
        except OSError as error:
            raise Refused(
                "Drive config error: Unable to create the virtio block device: Virtio backend"
                f" error: Error manipulating the backing file: {_os_error(error)}"
                f" {body['path_on_host']}"
            ) from error
        self._resources.drives[body["drive_id"]] = body

    async def network_interface(self, body: dict[str, Any]) -> None:
        self._configured = True
        failed = "Network config error: Cannot open/create the tap device: "
        name = body["host_dev_name"]
        if len(name) > 15:
            raise Refused(f"{failed}Invalid interface name")
        try:
            self._taps[body["iface_id"]] = open_tap(name)
        except OSError as error:
            raise Refused(
                f"{failed}Error while creating ifreq structure: {_os_error(error)}. Invalid"
                f" TUN/TAP Backend provided by {name}. Check our documentation on setting up the"
                " network devices."
            ) from error
        self._resources.interfaces[body["iface_id"]] = body

    async def vsock(self, body: dict[str, Any]) -> None:
        self._configured = True
        if Path(body["uds_path"]).exists():
            raise Refused(
                "Vsock config error: Cannot create backend for vsock device: Error binding to the"
                " host-side Unix socket: Address in use (os error 98)"
            )
        self._resources.vsock = body

    async def entropy(self, body: dict[str, Any]) -> None:
        self._configured = True
        self._resources.entropy = True

    async def balloon(self, body: dict[str, Any]) -> None:
        self._configured = True
        if body["amount_mib"] > int(self._resources.machine_config["mem_size_mib"]):
            raise Refused("Balloon config error: Amount of pages requested is too large.")
        self._resources.balloon = body

    async def metrics(self, body: dict[str, Any]) -> None:
        failed = "Metrics error: Cannot initialize the metrics system due to bad user input: "
        if self._metrics is not None:
            raise Refused(f"{failed}Reinitialization of metrics not allowed.")
        try:
            self._metrics = os.open(body["metrics_path"], os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise Refused(f"{failed}{_os_error(error)}") from error

    async def _flush_metrics(self) -> None:
        """A line of what was counted since the last one."""
        if self._metrics is None:
            return
        counts = await self._running.counts()
        since = [max(now - then, 0) for now, then in zip(counts, self._counted, strict=True)]
        self._counted = counts
        line = {
            "utc_timestamp_ms": time.time_ns() // 1000000,
            "block": {"read_bytes": since[0], "write_bytes": since[1]},
            "net": {"rx_bytes_count": since[2], "tx_bytes_count": since[3]},
        }
        os.write(self._metrics, json.dumps(line).encode() + b"\n")

    async def action_before(self, body: dict[str, Any]) -> None:
        if body["action_type"] != "InstanceStart":
            raise Refused(_NOT_BEFORE)
        if not self._resources.boot_source:
            raise Refused("Start microvm error: Cannot start microvm without kernel configuration.")
        memory_mib = int(self._resources.machine_config["mem_size_mib"])
        if (memory_mib - _LAST_REGION_MIB) << 10 > _REGION_MAX_KIB:
            raise Refused(
                "Start microvm error: Error with the KvmVm object: Cannot set the memory regions:"
                " Invalid argument (os error 22)"
            )
        machine = StandInMachine(self._name, self._resources, self._taps)
        await machine.start()
        self._runs(machine)
        await self._flush_metrics()

    async def load(self, body: dict[str, Any]) -> None:
        if self._configured:
            raise Refused(
                "Load snapshot error: Loading a microVM snapshot not allowed after configuring"
                " boot-specific resources."
            )
        memory = body["mem_backend"]["backend_path"]
        try:
            machine = await StandInMachine.load(
                self._name,
                Path(body["snapshot_path"]),
                Path(memory),
                {
                    each["iface_id"]: each["host_dev_name"]
                    for each in body.get("network_overrides", ())
                },
                body.get("vsock_override", {}).get("uds_path"),
            )
        except LoadFailed as error:
            raise Finished(
                f"Load snapshot error: Failed to restore from snapshot: {error}"
            ) from error
        self._runs(machine)
        if body.get("resume_vm"):
            await machine.resume()

    def end(self, status: int) -> None:
        if not self.ended.done():
            self.ended.set_result(status)

    async def close(self) -> None:
        """End the machine."""
        if self._machine is not None:
            await self._machine.close()

    def _runs(self, machine: StandInMachine) -> None:
        self._machine = machine
        machine.ended.add_done_callback(lambda process: self.end(process.result()))

    # At any time.

    async def describe(self, body: dict[str, Any]) -> object:
        if self._machine is None:
            state = "Not started"
        else:
            state = "Paused" if self._machine.paused else "Running"
        return {
            "id": self._id,
            "state": state,
            "vmm_version": VERSION,
            "app_name": "Firecracker",
        }

    async def version(self, body: dict[str, Any]) -> object:
        return {"firecracker_version": VERSION}

    # While it runs.

    @property
    def _running(self) -> StandInMachine:
        assert self._machine is not None
        return self._machine

    async def set_state(self, body: dict[str, Any]) -> None:
        if body["state"] == "Paused":
            await self._running.pause()
        else:
            await self._running.resume()

    async def action_after(self, body: dict[str, Any]) -> None:
        if body["action_type"] == "InstanceStart":
            raise Refused(_NOT_AFTER)
        if body["action_type"] == "FlushMetrics":
            await self._flush_metrics()

    async def create(self, body: dict[str, Any]) -> None:
        if not self._running.paused:
            raise Refused(
                "Create snapshot error: Cannot save the microVM state: Operation not allowed:"
                " save/restore unavailable while running"
            )
        try:
            await self._running.save(Path(body["snapshot_path"]), Path(body["mem_file_path"]))
        except OSError as error:
            raise Refused(
                "Create snapshot error: Cannot perform open on the snapshot backing file:"
                f" {_os_error(error)}"
            ) from error

    async def update_drive(self, body: dict[str, Any]) -> None:
        try:
            await self._running.update_drive(body["drive_id"], Path(body["path_on_host"]))
        except (OSError, LookupError) as error:
            why = _os_error(error) if isinstance(error, OSError) else "Device not found"
            raise Refused(
                f"Drive config error: Unable to patch the block device: {why} Please verify the"
                " request arguments."
            ) from error

    async def hot_plug(self, body: dict[str, Any]) -> None:
        raise Refused("PCI is not enabled")


Handler = Callable[[Api, dict[str, Any]], Awaitable[object]]

_ALWAYS: dict[str, Handler] = {"GET /": Api.describe, "GET /version": Api.version}
_BEFORE: dict[str, Handler] = _ALWAYS | {
    "PUT /boot-source": Api.boot_source,
    "PUT /machine-config": Api.machine_config,
    "PUT /drives": Api.drive,
    "PUT /network-interfaces": Api.network_interface,
    "PUT /vsock": Api.vsock,
    "PUT /entropy": Api.entropy,
    "PUT /balloon": Api.balloon,
    "PUT /metrics": Api.metrics,
    "PUT /actions": Api.action_before,
    "PUT /snapshot/load": Api.load,
}
_AFTER: dict[str, Handler] = _ALWAYS | {
    "PATCH /vm": Api.set_state,
    "PUT /actions": Api.action_after,
    "PUT /snapshot/create": Api.create,
    "PATCH /drives": Api.update_drive,
    "PUT /drives": Api.hot_plug,
    "PUT /network-interfaces": Api.hot_plug,
}


#: Of a request's method, path and body: status and body, None for an empty one.
Answer = Callable[[str, str, bytes], Awaitable[tuple[int, object | None]]]


async def serve_client(
    answer: Answer,
    turn: asyncio.Lock,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> None:
    """A connection, to its end. Firecracker has one thread for its API: one request of all clients'
    has its `turn`, and who has gone by then is not served."""
    # One that is killed may have sent half of a request.
    with suppress(ConnectionError, h11.RemoteProtocolError):
        await _serve_requests(answer, turn, reader, writer)
    writer.close()


async def _serve_requests(
    answer: Answer,
    turn: asyncio.Lock,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> None:
    connection = h11.Connection(h11.SERVER)
    method = path = ""
    body = bytearray()
    while True:
        event = connection.next_event()
        match event:
            case h11.NEED_DATA:
                connection.receive_data(await reader.read(65536))
            case h11.Request():
                method, path, body = event.method.decode(), event.target.decode(), bytearray()
            case h11.Data():
                body += event.data
            case h11.EndOfMessage():
                async with turn:
                    if reader.at_eof():
                        break
                    status, said = await answer(method, path, bytes(body))
                # As Firecracker does, before it answers; a log without room is no end.
                with suppress(OSError):
                    print(f"{method} {path} {bytes(body).decode()} -> {status} {said}", flush=True)
                content = b"" if said is None else json.dumps(said).encode()
                headers = [("Server", "Firecracker API"), ("Content-Type", "application/json")]
                if said is not None:
                    headers.append(("Content-Length", str(len(content))))
                for each in (
                    h11.Response(status_code=status, headers=headers),
                    *((h11.Data(data=content),) if content else ()),
                    h11.EndOfMessage(),
                ):
                    writer.write(connection.send(each) or b"")
                await writer.drain()
                connection.start_next_cycle()
            case _:
                break


async def serve(socket: str, instance_id: str) -> int:
    """Until the machine ends: the status to exit with."""
    api = Api(instance_id, Description())
    clients: set[asyncio.Task[None]] = set()
    turn = asyncio.Lock()

    def done(task: asyncio.Task[None]) -> None:
        clients.discard(task)
        if not task.cancelled() and (error := task.exception()):
            traceback.print_exception(error)
            api.end(1)  # an error of the stand-in's own: nobody waits for it

    def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(serve_client(api.answer, turn, reader, writer))
        clients.add(task)
        task.add_done_callback(done)

    # asyncio would remove what is there; Firecracker does not.
    if Path(socket).exists():
        print(f"Failed to open the API socket at: {socket}. Check that it is not already used.")
        return 1
    server = await asyncio.start_unix_server(client, socket)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, api.end, number)
    status = await api.ended
    server.close()
    # The answer that ended it goes out first.
    if clients:
        await asyncio.wait(clients, timeout=0.2)
    await api.close()
    return status


def main() -> int:
    parser = argparse.ArgumentParser("stand-in for firecracker", allow_abbrev=False)
    parser.add_argument("--api-sock", default="/run/firecracker.socket")
    parser.add_argument("--id", default="anonymous-instance")
    parser.add_argument("--log-path")
    parser.add_argument("--level")
    parser.add_argument("--version", action="store_true")
    arguments = parser.parse_args()
    if arguments.version:
        print(f"Firecracker v{VERSION}\n")
        return 0
    if arguments.log_path:
        # Its own output is the guest's serial console, as Firecracker's is.
        sys.stdout = sys.stderr = open(arguments.log_path, "w")  # noqa: SIM115 - for good
    return asyncio.run(serve(arguments.api_sock, arguments.id))


if __name__ == "__main__":
    sys.exit(main())
