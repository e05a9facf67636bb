"""The reconcile loop: what a crash left half done is finished, and nothing else is touched."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memcube.catalog import Change, Idempotency, Principal
from memcube.config import Config, load_config
from memcube.cube import Draft, MemCube
from memcube.errors import NotFound, Unavailable
from memcube.ids import TenantId
from memcube.indexing import indexed_cube
from memcube.reconcile import Report
from memcube.testing.local import LocalSystem
from memcube.tiers.plaintext import IndexedCube


@pytest.fixture
def who(system: LocalSystem) -> Principal:
    return system.principal()


def store(system: LocalSystem, who: Principal, *texts: str, **header) -> list[MemCube]:
    """What a gateway leaves that dies between its commit and its put."""
    drafts = [Draft(text=text, **header) for text in texts]
    added = system.catalog.cubes.add(who.tenant, drafts, author="test", now=system.clock())
    return [result.cube for result in added.results]


async def indexed(system: LocalSystem, who: Principal, *texts: str, **header) -> list[MemCube]:
    cubes = store(system, who, *texts, **header)
    await system.indexer.index(cubes, shard=who.shard)
    return cubes


def row(system: LocalSystem, cube: MemCube, **other: Any) -> IndexedCube:
    """What the index is told of a cube, with another vector."""
    vector = np.zeros(system.embedder.dim, dtype=np.float32)
    vector[0] = 1.0
    return replace(indexed_cube(cube, vector), **other)


def agree(system: LocalSystem, who: Principal) -> bool:
    """Whether the index holds exactly the catalog's searchable cubes, each at its version."""
    page = system.catalog.cubes.find(who.tenant, now=system.clock(), limit=500)
    wanted = {
        c.id: c.version for c in page.cubes if c.text and c.state in ("generated", "activated")
    }
    stats = system.catalog.index.stats()
    return system.shards[who.shard].held() == wanted and not (
        stats.pending_index or stats.pending_removal
    )


async def test_a_round_over_a_system_in_order_does_nothing(system: LocalSystem, who):
    await indexed(system, who, "tea", "milk")
    await system.reconcile()
    assert await system.reconcile() == Report()
    assert len(system.shards[0].puts) == 1


async def test_what_was_committed_and_not_put_is_indexed(system: LocalSystem, who):
    store(system, who, "tea", "milk")
    report = await system.reconcile()
    assert report.indexed == 2
    assert agree(system, who)


async def test_a_put_that_was_not_noted_is_put_again_once(system: LocalSystem, who):
    (cube,) = store(system, who, "tea")
    await system.indexer.index([cube], shard=0)
    system.catalog.index.unmark(who.tenant, [cube.id], now=system.clock())
    assert (await system.reconcile()).indexed == 1
    assert agree(system, who)
    assert (await system.reconcile()).indexed == 0


async def test_fresh_work_is_left_to_the_gateway_until_the_grace_is_over(system: LocalSystem, who):
    store(system, who, "tea")
    grace = system.config.scheduler.pending_grace_s
    assert (await system.reconcile(after_s=grace - 1)).indexed == 0
    assert (await system.reconcile(after_s=2)).indexed == 1


async def test_what_was_deleted_and_not_removed_is_removed(system: LocalSystem, who):
    tea, milk = await indexed(system, who, "tea", "milk")
    await system.reconcile()
    system.catalog.cubes.delete(who.tenant, tea.id, now=system.clock())
    report = await system.reconcile()
    assert report.removed == 1
    assert set(system.shards[0].held()) == {milk.id}
    assert agree(system, who)


async def test_what_has_run_out_is_wiped_and_leaves_the_index(system: LocalSystem, who):
    until = system.clock() + timedelta(hours=1)
    (tea,) = await indexed(system, who, "tea", expires_at=until)
    assert (await system.reconcile(after_s=3599)).expired == 0
    report = await system.reconcile(after_s=1)
    assert (report.expired, report.removed) == (1, 1)
    assert system.shards[0].held() == {}
    with pytest.raises(NotFound):
        system.catalog.cubes.get(who.tenant, tea.id, now=system.clock())


