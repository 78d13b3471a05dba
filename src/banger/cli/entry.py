"""The process `banger`: in and out as fast as can be.

Most calls live for a twentieth of a second, and a fifth of that went to collecting garbage among
freshly imported modules and to taking the interpreter apart at the end. So nothing is collected,
and the process ends without that, once what it had to say is written.
"""

from __future__ import annotations

import gc
import os
import sys


def main() -> None:
    """Run the command line; the exit status says how it went."""
    gc.disable()
    # After that: the imports are where the time goes.
    from banger.cli.main import run

    status = run(sys.argv[1:])
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        status = status or 1  # what was left to say has not arrived
    os._exit(status)


if __name__ == "__main__":
    main()
