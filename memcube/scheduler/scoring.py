"""Strategies: how much a cube is worth a place near to compute, from 0 to 1, where 0.5 is worth it.

Each is one function over rows; a tenant's profile weighs them. What *may* be is not theirs to say: the
rules come before (``memcube.scheduler.rules``).
"""

from collections.abc import Callable

import numpy as np

from memcube.scheduler.settings import STRATEGIES, Profile
from memcube.scheduler.view import View
from memcube.scheduler.world import AFFINITY_HALF_LIFE_S

Strategy = Callable[[View, np.ndarray, Profile], np.ndarray]
_REFERENCE_TOKENS = 500


def frequency(view: View, rows: np.ndarray, profile: Profile) -> np.ndarray:
    """By uses a day, faded; ``profile.rate`` is 0.5."""
    rate = view.rate(rows)
    return rate / (rate + profile.rate)


def cost(view: View, rows: np.ndarray, profile: Profile) -> np.ndarray:
    """By the seconds of reading that a byte of KV saves in a day. A text of 500 tokens that is used
    ``profile.rate`` times a day is 0.5; longer ones are worth more, as attention makes them dearer to read.
    """
    model = view.cost

    def saves_s_per_token(tokens: np.ndarray | int) -> np.ndarray | float:
        return model.prefill_s_per_token + model.prefill_s_per_token2 * tokens

    worth = view.rate(rows) * saves_s_per_token(view["tokens"][rows])
    usual = profile.rate * saves_s_per_token(_REFERENCE_TOKENS)
    return worth / (worth + usual)


def lru(view: View, rows: np.ndarray, profile: Profile) -> np.ndarray:
    """By the time since the last use; ``profile.recency_s`` ago is 0.5."""
    age = np.maximum(view.now - view["used_at"][rows], 0.0)
    return np.exp2(-age / profile.recency_s)


def similarity(view: View, rows: np.ndarray, profile: Profile) -> np.ndarray:
    """By how close a cube was to what its tenant asked of late, faded."""
    age = np.maximum(view.now - view["affine_at"][rows], 0.0)
    return view["affinity"][rows] * np.exp2(-age / AFFINITY_HALF_LIFE_S)


def labels(view: View, rows: np.ndarray, profile: Profile) -> np.ndarray:
    """1 for a cube that has one of the profile's wanted labels, else 0."""
    wanted = np.asarray(
        [bool(one & profile.wanted_labels) for one in view.world.labels], dtype="f4"
    )
    return wanted[view["labels"][rows]]


_BUILT: dict[str, Strategy] = {
    "frequency": frequency,
    "cost": cost,
    "lru": lru,
    "similarity": similarity,
    "labels": labels,
}
assert tuple(_BUILT) == STRATEGIES


def score(view: View, rows: np.ndarray, profile: Profile) -> np.ndarray:
    """The weighted mean of a profile's strategies."""
    total = np.zeros(len(rows))
    for name, weight in profile.strategies.items():
        total += weight * _BUILT[name](view, rows, profile)
    return total / sum(profile.strategies.values())


def clearly_below(value: float, margin: float) -> float:
    """The score of what is worth ``1 + margin`` times less. Scores level off near 1 where what they stand
    for (uses, seconds saved) doesn't: so it is their odds that are compared."""
    odds = value / max(1.0 - value, 1e-9) / (1.0 + margin)
    return odds / (1.0 + odds)


def scores(view: View, rows: np.ndarray) -> np.ndarray:
    """The scores of rows, each by its tenant's profile."""
    if len(view.profiles) == 1:
        return score(view, rows, view.profiles[0])
    found = np.zeros(len(rows))
    numbers = view.profile_numbers(rows)
    for number in np.unique(numbers):
        mine = numbers == number
        found[mine] = score(view, rows[mine], view.profiles[number])
    return found
