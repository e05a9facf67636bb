"""The policies that are built. A new one is a class with a name and a ``plan``."""

from collections.abc import Callable

from memcube.scheduler.policies.balance import Balance
from memcube.scheduler.policies.consolidation import Consolidation
from memcube.scheduler.policies.contract import Policy
from memcube.scheduler.policies.eviction import Eviction
from memcube.scheduler.policies.expiry import Expiry
from memcube.scheduler.policies.promotion import Promotion
from memcube.scheduler.policies.reindex import Reindexing
from memcube.scheduler.policies.spread import Spread

BUILT: dict[str, Callable[[], Policy]] = {
    "expiry": Expiry,
    "spread": Spread,
    "reindex": Reindexing,
    "eviction": Eviction,
    "promotion": Promotion,
    "balance": Balance,
    "consolidation": Consolidation,
}

__all__ = ["BUILT", "Policy"]
