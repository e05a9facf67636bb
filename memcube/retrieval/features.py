"""The features of a pool of candidates. One row a candidate; every feature is about 0 to 1.

A feature of something that is not there (no thread, no speaker, no date) is 0 for the whole pool,
and a feature that is equal for all candidates of a pool can't change their order.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from memcube.retrieval.query import Query
from memcube.tiers import bm25
from memcube.tiers.plaintext import StoredCube

Matrix = npt.NDArray[np.float64]

NAMES = (
    "dense",
    "bm25_squared",
    "coverage",
    "dense_next",
    "bm25_prev",
    "bm25_prev2",
    "thread_dense",
    "thread_bm25",
    "speaker",
    "is_question",
    "after_question",
    "proper_names",
    "when_time",
    "asked_month",
    "asked_day",
)
"""What each means is in docs/retrieval.md."""

SPREAD = 0.2
"""The cosine's unit, about what lies between the best and the 16th of a conversation. Measured by the
pool's own spread, a clear best among facts would count no more than a weak one."""

LOWEST_DENSE = -1.5
_TIME = re.compile(
    r"\b(yesterday|today|tonight|tomorrow|ago|last|next|week|weekend|month|year|day|morning|evening|"
    r"night|january|february|march|april|may|june|july|august|september|october|november|december|"
    r"monday|tuesday|wednesday|thursday|friday|saturday|sunday|since|recently|\d{4})\b",
    re.IGNORECASE,
)
_PROPER = re.compile(r"(?<=[a-z,] )[A-Z][a-z]+")

Place = tuple[str, int]
"""Thread and number of a turn."""


class Scores(NamedTuple):
    """Both scores of one turn."""

    cosine: float
    bm25: float


class Candidate(NamedTuple):
    """One cube of the pool. ``place`` is None for a cube that is in no thread."""

    cube: StoredCube
    cosine: float
    bm25: float
    place: Place | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """The candidates of a query and all that is known of the turns around them."""

    query: Query
    candidates: Sequence[Candidate]
    turns: Mapping[Place, Scores]
    """Scores of the candidates' turns and of turns near them."""

    best_cosine: float
    low_cosine: float
    """That of the last of the best few by cosine: the zero of ``dense``."""

    best_bm25: float


class TextFacts(NamedTuple):
    """What the features need of a text, whatever the query."""

    terms: frozenset[int]
    is_question: bool
    num_names: int
    has_time: bool


class TextReader:
    """Reads texts and remembers what it read, by hash: no text outlives its cube here."""

    MAX_HELD = 16_384

    def __init__(self) -> None:
        self._held: dict[int, TextFacts] = {}

    def read(self, text: str) -> TextFacts:
        """The facts of a text."""
        key = hash(text)
        facts = self._held.get(key)
        if facts is None:
            if len(self._held) >= self.MAX_HELD:
                self._held.clear()
            facts = self._held[key] = TextFacts(
                terms=frozenset(bm25.terms(text)),
                is_question=text.rstrip().endswith("?"),
                num_names=len(set(_PROPER.findall(text))),
                has_time=_TIME.search(text) is not None,
            )
        return facts


