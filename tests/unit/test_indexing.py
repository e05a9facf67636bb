"""The indexer: what reaches the index, what is noted of it, and what a race or a restart leaves."""

from datetime import timedelta

import pytest

from memcube.catalog import Change, Principal
from memcube.cube import Draft, MemCube
from memcube.errors import StaleEpoch, Unavailable
from memcube.indexing import MAX_STALE_RETRIES, PUT_SLICE, Indexer
from memcube.lifecycle import Event, State
from memcube.testing.local import LocalSystem


@pytest.fixture
def who(system: LocalSystem) -> Principal:
    return system.principal()


def store(system: LocalSystem, who: Principal, *texts: str) -> list[MemCube]:
    """Cubes in the catalog that the index was not told of."""
    drafts = [Draft(text=text, user_id="ann") for text in texts]
    added = system.catalog.cubes.add(who.tenant, drafts, author="test", now=system.clock())
    return [result.cube for result in added.results]


def noted(system: LocalSystem, who: Principal, cube: MemCube) -> bool:
    """Whether the catalog says that the index holds the cube's present version."""
    return system.catalog.cubes.get(who.tenant, cube.id, now=system.clock()).indexed


async def test_an_indexed_cube_is_held_and_noted_with_its_residency(system: LocalSystem, who):
    (cube,) = store(system, who, "tea")
    await system.indexer.index([cube], shard=0)
    assert system.shards[0].held() == {cube.id: 1}
    assert noted(system, who, cube)
    (residency,) = system.catalog.cubes.residency(who.tenant, cube.id, now=system.clock())
    assert (residency.tier, residency.location, residency.version) == ("plaintext", "shard-0", 1)
    assert residency.epoch == 1
    assert residency.size_bytes == 3 + 4 * system.embedder.dim


async def test_many_cubes_go_in_slices_and_all_arrive(system: LocalSystem, who):
    cubes = store(system, who, *(f"turn {i}" for i in range(2 * PUT_SLICE + 1)))
    await system.indexer.index(cubes, shard=0)
    assert sorted(len(put) for put in system.shards[0].puts) == [1, PUT_SLICE, PUT_SLICE]
    assert set(system.shards[0].held()) == {cube.id for cube in cubes}


async def test_indexing_again_changes_nothing(system: LocalSystem, who):
    cubes = store(system, who, "tea", "milk")
    await system.indexer.index(cubes, shard=0)
    held = system.shards[0].held()
    await system.indexer.index(cubes, shard=0)
    assert system.shards[0].held() == held


async def test_a_cube_without_text_or_out_of_search_is_not_indexed(system: LocalSystem, who):
    tea, empty = store(system, who, "tea", "")
    archived = system.catalog.cubes.transition(
        who.tenant, tea.id, Event.ARCHIVE, author="test", now=system.clock()
    )
    await system.indexer.index([archived, empty], shard=0)
    assert system.shards[0].held() == {}
    assert system.embedder.calls == []


async def test_a_shard_that_is_down_leaves_the_cube_pending(system: LocalSystem, who):
    (cube,) = store(system, who, "tea")
    system.shards[0].down = True
    with pytest.raises(Unavailable):
        await system.indexer.index([cube], shard=0)
    assert not noted(system, who, cube)
    later = system.clock() + timedelta(seconds=1)
    assert [c.id for c in system.catalog.index.pending(shard=0, before=later, limit=9)] == [cube.id]


async def test_a_cube_changed_while_it_was_put_stays_pending(system: LocalSystem, who):
    (cube,) = store(system, who, "tea")

    def change() -> None:
        system.catalog.cubes.update(
            who.tenant,
            cube.id,
            Change(text="milk"),
            expected_version=None,
            author="test",
            reason="update",
            now=system.clock(),
        )

    system.shards[0].on_put = change
    await system.indexer.index([cube], shard=0)
    assert not noted(system, who, cube)
    changed = system.catalog.cubes.get(who.tenant, cube.id, now=system.clock())
    await system.indexer.index([changed], shard=0)
    assert noted(system, who, cube)
    assert system.shards[0].held() == {cube.id: 2}


