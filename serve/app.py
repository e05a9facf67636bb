"""The HTTP application: routes, who may call them, and how errors are answered. No Ray in here."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Path, Query, Request
from fastapi.responses import JSONResponse, PlainTextResponse

from memcube import __version__
from memcube.catalog import UNSET, Change, Principal, Role
from memcube.chat.contract import in_time
from memcube.config import Limits
from memcube.cube import Kind, MemCube, Relation, Residency, Scope
from memcube.errors import (
    BadRequest,
    Conflict,
    Forbidden,
    LimitExceeded,
    MemCubeError,
    Unauthenticated,
    Unavailable,
)
from memcube.ids import TenantId
from memcube.lifecycle import READABLE
from memcube.reader.messages import Header as CubeHeader
from serve import kv_metrics, models, openapi, problems, requests, scheduler_metrics, views
from serve.adapters import adapters, held_by
from serve.backend import STATS_DEADLINE_S, Backend
from serve.chat import openai as openai_routes
from serve.dependencies import Admin, Here, Reader, RetryKey, Writer, check_page, guarded, runs_it
from serve.doctor import doctor
from serve.guard import secret_of
from serve.jobs import jobs
from serve.metrics import Measured, Metrics
from serve.nodes import nodes, tenants
from serve.proposals import proposals
from serve.scheduler import events, scheduler, tasks
from serve.time_machine import parts_of, snapshots, times

OpenBackend = Callable[[], Awaitable[Backend]]
Key = Annotated[str, Path(max_length=64, examples=["01a20e3e-d04c-705b-a9c3-c4fffbea30a3"])]
ScopeId = Annotated[str | None, Query(min_length=1, max_length=256)]
AtVersion = Annotated[int | None, Query(ge=1)]
AsOf = Annotated[datetime | None, Query(description="As it was at this time.")]


def create_app(open_backend: OpenBackend, limits: Limits) -> FastAPI:
    """The application. ``open_backend`` runs when the server starts."""
    metrics = Metrics()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.backend = await open_backend()
        yield
        await app.state.backend.close()

    app = FastAPI(
        title="MemOS on Ray",
        version=__version__,
        summary="Memory for language models: add, search, version, compose, forget.",
        description="Send `Authorization: Bearer KEY` (or `Token KEY`, or `X-API-Key: KEY`). The "
        "key decides the tenant and the role. Errors are `application/problem+json`.",
        lifespan=lifespan,
    )
    app.state.metrics = metrics
    app.state.limits = limits
    problems.install(app)
    openapi.install(app)
    for router in (memories, times, cubes, snapshots, proposals, openai_routes, adapters, held_by):
        app.include_router(router)
    for router in (jobs, scheduler, events, tasks, nodes, tenants):
        app.include_router(router)
    for router in (keys, doctor, state, system):
        app.include_router(router)
    app.add_middleware(problems.BodyLimit, limit=limits.body_bytes)
    app.add_middleware(problems.Named)
    app.add_middleware(Measured, metrics=metrics)  # the outermost: it counts all that is answered
    return app


memories = guarded("/v1", "memories")
cubes = guarded("/v1/cubes", "cubes")
keys = guarded("/v1/keys", "keys")
state = guarded("/v1", "system")
system = APIRouter(tags=["system"])


@memories.post("/memories", status_code=201, response_model=models.AddOut, summary="Add memories")
async def add(
    body: models.AddOneBody, who: Writer, here: Here, request: Request, key: RetryKey = None
) -> JSONResponse:
    """Remember messages (one memory a turn) or a text. Answered when it is safe on disk and, unless
    `wait` is `stored`, found by the next search. An exact repeat in the same scope is counted, not
    stored twice."""
    wanted = requests.add_request(body, here.config.limits, now=here.clock())
    (outcome,) = await here.service.add(
        who,
        [wanted],
        wait_indexed=body.wait == "indexed",
        idempotency=requests.idempotency(key, "add", body),
    )
    _count(request, outcome)
    return JSONResponse(views.added(outcome), 201)


@memories.post(
    "/memories/batch", status_code=201, response_model=models.BatchOut, summary="Add many at once"
)
async def add_batch(
    body: models.BatchBody, who: Writer, here: Here, request: Request, key: RetryKey = None
) -> JSONResponse:
    """Up to 1,000 adds in one transaction: all or none."""
    limits = here.config.limits
    if len(body.items) > limits.batch_items:
        raise LimitExceeded("items", limits.batch_items, len(body.items))
    for i, item in enumerate(body.items):
        if item.infer:
            raise BadRequest("add it alone: a batch is stored without a model", f"items[{i}].infer")
    wanted = [
        requests.add_request(item, limits, now=here.clock(), at=f"items[{i}].")
        for i, item in enumerate(body.items)
    ]
    outcomes = await here.service.add(
        who,
        wanted,
        wait_indexed=body.wait == "indexed",
        idempotency=requests.idempotency(key, "batch", body),
    )
    for outcome in outcomes:
        _count(request, outcome)
    return JSONResponse({"results": [views.added(outcome) for outcome in outcomes]}, 201)


def _count(request: Request, outcome: Any) -> None:
    for result in outcome.results:
        request.app.state.metrics.added.labels(result.event).inc()


@memories.post("/memories/search", response_model=models.SearchOut, summary="Search")
async def search(body: models.SearchBody, who: Reader, here: Here) -> JSONResponse:
    """The memories that answer a query, best first. `hybrid` scores are the estimated chance that a
    memory answers it; `dense` is cosine, `sparse` is BM25."""
    limits = here.config.limits
    if body.top_k > limits.top_k:
        raise LimitExceeded("top_k", limits.top_k, body.top_k)
    found = await here.service.search(
        who,
        requests.checked_query(body.query, limits),
        requests.search_scope(body),
        top_k=body.top_k,
        mode=body.mode,
        threshold=body.threshold,
        explain=body.explain,
    )
    took = {"search": round(found.search_ms, 3), "total": round(found.total_ms, 3)}
    return JSONResponse({"results": [views.hit(hit) for hit in found.hits], "took_ms": took})


@memories.post("/context", response_model=models.ContextOut, summary="Memories for a prompt")
async def context(body: models.ContextBody, who: Reader, here: Here) -> JSONResponse:
    """A block of memories to put into a prompt, of at most `token_budget` tokens (estimated), with
    the ids that are in it."""
    limits = here.config.limits
    if body.token_budget > limits.token_budget:
        raise LimitExceeded("token_budget", limits.token_budget, body.token_budget)
    if body.top_k is not None and body.top_k > limits.top_k:
        raise LimitExceeded("top_k", limits.top_k, body.top_k)
    query = requests.query_of(body, limits)
    block = await here.service.context(
        who,
        requests.checked_query(
            query if body.query is not None else query[-limits.query_chars :], limits
        ),
        requests.search_scope(body),
        token_budget=body.token_budget,
        top_k=body.top_k,
    )
    return JSONResponse(
        {
            "context": block.text,
            "ids": list(block.ids),
            "num_tokens": block.num_tokens,
            "budget": body.token_budget,
        }
    )


@memories.get("/memories", response_model=models.PageOut, summary="List memories")
async def list_memories(
    who: Reader,
    here: Here,
    user_id: ScopeId = None,
    agent_id: ScopeId = None,
    run_id: ScopeId = None,
    kind: Kind | None = None,
    state: Annotated[
        str | None, Query(description="generated, activated, merged or archived")
    ] = None,
    tag: Annotated[str | None, Query(max_length=128)] = None,
    as_of: AsOf = None,
    limit: Annotated[int, Query(ge=1)] = 50,
    cursor: Annotated[str | None, Query(max_length=256)] = None,
) -> JSONResponse:
    """Newest first. Give `next_cursor` as `cursor` for the next page. With `as_of` the memories that
    there were at that time and still are, with the content and the state of then; `state` and `tag` are
    of now, so they can't be given with it."""
    check_page(here, limit)
    if state is not None and state not in READABLE:
        raise BadRequest(f"one of {', '.join(sorted(READABLE))}", "state")
    for name, value in (
        ("user_id", user_id),
        ("agent_id", agent_id),
        ("run_id", run_id),
        ("tag", tag),
    ):
        if value is not None and "\x00" in value:
            raise BadRequest("can't hold a NUL character", name)
    if as_of is not None:
        if state is not None or tag is not None:
            raise BadRequest("can't be asked for with state or tag, which are of now", "as_of")
        page = await parts_of(here).time_machine.find(
            who,
            Scope(tenant=who.tenant, user_id=user_id, agent_id=agent_id, run_id=run_id),
            as_of=requests.utc(as_of, "as_of") or as_of,
            kind=kind,
            limit=limit,
            cursor=cursor,
        )
        return JSONResponse(views.page(page))
    page = await here.service.find(
        who,
        user_id=user_id,
        agent_id=agent_id,
        run_id=run_id,
        kind=kind,
        state=state,
        tag=tag,
        limit=limit,
        cursor=cursor,
    )
    return JSONResponse(views.page(page))


