"""The world as one round of planning sees it, with what the plan has taken up so far.

Of one cube a plan has one action at most, since each needs the cube's epoch. So what a plan does to the
world is that rows are taken and room is spoken for: ``take`` notes both, and a view is used up by
the plan it was made for.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from memcube.ids import CubeId, TenantId
from memcube.scheduler.actions import Action, Consolidate, Copy, Drop, Medium, Place, Tier
from memcube.scheduler.columns import NONE
from memcube.scheduler.settings import CostModel, Profile, Profiles
from memcube.scheduler.world import NEVER, World


class View:
    """What policies look at. ``rows`` are those to be looked at in this round."""

    def __init__(
        self,
        world: World,
        rows: np.ndarray,
        *,
        now: float,
        profiles: Profiles | None = None,
        cost: CostModel | None = None,
    ) -> None:
        profiles = profiles or Profiles()
        self.world = world
        self.now = now
        self.rows = rows
        self.cost = cost or CostModel()
        self.used_bytes = np.asarray(world.used_bytes, dtype="i8") + np.asarray(
            world.reserved_bytes, dtype="i8"
        )
        self.capacity_bytes = np.asarray([c.num_bytes for c in world.capacities], dtype="i8")
        self.fit = np.asarray([world.is_fit(n) for n in range(len(world.places))], dtype=bool)
        self.readable = np.asarray(
            [world.is_readable(n) for n in range(len(world.places))], dtype=bool
        )
        self.due = np.full(world.cubes.num_rows, NEVER)
        self.taken = world.cubes["busy"].copy()
        self.profiles: list[Profile] = []
        self._profile_of = np.zeros(len(world.tenants), dtype="i4")
        numbers: dict[int, int] = {}
        for tenant_number, tenant in enumerate(world.tenants):
            profile = profiles.of(tenant)
            if id(profile) not in numbers:
                numbers[id(profile)] = len(self.profiles)
                self.profiles.append(profile)
            self._profile_of[tenant_number] = numbers[id(profile)]

    # -- what is asked of it -------------------------------------------------------------------

    def __getitem__(self, column: str) -> np.ndarray:
        return self.world.cubes[column]

    def by_profile(self, rows: np.ndarray) -> Iterator[tuple[Profile, np.ndarray]]:
        """Rows by their tenants' profile."""
        if len(self.profiles) == 1:
            yield self.profiles[0], rows
            return
        numbers = self.profile_numbers(rows)
        for number in np.unique(numbers):
            yield self.profiles[number], rows[numbers == number]

    def profile_numbers(self, rows: np.ndarray) -> np.ndarray:
        """Of each row the place of its tenant's profile in ``profiles``."""
        return self._profile_of[self["tenant"][rows]]

    def profile(self, row: int) -> Profile:
        return self.profiles[self._profile_of[self["tenant"][row]]]

    def rate(self, rows: np.ndarray) -> np.ndarray:
        """Uses per day, faded until now."""
        age = np.maximum(self.now - self["used_at"][rows], 0.0)
        return self["rate"][rows] * np.exp2(-age / self.world.half_life_s)

    def free(self, rows: np.ndarray) -> np.ndarray:
        """Those that no action of this plan, or one under way, has taken."""
        return rows[~self.taken[rows]]

    def at(self, place: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The rows of what lies at a place, and the bytes and the version of each there."""
        return self.world.at(place)

    def any_at(self, rows: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Of each row whether a payload of it lies at one of the places of a mask."""
        h = self.world.held
        number = self["first"][rows]
        found = np.zeros(len(rows), dtype=bool)
        while (open := number != NONE).any():
            inside = number[open]
            found[open] |= places[h["place"][inside]]
            number = number.copy()
            number[open] = h["next"][inside]
        return found

    def places_of(self, row: int, tier: Tier) -> list[int]:
        """Where the present version of a cube lies in a tier, by the places' numbers."""
        h, w = self.world.held, self.world
        version = self["version"][row]
        found: list[int] = []
        number = int(self["first"][row])
        while number != NONE:
            place = int(h["place"][number])
            if h["version"][number] == version and w.places[place].tier is tier:
                found.append(place)
            number = int(h["next"][number])
        return found

    def places(self, tier: Tier, media: Sequence[Medium] | None = None) -> list[int]:
        """The places of a tier that may take something new, by number."""
        return [
            number
            for number, place in enumerate(self.world.places)
            if place.tier is tier and self.fit[number] and (media is None or place.medium in media)
        ]

    def room(self, place: int, fraction: float = 1.0) -> int:
        """Bytes that a place can take until it is filled to a fraction."""
        return int(self.capacity_bytes[place] * fraction) - int(self.used_bytes[place])

    # -- what a plan does to it ----------------------------------------------------------------

    def look_again(self, rows: np.ndarray | int, at: np.ndarray | float) -> None:
        """Ask for rows to be looked at at a time, if nothing changes before."""
        self.due[rows] = np.minimum(self.due[rows], at)

    def copy(
        self,
        row: int,
        source: int | None,
        target: int,
        *,
        policy: str,
        reason: str,
        takes_over: bool = False,
        urgent: bool = False,
    ) -> Copy:
        """A copy of a cube's present version."""
        w = self.world
        tenant, cube = w.ids[row]
        tier = w.places[target].tier
        size = self["num_bytes"][row]
        if tier is Tier.ACTIVATION:
            size = int(self["tokens"][row]) * w.kv_bytes_per_token
        return Copy(
            tenant=tenant,
            cube=cube,
            version=int(self["version"][row]),
            epoch=int(self["epoch"][row]),
            source=None if source is None else w.places[source],
            target=w.places[target],
            num_bytes=int(size),
            takes_over=takes_over,
            urgent=urgent,
            policy=policy,
            reason=reason,
        )

    def drop(self, row: int, place: int, num_bytes: int, *, policy: str, reason: str) -> Drop:
        """The removal of what lies of a cube at a place."""
        tenant, cube = self.world.ids[row]
        return Drop(
            tenant=tenant,
            cube=cube,
            version=int(self["version"][row]),
            epoch=int(self["epoch"][row]),
            place=self.world.places[place],
            num_bytes=num_bytes,
            policy=policy,
            reason=reason,
        )

    def row_of(self, tenant: TenantId, cube: CubeId) -> int:
        return self.world.row(tenant, cube)

    def number_of(self, place: Place) -> int:
        return self.world.places.get(place)

    def take(self, action: Action) -> None:
        """Note that an action is part of the plan. Room at a drop's place is free when it is done, not
        before."""
        if isinstance(action, Consolidate):
            return  # a proposal: nothing of it depends on the cubes' epochs
        if action.cube is not None:
            self.taken[self.world.row(action.tenant, action.cube)] = True
        if isinstance(action, Copy):
            self.used_bytes[self.number_of(action.target)] += self.needs_bytes(action)

    def needs_bytes(self, copy: Copy) -> int:
        """The room that a copy takes, beside what it replaces."""
        if copy.cube is None:
            return copy.num_bytes
        w = self.world
        there = w.bytes_at(w.row(copy.tenant, copy.cube), w.places.get(copy.target))
        return max(copy.num_bytes - there, 0)
