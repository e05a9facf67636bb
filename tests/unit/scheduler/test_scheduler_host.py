"""The scheduler that runs: its parts over a whole system in this process, and the real engine port."""

from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import pytest

from memcube.activation.contract import Mode
from memcube.catalog import JobKind, NewJob, NewTask, TaskState
from memcube.chat.migration import ActivationTier
from memcube.chat.router import Router
from memcube.config import load_config
from memcube.cube import Draft, Kind
from memcube.errors import StaleEpoch, Unavailable
from memcube.ids import CubeId
from memcube.scheduler.actions import Action, ActionState, Medium, Place, Tier
from memcube.scheduler.leader_fence import LeaderFence
from memcube.scheduler.lease import LeaseKeeper
from memcube.testing.local import LocalSystem, migrated_catalog

ENGINE = Place(Tier.ACTIVATION, Medium.DEVICE, "node-1/engine-0")
TEXT = "Ann moved to Oslo and drinks tea in the morning "


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return migrated_catalog(tmp_path_factory.mktemp("template"))


@pytest.fixture
def open_system(tmp_path: Path, template: Path) -> Iterator:
    opened: list[LocalSystem] = []

    def make(*overrides: str) -> LocalSystem:
        config = load_config(None, [f"data_dir={tmp_path}", *overrides])
        opened.append(LocalSystem.open(tmp_path, config=config, template=template))
        return opened[-1]

    yield make
    for system in opened:
        system.close()


@pytest.fixture
def system(open_system) -> LocalSystem:
    return open_system()


def add(system: LocalSystem, *texts: str, **draft) -> list[CubeId]:
    """Indexed cubes of the tenant acme, much used and long unchanged."""
    who = system.principal()
    drafts = [Draft(text=text, user_id="ann", **draft) for text in texts]
    found = system.catalog.cubes.add(who.tenant, drafts, author="test", now=system.clock())
    ids = [one.cube.id for one in found.results]
    system.clock.advance(10 * 86_400.0)
    return ids


def use(system: LocalSystem, ids: list[CubeId], times: int = 200) -> None:
    system.scheduler.host.used({system.principal().tenant: dict.fromkeys(ids, times)}, {})


async def steps(system: LocalSystem, num: int = 3, *, every_s: float = 5.0) -> None:
    for _ in range(num):
        await system.scheduler.step()
        system.clock.advance(every_s)


def listed(system: LocalSystem, id: CubeId) -> list[Place]:
    tenant = system.principal().tenant
    return [place for place, _ in system.catalog.actions.copies(tenant, id, Tier.ACTIVATION)]


async def held(system: LocalSystem, *ids: CubeId) -> set[str]:
    return {id for id in ids if await system.engines[0].residency([id])}


def places(system: LocalSystem) -> list[dict]:
    told = system.scheduler.host.details()["places"]
    return [place for place in told if place["tier"] == "activation"]


# -- leading ---------------------------------------------------------------------------------------


def test_a_fence_refuses_who_was_followed_by_another():
    fence = LeaderFence(3)
    fence.check(3)
    fence.check(5)
    with pytest.raises(StaleEpoch) as refused:
        fence.check(4)
    assert (refused.value.given, refused.value.current) == (4, 5)


def test_a_keeper_renews_in_time_and_a_successor_leads_once_the_lease_has_run_out(system):
    leases, clock = system.catalog.leases, system.clock
    first = LeaseKeeper(leases, holder="first", clock=clock)
    second = LeaseKeeper(leases, holder="second", clock=clock)
    assert (first.step(), second.step()) == (1, None)
    for _ in range(10):
        clock.advance(first.ttl_s / 3)
        assert (first.step(), second.step()) == (1, None)
    clock.advance(first.ttl_s + 0.1)
    assert second.step() == 2
    assert first.step() is None
    second.release()
    assert first.step() == 3
    assert second.step() is None


def test_a_keeper_that_can_not_reach_the_catalog_keeps_its_epoch_and_counts(system):
    class Down:
        def acquire(self, *given, **how):
            return system.catalog.leases.acquire(*given, **how)

        def renew(self, *given, **how):
            raise Unavailable("the catalog is down")

    keeper = LeaseKeeper(Down(), holder="one", clock=system.clock)  # type: ignore[arg-type]
    assert keeper.step() == keeper.step() == 1
    assert keeper.num_failures == 1


