"""Actions of the scheduler as rows of the journal, and rows as records."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from memcube.catalog.schema import micros, moment, moment_or_none
from memcube.ids import CubeId, TenantId
from memcube.scheduler.actions import (
    OPEN,
    Action,
    ActionKind,
    ActionState,
    Consolidate,
    Copy,
    Drop,
    Medium,
    Place,
    Tier,
    kind_of,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionRecord:
    """An action in the journal. ``outcome`` says why it ended as it did, or why it was put off."""

    id: str
    tenant: TenantId
    cube: CubeId | None
    action: ActionKind
    state: ActionState
    version: int
    epoch: int
    source: Place | None
    target: Place | None
    takes_over: bool
    urgent: bool
    num_bytes: int
    checksum: str | None
    policy: str
    reason: str
    outcome: str
    attempts: int
    next_at: datetime
    leader: int
    created_at: datetime
    updated_at: datetime
    closed_at: datetime | None

    @property
    def is_open(self) -> bool:
        return self.state in OPEN


def row_of_action(action: Action, *, id: str, leader: int, now: datetime) -> dict[str, Any]:
    source = target = None
    if isinstance(action, Copy):
        source, target = action.source, action.target
    elif isinstance(action, Drop):
        source = action.place
    where = target or source
    return {
        "id": id,
        "tenant": action.tenant,
        "cube": "" if isinstance(action, Consolidate) else action.cube or "",
        "action": kind_of(action),
        "state": ActionState.PLANNED,
        "version": getattr(action, "version", 0),
        "epoch": action.epoch,
        "tier": Tier.PLAINTEXT if where is None else where.tier,
        "from_medium": None if source is None else source.medium,
        "from_location": None if source is None else source.location,
        "to_medium": None if target is None else target.medium,
        "to_location": None if target is None else target.location,
        "takes_over": isinstance(action, Copy) and action.takes_over,
        "urgent": isinstance(action, Copy | Drop) and action.urgent,
        "num_bytes": getattr(action, "num_bytes", 0),
        "checksum": None,
        "policy": action.policy,
        "reason": action.reason,
        "outcome": "",
        "attempts": 0,
        "next_at": micros(now),
        "leader": leader,
        "created_at": micros(now),
        "updated_at": micros(now),
        "closed_at": None,
    }


def record_of(row: Mapping[Any, Any]) -> ActionRecord:
    def place(end: str) -> Place | None:
        if row[f"{end}_location"] is None:
            return None
        return Place(Tier(row["tier"]), Medium(row[f"{end}_medium"]), row[f"{end}_location"])

    return ActionRecord(
        **{name: row[name] for name in _AS_THEY_ARE},
        tenant=TenantId(row["tenant"]),
        cube=CubeId(row["cube"]) if row["cube"] else None,
        action=ActionKind(row["action"]),
        state=ActionState(row["state"]),
        source=place("from"),
        target=place("to"),
        next_at=moment(row["next_at"]),
        created_at=moment(row["created_at"]),
        updated_at=moment(row["updated_at"]),
        closed_at=moment_or_none(row["closed_at"]),
    )


_AS_THEY_ARE = (
    "id",
    "version",
    "epoch",
    "takes_over",
    "urgent",
    "num_bytes",
    "checksum",
    "policy",
    "reason",
    "outcome",
    "attempts",
    "leader",
)
