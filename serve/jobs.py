"""The routes of jobs: long work that is queued, watched, cancelled and resumed."""

import asyncio
import json
from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import Header, Path, Query, Response
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from memcube.catalog import Job, JobKind, JobState, NewJob, Principal
from memcube.cube import Kind
from memcube.errors import BadRequest, NotFound, Unavailable
from memcube.ids import digest
from memcube.objects import opened
from memcube.parametric.selection import Choice
from memcube.parametric.settings import TrainingSettings
from memcube.parametric.specs import (
    MAX_CUBES,
    AdapterVersion,
    ConsolidateSpec,
    FuseSpec,
    default_name,
    read_report,
    report_name,
)
from serve import report_page, requests
from serve.backend import Backend
from serve.dependencies import Here, Reader, Writer, check_page, guarded
from serve.models import CubeIds, ScopeBody, Tag

JobId = Annotated[str, Path(max_length=64, examples=["01a20e3e-d04c-705b-a9c3-c4fffbea30a3"])]
RetryKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key", description="One job for each key of a tenant, however often sent."
    ),
]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$", examples=["ann"])]
jobs = guarded("/v1/jobs", "jobs")


class RecipeBody(BaseModel):
    """What of the training recipe is changed for this job."""

    rank: int | None = Field(None, ge=1, le=128)
    steps: int | None = Field(None, ge=1, le=5_000)
    lr: float | None = Field(None, gt=0, le=0.1)
    kl_weight: float | None = Field(None, ge=0, le=100)
    distil_weight: float | None = Field(None, ge=0, le=100)
    seed: int | None = Field(None, ge=0, le=2**31 - 1)

    model_config = ConfigDict(extra="forbid")


class ConsolidateBody(ScopeBody):
    """Put memories into an adapter. Without `cubes`: all of the scope that may go in."""

    kind: Literal["consolidate"]
    adapter: Name | None = Field(None, description="Its name; made of the scope if it is left out.")
    cubes: CubeIds = Field(
        default_factory=list, description="These and no others; a composite's members."
    )
    cube_kind: Kind | None = None
    tag: Tag | None = None
    stable_days: float = Field(0.0, ge=0, le=36_500, description="Not changed for this long.")
    min_uses: int = Field(0, ge=0)
    limit: int = Field(500, ge=1, le=MAX_CUBES, description="Most cubes; the most used come first.")
    extend: bool = Field(True, description="Also what the serving version of the adapter holds.")
    activate: bool = Field(True, description="Let it serve at once, if it passes its gate.")
    recipe: RecipeBody = Field(default_factory=lambda: RecipeBody.model_validate({}))

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"kind": "consolidate", "user_id": "ann"}]}
    )


class AdapterVersionBody(BaseModel):
    """A version of an adapter."""

    id: str = Field(min_length=1, max_length=64)
    version: int = Field(ge=1, le=2**31 - 1)

    model_config = ConfigDict(extra="forbid")


_HELD = "01a20e3e-d04c-705b-a9c3-c4fffbea30a3"


class FuseBody(BaseModel):
    """Make one adapter of several of one scope, by merging their weights. Merging loses facts more
    often than not: then the job is refused and says so."""

    kind: Literal["fuse"]
    adapter: Name = Field(description="The name of what they become.")
    adapters: list[AdapterVersionBody] = Field(min_length=2, max_length=8, fail_fast=True)
    activate: bool = Field(False, description="Let it serve at once, if it passes its gate.")

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "kind": "fuse",
                    "adapter": "both",
                    "adapters": [{"id": _HELD, "version": 1}, {"id": _HELD, "version": 2}],
                }
            ]
        },
    )


class ProbeBody(BaseModel):
    """Ask an adapter for the facts inside. What agrees with the memories is written back as memories of
    origin `inference`; what contradicts them is listed."""

    kind: Literal["probe"]
    adapter: AdapterVersionBody

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"kind": "probe", "adapter": {"id": _HELD, "version": 1}}]},
    )


JobBody = Annotated[ConsolidateBody | FuseBody | ProbeBody, Field(discriminator="kind")]


