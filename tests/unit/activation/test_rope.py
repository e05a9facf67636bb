import pytest
import torch

from memcube.activation.forward import KvBuffer, PackedModel, Row
from memcube.activation.rope import Rope, compose_refusal
from tests.unit.activation.tiny import CONFIGS, EXACT_ONLY, Reference, some_ids


@pytest.mark.parametrize("family", CONFIGS)
def test_a_token_alone_can_be_put_to_any_position(family):
    loaded = Reference(CONFIGS[family]).loaded()
    assert loaded.why_not is None
    rope, packed = Rope(loaded.model), PackedModel(loaded)
    buffer = KvBuffer(loaded.layout, "cpu")
    packed.forward([Row(buffer, some_ids(90))])
    kv_L2HND = buffer.view()
    bare_L2HND = rope.unrotate(kv_L2HND, range(90))
    torch.testing.assert_close(rope.rotate(bare_L2HND, range(90)), kv_L2HND, rtol=0, atol=1e-5)
    # The first layer's keys depend on token and position alone.
    other = KvBuffer(loaded.layout, "cpu")
    packed.forward([Row(other, some_ids(7, seed=1) + some_ids(90))])
    moved_L2HND = rope.rotate(bare_L2HND, range(7, 97))
    torch.testing.assert_close(moved_L2HND[0], other.view()[0, :, :, 7:], rtol=0, atol=1e-4)
    assert not torch.allclose(moved_L2HND[1], other.view()[1, :, :, 7:], rtol=0, atol=1e-3)


def test_rotating_copies_and_keeps_the_values():
    loaded = Reference(CONFIGS["llama"]).loaded()
    kv_L2HND = torch.randn(loaded.layout.shape(5))
    kept_L2HND = kv_L2HND.clone()
    moved_L2HND = Rope(loaded.model).rotate(kv_L2HND[:, :, :, :4], range(3, 7))
    assert torch.equal(kv_L2HND, kept_L2HND)
    assert torch.equal(moved_L2HND[:, 1], kv_L2HND[:, 1, :, :4])
    with pytest.raises(ValueError, match="positions"):
        Rope(loaded.model).rotate(kv_L2HND, range(4))


@pytest.mark.parametrize(
    ("family", "words"),
    [("window", "sliding window of 24"), ("dynamic", "depends on the length"), ("latent", "MLA")],
)
def test_other_attention_is_exact_only_and_says_why(family, words):
    assert words in Reference(EXACT_ONLY[family]).loaded().why_not


def test_a_model_that_rotates_otherwise_is_found_out():
    reference = Reference(CONFIGS["llama"])
    attention = reference.model.model.layers[2].self_attn
    attention.register_forward_pre_hook(_turn_twice, with_kwargs=True)
    assert "aren't rotated" in compose_refusal(reference.model)


def _turn_twice(module, args, kwargs):
    cos, sin = kwargs["position_embeddings"]
    return args, kwargs | {"position_embeddings": (cos**2 - sin**2, 2 * sin * cos)}
