"""The routes of proposals: what could be one memory, and what becomes of that."""

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import Path, Query
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from memcube.catalog import Principal, Proposal, ProposalState
from memcube.errors import LimitExceeded
from memcube.ids import CubeId
from serve import models, views
from serve.backend import Backend
from serve.dependencies import Here, Reader, Writer, check_page, guarded
from serve.time_machine import parts_of, scope_of

ProposalId = Annotated[str, Path(max_length=64, examples=["01a20e3e-d04c-705b-a9c3-c4fffbea30a3"])]
proposals = guarded("/v1/proposals", "proposals")


class FindBody(models.ScopeBody):
    """Where to look: the newest memories of a scope, and what the index holds near them."""

    limit: int = Field(100, ge=1, description="Memories to look at.")

    model_config = models.examples({"user_id": "ann"}, {"user_id": "ann", "limit": 20})


class ProposedOut(BaseModel):
    """A memory of a proposal. `text` is null where it is not at that version any more."""

    id: str
    version: int
    text: str | None


class ProposalOut(BaseModel):
    """Memories that say the same (`duplicate`) or contradict each other (`contradiction`), the text they
    would become, and why."""

    id: str
    kind: Literal["duplicate", "contradiction"]
    state: Literal["open", "applied", "dismissed", "outdated"]
    cubes: list[ProposedOut]
    text: str
    why: dict[str, Any]
    created_at: datetime
    decided_at: datetime | None
    decided_by: str | None
    result: str | None = Field(description="The memory that applying it made.")


class ProposalsOut(BaseModel):
    proposals: list[ProposalOut]
    next_cursor: str | None = None


class AppliedOut(BaseModel):
    proposal: ProposalOut
    cube: models.CubeOut


@proposals.get("", response_model=ProposalsOut, summary="List proposals")
async def list_proposals(
    who: Reader,
    here: Here,
    state: Annotated[Literal["open", "applied", "dismissed", "outdated"] | None, Query()] = None,
    limit: Annotated[int, Query(ge=1)] = 50,
    cursor: Annotated[str | None, Query(max_length=64)] = None,
) -> JSONResponse:
    """Newest first. Give `next_cursor` as `cursor` for the next page."""
    check_page(here, limit)
    found = await parts_of(here).merging.proposals(
        who.tenant,
        state=None if state is None else ProposalState(state),
        limit=limit + 1,
        after=cursor,
    )
    shown = found[:limit]
    more = len(found) > limit
    return JSONResponse(
        {
            "proposals": await _views(who, here, shown),
            "next_cursor": shown[-1].id if more else None,
        }
    )


@proposals.post("/find", response_model=ProposalsOut, summary="Look for what could be one memory")
async def find_proposals(body: FindBody, who: Writer, here: Here) -> JSONResponse:
    """Near-duplicates (by meaning and by words) and statements that contradict each other, of one scope
    and speaker. What was proposed before, of the same versions, is not proposed again. Nothing is
    changed by it."""
    if body.limit > here.config.lifecycle.merge_cubes:
        raise LimitExceeded("limit", here.config.lifecycle.merge_cubes, body.limit)
    found = await parts_of(here).merging.find(
        scope_of(who, body), shard=who.shard, limit=body.limit
    )
    return JSONResponse({"proposals": await _views(who, here, found), "next_cursor": None})


@proposals.post("/{id}/apply", response_model=AppliedOut, summary="Apply a proposal")
async def apply_proposal(id: ProposalId, who: Writer, here: Here) -> JSONResponse:
    """Its memories become `merged`, and one new memory with its text takes their place; the lineage names
    them, and each can be restored. If one of them has changed since, the proposal is outdated: a
    `conflict`, and nothing changes. May be repeated."""
    done, cube = await parts_of(here).merging.apply(
        who.tenant, id, shard=who.shard, author=who.key_id
    )
    (view,) = await _views(who, here, [done])
    return JSONResponse({"proposal": view, "cube": views.cube(cube)})


@proposals.post("/{id}/dismiss", response_model=ProposalOut, summary="Dismiss a proposal")
async def dismiss_proposal(id: ProposalId, who: Writer, here: Here) -> JSONResponse:
    """It is not made again of the same versions. May be repeated."""
    done = await parts_of(here).merging.dismiss(who.tenant, id, author=who.key_id)
    (view,) = await _views(who, here, [done])
    return JSONResponse(view)


async def _views(who: Principal, here: Backend, found: list[Proposal]) -> list[dict[str, Any]]:
    ids = list(dict.fromkeys(id for one in found for id in one.cubes))
    cubes = {cube.id: cube for cube in await here.service.get_many(who, ids)}

    def proposed(id: CubeId, version: int) -> dict[str, Any]:
        cube = cubes.get(id)
        text = None if cube is None or cube.version != version else cube.text
        return {"id": id, "version": version, "text": text}

    return [
        {
            "id": one.id,
            "kind": one.kind,
            "state": one.state,
            "cubes": [proposed(id, version) for id, version in one.cubes.items()],
            "text": one.text,
            "why": dict(one.why),
            "created_at": views.moment(one.created_at),
            "decided_at": views.moment(one.decided_at),
            "decided_by": one.decided_by,
            "result": one.result,
        }
        for one in found
    ]
