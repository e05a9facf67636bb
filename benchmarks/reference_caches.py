"""Caches to measure a retention policy against: textbook policies over blocks of one size.

Each holds at most ``capacity`` keys: ``key in cache`` tells whether one is here, ``use(key)`` uses it
and takes it in. ``Belady`` knows the future and is what no policy exceeds.
"""

import heapq
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from itertools import count
from typing import Protocol

Key = Hashable


class Cache(Protocol):
    """A cache of ``capacity`` keys."""

    def __contains__(self, key: Key, /) -> bool: ...
    def use(self, key: Key) -> None: ...


class Lru:
    """The least recently used leaves first."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._keys: OrderedDict[Key, None] = OrderedDict()

    def __contains__(self, key: Key) -> bool:
        return key in self._keys

    def use(self, key: Key) -> None:
        if key in self._keys:
            self._keys.move_to_end(key)
            return
        if len(self._keys) >= self._capacity:
            self._keys.popitem(last=False)
        self._keys[key] = None


class _Ranked:
    """The one of least rank leaves first; ``_rank`` is asked at each use."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._ranks: dict[Key, tuple[float, ...]] = {}
        self._heap: list[tuple[tuple[float, ...], int, Key]] = []
        self._uses = count(1)

    def __contains__(self, key: Key) -> bool:
        return key in self._ranks

    def use(self, key: Key) -> None:
        now = next(self._uses)
        rank = self._rank(key, now)
        if key not in self._ranks and len(self._ranks) >= self._capacity:
            self._evict()
        self._ranks[key] = rank
        heapq.heappush(self._heap, (rank, now, key))

    def _evict(self) -> None:
        while True:
            rank, _, key = heapq.heappop(self._heap)
            if self._ranks.get(key) == rank:
                del self._ranks[key]
                self._evicted(rank)
                return

    def _rank(self, key: Key, now: int) -> tuple[float, ...]:
        raise NotImplementedError

    def _evicted(self, rank: tuple[float, ...]) -> None:
        pass


class Lru2(_Ranked):
    """The one whose last use but one is longest ago leaves first (O'Neil 1993), all history kept."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._last: dict[Key, int] = {}

    def _rank(self, key: Key, now: int) -> tuple[float, ...]:
        before = self._last.get(key, 0)
        self._last[key] = now
        return before, now


class LfuAgeing(_Ranked):
    """LFU with dynamic ageing: uses plus the rank of what left last (Arlitt 2000)."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._floor = 0.0
        self._counts: dict[Key, int] = {}

    def _rank(self, key: Key, now: int) -> tuple[float, ...]:
        uses = self._counts[key] = self._counts.get(key, 0) + 1 if key in self._ranks else 1
        return self._floor + uses, now

    def _evicted(self, rank: tuple[float, ...]) -> None:
        self._floor = rank[0]


class Arc:
    """Balances recency and frequency by what its ghosts would have hit (Megiddo and Modha 2003)."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._goal = 0.0
        self._once: OrderedDict[Key, None] = OrderedDict()
        self._often: OrderedDict[Key, None] = OrderedDict()
        self._once_ghosts: OrderedDict[Key, None] = OrderedDict()
        self._often_ghosts: OrderedDict[Key, None] = OrderedDict()

    def __contains__(self, key: Key) -> bool:
        return key in self._once or key in self._often

    def use(self, key: Key) -> None:
        if key in self:
            self._once.pop(key, None)
            self._often.pop(key, None)
            self._often[key] = None
        elif key in self._once_ghosts:
            step = max(len(self._often_ghosts) / len(self._once_ghosts), 1.0)
            self._goal = min(self._goal + step, self._capacity)
            self._replace(in_often=False)
            del self._once_ghosts[key]
            self._often[key] = None
        elif key in self._often_ghosts:
            step = max(len(self._once_ghosts) / len(self._often_ghosts), 1.0)
            self._goal = max(self._goal - step, 0.0)
            self._replace(in_often=True)
            del self._often_ghosts[key]
            self._often[key] = None
        else:
            self._make_room()
            self._once[key] = None

    def _make_room(self) -> None:
        if len(self._once) + len(self._once_ghosts) >= self._capacity:
            if len(self._once) < self._capacity:
                self._once_ghosts.popitem(last=False)
                self._replace(in_often=False)
            else:
                self._once.popitem(last=False)
            return
        total = sum(
            map(len, (self._once, self._often, self._once_ghosts, self._often_ghosts)),
        )
        if total >= self._capacity:
            if total >= 2 * self._capacity:
                self._often_ghosts.popitem(last=False)
            self._replace(in_often=False)

    def _replace(self, *, in_often: bool) -> None:
        num_once = len(self._once)
        if num_once and (num_once > self._goal or (in_often and num_once == self._goal)):
            key, _ = self._once.popitem(last=False)
            self._once_ghosts[key] = None
        elif self._often:
            key, _ = self._often.popitem(last=False)
            self._often_ghosts[key] = None
        elif num_once:
            key, _ = self._once.popitem(last=False)
            self._once_ghosts[key] = None


class S3Fifo:
    """A small queue that most pass through once, and a main one (Yang 2023)."""

    def __init__(self, capacity: int) -> None:
        self._small_capacity = max(capacity // 10, 1)
        self._capacity = capacity
        self._uses: dict[Key, int] = {}
        self._small: deque[Key] = deque()
        self._main: deque[Key] = deque()
        self._ghosts: OrderedDict[Key, None] = OrderedDict()

    def __contains__(self, key: Key) -> bool:
        return key in self._uses

    def use(self, key: Key) -> None:
        if key in self._uses:
            self._uses[key] = min(self._uses[key] + 1, 3)
            return
        while len(self._uses) >= self._capacity:
            if len(self._small) >= self._small_capacity or not self._main:
                self._pass_on()
            else:
                self._evict_from_main()
        if key in self._ghosts:
            del self._ghosts[key]
            self._main.append(key)
        else:
            self._small.append(key)
        self._uses[key] = 0

    def _pass_on(self) -> None:
        key = self._small.popleft()
        if self._uses[key] > 1:
            self._uses[key] = 0
            self._main.append(key)
            return
        del self._uses[key]
        self._ghosts[key] = None
        if len(self._ghosts) > self._capacity - self._small_capacity:
            self._ghosts.popitem(last=False)

    def _evict_from_main(self) -> None:
        while self._main:
            key = self._main.popleft()
            if not self._uses[key]:
                del self._uses[key]
                return
            self._uses[key] -= 1
            self._main.append(key)


class Belady(_Ranked):
    """What is used again last leaves first, and may be what has just come (Belady 1966)."""

    def __init__(self, capacity: int, uses: Sequence[Sequence[Key]]) -> None:
        """``uses`` are all that will be, in their order; those of a sequence are at one time."""
        super().__init__(capacity)
        self._next: list[float] = []
        seen: dict[Key, int] = {}
        for at in range(len(uses) - 1, -1, -1):
            for key in reversed(uses[at]):
                self._next.append(seen.get(key, float("inf")))
                seen[key] = at
        self._next.reverse()

    def use(self, key: Key) -> None:
        now = next(self._uses)
        rank = self._ranks[key] = (-self._next[now - 1],)
        heapq.heappush(self._heap, (rank, now, key))
        if len(self._ranks) > self._capacity:
            self._evict()


REFERENCES: dict[str, Callable[[int], Cache]] = {
    "LRU": Lru,
    "LRU-2": Lru2,
    "ARC": Arc,
    "S3-FIFO": S3Fifo,
    "LFU-DA": LfuAgeing,
}
"""Policies that don't know the future, by the names they are known by."""
