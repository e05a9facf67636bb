"""Bodies of requests and answers. Unknown fields are refused; every limit is stated in the schema."""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from memcube.cube import Kind, Origin, Sensitivity
from memcube.retrieval.ranker import Mode


def _clean(value: str) -> str:
    if "\x00" in value:
        raise ValueError("can't hold a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which is no character") from None
    return value


Text = Annotated[str, AfterValidator(_clean)]
Id = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_clean)]
Tag = Annotated[str, Field(min_length=1, max_length=128), AfterValidator(_clean)]
# One mistake is told, so one is looked for: a list of a million would give a million errors.
Tags = Annotated[list[Tag], Field(max_length=64, fail_fast=True)]
Ids = Annotated[list[Id], Field(fail_fast=True)]
CubeIds = Annotated[Ids, Field(max_length=1000)]
_ONE, _TWO = "01a20e3e-d04c-705b-a9c3-c4fffbea30a3", "01a20e3f-11d2-7c4e-8b1f-6d2f0a9e7c55"


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


def examples(*bodies: dict[str, Any]) -> ConfigDict:
    """The configuration of a body that is shown with these."""
    return ConfigDict(extra="forbid", json_schema_extra={"examples": list(bodies)})


class MessageBody(Body):
    """One turn of a conversation."""

    role: Id = Field(examples=["user"])
    content: Text = Field(examples=["I moved to Oslo in May."])
    name: Id | None = Field(None, description="Who speaks; kept with the memory.", examples=["Ann"])
    time: datetime | None = Field(None, description="When it was said; no zone means UTC.")
    id: Id | None = Field(None, description="Your own id of the message; comes back in `sources`.")


Messages = Annotated[list[MessageBody], Field(fail_fast=True)]


class ScopeBody(Body):
    """Whose memory it is. The tenant comes from the key."""

    user_id: Id | None = Field(None, examples=["ann"])
    agent_id: Id | None = None
    run_id: Id | None = None


class AddBody(ScopeBody):
    """Messages or a text to remember."""

    messages: Messages | None = None
    text: Text | None = None
    kind: Kind | None = Field(None, description="Default: episode for messages, fact for a text.")
    origin: Origin = Origin.USER_INPUT
    metadata: dict[str, Any] = Field(default_factory=dict)
    tags: Tags = Field(default_factory=list)
    sensitivity: Sensitivity = Sensitivity.NORMAL
    priority: int = Field(0, ge=-100, le=100)
    infer: bool = Field(False, description="Also extract facts by the configured model.")
    ttl_s: float | None = Field(None, gt=0, le=3.2e9, description="Forget after this many seconds.")
    expires_at: datetime | None = Field(None, description="Forget at this time.")


class AddOneBody(AddBody):
    wait: Literal["indexed", "stored"] = Field(
        "indexed", description="`indexed`: the next search finds it. `stored`: it is safe on disk."
    )

    model_config = examples(
        {
            "messages": [{"role": "user", "content": "I moved to Oslo.", "name": "Ann"}],
            "user_id": "ann",
        },
        {"text": "Ann prefers tea to coffee.", "user_id": "ann", "tags": ["taste"]},
    )


class BatchBody(Body):
    """Up to 1,000 adds, stored all or none. `infer` is for single adds."""

    items: Annotated[list[AddBody], Field(min_length=1, fail_fast=True)]
    wait: Literal["indexed", "stored"] = "indexed"

    model_config = examples(
        {
            "items": [
                {"text": "Ann prefers tea to coffee.", "user_id": "ann"},
                {"messages": [{"role": "user", "content": "Hello!"}], "user_id": "bob"},
            ]
        }
    )


class SearchBody(ScopeBody):
    """A query and where to look."""

    query: Annotated[Text, Field(min_length=1)] = Field(examples=["Where does Ann live?"])
    filters: dict[str, Any] | None = Field(
        None,
        description="and / or / not over fields and `metadata.KEY` with eq ne gt gte lt lte in nin "
        "contains; evaluated inside the index.",
        examples=[{"tags": {"contains": "taste"}, "created_at": {"gte": "2026-01-01T00:00:00Z"}}],
    )
    cube_ids: CubeIds = Field(
        default_factory=list, description="Only these cubes and the members of composites."
    )
    top_k: int = Field(10, ge=1)
    threshold: float | None = Field(
        None, allow_inf_nan=False, description="Leave out hits that score below."
    )
    mode: Mode = Mode.HYBRID
    explain: bool = False

    model_config = examples(
        {"query": "Where does Ann live?", "user_id": "ann"},
        {
            "query": "tea",
            "filters": {"or": [{"tags": {"contains": "taste"}}, {"metadata.page": {"gt": 3}}]},
            "top_k": 5,
            "mode": "sparse",
            "explain": True,
        },
    )