async def test_nothing_is_done_without_the_lease(system):
    other = LeaseKeeper(system.catalog.leases, holder="other", clock=system.clock)
    other.step()
    await system.scheduler.step()
    told = system.scheduler.host.details()
    assert told["epoch"] is None
    assert {part["rounds"] for part in told["parts"].values()} == {0}
    with pytest.raises(Unavailable):
        await system.scheduler.round_now()


async def test_one_that_was_deposed_drops_all_and_leads_again_under_a_new_epoch(system):
    await steps(system, 2)
    assert system.scheduler.host.status()["epoch"] == 1
    system.clock.advance(60)
    other = LeaseKeeper(system.catalog.leases, holder="other", clock=system.clock)
    other.step()
    await system.scheduler.host.step()  # the keeper has not heard of it yet
    assert system.scheduler.host.status()["epoch"] is None
    other.release()
    await steps(system, 1)
    assert system.scheduler.host.status()["epoch"] == 3
    assert system.scheduler.host.details()["parts"]["moves"]["error"] is None


# -- parts beside each other -----------------------------------------------------------------------


async def test_a_shard_that_is_down_holds_no_other_part_up(system):
    (id,) = add(system, TEXT * 20)
    system.shards[0].down = True
    use(system, [id])
    await steps(system)
    parts = system.scheduler.host.details()["parts"]
    assert "not there" in parts["reconcile"]["error"]
    assert {n for n, part in parts.items() if part["error"]} <= {"reconcile", "uses"}
    assert parts["moves"]["rounds"] == 3
    assert listed(system, id) == [ENGINE]


async def test_an_engine_that_is_down_holds_no_other_part_up(system):
    (id,) = add(system, TEXT * 20)
    system.engines[0].down = True
    use(system, [id])
    await steps(system)
    parts = system.scheduler.host.details()["parts"]
    assert {name: part["error"] for name, part in parts.items() if part["error"]} == {}
    assert listed(system, id) == []
    system.engines[0].down = False
    await steps(system)
    assert listed(system, id) == [ENGINE]


# -- the activation tier ---------------------------------------------------------------------------


async def test_what_is_used_much_gets_its_kv_and_what_is_not_gets_none(system):
    hot, cold = add(system, TEXT * 20, "Bob lives in Rome " * 20)
    use(system, [hot])
    await steps(system)
    assert (listed(system, hot), listed(system, cold)) == ([ENGINE], [])
    assert await held(system, hot, cold) == {hot}
    (action,) = system.catalog.actions.page()
    assert (action.state, action.policy, action.target) == (
        ActionState.DONE,
        "promotion",
        ENGINE,
    )
    told = system.scheduler.host.details()
    assert told["moved_bytes"] == {"activation": action.num_bytes}
    assert {"policy": "promotion", "outcome": "planned", "count": 1} in told["decisions"]
    (place,) = places(system)
    assert (place["location"], place["used_bytes"]) == ("node-1/engine-0", action.num_bytes)


async def test_with_similarity_what_is_close_to_what_was_asked_gets_its_kv(open_system):
    system = open_system("scheduler.profile={strategies: {similarity: 1}}")
    near, far = add(system, TEXT * 9, TEXT * 8)
    await steps(system)
    tenant = system.principal().tenant
    system.scheduler.host.used({tenant: {near: 200, far: 200}}, {tenant: {near: 0.9, far: 0.1}})
    await steps(system)
    assert await held(system, near, far) == {near}


async def test_kv_that_grew_cold_is_dropped_from_the_list_and_the_engine(system):
    (id,) = add(system, TEXT * 20)
    use(system, [id])
    await steps(system)
    assert await held(system, id) == {id}
    system.clock.advance(90 * 86_400.0)
    await steps(system)
    assert (listed(system, id), await held(system, id)) == ([], set())
    assert system.catalog.actions.page()[0].policy == "decay"


async def test_what_the_engine_let_go_is_struck_from_the_list_and_not_built_again_at_once(system):
    (id,) = add(system, TEXT * 20)
    use(system, [id])
    await steps(system)
    await system.engines[0].forget([id], None)
    await steps(system, 4, every_s=61.0)
    assert listed(system, id) == []
    drop = system.catalog.actions.page()[0]
    assert (drop.policy, drop.reason) == ("reconcile", "it is listed and not there")
    system.clock.advance(2_000)
    await steps(system)
    assert listed(system, id) == [ENGINE]