def matrix(pool: Pool, reader: TextReader) -> Matrix:
    """Features of shape (number of candidates, len(NAMES))."""
    query, candidates, turns = pool.query, pool.candidates, pool.turns
    facts = [reader.read(c.cube.text) for c in candidates]
    shared = [own.terms & query.terms for own in facts]
    at = {c.place: row for row, c in enumerate(candidates) if c.place is not None}
    top = max(pool.best_bm25, 1e-6)
    threads = _Threads(turns, pool.low_cosine)
    weight = _term_weights(query, shared)
    covered = [sum([weight[term] for term in terms]) for terms in shared]
    # A word or two that happen to be shared say little of a query that is otherwise unmatched.
    trust = max(covered, default=0.0)
    rows = []
    for row, (candidate, own) in enumerate(zip(candidates, facts, strict=True)):
        dense = max((candidate.cosine - pool.low_cosine) / SPREAD, LOWEST_DENSE)
        dense_next = bm25_prev = bm25_prev2 = thread_dense = thread_bm25 = 0.0
        coverage, before = covered[row], None
        place = candidate.place
        if place is not None:
            thread, seq = place
            if (turn := turns.get((thread, seq + 1))) is not None:
                dense_next = max((turn.cosine - pool.low_cosine) / SPREAD, 0.0)
            if (turn := turns.get((thread, seq - 1))) is not None:
                bm25_prev = turn.bm25 / top
            if (turn := turns.get((thread, seq - 2))) is not None:
                bm25_prev2 = turn.bm25 / top
            if (row_before := at.get((thread, seq - 1))) is not None:
                before = facts[row_before]
                coverage += sum([weight[term] for term in shared[row_before] - shared[row]])
            thread_dense, thread_bm25 = threads.support(thread, candidate)
        speaker, same_month, day_nearness = 0.0, False, 0.0
        if query.named and (name := candidate.cube.payload.get("speaker")) is not None:
            speaker = 1.0 if name in query.named else -1.0
        if query.date is not None:
            payload = candidate.cube.payload
            time = payload.get("event_time") or payload.get("created_at")
            if time is not None:
                same_month = query.date.same_month(time)
                day_nearness = query.date.day_nearness(time)
        rows.append(
            (
                dense,
                trust * (candidate.bm25 / top) ** 2,
                coverage,
                dense_next,
                bm25_prev,
                bm25_prev2,
                thread_dense / SPREAD,
                thread_bm25 / top,
                speaker,
                place is not None and own.is_question,
                before is not None and before.is_question,
                min(own.num_names, 3) / 3 if place is not None else 0.0,
                query.asks_when and own.has_time,
                same_month,
                day_nearness,
            )
        )
    return np.array(rows, dtype=np.float64).reshape(len(rows), len(NAMES))


def _term_weights(query: Query, shared: Sequence[frozenset[int]]) -> dict[int, float]:
    """Each query term's share of the query: terms that are rare in the pool weigh most, and those
    that it lacks too, so that a query which the pool hardly matches has little coverage."""
    counts = Counter(term for terms in shared for term in terms)
    weights = {term: math.log1p(len(shared) / (counts[term] + 0.5)) for term in query.terms}
    total = sum(weights.values())
    return {term: weight / total for term, weight in weights.items()}


class _Best:
    """The best few of a thread's scores, and their mean with one turn's own left out."""

    COUNT = 3

    def __init__(self, scores: list[float]) -> None:
        best = sorted(scores, reverse=True)[: self.COUNT + 1]
        self._least = best[self.COUNT - 1] if len(best) > self.COUNT else 0.0
        self._sum = sum(best)
        self._mean = sum(best[: self.COUNT]) / self.COUNT

    def without(self, own: float) -> float:
        if own >= self._least:
            return max(self._sum - own, 0.0) / self.COUNT
        return self._mean


class _Threads:
    """How well a thread does: the mean of its three best turns, the candidate's own left out.

    With a single thread there is nothing to compare, so all support is 0.
    """

    def __init__(self, turns: Mapping[Place, Scores], low_cosine: float) -> None:
        self._low = low_cosine
        found: dict[str, tuple[list[float], list[float]]] = {}
        for (thread, _), (cosine, score) in turns.items():
            if (lists := found.get(thread)) is None:
                lists = found[thread] = ([], [])
            lists[0].append(max(cosine - low_cosine, 0.0))
            lists[1].append(score)
        self._best: dict[str, tuple[_Best, _Best]] = {}
        if len(found) > 1:
            self._best = {t: (_Best(dense), _Best(sparse)) for t, (dense, sparse) in found.items()}

    def support(self, thread: str, candidate: Candidate) -> tuple[float, float]:
        """By cosine above the low one, and by BM25."""
        if (best := self._best.get(thread)) is None:
            return 0.0, 0.0
        dense, sparse = best
        own_dense = max(candidate.cosine - self._low, 0.0)
        return dense.without(own_dense), sparse.without(candidate.bm25)
