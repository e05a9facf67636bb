"""Learns the ranker's weights from conversations with known evidence.

    python -m benchmarks.train_ranker FILE [--out weights.json] [--leave-one-out FOLDER]

The pools come from the very code that serves requests, over an embedded store, so there is no
difference between training and serving. A conditional logit (each evidence turn against the rest of
its question's pool) with an L2 penalty; the score is then calibrated by a logistic line.
Calibration also asks each conversation another one's questions, which it can't answer.
``--leave-one-out`` writes one file a conversation, learned from the others, and prints the figures
of each question ranked by weights that never saw its conversation.
"""

import argparse
import asyncio
import json
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize

from memcube.config import EmbedderConfig
from memcube.cube import Scope, slot
from memcube.embedding import open_embedder
from memcube.embedding.contract import Embedder, Purpose
from memcube.evaluation.locomo import Conversation, Question, load_locomo
from memcube.evaluation.metrics import measures, summarise
from memcube.ids import TenantId, uuid7
from memcube.retrieval.features import NAMES, Pool, TextReader, matrix
from memcube.retrieval.passage import passage_text
from memcube.retrieval.ranker import Mode, Retriever
from memcube.retrieval.weights import RankerWeights
from memcube.tiers.edge import EdgeStore
from memcube.tiers.plaintext import IndexedCube, IndexSpec

PENALTY = 1.0
Array = npt.NDArray[np.float64]


Row = tuple[int, dict[str, float]]
"""Category and measures of one question."""

TOP_K = 20


@dataclass(frozen=True, slots=True)
class Example:
    """A question's pool: features, which rows are evidence, and what is needed to score it."""

    x: Array
    relevant: npt.NDArray[np.bool_]
    best_cosine: float
    turns: list[str]
    evidence: tuple[str, ...]
    category: int


@dataclass(frozen=True, slots=True)
class Collected:
    """One conversation's pools; ``foreign`` are of the questions of ``other``, without an answer here."""

    id: str
    other: str
    examples: list[Example]
    foreign: list[Example]
    plain: dict[str, list[Row]]
    cpu_s: float
    """Of one hybrid search a question, without the embedding."""


class _Remembered:
    """An embedder that embeds each text once, so that what is timed is the ranker."""

    def __init__(self, embedder: Embedder) -> None:
        self.identity, self.dim = embedder.identity, embedder.dim
        self._embedder = embedder
        self._vectors: dict[str, npt.NDArray[np.float32]] = {}

    async def embed(self, texts: Sequence[str], purpose: Purpose) -> npt.NDArray[np.float32]:
        missing = [text for text in dict.fromkeys(texts) if text not in self._vectors]
        if missing:
            vectors = await self._embedder.embed(missing, purpose)
            self._vectors.update(zip(missing, vectors, strict=True))
        return np.stack([self._vectors[text] for text in texts])


def collect_all(conversations: Sequence[Conversation], cache: Path) -> dict[str, Collected]:
    """Pools by conversation; each is also asked the questions of the one before it."""
    data: dict[str, Collected] = {}
    for i, conversation in enumerate(conversations):
        data[conversation.id] = asyncio.run(collect(conversation, conversations[i - 1], cache))
        print(f"{conversation.id}: {len(data[conversation.id].examples)} questions", flush=True)
    return data


async def collect(conversation: Conversation, other: Conversation, cache: Path) -> Collected:
    """Pools of a conversation's questions and of another's, and the plain rankings' measures."""
    real = open_embedder(EmbedderConfig(), cache)
    embedder = _Remembered(real)
    tenant, now = TenantId(conversation.id), datetime.now(UTC)
    later = now + timedelta(seconds=1)
    plain: dict[str, list[Row]] = {"dense": [], "bm25": []}
    examples: list[Example] = []
    foreign: list[Example] = []
    with tempfile.TemporaryDirectory() as folder:
        spec = IndexSpec(embedder=embedder.identity, dim=embedder.dim)
        store = EdgeStore.open(Path(folder) / "index", spec)
        names = await _put(store, embedder, conversation, tenant, now)
        retriever = Retriever(store, embedder, RankerWeights(np.zeros(len(NAMES)), 1.0, 0.0, 0.0))
        reader = TextReader()
        cpu_s = 0.0
        for question in conversation.questions:
            pool = await retriever.pool(tenant, question.text, where=None, now=later, limit=TOP_K)
            examples.append(_example(pool, reader, names, question))
            for system, mode in (("dense", Mode.DENSE), ("bm25", Mode.SPARSE)):
                hits = await retriever.search(
                    tenant, question.text, where=None, now=later, limit=TOP_K, mode=mode
                )
                ranked = [names[hit.id] for hit in hits]
                plain[system].append((question.category, measures(ranked, question.evidence)))
            started = time.process_time()
            await retriever.search(tenant, question.text, where=None, now=later, limit=10)
            cpu_s += time.process_time() - started
        for question in other.questions:
            text = _with_names(question.text, other.speakers, conversation.speakers)
            pool = await retriever.pool(tenant, text, where=None, now=later, limit=TOP_K)
            foreign.append(_example(pool, reader, names, replace(question, evidence=())))
        await store.close()
    await real.close()
    return Collected(conversation.id, other.id, examples, foreign, plain, cpu_s)


async def _put(
    store: EdgeStore,
    embedder: _Remembered,
    conversation: Conversation,
    tenant: TenantId,
    now: datetime,
) -> dict[str, str]:
    """Index a conversation as the service would, a session a thread; turns by cube."""
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
    return names


