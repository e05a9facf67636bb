"""How a memory fades: pure functions of its use, its priority and the time.

The catalog keeps what was last measured; nothing is rewritten as time goes by. ``rate_at`` and
``priority_at`` say what it is worth now, and ``strength`` puts both and the time since a cube was last
used or changed into one number that halves in each half-life in which nobody asks for it.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from math import log2

from memcube.cube import MemCube, Usage

RATE_HALF_LIFE = timedelta(days=7)
"""Of ``Usage.rate``, uses a day."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decay:
    """Which memories have faded. ``below`` is the strength under which one has."""

    half_life: timedelta
    below: float

    @property
    def least_idle(self) -> timedelta:
        """No cube fades that was used or changed less long ago."""
        return self.half_life * max(0.0, log2(1 / self.below))

    def faded(self, cube: MemCube, now: datetime) -> bool:
        """Whether a cube is not worth its place any more."""
        return strength(cube, now, self.half_life) < self.below


def fraction_left(idle: timedelta, half_life: timedelta) -> float:
    """1 at first, a half after one half-life; 1 also where the clock went back."""
    return 0.5 ** (max(timedelta(0), idle) / half_life)


def rate_at(usage: Usage, now: datetime) -> float:
    """Uses a day, as they are now."""
    if usage.last_used_at is None:
        return usage.rate
    return usage.rate * fraction_left(now - usage.last_used_at, RATE_HALF_LIFE)


def priority_at(cube: MemCube, now: datetime, half_life: timedelta) -> float:
    """A positive priority fades toward 0; a negative one stays what it is."""
    given = cube.governance.priority
    return given * fraction_left(idle(cube, now), half_life) if given > 0 else float(given)


def idle(cube: MemCube, now: datetime) -> timedelta:
    """How long nobody has used or changed it."""
    last = cube.usage.last_used_at
    return now - (cube.updated_at if last is None else max(last, cube.updated_at))


def strength(cube: MemCube, now: datetime, half_life: timedelta) -> float:
    """1 for a cube just added; more with use and priority, less with time and a negative priority."""
    priority = priority_at(cube, now, half_life)
    worth = 1 + rate_at(cube.usage, now) + max(0.0, priority)
    return fraction_left(idle(cube, now), half_life) * worth / (1 - min(0.0, priority))