@memories.delete(
    "/memories", response_model=models.DeletedManyOut, summary="Forget all memories of a scope"
)
async def delete_scope(
    who: Writer,
    here: Here,
    user_id: ScopeId = None,
    agent_id: ScopeId = None,
    run_id: ScopeId = None,
) -> JSONResponse:
    """Forget everything of a user, agent or run (at least one is needed), in one transaction."""
    deleted = await here.service.delete_scope(
        who, user_id=user_id, agent_id=agent_id, run_id=run_id
    )
    return JSONResponse({"deleted": deleted})


async def _get(
    id: Key,
    who: Reader,
    here: Here,
    version: AtVersion = None,
    as_of: AsOf = None,
) -> JSONResponse:
    """A cube, now, at a version, or as it was at a time. Its `residency` is what the catalog has
    noted; `GET /v1/cubes/{id}` asks the engines."""
    cube, noted = await _read(id, who, here, version, as_of)
    return JSONResponse(views.cube(cube, noted, whole_locations=runs_it(who)))


memories.get("/memories/{id}", response_model=models.CubeOut, summary="Get a memory")(_get)


@cubes.get("/{id}", response_model=models.CubeOut, summary="Get a cube")
async def get_cube(
    id: Key,
    who: Reader,
    here: Here,
    version: AtVersion = None,
    as_of: AsOf = None,
) -> JSONResponse:
    """A cube, now, at a version, or as it was at a time. Its `residency` says where its payloads lie
    now: the index's version of it, and the KV that holds it or any of its members, by medium and
    place, as the engines say. Where none answers within 2 seconds, it is what the last migration
    noted."""
    cube, noted = await _read(id, who, here, version, as_of)
    if here.tier is not None:
        noted = await here.tier.residency(who, cube, noted)
    return JSONResponse(views.cube(cube, noted, whole_locations=runs_it(who)))


