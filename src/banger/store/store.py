"""The database: VMs, images, kernels, templates and snapshots, each a row.

One SQLite connection in WAL mode, used from one worker thread so that the event loop never waits
for the disk. Opened at the daemon's start, closed at its end. The schema moves forward only; a
database of a newer version is refused.
"""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import TypeVar

import msgspec

from banger.base.errors import Conflict, Internal, NotFound, PreconditionFailed
from banger.base.model import Image, Kernel, Snapshot, Template, Vm, Workspace

T = TypeVar("T")
R = TypeVar("R", Image, Kernel, Snapshot)

#: SQLite writes some KiB before anything can be read.
_NEEDS_FREE_BYTES = 1 << 20

_encode = msgspec.json.Encoder().encode
_decode_vm = msgspec.json.Decoder(Vm).decode


class Store:
    """Open with `Store.open`; every method is one transaction."""

    def __init__(self, connection: sqlite3.Connection, worker: ThreadPoolExecutor) -> None:
        self._connection = connection
        self._worker = worker

    @classmethod
    async def open(cls, path: Path) -> Store:
        """Open or make the database and bring its schema up to date.

        Raises PreconditionFailed for a database from a newer version or one that is not readable.
        """
        worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store")
        loop = asyncio.get_running_loop()
        try:
            connection = await loop.run_in_executor(worker, _connect, path)
        except BaseException:
            worker.shutdown(wait=False)
            raise
        return cls(connection, worker)

    async def close(self) -> None:
        await self._run(sqlite3.Connection.close)
        self._worker.shutdown()

    async def insert_vm(self, vm: Vm) -> None:
        """Add a VM. Raises Conflict when the name is taken."""

        def work(db: sqlite3.Connection) -> None:
            with _unique_name(vm), db:
                db.execute(
                    "INSERT INTO vms (id, name, image_id, kernel_id, record, workspace)"
                    " VALUES (?, ?, ?, ?, ?, ?)",
                    (vm.id, vm.name, vm.image_id, vm.kernel_id, _json(vm), _json(vm.workspace)),
                )

        await self._run(work)

    async def update_vm(self, vm: Vm) -> None:
        """Replace a VM's row. Raises NotFound when it is gone, Conflict when its name is taken."""

        def work(db: sqlite3.Connection) -> None:
            with _unique_name(vm), db:
                done = db.execute(
                    "UPDATE vms SET name = ?, record = ? WHERE id = ?", (vm.name, _json(vm), vm.id)
                )
            if done.rowcount != 1:
                raise NotFound(f'vm "{vm.name}" not found')

        await self._run(work)

    async def touch_vm(self, vm_id: str, moment: datetime) -> None:
        """Note when a VM was last used: whoever replaces the record meanwhile does not lose it."""

        def work(db: sqlite3.Connection) -> None:
            with db:
                db.execute(
                    "UPDATE vms SET touched_at = ? WHERE id = ?", (moment.isoformat(), vm_id)
                )

        await self._run(work)

    async def set_workspace(self, vm_id: str, workspace: Workspace) -> None:
        """Note which repository a VM was given; nothing when the VM is gone."""

        def work(db: sqlite3.Connection) -> None:
            with db:
                db.execute("UPDATE vms SET workspace = ? WHERE id = ?", (_json(workspace), vm_id))

        await self._run(work)

    async def delete_vm(self, vm_id: str) -> None:
        """Remove a VM's row; nothing when it is gone already."""
        await self._delete("vms", vm_id)

    async def get_vm(self, vm_id: str) -> Vm | None:
        def work(db: sqlite3.Connection) -> Vm | None:
            query = "SELECT record, touched_at, workspace FROM vms WHERE id = ?"
            row = db.execute(query, (vm_id,)).fetchone()
            return None if row is None else _vm(*row)

        return await self._run(work)

    async def vms(self) -> list[Vm]:
        """All VMs, by name."""

        def work(db: sqlite3.Connection) -> list[Vm]:
            rows = db.execute("SELECT record, touched_at, workspace FROM vms ORDER BY name")
            return [_vm(*row) for row in rows]

        return await self._run(work)

    async def insert_image(self, image: Image) -> None:
        """Add an image. Raises Conflict when the name is taken."""

        def work(db: sqlite3.Connection) -> None:
            try:
                with db:
                    db.execute(
                        "INSERT INTO images (id, name, kernel_id, record) VALUES (?, ?, ?, ?)",
                        (image.id, image.name, image.kernel_id, _json(image)),
                    )
            except sqlite3.IntegrityError as error:
                raise image_exists(image.name) from error

        await self._run(work)

    async def update_image(self, image: Image) -> None:
        """Replace the record of an image that is there."""

        def work(db: sqlite3.Connection) -> None:
            with db:
                db.execute("UPDATE images SET record = ? WHERE id = ?", (_json(image), image.id))

        await self._run(work)

    async def delete_image(self, image_id: str) -> None:
        await self._delete("images", image_id)

    async def image_named(self, name: str) -> Image | None:
        return await self._get("images", "name", name, Image)

    async def get_image(self, image_id: str) -> Image | None:
        return await self._get("images", "id", image_id, Image)

    async def images(self) -> list[Image]:
        return await self._all("images", Image)

    async def vms_of_image(self, image_id: str) -> list[str]:
        """Names of the VMs whose disks lie over this image."""

        def work(db: sqlite3.Connection) -> list[str]:
            rows = db.execute("SELECT name FROM vms WHERE image_id = ? ORDER BY name", (image_id,))
            return [str(row[0]) for row in rows]

        return await self._run(work)

    async def snapshots_of_image(self, image_id: str) -> list[str]:
        """Names of the snapshots whose disks lie over this image."""

        def work(db: sqlite3.Connection) -> list[str]:
            query = "SELECT name FROM snapshots WHERE image_id = ? ORDER BY name"
            return [str(row[0]) for row in db.execute(query, (image_id,))]

        return await self._run(work)

    async def insert_snapshot(self, snapshot: Snapshot) -> None:
        """Add a snapshot. Raises Conflict when the name is taken."""

        def work(db: sqlite3.Connection) -> None:
            row = (snapshot.id, snapshot.name, snapshot.image_id, _json(snapshot))
            try:
                with db:
                    db.execute(
                        "INSERT INTO snapshots (id, name, image_id, record) VALUES (?, ?, ?, ?)",
                        row,
                    )
            except sqlite3.IntegrityError as error:
                raise snapshot_exists(snapshot.name) from error

        await self._run(work)

    async def delete_snapshot(self, snapshot_id: str) -> None:
        await self._delete("snapshots", snapshot_id)

    async def snapshots(self) -> list[Snapshot]:
        """All snapshots, by name."""
        return await self._all("snapshots", Snapshot)

    async def insert_kernel(self, kernel: Kernel) -> None:
        """Add a kernel. Raises Conflict when the name is taken."""

        def work(db: sqlite3.Connection) -> None:
            try:
                with db:
                    db.execute(
                        "INSERT INTO kernels (id, name, record) VALUES (?, ?, ?)",
                        (kernel.id, kernel.name, _json(kernel)),
                    )
            except sqlite3.IntegrityError as error:
                raise kernel_exists(kernel.name) from error

        await self._run(work)

    async def delete_kernel(self, kernel_id: str) -> None:
        await self._delete("kernels", kernel_id)

    async def users_of_kernel(self, kernel_id: str) -> list[str]:
        """What needs this kernel: ``image NAME``, ``vm NAME``, ``snapshot NAME``."""

        def work(db: sqlite3.Connection) -> list[str]:
            rows = db.execute(
                "SELECT 'image ' || name FROM images WHERE kernel_id = :id"
                " UNION SELECT 'vm ' || name FROM vms WHERE kernel_id = :id"
                " UNION SELECT 'snapshot ' || name FROM snapshots"
                " WHERE json_extract(record, '$.kernel_id') = :id ORDER BY 1",
                {"id": kernel_id},
            )
            return [str(row[0]) for row in rows]

        return await self._run(work)

    async def kernel_named(self, name: str) -> Kernel | None:
        return await self._get("kernels", "name", name, Kernel)

    async def get_kernel(self, kernel_id: str) -> Kernel | None:
        return await self._get("kernels", "id", kernel_id, Kernel)

    async def kernels(self) -> list[Kernel]:
        return await self._all("kernels", Kernel)

    async def insert_template(self, template: Template) -> None:
        """Add a template; its key must be free."""

        def work(db: sqlite3.Connection) -> None:
            with db:
                db.execute(
                    "INSERT INTO templates (id, key, image_id, used_at, record)"
                    " VALUES (?, ?, ?, ?, ?)",
                    (
                        template.id,
                        template.key,
                        template.image_id,
                        template.used_at.isoformat(),
                        _json(template),
                    ),
                )

        await self._run(work)

    async def touch_template(self, template_id: str, moment: datetime) -> None:
        """Note when a template was last used."""

        def work(db: sqlite3.Connection) -> None:
            with db:
                db.execute(
                    "UPDATE templates SET used_at = ? WHERE id = ?",
                    (moment.isoformat(), template_id),
                )

        await self._run(work)

    async def delete_template(self, template_id: str) -> None:
        await self._delete("templates", template_id)

    async def template_of_key(self, key: str) -> Template | None:
        def work(db: sqlite3.Connection) -> Template | None:
            query = "SELECT record, used_at FROM templates WHERE key = ?"
            row = db.execute(query, (key,)).fetchone()
            return None if row is None else _template(*row)

        return await self._run(work)

    async def templates(self) -> list[Template]:
        """All templates, the one that was used last first."""

        def work(db: sqlite3.Connection) -> list[Template]:
            rows = db.execute("SELECT record, used_at FROM templates ORDER BY used_at DESC")
            return [_template(*row) for row in rows]

        return await self._run(work)

    async def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        loop = asyncio.get_running_loop()
        try:
            # A transaction that was begun is finished even when its caller is cancelled.
            return await asyncio.shield(loop.run_in_executor(self._worker, work, self._connection))
        except sqlite3.Error as error:
            raise Internal(
                f"the database failed: {error}", hint="is the disk full? see: banger daemon logs"
            ) from error
        except msgspec.DecodeError as error:
            raise Internal(
                f"the database holds a record that this version cannot read: {error}",
                hint="was it written by a newer banger?",
            ) from error

    # The table and column names below are literals of this module, never from outside.

    async def _get(self, table: str, column: str, value: str, kind: type[R]) -> R | None:
        def work(db: sqlite3.Connection) -> R | None:
            query = f"SELECT record FROM {table} WHERE {column} = ?"  # noqa: S608
            row = db.execute(query, (value,)).fetchone()
            return None if row is None else msgspec.json.decode(row[0], type=kind)

        return await self._run(work)

    async def _all(self, table: str, kind: type[R]) -> list[R]:
        decoder = msgspec.json.Decoder(kind)

        def work(db: sqlite3.Connection) -> list[R]:
            rows = db.execute(f"SELECT record FROM {table} ORDER BY name")  # noqa: S608
            return [decoder.decode(row[0]) for row in rows]

        return await self._run(work)

    async def _delete(self, table: str, row_id: str) -> None:
        def work(db: sqlite3.Connection) -> None:
            with db:
                db.execute(f"DELETE FROM {table} WHERE id = ?", (row_id,))  # noqa: S608

        await self._run(work)


