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

What passt cannot send to us at once it drops, and takes for sent (tap.c, tap_send_frames). Data it
sends again later, but never a FIN: a guest without it waits for the end of its connection until
passt resets it, 16 s later. So passt is read whether or not the hypervisor takes more (`Backlog`),
and the guest's acknowledgements, by which passt sends, go on with changes (`Pace`):

- passt sends what the guest's window takes as fast as memory is: megabytes, more than a socket
  holds before its reader gets to run. So windows are told smaller. Those for far peers are told
  larger: passt shows the peer a window of the guest's size, and what the network brings, comes no
  faster than that.
- passt sends all of it again for each acknowledgement that repeats one (tcp.c, tcp_data_from_tap),
  which the guest answers with as many repetitions: a storm that keeps the socket full. So
  repetitions go on seldom.

It is a program of its own, run by file name: it lives as long as its machine, past the daemon,
and ends when either side does, which ends the other. It uses the standard library only, and of
that little: a machine should not wait for it, nor pay for it (12 ms, 9 MB).

    frame_filter.py VM_ID GUEST_ADDRESS HYPERVISOR_FD PASST_FD all|none NETWORK GATEWAY MAC

``all`` or ``none`` says whether anything goes on at all, which `SIGNALS` change: with ``none``,
only ARP; the guest is told so (ICMP), for its programs to fail at once rather than wait. What passt
has taken from the network by then still reaches the guest, a window's worth at most. NETWORK,
a.b.c.d/n, is one that is never reached: machines on the host's bridge are there. GATEWAY and MAC
are the addresses of who tells the guest.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import sys
import termios
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

#: Both sides put a frame's length before it, in network byte order.
_LENGTH_BYTES = 4
_ETHERNET_BYTES = 14
_IPV4_BYTES = 20
#: What goes on at most: guests have an MTU of 1500 bytes.
FRAME_BYTES_MAX = _ETHERNET_BYTES + 1500
#: The largest IPv4 packet and its Ethernet header: no guest's interface sends more.
LENGTH_MAX = _ETHERNET_BYTES + 65535
_READ_BYTES = 1 << 18
#: The windows of all connections with peers that are not far, together. The socket of passt holds
#: so much at once where Linux has its defaults (net.core.wmem_max).
WINDOWS_BYTES = 1 << 18
#: The least of one.
WINDOW_BYTES_MIN = 1 << 13
#: How long a connection that says nothing has its share of them.
SHARED_S = 1.0
#: A peer is far when it takes longer to answer; a busy host takes some of it itself.
FAR_S = 0.05
#: What the window for a far peer lets come.
BYTES_PER_S = 50_000_000
#: Longer than what is on its way takes to arrive, shorter than passt's own patience of 2 s.
REPEAT_S = 0.1
#: A few windows of far peers.
BACKLOG_BYTES = 1 << 22
#: How many connections are known at once; the window of others is left as it is.
CONNECTIONS_MAX = 1024
#: Far from what one read of passt takes, and so seldom that it costs nothing.
MARK_BYTES = 1 << 20
#: How often to look whether a mark has been read: no event tells of an empty send queue.
_LOOK_S = 0.0001

#: What changes the last word of the command line.
SIGNALS = {"none": signal.SIGUSR1, "all": signal.SIGUSR2}

_ARP = b"\x08\x06"
_IPV4 = b"\x08\x00"
_LOOPBACK = 127
#: Clouds hand out a host's credentials at 169.254.169.254, to whoever asks from that host.
_LINK_LOCAL = b"\xa9\xfe"
_FIRST_MULTICAST = 224

# Protocols of IPv4.
_ICMP = 1
_TCP = 6
_UDP = 17

#: Of ICMP errors: "communication administratively prohibited" (RFC 1812, 5.2.7.1), which Linux
#: gives programs as EHOSTUNREACH. They have the packet's header with 8 bytes more.
_PROHIBITED = b"\x03\x0d"
_QUOTED_BYTES = 8
_ECHO_REQUEST = 8

