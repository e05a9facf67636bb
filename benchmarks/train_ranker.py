"""Learns the ranker's weights from conversations with known evidence.

    python -m benchmarks.train_ranker FILE [--out weights.json] [--leave-one-out FOLDER]

The pools come from the very code that serves requests, over an embedded store, so there is no
difference between training and serving. A conditional logit (each evidence turn against the rest of
its question's pool) with an L2 penalty; the score is then calibrated by a logistic line.
``--leave-one-out`` writes one file a conversation, learned from the others, and prints the figures
of each question ranked by weights that never saw its conversation.
"""

import argparse
import asyncio
import json
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize

from memcube.config import EmbedderConfig
from memcube.cube import Scope, slot
from memcube.embedding import open_embedder
from memcube.embedding.contract import Purpose
from memcube.evaluation.locomo import Conversation, load_locomo
from memcube.evaluation.metrics import measures, summarise
from memcube.ids import TenantId, uuid7
from memcube.retrieval.features import NAMES, matrix
from memcube.retrieval.passage import passage_text
from memcube.retrieval.ranker import POOL, Mode, Retriever
from memcube.retrieval.weights import RankerWeights
from memcube.tiers.edge import EdgeStore
from memcube.tiers.plaintext import IndexedCube, IndexSpec

PENALTY = 1.0
Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Example:
    """A question's pool: features, which rows are evidence, and what is needed to score it."""

    x: Array
    relevant: npt.NDArray[np.bool_]
    turns: list[str]
    evidence: tuple[str, ...]
    category: int


async def collect(
    conversation: Conversation, cache: Path
) -> tuple[list[Example], dict[str, list[tuple[int, dict[str, float]]]]]:
    """Pools of all questions, and the plain rankings' measures."""
    embedder = open_embedder(EmbedderConfig(), cache)
    spec = IndexSpec(embedder=embedder.identity, dim=embedder.dim)
    tenant, now = TenantId(conversation.id), datetime.now(UTC)
    plain: dict[str, list[tuple[int, dict[str, float]]]] = {"dense": [], "bm25": []}
    examples = []
    with tempfile.TemporaryDirectory() as folder:
        store = EdgeStore.open(Path(folder) / "index", spec)
        names: dict[str, str] = {}
        for number, turns in conversation.sessions().items():
            thread = Scope(tenant=tenant, user_id="u", run_id=f"session-{number}").thread
            texts = [passage_text(turn.text, speaker=turn.speaker) for turn in turns]
            vectors = await embedder.embed(texts, Purpose.PASSAGE)
            cubes = [
                IndexedCube(
                    id=uuid7(now),
                    tenant=tenant,
                    version=1,
                    text=turn.text,
                    vector=vectors[seq],
                    kind="episode",
                    state="generated",
                    speaker=turn.speaker,
                    created_at=now,
                    updated_at=now,
                    event_time=turn.time,
                    slot=slot(thread, seq),
                    thread=thread,
                    seq=seq,
                )
                for seq, turn in enumerate(turns)
            ]
            names |= {cube.id: turn.id for cube, turn in zip(cubes, turns, strict=True)}
            await store.put(cubes)
        retriever = Retriever(store, embedder, RankerWeights(np.zeros(len(NAMES)), 1.0, 0.0))
        later = now + timedelta(seconds=1)
        for question in conversation.questions:
            pool = await retriever.pool(tenant, question.text, where=None, now=later, size=POOL)
            turns_found = [names[c.id] for c in pool.candidates]
            examples.append(
                Example(
                    matrix(pool.query, pool.candidates),
                    np.array([turn in question.evidence for turn in turns_found]),
                    turns_found,
                    question.evidence,
                    question.category,
                )
            )
            for system, mode in (("dense", Mode.DENSE), ("bm25", Mode.SPARSE)):
                hits = await retriever.search(
                    tenant, question.text, where=None, now=later, limit=20, mode=mode
                )
                ranked = [names[hit.id] for hit in hits]
                plain[system].append((question.category, measures(ranked, question.evidence)))
        await store.close()
    await embedder.close()
    return examples, plain


