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
    what that names), and what is to be done."""

    says: str
    error: type[BangerError]
    meaning: str
    hint: str


_KVM_HINT = 'see: banger doctor; without KVM: hypervisor = "qemu"'
_COLD_HINT = "start the VM without its memory: banger vm start --cold"
_KILL_HINT = "end it: banger vm kill"


#: The first that fits counts: what is closer to the cause comes before what tells of it.
_KNOWN = (
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
        "",
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
        "see: banger kernel list",
    ),
    _Known(
        "The initrd file cannot be opened", PreconditionFailed, "it cannot open the initramfs", ""
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
        "",
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
        "change it: banger vm set --memory",
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


def error_of(what: str, fault: str) -> BangerError:
    """The error for a request (`what`: its method and path) that was answered with this fault."""
    for known in _KNOWN:
        if known.says in fault:
            message = f"Firecracker refuses {what}: {known.meaning}: {fault}"
            if known.error is FirecrackerRefused:
                return FirecrackerRefused(message, hint=known.hint, fault=fault)
            return known.error(message, hint=known.hint)
    return FirecrackerRefused(f"Firecracker refuses {what}: {fault}", fault=fault)
