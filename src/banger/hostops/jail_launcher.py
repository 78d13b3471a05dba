"""Makes the jail of one machine and starts Firecracker's jailer in it: a process of root's own.

It is a process because namespaces belong to one, and a short one: it starts, reads what to do from
its standard input (`JailOrder`, made by `jails`, who has checked it), does it, and passes a pidfd
of what it has started over a socket. It follows no path of a user's: files come as descriptors, and
are mounted in the jail after a look whether what is at their path is what is open.

All that it makes goes with the last process of the jail: mounts and the file system that the jail
is in belong to its mount namespace, interfaces to its network namespace. What is killed half way
is in the machine's control group, by which it is ended.
"""

from __future__ import annotations

import errno
import os
import resource
import socket
import stat
import sys
from contextlib import suppress
from pathlib import Path

import msgspec

from banger.base import fork
from banger.base.jail import API_SOCKET, OUT
from banger.hostops import jail_kernel as kernel
from banger.hostops import jail_network

#: Nobody's but root's, and empty but in the mount namespace of a jail.
BASE = Path("/run/banger/jail")
#: Firecracker's own log, in a jail.
LOG = "log"
#: Beside the program itself: nodes of devices, and empty files that others are mounted on.
_ROOM_BYTES = 1 << 20
_INODES = 256
_FILES_MAX = 1024


class JailFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file of the owner's for the jail: its name there, and our descriptor of it."""

    name: str
    descriptor: int
    read_only: bool


