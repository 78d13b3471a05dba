"""The parameters of the RPC methods, one type each. Unknown fields are ignored."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from banger.base.model import PublishedPort
from banger.base.ssh import USER
from banger.services.forks import FORKS_MAX
from banger.services.vm_spec import ChangeRequest, CreateRequest
from banger.services.vm_start import BOOT_TIMEOUT_S
from banger.services.waiting import Goal
from banger.services.workspace import ExportRequest, PrepareRequest

#: No time that anybody waits for is longer.
_A_CENTURY_S = 100 * 365 * 86400


class Params(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all: immutable, by keyword."""


class Nothing(Params, frozen=True):
    pass


class VmReference(Params, frozen=True):
    vm: str


class DeleteVm(Params, frozen=True):
    vm: str
    force: bool = False


class StartVm(Params, frozen=True):
    vm: str
    boot_timeout_s: float = BOOT_TIMEOUT_S
    #: Boot it, even where a template would be faster.
    cold: bool = False


class StopVm(Params, frozen=True):
    vm: str
    #: Keep its memory: its next start goes on from there.
    suspend: bool = False


class SnapshotVm(Params, frozen=True):
    vm: str
    name: str


class ForkVm(Params, frozen=True):
    vm: str
    count: int = 1
    #: What their names begin with; empty: the VM's name and ``-fork``.
    name: str = ""


class SnapshotReference(Params, frozen=True):
    snapshot: str


class SetVm(Params, frozen=True):
    vm: str
    change: ChangeRequest


class WaitVm(Params, frozen=True):
    vm: str
    goal: Goal = Goal.STOPPED
    #: None: for ever.
    timeout_s: Annotated[float, Meta(ge=0)] | None = None


class PruneVms(Params, frozen=True):
    #: Only VMs that nobody has used for so long.
    unused_for_s: Annotated[float, Meta(ge=0, le=_A_CENTURY_S)] = 0
    #: Ids of those that somebody was shown and agreed to; None: whichever there are.
    only: frozenset[str] | None = None
    dry_run: bool = False


class PublishPort(Params, frozen=True):
    vm: str
    port: PublishedPort


class UnpublishPort(Params, frozen=True):
    vm: str
    host_port: int
    #: Empty: at whichever address it is published.
    host: str = ""


class ConnectTo(Params, frozen=True):
    vm: str
    port: Annotated[int, Meta(ge=1, le=65535)]
    #: The server speaks first, within so long, and may not listen yet; 0 when that is not known.
    greeting_timeout_s: Annotated[float, Meta(ge=0, le=3600)] = 0


class SshTo(Params, frozen=True):
    vm: str
    user: str = USER


class PortsOf(Params, frozen=True):
    #: Empty: of all that run.
    vm: str = ""


class OperationReference(Params, frozen=True):
    id: str


class ImageReference(Params, frozen=True):
    image: str


class PruneCache(Params, frozen=True):
    dry_run: bool = False


class KernelReference(Params, frozen=True):
    kernel: str


class ImportKernel(Params, frozen=True):
    """Files of the host, by absolute paths; empty: there is none."""

    name: str
    file: str
    modules: str = ""
    config: str = ""


class TemplateReference(Params, frozen=True):
    template: str


class PruneTemplates(Params, frozen=True):
    #: Also those that a start would still use.
    everything: bool = False
    dry_run: bool = False


Dimension = Annotated[int, Meta(ge=0, le=65535)]


class Command(Params, frozen=True):
    """A process in a guest. No arguments: the user's login shell. What is not given is as the image
    says."""

    argv: tuple[str, ...] = ()
    #: ``K=V``
    env: tuple[str, ...] = ()
    cwd: str = ""
    #: ``USER[:GROUP]``, names or numbers.
    user: str = ""
    tty: bool = False
    rows: Dimension = 24
    columns: Dimension = 80
    detach: bool = False


class Exec(Params, frozen=True):
    vm: str
    command: Command


#: The user's, for files that are made for him.
Umask = Annotated[int, Meta(ge=0, le=0o777)]


class Run(Params, frozen=True):
    """Make a VM and run a command in it. Without one it is just made. The command has the image's
    entrypoint before it; one without arguments is the image's own, if it has any and there is no
    repository."""

    create: CreateRequest
    command: Command | None = None
    #: In place of the image's entrypoint and arguments; empty: none.
    entrypoint: str | None = None
    #: A repository for it: the command runs there.
    workspace: PrepareRequest | None = None
    #: A file of the host's for the guest's patch, written when the command has ended, however.
    export: str = ""
    umask: Umask = 0o077


class ExportImage(Params, frozen=True):
    image: str
    #: The file of the host that the bundle is written to.
    file: str
    umask: Umask = 0o077


class ExportKernel(Params, frozen=True):
    kernel: str
    #: The file of the host that the bundle is written to.
    file: str
    umask: Umask = 0o077


class RunForks(Params, frozen=True):
    """Make a VM, fork it, and run a command in each of the forks."""

    create: CreateRequest
    command: Command
    count: Annotated[int, Meta(ge=1, le=FORKS_MAX)]
    #: As of `Run`.
    entrypoint: str | None = None
    workspace: PrepareRequest | None = None
    #: Delete the forks when their commands have ended.
    remove: bool = False


class ResultsReference(Params, frozen=True):
    results: str


class ApplyResult(Params, frozen=True):
    results: str
    fork: int
    umask: Umask = 0o077
    #: Another repository than the one that it came from.
    path: str = ""


class PlanWorkspace(Params, frozen=True):
    workspace: PrepareRequest


class PrepareWorkspace(Params, frozen=True):
    vm: str
    workspace: PrepareRequest


class ApplyWorkspace(Params, frozen=True):
    export: ExportRequest
    umask: Umask = 0o077
    #: Another repository than the one that it came from.
    path: str = ""


class Console(Params, frozen=True):
    vm: str
    follow: bool = False


class CopyOut(Params, frozen=True):
    """The file or tree at ``path`` as a tar whose first component is ``name``."""

    vm: str
    path: str
    name: str = ""


class CopyIn(Params, frozen=True):
    """A tar into ``directory``; the first component of each member becomes ``name``."""

    vm: str
    directory: str
    name: str = ""


class GuestPath(Params, frozen=True):
    vm: str
    path: str


class FileKind(Params, frozen=True):
    """What `vm.stat` answers: whether it is there, and as what (file, directory, link, other)."""

    exists: bool
    kind: str = ""
    mode: int = 0
    size_bytes: int = 0
