"""Channels to the agents of running VMs: one each, kept open, made again when it breaks."""

from __future__ import annotations

from pathlib import Path

from banger.base.errors import OperationTimeout, Unavailable
from banger.base.model import Vm
from banger.guest.channel import AgentChannel
from banger.services.locks import Locks

#: The agent of a booted guest answers in milliseconds; a loaded host under emulation needs more.
RECONNECT_TIMEOUT_S = 20.0


class Agents:
    def __init__(self) -> None:
        self._channels: dict[str, AgentChannel] = {}
        self._connecting = Locks()

    async def connect(self, vm: Vm, timeout_s: float) -> AgentChannel:
        """The VM's channel, connected if it is not. Concurrent callers share one attempt.

        Raises Unavailable or OperationTimeout when the agent does not answer.
        """
        async with self._connecting.hold(vm.id):
            channel = self._channels.get(vm.id)
            if channel is None or channel.closed:
                channel = await AgentChannel.connect(
                    Path(vm.runtime.agent_socket), timeout_s=timeout_s
                )
                self._channels[vm.id] = channel
            return channel

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
        """Close the channel of a VM that is going. Idempotent."""
        if channel := self._channels.pop(vm_id, None):
            await channel.close()

    async def close(self) -> None:
        for vm_id in list(self._channels):
            await self.drop(vm_id)
