"""For processes that work on a tree whose content nobody vouches for."""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from contextlib import suppress

#: CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETFCAP (linux/capability.h, of version 3).
_CAPABILITIES = (0, 1, 3, 4, 31)
_CAPABILITY_VERSION = 0x20080522
_PR_SET_NO_NEW_PRIVS = 38


def shut_in(tree: str) -> None:
    """Have `tree` as the root directory, and no right but to make files in it as others would.

    Whatever is loaded from here on, modules or libraries, would be the archive's own.
    """
    # Of threads that end; the C library looks for it then.
    with suppress(OSError):
        ctypes.CDLL("libgcc_s.so.1")
    libc = ctypes.CDLL(None, use_errno=True)
    sys.meta_path.clear()
    os.chroot(tree)
    os.chdir("/")
    # Root of these namespaces would have all capabilities again after an exec.
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "privileges cannot be given up")
    kept = sum(1 << capability for capability in _CAPABILITIES)
    header = struct.pack("=Ii", _CAPABILITY_VERSION, 0)
    low, high = kept & 0xFFFFFFFF, kept >> 32
    if libc.capset(header, struct.pack("=6I", low, low, 0, high, high, 0)) != 0:
        raise OSError(ctypes.get_errno(), "capabilities cannot be given up")
