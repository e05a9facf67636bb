"""Measures of a ranking against a set of relevant ids, all with binary relevance."""

import math
from collections.abc import Collection, Mapping, Sequence
from statistics import fmean
from typing import Any

from memcube.evaluation.locomo import ADVERSARIAL

RECALL_AT = (5, 10, 20)


def recall_at(ranked: Sequence[str], relevant: Collection[str], k: int) -> float:
    """The share of the relevant that is among the first k."""
    return len(set(ranked[:k]) & set(relevant)) / len(set(relevant))


def reciprocal_rank(ranked: Sequence[str], relevant: Collection[str]) -> float:
    """One over the place of the first relevant one; 0 if there is none."""
    return next((1 / place for place, id in enumerate(ranked, 1) if id in relevant), 0.0)


def ndcg_at(ranked: Sequence[str], relevant: Collection[str], k: int) -> float:
    """Discounted cumulative gain of the first k over that of the best ranking."""
    gain = sum(1 / math.log2(i + 2) for i, id in enumerate(ranked[:k]) if id in relevant)
    best = sum(1 / math.log2(i + 2) for i in range(min(k, len(set(relevant)))))
    return gain / best


def measures(ranked: Sequence[str], relevant: Collection[str]) -> dict[str, float]:
    """All measures of one question, between 0 and 1."""
    return {f"recall@{k}": recall_at(ranked, relevant, k) for k in RECALL_AT} | {
        "mrr": reciprocal_rank(ranked, relevant),
        "ndcg@10": ndcg_at(ranked, relevant, 10),
    }


def summarise(rows: Sequence[tuple[int, Mapping[str, float]]]) -> dict[str, Any]:
    """Means in percent of (category, measures of a question): overall, by category, and without
    the adversarial questions."""
    categories = sorted({category for category, _ in rows})
    return {
        "overall": _means([row for _, row in rows]),
        "by_category": {
            str(category): _means([row for c, row in rows if c == category])
            for category in categories
        },
        "without_adversarial": _means([row for c, row in rows if c != ADVERSARIAL]),
    }


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = rows[0] if rows else ()
    means = {name: round(100 * fmean(row[name] for row in rows), 2) for name in names}
    return means | {"num_questions": len(rows)}
