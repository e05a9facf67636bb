"""Each cube in as many places as it shall be, on nodes that are up and stay.

The unit is the cube, or the tenant where the plaintext tier keeps a tenant in one shard: then a tenant's
share of a node that drains moves as one.
"""

from collections import Counter
from collections.abc import Iterator

import numpy as np

from memcube.ids import TenantId
from memcube.scheduler.actions import Action, Place, Tier
from memcube.scheduler.policies.contract import RETRY_S
from memcube.scheduler.settings import Profile
from memcube.scheduler.view import View
from memcube.scheduler.whole_tenants import bytes_by_tenant, move_tenant
from memcube.scheduler.world import MEDIA


class Spread:
    """Heals placement: too few copies, copies on nodes that drain or are lost, and copies too many.

    A node that is down is given ``heal_after_s`` to come back. A cube without a copy that can be read is
    built anew of the catalog.
    """

    name = "spread"

    def __init__(self, *, by_tenant: bool = False) -> None:
        self._by_tenant = by_tenant

    def plan(self, view: View, now: float) -> Iterator[Action]:
        rows = view.free(view.rows)
        rows = rows[view["alive"][rows]]
        if self._by_tenant:
            yield from self._move_tenants(view)
        else:
            for profile, mine in view.by_profile(rows[view["searchable"][rows]]):
                yield from self._plaintext(view, mine, profile)
        yield from self._activation(view, rows)

    def _plaintext(self, view: View, rows: np.ndarray, profile: Profile) -> Iterator[Action]:
        indexed = view["indexed_version"][rows] == view["version"][rows]
        odd = indexed & (
            (view["plaintext"][rows] != profile.replicas)
            | (view["outdated"][rows] > 0)
            | view.any_at(rows, ~view.fit)
        )
        rows = rows[odd]
        view.look_again(rows, view.now + RETRY_S)
        for row in rows.tolist():
            yield from self._heal(view, row, profile)

    def _heal(self, view: View, row: int, profile: Profile) -> Iterator[Action]:
        held = view.places_of(row, Tier.PLAINTEXT)
        good = [place for place in held if view.fit[place]]
        waits = [place for place in held if not view.fit[place] and self._may_return(view, place)]
        readable = [place for place in held if view.readable[place]]
        owner = int(view["owner"][row])
        if len(good) + len(waits) < profile.replicas or (not good and not waits):
            target = self._emptiest(view, row, held)
            if target is None:
                return
            source = owner if owner in readable else next(iter(readable), None)
            yield view.copy(
                row,
                source,
                target,
                takes_over=owner not in good,
                policy=self.name,
                reason=_why_copy(view, held, source),
            )
            return
        leaving = [place for place in readable if not view.fit[place]]
        if leaving and len(good) >= profile.replicas:
            yield self._drop(view, row, leaving[0], "the node drains, and others have it")
        elif len(good) > profile.replicas:
            spare = [place for place in good if place != owner]
            fullest = max(spare, key=lambda place: _fill(view, place))
            yield self._drop(view, row, fullest, f"more than {profile.replicas} copies")
        elif (old := self._outdated(view, row)) is not None:
            yield self._drop(view, row, old, "it is of an old version")

    @staticmethod
    def _outdated(view: View, row: int) -> int | None:
        """A place that has the cube in an old version alone."""
        places = view.world.places
        for held in view.world.held_by(row):
            number = places.get(held.place)
            if held.version != view["version"][row] and view.readable[number]:
                return number
        return None

    def _drop(self, view: View, row: int, place: int, reason: str) -> Action:
        size = view.world.bytes_at(row, place)
        return view.drop(row, place, size, policy=self.name, reason=reason)

    @staticmethod
    def _may_return(view: View, place: int) -> bool:
        """Whether a place counts though it can't take anything: its node is down since a short while."""
        node = view.world.nodes.get(view.world.places[place].node)
        if node is None or node.alive:
            return False
        return view.now - node.since < view.profiles[0].heal_after_s

    @staticmethod
    def _emptiest(view: View, row: int, held: list[int]) -> int | None:
        """The emptiest place on a node that has none of it."""
        nodes = {view.world.places[place].node for place in held}
        size = int(view["num_bytes"][row])
        others = [
            place
            for place in view.places(Tier.PLAINTEXT)
            if view.world.places[place].node not in nodes
            and view.room(place, view.world.capacities[place].high) >= size
        ]
        return min(others, key=lambda place: (_fill(view, place), place), default=None)

    def _activation(self, view: View, rows: np.ndarray) -> Iterator[Action]:
        """KV on a node that drains goes to another one, or away."""
        unfit = np.asarray(
            [
                place.tier is Tier.ACTIVATION and bool(view.readable[n]) and not view.fit[n]
                for n, place in enumerate(view.world.places)
            ],
            dtype=bool,
        )
        if not unfit.any():
            return
        rows = view.free(rows)
        rows = rows[view.any_at(rows, unfit)]
        view.look_again(rows, view.now + RETRY_S)
        for row in rows.tolist():
            held = view.places_of(row, Tier.ACTIVATION)
            leaving = [place for place in held if unfit[place]]
            if not leaving:
                continue
            if any(view.fit[place] for place in held):
                yield self._drop(view, row, leaving[0], "the node drains, and others have it")
                continue
            size = int(view["tokens"][row]) * view.world.kv_bytes_per_token
            targets = [
                place
                for place in view.places(Tier.ACTIVATION)
                if view.room(place, view.world.capacities[place].low) >= size
            ]
            if targets:
                target = min(
                    targets,
                    key=lambda p: (MEDIA.index(view.world.places[p].medium), _fill(view, p)),
                )
                yield view.copy(row, leaving[0], target, policy=self.name, reason="the node drains")
            else:
                yield self._drop(view, row, leaving[0], "the node drains; no other has room")

    def _move_tenants(self, view: View) -> Iterator[Action]:
        """All that tenants have in shards whose node drains, each as one."""
        world = view.world
        sizes: dict[Place, Counter[TenantId]] = {}
        for tenant, where in world.tenant_places.items():
            place = view.number_of(where)
            if view.fit[place] or not view.readable[place] or tenant in world.moving_tenants:
                continue
            if where not in sizes:
                sizes[where] = bytes_by_tenant(world, where)
            size = sizes[where][tenant]
            targets = [
                other
                for other in view.places(Tier.PLAINTEXT)
                if view.room(other, world.capacities[other].high) >= size
            ]
            if targets:
                target = min(targets, key=lambda other: (_fill(view, other), other))
                yield move_tenant(
                    world,
                    tenant,
                    world.places[target],
                    size,
                    policy=self.name,
                    reason="the node drains",
                )


def _fill(view: View, place: int) -> float:
    return float(view.used_bytes[place]) / max(int(view.capacity_bytes[place]), 1)


def _why_copy(view: View, held: list[int], source: int | None) -> str:
    if source is None:
        return "no copy can be read; it is built of the catalog"
    if any(not view.fit[place] for place in held):
        return "a node that has it drains or is down"
    return "there are too few copies"
