"""The routes of the scheduler, over a real host in this process."""

from dataclasses import replace
from datetime import timedelta

import pytest

from memcube.catalog import NodeSeen
from memcube.catalog.fence import LEASE
from memcube.errors import Unavailable
from memcube.ids import uuid7

TEXT = "Ann moved to Oslo and drinks tea in the morning " * 20


@pytest.fixture
async def moved(api) -> str:
    """A memory whose KV the scheduler has built."""
    id = await api.add(TEXT)
    api.system.clock.advance(7_200)
    await used(api, id)
    assert (await api.ok("GET", "/v1/scheduler/journal"))["events"]
    return id


async def used(api, id: str) -> None:
    """Let a memory be used much, and the scheduler act on it."""
    tenant = api.system.principal().tenant
    for _ in range(3):
        api.system.scheduler.host.used({tenant: {id: 300}}, {})
        await api.system.scheduler.step()
        api.system.clock.advance(5)


async def test_the_status_tells_who_leads_what_was_moved_and_how_full_places_are(
    api, moved, operator
):
    told = await api.ok("GET", "/v1/scheduler", key=operator)
    assert (told["leading"], told["epoch"], told["lease"]["holder"]) == (True, 1, "scheduler")
    assert told["lease"]["has_run_out"] is False
    (done,) = told["moves"]
    assert done == {"tier": "activation", "action": "copy", "state": "done", "count": 1}
    assert {"policy": "promotion", "outcome": "planned", "count": 1} in told["decisions"]
    (place,) = [place for place in told["places"] if place["tier"] == "activation"]
    assert place["used_bytes"] == told["moved_bytes"]["activation"] > 0
    assert set(told["parts"]) >= {"moves", "reconcile", "lifecycle", "queue", "uses"}
    assert told["queue"] == {
        "by_state": {"waiting": 0, "running": 0, "done": 0, "dead": 0},
        "oldest_due_s": None,
    }
    api.system.clock.advance(60)
    assert (await api.ok("GET", "/v1/scheduler", key=operator))["lease"]["has_run_out"] is True


async def test_a_plan_changes_nothing_and_a_round_moves(api, operator):
    id = await api.add(TEXT)
    tenant = api.system.principal().tenant
    api.system.scheduler.host.used({tenant: {id: 300}}, {})
    await api.system.scheduler.step()
    before = api.system.catalog.actions.page()
    told = await api.ok("POST", "/v1/scheduler/plan", key=operator)
    assert (told["dry_run"], told["actions"], told["round"]) == (True, [], None)
    assert api.system.catalog.actions.page() == before == []
    api.system.clock.advance(3_600)  # now it is stable
    told = await api.ok("POST", "/v1/scheduler/plan?dry_run=false", key=operator)
    assert (told["dry_run"], told["num_actions"], told["planned"]) == (False, 1, {"promotion": 1})
    await api.system.scheduler.host.settled()
    (event,) = (await api.ok("GET", "/v1/scheduler/journal"))["events"]
    assert (event["cube"], event["state"]) == (id, "done")


async def test_the_journal_is_a_tenants_own_and_an_operators_whole(api, moved, other, operator):
    at = "/v1/scheduler/journal"
    (event,) = (await api.ok("GET", at))["events"]
    assert (event["cube"], event["policy"], event["ended"]) == (moved, "promotion", True)
    assert event["target"] == {
        "tier": "activation",
        "medium": "device",
        "location": "node-1/engine-0",
    }
    assert "Oslo" not in str(event)
    assert (await api.ok("GET", at, key=other))["events"] == []
    assert (await api.ok("GET", f"{at}?tenant=acme", key=operator))["events"] == [event]
    assert (await api.ok("GET", f"{at}?tenant=other", key=operator))["events"] == []
    assert (await api.ok("GET", f"{at}?cube={moved}"))["events"] == [event]
    assert (await api.ok("GET", f"{at}?cube=nothing"))["events"] == []
    await api.problem(403, "forbidden", "GET", f"{at}?tenant=other")
    page = await api.ok("GET", f"{at}?limit=1")
    assert page["next"] == event["id"]
    assert (await api.ok("GET", f"{at}?before={page['next']}"))["events"] == []
    assert (await api.problem(422, "limit_exceeded", "GET", f"{at}?limit=10000"))["limit"] == 500


async def test_an_operator_is_told_what_became_of_the_cluster_too(api, moved, other, operator):
    catalog, now = api.system.catalog, api.system.clock()
    leader = catalog.leases.epoch(LEASE)
    seen = [NodeSeen(name=name, labels={}, alive=True) for name in ("a", "b")]
    catalog.shards.note_nodes(seen[:1], leader=leader, now=now)
    catalog.shards.note_nodes(seen, leader=leader, now=now + timedelta(seconds=1))
    catalog.shards.drain("b", True, now=now + timedelta(seconds=2))
    at = "/v1/scheduler/journal"
    told = (await api.ok("GET", at, key=operator))["events"]
    about = [(one["kind"], one["node"]) for one in told]
    assert about[:3] == [("node_drains", "b"), ("node_up", "b"), ("node_up", "a")]
    assert sorted(about[3:]) == [("copy", None), ("leader", None)]  # of one millisecond
    assert (told[0]["type"], told[0]["tenant"], told[0]["ended"]) == ("cluster", None, True)
    pages, before = [], ""
    while before is not None:
        page = await api.ok("GET", f"{at}?limit=2{before and '&before=' + before}", key=operator)
        pages += page["events"]
        before = page["next"]
    assert pages == told
    path = f"/v1/events/{told[0]['id']}"
    assert await api.ok("GET", path, key=operator) == told[0]
    await api.problem(404, "not_found", "GET", path)
    assert len((await api.ok("GET", at))["events"]) == 1
    assert len((await api.ok("GET", f"{at}?cube={moved}", key=operator))["events"]) == 1


