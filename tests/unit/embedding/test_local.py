"""Queries encoded in the asking process."""

import numpy as np
import pytest

from memcube.embedding import LocalQueries
from memcube.embedding.batching import CPU_BATCH
from memcube.embedding.contract import Purpose
from memcube.errors import Conflict


class Encoder:
    dim, max_tokens, batch = 3, 16, CPU_BATCH

    def __init__(self, identity="a@1"):
        self.identity = identity
        self.asked = []

    def encode(self, texts):
        self.asked.append(list(texts))
        return np.ones((len(texts), self.dim), dtype=np.float32)


class Others:
    identity, dim = "a@1", 3

    def __init__(self):
        self.asked = []

    async def embed(self, texts, purpose):
        self.asked.append((list(texts), purpose))
        return np.zeros((len(texts), self.dim), dtype=np.float32)


async def test_queries_stay_and_passages_go():
    encoder, others = Encoder(), Others()
    embedder = LocalQueries(encoder, others)
    assert (await embedder.embed(["q"], Purpose.QUERY)).tolist() == [[1, 1, 1]]
    assert (await embedder.embed(["p"], Purpose.PASSAGE)).tolist() == [[0, 0, 0]]
    assert encoder.asked == [["q"]]
    assert others.asked == [(["p"], Purpose.PASSAGE)]


async def test_no_texts_are_no_vectors():
    assert (await LocalQueries(Encoder(), Others()).embed([], Purpose.QUERY)).shape == (0, 3)


def test_two_embedders_are_not_mixed():
    with pytest.raises(Conflict, match="'b@2', passages by 'a@1'"):
        LocalQueries(Encoder("b@2"), Others())
