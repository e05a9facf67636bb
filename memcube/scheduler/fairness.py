"""Which move is next: what a request waits for, then the tenants in turn, as far as the limits let."""

from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from itertools import islice
from typing import Generic, Protocol, TypeVar

QUANTUM_BYTES = 64 << 20


class Bucket:
    """A token bucket with a given time. It may be overdrawn by one move, so that none is too large for it."""

    def __init__(self, per_s: float, burst: float, *, now: float) -> None:
        self._per_s = per_s
        self._burst = burst
        self._level = burst
        self._at = now

    def is_open(self, now: float) -> bool:
        """Whether something may be taken."""
        self._level = min(self._burst, self._level + max(now - self._at, 0.0) * self._per_s)
        self._at = max(now, self._at)
        return self._level > 0

    def take(self, amount: float) -> None:
        self._level -= amount

    def opens_in_s(self) -> float:
        """Seconds until something may be taken again."""
        return max(0.0, -self._level / self._per_s)


class Queued(Protocol):
    """What the queue asks of a move."""

    @property
    def id(self) -> str: ...
    @property
    def tenant(self) -> str: ...
    @property
    def urgent(self) -> bool: ...
    @property
    def num_bytes(self) -> int: ...


T = TypeVar("T", bound=Queued)
_LOOKS_AHEAD = 16
"""So many moves of a tenant are looked at for one that can start."""


class FairQueue(Generic[T]):
    """Moves by tenant: those that are urgent first, each kind served by deficit round robin over bytes
    (Shreedhar and Varghese 1995)."""

    def __init__(self, quantum_bytes: int = QUANTUM_BYTES) -> None:
        self._urgent: _Ring[T] = _Ring(quantum_bytes)
        self._others: _Ring[T] = _Ring(quantum_bytes)
        self._ids: set[str] = set()

    def __len__(self) -> int:
        return len(self._ids)

    def put(self, move: T) -> None:
        """Let a move wait. Idempotent."""
        if move.id not in self._ids:
            self._ids.add(move.id)
            (self._urgent if move.urgent else self._others).put(move)

    def pop(self, may_start: Callable[[T], bool]) -> T | None:
        """The next move that may start, or None."""
        move = self._urgent.pop(may_start) or self._others.pop(may_start)
        if move is not None:
            self._ids.discard(move.id)
        return move


class _Ring(Generic[T]):
    def __init__(self, quantum_bytes: int) -> None:
        self._quantum = quantum_bytes
        self._waiting: OrderedDict[str, deque[T]] = OrderedDict()
        self._deficit: Counter[str] = Counter()

    def put(self, move: T) -> None:
        self._waiting.setdefault(move.tenant, deque()).append(move)

    def pop(self, may_start: Callable[[T], bool]) -> T | None:
        num_blocked = 0
        while num_blocked < len(self._waiting):
            tenant, waiting = next(iter(self._waiting.items()))
            move = next((m for m in islice(waiting, _LOOKS_AHEAD) if may_start(m)), None)
            if move is None:
                num_blocked += 1
                self._waiting.move_to_end(tenant)
            elif self._deficit[tenant] < move.num_bytes:
                num_blocked = 0
                self._deficit[tenant] += self._quantum
                self._waiting.move_to_end(tenant)
            else:
                self._deficit[tenant] -= move.num_bytes
                waiting.remove(move)
                if not waiting:
                    del self._waiting[tenant], self._deficit[tenant]
                return move
        return None
