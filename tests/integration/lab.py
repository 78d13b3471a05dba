"""A host of its own, and a world for it to reach: two network namespaces, joined by a cable.

``host`` has an uplink and a default route; ``world`` answers at `WORLD`, `ELSEWHERE` and `PUBLIC`,
and has a name server at `WORLD` while `names` says so. What banger does to a host is done there,
beside things of somebody else's (a bridge, a table) that must stay as they are.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dnslib import QTYPE, DNSQuestion, DNSRecord
from dnslib.server import DNSLogger, DNSServer
from dnslib.zoneresolver import ZoneResolver

from homes import Home
from product import Banger
from suite import JAILED_VARIABLE

#: ip-netns(8) has a new /sys there, without the control groups that jails take.
_MOUNT_GROUPS = 'mountpoint -q /sys/fs/cgroup || mount -t cgroup2 none /sys/fs/cgroup; exec "$@"'

#: RFC 2544's range for such networks.
UPLINK = "198.18.0.2"
WORLD = "198.18.0.1"
ELSEWHERE = "198.18.1.1"
#: One that any program takes for an address of the Internet. Nothing leaves the namespaces.
PUBLIC = "11.0.0.1"

_CLONE_NEWNET = 0x40000000
_FOREIGN_TABLE = """
table inet filter {
    set somebody {
        type ipv4_addr
        elements = { 192.0.2.1 }
    }
    chain forward {
        type filter hook forward priority filter; policy accept;
        ip saddr @somebody drop
    }
}
"""


@dataclass(frozen=True)
class Lab:
    host: str
    world: str

    def argv(self, namespace: str, *words: str) -> list[str]:
        return ["ip", "netns", "exec", namespace, *words]

    def run(self, namespace: str, *words: str, stdin: str = "") -> str:
        """The output of a command there, which must succeed."""
        argv = self.argv(namespace, *words)
        done = subprocess.run(argv, input=stdin, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, (words, done.stderr)
        return done.stdout

    @contextmanager
    def inside(self, namespace: str) -> Iterator[None]:
        """This thread is there, with all threads and processes that it starts meanwhile."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        there = os.open(f"/run/netns/{namespace}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _enter(there)
            try:
                yield
            finally:
                _enter(before)
        finally:
            os.close(there)
            os.close(before)

    def state(self) -> dict[str, Any]:
        """What a bridge of banger's changes of the host, and must give back."""
        links = json.loads(self.run(self.host, "ip", "-json", "link"))
        return {
            "links": sorted(each["ifname"] for each in links),
            "rules": self.run(self.host, "nft", "list", "ruleset"),
            "routes": self.run(self.host, "ip", "route"),
            "forward": self.run(self.host, "cat", "/proc/sys/net/ipv4/ip_forward"),
        }


class _Resolver(ZoneResolver):  # type: ignore[misc]
    """As resolvers do, it follows aliases to their end."""

    def resolve(self, request: Any, handler: Any) -> Any:
        reply = super().resolve(request, handler)
        while reply.rr and reply.rr[-1].rtype == QTYPE.CNAME != request.q.qtype:
            asked = DNSRecord(q=DNSQuestion(str(reply.rr[-1].rdata.label), request.q.qtype))
            found = super().resolve(asked, handler).rr
            if not found:
                break
            reply.add_answer(*found)
        return reply


@contextmanager
def names(lab: Lab, zone: str) -> Iterator[None]:
    """A name server out there that knows this zone, and that the host asks: see ip-netns(8)."""
    own = Path("/etc/netns", lab.host)
    own.mkdir(parents=True)
    try:
        (own / "resolv.conf").write_text(f"nameserver {WORLD}\n")
        with lab.inside(lab.world):
            servers = [
                DNSServer(_Resolver(zone), address=WORLD, tcp=tcp, logger=DNSLogger("-request"))
                for tcp in (False, True)
            ]
        threads = [threading.Thread(target=each.server.serve_forever) for each in servers]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            for server, thread in zip(servers, threads, strict=True):
                server.server.shutdown()
                server.server.server_close()
                thread.join()
    finally:
        shutil.rmtree(own)


@contextmanager
def lab(name: str) -> Iterator[Lab]:
    """Make one; `name` is short and this test's own. Nothing of it is left."""
    made = Lab(host=f"{name}-host", world=f"{name}-world")
    with ExitStack() as stack:
        for namespace in (made.host, made.world):
            subprocess.run(["ip", "netns", "add", namespace], check=True)
            stack.callback(subprocess.run, ["ip", "netns", "del", namespace], check=True)
            made.run(namespace, "ip", "link", "set", "lo", "up")
        cable = ("type", "veth", "peer", "name", "uplink", "netns", made.host)
        made.run(made.world, "ip", "link", "add", "cable", *cable)
        for namespace, link, addresses in (
            (made.host, "uplink", (UPLINK,)),
            (made.world, "cable", (WORLD, ELSEWHERE, PUBLIC)),
        ):
            for address in addresses:
                made.run(namespace, "ip", "addr", "add", f"{address}/24", "dev", link)
            made.run(namespace, "ip", "link", "set", link, "up")
        made.run(made.host, "ip", "route", "add", "default", "via", WORLD)
        made.run(made.host, "ip", "link", "add", "br0", "type", "bridge")
        made.run(made.host, "nft", "-f", "-", stdin=_FOREIGN_TABLE)
        yield made


def _enter(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


@dataclass(frozen=True)
class HostedBanger(Banger):
    """The command `banger` on the host of a lab, and with it its daemon and machines."""

    namespace: str = ""

    def argv(self, *words: str | Path) -> list[str]:
        with_groups = ["sh", "-c", _MOUNT_GROUPS, "sh"] if JAILED_VARIABLE in os.environ else []
        return ["ip", "netns", "exec", self.namespace, *with_groups, *super().argv(*words)]


@dataclass(frozen=True)
class HostedHome(Home):
    namespace: str

    @property
    def banger(self) -> Banger:
        return HostedBanger(super().banger.environment, namespace=self.namespace)
