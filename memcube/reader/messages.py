"""What a caller gives to remember."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from memcube.cube import Kind, Origin, Sensitivity


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn. ``id`` is the caller's own id of it."""

    role: str
    content: str
    name: str | None = None
    time: datetime | None = None
    id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The header that all cubes of one request get."""

    user_id: str | None = None
    agent_id: str | None = None
    run_id: str | None = None
    kind: Kind | None = None
    origin: Origin = Origin.USER_INPUT
    tags: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    sensitivity: Sensitivity = Sensitivity.NORMAL
    priority: int = 0
    expires_at: datetime | None = None
