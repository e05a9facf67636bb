"""The MemCube: content plus a header, in versions.

A *leaf* has text; a *composite* has an ordered list of members. Times are aware UTC datetimes.
Nothing here looks up the clock or makes an id: both are arguments.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

from memcube.ids import CubeId, TenantId, digest, digest64
from memcube.lifecycle import State


class Kind(StrEnum):
    """What sort of memory a cube is."""

    FACT = "fact"
    PREFERENCE = "preference"
    EPISODE = "episode"
    PROCEDURE = "procedure"
    DOCUMENT = "document"


class Origin(StrEnum):
    """How the content came to be."""

    USER_INPUT = "user_input"
    INFERENCE = "inference"
    RETRIEVAL = "retrieval"
    IMPORT = "import"
    FINE_TUNING = "fine_tuning"


class Shape(StrEnum):
    """Leaf (has text) or composite (has members)."""

    LEAF = "leaf"
    COMPOSITE = "composite"


class Sensitivity(StrEnum):
    """How far a cube may travel between the forms; only ``normal`` and below may enter weights."""

    PUBLIC = "public"
    NORMAL = "normal"
    SECRET = "secret"


class Relation(StrEnum):
    """How a child cube came from its parent."""

    DERIVED = "derived"
    FUSED = "fused"
    COMPOSED = "composed"
    SPLIT = "split"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """Whose memory it is. ``tenant`` comes from the key, never from a body."""

    tenant: TenantId
    user_id: str | None = None
    agent_id: str | None = None
    run_id: str | None = None

    @property
    def thread(self) -> str:
        """Key of the message stream of this scope: neighbours in it are neighbouring turns."""
        return digest("thread", self.tenant, self.user_id, self.agent_id, self.run_id)


def slot(thread: str, seq: int) -> int:
    """The place of a turn in its thread as one integer that the index can look up."""
    return digest64("slot", thread, seq)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One message, or part of it, that a cube's content came from.

    ``ref`` is the caller's own id of the message (LoCoMo: the ``dia_id``), if it has one.
    """

    ref: str | None = None
    role: str | None = None
    speaker: str | None = None
    time: datetime | None = None
    text: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Descriptive:
    """What the content is and where it came from."""

    kind: Kind = Kind.EPISODE
    origin: Origin = Origin.USER_INPUT
    user_id: str | None = None
    agent_id: str | None = None
    run_id: str | None = None
    role: str | None = None
    speaker: str | None = None
    tags: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    created_at: datetime
    event_time: datetime | None = None
    thread: str | None = None
    seq: int | None = None
    sources: tuple[Source, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Governance:
    """Who owns a cube and what may be done with it."""

    owner: str
    sensitivity: Sensitivity = Sensitivity.NORMAL
    priority: int = 0
    expires_at: datetime | None = None
    frozen: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """How a cube is used. ``rate`` is uses per day, decayed with a half-life of seven days."""

    repeats: int = 1
    uses: int = 0
    last_used_at: datetime | None = None
    rate: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Parent:
    """One edge of the lineage: this cube came from that version of that cube."""

    id: CubeId
    version: int
    relation: Relation


@dataclass(frozen=True, slots=True, kw_only=True)
class MemCube:
    """One version of one cube, with its header."""

    id: CubeId
    tenant: TenantId
    shape: Shape
    state: State
    version: int
    text: str
    members: tuple[CubeId, ...] = ()
    parents: tuple[Parent, ...] = ()
    descriptive: Descriptive
    governance: Governance
    usage: Usage = Usage()
    updated_at: datetime
    indexed: bool = False
    """Whether the plaintext index holds this very version."""

    @property
    def scope(self) -> Scope:
        d = self.descriptive
        return Scope(tenant=self.tenant, user_id=d.user_id, agent_id=d.agent_id, run_id=d.run_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A cube that is to be: what the reader makes and the catalog stores.

    ``threaded`` drafts take the next places in their scope's thread, in order; bare facts have none.
    """

    text: str
    shape: Shape = Shape.LEAF
    members: tuple[CubeId, ...] = ()
    parents: tuple[Parent, ...] = ()
    user_id: str | None = None
    agent_id: str | None = None
    run_id: str | None = None
    kind: Kind = Kind.EPISODE
    origin: Origin = Origin.USER_INPUT
    role: str | None = None
    speaker: str | None = None
    tags: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    event_time: datetime | None = None
    sources: tuple[Source, ...] = ()
    threaded: bool = False
    sensitivity: Sensitivity = Sensitivity.NORMAL
    priority: int = 0
    expires_at: datetime | None = None

    def scope(self, tenant: TenantId) -> Scope:
        return Scope(
            tenant=tenant, user_id=self.user_id, agent_id=self.agent_id, run_id=self.run_id
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """One entry of a cube's version chain."""

    version: int
    text: str
    members: tuple[CubeId, ...] = ()
    metadata: Mapping[str, Any]
    tags: tuple[str, ...]
    created_at: datetime
    author: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Residency:
    """Which payload, of which version, lies where, of how many bytes, under which epoch."""

    tier: str
    medium: str
    location: str
    version: int
    size_bytes: int
    epoch: int
    updated_at: datetime


def content_hash(
    scope: Scope, *, kind: str, role: str | None, speaker: str | None, text: str
) -> str:
    """Equal exactly for repeats: same scope, same speaker, same text up to outer white space."""
    return digest(
        "content",
        scope.tenant,
        scope.user_id,
        scope.agent_id,
        scope.run_id,
        kind,
        role,
        speaker,
        " ".join(text.split()),
    )
