"""Plaintext places about equally full, cube by cube or tenant by tenant."""

from collections.abc import Iterator

import numpy as np

from memcube.scheduler.actions import Action, Tier
from memcube.scheduler.view import View
from memcube.scheduler.whole_tenants import bytes_by_tenant, move_tenant

MAX_PROPOSED = 500
SMALL_BYTES = 8 << 20
"""Shards that differ by less are left as they are."""


class Balance:
    """Where the fullest place is more than ``balance_gap`` fuller than the emptiest, the cubes used least
    go over until half of the gap is closed. The other half keeps them from going back."""

    name = "balance"

    def __init__(self, *, by_tenant: bool = False) -> None:
        self._by_tenant = by_tenant

    def plan(self, view: View, now: float) -> Iterator[Action]:
        if self._by_tenant:
            yield from self._tenants(view)
        else:
            yield from self._cubes(view)

    def _tenants(self, view: View) -> Iterator[Action]:
        """Move one tenant from the shard that holds most to the one that holds least, where they are
        further apart than ``balance_gap`` of all that there is: the largest that takes no more than half of the
        difference, so that the two come nearer each time and none goes back."""
        places = list(view.places(Tier.PLAINTEXT))
        used = {p: int(view.used_bytes[p]) for p in places}
        if len(places) < 2 or not view.profiles or view.world.moving_tenants:
            return
        full, empty = max(places, key=used.__getitem__), min(places, key=used.__getitem__)
        apart = used[full] - used[empty]
        if apart <= max(view.profiles[0].balance_gap * sum(used.values()), SMALL_BYTES):
            return
        world, fullest = view.world, view.world.places[full]
        sizes = bytes_by_tenant(world, fullest)
        here = [tenant for tenant, place in world.tenant_places.items() if place == fullest]
        fits = [tenant for tenant in here if 0 < sizes[tenant] <= apart // 2]
        if fits:
            tenant = max(fits, key=lambda one: (sizes[one], one))
            yield move_tenant(
                world,
                tenant,
                world.places[empty],
                sizes[tenant],
                policy=self.name,
                reason=f"{fullest.location} holds {apart:,} bytes more than "
                f"{world.places[empty].location}",
            )

    def _cubes(self, view: View) -> Iterator[Action]:
        places = [p for p in view.places(Tier.PLAINTEXT) if view.capacity_bytes[p] > 0]
        if len(places) < 2 or not len(view.profiles):
            return
        fill = {p: view.used_bytes[p] / view.capacity_bytes[p] for p in places}
        full = max(places, key=lambda p: fill[p])
        empty = min(places, key=lambda p: fill[p])
        if fill[full] - fill[empty] <= view.profiles[0].balance_gap:
            return
        wanted = (fill[full] - fill[empty]) / 4 * view.capacity_bytes[full]
        rows, sizes, versions = view.at(full)
        wanted -= sizes[view.taken[rows]].sum()
        fits = (
            ~view.taken[rows] & (versions == view["version"][rows]) & (view["plaintext"][rows] == 1)
        )
        rows, sizes = rows[fits], sizes[fits]
        order = np.argsort(view.rate(rows), kind="stable")[:MAX_PROPOSED]
        for index in order.tolist():
            if wanted <= 0:
                return
            wanted -= sizes[index]
            yield view.copy(
                int(rows[index]),
                full,
                empty,
                takes_over=True,
                policy=self.name,
                reason=f"{view.world.places[full]} is {fill[full]:.0%} full, the target {fill[empty]:.0%}",
            )
