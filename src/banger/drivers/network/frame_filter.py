"""Between a hypervisor and passt: keeps the guest's frames away from the host's loopback.

passt opens an ordinary socket of the host towards whatever address a guest's packet names. Its
option ``--no-map-gw`` takes away one way to the loopback, but a guest that writes its own frames
reached servers on the host's 127.0.0.1, by TCP and by UDP, with destination 127.x.y.z and with
0.0.0.0 (passt 2023-03-09; `tests/integration/test_network_frames.py` tries). So every frame from
the guest passes here first, and only these go on: ARP, and IPv4 from the guest's own address to a
unicast address that is neither loopback nor "this host". Whatever else there is (IPv6, VLAN tags,
forged sources) is dropped. Frames to the guest pass unseen.

It is a program of its own, run by file name: it lives as long as its machine, past the daemon,
and ends when either side does, which ends the other. It uses the standard library only, and of
that little: a machine should not wait for it, nor pay for it (12 ms, 9 MB).

    frame_filter.py VM_ID GUEST_ADDRESS HYPERVISOR_FD PASST_FD
"""

from __future__ import annotations

import os
import socket
import sys
import threading

#: Both sides put a frame's length before it, in network byte order.
_LENGTH_BYTES = 4
_ETHERNET_BYTES = 14
_IPV4_BYTES = 20
#: The largest IPv4 packet and its Ethernet header: nothing passt takes is longer.
FRAME_BYTES_MAX = _ETHERNET_BYTES + 65535
_READ_BYTES = 1 << 18

_ARP = b"\x08\x06"
_IPV4 = b"\x08\x00"
_LOOPBACK = 127
_FIRST_MULTICAST = 224


class BadStream(Exception):
    """A length that no frame has: the boundaries of what follows are lost."""


def passes(frame: bytes | bytearray | memoryview, guest: bytes) -> bool:
    """Whether a frame of the guest, whose address is the 4 bytes `guest`, may reach passt."""
    if len(frame) < _ETHERNET_BYTES:
        return False
    ethertype = frame[12:14]
    if ethertype == _ARP:
        return True
    if ethertype != _IPV4 or len(frame) < _ETHERNET_BYTES + _IPV4_BYTES:
        return False
    if frame[14] >> 4 != 4 or frame[26:30] != guest:
        return False
    # The kernel takes 0.0.0.0 for the loopback. Multicast and what lies above it (broadcast) has
    # no single receiver, and may be delivered to sockets on this host.
    network = frame[30]
    return 0 < network < _FIRST_MULTICAST and network != _LOOPBACK


def sift(data: bytes | bytearray, guest: bytes) -> tuple[bytes, int]:
    """What of a stream's bytes goes on (whole frames), and how many of them are dealt with.

    The rest is the beginning of a frame, to be given again with more behind it. Raises BadStream.
    """
    view = memoryview(data)
    kept: list[memoryview] = []
    position = 0
    while len(data) - position >= _LENGTH_BYTES:
        start = position + _LENGTH_BYTES
        length = int.from_bytes(view[position:start], "big")
        if length > FRAME_BYTES_MAX:
            raise BadStream(f"frame of {length} bytes")
        if start + length > len(data):
            break
        if passes(view[start : start + length], guest):
            kept.append(view[position : start + length])
        position = start + length
    return b"".join(kept), position


def from_guest(hypervisor: socket.socket, passt: socket.socket, guest: bytes) -> None:
    """Pass on what may pass until the hypervisor's side ends. Blocks; holds one read at most."""
    pending = bytearray()
    while data := hypervisor.recv(_READ_BYTES):
        pending += data
        kept, done = sift(pending, guest)
        del pending[:done]
        if kept:
            passt.sendall(kept)


def to_guest(passt: socket.socket, hypervisor: socket.socket) -> None:
    """Pass on everything until passt's side ends. Blocks."""
    while data := passt.recv(_READ_BYTES):
        hypervisor.sendall(data)


def main(argv: list[str]) -> None:
    """Relay until one side is gone; then end the process, and with it the other side."""
    guest = socket.inet_aton(argv[2])
    hypervisor = socket.socket(fileno=int(argv[3]))
    passt = socket.socket(fileno=int(argv[4]))

    def inward() -> None:
        try:
            to_guest(passt, hypervisor)
        except OSError:
            pass  # the other side is gone: the end all the same
        finally:
            # The main thread sits in recv; only the end of the process stops it.
            os._exit(0)

    threading.Thread(target=inward, daemon=True).start()
    try:
        from_guest(hypervisor, passt, guest)
    except BadStream as error:
        print(f"network ended: the hypervisor sent a {error}", file=sys.stderr)  # noqa: T201
    except OSError:
        pass
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv)
