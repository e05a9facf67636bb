"""Which cubes go into an adapter: those that are named, all of a scope, or the stable and used of it.

Pure: cubes and a time in, a choice with its reasons out.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, NamedTuple

from memcube.catalog.adapters import WRITTEN_BY
from memcube.cube import MemCube, Sensitivity, Shape
from memcube.errors import BadRequest
from memcube.ids import CubeId
from memcube.lifecycle import SEARCHABLE


class Left(StrEnum):
    """Why a cube was not chosen."""

    SECRET = "secret"
    EXPIRES = "expires"
    SESSION = "of one session"
    STATE = "not searchable"
    NO_TEXT = "no text"
    OF_AN_ADAPTER = "said by an adapter"
    YOUNG = "changed lately"
    UNUSED = "not used enough"
    OVER_LIMIT = "over the limit of cubes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What is asked for. ``cubes`` names them one by one; else all of the scope with this kind and tag.

    ``stable_days`` is for how long a cube has not changed, ``min_uses`` how often it was used. ``limit``
    is the most cubes; those used most come first.
    """

    cubes: tuple[str, ...] = ()
    user_id: str | None = None
    agent_id: str | None = None
    run_id: str | None = None
    kind: str | None = None
    tag: str | None = None
    stable_days: float = 0.0
    min_uses: int = 0
    limit: int = 500

    def __post_init__(self) -> None:
        if self.limit < 1 or self.stable_days < 0 or self.min_uses < 0:
            raise BadRequest("limit is at least 1, the others not below 0", "choice")

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "cubes": list(self.cubes)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Choice":
        return cls(**{**data, "cubes": tuple(data.get("cubes", ()))})


class Chosen(NamedTuple):
    """The cubes that go in, and how many were left for which reason."""

    cubes: list[MemCube]
    left: dict[Left, int]

    @property
    def versions(self) -> dict[CubeId, int]:
        return {cube.id: cube.version for cube in self.cubes}


def choose(cubes: Iterable[MemCube], choice: Choice, *, now: datetime) -> Chosen:
    """Those that may go into weights and are wanted there.

    A secret never goes in, nor what expires: it would have to be unlearned at a known time; nor what an
    adapter was heard to say, which would be its own teacher. What is of one session goes in only where the choice names the session, or the cube.
    """
    left: dict[Left, int] = {}
    found: list[MemCube] = []
    for cube in cubes:
        if (why := _why_left(cube, choice, now)) is None:
            found.append(cube)
        else:
            left[why] = left.get(why, 0) + 1
    found.sort(key=lambda cube: (-cube.usage.rate, -cube.usage.uses, cube.id))
    if len(found) > choice.limit:
        left[Left.OVER_LIMIT] = len(found) - choice.limit
    return Chosen(found[: choice.limit], left)


def _why_left(cube: MemCube, choice: Choice, now: datetime) -> Left | None:
    is_named = cube.id in choice.cubes
    if WRITTEN_BY in cube.descriptive.metadata:
        return Left.OF_AN_ADAPTER
    if cube.governance.sensitivity is Sensitivity.SECRET:
        return Left.SECRET
    if cube.governance.expires_at is not None:
        return Left.EXPIRES
    if cube.state not in SEARCHABLE:
        return Left.STATE
    if cube.shape is not Shape.LEAF or not cube.text.strip():
        return Left.NO_TEXT
    if is_named:
        return None
    if cube.descriptive.run_id is not None and choice.run_id is None:
        return Left.SESSION
    if cube.updated_at > now - timedelta(days=choice.stable_days):
        return Left.YOUNG
    if cube.usage.uses < choice.min_uses:
        return Left.UNUSED
    return None
