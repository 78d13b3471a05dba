"""A machine from a template, made for one command and deleted after it: beside QEMU restored by
hand to the same answer, and beside the same command with a boot.

Once with a machine that waits for it (`services/standby.py`), as a person or an agent finds it who
gives a command every other second; and once without, as in a burst.
"""

from __future__ import annotations

import asyncio

from bench.bare import BareQemu
from bench.home import Home
from bench.measure import Figure, Target, compare, timed

_ROUNDS = 100
_COLD_ROUNDS = 10


def measure(home: Home) -> list[Figure]:
    image, kernel = home.image()
    run = ("vm", "run", "--rm", "--quiet", "--image", image.name, "--", "true")
    cold = ("vm", "run", "--rm", "--quiet", "--cold", "--image", image.name, "--", "true")

    def warm_s() -> float:
        home.await_standby()
        return timed(lambda: home.banger(*run))

    home.banger(*run)  # makes the template
    with asyncio.Runner() as runner:
        bare = BareQemu(home.paths, home.directory / "warm", image, kernel)
        runner.run(bare.save())

        def floor_s() -> float:
            return runner.run(bare.warm_true_s())

        figures = [
            compare(
                "vm run --rm -- true",
                warm_s,
                floor_name="bare QEMU restored to the same answer",
                floor=floor_s,
                rounds=_ROUNDS,
                target=Target(times=1.5, p95=True),
            ),
            compare(
                "vm run --rm -- true, beside a boot",
                warm_s,
                floor_name="vm run --rm --cold -- true",
                floor=lambda: timed(lambda: home.banger(*cold)),
                rounds=_COLD_ROUNDS,
                target=Target(times=1 / 8),
            ),
        ]
        home.configure("standby_limit = 0\n")
        try:
            figures.append(
                compare(
                    "vm run --rm -- true, no standby",
                    lambda: timed(lambda: home.banger(*run)),
                    floor_name="bare QEMU restored to the same answer",
                    floor=floor_s,
                    rounds=_ROUNDS,
                )
            )
        finally:
            home.configure("")
    return figures