class JobOut(BaseModel):
    """A job. ``progress`` and ``result`` depend on its kind."""

    id: str
    kind: JobKind
    state: JobState
    adapter: str | None
    progress: dict[str, Any]
    result: dict[str, Any] | None
    error: str | None
    attempts: int
    cancelling: bool
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


class JobsOut(BaseModel):
    jobs: list[JobOut]
    next: str | None = Field(description="Give it as `before` for older ones.")


class LogLineOut(BaseModel):
    seq: int
    at: datetime
    text: str


class LogsOut(BaseModel):
    lines: list[LogLineOut]


class ReportOut(BaseModel):
    """What a job found of an adapter. Of a consolidation: the gate's figures beside their limits, what was
    short, and of each step loss, answer loss and KL (``history``). ``answers`` is null where a memory
    that they speak of has changed or is gone, or there are none."""

    job: str
    kind: JobKind
    state: JobState
    adapter: str | None
    figures: dict[str, Any]
    limits: dict[str, float] | None = None
    short: list[str] | None = None
    history: list[list[float]] | None = None
    answers: list[dict[str, Any]] | None


@jobs.post("", status_code=202, response_model=JobOut, summary="Start a job")
async def start(body: JobBody, who: Writer, here: Here, key: RetryKey = None) -> JSONResponse:
    """It is queued and answered at once; ask for it until it has ended. Its cubes are taken in the
    versions that they have when it begins."""
    spec = await asyncio.to_thread(_spec, body, who, here)
    asked = requests.idempotency(key, "job", body)
    new = NewJob(
        kind=JobKind(body.kind),
        spec=spec,
        author=who.key_id,
        key=None if asked is None else digest("asked", asked.key),
    )

    job = await asyncio.to_thread(
        lambda: here.catalog.jobs.add(
            who.tenant, new, now=here.clock(), max_open=here.config.training.max_open_jobs
        )
    )
    return JSONResponse(job_view(job), 202)


@jobs.get("", response_model=JobsOut, summary="List jobs")
async def list_jobs(
    who: Reader,
    here: Here,
    state: JobState | None = None,
    before: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1)] = 50,
) -> JSONResponse:
    """Newest first."""
    check_page(here, limit)
    found = await asyncio.to_thread(
        lambda: here.catalog.jobs.page(who.tenant, state=state, before=before, limit=limit)
    )
    more = found[-1].id if len(found) == limit else None
    return JSONResponse({"jobs": [job_view(job) for job in found], "next": more})


@jobs.get("/{id}", response_model=JobOut, summary="Get a job")
async def get_job(id: JobId, who: Reader, here: Here) -> JSONResponse:
    """Its state, how far it is, and what it came to."""
    return JSONResponse(job_view(await asyncio.to_thread(here.catalog.jobs.get, who.tenant, id)))


@jobs.get("/{id}/logs", response_model=LogsOut, summary="Read a job's log")
async def job_logs(
    id: JobId, who: Reader, here: Here, after: Annotated[int, Query(ge=0, le=2**31 - 1)] = 0
) -> JSONResponse:
    """Up to 500 lines, oldest first, from the one after `after` on. It holds no memory's text."""
    lines = await asyncio.to_thread(lambda: here.catalog.jobs.logs(who.tenant, id, after=after))
    out = [{"seq": line.seq, "at": line.at.isoformat(), "text": line.text} for line in lines]
    return JSONResponse({"lines": out})


@jobs.post("/{id}/cancel", response_model=JobOut, summary="Cancel a job")
async def cancel(id: JobId, who: Writer, here: Here) -> JSONResponse:
    """A queued job ends at once, a running one after its present step (`cancelling`). May be
    repeated; one that has ended stays as it is."""
    job = await asyncio.to_thread(
        lambda: here.catalog.jobs.cancel(who.tenant, id, now=here.clock())
    )
    return JSONResponse(job_view(job))


@jobs.post("/{id}/resume", response_model=JobOut, summary="Resume a job")
async def resume(id: JobId, who: Writer, here: Here) -> JSONResponse:
    """Queue a failed or cancelled job again; it goes on from its last checkpoint."""
    return JSONResponse(job_view(await asyncio.to_thread(here.catalog.jobs.resume, who.tenant, id)))


