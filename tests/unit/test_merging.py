"""Finding and merging over a system in this process."""

import pytest

from memcube.catalog import Change, Principal, ProposalState
from memcube.cube import Scope
from memcube.errors import Conflict, Unavailable
from memcube.merging import NEIGHBOURS, Merging
from memcube.reader.messages import Header
from memcube.service import AddRequest, SearchScope
from memcube.settling import Settling
from memcube.testing.local import LocalSystem

TEA, SAME = "Ann likes green tea in the morning", "In the morning Ann likes green tea!"


@pytest.fixture
def who(system: LocalSystem) -> Principal:
    return system.principal()


@pytest.fixture
def merging(system: LocalSystem) -> Merging:
    shards = system.shards.__getitem__
    settling = Settling(system.catalog, system.indexer, clock=system.clock)
    return Merging(
        system.catalog,
        shards,
        settling,
        system.config.lifecycle,
        clock=system.clock,
    )


async def add(system: LocalSystem, who: Principal, *texts: str, user: str = "ann") -> list[str]:
    ids = []
    for text in texts:
        system.clock.advance(1)
        request = AddRequest(text=text, header=Header(user_id=user))
        (outcome,) = await system.service.add(who, [request], wait_indexed=True)
        ids.append(outcome.results[0].cube.id)
    return ids


def ann(who: Principal) -> Scope:
    return Scope(tenant=who.tenant, user_id="ann")


async def found(system: LocalSystem, who: Principal, query: str) -> list[str]:
    hits = await system.service.search(who, query, SearchScope(), top_k=20)
    return [hit.cube.text for hit in hits.hits]


async def test_duplicates_and_contradictions_are_found_and_change_nothing(system, who, merging):
    ids = await add(system, who, TEA, SAME, "Ann lives in Oslo.", "Ann lives in Bergen.")
    await add(system, who, "The weather is fine today")
    await add(system, who, TEA, user="bob")
    made = await merging.find(ann(who), shard=who.shard)
    assert {(str(one.kind), *sorted(one.cubes)) for one in made} == {
        ("duplicate", *sorted(ids[:2])),
        ("contradiction", *sorted(ids[2:])),
    }
    page = system.catalog.cubes.find(who.tenant, now=system.clock(), limit=99)
    assert {str(cube.state) for cube in page.cubes} == {"generated"}
    assert await merging.find(ann(who), shard=who.shard) == []


async def test_applying_merges_and_the_next_search_finds_the_merged_one_alone(system, who, merging):
    one, other = await add(system, who, "Ann lives in Oslo.", "Ann lives in Bergen.")
    (made,) = await merging.find(ann(who), shard=who.shard)
    done, cube = await merging.apply(who.tenant, made.id, shard=who.shard, author="key")
    assert (done.state, cube.text, cube.indexed) == ("applied", "Ann lives in Bergen.", True)
    assert await found(system, who, "Ann lives") == ["Ann lives in Bergen."]
    assert set(system.shards[0].held()) == {cube.id}
    lineage = await system.service.lineage(who, cube.id)
    assert {(edge.id, edge.version, str(edge.relation)) for edge in lineage.ancestors} == {
        (one, 1, "fused"),
        (other, 1, "fused"),
    }
    restored = await system.service.restore(who, one)
    assert restored.text == "Ann lives in Oslo."
    again = await merging.apply(who.tenant, made.id, shard=who.shard, author="key")
    assert again[1].id == cube.id


async def test_a_proposal_that_is_outdated_is_refused_and_found_anew(system, who, merging):
    one, _ = await add(system, who, "Ann lives in Oslo.", "Ann lives in Bergen.")
    (made,) = await merging.find(ann(who), shard=who.shard)
    change = Change(text="Ann lives in Rome.")
    await system.service.update(who, one, change, expected_version=None)
    with pytest.raises(Conflict):
        await merging.apply(who.tenant, made.id, shard=who.shard, author="key")
    assert len(await found(system, who, "Ann lives")) == 2
    (anew,) = await merging.find(ann(who), shard=who.shard)
    assert anew.cubes[one] == 2
    states = {p.id: p.state for p in await merging.proposals(who.tenant, limit=9)}
    assert states == {made.id: ProposalState.OUTDATED, anew.id: ProposalState.OPEN}


async def test_a_search_asks_the_index_for_neighbours_and_not_for_all_pairs(system, who, merging):
    await add(system, who, *(f"note {n} about {n * 7} things" for n in range(40)))
    asked = []
    nearest = system.shards[0].nearest

    async def counted(tenant, ids, **how):
        asked.append((len(ids), how["limit"]))
        return await nearest(tenant, ids, **how)

    system.shards[0].nearest = counted
    await merging.find(ann(who), shard=who.shard, limit=10)
    assert asked == [(10, NEIGHBOURS)]


async def test_what_lies_behind_the_limit_is_found_as_a_neighbour(system, who, merging):
    (old,) = await add(system, who, TEA)
    system.clock.advance(60)
    await add(system, who, *(f"note {n}" for n in range(5)))
    (new,) = await add(system, who, SAME)
    system.clock.advance(60)
    (made,) = await merging.find(ann(who), shard=who.shard, limit=6)
    assert set(made.cubes) == {old, new}


async def test_without_the_index_nothing_is_found_and_it_is_said(system, who, merging):
    await add(system, who, TEA, SAME)
    system.shards[0].down = True
    with pytest.raises(Unavailable):
        await merging.find(ann(who), shard=who.shard)


async def test_a_cube_that_is_not_in_the_index_yet_is_left_for_later(system, who, merging):
    system.shards[0].down = True
    header = Header(user_id="ann")
    for text in (TEA, SAME):
        await system.service.add(who, [AddRequest(text=text, header=header)], wait_indexed=False)
    system.shards[0].down = False
    assert await merging.find(ann(who), shard=who.shard) == []
