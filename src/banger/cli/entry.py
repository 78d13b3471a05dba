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
    _complete_streams()
    # After that: the imports are where the time goes.
    from banger.cli.main import run

    status = run(sys.argv[1:])
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        status = status or 1  # what was left to say has not arrived
    os._exit(status)


def _complete_streams() -> None:
    """Standard streams that were closed become /dev/null: no socket must get their numbers."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
            setattr(sys, name, os.fdopen(number, mode))


if __name__ == "__main__":
    main()