async def _read(
    id: str, who: Principal, here: Backend, version: int | None, as_of: datetime | None
) -> tuple[MemCube, list[Residency]]:
    if version is not None and as_of is not None:
        raise BadRequest("give version or as_of, not both", "version")
    cube = await here.service.get(who, id, version=version, as_of=requests.utc(as_of, "as_of"))
    return cube, await here.service.residency(who, id)


@memories.put("/memories/{id}", response_model=models.CubeOut, summary="Change a memory")
async def update(
    id: Key, body: models.UpdateBody, who: Writer, here: Here, key: RetryKey = None
) -> JSONResponse:
    """A new version with what is given changed. With `expected_version`, only if nobody else changed
    it meanwhile."""
    limits = here.config.limits
    given = body.model_fields_set - {"expected_version"}
    if not given:
        raise BadRequest("give at least one of text, metadata, tags, expires_at")
    for name in ("text", "metadata", "tags"):
        if name in given and getattr(body, name) is None:
            raise BadRequest("can't be null; leave it out to keep it", name)
    requests.check_text(body.text, limits)
    if body.text is not None and not body.text.strip():
        raise BadRequest("is empty", "text")
    expires_at = requests.utc(body.expires_at, "expires_at")
    if expires_at is not None and expires_at <= here.clock():
        raise BadRequest("is in the past; delete it instead", "expires_at")
    change = Change(
        text=body.text if body.text is not None else UNSET,
        metadata=UNSET if body.metadata is None else requests.metadata(body.metadata, limits),
        tags=UNSET if body.tags is None else tuple(dict.fromkeys(body.tags)),
        expires_at=expires_at if "expires_at" in given else UNSET,
    )
    cube = await here.service.update(
        who,
        id,
        change,
        expected_version=body.expected_version,
        idempotency=requests.idempotency(key, f"update {id}", body, null_differs=True),
    )
    return JSONResponse(views.cube(cube))


