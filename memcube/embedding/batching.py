"""Batches texts across callers, queries first.

One thread computes. Work is cut into small batches of texts of similar length, so that little is
spent on padding and a query waits for one such batch at most. Callers take turns, so that a small
one does not wait for all of a large one. Vectors are not cached: a cache shared by tenants would
tell one by its timing what another has asked.
"""

import asyncio
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from memcube.embedding.contract import Purpose
from memcube.errors import Unavailable

Vectors = npt.NDArray[np.float32]


class BatchSize(NamedTuple):
    """The most texts of one batch, and the most tokens counting the padding."""

    texts: int
    tokens: int


CPU_BATCH = BatchSize(texts=8, tokens=256)
"""About 30 ms on one core. Larger ones are no faster: 283, 279 and 263 texts a CPU-second for 8, 16
and 32 texts of 30 tokens."""
GPU_BATCH = BatchSize(texts=256, tokens=16_384)


class Encoder(Protocol):
    """A model that computes vectors, synchronously and on any thread."""

    identity: str
    dim: int
    max_tokens: int
    batch: BatchSize

    def encode(self, texts: Sequence[str]) -> Vectors: ...


class _Item(NamedTuple):
    row: int
    text: str
    length: int


@dataclass(slots=True, eq=False)
class _Job:
    """One caller's texts. ``todo`` is sorted by length; ``left`` counts those without a vector."""

    todo: list[_Item]
    vectors: Vectors
    done: asyncio.Future[Vectors]
    left: int


_Batch = list[tuple[_Job, _Item]]


class BatchingEmbedder:
    """An ``Embedder`` in front of one encoder. It lives in one event loop."""

    def __init__(self, encoder: Encoder, *, max_waiting_texts: int) -> None:
        self.identity = encoder.identity
        self.dim = encoder.dim
        self._encoder = encoder
        self._max_waiting = max_waiting_texts
        self._jobs: dict[Purpose, deque[_Job]] = {
            Purpose.QUERY: deque(),  # the order of the keys is the order of service
            Purpose.PASSAGE: deque(),
        }
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._runner: asyncio.Task[None] | None = None
        self._closed = False
        self.num_texts = 0
        self.num_batches = 0
        self.busy_s = 0.0

    @property
    def num_waiting(self) -> int:
        """Texts that wait for a batch."""
        return sum(self._waiting(purpose) for purpose in self._jobs)

    async def embed(self, texts: Sequence[str], purpose: Purpose) -> Vectors:
        """Vectors of shape (len(texts), dim), in order. A cancelled call's texts are dropped.

        Raises:
            Unavailable: too many texts of this purpose wait (a call of any size is taken when none
                does), or the embedder was closed.
        """
        vectors = np.empty((len(texts), self.dim), dtype=np.float32)
        if not texts:
            return vectors
        self._admit(len(texts), purpose)
        items = [_Item(row, text, self._num_tokens(text)) for row, text in enumerate(texts)]
        items.sort(key=_length)
        job = _Job(items, vectors, asyncio.get_running_loop().create_future(), len(items))
        self._jobs[purpose].append(job)
        if self._runner is None or self._runner.done():
            self._runner = asyncio.create_task(self._run())
        return await job.done

    async def close(self) -> None:
        """Finish what waits, then stop. Later calls are refused."""
        self._closed = True
        if self._runner is not None:
            await self._runner
        self._thread.shutdown()

    def _waiting(self, purpose: Purpose) -> int:
        return sum(len(job.todo) for job in self._jobs[purpose] if not job.done.done())

    def _admit(self, num_texts: int, purpose: Purpose) -> None:
        if self._closed:
            raise Unavailable("the embedder is shutting down")
        waiting = self._waiting(purpose)
        if waiting and waiting + num_texts > self._max_waiting:
            pace = self.num_texts / self.busy_s if self.busy_s else 100.0
            retry_after_s = float(min(60, max(1, round(waiting / pace))))
            raise Unavailable(f"{waiting:,} texts wait for the embedder", retry_after_s)

    def _num_tokens(self, text: str) -> int:
        # A guess: only the make-up of batches hangs on it. In bytes, as scripts of three bytes a
        # letter have nearly a token a letter.
        return min(len(text.encode("utf-8", "replace")) // 4 + 2, self._encoder.max_tokens)

    async def _run(self) -> None:
        while batch := self._next_batch():
            failed = await self._compute(batch)
            if failed is None:
                continue
            # One caller's text must not fail another's: each is tried alone.
            owners = list(dict.fromkeys(job for job, _ in batch))
            for owner in owners:
                own = [pair for pair in batch if pair[0] is owner]
                why = failed if len(owners) == 1 else await self._compute(own)
                if why is not None and not owner.done.done():
                    owner.done.set_exception(why)

    async def _compute(self, batch: _Batch) -> Exception | None:
        """Fill in the vectors of a batch, or return why there are none."""
        texts = [item.text for _, item in batch]
        started = time.monotonic()
        try:
            vectors = await asyncio.get_running_loop().run_in_executor(
                self._thread, self._encoder.encode, texts
            )
            if vectors.shape != (len(batch), self.dim):
                raise ValueError(f"{self.identity} gave vectors of shape {vectors.shape}")
        except Exception as failed:  # noqa: BLE001 - handed to the callers, whose it is
            return failed
        self.busy_s += time.monotonic() - started
        self.num_texts += len(batch)
        self.num_batches += 1
        for (job, item), vector in zip(batch, vectors, strict=True):
            job.vectors[item.row] = vector
            job.left -= 1
            if job.left == 0 and not job.done.done():
                job.done.set_result(job.vectors)
        return None

    def _next_batch(self) -> _Batch:
        for jobs in self._jobs.values():
            if batch := self._cut(jobs):
                return batch
        return []

    def _cut(self, jobs: deque[_Job]) -> _Batch:
        """The first caller's longest texts, and what of the others' is about as long.

        Who gave something goes to the end of the line; who had nothing that fits stays in place.
        """
        batch: _Batch = []
        widest = 0
        served: list[_Job] = []
        passed: list[_Job] = []
        while jobs and len(batch) < self._encoder.batch.texts:
            job = jobs.popleft()
            if job.done.done():  # cancelled, or failed in an earlier batch
                continue
            widest = widest or job.todo[-1].length
            room = min(self._encoder.batch.texts, max(1, self._encoder.batch.tokens // widest))
            end = bisect_right(job.todo, widest, key=_length)
            start = max(end - (room - len(batch)), 0)
            # Half as long or longer: beside much longer texts, a short one is mostly padding.
            start = max(start, bisect_right(job.todo, (widest - 1) // 2, 0, end, key=_length))
            taken = job.todo[start:end]
            del job.todo[start:end]
            batch.extend((job, item) for item in taken)
            if not taken:
                passed.append(job)
            elif job.todo:
                served.append(job)
            if len(batch) >= room:
                break
        jobs.extendleft(reversed(passed))
        jobs.extend(served)
        return batch


def _length(item: _Item) -> int:
    return item.length
