"""The routes of the time machine: snapshots, two times beside each other, and back to one."""

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import Path
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from memcube.catalog import Difference, Principal, Snapshot
from memcube.cube import Scope
from memcube.errors import BadRequest, Unavailable
from memcube.history import WentBack
from memcube.lifecycle_parts import LifecycleParts
from serve import models, requests, views
from serve.backend import Backend
from serve.dependencies import Here, Reader, RetryKey, Writer, check_page, guarded

SnapshotId = Annotated[str, Path(max_length=64, examples=["01a20e3e-d04c-705b-a9c3-c4fffbea30a3"])]
snapshots = guarded("/v1/snapshots", "time machine")
times = guarded("/v1/memories", "time machine")
_WHEN = "2026-03-01T12:00:00Z"


class SnapshotBody(models.ScopeBody):
    """A name for a scope at a time; without a scope for the whole tenant."""

    name: models.Id = Field(examples=["before the move"])
    at: datetime | None = Field(None, description="Default: now.")

    model_config = models.examples(
        {"name": "before the move", "user_id": "ann"}, {"name": "spring", "at": _WHEN}
    )


class CompareBody(models.ScopeBody):
    """Two times of a scope. Give `since` with a scope, or a `snapshot`, which has both."""

    since: datetime | None = None
    snapshot: models.Id | None = Field(None, description="Its id or name.")
    until: datetime | None = Field(None, description="Default: now.")
    limit: int = Field(50, ge=1)
    cursor: Annotated[models.Text, Field(max_length=256)] | None = None

    model_config = models.examples({"user_id": "ann", "since": _WHEN})


class RollbackBody(models.ScopeBody):
    """The time to go back to. Give `to` with a scope, or a `snapshot`, which has both."""

    to: datetime | None = None
    snapshot: models.Id | None = Field(None, description="Its id or name.")

    model_config = models.examples({"user_id": "ann", "to": _WHEN})


class SnapshotOut(BaseModel):
    id: str
    name: str
    user_id: str | None
    agent_id: str | None
    run_id: str | None
    at: datetime
    created_at: datetime
    author: str


class SnapshotsOut(BaseModel):
    snapshots: list[SnapshotOut]


class DifferenceOut(BaseModel):
    """One memory. Of a deleted one only the id is left; of an added one there is no `before`. A moved
    one left the search (merged, archived) or came back, with the same content."""

    id: str
    change: Literal["added", "changed", "moved", "deleted"]
    before: models.VersionOut | None
    after: models.VersionOut | None
    state_before: str | None
    state_after: str | None


class ComparisonOut(BaseModel):
    since: datetime
    until: datetime
    results: list[DifferenceOut]
    next_cursor: str | None


class AtVersionOut(BaseModel):
    id: str
    version: int


class ForgottenOut(BaseModel):
    id: str
    at: datetime


class WentBackOut(BaseModel):
    """What changed. `out_of_search` are memories that were added since, now archived, and those that
    were merged or archived at that time; `cannot_restore` those that were deleted, or ran out, since
    then: they are gone for good (told for 30 days)."""

    to: datetime
    changed: list[AtVersionOut]
    out_of_search: list[AtVersionOut]
    cannot_restore: list[ForgottenOut]
    pending: int = Field(description="Of the changed, not found by a search yet.")


def parts_of(here: Backend) -> LifecycleParts:
    """The parts of the lifecycle.

    Raises:
        Unavailable: this backend has none.
    """
    if here.lifecycle is None:
        raise Unavailable("the lifecycle's parts are not there")
    return here.lifecycle


def scope_of(who: Principal, body: models.ScopeBody) -> Scope:
    return Scope(
        tenant=who.tenant, user_id=body.user_id, agent_id=body.agent_id, run_id=body.run_id
    )


@snapshots.post("", status_code=201, response_model=SnapshotOut, summary="Take a snapshot")
async def create_snapshot(body: SnapshotBody, who: Writer, here: Here) -> JSONResponse:
    """A name for what a scope is now, or was at a time. Nothing is copied: memories keep all their
    versions. The same once more is the same snapshot; another under its name is a `conflict`. The sweep
    forgets nothing that a snapshot shows; a deletion and an expiry take effect all the same."""
    made = await parts_of(here).time_machine.snapshot(
        who, scope_of(who, body), body.name, at=requests.utc(body.at, "at")
    )
    return JSONResponse(_snapshot(made), 201)


