"""Every request of the API: what goes over the wire, and how the answer is read. No I/O.

Each function makes a ``Call``; ``sync`` and ``aio`` turn them into methods of the two clients, with
the same parameters and documentation.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, TypeVar
from urllib.parse import quote
from uuid import uuid4

import httpx

from memcube.client.address import is_header_text
from memcube.client.lifecycle_types import (
    Applied,
    Comparison,
    Diagnosis,
    Proposal,
    Proposals,
    RolledBack,
    Snapshot,
    Snapshots,
)
from memcube.client.retry import TRANSIENT, Call, Repeat
from memcube.client.scheduler_types import Event, Events, Plan
from memcube.client.types import (
    Adapter,
    AddResult,
    ApiKey,
    BatchResult,
    Context,
    Cube,
    Deleted,
    History,
    Item,
    Job,
    Jobs,
    Lineage,
    LogLine,
    Message,
    Migrated,
    NewKey,
    Page,
    SearchResult,
    from_json,
    time_text,
    to_json,
)
from memcube.errors import BadRequest, Corrupt

T = TypeVar("T")

MAX_KEY_CHARS = 255

_UNSET: Any = type("Unset", (), {"__repr__": lambda self: "<unchanged>"})()
AnyMessage = Message | Mapping[str, Any]


def add(
    content: str | Sequence[AnyMessage],
    *,
    user_id: str | None = None,
    agent_id: str | None = None,
    run_id: str | None = None,
    kind: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    tags: Sequence[str] = (),
    infer: bool = False,
    ttl_s: float | None = None,
    expires_at: datetime | None = None,
    sensitivity: str | None = None,
    priority: int | None = None,
    origin: str | None = None,
    wait: str = "indexed",
    idempotency_key: str | None = None,
) -> Call[AddResult]:
    """Remember a text or messages; on return they are stored for good.

    ``wait="indexed"`` returns when a search finds them, ``"stored"`` before that. Without an
    ``idempotency_key`` one is made for this call, so its retries never add twice; give your own to
    make the same hold over a crash of your process.
    """
    item = Item(
        messages=None if isinstance(content, str) else tuple(content),
        text=content if isinstance(content, str) else None,
        user_id=user_id,
        agent_id=agent_id,
        run_id=run_id,
        kind=kind,
        metadata=metadata,
        tags=tuple(tags),
        infer=infer,
        ttl_s=ttl_s,
        expires_at=expires_at,
        sensitivity=sensitivity,
        priority=priority,
        origin=origin,
    )
    body = {**item_json(item), "wait": wait}
    parse = _as(AddResult)
    return _keyed("/v1/memories", body, parse, idempotency_key)


def add_batch(
    items: Iterable[Item | Mapping[str, Any]],
    *,
    wait: str = "indexed",
    idempotency_key: str | None = None,
) -> Call[BatchResult]:
    """Up to 1,000 adds as one transaction: all of them or none. See ``add``.

    An item with ``infer`` is refused: add it alone.
    """
    body = {"items": [item_json(item) for item in items], "wait": wait}
    parse = _as(BatchResult)
    return _keyed("/v1/memories/batch", body, parse, idempotency_key)


def search(
    query: str,
    *,
    user_id: str | None = None,
    agent_id: str | None = None,
    run_id: str | None = None,
    filters: Mapping[str, Any] | None = None,
    cube_ids: Sequence[str] = (),
    top_k: int = 10,
    threshold: float | None = None,
    mode: str = "hybrid",
    explain: bool = False,
) -> Call[SearchResult]:
    """The cubes that fit a query best. ``mode``: hybrid, dense (cosine) or sparse (BM25)."""
    body = _given(
        query=query,
        user_id=user_id,
        agent_id=agent_id,
        run_id=run_id,
        filters=filters,
        cube_ids=list(cube_ids) or None,
        top_k=top_k,
        threshold=threshold,
        mode=mode,
        explain=explain or None,
    )
    parse = _as(SearchResult)
    return Call(method="POST", path="/v1/memories/search", body=_body(body), parse=parse)


def get(id: str, *, version: int | None = None, as_of: datetime | None = None) -> Call[Cube]:
    """A cube as it is, as it was in a version, or as it was at a time.

    Raises:
        NotFound: no such cube or version, or it was deleted or has expired.
    """
    return _get(f"/v1/memories/{_part(id)}", _as(Cube), version=version, as_of=as_of)


def list_page(
    *,
    user_id: str | None = None,
    agent_id: str | None = None,
    run_id: str | None = None,
    kind: str | None = None,
    state: str | None = None,
    tag: str | None = None,
    as_of: datetime | None = None,
    limit: int = 50,
    cursor: str | None = None,
) -> Call[Page]:
    """One page of cubes, newest first; the page's ``next_cursor`` asks for the next one.

    With ``as_of`` the cubes that there were at that time and still are, as they were then.
    """
    return _get(
        "/v1/memories",
        _as(Page),
        user_id=user_id,
        agent_id=agent_id,
        run_id=run_id,
        kind=kind,
        state=state,
        tag=tag,
        as_of=as_of,
        limit=limit,
        cursor=cursor,
    )


def update(
    id: str,
    *,
    text: str = _UNSET,
    metadata: Mapping[str, Any] = _UNSET,
    tags: Sequence[str] = _UNSET,
    expires_at: datetime | None = _UNSET,
    expected_version: int | None = None,
) -> Call[Cube]:
    """Change what is given, as a new version; ``expires_at=None`` makes the cube stay.

    With ``expected_version`` the change is made only to that version, and is tried again when the
    connection breaks. If a first try got through unseen, the next one raises VersionMismatch: read
    the cube to see whose change it was. Without it a broken call raises OutcomeUnknown.
    """
    changes = {"text": text, "metadata": metadata, "tags": tags, "expires_at": expires_at}
    body = {name: to_json(value) for name, value in changes.items() if value is not _UNSET}
    if not body:
        raise BadRequest("nothing to change; give text, metadata, tags or expires_at")
    repeat = Repeat.UNSAFE if expected_version is None else Repeat.SAFE
    if expected_version is not None:
        body["expected_version"] = expected_version
    path = f"/v1/memories/{_part(id)}"
    return Call(method="PUT", path=path, body=_body(body), parse=_as(Cube), repeat=repeat)


def delete(id: str) -> Call[Deleted]:
    """Forget a cube with all its versions.

    Raises:
        NotFound: there is none. Not raised when an earlier try of this call may have deleted it.
    """
    return Call(
        method="DELETE",
        path=f"/v1/memories/{_part(id)}",
        parse=_as(Deleted),
        when_gone=Deleted(id=id),
    )


def delete_all(
    *, user_id: str | None = None, agent_id: str | None = None, run_id: str | None = None
) -> Call[int]:
    """Forget all cubes of a scope; how many they were.

    The number is of the last try, so it can be too small after a broken connection.
    """
    params = _given(user_id=user_id, agent_id=agent_id, run_id=run_id)
    if not params:
        raise BadRequest("name at least one of user_id, agent_id, run_id")
    return Call(method="DELETE", path="/v1/memories", params=params, parse=_num_deleted)


def history(id: str) -> Call[History]:
    """All versions of a cube."""
    return _get(f"/v1/memories/{_part(id)}/history", _as(History))


def context(
    query: str | Sequence[AnyMessage],
    *,
    user_id: str | None = None,
    agent_id: str | None = None,
    run_id: str | None = None,
    filters: Mapping[str, Any] | None = None,
    cube_ids: Sequence[str] = (),
    token_budget: int = 1024,
    top_k: int | None = None,
) -> Call[Context]:
    """The memories that fit a query (or a conversation so far), as one block for a prompt."""
    asked = {"query": query} if isinstance(query, str) else {"messages": _messages(query)}
    body = asked | _given(
        user_id=user_id,
        agent_id=agent_id,
        run_id=run_id,
        filters=filters,
        cube_ids=list(cube_ids) or None,
        token_budget=token_budget,
        top_k=top_k,
    )
    parse = _as(Context)
    return Call(method="POST", path="/v1/context", body=_body(body), parse=parse)


def status() -> Call[dict[str, Any]]:
    """What the server says about itself and about this key's tenant."""
    return _get("/v1/status", _object)


