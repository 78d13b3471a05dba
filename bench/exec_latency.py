"""A command in a running machine, beside the agent's own time for it in a bare QEMU."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from contextlib import AsyncExitStack

from banger.rpc.client import Client
from banger.rpc.protocol import FrameType, decode_exit
from bench.bare import BareQemu, true_s
from bench.home import Home
from bench.measure import Figure, Target, compare, timed

_ROUNDS = 40
_VM = "bench-exec"


def measure(home: Home) -> list[Figure]:
    image, kernel = home.image()
    home.banger("vm", "run", "--quiet", "--name", _VM, "--image", image.name, "--", "true")
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        bare = BareQemu(home.paths, home.directory / "exec", image, kernel)
        channel = runner.run(stack.enter_async_context(bare.guest()))
        try:
            return [
                compare(
                    "vm.exec true, by RPC",
                    lambda: timed(lambda: _exec_by_rpc(home)),
                    floor_name="the agent's own, in a bare QEMU",
                    floor=lambda: runner.run(true_s(channel)),
                    rounds=_ROUNDS,
                    target=Target(above_floor_s=0.030),
                ),
                compare(
                    "banger vm exec -- true",
                    lambda: timed(lambda: home.banger("vm", "exec", _VM, "--", "true")),
                    floor_name="python -c pass, then the agent's own",
                    floor=lambda: timed(_bare_python) + runner.run(true_s(channel)),
                    rounds=_ROUNDS,
                ),
            ]
        finally:
            runner.run(stack.aclose())


def _bare_python() -> None:
    subprocess.run([sys.executable, "-c", "pass"], stdin=subprocess.DEVNULL, check=True)


def _exec_by_rpc(home: Home) -> None:
    """What the CLI does for ``vm exec``, without the start of a process."""
    with Client.connect(home.paths, start=False) as client:
        exec_true(client, _VM)


def exec_true(client: Client, vm: str) -> None:
    """``true`` in a machine, to its successful end."""
    client.call("vm.exec", {"vm": vm, "command": {"argv": ["true"]}}, dict[str, object])
    session = client.session()
    session.send(FrameType.EOF)
    frames = list(session.pending())
    while not frames or frames[-1][0] is not FrameType.EXIT:
        frames += session.receive()
    assert decode_exit(frames[-1][1]).status == 0
