"""A git repository of the host given to a guest, and what the guest made of it taken out again.

The VM's lock is held only to look at the VM: a transfer has the lock of the workspace, so that it
never keeps a VM from being stopped.
"""

from __future__ import annotations

import asyncio
import os
import posixpath
import re
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec

from banger.base.errors import BadRequest, NotFound, OperationTimeout, PreconditionFailed
from banger.base.files import sync_file
from banger.base.model import FileChange, Plan, ShippedFile, Vm, Workspace, WorkspaceMode, now
from banger.base.paths import Paths, prepare_private_dir
from banger.base.units import format_size
from banger.git import patch as patches
from banger.git.shipment import Shipment, Wish, check_submodules, pack, shown
from banger.git.source import Source, check_branch_name, inspect, resolve
from banger.git.throwaway import throwaway
from banger.git.tooling import Step, steps
from banger.guest.channel import AgentStream, Data, ExitKind, Stderr
from banger.guest.channel import Exit as GuestExit
from banger.services.locks import Locks, Rank
from banger.services.operations import Progress, Stages
from banger.services.vm import VmService
from banger.services.workspace_guest import LEFT_OUT, GuestSide, check, script
from banger.store.store import Store

#: Where a repository goes unless somebody says otherwise.
GUEST_PATH = "/root/repo"
_GUEST_PATH = re.compile(r"/[^\0-\x1f\x7f]+")
_SAID_BYTES = 4000
#: A guest that sends nothing of a patch for so long hangs. (An emulated one takes a minute to look
#: at a hundred thousand files.)
_SILENCE_S = 600.0


class PrepareRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A repository of the host, and how it is to be in the guest."""

    path: str
    guest_path: str = ""
    mode: WorkspaceMode = WorkspaceMode.SHALLOW_OVERLAY
    #: A branch to be made in the guest's copy, at `from_ref` or else at HEAD.
    branch: str = ""
    from_ref: str = ""
    include_untracked: bool = False
    #: Nobody may write to it afterwards (but root, who may always).
    read_only: bool = False
    #: What is at the guest's path goes.
    replace: bool = False
    #: Run what the repository asks for to install its tools.
    bootstrap: bool = False


class ExportRequest(msgspec.Struct, frozen=True, kw_only=True):
    vm: str
    #: Compare with the guest's HEAD: what was committed in the guest is left out.
    since_head: bool = False
    #: The guest's commits as a git bundle, in place of a patch.
    bundle: bool = False


@dataclass(frozen=True)
class Order:
    """A request that was looked at: it can be done, as far as the host goes."""

    request: PrepareRequest
    source: Source
    wish: Wish
    guest_path: str
    #: Whether something of the path that was named goes.
    goes: bool = True
    #: What its files ask for.
    steps: Sequence[Step] = ()

    @property
    def directory(self) -> str:
        """Where in the guest the path that was named is; one that does not go is not there."""
        if not self.goes:
            return self.guest_path
        return posixpath.normpath(posixpath.join(self.guest_path, self.source.inside.as_posix()))


class WorkspaceService:
    def __init__(self, paths: Paths, store: Store, vms: VmService) -> None:
        self._paths = paths
        self._store = store
        self._vms = vms
        self.locks = Locks(Rank.WORKSPACE)

    # In.

    async def look(self, request: PrepareRequest) -> Order:
        """Look at the repository, before anything is made for it. Raises what `git.source` does,
        BadRequest, and PreconditionFailed for what the mode cannot ship."""
        if request.from_ref and not request.branch:
            raise BadRequest("--from names where a branch begins: give it a name with --branch")
        source = await inspect(Path(request.path))
        guest_path = check_guest_path(request.guest_path or GUEST_PATH)
        commit = source.head_commit
        if request.branch:
            await check_branch_name(source, request.branch)
            if request.from_ref:
                commit = await resolve(source, request.from_ref)
        wish = Wish(request.mode, commit, request.branch, request.include_untracked)
        async with throwaway(source, self._scratch()) as repository:
            check_submodules(source, request.mode, await repository.submodules())
            if commit != source.head_commit and request.mode is not WorkspaceMode.METADATA_ONLY:
                await self._check_clean(source, request.from_ref, await repository.is_clean())
            inside = await repository.git("ls-files", "-z", "--", source.inside)
        asked_for = await asyncio.to_thread(steps, source.root, strict=request.bootstrap)
        return Order(request, source, wish, guest_path, bool(inside.stdout), asked_for)

    async def _check_clean(self, source: Source, ref: str, clean: bool) -> None:
        if not clean:
            raise PreconditionFailed(
                f"{source.root} has changes that are not of {ref}: they cannot go with it",
                hint="commit or stash them, or leave them out with --mode metadata_only",
            )

    async def plan(self, request: PrepareRequest) -> Plan:
        """What `prepare` would ship."""
        order = await self.look(request)
        with tempfile.TemporaryDirectory(prefix="pack-", dir=self._scratch()) as directory:
            shipment = await pack(order.source, order.wish, Path(directory))
            files = await asyncio.to_thread(_listed, shipment)
        return Plan(
            repo_root=shown(str(order.source.root)),
            guest_path=order.guest_path,
            mode=request.mode,
            head_commit=order.source.head_commit,
            base_commit=shipment.base_commit,
            files=files,
            size_bytes=shipment.size_bytes,
        )

    async def prepare(self, reference: str, order: Order, progress: Progress) -> Workspace:
        """Put a repository into a running VM.

        Cancelled or failed it leaves the guest's path as it was. Raises Conflict when something is
        there already, NotRunning, and PreconditionFailed.
        """
        vm = await self._running(reference, progress)
        if self.locks.held(vm.id):
            progress.stage("wait", "for another transfer")
        async with self.locks.hold(vm.id), self._vms.in_use(vm):
            with tempfile.TemporaryDirectory(prefix="pack-", dir=self._scratch()) as directory:
                progress.stage("pack", shown(str(order.source.root)))
                shipment = await pack(order.source, order.wish, Path(directory))
                workspace = _record(order, shipment)
                await GuestSide(self._vms, vm, order.guest_path).deliver(
                    shipment,
                    progress,
                    partial(self._store.set_workspace, vm.id, workspace),
                    replace=order.request.replace,
                    read_only=order.request.read_only,
                )
            await self._bootstrap(vm, order, progress)
        return workspace

    async def _bootstrap(self, vm: Vm, order: Order, progress: Progress) -> None:
        """Run what the repository asks for; where nobody wants that, say what it is."""
        files = ", ".join(dict.fromkeys(step.file for step in order.steps))
        if not order.request.bootstrap:
            if files:
                progress.note(f"the repository has {files}: --bootstrap installs what it asks for")
            return
        if not files:
            progress.note("the repository asks for nothing to be installed")
        for step in order.steps:
            progress.stage("bootstrap", step.title)
            await GuestSide(self._vms, vm, order.guest_path).bootstrap(step)

    async def _running(self, reference: str, stages: Stages | None = None) -> Vm:
        """The VM, which runs: its lock is held only to see that."""
        found = await self._vms.settled(reference)
        async with self._vms.locked(found, stages) as vm:
            return await self._vms.running(vm.id)

    def _scratch(self) -> Path:
        prepare_private_dir(self._paths.scratch_dir)
        return self._paths.scratch_dir

    # Out.

    @asynccontextmanager
    async def exporting(
        self, request: ExportRequest, *, plain: bool = False
    ) -> AsyncIterator[tuple[Vm, AgentStream]]:
        """A stream of the guest's patch, or bundle: an observation, which changes nothing there.

        A `plain` patch says nothing of renames: it has all that it takes away.

        It waits for a transfer that is under way. Raises NotFound for a VM that was given no
        repository. How the stream ends is for the caller to check.
        """
        vm = await self._running(request.vm)
        async with self.locks.hold(vm.id), self._vms.in_use(vm):
            vm = await self._vms.running(vm.id)
            workspace = given(vm)
            base = "HEAD" if request.since_head else workspace.base_commit
            if request.bundle:
                base = workspace.start_commit or workspace.head_commit
            what = "bundle" if request.bundle else "plain" if plain else "patch"
            inner = (word for pair in workspace.submodules for word in pair)
            exported = script("export", workspace.guest_path, base, what, *inner)
            async with await self._vms.open_stream(vm, exported) as stream:
                await stream.send_eof()
                yield vm, stream

    async def save(
        self, request: ExportRequest, path: Path, *, plain: bool = False, mode: int = 0o600
    ) -> str:
        """Write the guest's patch to a file that is there whole or not at all; what of the guest's
        changes is not in it, being in repositories of their own.

        Raises PreconditionFailed for one that is longer than a patch may be.
        """
        async with self.exporting(request, plain=plain) as (vm, stream):
            descriptor, name = await asyncio.to_thread(_temporary_beside, path)
            beside = Path(name)
            try:
                with os.fdopen(descriptor, "wb") as out:
                    left_out = await _received(vm, stream, out.write)
                    os.fchmod(out.fileno(), mode)
                await asyncio.to_thread(sync_file, beside)
                await asyncio.to_thread(beside.replace, path)
            finally:
                await asyncio.to_thread(beside.unlink, missing_ok=True)
        return left_out

    async def changes(self, request: ExportRequest) -> tuple[FileChange, ...]:
        """What the guest has changed, file by file, as the host reads its patch."""
        async with self._patch(request) as (_, patch, _):
            return await self.summary(patch)

    async def summary(self, patch: Path) -> tuple[FileChange, ...]:
        """What a patch that was saved changes, file by file."""
        return _shown_changes(await patches.changes(patch, self._scratch()))

    async def apply_saved(self, patch: Path, root: Path, umask: int) -> tuple[FileChange, ...]:
        """Apply a patch that was saved: see `apply`."""
        source = await inspect(root)
        return _shown_changes(await patches.apply(source, patch, self._scratch(), umask))

    async def apply(
        self, request: ExportRequest, path: str, umask: int, stages: Stages
    ) -> tuple[FileChange, ...]:
        """Apply the guest's patch to the repository at `path`, or else to the one it came from.

        All or nothing: see `git.patch`. `umask` is the user's, for the files that it makes.
        """
        stages.stage("export")
        async with self._patch(request) as (vm, patch, left_out):
            if left_out:
                stages.note(left_out)
            root = path or given(vm).repo_root
            stages.stage("apply", shown(root))
            return await self.apply_saved(patch, Path(root), umask)

    @asynccontextmanager
    async def _patch(self, request: ExportRequest) -> AsyncIterator[tuple[Vm, Path, str]]:
        """The guest's patch, in a file as long as the block, and what is not in it."""
        with tempfile.TemporaryDirectory(prefix="patch-", dir=self._scratch()) as directory:
            patch = Path(directory) / "patch"
            left_out = await self.save(request, patch, plain=True)
            yield await self._vms.show(request.vm), patch, left_out


