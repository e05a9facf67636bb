"""What the client gives and takes, as frozen dataclasses, and their way from and to JSON.

Enumerated values (kind, state, …) stay strings, and fields that this version doesn't know are
ignored, so an older client reads a newer server.
"""

import functools
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from memcube.errors import BadRequest, Corrupt

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message to remember. ``id`` is the caller's own; search gives it back as a source ref."""

    role: str
    content: str
    name: str | None = None
    time: datetime | None = None
    id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One add: either messages or text, whose memory it is, and the header of its cubes."""

    messages: tuple[Message | Mapping[str, Any], ...] | None = None
    text: str | None = None
    user_id: str | None = None
    agent_id: str | None = None
    run_id: str | None = None
    kind: str | None = None
    metadata: Mapping[str, Any] | None = None
    tags: tuple[str, ...] = ()
    infer: bool = False
    ttl_s: float | None = None
    expires_at: datetime | None = None
    sensitivity: str | None = None
    priority: int | None = None
    origin: str | None = None

    def __post_init__(self) -> None:
        if (self.messages is None) == (self.text is None):
            raise BadRequest("an add needs either messages or text", "messages")


@dataclass(frozen=True, slots=True, kw_only=True)
class Added:
    """One cube of an add. ``event`` is ``added``, or ``repeated`` when it was known already."""

    id: str
    event: str
    version: int
    text: str
    indexed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class AddResult:
    """The cubes of one add. ``fallback`` says why ``infer`` ended verbatim, if it did."""

    results: tuple[Added, ...]
    fallback: str | None = None

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(added.id for added in self.results)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchResult:
    """One AddResult an item, in the order of the items."""

    results: tuple[AddResult, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """One search result, with what its score is made of if ``explain`` was asked for."""

    id: str
    text: str
    score: float
    kind: str | None = None
    role: str | None = None
    speaker: str | None = None
    user_id: str | None = None
    agent_id: str | None = None
    run_id: str | None = None
    tags: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    created_at: datetime | None = None
    event_time: datetime | None = None
    version: int | None = None
    explain: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """Hits, best first; iterating goes over them. ``took_ms``: embed, search and total."""

    results: tuple[Hit, ...]
    took_ms: Mapping[str, float] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Hit]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)

    def __getitem__(self, place: int) -> Hit:
        return self.results[place]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parent:
    """One edge of the lineage: the cube came from that version of that cube."""

    id: str
    version: int
    relation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One message that a cube's content came from; ``ref`` is the caller's own id of it."""

    ref: str | None = None
    role: str | None = None
    speaker: str | None = None
    time: datetime | None = None
    text: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Residency:
    """Which payload, of which version, lies where."""

    tier: str
    medium: str
    location: str
    version: int
    size_bytes: int
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cube:
    """One version of one cube with its header."""

    id: str
    state: str
    version: int
    text: str
    shape: str = "leaf"
    members: tuple[str, ...] = ()
    parents: tuple[Parent, ...] = ()
    kind: str | None = None
    origin: str | None = None
    role: str | None = None
    speaker: str | None = None
    user_id: str | None = None
    agent_id: str | None = None
    run_id: str | None = None
    tags: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    created_at: datetime | None = None
    event_time: datetime | None = None
    updated_at: datetime | None = None
    sources: tuple[Source, ...] = ()
    owner: str | None = None
    sensitivity: str | None = None
    priority: int = 0
    expires_at: datetime | None = None
    frozen: bool = False
    repeats: int = 1
    uses: int = 0
    last_used_at: datetime | None = None
    rate: float = 0.0
    residency: tuple[Residency, ...] = ()
    indexed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Migrated:
    """What a migration did. ``built_tokens`` of ``tokens`` were computed by it."""

    id: str
    tier: str
    version: int
    cubes: int
    tokens: int
    built_tokens: int
    size_bytes: int
    dropped_bytes: int
    engine: int | None = None
    residency: tuple[Residency, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Some cubes, newest first. ``next_cursor`` asks for the next page; None is the last one."""

    results: tuple[Cube, ...]
    next_cursor: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Deleted:
    """What was deleted."""

    id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """One entry of a cube's version chain."""

    version: int
    text: str
    members: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    created_at: datetime | None = None
    author: str | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """A cube's versions, in the server's order."""

    versions: tuple[Version, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """A block of text ready for a prompt, and the ids of the cubes in it."""

    context: str
    ids: tuple[str, ...]
    num_tokens: int
    budget: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """One edge of a lineage: ``child`` came from version ``version`` of ``id``."""

    id: str
    version: int
    relation: str
    child: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """What a cube came from, and what came from it."""

    ancestors: tuple[Edge, ...] = ()
    descendants: tuple[Edge, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """A key's record; the server doesn't know the secret itself any more."""

    id: str
    name: str
    role: str
    tenant: str | None = None
    hint: str | None = None
    created_at: datetime | None = None
    expires_at: datetime | None = None
    revoked_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NewKey:
    """A new key with its secret, which is shown this once only."""

    id: str
    key: str = field(repr=False)
    name: str | None = None
    role: str | None = None
    tenant: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Long work. ``state`` is queued, running, done, refused, failed or cancelled."""

    id: str
    kind: str
    state: str
    adapter: str | None = None
    progress: Mapping[str, Any] = field(default_factory=dict)
    result: Mapping[str, Any] | None = None
    error: str | None = None
    attempts: int = 0
    cancelling: bool = False
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None

    @property
    def has_ended(self) -> bool:
        return self.state not in ("queued", "running")


@dataclass(frozen=True, slots=True, kw_only=True)
class Jobs:
    """Some jobs, newest first. ``next`` is the ``before`` of older ones."""

    jobs: tuple[Job, ...]
    next: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLine:
    """A line of a job's log."""

    seq: int
    at: datetime
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """One version of an adapter. ``reason`` says why a retired one is so."""

    id: str
    name: str
    version: int
    state: str
    reason: str | None = None
    user_id: str | None = None
    agent_id: str | None = None
    run_id: str | None = None
    base: str
    sha256: str
    size_bytes: int
    rank: int
    created_at: datetime
    activated_at: datetime | None = None
    retired_at: datetime | None = None


def from_json(kind: type[T], data: Any) -> T:
    """A dataclass of parsed JSON. Unknown fields are ignored.

    Raises:
        Corrupt: a field without a default is missing, or a value doesn't fit.
    """
    if not isinstance(data, Mapping):
        raise Corrupt("the server's answer", f"expected an object for {kind.__name__}")
    values: dict[str, Any] = {}
    for name, (hint, required) in _shape(kind).items():
        value = data.get(name)
        if value is not None:
            values[name] = _value(hint, value, name)
        elif required:
            raise Corrupt("the server's answer", f"{kind.__name__} lacks {name!r}")
    return kind(**values)


def to_json(value: Any) -> Any:
    """Plain JSON values of a result; fields that hold nothing are left out."""
    if isinstance(value, datetime):
        return time_text(value)
    if is_dataclass(value) and not isinstance(value, type):
        pairs = ((f.name, getattr(value, f.name)) for f in fields(value))
        return {name: to_json(inner) for name, inner in pairs if inner is not None}
    if isinstance(value, Mapping):
        return {key: to_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(inner) for inner in value]
    return value


def time_text(time: datetime) -> str:
    """ISO 8601 in UTC.

    Raises:
        BadRequest: the time has no zone, so it could be any of several instants.
    """
    if time.tzinfo is None:
        raise BadRequest(f"{time.isoformat()} has no time zone; use an aware datetime", "time")
    return time.astimezone(UTC).isoformat().replace("+00:00", "Z")


@functools.cache
def _shape(kind: type) -> dict[str, tuple[Any, bool]]:
    hints = typing.get_type_hints(kind)
    return {
        f.name: (hints[f.name], f.default is MISSING and f.default_factory is MISSING)
        for f in fields(kind)
    }


def _value(hint: Any, value: Any, name: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        hint = next(arm for arm in typing.get_args(hint) if arm is not type(None))
        return _value(hint, value, name)
    if origin is tuple:
        if not isinstance(value, list):
            raise Corrupt("the server's answer", f"expected an array for {name!r}")
        return tuple(_value(typing.get_args(hint)[0], inner, name) for inner in value)
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise Corrupt("the server's answer", f"expected an object for {name!r}")
        return value
    if hint is datetime:
        try:
            return datetime.fromisoformat(value)
        except (TypeError, ValueError):
            raise Corrupt("the server's answer", f"{name!r} is no time: {value!r}") from None
    if isinstance(hint, type) and is_dataclass(hint):
        return from_json(hint, value)
    if hint is float and isinstance(value, int):
        return float(value)
    if hint in (str, int, float, bool) and not isinstance(value, hint):
        raise Corrupt("the server's answer", f"{name!r} is no {hint.__name__}: {value!r}")
    return value
