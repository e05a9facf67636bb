"""Adapters on a model for a while: what they compute, and that nothing of them stays."""

from dataclasses import replace

import pytest
import torch

from memcube.errors import BadRequest, Conflict
from memcube.parametric.attaching import attached, factors_of
from memcube.parametric.weights import LoraPair
from tests.unit.parametric.small import small_model
from tests.unit.parametric.tiny_adapters import random_adapter

IDS = torch.tensor([[3, 50, 200, 7]])


def adapter(loaded, **given):
    return random_adapter(loaded.model, base=loaded.fingerprint, **given)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


def state_of(model):
    """All by which one would notice that a model was changed."""
    return (
        {name: id(module) for name, module in model.named_modules()},
        {name: module.training for name, module in model.named_modules()},
        {name: (id(p), p.requires_grad) for name, p in model.named_parameters()},
        set(vars(model)),
        {name: len(module._forward_hooks) for name, module in model.named_modules()},
        torch.get_rng_state().tolist(),
    )


@pytest.fixture
def loaded():
    return small_model()


def test_an_attached_adapter_adds_its_scaled_product_to_its_layers(loaded):
    weights = adapter(loaded, kinds=("q_proj", "down_proj"))
    with attached(loaded, {"one": weights}) as model:
        found = logits(model)
    changed = small_model().model
    with torch.no_grad():
        for name, (a_RI, b_OR) in weights.pairs.items():
            layer = changed.get_submodule(name)
            layer.weight += weights.alpha / weights.rank * b_OR @ a_RI
    torch.testing.assert_close(found, logits(changed), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, logits(loaded.model), atol=1e-2)


def test_of_several_the_first_is_active(loaded):
    one, two = adapter(loaded, seed=1), adapter(loaded, seed=2, rank=2)
    with attached(loaded, {"one": one}) as model:
        expected = logits(model)
    with attached(loaded, {"one": one, "two": two}) as model:
        assert torch.equal(logits(model), expected)
        for name, pair in factors_of(model, "two").items():
            assert torch.equal(pair.a_RI, two.pairs[name].a_RI)
            assert torch.equal(pair.b_OR, two.pairs[name].b_OR)


def test_the_model_is_afterwards_as_it_was(loaded):
    loaded.model.train()
    loaded.model.model.layers[0].requires_grad_(True)
    before, said = state_of(loaded.model), logits(loaded.model)
    with attached(loaded, {"one": adapter(loaded), "two": adapter(loaded, seed=1)}) as model:
        assert not model.training
        model.generate(input_ids=IDS, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert state_of(loaded.model) == before
    assert torch.equal(logits(loaded.model), said)


def test_the_model_is_as_it_was_behind_an_error(loaded):
    before = state_of(loaded.model)
    with pytest.raises(KeyError), attached(loaded, {"one": adapter(loaded)}):
        raise KeyError
    assert state_of(loaded.model) == before


def test_a_wrapping_that_fails_half_way_leaves_the_model_as_it_was(loaded, monkeypatch):
    before, calls = state_of(loaded.model), []

    def add_adapter(self, name, config):
        calls.append(name)
        raise RuntimeError

    monkeypatch.setattr("peft.PeftModel.add_adapter", add_adapter)
    both = {"one": adapter(loaded), "two": adapter(loaded)}
    with pytest.raises(RuntimeError), attached(loaded, both):
        pytest.fail("it was attached")
    assert calls == ["two"]
    assert state_of(loaded.model) == before


def test_layers_are_found_by_their_whole_names(loaded):
    weights = adapter(loaded, kinds=("q_proj",))
    first = {name: pair for name, pair in weights.pairs.items() if ".0." in name}
    with attached(loaded, {"one": replace(weights, pairs=first)}) as model:
        assert factors_of(model, "one").keys() == first.keys()


def test_an_adapter_of_another_base_is_refused(loaded):
    other = replace(adapter(loaded), base="f" * 64)
    with pytest.raises(Conflict, match="trained on model ffff"), attached(loaded, {"one": other}):
        pytest.fail("it was attached")


@pytest.mark.parametrize(
    ("name", "columns", "word"),
    [
        ("model.layers.7.self_attn.q_proj", 64, "no linear layer"),
        ("model.norm", 64, "no linear layer"),
        ("model.layers.0.self_attn.q_proj", 63, "another shape"),
    ],
)
def test_layers_that_the_model_does_not_have_are_refused(loaded, name, columns, word):
    pairs = {name: LoraPair(torch.ones(4, columns), torch.ones(64, 4))}
    weights = replace(adapter(loaded), pairs=pairs)
    with pytest.raises(BadRequest, match=word), attached(loaded, {"one": weights}):
        pytest.fail("it was attached")


def test_a_model_with_an_adapter_gets_no_other_and_keeps_its_own(loaded):
    weights = adapter(loaded)
    with attached(loaded, {"one": weights}) as model:
        expected = logits(model)
        with pytest.raises(Conflict, match="already"), attached(loaded, {"two": weights}):
            pytest.fail("it was attached")
        assert torch.equal(logits(model), expected)


def test_no_adapter_is_none_to_attach(loaded):
    with pytest.raises(BadRequest), attached(loaded, {}):
        pytest.fail("it was attached")