def snapshot_exists(name: str) -> Conflict:
    return Conflict(
        f'snapshot "{name}" already exists',
        hint=f"choose another name, or: banger snapshot delete {name}",
    )


def image_exists(name: str) -> Conflict:
    return Conflict(
        f'image "{name}" already exists',
        hint=f"take another name, or to renew it: banger image delete {name}",
    )


def kernel_exists(name: str) -> Conflict:
    return Conflict(
        f'kernel "{name}" already exists', hint=f"to renew it: banger kernel delete {name}"
    )


def _json(record: msgspec.Struct | None) -> str:
    return _encode(record).decode()


@contextmanager
def _unique_name(vm: Vm) -> Iterator[None]:
    try:
        yield
    except sqlite3.IntegrityError as error:
        raise Conflict(
            f'vm "{vm.name}" already exists', hint="choose another --name, or delete it first"
        ) from error


def _vm(record: str, touched_at: str | None, workspace: str | None) -> Vm:
    vm = _decode_vm(record)
    moment = None if touched_at is None else datetime.fromisoformat(touched_at)
    given = None if workspace is None else msgspec.json.decode(workspace, type=Workspace | None)
    if (vm.touched_at, vm.workspace) == (moment, given):
        return vm
    return msgspec.structs.replace(vm, touched_at=moment, workspace=given)