@memories.delete("/memories/{id}", response_model=models.DeletedOut, summary="Forget a memory")
async def delete(id: Key, who: Writer, here: Here) -> JSONResponse:
    """Wipe a memory with all its versions. No later answer holds it."""
    return JSONResponse({"id": await here.service.delete(who, id), "deleted": True})


@memories.get("/memories/{id}/history", response_model=models.VersionsOut, summary="All versions")
async def history(id: Key, who: Reader, here: Here) -> JSONResponse:
    """Every version, oldest first."""
    found = await here.service.history(who, id)
    return JSONResponse({"versions": [views.version(v) for v in found]})


cubes.get("/{id}/versions", response_model=models.VersionsOut, summary="All versions")(history)


@cubes.post("", status_code=201, response_model=models.CubeOut, summary="Create a composite")
async def create_cube(
    body: models.CompositeBody, who: Writer, here: Here, key: RetryKey = None
) -> JSONResponse:
    """A cube that holds others in order: a profile, a conversation, a knowledge base."""
    limits = here.config.limits
    title = {} if body.title is None else {"title": body.title}
    header = CubeHeader(
        user_id=body.user_id,
        agent_id=body.agent_id,
        run_id=body.run_id,
        kind=body.kind,
        tags=tuple(dict.fromkeys(body.tags)),
        metadata=requests.metadata({**body.metadata, **title}, limits),
    )
    requests.check_text(body.text, limits)
    cube = await here.service.create_composite(
        who,
        body.members,
        header,
        text=body.text,
        idempotency=requests.idempotency(key, "composite", body),
    )
    return JSONResponse(views.cube(cube), 201)


@cubes.post("/compose", status_code=201, response_model=models.CubeOut, summary="Compose cubes")
async def compose(
    body: models.ComposeBody, who: Writer, here: Here, key: RetryKey = None
) -> JSONResponse:
    """A composite of cubes whose lineage names each of them at its present version."""
    header = CubeHeader(
        user_id=body.user_id,
        agent_id=body.agent_id,
        run_id=body.run_id,
        metadata=requests.metadata(
            {} if body.title is None else {"title": body.title}, here.config.limits
        ),
    )
    cube = await here.service.create_composite(
        who,
        body.ids,
        header,
        text="",
        relation=Relation.COMPOSED,
        idempotency=requests.idempotency(key, "compose", body),
    )
    return JSONResponse(views.cube(cube), 201)


@cubes.post("/fuse", status_code=201, response_model=models.CubeOut, summary="Fuse cubes into one")
async def fuse(
    body: models.FuseBody, who: Writer, here: Here, key: RetryKey = None
) -> JSONResponse:
    """One memory of several, with all of them as parents; they become `merged` and leave search."""
    requests.check_text(body.text, here.config.limits)
    cube = await here.service.fuse(
        who, body.ids, text=body.text, idempotency=requests.idempotency(key, "fuse", body)
    )
    return JSONResponse(views.cube(cube), 201)


@cubes.get("/{id}/members", response_model=models.PageOut, summary="Members of a composite")
async def get_members(
    id: Key,
    who: Reader,
    here: Here,
    limit: Annotated[int, Query(ge=1)] = 50,
    cursor: Annotated[str | None, Query(max_length=256)] = None,
) -> JSONResponse:
    """In their order."""
    check_page(here, limit)
    page = await here.service.members(who, id, limit=limit, cursor=cursor)
    return JSONResponse(views.page(page))


@cubes.put("/{id}/members", response_model=models.CubeOut, summary="Replace the members")
async def set_members(
    id: Key, body: models.MembersBody, who: Writer, here: Here, key: RetryKey = None
) -> JSONResponse:
    """As a new version of the composite."""
    idempotency = requests.idempotency(key, f"members {id}", body)
    cube = await here.service.set_members(who, id, body.members, idempotency=idempotency)
    return JSONResponse(views.cube(cube))


