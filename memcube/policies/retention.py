"""Which KV payloads stay in one medium.

Greedy-Dual-Size with frequency (Cherkasova 1998): a payload is worth ``base + uses * saved / bytes``,
where ``base`` is the worth of the last one that was evicted. So what saves much for its bytes, and is
used often, stays long; and what isn't used is overtaken by what came later, whatever it was worth.
Among equals the one used longest ago goes first. A hint that a conversation goes on counts as uses
that are still to come.

Pure: no clock, no I/O, one thread. Each call costs O(log n), amortised.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

_HINTED_USES = 8.0
"""A conversation that surely goes on counts as this many uses."""
_MAX_SHADOWS = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One payload. ``saves_s`` is what it takes to compute it again, ``load_s`` to bring it up;
    ``group`` says whose next turn may need it (a conversation)."""

    key: str
    num_bytes: int
    tenant: str
    group: str
    saves_s: float
    load_s: float


@dataclass(frozen=True, slots=True)
class Budget:
    """What a tenant may hold at most, and what others' pressure never takes from it."""

    floor_bytes: int = 0
    cap_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether a payload is let in, which others leave for it, and why."""

    admitted: bool
    victims: tuple[str, ...]
    reason: str


class _Rank(NamedTuple):
    worth: float
    used: int


@dataclass(slots=True, eq=False)
class _Entry:
    item: Item
    uses: float
    rank: _Rank
    pins: int = 0


class Retention:
    """The policy of one medium.

    Over ``high`` of the capacity it evicts down to ``low``, so that not each payload that comes in
    has to wait for another to leave.
    """

    def __init__(
        self,
        capacity_bytes: int,
        *,
        low: float = 0.9,
        high: float = 1.0,
        budgets: Mapping[str, Budget] | None = None,
    ) -> None:
        if not 0 < low <= high <= 1:
            raise ValueError("watermarks are fractions with 0 < low <= high <= 1")
        self._high_bytes = int(capacity_bytes * high)
        self._low_bytes = int(capacity_bytes * low)
        self._budgets = dict(budgets or {})
        self._entries: dict[str, _Entry] = {}
        self._heap: list[tuple[_Rank, str]] = []
        """Old ranks stay in it until they come up."""
        self._groups: defaultdict[str, set[str]] = defaultdict(set)
        self._hints: dict[str, float] = {}
        self._shadows: dict[str, float] = {}
        """Uses of what was evicted, so that it does not come back as a stranger; oldest first."""
        self._bytes: Counter[str] = Counter()
        self._used_bytes = 0
        self._base = 0.0
        self._calls = count()

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    def hit(self, key: str, now: float) -> None:
        """A payload was used."""
        if (entry := self._entries.get(key)) is not None:
            entry.uses += 1
            self._rank(entry)

    def admit(self, item: Item, now: float) -> Decision:
        """Let a payload in, if room can be made for it. Idempotent: one that is here counts as hit."""
        if item.key in self._entries:
            self.hit(item.key, now)
            return Decision(True, (), "resident")
        cap = self._budget(item.tenant).cap_bytes
        if item.num_bytes > self._high_bytes or (cap is not None and item.num_bytes > cap):
            return Decision(False, (), "too large")
        victims: list[_Entry] = []
        reason = "room"
        if cap is not None and self._bytes[item.tenant] + item.num_bytes > cap:
            reason = "tenant's budget"
            over = self._bytes[item.tenant] + item.num_bytes - cap
            victims = self._choose(over, only=item.tenant, besides=[])
        freed = sum(victim.item.num_bytes for victim in victims)
        over = self._used_bytes - freed + item.num_bytes - self._high_bytes
        if over > 0:
            reason = "capacity"
            wanted = over + self._high_bytes - self._low_bytes
            victims += self._choose(wanted, only=None, besides=victims)
        freed = sum(victim.item.num_bytes for victim in victims)
        of_tenant = sum(v.item.num_bytes for v in victims if v.item.tenant == item.tenant)
        if self._used_bytes - freed + item.num_bytes > self._high_bytes or (
            cap is not None and self._bytes[item.tenant] - of_tenant + item.num_bytes > cap
        ):
            for victim in victims:
                self._push(victim)
            return Decision(False, (), "no room: the rest is pinned or within its tenant's floor")
        for victim in victims:
            self._base = max(self._base, victim.rank.worth)
            self._remember(victim)
            self._remove(victim)
        entry = _Entry(item, self._shadows.pop(item.key, 0.0) + 1.0, _Rank(0.0, 0))
        self._entries[item.key] = entry
        self._groups[item.group].add(item.key)
        self._bytes[item.tenant] += item.num_bytes
        self._used_bytes += item.num_bytes
        self._rank(entry)
        return Decision(True, tuple(victim.item.key for victim in victims), reason)

    def forget(self, key: str) -> None:
        """A payload is gone. Idempotent."""
        self._shadows.pop(key, None)
        if (entry := self._entries.get(key)) is not None:
            self._remove(entry)

    def pin(self, key: str) -> None:
        """Keep a payload until it is unpinned as often."""
        if (entry := self._entries.get(key)) is not None:
            entry.pins += 1

    def unpin(self, key: str) -> None:
        """Take one pin back."""
        entry = self._entries.get(key)
        if entry is not None and entry.pins:
            entry.pins -= 1
            self._push(entry)

    def hint(self, group: str, probability: float, now: float) -> None:
        """How likely a conversation goes on; 0 takes an earlier hint back."""
        if probability > 0:
            self._hints[group] = min(probability, 1.0)
        else:
            self._hints.pop(group, None)
        for key in self._groups.get(group, ()):
            self._rank(self._entries[key])

    def _budget(self, tenant: str) -> Budget:
        return self._budgets.get(tenant, Budget())

    def _rank(self, entry: _Entry) -> None:
        item = entry.item
        saved_s = max(item.saves_s - item.load_s, 1e-9)
        uses = entry.uses + _HINTED_USES * self._hints.get(item.group, 0.0)
        worth = self._base + uses * saved_s / max(item.num_bytes, 1)
        entry.rank = _Rank(worth, next(self._calls))
        self._push(entry)

    def _push(self, entry: _Entry) -> None:
        heapq.heappush(self._heap, (entry.rank, entry.item.key))
        if len(self._heap) > 64 + 4 * len(self._entries):
            self._heap = [(e.rank, e.item.key) for e in self._entries.values()]
            heapq.heapify(self._heap)

    def _choose(self, num_bytes: int, *, only: str | None, besides: list[_Entry]) -> list[_Entry]:
        """The least worthy that may leave, until so many bytes are free. They are off the heap."""
        chosen: list[_Entry] = []
        passed: list[_Entry] = []
        left: Counter[str] = Counter(self._bytes)
        for one in besides:
            left[one.item.tenant] -= one.item.num_bytes
        taken = {one.item.key for one in besides}
        while num_bytes > 0 and self._heap:
            rank, key = heapq.heappop(self._heap)
            entry = self._entries.get(key)
            if entry is None or entry.rank != rank or key in taken:
                continue
            tenant = entry.item.tenant
            floor = self._budget(tenant).floor_bytes if only is None else 0
            if (
                entry.pins
                or (only is not None and tenant != only)
                or left[tenant] - entry.item.num_bytes < floor
            ):
                passed.append(entry)
                taken.add(key)
                continue
            chosen.append(entry)
            taken.add(key)
            left[tenant] -= entry.item.num_bytes
            num_bytes -= entry.item.num_bytes
        for entry in passed:
            self._push(entry)
        return chosen

    def _remember(self, entry: _Entry) -> None:
        self._shadows[entry.item.key] = entry.uses
        while len(self._shadows) > _MAX_SHADOWS:
            del self._shadows[next(iter(self._shadows))]

    def _remove(self, entry: _Entry) -> None:
        item = entry.item
        del self._entries[item.key]
        group = self._groups[item.group]
        group.discard(item.key)
        if not group:
            del self._groups[item.group]
        self._bytes[item.tenant] -= item.num_bytes
        self._used_bytes -= item.num_bytes
