"""Between a hypervisor and passt: keeps the guest's frames away from the host's loopback.

passt opens an ordinary socket of the host towards whatever address a guest's packet names. Its
option ``--no-map-gw`` takes away one way to the loopback, but a guest that writes its own frames
reached servers on the host's 127.0.0.1, by TCP and by UDP, with destination 127.x.y.z and with
0.0.0.0 (passt 2023-03-09; `tests/integration/test_network_frames.py` tries). So every frame from
the guest passes here first, and only these go on: ARP, and IPv4 from the guest's own address to a
unicast address that is neither loopback, nor "this host", nor link-local. Whatever else there is
(IPv6, VLAN tags, forged sources) is dropped. Frames to the guest pass unseen.

What is a frame here must be the same frame to passt, and passt 2023-03-09 takes a stream apart
wrongly: when one of its reads ends within a length, it forgets the bytes it has of it, and so it
does with a frame that comes in three pieces. What it then takes for lengths and frames is what
the guest wrote into its packets. (tap.c, tap_handler_passt: later versions keep such pieces.) So
no read of passt may end but where a frame does, whatever the guest sends:

- Each frame is one write of 1518 bytes at most, which Linux makes one socket buffer: never more
  than half the socket's send buffer less 64 bytes (unix_stream_sendmsg), which is 2 KiB at least.
  A read ends where the queue does, thus after a whole frame, or when it has got what it asked for.
- passt asks for 8323069 bytes. To never give as many to one read, every `MARK_BYTES` a frame has a
  descriptor attached to it: Linux ends a read behind such a buffer (unix_stream_read_generic), and
  drops the descriptor, for passt takes none. Then nothing is sent until that frame has been read:
  passt waits for edges (EPOLLET), and would not see what was behind the mark before it came to it.

It is a program of its own, run by file name: it lives as long as its machine, past the daemon,
and ends when either side does, which ends the other. It uses the standard library only, and of
that little: a machine should not wait for it, nor pay for it (12 ms, 9 MB).

    frame_filter.py VM_ID GUEST_ADDRESS HYPERVISOR_FD PASST_FD
"""

from __future__ import annotations

import fcntl
import os
import socket
import sys
import termios
import threading
import time

#: Both sides put a frame's length before it, in network byte order.
_LENGTH_BYTES = 4
_ETHERNET_BYTES = 14
_IPV4_BYTES = 20
#: What goes on at most: guests have an MTU of 1500 bytes.
FRAME_BYTES_MAX = _ETHERNET_BYTES + 1500
#: The largest IPv4 packet and its Ethernet header: no guest's interface sends more.
LENGTH_MAX = _ETHERNET_BYTES + 65535
_READ_BYTES = 1 << 18
#: Far from what one read of passt takes, and so seldom that it costs nothing.
MARK_BYTES = 1 << 20
#: How often to look whether a mark has been read: no event tells of an empty send queue.
_LOOK_S = 0.0001

_ARP = b"\x08\x06"
_IPV4 = b"\x08\x00"
_LOOPBACK = 127
#: Clouds hand out a host's credentials at 169.254.169.254, to whoever asks from that host.
_LINK_LOCAL = b"\xa9\xfe"
_FIRST_MULTICAST = 224


class BadStream(Exception):
    """A length that no frame has: the boundaries of what follows are lost."""


def passes(frame: bytes, guest: bytes) -> bool:
    """Whether a frame of the guest, whose address is the 4 bytes `guest`, may reach passt."""
    if not _ETHERNET_BYTES <= len(frame) <= FRAME_BYTES_MAX:
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
    if network == _LOOPBACK or frame[30:32] == _LINK_LOCAL:
        return False
    return 0 < network < _FIRST_MULTICAST


def sift(data: bytes, guest: bytes) -> tuple[list[bytes], int]:
    """What of a stream goes on, each frame with its length before it, and where the rest begins.

    The rest is the beginning of a frame, to be given again with more behind it. Raises BadStream.
    """
    kept: list[bytes] = []
    position = 0
    while len(data) - position >= _LENGTH_BYTES:
        start = position + _LENGTH_BYTES
        length = int.from_bytes(data[position:start], "big")
        if length > LENGTH_MAX:
            raise BadStream(f"frame of {length} bytes")
        if start + length > len(data):
            break
        if passes(data[start : start + length], guest):
            kept.append(data[position : start + length])
        position = start + length
    return kept, position


class Outlet:
    """The way to passt, which no read of passt leaves but behind a whole frame (see above)."""

    def __init__(self, passt: socket.socket, attached: int) -> None:
        """`attached` is the descriptor for marks. The socket stays the caller's, and blocking."""
        self._passt = passt
        mark = attached.to_bytes(4, sys.byteorder)
        self._mark = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, mark)]
        self._since_mark = 0

    def send(self, frame: bytes) -> None:
        """Send one frame, with its length before it. Blocks while passt does not read."""
        self._since_mark += len(frame)
        if self._since_mark < MARK_BYTES:
            self._passt.send(frame)
            return
        self._passt.sendmsg([frame], self._mark)
        self._since_mark = 0
        while self._unread():
            time.sleep(_LOOK_S)

    def _unread(self) -> int:
        """What the kernel holds for passt (unix(7): SIOCOUTQ, the same as TIOCOUTQ)."""
        answer = fcntl.ioctl(self._passt, termios.TIOCOUTQ, bytes(4))
        return int.from_bytes(answer, sys.byteorder)


def from_guest(hypervisor: socket.socket, outlet: Outlet, guest: bytes) -> None:
    """Pass on what may pass until the hypervisor's side ends. Blocks; holds one read at most."""
    pending = b""
    while data := hypervisor.recv(_READ_BYTES):
        pending += data
        kept, done = sift(pending, guest)
        pending = pending[done:]
        for frame in kept:
            outlet.send(frame)


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
        from_guest(hypervisor, Outlet(passt, os.open(os.devnull, os.O_RDONLY)), guest)
    except BadStream as error:
        print(f"network ended: the hypervisor sent a {error}", file=sys.stderr)  # noqa: T201
    except OSError:
        pass
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv)