def health() -> Call[bool]:
    """Whether the server lives. Asked once, without a retry."""
    return _probe("/healthz")


def ready() -> Call[bool]:
    """Whether the server can take work. Asked once, without a retry."""
    return _probe("/readyz")


# -- cubes -------------------------------------------------------------------------------------


def create_composite(
    members: Sequence[str],
    *,
    title: str | None = None,
    text: str | None = None,
    user_id: str | None = None,
    agent_id: str | None = None,
    run_id: str | None = None,
    tags: Sequence[str] = (),
    metadata: Mapping[str, Any] | None = None,
    idempotency_key: str | None = None,
) -> Call[Cube]:
    """A composite that holds these cubes, in order."""
    body = {"members": list(members)} | _given(
        title=title,
        text=text,
        user_id=user_id,
        agent_id=agent_id,
        run_id=run_id,
        tags=list(tags) or None,
        metadata=metadata,
    )
    return _keyed("/v1/cubes", body, _as(Cube), idempotency_key)


def get_cube(id: str) -> Call[Cube]:
    """A cube, leaf or composite."""
    return _get(f"/v1/cubes/{_part(id)}", _as(Cube))


def members(id: str, *, limit: int | None = None, cursor: str | None = None) -> Call[Page]:
    """The members of a composite, in order."""
    parse = _as(Page)
    return _get(f"/v1/cubes/{_part(id)}/members", parse, limit=limit, cursor=cursor)