async def test_a_cube_that_changes_while_its_kv_is_built_is_neither_listed_nor_kept(system):
    (id,) = add(system, TEXT * 20)
    use(system, [id])
    tenant = system.principal().tenant
    system.engines[0].on_build = lambda: system.catalog.cubes.delete(tenant, id, now=system.clock())
    await steps(system)
    assert await held(system, id) == set()
    assert system.catalog.actions.page()[0].state is ActionState.UNDONE


async def test_a_copy_that_fails_settles_before_it_is_tried_again(system):
    (id,) = add(system, TEXT * 20)
    use(system, [id])
    system.engines[0].fence.check(0)

    async def forgetful(wanted, *, leader=None):
        return None

    system.engines[0].build = forgetful  # type: ignore[method-assign]
    await steps(system, 10, every_s=30.0)
    states = [action.state for action in system.catalog.actions.page()]
    assert states == [ActionState.FAILED]


async def test_an_engine_refuses_a_leader_that_was_followed(system):
    (id,) = add(system, TEXT * 20)
    use(system, [id])
    system.engines[0].fence.check(99)
    await steps(system, 5)
    assert listed(system, id) == []
    assert system.scheduler.host.details()["parts"]["moves"]["failures"] > 0
    await steps(system, 200)  # each time that it is refused it takes the lease anew
    assert listed(system, id) == [ENGINE]


async def test_a_location_that_no_engine_has_any_more_is_forgotten(open_system):
    system = open_system()
    (id,) = add(system, TEXT * 20)
    use(system, [id])
    await steps(system)
    system.engines[0].node = "node-2"
    await steps(system, 1)
    assert listed(system, id) == []
    assert [place["location"] for place in places(system)] == ["node-2/engine-0"]
    system.clock.advance(1_000)  # it settles first
    await steps(system)
    assert [place.location for place in listed(system, id)] == ["node-2/engine-0"]


async def test_an_operator_may_migrate_what_the_scheduler_then_knows(system):
    (id,) = add(system, TEXT * 20)
    await steps(system, 1)
    tier = ActivationTier(system.service, system.engines, Router(1), mode=Mode.EXACT)
    await tier.activate(system.principal(), id)
    await steps(system, 1)
    (place,) = places(system)
    assert place["used_bytes"] > 0


async def test_a_dry_run_tells_actions_with_reasons_and_changes_nothing(system):
    (id,) = add(system, TEXT * 20)
    system.clock.advance(-10 * 86_400.0)  # it has not been stable for an hour yet
    use(system, [id])
    await steps(system)
    assert system.scheduler.host.plan(limit=10)["actions"] == []
    system.clock.advance(3_600.0)
    told = system.scheduler.host.plan(limit=10)
    assert [(a["cube"], a["policy"]) for a in told["actions"]] == [(id, "promotion")]
    assert "times a day" in told["actions"][0]["reason"]
    assert (told["num_actions"], told["planned"]) == (1, {"promotion": 1})
    assert system.scheduler.host.plan(limit=0)["num_actions"] == 1
    assert (listed(system, id), system.catalog.actions.page()) == ([], [])


# -- the queue -------------------------------------------------------------------------------------

CONSENTS = ("scheduler.consents=[acme]", "scheduler.profile={min_cubes: 2, lasting_rate: 0}")


def queue(system: LocalSystem, **payload) -> str:
    new = NewTask(kind=payload.pop("kind"), key="k", payload=payload, max_attempts=2)
    return system.catalog.tasks.put(system.principal().tenant, new, now=system.clock()).id


def task(system: LocalSystem, id: str):
    return system.catalog.tasks.get(system.principal().tenant, id)


async def test_a_scope_that_lasts_is_proposed_to_its_tenant_once(open_system):
    system = open_system(*CONSENTS)
    ids = add(system, "Ann likes tea", "Ann likes milk", kind=Kind.FACT)
    system.clock.advance(20 * 86_400.0)
    await steps(system, 5)
    (proposed,) = system.catalog.tasks.page()
    assert (proposed.kind, proposed.state) == ("consolidate", TaskState.DONE)
    assert proposed.result == {"outcome": "proposed", "num_cubes": 2}
    assert set(proposed.payload["cubes"]) == set(ids)
    assert "tea" not in repr(proposed)
    assert system.catalog.jobs.page(proposed.tenant) == []