class JailOrder(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be made. Numbers of descriptors are of this process, which inherits them."""

    vm_id: str
    uid: int
    firecracker: str
    jailer: str
    #: The control group of this jail, which is there; its parent; its limits, ``FILE=VALUE``.
    group: str
    parent_group: str
    limits: tuple[str, ...]
    files: tuple[JailFile, ...]
    console: int
    log: int
    network: int
    has_interface: bool
    #: A socket, over which a pidfd goes.
    report: int
    #: The pid of whoever waits for this.
    parent: int


class LaunchFailed(msgspec.Struct, frozen=True, kw_only=True):
    """What this process says on its standard output when it fails."""

    message: str
    hint: str = ""


class _Refused(Exception):
    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


def jailer_argv(order: JailOrder) -> tuple[str, ...]:
    """The jailer's command line (docs/jailer.md of Firecracker); after ``--``, Firecracker's."""
    limits = (word for limit in order.limits for word in ("--cgroup", limit))
    identity = str(order.uid)
    return (
        *(order.jailer, "--id", order.vm_id, "--exec-file", order.firecracker),
        *("--uid", identity, "--gid", identity, "--chroot-base-dir", str(BASE)),
        *("--cgroup-version", "2", "--parent-cgroup", order.parent_group, *limits),
        *("--resource-limit", f"no-file={_FILES_MAX}"),
        *("--", "--api-sock", f"{OUT}/{API_SOCKET}", "--log-path", LOG, "--level", "Warning"),
    )


def jail_root(order: JailOrder) -> Path:
    """Where the jailer makes the root of the jail (`Env::new` in its source)."""
    return BASE / Path(order.firecracker).name / order.vm_id / "root"


def launch(order: JailOrder) -> None:
    """Make the jail and start the jailer. Raises OSError and `_Refused`."""
    # A later launch of this machine's is not to meet this one.
    kernel.end_with(order.parent)
    # Then at once: whatever comes of this is found there.
    Path(order.group, "cgroup.procs").write_text(str(os.getpid()))
    os.umask(0o022)
    kernel.unshare(kernel.CLONE_NEWNS | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS)
    kernel.keep_mounts_private()
    mounts = [(each, _mount_of(each, order.uid)) for each in order.files]
    root = _make_root(order)
    for each, mount in mounts:
        _place(each, mount, root, order.uid)
    kernel.enter_network(order.network)
    jail_network.furnish(order.uid, has_interface=order.has_interface)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # it would have the guest's memory
    kernel.gain_nothing()
    pidfd = _start(order)
    with socket.socket(fileno=order.report) as report:
        socket.send_fds(report, [b"p"], [pidfd])


# Files.


def _mount_of(file: JailFile, uid: int) -> int:
    """A mount of a file, or directory, in which what is its owner's is the jail's user's; -1 for a
    device, which needs none."""
    wanted = os.fstat(file.descriptor)
    if stat.S_ISBLK(wanted.st_mode):
        return -1
    path = Path(f"/proc/self/fd/{file.descriptor}").readlink()
    found = _found(path, wanted)
    mount = kernel.clone_mount(found)
    os.close(found)
    attributes = kernel.ATTR_NOSUID | kernel.ATTR_NODEV | kernel.ATTR_NOEXEC
    attributes |= kernel.ATTR_NOSYMFOLLOW
    if file.read_only:
        attributes |= kernel.ATTR_RDONLY
    # The helper sees homes as read-only; a machine's files are its own to write.
    clear = 0 if file.read_only else kernel.ATTR_RDONLY
    identities = _identities(wanted, uid)
    try:
        kernel.set_attributes(mount, attributes | kernel.ATTR_IDMAP, clear, identities)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EPERM):
            raise
        raise _Refused(
            f"the file system of {path} cannot be shown to a jail as another user's:"
            f" {error.strerror}",
            "have banger's files on ext4, btrfs or xfs, with Linux 5.15 or later; or do without"
            " the jail: jailer_enabled = false",
        ) from None
    finally:
        os.close(identities)
    return mount


def _found(path: Path, wanted: os.stat_result) -> int:
    """What `_named` finds, which must be this file.

    One answer for all else: root walks where the caller may not look.
    """
    with suppress(OSError):
        found = _named(path)
        status = os.fstat(found)
        if (status.st_dev, status.st_ino) == (wanted.st_dev, wanted.st_ino):
            return found
        os.close(found)
    raise _Refused(f"{path} is not to be found where it was opened")


def _named(path: Path) -> int:
    """A descriptor that names what is at a path, no part of which may be a link.

    Not by openat2(2): the helper's unit has `RestrictSUIDSGID`, which knows nothing of it.
    """
    current = os.open("/", os.O_PATH | os.O_CLOEXEC)
    for part in path.parts[1:]:
        directory = current
        try:
            flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
            current = os.open(part, flags, dir_fd=directory)
        finally:
            os.close(directory)
    return current


def _identities(file: os.stat_result, uid: int) -> int:
    """A user namespace that maps a file's owner and group to the jail's user: its descriptor.

    It lives on by that; the process that made it need not.
    """
    ready, made = os.pipe()
    go, done = os.pipe()
    child = fork.fork()
    if child == 0:
        try:
            os.close(done)
            kernel.unshare(kernel.CLONE_NEWUSER)
            os.write(made, b"r")
            os.read(go, 1)
        finally:
            fork.leave(0)
    os.close(made)
    os.close(go)
    try:
        if not os.read(ready, 1):
            raise _Refused(
                "there are no user namespaces to be had",
                "look at: sysctl user.max_user_namespaces",
            )
        Path(f"/proc/{child}/uid_map").write_text(f"{file.st_uid} {uid} 1")
        Path(f"/proc/{child}/gid_map").write_text(f"{file.st_gid} {uid} 1")
        return os.open(f"/proc/{child}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(ready)
        os.close(done)
        os.waitpid(child, 0)


def _make_root(order: JailOrder) -> Path:
    """The directory that will be the root of the jail, in memory that goes with it."""
    size = os.stat(order.firecracker).st_size + _ROOM_BYTES  # noqa: PTH116 - pathlib is no faster
    kernel.mount_tmpfs(BASE, f"mode=0755,size={size},nr_inodes={_INODES}")
    root = jail_root(order)
    root.mkdir(parents=True, mode=0o755)
    return root


def _place(file: JailFile, mount: int, root: Path, uid: int) -> None:
    """Have a file in the jail, by its name."""
    path = root / file.name
    path.parent.mkdir(mode=0o755, exist_ok=True)
    status = os.fstat(file.descriptor)
    if stat.S_ISBLK(status.st_mode):
        # Root's, so that whoever is in the jail cannot give himself more of it.
        os.mknod(path, stat.S_IFBLK, status.st_rdev)
        os.chown(path, 0, uid)
        path.chmod(0o440 if file.read_only else 0o660)
        return
    if stat.S_ISDIR(status.st_mode):
        path.mkdir(mode=0o700)
    else:
        path.touch(mode=0o600, exist_ok=False)
    kernel.attach_mount(mount, path)
    os.close(mount)


# The jailer.


def _start(order: JailOrder) -> int:
    """A pidfd of the jailer, which is alone in a namespace of processes and becomes Firecracker."""
    kernel.unshare(kernel.CLONE_NEWPID)
    failed, tell = os.pipe()  # whose end closes when the jailer is executed
    child = fork.fork()
    if child == 0:
        try:
            _become_jailer(order)
        except OSError as error:
            os.write(tell, (error.strerror or "").encode())
        finally:
            fork.leave(127)
    os.close(tell)
    pidfd = os.pidfd_open(child)  # not reaped yet, so the pid is still its own
    if said := os.read(failed, 200):
        raise _Refused(f"{order.jailer} cannot be executed: {said.decode(errors='replace')}")
    return pidfd


def _become_jailer(order: JailOrder) -> None:
    os.setsid()
    os.umask(0o077)
    nowhere = os.open(os.devnull, os.O_RDONLY)
    for descriptor, standard in ((nowhere, 0), (order.console, 1), (order.log, 2)):
        os.dup2(descriptor, standard)
    os.chdir("/")
    kernel.leave_keyring()
    fork.execute(jailer_argv(order), {})


def main() -> None:
    try:
        launch(msgspec.json.decode(sys.stdin.buffer.read(), type=JailOrder))
    except _Refused as error:
        _fail(str(error), error.hint)
    except OSError as error:
        _fail(f"{error.filename or _place_of(error)}: {error.strerror}")


def _place_of(error: OSError) -> str:
    """The function that failed, for calls of the kernel's, whose errors name nothing."""
    names = []
    trace = error.__traceback__
    while trace is not None:
        names.append(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    return next((name for name in reversed(names) if not name.startswith("_c")), "")


def _fail(message: str, hint: str = "") -> None:
    # A path may have any bytes.
    message = message.encode(errors="replace").decode()
    sys.stdout.buffer.write(msgspec.json.encode(LaunchFailed(message=message, hint=hint)))
    sys.stdout.flush()
    sys.exit(1)


if __name__ == "__main__":
    main()
