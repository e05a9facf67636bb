"""The routes of adapters: which there are, which serve, and back to the one before."""

import asyncio
from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import Path
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from memcube.catalog import AdapterRecord
from memcube.errors import Unavailable
from memcube.objects import opened
from memcube.parametric.limits import AdapterLimits
from memcube.parametric.registry import AdapterFiles, AdapterRegistry
from serve.dependencies import Here, Reader, Writer, guarded
from serve.models import Body

AdapterId = Annotated[str, Path(max_length=64, examples=["01a20e3e-d04c-705b-a9c3-c4fffbea30a3"])]
AtVersion = Annotated[int, Path(ge=1, le=2**31 - 1)]
adapters = guarded("/v1/adapters", "adapters")
held_by = guarded("/v1/cubes", "adapters")


class ActivateBody(Body):
    """The version that is to serve."""

    version: int = Field(ge=1, le=2**31 - 1)

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"version": 1}]})


class AdapterOut(BaseModel):
    """One version of an adapter. ``reason`` says why a retired one is so: a stale one holds a memory
    that has changed or is gone."""

    id: str
    name: str
    version: int
    state: Literal["candidate", "serving", "retired"]
    reason: str | None
    user_id: str | None
    agent_id: str | None
    run_id: str | None
    base: str
    sha256: str
    size_bytes: int
    rank: int
    created_at: datetime
    activated_at: datetime | None
    retired_at: datetime | None


class InsideOut(BaseModel):
    id: str
    version: int


class AdapterInsideOut(AdapterOut):
    cubes: list[InsideOut]


class HolderOut(BaseModel):
    """A version of an adapter, and the version of the cube inside."""

    adapter: str
    version: int
    state: Literal["candidate", "serving", "retired"]
    cube: str
    cube_version: int


class HoldersOut(BaseModel):
    adapters: list[HolderOut]


class AdaptersOut(BaseModel):
    adapters: list[AdapterOut]


@adapters.get("", response_model=AdaptersOut, summary="Adapters")
async def list_adapters(who: Reader, here: Here) -> JSONResponse:
    """All versions of the tenant's adapters, by name, the newest first."""
    found = await asyncio.to_thread(here.catalog.adapters.versions, who.tenant)
    return JSONResponse({"adapters": [_view(record) for record in found]})


@adapters.get(
    "/{id}/versions/{version}", response_model=AdapterInsideOut, summary="What is inside a version"
)
async def inside(id: AdapterId, version: AtVersion, who: Reader, here: Here) -> JSONResponse:
    """The version, and which version of which memory it was trained on. The other way round:
    `GET /v1/cubes/{id}/adapters`."""
    book = here.catalog.adapters
    record = await asyncio.to_thread(book.get, who.tenant, id, version)
    held = await asyncio.to_thread(book.inside, who.tenant, id, version)
    cubes = [{"id": cube, "version": at} for cube, at in sorted(held.items())]
    return JSONResponse(_view(record) | {"cubes": cubes})


@held_by.get("/{id}/adapters", response_model=HoldersOut, summary="Adapters that hold a cube")
async def holders(id: AdapterId, who: Reader, here: Here) -> JSONResponse:
    """Every version of every adapter that was trained on the cube, and on which version of it."""
    cube = await here.service.get(who, id)
    found = await asyncio.to_thread(here.catalog.adapters.holding, who.tenant, cube.id)
    return JSONResponse({"adapters": [asdict(holding) for holding in found]})


@adapters.post("/{id}/activate", response_model=AdapterOut, summary="Let a version serve")
async def activate(id: AdapterId, body: ActivateBody, who: Writer, here: Here) -> JSONResponse:
    """In place of the version that serves. Its file is read and checked first; one that holds a memory
    which has changed is a `conflict`. May be repeated."""
    if here.open_objects is None:
        raise Unavailable("there is no object store here")
    limits = AdapterLimits.of(here.config.adapters)
    # The version first: without one, the store need not answer.
    await asyncio.to_thread(here.catalog.adapters.get, who.tenant, id, body.version)
    async with opened(here.open_objects) as objects:
        registry = AdapterRegistry(AdapterFiles(objects, limits), here.catalog.adapters)
        record = await registry.activate(who.tenant, id, body.version, now=here.clock())
    if here.forgetting is not None:
        await here.forgetting(who.tenant, ())
    return JSONResponse(_view(record))


@adapters.post("/{id}/rollback", response_model=AdapterOut, summary="Back to the version before")
async def rollback_adapter(id: AdapterId, who: Writer, here: Here) -> JSONResponse:
    """The version serves again that did before the present one; stale ones are passed over. Where there
    is none it is a `conflict`, and nothing changes."""
    now = here.clock()
    record = await asyncio.to_thread(
        lambda: here.catalog.adapters.rollback(who.tenant, id, now=now)
    )
    if here.forgetting is not None:
        await here.forgetting(who.tenant, ())
    return JSONResponse(_view(record))


def _view(record: AdapterRecord) -> dict[str, Any]:
    out = AdapterOut(
        id=record.line.id,
        name=record.line.name,
        version=record.version,
        state=record.state.value,
        reason=record.reason or None,
        user_id=record.line.scope.user_id,
        agent_id=record.line.scope.agent_id,
        run_id=record.line.scope.run_id,
        base=record.base,
        sha256=record.sha256,
        size_bytes=record.size_bytes,
        rank=record.rank,
        created_at=record.created_at,
        activated_at=record.activated_at,
        retired_at=record.retired_at,
    )
    return out.model_dump(mode="json")
