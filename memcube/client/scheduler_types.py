"""What the scheduler's calls answer."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """Where a payload lies, came from or goes."""

    tier: str
    medium: str
    location: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """An action of the journal (``type`` action), something that happened to the cluster (cluster: a node, a shard,
    the lead; it has no ``tenant``), or a task of the queue (task). ``outcome`` says why it ended so."""

    id: str
    type: str
    kind: str
    state: str
    ended: bool
    tenant: str | None = None
    node: str | None = None
    cube: str | None = None
    version: int | None = None
    policy: str | None = None
    reason: str = ""
    outcome: str = ""
    source: Where | None = None
    target: Where | None = None
    num_bytes: int = 0
    attempts: int = 0
    cubes: tuple[str, ...] | None = None
    result: Mapping[str, Any] | None = None
    created_at: datetime
    updated_at: datetime
    ended_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Events:
    """Some events, newest first. ``next`` is the ``before`` of older ones."""

    events: tuple[Event, ...]
    next: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What would be done now (or, where it was no dry run, what a ``round`` did). Counts are of all, the lists
    of the first."""

    dry_run: bool
    num_actions: int
    num_refused: int
    planned: Mapping[str, Any]
    refused: tuple[Mapping[str, Any], ...] = ()
    actions: tuple[Mapping[str, Any], ...] = ()
    refusals: tuple[Mapping[str, Any], ...] = ()
    round: Mapping[str, Any] | None = None
