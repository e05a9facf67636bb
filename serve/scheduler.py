"""The routes of the scheduler: who leads, what is planned, what was done, and the queue.

What is of the whole system is an operator's. A tenant's keys see its own actions and tasks, and an
operator's those of all. None of it holds a memory's text.
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import Path, Query
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from memcube.catalog import ActionRecord, ClusterEvent, Principal, Role, Task, TaskState
from memcube.catalog.fence import LEASE
from memcube.errors import Conflict, Forbidden, NotFound, Unavailable
from memcube.ids import CubeId, TenantId
from memcube.scheduler.actions import Place
from memcube.scheduler.parts import consolidations
from serve import views
from serve.backend import Backend, Scheduler
from serve.dependencies import Here, Operator, Reader, Writer, check_page, guarded, runs_it
from serve.jobs import JobOut, job_view

scheduler = guarded("/v1/scheduler", "scheduler")
events = guarded("/v1/events", "scheduler")
tasks = guarded("/v1/tasks", "scheduler")

_ID = "01a20e3e-d04c-705b-a9c3-c4fffbea30a3"
EventId = Annotated[str, Path(max_length=64, examples=[_ID])]
TenantName = Annotated[
    str | None,
    Query(max_length=63, description="An operator's choice; none is all. Others see their own."),
]
Before = Annotated[str | None, Query(max_length=64, description="Older ones than this.")]
Limit = Annotated[int, Query(ge=1)]
POLL_S = 0.25


class LeaseOut(BaseModel):
    holder: str
    epoch: int
    until: datetime
    has_run_out: bool


class PartOut(BaseModel):
    """A part of the scheduler's work: `moves`, `reconcile`, `lifecycle`, `queue`, `uses`, `retrain`."""

    rounds: int
    failures: int
    took_s: float
    ended_at: datetime | None
    error: str | None = Field(description="Why its last round failed; null where it did not.")
    last: dict[str, Any]


class QueueOut(BaseModel):
    by_state: dict[str, int]
    oldest_due_s: float | None = Field(description="How long the oldest task waits that may run.")


class DecisionOut(BaseModel):
    policy: str
    outcome: str = Field(
        description="`planned`, `passed` (the world had moved on), or the refusal."
    )
    count: int


class MovesOut(BaseModel):
    tier: str
    action: str
    state: str
    count: int


class NodeOut(BaseModel):
    name: str
    alive: bool
    draining: bool
    labels: list[str]


class PlaceOut(BaseModel):
    """Where payloads may lie. `used_bytes` is what the catalog lists there, `reserved_bytes` what is on its
    way."""

    place: str
    tier: str
    medium: str
    location: str
    used_bytes: int
    reserved_bytes: int
    capacity_bytes: int
    readable: bool


class SchedulerStatusOut(BaseModel):
    leading: bool
    epoch: int | None
    lease: LeaseOut | None
    rounds: int
    parts: dict[str, PartOut]
    failing: dict[str, str] = Field(
        description="Tiers whose places could not be looked at, and why."
    )
    last_round: dict[str, Any] | None
    last_round_at: datetime | None
    moves_open: int
    moves_waiting: int
    moved_bytes: dict[str, int]
    moves: list[MovesOut]
    decisions: list[DecisionOut]
    queue: QueueOut
    nodes: list[NodeOut]
    places: list[PlaceOut]


class PlannedOut(BaseModel):
    tenant: str
    cube: str | None
    action: str
    policy: str
    reason: str
    source: str | None
    target: str | None
    num_bytes: int
    num_cubes: int
    refused: str | None = None


class ReasonOut(BaseModel):
    policy: str
    reason: str
    count: int


class PlanOut(BaseModel):
    """A plan. Counts are of all of it, `actions` and `refusals` are its first. Of a round that was made, `round`
    is what it did."""

    dry_run: bool
    num_actions: int
    num_refused: int
    planned: dict[str, int] = Field(description="Actions by policy.")
    refused: list[ReasonOut]
    actions: list[PlannedOut]
    refusals: list[PlannedOut]
    round: dict[str, Any] | None = None


class WhereOut(BaseModel):
    tier: str
    medium: str
    location: str


class EventOut(BaseModel):
    """An action of the journal, something that happened to the cluster (a node, a shard, the lead), or a task of
    the queue. `outcome` says why it ended so, or was put off."""

    id: str
    type: Literal["action", "cluster", "task"]
    kind: str
    state: str
    ended: bool
    tenant: str | None = Field(description="None of what happened to the cluster.")
    node: str | None = Field(description="Of what happened to the cluster.")
    cube: str | None
    version: int | None
    policy: str | None
    reason: str
    outcome: str
    source: WhereOut | None
    target: WhereOut | None
    num_bytes: int
    attempts: int
    cubes: list[str] | None = Field(description="Those that a task names.")
    result: dict[str, Any] | None
    created_at: datetime
    updated_at: datetime
    ended_at: datetime | None


