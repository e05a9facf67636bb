"""The doctor: each way in which a part can disagree is found, said, and mended where a rule can."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memcube.activation.keyring import Keyring
from memcube.archive import Archive, name_of
from memcube.catalog import Change, NewAdapter, Principal
from memcube.catalog.schema import cubes
from memcube.cube import Draft, MemCube, Scope
from memcube.doctor import AdapterCheck, ArchiveCheck, Diagnosis, Doctor, IndexCheck
from memcube.errors import Unavailable
from memcube.indexing import indexed_cube
from memcube.objects.folder import FolderStore
from memcube.parametric.registry import AdapterFiles
from memcube.reader.messages import Header
from memcube.service import AddRequest
from memcube.testing.local import LocalSystem

Kinds = dict[str, tuple[int, int]]


@pytest.fixture
def who(system: LocalSystem) -> Principal:
    return system.principal()


@pytest.fixture
def objects(tmp_path: Path) -> FolderStore:
    return FolderStore.open(tmp_path / "objects")


@pytest.fixture
def archive(system: LocalSystem, objects: FolderStore, tmp_path: Path) -> Archive:
    return Archive(system.catalog, objects, Keyring(tmp_path / "archive.keyring"))


@pytest.fixture
def doctor(system: LocalSystem, objects: FolderStore, archive: Archive) -> Doctor:
    async def open_objects() -> FolderStore:
        return objects

    async def pause(_seconds: float) -> None:
        return None

    shards = system.shards.__getitem__
    return Doctor(
        [
            IndexCheck(system.catalog, system.indexer, shards, num_shards=1),
            AdapterCheck(system.catalog, open_objects, pause=pause),
            ArchiveCheck(system.catalog, open_objects, lambda _: archive, pause=pause),
        ]
    )


@pytest.fixture
def examine(system: LocalSystem, doctor: Doctor) -> Callable[..., Any]:
    async def after_the_grace(*, repair: bool = False, **how: Any) -> Diagnosis:
        system.clock.advance(60)
        return await doctor.examine(system.clock(), repair=repair, **how)

    return after_the_grace


def told(found: Diagnosis) -> Kinds:
    """Counts and repairs, by what is wrong."""
    return {f"{f.check}: {f.kind}": (f.count, f.repaired) for f in found.findings}


async def mended(examine: Any, *kinds: str, left: bool = False) -> None:
    """Each is found once without a change, mended once, and gone then."""
    looked = await examine()
    assert told(looked) == dict.fromkeys(kinds, (1, 0))
    assert not looked.sound
    assert told(await examine()) == told(looked)
    repaired = await examine(repair=True)
    assert told(repaired) == dict.fromkeys(kinds, (1, 1))
    assert repaired.sound
    last = await examine()
    assert (told(last), last.sound) == ({}, True)


async def add(system: LocalSystem, who: Principal, *texts: str) -> list[MemCube]:
    outcomes = await system.service.add(
        who,
        [AddRequest(text=text, header=Header(user_id="ann")) for text in texts],
        wait_indexed=True,
    )
    return [outcome.results[0].cube for outcome in outcomes]


async def archived(system: LocalSystem, who: Principal, archive: Archive, text: str = "tea"):
    (cube,) = await add(system, who, text)
    cube = await system.service.archive(who, cube.id)
    await archive.step(system.clock(), limit=9)
    record = system.catalog.archives.of(who.tenant, cube.id)
    assert record is not None
    return cube, record


async def test_a_sound_system_is_said_to_be_so(system, who, examine, archive):
    await add(system, who, "tea", "milk")
    await archived(system, who, archive, "old")
    found = await examine(repair=True)
    assert found.sound
    assert found.findings == []
    assert found.looked_at == {"index": 2, "adapters": 0, "archive": 2}


# -- the index -------------------------------------------------------------------------------------


async def test_what_the_index_lost_is_put_again(system, who, examine):
    tea, _ = await add(system, who, "tea", "milk")
    await system.shards[0].store.delete(who.tenant, {tea.id: 1})
    system.shards[0].store._tombstones.clear()
    await mended(examine, "index: missing")
    assert tea.id in system.shards[0].held()


async def test_an_old_version_in_the_index_is_replaced(system, who, examine):
    (tea,) = await add(system, who, "tea")
    store = system.shards[0].store
    before = store._cubes[who.tenant][tea.id]
    await system.service.update(who, tea.id, Change(text="coffee"), expected_version=1)
    store._cubes[who.tenant][tea.id] = before
    await mended(examine, "index: stale")
    assert system.shards[0].held() == {tea.id: 2}


async def test_what_the_catalog_does_not_want_leaves_the_index(system, who, examine):
    (tea,) = await add(system, who, "tea")
    await system.service.delete(who, tea.id)
    vector = np.zeros(system.embedder.dim, dtype=np.float32)
    vector[0] = 1.0
    system.shards[0].store._tombstones.clear()
    await system.shards[0].store.put([indexed_cube(tea, vector)])
    await mended(examine, "index: orphan")
    assert system.shards[0].held() == {}


async def test_what_may_be_on_its_way_is_no_finding(system, who, doctor):
    drafts = [Draft(text="tea", user_id="ann")]
    system.catalog.cubes.add(who.tenant, drafts, author="key", now=system.clock())
    (milk,) = await add(system, who, "milk")
    system.catalog.cubes.delete(who.tenant, milk.id, now=system.clock())
    assert told(await doctor.examine(system.clock())) == {}
    system.clock.advance(60)
    assert set(told(await doctor.examine(system.clock()))) == {"index: missing", "index: orphan"}


async def test_some_of_many_are_named_and_all_are_counted_and_mended(system, who, examine):
    made = await add(system, who, *(f"note {n}" for n in range(25)))
    await system.shards[0].store.delete(who.tenant, {cube.id: 1 for cube in made})
    system.shards[0].store._tombstones.clear()
    (finding,) = (await examine()).findings
    assert (finding.count, len(finding.examples)) == (25, 10)
    assert all(name.startswith("acme/") for name in finding.examples)
    (finding,) = (await examine(repair=True)).findings
    assert finding.repaired == 25
    assert len(system.shards[0].held()) == 25


async def test_a_part_that_does_not_answer_is_no_sound_part(system, who, examine):
    system.shards[0].down = True
    with pytest.raises(Unavailable):
        await examine()


# -- the archive -----------------------------------------------------------------------------------


async def test_a_copy_that_is_gone_is_made_again(system, who, examine, archive, objects):
    cube, record = await archived(system, who, archive)
    await objects.delete(name_of(who.tenant, cube.id, record.sha256))
    await mended(examine, "archive: missing")


async def test_a_copy_that_is_damaged_is_made_again(system, who, examine, archive, objects):
    cube, record = await archived(system, who, archive)
    await objects.put(name_of(who.tenant, cube.id, record.sha256), b"rubbish")
    await mended(examine, "archive: damaged")


def spoil(system: LocalSystem) -> None:
    system.catalog._database.write(
        lambda connection: connection.execute(cubes.update().values(text="spoilt"))
    )


async def test_a_catalog_that_is_damaged_gets_the_copys_content(system, who, examine, archive):
    cube, _ = await archived(system, who, archive)
    spoil(system)
    await mended(examine, "archive: catalog damaged")
    assert (await system.service.get(who, cube.id)).text == "tea"


async def test_what_is_damaged_in_both_is_said_and_left(system, who, examine, archive, objects):
    cube, record = await archived(system, who, archive)
    spoil(system)
    await objects.put(name_of(who.tenant, cube.id, record.sha256), b"rubbish")
    found = await examine(repair=True)
    assert told(found) == {"archive: lost": (1, 0)}
    assert not found.sound
    assert (await system.service.get(who, cube.id)).text == "spoilt"


async def test_an_object_that_nothing_names_goes_and_one_of_an_unknown_cube_stays(
    system, who, examine, objects
):
    (tea,) = await add(system, who, "tea")
    orphan = name_of(who.tenant, tea.id, "0" * 64)
    unknown = name_of(who.tenant, "01a20e3e-d04c-705b-a9c3-c4fffbea30a3", "1" * 64)
    for name in (orphan, unknown):
        await objects.put(name, b"x")
    found = await examine(repair=True)
    assert told(found) == {"archive: orphan object": (1, 1), "archive: unknown object": (1, 0)}
    assert [found.name async for found in objects.list()] == [unknown]
    assert not found.sound


async def test_what_was_doomed_and_not_removed_is_removed(system, who, examine, archive, objects):
    cube, _ = await archived(system, who, archive)
    await system.service.delete(who, cube.id)
    await mended(examine, "archive: not removed yet")
    assert [found async for found in objects.list()] == []


async def test_a_large_archive_is_read_in_pages(system, who, examine, archive, objects):
    made = [await archived(system, who, archive, f"note {n}") for n in range(5)]
    cube, record = max(made, key=lambda one: one[0].id)
    await objects.put(name_of(who.tenant, cube.id, record.sha256), b"rubbish")
    kinds, cursor, pages = [], None, 0
    while True:
        found = await examine(cursor=cursor, limit=2)
        kinds += list(told(found))
        pages, cursor = pages + 1, found.next_cursor
        if cursor is None:
            break
    assert (kinds, pages) == (["archive: damaged"], 3)


# -- adapters --------------------------------------------------------------------------------------


async def adapter(
    system: LocalSystem, who: Principal, objects: FolderStore, data: bytes = b"weights"
) -> tuple[MemCube, str]:
    """A cube inside an adapter, and the adapter's SHA-256. The doctor looks at bytes alone."""
    (cube,) = await add(system, who, "held")
    sha256 = hashlib.sha256(data).hexdigest()
    for name in AdapterFiles.names(who.tenant, sha256):
        await objects.put(name, data)
    new = NewAdapter(
        name="ann",
        scope=Scope(tenant=who.tenant, user_id="ann"),
        base="f" * 64,
        sha256=sha256,
        size_bytes=len(data),
        rank=2,
        cubes={cube.id: cube.version},
    )
    system.catalog.adapters.add(who.tenant, new, now=system.clock())
    return cube, sha256


