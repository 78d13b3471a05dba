"""The helper as it is installed: its process, what it does for its owner, and how it ends."""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import pytest

from banger.base.errors import Conflict, PermissionDenied, PreconditionFailed
from banger.base.opid import current_op_id
from banger.hostops.client import HelperHost
from banger.hostops.ops import (
    AllowResolved,
    Bridge,
    BridgeDown,
    BridgeUp,
    Guest,
    OpenTap,
    SetGuests,
    UnmapSnapshot,
)
from helper_world import (
    HELPER,
    OWNER_UID,
    START_S,
    World,
    helper_world,
    network_namespace,
    running_helper,
    wait_ready,
    write_installation,
)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="run the tests as root for the helper")

BRIDGE = Bridge(name="banger1", address="172.30.0.1/24")
RESOLVER_PORT = 5353
FAMILIES = ("bridge", "inet")


@pytest.fixture
def world() -> Iterator[World]:
    with helper_world() as made:
        yield made


@asynccontextmanager
async def bridge(host: HelperHost) -> AsyncIterator[Bridge]:
    await host.perform(BridgeUp(bridge=BRIDGE, resolver_port=RESOLVER_PORT))
    yield BRIDGE
    await host.perform(BridgeDown(bridge=BRIDGE.name))


def guest(tap: str, number: int = 2) -> Guest:
    return Guest(
        tap=tap,
        mac=f"02:62:67:01:00:{number:02x}",
        address=f"172.30.0.{number}",
        allow=("192.0.2.0/24", "198.51.100.7/32"),
    )


def chain_rules(world: World) -> list[str]:
    """The rules of our tables, without what their sets hold."""
    return [world.inside("nft", "-t", "list", "table", each, BRIDGE.name) for each in FAMILIES]


async def test_a_bridge_and_all_of_it_goes_as_it_came(world: World) -> None:
    host = HelperHost(world.socket)
    before, open_before = world.network(), world.descriptors()
    async with bridge(host):
        tap = await host.perform(OpenTap(bridge=BRIDGE.name))
        assert tap.name.startswith("banger1-")
        await host.perform(SetGuests(bridge=BRIDGE, guests=(guest(tap.name),)))
        resolved = AllowResolved(bridge=BRIDGE, guest="172.30.0.2", addresses=("203.0.113.5",))
        await host.perform(resolved)
        rules = world.inside("nft", "list", "ruleset")
        assert "172.30.0.2 . 203.0.113.5" in rules
        assert "198.51.100.7" in rules
        assert f"master {BRIDGE.name}" in world.inside("ip", "link", "show", tap.name)
        os.close(tap.fd)
    assert world.network() == before
    assert world.descriptors() == open_before


async def test_a_tap_goes_with_its_descriptor_and_one_made_to_last_with_its_bridge(
    world: World,
) -> None:
    host = HelperHost(world.socket)
    async with bridge(host):
        one, lasting = [await host.perform(OpenTap(bridge=BRIDGE.name)) for _ in range(2)]
        make_last(lasting.fd)
        os.close(one.fd)
        os.close(lasting.fd)
        names = world.inside("ip", "link")
        assert one.name not in names
        assert lasting.name in names
    assert lasting.name not in world.inside("ip", "link")


def make_last(tap: int) -> None:
    """As whoever has its descriptor may: TUNSETPERSIST (linux/if_tun.h)."""
    fcntl.ioctl(tap, 0x400454CB, 1)


async def test_a_cancelled_caller_leaves_neither_tap_nor_descriptor(world: World) -> None:
    host = HelperHost(world.socket)
    async with bridge(host):
        await host.perform(OpenTap(bridge=BRIDGE.name))  # pyroute2 is imported by now
        # The helper answers before it closes what it has answered with.
        open_before = await asyncio.to_thread(at_rest, world)
        links_before = world.inside("ip", "-br", "link")
        ours_before = sorted(Path("/proc/self/fd").iterdir())
        answered = 0
        for turns in range(12):
            task = asyncio.create_task(host.perform(OpenTap(bridge=BRIDGE.name)))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            with suppress(asyncio.CancelledError):
                os.close((await task).fd)  # on busy processors the answer may be there already
                answered += 1
        assert answered < 12
        # One at a time: when this is done, so are all before it.
        await host.perform(BridgeUp(bridge=BRIDGE, resolver_port=RESOLVER_PORT))
        await asyncio.to_thread(settled, world, open_before)
        assert sorted(Path("/proc/self/fd").iterdir()) == ours_before
        assert world.inside("ip", "-br", "link") == links_before


