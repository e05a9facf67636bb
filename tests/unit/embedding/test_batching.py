import asyncio
import threading

import numpy as np
import pytest

from memcube.embedding.batching import BatchingEmbedder
from memcube.embedding.contract import Purpose
from memcube.errors import Unavailable


class Gated:
    """An encoder that waits for the test before each batch. A vector holds its text's length."""

    identity = "gated@1"
    dim = 2

    def __init__(self) -> None:
        self.gate = threading.Semaphore(0)
        self.batches: list[list[str]] = []

    def encode(self, texts):
        self.gate.acquire()
        self.batches.append(list(texts))
        if "bad" in texts:
            raise RuntimeError("bad text")
        return np.array([[len(text), 1] for text in texts], dtype=np.float32)


@pytest.fixture
def encoder():
    return Gated()


@pytest.fixture
def embedder(encoder):
    return BatchingEmbedder(encoder, max_waiting_texts=50)


async def start(embedder, texts, purpose=Purpose.PASSAGE):
    task = asyncio.ensure_future(embedder.embed(texts, purpose))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return task


async def test_vectors_come_in_the_order_of_the_texts(embedder, encoder):
    texts = ["aaa" * 90, "b", "cc" * 40, "dddd"] * 5
    encoder.gate.release(100)
    vectors = await embedder.embed(texts, Purpose.PASSAGE)
    assert vectors[:, 0].tolist() == [len(text) for text in texts]


async def test_texts_of_several_callers_share_batches(embedder, encoder):
    first = await start(embedder, ["first"])
    others = [await start(embedder, [f"t{i}"]) for i in range(6)]
    encoder.gate.release(100)
    await asyncio.gather(first, *others)
    assert len(encoder.batches) == 2


async def test_a_query_goes_before_waiting_passages(embedder, encoder):
    bulk = await start(embedder, [f"passage {i}" for i in range(30)])
    query = await start(embedder, ["query"], Purpose.QUERY)
    encoder.gate.release(2)
    await query
    assert not bulk.done()
    assert encoder.batches[1] == ["query"]
    encoder.gate.release(100)
    await bulk


async def test_a_failed_batch_fails_its_callers_only(embedder, encoder):
    bad = await start(embedder, ["bad"])
    good = await start(embedder, ["good"])
    encoder.gate.release(100)
    with pytest.raises(RuntimeError, match="bad text"):
        await bad
    assert (await good).shape == (1, 2)


async def test_a_caller_that_goes_away_is_not_computed_for(embedder, encoder):
    first = await start(embedder, ["first"])
    gone = await start(embedder, ["gone"])
    gone.cancel()
    encoder.gate.release(100)
    await first
    await embedder.close()
    assert ["gone"] not in encoder.batches


async def test_too_many_waiting_texts_are_refused(embedder, encoder):
    waiting = await start(embedder, ["x"] * 50)
    with pytest.raises(Unavailable, match="wait for the embedder"):
        await embedder.embed(["y"] * 20, Purpose.PASSAGE)
    encoder.gate.release(100)
    await waiting


async def test_no_texts_are_no_work(embedder):
    assert (await embedder.embed([], Purpose.QUERY)).shape == (0, 2)