class ContextBody(ScopeBody):
    """What the prompt is about, as a query or as the messages so far."""

    query: Annotated[Text, Field(min_length=1)] | None = Field(
        None, examples=["Where does Ann live?"]
    )
    messages: Messages | None = None
    filters: dict[str, Any] | None = None
    cube_ids: CubeIds = Field(default_factory=list)
    token_budget: int = Field(1024, ge=64)
    top_k: int | None = Field(None, ge=1)

    model_config = examples(
        {"query": "Where does Ann live?", "user_id": "ann", "token_budget": 512},
        {"messages": [{"role": "user", "content": "What should I cook for Ann?"}]},
    )


class UpdateBody(Body):
    """What to change; what is left out stays."""

    text: Annotated[Text, Field(min_length=1)] | None = None
    metadata: dict[str, Any] | None = None
    tags: Tags | None = None
    expires_at: datetime | None = Field(None, description="null takes the expiry away.")
    expected_version: int | None = Field(None, ge=1)

    model_config = examples(
        {"text": "Ann prefers coffee to tea.", "expected_version": 1},
        {"tags": ["taste"], "expires_at": None},
    )


class CompositeBody(ScopeBody):
    """A cube that holds others."""

    members: Ids = Field(default_factory=list)
    title: Text | None = Field(None, description="Short for `metadata.title`.")
    text: Text = ""
    kind: Kind | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)
    tags: Tags = Field(default_factory=list)

    model_config = examples(
        {"title": "Ann's profile", "members": [_ONE, _TWO], "user_id": "ann"},
    )


class MembersBody(Body):
    """The members, in their order."""

    members: Ids

    model_config = examples({"members": [_TWO, _ONE]})


class ComposeBody(ScopeBody):
    """Cubes to hold together; the composite's lineage names them."""

    ids: Annotated[Ids, Field(min_length=1)]
    title: Text | None = None

    model_config = examples({"ids": [_ONE, _TWO], "title": "What Ann drinks"})


class FuseBody(Body):
    """Cubes to make one of; they become `merged`."""

    ids: Annotated[Ids, Field(min_length=2, max_length=100)]
    text: Annotated[Text, Field(min_length=1)] | None = Field(
        None, description="Default: the cubes' texts, each once, a line each."
    )

    model_config = examples({"ids": [_ONE, _TWO], "text": "Ann drinks tea, and coffee at work."})


class MigrateBody(Body):
    """Where the cube's payloads are to be."""

    tier: Literal["activation", "plaintext"]
    adapter: Id | None = Field(None, description="The name or id of one that serves.")
    node: Id | None = Field(
        None, description="A node's name, or one of its labels: the KV is built there."
    )

    model_config = examples({"tier": "activation"}, {"tier": "plaintext"})


class RollbackBody(Body):
    """The version to go back to."""

    version: int = Field(ge=1)

    model_config = examples({"version": 1})


class KeyBody(Body):
    """A new API key. Another tenant than one's own is for operators."""

    name: Id = Field(examples=["ci"])
    role: Literal["reader", "writer", "admin", "operator"] = "writer"
    tenant: Id | None = None
    expires_at: datetime | None = None

    model_config = examples({"name": "ci", "role": "reader"})


class SourceOut(BaseModel):
    ref: str | None
    role: str | None
    speaker: str | None
    time: datetime | None
    text: str | None


class ParentOut(BaseModel):
    id: str
    version: int
    relation: str


class ResidencyOut(BaseModel):
    tier: str
    medium: str
    location: str
    version: int
    size_bytes: int
    epoch: int