@jobs.get(
    "/{id}/report",
    response_model=ReportOut,
    summary="What the gate found",
    responses={200: {"content": {"text/html": {"schema": {"type": "string"}}}}},
)
async def report(
    id: JobId, who: Reader, here: Here, format: Literal["json", "html"] = "json"
) -> Response:
    """The figures beside their limits, the course of the training, and what the adapter said to each
    probe. Of a consolidation also as `html`, a page with plots."""
    job = await asyncio.to_thread(here.catalog.jobs.get, who.tenant, id)
    result = job.result or {}
    figures = next((result[n] for n in ("figures", "fusion", "probe") if n in result), None)
    if figures is None:
        raise NotFound("report of job", id)
    out = {
        "job": job.id,
        "kind": job.kind,
        "state": job.state,
        "adapter": result.get("adapter"),
        "figures": figures,
        **{name: result.get(name) for name in ("limits", "short", "history")},
        "answers": await _answers(job, here),
    }
    if format == "html":
        if job.kind is not JobKind.CONSOLIDATE:
            raise BadRequest("a page is drawn of consolidations alone", "format")
        return HTMLResponse(report_page.page(out))
    return JSONResponse(out)


async def _answers(job: Job, here: Backend) -> list[dict[str, Any]] | None:
    """What was said to the probes; None once a memory inside has changed or is gone."""
    if here.open_objects is None:
        raise Unavailable("there is no object store here")
    if await asyncio.to_thread(lambda: here.catalog.jobs.moved_on(job, now=here.clock())):
        return None
    async with opened(here.open_objects) as objects:
        try:
            if job.kind is JobKind.CONSOLIDATE:
                return [asdict(answer) for answer in (await read_report(objects, job)).answers]
            return json.loads(await objects.get(report_name(job)))
        except NotFound:
            return None


def _spec(
    body: ConsolidateBody | FuseBody | ProbeBody, who: Principal, here: Backend
) -> dict[str, Any]:
    """What a job is asked for, as it stands in the catalog.

    Raises:
        NotFound: an adapter that is named isn't there.
    """
    if isinstance(body, ConsolidateBody):
        return _consolidation(body, here).to_json()
    named = body.adapters if isinstance(body, FuseBody) else [body.adapter]
    for adapter in named:
        here.catalog.adapters.get(who.tenant, adapter.id, adapter.version)
    if isinstance(body, ProbeBody):
        return {"adapter": body.adapter.id, "version": body.adapter.version}
    spec = FuseSpec(
        name=body.adapter,
        adapters=tuple(AdapterVersion(one.id, one.version) for one in named),
        settings=TrainingSettings.of(here.config),
        activate=body.activate,
    )
    return spec.to_json()


def _consolidation(body: ConsolidateBody, here: Backend) -> ConsolidateSpec:
    if body.cubes and (body.cube_kind or body.tag or body.stable_days or body.min_uses):
        raise BadRequest("give cubes, or conditions that choose them", "cubes")
    choice = Choice(
        cubes=tuple(body.cubes),
        user_id=body.user_id,
        agent_id=body.agent_id,
        run_id=body.run_id,
        kind=body.cube_kind,
        tag=body.tag,
        stable_days=body.stable_days,
        min_uses=body.min_uses,
        limit=body.limit,
    )
    settings = TrainingSettings.of(here.config)
    return ConsolidateSpec(
        name=body.adapter or default_name(body.user_id, body.agent_id, body.run_id),
        choice=choice,
        settings=settings.with_recipe(body.recipe.model_dump(exclude_none=True)),
        extend=body.extend,
        activate=body.activate,
    )


def job_view(job: Job) -> dict[str, Any]:
    """A job as it is shown."""
    out = JobOut(
        id=job.id,
        kind=job.kind,
        state=job.state,
        adapter=job.spec.get("name") or job.spec.get("adapter"),
        progress=dict(job.progress),
        result=None
        if job.result is None
        else {name: value for name, value in job.result.items() if name != "history"},
        error=job.error,
        attempts=job.attempts,
        cancelling=job.is_cancelled,
        created_at=job.created_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
    )
    return out.model_dump(mode="json")
