"""Rootless networking: passt beside each VM, behind a filter of frames.

passt makes ordinary sockets of the host out of the guest's packets, so it needs no privileges; as
root it becomes ``nobody``. `frame_filter` says why it does not see what the guest sends before
that filter does. The three processes are joined by two pairs of connected sockets without any
name: hypervisor - filter - passt. When one of them ends, however it ends, so do the two network
processes, and so they do when the daemon dies before the hypervisor has its end.

The guest's addresses are the same in every VM: each has a network to itself. There is no IPv6:
passt lets a guest reach by it what it keeps it from by IPv4 (the host's link-local addresses), and
what it offers depends on the host's address of the day. On a host without a default route passt
is given the loopback as its interface, for it would not start; such a guest gets TCP, but no UDP
and so no names, once the host has a network: passt binds its UDP sockets to that interface.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import socket
import struct
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from ipaddress import IPv4Network
from pathlib import Path

from banger.base import proc, procfs
from banger.base.errors import PreconditionFailed, Unavailable
from banger.base.model import Egress, Reach
from banger.drivers.base import (
    Check,
    GuestNetwork,
    Level,
    Link,
    NetworkAttachment,
    Plug,
    Plugged,
)
from banger.drivers.network import frame_filter
from banger.drivers.network.mac import UNPLUGGED_MAC, mac_address

PASST = "passt"

GUEST_ADDRESS = "172.16.0.2"
PREFIX_LENGTH = 24
GATEWAY = "172.16.0.1"
#: passt forwards UDP to port 53 of this address to the host's own resolver.
DNS = "172.16.0.3"
#: The gateway's: given, because passt would take the MAC of an uplink that may not be there.
GATEWAY_MAC = "02:62:67:00:00:01"

_NOWHERE = IPv4Network("0.0.0.0/32")

_ROUTES = Path("/proc/net/route")
_ROUTE_UP = 0x1  # RTF_UP
_START_TIMEOUT_S = 10.0
_LOG_TAIL_CHARACTERS = 1000
#: How far passt may be ahead of the filter: beyond it, passt drops frames. Linux gives an ordinary
#: user less, twice net.core.wmem_max, which is 425984 bytes by default.
_SEND_BUFFER_BYTES = 1 << 20


class PasstNetwork:
    """Implements `drivers.base.Network`."""

    name = "user"
    link = Link.STREAM
    guests: IPv4Network | None = None

    async def checks(self) -> list[Check]:
        path = proc.which(PASST)
        if path is None:
            error = proc.missing_tool(PASST)
            return [Check("network user", Level.FAIL, error.message, error.hint)]
        return [Check("network user", Level.OK, f"{path}, without the host's loopback")]

    def __init__(self, kept_from: IPv4Network) -> None:
        """``kept_from`` is a network of this host's that guests do not reach: where passt's sockets
        are the host's own, and those of machines on a bridge are nobody's else."""
        self._kept_from = kept_from
        #: What the filters of machines that this daemon knows let go on.
        self._egress: dict[str, Egress] = {}

    def refusal(self, reach: Reach) -> Check | None:
        """Each machine has a network to itself, and a filter that knows all and nothing."""
        if reach.egress is Egress.ALLOWLIST:
            what = "user networking cannot hold a machine to what is allowed"
            hint = "use --network bridge, or --egress none"
        elif not reach.isolated:
            what = "machines in user networking cannot reach each other"
            hint = "use --network bridge, or publish ports of the one for the other"
        else:
            return None
        return Check("network user", Level.FAIL, what, hint)

    async def resume(self, machines: Sequence[Plugged]) -> None:
        """See `Network.resume`. Their processes have gone on without a daemon, which may have died
        before it had changed what its record says."""
        for machine in machines:
            self._change(machine)

    async def apply(self, machine: Plugged) -> None:
        """See `Network.apply`. Raises PreconditionFailed for what `refusal` refuses."""
        if (refused := self.refusal(machine.reach)) is not None:
            raise PreconditionFailed(refused.detail, hint=refused.hint)
        egress = machine.reach.egress
        if self._egress.get(machine.vm_id, Egress.ALL) is egress:
            return  # as it was started: a filter that has just begun would not outlive a signal
        if not self._change(machine):
            raise PreconditionFailed(
                "its network was started by another version of banger, which cannot change it",
                hint="restart the VM, then change what it may reach",
            )

    def _change(self, machine: Plugged) -> bool:
        """Tell the filter what it is to let go on; whether there is one that understands."""
        open_ = machine.reach.egress is Egress.ALL
        number = frame_filter.SIGNALS["all" if open_ else "none"]
        told = [_signalled(pid, machine.vm_id, number) for pid in machine.pids]
        if any(told):
            self._egress[machine.vm_id] = machine.reach.egress
        return any(told)

    async def detach(self, vm_id: str) -> None:
        """See `Network.detach`."""
        self._egress.pop(vm_id, None)

    async def close(self) -> None:
        """See `Network.close`."""

    async def attach(self, plug: Plug) -> NetworkAttachment:
        """See `Network.attach`. When the filter ends, so does passt, unless it spins. Both end by
        themselves when the machine does.

        Takes as long as passt needs to start, 10 to 15 ms. Raises PreconditionFailed when passt is
        not installed, Unavailable (with the end of its log) when it does not serve.
        """
        vm_id, log = plug.vm_id, plug.log
        mac = mac_address(vm_id)
        # Close-on-exec all of them: each process gets the ends it is told of, and no other.
        hypervisor, outer = socket.socketpair()
        inner, passt = socket.socketpair()
        passt.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        try:
            with outer, inner:
                with passt:
                    argv = passt_argv(passt.fileno(), log, uplink=has_default_route(_ROUTES))
                    fds = [passt.fileno()]
                    env = proc.BARE_ENVIRONMENT
                    server = proc.spawn_detached(argv, log=log, pass_fds=fds, env=env)
                    proc.watch(server)
                await _serves(inner, mac, log)
                fds = [outer.fileno(), inner.fileno()]
                egress = plug.reach.egress
                argv = filter_argv(vm_id, fds[0], fds[1], egress, self._kept_from)
                sifter = proc.spawn_detached(argv, log=log, pass_fds=fds, env=env)
        except BaseException:
            hypervisor.close()
            raise
        proc.watch(sifter)
        self._egress[vm_id] = egress
        pids = (sifter.pid, server.pid)
        return NetworkAttachment(_guest(mac), self.link, fd=hypervisor.detach(), pids=pids)

    @asynccontextmanager
    async def unplugged(self) -> AsyncIterator[NetworkAttachment]:
        """See `Network.unplugged`. Whoever launches closes the descriptor, as that of `attach`."""
        hypervisor, nowhere = socket.socketpair()
        with nowhere:
            yield NetworkAttachment(_guest(UNPLUGGED_MAC), self.link, fd=hypervisor.detach())

    def owns(self, argv: tuple[str, ...], vm_id: str) -> bool:
        return _is_filter_of(argv, vm_id) or _is_passt_of(argv, vm_id)


def _guest(mac: str) -> GuestNetwork:
    return GuestNetwork(mac, f"{GUEST_ADDRESS}/{PREFIX_LENGTH}", GATEWAY, DNS)


def _is_filter_of(argv: tuple[str, ...], vm_id: str) -> bool:
    """Of whichever version: see `filter_argv`."""
    program = Path(frame_filter.__file__).name
    return len(argv) >= 8 and Path(argv[3]).name == program and argv[4] == vm_id


def _signalled(pid: int, vm_id: str, number: signal.Signals) -> bool:
    """Whether the process was a filter of this VM's that knows the signal, and has got it. One of
    an earlier version would die of it."""
    words = len(filter_argv(vm_id, 0, 0, Egress.ALL, _NOWHERE))
    pidfd = procfs.open_pidfd(
        pid, lambda each: _is_filter_of(each.argv, vm_id) and len(each.argv) == words
    )
    if pidfd < 0:
        return False
    try:
        signal.pidfd_send_signal(pidfd, number)
    finally:
        os.close(pidfd)
    return True


def _is_passt_of(argv: tuple[str, ...], vm_id: str) -> bool:
    """passt is told apart by its log, which lies in the VM's directory."""
    if not argv or Path(argv[0]).name.partition(".")[0] != PASST:  # passt.avx2 runs where it can
        return False
    return any(
        option == "--log-file" and Path(value).parent.name == vm_id
        for option, value in itertools.pairwise(argv)
    )