def _template(record: str, used_at: str) -> Template:
    template = msgspec.json.decode(record, type=Template)
    return msgspec.structs.replace(template, used_at=datetime.fromisoformat(used_at))


def _connect(path: Path) -> sqlite3.Connection:
    try:
        connection = sqlite3.connect(path, check_same_thread=False)
        try:
            path.chmod(0o600)
            connection.execute("PRAGMA journal_mode = WAL")
            # WAL with NORMAL loses no consistency on a crash, at most the last transaction on
            # power loss; start-up reconciles with what really runs anyway.
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute("PRAGMA busy_timeout = 5000")
            _migrate(connection, path)
        except BaseException:
            connection.close()
            raise
    except sqlite3.Error as error:
        hint = "move it away to begin with an empty one"
        if _is_full(path.parent):
            hint = f"the disk is full: make room in {path.parent}"
        raise PreconditionFailed(f"cannot use the database {path}: {error}", hint=hint) from error
    return connection


def _is_full(directory: Path) -> bool:
    try:
        return shutil.disk_usage(directory).free < _NEEDS_FREE_BYTES
    except OSError:
        return False


def migrations() -> list[tuple[int, str]]:
    """(number, SQL) of each migration, in order."""
    folder = resources.files("banger.store") / "migrations"
    scripts = [entry for entry in folder.iterdir() if entry.name.endswith(".sql")]
    return sorted((int(script.name[:3]), script.read_text("utf-8")) for script in scripts)


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    steps = migrations()
    newest = steps[-1][0]
    (current,) = connection.execute("PRAGMA user_version").fetchone()
    if current > newest:
        raise PreconditionFailed(
            f"the database {path} is from a newer banger"
            f" (schema {current}; this version knows {newest})",
            hint="upgrade banger, or move the database away",
        )
    for number, script in steps:
        if number > current:
            try:
                connection.executescript(
                    f"BEGIN IMMEDIATE; {script}\n; PRAGMA user_version = {number}; COMMIT;"
                )
            except sqlite3.Error:
                with suppress(sqlite3.Error):
                    connection.rollback()
                raise
