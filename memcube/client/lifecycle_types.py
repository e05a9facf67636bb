"""What the calls of the lifecycle give: snapshots, comparisons, rollbacks, proposals, diagnoses."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from memcube.client.types import Cube, Version


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A name for a scope as it was ``at`` a time."""

    id: str
    name: str
    at: datetime
    user_id: str | None = None
    agent_id: str | None = None
    run_id: str | None = None
    created_at: datetime | None = None
    author: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshots:
    """The latest time first."""

    snapshots: tuple[Snapshot, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One memory between two times. ``change``: added, changed, moved or deleted. Of a deleted one only
    the id is left; an added one has no ``before``; a moved one left the search or came back."""

    id: str
    change: str
    before: Version | None = None
    after: Version | None = None
    state_before: str | None = None
    state_after: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Differences in the order of the ids; ``next_cursor`` asks for the next page."""

    since: datetime
    until: datetime
    results: tuple[Difference, ...]
    next_cursor: str | None = None

    def __iter__(self) -> Iterator[Difference]:
        return iter(self.results)


@dataclass(frozen=True, slots=True, kw_only=True)
class AtVersion:
    """A memory at a version."""

    id: str
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Forgotten:
    """A memory that is gone for good, and since when."""

    id: str
    at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class RolledBack:
    """What a rollback of a scope did. ``out_of_search`` are memories that were added since then, now
    archived, and those that were merged or archived at that time."""

    to: datetime
    changed: tuple[AtVersion, ...]
    out_of_search: tuple[AtVersion, ...]
    cannot_restore: tuple[Forgotten, ...]
    pending: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposed:
    """A memory of a proposal; without ``text`` where it has changed since."""

    id: str
    version: int
    text: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """Memories that could be one. ``kind``: duplicate or contradiction; ``state``: open, applied,
    dismissed or outdated."""

    id: str
    kind: str
    state: str
    cubes: tuple[Proposed, ...]
    text: str
    why: Mapping[str, Any] = field(default_factory=dict)
    created_at: datetime | None = None
    decided_at: datetime | None = None
    decided_by: str | None = None
    result: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposals:
    """Newest first; ``next_cursor`` asks for the next page."""

    proposals: tuple[Proposal, ...]
    next_cursor: str | None = None

    def __iter__(self) -> Iterator[Proposal]:
        return iter(self.proposals)


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """An applied proposal and the memory it made."""

    proposal: Proposal
    cube: Cube


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One sort of thing that is wrong, how often, and some of it."""

    check: str
    kind: str
    count: int
    repaired: int
    advice: str = ""
    examples: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What the doctor found. While there is a ``next_cursor`` there is more of the archive to read."""

    sound: bool
    looked_at: Mapping[str, int]
    findings: tuple[Finding, ...] = ()
    next_cursor: str | None = None
