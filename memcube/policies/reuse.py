"""Whether and when a payload is used again, learnt from those that were.

Payloads are sorted into classes by what is known of them when they are used: a hint about their
conversation, how often they and their conversation were used, and how long the last wait was. Each
class has a life table: over steps of age, how many were at risk of a use and how many were used. A class
and the one above it, which leaves out its last feature, are in a duel: whose rates foretold better what
came since is trusted more. So a feature that tells nothing adds no noise, and one that does soon counts.
The root's opponent is "the chance of a use in the next doubling of age is the same at each age": where
nothing better was learnt, that makes the policy one of least recent use.

What a policy asks for is a class's *index* at an age: uses per unit of time held, over the stretch of
time ahead for which that is greatest (Gittins 1979, for a prize that ends the wait). It is high just
before a use is due and low once it is overdue, so loops, bursts and conversations each get their due
without being named. A cache that holds what has the highest index per byte is optimal for uses that
don't depend on each other, as its size and the number of payloads grow.

Time is a count of uses, not seconds: a quiet night ages nothing. Statistics fade by half in
``HALF_LIFE`` uses. Pure: no clock, no I/O.
"""

from bisect import bisect_right
from itertools import pairwise
from typing import NamedTuple

import numpy as np

FIRST_STEP = 64
"""Ages under this are not told apart: few caches are so small that it matters."""
HALF_LIFE = 65_536
_NUM_STEPS = 48
_EDGES = [0.0] + [FIRST_STEP * 2 ** (step / 2) for step in range(_NUM_STEPS - 1)]
"""Where steps of age begin: half doublings, the last one open (a billion uses)."""
_WIDTHS = [after - before for before, after in pairwise(_EDGES)] + [_EDGES[-1]]
_PRIOR = 0.2
"""Uses to be expected while the age grows by itself, before anything was learnt."""
_LEAST = 1e-15
_MOST_EVIDENCE = 10.0
"""So much at most either way, so that a class that begins to tell something is soon trusted."""
_NO_HINT = -1
_HINT_LEVELS = 8
_DUE = ((-2.0, -1.0, 0.0, 1.0), (0.0, 0.15, 0.85, 1.0))
"""How much of the chance of a use is over by the edges of steps, counted from the end of that in which it
is expected."""


def step_of(age: int) -> int:
    """The step that an age falls into."""
    return bisect_right(_EDGES, age) - 1


def next_edge(step: int) -> float:
    """The age at which a step ends."""
    return _EDGES[step + 1] if step + 1 < _NUM_STEPS else float("inf")


def num_steps() -> int:
    """How many steps there are."""
    return _NUM_STEPS


def hint_level(probability: float, wait: float | None = None) -> int:
    """The level of a hint, which is a feature of the class; ``wait``: the age at the expected use."""
    level = round(min(max(probability, 0.0), 1.0) * _HINT_LEVELS)
    if wait is None or not level:
        return level
    return level + (_HINT_LEVELS + 1) * (step_of(max(int(wait), 0)) + 1)


