"""The texts of the two units, and their names.

What they are not allowed is said in systemd.exec(5); what they keep, and why, stands beside it as a
comment in the text itself, where an administrator looks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

HELPER = "banger-helper.service"
DAEMON = "bangerd.service"
UNITS = (HELPER, DAEMON)

UNIT_DIR = Path("/etc/systemd/system")

_HEAD = "# Written by: banger system install. Changes belong into: systemctl edit {unit}\n"


@dataclass(frozen=True)
class Owner:
    """The user whom both daemons work for."""

    name: str
    uid: int
    gid: int


def unit_texts(owner: Owner, python: str) -> dict[str, str]:
    """The units by their names. `python` is an absolute path."""
    texts = {HELPER: helper_unit(python), DAEMON: daemon_unit(owner, python)}
    return {name: _HEAD.format(unit=name) + text for name, text in texts.items()}


def quoted(text: str) -> str:
    """One word of a unit's setting: quotes, and what systemd.unit(5) has expanded."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"'


def helper_unit(python: str) -> str:
    """Root's part. It serves the socket /run/banger/helper.sock and nothing else."""
    return f"""\
[Unit]
Description=banger's privileged operations
Before={DAEMON}
# Their block devices can only be allowed below when their drivers are there.
Wants=modprobe@loop.service modprobe@dm_mod.service
After=modprobe@loop.service modprobe@dm_mod.service

[Service]
# Whoever is started after it finds its socket.
Type=notify
# -I: neither the environment nor the directory it starts in say what is imported.
ExecStart={quoted(python)} -I -m banger.hostops.helper
Restart=always
RestartSec=100ms
RuntimeDirectory=banger
# The owner has to come through to the socket, which is his alone.
RuntimeDirectoryMode=0755
UMask=0077

# For bridges, taps and nftables; for loop devices, device-mapper, namespaces and mounts; to make
# the nodes of devices, and to give them and the socket to the owner. The rest is for Firecracker's
# jailer, which makes nodes in a directory that is another user's, has that as its root, and becomes
# that user; and for the owner's files, wherever he keeps them.
CapabilityBoundingSet=CAP_NET_ADMIN CAP_SYS_ADMIN CAP_CHOWN CAP_MKNOD CAP_DAC_OVERRIDE \\
    CAP_SYS_CHROOT CAP_SETUID CAP_SETGID
NoNewPrivileges=yes
DevicePolicy=closed
DeviceAllow=/dev/net/tun rw
DeviceAllow=/dev/loop-control rw
DeviceAllow=block-loop rw
DeviceAllow=/dev/mapper/control rw
DeviceAllow=block-device-mapper rwm
ProtectSystem=strict
ProtectHome=read-only
PrivateTmp=yes
ProtectClock=yes
# A machine in its jail has a control group of its own, outside this unit's: it outlives it.
ProtectControlGroups=no
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
# Forwarding between the bridge and the outside is a setting of the kernel's.
ProtectKernelTunables=yes
ReadWritePaths=/proc/sys/net
LockPersonality=yes
MemoryDenyWriteExecute=yes
# Jails are made of them.
RestrictNamespaces=user mnt net pid ipc uts
RestrictRealtime=yes
RestrictSUIDSGID=yes
# AF_INET is what interfaces are configured by, with ioctl(2).
RestrictAddressFamilies=AF_UNIX AF_NETLINK AF_INET
SystemCallArchitectures=native
# Firecracker inherits it, and sets one of its own, which allows less.
SystemCallFilter=@system-service @mount seccomp
SystemCallFilter=~@clock @cpu-emulation @debug @module @obsolete @raw-io @reboot @swap
SystemCallErrorNumber=EPERM

[Install]
WantedBy=multi-user.target
"""


def daemon_unit(owner: Owner, python: str) -> str:
    """The owner's part: bangerd, and in its control group the machines, which outlive it."""
    return f"""\
[Unit]
Description=banger's machines of the user {owner.name.replace("%", "%%")}
Wants={HELPER}
After={HELPER} network.target

[Service]
Type=notify
ExecStart={quoted(python)} -I -m banger.daemon.main
User={owner.uid}
Group={owner.gid}
# Machines run on without it: only the daemon itself is ended, and a machine that the kernel ends
# for want of memory is not the end of the others.
KillMode=process
OOMPolicy=continue
Restart=always
RestartSec=100ms
# It waits for one that is stopping, and takes back what it was doing.
TimeoutStartSec=120
TimeoutStopSec=90
RuntimeDirectory=bangerd
RuntimeDirectoryMode=0700
# The sockets of machines that run on.
RuntimeDirectoryPreserve=yes
UMask=0077
TasksMax=infinity
LimitNOFILE=65536

# Images are built in user namespaces, whose ids newuidmap maps, which is setuid: that is what the
# capabilities are for, and why there is no NoNewPrivileges, nor anything that brings it in a
# service of a user's (SystemCallFilter, RestrictNamespaces, PrivateDevices, ...). A /proc that is
# partly covered (ProtectKernelTunables, ProtectProc) could not be mounted there. Users name files
# anywhere to import, in /tmp and /home, too (PrivateTmp, ProtectHome). Machines have QEMU's own
# filter of system calls, and their network one of banger's.
CapabilityBoundingSet=CAP_SETUID CAP_SETGID CAP_DAC_OVERRIDE CAP_SYS_ADMIN
DevicePolicy=closed
DeviceAllow=/dev/kvm rw
DeviceAllow=/dev/net/tun rw
DeviceAllow=/dev/vhost-net rw
DeviceAllow=/dev/vhost-vsock rw
DeviceAllow=block-loop rw
DeviceAllow=block-device-mapper rw
ProtectSystem=full
ProtectControlGroups=yes

[Install]
WantedBy=multi-user.target
"""