# TCP (RFC 9293, 3.1): bits of the flags, and kinds of options.
_TCP_BYTES = 20
_SYN = 0x02
_ACK = 0x10
_OPTION_END = 0
_OPTION_NOTHING = 1
_OPTION_WINDOW_SCALE = 3
_WINDOW_SCALE_MAX = 14  # RFC 7323, 2.3


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


class _Connection:
    """What the guest last said of a connection. Windows are in units of 2 ** scale bytes."""

    __slots__ = ("acknowledged", "far", "opened_at", "repeat_at", "scale", "told", "window")

    def __init__(self, scale: int, opened_at: float) -> None:
        self.scale = scale
        self.opened_at = opened_at
        #: The window that a far peer needs, in bytes; 0 for another's, None before it has answered.
        self.far: int | None = None
        self.acknowledged = b""
        self.window = -1
        #: What passt was told instead.
        self.told = -1
        self.repeat_at = 0.0

    def answered(self, now: float) -> None:
        """passt answers a SYN when the peer has: how far that is, is known then."""
        away = now - self.opened_at
        self.far = int(away * BYTES_PER_S) if away > FAR_S else 0

    def repeats(self, now: float) -> bool:
        """Whether a repetition may go on. It tells of a loss, thus of too large a window."""
        self.far = 0
        if now < self.repeat_at:
            return False
        self.repeat_at = now + REPEAT_S
        return True