async def test_a_late_put_does_not_bring_a_deleted_cube_back(system: LocalSystem, who):
    (cube,) = store(system, who, "tea")
    version = system.catalog.cubes.delete(who.tenant, cube.id, now=system.clock())
    await system.indexer.remove(who.tenant, {cube.id: version}, shard=0)
    await system.indexer.index([cube], shard=0)
    assert system.shards[0].held() == {}


async def test_a_restart_between_is_noticed_and_the_write_goes_on_under_the_new_epoch(
    system: LocalSystem, who
):
    tea, milk = store(system, who, "tea", "milk")
    await system.indexer.index([tea], shard=0)
    system.shards[0].restart()
    await system.indexer.index([milk], shard=0)
    assert set(system.shards[0].held()) == {tea.id, milk.id}
    await system.indexer.remove(who.tenant, {tea.id: 1}, shard=0)
    assert set(system.shards[0].held()) == {milk.id}


async def test_after_a_restart_what_was_deleted_meanwhile_is_not_put(system: LocalSystem, who):
    """The tombstone went with the shard's process; the catalog is asked again."""
    tea, milk = store(system, who, "tea", "milk")
    await system.indexer.info(0)

    def delete_and_restart() -> None:
        system.catalog.cubes.delete(who.tenant, tea.id, now=system.clock())
        system.shards[0].restart()

    system.shards[0].on_put = delete_and_restart
    await system.indexer.index([tea, milk], shard=0)
    assert set(system.shards[0].held()) == {milk.id}


async def test_a_shard_that_restarts_at_every_write_is_given_up(system: LocalSystem, who):
    (cube,) = store(system, who, "tea")
    shard, restarts = system.shards[0], 0

    def restart() -> None:
        nonlocal restarts
        restarts += 1
        shard.restart()
        shard.on_put = restart

    shard.on_put = restart
    with pytest.raises(StaleEpoch):
        await system.indexer.index([cube], shard=0)
    assert restarts == MAX_STALE_RETRIES
    assert not noted(system, who, cube)


async def test_a_removal_is_noted_and_nothing_is_asked_for_nothing(system: LocalSystem, who):
    (cube,) = store(system, who, "tea")
    await system.indexer.index([cube], shard=0)
    version = system.catalog.cubes.delete(who.tenant, cube.id, now=system.clock())
    assert len(system.catalog.index.removals(shard=0, limit=9)) == 1
    await system.indexer.remove(who.tenant, {cube.id: version}, shard=0)
    assert system.catalog.index.removals(shard=0, limit=9) == []
    system.shards[0].down = True
    await system.indexer.remove(who.tenant, {}, shard=0)


async def test_a_new_state_reaches_the_index_without_a_put(system: LocalSystem, who):
    (cube,) = store(system, who, "tea")
    await system.indexer.index([cube], shard=0)
    await system.indexer.set_state(who.tenant, [cube.id], State.ACTIVATED, shard=0)
    (held,) = await system.shards[0].store.get(who.tenant, [cube.id])
    assert held.payload["state"] == "activated"
    assert noted(system, who, cube)


@pytest.mark.parametrize("trouble", ["down", "down before it was known", "restarted"])
async def test_a_state_that_could_not_be_told_makes_the_cube_pending(
    system: LocalSystem, who, trouble: str
):
    (cube,) = store(system, who, "tea")
    await system.indexer.index([cube], shard=0)
    indexer = system.indexer
    if trouble == "restarted":
        system.shards[0].restart()
    else:
        system.shards[0].down = True
    if trouble == "down before it was known":
        indexer = Indexer(
            system.catalog, system.embedder, system.shards.__getitem__, clock=system.clock
        )
    await indexer.set_state(who.tenant, [cube.id], State.ACTIVATED, shard=0)
    assert not noted(system, who, cube)


async def test_what_the_index_is_told_of_a_turn_names_its_neighbours(system: LocalSystem, who):
    drafts = [Draft(text=t, user_id="ann", threaded=True) for t in ("one", "two", "three")]
    added = system.catalog.cubes.add(who.tenant, drafts, author="test", now=system.clock())
    cubes = [result.cube for result in added.results]
    await system.indexer.index(cubes, shard=0)
    one, two, three = await system.shards[0].store.get(who.tenant, [c.id for c in cubes])
    assert [c.payload["seq"] for c in (one, two, three)] == [0, 1, 2]
    assert len({c.payload["slot"] for c in (one, two, three)}) == 3
