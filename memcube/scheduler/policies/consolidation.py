"""Proposals to train what is abstract and lasting into an adapter."""

from collections.abc import Iterator

import numpy as np

from memcube.scheduler.actions import Action, Consolidate
from memcube.scheduler.rules import may_be_parameters
from memcube.scheduler.view import View

MAX_CUBES = 2_000


class Consolidation:
    """One proposal a scope and ``propose_every_s``, where enough of its cubes may be parameters and are in
    no adapter yet. It is a proposal: whether to train is for the gate and the owner to say."""

    name = "consolidation"

    def plan(self, view: View, now: float) -> Iterator[Action]:
        for profile, mine in view.by_profile(view.rows):
            period = int(now // profile.propose_every_s)
            fits = mine[may_be_parameters(view, mine, profile) & (view["parametric"][mine] == 0)]
            self._wait_to_last(view, mine, profile.lasting_s)
            scopes = [
                scope
                for scope in np.unique(view["scope"][fits]).tolist()
                if view.world.proposed.get(view.world.scopes[scope]) != period
            ]
            if not scopes:
                continue
            everywhere = np.flatnonzero(np.isin(view["scope"], scopes) & view["alive"])
            inside = everywhere[
                may_be_parameters(view, everywhere, profile) & (view["parametric"][everywhere] == 0)
            ]
            order = np.argsort(view["scope"][inside], kind="stable")
            inside = inside[order]
            bounds = np.flatnonzero(np.diff(view["scope"][inside])) + 1
            for rows in np.split(inside, bounds):
                if len(rows) < profile.min_cubes:
                    continue
                scope = int(view["scope"][rows[0]])
                best = rows[np.argsort(-view.rate(rows), kind="stable")][:MAX_CUBES]
                tenant, name = view.world.scopes[scope]
                yield Consolidate(
                    tenant=tenant,
                    scope=name,
                    cubes=tuple(view.world.ids[row][1] for row in best.tolist()),
                    epoch=period,
                    policy=self.name,
                    reason=f"{len(rows)} stable cubes of the scope are in no adapter",
                )

    @staticmethod
    def _wait_to_last(view: View, rows: np.ndarray, lasting_s: float) -> None:
        """Look again at what has only to become old enough."""
        lasts_at = view["changed_at"][rows] + lasting_s
        waits = view["consents"][rows] & (lasts_at > view.now)
        view.look_again(rows[waits], lasts_at[waits])