def set_members(id: str, members: Sequence[str]) -> Call[Cube]:
    """Replace a composite's members, as a new version."""
    return _change("PUT", f"/v1/cubes/{_part(id)}/members", {"members": list(members)})


def compose(
    ids: Sequence[str],
    *,
    title: str | None = None,
    user_id: str | None = None,
    agent_id: str | None = None,
    run_id: str | None = None,
    idempotency_key: str | None = None,
) -> Call[Cube]:
    """A composite made of cubes that its lineage then names as parents."""
    scope = _given(title=title, user_id=user_id, agent_id=agent_id, run_id=run_id)
    return _keyed("/v1/cubes/compose", {"ids": list(ids)} | scope, _as(Cube), idempotency_key)


def fuse(
    ids: Sequence[str], *, text: str | None = None, idempotency_key: str | None = None
) -> Call[Cube]:
    """One new leaf in place of several cubes, which become ``merged``."""
    body = {"ids": list(ids)} | _given(text=text)
    return _keyed("/v1/cubes/fuse", body, _as(Cube), idempotency_key)


def versions(id: str) -> Call[History]:
    """All versions of a cube."""
    return _get(f"/v1/cubes/{_part(id)}/versions", _as(History))


def migrate(
    id: str, tier: str, *, adapter: str | None = None, node: str | None = None
) -> Call[Migrated]:
    """Move a cube to the tier ``activation`` (build its KV now) or back to ``plaintext`` (drop it).
    ``adapter``: the KV is for chats that name this one, by ``model="MODEL:ADAPTER"``. ``node``: it is built
    there, by a node's name or label.

    A build may take longer than one try waits: the next one goes on where it is.

    Raises:
        Conflict: the server has no activation tier, or the cube holds nothing to build.
    """
    path = f"/v1/cubes/{_part(id)}/migrate"
    body = _body({"tier": tier, "adapter": adapter, "node": node})
    return Call(method="POST", path=path, body=body, parse=_as(Migrated))


def rollback(id: str, version: int) -> Call[Cube]:
    """A new version with the content of an old one."""
    return _change("POST", f"/v1/cubes/{_part(id)}/rollback", {"version": version})


def freeze(id: str) -> Call[Cube]:
    """Forbid changes of a cube until it is unfrozen."""
    return _change("POST", f"/v1/cubes/{_part(id)}/freeze", None, repeat=Repeat.SAFE)


def unfreeze(id: str) -> Call[Cube]:
    """Allow changes of a cube again."""
    return _change("POST", f"/v1/cubes/{_part(id)}/unfreeze", None, repeat=Repeat.SAFE)


def archive(id: str) -> Call[Cube]:
    """Take a cube out of search; it stays readable by its id."""
    return _change("POST", f"/v1/cubes/{_part(id)}/archive", None)


def restore(id: str) -> Call[Cube]:
    """Bring an archived or merged cube back into search."""
    return _change("POST", f"/v1/cubes/{_part(id)}/restore", None)


def lineage(id: str) -> Call[Lineage]:
    """What a cube came from, and what came from it."""
    return _get(f"/v1/cubes/{_part(id)}/lineage", _as(Lineage))


# -- jobs and adapters -------------------------------------------------------------------------


