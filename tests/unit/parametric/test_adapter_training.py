"""The trainer at a tiny scale: resume, cancel, early end, and what an adapter is on disk."""

import json
from dataclasses import replace

import pytest
import torch
from peft import PeftModel

from memcube.chat.prompt import DEFAULT_SYSTEM
from memcube.errors import BadRequest, Conflict, Corrupt
from memcube.parametric.engines import Workers
from memcube.parametric.packing import Encoder
from memcube.parametric.recipe import Recipe
from memcube.parametric.training import AdapterTrainer, Outcome, export_adapter, plan_steps
from tests.unit.parametric.small import small_data, small_model

RECIPE = Recipe(
    rank=4,
    alpha=8,
    lr=1e-2,
    steps=8,
    decay_steps=3,
    warmup_steps=1,
    row_tokens=300,
    rows=2,
    replay_tokens=200,
    check_steps=0,
    checkpoint_steps=2,
    autocast=False,
)


def trainer(folder, recipe=RECIPE, **given) -> AdapterTrainer:
    return AdapterTrainer(small_model(), small_data(), recipe, folder, **given)


def weights(trained: AdapterTrainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trained.model.named_parameters() if p.requires_grad}


def test_training_lowers_the_loss_and_leaves_the_base_as_it_was(tmp_path):
    one = trainer(tmp_path, replace(RECIPE, steps=12))
    base = small_model().model.state_dict()
    history = one.train().history
    assert len(history) == 12
    assert history[-1][1] < history[0][1]
    for name, value in one.model.get_base_model().state_dict().items():
        plain = name.replace(".base_layer", "")
        if "lora_" not in name:
            torch.testing.assert_close(value, base[plain], atol=0, rtol=0)


def test_the_same_seed_gives_the_same_weights(tmp_path):
    one, two = trainer(tmp_path / "1"), trainer(tmp_path / "2")
    assert one.train() == two.train()
    for a, b in zip(weights(one).values(), weights(two).values(), strict=True):
        assert torch.equal(a, b)


def test_a_run_that_was_stopped_goes_on_to_the_same_end(tmp_path):
    undisturbed = trainer(tmp_path / "1")
    expected = undisturbed.train()
    calls = iter([False] * 5 + [True])
    stopped = trainer(tmp_path / "2", should_stop=lambda: next(calls)).train()
    assert (stopped.outcome, stopped.step) == (Outcome.CANCELLED, 5)
    resumed = trainer(tmp_path / "2")
    assert resumed.train() == expected
    for a, b in zip(weights(undisturbed).values(), weights(resumed).values(), strict=True):
        assert torch.equal(a, b)


def test_a_crash_between_checkpoints_ends_the_same(tmp_path):
    class Crash(Exception):
        pass

    def crash(progress):
        if progress.step == 5:
            raise Crash

    expected = trainer(tmp_path / "1").train()
    with pytest.raises(Crash):
        trainer(tmp_path / "2", progress=crash).train()
    (tmp_path / "2" / ".step-000006").mkdir()  # as a crash while saving leaves it
    assert trainer(tmp_path / "2").train() == expected


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    trainer(tmp_path).train()
    with pytest.raises(Conflict, match="recipe"):
        trainer(tmp_path, replace(RECIPE, lr=1e-3)).train()


def test_a_broken_checkpoint_is_told(tmp_path):
    trainer(tmp_path).train()
    (max(tmp_path.glob("step-*")) / "state.json").write_text("{")
    with pytest.raises(Corrupt):
        trainer(tmp_path).train()


def test_the_last_two_checkpoints_are_kept(tmp_path):
    trainer(tmp_path).train()
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-000006", "step-000008"]


def test_the_rate_falls_as_soon_as_a_check_passes(tmp_path):
    recipe = replace(RECIPE, steps=20, check_steps=2, first_check=4)
    seen = []
    trained = trainer(tmp_path, recipe, check=lambda model: True, progress=seen.append).train()
    assert trained.step == 4 + recipe.decay_steps
    assert [p.lr < recipe.lr for p in seen] == [False] * 5 + [True] * 2
    assert seen[-1].num_steps == trained.step


