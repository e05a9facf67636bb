"""The lifecycle's part of a scheduler's round."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from memcube.catalog import Principal
from memcube.config import load_config
from memcube.cube import Draft, Kind, Scope
from memcube.errors import Unavailable
from memcube.ids import uuid7
from memcube.objects.folder import FolderStore
from memcube.reader.messages import Header, Message
from memcube.service import AddRequest
from memcube.sweep import LifecycleSweep, SweepReport, first_id, lifecycle_sweep
from memcube.testing.local import START, LocalSystem

TEA, SAME = "Ann likes green tea in the morning", "In the morning Ann likes green tea!"
YEAR = 365 * 86_400


@pytest.fixture
def who(system: LocalSystem) -> Principal:
    return system.principal()


@pytest.fixture
def sweep(system: LocalSystem, tmp_path: Path) -> Callable[..., LifecycleSweep]:
    """Makes the sweep of a configuration."""

    def make(*overrides: str, down: Sequence[object] = ()) -> LifecycleSweep:
        config = load_config(None, [f"data_dir={tmp_path}", *overrides])

        async def open_objects() -> FolderStore:
            if down:
                raise Unavailable("no store")
            return FolderStore.open(tmp_path / "objects")

        return lifecycle_sweep(
            system.catalog,
            system.indexer,
            system.shards.__getitem__,
            config,
            clock=system.clock,
            open_objects=open_objects,
        )

    return make


async def add(system: LocalSystem, who: Principal, *texts: str, **header: Any) -> list[str]:
    about = Header(**{"user_id": "ann", **header})
    outcomes = await system.service.add(
        who, [AddRequest(text=text, header=about) for text in texts], wait_indexed=True
    )
    system.clock.advance(60)
    return [outcome.results[0].cube.id for outcome in outcomes]


def states(system: LocalSystem) -> dict[str, int]:
    return dict(system.catalog.index.stats().cubes_by_state)


async def test_a_step_over_a_quiet_system_does_nothing(system, who, sweep):
    await add(system, who, "tea", "milk")
    assert await sweep().step(system.clock()) == SweepReport()


async def test_nothing_is_forgotten_unless_the_policy_says_so(system, who, sweep):
    await add(system, who, "tea")
    system.clock.advance(9 * YEAR)
    await sweep().step(system.clock())
    assert states(system) == {"generated": 1}


@pytest.mark.parametrize(("policy", "state"), [("archive", "archived"), ("delete", "deleted")])
async def test_what_has_faded_goes_from_the_search_by_the_policy(system, who, sweep, policy, state):
    await add(system, who, "old")
    system.clock.advance(YEAR)
    (new,) = await add(system, who, "new")
    made = sweep(f"lifecycle.forget={policy}")
    assert (await made.step(system.clock())).faded == 1
    assert states(system) == {"generated": 1, state: 1}
    assert set(system.shards[0].held()) == {new}


async def test_frozen_used_important_and_pinned_cubes_do_not_fade(system, who, sweep):
    frozen, used, pinned, plain = await add(system, who, "frozen", "used", "pinned", "plain")
    await add(system, who, "important", priority=100)
    await system.service.set_frozen(who, frozen, True)
    scope = Scope(tenant=who.tenant, user_id="bob")
    system.catalog.snapshots.create(
        scope, "bob's", at=system.clock(), author="k", now=system.clock()
    )
    (bobs,) = await add(system, who, "bob's", user_id="bob")
    system.clock.advance(YEAR)
    system.catalog.cubes.record_uses(who.tenant, {used: 1}, now=system.clock())
    made = sweep("lifecycle.forget=archive", "lifecycle.half_life_days=50")
    assert (await made.step(system.clock())).faded == 2
    left = {
        c.id
        for c in system.catalog.cubes.find(who.tenant, now=system.clock(), limit=9).cubes
        if c.state != "archived"
    }
    assert left >= {frozen, used, bobs}
    assert not {pinned, plain} & left
    system.catalog.snapshots.delete(
        who.tenant, system.catalog.snapshots.get(who.tenant, "bob's").id
    )
    assert (await made.step(system.clock())).faded == 1


async def test_a_step_looks_at_a_batch_and_the_next_goes_on(system, who, sweep):
    await add(system, who, *(f"note {n}" for n in range(7)))
    system.clock.advance(YEAR)
    made = sweep("lifecycle.forget=archive", "scheduler.batch=3", "lifecycle.archive=false")
    assert [(await made.step(system.clock())).faded for _ in range(4)] == [3, 3, 1, 0]
    assert states(system) == {"archived": 7}


async def test_archived_cubes_are_copied_and_what_is_doomed_removed(system, who, sweep, tmp_path):
    (id,) = await add(system, who, "tea")
    await system.service.archive(who, id)
    made = sweep()
    assert (await made.step(system.clock())).copied == 1
    await system.service.delete(who, id)
    assert (await made.step(system.clock())).removed == 1
    assert [found async for found in FolderStore.open(tmp_path / "objects").list()] == []
    (other,) = await add(system, who, "milk")
    await system.service.archive(who, other)
    assert (await sweep("lifecycle.archive=false").step(system.clock())).copied == 0


async def test_a_store_that_is_down_holds_nothing_else_up(system, who, sweep):
    down = [True]
    made = sweep(down=down)
    (id,) = await add(system, who, "old")
    await system.service.archive(who, id)
    await add(system, who, TEA, SAME)
    with pytest.raises(Unavailable):
        await made.step(system.clock())
    assert len(system.catalog.proposals.find(who.tenant, limit=9, now=system.clock())) == 1
    down.clear()
    assert (await made.step(system.clock())).copied == 1


async def test_what_was_added_since_is_proposed_and_by_default_not_merged(system, who, sweep):
    made = sweep()
    await add(system, who, TEA, SAME)
    report = await made.step(system.clock())
    assert (report.proposed, report.merged) == (1, 0)
    assert states(system) == {"generated": 2}
    assert (await made.step(system.clock())).proposed == 0
    await add(system, who, "Ann lives in Oslo.")
    system.clock.advance(60)
    await add(system, who, "Ann lives in Bergen.")
    assert (await made.step(system.clock())).proposed == 1


async def test_the_policy_merges_statements_but_never_turns(system, who, sweep):
    made = sweep("scheduler.merge=apply")
    await add(system, who, TEA, SAME)
    turns = tuple(
        Message(role="user", content=text) for text in ("Good day, all!", "good day, all")
    )
    await system.service.add(
        who, [AddRequest(messages=turns, header=Header(user_id="bob"))], wait_indexed=True
    )
    system.clock.advance(60)
    report = await made.step(system.clock())
    assert (report.proposed, report.merged) == (2, 1)
    assert states(system) == {"generated": 3, "merged": 2}
    noted = system.catalog.proposals.find(who.tenant, limit=9, now=system.clock())
    assert {(str(p.state), p.decided_by) for p in noted} == {
        ("applied", "scheduler"),
        ("open", None),
    }


async def test_with_merging_off_nothing_is_looked_for(system, who, sweep):
    await add(system, who, TEA, SAME)
    assert (await sweep("scheduler.merge=off").step(system.clock())).proposed == 0


async def test_a_cube_that_is_not_indexed_yet_is_looked_at_once_it_is(system, who, sweep):
    made = sweep()
    await add(system, who, TEA)
    draft = Draft(text=SAME, user_id="ann", kind=Kind.FACT)
    system.catalog.cubes.add(who.tenant, [draft], author="key", now=system.clock())
    system.clock.advance(60)
    assert (await made.step(system.clock())).proposed == 0
    await system.reconcile(after_s=60)
    assert (await made.step(system.clock())).proposed == 1


async def test_old_proposals_are_pruned_once_an_hour(system, who, sweep):
    made = sweep()
    ids = await add(system, who, TEA, SAME)
    await made.step(system.clock())
    await system.service.archive(who, ids[0])
    system.clock.advance(timedelta(days=31).total_seconds())
    assert (await made.step(system.clock())).pruned == 1


def test_ids_of_a_time_on_come_after_its_first_id():
    for n in range(20):
        moment = START + timedelta(milliseconds=n)
        assert first_id(moment) <= uuid7(moment)
        assert uuid7(moment - timedelta(milliseconds=1)) < first_id(moment)
