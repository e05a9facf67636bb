"""What the scheduler may do to a payload: copy it, commit the copy, drop it. There is no move.

An action is planned against a cube's *epoch*, and to commit it takes that epoch: the catalog then counts
one more, so that of all actions planned at one epoch at most one ever takes effect, and a repeat of it
changes nothing. Every change of a cube's content, and of a member's, counts one more too: what was
planned before is refused then.

The unit is a cube, or with ``cube`` None all that a tenant has in the tier (a plaintext shard moves as one).
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from memcube.ids import CubeId, TenantId


class Tier(StrEnum):
    """The form of a payload."""

    PLAINTEXT = "plaintext"
    ACTIVATION = "activation"
    PARAMETRIC = "parametric"


class Medium(StrEnum):
    """What holds it, the nearest to compute first."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"
    OBJECT = "object"


class Place(NamedTuple):
    """Where payloads may lie. ``location`` names a node, or a part of one (``node/engine-0``)."""

    tier: Tier
    medium: Medium
    location: str

    @property
    def node(self) -> str:
        return self.location.partition("/")[0]

    def __str__(self) -> str:
        return f"{self.location}:{self.tier}/{self.medium}"


_SHARD = "shard-"


def shard_location(shard: int) -> str:
    """The location of what lies in a shard of the plaintext tier, wherever it runs."""
    return f"{_SHARD}{shard}"


def shard_place(shard: int) -> Place:
    return Place(Tier.PLAINTEXT, Medium.DISK, shard_location(shard))


def shard_at(location: str) -> int | None:
    """The number of a shard by its location; None where that is something else."""
    number = location.removeprefix(_SHARD)
    return int(number) if number != location and number.isdecimal() else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """Make a copy of a payload at ``target``; with no ``source`` build it of what the catalog holds.

    The target reserves the room, the source is held fast, the bytes go over and are read back. Nobody
    sees the copy before its commit (``ActionBook.commit``). A crash before this action leaves nothing;
    one after it leaves a reservation, which the journal knows and the next leader frees (or finishes).
    Done twice it is the same reservation.

    ``takes_over``: the commit makes the target the owner, so the source takes no more writes from the
    time on that the last bytes go over. ``urgent``: a request waits for it.
    """

    tenant: TenantId
    cube: CubeId | None
    version: int
    epoch: int
    source: Place | None
    target: Place
    num_bytes: int
    takes_over: bool = False
    urgent: bool = False
    policy: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """Take a payload away from a place, in a later round than the copy that replaces it.

    First another copy is read where this is one that a search needs, then one conditional transaction
    strikes it from the catalog (never the last copy) and takes the epoch, then another copy is read once more
    (if none is left it is listed again, ``ActionBook.restore``), then the bytes go. A crash before
    the transaction leaves all as it was; one after it leaves bytes that nothing lists, which the next
    leader removes or lists again. A late repeat removes nothing newer: it goes by the epoch.
    """

    tenant: TenantId
    cube: CubeId | None
    version: int
    epoch: int
    place: Place
    num_bytes: int
    urgent: bool = False
    policy: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Consolidate:
    """Propose that the cubes of a scope be trained into an adapter. ``scope`` names it within its tenant.

    A task of the queue, written with its journal entry in one transaction; so are the actions below. A
    crash leaves both or none, and a repeat finds the task.
    """

    tenant: TenantId
    scope: str
    cubes: tuple[CubeId, ...]
    epoch: int
    policy: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reindex:
    """Bring the plaintext index to a cube's present version."""

    tenant: TenantId
    cube: CubeId
    version: int
    epoch: int
    policy: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expire:
    """Wipe a cube whose time is over, a frozen one too."""

    tenant: TenantId
    cube: CubeId
    epoch: int
    policy: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Archive:
    """Take a cube that nobody uses out of search."""

    tenant: TenantId
    cube: CubeId
    epoch: int
    policy: str = ""
    reason: str = ""


PayloadAction = Copy | Drop
ControlAction = Consolidate | Reindex | Expire | Archive
Action = PayloadAction | ControlAction


class ActionKind(StrEnum):
    """An action's name in the journal."""

    COPY = "copy"
    DROP = "drop"
    CONSOLIDATE = "consolidate"
    REINDEX = "reindex"
    EXPIRE = "expire"
    ARCHIVE = "archive"


_KINDS: dict[type, ActionKind] = {
    Copy: ActionKind.COPY,
    Drop: ActionKind.DROP,
    Consolidate: ActionKind.CONSOLIDATE,
    Reindex: ActionKind.REINDEX,
    Expire: ActionKind.EXPIRE,
    Archive: ActionKind.ARCHIVE,
}


def kind_of(action: Action) -> ActionKind:
    return _KINDS[type(action)]


def is_move(action: Action) -> bool:
    """Whether it moves bytes, rather than being work for the queue."""
    return isinstance(action, Copy | Drop)


class ActionState(StrEnum):
    """planned → prepared → committed → done; until it is committed also → undone, or → failed.

    A copy is *prepared* when its bytes were verified at the target. A drop goes from planned to committed.
    Of one that is undone or has failed nothing is left: the world moved on before it could commit, or it
    was tried as often as it may be.
    """

    PLANNED = "planned"
    PREPARED = "prepared"
    COMMITTED = "committed"
    DONE = "done"
    UNDONE = "undone"
    FAILED = "failed"


OPEN: frozenset[ActionState] = frozenset(
    {ActionState.PLANNED, ActionState.PREPARED, ActionState.COMMITTED}
)
"""States of actions that are under way: of one cube there is one such at most."""
