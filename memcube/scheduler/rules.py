"""Which forms a cube may take. Rules come before scores, and no score overrules one.

What is bound to a time or a session is plaintext. What is stable may be KV; what is abstract and lasting
may also be parameters, if it is not secret and its owner consents.
"""

import numpy as np

from memcube.cube import Sensitivity
from memcube.scheduler.settings import Profile
from memcube.scheduler.view import View
from memcube.scheduler.world import KINDS, SENSITIVITIES

SECRET = SENSITIVITIES.index(Sensitivity.SECRET)


def is_bound(view: View, rows: np.ndarray) -> np.ndarray:
    """Bound to a time (it expires) or to a session."""
    return np.isfinite(view["expires_at"][rows]) | view["session_bound"][rows]


def may_be_kv(view: View, rows: np.ndarray, profile: Profile) -> np.ndarray:
    """Searchable, bound to nothing, with a text that an engine can keep, and unchanged for a while."""
    tokens = view["tokens"][rows]
    return (
        view["searchable"][rows]
        & ~is_bound(view, rows)
        & (tokens >= view.world.kv_least_tokens)
        & (tokens <= view.world.kv_most_tokens)
        & (view.now - view["changed_at"][rows] >= profile.stable_s)
    )


def may_be_parameters(view: View, rows: np.ndarray, profile: Profile) -> np.ndarray:
    """Abstract, lasting and used; not secret; its owner consents."""
    abstract = np.asarray([kind in profile.abstract for kind in KINDS])
    return (
        view["searchable"][rows]
        & ~is_bound(view, rows)
        & abstract[view["kind"][rows]]
        & (view["sensitivity"][rows] != SECRET)
        & view["consents"][rows]
        & (view.now - view["changed_at"][rows] >= profile.lasting_s)
        & (view.rate(rows) >= profile.lasting_rate)
    )
