"""Searches in the embedded store alone: 10,000 and 100,000 cubes of 50 tenants, tenant-filtered.

python -m benchmarks.bench_store
"""

import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from benchmarks.results import Figure, write_results
from memcube.cube import slot
from memcube.embedding.contract import Purpose
from memcube.ids import TenantId, uuid7
from memcube.retrieval.ranker import Retriever
from memcube.retrieval.weights import RankerWeights
from memcube.tiers.edge import EdgeStore
from memcube.tiers.plaintext import IndexedCube, IndexSpec, Vector

DIM = 384
TENANTS = 50
QUERIES = 400
HYBRID = "hybrid search with its ranking"
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def cubes(count: int, generator: np.random.Generator) -> list[IndexedCube]:
    """Clustered vectors and texts of words with Zipf's frequencies."""
    centres = generator.standard_normal((200, DIM)).astype(np.float32)
    made = []
    for i in range(count):
        vector = centres[generator.integers(200)] + 0.8 * generator.standard_normal(DIM).astype(
            np.float32
        )
        words = generator.zipf(1.2, 20) % 20_000
        tenant = TenantId(f"t{i % TENANTS}")
        made.append(
            IndexedCube(
                id=uuid7(NOW),
                tenant=tenant,
                version=1,
                text=" ".join(f"word{w}" for w in words),
                vector=vector / np.linalg.norm(vector),
                kind="episode",
                state="generated",
                user_id=f"u{i % 500}",
                speaker=f"s{i % 3}",
                created_at=NOW,
                updated_at=NOW,
                slot=slot(tenant, i // TENANTS),
                thread=tenant,
                seq=i // TENANTS,
            )
        )
    return made


def _asked(cube: IndexedCube) -> str:
    return " ".join(cube.text[:60].split())


class _Given:
    """An embedder that knows the vectors of the queries, so that none is computed."""

    identity, dim = "bench@1", DIM

    def __init__(self, data: list[IndexedCube]) -> None:
        self._vectors = {_asked(cube): cube.vector for cube in data}

    async def embed(self, texts: Sequence[str], purpose: Purpose) -> Vector:
        return np.stack([self._vectors[text] for text in texts])


async def timed(call: Callable[[int], Awaitable[object]]) -> tuple[float, float]:
    """Median and 95th percentile, milliseconds."""
    for i in range(20):
        await call(i)
    took = []
    for i in range(QUERIES):
        started = time.perf_counter()
        await call(i)
        took.append((time.perf_counter() - started) * 1e3)
    return float(np.percentile(took, 50)), float(np.percentile(took, 95))


async def measure(count: int) -> dict[str, tuple[float, float]]:
    """Times of each search, and of putting."""
    generator = np.random.default_rng(count)
    data = cubes(count, generator)
    with tempfile.TemporaryDirectory() as folder:
        store = EdgeStore.open(Path(folder) / "index", IndexSpec(embedder="bench@1", dim=DIM))
        started = time.process_time()
        for i in range(0, count, 512):
            await store.put(data[i : i + 512])
        put_rate = count / (time.process_time() - started)
        if store.needs_optimise:
            await store.optimise()
        found = {"put": (put_rate, put_rate)}
        pick = generator.integers(0, count, 1000)

        def one(i: int) -> IndexedCube:
            return data[int(pick[i % 1000])]

        found["dense"] = await timed(
            lambda i: store.search_dense(
                one(i).tenant, one(i).vector, where=None, now=NOW, limit=10
            )
        )
        found["BM25"] = await timed(
            lambda i: store.search_sparse(
                one(i).tenant, _asked(one(i)), where=None, now=NOW, limit=10
            )
        )

        retriever = Retriever(store, _Given(data), RankerWeights.load())
        found[HYBRID] = await timed(
            lambda i: retriever.search(one(i).tenant, _asked(one(i)), where=None, now=NOW, limit=10)
        )
        await store.close()
    return found


def main() -> None:
    small, large = asyncio.run(measure(10_000)), asyncio.run(measure(100_000))
    figures = []
    for name in ("dense", "BM25", HYBRID):
        is_whole = name == HYBRID
        beside = f"10,000 cubes: p95 {small[name][1]:.2f} ms"
        figures += [
            Figure(name=f"{name}, 100,000 cubes: p50", value=large[name][0], unit="ms"),
            Figure(
                name=f"{name}, 100,000 cubes: p95",
                value=large[name][1],
                unit="ms",
                goal=None if is_whole else "<= 5",
                beside=beside,
            ),
            Figure(
                name=f"{name}: p95 at 100,000 over p95 at 10,000",
                value=large[name][1] / small[name][1],
                unit="×",
                goal=None if is_whole else "<= 2",
            ),
        ]
    figures.append(Figure(name="put, 100,000 cubes", value=large["put"][0], unit="1/CPU-s"))
    write_results("store", "python -m benchmarks.bench_store", figures)


if __name__ == "__main__":
    main()