class EventsOut(BaseModel):
    events: list[EventOut]
    next: str | None = Field(description="Give it as `before` for older ones.")


@scheduler.get("", response_model=SchedulerStatusOut, summary="How the scheduler is doing")
async def status(who: Operator, here: Here) -> JSONResponse:
    """Who leads, what each part of its work did last, what was decided and moved since it began, the queue,
    and how full each place is."""
    told = await _of(here).details()
    now = here.clock()
    lease, queue = await asyncio.gather(
        asyncio.to_thread(here.catalog.leases.get, LEASE),
        asyncio.to_thread(lambda: here.catalog.tasks.stats(now=now)),
    )
    out = {name: told[name] for name in SchedulerStatusOut.model_fields if name in told}
    out["leading"] = told["epoch"] is not None
    out["lease"] = None
    if lease is not None:
        out["lease"] = {
            "holder": lease.holder,
            "epoch": lease.epoch,
            "until": views.moment(lease.expires_at),
            "has_run_out": lease.expires_at <= now,
        }
    due = queue.oldest_due
    out["queue"] = {
        "by_state": dict(queue.by_state),
        "oldest_due_s": None if due is None else max((now - due).total_seconds(), 0.0),
    }
    return JSONResponse(out)


@scheduler.post("/plan", response_model=PlanOut, summary="What would be done now")
async def plan(who: Operator, here: Here, dry_run: bool = True, limit: Limit = 50) -> JSONResponse:
    """What the policies would do now over all that is known, and what is refused and why; nothing changes.
    With `dry_run=false` a round is made at once instead of at its time."""
    check_page(here, limit)
    if dry_run:
        told = await _of(here).plan(limit=limit)
        return JSONResponse({"dry_run": True, **told, "round": None})
    made = await _of(here).round_now()
    return JSONResponse(
        {
            "dry_run": False,
            "num_actions": made["num_planned"],
            "num_refused": sum(one["count"] for one in made["refused"]),
            "planned": made["planned"],
            "refused": made["refused"],
            "actions": [],
            "refusals": [],
            "round": made,
        }
    )


@scheduler.get("/journal", response_model=EventsOut, summary="What was done, and is under way")
async def journal(
    who: Reader,
    here: Here,
    tenant: TenantName = None,
    cube: Annotated[str | None, Query(max_length=64)] = None,
    before: Before = None,
    limit: Limit = 50,
) -> JSONResponse:
    """Actions of the journal, newest first; for an operator who asks for no tenant and no cube also what happened to
    the cluster: nodes that came, went and were drained, shards that were opened, who leads."""
    check_page(here, limit)
    whose = _whose(who, tenant)

    def work() -> list[dict[str, Any]]:
        about = None if cube is None else CubeId(cube)
        catalog = here.catalog
        actions = catalog.actions.page(tenant=whose, cube=about, before=before, limit=limit)
        found = [_action(who, record) for record in actions]
        if whose is None and about is None:
            found += map(_cluster_event, catalog.cluster_log.page(before=before, limit=limit))
            found.sort(key=lambda event: event["id"], reverse=True)
        return found[:limit]

    return JSONResponse(_page(await asyncio.to_thread(work), limit))


@events.get("/{id}", response_model=EventOut, summary="Get an event")
async def get_event(id: EventId, who: Reader, here: Here) -> JSONResponse:
    """One action of the journal, something that happened to the cluster (for an operator), or one task of the queue."""
    return JSONResponse(await _event(id, who, here))


@events.get("/{id}/wait", response_model=EventOut, summary="Wait for an event to end")
async def wait_for_event(
    id: EventId,
    who: Reader,
    here: Here,
    timeout_s: Annotated[float, Query(ge=0, le=60)] = 30.0,
) -> JSONResponse:
    """Answered when it has ended (`ended`), or as it is when the time is over: then ask again."""
    loop = asyncio.get_running_loop()
    until = loop.time() + timeout_s
    while True:
        found = await _event(id, who, here)
        left_s = until - loop.time()
        if found["ended"] or left_s <= 0:
            return JSONResponse(found)
        await asyncio.sleep(min(POLL_S, left_s))


@tasks.get("", response_model=EventsOut, summary="List the queue's tasks")
async def list_tasks(
    who: Reader,
    here: Here,
    state: TaskState | None = None,
    tenant: TenantName = None,
    before: Before = None,
    limit: Limit = 50,
) -> JSONResponse:
    """Newest first. One of kind `consolidate` that is done with the result `proposed` is a proposal: a writer
    of its tenant may accept it."""
    check_page(here, limit)
    whose = _whose(who, tenant)
    found = await asyncio.to_thread(
        lambda: here.catalog.tasks.page(tenant=whose, state=state, before=before, limit=limit)
    )
    return JSONResponse(_page([task_view(task) for task in found], limit))