def consolidate(
    *,
    adapter: str | None = None,
    cubes: Sequence[str] = (),
    user_id: str | None = None,
    agent_id: str | None = None,
    run_id: str | None = None,
    cube_kind: str | None = None,
    tag: str | None = None,
    stable_days: float | None = None,
    min_uses: int | None = None,
    limit: int | None = None,
    extend: bool = True,
    activate: bool = True,
    recipe: Mapping[str, Any] | None = None,
    idempotency_key: str | None = None,
) -> Call[Job]:
    """Queue the training of an adapter with memories: those named, or all of a scope that may go in."""
    body = {"kind": "consolidate", "extend": extend, "activate": activate} | _given(
        adapter=adapter,
        cubes=list(cubes) or None,
        user_id=user_id,
        agent_id=agent_id,
        run_id=run_id,
        cube_kind=cube_kind,
        tag=tag,
        stable_days=stable_days,
        min_uses=min_uses,
        limit=limit,
        recipe=recipe,
    )
    return _keyed("/v1/jobs", body, _as(Job), idempotency_key)


def list_jobs(
    *, state: str | None = None, before: str | None = None, limit: int | None = None
) -> Call[Jobs]:
    """Jobs, newest first."""
    return _get("/v1/jobs", _as(Jobs), state=state, before=before, limit=limit)


def get_job(id: str) -> Call[Job]:
    """A job as it is now."""
    return _get(f"/v1/jobs/{_part(id)}", _as(Job))


def job_logs(id: str, *, after: int = 0) -> Call[tuple[LogLine, ...]]:
    """Lines of a job's log, oldest first, from the one after ``after`` on."""
    return _get(f"/v1/jobs/{_part(id)}/logs", _lines, after=after)


def cancel_job(id: str) -> Call[Job]:
    """End a job: a queued one at once, a running one after its present step."""
    return Call(method="POST", path=f"/v1/jobs/{_part(id)}/cancel", parse=_as(Job))


def resume_job(id: str) -> Call[Job]:
    """Queue a failed or cancelled job again; it goes on from its last checkpoint."""
    return Call(method="POST", path=f"/v1/jobs/{_part(id)}/resume", parse=_as(Job))


def job_report(id: str) -> Call[dict[str, Any]]:
    """What the gate of a job found: figures, limits, what was short, the training's course, answers."""
    return _get(f"/v1/jobs/{_part(id)}/report", _object)


def job_page(id: str) -> Call[str]:
    """The same as a page of HTML."""
    return _get(f"/v1/jobs/{_part(id)}/report", lambda response: response.text, format="html")


def list_adapters() -> Call[tuple[Adapter, ...]]:
    """All versions of the tenant's adapters, by name, the newest first."""
    return _get("/v1/adapters", _adapters)


def activate_adapter(id: str, version: int) -> Call[Adapter]:
    """Let a version of an adapter serve."""
    path = f"/v1/adapters/{_part(id)}/activate"
    return Call(method="POST", path=path, body=_body({"version": version}), parse=_as(Adapter))


def rollback_adapter(id: str) -> Call[Adapter]:
    """Let the version serve again that did before the present one."""
    path = f"/v1/adapters/{_part(id)}/rollback"
    return Call(method="POST", path=path, parse=_as(Adapter), repeat=Repeat.UNSAFE)


# -- keys --------------------------------------------------------------------------------------


def create_key(
    name: str,
    *,
    role: str = "writer",
    tenant: str | None = None,
    expires_at: datetime | None = None,
) -> Call[NewKey]:
    """A new API key. Its secret is in the answer and can't be asked for again."""
    given = _given(tenant=tenant, expires_at=to_json(expires_at))
    body = {"name": name, "role": role} | given
    return Call(
        method="POST",
        path="/v1/keys",
        body=_body(body),
        parse=_as(NewKey),
        repeat=Repeat.UNSAFE,
    )


def list_keys() -> Call[tuple[ApiKey, ...]]:
    """The tenant's keys, without their secrets."""
    return _get("/v1/keys", _keys)


def revoke_key(id: str) -> Call[Deleted]:
    """End a key; the next request with it is refused."""
    return Call(
        method="DELETE",
        path=f"/v1/keys/{_part(id)}",
        parse=lambda _: Deleted(id=id),
        when_gone=Deleted(id=id),
    )


# -- lifecycle ---------------------------------------------------------------------------------