def test_the_kl_term_holds_the_adapter_nearer_to_the_base(tmp_path):
    recipe = replace(RECIPE, steps=12)
    loose = trainer(tmp_path / "1", replace(recipe, kl_weight=0.01)).train().history
    tight = trainer(tmp_path / "2", replace(recipe, kl_weight=10.0)).train().history
    assert tight[-1][2] < loose[-1][2]


def distance_from_told(one: AdapterTrainer) -> float:
    """KL of the answers to those of the base that is told the memories, a token."""
    loaded = small_model()
    encoder = Encoder(loaded.tokenizer, system=DEFAULT_SYSTEM)
    found = []
    one.model.eval()
    for example in small_data().examples:
        told = encoder.told(example)
        if told is None:
            continue
        own = encoder.segment(example)
        ids = torch.tensor([[*encoder.prefix, *own.ids]])
        learned = slice(-own.num_learned - 1, -1)
        with torch.no_grad():
            of_own = one.model(input_ids=ids).logits[0, learned].log_softmax(-1)
            with one.model.disable_adapter():
                of_told = one.model(input_ids=torch.tensor([told.ids])).logits[0, learned]
        target = of_told.log_softmax(-1)
        found.append((target.exp() * (target - of_own)).sum(-1).mean().item())
    return sum(found) / len(found)


def test_distilling_brings_the_answers_nearer_to_those_of_the_base_that_is_told(tmp_path):
    recipe = replace(RECIPE, steps=12)
    plain, distilled = (
        trainer(tmp_path / str(weight), replace(recipe, distil_weight=weight))
        for weight in (0.0, 20.0)
    )
    assert plain.train().history[0][1:] == pytest.approx(distilled.train().history[0][1:])
    assert distance_from_told(distilled) < 0.8 * distance_from_told(plain)


def test_what_is_exported_is_what_the_model_then_computes(tmp_path):
    one = trainer(tmp_path / "run")
    one.train()
    size = export_adapter(one.model, tmp_path / "out")
    assert size == (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == RECIPE.rank
    again = PeftModel.from_pretrained(small_model().model, str(tmp_path / "out"))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        torch.testing.assert_close(again(ids).logits, one.model(ids).logits)


def test_rows_that_workers_cannot_share_are_refused(tmp_path):
    with pytest.raises(BadRequest, match="3 workers"):
        trainer(tmp_path, workers=Workers(0, 3))


def test_each_pass_reads_every_example_once():
    recipe = Recipe(steps=6, rows=1, row_tokens=30, replay_tokens=0)
    steps = plan_steps([10] * 6, [5], recipe, prefix=10)
    read = [index for step in steps for micro in step for index in micro.examples]
    assert sorted(read[:6]) == sorted(read[6:]) == list(range(6))
    assert read[:6] != read[6:]


def test_some_layers_alone_can_be_adapted(tmp_path):
    one = trainer(tmp_path, replace(RECIPE, layers=0.5))
    assert all(".layers.1." in name for name in weights(one))


def test_more_facts_take_more_steps_and_what_is_given_stays():
    assert Recipe.for_facts(20) == Recipe()
    assert Recipe.for_facts(100).steps < 5 * Recipe.for_facts(20).steps
    given = Recipe.for_facts(20, steps=30, lr=1e-3)
    assert (given.steps, given.decay_steps, given.lr) == (30, 16, 1e-3)


def test_a_model_with_an_attention_of_its_own_is_trained_with_the_mask(tmp_path, monkeypatch):
    calls = []

    def otherwise(*args, memcube_blocks=None, **kwargs):
        calls.append(memcube_blocks)
        query = args[1]
        return torch.zeros_like(query).transpose(1, 2), None

    monkeypatch.setattr("memcube.parametric.packed_attention._attend", otherwise)
    expected = trainer(tmp_path / "1").train()
    assert len(calls) == 2  # the two layers, once, to compare
    monkeypatch.undo()
    found = trainer(tmp_path / "2").train()
    for one, two in zip(expected.history, found.history, strict=True):
        assert one == pytest.approx(two, rel=1e-3, abs=1e-5)