def at_rest(world: World) -> list[str]:
    """What it has open when it has nothing to do."""
    for _ in range(100):
        found = world.descriptors()
        world.inside("true")
        if "/dev/net/tun" not in found and found == world.descriptors():
            return found
    raise AssertionError(f"it does not come to rest: {world.descriptors()}")


def settled(world: World, expected: list[str]) -> None:
    for _ in range(100):
        if world.descriptors() == expected:
            return
        # Each starts a process, which takes longer than the helper's closing of a connection.
        world.inside("true")
    assert world.descriptors() == expected


async def test_guests_stay_when_the_rules_are_set_anew(world: World) -> None:
    host = HelperHost(world.socket)
    async with bridge(host):
        tap = await host.perform(OpenTap(bridge=BRIDGE.name))
        await host.perform(SetGuests(bridge=BRIDGE, guests=(guest(tap.name),)))
        before = world.inside("nft", "list", "ruleset")
        await host.perform(BridgeUp(bridge=BRIDGE, resolver_port=RESOLVER_PORT))
        assert world.inside("nft", "list", "ruleset") == before
        await host.perform(BridgeUp(bridge=BRIDGE, resolver_port=RESOLVER_PORT + 1))
        moved = world.inside("nft", "list", "ruleset")
        assert moved == before.replace(str(RESOLVER_PORT), str(RESOLVER_PORT + 1))
        os.close(tap.fd)


async def test_rules_that_a_reloaded_firewall_took_away_are_missed_and_set_again(
    world: World,
) -> None:
    host = HelperHost(world.socket)
    async with bridge(host):
        before = chain_rules(world)
        world.inside("nft", "flush", "ruleset")
        with pytest.raises(PreconditionFailed, match="rules of banger1 are not there"):
            await host.perform(SetGuests(bridge=BRIDGE, guests=()))
        await host.perform(BridgeUp(bridge=BRIDGE, resolver_port=RESOLVER_PORT))
        assert chain_rules(world) == before
        world.inside("nft", "flush", "chain", "inet", BRIDGE.name, "to_host")
        await host.perform(BridgeUp(bridge=BRIDGE, resolver_port=RESOLVER_PORT))
        assert chain_rules(world) == before


async def test_sets_of_an_earlier_version_give_way(world: World) -> None:
    host = HelperHost(world.socket)
    async with bridge(host):
        before = chain_rules(world)
        world.inside("nft", "delete", "table", "inet", BRIDGE.name)
        old = f"table inet {BRIDGE.name} {{\nset everywhere {{\ntype ether_addr\n}}\n}}\n"
        world.inside("nft", "-f", "-", stdin=old)
        await host.perform(BridgeUp(bridge=BRIDGE, resolver_port=RESOLVER_PORT))
        assert chain_rules(world) == before


async def test_a_name_of_ours_that_another_has_is_left_alone(world: World) -> None:
    host = HelperHost(world.socket)
    before = world.network()
    for name in ("banger7", "banger8"):
        foreign = Bridge(name=name, address="172.30.0.1/24")
        for operation in (
            BridgeUp(bridge=foreign, resolver_port=RESOLVER_PORT),
            BridgeDown(bridge=name),
            OpenTap(bridge=name),
        ):
            with pytest.raises(Conflict, match="not banger's"):
                await host.perform(operation)
            assert world.network() == before