async def test_more_work_than_a_batch_is_done_over_the_rounds(
    tmp_path: Path, catalog_template: Path
):
    config = load_config(None, [f"data_dir={tmp_path}", "scheduler.batch=3"])
    system = LocalSystem.open(tmp_path, config=config, template=catalog_template)
    who = system.principal()
    store(system, who, *(f"turn {i}" for i in range(7)))
    assert [(await system.reconcile()).indexed for _ in range(4)] == [3, 3, 1, 0]
    assert agree(system, who)
    system.close()


async def test_a_restarted_shard_that_lost_cubes_gets_them_back(system: LocalSystem, who):
    await indexed(system, who, "tea", "milk", "bread")
    await system.reconcile()
    system.shards[0].restart(empty=True)
    report = await system.reconcile()
    assert report.missing == 3
    assert (await system.reconcile()).indexed == 3
    assert agree(system, who)


async def test_a_restarted_shard_is_compared_both_ways_once(system: LocalSystem, who):
    tea, milk = await indexed(system, who, "tea", "milk")
    await system.reconcile()
    shard = system.shards[0]
    await shard.store.delete(who.tenant, {tea.id: 1})
    (orphan,) = store(system, who, "orphan")
    await system.indexer.index([orphan], shard=0)
    system.catalog.cubes.delete(who.tenant, orphan.id, now=system.clock())
    system.catalog.index.mark_removed(who.tenant, [orphan.id])
    assert set(shard.held()) == {milk.id, orphan.id}

    assert (await system.reconcile()).orphans == 0, "nothing is compared while the epoch stands"
    shard.restart()
    report = await system.reconcile()
    assert (report.missing, report.orphans) == (1, 1)
    await system.reconcile()
    assert set(shard.held()) == {tea.id, milk.id}
    assert agree(system, who)
    assert await system.reconcile() == Report()


async def test_an_older_version_in_the_index_is_replaced_after_a_restart(system: LocalSystem, who):
    (cube,) = await indexed(system, who, "tea")
    await system.reconcile()
    system.catalog.cubes.rollback(who.tenant, cube.id, 1, author="test", now=system.clock())
    (kept,) = await system.shards[0].store.get(who.tenant, [cube.id])
    assert kept.version == 1
    changed = await system.service.update(who, cube.id, Change(text="milk"), expected_version=None)
    assert system.shards[0].held() == {cube.id: changed.version}
    await system.shards[0].store.delete(who.tenant, {cube.id: changed.version})
    system.shards[0].restart()
    await system.shards[0].put([row(system, cube)], epoch=(await system.shards[0].info()).epoch)
    assert system.shards[0].held() == {cube.id: 1}
    assert (await system.reconcile()).missing == 1
    await system.reconcile()
    assert agree(system, who)


async def test_what_is_pending_is_not_taken_for_an_orphan(system: LocalSystem, who):
    """The put went through and the note of it was lost with the process."""
    (cube,) = store(system, who, "tea")
    shard = system.shards[0]
    await shard.put([row(system, cube)], epoch=1)
    shard.restart()
    report = await system.reconcile()
    assert (report.orphans, report.indexed) == (0, 1)
    assert agree(system, who)


async def test_an_orphan_of_a_tenant_that_the_catalog_does_not_know_is_dropped(
    system: LocalSystem, who
):
    (cube,) = store(system, who, "tea")
    foreign = row(system, cube, tenant=TenantId("gone"))
    await system.shards[0].store.put([foreign])
    assert (await system.reconcile()).orphans == 1
    assert system.shards[0].held() == {cube.id: 1}