def create_snapshot(
    name: str,
    *,
    user_id: str | None = None,
    agent_id: str | None = None,
    run_id: str | None = None,
    at: datetime | None = None,
) -> Call[Snapshot]:
    """Give what a scope is now, or was at a time, a name. The same again is the same snapshot.

    Without ``at`` a repeat of a broken call may be refused as a Conflict: the first one got through.
    """
    scope = _given(user_id=user_id, agent_id=agent_id, run_id=run_id, at=to_json(at))
    body = _body({"name": name} | scope)
    return Call(method="POST", path="/v1/snapshots", body=body, parse=_as(Snapshot))


def list_snapshots() -> Call[Snapshots]:
    """The tenant's snapshots, the latest time first."""
    return _get("/v1/snapshots", _as(Snapshots))


def delete_snapshot(id: str) -> Call[Deleted]:
    """Take a snapshot's name and pin away; no memory changes."""
    return Call(
        method="DELETE",
        path=f"/v1/snapshots/{_part(id)}",
        parse=_as(Deleted),
        when_gone=Deleted(id=id),
    )


def compare(
    *,
    since: datetime | None = None,
    snapshot: str | None = None,
    until: datetime | None = None,
    user_id: str | None = None,
    agent_id: str | None = None,
    run_id: str | None = None,
    limit: int = 50,
    cursor: str | None = None,
) -> Call[Comparison]:
    """What changed in a scope after ``since`` (or a snapshot, which has its own scope), up to ``until``,
    by default now."""
    body = _given(
        since=to_json(since),
        snapshot=snapshot,
        until=to_json(until),
        user_id=user_id,
        agent_id=agent_id,
        run_id=run_id,
        limit=limit,
        cursor=cursor,
    )
    path, parse = "/v1/memories/compare", _as(Comparison)
    return Call(method="POST", path=path, body=_body(body), parse=parse)


def rollback_scope(
    *,
    to: datetime | None = None,
    snapshot: str | None = None,
    user_id: str | None = None,
    agent_id: str | None = None,
    run_id: str | None = None,
    idempotency_key: str | None = None,
) -> Call[RolledBack]:
    """Take a scope back to a time, or to a snapshot, which has its own scope.

    Raises:
        Conflict: a frozen memory would change. Nothing is changed.
    """
    body = _given(
        to=to_json(to), snapshot=snapshot, user_id=user_id, agent_id=agent_id, run_id=run_id
    )
    return _keyed("/v1/memories/rollback", body, _as(RolledBack), idempotency_key)


def list_proposals(
    *, state: str | None = None, limit: int = 50, cursor: str | None = None
) -> Call[Proposals]:
    """Proposals, newest first: open, applied, dismissed or outdated."""
    return _get("/v1/proposals", _as(Proposals), state=state, limit=limit, cursor=cursor)


def find_proposals(
    *,
    user_id: str | None = None,
    agent_id: str | None = None,
    run_id: str | None = None,
    limit: int | None = None,
) -> Call[Proposals]:
    """Look for memories of a scope that could be one; those that were not proposed before."""
    body = _given(user_id=user_id, agent_id=agent_id, run_id=run_id, limit=limit)
    path, parse = "/v1/proposals/find", _as(Proposals)
    return Call(method="POST", path=path, body=_body(body), parse=parse)


def apply_proposal(id: str) -> Call[Applied]:
    """Merge a proposal's memories. May be repeated.

    Raises:
        Conflict: one of them has changed since, or is frozen, or it was dismissed.
    """
    path = f"/v1/proposals/{_part(id)}/apply"
    return Call(method="POST", path=path, parse=_as(Applied))


def dismiss_proposal(id: str) -> Call[Proposal]:
    """Close a proposal without a change. May be repeated."""
    path = f"/v1/proposals/{_part(id)}/dismiss"
    return Call(method="POST", path=path, parse=_as(Proposal))


def doctor(*, repair: bool = False, cursor: str | None = None) -> Call[Diagnosis]:
    """Look whether the parts of the system agree, and mend what does not. Needs an operator's key."""
    parse = _as(Diagnosis)
    if not repair:
        return _get("/v1/doctor", parse, cursor=cursor)
    params = _given(cursor=cursor) or None
    return Call(method="POST", path="/v1/doctor/repair", params=params, parse=parse)


def scheduler_status() -> Call[dict[str, Any]]:
    """Who leads, what was decided and moved, the queue, nodes and places. Needs an operator's key."""
    return _get("/v1/scheduler", _object)


