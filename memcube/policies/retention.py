"""Which KV payloads stay in one medium.

A payload is worth what it saves over what it takes: the time that a use saves (recomputing it, less
loading it) times the uses to be expected per byte and unit of time held. The last is learnt from what
is used again and when (``memcube.policies.reuse``). The least worthy leave first, and what is worth less
than what it would displace isn't let in.

What left, or wasn't let in, is followed for a while as a *shadow*: a few hundred bytes without payload.
So the policy learns of uses that come too late for this medium, and what comes back is no stranger.

Payloads of one class, step of age and worth share a *cell*, in the order of their last use. A cell
has one value; eviction takes the oldest of the cell of least value. Cells, not payloads, are ranked and
learn, so an operation costs O(log n) of the number of cells, amortised.

What was learnt is acted by while it does better than recency (``memcube.policies.duel``), which is what
the policy begins with once it has seen a few hundred uses. Both together took 67 CPU-µs a block on one
core of a shared Xeon (``make bench-trace``).

Pure: no clock, no I/O, one thread.
"""

import heapq
import math
import zlib
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from memcube.policies import reuse
from memcube.policies.duel import Duel
from memcube.policies.reuse import Features, ReuseModel

_MIN_SHADOWS = 65_536
"""So many payloads are followed at least that aren't here; else two for each that is."""
_AGE_EVERY = 64
_FIT_FIRST = 256
_FIT_EVERY = 1024
_WORTHS_PER_DOUBLING = 4
_MOST_ALIKE = 64
_PACE_EVERY = 2048
"""The pace of uses is taken anew after so many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One payload. ``saves_s`` is what it takes to compute it again, ``load_s`` to bring it up;
    ``group`` says whose next turn may need it (a conversation; empty if none).

    ``parent`` is the payload without which this one is of no use, such as the block before it: it does
    not leave before this one.
    """

    key: str
    num_bytes: int
    tenant: str
    group: str
    saves_s: float
    load_s: float
    parent: str | None = None


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


class _Group:
    """A conversation's turns and the payloads of it that are followed."""

    __slots__ = ("entries", "num_turns")

    def __init__(self) -> None:
        self.num_turns = 0
        self.entries: dict[str, _Entry] = {}


class _Entry:
    """A payload that is followed, here or as a shadow."""

    __slots__ = (
        "cell",
        "group",
        "hint",
        "is_here",
        "item",
        "last_wait",
        "lot",
        "num_uses",
        "pins",
        "refused_at",
        "used_at",
        "weight",
    )

    def __init__(self, item: Item, group: _Group | None, lot: float) -> None:
        self.item = item
        self.lot = lot
        self.group = group
        self.hint: int | None = None
        self.is_here = False
        self.pins = 0
        self.num_uses = 0
        self.last_wait = 0
        self.used_at = 0
        self.weight = 1.0
        self.refused_at: float | None = None
        self.cell: _Cell


class _Cell:
    """Payloads of one pool, class, worth and step of age."""

    __slots__ = ("key", "pool", "queued_at", "ready", "rest", "step", "value", "weight")

    def __init__(self, key: "_CellKey", pool: "_Pool", step: int) -> None:
        self.key = key
        self.pool = pool
        self.step = step
        self.value = 0.0
        self.weight = 0.0
        self.queued_at: float | None = None
        """Its rank in the pool's queue."""
        self.ready: OrderedDict[str, _Entry] = OrderedDict()
        """What may be evicted, that used longest ago first."""
        self.rest: OrderedDict[str, _Entry] = OrderedDict()
        """What is pinned, needed by another payload, or a shadow."""


class _Pool:
    """What is evicted together: a tenant with a budget, or all the others."""

    __slots__ = ("number", "queue")

    def __init__(self, number: int) -> None:
        self.number = number
        self.queue: list[tuple[float, int, _Cell]] = []
        """Cells with something ready, by value; others stay in it until they come up."""