async def _serves(inner: socket.socket, mac: str, log: Path) -> None:
    """Wait until passt, at the other end, answers for the gateway; raise Unavailable otherwise."""
    inner.setblocking(False)
    try:
        async with asyncio.timeout(_START_TIMEOUT_S):
            await asyncio.get_running_loop().sock_sendall(inner, gateway_question(mac))
            # All of the answer, or the filter would take its rest for the beginning of a frame.
            await _receive(inner, int.from_bytes(await _receive(inner, 4), "big"))
    except (TimeoutError, OSError) as error:
        raise Unavailable(f"passt does not start: {_tail(log)}; inspect {log}") from error
    # The filter inherits the open file, and with it this flag.
    inner.setblocking(True)


async def _receive(source: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = await asyncio.get_running_loop().sock_recv(source, count - len(data))
        if not more:
            raise ConnectionResetError("the other end is closed")
        data += more
    return data


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-_LOG_TAIL_CHARACTERS:].strip()


def gateway_question(mac: str) -> bytes:
    """An ARP request (RFC 826) of the guest for its gateway, in a frame, after its length."""
    sender = bytes.fromhex(mac.replace(":", ""))
    frame = b"".join(
        (
            b"\xff" * 6 + sender + b"\x08\x06",
            struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1),
            sender + socket.inet_aton(GUEST_ADDRESS),
            bytes(6) + socket.inet_aton(GATEWAY),
        )
    )
    return struct.pack("!I", len(frame)) + frame