class Pace:
    """Keeps passt from sending more to the guest than finds room (see above).

    It knows a connection by its SYN, and forgets those that were not used for longest. Times are
    in seconds of time.monotonic.
    """

    def __init__(self) -> None:
        self._connections: OrderedDict[bytes, _Connection] = OrderedDict()
        self._sharing: set[bytes] = set()
        self._shared_before = 0
        self._shared_until = 0.0

    def paced(self, frame: bytes, now: float) -> bytes:
        """A frame that passes, with its length before it, as it may go on; or nothing.

        What is no whole segment of TCP stays as it is.
        """
        start = _LENGTH_BYTES + _ETHERNET_BYTES
        if frame[start - 2 : start] != _IPV4 or frame[start + 9] != _TCP:
            return frame
        tcp = start + (frame[start] & 0x0F) * 4
        fragment = int.from_bytes(frame[start + 6 : start + 8], "big") & 0x3FFF
        if fragment or tcp < start + _IPV4_BYTES or len(frame) < tcp + _TCP_BYTES:
            return frame
        # Ports and the other address; the guest's own is always the same.
        key = frame[tcp : tcp + 4] + frame[start + 16 : start + 20]
        payload = tcp + (frame[tcp + 12] >> 4) * 4
        flags = frame[tcp + 13]
        if flags & _SYN:
            self._open(key, _window_scale(frame[tcp + _TCP_BYTES : payload]), now)
            return frame
        connection = self._connections.get(key)
        if connection is None:
            return frame
        self._connections.move_to_end(key)
        if connection.far is None:
            connection.answered(now)
        window = int.from_bytes(frame[tcp + 14 : tcp + 16], "big")
        widest = (connection.far or self._share(key, now)) >> connection.scale
        told = min(window, max(widest, 1))
        acknowledged = frame[tcp + 8 : tcp + 12]
        end = start + int.from_bytes(frame[start + 2 : start + 4], "big")
        pure = flags == _ACK and end == payload
        repeated = pure and (acknowledged, told) == (connection.acknowledged, connection.told)
        # Where the window that the guest means has changed, it is no repetition, and tells nothing.
        if repeated and not (window == connection.window and connection.repeats(now)):
            connection.window = window
            return b""
        connection.acknowledged = acknowledged
        connection.window = window
        connection.told = told
        return _with_window(frame, tcp, told)

    def _open(self, key: bytes, scale: int, now: float) -> None:
        self._connections[key] = _Connection(scale, now)
        self._connections.move_to_end(key)
        if len(self._connections) > CONNECTIONS_MAX:
            self._connections.popitem(last=False)

    def _share(self, key: bytes, now: float) -> int:
        """What a connection has of all windows, by how many there are now or were just before."""
        if now >= self._shared_until:
            self._shared_before = len(self._sharing)
            self._sharing.clear()
            self._shared_until = now + SHARED_S
        if len(self._sharing) < CONNECTIONS_MAX:
            self._sharing.add(key)
        return max(WINDOWS_BYTES // max(self._shared_before, len(self._sharing)), WINDOW_BYTES_MIN)


def _window_scale(options: bytes) -> int:
    """By how many bits the windows of a connection are shifted, as its SYN has it (RFC 7323)."""
    position = 0
    while position + 2 < len(options) and options[position] != _OPTION_END:
        if options[position] == _OPTION_NOTHING:
            position += 1
        elif options[position] == _OPTION_WINDOW_SCALE:
            return min(options[position + 2], _WINDOW_SCALE_MAX)
        else:
            position += max(options[position + 1], 2)
    return 0


def _with_window(frame: bytes, tcp: int, told: int) -> bytes:
    """A frame whose segment of TCP begins at `tcp`, with the window `told`."""
    window = int.from_bytes(frame[tcp + 14 : tcp + 16], "big")
    if window == told:
        return frame
    # RFC 1624, equation 3: the checksum of what differs by one word.
    checksum = int.from_bytes(frame[tcp + 16 : tcp + 18], "big")
    total = (checksum ^ 0xFFFF) + (window ^ 0xFFFF) + told
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    words = told.to_bytes(2, "big") + (total ^ 0xFFFF).to_bytes(2, "big")
    return frame[: tcp + 14] + words + frame[tcp + 18 :]


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


class Gate:
    """Whether more than ARP goes on of a guest's, and where to not."""

    def __init__(self, guest: str, egress: str, network: str) -> None:
        self.guest = socket.inet_aton(guest)
        self._open = egress == "all"
        address, _, length = network.partition("/")
        self._shift = 32 - int(length)
        self._kept_from = int.from_bytes(socket.inet_aton(address), "big") >> self._shift

    def listen(self) -> None:
        """Be changed by signals. They interrupt no call of ours (PEP 475)."""
        for egress, number in SIGNALS.items():
            signal.signal(number, lambda *_, egress=egress: self.set(egress))

    def set(self, egress: str) -> None:
        self._open = egress == "all"

    def passes(self, frame: bytes) -> bool:
        """Of a frame that may pass, with its length before it."""
        start = _LENGTH_BYTES + _ETHERNET_BYTES
        if frame[start - 2 : start] == _ARP:
            return True
        destination = int.from_bytes(frame[start + 16 : start + 20], "big")
        return self._open and destination >> self._shift != self._kept_from


class Gateway:
    """Who tells the guest that something did not go on."""

    def __init__(self, address: str, mac: str) -> None:
        self._address = socket.inet_aton(address)
        self._mac = bytes.fromhex(mac.replace(":", ""))

    def refusal(self, frame: bytes) -> bytes:
        """The answer to a frame of IPv4, both with their length before them.

        Empty where none is due (RFC 1122, 3.2.2): to errors, and to all but the first fragment.
        """
        start = _LENGTH_BYTES + _ETHERNET_BYTES
        header_bytes = (frame[start] & 0x0F) * 4
        quoted = frame[start : start + header_bytes + _QUOTED_BYTES]
        if header_bytes < _IPV4_BYTES or len(quoted) < header_bytes + _QUOTED_BYTES:
            return b""
        asks = frame[start + 9] == _ICMP and quoted[header_bytes] == _ECHO_REQUEST
        is_later = int.from_bytes(frame[start + 6 : start + 8], "big") & 0x1FFF
        if is_later or not (asks or frame[start + 9] in (_TCP, _UDP)):
            return b""
        error = _with_checksum(_PROHIBITED + bytes(6) + quoted, 2)
        total = (_IPV4_BYTES + len(error)).to_bytes(2, "big")
        header = b"\x45\0" + total + bytes(4) + bytes((64, _ICMP)) + bytes(2)
        packet = _with_checksum(header + self._address + frame[start + 12 : start + 16], 10) + error
        guest_mac = frame[_LENGTH_BYTES + 6 : _LENGTH_BYTES + 12]
        answer = guest_mac + self._mac + _IPV4 + packet
        return len(answer).to_bytes(_LENGTH_BYTES, "big") + answer


def _with_checksum(data: bytes, position: int) -> bytes:
    """`data`, whole words, with the Internet checksum (RFC 1071) of all of it in place of zeros."""
    total = sum(int.from_bytes(data[at : at + 2], "big") for at in range(0, len(data), 2))
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    return data[:position] + (total ^ 0xFFFF).to_bytes(2, "big") + data[position + 2 :]


def from_guest(
    hypervisor: socket.socket,
    outlet: Outlet,
    gate: Gate,
    refuse: Callable[[bytes], None],
) -> None:
    """Pass on what may pass until the hypervisor's side ends; `refuse` what only the gate keeps.

    Blocks; holds one read at most.
    """
    pace = Pace()
    pending = b""
    while data := hypervisor.recv(_READ_BYTES):
        pending += data
        kept, done = sift(pending, gate.guest)
        pending = pending[done:]
        now = time.monotonic()
        for frame in kept:
            if not gate.passes(frame):
                refuse(frame)
            elif paced := pace.paced(frame, now):
                outlet.send(paced)


class Backlog:
    """What passt has sent and the hypervisor has not taken.

    It is bounded, for a guest may take nothing. When it is full, passt is not read.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._held = bytearray()

    def offer(self, frame: bytes) -> None:
        """Put it where there is room: a guest that takes nothing must not hold up what it sends."""
        with self._changed:
            if len(self._held) < BACKLOG_BYTES:
                self._held += frame
                self._changed.notify_all()

    def put(self, data: bytes) -> None:
        """Whole frames, for others come between. Blocks while it is full."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._held) < BACKLOG_BYTES)
            self._held += data
            self._changed.notify_all()

    def take(self) -> bytearray:
        """All of it. Blocks while there is nothing."""
        with self._changed:
            self._changed.wait_for(lambda: self._held)
            held, self._held = self._held, bytearray()
            self._changed.notify_all()
        return held


def from_passt(passt: socket.socket, backlog: Backlog) -> None:
    """Take everything until passt's side ends. Blocks."""
    pending = b""
    while data := passt.recv(_READ_BYTES):
        pending += data
        if end := whole_frames(pending):
            backlog.put(pending[:end])
            pending = pending[end:]


def whole_frames(data: bytes) -> int:
    """How many bytes of a stream, which begins with a frame, are whole frames. Raises BadStream."""
    end = 0
    while len(data) - end >= _LENGTH_BYTES:
        length = int.from_bytes(data[end : end + _LENGTH_BYTES], "big")
        if length > LENGTH_MAX:
            raise BadStream(f"frame of {length} bytes")
        if end + _LENGTH_BYTES + length > len(data):
            break
        end += _LENGTH_BYTES + length
    return end


def to_guest(backlog: Backlog, hypervisor: socket.socket) -> None:
    """Pass on everything, for good. Blocks."""
    while True:
        hypervisor.sendall(backlog.take())


def main(argv: list[str]) -> None:
    """Relay until one side is gone; then end the process, and with it the other side."""
    hypervisor = socket.socket(fileno=int(argv[3]))
    passt = socket.socket(fileno=int(argv[4]))
    gate = Gate(argv[2], argv[5], argv[6])
    gate.listen()
    gateway = Gateway(argv[7], argv[8])

    backlog = Backlog()

    def refuse(frame: bytes) -> None:
        backlog.offer(gateway.refusal(frame))

    def relay(target: Callable[..., None], *args: object) -> None:
        try:
            target(*args)
        except (OSError, BadStream):
            pass  # the other side is gone, or as good as gone: the end all the same
        finally:
            # The main thread sits in recv; only the end of the process stops it.
            os._exit(0)

    for relayed in ((from_passt, passt, backlog), (to_guest, backlog, hypervisor)):
        threading.Thread(target=relay, args=relayed, daemon=True).start()
    try:
        from_guest(hypervisor, Outlet(passt, os.open(os.devnull, os.O_RDONLY)), gate, refuse)
    except BadStream as error:
        print(f"network ended: the hypervisor sent a {error}", file=sys.stderr)  # noqa: T201
    except OSError:
        pass
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv)
