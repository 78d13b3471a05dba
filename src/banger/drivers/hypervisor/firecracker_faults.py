"""What Firecracker's errors mean, and what is to be done about them."""

from __future__ import annotations

from dataclasses import dataclass

from banger.base.errors import BangerError, PermissionDenied, PreconditionFailed, Unavailable
from banger.drivers.hypervisor.firecracker_requests import VCPU_MAX


class FirecrackerRefused(Unavailable):
    """Firecracker has answered a request with an error, for what stands in ``fault``."""

    def __init__(self, message: str, *, hint: str = "", fault: str = "") -> None:
        super().__init__(message, hint=hint)
        self.fault = fault


@dataclass(frozen=True)
class _Known:
    """An error of Firecracker's, by a part of what it says of it (`vmm/src/rpc_interface.rs` and
    what that names), and what is to be done: in that, ``{vm}`` is the machine's."""

    says: str
    error: type[BangerError]
    meaning: str
    hint: str


_KVM_HINT = 'see: banger doctor; without KVM: hypervisor = "qemu"'
_KERNEL_HINT = "see: banger kernel list"
_COLD_HINT = "start the VM without its memory: banger vm start --cold {vm}"
_KILL_HINT = "end it: banger vm kill {vm}"
_MEMORY_HINT = "change it: banger vm set {vm} --memory SIZE"
_LOG_HINT = "see vms/{vm}/hypervisor.log where banger keeps its state, and: banger vm logs {vm}"


#: The first that fits counts: what is closer to the cause comes before what tells of it. Errors of
#: the system's go by their numbers: the C library names them, and releases have musl's, whose names
#: are not those of glibc ("Out of memory", "No file descriptors available", "Address in use").
_KNOWN = (
    _Known(
        "(os error 12)",
        Unavailable,
        "the host has not enough memory",
        "stop other VMs, or give it less: banger vm set {vm} --memory SIZE",
    ),
    _Known(
        "(os error 24)",
        Unavailable,
        "it may not open more files",
        "let bangerd have more open (ulimit -n; LimitNOFILE= of its unit), then: banger daemon"
        " restart",
    ),
    _Known(
        "(os error 98)",
        Unavailable,
        "another process has made the socket of its vsock",
        "see which one listens: ss -xlp; end it, then: banger vm start {vm}",
    ),
    _Known(
        "not supported after starting the microVM",
        FirecrackerRefused,
        "its machine runs already",
        _KILL_HINT,
    ),
    _Known(
        "not supported before starting the microVM",
        FirecrackerRefused,
        "its machine has not been started",
        _KILL_HINT,
    ),
    _Known("Error creating KVM object", PreconditionFailed, "there is no usable KVM", _KVM_HINT),
    _Known("Kvm error:", PreconditionFailed, "KVM does not do what it needs", _KVM_HINT),
    _Known(
        "snapshot not allowed after configuring",
        FirecrackerRefused,
        "a state cannot be loaded into a machine that was configured",
        _COLD_HINT,
    ),
    _Known(
        "Invalid data version", FirecrackerRefused, "the state is another release's", _COLD_HINT
    ),
    _Known("CRC64 validation failed", FirecrackerRefused, "the saved state is damaged", _COLD_HINT),
    _Known("the tap device", Unavailable, "it cannot open the machine's tap", "see: banger doctor"),
    _Known("No space left on device", Unavailable, "the disk is full", "make room on it"),
    _Known(
        "The kernel file cannot be opened",
        PreconditionFailed,
        "it cannot open the kernel",
        _KERNEL_HINT,
    ),
    _Known(
        "without kernel configuration", FirecrackerRefused, "it has got no kernel", _KERNEL_HINT
    ),
    _Known(
        "The initrd file cannot be opened",
        PreconditionFailed,
        "it cannot open the initramfs",
        "see that the file is there, and whose it is",
    ),
    _Known(
        "Error with initrd initialization",
        PreconditionFailed,
        "it cannot load the initramfs, for which its memory may be too small",
        _MEMORY_HINT,
    ),
    _Known(
        "the virtio block device",
        Unavailable,
        "it cannot use a disk",
        "see that the file is there, and whose it is",
    ),
    _Known(
        "Cannot initialize the metrics system",
        Unavailable,
        "it cannot count into a file",
        "see that the directory of its sockets is there, and whose it is",
    ),
    _Known(
        "Amount of pages requested is too large",
        PreconditionFailed,
        "the machine cannot have this balloon",
        _MEMORY_HINT,
    ),
    _Known("Permission denied", PermissionDenied, "it may not open a file", "see whose it is"),
    _Known(
        "Failed to get snapshot state from file",
        FirecrackerRefused,
        "the saved state cannot be read",
        _COLD_HINT,
    ),
    _Known(
        "Failed to restore from snapshot",
        FirecrackerRefused,
        "the machine cannot go on from its saved state",
        _COLD_HINT,
    ),
    _Known(
        "The memory size (MiB) is",
        PreconditionFailed,
        "the machine cannot have that much memory",
        _MEMORY_HINT,
    ),
    _Known(
        "The number of vCPUs must be",
        PreconditionFailed,
        f"the machine cannot have that many vCPUs: from 1 to {VCPU_MAX}",
        "give it fewer, by --vcpu",
    ),
    _Known(
        "Cannot set the memory regions",
        PreconditionFailed,
        "KVM does not give the machine that much memory",
        "give it less, by --memory",
    ),
)


def error_of(what: str, fault: str, vm: str) -> BangerError:
    """The error for a request (`what`: its method and path) that was answered with this fault;
    `vm` is what commands know the machine by."""
    for known in _KNOWN:
        if known.says in fault:
            message = f"Firecracker refuses {what}: {known.meaning}: {fault}"
            hint = known.hint.format(vm=vm)
            if known.error is FirecrackerRefused:
                return FirecrackerRefused(message, hint=hint, fault=fault)
            return known.error(message, hint=hint)
    message = f"Firecracker refuses {what}: {fault}"
    return FirecrackerRefused(message, hint=_LOG_HINT.format(vm=vm), fault=fault)
