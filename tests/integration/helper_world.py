"""A helper of the product's own in a network namespace of its own, beside what is not banger's."""

from __future__ import annotations

import json
import os
import pwd
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

#: Of each worker another (`-n 2`): loop devices are of the whole host, and known by their owner.
OWNER = "bin" if os.environ.get("PYTEST_XDIST_WORKER") == "gw1" else "daemon"
OWNER_UID = pwd.getpwnam(OWNER).pw_uid
HELPER = Path(sys.executable).parent / "banger-helper"
START_S = 30.0

#: What belongs to somebody else; some of it has names like ours.
FOREIGN_RULES = """
table inet filter {
    set hosts {
        type ipv4_addr
        elements = { 10.9.9.9 }
    }
    chain input {
        type filter hook input priority filter; policy accept;
        ip saddr @hosts tcp dport 22 accept
    }
}
table bridge br0 {
    chain forward {
        type filter hook forward priority filter; policy accept;
    }
}
table inet banger-not {
}
"""
FOREIGN_LINKS = (
    ("br0", "type", "bridge"),
    ("banger7", "type", "veth", "peer", "name", "other"),
    ("banger8", "type", "bridge"),
    ("banger-names", "type", "bridge"),
)
#: A foreign network, which no bridge of ours may have.
FOREIGN_ADDRESS = "10.44.0.1/24"

#: What somebody might put in the place of a name, an address or a number.
JUNK = st.one_of(
    st.sampled_from(
        (
            *("", "-", "--help", "-f", "..", "../../etc", "/etc/passwd", "banger1/../br0"),
            *("banger1\0", "banger1\n", "banger1;", 'banger1"', "banger-", "BANGER1", "banger100"),
            *("banger\uff11", "br0", "eth0", "lo", "inet filter", "banger1 }", "$(id)", "`id`"),
            *("loop0", "loop01", "a" * 300, "\udcff", "@x", "#", "::1", "1", "10.0.0.1\n"),
            *("0.0.0.0/0", "127.0.0.1", "10.0.0.01", "224.0.0.1"),
        )
    ),
    st.text(max_size=40),
)


@dataclass(frozen=True)
class World:
    """Where a helper runs: its namespace, its files, its process."""

    namespace: str
    directory: Path
    process: subprocess.Popen[bytes]

    @property
    def socket(self) -> Path:
        return self.directory / "run" / "helper.sock"

    def inside(self, *argv: str, stdin: str = "") -> str:
        """What a tool says in the namespace."""
        return inside(self.namespace, *argv, stdin=stdin)

    def records(self, message: str = "") -> list[dict[str, Any]]:
        """The helper's log: of these messages, or all of it."""
        lines = (self.directory / "log").read_text().splitlines()
        found: list[dict[str, Any]] = [json.loads(line) for line in lines]
        return [each for each in found if message in each["message"]]

    def network(self) -> dict[str, Any]:
        """All that a helper could change in the namespace."""
        links = json.loads(self.inside("ip", "-j", "-d", "address"))
        return {
            "rules": self.inside("nft", "list", "ruleset"),
            "links": [_lasting(link) for link in links],
            "routes": self.inside("ip", "route", "show", "table", "all"),
            "forward": self.inside("cat", "/proc/sys/net/ipv4/ip_forward"),
            "mounts": self._mounts(),
        }

    def _mounts(self) -> list[str]:
        """What the helper sees, without the small file systems and the namespaces of tests that
        run beside."""
        mounts = Path(f"/proc/{self.process.pid}/mounts").read_text().splitlines()
        others = re.compile(r" (/run/netns|/tmp/bt-\w+|/tmp/pytest-of-\w+)/")
        return [each for each in mounts if str(self.directory) in each or not others.search(each)]

    def descriptors(self) -> list[str]:
        """What the helper has open."""
        found = []
        for each in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                found.append(str(each.readlink()))
        return sorted(found)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=START_S)


def _lasting(link: dict[str, Any]) -> dict[str, Any]:
    """What of a link does not change by itself, as a bridge's timers do."""
    data = link.get("linkinfo", {}).get("info_data", {})
    for key in [key for key in data if key.endswith("timer")]:
        del data[key]
    return link


def inside(namespace: str, *argv: str, stdin: str = "") -> str:
    return subprocess.run(
        ["ip", "netns", "exec", namespace, *argv],
        input=stdin,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout


@contextmanager
def network_namespace() -> Iterator[str]:
    name = f"bt-{secrets.token_hex(4)}"
    subprocess.run(["ip", "netns", "add", name], check=True, timeout=60)
    try:
        yield name
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True, timeout=60)


@contextmanager
def foreign_things(namespace: str) -> Iterator[None]:
    """In the namespace, for as long as that lives: rules and interfaces of somebody else's."""
    for name, *kind in FOREIGN_LINKS:
        inside(namespace, "ip", "link", "add", name, *kind)
    # On lo, which is up at once: other links say later that nobody is there.
    inside(namespace, "ip", "address", "add", FOREIGN_ADDRESS, "dev", "lo")
    inside(namespace, "ip", "link", "set", "lo", "up")
    inside(namespace, "nft", "-f", "-", stdin=FOREIGN_RULES)
    yield


def write_installation(path: Path, *, uid: int = OWNER_UID, owner: str = OWNER) -> Path:
    path.write_text(f'owner = "{owner}"\nowner_uid = {uid}\nversion = "0.1.0"\n')
    path.chmod(0o644)
    return path


@contextmanager
def helper_world() -> Iterator[World]:
    """A helper for OWNER, ready, with foreign things around it."""
    with ExitStack() as stack:
        # Where the owner gets to; in /tmp for a short path of the socket.
        directory = Path(tempfile.mkdtemp(prefix="bt-", dir="/tmp"))
        stack.callback(shutil.rmtree, directory)
        directory.chmod(0o755)
        namespace = stack.enter_context(network_namespace())
        stack.enter_context(foreign_things(namespace))
        yield stack.enter_context(running_helper(namespace, directory))


@contextmanager
def running_helper(namespace: str, directory: Path) -> Iterator[World]:
    install = write_installation(directory / "install.toml")
    socket = directory / "run" / "helper.sock"
    argv: list[str | Path] = ["ip", "netns", "exec", namespace]
    # With mounts of its own: others on this machine come and go.
    argv += ["unshare", "--mount", "--propagation", "private"]
    argv += [HELPER, "--socket", socket, "--install-file", install]
    with open(directory / "log", "ab") as log:
        already = log.tell()
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=log)
    try:
        wait_ready(directory / "log", process, already)
        yield World(namespace, directory, process)
    finally:
        process.kill()
        process.wait()


def wait_ready(log: Path, process: subprocess.Popen[bytes], already: int = 0) -> None:
    """Until its log says so, after what it had `already`, in bytes."""
    argv = ["tail", "-c", f"+{already + 1}", f"--pid={process.pid}", "-F", str(log)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as follower:
        assert follower.stdout is not None
        try:
            for line in follower.stdout:
                if b"helper ready" in line:
                    return
                assert b"helper failed" not in line, line
        finally:
            follower.kill()
    raise AssertionError(f"the helper ended: {process.poll()}")