def scheduler_plan(*, dry_run: bool = True, limit: int | None = None) -> Call[Plan]:
    """What the scheduler would do now and what it refuses; or, with ``dry_run`` off, a round at once. Needs
    an operator's key."""
    params = {"dry_run": str(dry_run).lower(), **_given(limit=limit)}
    path, parse = "/v1/scheduler/plan", _as(Plan)
    texts = {name: str(value) for name, value in params.items()}
    return Call(method="POST", path=path, params=texts, parse=parse)


def journal(
    *,
    tenant: str | None = None,
    cube: str | None = None,
    before: str | None = None,
    limit: int | None = None,
) -> Call[Events]:
    """What the scheduler does and did, newest first. ``tenant`` is for an operator, who sees all, and without it also
    what became of nodes, shards and the lead (``type`` is cluster)."""
    path = "/v1/scheduler/journal"
    return _get(path, _as(Events), tenant=tenant, cube=cube, before=before, limit=limit)


def list_tasks(
    *,
    state: str | None = None,
    tenant: str | None = None,
    before: str | None = None,
    limit: int | None = None,
) -> Call[Events]:
    """Tasks of the queue, newest first: waiting, running, done or dead."""
    return _get("/v1/tasks", _as(Events), state=state, tenant=tenant, before=before, limit=limit)


def get_event(id: str) -> Call[Event]:
    """One event: an action, a task, or what happened to the cluster."""
    return _get(f"/v1/events/{_part(id)}", _as(Event))


def wait_for_event(id: str, *, timeout_s: float = 30.0) -> Call[Event]:
    """One event when it has ended, or as it is after ``timeout_s`` (60 at most)."""
    return _get(f"/v1/events/{_part(id)}/wait", _as(Event), timeout_s=timeout_s)


def retry_task(id: str) -> Call[Event]:
    """Let a dead task run again. May be repeated.

    Raises:
        Conflict: it is done.
    """
    return Call(method="POST", path=f"/v1/tasks/{_part(id)}/retry", parse=_as(Event))


def accept_task(id: str) -> Call[Job]:
    """Queue the job that a task of kind ``consolidate`` proposes. May be repeated: it is one job."""
    return Call(method="POST", path=f"/v1/tasks/{_part(id)}/accept", parse=_as(Job))


# -- nodes: need an operator's key ---------------------------------------------------------------


def list_nodes() -> Call[list[dict[str, Any]]]:
    """All nodes by name: state (up, draining, drained, down), shards, tenants."""
    return _get("/v1/nodes", _nodes)


def get_node(name: str) -> Call[dict[str, Any]]:
    """One node."""
    return _get(f"/v1/nodes/{_part(name)}", _object)


def drain_node(name: str) -> Call[dict[str, Any]]:
    """Let a node take nothing new, and be emptied until it is ``drained``. May be repeated.

    Raises:
        Conflict: there is no other node to take over what lies there.
    """
    return Call(method="POST", path=f"/v1/nodes/{_part(name)}/drain", parse=_object)


def undrain_node(name: str) -> Call[dict[str, Any]]:
    """Let a node be used again. May be repeated."""
    return Call(method="POST", path=f"/v1/nodes/{_part(name)}/undrain", parse=_object)


def forget_node(name: str) -> Call[dict[str, Any]]:
    """Take a node off the list that is down and will not come back.

    Raises:
        Conflict: it is up.
    """
    return Call(
        method="DELETE",
        path=f"/v1/nodes/{_part(name)}",
        parse=_object,
        when_gone={"name": name, "forgotten": True},
    )


def move_tenant(tenant: str, *, to: str) -> Call[Event]:
    """Send a tenant to a node, by its name or a label; the task that sees to it, which ``scheduler.wait``
    follows. May be repeated; of several words the last one holds.

    Raises:
        NotFound: no such tenant, or no such node is up and takes any.
    """
    path = f"/v1/tenants/{_part(tenant)}/move"
    return Call(method="POST", path=path, body=_body({"to": to}), parse=_as(Event))


# -- parts -------------------------------------------------------------------------------------


