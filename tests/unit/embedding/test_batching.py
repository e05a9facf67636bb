import asyncio
import threading
from itertools import chain

import numpy as np
import pytest

from memcube.embedding.batching import CPU_BATCH, BatchingEmbedder, BatchSize
from memcube.embedding.contract import Purpose
from memcube.errors import Unavailable


class Gated:
    """An encoder that waits for the test before each batch. A vector holds its text's length."""

    identity = "gated@1"
    dim = 2
    max_tokens = 256
    batch = CPU_BATCH

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


async def test_passages_go_on_when_the_waiting_queries_go_away(embedder, encoder):
    bulk = await start(embedder, [f"passage {i}" for i in range(30)])
    query = await start(embedder, ["query"], Purpose.QUERY)
    query.cancel()
    encoder.gate.release(100)
    assert (await asyncio.wait_for(bulk, 5)).shape == (30, 2)


async def test_a_small_caller_does_not_wait_for_all_of_a_large_one(embedder, encoder):
    large = await start(embedder, ["a passage of some length"] * 40)
    small = await start(embedder, ["tiny"])
    encoder.gate.release(3)
    await asyncio.wait_for(small, 5)
    assert not large.done()
    encoder.gate.release(100)
    await large


async def test_one_callers_bad_text_does_not_fail_another_in_its_batch(embedder, encoder):
    first = await start(embedder, ["first"])
    bad = await start(embedder, ["bad", "worse"])
    good = await start(embedder, ["good"])
    encoder.gate.release(100)
    await first
    with pytest.raises(RuntimeError, match="bad text"):
        await bad
    assert (await good)[0, 0] == 4
    assert sorted(encoder.batches[1]) == ["bad", "good", "worse"]


async def test_no_batch_is_larger_than_the_encoders_bounds(encoder):
    encoder.batch = BatchSize(texts=4, tokens=60)
    embedder = BatchingEmbedder(encoder, max_waiting_texts=500)
    texts = ["x" * size for size in range(1, 400, 7)]
    encoder.gate.release(1000)
    await asyncio.gather(*(embedder.embed(texts[i::3], Purpose.PASSAGE) for i in range(3)))
    assert sorted(chain.from_iterable(encoder.batches)) == texts
    for batch in encoder.batches:
        widest = max(len(text) for text in batch) // 4 + 2
        assert len(batch) <= 4
        assert len(batch) == 1 or len(batch) * widest <= 60


async def test_cancelled_texts_no_longer_count_as_waiting(embedder, encoder):
    first = await start(embedder, ["first"])
    gone = await start(embedder, ["x"] * 50)
    assert embedder.num_waiting == 50
    gone.cancel()
    await asyncio.sleep(0)
    assert embedder.num_waiting == 0
    encoder.gate.release(100)
    await first


async def test_queries_are_taken_while_passages_fill_their_queue(embedder, encoder):
    waiting = await start(embedder, ["x"] * 60)
    query = await start(embedder, ["query"], Purpose.QUERY)
    encoder.gate.release(2)
    assert (await query).shape == (1, 2)
    encoder.gate.release(100)
    await waiting


async def test_an_encoder_that_answers_in_another_shape_fails_the_call_and_no_more(
    embedder, encoder
):
    encoder.gate.release(100)
    encoder.encode = lambda texts: np.zeros((len(texts) + 1, 2), dtype=np.float32)
    with pytest.raises(ValueError, match="shape"):
        await embedder.embed(["x"], Purpose.QUERY)
    del encoder.encode
    assert (await embedder.embed(["x"], Purpose.QUERY)).shape == (1, 2)


async def test_closing_finishes_what_waits_and_refuses_more(embedder, encoder):
    waiting = await start(embedder, ["x"] * 30)
    closing = asyncio.ensure_future(embedder.close())
    await asyncio.sleep(0)
    with pytest.raises(Unavailable, match="shutting down"):
        await embedder.embed(["y"], Purpose.QUERY)
    encoder.gate.release(100)
    await closing
    assert (await waiting).shape == (30, 2)
