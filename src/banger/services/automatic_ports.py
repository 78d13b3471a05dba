"""Ports that are open by themselves: what listens in a guest, at the address of its VM.

The guest's agent tells what listens, and tells again when that changes. Ports from 1024 up that a
connection to the guest's loopback reaches are open at the VM's own address, under the same number,
for as long as the guest listens and the VM runs. The guest is not trusted: it cannot have more
ports than there are here, nor take one that somebody has, nor have them change all the time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from ipaddress import ip_address

from banger.base.errors import BadRequest, BangerError, PreconditionFailed
from banger.base.log import get_logger, vm_attributes
from banger.base.model import PublishedPort, Vm
from banger.base.opid import current_op_id, new_op_id
from banger.base.ports import AUTOMATIC_MIN, GuestSocket, overlap
from banger.guest.channel import AgentStream, Data, Exit, ExitKind
from banger.guest.requests import Listeners
from banger.services.agents import Agents
from banger.services.capabilities import Capability
from banger.services.forwards import Forwards
from banger.services.guest_sockets import SOCKETS_LIMIT_BYTES, decode_sockets

#: Of one VM, and of all: each is a descriptor of the daemon's, which may have 1024.
VM_PORTS_MAX = 64
PORTS_MAX = 256
#: From a start to the first look, so that what was started goes first; and after a failure, from
#: then on twice as long each time.
_DELAY_S = 1.0
_DELAY_MAX_S = 60.0
#: Between two changes that are followed.
_PACE_S = 0.2
#: A port that somebody has, or has published meanwhile, may be free by then; nothing tells.
_TRY_AGAIN_S = 10.0
#: Between two wishes to look at once that are passed on.
_LOOK_S = 0.25


class _Watch:
    """Of one VM that runs."""

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self.task: asyncio.Task[None] | None = None
        #: To the agent, while it tells.
        self.stream: AgentStream | None = None
        #: Sends that somebody wants to know now.
        self.wish: asyncio.Task[None] | None = None
        #: Why nothing is known of its ports, and why ports are not open.
        self.problem = ""
        self.problems: dict[int, str] = {}
        self.told_too_many = False


class AutomaticPorts(Capability):
    name = "automatic ports"

    def __init__(self, forwards: Forwards, agents: Agents, *, enabled: bool) -> None:
        self._forwards = forwards
        self._agents = agents
        self._enabled = enabled
        self._watches: dict[str, _Watch] = {}

    async def post_start(self, vm: Vm) -> None:
        """Watch it. Idempotent."""
        if self.serves(vm) and vm.id not in self._watches:
            watch = self._watches[vm.id] = _Watch(vm)
            watch.task = asyncio.create_task(self._run(watch))

    async def apply_config_changes(self, before: Vm, after: Vm) -> None:  # noqa: ARG002 - a hook
        if watch := self._watches.get(after.id):
            watch.vm = after  # it may have another name now

    async def cleanup(self, vm: Vm) -> None:
        await self._end(vm.id)
        await self._forwards.close_vm(vm.id)

    async def close(self) -> None:
        """Watch nothing any more: the daemon ends. The VMs run on."""
        for vm_id in list(self._watches):
            await self._end(vm_id)

    def serves(self, vm: Vm) -> bool:
        """Whether ports of this VM are opened at all: at an address that is its own machine's and
        not ours, there is nothing to open."""
        address = vm.runtime.address
        return self._enabled and bool(address) and ip_address(address).is_loopback

    def problem(self, vm: Vm, number: int) -> str:
        """Why a port that listens in a running VM is not open; empty when it is."""
        if any(each.host_port == number for each in self._forwards.automatic(vm.id)):
            return ""
        watch = self._watches.get(vm.id)
        if watch is None or self._is_published(watch, number):
            return ""
        return watch.problems.get(number) or watch.problem or "it is about to open"

    def look(self, vm_id: str) -> None:
        """Somebody wants to go there now: have the guest look at once."""
        watch = self._watches.get(vm_id)
        if watch and watch.stream and (watch.wish is None or watch.wish.done()):
            watch.wish = asyncio.create_task(_wish(watch.stream))

    async def _end(self, vm_id: str) -> None:
        if watch := self._watches.pop(vm_id, None):
            tasks = [each for each in (watch.task, watch.wish) if each is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, watch: _Watch) -> None:
        current_op_id.set(new_op_id())  # not that of the start
        loop, delay_s = asyncio.get_running_loop(), _DELAY_S
        while True:
            await asyncio.sleep(delay_s)
            began = loop.time()
            try:
                await self._follow(watch)
            except BadRequest as error:
                watch.problem = "its guest agent is of an older banger: restart the VM"
                get_logger().info("no ports", error=error.message, **vm_attributes(watch.vm))
                return
            except BangerError as error:
                watch.problem = error.message
            except Exception:
                # A supervisor's boundary: a bug costs the ports of one VM.
                get_logger().exception("ports not followed", **vm_attributes(watch.vm))
            finally:
                watch.stream = None
            lasted = loop.time() - began > _DELAY_MAX_S
            delay_s = _DELAY_S if lasted else min(2 * delay_s, _DELAY_MAX_S)

    async def _follow(self, watch: _Watch) -> None:
        """Keep the ports as the guest tells, until it tells no more.

        Raises BadRequest when its agent cannot tell, another error when it breaks off.
        """
        channel = await self._agents.channel(watch.vm)
        async with await channel.open(Listeners()) as stream:
            watch.stream = stream
            lines = _Lines(stream)
            sockets: tuple[GuestSocket, ...] = ()
            while True:
                try:
                    async with asyncio.timeout(_TRY_AGAIN_S):
                        line = await lines.last()
                except TimeoutError:
                    await self._apply(watch, sockets)
                    continue
                if line is None:
                    return
                try:
                    sockets = decode_sockets(line)
                except BadRequest as error:
                    watch.problem = error.message
                    continue
                watch.problem = ""
                await self._apply(watch, sockets)
                await asyncio.sleep(_PACE_S)

    async def _apply(self, watch: _Watch, sockets: Iterable[GuestSocket]) -> None:
        """Close what listens no more, then open what does."""
        vm = watch.vm
        wanted = {each.port for each in sockets if each.reachable and each.port >= AUTOMATIC_MIN}
        for port in list(self._forwards.automatic(vm.id)):
            if port.host_port not in wanted:
                await self._forwards.close_automatic(vm.id, port)
        watch.problems = {}
        for number in sorted(wanted):
            port = _at(vm, number)
            if port in self._forwards.automatic(vm.id) or self._is_published(watch, number):
                continue
            try:
                self._check_room(watch)
                await self._forwards.open_automatic(vm, port)
            except BangerError as error:
                watch.problems[number] = error.message

    def _check_room(self, watch: _Watch) -> None:
        """Raise PreconditionFailed when there are as many ports as there may be."""
        if len(self._forwards.automatic(watch.vm.id)) >= VM_PORTS_MAX:
            problem = f"{VM_PORTS_MAX} ports of this VM are open by themselves, which is the most"
        elif self._forwards.automatic_count >= PORTS_MAX:
            problem = f"{PORTS_MAX} ports of VMs are open by themselves, which is the most"
        else:
            return
        if not watch.told_too_many:
            watch.told_too_many = True
            get_logger().warning("too many ports", error=problem, **vm_attributes(watch.vm))
        raise PreconditionFailed(problem)

    def _is_published(self, watch: _Watch, number: int) -> bool:
        """Whether somebody has published the same port at all addresses, this one among them."""
        mine = _at(watch.vm, number)
        return any(
            overlap(each, mine) and each.guest_port == number
            for each in self._forwards.published(watch.vm.id)
        )


def _at(vm: Vm, number: int) -> PublishedPort:
    return PublishedPort(host=vm.runtime.address, host_port=number, guest_port=number)


async def _wish(stream: AgentStream) -> None:
    try:
        await stream.send(b"\n")
    except BangerError:
        return  # it tells no more, which is noticed elsewhere
    await asyncio.sleep(_LOOK_S)


class _Lines:
    """What a guest tells, of which only the latest counts."""

    def __init__(self, stream: AgentStream) -> None:
        self._stream = stream
        self._buffer = bytearray()

    async def last(self) -> bytes | None:
        """The next line, or a later one if there is one; None at the end.

        Raises the error of an end that is one, and PreconditionFailed for a line without an end.
        """
        while True:
            event = await self._stream.receive()
            if isinstance(event, Exit):
                if event.kind is ExitKind.FAILED:
                    raise event.error()
                return None
            if isinstance(event, Data):
                self._buffer += event.data
            lines, newline, rest = self._buffer.rpartition(b"\n")
            if newline:
                self._buffer = rest
                return bytes(lines.rpartition(b"\n")[2])
            if len(self._buffer) > SOCKETS_LIMIT_BYTES:
                raise PreconditionFailed("the guest tells of more sockets than it can have")
