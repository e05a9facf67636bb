"""Archived cubes as objects: copied, checked, brought back byte for byte, gone with their cube."""

import json
from pathlib import Path
from typing import Any

import pytest

from memcube.activation.keyring import Keyring
from memcube.archive import Archive, decode, encode, name_of
from memcube.catalog import Change, Principal
from memcube.catalog.schema import cubes, versions
from memcube.cube import MemCube
from memcube.errors import Corrupt, NotFound, Unavailable
from memcube.lifecycle import Event
from memcube.objects.folder import FolderStore
from memcube.reader.messages import Header, Message
from memcube.service import AddRequest
from memcube.testing.local import LocalSystem

ODD = 'Ann’s\n"tea" \u2028 \x1f \U0001f375 ́'


@pytest.fixture
def who(system: LocalSystem) -> Principal:
    return system.principal()


@pytest.fixture
def objects(tmp_path: Path) -> FolderStore:
    return FolderStore.open(tmp_path / "objects")


@pytest.fixture
def archive(system: LocalSystem, objects: FolderStore, tmp_path: Path) -> Archive:
    return Archive(system.catalog, objects, Keyring(tmp_path / "archive.keyring"))


async def archived(system: LocalSystem, who: Principal, text: str = ODD) -> MemCube:
    """A cube with two versions, archived."""
    messages = (Message(role="user", content=text, name="Ann"),)
    header = Header(user_id="ann", metadata={"a": [1.5, {"b": None}], "ü": 2**62}, tags=("x",))
    (outcome,) = await system.service.add(
        who, [AddRequest(messages=messages, header=header)], wait_indexed=True
    )
    id = outcome.results[0].cube.id
    system.clock.advance(5)
    await system.service.update(who, id, Change(text=text + "!"), expected_version=1)
    return await system.service.archive(who, id)


async def names(objects: FolderStore) -> list[str]:
    return [found.name async for found in objects.list()]


def rows(system: LocalSystem, cube: MemCube) -> list[Any]:
    with system.catalog._database.reading() as connection:
        return [
            connection.execute(cubes.select().where(cubes.c.id == cube.id)).all(),
            connection.execute(versions.select().where(versions.c.cube == cube.id)).all(),
        ]


def spoil(system: LocalSystem, cube: MemCube, text: str = "damaged") -> None:
    """Change the texts of a cube behind the catalog's back."""

    def work(connection: Any) -> None:
        connection.execute(cubes.update().where(cubes.c.id == cube.id).values(text=text))
        connection.execute(versions.update().where(versions.c.cube == cube.id).values(text=text))

    system.catalog._database.write(work)


async def test_an_archived_cube_is_copied_once(system, who, archive, objects):
    cube = await archived(system, who)
    report = await archive.step(system.clock(), limit=9)
    assert (report.copied, report.removed) == (1, 0)
    record = system.catalog.archives.of(who.tenant, cube.id)
    assert await names(objects) == [name_of(who.tenant, cube.id, record.sha256)]
    assert (await archive.step(system.clock(), limit=9)).copied == 0


async def test_a_copy_holds_all_versions_and_the_header_and_is_read_back_equal(
    system, who, archive
):
    cube = await archived(system, who)
    await archive.step(system.clock(), limit=9)
    held = await archive.read(system.catalog.archives.of(who.tenant, cube.id))
    assert [v["text"] for v in held.versions] == [ODD, ODD + "!"]
    assert held.cube["metadata"] == {"a": [1.5, {"b": None}], "ü": 2**62}
    assert held.cube["speaker"] == "Ann"
    assert held.cube["user_id"] == "ann"


async def test_a_spoilt_catalog_gets_its_content_back_byte_for_byte(system, who, archive):
    cube = await archived(system, who)
    await archive.step(system.clock(), limit=9)
    record = system.catalog.archives.of(who.tenant, cube.id)
    before = rows(system, cube)
    assert await archive.agrees(record)
    spoil(system, cube)
    assert not await archive.agrees(record)
    assert await archive.put_back(record)
    assert rows(system, cube) == before
    restored = await system.service.restore(who, cube.id)
    assert (restored.text, restored.version) == (ODD + "!", 3)


async def test_a_copy_is_noise_without_the_tenants_key(system, who, objects, archive, tmp_path):
    cube = await archived(system, who, "canary-31337 kept secret")
    await archive.step(system.clock(), limit=9)
    (name,) = await names(objects)
    data = await objects.get(name)
    assert b"canary" not in data
    assert b"ann" not in data
    assert "ann" not in name
    record = system.catalog.archives.of(who.tenant, cube.id)
    stranger = Archive(system.catalog, objects, Keyring(tmp_path / "other.keyring"))
    for without in (stranger, Archive(system.catalog, objects, None)):
        with pytest.raises(Corrupt, match="key"):
            await without.read(record)


async def test_without_a_keyring_a_copy_is_json_lines(system, who, objects):
    await archived(system, who, "plain")
    await Archive(system.catalog, objects).step(system.clock(), limit=9)
    (name,) = await names(objects)
    head, *lines = (await objects.get(name)).splitlines()
    assert head.startswith(b"memcube-archive plain ")
    parsed = [json.loads(line) for line in lines]
    assert (parsed[0], parsed[1]["text"]) == ({"format": 1, "num_versions": 2}, "plain!")


