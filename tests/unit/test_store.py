"""The database: what is written comes back, names are unique, schemas only move forward."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from banger.base.errors import Conflict, Internal, NotFound, PreconditionFailed
from banger.base.model import VmState
from banger.store import store as module
from banger.store.store import Store, migrations
from records import a_kernel, a_vm, an_image


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    opened = await Store.open(tmp_path / "banger.db")
    yield opened
    await opened.close()


def schema(path: Path) -> tuple[int, list[str]]:
    """(user_version, names of the tables) as another reader sees them."""
    with sqlite3.connect(path) as db:
        (version,) = db.execute("PRAGMA user_version").fetchone()
        rows = db.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")
        tables = [name for (name,) in rows]
    db.close()
    return version, tables


async def test_vms_are_written_changed_listed_by_name_and_deleted(store: Store) -> None:
    b, a = a_vm("b"), a_vm("a")
    await store.insert_vm(b)
    await store.insert_vm(a)
    assert await store.vms() == [a, b]
    running = msgspec.structs.replace(
        a, runtime=msgspec.structs.replace(a.runtime, state=VmState.RUNNING, guest_ip="1.2.3.4")
    )
    await store.update_vm(running)
    assert await store.get_vm(a.id) == running
    await store.delete_vm(a.id)
    await store.delete_vm(a.id)
    assert await store.get_vm(a.id) is None
    assert await store.vms() == [b]


async def test_images_and_kernels_are_found_by_name_and_by_id(store: Store) -> None:
    image, kernel = an_image("debian", packages=("git 1", "jq 2")), a_kernel()
    await store.insert_image(image)
    await store.insert_kernel(kernel)
    assert await store.image_named("debian") == await store.get_image(image.id) == image
    assert await store.kernel_named(kernel.name) == await store.get_kernel(kernel.id) == kernel
    assert await store.images() == [image]
    assert await store.kernels() == [kernel]
    await store.delete_image(image.id)
    assert await store.image_named("debian") is None


async def test_a_name_that_is_taken_is_a_conflict_and_changes_nothing(store: Store) -> None:
    first = a_vm("box", vm_id="1")
    await store.insert_vm(first)
    with pytest.raises(Conflict) as caught:
        await store.insert_vm(a_vm("box", vm_id="2"))
    assert caught.value.message == 'vm "box" already exists'
    assert caught.value.hint
    assert await store.vms() == [first]


async def test_a_vm_that_is_gone_cannot_be_changed(store: Store) -> None:
    with pytest.raises(NotFound, match='vm "box" not found'):
        await store.update_vm(a_vm("box"))


async def test_the_vms_of_an_image_are_named(store: Store) -> None:
    for name, image_id in (("b", "i1"), ("a", "i1"), ("c", "i2")):
        await store.insert_vm(a_vm(name, image_id=image_id))
    assert await store.vms_of_image("i1") == ["a", "b"]
    assert await store.vms_of_image("i3") == []


async def test_what_was_written_is_there_for_the_next_daemon(tmp_path: Path) -> None:
    vm = a_vm("box")
    first = await Store.open(tmp_path / "db")
    await first.insert_vm(vm)
    await first.close()
    second = await Store.open(tmp_path / "db")
    assert await second.vms() == [vm]
    await second.close()


async def test_names_cannot_inject_sql(store: Store) -> None:
    name = "'; DROP TABLE vms; --"
    vm = a_vm(name)
    await store.insert_vm(vm)
    assert await store.image_named(name) is None
    assert await store.vms() == [vm]


async def test_only_its_owner_can_read_the_database(store: Store, tmp_path: Path) -> None:
    await store.insert_vm(a_vm("box"))
    modes = {entry.name: entry.stat().st_mode & 0o777 for entry in tmp_path.iterdir()}
    assert modes["banger.db"] == 0o600
    assert set(modes.values()) == {0o600}


async def test_many_writers_and_readers_at_once_lose_nothing(store: Store) -> None:
    names = [f"vm-{number:02}" for number in range(40)]

    async def write(name: str) -> None:
        await store.insert_vm(a_vm(name))
        assert name in [vm.name for vm in await store.vms()]
        await store.update_vm(a_vm(name, state=VmState.RUNNING))

    await asyncio.gather(*map(write, names))
    found = await store.vms()
    assert [vm.name for vm in found] == names
    assert {vm.runtime.state for vm in found} == {VmState.RUNNING}


async def test_one_of_many_gets_a_name_that_all_want(store: Store) -> None:
    wanting = (store.insert_vm(a_vm("box", vm_id=str(number))) for number in range(10))
    results = await asyncio.gather(*wanting, return_exceptions=True)
    assert results.count(None) == 1
    assert sum(isinstance(result, Conflict) for result in results) == 9


async def test_a_transaction_is_finished_even_when_its_caller_is_cancelled(store: Store) -> None:
    vm = a_vm("box")
    free = threading.Event()
    before = asyncio.create_task(store._run(lambda _: free.wait(10)))
    inserting = asyncio.create_task(store.insert_vm(vm))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    inserting.cancel()
    await asyncio.gather(inserting, return_exceptions=True)
    assert inserting.cancelled()
    free.set()
    await before
    assert await store.vms() == [vm]


async def test_a_record_that_cannot_be_read_is_a_clear_error(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "db")
    await store.insert_vm(a_vm("box"))
    with sqlite3.connect(tmp_path / "db") as db:
        db.execute("""UPDATE vms SET record = '{"id": 7}'""")
    db.close()
    with pytest.raises(Internal, match="record that this version cannot read"):
        await store.vms()
    await store.close()


async def test_what_is_not_json_is_not_stored(store: Store, tmp_path: Path) -> None:
    db = sqlite3.connect(tmp_path / "banger.db")
    with pytest.raises(sqlite3.IntegrityError, match="CHECK"), db:
        db.execute("INSERT INTO kernels (id, name, record) VALUES ('1', 'k', '{')")
    db.close()


async def test_unknown_fields_of_a_record_are_ignored(tmp_path: Path) -> None:
    vm = a_vm("box")
    store = await Store.open(tmp_path / "db")
    await store.insert_vm(vm)
    with sqlite3.connect(tmp_path / "db") as db:
        db.execute("UPDATE vms SET record = json_insert(record, '$.of_tomorrow', 1)")
    db.close()
    assert await store.vms() == [vm]
    await store.close()


async def test_a_database_of_a_newer_version_is_refused_and_untouched(tmp_path: Path) -> None:
    path = tmp_path / "db"
    await (await Store.open(path)).close()
    newest = migrations()[-1][0]
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA user_version = {newest + 1}")
    db.close()
    with pytest.raises(PreconditionFailed) as caught:
        await Store.open(path)
    assert str(path) in caught.value.message
    assert "is from a newer banger" in caught.value.message
    assert f"schema {newest + 1}; this version knows {newest}" in caught.value.message
    assert "upgrade banger" in caught.value.hint
    assert schema(path)[0] == newest + 1


@pytest.mark.parametrize("content", [b"not a database at all", b"x" * 5000])
async def test_what_is_no_database_is_refused_with_its_path(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "db"
    path.write_bytes(content)
    with pytest.raises(PreconditionFailed, match="cannot use the database") as caught:
        await Store.open(path)
    assert str(path) in caught.value.message
    assert path.read_bytes() == content


async def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(PreconditionFailed, match="cannot use the database"):
        await Store.open(tmp_path / "none" / "db")


async def test_on_a_full_disk_nobody_is_told_to_give_up_the_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "db"
    path.mkdir()  # SQLite cannot use it, as it cannot use one that it has no room to open
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 0}))
    with pytest.raises(PreconditionFailed) as caught:
        await Store.open(path)
    assert caught.value.hint == f"the disk is full: make room in {tmp_path}"


async def test_each_migration_runs_once_and_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "db"
    steps = [
        (1, "CREATE TABLE trail (n INTEGER); INSERT INTO trail VALUES (1);"),
        (2, "INSERT INTO trail VALUES (2) -- it may end with a comment"),
        (3, "INSERT INTO trail VALUES (3);\n"),
    ]
    for known in (1, 1, 3, 3):
        monkeypatch.setattr(module, "migrations", lambda known=known: steps[:known])
        await (await Store.open(path)).close()
    with sqlite3.connect(path) as db:
        assert [n for (n,) in db.execute("SELECT n FROM trail")] == [1, 2, 3]
    db.close()
    assert schema(path)[0] == 3


async def test_a_broken_migration_leaves_the_old_schema(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "db"
    good = [(1, "CREATE TABLE a (n INTEGER);")]
    monkeypatch.setattr(module, "migrations", lambda: good)
    await (await Store.open(path)).close()
    broken = [*good, (2, "CREATE TABLE b (n INTEGER); INSERT INTO nowhere VALUES (1);")]
    monkeypatch.setattr(module, "migrations", lambda: broken)
    with pytest.raises(PreconditionFailed, match="nowhere"):
        await Store.open(path)
    assert schema(path) == (1, ["a"])
    mended = [*good, (2, "CREATE TABLE b (n INTEGER);")]
    monkeypatch.setattr(module, "migrations", lambda: mended)
    await (await Store.open(path)).close()
    assert schema(path) == (2, ["a", "b"])


def test_migrations_are_numbered_from_one_without_gaps() -> None:
    assert [number for number, _ in migrations()] == list(range(1, len(migrations()) + 1))