async def test_a_network_that_is_in_use_is_refused_also_for_a_bridge_that_is_there(
    world: World,
) -> None:
    host = HelperHost(world.socket)
    taken = Bridge(name="banger1", address="10.44.0.1/26")
    before = world.network()
    with pytest.raises(Conflict, match=r"10\.44\.0\.0/24"):
        await host.perform(BridgeUp(bridge=taken, resolver_port=RESOLVER_PORT))
    assert world.network() == before
    async with bridge(host):
        up = world.network()
        with pytest.raises(Conflict, match=r"10\.44\.0\.0/24"):
            await host.perform(BridgeUp(bridge=taken, resolver_port=RESOLVER_PORT))
        assert world.network() == up


async def test_a_bridge_whose_maker_was_killed_is_taken_up(world: World) -> None:
    host = HelperHost(world.socket)
    before = world.network()
    address = "02:62:67:00:00:01"
    world.inside("ip", "link", "add", "banger1", "address", address, "type", "bridge")
    async with bridge(host):
        assert "did not forward before" in world.inside("ip", "-d", "link", "show", "banger1")
    assert world.network() == before


async def test_the_last_bridge_gives_forwarding_back(world: World) -> None:
    host = HelperHost(world.socket)
    other = Bridge(name="banger11", address="172.31.0.1/24")
    forward = ("cat", "/proc/sys/net/ipv4/ip_forward")
    async with bridge(host):
        await host.perform(BridgeUp(bridge=other, resolver_port=RESOLVER_PORT))
    assert world.inside(*forward) == "1\n"
    await host.perform(BridgeDown(bridge=other.name))
    assert world.inside(*forward) == "0\n"


async def test_each_call_is_a_line_of_the_log_with_its_op_id(world: World) -> None:
    host = HelperHost(world.socket)
    current_op_id.set("op-0123456789ab")
    await host.perform(BridgeDown(bridge="banger1"))
    with pytest.raises(Conflict) as raised:
        await host.perform(OpenTap(bridge="banger7"))
    assert raised.value.op_id == "op-0123456789ab"
    done, failed = world.records("helper rpc")
    assert done["message"] == "helper rpc completed"
    assert done["method"] == "bridge_down"
    assert failed["message"] == "helper rpc failed"
    assert failed["method"] == "open_tap"
    assert failed["code"] == "conflict"
    for each in (done, failed):
        assert each["op_id"] == "op-0123456789ab"
        assert each["peer_uid"] == 0
        assert each["duration_ms"] >= 0


def as_owner(world: World, operation: str) -> str:
    """What comes of an operation that the owner asks for."""
    code = (
        "import asyncio, sys\nfrom pathlib import Path\n"
        "from banger.hostops.client import HelperHost\nfrom banger.hostops.ops import *\n"
        f"print(asyncio.run(HelperHost(Path({str(world.socket)!r})).perform({operation})))"
    )
    argv = ["setpriv", f"--reuid={OWNER_UID}", "--clear-groups", sys.executable, "-c", code]
    result = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    return result.stdout + result.stderr


def test_the_owner_is_served_as_an_ordinary_user(world: World) -> None:
    assert "Done(" in as_owner(world, "BridgeDown(bridge='banger1')")
    assert world.records("completed")[0]["peer_uid"] == OWNER_UID
    assert stat.S_IMODE(world.socket.lstat().st_mode) == 0o600
    assert world.socket.lstat().st_uid == OWNER_UID


async def test_what_a_killed_helper_made_the_next_one_takes_away(world: World) -> None:
    before = world.network()["rules"]
    await HelperHost(world.socket).perform(BridgeUp(bridge=BRIDGE, resolver_port=RESOLVER_PORT))
    world.process.kill()
    world.process.wait()
    with running_helper(world.namespace, world.directory) as second:
        await HelperHost(second.socket).perform(BridgeDown(bridge=BRIDGE.name))
        after = second.network()
        assert after["rules"] == before
        assert after["forward"] == "0\n"
        assert BRIDGE.name not in {link["ifname"] for link in after["links"]}


