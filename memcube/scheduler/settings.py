"""How a tenant's cubes are tiered: which policies and strategies, by which thresholds.

A tenant has a profile; tenants without one of their own have the default. A name that is not built is
refused when the planner is made, not when a plan would need it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from memcube.cube import Kind
from memcube.errors import BadRequest, UnknownBackend
from memcube.ids import TenantId

DAY_S = 86_400.0
ABSTRACT = frozenset({Kind.FACT, Kind.PREFERENCE, Kind.PROCEDURE})
POLICIES = (
    "expiry",
    "spread",
    "reindex",
    "eviction",
    "promotion",
    "balance",
    "consolidation",
)
"""In the order in which they are asked: what must be, before what would be good."""
STRATEGIES = ("frequency", "cost", "lru", "similarity", "labels")


def _known(kind: str, names: Iterable[str], built: tuple[str, ...]) -> None:
    for name in names:
        if name not in built:
            raise UnknownBackend(kind, name, built)


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """What KV saves: seconds to read ``n`` tokens anew, ``a·n + b·n²``."""

    prefill_s_per_token: float = 4e-4
    prefill_s_per_token2: float = 5e-8

    def __post_init__(self) -> None:
        if self.prefill_s_per_token <= 0 or self.prefill_s_per_token2 < 0:
            raise BadRequest("must be above 0", "cost")


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Thresholds and the weights of strategies. Scores run from 0 to 1; ``promote_score`` lets a cube
    into the activation tier, and below ``demote_score`` it leaves. The gap between them, ``settle_s`` after
    each move, and the ``margin`` by which a newcomer must be worth more than what it would displace keep
    cubes from going to and fro."""

    policies: tuple[str, ...] = POLICIES
    strategies: Mapping[str, float] = field(default_factory=lambda: {"cost": 1.0})
    wanted_labels: frozenset[str] = frozenset()
    promote_score: float = 0.5
    demote_score: float = 0.25
    margin: float = 0.2
    stable_s: float = 3_600.0
    settle_s: float = 900.0
    rate: float = 2.0
    """Uses a day from which on a cube counts as frequent: the score 0.5 of ``frequency``."""
    recency_s: float = DAY_S
    lasting_s: float = 14 * DAY_S
    lasting_rate: float = 0.2
    abstract: frozenset[Kind] = ABSTRACT
    min_cubes: int = 20
    """So many cubes of a scope make a proposal to consolidate."""
    propose_every_s: float = 7 * DAY_S
    archive_after_s: float | None = None
    replicas: int = 1
    heal_after_s: float = 60.0
    """A node that has been down so long counts as lost: its payloads are made anew elsewhere."""
    balance_gap: float = 0.25
    """So much fuller than the emptiest may a place be before cubes are moved."""
    reindex_after_s: float = 10.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.demote_score < self.promote_score <= 1.0:
            raise BadRequest(
                "demote_score must lie below promote_score, both from 0 to 1", "profile"
            )
        if not self.strategies or min(self.strategies.values()) <= 0:
            raise BadRequest("needs a strategy, and weights above 0", "profile.strategies")
        for name in ("replicas", "min_cubes"):
            if getattr(self, name) < 1:
                raise BadRequest("must be 1 or more", f"profile.{name}")
        for name in ("rate", "recency_s", "propose_every_s"):
            if getattr(self, name) <= 0:
                raise BadRequest("must be above 0", f"profile.{name}")
        for name in ("margin", "stable_s", "settle_s", "lasting_s", "lasting_rate", "heal_after_s"):
            if getattr(self, name) < 0:
                raise BadRequest("must not be below 0", f"profile.{name}")
        _known("policy", self.policies, POLICIES)
        _known("strategy", self.strategies, STRATEGIES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Profiles:
    """The default profile, and those of tenants."""

    default: Profile = Profile()
    tenants: Mapping[TenantId, Profile] = field(default_factory=dict)

    def of(self, tenant: TenantId) -> Profile:
        return self.tenants.get(tenant, self.default)


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveLimits:
    """Bounds of one round's plan, and of what is under way at once. A tenant gets at most
    ``tenant_fraction`` of a round while others wait."""

    max_actions: int = 2_000
    max_bytes: int = 64 << 30
    tenant_fraction: float = 0.5
    max_moves: int = 8
    max_moves_per_node: int = 4
    bytes_per_s: float = 256e6
    burst_bytes: int = 512 << 20

    def __post_init__(self) -> None:
        if not 0.0 < self.tenant_fraction <= 1.0:
            raise BadRequest("lies above 0 and is 1 at most", "limits.tenant_fraction")
        for name in ("max_actions", "max_bytes", "max_moves", "max_moves_per_node", "burst_bytes"):
            if getattr(self, name) < 1:
                raise BadRequest("must be 1 or more", f"limits.{name}")
        if self.bytes_per_s <= 0:
            raise BadRequest("must be above 0", "limits.bytes_per_s")
