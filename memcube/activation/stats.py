"""What an engine counts, and what it shows of that."""

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Histogram:
    """Counts of values by upper bound; those above the last bound stand in a bucket of their own."""

    def __init__(self, bounds: tuple[float, ...] = SECONDS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def shown(self) -> "HistogramData":
        """A copy that stays as it is."""
        return HistogramData(bounds=self.bounds, counts=tuple(self.counts), sum=self.sum)


@dataclass(frozen=True, slots=True, kw_only=True)
class HistogramData:
    """``counts`` has one more than ``bounds``; they don't add up from bucket to bucket."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float

    @property
    def count(self) -> int:
        return sum(self.counts)


class Rate:
    """Events a second, those of the last ten seconds counting most."""

    _TAU_S = 10.0

    def __init__(self) -> None:
        self._rate = 0.0
        self._at: float | None = None

    def add(self, count: int, now: float) -> None:
        """Count events that came up to now."""
        if self._at is None:
            self._at = now
        self._rate = self.at(now) + count / self._TAU_S
        self._at = now

    def at(self, now: float) -> float:
        """The rate now."""
        return 0.0 if self._at is None else self._rate * math.exp((self._at - now) / self._TAU_S)


class Speed:
    """Work a second, as a mean over about the last ``span_s`` seconds of it."""

    def __init__(self, span_s: float, first_guess: float) -> None:
        self._span_s = span_s
        self._done, self._took_s = first_guess * 1e-3, 1e-3

    def add(self, amount: float, took_s: float) -> None:
        """Count work done in so many seconds."""
        self._done += amount
        self._took_s += took_s
        if self._took_s > self._span_s:
            keep = self._span_s / self._took_s
            self._done, self._took_s = self._done * keep, self._span_s

    @property
    def per_s(self) -> float:
        return self._done / self._took_s


@dataclass(slots=True)
class Counters:
    """What the batcher counts. One thread writes."""

    steps: int = 0
    step_s: float = 0.0
    failed_steps: int = 0
    prefilled_tokens: int = 0
    generated_tokens: int = 0
    generated: Rate = field(default_factory=Rate)
    ended: Rate = field(default_factory=Rate)
    prefill: Speed = field(default_factory=lambda: Speed(30.0, first_guess=300.0))
    attached_tokens: Counter[str] = field(default_factory=Counter)
    finished: Counter[str] = field(default_factory=Counter)
    ttft: dict[str, Histogram] = field(default_factory=dict)
    queue: Histogram = field(default_factory=Histogram)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """One moment of an engine.

    ``attached_tokens`` and ``ttft_s`` are by kind of reuse: exact, composed, and for the time to
    the first token also none. ``finished`` is by reason, errors and cancellations included.
    """

    running: int
    waiting: int
    background: int
    tokens_per_s: float
    prefill_tokens_per_s: float
    steps: int
    step_s: float
    failed_steps: int
    prefilled_tokens: int
    generated_tokens: int
    attached_tokens: Mapping[str, int]
    buffer_bytes: int
    pool_bytes: int
    pool_blocks: int
    bytes_by_tenant: Mapping[str, int]
    evictions: Mapping[str, int]
    finished: Mapping[str, int]
    ttft_s: Mapping[str, HistogramData]
    queue_s: HistogramData


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterStats:
    """The adapters of an engine. ``load_s`` is all the time that loads took; ``wait_s`` how long
    requests waited for theirs, by whether it was ``resident`` (a swap) or had to be ``loaded``."""

    resident: int
    resident_bytes: int
    loads: int
    load_s: float
    evictions: int
    refused: Mapping[str, int]
    """Requests whose adapter could not be used, by the error's code."""
    wait_s: Mapping[str, HistogramData]


@dataclass(frozen=True, slots=True, kw_only=True)
class MediumStats:
    """One medium's bytes and counts, since it was opened."""

    name: str
    num_payloads: int
    used_bytes: int
    bytes_by_tenant: Mapping[str, int]
    hits: int
    hit_tokens: int
    misses: int
    events: Mapping[str, int]
    """``evicted: REASON``, ``refused: REASON``, ``failed: ERROR``, ``lost`` (damaged or vanished)."""
    load_s_per_mb: float


@dataclass(frozen=True, slots=True, kw_only=True)
class KvStats:
    """One moment of an engine, and of the media of its node, which its engines share."""

    engine: EngineStats
    media: Sequence[MediumStats]
    node: str = ""
    adapters: AdapterStats | None = None
    """None where the engine serves none."""