class CubeOut(BaseModel):
    """A MemCube: content, descriptive and governance header, usage."""

    id: str
    shape: str
    state: str
    version: int
    text: str
    members: list[str]
    parents: list[ParentOut]
    kind: str
    origin: str
    role: str | None
    speaker: str | None
    user_id: str | None
    agent_id: str | None
    run_id: str | None
    tags: list[str]
    metadata: dict[str, Any]
    created_at: datetime
    event_time: datetime | None
    updated_at: datetime
    sources: list[SourceOut]
    owner: str
    sensitivity: str
    priority: int
    expires_at: datetime | None
    frozen: bool
    repeats: int
    uses: int
    last_used_at: datetime | None
    rate: float
    indexed: bool
    residency: list[ResidencyOut] | None = None


class MigratedOut(BaseModel):
    """What a migration did."""

    id: str
    tier: Literal["activation", "plaintext"]
    version: int
    cubes: int = Field(description="Cubes whose text it is about: itself, or its members.")
    tokens: int = Field(description="Of the KV that was built or lay there already.")
    built_tokens: int = Field(description="Of these, computed by this call.")
    size_bytes: int = Field(description="Of the KV that holds it now, in all media.")
    dropped_bytes: int
    engine: int | None
    residency: list[ResidencyOut]


class AddedOut(BaseModel):
    id: str
    event: Literal["added", "repeated"]
    version: int
    text: str
    indexed: bool


class AddOut(BaseModel):
    results: list[AddedOut]
    fallback: str | None = Field(None, description="Why `infer` ended verbatim, if it did.")


class BatchOut(BaseModel):
    results: list[AddOut]


class HitOut(BaseModel):
    id: str
    text: str
    score: float
    kind: str
    role: str | None
    speaker: str | None
    user_id: str | None
    agent_id: str | None
    run_id: str | None
    tags: list[str]
    metadata: dict[str, Any]
    created_at: datetime
    event_time: datetime | None
    version: int
    explain: dict[str, float] | None = None


class TookOut(BaseModel):
    search: float
    total: float


class SearchOut(BaseModel):
    results: list[HitOut]
    took_ms: TookOut


class ContextOut(BaseModel):
    context: str
    ids: list[str]
    num_tokens: int
    budget: int


class PageOut(BaseModel):
    results: list[CubeOut]
    next_cursor: str | None


class VersionOut(BaseModel):
    version: int
    text: str
    members: list[str]
    metadata: dict[str, Any]
    tags: list[str]
    created_at: datetime
    author: str
    reason: str


class VersionsOut(BaseModel):
    versions: list[VersionOut]


class EdgeOut(BaseModel):
    id: str
    version: int
    relation: str
    child: str


class LineageOut(BaseModel):
    ancestors: list[EdgeOut]
    descendants: list[EdgeOut]


class DeletedOut(BaseModel):
    id: str
    deleted: Literal[True] = True


class DeletedManyOut(BaseModel):
    deleted: int


class KeyOut(BaseModel):
    id: str
    tenant: str
    name: str
    role: str
    hint: str
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    key: str | None = Field(None, description="The secret, told this once.")


class KeysOut(BaseModel):
    keys: list[KeyOut]


class ShardOut(BaseModel):
    """A shard as it says itself. Of one that does not answer only why is known (`error`): its node may be down,
    and another takes it over."""

    shard: int
    epoch: int | None
    index: str | None
    location: str | None
    node: str | None
    error: str | None


class EmbedderOut(BaseModel):
    identity: str
    dim: int
    waiting: int
    texts: int
    batches: int


class SchedulerOut(BaseModel):
    epoch: int | None = Field(description="Of its lease; null while it does not lead.")
    rounds: int
    failures: int
    last: dict[str, Any] = Field(description="What the last round did.")
    error: str | None = Field(description="Why nothing is heard of it; null where it answers.")


class StatusOut(BaseModel):
    version: str
    tenant: str
    role: str
    cubes: dict[str, int] = Field(description="The tenant's cubes, by state.")
    pending_index: int
    pending_removal: int
    shards: list[ShardOut]
    embedder: EmbedderOut
    scheduler: SchedulerOut


class ProblemOut(BaseModel):
    """RFC 9457. `code` is stable; `detail` says what was wrong and what to do."""

    type: str
    title: str
    status: int
    code: str
    detail: str
    field: str | None = None
    limit: int | None = None
    request_id: str