@tasks.post("/{id}/retry", response_model=EventOut, summary="Retry a dead task")
async def retry(id: EventId, who: Writer, here: Here) -> JSONResponse:
    """It waits again, with all its attempts. May be repeated; one that waits or runs stays as it is."""
    whose = None if runs_it(who) else who.tenant
    task = await asyncio.to_thread(
        lambda: here.catalog.tasks.retry(id, tenant=whose, now=here.clock())
    )
    return JSONResponse(task_view(task))


@tasks.post(
    "/{id}/accept", status_code=202, response_model=JobOut, summary="Accept a consolidation"
)
async def accept(id: EventId, who: Writer, here: Here) -> JSONResponse:
    """Queue the job that a task of kind `consolidate` proposes, as `POST /v1/jobs` would. May be repeated: it is
    one job."""

    def work() -> dict[str, Any]:
        task = here.catalog.tasks.get(who.tenant, id)
        if task.state is not TaskState.DONE:
            raise Conflict(f"task {id} is {task.state}; it proposes nothing yet")
        made = consolidations(here.catalog, here.config)
        return job_view(made.accept(task, author=who.key_id, now=here.clock()))

    return JSONResponse(await asyncio.to_thread(work), 202)


_NOTHING: dict[str, Any] = {
    "tenant": None,
    "node": None,
    "cube": None,
    "version": None,
    "policy": None,
    "outcome": "",
    "source": None,
    "target": None,
    "num_bytes": 0,
    "attempts": 0,
    "cubes": None,
    "result": None,
}
"""An event of which nothing is known."""


async def _event(id: str, who: Principal, here: Backend) -> dict[str, Any]:
    whose = None if runs_it(who) else who.tenant

    def read() -> dict[str, Any]:
        catalog = here.catalog
        with suppress(NotFound):
            record = catalog.actions.get(id)
            if whose in (None, record.tenant):
                return _action(who, record)
        if whose is None:
            with suppress(NotFound):
                return _cluster_event(catalog.cluster_log.get(id))
        return task_view(catalog.tasks.get(whose, id))

    try:
        return await asyncio.to_thread(read)
    except NotFound:
        raise NotFound("event", id) from None


def _of(here: Backend) -> Scheduler:
    if here.scheduler is None:
        raise Unavailable("there is no scheduler here")
    return here.scheduler


def _whose(who: Principal, tenant: str | None) -> TenantId | None:
    """Whose actions are looked at; None is everybody's."""
    if runs_it(who):
        return None if tenant is None else TenantId(tenant)
    if tenant not in (None, who.tenant):
        raise Forbidden(who.role, Role.OPERATOR)
    return who.tenant


def _page(found: Sequence[dict[str, Any]], limit: int) -> dict[str, Any]:
    return {"events": found, "next": found[-1]["id"] if len(found) == limit else None}


def _action(who: Principal, record: ActionRecord) -> dict[str, Any]:
    def where(place: Place | None) -> dict[str, str] | None:
        if place is None:
            return None
        location = views.location(place.location, whole=runs_it(who))
        return {"tier": place.tier, "medium": place.medium, "location": location}

    return _NOTHING | {
        "id": record.id,
        "type": "action",
        "kind": record.action,
        "state": record.state,
        "ended": not record.is_open,
        "tenant": record.tenant,
        "cube": record.cube,
        "version": record.version,
        "policy": record.policy,
        "reason": record.reason,
        "outcome": record.outcome,
        "source": where(record.source),
        "target": where(record.target),
        "num_bytes": record.num_bytes,
        "attempts": record.attempts,
        "created_at": views.moment(record.created_at),
        "updated_at": views.moment(record.updated_at),
        "ended_at": views.moment(record.closed_at),
    }


def _cluster_event(event: ClusterEvent) -> dict[str, Any]:
    """What happened to the cluster, as an event."""
    at = views.moment(event.at)
    return _NOTHING | {
        "id": event.id,
        "type": "cluster",
        "kind": event.kind,
        "state": "done",
        "ended": True,
        "node": event.node or None,
        "reason": event.reason,
        "created_at": at,
        "updated_at": at,
        "ended_at": at,
    }


def task_view(task: Task) -> dict[str, Any]:
    """A task as an event."""
    ended = task.state in (TaskState.DONE, TaskState.DEAD)
    cubes = task.payload.get("cubes")
    return _NOTHING | {
        "id": task.id,
        "type": "task",
        "kind": task.kind,
        "state": task.state,
        "ended": ended,
        "tenant": task.tenant,
        "cube": task.payload.get("cube"),
        "reason": task.payload.get("reason", ""),
        "outcome": task.error,
        "attempts": task.attempts,
        "cubes": None if cubes is None else list(cubes),
        "result": None if task.result is None else dict(task.result),
        "created_at": views.moment(task.created_at),
        "updated_at": views.moment(task.updated_at),
        "ended_at": views.moment(task.updated_at if ended else None),
    }
