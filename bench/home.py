"""banger with a home of its own, for the time of a benchmark: nobody's VMs are seen or touched."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from banger.base.model import Image, Kernel
from banger.base.paths import Paths

_STANDBY_TIMEOUT_S = 60.0
_STANDBY_POLL_S = 0.2

BANGER = Path(sys.executable).with_name("banger")
IMAGE = "debian-bookworm"


class Home:
    """While it is entered, HOME and XDG_* of this process and its children lead to it."""

    def __init__(self) -> None:
        self._before = dict(os.environ)
        # In /tmp whatever TMPDIR says: the path of a Unix socket is limited to 107 bytes.
        self.directory = Path(tempfile.mkdtemp(prefix="bb-", dir="/tmp"))

    def __enter__(self) -> Self:
        for name in [name for name in os.environ if name.startswith("XDG_")]:
            del os.environ[name]
        runtime = self.directory / "run"
        runtime.mkdir(mode=0o700)
        os.environ.update(HOME=str(self.directory), XDG_RUNTIME_DIR=str(runtime))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if self.paths.daemon_socket.exists():
                self.delete_vms()
                self.banger("daemon", "stop")
        finally:
            os.environ.clear()
            os.environ.update(self._before)
            shutil.rmtree(self.directory)

    @property
    def paths(self) -> Paths:
        return Paths.from_environment()

    def banger(self, *arguments: str) -> str:
        """Run the CLI to a successful end; its stdout."""
        result = subprocess.run(
            [BANGER, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
        )
        result.check_returncode()
        return result.stdout

    def image(self) -> tuple[Image, Kernel]:
        """The default image, built on the first call (a minute or more), and its kernel."""
        if not any(image["name"] == IMAGE for image in self._json("image", "list")):
            self.banger("image", "build", IMAGE)
        image = msgspec.convert(self._only("image", name=IMAGE), Image)
        return image, msgspec.convert(self._only("kernel", id=image.kernel_id), Kernel)

    def delete_vms(self) -> None:
        for vm in self._json("vm", "list"):
            self.banger("vm", "delete", "--force", str(vm["id"]))

    def configure(self, text: str) -> None:
        """Let the daemon run with this config.toml. VMs run on, standbys do not."""
        self.paths.config_file.parent.mkdir(parents=True, exist_ok=True)
        self.paths.config_file.write_text(text)
        self.banger("daemon", "restart")

    def await_standby(self) -> None:
        """Return when a machine waits for the next start."""
        deadline = time.monotonic() + _STANDBY_TIMEOUT_S
        while not msgspec.json.decode(self.banger("daemon", "status", "--json"))["standbys"]:
            if time.monotonic() > deadline:
                raise TimeoutError("no standby was made")
            time.sleep(_STANDBY_POLL_S)

    def _json(self, *arguments: str) -> list[dict[str, object]]:
        found: list[dict[str, object]] = msgspec.json.decode(self.banger(*arguments, "--json"))
        return found

    def _only(self, noun: str, **wanted: str) -> dict[str, object]:
        (found,) = [each for each in self._json(noun, "list") if wanted.items() <= each.items()]
        return found