class Features(NamedTuple):
    """What sorts payloads into classes, the most telling first. Numbers are levels, not values."""

    hint: int
    uses: int
    turns: int
    wait: int

    @classmethod
    def of(cls, hint: int | None, num_uses: int, num_turns: int, last_wait: int) -> "Features":
        """The features of a payload used so often, of a conversation with so many turns."""
        return cls(
            hint=_NO_HINT if hint is None else hint,
            uses=_count_level(num_uses),
            turns=_count_level(num_turns),
            wait=((last_wait // FIRST_STEP + 1).bit_length() + 1) // 2 if num_uses > 1 else 0,
        )


def _count_level(number: int) -> int:
    """1, 2, 3, then doublings up to about 400."""
    return number if number <= 3 else min(2 + (number // 3).bit_length(), 10)


class ReuseModel:
    """Life tables by class, and the indexes made of them.

    The caller tells when a payload's age passes a step (``aged``) and when its wait ends by a use
    (``used``) or because it is no longer followed (``lost``). A weight under 1 is for payloads that come
    back together, and so tell less than as many that don't.
    """

    def __init__(self) -> None:
        self._ids: dict[tuple[int, ...], int] = {}
        self._above: list[int] = []
        self._depths: list[int] = []
        self._hints: list[int] = []
        self._uses: list[list[float]] = []
        self._risks: list[list[float]] = []
        self.index: list[list[float]] = []
        """By class and step; as of the last ``fit``."""
        self._own = self._other = np.empty((0, _NUM_STEPS))
        """By class and step: the rates that the last ``fit`` set against each other."""
        self._old_uses = self._old_risks = np.empty((0, _NUM_STEPS))
        self._evidence = np.empty(0)
        self._class(())
        self.fit(np.zeros((1, _NUM_STEPS)), 0)

    def __len__(self) -> int:
        return len(self._above)

    def class_of(self, features: Features) -> int:
        """The class of these features; it is made on first sight."""
        found = self._ids.get(features)
        return self._class(features) if found is None else found

    def aged(self, of_class: int, step: int, weight: float) -> None:
        """Payloads of this total weight lived through a step of age unused."""
        self._risks[of_class][step] += weight * _WIDTHS[step]

    def used(self, of_class: int, step: int, age: int, weight: float) -> None:
        """A payload was used at this age; up to the beginning of ``step`` it was told of by ``aged``."""
        at = self._until(of_class, step, age, weight)
        self._uses[of_class][at] += weight

    def lost(self, of_class: int, step: int, age: int, weight: float) -> None:
        """A payload of this age is no longer followed."""
        self._until(of_class, step, age, weight)

    def fit(self, present: np.ndarray, elapsed: int) -> None:
        """Make the indexes anew, and let what was learnt fade for so many uses.

        ``present``: by class and step, the weight of the payloads that are of that age now. They have
        been at risk for half of their step, on average.
        """
        widths = np.array(_WIDTHS)
        uses = np.array(self._uses)
        risks = np.array(self._risks)
        above = np.array(self._above)
        depths = np.array(self._depths)
        levels = [np.flatnonzero(depths == depth) for depth in range(depths.max() + 1)]

        def with_those_below(counts: np.ndarray) -> np.ndarray:
            for level in reversed(levels[1:]):
                np.add.at(counts, above[level], counts[level])
            return counts

        num_known = len(self._evidence)
        new_uses, new_risks = uses.copy(), risks.copy()
        new_uses[:num_known] -= self._old_uses
        new_risks[:num_known] -= self._old_risks
        fade = 0.5 ** (elapsed / HALF_LIFE)
        self._old_uses, self._old_risks = uses * fade, risks * fade
        self._uses, self._risks = self._old_uses.tolist(), self._old_risks.tolist()
        trust = self._trust(with_those_below(new_uses), with_those_below(new_risks), fade)

        risks[: len(present)] += 0.5 * widths * present
        uses, risks = with_those_below(uses), with_those_below(risks)
        prior = _PRIOR / np.maximum(FIRST_STEP / 2, np.array(_EDGES))
        rates, own, other = (np.empty_like(uses) for _ in range(3))
        own[0] = (uses[0] + 1) / (risks[0] + 1 / prior)
        other[0] = prior * (uses[0].sum() + 1) / ((risks[0] * prior).sum() + 1)
        rates[0] = trust[0] * own[0] + (1 - trust[0]) * other[0]
        for depth, level in enumerate(levels[1:], start=1):
            borrowed = rates[above[level]]
            expected = np.ones_like(borrowed)
            if depth == 1:
                expected = self._hinted(level, borrowed[0], widths)
            own[level] = (uses[level] + expected) / (risks[level] + 1 / borrowed)
            other[level] = borrowed * expected
            rates[level] = trust[level] * own[level] + (1 - trust[level]) * other[level]
        self._own, self._other = np.maximum(own, _LEAST), np.maximum(other, _LEAST)
        self.index = _indexes(np.maximum(rates, _LEAST), widths).tolist()

    def _trust(self, uses: np.ndarray, risks: np.ndarray, fade: float) -> np.ndarray:
        """How far each class's own rates are trusted, after uses and risks that they didn't know of.

        The evidence is by how much its own rates make these likelier than the other rates do, each
        being Poisson, as a logarithm.
        """
        num_known = len(self._evidence)
        told = uses[:num_known] * np.log(self._own / self._other)
        told -= (self._own - self._other) * risks[:num_known]
        evidence = self._evidence * fade + told.sum(axis=1)
        self._evidence = np.zeros(len(uses))
        self._evidence[:num_known] = np.clip(evidence, -_MOST_EVIDENCE, _MOST_EVIDENCE)
        return (1 / (1 + np.exp(-self._evidence)))[:, None]

    def _class(self, features: tuple[int, ...]) -> int:
        """A new class, and those above it that are missing."""
        above = -1
        if features:
            found = self._ids.get(features[:-1])
            above = self._class(features[:-1]) if found is None else found
        self._ids[features] = number = len(self._above)
        self._above.append(above)
        self._depths.append(len(features))
        self._hints.append(features[0] if features else _NO_HINT)
        self._uses.append([0.0] * _NUM_STEPS)
        self._risks.append([0.0] * _NUM_STEPS)
        self.index.append(self.index[above] if features else [0.0] * _NUM_STEPS)
        return number

    def _until(self, of_class: int, step: int, age: int, weight: float) -> int:
        risks = self._risks[of_class]
        while age >= next_edge(step):
            risks[step] += weight * _WIDTHS[step]
            step += 1
        risks[step] += weight * max(age - _EDGES[step], 0.0)
        return step

    def _hinted(self, level: np.ndarray, rates: np.ndarray, widths: np.ndarray) -> np.ndarray:
        """How many times as likely as by ``rates`` a use is in each class that a hint alone makes.

        Where a hint gives the chance of a use and not its time, that keeps the shape it has without a
        hint, and the chance is taken to be within the time that is remembered. Where it gives the time,
        most of the chance is in the step it falls into, and the rest in those beside. This is what a class begins with; what
        happened to those with such a hint soon outweighs it, so that hints may be wrong.
        """
        chance = 1 - np.exp(-np.concatenate(([0.0], np.cumsum(rates * widths))))
        within = step_of(HALF_LIFE)
        expected = np.ones((len(level), _NUM_STEPS))
        for row, number in enumerate(level):
            if self._hints[number] == _NO_HINT:
                continue
            due, chance_level = divmod(self._hints[number], _HINT_LEVELS + 1)
            until = within
            if due:
                until = _NUM_STEPS
                spread = np.interp(np.arange(_NUM_STEPS + 1) - due, *_DUE)
                hinted = chance_level / _HINT_LEVELS * spread
            else:
                hinted = np.minimum(chance_level / _HINT_LEVELS / chance[within] * chance, 1.0)
            left = np.maximum(1 - hinted, 1e-3)
            wanted = -np.diff(np.log(left)) / widths
            # Not nothing: a class has to be able to learn that such hints are wrong.
            expected[row, :until] = np.maximum(wanted / rates, 0.01)[:until]
        return expected


def _indexes(rates: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """For each class and step: the most uses per unit of time held, over all times to hold on."""
    hazards = rates * widths
    held = -np.expm1(-hazards) / rates
    """Mean time in a step of those that enter it."""
    best = -np.expm1(-hazards) / held
    passed, time = hazards.copy(), held.copy()
    for further in range(1, rates.shape[1]):
        # Of each row the steps that have so many after them.
        reach = rates.shape[1] - further
        time[:, :reach] += np.exp(-passed[:, :reach]) * held[:, further:]
        passed[:, :reach] += hazards[:, further:]
        ahead = -np.expm1(-passed[:, :reach]) / time[:, :reach]
        np.maximum(best[:, :reach], ahead, out=best[:, :reach])
    return best
