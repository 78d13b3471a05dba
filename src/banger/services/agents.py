"""Channels to the agents of running VMs: one each, kept open, made again when it breaks."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

from banger.base.errors import OperationTimeout, Unavailable
from banger.base.model import Vm
from banger.guest.channel import AgentChannel
from banger.services.locks import Locks, Rank

#: The agent of a booted guest answers in milliseconds; a loaded host under emulation needs more.
RECONNECT_TIMEOUT_S = 20.0


class Agents:
    def __init__(self, vsock_port: int = 0) -> None:
        """`vsock_port` is `HypervisorFeatures.agent_vsock_port`."""
        self._vsock_port = vsock_port
        self._channels: dict[str, AgentChannel] = {}
        self._connecting = Locks(Rank.CHANNEL)
        self._attempts: dict[str, asyncio.Timeout] = {}
        self._going: Counter[str] = Counter()

    async def connect(self, vm: Vm, timeout_s: float) -> AgentChannel:
        """The VM's channel, connected if it is not. Concurrent callers share one attempt.

        Raises Unavailable or OperationTimeout when the agent does not answer, Unavailable at once
        when the channel is dropped meanwhile.
        """
        async with self._connecting.hold(vm.id):
            if self._going[vm.id]:
                raise _going()
            channel = self._channels.get(vm.id)
            if channel is None or channel.closed:
                channel = await self._connect(vm, timeout_s)
                self._channels[vm.id] = channel
            return channel

    async def _connect(self, vm: Vm, timeout_s: float) -> AgentChannel:
        try:
            # Without an end of its own: `drop` sets it.
            async with asyncio.timeout(None) as attempt:
                self._attempts[vm.id] = attempt
                try:
                    return await AgentChannel.connect(
                        Path(vm.runtime.agent_socket),
                        timeout_s=timeout_s,
                        vsock_port=self._vsock_port,
                    )
                finally:
                    self._attempts.pop(vm.id, None)
        except TimeoutError:
            raise _going() from None

    async def channel(self, vm: Vm) -> AgentChannel:
        """The channel of a VM that runs. Raises Unavailable, saying where to look."""
        try:
            return await self.connect(vm, RECONNECT_TIMEOUT_S)
        except (OperationTimeout, Unavailable) as error:
            raise Unavailable(
                f'the agent of vm "{vm.name}" does not answer: {error.message}',
                hint=f"inspect {vm.runtime.log_path}, or: banger vm logs {vm.name}",
            ) from error

    async def drop(self, vm_id: str) -> None:
        """Close the channel of a VM that is going, and end attempts to make one. Idempotent."""
        self._going[vm_id] += 1
        try:
            if attempt := self._attempts.pop(vm_id, None):
                attempt.reschedule(asyncio.get_running_loop().time())
            async with self._connecting.hold(vm_id):
                if channel := self._channels.pop(vm_id, None):
                    await channel.close()
        finally:
            self._going[vm_id] -= 1
            if not self._going[vm_id]:
                del self._going[vm_id]

    async def close(self) -> None:
        for vm_id in {*self._channels, *self._attempts}:
            await self.drop(vm_id)


def _going() -> Unavailable:
    return Unavailable("its machine is being stopped")
