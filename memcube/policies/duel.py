"""Which of two rules for eviction does better of late, by what each would have kept.

Each rule has a *ghost*: the payloads that it would hold, without their bytes. Only a sample of the
payloads is followed so, whole conversations by the hash of their name, and the ghosts' capacity is of the
same share (Waldspurger 2015). The ghosts see the same uses, so chance favours none of them. What counts
is the time that hits save.

The least worthy is looked for among a few drawn at random and the runners-up of the last draw (whole
caches so simulated have the hit ratio of exact ones within 0.002). So a use of a payload in the sample
costs O(1), some 20 CPU-µs, and of another a comparison. Ghosts know of no pins and no budgets.

Pure: no clock, no I/O; the draws are the same each time.
"""

import random
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from memcube.policies.retention import Item

_NUM_SAMPLED = 4096
"""Payloads in a ghost, about: half to all of it."""
_NUM_DRAWN = 6
_NUM_RUNNERS_UP = 4
_HALF_LIFE_TURNOVERS = 8
"""What was counted fades by half in so many uses for each payload that is held."""
_MIN_HALF_LIFE = 4_096
_CLEARLY = 1.0
"""So many standard deviations, were the hits of only one of them coins tossed."""


class Followed(Protocol):
    """A payload in the eyes of a ghost. ``lot`` is its place in the sample, from 0 up to 1."""

    item: "Item"
    lot: float


T = TypeVar("T", bound=Followed)


class _Ghost(Generic[T]):
    """What one rule would hold, of the sample."""

    def __init__(self, score: Callable[[T], float], rng: random.Random) -> None:
        self._score = score
        self._rng = rng
        self._members: dict[str, T] = {}
        self._num_children: Counter[str] = Counter()
        self._leaves: list[T] = []
        self._places: dict[str, int] = {}
        """Of each leaf, by its key."""
        self._runners_up: list[T] = []
        self._bytes = 0
        self._refused: set[str] = set()
        self._now = 0.0

    def use(self, entry: T, capacity_bytes: float, now: float) -> bool:
        """Whether it was held; it is from now on, unless what is there is worth more."""
        item = entry.item
        if item.key in self._members:
            return True
        if now != self._now:
            self._refused.clear()
            self._now = now
        if item.parent in self._refused or not self._make_room(entry, capacity_bytes):
            self._refused.add(item.key)
            return False
        self._members[item.key] = entry
        self._bytes += item.num_bytes
        if item.parent is not None:
            self._num_children[item.parent] += 1
            self._remove_leaf(item.parent)
        if not self._num_children.get(item.key):
            self._add_leaf(entry)
        return False

    def drop(self, entry: T) -> None:
        """Let it go, if it is held."""
        item = entry.item
        if self._members.pop(item.key, None) is None:
            return
        self._bytes -= item.num_bytes
        self._remove_leaf(item.key)
        if item.parent is not None:
            self._num_children[item.parent] -= 1
            if not self._num_children[item.parent]:
                del self._num_children[item.parent]
                if (parent := self._members.get(item.parent)) is not None:
                    self._add_leaf(parent)

    def thin(self, share: float) -> None:
        """Keep only this share of all payloads."""
        for entry in [entry for entry in self._members.values() if entry.lot >= share]:
            self.drop(entry)

    def _make_room(self, entry: T, capacity_bytes: float) -> bool:
        item = entry.item
        while self._bytes + item.num_bytes > capacity_bytes:
            found = self._draw(item.parent)
            if not found or self._score(found[0]) > self._score(entry):
                return False
            self._runners_up = found[1 : _NUM_RUNNERS_UP + 1]
            parent = self._members.get(found[0].item.parent or "")
            self.drop(found[0])
            if parent is not None:
                self._runners_up.append(parent)
        return True

    def _draw(self, needed: str | None) -> list[T]:
        """Some of what may leave, the least worthy first."""
        leaves, places = self._leaves, self._places
        drawn = {one.item.key: one for one in self._runners_up if one.item.key in places}
        if len(leaves) <= _NUM_DRAWN:
            drawn |= {one.item.key: one for one in leaves}
        else:
            for _ in range(_NUM_DRAWN):
                one = leaves[int(self._rng.random() * len(leaves))]
                drawn[one.item.key] = one
        if needed is not None:
            drawn.pop(needed, None)
        return sorted(drawn.values(), key=self._score)

    def _add_leaf(self, entry: T) -> None:
        self._places[entry.item.key] = len(self._leaves)
        self._leaves.append(entry)

    def _remove_leaf(self, key: str) -> None:
        place = self._places.pop(key, None)
        if place is None:
            return
        last = self._leaves.pop()
        if place < len(self._leaves):
            self._leaves[place] = last
            self._places[last.item.key] = place


class Duel(Generic[T]):
    """Follows what either of two rules would have hit. ``falls_back``: the second is to be acted by."""

    def __init__(
        self, capacity_bytes: int, rule: Callable[[T], float], fallback: Callable[[T], float]
    ) -> None:
        """A rule is what it ranks payloads by, at the time: the lowest leaves first."""
        self._capacity_bytes = capacity_bytes
        # Each its own draws, from the same seed: whether one draws doesn't depend on the other.
        self._ghosts = [_Ghost(score, random.Random(0)) for score in (rule, fallback)]
        self._share = 1.0
        self._ahead_s = 0.0
        """The time saved by hits of the rule alone, less that by hits of the fallback alone."""
        self._squares = 0.0
        self.falls_back = False

    def use(self, entry: T, now: float) -> None:
        """A payload is used, or asked for in vain."""
        if entry.lot >= self._share:
            return
        capacity_bytes = self._capacity_bytes * self._share
        is_hit, is_hit_else = [ghost.use(entry, capacity_bytes, now) for ghost in self._ghosts]
        if is_hit != is_hit_else:
            gain_s = entry.item.saves_s - entry.item.load_s
            self._ahead_s += gain_s if is_hit else -gain_s
            self._squares += gain_s * gain_s

    def drop(self, entry: T) -> None:
        """A payload is followed no more."""
        if entry.lot < self._share:
            for ghost in self._ghosts:
                ghost.drop(entry)

    def decide(self, num_held: int, elapsed: int) -> None:
        """Choose anew, where so many payloads are held, so many uses after the last time.

        The rule has to be clearly ahead to be taken up again, and to be left need only fall behind.
        """
        needed_s = _CLEARLY * self._squares**0.5 if self.falls_back else 0.0
        self.falls_back = self._ahead_s <= needed_s
        fade = 0.5 ** (elapsed / max(_HALF_LIFE_TURNOVERS * num_held, _MIN_HALF_LIFE))
        self._ahead_s *= fade
        self._squares *= fade
        while self._share * num_held > _NUM_SAMPLED:
            self._share /= 2
            for ghost in self._ghosts:
                ghost.thin(self._share)
