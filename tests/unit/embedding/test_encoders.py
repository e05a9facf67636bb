import json

import numpy as np
import pytest

from memcube.config import EmbedderConfig
from memcube.embedding import open_embedder
from memcube.embedding.contract import Purpose
from memcube.embedding.model_files import find_model
from memcube.embedding.onnx import cached_graph
from memcube.errors import UnknownBackend

TEXTS = ["Ann likes kumquat tea.", "Where does Ann live?", "x", "long " * 300]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def onnx(cache):
    return open_embedder(EmbedderConfig(backend="onnx", threads=1), cache)


async def test_onnx_and_torch_give_the_same_unit_vectors(onnx, cache):
    torch = open_embedder(EmbedderConfig(backend="torch"), cache)
    ours = await onnx.embed(TEXTS, Purpose.PASSAGE)
    theirs = await torch.embed(TEXTS, Purpose.PASSAGE)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-5)
    assert (ours * theirs).sum(1).min() > 0.9999
    assert onnx.identity != torch.identity


async def test_a_vector_does_not_depend_on_its_batch(onnx):
    together = await onnx.embed(TEXTS, Purpose.PASSAGE)
    alone = np.concatenate([await onnx.embed([text], Purpose.PASSAGE) for text in TEXTS])
    np.testing.assert_allclose(together, alone, atol=1e-5)


async def test_texts_beyond_128_tokens_are_read_on(onnx):
    start = "word " * 150
    a, b = await onnx.embed([start + "kumquat " * 40, start + "war " * 40], Purpose.PASSAGE)
    assert float(a @ b) < 0.99


def test_a_damaged_graph_is_exported_again(cache):
    model = find_model("all-MiniLM-L6-v2")
    graph = cached_graph(model, "fp32", cache)
    whole = json.loads(graph.with_suffix(".json").read_text())
    graph.write_bytes(graph.read_bytes()[:-100])
    again = cached_graph(model, "fp32", cache)
    assert again == graph
    assert json.loads(graph.with_suffix(".json").read_text()) == whole


async def test_int8_is_close_and_is_another_index(onnx, cache):
    small = open_embedder(EmbedderConfig(backend="onnx", precision="int8", threads=1), cache)
    ours = await onnx.embed(TEXTS[:2], Purpose.PASSAGE)
    theirs = await small.embed(TEXTS[:2], Purpose.PASSAGE)
    assert (ours * theirs).sum(1).min() > 0.9
    assert small.identity != onnx.identity


def test_an_unknown_model_is_refused_by_name(cache):
    with pytest.raises(UnknownBackend, match="no embedder model named 'gpt-9'"):
        open_embedder(EmbedderConfig(model="gpt-9"), cache)