def learn(examples: list[Example]) -> RankerWeights:
    """Weights from pools that hold at least one evidence turn."""
    usable = [e for e in examples if e.relevant.any() and not e.relevant.all()]

    def loss(w: Array) -> tuple[float, Array]:
        value, gradient = PENALTY * float(w @ w), 2 * PENALTY * w
        for e in usable:
            scores = e.x @ w
            scores -= scores.max()
            exp = np.exp(scores)
            others = exp[~e.relevant]
            share = 1.0 / int(e.relevant.sum())
            for row in np.flatnonzero(e.relevant):
                # Each evidence turn against all that is no evidence.
                total = exp[row] + others.sum()
                value -= share * (scores[row] - np.log(total))
                expected = (exp[row] * e.x[row] + others @ e.x[~e.relevant]) / total
                gradient += share * (expected - e.x[row])
        return value, gradient

    found = minimize(loss, np.zeros(len(NAMES)), jac=True, method="L-BFGS-B")
    weights = found.x
    scale, offset = _calibrate(examples, weights)
    return RankerWeights(weights, scale, offset)


def _calibrate(examples: list[Example], weights: Array) -> tuple[float, float]:
    """The line whose logistic is the chance of being evidence, over the ten best of each pool."""
    scores, labels = [], []
    for e in examples:
        found = e.x @ weights
        best = np.argsort(-found)[:10]
        scores.extend(found[best])
        labels.extend(e.relevant[best])
    s, y = np.array(scores), np.array(labels, dtype=float)

    def loss(line: Array) -> float:
        logits = line[0] * s + line[1]
        return float(np.logaddexp(0, logits).sum() - (y * logits).sum())

    scale, offset = minimize(loss, np.array([1.0, 0.0])).x
    return float(scale), float(offset)


def rank(example: Example, weights: RankerWeights) -> list[str]:
    """Turns, best first."""
    return [example.turns[row] for row in np.argsort(-(example.x @ weights.weights), kind="stable")]


def write(path: Path, weights: RankerWeights, trained_on: list[str]) -> None:
    """Save a weights file."""
    data = {
        "trained_on": trained_on,
        "weights": {n: round(float(w), 5) for n, w in zip(NAMES, weights.weights, strict=True)},
        "scale": round(weights.scale, 5),
        "offset": round(weights.offset, 5),
    }
    path.write_text(json.dumps(data, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("file", type=Path, help="conversations in LoCoMo's form")
    parser.add_argument(
        "--out", type=Path, help="write weights learned from all conversations here"
    )
    parser.add_argument("--leave-one-out", type=Path, help="write one file a conversation here")
    parser.add_argument("--cache", type=Path, default=Path(".memcube/models"), help="ONNX graphs")
    given = parser.parse_args()
    conversations = load_locomo(given.file)
    pools: dict[str, list[Example]] = {}
    plain: dict[str, list[tuple[int, dict[str, float]]]] = {"dense": [], "bm25": []}
    for conversation in conversations:
        pools[conversation.id], found = asyncio.run(collect(conversation, given.cache))
        for system, rows in found.items():
            plain[system] += rows
        print(f"{conversation.id}: {len(pools[conversation.id])} questions", flush=True)
    held_out = []
    for left_out, examples in pools.items():
        weights = learn([e for name, es in pools.items() if name != left_out for e in es])
        if given.leave_one_out:
            given.leave_one_out.mkdir(parents=True, exist_ok=True)
            path = given.leave_one_out / f"without-{left_out}.json"
            write(path, weights, [name for name in pools if name != left_out])
        rows = [(e.category, measures(rank(e, weights), e.evidence)) for e in examples]
        print(left_out, summarise(rows)["overall"])
        held_out += rows
    inside = np.mean(
        [len(set(e.turns) & set(e.evidence)) / len(e.evidence) for p in pools.values() for e in p]
    )
    print(f"evidence inside the pools: {100 * inside:.1f}%")
    for system, rows in (*plain.items(), ("memcube, left out", held_out)):
        print(system, json.dumps(summarise(rows), indent=None))
    weights = learn([e for es in pools.values() for e in es])
    for name, weight in zip(NAMES, weights.weights, strict=True):
        print(f"  {name:18} {weight:8.3f}")
    if given.out:
        write(given.out, weights, list(pools))


if __name__ == "__main__":
    main()