def test_it_stops_when_told_takes_its_socket_with_it_and_starts_over_a_stale_one(
    world: World,
) -> None:
    assert world.stop() == 0
    assert not world.socket.exists()
    assert [each["message"] for each in world.records()] == ["helper ready", "helper stopped"]
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(world.socket))
    with running_helper(world.namespace, world.directory) as second:
        assert "Done(" in as_owner(second, "BridgeDown(bridge='banger1')")


@pytest.mark.parametrize("kind", ["file", "link", "helper"])
def test_it_takes_no_place_that_another_thing_has(world: World, kind: str) -> None:
    path = world.directory / "run" / "other.sock"
    if kind == "file":
        path.touch()
    elif kind == "link":
        path.symlink_to(world.socket)
    else:
        path = world.socket
    assert b"is there and is not a socket" in refusal(world, path) or kind == "helper"
    assert kind != "helper" or b"another helper" in refusal(world, path)
    assert path.is_socket() or kind == "file"


def refusal(world: World, path: Path, install_file: Path | None = None) -> bytes:
    install_file = install_file or world.directory / "install.toml"
    argv: list[str | Path] = [HELPER, "--socket", path, "--install-file", install_file]
    result = subprocess.run(argv, capture_output=True, timeout=START_S, check=False)
    assert result.returncode == 1
    return result.stderr


def test_it_listens_in_no_directory_that_others_may_write(world: World) -> None:
    for name, mode, uid in (("open", 0o777, 0), ("theirs", 0o755, OWNER_UID)):
        directory = world.directory / name
        directory.mkdir()
        directory.chmod(mode)
        os.chown(directory, uid, 0)
        assert b"could have been written by others" in refusal(world, directory / "s")


def test_a_socket_of_systemds_is_served_and_left() -> None:
    with helper_directory() as directory, network_namespace() as namespace:
        path = directory / "s"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen()
            process = passed(namespace, directory, listener, "1")
        try:
            wait_ready(directory / "log", process)
            world = World(namespace, directory, process)
            asyncio.run(HelperHost(path).perform(BridgeDown(bridge="banger1")))
            assert world.stop() == 0
            assert path.is_socket()
        finally:
            process.kill()
            process.wait()


def test_what_is_no_listening_socket_is_refused() -> None:
    with helper_directory() as directory, network_namespace() as namespace:
        for pair, count in ((socket.socketpair(), "1"), (socket.socketpair(), "2")):
            with pair[0], pair[1]:
                process = passed(namespace, directory, pair[0], count)
                assert process.wait(timeout=START_S) == 1
        log = (directory / "log").read_text()
        assert "no listening Unix socket" in log
        assert "was passed others" in log


def passed(
    namespace: str, directory: Path, listener: socket.socket, count: str
) -> subprocess.Popen[bytes]:
    """A helper that is started as systemd would (sd_listen_fds(3))."""
    install = write_installation(directory / "install.toml")
    # The shell becomes the helper: the variable has its own process id.
    script = f'LISTEN_FDS={count} LISTEN_PID=$$ exec "$@" 3<&{listener.fileno()}'
    argv: list[str | Path] = ["ip", "netns", "exec", namespace]
    argv += ["bash", "-c", script, "bash", HELPER]
    with open(directory / "log", "ab") as log:
        return subprocess.Popen(
            [*argv, "--install-file", install], stderr=log, pass_fds=[listener.fileno()]
        )


@contextmanager
def helper_directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="bt-", dir="/tmp") as directory:
        yield Path(directory)


def test_a_helper_serves_no_account_that_is_gone_or_anothers(world: World) -> None:
    other = write_installation(world.directory / "other.toml", uid=OWNER_UID + 1)
    path = world.directory / "run" / "other.sock"
    assert b"no such account" in refusal(world, path, other)
    write_installation(other, owner="nobody-has-this")
    assert b"no such account" in refusal(world, path, other)
    assert not path.exists()


async def test_without_a_helper_it_is_said(tmp_path: Path) -> None:
    host = HelperHost(tmp_path / "none")
    assert "no helper" in host.problem
    assert "banger system install" in host.hint
    with pytest.raises(PermissionDenied, match="no helper"):
        await host.perform(UnmapSnapshot(vm_id="0" * 12))
