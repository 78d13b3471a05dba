"""A machine made for one command and deleted after it, beside QEMU booting to the same answer."""

from __future__ import annotations

import asyncio

from bench.bare import BareQemu
from bench.home import Home
from bench.measure import Figure, Target, compare, timed

_ROUNDS = 5


def measure(home: Home) -> list[Figure]:
    image, kernel = home.image()
    run = ("vm", "run", "--rm", "--quiet", "--cold", "--image", image.name, "--", "true")
    home.banger(*run)  # makes the initramfs
    with asyncio.Runner() as runner:
        bare = BareQemu(home.paths, home.directory / "cold", image, kernel)
        return [
            compare(
                "vm run --rm -- true, cold",
                lambda: timed(lambda: home.banger(*run)),
                floor_name="bare QEMU to the same answer",
                floor=lambda: runner.run(bare.cold_true_s()),
                rounds=_ROUNDS,
                target=Target(times=1.3),
            )
        ]
