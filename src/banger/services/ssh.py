"""What OpenSSH needs to reach a guest, and no network: a key of this user's that the guest lets in,
and the guest's own keys, which come by its agent, so that nobody can be in between.

The connection itself is a stream of the agent's (`vm.connect`): see `banger vm proxy`.
"""

from __future__ import annotations

import asyncio
import os
import re
import tempfile
from contextlib import suppress
from importlib import resources
from pathlib import Path

from banger.base import proc
from banger.base.errors import NotFound, PreconditionFailed
from banger.base.files import write_atomically
from banger.base.log import OperationLog, vm_attributes
from banger.base.model import Vm
from banger.base.paths import Paths, prepare_private_dir
from banger.base.ssh import SUFFIX, SshAccess, SshFiles
from banger.guest.channel import call
from banger.guest.requests import Exec
from banger.services.agents import Agents
from banger.services.vm import VmService

_KEYGEN_TIMEOUT_S = 30.0
_ADMIT_TIMEOUT_S = 30.0
_ANSWER_BYTES = 64 << 10
#: A line of a public key: its kind and itself; what follows is a comment.
_HOST_KEY = re.compile(
    r"(ssh-ed25519|ssh-rsa|ecdsa-sha2-nistp(?:256|384|521)) ([A-Za-z0-9+/]{40,4000}={0,2})(?: |$)"
)
_HOST_KEYS_MAX = 8

#: What the statuses of the script mean: see there.
_MEANINGS = {
    90: ("there is no sshd in it", "a shell without one: banger vm shell {name}"),
    91: ("it has no host key", "make one in it: ssh-keygen -A"),
    92: ("the key could not be put into ~/.ssh/authorized_keys", "has its user a home?"),
}
_NOT_FOUND = 127


class SshService:
    """`key` is where the user wants the private key; empty for our own place."""

    def __init__(self, paths: Paths, vms: VmService, agents: Agents, key: str) -> None:
        self._paths = paths
        self._vms = vms
        self._agents = agents
        self._key = Path(key).expanduser() if key else paths.ssh_key
        self._making = asyncio.Lock()
        self._writing = asyncio.Lock()

    async def files(self) -> SshFiles:
        """The key, made on first use, and the file of known hosts."""
        await self._public_key()
        return self._files

    async def admit(self, reference: str, user: str) -> SshAccess:
        """Have a running guest let the key in as `user`, and know it.

        Raises NotRunning, NotFound for a user it does not have, PreconditionFailed for one without
        an sshd. That one may still be about to listen.
        """
        vm = await self._vms.running(reference)
        key = await self._public_key()
        with OperationLog("vm.ssh", **vm_attributes(vm)):
            host_keys = _host_keys(await self._let_in(vm, user, key))
            if not host_keys:
                raise PreconditionFailed(f'vm "{vm.name}": {_MEANINGS[91][0]} that OpenSSH knows')
            await self._know(vm, host_keys)
        return SshAccess(vm_name=vm.name, files=self._files)

    @property
    def _files(self) -> SshFiles:
        return SshFiles(key=str(self._key), known_hosts=str(self._paths.ssh_known_hosts))

    async def _public_key(self) -> str:
        public = self._key.with_name(f"{self._key.name}.pub")
        async with self._making:
            # The private one may be in an agent, or on a card.
            there = await asyncio.to_thread(lambda: self._key.exists() or public.exists())
            if not there:
                await self._make_key()
            try:
                text = await asyncio.to_thread(lambda: public.read_text(errors="replace"))
            except FileNotFoundError:
                text = await self._derived()
        kind, _, rest = text.strip().partition(" ")
        body = rest.partition(" ")[0]
        if not body or "\n" in text.strip():
            raise PreconditionFailed(f"{public} is not a public key of OpenSSH")
        return f"{kind} {body} banger"

    async def _derived(self) -> str:
        try:
            done = await proc.run(
                ["ssh-keygen", "-y", "-P", "", "-f", self._key], timeout_s=_KEYGEN_TIMEOUT_S
            )
        except proc.ProcessFailed as error:
            raise PreconditionFailed(
                f"the public key of {self._key} cannot be had: {error.message}",
                hint=f"put it into {self._key}.pub",
            ) from error
        return done.stdout.decode()

    async def _make_key(self) -> None:
        """Whole, or not there; one that another daemon has made meanwhile is taken."""
        if self._key == self._paths.ssh_key:
            await asyncio.to_thread(prepare_private_dir, self._key.parent)
        else:
            await asyncio.to_thread(
                lambda: self._key.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            )
        with tempfile.TemporaryDirectory(dir=self._key.parent, prefix=".new-") as scratch:
            made = Path(scratch, "key")
            kind = ("-t", "ed25519", "-N", "", "-C", "banger")
            await proc.run(["ssh-keygen", "-q", *kind, "-f", made], timeout_s=_KEYGEN_TIMEOUT_S)
            with suppress(FileExistsError):
                os.link(made, self._key)
                made.with_name("key.pub").replace(self._key.with_name(f"{self._key.name}.pub"))

    async def _let_in(self, vm: Vm, user: str, key: str) -> str:
        script = (resources.files("banger.services") / "guest" / "ssh.sh").read_text()
        request = Exec(("sh", "-c", script, "ssh", key), user=user)
        try:
            answer = await call(
                await self._agents.channel(vm),
                request,
                timeout_s=_ADMIT_TIMEOUT_S,
                limit_bytes=_ANSWER_BYTES,
            )
        except NotFound as error:
            error.hint = error.hint or f"as another user: banger vm ssh {vm.name} -l USER"
            raise
        status = answer.exit.value
        if status == _NOT_FOUND:  # not even a shell
            status = 90
        if status:
            what, hint = _MEANINGS.get(status, (f"it could not be prepared (status {status})", ""))
            raise PreconditionFailed(f'vm "{vm.name}": {what}', hint=hint.format(name=vm.name))
        return answer.stdout.decode(errors="replace")

    async def _know(self, vm: Vm, keys: list[str]) -> None:
        """Put a guest's keys where ssh looks for them, in place of any others of its name."""
        host = vm.name + SUFFIX
        async with self._writing:
            names = {each.name + SUFFIX for each in await self._vms.all()} - {host}
            await asyncio.to_thread(prepare_private_dir, self._paths.ssh_known_hosts.parent)
            lines = await asyncio.to_thread(_lines, self._paths.ssh_known_hosts)
            kept = [line for line in lines if line.partition(" ")[0] in names]
            wanted = kept + [f"{host} {key}" for key in keys]
            if wanted != lines:
                data = "".join(f"{line}\n" for line in wanted).encode()
                await asyncio.to_thread(
                    write_atomically, self._paths.ssh_known_hosts, data, durable=False
                )


def _host_keys(said: str) -> list[str]:
    """What a guest said of its keys, which may be anything: those lines that are keys."""
    found = [match for line in said.splitlines() if (match := _HOST_KEY.match(line))]
    return [f"{match[1]} {match[2]}" for match in found[:_HOST_KEYS_MAX]]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []
