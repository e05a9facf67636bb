"""An embedder for tests: bags of hashed words, so that texts with shared words are similar."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from memcube.embedding.contract import Purpose
from memcube.tiers import bm25


class HashEmbedder:
    """Deterministic and without a model. ``calls`` keeps what was asked for."""

    def __init__(self, dim: int = 64, *, identity: str = "hash@1") -> None:
        self.dim = dim
        self.identity = identity
        self.calls: list[tuple[tuple[str, ...], Purpose]] = []

    async def embed(self, texts: Sequence[str], purpose: Purpose) -> npt.NDArray[np.float32]:
        self.calls.append((tuple(texts), purpose))
        vectors = np.full((len(texts), self.dim), 1e-3, dtype=np.float32)
        for row, text in enumerate(texts):
            for term in bm25.terms(text):
                generator = np.random.default_rng(term)
                vectors[row] += generator.standard_normal(self.dim).astype(np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
