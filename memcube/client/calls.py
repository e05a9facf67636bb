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
from memcube.client.retry import TRANSIENT, Call, Repeat
from memcube.client.types import (
    AddResult,
    ApiKey,
    BatchResult,
    Context,
    Cube,
    Deleted,
    History,
    Item,
    Lineage,
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
    limit: int = 50,
    cursor: str | None = None,
) -> Call[Page]:
    """One page of cubes, newest first; the page's ``next_cursor`` asks for the next one."""
    return _get(
        "/v1/memories",
        _as(Page),
        user_id=user_id,
        agent_id=agent_id,
        run_id=run_id,
        kind=kind,
        state=state,
        tag=tag,
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


def migrate(id: str, tier: str) -> Call[Migrated]:
    """Move a cube to the tier ``activation`` (build its KV now) or back to ``plaintext`` (drop it).

    A build may take longer than one try waits: the next one goes on where it is.

    Raises:
        Conflict: the server has no activation tier, or the cube holds nothing to build.
    """
    path = f"/v1/cubes/{_part(id)}/migrate"
    return Call(method="POST", path=path, body=_body({"tier": tier}), parse=_as(Migrated))


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