@cubes.post("/{id}/migrate", response_model=models.MigratedOut, summary="Migrate to a tier")
async def migrate(id: Key, body: models.MigrateBody, who: Writer, here: Here) -> JSONResponse:
    """`activation`: read the cube (a composite: its members, in their order) now and keep its KV, so
    that the first chat that names it in `cube_ids` attaches it. `plaintext`: drop all KV that holds
    it; the text stays (a tenant's memories are searched in one shard: `POST /v1/tenants/{tenant}/move`).
    Both may be repeated. Without a chat model it is a `conflict`. `adapter`: the
    KV is for chats that name this one (`MODEL:ADAPTER`), and serves no others."""
    if here.tier is None:
        await here.service.get(who, id)
        raise Conflict("there is no activation tier here: start with activation.actors=1")
    if body.tier == "activation":
        nodes = None
        if body.node is not None:
            nodes = await asyncio.to_thread(here.catalog.shards.nodes_with, body.node)
        done = await here.tier.activate(who, id, adapter=body.adapter, nodes=nodes)
    elif body.adapter is None and body.node is None:
        done = await here.tier.deactivate(who, id)
    else:
        raise BadRequest(
            "is for the tier activation; all KV of a cube goes at once",
            "node" if body.adapter is None else "adapter",
        )
    return JSONResponse(views.migrated(done, body.tier))


@cubes.post("/{id}/rollback", response_model=models.CubeOut, summary="Go back to a version")
async def rollback(id: Key, body: models.RollbackBody, who: Writer, here: Here) -> JSONResponse:
    """A new version with the content of an old one."""
    return JSONResponse(views.cube(await here.service.rollback(who, id, body.version)))


@cubes.post("/{id}/freeze", response_model=models.CubeOut, summary="Freeze")
async def freeze(id: Key, who: Writer, here: Here) -> JSONResponse:
    """Nobody changes or deletes it until it is unfrozen."""
    return JSONResponse(views.cube(await here.service.set_frozen(who, id, True)))


@cubes.post("/{id}/unfreeze", response_model=models.CubeOut, summary="Unfreeze")
async def unfreeze(id: Key, who: Writer, here: Here) -> JSONResponse:
    """It may be changed again."""
    return JSONResponse(views.cube(await here.service.set_frozen(who, id, False)))


@cubes.post("/{id}/archive", response_model=models.CubeOut, summary="Archive")
async def archive(id: Key, who: Writer, here: Here) -> JSONResponse:
    """Out of search, still readable by id."""
    return JSONResponse(views.cube(await here.service.archive(who, id)))


@cubes.post("/{id}/restore", response_model=models.CubeOut, summary="Restore")
async def restore(id: Key, who: Writer, here: Here) -> JSONResponse:
    """Back into search, as a new version."""
    return JSONResponse(views.cube(await here.service.restore(who, id)))


@cubes.get("/{id}/lineage", response_model=models.LineageOut, summary="Lineage")
async def lineage(id: Key, who: Reader, here: Here) -> JSONResponse:
    """What it came from, at which versions, and what came from it."""
    return JSONResponse(views.lineage(await here.service.lineage(who, id)))


@keys.post("", status_code=201, response_model=models.KeyOut, summary="Create an API key")
async def create_key(body: models.KeyBody, who: Admin, here: Here) -> JSONResponse:
    """The secret is told this once. An operator may name another tenant; a new one is created."""
    role = Role(body.role)
    if not who.role.allows(role):
        raise Forbidden(who.role, role)
    expires_at = requests.utc(body.expires_at, "expires_at")
    if expires_at is not None and expires_at <= here.clock():
        raise BadRequest("is in the past", "expires_at")
    tenant = who.tenant
    if body.tenant is not None and body.tenant != who.tenant:
        if who.role is not Role.OPERATOR:
            raise Forbidden(who.role, Role.OPERATOR)
        made = await here.service.ensure_tenant(body.tenant, shards=here.config.plaintext.shards)
        tenant = TenantId(made.id)
    info, secret = await here.service.create_key(tenant, body.name, role, expires_at)
    return JSONResponse(views.key(info, secret), 201)


