"""The running system over HTTP: the rate of adds and the time of a search, beside their parts alone.

python -m benchmarks.bench_http
"""

import asyncio
import random
import tempfile
import time
from pathlib import Path
from statistics import median

import httpx

from benchmarks.results import Figure, write_results
from memcube.config import EmbedderConfig
from memcube.embedding import open_embedder
from memcube.embedding.contract import Purpose
from memcube.testing.process import SystemProcess

TEXTS = 3_000
BATCH = 100
IN_FLIGHT = 4
QUERIES = 300
_WORDS = [
    "garden",
    "travel",
    "music",
    "mother",
    "coffee",
    "project",
    "deadline",
    "hiking",
    "photograph",
    "library",
    "concert",
    "doctor",
    "birthday",
    "kitchen",
    "painting",
    "river",
    "mountain",
    "school",
    "recipe",
    "football",
    "train",
    "weather",
    "holiday",
    "neighbour",
    "book",
    "computer",
    "wedding",
    "market",
    "language",
    "museum",
    "bicycle",
    "theatre",
    "candle",
    "forest",
    "summer",
    "winter",
    "letter",
    "journey",
    "friend",
    "brother",
    "sister",
    "teacher",
    "story",
    "dream",
    "plan",
    "idea",
    "lunch",
    "dinner",
    "morning",
    "evening",
    "weekend",
]


def texts(count: int, seed: int) -> list[str]:
    """Distinct turns of 8 to 40 words."""
    generator = random.Random(seed)
    return [
        f"{i}: I " + " ".join(generator.choice(_WORDS) for _ in range(generator.randint(8, 40)))
        for i in range(count)
    ]


async def bare_rate(given: list[str], cache: Path) -> float:
    """Texts a second of the embedder alone, configured as in the system."""
    embedder = open_embedder(EmbedderConfig(), cache)
    await embedder.embed(given[:64], Purpose.PASSAGE)
    started = time.perf_counter()
    await embedder.embed(given, Purpose.PASSAGE)
    rate = len(given) / (time.perf_counter() - started)
    await embedder.close()
    return rate


async def bare_query_ms(queries: list[str], cache: Path) -> float:
    """Median time to embed one query."""
    embedder = open_embedder(EmbedderConfig(), cache)
    took = []
    for query in queries:
        started = time.perf_counter()
        await embedder.embed([query], Purpose.QUERY)
        took.append((time.perf_counter() - started) * 1e3)
    await embedder.close()
    return median(took[20:])


async def add_rate(http: httpx.AsyncClient, given: list[str], user: str) -> float:
    """Texts a second through HTTP, each found by a search when its batch is answered."""
    batches = [given[i : i + BATCH] for i in range(0, len(given), BATCH)]
    waiting = iter(batches)

    async def worker() -> None:
        for batch in waiting:
            items = [{"text": text, "user_id": user} for text in batch]
            answer = await http.post("/v1/memories/batch", json={"items": items, "wait": "indexed"})
            answer.raise_for_status()

    started = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(IN_FLIGHT)))
    return len(given) / (time.perf_counter() - started)


async def median_ms(call, count: int) -> float:
    took = []
    for i in range(count):
        started = time.perf_counter()
        (await call(i)).raise_for_status()
        took.append((time.perf_counter() - started) * 1e3)
    return median(took[20:])


async def measure(system: SystemProcess) -> list[Figure]:
    cache = system.data_dir / "models"
    async with httpx.AsyncClient(
        base_url=system.url, headers={"X-API-Key": system.key}, timeout=300
    ) as http:
        await add_rate(http, texts(400, seed=1), "warm")
        ratios, adds, bares = [], [], []
        # The two rates one after the other, three times: what else the machine does hits both.
        for round_number in range(3):
            given = texts(TEXTS // 3, seed=10 + round_number)
            bares.append(await bare_rate(given, cache))
            adds.append(await add_rate(http, given, f"u{round_number}"))
            ratios.append(adds[-1] / bares[-1])
        queries = [f"what about the {t}" for t in (t[4:60] for t in texts(QUERIES, seed=2))]
        noop = await median_ms(lambda i: http.get("/healthz"), QUERIES)
        embed = await bare_query_ms(queries, cache)
        search = await median_ms(
            lambda i: http.post(
                "/v1/memories/search", json={"query": queries[i], "user_id": "u1", "top_k": 10}
            ),
            QUERIES,
        )
    return [
        Figure(name="add, batches of 100, wait=indexed", value=median(adds), unit="1/s"),
        Figure(name="the bare embedder on the same texts", value=median(bares), unit="1/s"),
        Figure(name="add over the bare embedder", value=median(ratios), unit="×", goal=">= 0.8"),
        Figure(name="search over HTTP, one client: p50", value=search, unit="ms"),
        Figure(name="no-op route on the same server: p50", value=noop, unit="ms"),
        Figure(name="embedding one query: p50", value=embed, unit="ms"),
        Figure(
            name="search over (no-op + embedding)",
            value=search / (noop + embed),
            unit="×",
            goal="<= 3",
        ),
    ]


def main() -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        SystemProcess(Path(folder) / "data") as system,
    ):
        figures = asyncio.run(measure(system))
    write_results("http", "python -m benchmarks.bench_http", figures)


if __name__ == "__main__":
    main()