@snapshots.get("", response_model=SnapshotsOut, summary="List snapshots")
async def list_snapshots(who: Reader, here: Here) -> JSONResponse:
    """The tenant's, the latest time first."""
    found = await parts_of(here).time_machine.snapshots(who)
    return JSONResponse({"snapshots": [_snapshot(one) for one in found]})


@snapshots.delete("/{id}", response_model=models.DeletedOut, summary="Delete a snapshot")
async def delete_snapshot(id: SnapshotId, who: Writer, here: Here) -> JSONResponse:
    """Its name and its pin; no memory changes."""
    await parts_of(here).time_machine.delete_snapshot(who, id)
    return JSONResponse({"id": id, "deleted": True})


@times.post("/compare", response_model=ComparisonOut, summary="Compare two times")
async def compare(body: CompareBody, who: Reader, here: Here) -> JSONResponse:
    """What was added, changed, moved and deleted in a scope, with the texts before and after, in the
    order of the ids. A page may hold fewer than `limit`; `next_cursor` says whether there are more. What
    was deleted after `until` is in neither."""
    check_page(here, body.limit)
    scope, since = await _when(who, here, body, body.since, "since")
    until = requests.utc(body.until, "until") or here.clock()
    found = await parts_of(here).time_machine.compare(
        who, scope, since=since, until=until, limit=body.limit, cursor=body.cursor
    )
    return JSONResponse(
        {
            "since": views.moment(since),
            "until": views.moment(until),
            "results": [_difference(one) for one in found.differences],
            "next_cursor": found.next_cursor,
        }
    )


@times.post("/rollback", response_model=WentBackOut, summary="Take a scope back to a time")
async def rollback_scope(
    body: RollbackBody, who: Writer, here: Here, key: RetryKey = None
) -> JSONResponse:
    """In one transaction: a changed memory gets a new version with the content of then, a merged or
    archived one comes back, one that was added since is archived. At least one of user, agent and run is
    needed. A frozen memory that would change is a `conflict`, and nothing changes. A rollback can be
    rolled back."""
    scope, to = await _when(who, here, body, body.to, "to")
    done = await parts_of(here).time_machine.rollback(
        who, scope, to=to, idempotency=requests.idempotency(key, "rollback", body)
    )
    return JSONResponse(_went_back(done))


async def _when(
    who: Principal,
    here: Backend,
    body: CompareBody | RollbackBody,
    time: datetime | None,
    field: str,
) -> tuple[Scope, datetime]:
    """The scope and the time that a body names."""
    scope = scope_of(who, body)
    if body.snapshot is None:
        if time is None:
            raise BadRequest(f"give {field} or snapshot", field)
        return scope, requests.utc(time, field) or time
    if time is not None or scope != Scope(tenant=who.tenant):
        raise BadRequest("has a time and a scope of its own; give nothing beside it", "snapshot")
    found = await parts_of(here).time_machine.named(who, body.snapshot)
    return found.scope, found.at


def _snapshot(one: Snapshot) -> dict[str, Any]:
    return {
        "id": one.id,
        "name": one.name,
        "user_id": one.scope.user_id,
        "agent_id": one.scope.agent_id,
        "run_id": one.scope.run_id,
        "at": views.moment(one.at),
        "created_at": views.moment(one.created_at),
        "author": one.author,
    }


def _difference(one: Difference) -> dict[str, Any]:
    return {
        "id": one.id,
        "change": one.kind,
        "before": None if one.before is None else views.version(one.before),
        "after": None if one.after is None else views.version(one.after),
        "state_before": one.state_before,
        "state_after": one.state_after,
    }


def _went_back(back: WentBack) -> dict[str, Any]:
    return {
        "to": views.moment(back.to),
        "changed": [one._asdict() for one in back.done.changed],
        "out_of_search": [one._asdict() for one in back.done.out],
        "cannot_restore": [
            {"id": one.id, "at": views.moment(one.at)} for one in back.done.cannot_restore
        ],
        "pending": back.pending,
    }
