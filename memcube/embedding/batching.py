"""Batches texts across callers, queries first.

One thread computes. Passages are cut into small batches of similar length, so that little is spent
on padding and a query waits for one such batch at most. What a vector is does not depend on which
texts share its batch, beyond float rounding.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from memcube.embedding.contract import Purpose
from memcube.errors import Unavailable

Vectors = npt.NDArray[np.float32]

MAX_BATCH_TEXTS = 8
MAX_BATCH_TOKENS = 256
"""Padded tokens of one batch: about 40 ms on one core. Of 8, 16 and 32 texts, 8 gave the most texts a
CPU-second on conversation turns (203, 192, 178): less is padded."""


class Encoder(Protocol):
    """A model that computes vectors, synchronously and on any thread."""

    identity: str
    dim: int

    def encode(self, texts: Sequence[str]) -> Vectors: ...


@dataclass(slots=True)
class _Job:
    """One caller's texts; ``left`` counts those not yet computed."""

    vectors: Vectors
    done: asyncio.Future[Vectors]
    left: int


@dataclass(frozen=True, slots=True)
class _Item:
    job: _Job
    row: int
    text: str
    length: int


@dataclass(slots=True)
class _Queues:
    queries: deque[_Item] = field(default_factory=deque)
    passages: list[_Item] = field(default_factory=list)


class BatchingEmbedder:
    """An ``Embedder`` in front of one encoder."""

    def __init__(self, encoder: Encoder, *, max_waiting_texts: int) -> None:
        self.identity = encoder.identity
        self.dim = encoder.dim
        self._encoder = encoder
        self._max_waiting = max_waiting_texts
        self._queues = _Queues()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._runner: asyncio.Task[None] | None = None
        self.num_texts = 0
        self.num_batches = 0

    @property
    def num_waiting(self) -> int:
        """Texts that wait for a batch."""
        return len(self._queues.queries) + len(self._queues.passages)

    async def embed(self, texts: Sequence[str], purpose: Purpose) -> Vectors:
        """Vectors of shape (len(texts), dim), in order.

        Raises:
            Unavailable: too many texts are waiting.
        """
        if self.num_waiting + len(texts) > self._max_waiting and self.num_waiting:
            raise Unavailable(f"{self.num_waiting:,} texts wait for the embedder", 2.0)
        vectors = np.empty((len(texts), self.dim), dtype=np.float32)
        if not texts:
            return vectors
        job = _Job(vectors, asyncio.get_running_loop().create_future(), len(texts))
        items = [_Item(job, i, text, _num_tokens(text)) for i, text in enumerate(texts)]
        if purpose is Purpose.QUERY:
            self._queues.queries.extend(items)
        else:
            # Longest last, so that a batch is taken from the end; equal callers stay in order.
            self._queues.passages.extend(items)
            self._queues.passages.sort(key=lambda item: item.length)
        if self._runner is None or self._runner.done():
            self._runner = asyncio.create_task(self._run())
        return await job.done

    async def close(self) -> None:
        """Finish what waits, then stop."""
        if self._runner is not None:
            await self._runner
        self._thread.shutdown()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while batch := self._next_batch():
            texts = [item.text for item in batch]
            try:
                vectors = await loop.run_in_executor(self._thread, self._encoder.encode, texts)
            except Exception as failed:  # noqa: BLE001 - it is the callers' to handle
                for item in batch:
                    if not item.job.done.done():
                        item.job.done.set_exception(failed)
                continue
            self.num_texts += len(batch)
            self.num_batches += 1
            for item, vector in zip(batch, vectors, strict=True):
                item.job.vectors[item.row] = vector
                item.job.left -= 1
                if item.job.left == 0 and not item.job.done.done():
                    item.job.done.set_result(item.job.vectors)

    def _next_batch(self) -> list[_Item]:
        batch: list[_Item] = []
        queue = self._queues.queries or self._queues.passages
        widest = 0
        while queue and len(batch) < MAX_BATCH_TEXTS:
            item = queue[0] if queue is self._queues.queries else queue[-1]
            widest = max(widest, item.length)
            if batch and widest * (len(batch) + 1) > MAX_BATCH_TOKENS:
                break
            self._queues.queries.popleft() if queue is self._queues.queries else queue.pop()
            # A caller that has gone away is not computed for.
            if not item.job.done.done():
                batch.append(item)
        return batch


def _num_tokens(text: str) -> int:
    """About how many tokens a text has; only the order of texts and the size of batches hang on it."""
    return min(len(text) // 4 + 2, 512)