@keys.get("", response_model=models.KeysOut, summary="List the tenant's API keys")
async def list_keys(who: Admin, here: Here) -> JSONResponse:
    """Without their secrets."""
    found = await here.service.keys(who)
    return JSONResponse({"keys": [views.key(info) for info in found]})


@keys.delete("/{id}", response_model=models.DeletedOut, summary="Revoke an API key")
async def revoke_key(id: Key, who: Admin, here: Here) -> JSONResponse:
    """The next request with it is refused."""
    await here.service.revoke_key(who, id)
    return JSONResponse({"id": id, "deleted": True})


@state.get(
    "/status",
    response_model=models.StatusOut,
    summary="What the system holds and how its parts are",
)
async def status(who: Reader, here: Here) -> JSONResponse:
    """Counts are the tenant's own. Paths on the hosts are shown to an operator alone. A shard, an engine or
    the scheduler that doesn't answer within 2 seconds is listed with its `error`."""
    stats = await here.service.stats(who)
    parts = await here.status()
    parts["shards"] = [
        shard
        if shard["location"] is None
        else shard | {"location": views.location(shard["location"], whole=runs_it(who))}
        for shard in parts["shards"]
    ]
    return JSONResponse(
        {
            "version": __version__,
            "tenant": who.tenant,
            "role": who.role,
            "cubes": stats.cubes_by_state,
            "pending_index": stats.pending_index,
            "pending_removal": stats.pending_removal,
            **parts,
        }
    )


@system.get("/healthz", summary="Is this process alive?", response_class=PlainTextResponse)
async def healthz() -> PlainTextResponse:
    """Asks nobody else."""
    return PlainTextResponse("ok\n")


@system.get("/readyz", summary="Can requests be served?", response_class=PlainTextResponse)
async def readyz(here: Here) -> PlainTextResponse:
    """Asks the catalog and the embedder, and whether any shard answers: while a node is down the tenants of
    the others are served. `GET /v1/status` says what doesn't answer."""
    try:
        parts = await here.status()
    except MemCubeError as failed:
        raise Unavailable(f"not ready: {failed}", 2.0) from None
    errors = [shard["error"] for shard in parts["shards"]]
    if None not in errors:
        raise Unavailable(f"not ready: {'; '.join(errors)}"[:500], 2.0)
    return PlainTextResponse("ready\n")


@system.get("/metrics", summary="Prometheus metrics", response_class=PlainTextResponse)
async def metrics(request: Request, here: Here) -> PlainTextResponse:
    """Of this gateway process and the parts it talks to. No tenant is named but to an operator's key:
    that also gets the bytes of KV by tenant."""
    measured: Metrics = request.app.state.metrics
    stats = await here.service.total_stats()
    measured.pending_index.set(stats.pending_index)
    with contextlib.suppress(MemCubeError):
        # A scrape goes on without the parts that don't answer; /readyz says so.
        parts = await here.status()
        measured.embedder_waiting.set(parts["embedder"]["waiting"])
        measured.shards_down.set(sum(one["error"] is not None for one in parts["shards"]))
        if parts["scheduler"]["error"] is None:
            measured.scheduler_rounds.set(parts["scheduler"]["rounds"])
        measured.scheduler_epoch.set(parts["scheduler"]["epoch"] or 0)
    counts, running = await asyncio.to_thread(here.catalog.jobs.load)
    measured.jobs_are(counts, running)
    engines = [] if here.kv_stats is None else await here.kv_stats()
    kv = kv_metrics.text(engines, name_tenants=await _is_operators(request, here))
    told = None
    if here.scheduler is not None:
        told = await in_time(here.scheduler.details(), STATS_DEADLINE_S)
    queue = await asyncio.to_thread(lambda: here.catalog.tasks.stats(now=here.clock()))
    moves = scheduler_metrics.text(told, queue, now=here.clock())
    return PlainTextResponse(
        measured.text() + kv + moves, media_type="text/plain; version=0.0.4; charset=utf-8"
    )


async def _is_operators(request: Request, here: Backend) -> bool:
    """Whether a request to a public route was sent with an operator's key."""
    try:
        who = await here.service.authenticate(secret_of(request))
    except Unauthenticated:
        return False
    return who.role.allows(Role.OPERATOR)