def has_default_route(routes: Path) -> bool:
    """Whether /proc/net/route (proc_net(5)) has a route to anywhere: mask 0, up, no reject."""
    for line in routes.read_text().splitlines()[1:]:
        fields = line.split()
        if fields[1] == fields[7] == "00000000" and int(fields[3], 16) & _ROUTE_UP:
            return True
    return False


def passt_argv(fd: int, log: Path, *, uplink: bool) -> list[str]:
    """passt on a connected socket. It opens `log` before it gives up its privileges."""
    return [
        PASST,
        *("--fd", str(fd), "--foreground", "--quiet", "--log-file", str(log)),
        *("--ipv4-only", "--mac-addr", GATEWAY_MAC),
        *(() if uplink else ("--interface", "lo")),
        *("--address", GUEST_ADDRESS, "--netmask", str(PREFIX_LENGTH), "--gateway", GATEWAY),
        *("--no-map-gw", "--dns-forward", DNS),
        # The guest's interface is set by the agent.
        *("--no-dhcp", "--no-dhcpv6", "--no-ndp", "--no-ra"),
        *("--tcp-ports", "none", "--udp-ports", "none"),
    ]


def filter_argv(
    vm_id: str, outer_fd: int, inner_fd: int, egress: Egress, kept_from: IPv4Network
) -> list[str]:
    """The frame filter: by file name and isolated, so that it imports nothing else of ours.

    What it lets through at first is in it, and no longer true once `apply` was called.
    """
    program = os.fspath(Path(frame_filter.__file__).absolute())
    fds = (str(outer_fd), str(inner_fd))
    gateway = (GATEWAY, GATEWAY_MAC)
    words = (vm_id, GUEST_ADDRESS, *fds, egress.value, str(kept_from), *gateway)
    return [sys.executable, "-I", "-S", program, *words]