def _example(
    pool: Pool, reader: TextReader, names: Mapping[str, str], question: Question
) -> Example:
    turns = [names[c.cube.id] for c in pool.candidates]
    return Example(
        x=matrix(pool, reader),
        relevant=np.array([turn in question.evidence for turn in turns], dtype=bool),
        best_cosine=pool.best_cosine,
        turns=turns,
        evidence=question.evidence,
        category=question.category,
    )


def _with_names(text: str, old: Sequence[str], new: Sequence[str]) -> str:
    for a, b in zip(old, new, strict=True):
        text = re.sub(rf"\b{re.escape(a)}\b", b, text)
    return text


def learn(data: Sequence[Collected]) -> RankerWeights:
    """Weights from pools that hold at least one evidence turn, and from nothing of a conversation
    that is not among ``data``."""
    known = {collected.id for collected in data}
    examples = [e for collected in data for e in collected.examples]
    foreign = [e for collected in data if collected.other in known for e in collected.foreign]
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

    weights = minimize(loss, np.zeros(len(NAMES)), jac=True, method="L-BFGS-B").x
    return RankerWeights(weights, *_calibrate(examples, foreign, weights))


def _calibrate(
    examples: list[Example], foreign: list[Example], weights: Array
) -> tuple[float, float, float]:
    """Scale, weight of the best cosine, offset: their logistic is the chance of being evidence,
    over the ten best of each pool, answerable and unanswerable questions weighing the same."""
    rows, labels, shares = [], [], []
    for group in (examples, foreign):
        for e in group:
            scores = e.x @ weights
            for row in np.argsort(-scores)[:10]:
                rows.append((scores[row], e.best_cosine, 1.0))
                labels.append(float(e.relevant[row]))
                shares.append(len(examples) / len(group))
    x, y, share = np.array(rows), np.array(labels), np.array(shares)

    def loss(line: Array) -> float:
        logits = x @ line
        return float(share @ (np.logaddexp(0, logits) - y * logits))

    scale, best_cosine, offset = minimize(loss, np.array([1.0, 0.0, 0.0])).x
    return float(scale), float(best_cosine), float(offset)


def rank(example: Example, weights: RankerWeights) -> list[str]:
    """Turns, best first."""
    return [example.turns[row] for row in np.argsort(-(example.x @ weights.weights), kind="stable")]


def report_calibration(pools: list[tuple[Example, RankerWeights]]) -> None:
    """Said and true chance of the ten best of each held-out pool, in ten bands."""
    said, true = [], []
    for e, weights in pools:
        scores = e.x @ weights.weights
        for row in np.argsort(-scores)[:10]:
            said.append(weights.probability(float(scores[row]), e.best_cosine))
            true.append(float(e.relevant[row]))
    p, y = np.array(said), np.array(true)
    print("calibration of held-out questions, half of them unanswerable: band, said, true, count")
    for low in np.arange(0, 1, 0.1):
        band = (p >= low) & (p < low + 0.1)
        if band.any():
            print(f"  {low:.1f}  {p[band].mean():.3f}  {y[band].mean():.3f}  {band.sum()}")


def write(path: Path, weights: RankerWeights, trained_on: list[str]) -> None:
    """Save a weights file."""
    data = {
        "trained_on": trained_on,
        "weights": {n: round(float(w), 5) for n, w in zip(NAMES, weights.weights, strict=True)},
        "scale": round(weights.scale, 5),
        "best_cosine": round(weights.best_cosine, 5),
        "offset": round(weights.offset, 5),
    }
    path.write_text(json.dumps(data, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("file", type=Path, help="conversations in LoCoMo's form, at least two")
    parser.add_argument(
        "--out", type=Path, help="write weights learned from all conversations here"
    )
    parser.add_argument("--leave-one-out", type=Path, help="write one file a conversation here")
    parser.add_argument("--cache", type=Path, default=Path(".memcube/models"), help="ONNX graphs")
    given = parser.parse_args()
    conversations = load_locomo(given.file)
    if len(conversations) < 2:
        parser.error("needs at least two conversations: each is scored by weights of the others")
    data = collect_all(conversations, given.cache)
    held_out: list[Row] = []
    judged: list[tuple[Example, RankerWeights]] = []
    for left_out, collected in data.items():
        weights = learn([c for name, c in data.items() if name != left_out])
        if given.leave_one_out:
            given.leave_one_out.mkdir(parents=True, exist_ok=True)
            path = given.leave_one_out / f"without-{left_out}.json"
            write(path, weights, [name for name in data if name != left_out])
        rows = [
            (e.category, measures(rank(e, weights)[:TOP_K], e.evidence)) for e in collected.examples
        ]
        print(left_out, summarise(rows)["overall"])
        held_out += rows
        judged += [(e, weights) for e in (*collected.examples, *collected.foreign)]
    examples = [e for c in data.values() for e in c.examples]
    inside = np.mean([len(set(e.turns) & set(e.evidence)) / len(e.evidence) for e in examples])
    size = np.mean([len(e.turns) for e in examples])
    cpu_ms = 1000 * sum(c.cpu_s for c in data.values()) / len(examples)
    print(f"pools: {size:.0f} cubes, {100 * inside:.1f}% of the evidence inside")
    print(f"ranker: {cpu_ms:.2f} CPU-ms a query without the embedding")
    report_calibration(judged)
    for system in ("dense", "bm25"):
        rows = [row for c in data.values() for row in c.plain[system]]
        print(system, json.dumps(summarise(rows)))
    print("memcube, left out", json.dumps(summarise(held_out)))
    weights = learn(list(data.values()))
    for name, weight in zip(NAMES, weights.weights, strict=True):
        print(f"  {name:18} {weight:8.3f}")
    if given.out:
        write(given.out, weights, list(data))


if __name__ == "__main__":
    main()
