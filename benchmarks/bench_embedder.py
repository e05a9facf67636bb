"""What the embedder costs: CPU time a query, passages a CPU-second, a query's wait behind bulk work.

    python -m benchmarks.bench_embedder [--cache FOLDER] [--backends onnx,onnx-int8,torch]

The texts are made of common words in the lengths stated; "turns" have the spread of lengths of chat
turns (log-normal around 28 words). One thread computes. No network is used.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.results import Figure, write_results
from memcube.config import EmbedderConfig
from memcube.embedding import BatchingEmbedder, Encoder, open_encoder
from memcube.embedding.contract import Purpose

COMMAND = "python -m benchmarks.bench_embedder"
BACKENDS = {
    "onnx": EmbedderConfig(backend="onnx", precision="fp32", threads=1),
    "onnx-int8": EmbedderConfig(backend="onnx", precision="int8", threads=1),
    "torch": EmbedderConfig(backend="torch", threads=1),
}
SAMPLE = (
    "the a my we they moved to Oslo in May and then again bought green tea for their old dog "
    "because it was cold outside yesterday she said that he likes music more than long walks"
)


def made_texts(lengths: np.ndarray, rng: np.random.Generator) -> list[str]:
    """One text of so many words for each length."""
    words = SAMPLE.split()
    return [" ".join(rng.choice(words, size)) for size in lengths]


def bare(encoder: Encoder, texts: list[str]) -> float:
    """Texts a CPU-second of the encoder alone in batches of 32, as libraries do by default."""
    cpu = time.process_time()
    for start in range(0, len(texts), 32):
        encoder.encode(texts[start : start + 32])
    return len(texts) / (time.process_time() - cpu)


async def measure(
    name: str, encoder: Encoder, reference: np.ndarray | None
) -> tuple[list[Figure], np.ndarray]:
    """The figures of one backend, and its vectors of the turns to compare others by."""
    embedder = BatchingEmbedder(encoder, max_waiting_texts=10_000)
    rng = np.random.default_rng(7)
    queries = made_texts(np.full(60, 10), rng)
    thirty = made_texts(np.full(160, 28), rng)
    turns = made_texts(np.clip(rng.lognormal(np.log(28), 0.7, 200), 2, 200).astype(int), rng)
    await embedder.embed(thirty[:16], Purpose.PASSAGE)
    await embedder.embed(queries[:1], Purpose.QUERY)

    walls: list[float] = []
    cpu = time.process_time()
    for query in queries:
        began = time.perf_counter()
        await embedder.embed([query], Purpose.QUERY)
        walls.append(time.perf_counter() - began)
    query_ms = (time.process_time() - cpu) * 1e3 / len(queries)

    cpu = time.process_time()
    await embedder.embed(thirty, Purpose.PASSAGE)
    thirty_per_s = len(thirty) / (time.process_time() - cpu)

    bare_per_s = bare(encoder, thirty)

    cpu = time.process_time()
    vectors = await embedder.embed(turns, Purpose.PASSAGE)
    turns_per_s = len(turns) / (time.process_time() - cpu)

    bulk = asyncio.create_task(embedder.embed(turns, Purpose.PASSAGE))
    waits: list[float] = []
    while not bulk.done():
        began = time.perf_counter()
        await embedder.embed([queries[len(waits) % len(queries)]], Purpose.QUERY)
        waits.append((time.perf_counter() - began) * 1e3)
        await asyncio.sleep(0.005)
    await bulk
    waits = waits[:-1] or waits
    default = name == "onnx-int8"
    figures = [
        Figure(
            name=f"{name}: a query of 12 tokens",
            value=query_ms,
            unit="CPU-ms",
            goal="<= 5" if default else None,
        ),
        Figure(
            name=f"{name}: the same, median wall",
            value=statistics.median(walls) * 1e3,
            unit="ms",
        ),
        Figure(
            name=f"{name}: texts of 30 tokens",
            value=thirty_per_s,
            unit="1/CPU-s",
            beside=f"the encoder alone, batches of 32: {bare_per_s:.0f}",
        ),
        Figure(name=f"{name}: chat turns", value=turns_per_s, unit="1/CPU-s"),
        Figure(
            name=f"{name}: a query behind bulk work, 95th percentile",
            value=float(np.percentile(waits, 95)),
            unit="ms",
            goal="<= 100" if default else None,
        ),
    ]
    if reference is not None:
        cosine = float((vectors * reference).sum(1).mean())
        figures.append(Figure(name=f"{name}: mean cosine to onnx fp32", value=cosine, unit=""))
    await embedder.close()
    return figures, vectors


async def run(cache: Path, backends: list[str]) -> None:
    figures: list[Figure] = []
    reference: np.ndarray | None = None
    for name in backends:
        began = time.perf_counter()
        encoder = open_encoder(BACKENDS[name], cache)
        opened = time.perf_counter() - began
        found, vectors = await measure(name, encoder, reference)
        reference = vectors if reference is None else reference
        figures += [*found, Figure(name=f"{name}: open, with the export", value=opened, unit="s")]
    write_results("embedder", COMMAND, figures)


def main() -> None:
    parser = argparse.ArgumentParser(description="What the embedder costs.")
    parser.add_argument("--cache", type=Path, help="keeps the exported graphs")
    parser.add_argument("--backends", default=",".join(BACKENDS))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(run(args.cache or Path(folder), args.backends.split(",")))


if __name__ == "__main__":
    main()
