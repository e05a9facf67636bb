"""Toward compute: KV of cubes that are stable and worth reading ahead."""

from collections.abc import Iterator

import numpy as np

from memcube.scheduler.actions import Action, Tier
from memcube.scheduler.policies.contract import RETRY_S
from memcube.scheduler.policies.eviction import Leavers
from memcube.scheduler.rules import is_bound, may_be_kv
from memcube.scheduler.scoring import clearly_below, score
from memcube.scheduler.settings import Profile
from memcube.scheduler.view import View
from memcube.scheduler.world import MEDIA

MAX_PROPOSED = 20_000


class Promotion:
    """Builds the KV of the best cubes in the nearest medium that has room, or brings it nearer.

    A place is filled to its low watermark by whoever is worth it. Above that a newcomer must be worth
    ``margin`` more than the least of those there. Where no room is left for one that is, the least are let
    go, and it comes in a later round.
    """

    name = "promotion"

    def plan(self, view: View, now: float) -> Iterator[Action]:
        places = sorted(
            view.places(Tier.ACTIVATION),
            key=lambda place: MEDIA.index(view.world.places[place].medium),
        )
        if not places:
            return
        leavers: dict[int, Leavers] = {}
        nearest = MEDIA.index(view.world.places[places[0]].medium)
        found, worth = self._candidates(view, view.free(view.rows), nearest)
        rates = view.rate(found)
        for row, value, rate in zip(found.tolist(), worth.tolist(), rates.tolist(), strict=True):
            held = view.places_of(row, Tier.ACTIVATION)
            target = self._target(view, row, value, places, held, leavers)
            if target is None:
                yield from self._displace(view, row, value, places, held, leavers)
                continue
            sources = [place for place in held if view.readable[place]]
            yield view.copy(
                row,
                min(sources, key=lambda p: MEDIA.index(view.world.places[p].medium), default=None),
                target,
                policy=self.name,
                reason=f"worth {value:.2f}, used {rate:.1f} times a day",
            )

    def _candidates(
        self, view: View, rows: np.ndarray, nearest: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """What is worth KV and could lie nearer than it does; the best first."""
        rows = rows[view["kv_medium"][rows] > nearest]
        found, worth = [], []
        for profile, mine in view.by_profile(rows):
            fits = may_be_kv(view, mine, profile)
            self._wait_to_settle(view, mine[~fits], profile)
            mine = mine[fits]
            value = score(view, mine, profile)
            good = value >= profile.promote_score
            settled_at = view["moved_at"][mine] + profile.settle_s
            ready = good & (settled_at <= view.now)
            view.look_again(mine[good], np.maximum(settled_at[good], view.now + RETRY_S))
            found.append(mine[ready])
            worth.append(value[ready])
        rows = np.concatenate(found) if found else rows[:0]
        value = np.concatenate(worth) if worth else np.zeros(0)
        if len(rows) > MAX_PROPOSED:
            best = np.argpartition(-value, MAX_PROPOSED)[:MAX_PROPOSED]
            rows, value = rows[best], value[best]
        order = np.lexsort((rows, -value))
        return rows[order], value[order]

    @staticmethod
    def _wait_to_settle(view: View, rows: np.ndarray, profile: Profile) -> None:
        """Look again at what has only to stay unchanged a while longer."""
        stable_at = view["changed_at"][rows] + profile.stable_s
        waits = (
            view["searchable"][rows]
            & ~is_bound(view, rows)
            & (view["tokens"][rows] > 0)
            & (stable_at > view.now)
        )
        view.look_again(rows[waits], stable_at[waits])

    @staticmethod
    def _target(
        view: View,
        row: int,
        value: float,
        places: list[int],
        held: list[int],
        leavers: dict[int, Leavers],
    ) -> int | None:
        """The nearest place that takes it; of several in one medium the emptiest that has the cube's
        labels."""
        world, profile = view.world, view.profile(row)
        size = int(view["tokens"][row]) * world.kv_bytes_per_token
        labels = world.labels[view["labels"][row]]
        best: tuple[int, int, float] | None = None
        found = None
        at = min((MEDIA.index(world.places[p].medium) for p in held), default=len(MEDIA))
        for place in places:
            medium = MEDIA.index(world.places[place].medium)
            if medium >= at or (best is not None and medium > best[0]):
                break
            capacity = world.capacities[place]
            if view.room(place, capacity.low) < size:
                if view.room(place, capacity.high) < size:
                    continue
                if place not in leavers:
                    leavers[place] = Leavers(view, place)
                if clearly_below(value, profile.margin) < leavers[place].floor():
                    continue
            node = world.nodes[world.places[place].node]
            fill = view.used_bytes[place] / max(world.capacities[place].num_bytes, 1)
            rank = (medium, -len(labels & node.labels), float(fill))
            if best is None or rank < best:
                best, found = rank, place
        return found

    def _displace(
        self,
        view: View,
        row: int,
        value: float,
        places: list[int],
        held: list[int],
        leavers: dict[int, Leavers],
    ) -> Iterator[Action]:
        """Let go what is worth clearly less, at the nearest place where that makes the room."""
        if held:
            return
        size = int(view["tokens"][row]) * view.world.kv_bytes_per_token
        for place in places:
            capacity = view.world.capacities[place]
            if size > capacity.num_bytes * capacity.low:
                continue
            if place not in leavers:
                leavers[place] = Leavers(view, place)
            least = clearly_below(value, view.profile(row).margin)
            missing = size - max(view.room(place, capacity.high), 0)
            if missing <= leavers[place].leaving_bytes:
                return  # room is being made
            for action in leavers[place].make_room(
                missing,
                below=least,
                policy="displacement",
                reason=f"one worth {value:.2f} needs it",
            ):
                leavers[place].leaving_bytes += getattr(action, "num_bytes", 0)
                yield action
            return
