"""Queries encoded where they are asked."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from memcube.embedding.batching import Encoder
from memcube.embedding.contract import Embedder, Purpose
from memcube.errors import Conflict


class LocalQueries:
    """An embedder that encodes queries in this process and sends passages to ``others``.

    On a CPU a query gains nothing by waiting for a batch, and asking another process for it costs
    more than the encoding (docs/adr/0010).

    Raises:
        Conflict: the two are not the same embedder; their vectors can't be compared.
    """

    def __init__(self, encoder: Encoder, others: Embedder) -> None:
        if encoder.identity != others.identity:
            raise Conflict(f"queries by {encoder.identity!r}, passages by {others.identity!r}")
        self.identity, self.dim = others.identity, others.dim
        self._encoder = encoder
        self._others = others
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="queries")

    async def embed(self, texts: Sequence[str], purpose: Purpose) -> npt.NDArray[np.float32]:
        """Vectors of shape (len(texts), dim)."""
        if purpose is not Purpose.QUERY or not texts:
            return await self._others.embed(texts, purpose)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._encoder.encode, texts)
