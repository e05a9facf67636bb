"""The activation tier's port over a scripted engine and the real catalog: what it says is there, is."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from memcube.activation.contract import Mode
from memcube.catalog.action_rows import ActionRecord
from memcube.catalog.fence import LEASE
from memcube.cube import Draft, Shape
from memcube.errors import Conflict, NotFound, StaleEpoch, StorageFull, UnknownBackend
from memcube.ids import CubeId
from memcube.scheduler.actions import ActionState, Copy, Drop, Medium, Place, Tier
from memcube.scheduler.engine_port import EnginePort, Engines, EngineTopology
from memcube.scheduler.tier_ports import TierPorts
from memcube.scheduler.world import World
from memcube.testing.local import LocalSystem, migrated_catalog

ENGINE = Place(Tier.ACTIVATION, Medium.DEVICE, "node-1/engine-0")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return migrated_catalog(tmp_path_factory.mktemp("template"))


@pytest.fixture
def system(tmp_path: Path, template: Path) -> Iterator[LocalSystem]:
    opened = LocalSystem.open(tmp_path, template=template)
    opened.catalog.leases.acquire(LEASE, "test", now=opened.clock(), ttl_s=1e6)
    yield opened
    opened.close()


@pytest.fixture
async def engines(system) -> Engines:
    engines = Engines(system.engines)
    await engines.look()
    return engines


@pytest.fixture
def port(system, engines) -> EnginePort:
    return EnginePort(engines, system.catalog, mode=Mode.EXACT, clock=system.clock, max_members=100)


def add(system: LocalSystem, *texts: str) -> list[CubeId]:
    drafts = [Draft(text=text, user_id="ann") for text in texts]
    added = system.catalog.cubes.add(
        system.principal().tenant, drafts, author="t", now=system.clock()
    )
    return [one.cube.id for one in added.results]


def record(system: LocalSystem, action) -> ActionRecord:
    (made,) = system.catalog.actions.plan([action], leader=1, now=system.clock())
    assert isinstance(made, ActionRecord), made
    return made


def copy_of(system: LocalSystem, cube: CubeId, **other) -> ActionRecord:
    given = {"version": 1, "epoch": 0, "source": None, "target": ENGINE, "num_bytes": 300, **other}
    return record(system, Copy(tenant=system.principal().tenant, cube=cube, **given))


async def listed_copy(system: LocalSystem, port: EnginePort, cube: CubeId) -> ActionRecord:
    """A copy that was carried out up to its commit."""
    move, book = copy_of(system, cube), system.catalog.actions
    await port.prepare(move, leader=1)
    assert await port.copy(move, leader=1) == await port.verify(move, leader=1)
    book.prepared(move.id, "x", leader=1, now=system.clock())
    book.commit(move.id, leader=1, now=system.clock())
    await port.publish(move, leader=1)
    return move


async def test_what_is_copied_is_there_and_told_and_what_is_let_go_is_not(system, port):
    (id,) = add(system, "Ann drinks tea")
    tenant = system.principal().tenant
    move = await listed_copy(system, port, id)
    (stored,) = await port.inventory(ENGINE, leader=1)
    assert (stored.cube, stored.version, stored.num_bytes) == (id, 1, 300)
    assert await port.has(ENGINE, tenant, id, 1, leader=1)
    assert not await port.has(ENGINE, tenant, id, 2, leader=1)
    await system.engines[0].forget([id], None)
    assert await port.inventory(ENGINE, leader=1) == []
    assert not await port.has(ENGINE, tenant, id, 1, leader=1)
    for lost in (port.verify, port.publish):
        with pytest.raises(NotFound):
            await lost(move, leader=1)


async def test_kv_that_nobody_listed_is_not_told_of(system, port):
    (id,) = add(system, "Ann drinks tea")
    await port.copy(copy_of(system, id), leader=1)
    assert await port.inventory(ENGINE, leader=1) == []


async def test_a_composite_is_there_when_all_of_its_members_are(system, port):
    ids = add(system, "Ann drinks tea", "Ann lives in Oslo")
    who = system.principal()
    whole = system.catalog.cubes.add(
        who.tenant,
        [Draft(text="about Ann", shape=Shape.COMPOSITE, members=tuple(ids))],
        author="t",
        now=system.clock(),
    )
    cube = whole.results[0].cube.id
    await listed_copy(system, port, cube)
    assert [one.cube for one in await port.inventory(ENGINE, leader=1)] == [cube]
    assert await system.engines[0].held(ids, leader=1) == set(ids)
    await system.engines[0].forget(ids[:1], None)
    assert await port.inventory(ENGINE, leader=1) == []


async def test_a_drop_takes_the_kv_and_a_late_one_takes_nothing_newer(system, port):
    (id,) = add(system, "Ann drinks tea")
    move = await listed_copy(system, port, id)
    book, tenant = system.catalog.actions, system.principal().tenant
    book.close(move.id, ActionState.DONE, "", leader=1, now=system.clock())
    drop = record(
        system,
        Drop(tenant=tenant, cube=id, version=1, epoch=1, place=ENGINE, num_bytes=300),
    )
    await port.drop(drop, leader=1)  # it is listed: not this drop's
    assert await system.engines[0].held([id], leader=1) == {id}
    book.commit(drop.id, leader=1, now=system.clock())
    await port.drop(drop, leader=1)
    assert await system.engines[0].held([id], leader=1) == set()


async def test_what_changed_or_does_not_fit_is_refused(system, port):
    (id,) = add(system, "Ann drinks tea")
    with pytest.raises(Conflict):
        await port.copy(copy_of(system, id, version=2), leader=1)
    (other,) = add(system, "Ann lives in Oslo")
    with pytest.raises(StorageFull):
        await port.prepare(copy_of(system, other, num_bytes=10**9), leader=1)


async def test_an_engine_that_heard_of_a_later_leader_refuses(system, port):
    (id,) = add(system, "Ann drinks tea")
    move = copy_of(system, id)
    system.engines[0].fence.check(2)
    for call in (port.prepare, port.copy, port.verify):
        with pytest.raises(StaleEpoch):
            await call(move, leader=1)


async def test_an_engine_that_moved_leaves_its_place_for_good(system, engines, port):
    (id,) = add(system, "Ann drinks tea")
    move = copy_of(system, id)
    system.engines[0].node = "node-2"
    world = World()
    await EngineTopology(engines).update(world, leader=1, now=system.clock())
    assert [str(place) for place in world.places] == ["node-2/engine-0:activation/device"]
    assert engines.is_gone(ENGINE)
    assert engines.is_gone(ENGINE._replace(location="node-2/engine-7"))
    assert not engines.is_gone(ENGINE._replace(location="node-2/engine-0"))
    with pytest.raises(NotFound):
        await port.prepare(move, leader=1)
    await port.free(move, leader=1)  # what frees something at a place that is gone returns
    await port.release(move, leader=1, moved=False)


async def test_a_tier_without_a_port_is_not_taken_for_another(system, port):
    with pytest.raises(UnknownBackend):
        await TierPorts({Tier.ACTIVATION: port}).inventory(
            Place(Tier.PLAINTEXT, Medium.DISK, "node-1"), leader=1
        )
