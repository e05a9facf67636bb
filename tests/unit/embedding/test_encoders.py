import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import transformers

from memcube.config import EmbedderConfig
from memcube.embedding import open_embedder, resolved
from memcube.embedding.contract import Purpose
from memcube.embedding.model_files import find_model
from memcube.embedding.onnx import cached_graph
from memcube.errors import BadRequest, UnknownBackend

TEXTS = ["Ann likes kumquat tea.", "Where does Ann live?", "x", "long " * 300]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def onnx(cache):
    return open_embedder(EmbedderConfig(backend="onnx", precision="fp32", threads=1), cache)


async def test_onnx_and_torch_give_the_same_unit_vectors(onnx, cache):
    other = open_embedder(EmbedderConfig(backend="torch"), cache)
    ours = await onnx.embed(TEXTS, Purpose.PASSAGE)
    theirs = await other.embed(TEXTS, Purpose.PASSAGE)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-5)
    assert (ours * theirs).sum(1).min() > 0.9999
    assert onnx.identity != other.identity


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
    (alone,) = await small.embed(TEXTS[:1], Purpose.PASSAGE)
    np.testing.assert_array_equal(theirs[0], alone)


def test_an_unknown_model_is_refused_by_name(cache):
    with pytest.raises(UnknownBackend, match="no embedder model named 'gpt-9'"):
        open_embedder(EmbedderConfig(model="gpt-9"), cache)


def test_two_processes_may_ask_for_the_graph_at_once(cache, tiny):
    model = find_model(str(tiny))
    with ThreadPoolExecutor(2) as pool:  # each opens the lock file anew, as a process would
        one, two = pool.map(lambda _: cached_graph(model, "fp32", cache), range(2))
    assert one == two
    assert not list(cache.glob("exporting-*"))


async def test_a_folder_is_a_model_too_with_its_own_pooling_and_window(cache, tiny):
    config = EmbedderConfig(model=str(tiny), threads=1, max_tokens=512)
    onnx = open_embedder(config.model_copy(update={"backend": "onnx", "precision": "fp32"}), cache)
    other = open_embedder(config.model_copy(update={"backend": "torch"}), cache)
    assert find_model(str(tiny)).pooling == "cls"
    assert onnx.dim == 32
    assert onnx.identity.startswith("tiny@onnx-fp32-64-")
    ours = await onnx.embed(TEXTS, Purpose.PASSAGE)
    theirs = await other.embed(TEXTS, Purpose.PASSAGE)
    assert (ours * theirs).sum(1).min() > 0.9999


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", {"model_type": "gpt2"}, "is a 'gpt2' model"),
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "pools by 'max_tokens'"),
        ("modules.json", [{"type": "sentence_transformers.models.Dense"}], "has a Dense layer"),
        ("config.json", None, "can't be read"),
    ],
)
def test_a_model_of_a_kind_that_is_not_built_is_refused(tiny, file, content, message):
    (tiny / file).write_text("{" if content is None else json.dumps(content))
    with pytest.raises(BadRequest, match=message):
        find_model(str(tiny))


def test_a_folder_without_weights_is_refused_with_what_it_lacks(tmp_path):
    with pytest.raises(UnknownBackend, match=r"model\.safetensors"):
        find_model(str(tmp_path))


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"backend": "onnx"}, ("onnx", "int8")),
        ({"backend": "torch"}, ("torch", "fp32")),
        ({"precision": "int8"}, ("onnx", "int8")),
        ({"backend": "onnx", "precision": "fp32"}, ("onnx", "fp32")),
    ],
)
def test_what_is_left_to_choose_is_chosen_by_the_backend(given, meant):
    chosen = resolved(EmbedderConfig(**given))
    assert (chosen.backend, chosen.precision) == meant


def test_int8_is_no_precision_of_torch(cache):
    with pytest.raises(UnknownBackend, match="precision named 'int8'"):
        open_embedder(EmbedderConfig(backend="torch", precision="int8"), cache)


@pytest.mark.parametrize("text", ["", " ", "\u200b", "🙂" * 3000, "\0", "a" * 100_000])
async def test_any_text_has_a_vector_of_unit_length(onnx, text):
    (vector,) = await onnx.embed([text], Purpose.PASSAGE)
    assert abs(float(np.linalg.norm(vector)) - 1) < 1e-5


@pytest.fixture
def tiny(tmp_path):
    """A BERT with random weights, CLS pooling and a window of 64 tokens."""
    folder = tmp_path / "tiny"
    packaged = find_model("all-MiniLM-L6-v2").folder
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    transformers.BertModel(config).save_pretrained(folder)
    shutil.copy(packaged / "tokenizer.json", folder)
    (folder / "1_Pooling").mkdir()
    pooling = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder
