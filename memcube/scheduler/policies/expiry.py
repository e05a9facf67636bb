"""What is over: cubes whose time has come, and cubes that nobody has used for long."""

from collections.abc import Iterator

import numpy as np

from memcube.lifecycle import READABLE
from memcube.scheduler.actions import Action, Archive, Expire
from memcube.scheduler.policies.contract import RETRY_S
from memcube.scheduler.view import View
from memcube.scheduler.world import STATES

_READABLE = np.asarray([state in READABLE for state in STATES])


class Expiry:
    """Expires by the time that a cube was given, archives by ``archive_after_s`` without use (decay)."""

    name = "expiry"

    def plan(self, view: View, now: float) -> Iterator[Action]:
        rows = view.free(view.rows)
        rows = rows[_READABLE[view["state"][rows]]]
        expires_at = view["expires_at"][rows]
        over = expires_at <= now
        view.look_again(rows, np.where(over, now + RETRY_S, expires_at))
        for row in rows[over].tolist():
            tenant, cube = view.world.ids[row]
            yield Expire(
                tenant=tenant,
                cube=cube,
                epoch=int(view["epoch"][row]),
                policy=self.name,
                reason="its time is over",
            )
        for profile, mine in view.by_profile(rows[~over]):
            if profile.archive_after_s is not None:
                yield from self._archive(view, mine, now, profile.archive_after_s)

    def _archive(
        self, view: View, rows: np.ndarray, now: float, after_s: float
    ) -> Iterator[Action]:
        rows = rows[view["searchable"][rows] & ~view["frozen"][rows] & ~view["pinned"][rows]]
        idle_at = np.maximum(view["used_at"][rows], view["changed_at"][rows]) + after_s
        idle = idle_at <= now
        view.look_again(rows, np.where(idle, now + RETRY_S, idle_at))
        for row in rows[idle].tolist():
            tenant, cube = view.world.ids[row]
            yield Archive(
                tenant=tenant,
                cube=cube,
                epoch=int(view["epoch"][row]),
                policy=self.name,
                reason=f"not used for {after_s / 86_400:g} days",
            )
