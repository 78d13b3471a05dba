"""A vsock for `stand_in_machine`: as Firecracker has it, for a QEMU without vhost-vsock.

QEMU has the device and asks this, by vhost-user, to serve its queues in the guest's memory
(docs/interop/vhost-user.rst of QEMU; VIRTIO 1.2, 2.7 and 5.10). To the host it is the Unix socket
of docs/vsock.md of Firecracker's. Connections of the host's only: nothing else is asked for.
"""

from __future__ import annotations

import array
import asyncio
import itertools
import mmap
import os
import socket
import struct
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field

_HEADER = struct.Struct("<III")
_REPLY = 0x5  # version 1, and that it is one
_VERSION_1, _PROTOCOL_FEATURES, _CONFIG = 1 << 32, 1 << 30, 1 << 9

_PACKET = struct.Struct("<QQIIIHHIII")
_HOST_CID, _STREAM = 2, 1
_REQUEST, _RESPONSE, _RST, _SHUTDOWN, _RW, _CREDIT_UPDATE, _CREDIT_REQUEST = range(1, 8)
_BUFFER = 256 << 10
#: Linux gives buffers of 4 KiB, less what it needs for itself.
_CHUNK = 2048

_NEXT, _WRITE = 1, 2
_RX, _TX = 0, 1


@dataclass
class _Region:
    guest: int
    size: int
    user: int
    memory: mmap.mmap
    offset: int


@dataclass
class _Queue:
    """One split ring, by QEMU's addresses."""

    size: int = 0
    descriptors: int = 0
    available: int = 0
    used: int = 0
    seen: int = 0
    kick: int = -1
    call: int = -1


@dataclass
class _Connection:
    """Of the host's, to a port of the guest's."""

    guest_port: int
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    accepted: asyncio.Future[bool]
    sent: int = 0
    received: int = 0
    room: int = 0  # of the guest's buffer
    forwarded: int = 0  # what the guest has taken of it
    credit: asyncio.Event = field(default_factory=asyncio.Event)


