"""From request bodies to what the service takes: limits, times, headers of cubes."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from memcube.catalog import Idempotency
from memcube.config import Limits
from memcube.errors import BadRequest, LimitExceeded
from memcube.filters import parse_filter
from memcube.reader.messages import Header, Message
from memcube.service import AddRequest, SearchScope
from serve.models import AddBody, ContextBody, MessageBody, SearchBody

MAX_KEY_CHARS = 255


def utc(time: datetime | None, field: str) -> datetime | None:
    """The time in UTC; one without a zone is UTC already.

    Raises:
        BadRequest: out of the calendar's range once in UTC.
    """
    if time is None:
        return None
    try:
        return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    except OverflowError:
        raise BadRequest("out of range", field) from None


def add_request(body: AddBody, limits: Limits, *, now: datetime, at: str = "") -> AddRequest:
    """One add. ``at`` is its place in a batch, for errors.

    Raises:
        BadRequest, LimitExceeded: over a limit, or contradicting itself.
    """
    if body.ttl_s is not None and body.expires_at is not None:
        raise BadRequest("give ttl_s or expires_at, not both", f"{at}ttl_s")
    expires_at = utc(body.expires_at, f"{at}expires_at")
    if body.ttl_s is not None:
        expires_at = now + timedelta(seconds=body.ttl_s)
    if expires_at is not None and expires_at <= now:
        raise BadRequest("is in the past", f"{at}expires_at")
    _check_lengths(body.messages, limits, at=at)
    check_text(body.text, limits, at=at)
    header = Header(
        user_id=body.user_id,
        agent_id=body.agent_id,
        run_id=body.run_id,
        kind=body.kind,
        origin=body.origin,
        tags=tuple(dict.fromkeys(body.tags)),
        metadata=metadata(body.metadata, limits, at=at),
        sensitivity=body.sensitivity,
        priority=body.priority,
        expires_at=expires_at,
    )
    messages = None
    if body.messages is not None:
        messages = tuple(
            _message(m, f"{at}messages[{i}].time") for i, m in enumerate(body.messages)
        )
    return AddRequest(messages=messages, text=body.text, header=header, infer=body.infer, at=at)


def check_text(text: str | None, limits: Limits, *, at: str = "") -> None:
    """Refuse a text over the limit.

    Raises:
        LimitExceeded: it is.
    """
    if text is not None and len(text) > limits.text_chars:
        raise LimitExceeded(f"characters of {at}text", limits.text_chars, len(text))


def _check_lengths(messages: Sequence[MessageBody] | None, limits: Limits, *, at: str = "") -> None:
    if messages is None:
        return
    if len(messages) > limits.messages:
        raise LimitExceeded(f"{at}messages", limits.messages, len(messages))
    for i, message in enumerate(messages):
        if len(message.content) > limits.text_chars:
            what = f"characters of {at}messages[{i}].content"
            raise LimitExceeded(what, limits.text_chars, len(message.content))


def _message(body: MessageBody, field: str) -> Message:
    return Message(
        role=body.role,
        content=body.content,
        name=body.name,
        time=utc(body.time, field),
        id=body.id,
    )


def metadata(value: Mapping[str, Any], limits: Limits, *, at: str = "") -> dict[str, Any]:
    """Metadata within its limits, every text of it storable.

    Raises:
        BadRequest, LimitExceeded: too deep, too large, NaN, NUL or half a surrogate pair.
    """
    field = f"{at}metadata"
    _check(value, field, limits.metadata_depth, limits.metadata_depth)
    try:
        encoded = json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except ValueError:
        raise BadRequest("holds NaN, infinity or half of a surrogate pair", field) from None
    if len(encoded) > limits.metadata_bytes:
        raise LimitExceeded(f"bytes of {field}", limits.metadata_bytes, len(encoded))
    return dict(value)


def _check(value: Any, field: str, left: int, depth: int) -> None:
    if isinstance(value, dict | list):
        if left == 0:
            raise LimitExceeded(f"depth of {field}", depth)
        for inner in (*value, *value.values()) if isinstance(value, dict) else value:
            _check(inner, field, left - 1, depth)
    elif isinstance(value, str) and "\0" in value:
        raise BadRequest("can't hold a NUL character", field)
    elif isinstance(value, int) and abs(value) >= 2**63:
        raise BadRequest("an integer has at most 64 bits", field)


def search_scope(body: SearchBody | ContextBody) -> SearchScope:
    """Where to look."""
    return SearchScope(
        user_id=body.user_id,
        agent_id=body.agent_id,
        run_id=body.run_id,
        filters=parse_filter(body.filters),
        cube_ids=tuple(body.cube_ids),
    )


def query_of(body: ContextBody, limits: Limits) -> str:
    """What a context is about: the query, or the last messages, the newest first in weight.

    Raises:
        BadRequest, LimitExceeded: neither or both are given, or nothing or too much is in them.
    """
    if (body.query is None) == (body.messages is None):
        raise BadRequest("give either query or messages", "query")
    if body.query is not None:
        return body.query
    _check_lengths(body.messages, limits)
    spoken = [m.content.strip() for m in body.messages or () if m.content.strip()]
    if not spoken:
        raise BadRequest("hold no text", "messages")
    return spoken[-1]


def checked_query(query: str, limits: Limits) -> str:
    """The query, if it holds anything and is not too long."""
    if not query.strip():
        raise BadRequest("is empty", "query")
    if len(query) > limits.query_chars:
        raise LimitExceeded("characters of the query", limits.query_chars, len(query))
    return query


def idempotency(
    key: str | None, route: str, body: Any, *, null_differs: bool = False
) -> Idempotency | None:
    """The caller's retry key with the hash of the request that it stands for.

    ``null_differs``: a field that is null is not one that is left out, as in a change.

    Raises:
        BadRequest: an empty or overlong key.
    """
    if key is None:
        return None
    if not key or len(key) > MAX_KEY_CHARS or not key.isprintable():
        raise BadRequest(f"1 to {MAX_KEY_CHARS} printable characters", "Idempotency-Key")
    fields = body.model_dump(mode="json", exclude_unset=null_differs)
    canonical = json.dumps([route, fields], sort_keys=True)
    return Idempotency(key=key, body_hash=hashlib.sha256(canonical.encode()).hexdigest())