async def test_cubes_of_another_embedder_are_indexed_anew(system: LocalSystem, who):
    cubes = await indexed(system, who, "tea", "milk")
    await system.reconcile()
    system.embedder.identity = "hash@2"
    system.shards[0].restart(empty=True)
    await system.reconcile()
    await system.reconcile()
    assert set(system.shards[0].held()) == {cube.id for cube in cubes}
    (residency,) = system.catalog.cubes.residency(who.tenant, cubes[0].id, now=system.clock())
    assert residency.epoch == 2
    assert agree(system, who)


@pytest.fixture
def two_shards(tmp_path: Path, catalog_template: Path) -> Iterator[LocalSystem]:
    config = Config(data_dir=tmp_path).model_copy(
        update={"plaintext": load_config(None, ["plaintext.shards=2"]).plaintext}
    )
    system = LocalSystem.open(tmp_path, config=config, template=catalog_template)
    yield system
    system.close()


async def test_a_shard_that_is_down_does_not_keep_the_others_waiting(two_shards: LocalSystem):
    system = two_shards
    tenants = [system.principal(name) for name in ("a", "b", "c", "d", "e", "f")]
    first = next(who for who in tenants if who.shard == 0)
    second = next(who for who in tenants if who.shard == 1)
    (waiting,) = store(system, first, "tea")
    (other,) = store(system, second, "milk")
    system.shards[0].down = True
    with pytest.raises(Unavailable):
        await system.reconcile()
    assert system.shards[1].held() == {other.id: 1}
    system.shards[0].down = False
    await system.reconcile()
    assert system.shards[0].held() == {waiting.id: 1}


async def test_a_tenants_cubes_lie_in_its_own_shard_alone(two_shards: LocalSystem):
    system = two_shards
    for name in ("a", "b", "c", "d", "e", "f"):
        who = system.principal(name)
        store(system, who, f"tea of {name}")
    await system.reconcile()
    for number, shard in enumerate(system.shards):
        tenants = {tenant for tenant, _, _ in await shard.versions()}
        assert {system.principal(tenant).shard for tenant in tenants} == {number}


async def test_uses_are_counted_and_the_index_told_of_the_new_state(system: LocalSystem, who):
    tea, milk = await indexed(system, who, "tea", "milk")
    await system.reconciler.record_uses({who.tenant: {tea.id: 3}}, system.clock())
    used = system.catalog.cubes.get(who.tenant, tea.id, now=system.clock())
    assert (used.state, used.usage.uses, used.version) == ("activated", 3, 1)
    states = {
        c.id: c.payload["state"]
        for c in await system.shards[0].store.get(who.tenant, [tea.id, milk.id])
    }
    assert states == {tea.id: "activated", milk.id: "generated"}


async def test_uses_are_counted_while_the_shard_is_down_and_the_state_arrives_later(
    system: LocalSystem, who
):
    (tea,) = await indexed(system, who, "tea")
    system.shards[0].down = True
    await system.reconciler.record_uses({who.tenant: {tea.id: 1}}, system.clock())
    assert system.catalog.cubes.get(who.tenant, tea.id, now=system.clock()).usage.uses == 1
    system.shards[0].down = False
    await system.reconcile()
    (held,) = await system.shards[0].store.get(who.tenant, [tea.id])
    assert held.payload["state"] == "activated"
    assert agree(system, who)


async def test_retry_keys_are_forgotten_after_their_time_and_looked_at_once_an_hour(
    system: LocalSystem, who
):
    for i in range(3):
        system.catalog.cubes.add(
            who.tenant,
            [Draft(text=f"turn {i}")],
            author="test",
            now=system.clock(),
            idempotency=Idempotency(key=f"k{i}", body_hash="h"),
        )
    assert (await system.reconcile(after_s=0)).pruned == 0
    assert (await system.reconcile(after_s=47 * 3600)).pruned == 0
    assert (await system.reconcile(after_s=3700)).pruned == 3