async def test_an_adapter_in_order_is_looked_at(system, who, examine, objects):
    await adapter(system, who, objects)
    found = await examine()
    assert (told(found), found.looked_at["adapters"]) == ({}, 1)


@pytest.mark.parametrize(("how", "kind"), [("delete", "missing"), ("put", "damaged")])
async def test_an_adapters_file_that_is_gone_or_damaged_is_said(
    system, who, examine, objects, how, kind
):
    _, sha256 = await adapter(system, who, objects)
    name, _ = AdapterFiles.names(who.tenant, sha256)
    await (objects.delete(name) if how == "delete" else objects.put(name, b"rubbish"))
    found = await examine(repair=True)
    assert told(found) == {f"adapters: {kind}": (1, 0)}
    assert not found.sound


async def test_files_of_a_stale_adapter_are_erased(system, who, examine, objects):
    cube, _ = await adapter(system, who, objects)
    await system.service.delete(who, cube.id)
    await mended(examine, "adapters: stale file")
    assert [found async for found in objects.list("adapters/")] == []


async def test_an_adapters_file_without_a_version_is_deleted(system, who, examine, objects):
    await objects.put(AdapterFiles.names(who.tenant, "0" * 64)[0], b"x")
    await mended(examine, "adapters: orphan file")
    assert [found async for found in objects.list("adapters/")] == []