def item_json(item: Item | Mapping[str, Any]) -> dict[str, Any]:
    """The body of one add, without what is at its default.

    Raises:
        BadRequest: neither messages nor text, both, or a field that an add doesn't have.
    """
    if not isinstance(item, Item):
        unknown = set(item) - {field.name for field in dataclasses.fields(Item)}
        if unknown:
            raise BadRequest(f"an add has no field {min(unknown)!r}")
        item = Item(**item)
    return _given(
        messages=None if item.messages is None else _messages(item.messages),
        text=item.text,
        user_id=item.user_id,
        agent_id=item.agent_id,
        run_id=item.run_id,
        kind=item.kind,
        metadata=to_json(item.metadata) or None,
        tags=list(item.tags) or None,
        infer=item.infer or None,
        ttl_s=item.ttl_s,
        expires_at=to_json(item.expires_at),
        sensitivity=item.sensitivity,
        priority=item.priority,
        origin=item.origin,
    )


def _messages(messages: Sequence[AnyMessage]) -> list[dict[str, Any]]:
    return [to_json(message) for message in messages]


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _body(value: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain).encode()
    except RecursionError:
        raise BadRequest("nested too deeply", "body") from None
    except ValueError:
        raise BadRequest(
            "holds NaN, infinity or half of a surrogate pair, which JSON can't carry", "body"
        ) from None


def _plain(value: Any) -> Any:
    plain = to_json(value)
    if plain is value:
        raise BadRequest(f"a {type(value).__name__} can't be sent as JSON", "body")
    return plain


def _part(id: str) -> str:
    """One path segment. A slash or ``..`` in an id must not lead to another route."""
    if id in ("", ".", ".."):
        raise BadRequest(f"{id!r} is no id", "id")
    return quote(id, safe="")


def _get(path: str, parse: Callable[[httpx.Response], T], **params: Any) -> Call[T]:
    given = _given(**params)
    texts = {
        name: time_text(value) if isinstance(value, datetime) else str(value)
        for name, value in given.items()
    }
    return Call(method="GET", path=path, params=texts or None, parse=parse)


def _keyed(
    path: str, body: Mapping[str, Any], parse: Callable[[httpx.Response], T], key: str | None
) -> Call[T]:
    if key is not None and not (is_header_text(key) and 0 < len(key) <= MAX_KEY_CHARS):
        raise BadRequest(f"1 to {MAX_KEY_CHARS} printable ASCII characters", "idempotency_key")
    headers = {"Idempotency-Key": key if key is not None else str(uuid4())}
    return Call(method="POST", path=path, body=_body(body), headers=headers, parse=parse)


def _change(
    method: str, path: str, body: Mapping[str, Any] | None, *, repeat: Repeat = Repeat.UNSAFE
) -> Call[Cube]:
    content = None if body is None else _body(body)
    return Call(method=method, path=path, body=content, parse=_as(Cube), repeat=repeat)


def _probe(path: str) -> Call[bool]:
    return Call(
        method="GET",
        path=path,
        parse=lambda response: response.is_success,
        accept=TRANSIENT,
        repeat=Repeat.NEVER,
    )


def _as(kind: type[T]) -> Callable[[httpx.Response], T]:
    return lambda response: from_json(kind, _json(response))


def _json(response: httpx.Response) -> Any:
    try:
        return json.loads(response.content)
    except (ValueError, RecursionError):
        raise Corrupt(
            str(response.url), "answered with something that is no JSON; is it a memcube server?"
        ) from None


def _object(response: httpx.Response) -> dict[str, Any]:
    body = _json(response)
    if not isinstance(body, dict):
        raise Corrupt(str(response.url), "expected an object")
    return body


def _num_deleted(response: httpx.Response) -> int:
    deleted = _object(response).get("deleted")
    if not isinstance(deleted, int):
        raise Corrupt(str(response.url), "does not say how many were deleted")
    return deleted


def _keys(response: httpx.Response) -> tuple[ApiKey, ...]:
    return tuple(from_json(ApiKey, entry) for entry in _object(response).get("keys", ()))


def _lines(response: httpx.Response) -> tuple[LogLine, ...]:
    return tuple(from_json(LogLine, entry) for entry in _object(response).get("lines", ()))


def _nodes(response: httpx.Response) -> list[dict[str, Any]]:
    nodes = _object(response).get("nodes")
    if not isinstance(nodes, list):
        raise Corrupt(str(response.url), "does not list nodes")
    return nodes


def _adapters(response: httpx.Response) -> tuple[Adapter, ...]:
    return tuple(from_json(Adapter, entry) for entry in _object(response).get("adapters", ()))
