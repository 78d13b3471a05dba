"""What udev is told of banger's devices: a guest has written what is on them.

The rules file comes before those that read devices, and after device-mapper's own where these come
first (10-dm.rules; Debian's come later, and change nothing of it). udevd looks by itself whether
there are other files than before.
"""

from __future__ import annotations

from pathlib import Path

RULES_FILE = Path("/etc/udev/rules.d/12-banger.rules")

RULES = """\
# Written by: banger system install
# What machines have written is not read (blkid and what follows from that), and not read again
# whenever somebody closes it.
SUBSYSTEM!="block", GOTO="banger_end"
ACTION!="add|change", GOTO="banger_end"

# Their disks: device-mapper's and everybody's rules leave them alone.
KERNEL=="dm-[0-9]*", ATTR{dm/uuid}=="BANGER-*", \\
    ENV{DM_UDEV_DISABLE_SUBSYSTEM_RULES_FLAG}="1", \\
    ENV{DM_UDEV_DISABLE_DISK_RULES_FLAG}="1", \\
    ENV{DM_UDEV_DISABLE_OTHER_RULES_FLAG}="1", \\
    OPTIONS:="nowatch"

# What these keep changes on.
KERNEL=="loop[0-9]*", ATTR{loop/backing_file}=="*/system.cow", \\
    ENV{UDEV_DISABLE_PERSISTENT_STORAGE_RULES_FLAG}="1", \\
    OPTIONS:="nowatch"

LABEL="banger_end"
"""
