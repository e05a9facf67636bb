"""Away from compute: under pressure the least worthy, and in time what has grown cold."""

from collections.abc import Iterator

import numpy as np

from memcube.scheduler.actions import Action, Tier
from memcube.scheduler.scoring import score, scores
from memcube.scheduler.view import View
from memcube.scheduler.world import MEDIA

_FLOOR = 10


class Leavers:
    """What lies at a place and may leave, the least worthy first."""

    def __init__(self, view: View, place: int) -> None:
        self._view = view
        self._place = place
        rows, sizes, versions = view.at(place)
        leaving = view.taken[rows]
        self.leaving_bytes = int(sizes[leaving].sum())
        """Of what has an action already."""
        stays = leaving | view["pinned"][rows]
        rows, sizes, versions = rows[~stays], sizes[~stays], versions[~stays]
        worth = np.where(versions != view["version"][rows], -1.0, scores(view, rows))
        order = np.argsort(worth, kind="stable")
        self._rows, self._sizes, self._worth = rows[order], sizes[order], worth[order]
        self._freed = np.concatenate(([0], np.cumsum(self._sizes)))
        self._next = 0
        self._below = _next_medium(view, place)

    def floor(self) -> float:
        """What a newcomer has to exceed: a low percentile of the worth of those here."""
        return float(np.percentile(self._worth, _FLOOR)) if len(self._worth) else 0.0

    def make_room(
        self, num_bytes: int, *, below: float = np.inf, policy: str, reason: str
    ) -> Iterator[Action]:
        """Let go what is worth less than ``below``, for so many bytes; nothing if that isn't enough."""
        if num_bytes <= 0:
            return
        first = self._next
        last = int(np.searchsorted(self._freed, self._freed[first] + num_bytes))
        last = min(last, len(self._rows)) if below == np.inf else last
        if last > len(self._rows) or (last > first and self._worth[last - 1] >= below):
            return
        self._next = last
        for index in range(first, last):
            yield self._let_go(index, policy, reason)

    def _let_go(self, index: int, policy: str, reason: str) -> Action:
        """Copy what is still worth something into the next medium; the rest, and what is there, drop."""
        view, below = self._view, self._below
        row, size = int(self._rows[index]), int(self._sizes[index])
        worth = float(self._worth[index])
        told = f"{reason}; worth {worth:.2f}"
        if (
            below is not None
            and worth >= view.profile(row).demote_score
            and not self._lies_below(row)
            and view.room(below, view.world.capacities[below].high) >= size
        ):
            return view.copy(row, self._place, below, policy=policy, reason=told)
        return view.drop(row, self._place, size, policy=policy, reason=told)

    def _lies_below(self, row: int) -> bool:
        places = self._view.world.places
        medium = MEDIA.index(places[self._place].medium)
        return any(
            MEDIA.index(places[other].medium) > medium
            for other in self._view.places_of(row, Tier.ACTIVATION)
        )


def _next_medium(view: View, place: int) -> int | None:
    """The next medium of the same node that may take something."""
    places = view.world.places
    where = places[place]
    under = [
        other
        for other in view.places(Tier.ACTIVATION)
        if places[other].node == where.node
        and MEDIA.index(places[other].medium) > MEDIA.index(where.medium)
    ]
    return min(under, key=lambda other: MEDIA.index(places[other].medium), default=None)


class Eviction:
    """Empties places of the activation tier that are over their high watermark down to the low one.

    What is still worth something is first copied into the next medium of its node that has room, and
    dropped in a later round; the rest is dropped, as KV can be built anew. Apart from pressure, KV whose
    score fell below ``demote_score`` is dropped too (as ``decay``).
    """

    name = "eviction"

    def plan(self, view: View, now: float) -> Iterator[Action]:
        world = view.world
        for place, where in enumerate(world.places):
            over = int(world.capacities[place].num_bytes * world.capacities[place].high)
            is_open = where.tier is Tier.ACTIVATION and view.readable[place]
            if is_open and view.used_bytes[place] > over:
                leavers = Leavers(view, place)
                excess = -view.room(place, world.capacities[place].low) - leavers.leaving_bytes
                reason = f"{where} is over its high watermark"
                yield from leavers.make_room(excess, policy=self.name, reason=reason)
        yield from self._decay(view, now)

    @staticmethod
    def _decay(view: View, now: float) -> Iterator[Action]:
        rows = view.free(view.rows)
        rows = rows[(view["activation"][rows] > 0) & ~view["pinned"][rows]]
        for profile, mine in view.by_profile(rows):
            settled_at = view["moved_at"][mine] + profile.settle_s
            view.look_again(mine, np.maximum(settled_at, now + profile.settle_s))
            cold = (score(view, mine, profile) < profile.demote_score) & (settled_at <= now)
            for row in mine[cold].tolist():
                place = view.places_of(row, Tier.ACTIVATION)[0]
                size = view.world.bytes_at(row, place)
                yield view.drop(
                    row, place, size, policy="decay", reason="it is hardly used any more"
                )
