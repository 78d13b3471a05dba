"""A guest of a few bytes: it says something on the console, and then nothing any more."""

from __future__ import annotations

import struct

from banger.drivers.hypervisor import kvm


def speaking_guest(text: bytes) -> bytes:
    """A kernel that writes `text` to the first serial port and then waits for ever."""

    def code(address: int) -> bytes:
        head = 5 + 5 + 4  # the three instructions before the loop
        loop = b"\xac\xee\xe2\xfc" + b"\xf4\xeb\xfd"  # lodsb; out dx, al; loop; wait: hlt; jmp wait
        start = address + head + len(loop)
        return b"".join(
            (
                b"\xbe" + struct.pack("<I", start),  # esi = text
                b"\xb9" + struct.pack("<I", len(text)),  # ecx = length
                b"\x66\xba\xf8\x03",  # dx = COM1
                loop,
                text,
            )
        )

    return kvm.pvh_image(code)