async def test_nothing_is_proposed_without_the_owners_consent(open_system):
    system = open_system(*CONSENTS[1:])
    add(system, "Ann likes tea", "Ann likes milk", kind=Kind.FACT)
    system.clock.advance(20 * 86_400.0)
    await steps(system)
    assert system.catalog.tasks.page() == []


async def test_applied_it_queues_the_job_that_a_request_would(open_system):
    system = open_system(*CONSENTS, "scheduler.consolidate=apply")
    ids = add(system, "Ann likes tea", "Ann likes milk", kind=Kind.FACT)
    system.clock.advance(20 * 86_400.0)
    await steps(system, 5)
    (done,) = system.catalog.tasks.page()
    (job,) = system.catalog.jobs.page(done.tenant)
    assert done.result == {"outcome": "queued", "job": job.id}
    assert (job.kind, job.spec["name"], job.author) == (JobKind.CONSOLIDATE, "ann", "scheduler")
    assert set(job.spec["choice"]["cubes"]) == set(ids)


async def test_a_task_that_fails_is_put_off_then_dead_and_done_when_it_is_retried(open_system):
    system = open_system("scheduler.consolidate=apply", "training.max_open_jobs=1")
    tenant = system.principal().tenant
    (id,) = add(system, "Ann likes tea", kind=Kind.FACT)
    other = NewJob(kind=JobKind.PROBE, spec={}, author="test")
    busy = system.catalog.jobs.add(tenant, other, now=system.clock())
    wanted = queue(system, kind="consolidate", scope="s", cubes=[id], reason="r")
    await steps(system, 1)
    assert task(system, wanted).state is TaskState.WAITING
    await steps(system, 2)
    dead = task(system, wanted)
    assert (dead.state, dead.attempts) == (TaskState.DEAD, 2)
    assert "1 jobs of this tenant" in dead.error
    system.catalog.jobs.cancel(tenant, busy.id, now=system.clock())
    system.catalog.tasks.retry(wanted, now=system.clock())
    await steps(system, 1)
    assert task(system, wanted).state is TaskState.DONE


@pytest.mark.parametrize("kind", ["reindex", "expire", "archive"])
async def test_the_queue_keeps_tiers_true_to_the_catalog(system, kind):
    (id,) = add(
        system,
        "Ann likes tea",
        **({"expires_at": system.clock() + timedelta(days=1)} if kind == "expire" else {}),
    )
    gone = queue(system, kind=kind, cube=id, reason="r")
    await steps(system, 1)
    assert task(system, gone).state is TaskState.DONE
    found = system.catalog.cubes.live_versions(system.principal().tenant, [id], now=system.clock())
    assert found == ({id: 1} if kind == "reindex" else {})
    assert (id in system.shards[0].held()) == (kind == "reindex")


# -- places that are gone --------------------------------------------------------------------------


class NoNodes:
    """A topology of a cluster that has lost all that it had; ``failing`` is why it can't say so."""

    failing: Exception | None = None

    async def update(self, world, *, leader, now) -> Sequence[Action]:
        if self.failing is not None:
            raise self.failing
        return ()


def plaintext(system: LocalSystem, id: CubeId) -> list[Place]:
    tenant = system.principal().tenant
    return [place for place, _ in system.catalog.actions.copies(tenant, id, Tier.PLAINTEXT)]


async def test_what_is_listed_on_nodes_that_are_gone_is_forgotten_of_known_tiers_alone(system):
    (id,) = add(system, "Ann drinks tea")
    system.clock.advance(-10 * 86_400.0)  # the feed looks half a minute back
    await steps(system, 4)
    (place,) = plaintext(system, id)  # nobody knows this tier's nodes here
    topology = NoNodes()
    topology.failing = RuntimeError("no answer")
    system.scheduler.host._moves._topologies[Tier.PLAINTEXT] = topology
    await steps(system, 2)
    assert plaintext(system, id) == [place]
    assert system.scheduler.host.details()["failing"] == {"plaintext": "RuntimeError"}
    topology.failing = None
    await steps(system, 2)
    assert place not in plaintext(system, id)
    assert system.scheduler.host.details()["failing"] == {}
