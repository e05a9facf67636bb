"""What the scheduler asks of the tiers: two-phase copies, drops, and what lies where."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from memcube.catalog.action_rows import ActionRecord
from memcube.ids import CubeId, TenantId
from memcube.scheduler.actions import Place


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A payload as a place has it. ``action`` is set for one that was reserved and not published, ``pinned_by``
    are the actions that hold it fast; ``sound``: its bytes passed their check."""

    tenant: TenantId
    cube: CubeId
    version: int
    epoch: int
    num_bytes: int
    since: float
    action: str | None = None
    pinned_by: tuple[str, ...] = ()
    sound: bool = True


class TierPort(Protocol):
    """All tiers, by their places. Every call is idempotent, and every one carries the epoch of the leader:
    who has heard of a later one refuses it (``StaleEpoch``).

    A call that raises ``Unavailable`` (or ``DeadlineExceeded``) may have been carried out. Waits have
    deadlines. A place that is known to be gone for good holds nothing: what frees something there returns.
    """

    async def prepare(self, move: ActionRecord, *, leader: int) -> None:
        """Reserve room at the target and hold the source fast, both in the action's name.

        Raises:
            StorageFull: the target has no room. NotFound: the source doesn't have it.
        """
        ...

    async def copy(self, move: ActionRecord, *, leader: int) -> str:
        """Bring the bytes into the reservation, or build them where there is no source; the SHA-256 that
        they should have. Nobody can read them at the target yet.

        With ``takes_over`` the source takes no more writes from some time before this returns, and what
        it took before is among the bytes.

        Raises:
            NotFound: there is no reservation, or the source lost it. Corrupt: the source fails its check.
        """
        ...

    async def verify(self, move: ActionRecord, *, leader: int) -> str:
        """The SHA-256 of what lies in the reservation, read back after it was made durable.

        Raises:
            NotFound: there is none.
        """
        ...

    async def publish(self, move: ActionRecord, *, leader: int) -> None:
        """Let the target's copy be read; with ``takes_over`` it takes the writes.

        Raises:
            NotFound: there is neither a reservation nor a published copy.
        """
        ...

    async def free(self, move: ActionRecord, *, leader: int) -> None:
        """Give the target's reservation back. What is published stays."""
        ...

    async def release(self, move: ActionRecord, *, leader: int, moved: bool) -> None:
        """Let the source go. Where it was sealed for a copy that takes over it takes writes again, unless
        they have ``moved``."""
        ...

    async def has(
        self, place: Place, tenant: TenantId, cube: CubeId, version: int, *, leader: int
    ) -> bool:
        """Whether a place can serve this payload now: it is published, and its bytes pass their check."""
        ...

    async def drop(self, drop: ActionRecord, *, leader: int) -> None:
        """Remove a payload from its place, if it is not newer than the drop: of an epoch above its own.

        When it returns, nothing of it is served there.
        """
        ...

    async def inventory(self, place: Place, *, leader: int) -> Sequence[Stored]:
        """All that lies at a place, reservations too."""
        ...

    async def sweep(self, place: Place, stored: Sequence[Stored], *, leader: int) -> int:
        """Remove payloads, reservations and holds as they were seen; those that changed since stay. How
        many were removed."""
        ...