async def test_an_event_is_read_and_waited_for_by_its_id(api, moved, other, operator):
    (event,) = (await api.ok("GET", "/v1/scheduler/journal"))["events"]
    path = f"/v1/events/{event['id']}"
    assert await api.ok("GET", path) == event
    assert await api.ok("GET", f"{path}/wait") == event  # it has ended: at once
    assert await api.ok("GET", path, key=operator) == event
    await api.problem(404, "not_found", "GET", path, key=other)
    task = await api.task()
    found = await api.ok("GET", f"/v1/events/{task}/wait")
    assert (found["type"], found["kind"], found["result"]) == (
        "task",
        "consolidate",
        {"outcome": "proposed"},
    )
    waiting = await api.dead_task()
    await api.ok("POST", f"/v1/tasks/{waiting}/retry")
    told = await api.ok("GET", f"/v1/events/{waiting}/wait?timeout_s=0")
    assert (told["state"], told["ended"], told["ended_at"]) == ("waiting", False, None)
    await api.problem(422, "bad_request", "GET", f"{path}/wait?timeout_s=61")


async def test_dead_tasks_are_listed_and_retried(api, other, operator):
    id = await api.dead_task()
    (listed,) = (await api.ok("GET", "/v1/tasks?state=dead"))["events"]
    assert (listed["id"], listed["outcome"], listed["attempts"]) == (id, "it can't be", 1)
    assert (await api.ok("GET", "/v1/tasks", key=other))["events"] == []
    assert len((await api.ok("GET", "/v1/tasks", key=operator))["events"]) == 1
    await api.problem(404, "not_found", "POST", f"/v1/tasks/{id}/retry", key=other)
    assert (await api.ok("POST", f"/v1/tasks/{id}/retry", key=operator))["state"] == "waiting"
    assert (await api.ok("POST", f"/v1/tasks/{id}/retry"))["state"] == "waiting"
    done = await api.task()
    await api.problem(409, "conflict", "POST", f"/v1/tasks/{done}/retry")


async def test_a_proposed_consolidation_becomes_one_job_however_often_it_is_accepted(api):
    id = await api.task()
    job = await api.ok("POST", f"/v1/tasks/{id}/accept")
    assert (job["kind"], job["state"], job["adapter"]) == ("consolidate", "queued", "ann")
    assert await api.ok("POST", f"/v1/tasks/{id}/accept") == job
    assert [one["id"] for one in (await api.ok("GET", "/v1/jobs"))["jobs"]] == [job["id"]]
    dead = await api.dead_task()
    await api.problem(409, "conflict", "POST", f"/v1/tasks/{dead}/accept")
    last = await api.task()
    (cube,) = (await api.ok("GET", f"/v1/events/{last}"))["cubes"]
    await api.ok("DELETE", f"/v1/memories/{cube}")
    told = await api.problem(409, "conflict", "POST", f"/v1/tasks/{last}/accept")
    assert "no cube" in told["detail"]


async def test_a_scheduler_that_does_not_answer_is_said_so(api, operator):
    class Gone:
        async def details(self):
            raise Unavailable("the scheduler is not there now", 2.0)

    api.app.state.backend = replace(api.app.state.backend, scheduler=Gone())
    await api.problem(503, "unavailable", "GET", "/v1/scheduler", key=operator)
    assert "memcube_scheduler_leading 0.0" in (await api.call("GET", "/metrics")).text
    api.app.state.backend = replace(api.app.state.backend, scheduler=None)
    await api.problem(503, "unavailable", "POST", "/v1/scheduler/plan", key=operator)


async def test_metrics_tell_decisions_moves_and_the_queue_and_no_tenant(api, moved):
    await api.dead_task()
    text = (await api.call("GET", "/metrics", key=None)).text
    for line in (
        "memcube_scheduler_leading 1.0",
        'memcube_scheduler_decisions_total{outcome="planned",policy="promotion"} 1.0',
        'memcube_scheduler_moves_total{action="copy",state="done",tier="activation"} 1.0',
        "memcube_scheduler_moves_open 0.0",
        'memcube_scheduler_tasks{state="dead"} 1.0',
        'memcube_scheduler_part_failures_total{part="moves"} 0.0',
    ):
        assert line in text
    assert 'memcube_scheduler_moved_bytes_total{tier="activation"}' in text
    assert 'memcube_scheduler_part_age_seconds{part="reconcile"}' in text
    assert "acme" not in text
    assert str(uuid7(api.system.clock()))[:8] not in text