@pytest.mark.parametrize("how", ["restore", "delete", "forget", "expire"])
async def test_the_object_goes_with_what_ended_the_archiving(system, who, archive, objects, how):
    cube = await archived(system, who)
    await archive.step(system.clock(), limit=9)
    if how == "restore":
        await system.service.restore(who, cube.id)
    elif how == "delete":
        await system.service.delete(who, cube.id)
    elif how == "forget":
        await system.service.delete_scope(who, user_id="ann", agent_id=None, run_id=None)
    else:
        now = system.clock()

        def run_out(connection: Any) -> None:
            at = int(now.timestamp() * 1e6)
            connection.execute(cubes.update().values(expires_at=at))

        system.catalog._database.write(run_out)
        system.catalog.cubes.expire_due(now=now, limit=9)
    assert (await archive.step(system.clock(), limit=9)).removed == 1
    assert await names(objects) == []
    assert system.catalog.archives.doomed(limit=9) == []


class Dying(Exception):
    """The process ends here."""


@pytest.mark.parametrize("point", ["before the object", "after the object", "after the row"])
async def test_a_crash_while_copying_leaves_the_cube_whole_and_is_made_good(
    system, who, archive, objects, point, monkeypatch
):
    cube = await archived(system, who)
    before = rows(system, cube)
    put, note = objects.put, archive._book.note

    async def dying_put(name: str, data: bytes) -> None:
        if point == "after the object":
            await put(name, data)
        raise Dying

    def dying_note(record: Any) -> bool:
        note(record)
        raise Dying

    with monkeypatch.context() as patch:
        if point == "after the row":
            patch.setattr(archive._book, "note", dying_note)
        else:
            patch.setattr(objects, "put", dying_put)
        with pytest.raises(Dying):
            await archive.copy(who.tenant, cube.id, now=system.clock())
    assert rows(system, cube) == before
    await archive.step(system.clock(), limit=9)
    record = system.catalog.archives.of(who.tenant, cube.id)
    assert (await archive.read(record)).cube["text"] == ODD + "!"


async def test_a_cube_restored_while_it_is_copied_keeps_no_copy(
    system, who, archive, objects, monkeypatch
):
    cube = await archived(system, who)
    put = objects.put

    async def slow_put(name: str, data: bytes) -> None:
        await put(name, data)
        system.catalog.cubes.transition(
            who.tenant, cube.id, Event.RESTORE, author="key", now=system.clock()
        )

    monkeypatch.setattr(objects, "put", slow_put)
    assert not await archive.copy(who.tenant, cube.id, now=system.clock())
    assert await names(objects) == []
    assert system.catalog.archives.of(who.tenant, cube.id) is None


async def test_a_store_that_is_down_is_told_and_the_rest_is_done_later(
    system, who, archive, objects, monkeypatch
):
    await archived(system, who)

    async def down(*_: Any, **__: Any) -> None:
        raise Unavailable("no store")

    with monkeypatch.context() as patch:
        patch.setattr(objects, "put", down)
        with pytest.raises(Unavailable):
            await archive.step(system.clock(), limit=9)
    assert (await archive.step(system.clock(), limit=9)).copied == 1


@pytest.mark.parametrize("place", [0, 10, 30, 60, -40, -1])
@pytest.mark.parametrize("sealed", [True, False])
async def test_a_flipped_bit_is_found(system, who, objects, tmp_path, sealed, place):
    keyring = Keyring(tmp_path / "k") if sealed else None
    archive = Archive(system.catalog, objects, keyring)
    cube = await archived(system, who)
    await archive.step(system.clock(), limit=9)
    record = system.catalog.archives.of(who.tenant, cube.id)
    name = name_of(who.tenant, cube.id, record.sha256)
    data = bytearray(await objects.get(name))
    data[place] ^= 1
    await objects.put(name, bytes(data))
    with pytest.raises(Corrupt):
        await archive.read(record)
    assert await archive.replace(record, now=system.clock())
    anew = system.catalog.archives.of(who.tenant, cube.id)
    assert anew.content_sha256 == record.content_sha256
    await archive.read(anew)


async def test_a_missing_object_is_told(system, who, archive, objects):
    cube = await archived(system, who)
    await archive.step(system.clock(), limit=9)
    record = system.catalog.archives.of(who.tenant, cube.id)
    await objects.delete(name_of(who.tenant, cube.id, record.sha256))
    with pytest.raises(NotFound):
        await archive.read(record)


def lines_of(system: LocalSystem, who: Principal, cube: MemCube) -> bytes:
    found = system.catalog.archives.contents(who.tenant, cube.id)
    assert found is not None
    return encode(*found)


async def test_lines_that_are_cut_added_or_changed_are_no_archive(system, who):
    lines = lines_of(system, who, await archived(system, who)).splitlines(keepends=True)
    assert decode(b"".join(lines), where="x").cube["text"] == ODD + "!"
    wrong = [
        lines[:-1],
        lines[1:],
        [*lines[:2], *lines[3:]],
        [*lines, b"{}\n"],
        [lines[0], lines[1].replace(b"tea", b"TEA"), *lines[2:]],
        [lines[0].replace(b'"format":1', b'"format":2'), *lines[1:]],
        [b"[" * 100_000 + b"\n"],
        [b"\xff\n"],
        [],
    ]
    for given in wrong:
        with pytest.raises(Corrupt):
            decode(b"".join(given), where="x")
