import json

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, MambaConfig, PreTrainedTokenizerFast

from memcube.activation.layout import KvLayout
from memcube.activation.models import load_model
from memcube.config import ModelConfig
from memcube.errors import BadRequest, UnknownBackend
from tests.unit.activation.tiny import CONFIGS, Reference


def save(folder, config=None, seed=3):
    if config is None:
        model = Reference(CONFIGS["llama"]).model
    else:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    words = {"<unk>": 0, "</s>": 2, "hello": 5}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model"))


def load(folder, cache, **spec):
    return load_model(ModelConfig(name=str(folder), device="cpu", **spec), cache)


def test_a_model_is_loaded_from_its_folder(folder, tmp_path):
    loaded = load(folder, tmp_path)
    assert loaded.layout == KvLayout(3, 2, 16, "float32")
    assert loaded.tokenizer("hello").input_ids == [5]
    assert (loaded.eos_ids, loaded.max_positions) == (frozenset({2}), 512)
    assert loaded.supports_compose
    assert not loaded.model.training
    assert load(folder, tmp_path, dtype="bfloat16").layout.dtype == "bfloat16"


def test_fingerprints_are_those_of_the_bytes(folder, tmp_path):
    first = load(folder, tmp_path / "cache")
    assert load(folder, tmp_path / "cache").fingerprint == first.fingerprint
    (tmp_path / "cache" / "fingerprints.json").write_text("{broken")
    again = load(folder, tmp_path / "cache")
    assert again.fingerprint == first.fingerprint
    assert again.tokenizer_fingerprint == first.tokenizer_fingerprint

    other = save(tmp_path / "other", CONFIGS["llama"], seed=4)
    loaded = load(other, tmp_path / "cache")
    assert loaded.fingerprint != first.fingerprint
    assert loaded.tokenizer_fingerprint == first.tokenizer_fingerprint
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["world"] = 6
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert load(other, tmp_path / "cache").tokenizer_fingerprint != first.tokenizer_fingerprint


def test_another_configuration_of_the_same_weights_is_another_model(folder, tmp_path):
    other = save(tmp_path / "other")
    assert load(other, tmp_path).fingerprint == load(folder, tmp_path).fingerprint
    config = json.loads((other / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 5000.0
    (other / "config.json").write_text(json.dumps(config))
    assert load(other, tmp_path).fingerprint != load(folder, tmp_path).fingerprint


@pytest.mark.parametrize("name", ["no-such-model", "some/one", "../..", "/nowhere", "a b"])
def test_an_unknown_model_is_not_looked_for_on_a_hub(name, tmp_path):
    with pytest.raises(UnknownBackend, match="SmolLM2"):
        load(name, tmp_path)


def test_other_weights_than_safetensors_are_not_read(tmp_path):
    folder = save(tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BadRequest, match="safetensors"):
        load(folder, tmp_path)


def test_a_model_without_keys_and_values_is_refused(tmp_path):
    config = MambaConfig(vocab_size=199, hidden_size=32, num_hidden_layers=2, state_size=4)
    with pytest.raises(BadRequest, match="running state"):
        load(save(tmp_path / "mamba", config), tmp_path)
