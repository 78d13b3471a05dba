"""Where the compiled guest agent is: the package's build hook puts one for each architecture."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from banger.base.errors import PreconditionFailed


def agent_binary(architecture: str) -> Path:
    """The static agent for ``x86_64`` or ``aarch64``."""
    path = Path(str(resources.files("banger.guest") / "bin" / f"banger-agent-{architecture}"))
    if not path.is_file():
        raise PreconditionFailed(
            f"the guest agent for {architecture} is not in this installation",
            hint="install banger with pip, which compiles it",
        )
    return path