_CellKey = tuple[int, int, int]
"""Class, worth (a power of two in quarters) and pool."""


class Retention:
    """The policy of one medium.

    Over ``high`` of the capacity it evicts down to ``low``, so that not each payload that comes in
    has to wait for others to leave.
    """

    def __init__(
        self,
        capacity_bytes: int,
        *,
        low: float = 0.995,
        high: float = 1.0,
        budgets: Mapping[str, Budget] | None = None,
        min_shadows: int = _MIN_SHADOWS,
    ) -> None:
        if not 0 < low <= high <= 1:
            raise ValueError("watermarks are fractions with 0 < low <= high <= 1")
        self._high_bytes = int(capacity_bytes * high)
        self._low_bytes = int(capacity_bytes * low)
        self._budgets = dict(budgets or {})
        self._min_shadows = min_shadows
        self._model = ReuseModel()
        self._duel: Duel[_Entry] = Duel(
            self._high_bytes,
            rule=lambda entry: entry.cell.value,
            fallback=lambda entry: entry.used_at,
        )
        self._entries: dict[str, _Entry] = {}
        self._shadows: OrderedDict[str, _Entry] = OrderedDict()
        """What left longest ago first."""
        self._groups: dict[str, _Group] = {}
        self._hints: OrderedDict[str, tuple[float, float | None, float]] = OrderedDict()
        """By group: the chance, in how many uses it is expected, and when this was said; the oldest first."""
        self._pace: float | None = None
        """Uses per second, once it is known."""
        self._paced_at: tuple[int, float] | None = None
        """How many uses there had been, and the time, when the pace was last taken."""
        self._num_children: Counter[str] = Counter()
        """How many of those here need a payload, by its key."""
        self._pools: dict[str | None, _Pool] = {}
        self._cells: list[dict[_CellKey, _Cell]] = [{} for _ in range(reuse.num_steps())]
        self._bytes: Counter[str] = Counter()
        self._used_bytes = 0
        self._num_uses = 0
        self._age_at = 0
        self._step_due = [0.0] * reuse.num_steps()
        self._fit_at = _FIT_FIRST
        self._fitted_at = 0
        self._num_queued = 0

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    @property
    def num_shadows(self) -> int:
        return len(self._shadows)

    def hit(self, key: str, now: float) -> None:
        """A payload was used. Of an unknown one nothing is learnt."""
        if (entry := self._entries.get(key)) is not None:
            self._use(entry, now)
            self._put(entry)
            self._duel.use(entry, now)

    def admit(self, item: Item, now: float) -> Decision:
        """Let a payload in, if room can be made for it. Idempotent: one that is here counts as hit.

        Offer the blocks of a prompt from its beginning: what needs a payload that was just refused is
        refused too. Offer those too that will be refused: it is how the policy gets to know them.
        """
        entry = self._entries.get(item.key)
        if entry is not None:
            self._use(entry, now)
            self._put(entry)
            self._duel.use(entry, now)
            return Decision(True, (), "resident")
        entry = self._follow(item)
        self._use(entry, now)
        refusal = self._refusal(item, now)
        if refusal is not None:
            return self._refuse(entry, refusal, now)
        if item.parent is not None:
            self._need(item.parent)
        entry.cell = self._cell_of(entry, 0)
        victims, reason = self._victims(item, self._rank(entry))
        if victims is None:
            if item.parent is not None:
                self._release(item.parent)
            return self._refuse(entry, reason, now)
        for victim in victims:
            self._leave(victim)
        entry.is_here = True
        self._entries[item.key] = entry
        self._bytes[item.tenant] += item.num_bytes
        self._used_bytes += item.num_bytes
        self._put(entry)
        self._duel.use(entry, now)
        return Decision(True, tuple(victim.item.key for victim in victims), reason)

    def forget(self, key: str) -> None:
        """A payload is gone, and won't be asked for again under this key. Idempotent."""
        entry = self._entries.get(key)
        if entry is not None:
            self._take(entry)
            self._uncount(entry)
            if entry.item.parent is not None:
                self._release(entry.item.parent)
        else:
            entry = self._shadows.pop(key, None)
            if entry is None:
                return
            self._take(entry)
        self._unfollow(entry)

    def pin(self, key: str) -> None:
        """Keep a payload until it is unpinned as often."""
        if (entry := self._entries.get(key)) is not None:
            entry.pins += 1
            self._settle(entry)

    def unpin(self, key: str) -> None:
        """Take one pin back."""
        entry = self._entries.get(key)
        if entry is not None and entry.pins:
            entry.pins -= 1
            self._settle(entry)

    def hint(
        self, group: str, probability: float | None, now: float, expected_at: float | None = None
    ) -> None:
        """How likely it is that a conversation has another turn; None takes an earlier hint back.

        ``expected_at``: when that turn is expected, where somebody knows; by the clock of ``now``.

        It holds until a payload of the group is used at another time. So give it after the turn, or
        at the time (``now``) of the turn: best between the hits and what is offered for admission then.
        How far hints can be trusted is learnt too. Groups of different tenants need different names.
        """
        self._hints.pop(group, None)
        wait = None
        if probability is not None:
            if expected_at is not None and self._pace is not None:
                wait = max(expected_at - now, 0.0) * self._pace
            self._hints[group] = (probability, wait, now)
            if len(self._hints) > self._min_shadows:
                self._hints.popitem(last=False)
        found = self._groups.get(group)
        for entry in found.entries.values() if found is not None else ():
            level = None
            if probability is not None:
                age = self._num_uses - entry.used_at
                level = reuse.hint_level(probability, None if wait is None else age + wait)
            if entry.hint != level:
                entry.hint = level
                self._take(entry)
                self._insert(entry, self._cell_of(entry, entry.cell.step))

    # What is followed: uses, ages, shadows.

    def _follow(self, item: Item) -> _Entry:
        """The shadow of a payload, taken out of its cell, or a new entry; in neither case counted yet."""
        entry = self._shadows.pop(item.key, None)
        if entry is not None:
            entry.item = item
            return entry
        group = None
        if item.group:
            group = self._groups.get(item.group)
            if group is None:
                group = self._groups[item.group] = _Group()
        entry = _Entry(item, group, self._lot(item))
        if group is not None:
            group.entries[item.key] = entry
        return entry

    def _lot(self, item: Item) -> float:
        """That of the conversation, or of what the payload needs: a chain is in a sample or it isn't."""
        if not item.group and item.parent is not None:
            parent = self._entries.get(item.parent) or self._shadows.get(item.parent)
            if parent is not None:
                return parent.lot
        return zlib.crc32((item.group or item.key).encode()) / 2**32

    def _unfollow(self, entry: _Entry) -> None:
        self._duel.drop(entry)
        age = self._num_uses - entry.used_at
        self._model.lost(entry.cell.key[0], entry.cell.step, age, entry.weight)
        group = entry.group
        if group is not None:
            del group.entries[entry.item.key]
            if not group.entries:
                self._groups.pop(entry.item.group, None)

    def _use(self, entry: _Entry, now: float) -> None:
        """Learn from a use. The entry is in no cell afterwards; its features are those of the use."""
        self._num_uses += 1
        if self._num_uses >= self._age_at:
            self._age()
            self._take_pace(now)
        if self._num_uses >= self._fit_at:
            self._fit()
        if entry.num_uses:
            self._take(entry)
            age = self._num_uses - entry.used_at
            self._model.used(entry.cell.key[0], entry.cell.step, age, entry.weight)
            entry.last_wait = age
        entry.num_uses += 1
        entry.used_at = self._num_uses
        entry.hint = None
        group = entry.group
        if group is not None:
            if (hint := self._hints.get(entry.item.group)) is not None:
                if hint[2] == now:
                    entry.hint = reuse.hint_level(hint[0], hint[1])
                else:
                    del self._hints[entry.item.group]
            group.num_turns = max(group.num_turns, entry.num_uses)
            # The n payloads of a conversation come back together: they tell as much as sqrt(n) others.
            entry.weight = min(len(group.entries), _MOST_ALIKE) ** -0.5

    def _age(self) -> None:
        """Move what has become older to the next step."""
        now = self._num_uses
        self._age_at = now + _AGE_EVERY
        for step in range(reuse.num_steps() - 2, -1, -1):
            cells = self._cells[step]
            if not cells or now < self._step_due[step]:
                continue
            edge = reuse.next_edge(step)
            # A step is looked at eight times while it lasts.
            self._step_due[step] = now + (edge / 32 if step else 0)
            youngest = now - edge
            for cell in cells.values():
                older: _Cell | None = None
                passed = 0.0
                for queue in (cell.ready, cell.rest):
                    while queue and (entry := next(iter(queue.values()))).used_at <= youngest:
                        if older is None:
                            older = self._cell(cell.key, cell.pool, step + 1)
                        queue.popitem(last=False)
                        passed += entry.weight
                        (older.ready if queue is cell.ready else older.rest)[entry.item.key] = entry
                        entry.cell = older
                if older is not None:
                    cell.weight -= passed
                    older.weight += passed
                    self._model.aged(cell.key[0], step, passed)
                    self._queue(older)

    def _take_pace(self, now: float) -> None:
        """Of the last uses, those longer ago counting for less."""
        if self._paced_at is None:
            self._paced_at = (self._num_uses, now)
            return
        num_uses, passed_s = self._num_uses - self._paced_at[0], now - self._paced_at[1]
        # Requests may be noted at one time together: let some time pass.
        if num_uses >= _PACE_EVERY and passed_s > 0:
            pace = num_uses / passed_s
            self._pace = pace if self._pace is None else math.sqrt(self._pace * pace)
            self._paced_at = (self._num_uses, now)

    def _fit(self) -> None:
        """Learn, and value all cells anew; empty ones go."""
        present = np.zeros((len(self._model), reuse.num_steps()))
        num_cells = 0
        for step, cells in enumerate(self._cells):
            for key in [key for key, cell in cells.items() if not cell.ready and not cell.rest]:
                del cells[key]
            for key, cell in cells.items():
                present[key[0], step] += cell.weight
            num_cells += len(cells)
        self._model.fit(present, self._num_uses - self._fitted_at)
        self._duel.decide(len(self._entries), self._num_uses - self._fitted_at)
        self._fitted_at = self._num_uses
        self._fit_at = self._num_uses + min(max(_FIT_EVERY, num_cells), max(self._num_uses, 1))
        for pool in self._pools.values():
            pool.queue.clear()
        for cells in self._cells:
            for cell in cells.values():
                cell.value = self._value(cell.key, cell.step)
                cell.queued_at = None
                self._queue(cell)

    # Cells.

    def _value(self, key: _CellKey, step: int) -> float:
        return self._model.index[key[0]][step] * 2.0 ** (key[1] / _WORTHS_PER_DOUBLING)

    def _rank(self, entry: _Entry) -> float:
        """The lowest leaves first."""
        return entry.used_at if self._duel.falls_back else entry.cell.value

    def _cell_of(self, entry: _Entry, step: int) -> _Cell:
        item, group = entry.item, entry.group
        num_turns = entry.num_uses if group is None else group.num_turns
        features = Features.of(entry.hint, entry.num_uses, num_turns, entry.last_wait)
        pool = self._pool(item.tenant)
        key = (self._model.class_of(features), _worth_level(item), pool.number)
        return self._cell(key, pool, step)

    def _cell(self, key: _CellKey, pool: _Pool, step: int) -> _Cell:
        cell = self._cells[step].get(key)
        if cell is None:
            cell = self._cells[step][key] = _Cell(key, pool, step)
            cell.value = self._value(key, step)
        return cell

    def _pool(self, tenant: str) -> _Pool:
        owner = tenant if tenant in self._budgets else None
        pool = self._pools.get(owner)
        if pool is None:
            pool = self._pools[owner] = _Pool(len(self._pools))
        return pool

    def _queue(self, cell: _Cell) -> None:
        """See to it that a cell is in its pool's queue at its rank, or a lower one, if it has one."""
        if not cell.ready:
            return
        rank = self._rank(next(iter(cell.ready.values())))
        if cell.queued_at is None or rank < cell.queued_at:
            cell.queued_at = rank
            self._num_queued += 1
            heapq.heappush(cell.pool.queue, (rank, self._num_queued, cell))

    def _first(self, pool: _Pool) -> tuple[float, _Cell] | None:
        """The cell whose first is the least worthy."""
        while pool.queue:
            queued_at, _, cell = pool.queue[0]
            if queued_at == cell.queued_at and cell.ready:
                rank = self._rank(next(iter(cell.ready.values())))
                if rank == queued_at:
                    return rank, cell
            heapq.heappop(pool.queue)
            if queued_at == cell.queued_at:
                cell.queued_at = None
                self._queue(cell)
        return None

    def _put(self, entry: _Entry) -> None:
        """Into the cell of a payload just used."""
        self._insert(entry, self._cell_of(entry, 0))

    def _insert(self, entry: _Entry, cell: _Cell, *, first: bool = False) -> None:
        key = entry.item.key
        is_ready = entry.is_here and not entry.pins and not self._num_children.get(key)
        queue = cell.ready if is_ready else cell.rest
        queue[key] = entry
        if first:
            queue.move_to_end(key, last=False)
        entry.cell = cell
        cell.weight += entry.weight
        if is_ready:
            self._queue(cell)

    def _take(self, entry: _Entry) -> None:
        cell = entry.cell
        cell.weight -= entry.weight
        if cell.ready.pop(entry.item.key, None) is None:
            cell.rest.pop(entry.item.key, None)

    def _settle(self, entry: _Entry) -> None:
        """After a change of what keeps a payload: it may be evicted now, or no longer."""
        self._take(entry)
        self._insert(entry, entry.cell, first=True)

    def _need(self, parent: str) -> None:
        self._num_children[parent] += 1
        if self._num_children[parent] == 1 and (entry := self._entries.get(parent)) is not None:
            self._settle(entry)

    def _release(self, parent: str) -> None:
        self._num_children[parent] -= 1
        if not self._num_children[parent]:
            del self._num_children[parent]
            if (entry := self._entries.get(parent)) is not None:
                self._settle(entry)

    # Who comes in and who leaves.

    def _refusal(self, item: Item, now: float) -> str | None:
        """Why an item can't be let in, whatever else is here."""
        cap = self._budget(item.tenant).cap_bytes
        if item.num_bytes > self._high_bytes or (cap is not None and item.num_bytes > cap):
            return "too large"
        if item.saves_s <= item.load_s:
            return "quicker computed than loaded"
        if item.parent is not None:
            parent = self._shadows.get(item.parent)
            if parent is not None and parent.refused_at == now:
                return "what it needs was refused"
        return None

    def _refuse(self, entry: _Entry, reason: str, now: float) -> Decision:
        entry.refused_at = now
        self._put(entry)
        if entry.item.saves_s > entry.item.load_s:
            self._duel.use(entry, now)
        self._shadow(entry)
        return Decision(False, (), reason)

    def _victims(self, item: Item, rank: float) -> tuple[list[_Entry] | None, str]:
        """What leaves for an item of this rank, or None and why it isn't let in.

        The victims are out of their cells, and what they needed may follow them; else all is as it was.
        """
        tenant = item.tenant
        budget = self._budget(tenant)
        victims: list[_Entry] = []
        left: Counter[str] = Counter()
        reason = "room"
        used, of_tenant = self._used_bytes, self._bytes[tenant]

        def take(pools: list[_Pool], keep: bool) -> bool:
            nonlocal used, of_tenant
            found = self._least(pools, keep, left)
            if found is None:
                return False
            victims.append(found)
            num_bytes = found.item.num_bytes
            left[found.item.tenant] += num_bytes
            used -= num_bytes
            if found.item.tenant == tenant:
                of_tenant -= num_bytes
            return True

        own = [self._pool(tenant)]
        others = list(self._pools.values())
        # A tenant gets its floor even for what is worth little.
        deserves = of_tenant + item.num_bytes <= budget.floor_bytes
        cap = budget.cap_bytes
        is_refused = ""
        if cap is not None and of_tenant + item.num_bytes > cap:
            reason = "tenant's budget"
            while not is_refused and of_tenant + item.num_bytes > cap:
                if not take(own, False):
                    is_refused = "no room: the rest is pinned"
                elif rank < self._rank(victims[-1]):
                    is_refused = "worth less than what is there"
        if not is_refused and used + item.num_bytes > self._high_bytes:
            reason = "capacity"
            while not is_refused and used + item.num_bytes > self._high_bytes:
                if not take(others, True) and not take(own, False):
                    is_refused = "no room: the rest is pinned or within its tenant's floor"
                elif not deserves and rank < self._rank(victims[-1]):
                    is_refused = "worth less than what is there"
            while not is_refused and used + item.num_bytes > self._low_bytes:
                if not take(others, True):
                    break
        if is_refused:
            for victim in reversed(victims):
                if victim.item.parent is not None:
                    self._need(victim.item.parent)
                self._insert(victim, victim.cell, first=True)
            return None, is_refused
        return victims, reason

    def _least(self, pools: list[_Pool], keep: bool, left: Counter[str]) -> _Entry | None:
        """Take the least worthy that may leave out of its queue; ``keep``: not what is in a floor."""
        best: _Cell | None = None
        least = math.inf
        for pool in pools:
            if (first := self._first(pool)) is None or first[0] >= least:
                continue
            rank, cell = first
            if keep:
                item = next(iter(cell.ready.values())).item
                rest = self._bytes[item.tenant] - left[item.tenant] - item.num_bytes
                if rest < self._budget(item.tenant).floor_bytes:
                    continue
            best, least = cell, rank
        if best is None:
            return None
        _, entry = best.ready.popitem(last=False)
        best.weight -= entry.weight
        if entry.item.parent is not None:
            self._release(entry.item.parent)
        return entry

    def _leave(self, entry: _Entry) -> None:
        """Evict: it is followed as a shadow."""
        self._uncount(entry)
        self._insert(entry, entry.cell)
        self._shadow(entry)

    def _uncount(self, entry: _Entry) -> None:
        """No longer here."""
        item = entry.item
        del self._entries[item.key]
        entry.is_here = False
        entry.pins = 0
        self._bytes[item.tenant] -= item.num_bytes
        self._used_bytes -= item.num_bytes

    def _shadow(self, entry: _Entry) -> None:
        self._shadows[entry.item.key] = entry
        if len(self._shadows) > max(self._min_shadows, 2 * len(self._entries)):
            _, oldest = self._shadows.popitem(last=False)
            self._take(oldest)
            self._unfollow(oldest)

    def _budget(self, tenant: str) -> Budget:
        return self._budgets.get(tenant, _NO_BUDGET)


_NO_BUDGET = Budget()


def _worth_level(item: Item) -> int:
    """What a use saves per byte, in quarters of a doubling."""
    saved_s = max(item.saves_s - item.load_s, 1e-12)
    return round(_WORTHS_PER_DOUBLING * math.log2(saved_s / max(item.num_bytes, 1)))
