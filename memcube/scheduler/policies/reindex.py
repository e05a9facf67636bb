"""Cubes that the plaintext index doesn't hold at their present version."""

from collections.abc import Iterator

import numpy as np

from memcube.scheduler.actions import Action, Reindex
from memcube.scheduler.policies.contract import RETRY_S
from memcube.scheduler.view import View


class Reindexing:
    """Leaves index work to who wrote the cube for ``reindex_after_s``, then asks for it."""

    name = "reindex"

    def plan(self, view: View, now: float) -> Iterator[Action]:
        rows = view.free(view.rows)
        rows = rows[
            view["searchable"][rows]
            & (view["indexed_version"][rows] != view["version"][rows])
            & (view["tokens"][rows] > 0)
        ]
        for profile, mine in view.by_profile(rows):
            after = view["changed_at"][mine] + profile.reindex_after_s
            late = after <= now
            view.look_again(mine, np.where(late, now + RETRY_S, after))
            for row in mine[late].tolist():
                tenant, cube = view.world.ids[row]
                yield Reindex(
                    tenant=tenant,
                    cube=cube,
                    version=int(view["version"][row]),
                    epoch=int(view["epoch"][row]),
                    policy=self.name,
                    reason="the index holds another version",
                )