class StandInVsock:
    """Lives as long as its machine. `qemu` is the end of the socket pair for QEMU's chardev."""

    def __init__(self, cid: int) -> None:
        self._cid = cid
        ours, self.qemu = socket.socketpair()
        ours.setblocking(True)
        self._socket = ours
        self._regions: list[_Region] = []
        self._queues = [_Queue(), _Queue(), _Queue()]
        self._waiting: deque[bytes] = deque()
        self._ports = itertools.count(1 << 30)
        self._connections: dict[int, _Connection] = {}
        self._serving: set[asyncio.Task[None]] = set()
        asyncio.get_running_loop().add_reader(ours, self._message)

    async def listen(self, path: str) -> None:
        self._server = await asyncio.start_unix_server(self._host_connects, path)

    # vhost-user: QEMU asks, one message at a time.

    def _message(self) -> None:
        loop = asyncio.get_running_loop()
        head, ancillary, _, _ = self._socket.recvmsg(_HEADER.size, socket.CMSG_SPACE(32))
        if not head:
            loop.remove_reader(self._socket)
            return
        fds = array.array("i")
        for _level, _kind, data in ancillary:
            fds.frombytes(data[: len(data) - len(data) % 4])
        request, _flags, size = _HEADER.unpack(head)
        body = self._socket.recv(size, socket.MSG_WAITALL) if size else b""
        if (answer := self._answer(request, body, list(fds))) is not None:
            self._socket.sendall(_HEADER.pack(request, _REPLY, len(answer)) + answer)

    def _answer(self, request: int, body: bytes, fds: list[int]) -> bytes | None:
        match request:
            case 1:  # GET_FEATURES
                return struct.pack("<Q", _VERSION_1 | _PROTOCOL_FEATURES)
            case 15:  # GET_PROTOCOL_FEATURES
                return struct.pack("<Q", _CONFIG)
            case 24:  # GET_CONFIG: the guest's CID
                return body[:12] + struct.pack("<Q", self._cid).ljust(len(body) - 12, b"\0")
            case 5:  # SET_MEM_TABLE
                self._map(body, fds)
            case 8:  # SET_VRING_NUM
                index, size = struct.unpack("<II", body)
                self._queues[index].size = size
            case 9:  # SET_VRING_ADDR
                index, _, descriptors, used, available, _ = struct.unpack("<IIQQQQ", body)
                queue = self._queues[index]
                queue.descriptors, queue.used, queue.available = descriptors, used, available
            case 10:  # SET_VRING_BASE
                index, seen = struct.unpack("<II", body)
                self._queues[index].seen = seen
            case 11:  # GET_VRING_BASE
                (index, _) = struct.unpack("<II", body)
                return struct.pack("<II", index, self._queues[index].seen)
            case 12:  # SET_VRING_KICK
                index = body[0]
                self._queues[index].kick = fds[0]
                asyncio.get_running_loop().add_reader(fds[0], self._kicked, index)
            case 13:  # SET_VRING_CALL
                self._queues[body[0]].call = fds[0] if fds else -1
        return None

    def _map(self, body: bytes, fds: list[int]) -> None:
        (count,) = struct.unpack_from("<I", body)
        self._regions = []
        for number in range(count):
            guest, size, user, offset = struct.unpack_from("<QQQQ", body, 8 + 32 * number)
            memory = mmap.mmap(fds[number], offset + size)
            self._regions.append(_Region(guest, size, user, memory, offset))
            os.close(fds[number])

    # Rings.

    def _at(self, address: int, *, user: bool) -> tuple[mmap.mmap, int]:
        for region in self._regions:
            start = region.user if user else region.guest
            if start <= address < start + region.size:
                return region.memory, address - start + region.offset
        raise ValueError(f"no memory at {address:#x}")

    def _read(self, form: str, address: int) -> tuple[int, ...]:
        memory, at = self._at(address, user=True)
        return struct.unpack_from(form, memory, at)

    def _pop(self, queue: _Queue) -> tuple[int, list[tuple[int, int, int]]] | None:
        """The next chain: its head, and (address, length, flags) of each descriptor."""
        if not queue.available or self._read("<H", queue.available + 2)[0] == queue.seen:
            return None
        ring = queue.available + 4 + 2 * (queue.seen % queue.size)
        (head,) = self._read("<H", ring)
        queue.seen = (queue.seen + 1) & 0xFFFF
        chain, index = [], head
        while True:
            address, length, flags, following = self._read("<QIHH", queue.descriptors + 16 * index)
            chain.append((address, length, flags))
            if not flags & _NEXT:
                return head, chain
            index = following

    def _push(self, queue: _Queue, head: int, length: int) -> None:
        memory, at = self._at(queue.used, user=True)
        (index,) = struct.unpack_from("<H", memory, at + 2)
        struct.pack_into("<II", memory, at + 4 + 8 * (index % queue.size), head, length)
        struct.pack_into("<H", memory, at + 2, (index + 1) & 0xFFFF)
        if queue.call >= 0:
            os.eventfd_write(queue.call, 1)

    def _kicked(self, index: int) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self._queues[index].kick)
        if index == _TX:
            queue = self._queues[_TX]
            while (popped := self._pop(queue)) is not None:
                head, chain = popped
                data = b""
                for address, length, _ in chain:
                    memory, at = self._at(address, user=False)
                    data += memory[at : at + length]
                self._push(queue, head, 0)
                self._from_guest(data[: _PACKET.size], data[_PACKET.size :])
        self._flush()

    def _flush(self) -> None:
        """Give the guest what waits, as far as it has buffers."""
        queue = self._queues[_RX]
        while self._waiting and (popped := self._pop(queue)) is not None:
            head, chain = popped
            rest = packet = self._waiting.popleft()
            for address, length, _ in chain:
                memory, at = self._at(address, user=False)
                piece, rest = rest[:length], rest[length:]
                memory[at : at + len(piece)] = piece
            assert not rest, "the guest's buffers are smaller than a packet"
            self._push(queue, head, len(packet))

    # Packets.

    def _send(self, port: int, op: int, data: bytes = b"", *, flags: int = 0) -> None:
        connection = self._connections[port]
        header = _PACKET.pack(
            *(_HOST_CID, self._cid, port, connection.guest_port, len(data), _STREAM, op, flags),
            *(_BUFFER, connection.received & 0xFFFFFFFF),
        )
        self._waiting.append(header + data)
        self._flush()

    def _from_guest(self, header: bytes, data: bytes) -> None:
        _, _, _, port, length, _, op, _, room, forwarded = _PACKET.unpack(header)
        connection = self._connections.get(port)
        if connection is None:
            return
        connection.room, connection.forwarded = room, forwarded
        connection.credit.set()
        match op:
            case 2 if not connection.accepted.done():  # RESPONSE
                connection.accepted.set_result(True)
            case 3 | 4:  # RST, SHUTDOWN
                if not connection.accepted.done():
                    connection.accepted.set_result(False)
                if op == _SHUTDOWN:
                    self._send(port, _RST)
                connection.writer.close()
            case 5:  # RW
                connection.writer.write(data[:length])
                connection.received += length
                self._send(port, _CREDIT_UPDATE)
            case 7:  # CREDIT_REQUEST
                self._send(port, _CREDIT_UPDATE)

    def _host_connects(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        word, _, number = (await reader.readline()).decode().strip().partition(" ")
        port = next(self._ports)
        accepted: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        connection = _Connection(int(number), reader, writer, accepted)
        self._connections[port] = connection
        try:
            self._send(port, _REQUEST)
            # As Firecracker's CONN_REQUEST_TIMEOUT_MS.
            if word == "CONNECT" and await asyncio.wait_for(accepted, 2):
                writer.write(f"OK {port}\n".encode())
                await self._to_guest(port, connection)
                self._send(port, _SHUTDOWN, flags=3)
        except (TimeoutError, OSError):
            pass
        finally:
            writer.close()
            del self._connections[port]

    async def _to_guest(self, port: int, connection: _Connection) -> None:
        while data := await connection.reader.read(_CHUNK):
            while len(data) > self._credit(connection):
                connection.credit.clear()
                await connection.credit.wait()
            connection.sent += len(data)
            self._send(port, _RW, data)

    def _credit(self, connection: _Connection) -> int:
        return connection.room - ((connection.sent - connection.forwarded) & 0xFFFFFFFF)