def _record(order: Order, shipment: Shipment) -> Workspace:
    source = order.source
    return Workspace(
        source_path=shown(order.request.path),
        repo_root=shown(str(source.root)),
        repo_name=shown(source.name),
        guest_path=order.guest_path,
        mode=order.request.mode,
        head_commit=source.head_commit,
        current_branch=shown(source.branch),
        branch_name=shown(order.request.branch or source.branch),
        base_commit=shipment.base_commit,
        start_commit=order.wish.commit,
        prepared_at=now(),
        submodules=shipment.submodules,
    )


def given(vm: Vm) -> Workspace:
    """The repository that a VM was given; NotFound without one."""
    if vm.workspace is None:
        raise NotFound(
            f'vm "{vm.name}" was given no repository',
            hint=f"banger vm workspace prepare {vm.name} PATH",
        )
    return vm.workspace


def check_guest_path(path: str) -> str:
    """`path` when a repository can be put there; BadRequest otherwise."""
    plain = posixpath.normpath(path)
    if _GUEST_PATH.fullmatch(path) is None or plain in ("/", "//") or ".." in path.split("/"):
        raise BadRequest(
            f'"{shown(path)}" cannot be the place of a repository in a guest',
            hint="give an absolute path, like /root/repo",
        )
    return plain


def exported_from(vm: Vm) -> str:
    """What an export is of, for its errors."""
    return f'{given(vm).guest_path} in vm "{vm.name}"'


async def _received(vm: Vm, stream: AgentStream, write: Callable[[bytes], object]) -> str:
    """Pass on what the guest sends to its end; what it says that it left out."""
    size, said = 0, bytearray()
    while True:
        try:
            async with asyncio.timeout(_SILENCE_S):
                event = await stream.receive()
        except TimeoutError:
            raise OperationTimeout(
                f'vm "{vm.name}" has said nothing of its changes for {_SILENCE_S:g} s',
                hint=f"look into it: banger vm shell {vm.name}",
            ) from None
        match event:
            case Data(data):
                size += len(data)
                if size > patches.PATCH_LIMIT_BYTES:
                    limit = format_size(patches.PATCH_LIMIT_BYTES)
                    raise PreconditionFailed(
                        f'the patch of vm "{vm.name}" is longer than {limit}: refused',
                        hint="bring large files out with: banger vm cp",
                    )
                await asyncio.to_thread(write, data)
            case Stderr(data):
                said += data[: _SAID_BYTES - len(said)]
            case GuestExit() as exit_:
                if exit_.kind is ExitKind.EXITED and exit_.status == LEFT_OUT:
                    return said.decode(errors="backslashreplace").strip()
                check(exit_, bytes(said), exported_from(vm))
                return ""


def _temporary_beside(path: Path) -> tuple[int, str]:
    try:
        return tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise PreconditionFailed(f"cannot write {path}: {error.strerror}") from error


def _listed(shipment: Shipment) -> tuple[ShippedFile, ...]:
    files = []
    for tree in shipment.trees:
        root = os.fsencode(tree.source.root) + b"/"
        files += [
            ShippedFile(shown(tree.prefix + path), os.lstat(root + path).st_size)
            for path in tree.files
        ]
    return tuple(files)


def _shown_changes(changes: list[patches.Change]) -> tuple[FileChange, ...]:
    return tuple(
        FileChange(shown(change.path), change.insertions, change.deletions) for change in changes
    )
