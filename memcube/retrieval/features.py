"""The features of a pool of candidates. One row a candidate; every feature is about 0 to 1.

A feature of something that is not there (no thread, no speaker) is 0 for the whole pool, and a
feature that is equal for all candidates of a pool can't change their order.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from memcube.ids import CubeId
from memcube.retrieval.query import Query

Matrix = npt.NDArray[np.float64]

_TIME = re.compile(
    r"\b(yesterday|today|tonight|tomorrow|ago|last|next|week|weekend|month|year|day|morning|evening|"
    r"night|january|february|march|april|may|june|july|august|september|october|november|december|"
    r"monday|tuesday|wednesday|thursday|friday|saturday|sunday|since|recently|\d{4})\b",
    re.IGNORECASE,
)

NAMES = (
    "dense",
    "bm25",
    "dense_x_bm25",
    "dense_prev",
    "dense_next",
    "dense_prev2",
    "dense_next2",
    "bm25_prev",
    "bm25_next",
    "bm25_prev2",
    "bm25_next2",
    "thread_dense",
    "thread_bm25",
    "speaker_named",
    "speaker_other",
    "is_question",
    "prev_is_question",
    "log_length",
    "when_time",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One cube of the pool, with what the features need."""

    id: CubeId
    cosine: float
    bm25: float
    text: str
    speaker: str | None
    thread: str | None
    neighbours: tuple[tuple[float, float] | None, ...]
    """(cosine, BM25) of the turns before, after, two before and two after; None where there is none."""

    prev_is_question: bool


def matrix(query: Query, pool: Sequence[Candidate]) -> Matrix:
    """Features of shape (len(pool), len(NAMES))."""
    n = len(pool)
    x = np.zeros((n, len(NAMES)))
    column = {name: i for i, name in enumerate(NAMES)}
    cosine = np.array([c.cosine for c in pool])
    bm25 = np.array([c.bm25 for c in pool])
    low, high = (float(cosine.min()), float(cosine.max())) if n else (0.0, 1.0)
    width = max(high - low, 1e-6)
    top = max(float(bm25.max()) if n else 0.0, 1e-6)
    dense, sparse = (cosine - low) / width, bm25 / top
    x[:, column["dense"]] = dense
    x[:, column["bm25"]] = sparse
    x[:, column["dense_x_bm25"]] = dense * sparse
    for place, suffix in enumerate(("prev", "next", "prev2", "next2")):
        for row, candidate in enumerate(pool):
            neighbour = candidate.neighbours[place]
            if neighbour is not None:
                x[row, column[f"dense_{suffix}"]] = max(0.0, (neighbour[0] - low) / width)
                x[row, column[f"bm25_{suffix}"]] = neighbour[1] / top
    _threads(x, column, pool, dense, sparse)
    for row, candidate in enumerate(pool):
        if query.named and candidate.speaker is not None:
            place = "speaker_named" if candidate.speaker in query.named else "speaker_other"
            x[row, column[place]] = 1.0
        x[row, column["is_question"]] = candidate.text.rstrip().endswith("?")
        x[row, column["prev_is_question"]] = candidate.prev_is_question
        x[row, column["log_length"]] = np.log1p(len(candidate.text)) / 6.0
        if query.asks_when and _TIME.search(candidate.text):
            x[row, column["when_time"]] = 1.0
    return x


def _threads(
    x: Matrix,
    column: Mapping[str, int],
    pool: Sequence[Candidate],
    dense: Matrix,
    sparse: Matrix,
) -> None:
    """How well a candidate's thread does: the mean of its three best turns, the candidate's own
    left out, against the best thread's."""
    rows: dict[str, list[int]] = {}
    for row, candidate in enumerate(pool):
        if candidate.thread is not None:
            rows.setdefault(candidate.thread, []).append(row)
    if len(rows) < 2:
        return
    for name, values in (("thread_dense", dense), ("thread_bm25", sparse)):
        for members in rows.values():
            ordered = sorted(members, key=lambda row: -values[row])[:4]
            for row in members:
                best = [values[other] for other in ordered if other != row][:3]
                x[row, column[name]] = sum(best) / 3
